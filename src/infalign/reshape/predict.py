"""What a reshaping does on a set of prompts, estimated from their rollouts before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infalign.errors import InputError
from infalign.estimators.clustered import mean_estimate
from infalign.procedures import InferenceProcedure
from infalign.reshape.data import ReshapingData
from infalign.reshape.pool import Contest, Pool
from infalign.reshape.reshaping import Predicted, Predictions, Reshaping
from infalign.theory.winrate import Objective

Float = NDArray[np.float64]

_GROUPS = 5


@dataclass(frozen=True, eq=False)
class PerPrompt:
    """What a reshaping does on each prompt.

    Attributes:
        kl_P: KL in nats.
        win_rates_P: Win rate of each procedure, by its label.
        acceptance_P: Share of accepted proposals.
        tokens_P: Tokens for each delivered response, or None.
        effective_samples_P: See `Predictions`.
    """

    kl_P: Float  # noqa: N815
    win_rates_P: dict[str, Float]  # noqa: N815
    acceptance_P: Float  # noqa: N815
    tokens_P: Float | None  # noqa: N815
    effective_samples_P: Float  # noqa: N815

    @classmethod
    def joined(cls, parts: Sequence[PerPrompt]) -> PerPrompt:
        """Those of several sets of prompts as one."""
        tokens = [part.tokens_P for part in parts]
        return cls(
            np.concatenate([part.kl_P for part in parts]),
            {label: np.concatenate([part.win_rates_P[label] for part in parts]) for label in parts[0].win_rates_P},
            np.concatenate([part.acceptance_P for part in parts]),
            None if tokens[0] is None else np.concatenate([values for values in tokens if values is not None]),
            np.concatenate([part.effective_samples_P for part in parts]),
        )

    def summary(self, *, cross_fitted: bool) -> Predictions:
        """Means over prompts with clustered errors."""

        def mean(values: Float) -> Predicted:
            return Predicted.of(mean_estimate(values))

        return Predictions(
            mean(self.kl_P),
            {label: _within_unit(mean(values)) for label, values in self.win_rates_P.items()},
            _within_unit(mean(self.acceptance_P)),
            mean(1.0 / self.acceptance_P),
            None if self.tokens_P is None else mean(self.tokens_P),
            float(self.effective_samples_P.mean()),
            cross_fitted,
        )


class Predictor:
    """The pools from which predictions are made: all rollouts, and all but one group of each prompt's.

    A win rate is not linear in the distribution of samples, so the plain estimate from K samples is off by order N/K.
    The jackknife over five groups of each prompt's rollouts takes the leading term away.

    Args:
        data: Rollouts of the prompts.
        contests: Procedure and opponent (None: itself) of each win rate.
        seed: For the groups.
    """

    def __init__(
        self,
        data: ReshapingData,
        contests: Sequence[tuple[InferenceProcedure, InferenceProcedure | None]],
        *,
        seed: int = 0,
    ) -> None:
        self.data = data
        self.pool = Pool.of(data)
        self._objectives = {procedure.label: Objective.of(procedure, opponent) for procedure, opponent in contests}
        self._pools = [self.pool]
        rng = np.random.default_rng(seed)
        real = [group.real_PG for group in (data.ref, *data.aligned)]
        group_of = [np.argsort(rng.random(mask.shape), axis=1).argsort(axis=1) % _GROUPS for mask in real]
        if int(data.ref.real_PG.sum(axis=1).min()) >= 4 * _GROUPS:
            self._pools += [Pool.of(data, tuple(group != left for group in group_of)) for left in range(_GROUPS)]

    def predict(self, reshaping: Reshaping, index: NDArray[np.intp] | None = None) -> PerPrompt:
        """Predictions on some of the prompts (all if None)."""
        index = np.arange(self.data.num_prompts) if index is None else index
        found: list[list[Float]] = []
        effective_P = np.zeros(0)
        for at, pool in enumerate(self._pools):
            part = pool.of_prompts(index)
            tilted = part.tilted(reshaping.log_density(_ratios(part, reshaping)))
            rates = [Contest(part, objective).win_rate_P(tilted.mass_PS) for objective in self._objectives.values()]
            found.append([tilted.kl_P, tilted.log_partition_P, *rates])
            if at == 0:
                effective_P = tilted.effective_samples_P
        corrected = found[0]
        if len(found) > 1:
            without = [np.mean([group[i] for group in found[1:]], axis=0) for i in range(len(found[0]))]
            corrected = [_GROUPS * a - (_GROUPS - 1) * b for a, b in zip(found[0], without, strict=True)]
        kl_P, _, *rates = corrected
        log_partition_P = np.zeros(len(index)) if reshaping.kind == "mixture" else found[0][1]
        acceptance_P = np.minimum(np.exp(log_partition_P - reshaping.log_bound), 1.0)
        return PerPrompt(
            kl_P,
            dict(zip(self._objectives, rates, strict=True)),
            acceptance_P,
            self._tokens_P(reshaping, acceptance_P, index),
            effective_P,
        )

    def _tokens_P(self, reshaping: Reshaping, acceptance_P: Float, index: NDArray[np.intp]) -> Float | None:  # noqa: N802
        """Tokens for each delivered response: tries × mean length of a proposal."""
        groups = [self.data.ref, *self.data.aligned]
        if any(group.length_PG is None for group in groups) or len(groups) <= len(reshaping.weights):
            return None
        total_P = np.zeros(len(index))
        for weight, group in zip((1.0 - reshaping.mixture_weight, *reshaping.weights), groups, strict=True):
            lengths, real = group.length_PG, group.real_PG[index]
            assert lengths is not None, "looked at above"
            if weight > 0:
                if not real.any(axis=1).all():
                    return None
                total_P += weight * np.where(real, lengths[index], 0.0).sum(axis=1) / real.sum(axis=1)
        return total_P / acceptance_P


def predict_reshaping(
    data: ReshapingData,
    reshaping: Reshaping,
    procedures: Sequence[InferenceProcedure],
    *,
    opponent: InferenceProcedure | None = None,
    seed: int = 0,
) -> Predictions:
    """What a given reshaping does on prompts that it was not fitted on.

    Args:
        data: Rollouts of these prompts.
        reshaping: A mixture or a table; `Reshaping.mixture(1.0)` is the aligned model itself.
        procedures: Which win rates to predict.
        opponent: What is run on the reference; the same procedure if None.
        seed: For the groups of the jackknife.

    Raises:
        InputError: If the reshaping is for another number of aligned models.
    """
    if len(reshaping.weights) != data.num_models:
        raise InputError(
            f"a reshaping of {len(reshaping.weights)} aligned models for rollouts with {data.num_models}",
            where="predict_reshaping",
        )
    predictor = Predictor(data, [(procedure, opponent) for procedure in procedures], seed=seed)
    return predictor.predict(reshaping).summary(cross_fitted=True)


def _ratios(pool: Pool, reshaping: Reshaping) -> Float:
    return pool.log_ratio_PSM if len(reshaping.weights) > 1 else pool.log_ratio


def _within_unit(predicted: Predicted) -> Predicted:
    low, high = predicted.confidence_interval
    return Predicted(min(max(predicted.estimate, 0.0), 1.0), predicted.standard_error, (max(low, 0.0), min(high, 1.0)))
