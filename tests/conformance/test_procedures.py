"""One table for all procedures: what every distortion must satisfy."""

from __future__ import annotations

import itertools
import json
import pickle
from dataclasses import dataclass

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import integrate

import infalign as ia
from infalign.procedures import InferenceProcedure


@dataclass(frozen=True)
class Softened(InferenceProcedure):
    """A user's own procedure: Best-of-2 for half of the requests."""

    def distortion(self, q):
        return 0.5 * np.asarray(q) ** 2 + 0.5 * np.asarray(q)

    def density(self, q):
        return np.asarray(q) + 0.5


PROCEDURES = [
    ia.Standard(),
    ia.BestOfN(1),
    ia.BestOfN(2),
    ia.BestOfN(4),
    ia.BestOfN(10_000),
    ia.WorstOfN(1),
    ia.WorstOfN(3),
    ia.WorstOfN(10_000),
    ia.OrderStatistic(k=1, n=1),
    ia.OrderStatistic(k=3, n=5),
    ia.OrderStatistic(k=50, n=100),
    ia.Mixture([(0.7, ia.Standard()), (0.3, ia.BestOfN(8))]),
    ia.Mixture([(0.5, ia.BestOfN(2)), (0.5, ia.Mixture([(0.5, ia.WorstOfN(4)), (0.5, ia.Standard())]))]),
    ia.FittedProcedure((0.1, 0.2, 0.7), 1000),
    ia.FittedProcedure((1.0,), 20),
    ia.EarlyStopping(8, 0.905),
    ia.EarlyStopping(7, 0.305, block=3),
    ia.EarlyStopping(4, 0.0, block=2),
    ia.EarlyStopping(4, 1.0),
    ia.EarlyStopping(6, 0.9, block=4, num_ref=20),
    ia.EarlyStopping(6, 0.0, num_ref=20),
    Softened(),
]
BUILT_IN = [procedure for procedure in PROCEDURES if not isinstance(procedure, Softened)]
# By rank among n: not where the order of drawing matters too.
RANKED = [
    procedure for procedure in PROCEDURES if procedure.n is not None and not isinstance(procedure, ia.EarlyStopping)
]
COUNTED = [procedure for procedure in RANKED if procedure.n <= 8]

every = pytest.mark.parametrize("procedure", PROCEDURES, ids=lambda procedure: procedure.label)
every_built_in = pytest.mark.parametrize("procedure", BUILT_IN, ids=lambda procedure: procedure.label)
every_counted = pytest.mark.parametrize("procedure", COUNTED, ids=lambda procedure: procedure.label)


@every
def test_is_a_distortion(procedure):
    ia.check_procedure(procedure)
    q = np.linspace(0.0, 1.0, 2001)
    distortion = procedure.distortion(q)
    assert distortion.dtype == np.float64
    assert distortion[0] == pytest.approx(0.0, abs=1e-12)
    assert distortion[-1] == pytest.approx(1.0, abs=1e-12)
    assert (np.diff(distortion) >= -1e-14).all()
    assert (procedure.density(q) >= 0).all()


@every
def test_density_integrates_to_the_distortion(procedure):
    for low, high in [(0.0, 1e-4), (1e-4, 0.3), (0.3, 0.9), (0.9, 0.9999), (0.9999, 1.0)]:
        mass, _ = integrate.quad(lambda q: float(procedure.density(q)), low, high, epsabs=1e-13, limit=400)
        assert mass == pytest.approx(float(procedure.distortion(high) - procedure.distortion(low)), abs=1e-9)


@every
def test_density_slope_is_the_derivative_of_the_density(procedure):
    q = np.linspace(0.01, 0.99, 99)
    step = 1e-6
    slope = (procedure.density(q + step) - procedure.density(q - step)) / (2 * step)
    assert procedure.density_slope(q) == pytest.approx(slope, rel=1e-4, abs=1e-4 * max(1.0, np.abs(slope).max()))


@every
def test_keeps_the_shape_of_its_argument(procedure):
    for q in (0.25, [0.25, 0.5], np.full((2, 3, 4), 0.25)):
        assert procedure.distortion(q).shape == np.shape(q)
        assert procedure.density(q).shape == np.shape(q)


@every
def test_is_hashable_picklable_and_equal_to_its_copy(procedure):
    copy = pickle.loads(pickle.dumps(procedure))
    assert copy == procedure
    assert hash(copy) == hash(procedure)
    assert repr(copy) == repr(procedure)


@every_built_in
def test_survives_json(procedure):
    assert ia.procedure_from_dict(json.loads(json.dumps(procedure.to_dict()))) == procedure


@every_built_in
@pytest.mark.parametrize("bad", [-0.1, 1.1, np.nan, [0.5, np.nan], "half", 0.5j])
def test_refuses_values_outside_the_unit_interval(procedure, bad):
    for method in (procedure.distortion, procedure.density, procedure.density_slope):
        with pytest.raises(ia.InputError, match=r"outside|real numbers"):
            method(bad)


@every
def test_components_are_a_mixture_that_gives_the_distortion(procedure):
    q = np.linspace(0, 1, 11)
    assert sum(weight for weight, _ in procedure.components) == pytest.approx(1.0)
    total = sum(weight * part.distortion(q) for weight, part in procedure.components)
    assert total == pytest.approx(procedure.distortion(q), abs=1e-12)


def chosen_index(procedure: InferenceProcedure, group: tuple[int, ...]) -> int:
    """What the procedure returns on a sorted group, by its definition."""
    match procedure:
        case ia.Standard():
            return group[0]
        case ia.BestOfN():
            return group[-1]
        case ia.WorstOfN():
            return group[0]
        case ia.OrderStatistic(k=k):
            return group[k - 1]
    raise AssertionError(procedure)


@every_counted
@pytest.mark.parametrize("m", [8, 10])
def test_selection_weights_match_an_enumeration_of_all_subsets(procedure, m):
    expected = np.zeros(m)
    for weight, part in procedure.components:
        groups = list(itertools.combinations(range(m), part.n))
        for group in groups:
            expected[chosen_index(part, group)] += weight / len(groups)
    assert procedure.selection_weights(m) == pytest.approx(expected, abs=1e-14)


@every
def test_selection_weights_follow_the_distortion_for_many_samples(procedure):
    # A fitted procedure draws no stated number, but is a mixture of order statistics of so many.
    n = len(procedure.weights) if isinstance(procedure, ia.FittedProcedure) else procedure.n
    if procedure not in RANKED and not isinstance(procedure, ia.FittedProcedure):
        with pytest.raises(ia.InputError, match=r"no finite number|stops by a quantile"):
            procedure.selection_weights(100)
        return
    m = 200_000
    weights = procedure.selection_weights(m)
    assert weights.shape == (m,)
    assert weights.sum() == pytest.approx(1.0, abs=1e-12)
    # Without replacement, the i-th of m has H(i/m) below it up to O(n/m) relative to one sample's share.
    gap = np.abs(np.cumsum(weights) - procedure.distortion(np.arange(1, m + 1) / m)).max()
    assert gap < 2.0 * n / m + 2e-5


@every_counted
def test_selection_weights_need_enough_samples(procedure):
    if procedure.n > 1:
        with pytest.raises(ia.InputError, match="fewer than"):
            procedure.selection_weights(procedure.n - 1)


@given(k=st.integers(1, 12), extra=st.integers(0, 12), q=st.floats(0, 1))
def test_order_statistics_mirror_each_other(k, extra, q):
    n = k + extra
    mirrored = 1.0 - ia.OrderStatistic(k=n - k + 1, n=n).distortion(1.0 - q)
    assert ia.OrderStatistic(k=k, n=n).distortion(q) == pytest.approx(mirrored, abs=1e-12)
    assert ia.OrderStatistic(k=n, n=n).distortion(q) == pytest.approx(ia.BestOfN(n).distortion(q), abs=1e-12)
    assert ia.OrderStatistic(k=1, n=n).distortion(q) == pytest.approx(ia.WorstOfN(n).distortion(q), abs=1e-12)
