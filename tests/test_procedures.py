"""Single procedures: hand-worked values, refusals, and fitting a black box."""

from __future__ import annotations

import json
from dataclasses import dataclass

import numpy as np
import pytest

import infalign as ia
from infalign.procedures import InferenceProcedure, procedure_from_dict


def test_hand_worked_values():
    assert ia.BestOfN(3).distortion(0.5) == pytest.approx(1 / 8)
    assert ia.WorstOfN(3).distortion(0.5) == pytest.approx(7 / 8)
    assert ia.OrderStatistic(k=2, n=3).distortion(0.5) == pytest.approx(0.5)
    assert ia.OrderStatistic(k=2, n=3).density(0.5) == pytest.approx(1.5)
    np.testing.assert_allclose(ia.BestOfN(2).selection_weights(4), [0, 1 / 6, 2 / 6, 3 / 6], atol=1e-15)
    np.testing.assert_allclose(ia.WorstOfN(2).selection_weights(4), [3 / 6, 2 / 6, 1 / 6, 0], atol=1e-15)
    np.testing.assert_allclose(ia.OrderStatistic(k=2, n=3).selection_weights(5), [0, 0.3, 0.4, 0.3, 0], atol=1e-15)


def test_labels():
    labels = [ia.OrderStatistic(k=k, n=30).label for k in (1, 2, 3, 4, 11, 12, 13, 21)]
    assert labels == [f"{k} of 30" for k in ("1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st")]
    assert ia.BestOfN(4).label == "Best-of-4"


@pytest.mark.parametrize("n", [0, -1, 2.5, "4", True, None])
@pytest.mark.parametrize("make", [ia.BestOfN, ia.WorstOfN, lambda n: ia.OrderStatistic(k=1, n=n)])
def test_n_must_be_a_whole_number_of_at_least_one(make, n):
    with pytest.raises(ia.InputError, match="whole number"):
        make(n)


def test_numpy_integers_are_numbers():
    assert ia.BestOfN(np.int64(4)) == ia.BestOfN(4)


def test_order_statistic_refuses_k_above_n():
    with pytest.raises(ia.InputError, match="more than n"):
        ia.OrderStatistic(k=4, n=3)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([], "sum"),
        ([(1.0, "best-of-4")], "not a procedure"),
        ([(ia.Standard(), 1.0)], "not a pair"),
        ((1.0, ia.Standard()), "not a pair"),
        ([("half", ia.Standard())], "not a pair"),
        ([(0.5, ia.Standard())], "sum"),
        ([(-1.0, ia.Standard()), (2.0, ia.Standard())], "not positive"),
    ],
)
def test_mixture_refuses_weights_that_are_no_weights(parts, message):
    with pytest.raises(ia.InputError, match=message):
        ia.Mixture(parts)


def test_mixture_of_mixtures_is_flat():
    inner = ia.Mixture([(0.5, ia.Standard()), (0.5, ia.BestOfN(2))])
    assert ia.Mixture([(0.5, inner), (0.5, ia.WorstOfN(3))]).components == (
        (0.25, ia.Standard()),
        (0.25, ia.BestOfN(2)),
        (0.5, ia.WorstOfN(3)),
    )


@pytest.mark.parametrize(
    ("description", "message"),
    [
        ({"kind": "beam"}, "unknown procedure kind"),
        ({"n": 4}, "unknown procedure kind"),
        ({"kind": "best-of-n"}, "whole number"),
        ({"kind": "best-of-n", "n": 4, "m": 3}, "does not fit"),
        ({"kind": "order-statistic", "n": 4}, "does not fit"),
        ({"kind": "mixture"}, "does not fit"),
        ({"kind": "mixture", "parts": [{"weight": 1.0}]}, "does not fit"),
        ({"kind": "mixture", "parts": [{"weight": 1.0, "procedure": "standard"}]}, "does not describe"),
        ({"kind": "fitted", "weights": "x", "num_samples": 3}, "not a number"),
        ("best-of-4", "does not describe"),
        (None, "does not describe"),
        ([1], "does not describe"),
    ],
)
def test_procedure_from_dict_names_what_is_wrong(description, message):
    with pytest.raises(ia.InputError, match=message):
        ia.procedure_from_dict(description)


@dataclass(frozen=True)
class Own(InferenceProcedure):
    """A procedure whose H and h the test chooses."""

    high: float = 1.0
    slope: float = 1.0
    dip: float = 0.0

    def distortion(self, q):
        q = np.asarray(q, dtype=float)
        return self.high * q - self.dip * np.sin(2 * np.pi * q)

    def density(self, q):
        q = np.asarray(q, dtype=float)
        return self.slope * self.high - 2 * np.pi * self.dip * np.cos(2 * np.pi * q)


@pytest.mark.parametrize(
    ("procedure", "message"),
    [
        (Own(high=0.9), r"H\(1\) is 0\.9"),
        (Own(slope=1.3), "not the derivative"),
        (Own(dip=0.3), "decreases"),
    ],
)
def test_a_procedure_that_is_no_distortion_is_refused_before_anything_is_solved(procedure, message):
    with pytest.raises(ia.InputError, match=message):
        ia.check_procedure(procedure)
    with pytest.raises(ia.InputError, match=message):
        ia.optimal_transform(procedure, beta=0.1)


def test_a_procedure_of_ones_own_is_solved_like_any_other():
    own = ia.optimal_transform(Own(), beta=0.1)
    assert own.win_rate == pytest.approx(ia.optimal_transform(ia.Standard(), beta=0.1).win_rate, abs=1e-10)
    with pytest.raises(ia.InputError, match="to_dict"):
        own.procedure.to_dict()


class Flattens(Own):
    """Right on a vector, but loses the shape of a matrix."""

    def density(self, q):
        return np.ones(np.size(q))


def test_a_density_that_loses_the_shape_of_its_argument_is_refused():
    with pytest.raises(ia.InputError, match="shape of a matrix"):
        ia.check_procedure(Flattens())


@dataclass(frozen=True)
class UpperHalf(InferenceProcedure):
    """Never returns anything from the lower half: h has a kink (power 2) or a jump (power 1) at one half."""

    power: int

    def distortion(self, q):
        return np.maximum(0.0, 2.0 * np.asarray(q, dtype=float) - 1.0) ** self.power

    def density(self, q):
        base = 2.0 * np.asarray(q, dtype=float) - 1.0
        return np.where(base > 0, 2.0 * self.power * np.maximum(base, 0.0) ** (self.power - 1), 0.0)


def test_a_kink_is_resolved_and_a_jump_is_refused():
    best = ia.optimal_transform(UpperHalf(power=2), 0.1)
    assert best.residual < 1e-8
    assert best.tilt.win_rate(UpperHalf(power=2)) == pytest.approx(best.win_rate, abs=1e-10)
    with pytest.raises(ia.InputError, match="density h jumps"):
        ia.optimal_transform(UpperHalf(power=1), 0.1)


def test_fitting_finds_best_of_4_from_its_own_ranks():
    ranks = np.random.default_rng(0).random((3000, 4)).max(axis=1)
    fitted = ia.FittedProcedure.from_ranks(ranks)
    q = np.linspace(0, 1, 401)
    low, high = fitted.confidence_band(q, level=1 - 1e-6)  # the fit smooths; false alarm below 1e-6
    assert ((low <= q**4) & (q**4 <= high)).all()
    gap = ia.optimal_transform(fitted, 0.1).win_rate - ia.optimal_transform(ia.BestOfN(4), 0.1).win_rate
    assert abs(gap) < 0.01
    spread = np.std([refit.distortion(0.8) for refit in fitted.bootstrap(12)], ddof=1)
    assert 0.0 < spread < 3.0 * fitted.standard_error(0.8)


def test_fitting_a_noisy_verifier_agrees_with_simulating_it():
    rng = np.random.default_rng(1)
    rewards = rng.normal(size=(40_000, 4))
    chosen = rewards[np.arange(40_000), (rewards + rng.normal(size=rewards.shape)).argmax(axis=1)]
    from scipy.stats import norm

    ranks = norm.cdf(chosen)
    fitted = ia.FittedProcedure.from_ranks(ranks[:4000])
    q = np.linspace(0, 1, 201)
    truth = np.searchsorted(np.sort(ranks[4000:]), q) / 36_000
    margin = np.sqrt(np.log(2 / 1e-6) / 2) * (1 / np.sqrt(4000) + 1 / np.sqrt(36_000))  # false alarm below 2e-6
    assert np.abs(fitted.distortion(q) - truth).max() < margin


def test_noise_of_finite_reference_ranks_is_not_mistaken_for_the_procedure():
    rng = np.random.default_rng(2)
    counts = rng.binomial(16, rng.random((4000, 8)).max(axis=1))
    q = np.linspace(0, 1, 201)
    aware = np.abs(ia.FittedProcedure.from_ranks(counts / 16, num_ref=16).distortion(q) - q**8).max()
    naive = np.abs(ia.FittedProcedure.from_ranks(counts / 16).distortion(q) - q**8).max()
    assert aware < 0.025 < naive


@pytest.mark.parametrize("num_ref", [None, 16])
def test_the_band_holds_what_order_statistics_cannot_follow(num_ref):
    # A procedure uniform on the top tenth. Three data sets at a level of 99.9 %: false alarm 0.003 (seeded).
    q = np.linspace(0, 1, 101)
    for seed in range(3):
        rng = np.random.default_rng(seed)
        ranks = 0.9 + 0.1 * rng.random(200)
        if num_ref is not None:
            ranks = rng.binomial(num_ref, ranks) / num_ref
        fitted = ia.FittedProcedure.from_ranks(ranks, num_ref=num_ref)
        low, high = fitted.confidence_band(q, level=0.999)
        truth = np.clip(10 * q - 9, 0, 1)
        assert ((low <= truth + 1e-9) & (truth <= high + 1e-9)).all()
        assert (low <= fitted.distortion(q)).all()
        assert (fitted.distortion(q) <= high).all()
        assert (np.diff(high) >= 0).all()
        if seed == 0:
            assert procedure_from_dict(json.loads(json.dumps(fitted.to_dict()))) == fitted


def test_the_error_of_few_references_takes_in_their_noise():
    rng = np.random.default_rng(3)
    counts = rng.binomial(8, rng.random((400, 4)).max(axis=1))
    fitted = ia.FittedProcedure.from_ranks(counts / 8, num_ref=8)
    level = fitted.distortion(0.8)
    assert fitted.standard_error(0.8) > 1.1 * np.sqrt(level * (1 - level) / 400)


@pytest.mark.parametrize(
    ("ranks", "message"),
    [(np.full(5, 0.5), "too few"), (np.append(np.full(30, 0.5), np.nan), "NaN"), (np.arange(30), "0, 1")],
)
def test_fitting_refuses_what_are_not_ranks(ranks, message):
    with pytest.raises(ia.InputError, match=message):
        ia.FittedProcedure.from_ranks(ranks)


@pytest.mark.parametrize("num_ref", [0, -1, 2.5, "16", True, np.nan])
def test_fitting_refuses_what_is_no_number_of_references(num_ref):
    with pytest.raises(ia.InputError, match="num_ref"):
        ia.FittedProcedure.from_ranks(np.linspace(0, 1, 33), num_ref=num_ref)


def test_fitting_refuses_ranks_that_do_not_fit_the_number_of_references():
    with pytest.raises(ia.InputError, match="multiple of 1/20"):
        ia.FittedProcedure.from_ranks(np.linspace(0, 1, 33), num_ref=10)
    float32 = np.linspace(0, 1, 33, dtype=np.float32)
    assert ia.FittedProcedure.from_ranks(float32, num_ref=32) == ia.FittedProcedure.from_ranks(
        np.arange(33) / 32, num_ref=32
    )


def test_fitting_asks_for_the_number_of_references_when_ranks_take_few_values():
    with pytest.raises(ia.InputError, match="only 1 value"):
        ia.FittedProcedure.from_ranks(np.ones(50))
    assert ia.FittedProcedure.from_ranks(np.ones(50), num_ref=4).distortion(0.5) < 0.1


@pytest.mark.parametrize(("weights", "message"), [((), "none"), ((0.5,), "sum"), ((2.0, -1.0), "negative")])
def test_fitted_weights_must_be_weights(weights, message):
    with pytest.raises(ia.InputError, match=message):
        ia.FittedProcedure(weights, 100)
