"""Fitting a reshaping to a procedure: from rollouts with log-ratios and ranks to a density and its predictions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infalign.errors import InputError
from infalign.procedures import InferenceProcedure, Standard
from infalign.reshape.data import Ragged, ReshapingData
from infalign.reshape.families import Components, Increasing, knots_for
from infalign.reshape.optimise import Optimum, Problem, best_at_beta, best_at_kl
from infalign.reshape.pool import Contest, Pool
from infalign.reshape.predict import PerPrompt, Predictor
from infalign.reshape.reshaping import Kind, Reshaping
from infalign.theory.winrate import Objective

Float = NDArray[np.float64]

_BUDGET_ROUNDS = 3
_DEEPEST = 30.0
"""Nats below its largest value at which log g ends. What lies deeper is never drawn, and its value is not known."""
_BUDGET_TOLERANCE = 0.005
"""How near, as a share of the budget, the cross-fitted KL must come to it."""


def fit_reshaping(
    log_ratios_PK: Ragged,
    ranks_PK: Ragged,
    procedure: InferenceProcedure,
    *,
    kl_budget: float | None = None,
    beta: float | None = None,
    aligned_log_ratios_PG: Ragged | None = None,
    aligned_ranks_PG: Ragged | None = None,
    opponent: InferenceProcedure | None = None,
    kind: Kind = "reshaped",
) -> Reshaping:
    """The best increasing function of an aligned model's log-ratio for a procedure (reshaped policy, M16).

    `infalign.reshape.fit_reshaping_to` takes raw rewards, lengths and more; this is its short form for arrays.

    Args:
        log_ratios_PK: log q(y|x) − log p(y|x) in nats of K rollouts of the reference p for each prompt, whole
            responses; q is the aligned model. (P, K), or one array for each prompt; (P, K, M) for M models.
        ranks_PK: Their calibrated ranks in [0, 1] among the prompt's other references.
        procedure: What is done with the policy's samples.
        kl_budget: Highest KL to the reference in nats, of whole responses, on new prompts. Give this or `beta`.
        beta: Price of KL in win rate per nat: W − β KL is maximised.
        aligned_log_ratios_PG: The log-ratios of G rollouts of the aligned model itself; a list of M such for M models.
            Without them the upper tail is known only as far as the reference reaches it.
        aligned_ranks_PG: Their calibrated ranks among the references.
        opponent: What is run on the reference; the same procedure if None.
        kind: "reshaped" for any increasing density, "mixture" for g = 1 − ε + ε e^ℓ.

    Returns:
        The fit, with what it predicts on new prompts (cross-fitted over prompts, errors clustered by prompt).

    Raises:
        InputError: If an input is not usable, or not exactly one of `kl_budget` and `beta` is given.
    """
    data = ReshapingData.from_ranks(
        log_ratios_PK,
        ranks_PK,
        aligned_log_ratios_PG=aligned_log_ratios_PG,
        aligned_ranks_PG=aligned_ranks_PG,
    )
    return fit_reshaping_to(data, Goal(procedure, opponent, kl_budget, beta), kind=kind)


@dataclass(frozen=True)
class Goal:
    """What a reshaping is fitted for.

    Attributes:
        procedure: What is done with the policy's samples.
        opponent: What is run on the reference; the same procedure if None.
        kl_budget: Highest KL in nats. Exactly one of this and `beta` is given.
        beta: Price of KL in win rate per nat.
    """

    procedure: InferenceProcedure
    opponent: InferenceProcedure | None = None
    kl_budget: float | None = None
    beta: float | None = None

    def __post_init__(self) -> None:
        given = [value for value in (self.kl_budget, self.beta) if value is not None]
        if len(given) != 1:
            raise InputError("give exactly one of kl_budget and beta", where="fit_reshaping")
        if not (math.isfinite(given[0]) and given[0] > 0):
            raise InputError(f"{given[0]!r} is not a positive number", where="fit_reshaping")


def fit_reshaping_to(
    data: ReshapingData,
    goal: Goal,
    *,
    kind: Kind = "reshaped",
    report: Sequence[InferenceProcedure] = (),
    folds: int = 5,
    seed: int = 0,
) -> Reshaping:
    """`fit_reshaping` on rollouts of any form.

    With a KL budget the scale is set on prompts kept out of the fit: a fit looks cheaper on its own prompts than it is.

    Args:
        data: Rollouts of the reference and, for the upper tail, of the aligned models.
        goal: Procedure and budget.
        kind: "reshaped" or "mixture".
        report: Procedures whose win rates are predicted besides the goal's and `Standard`'s.
        folds: Into how many sets the prompts are split for cross-fitting; 1 predicts on the prompts of the fit.
        seed: For the split.

    Raises:
        InputError: If `kind` is unknown, or a "reshaped" density is asked for with several aligned models.
    """
    if kind not in ("mixture", "reshaped"):
        raise InputError(f"unknown kind {kind!r}", where="fit_reshaping", hint='Use "mixture" or "reshaped"')
    if kind == "reshaped" and data.num_models > 1:
        raise InputError(
            f"{data.num_models} aligned models", where="fit_reshaping", hint='Use one, or kind="mixture" for several'
        )
    contests = {goal.procedure.label: (goal.procedure, goal.opponent)}
    for other in (Standard(), *report):
        contests.setdefault(other.label, (other, None))
    predictor = Predictor(data, list(contests.values()), seed=seed)
    fitter = _Fitter(predictor.pool, Objective.of(goal.procedure, goal.opponent), kind)
    order = np.random.default_rng(seed).permutation(data.num_prompts)
    folds = max(1, min(folds, data.num_prompts))
    held_out = [np.sort(part) for part in np.array_split(order, folds)]

    def cross_fitted(budget: float | None, start: Float) -> PerPrompt:
        parts: list[PerPrompt] = []
        for index in held_out:
            rest = np.setdiff1d(np.arange(data.num_prompts), index) if folds > 1 else index
            found = fitter.fit(budget, goal.beta, index=rest, starts=[start])
            parts.append(predictor.predict(fitter.reshaping(found), index))
        return PerPrompt.joined(parts)

    found = fitter.fit(goal.kl_budget, goal.beta)
    predicted = cross_fitted(goal.kl_budget, found.theta)
    if goal.kl_budget is not None:
        asked = goal.kl_budget
        for _ in range(_BUDGET_ROUNDS):
            seen = float(predicted.kl_P.mean())
            short = goal.kl_budget - seen
            # A mixture may reach the budget with no weight; below it there is nothing to correct then.
            if abs(short) < _BUDGET_TOLERANCE * goal.kl_budget or (found.kl < 0.99 * asked and short > 0):
                break
            asked *= min(max(goal.kl_budget / max(seen, 1e-9), 0.5), 2.0)
            found = fitter.fit(asked, None, starts=[found.theta])
            predicted = cross_fitted(asked, found.theta)
    shape = fitter.reshaping(found)
    return Reshaping(
        shape.kind,
        shape.weights,
        shape.knots,
        shape.log_values,
        shape.log_bound,
        goal.procedure.label,
        found.beta,
        predicted.summary(cross_fitted=folds > 1),
    )


def best_density(
    pool: Pool,
    objective: Objective,
    *,
    kl_budget: float | None = None,
    beta: float | None = None,
    kind: Kind = "reshaped",
) -> tuple[Reshaping, Optimum]:
    """The best density on one pool, without cross-fitting; with `Pool.enumerated` it is exact.

    Returns:
        The density, and the win rate and KL that it has on the pool.
    """
    fitter = _Fitter(pool, objective, kind)
    found = fitter.fit(kl_budget, beta)
    return fitter.reshaping(found), found


class _Fitter:
    """One family of densities on one pool, fitted to all of its prompts or to some."""

    def __init__(self, pool: Pool, objective: Objective, kind: Kind) -> None:
        self._pool, self._objective, self._kind = pool, objective, kind
        self._knots = knots_for(pool) if kind == "reshaped" else np.zeros(0)

    def fit(
        self,
        kl_budget: float | None,
        beta: float | None,
        *,
        index: NDArray[np.intp] | None = None,
        starts: Sequence[Float] | None = None,
    ) -> Optimum:
        pool = self._pool if index is None else self._pool.of_prompts(index)
        contest = Contest(pool, self._objective)
        if self._kind == "mixture":
            return _best(Problem(pool, contest, Components(pool)), kl_budget, beta, starts)
        family = Increasing(pool, self._knots)
        if starts is None:
            # The best mixture is a member of the family (up to its knots): start from it, and never end below it.
            mixture = _best(Problem(pool, contest, Components(pool)), kl_budget, beta, None)
            log_weights = Components.log_weights(mixture.theta)
            path = np.logaddexp(log_weights[0], log_weights[1] + self._knots)
            starts = [np.diff(path), *family.starts]
        return _best(Problem(pool, contest, family), kl_budget, beta, starts)

    def reshaping(self, found: Optimum) -> Reshaping:
        if self._kind == "mixture":
            return Reshaping.mixture(*np.exp(Components.log_weights(found.theta)[1:]))
        log_values = np.concatenate([[0.0], np.cumsum(found.theta)])
        return Reshaping.table(self._knots, np.maximum(log_values - log_values[-1], -_DEEPEST))


def _best(problem: Problem, kl_budget: float | None, beta: float | None, starts: Sequence[Float] | None) -> Optimum:
    if kl_budget is not None:
        return best_at_kl(problem, kl_budget, starts)
    assert beta is not None, "held by the goal"
    return best_at_beta(problem, beta, starts)
