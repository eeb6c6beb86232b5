"""TiltedPolicy against closed forms, Monte Carlo and exact symmetries."""

from __future__ import annotations

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import infalign as ia
from infalign.transforms import RewardTransform


class Changed(RewardTransform):
    """Another transform, shifted, or read from the other end (and then decreasing)."""

    def __init__(self, base, shift=0.0, mirror=False):
        self.base, self.shift, self.mirror = base, shift, mirror

    label = "changed"

    def _value(self, u):
        return self.base(1.0 - u) if self.mirror else self.base(u) + self.shift

    def to_dict(self):
        raise NotImplementedError


@pytest.mark.parametrize("n", [1.5, 2, 4, 37, 1000, 10_000])
def test_log_is_the_best_of_n_distribution(n):
    tilt = ia.TiltedPolicy(ia.Log(), beta=1 / (n - 1))
    assert tilt.kl == pytest.approx(np.log(n) - (n - 1) / n, abs=1e-9)
    assert tilt.log_partition == pytest.approx(-np.log(n), abs=1e-9)
    assert tilt.win_rate(ia.Standard()) == pytest.approx(n / (n + 1), abs=1e-9)
    # Best-of-M of the Best-of-n distribution has CDF u^(nM), against u^m.
    assert tilt.win_rate(ia.BestOfN(7), opponent=ia.BestOfN(5)) == pytest.approx(7 * n / (7 * n + 5), abs=1e-9)
    u = np.linspace(0, 1, 51)
    np.testing.assert_allclose(tilt.cdf(u), u**n, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(tilt.density(u), n * u ** (n - 1), rtol=1e-9, atol=1e-290)
    np.testing.assert_allclose(tilt.quantile(u), u ** (1 / n), atol=1e-11)


@pytest.mark.parametrize("beta", [100.0, 1.0, 0.1, 0.01, 1e-3, 1e-5])
def test_identity_is_a_truncated_exponential(beta):
    tilt = ia.TiltedPolicy(ia.Identity(), beta)
    mean = -1.0 / np.expm1(-1.0 / beta) - beta
    assert tilt.win_rate(ia.Standard()) == pytest.approx(mean, abs=1e-9)
    assert tilt.kl == pytest.approx(mean / beta - ia.Identity().log_partition(beta), abs=1e-9)
    u = np.array([0.0, 0.3, 0.99, 0.99999, 1.0])
    exact = (np.exp((u - 1) / beta) - np.exp(-1 / beta)) / -np.expm1(-1 / beta)
    np.testing.assert_allclose(tilt.cdf(u), exact, atol=1e-11)


@given(t=st.floats(-50, 50), beta=st.floats(0.01, 10), shift=st.floats(-100, 100))
@settings(max_examples=25, deadline=None)
def test_a_constant_added_to_the_transform_changes_nothing(t, beta, shift):
    base, moved = ia.TiltedPolicy(ia.Exponential(t), beta), ia.TiltedPolicy(Changed(ia.Exponential(t), shift), beta)
    objective = [tilt.win_rate(ia.BestOfN(4)) - beta * tilt.kl for tilt in (base, moved)]
    assert objective[1] == pytest.approx(objective[0], abs=1e-8)
    assert moved.log_partition == pytest.approx(base.log_partition + shift / beta, abs=1e-8)


@given(t=st.floats(-50, 50), beta=st.floats(0.01, 10), n=st.integers(1, 64))
@settings(max_examples=25, deadline=None)
def test_best_and_worst_mirror_each_other(t, beta, n):
    tilt, mirror = (
        ia.TiltedPolicy(ia.Exponential(t), beta),
        ia.TiltedPolicy(Changed(ia.Exponential(t), mirror=True), beta),
    )
    # A decreasing transform's largest value is at 0, so only the plain quantities are compared.
    assert mirror.kl == pytest.approx(tilt.kl, abs=1e-8)
    assert mirror.win_rate(ia.WorstOfN(n)) == pytest.approx(1 - tilt.win_rate(ia.BestOfN(n)), abs=1e-8)


@given(t=st.floats(-300, 300), beta=st.floats(1e-3, 100))
@settings(max_examples=40, deadline=None)
def test_kl_is_not_negative_and_shrinks_with_beta(t, beta):
    kl = ia.TiltedPolicy(ia.Exponential(t), beta).kl
    assert kl >= 0
    assert ia.TiltedPolicy(ia.Exponential(t), 2 * beta).kl <= kl + 1e-12


@pytest.mark.parametrize("procedure", [ia.Standard(), ia.BestOfN(4), ia.WorstOfN(4), ia.OrderStatistic(k=2, n=3)])
def test_win_rate_agrees_with_playing_it_out(procedure):
    rng = np.random.default_rng(5)
    tilt, games, n = ia.TiltedPolicy(ia.Exponential(6.0), 0.2), 100_000, procedure.n
    index = {"Standard": 0, "BestOfN": n - 1, "WorstOfN": 0, "OrderStatistic": getattr(procedure, "k", 1) - 1}
    pick = index[type(procedure).__name__]
    ours = np.sort(tilt.quantile(rng.random((games, n))), axis=1)[:, pick]
    theirs = np.sort(rng.random((games, n)), axis=1)[:, pick]
    won = (ours > theirs).mean()
    win_rate = tilt.win_rate(procedure)
    # Five standard errors: false alarm rate 6e-7.
    assert abs(won - win_rate) < 5 * np.sqrt(win_rate * (1 - win_rate) / games)


def test_quantile_inverts_cdf_everywhere():
    tilt = ia.TiltedPolicy(ia.Exponential(-20.0), 0.01)
    p = np.concatenate([[0.0], np.geomspace(1e-12, 0.5, 40), 1 - np.geomspace(1e-12, 0.4, 40)[::-1], [1.0]])
    np.testing.assert_allclose(tilt.cdf(tilt.quantile(p)), p, atol=1e-12)


@pytest.mark.parametrize("transform", ["identity", ia.Identity, None])
def test_refuses_what_is_no_transform(transform):
    with pytest.raises(ia.InputError, match="not a transform"):
        ia.TiltedPolicy(transform, 0.1)


def test_the_kl_of_the_reference_itself_is_not_negative():
    for beta in (1e8, 1e12, 1e300):
        assert 0 <= ia.TiltedPolicy(ia.Identity(), beta).kl < 1e-15
        assert 0 <= ia.optimal_transform(ia.WorstOfN(4), beta).kl < 1e-15


def test_a_tilt_survives_pickling():
    tilt = ia.optimal_transform(ia.BestOfN(4), 0.2).tilt
    assert pickle.loads(pickle.dumps(tilt)).kl == pytest.approx(tilt.kl, abs=1e-8)


@pytest.mark.parametrize(
    "call", [lambda tilt: tilt.cdf(1.5), lambda tilt: tilt.quantile(-0.1), lambda tilt: tilt.density(np.nan)]
)
def test_refuses_values_outside_the_unit_interval(call):
    with pytest.raises(ia.InputError, match="outside"):
        call(ia.TiltedPolicy(ia.Identity(), 0.1))
