"""Turn raw rewards into calibrated ones: a response's quantile among the reference policy's own responses.

`RewardCalibrator` keeps K scored reference responses per prompt and answers, for any other score of that prompt, which
share of the reference it beats (M1, estimated by M5). Scale, offset and drift of the reward between prompts vanish.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast, get_args

import numpy as np
from numpy.typing import ArrayLike, NDArray

from infalign._io.files import write_file, write_json
from infalign._io.wording import counted
from infalign.errors import InputError, StorageError

Ties = Literal["midrank", "strict", "inclusive", "random"]
FloatArray = NDArray[np.float64]
IntArray = NDArray[np.int64]

_FORMAT = 1


class RewardCalibrator:
    """The empirical reward quantiles of the reference policy, one set of K scores per prompt (M1, M5).

    Args:
        ties: What a score equal to some of the references gains from them. `"midrank"` counts each as one half, which
            keeps the reference's own mean at exactly ½; `"strict"` counts them as not beaten, `"inclusive"` as beaten,
            and `"random"` breaks each tie by lot, so that ranks stay whole numbers.
        seed: Seed of the lots drawn with `ties="random"`.

    Example:
        >>> calibrator = RewardCalibrator().fit([[0.0, 1.0, 2.0, 3.0]])
        >>> calibrator.calibrate([[2.5, 1.0]])
        array([[0.75 , 0.375]])
    """

    def __init__(self, ties: Ties = "midrank", *, seed: int = 0) -> None:
        if ties not in get_args(Ties):
            raise InputError(f"unknown tie rule {ties!r}", where="ties", hint=f"Use one of {', '.join(get_args(Ties))}")
        self.ties: Ties = ties
        self.seed = seed
        self._rng = np.random.default_rng(seed)
        self._rewards: FloatArray | None = None  # flat, in the order given
        self._sorted: FloatArray | None = None  # flat, ascending within each prompt
        self._starts: IntArray = np.zeros(1, np.int64)  # (P + 1,) where each prompt's references begin

    # --- fitting -----------------------------------------------------------------------------------------------------

    def fit(
        self, ref_rewards_PK: ArrayLike | Sequence[ArrayLike], *, mask_PK: ArrayLike | None = None
    ) -> RewardCalibrator:
        """Store the references' rewards.

        Args:
            ref_rewards_PK: Rewards of K reference responses per prompt, shape (P, K); or one array per prompt, when K
                differs between prompts.
            mask_PK: With a (P, K) array: True where a reward counts. What stands at the other places is ignored.

        Returns:
            The calibrator itself.

        Raises:
            InputError: A reward is NaN or infinite, a prompt has no reference, or the shapes do not fit.
        """
        flat, num_ref_P = _flatten(ref_rewards_PK, mask_PK)
        starts = np.concatenate([[0], np.cumsum(num_ref_P)]).astype(np.int64)
        _require_finite(flat, starts, "ref_rewards_PK")
        if num_ref_P.size == 0 or num_ref_P.min() == 0:
            empty = np.flatnonzero(num_ref_P == 0)
            what = (
                "there are no prompts"
                if num_ref_P.size == 0
                else f"{counted(empty.size, 'prompt has', 'prompts have')} no reference reward"
            )
            at = "" if num_ref_P.size == 0 else f", the first is prompt {empty[0]}"
            raise InputError(what + at, where="ref_rewards_PK", hint="Draw and score references for every prompt first")
        self._rewards = flat
        self._starts = starts
        if num_ref_P.min() == num_ref_P.max():
            self._sorted = np.sort(flat.reshape(num_ref_P.size, -1), axis=1).ravel()
        else:
            prompt_R = np.repeat(np.arange(num_ref_P.size), num_ref_P)
            self._sorted = flat[np.lexsort((flat, prompt_R))]
        return self

    @property
    def num_prompts(self) -> int:
        """P, the number of prompts fitted."""
        return self._starts.size - 1

    @property
    def num_ref_P(self) -> IntArray:  # noqa: N802
        """K of each prompt, shape (P,)."""
        return np.diff(self._starts)

    @property
    def ref_rewards_PK(self) -> FloatArray | list[FloatArray]:  # noqa: N802
        """The references as they were given: (P, K), or a list of arrays when K differs between prompts."""
        return self._shaped(self._fitted()[0])

    # --- calibrating -------------------------------------------------------------------------------------------------

    def calibrate(self, rewards: ArrayLike, *, prompt_index: ArrayLike | None = None) -> FloatArray:
        """Calibrated rewards Ĉ in [0, 1] (M5), in the shape of `rewards`.

        Args:
            rewards: Shape (P, G), row p scored on prompt p; or any shape together with `prompt_index`.
            prompt_index: Which fitted prompt each reward belongs to; same shape as `rewards`, or broadcast to it.

        Returns:
            For each reward the share of its prompt's references that it beats, ties counted by the tie rule.

        Raises:
            InputError: A reward is NaN or infinite, or the shapes or indices do not fit.
        """
        below, equal, num_ref = self._compare(rewards, prompt_index)
        return resolve_ties(below, equal, self.ties, self._rng) / num_ref

    def ranks(self, rewards: ArrayLike, *, prompt_index: ArrayLike | None = None) -> FloatArray:
        """Ranks b in 0..K: how many of its prompt's references each reward beats.

        With mid-ranks a tie counts one half, so ranks can be half-integers; the other rules give whole numbers.
        Arguments and errors are those of `calibrate`.
        """
        below, equal, _ = self._compare(rewards, prompt_index)
        return resolve_ties(below, equal, self.ties, self._rng)

    def compare(self, rewards: ArrayLike, *, prompt_index: ArrayLike | None = None) -> tuple[IntArray, IntArray]:
        """How many of its prompt's references each reward beats, and how many it equals.

        Arguments and errors are those of `calibrate`.
        """
        below, equal, _ = self._compare(rewards, prompt_index)
        return below, equal

    def resolve(self, below: IntArray, equal: IntArray) -> tuple[FloatArray, IntArray]:
        """Ranks by the tie rule from what `compare` gave, and how many ties it leaves open (none where it decides)."""
        return ranks_and_ties_left(below, equal, self.ties, self._rng)

    def level_counts(self, prompt: int) -> IntArray:
        """How many references of a prompt have its lowest reward, the next, …; they sum to K."""
        _, ordered = self._fitted()
        return np.unique(ordered[self._starts[prompt] : self._starts[prompt + 1]], return_counts=True)[1]

    def calibrate_references(self) -> FloatArray | list[FloatArray]:
        """Calibrated rewards of the references themselves, each against the K − 1 others of its prompt.

        A response that took part in its own comparison would always tie with itself and be pulled towards ½.

        Returns:
            Shape (P, K), or a list of arrays when K differs between prompts; in the order given to `fit`.

        Raises:
            InputError: A prompt has a single reference.
        """
        flat, _ = self._fitted()
        if self.num_ref_P.min() < 2:
            first = int(np.argmin(self.num_ref_P))
            raise InputError(
                f"prompt {first} has one reference only",
                where="calibrate_references",
                hint="Leaving a reference out of its own comparison needs at least two per prompt",
            )
        prompt_R = np.repeat(np.arange(self.num_prompts), self.num_ref_P)
        below, equal, num_ref = self._compare(flat, prompt_R)
        return self._shaped(resolve_ties(below, equal - 1, self.ties, self._rng) / (num_ref - 1))

    def ranks_and_ties(
        self, rewards: ArrayLike, *, prompt_index: ArrayLike | None = None
    ) -> tuple[FloatArray, IntArray]:
        """As `ranks`, and with how many references each reward ties; both in the shape of `rewards`.

        The number is 0 under a tie rule that resolves ties. `theory.finite_k.tilt_at_ranks` needs it for an exact
        normaliser (M6) where rewards take few values.
        """
        below, equal, _ = self._compare(rewards, prompt_index)
        return ranks_and_ties_left(below, equal, self.ties, self._rng)

    def reference_ranks_and_ties(self) -> tuple[FloatArray, IntArray]:
        """Ranks in 0..K−1 of the references themselves among the K − 1 others of their prompt, and their ties there.

        Returns:
            Two flat arrays, prompt by prompt, in the order given to `fit` (without what a mask left out).

        Raises:
            InputError: A prompt has a single reference.
        """
        self.calibrate_references()  # refuses a single reference
        flat, _ = self._fitted()
        below, equal, _ = self._compare(flat, np.repeat(np.arange(self.num_prompts), self.num_ref_P))
        return ranks_and_ties_left(below, equal - 1, self.ties, self._rng)

    @property
    def tie_mass_P(self) -> FloatArray:  # noqa: N802
        """Share of the pairs of references of each prompt that have equal rewards, shape (P,); 0 where K = 1."""
        flat, _ = self._fitted()
        num_ref_P = self.num_ref_P
        _, equal, _ = self._compare(flat, np.repeat(np.arange(self.num_prompts), num_ref_P))
        tied_P = np.add.reduceat((equal - 1).astype(np.float64), self._starts[:-1])
        return tied_P / np.maximum(num_ref_P * (num_ref_P - 1), 1)

    @property
    def tie_mass(self) -> float:
        """Chance that two references of a random prompt tie. Above a few per cent, C is visibly discrete."""
        return float(self.tie_mass_P.mean())

    # --- saving ------------------------------------------------------------------------------------------------------

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write the calibrator as plain `.npy` arrays and a `calibrator.json` into `folder`.

        Raises:
            StorageError: The folder cannot be written.
        """
        flat, ordered = self._fitted()
        path = Path(folder)
        try:
            # Written last: a save that was cut short has none, and is not mistaken for a calibrator.
            (path / "calibrator.json").unlink(missing_ok=True)
        except OSError as error:
            raise StorageError(f"cannot be written ({error.strerror})", where=str(path)) from error
        for name, array in (("rewards", flat), ("sorted", ordered), ("starts", self._starts)):
            write_file(path / f"{name}.npy", partial(np.save, arr=array))
        settings = {"format": _FORMAT, "ties": self.ties, "seed": self.seed, "num_prompts": self.num_prompts}
        write_json(path / "calibrator.json", settings)

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> RewardCalibrator:
        """Open a saved calibrator; its arrays are memory-mapped, so opening costs nothing however many there are.

        Raises:
            StorageError: The folder holds no calibrator that this version can read.
        """
        path = Path(folder)
        try:
            settings: dict[str, Any] = json.loads((path / "calibrator.json").read_text(encoding="utf-8"))
            if settings.get("format") != _FORMAT:
                raise StorageError(f"calibrator format {settings.get('format')!r} is not {_FORMAT}", where=str(path),
                                   hint="Fit it again with this version")  # fmt: skip
            loaded = cls(settings["ties"], seed=settings["seed"])
            loaded._rewards = np.load(path / "rewards.npy", mmap_mode="r")
            loaded._sorted = np.load(path / "sorted.npy", mmap_mode="r")
            loaded._starts = np.load(path / "starts.npy")
        except (OSError, ValueError, RecursionError, KeyError, TypeError, AttributeError, EOFError) as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"no readable calibrator here ({error})", where=str(path),
                               hint="Fit it again; in a run folder, run the recipe again")  from error  # fmt: skip
        return loaded

    # --- inside ------------------------------------------------------------------------------------------------------

    def _fitted(self) -> tuple[FloatArray, FloatArray]:
        if self._rewards is None or self._sorted is None:
            raise InputError("the calibrator has no references yet", where="RewardCalibrator", hint="Call fit first")
        return self._rewards, self._sorted

    def _shaped(self, flat: FloatArray) -> FloatArray | list[FloatArray]:
        num_ref_P = self.num_ref_P
        if num_ref_P.min() == num_ref_P.max():
            return flat.reshape(num_ref_P.size, -1)
        return np.split(flat, self._starts[1:-1])

    def _compare(self, rewards: ArrayLike, prompt_index: ArrayLike | None) -> tuple[IntArray, IntArray, IntArray]:
        """How many references are below and equal, and how many there are; each in the shape of `rewards`."""
        _, ordered = self._fitted()
        scores, index = _aligned(rewards, prompt_index, self.num_prompts)
        below, equal = _count_below_and_equal(ordered, self._starts, scores.ravel(), index.ravel())
        num_ref = self.num_ref_P[index]
        return below.reshape(scores.shape), equal.reshape(scores.shape), num_ref


class RefinedCalibrator:
    """Reference quantiles sharpened with the policy's own responses.

    During training the policy draws many responses exactly where the procedure needs resolution, and their log-ratios
    to the reference are known. Together with the references they are draws from a mixture of K parts p and S parts π,
    so a response of log-ratio ℓ = log π − log p counts with weight 1 / (K + S e^ℓ): the balance heuristic (Veach and
    Guibas 1995). Weights are normalised within each prompt; no shape of the rewards is assumed. Ties are mid-ranks.

    Args:
        ref_rewards_PK: Rewards of K reference responses per prompt, shape (P, K).
        ref_log_ratios_PK: Their log π(y|x) − log p(y|x) in nats, shape (P, K).
        policy_rewards_PS: Rewards of S policy responses per prompt, shape (P, S).
        policy_log_ratios_PS: Their log-ratios, shape (P, S).

    Raises:
        InputError: A number is NaN or infinite, or the shapes do not fit.
    """

    def __init__(
        self,
        ref_rewards_PK: ArrayLike,
        ref_log_ratios_PK: ArrayLike,
        policy_rewards_PS: ArrayLike,
        policy_log_ratios_PS: ArrayLike,
    ) -> None:
        ref_PK, ref_ratios_PK = np.asarray(ref_rewards_PK, np.float64), np.asarray(ref_log_ratios_PK, np.float64)
        new_PS, new_ratios_PS = np.asarray(policy_rewards_PS, np.float64), np.asarray(policy_log_ratios_PS, np.float64)
        if ref_PK.ndim != 2 or new_PS.ndim != 2 or len(ref_PK) != len(new_PS) or not ref_PK.size:
            raise InputError(f"references have shape {ref_PK.shape}, policy responses {new_PS.shape}",
                             where="RefinedCalibrator", hint="Give (P, K) and (P, S) for the same prompts")  # fmt: skip
        for rewards, ratios in ((ref_PK, ref_ratios_PK), (new_PS, new_ratios_PS)):
            if rewards.shape != ratios.shape:
                raise InputError(f"rewards have shape {rewards.shape}, log-ratios {ratios.shape}",
                                 where="RefinedCalibrator")  # fmt: skip
        num_ref, num_new = ref_PK.shape[1], new_PS.shape[1]
        rewards_PR = np.concatenate([ref_PK, new_PS], axis=1)
        ratios_PR = np.concatenate([ref_ratios_PK, new_ratios_PS], axis=1)
        self._starts = np.arange(len(rewards_PR) + 1, dtype=np.int64) * rewards_PR.shape[1]
        _require_finite(rewards_PR.ravel(), self._starts, "RefinedCalibrator")
        _require_finite(ratios_PR.ravel(), self._starts, "RefinedCalibrator log-ratios")
        log_new = np.log(num_new) if num_new else -np.inf
        weights_PR = np.exp(-np.logaddexp(np.log(num_ref), log_new + ratios_PR))
        weights_PR /= weights_PR.sum(axis=1, keepdims=True)
        order_PR = np.argsort(rewards_PR, axis=1, kind="stable")
        self._sorted = np.take_along_axis(rewards_PR, order_PR, axis=1).ravel()
        self._weights_PR: FloatArray = np.take_along_axis(weights_PR, order_PR, axis=1)
        # Weight of all that come before, with the whole weight at the end; exactly 1, whatever the sums round to.
        self._before: FloatArray = np.pad(np.cumsum(self._weights_PR, axis=1), ((0, 0), (1, 0)))
        self._before /= self._before[:, -1:]

    @property
    def effective_num_ref_P(self) -> FloatArray:  # noqa: N802
        """How many equally weighted references say as much on average (Kish), shape (P,)."""
        return 1.0 / np.square(self._weights_PR).sum(axis=1)

    def calibrate(self, rewards: ArrayLike, *, prompt_index: ArrayLike | None = None) -> FloatArray:
        """Calibrated rewards in [0, 1]; arguments and errors are those of `RewardCalibrator.calibrate`."""
        scores, index = _aligned(rewards, prompt_index, len(self._before))
        below, equal = _count_below_and_equal(self._sorted, self._starts, scores.ravel(), index.ravel())
        row = index.ravel()
        quantile_B = 0.5 * (self._before[row, below] + self._before[row, below + equal])
        return quantile_B.reshape(scores.shape)


def _aligned(rewards: ArrayLike, prompt_index: ArrayLike | None, num_prompts: int) -> tuple[FloatArray, IntArray]:
    """Rewards, and the prompt of each in the same shape; an InputError where they do not fit or are not finite."""
    scores = np.asarray(rewards, dtype=np.float64)
    if prompt_index is None:
        if scores.ndim < 1 or scores.shape[0] != num_prompts:
            raise InputError(f"rewards have shape {scores.shape}, the calibrator holds "
                             f"{counted(num_prompts, 'prompt')}",
                             where="rewards", hint="Give one row per prompt, or say prompt_index")  # fmt: skip
        index = np.arange(num_prompts).reshape((-1,) + (1,) * (scores.ndim - 1))
    else:
        index = np.asarray(prompt_index)
        if not np.issubdtype(index.dtype, np.integer):
            raise InputError(f"prompt_index has type {index.dtype}", where="prompt_index", hint="Give whole numbers")
        outside = np.flatnonzero((index < 0) | (index >= num_prompts))
        if outside.size:
            raise InputError(f"prompt {index.ravel()[outside[0]]} is not one of the {num_prompts} fitted",
                             where="prompt_index")  # fmt: skip
    try:
        index = np.broadcast_to(index, scores.shape)
    except ValueError as error:
        raise InputError(
            f"prompt_index has shape {index.shape}, rewards {scores.shape}", where="prompt_index"
        ) from error
    bad = np.flatnonzero(~np.isfinite(scores))
    if bad.size:
        at = tuple(int(axis) for axis in np.argwhere(~np.isfinite(scores))[0])
        raise InputError(f"{counted(bad.size, 'reward is', 'rewards are')} NaN or infinite, the first at "
                         f"{at}", where="rewards",
                         hint="Leave unscored responses out")  # fmt: skip
    return scores, index


def _flatten(rewards: ArrayLike | Sequence[ArrayLike], mask_PK: ArrayLike | None) -> tuple[FloatArray, IntArray]:
    """All rewards in one flat array, and how many belong to each prompt."""
    if isinstance(rewards, Sequence) and _lengths_differ(cast("Sequence[Any]", rewards)):
        if mask_PK is not None:
            raise InputError(
                "a mask needs a (P, K) array", where="mask_PK", hint="Leave masked rewards out of the lists"
            )
        rows = [np.asarray(row, dtype=np.float64).ravel() for row in cast("Sequence[ArrayLike]", rewards)]
        return np.concatenate(rows), np.array([row.size for row in rows], dtype=np.int64)
    array = np.array(rewards, dtype=np.float64)
    if array.ndim != 2:
        raise InputError(f"reference rewards have shape {array.shape}", where="ref_rewards_PK",
                         hint="Give shape (P, K): prompts, references per prompt")  # fmt: skip
    if mask_PK is None:
        num_ref_P = np.repeat(np.int64(array.shape[1]), array.shape[0])
        return array.ravel(), num_ref_P
    mask: NDArray[np.bool_] = np.asarray(mask_PK)
    if mask.shape != array.shape or mask.dtype != np.bool_:
        raise InputError(
            f"the mask has shape {mask.shape} and type {mask.dtype}, rewards have shape {array.shape}",
            where="mask_PK",
            hint="Give a boolean array of the rewards' shape, True where a reward counts",
        )
    num_ref_P = np.add.reduce(mask, axis=1, dtype=np.int64)
    return array[mask], num_ref_P


def _lengths_differ(rewards: Sequence[Any]) -> bool:
    return len({np.asarray(row).size for row in rewards}) > 1


def _require_finite(flat: FloatArray, starts: IntArray, where: str) -> None:
    bad = np.flatnonzero(~np.isfinite(flat))
    if bad.size:
        first = int(bad[0])
        prompt = int(np.searchsorted(starts, first, side="right")) - 1
        raise InputError(
            f"{counted(bad.size, 'reward is', 'rewards are')} NaN or infinite, the first at prompt {prompt}, "
            f"reference {first - starts[prompt]}",
            where=where,
            hint="Score them again, or leave them out with a mask or ragged lists",
        )


def _count_below_and_equal(
    ordered: FloatArray, starts: IntArray, scores_B: FloatArray, index_B: IntArray
) -> tuple[IntArray, IntArray]:
    """For each score: how many of its prompt's references are below, and how many are equal."""
    left_B = _bisect(ordered, starts, scores_B, index_B, right=False)
    first_B = starts[index_B]
    # Most scores tie with nothing: search for the right end only where the reference at the left end is equal.
    inside_B = np.minimum(left_B, starts[index_B + 1] - 1)
    tied = np.flatnonzero((ordered[inside_B] == scores_B) & (left_B == inside_B))
    equal_B = np.zeros(scores_B.size, dtype=np.int64)
    if tied.size:
        equal_B[tied] = _bisect(ordered, starts, scores_B[tied], index_B[tied], right=True) - left_B[tied]
    return left_B - first_B, equal_B


def _bisect(ordered: FloatArray, starts: IntArray, scores_B: FloatArray, index_B: IntArray, *, right: bool) -> IntArray:
    """`searchsorted` of every score inside its own prompt's stretch of `ordered`, all at once: log2(K) gathers."""
    small = np.int32 if ordered.size < 2**31 else np.int64
    base_B = starts[index_B].astype(small)
    num_ref_P = np.diff(starts)
    # One scalar where every prompt has the same K is twice as fast as one number per score.
    same = num_ref_P.min() == num_ref_P.max()
    left_to_search: NDArray[Any] = np.asarray(num_ref_P[:1] if same else num_ref_P[index_B], dtype=small)
    compare = np.less_equal if right else np.less
    while left_to_search.max() > 1:
        half = left_to_search // small(2)
        # Where one is left, half is 0: it looks one place back, which may be another prompt's, and moves by 0.
        base_B += np.where(compare(ordered.take(np.maximum(base_B + half - small(1), 0)), scores_B), half, small(0))
        left_to_search = left_to_search - half
    base_B += compare(ordered.take(base_B), scores_B)
    return base_B.astype(np.int64)


def ranks_and_ties_left(
    below: IntArray, equal: IntArray, ties: Ties, rng: np.random.Generator
) -> tuple[FloatArray, IntArray]:
    """Ranks by the tie rule, and how many ties it leaves open: all of them as mid-ranks, none otherwise."""
    return resolve_ties(below, equal, ties, rng), equal if ties == "midrank" else np.zeros_like(equal)


def resolve_ties(below: IntArray, equal: IntArray, ties: Ties, rng: np.random.Generator) -> FloatArray:
    """Ranks from how many are below and how many equal, by the tie rule."""
    if ties == "midrank":
        return below + 0.5 * equal
    if ties == "strict":
        return below.astype(np.float64)
    if ties == "inclusive":
        return (below + equal).astype(np.float64)
    return (below + rng.integers(0, equal, endpoint=True)).astype(np.float64)
