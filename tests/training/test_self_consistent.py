"""The self-consistent transform: right derivative, right fixed point, exact normaliser."""

import numpy as np
import pytest

from infalign.procedures import BestOfN, Mixture, Standard, WorstOfN
from infalign.theory.optimal import optimal_transform
from infalign.training.self_consistent import CELLS, SelfConsistentTransform


def test_at_the_reference_it_is_the_derivative_of_the_win_rate_there():
    """F̂ = u: R(u) = ∫ 16 v^6 dv for Best-of-4, 16 (1 − (1−u)^7) / 7 for Worst-of-4, u for standard sampling."""
    u = np.linspace(0, 1, CELLS + 1)
    assert SelfConsistentTransform(BestOfN(4)).value() == pytest.approx(16 * u**7 / 7, abs=2e-5)
    assert SelfConsistentTransform(WorstOfN(4)).value() == pytest.approx(16 * (1 - (1 - u) ** 7) / 7, abs=2e-5)
    assert SelfConsistentTransform(Standard()).value() == pytest.approx(u, abs=1e-12)


@pytest.mark.parametrize("procedure", [BestOfN(4), WorstOfN(4), Mixture([(0.5, Standard()), (0.5, BestOfN(8))])])
def test_its_fixed_point_is_the_optimal_transform(procedure):
    """Fed with draws from the optimum, it gives the optimum's own transform (M9)."""
    best = optimal_transform(procedure, beta=0.2)
    transform = SelfConsistentTransform(procedure, memory=0.0)
    num_ref = 100_000  # so that a rank is a quantile
    quantiles = best.tilt.quantile((np.arange(20_000) + 0.5) / 20_000)
    transform.update(np.floor(quantiles * num_ref), np.full(20_000, num_ref))
    u = np.linspace(0, 1, CELLS + 1)
    assert transform.value() == pytest.approx(best.transform(u) - best.transform(0.0), abs=2e-3)


def test_an_ideal_policy_that_follows_it_settles_at_the_optimum():
    """Damped updates from the reference, each time tilting by the present transform: W − βKL ends at the optimum's."""
    beta, procedure = 0.2, BestOfN(4)
    transform = SelfConsistentTransform(procedure, memory=0.9)
    middles = (np.arange(CELLS) + 0.5) / CELLS
    num_ref = 100_000
    for _ in range(150):
        value = transform.value()
        weights = np.exp(((value[1:] + value[:-1]) / 2 - value[-1]) / beta)
        drawn = np.random.default_rng(0).choice(CELLS, 4096, p=weights / weights.sum())
        transform.update(np.floor(middles[drawn] * num_ref), np.full(4096, num_ref))
    best = optimal_transform(procedure, beta=beta)
    assert transform.cdf == pytest.approx(best.tilt.cdf(np.linspace(0, 1, CELLS + 1)), abs=0.03)


@pytest.mark.parametrize("num_ref", [1, 4, 64])
def test_the_normaliser_is_exact_at_any_number_of_references(num_ref):
    """The mean of exp(Φ_K/β) over ranks is ∫ exp(Φ/β) du on the cells (M6)."""
    transform = SelfConsistentTransform(BestOfN(4))
    value = transform.value() / 0.1
    integral = np.exp((value[1:] + value[:-1]) / 2).mean()
    assert np.exp(transform.tilt_by_rank(num_ref, 0.1)).mean() == pytest.approx(integral)


def test_ranks_of_the_reference_leave_the_distribution_uniform():
    transform = SelfConsistentTransform(WorstOfN(2), memory=0.5)
    for _ in range(5):
        transform.update(np.arange(9.0), np.full(9, 8))  # each rank once
    assert transform.cdf == pytest.approx(np.linspace(0, 1, CELLS + 1))


def test_it_survives_its_description():
    again = SelfConsistentTransform.from_dict(SelfConsistentTransform(WorstOfN(3), memory=0.7).to_dict())
    assert (again.procedure, again.memory) == (WorstOfN(3), 0.7)
