"""Weighted samples of each prompt, and what a density g of the log-ratio makes of them: Z, F, W, KL and derivatives.

All rollouts of a prompt form one pool. With K draws of the reference p and G of an aligned model q, a member stands for
p with weight 1/(K + G e^ℓ) (the balance heuristic), here with the proportions that make both Σ w = 1 and Σ w e^ℓ = 1
(maximum likelihood; Tan 2004). So p and q both have total mass 1, and every mixture of them gets Z = 1 exactly.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infalign.numerics.special import logsumexp
from infalign.reshape.data import ReshapingData
from infalign.theory.winrate import Objective

Float = NDArray[np.float64]

_EM_STEPS = 200


@dataclass(frozen=True, eq=False)
class Pool:
    """Samples of P prompts, each prompt's sorted by reward, padded at the end with samples of weight 0.

    Attributes:
        log_ratio_PSM: Log-ratio to the reference of each sample under each of M aligned models, shape (P, S, M).
        log_weight_PS: Log of its weight as a draw of the reference; the weights of a prompt sum to 1.
        first_PS: Position of the first sample with the same reward.
        last_PS: Position of the last one.
    """

    log_ratio_PSM: Float  # noqa: N815
    log_weight_PS: Float  # noqa: N815
    first_PS: NDArray[np.intp]  # noqa: N815
    last_PS: NDArray[np.intp]  # noqa: N815

    @classmethod
    def of(cls, data: ReshapingData, kept: tuple[NDArray[np.bool_], ...] | None = None) -> Pool:
        """The pool of a set of rollouts.

        Args:
            data: The rollouts.
            kept: For each group of rollouts (reference first) which ones to use; all if None.
        """
        groups = (data.ref, *data.aligned)
        real = [group.real_PG for group in groups]
        if kept is not None:
            real = [mask & keep for mask, keep in zip(real, kept, strict=True)]
        real_PS = np.concatenate(real, axis=1)
        log_ratio_PSM = np.concatenate([group.log_ratio_PGM for group in groups], axis=1)
        counts_PM = np.zeros((len(real_PS), 1 + log_ratio_PSM.shape[2]))
        for at, mask in enumerate(real):
            counts_PM[:, at] = mask.sum(axis=1)
        log_weight_PS = _log_weights(log_ratio_PSM, real_PS, counts_PM)
        place_PS = np.where(real_PS, np.concatenate([group.place_PG for group in groups], axis=1), np.inf)
        return cls.sorted_by(place_PS, log_ratio_PSM, log_weight_PS)

    @classmethod
    def enumerated(cls, probabilities_PS: Float, log_ratios_PS: Float, rewards_PS: Float) -> Pool:
        """Every response of each prompt with its exact probability under the reference: nothing is estimated.

        Args:
            probabilities_PS: (P, S) probabilities under the reference; they sum to 1.
            log_ratios_PS: (P, S) log-ratios.
            rewards_PS: (P, S) rewards, by their order.
        """
        with np.errstate(divide="ignore"):
            log_weights = np.log(np.asarray(probabilities_PS, dtype=np.float64))
        places = np.where(np.isfinite(log_weights), rewards_PS, np.inf)
        return cls.sorted_by(places, np.asarray(log_ratios_PS, dtype=np.float64)[:, :, None], log_weights)

    @classmethod
    def sorted_by(cls, place_PS: Float, log_ratio_PSM: Float, log_weight_PS: Float) -> Pool:
        """A pool in the order of `place_PS` (inf for padding)."""
        order_PS = np.argsort(place_PS, axis=1, kind="stable")
        place_PS = np.take_along_axis(place_PS, order_PS, axis=1)
        new_PS = np.ones(place_PS.shape, dtype=np.bool_)
        new_PS[:, 1:] = place_PS[:, 1:] != place_PS[:, :-1]
        position_S = np.arange(place_PS.shape[1])
        first_PS = np.maximum.accumulate(np.where(new_PS, position_S, 0), axis=1)
        ends_PS = np.ones_like(new_PS)
        ends_PS[:, :-1] = new_PS[:, 1:]
        backwards = np.where(ends_PS, position_S, position_S[-1])[:, ::-1]
        last_PS = np.minimum.accumulate(backwards, axis=1)[:, ::-1]
        return cls(
            np.take_along_axis(log_ratio_PSM, order_PS[:, :, None], axis=1),
            np.take_along_axis(log_weight_PS, order_PS, axis=1),
            first_PS,
            last_PS,
        )

    @property
    def log_ratio(self) -> Float:
        """(P, S) log-ratios under the only aligned model."""
        return self.log_ratio_PSM[:, :, 0]

    def of_prompts(self, index: NDArray[np.intp]) -> Pool:
        """The pool of some prompts."""
        return Pool(self.log_ratio_PSM[index], self.log_weight_PS[index], self.first_PS[index], self.last_PS[index])

    def tilted(self, log_density_PS: Float) -> Tilted:
        """What density exp(`log_density_PS`), relative to the reference and not normalised, makes of the pool."""
        log_mass_PS = self.log_weight_PS + log_density_PS
        log_partition_P = np.asarray(logsumexp(log_mass_PS, axis=1))
        mass_PS = np.exp(log_mass_PS - log_partition_P[:, None])
        centred_PS = log_density_PS - log_partition_P[:, None]
        kl_P = np.einsum("ps,ps->p", mass_PS, centred_PS)
        return Tilted(mass_PS, log_partition_P, kl_P, centred_PS)


@dataclass(frozen=True, eq=False)
class Tilted:
    """A pool under one density.

    Attributes:
        mass_PS: Share of each sample; sums to 1 for each prompt.
        log_partition_P: log Z of each prompt.
        kl_P: KL of the reshaped policy to the reference, in nats.
        log_density_PS: log π_g(y|x) − log p(y|x) of each sample.
    """

    mass_PS: Float  # noqa: N815
    log_partition_P: Float  # noqa: N815
    kl_P: Float  # noqa: N815
    log_density_PS: Float  # noqa: N815

    @property
    def effective_samples_P(self) -> Float:  # noqa: N802
        """1/Σ mass²: how many equal samples would tell as much."""
        return 1.0 / np.square(self.mass_PS).sum(axis=1)


class Contest:
    """The win rate of a procedure on pools, as a function of the samples' masses (M8 on a discrete distribution).

    With equal rewards sharing their ½: W = Σ_j [H(F_j) − H(F_{j−1})] c_j, where c_j is the opponent's chance to return
    less than sample j, plus half of its chance to return the same.

    Args:
        pool: The samples.
        objective: Procedure and opponent.
    """

    def __init__(self, pool: Pool, objective: Objective) -> None:
        self._terms = objective.terms
        ref_cdf_PS1 = _padded_cdf(np.exp(pool.log_weight_PS))
        self._chance: list[Float] = []  # c of each term, by which the win rate is also split between samples
        self._steps: list[Float] = []  # c_j − c_{j+1}
        for _, _, opponent in self._terms:
            output_PS1 = opponent.distortion(ref_cdf_PS1)
            below = np.take_along_axis(output_PS1, pool.first_PS, axis=1)
            upto = np.take_along_axis(output_PS1, pool.last_PS + 1, axis=1)
            chance_PS = 0.5 * (below + upto)
            self._chance.append(chance_PS)
            self._steps.append(chance_PS[:, :-1] - chance_PS[:, 1:])

    def win_rate_P(self, mass_PS: Float) -> Float:  # noqa: N802
        """W of each prompt."""
        cdf_PS = _padded_cdf(mass_PS)[:, 1:-1]
        total = np.zeros(len(mass_PS))
        for (weight, part, _), chance_PS, steps_PS in zip(self._terms, self._chance, self._steps, strict=True):
            total += weight * (chance_PS[:, -1] + np.einsum("ps,ps->p", part.distortion(cdf_PS), steps_PS))
        return total

    def reward_PS(self, mass_PS: Float) -> Float:  # noqa: N802
        """Φ at each sample: the derivative of W with respect to its mass, up to a constant of the prompt (M16)."""
        cdf_PS = _padded_cdf(mass_PS)[:, 1:-1]
        slope_PS = np.zeros_like(cdf_PS)
        for (weight, part, _), steps_PS in zip(self._terms, self._steps, strict=True):
            slope_PS -= weight * part.density(cdf_PS) * steps_PS
        out = np.zeros_like(mass_PS)
        np.cumsum(slope_PS, axis=1, out=out[:, 1:])
        return out


def _padded_cdf(mass_PS: Float) -> Float:
    cdf = np.zeros((mass_PS.shape[0], mass_PS.shape[1] + 1))
    np.cumsum(mass_PS, axis=1, out=cdf[:, 1:])
    cdf /= cdf[:, -1:]
    return np.minimum(cdf, 1.0)


def _log_weights(log_ratio_PSM: Float, real_PS: NDArray[np.bool_], counts_PM: Float) -> Float:
    """Log of each sample's weight as a draw of the reference; −inf for padding.

    The shares start at the true proportions of the pool and move to their maximum likelihood by expectation
    maximisation. At the maximum, the weights of every model that has samples sum to 1.
    """
    total_P = counts_PM.sum(axis=1)
    share_PM = counts_PM / total_P[:, None]
    log_models = np.concatenate([np.zeros((*log_ratio_PSM.shape[:2], 1)), log_ratio_PSM], axis=2)
    used = counts_PM.any(axis=0)
    log_models, share_PU = log_models[:, :, used], share_PM[:, used]
    if used.sum() > 1:
        top_PS = log_models.max(axis=2)
        models_PSU = np.exp(log_models - top_PS[:, :, None]) * real_PS[:, :, None]
        for _ in range(_EM_STEPS):
            mixed_PS = np.einsum("psu,pu->ps", models_PSU, share_PU)
            updated = share_PU * np.einsum(
                "psu,ps->pu", models_PSU, np.divide(1.0, mixed_PS, out=np.zeros_like(mixed_PS), where=mixed_PS > 0)
            )
            updated /= updated.sum(axis=1, keepdims=True)
            moved = float(np.abs(updated - share_PU).max())
            share_PU = updated
            if moved < 1e-12:
                break
    with np.errstate(divide="ignore"):
        log_mixed_PS = np.asarray(logsumexp(log_models + np.log(share_PU)[:, None, :], axis=2))
    log_weight_PS = np.where(real_PS, -log_mixed_PS, -np.inf)
    return log_weight_PS - np.asarray(logsumexp(log_weight_PS, axis=1))[:, None]
