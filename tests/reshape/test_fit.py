"""Fits of g against truth: enumerable policies and a direct optimiser, and predictions against a known channel."""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy import optimize

from infalign.calibration.calibrator import RewardCalibrator
from infalign.errors import InputError
from infalign.procedures import BestOfN, InferenceProcedure, Mixture, OrderStatistic, Standard, WorstOfN
from infalign.reshape import (
    Goal,
    Pool,
    Reshaping,
    ReshapingData,
    best_density,
    fit_reshaping,
    fit_reshaping_to,
    predict_reshaping,
)
from infalign.reshape.families import Increasing, knots_for
from infalign.reshape.optimise import Problem
from infalign.reshape.pool import Contest
from infalign.reshape.reshaping import Kind
from infalign.theory.winrate import Objective
from tests.reshape.channel import Channel


class Enumerated:
    """Two-token policies over a small vocabulary on a few prompts, every response with its exact probability."""

    def __init__(self, seed: int, *, vocabulary: int = 4, prompts: int = 2, ties: bool = False) -> None:
        rng = np.random.default_rng(seed)
        tokens = list(product(range(vocabulary), repeat=2))
        self.p_PS = np.zeros((prompts, len(tokens)))
        self.q_PS, self.reward_PS = np.zeros_like(self.p_PS), np.zeros_like(self.p_PS)
        for at in range(prompts):
            first, second = rng.dirichlet(np.full(vocabulary, 2.0)), rng.dirichlet(np.full(vocabulary, 2.0), vocabulary)
            self.p_PS[at] = [first[a] * second[a, b] for a, b in tokens]
            self.reward_PS[at] = rng.normal(size=len(tokens))
            if ties:
                self.reward_PS[at] = np.round(self.reward_PS[at])
            tilted = self.p_PS[at] * np.exp(1.2 * self.reward_PS[at] + rng.normal(0, 0.7, len(tokens)))
            self.q_PS[at] = tilted / tilted.sum()
        self.log_ratio_PS = np.log(self.q_PS / self.p_PS)
        self.pool = Pool.enumerated(self.p_PS, self.log_ratio_PS, self.reward_PS)

    def exact(self, log_density_PS: np.ndarray, procedure: InferenceProcedure) -> tuple[float, float]:
        """Win rate and KL with plain loops: distributions of both outputs over the levels of reward, ties ½."""
        win_rates, kls = [], []
        for p, log_density, reward in zip(self.p_PS, log_density_PS, self.reward_PS, strict=True):
            policy = p * np.exp(log_density - log_density.max())
            policy /= policy.sum()
            kls.append(float(policy @ np.log(policy / p)))
            levels = np.unique(reward)
            total = 0.0
            for weight, part in procedure.components:
                outputs = []
                for probability in (policy, p):
                    cdf = np.array([min(probability[reward <= level].sum(), 1.0) for level in levels])
                    outputs.append(np.diff(part.distortion(cdf), prepend=0.0))
                pairs = np.outer(*outputs)
                total += weight * (np.tril(pairs, -1).sum() + 0.5 * np.trace(pairs))
            win_rates.append(total)
        return float(np.mean(win_rates)), float(np.mean(kls))

    def objective(self, log_density_PS: np.ndarray, procedure: InferenceProcedure, beta: float) -> float:
        win_rate, kl = self.exact(log_density_PS, procedure)
        return win_rate - beta * kl

    def direct(self, procedure: InferenceProcedure, beta: float, seed: int = 0) -> float:
        """The highest J over increasing g, by SLSQP on its steps with numerical gradients, from several starts."""
        levels, place = np.unique(self.log_ratio_PS, return_inverse=True)
        place = place.reshape(self.log_ratio_PS.shape)

        def loss(steps: np.ndarray) -> float:
            return -self.objective(np.concatenate([[0.0], np.cumsum(steps)])[place], procedure, beta)

        rng = np.random.default_rng(seed)
        starts = [np.diff(levels), rng.exponential(2.0 / len(levels), len(levels) - 1)]
        found = [
            optimize.minimize(
                loss, start, method="SLSQP", bounds=[(0, 30)] * len(start), options={"maxiter": 100, "ftol": 1e-9}
            )
            for start in starts
        ]
        return -min(result.fun for result in found)

    def best_mixture(self, procedure: InferenceProcedure, beta: float) -> float:
        weights = np.linspace(0, 1, 201)
        return max(
            self.objective(np.log(1 - weight + weight * np.exp(self.log_ratio_PS)), procedure, beta)
            for weight in weights
        )


PROCEDURES = [
    BestOfN(4),
    WorstOfN(4),
    BestOfN(16),
    OrderStatistic(3, 5),
    Mixture([(0.5, Standard()), (0.5, BestOfN(8))]),
]


@pytest.mark.parametrize("procedure", PROCEDURES, ids=lambda procedure: procedure.label)
@pytest.mark.parametrize("beta", [0.1])
def test_fit_is_the_direct_optimum(procedure: InferenceProcedure, beta: float) -> None:
    case = Enumerated(3, vocabulary=3, prompts=2)
    reshaping, found = best_density(case.pool, Objective.of(procedure), beta=beta)
    log_density_PS = reshaping.log_density(case.log_ratio_PS)
    win_rate, kl = case.exact(log_density_PS, procedure)
    assert (found.win_rate, found.kl) == pytest.approx((win_rate, kl), abs=1e-9)
    value = win_rate - beta * kl
    assert value == pytest.approx(case.direct(procedure, beta), abs=1e-3)
    for other in (np.zeros_like(case.log_ratio_PS), case.log_ratio_PS):
        assert value >= case.objective(other, procedure, beta) - 1e-9
    assert value >= case.best_mixture(procedure, beta) - 1e-9


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("procedure", [BestOfN(16), WorstOfN(16)], ids=lambda procedure: procedure.label)
def test_budget_is_met_and_nothing_simpler_is_better(seed: int, procedure: InferenceProcedure) -> None:
    case = Enumerated(seed, vocabulary=4, ties=seed % 2 == 1)
    budget = 0.3
    reshaping, found = best_density(case.pool, Objective.of(procedure), kl_budget=budget)
    win_rate, kl = case.exact(reshaping.log_density(case.log_ratio_PS), procedure)
    assert kl == pytest.approx(budget, abs=1e-6)
    assert win_rate == pytest.approx(found.win_rate, abs=1e-9)
    mixture, of_mixture = best_density(case.pool, Objective.of(procedure), kl_budget=budget, kind="mixture")
    _, kl = case.exact(mixture.log_density(case.log_ratio_PS), procedure)
    assert kl <= budget + 1e-6
    assert win_rate >= of_mixture.win_rate - 1e-9
    # The geometric path through the aligned model, at the same KL.
    power = float(optimize.brentq(lambda c: case.exact(c * case.log_ratio_PS, procedure)[1] - budget, 1e-3, 20))  # pyright: ignore[reportArgumentType]
    assert win_rate >= case.exact(power * case.log_ratio_PS, procedure)[0] - 1e-9


@pytest.mark.parametrize("seed", range(3))
def test_best_of_n_is_the_same_from_every_start(seed: int) -> None:
    case = Enumerated(seed)
    family = Increasing(case.pool, knots_for(case.pool))
    problem = Problem(case.pool, Contest(case.pool, Objective.of(BestOfN(8))), family)
    rng = np.random.default_rng(seed)
    starts = [*family.starts, *rng.exponential(0.2, (5, len(family.lower)))]
    values = [problem.optimum(problem.climb(start, 0.1, steps=2000), 0.1).objective(0.1) for start in starts]
    assert np.ptp(values) < 1e-5


@pytest.mark.parametrize("kind", ["increasing", "mixture"])
def test_mixture_of_several_models_is_the_direct_optimum(kind: str) -> None:
    rng = np.random.default_rng(5)
    case = Enumerated(1)
    other = np.log(rng.permuted(case.q_PS, axis=1) / case.p_PS)
    better = np.log(case.p_PS * np.exp(3 * case.reward_PS))
    better -= np.log(np.exp(better).sum(axis=1, keepdims=True)) + np.log(case.p_PS)
    ratios_PSM = np.stack([case.log_ratio_PS, other, better], axis=2)
    pool = Pool.sorted_by(case.reward_PS, ratios_PSM, np.log(case.p_PS))
    procedure = BestOfN(4) if kind == "increasing" else WorstOfN(4)
    mixture, found = best_density(pool, Objective.of(procedure), beta=0.1, kind="mixture")
    assert sum(mixture.weights) <= 1 + 1e-9
    grid = [np.array(w) for w in product(np.linspace(0, 1, 11), repeat=3) if sum(w) <= 1 + 1e-9]
    direct = max(case.objective(np.log(1 - w.sum() + np.exp(ratios_PSM) @ w + 1e-300), procedure, 0.1) for w in grid)
    value = case.objective(mixture.log_density(ratios_PSM), procedure, 0.1)
    assert value == pytest.approx(found.objective(0.1), abs=1e-9)
    assert value >= direct - 1e-6
    assert value - direct < 1e-2  # the grid is coarse


def test_gradient_is_the_derivative() -> None:
    case = Enumerated(2, ties=True)
    for procedure in PROCEDURES:
        family = Increasing(case.pool, knots_for(case.pool))
        problem = Problem(case.pool, Contest(case.pool, Objective.of(procedure, WorstOfN(2))), family)
        theta = np.random.default_rng(0).uniform(0, 0.3, len(family.lower))
        tilted, *_ = problem.at(theta)
        gradient = problem.gradient(theta, tilted, 0.2)
        numerical = optimize.approx_fprime(theta, lambda t, p=problem: p.optimum(t, 0.2).objective(0.2), 1e-7)
        np.testing.assert_allclose(gradient, np.asarray(numerical), atol=1e-6)


def test_pool_knows_both_models_to_have_mass_one() -> None:
    rng = np.random.default_rng(0)
    pool = Pool.of(Channel.random(rng, 20, 2.0).draw(rng, 64, 32))
    weight_PS = np.exp(pool.log_weight_PS)
    np.testing.assert_allclose(weight_PS.sum(axis=1), 1.0)
    np.testing.assert_allclose((weight_PS * np.exp(pool.log_ratio)).sum(axis=1), 1.0, rtol=1e-6)
    flat = pool.tilted(np.zeros_like(pool.log_ratio))
    np.testing.assert_allclose(Contest(pool, Objective.of(BestOfN(16))).win_rate_P(flat.mass_PS), 0.5)


# At the nominal level an interval misses with probability 0.05: 5 or more misses of 20 happen with probability 0.003,
# in each of the six counts. Seeded.
@pytest.mark.parametrize(
    ("procedure", "shift", "kind"),
    [(BestOfN(8), 2.3, "reshaped"), (BestOfN(16), 2.3, "mixture"), (WorstOfN(8), 1.0, "reshaped")],
)
def test_predictions_cover_what_new_prompts_show(procedure: InferenceProcedure, shift: float, kind: Kind) -> None:
    misses = np.zeros(2)
    for repeat in range(20):
        rng = np.random.default_rng(repeat)
        data = Channel.random(rng, 32, shift).draw(rng, 64, 32)
        fitted = fit_reshaping_to(data, Goal(procedure, beta=0.2), kind=kind)
        kl_P, win_rate_P = Channel.random(rng, 300, shift).truth(fitted, procedure)
        assert fitted.predictions is not None
        rate = fitted.predictions.win_rates[procedure.label]
        for at, (predicted, truth) in enumerate([(fitted.predictions.kl, kl_P), (rate, win_rate_P)]):
            low, high = predicted.confidence_interval
            misses[at] += not low <= truth.mean() <= high
    assert (misses < 5).all(), misses


@pytest.mark.parametrize("kind", ["mixture", "reshaped"])
def test_budget_is_met_on_new_prompts(kind: Kind) -> None:
    rng = np.random.default_rng(0)
    fitted = fit_reshaping_to(
        Channel.random(rng, 64, 2.0).draw(rng, 64, 32), Goal(BestOfN(8), kl_budget=0.5), kind=kind
    )
    assert fitted.kl == pytest.approx(0.5, rel=0.01)
    kl_P, win_rate_P = Channel.random(rng, 400, 2.0).truth(fitted, BestOfN(8))
    predictions = fitted.predictions
    assert predictions is not None
    assert fitted.win_rate is not None
    # Four standard errors: less than 1e-4 by chance.
    assert kl_P.mean() == pytest.approx(0.5, abs=4 * predictions.kl.standard_error)
    error = predictions.win_rates["Best-of-8"].standard_error
    assert win_rate_P.mean() == pytest.approx(fitted.win_rate, abs=4 * error)
    assert "Standard" in predictions.win_rates


def test_acceptance_and_tokens_are_those_of_rejection() -> None:
    rng = np.random.default_rng(1)
    channel = Channel(np.array([1.0]), np.array([0.7]))
    reshaping = Reshaping.table([-1.5, -0.5, 1.0], [-3.0, 0.0, 0.4])
    weight = reshaping.mixture_weight
    draws = 400_000
    s = rng.standard_normal(draws) + (rng.random(draws) < weight)
    accepted = rng.random(draws) < np.exp(reshaping.log_acceptance(s - 0.5))
    delivered = np.exp(reshaping.log_density(s[accepted] - 0.5))
    # Accepted samples are draws of p g/Z: 1/g has mean 1/Z there, and Z is known from draws of p.
    partition = np.exp(reshaping.log_density(rng.standard_normal(draws) - 0.5)).mean()
    assert (1 / delivered).mean() == pytest.approx(1 / partition, rel=0.02)  # ten standard errors
    assert accepted.mean() == pytest.approx(partition * np.exp(-reshaping.log_bound), rel=0.02)
    data = channel.draw(rng, 20_000, 20_000)
    lengths = [np.full((1, 20_000), 10.0), np.full((1, 20_000), 30.0)]
    groups = [
        type(group)(group.log_ratio_PGM, group.place_PG, group.real_PG, length)
        for group, length in zip((data.ref, *data.aligned), lengths, strict=True)
    ]
    predicted = predict_reshaping(ReshapingData(groups[0], tuple(groups[1:])), reshaping, [Standard()])
    assert predicted.acceptance.estimate == pytest.approx(accepted.mean(), rel=0.02)
    assert predicted.tokens is not None
    assert predicted.tokens.estimate == pytest.approx((10 + 20 * weight) / accepted.mean(), rel=0.02)


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.tuples(st.floats(0.05, 3), st.floats(0, 3)), min_size=1, max_size=6),
    st.floats(-5, 5),
    st.floats(-60, 60),
)
@example([(0.5056443632267529, 0.0), (0.375, 1.0), (0.46875, 3.0), (0.46875, 3.0), (0.46875, 3.0)], 0.0, 0.0)
def test_bound_holds_everywhere(steps: list[tuple[float, float]], start: float, log_ratio: float) -> None:
    knots = start + np.concatenate([[0.0], np.cumsum([x for x, _ in steps])])
    reshaping = Reshaping.table(knots, np.concatenate([[0.0], np.cumsum([y for _, y in steps])]))
    everywhere = np.concatenate([[log_ratio], knots, np.linspace(knots[0] - 5, knots[-1] + 5, 500)])
    excess = reshaping.log_density(everywhere) - Reshaping.mixture(reshaping.mixture_weight).log_density(everywhere)
    assert excess.max() <= reshaping.log_bound + 1e-9
    # And it is reached: between knots the excess is smooth, so a grid with the knots finds its largest value.
    dense = np.concatenate([knots, np.linspace(knots[0] - 40, knots[-1] + 5, 20_001)])
    reached = reshaping.log_density(dense) - Reshaping.mixture(reshaping.mixture_weight).log_density(dense)
    assert reached.max() == pytest.approx(reshaping.log_bound, abs=1e-5)


def test_mixture_density_by_hand() -> None:
    assert Reshaping.mixture(0.25).log_density([0.0, np.log(3.0)]) == pytest.approx([0.0, np.log(1.5)])
    assert Reshaping.mixture(1.0).log_density([800.0, -800.0]) == pytest.approx([800.0, -800.0])
    two = Reshaping.mixture(0.25, 0.5)
    assert two.log_density(np.log([[3.0, 2.0]])) == pytest.approx([np.log(0.25 + 0.75 + 1.0)])
    assert (two.mixture_weight, two.acceptance, two.log_bound) == (0.75, 1.0, 0.0)
    with pytest.raises(InputError, match="last axis"):
        two.log_density([0.1, 0.2, 0.3])
    with pytest.raises(InputError, match="do not make a mixture"):
        Reshaping.mixture(0.7, 0.6)
    with pytest.raises(InputError, match="NaN"):
        two.log_density([[np.nan, 0.0]])


def test_json_round_trip(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    data = Channel.random(rng, 12, 1.5).draw(rng, 40, 20)
    kinds: list[Kind] = ["mixture", "reshaped"]
    for kind in kinds:
        fitted = fit_reshaping_to(data, Goal(BestOfN(4), kl_budget=0.3), kind=kind, report=[WorstOfN(2)])
        fitted.save(tmp_path / "reshaping.json")
        read = Reshaping.load(tmp_path / "reshaping.json")
        assert read.to_dict() == fitted.to_dict()
        assert read.log_bound == fitted.log_bound
        assert read.predictions == fitted.predictions
    for broken in ({}, {"kind": "other", "weights": [0.1]}, {"kind": "mixture", "weights": "x"}):
        with pytest.raises(InputError):
            Reshaping.from_dict(broken)
    with pytest.raises(InputError, match="cannot be read"):
        Reshaping.load(tmp_path / "missing.json")


def test_ranks_and_rewards_agree() -> None:
    rng = np.random.default_rng(4)
    rewards_PK, rewards_PG = rng.integers(0, 30, (6, 24)).astype(float), rng.integers(5, 35, (6, 10)).astype(float)
    log_ratios_PK, log_ratios_PG = rng.normal(size=(6, 24)), rng.normal(0.5, 1, (6, 10))
    calibrator = RewardCalibrator().fit(rewards_PK)
    by_rank = fit_reshaping(
        log_ratios_PK,
        calibrator.calibrate_references(),
        BestOfN(4),
        beta=0.2,
        aligned_log_ratios_PG=log_ratios_PG,
        aligned_ranks_PG=calibrator.calibrate(rewards_PG),
    )
    # Rewards between two references, or above all, are told apart by rewards alone: make those equal.
    levels_PG = calibrator.calibrate(rewards_PG) * 1000
    placed_PK = calibrator.calibrate(rewards_PK) * 1000
    data = ReshapingData.from_rewards(
        log_ratios_PK, placed_PK, aligned_log_ratios_PG=log_ratios_PG, aligned_rewards_PG=levels_PG
    )
    by_reward = fit_reshaping_to(data, Goal(BestOfN(4), beta=0.2))
    np.testing.assert_allclose(by_rank.log_values, by_reward.log_values, atol=1e-6)
    assert by_rank.predictions == by_reward.predictions


def test_ragged_prompts_are_their_own_samples() -> None:
    rng = np.random.default_rng(7)
    counts = [12, 30, 21]
    ratios = [rng.normal(size=count) for count in counts]
    rewards = [rng.integers(0, 8, count).astype(float) for count in counts]
    pool = Pool.of(ReshapingData.from_rewards(ratios, rewards))
    objective = Objective.of(WorstOfN(3))
    together = pool.tilted(np.where(np.isfinite(pool.log_weight_PS), pool.log_ratio, 0.0))
    rates_P = Contest(pool, objective).win_rate_P(together.mass_PS)
    for at in range(3):
        alone = Pool.of(ReshapingData.from_rewards([ratios[at]], [rewards[at]]))
        tilted = alone.tilted(alone.log_ratio)
        assert tilted.kl_P[0] == pytest.approx(together.kl_P[at])
        assert Contest(alone, objective).win_rate_P(tilted.mass_PS)[0] == pytest.approx(rates_P[at])


@pytest.mark.parametrize(
    ("ratios", "ranks", "message"),
    [
        ([[0.0, np.nan]], [[0.0, 1.0]], "NaN"),
        ([[0.0, 1.0]], [[0.0, np.inf]], "NaN"),
        ([[0.0, 1.0]], [[0.0, 1.5]], "outside"),
        ([[0.0, 1.0]], [[0.0]], "not one value"),
        ([[0.0]], [[0.0]], "fewer than two"),
        ([], [], "no prompt"),
        ([0.0, 1.0], [0.0, 1.0], "one row"),
    ],
)
def test_bad_input_is_refused(ratios: list, ranks: list, message: str) -> None:
    with pytest.raises(InputError, match=message):
        fit_reshaping(ratios, ranks, BestOfN(2), beta=0.1)


def test_goal_is_one_of_budget_and_beta() -> None:
    for wrong in ({}, {"kl_budget": 0.5, "beta": 0.1}, {"beta": -1.0}, {"kl_budget": np.nan}):
        with pytest.raises(InputError):
            Goal(BestOfN(2), None, wrong.get("kl_budget"), wrong.get("beta"))
    with pytest.raises(InputError, match="unknown kind"):
        fit_reshaping([[0.0, 1.0]], [[0.0, 1.0]], BestOfN(2), beta=0.1, kind="other")  # pyright: ignore[reportArgumentType]
