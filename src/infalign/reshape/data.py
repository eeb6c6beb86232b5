"""What a reshaping is fitted on: rollouts with their log-ratios and where each stands among its prompt's rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.errors import InputError

Float = NDArray[np.float64]
Ragged = Sequence[Any] | NDArray[Any]
"""One row of numbers for each prompt: a matrix, or a list of arrays of any lengths."""


@dataclass(frozen=True, eq=False)
class Rollouts:
    """One model's rollouts for P prompts, in padded arrays.

    Attributes:
        log_ratio_PGM: log q(y|x) − log p(y|x) for each of the M aligned models, shape (P, G, M).
        place_PG: Where each stands in its prompt's reward order: only order and equality matter.
        real_PG: False for padding, where prompts have fewer rollouts.
        length_PG: Number of tokens of each, or None.
    """

    log_ratio_PGM: Float  # noqa: N815
    place_PG: Float  # noqa: N815
    real_PG: NDArray[np.bool_]  # noqa: N815
    length_PG: Float | None = None  # noqa: N815

    def of_prompts(self, index: NDArray[np.intp]) -> Rollouts:
        """Those of some prompts."""
        lengths = None if self.length_PG is None else self.length_PG[index]
        return Rollouts(self.log_ratio_PGM[index], self.place_PG[index], self.real_PG[index], lengths)


@dataclass(frozen=True, eq=False)
class ReshapingData:
    """Rollouts of the reference, and of each aligned model where there are some.

    Build one with `from_ranks` or, better, `from_rewards`, which also orders rollouts that beat the same references.

    Attributes:
        ref: The reference's rollouts.
        aligned: Each aligned model's own rollouts; an empty tuple if there are none. They are what tells the upper
            tail: the reference hardly ever draws what an aligned model at 3 nats prefers.
    """

    ref: Rollouts
    aligned: tuple[Rollouts, ...] = ()

    @classmethod
    def from_ranks(
        cls,
        log_ratios_PK: Ragged,
        ranks_PK: Ragged,
        *,
        aligned_log_ratios_PG: Ragged | None = None,
        aligned_ranks_PG: Ragged | None = None,
        lengths_PK: Ragged | None = None,
        aligned_lengths_PG: Ragged | None = None,
    ) -> ReshapingData:
        """From calibrated ranks, as `RewardCalibrator` gives them.

        Args:
            log_ratios_PK: log q(y|x) − log p(y|x) in nats of K reference rollouts for each prompt; (P, K), (P, K, M)
                for M aligned models, or one array for each prompt where K differs.
            ranks_PK: Their ranks in [0, 1] among the other references (`RewardCalibrator.calibrate_references`).
            aligned_log_ratios_PG: The same of G rollouts of the aligned model; a list of M such for M models.
            aligned_ranks_PG: Their ranks among the references (`RewardCalibrator.calibrate`).
            lengths_PK: Tokens of each reference rollout, if the cost is to be predicted.
            aligned_lengths_PG: Tokens of each aligned rollout.

        Raises:
            InputError: If a number is NaN or infinite, a rank lies outside [0, 1], the shapes differ, or a prompt has
                fewer than two reference rollouts.
        """
        ref = _rollouts(log_ratios_PK, ranks_PK, lengths_PK, "log_ratios_PK", "ranks_PK", is_ref=True)
        aligned = _aligned(ref, aligned_log_ratios_PG, aligned_ranks_PG, aligned_lengths_PG, "aligned_ranks_PG", True)
        _refuse_outside_unit(ref, "ranks_PK")
        for group in aligned:
            _refuse_outside_unit(group, "aligned_ranks_PG")
        # Leave-self-out ranks of K references are 0, 1/(K−1), …. Each is moved to the middle of its cell of K, so that
        # a rollout above every reference is above the highest of them, and not equal to it.
        count_P1 = ref.real_PG.sum(axis=1, keepdims=True)
        place = (ref.place_PG * (count_P1 - 1) + 0.5) / count_P1
        return cls(Rollouts(ref.log_ratio_PGM, np.round(place, 12), ref.real_PG, ref.length_PG), _rounded(aligned))

    @classmethod
    def from_rewards(
        cls,
        log_ratios_PK: Ragged,
        rewards_PK: Ragged,
        *,
        aligned_log_ratios_PG: Ragged | None = None,
        aligned_rewards_PG: Ragged | None = None,
        lengths_PK: Ragged | None = None,
        aligned_lengths_PG: Ragged | None = None,
    ) -> ReshapingData:
        """From raw rewards; only their order within a prompt matters. Otherwise as `from_ranks`."""
        ref = _rollouts(log_ratios_PK, rewards_PK, lengths_PK, "log_ratios_PK", "rewards_PK", is_ref=True)
        return cls(
            ref,
            _aligned(ref, aligned_log_ratios_PG, aligned_rewards_PG, aligned_lengths_PG, "aligned_rewards_PG", False),
        )

    @property
    def num_prompts(self) -> int:
        """P."""
        return len(self.ref.place_PG)

    @property
    def num_models(self) -> int:
        """M, the number of aligned models."""
        return self.ref.log_ratio_PGM.shape[2]

    def of_prompts(self, index: NDArray[np.intp]) -> ReshapingData:
        """The data of some prompts."""
        return ReshapingData(self.ref.of_prompts(index), tuple(group.of_prompts(index) for group in self.aligned))


def _aligned(
    ref: Rollouts, log_ratios: Any, places: Any, lengths: Any, place_name: str, ranked: bool
) -> tuple[Rollouts, ...]:
    if log_ratios is None and places is None:
        return ()
    name = "aligned_log_ratios_PG"
    if log_ratios is None or places is None:
        raise InputError("log-ratios and ranks go together", where=place_name, hint="Give both or neither")
    num_models = ref.log_ratio_PGM.shape[2]
    several = num_models > 1
    groups = (
        list(zip(log_ratios, places, lengths or [None] * len(log_ratios), strict=True))
        if several
        else [(log_ratios, places, lengths)]
    )
    if len(groups) != num_models:
        raise InputError(f"{len(groups)} groups for {num_models} aligned models", where=name, hint="Give one for each")
    out = tuple(_rollouts(*group, name, place_name, is_ref=False) for group in groups)
    for group in out:
        if len(group.place_PG) != len(ref.place_PG) or group.log_ratio_PGM.shape[2] != num_models:
            raise InputError(
                f"{len(group.place_PG)} prompts and {group.log_ratio_PGM.shape[2]} models, "
                f"but the reference's rollouts have {len(ref.place_PG)} and {num_models}",
                where=name,
                hint="Give the same prompts, in the same order, with log-ratios of every model",
            )
    return out


def _rollouts(log_ratios: Any, places: Any, lengths: Any, name: str, place_name: str, *, is_ref: bool) -> Rollouts:
    ratio_rows = [_row(row, name) for row in log_ratios]
    place_rows = [_row(row, place_name) for row in places]
    if not ratio_rows:
        raise InputError("there is no prompt", where=name)
    if [len(row) for row in ratio_rows] != [len(row) for row in place_rows]:
        raise InputError("not one value for each log-ratio", where=place_name, hint=f"Give the shape of {name}")
    if any(row.ndim != 1 for row in place_rows) or len({row.shape[1:] for row in ratio_rows}) != 1:
        raise InputError("the shapes differ between prompts", where=name, hint="Give one row for each prompt")
    least = min(len(row) for row in ratio_rows)
    if is_ref and least < 2:
        raise InputError("a prompt has fewer than two reference rollouts", where=name, hint="Give at least two")
    if ratio_rows[0].ndim > 2:
        raise InputError("too many axes", where=name, hint="Give (P, K), or (P, K, M) for M aligned models")
    widest = max(len(row) for row in ratio_rows)
    num_models = 1 if ratio_rows[0].ndim == 1 else ratio_rows[0].shape[1]
    log_ratio_PGM = np.zeros((len(ratio_rows), widest, num_models))
    place_PG = np.full((len(ratio_rows), widest), np.inf)
    real_PG = np.zeros((len(ratio_rows), widest), dtype=np.bool_)
    for at, (ratio, place) in enumerate(zip(ratio_rows, place_rows, strict=True)):
        log_ratio_PGM[at, : len(ratio)] = ratio.reshape(len(ratio), num_models)
        place_PG[at, : len(place)] = place
        real_PG[at, : len(place)] = True
    return Rollouts(log_ratio_PGM, place_PG, real_PG, _lengths(lengths, real_PG, name))


def _lengths(lengths: Any, real_PG: NDArray[np.bool_], name: str) -> Float | None:
    if lengths is None:
        return None
    rows = [_row(row, f"lengths of {name}") for row in lengths]
    if [row.shape for row in rows] != [(count,) for count in real_PG.sum(axis=1)]:
        raise InputError("not one length for each rollout", where=name)
    length_PG = np.zeros(real_PG.shape)
    length_PG[real_PG] = np.concatenate(rows)
    return length_PG


def _row(row: Any, name: str) -> Float:
    try:
        values = np.asarray(row, dtype=np.float64)
    except (TypeError, ValueError) as error:
        raise InputError(f"not numbers: {error}", where=name) from error
    if values.ndim == 0:
        raise InputError("one number is not one row for each prompt", where=name, hint="Give a (P, K) array")
    if not np.isfinite(values).all():
        raise InputError("a value is NaN or infinite", where=name, hint="Score that rollout again, or leave it out")
    return values


def _refuse_outside_unit(rollouts: Rollouts, name: str) -> None:
    places = rollouts.place_PG[rollouts.real_PG]
    if places.size and (places.min() < 0 or places.max() > 1):
        raise InputError(
            "a rank lies outside [0, 1]", where=name, hint="For raw rewards use ReshapingData.from_rewards"
        )


def _rounded(groups: tuple[Rollouts, ...]) -> tuple[Rollouts, ...]:
    return tuple(
        Rollouts(group.log_ratio_PGM, np.round(group.place_PG, 12), group.real_PG, group.length_PG) for group in groups
    )
