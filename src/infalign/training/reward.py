"""Score → calibrate → transform: what RL maximises, as a TRL reward function.

The object here goes unchanged into any trainer that calls `reward(prompts=…, completions=…, **columns)`, such as
TRL's `RLOOTrainer` and `GRPOTrainer`; the data set only needs a `prompt_id` column.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.calibration import RewardCalibrator
from infalign.combined_calibration import CombinedCalibrator
from infalign.data import Prompt
from infalign.errors import InputError, RewardError
from infalign.procedures import InferenceProcedure
from infalign.rollouts.rewards import RewardSource
from infalign.rollouts.score import column_names, columns_of
from infalign.theory.finite_k import tilt_at_ranks
from infalign.training.drop_in import calling_trainer, texts_in_context, warn_of_settings
from infalign.training.mixture import check_weight, mixture_log_partition
from infalign.training.rank_value import RankTable
from infalign.training.ranked import RankedRollouts
from infalign.training.self_consistent import SelfConsistentTransform
from infalign.training.tilt import tilt_by_rank, tilt_of_reward
from infalign.transforms import RewardTransform

Float = NDArray[np.float64]


class TransformedReward:
    """Φ(C(x, y)) / β for responses to known prompts (M1, M5, M6).

    Divided by β, the reward is in nats: the trainer's own KL coefficient must be 1, so that `reward − KL` is the
    objective of KL-regularised RL with transform Φ at KL coefficient β, divided by β.

    With K references the calibrated reward is a rank b in 0..K. Its tilt is the rank-conditional Φ_K(b) (M6), which
    keeps the normaliser exact where plugging in b/K would over-tilt; a self-consistent transform pays the mean of what
    the rank leaves open, at the policy's distribution on that prompt (M17). Both have a floor (`training/tilt.py`).

    Args:
        source: Scores responses; a `CombinedReward` gives several rewards each.
        calibrator: Fitted on the reference policy's rewards, one row per prompt; a `CombinedCalibrator` for several.
        prompt_ids: The prompt id of each of the calibrator's rows.
        transform: Φ; a `SelfConsistentTransform` follows the policy from one call to the next.
        beta: β > 0, in units of Φ per nat. May be changed during training (`reward.beta = …`).
        procedure: What the policy will be used through, for the win rate in the log; a `SelfConsistentTransform` knows.
        mixture_weight: ε in (0, 1], below 1 for training inside a mixture with the reference (M19): the policy's share.
            By default a `SelfConsistentTransform`'s own, else 1.

    Attributes:
        strength: Share of the tilt that is in force, in (0, 1]; below 1 while training anneals (`steering.py`).
        tilt_cap: Most nats that a tilt may lie above log Z (`tilt.py`); None for no cap.
        ranked: How the rollouts scored last stand among the references; those of all processes in a training.
        win_rate: Their estimated inference-time win rate (M10); None where they are too few.

    Raises:
        InputError: If `prompt_ids` and the calibrator's rows differ in number, or `beta` is not positive.
    """

    def __init__(
        self,
        source: RewardSource,
        calibrator: RewardCalibrator | CombinedCalibrator,
        prompt_ids: Sequence[str],
        transform: RewardTransform | SelfConsistentTransform,
        beta: float,
        *,
        procedure: InferenceProcedure | None = None,
        mixture_weight: float | None = None,
    ) -> None:
        if len(prompt_ids) != calibrator.num_prompts:
            raise InputError(
                f"{len(prompt_ids)} prompt ids for a calibrator of {calibrator.num_prompts} prompts",
                where="TransformedReward",
                hint="Give one id per row that the calibrator was fitted on, in the same order",
            )
        self.source = source
        self.calibrator = calibrator
        self.transform = transform
        own_weight = transform.weight if isinstance(transform, SelfConsistentTransform) else 1.0
        self.mixture_weight = check_weight(own_weight if mixture_weight is None else mixture_weight)
        if isinstance(transform, SelfConsistentTransform):
            transform.weight = self.mixture_weight
        self._prompt_of: dict[str, Prompt] = {}
        self._columns: list[str] = []
        self.procedure = transform.procedure if isinstance(transform, SelfConsistentTransform) else procedure
        self.ranked: RankedRollouts | None = None
        self.win_rate: float | None = None
        self._checked = False  # whether the calling trainer's settings have been looked at
        self._row_of = {prompt_id: row for row, prompt_id in enumerate(prompt_ids)}
        self._levels_of_row: dict[int, NDArray[np.int64]] = {}
        self._strength = 1.0
        self._tilt_cap: float | None = None
        self.beta = beta
        self.__name__ = f"{transform.label} transformed reward"  # the name TRL logs it under

    @property
    def beta(self) -> float:
        """KL coefficient, in units of Φ per nat."""
        return self._beta

    @beta.setter
    def beta(self, beta: float) -> None:
        if not (np.isfinite(beta) and beta > 0):
            raise InputError(f"beta must be a positive number, not {beta}", where="TransformedReward")
        self._beta = float(beta)
        self._forget_tilts()

    @property
    def strength(self) -> float:
        """Share s of the tilt that is in force: the policy aimed at is p^(1 − s)·π*^s, normalised."""
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        if strength != self._strength:
            self._strength = strength
            self._forget_tilts()

    @property
    def tilt_cap(self) -> float | None:
        """Most nats that a tilt may lie above log Z; uncalibrated rewards have none."""
        return self._tilt_cap

    @tilt_cap.setter
    def tilt_cap(self, cap: float | None) -> None:
        if cap is not None and not (np.isfinite(cap) and cap > 0):
            raise InputError(f"tilt_cap must be a positive number of nats, not {cap}", where="TransformedReward")
        self._tilt_cap = cap
        self._forget_tilts()

    def take_columns_from(self, prompts: Sequence[Prompt]) -> None:
        """Give the source the columns of these prompts' rows, as scoring a store does, not those of a data set."""
        self._prompt_of = {prompt.id: prompt for prompt in prompts}
        self._columns = column_names(prompts)

    def calibrate(self, rewards: Float, prompt_id: Sequence[str]) -> Float:
        """Calibrated rewards C in [0, 1] (M5) of raw `rewards`, shape (B,), or (B, M) of several sources."""
        return self.calibrator.calibrate(rewards, prompt_index=self.rows(prompt_id))

    def tilt(self, rewards: Float, prompt_id: Sequence[str], ranked: RankedRollouts | None = None) -> Float:
        """Φ_K(b)/β in nats (M6, M17), times `strength`, shape (B,).

        Args:
            rewards: Raw rewards, as in `calibrate`.
            prompt_id: The prompt of each.
            ranked: What `rank` gave for them, where they have been compared already.
        """
        found = self.rank(rewards, prompt_id) if ranked is None else ranked
        out_B = np.empty(len(found))
        if isinstance(self.transform, SelfConsistentTransform):
            for row in np.unique(found.prompt_B):
                of_row = found.prompt_B == row
                out_B[of_row] = self._tilt_table(int(row)).at(found.first_B[of_row], found.tied_B[of_row])
            return out_B
        for num_ref in np.unique(found.num_ref_B):
            of_K = found.num_ref_B == num_ref
            out_B[of_K] = tilt_at_ranks(self._tilt_by_rank(int(num_ref)), 1.0, found.rank_B[of_K], found.tied_B[of_K])
        return out_B

    def log_normalizer(self, prompt_id: Sequence[str]) -> Float:
        """Log Z = log E_p exp(Φ_K(b)/β) of each prompt (M6), in nats, shape (B,)."""
        row_B, weight = self.rows(prompt_id), self.mixture_weight
        if isinstance(self.transform, SelfConsistentTransform):
            return np.array([mixture_log_partition(self._tilt_table(int(row)).half_cells, weight) for row in row_B])
        num_ref_B = self.calibrator.num_ref_P[row_B]
        return np.array([mixture_log_partition(self._tilt_by_rank(int(k)), weight) for k in num_ref_B])

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        *,
        prompt_id: Sequence[str] | None = None,
        log_metric: Callable[[str, float], None] | None = None,
        **columns: Any,
    ) -> list[float]:
        """Φ_K/β of each response; TRL's reward-function signature.

        When a TRL trainer calls for the first time, settings of it that would change the objective are warned about
        (`drop_in.check_trainer`).

        Args:
            prompts: B prompts, strings or chat messages.
            completions: B responses, strings or chat messages.
            prompt_id: Column of the training data set: the id of each prompt.
            log_metric: TRL's hook for further metrics.
            **columns: TRL's other keyword arguments and data set columns; passed to the reward source.

        Raises:
            InputError: If there is no `prompt_id`, or one that the calibrator does not know.
            RewardError: If the source leaves a response without a finite score.
        """
        trainer = calling_trainer(log_metric)
        if not self._checked and trainer is not None:
            self._checked = True
            warn_of_settings(trainer, self)
        if prompt_id is None:
            raise InputError(
                "the training data has no column prompt_id",
                where="TransformedReward",
                hint="Add the prompt ids that the calibration was fitted with, and keep remove_unused_columns=False",
            )
        if trainer is not None and not getattr(trainer, "tells_texts", False):
            given = zip(prompt_id, prompts, strict=True)
            known = [self._prompt_of[i] if i in self._prompt_of else Prompt(prompt) for i, prompt in given]
            completions = texts_in_context(trainer, known, completions, columns.get("completion_ids"))
        rewards = self.score(prompts, completions, prompt_id, **columns)
        ranked = self.rank(rewards, prompt_id)
        tilt_B = self.tilt(rewards, prompt_id, ranked)
        # Called by a trainer, every process does this at the same time: the state is then that of all their rollouts.
        self.ranked = ranked if log_metric is None else ranked.of_all_processes()
        own = self.procedure if self.mixture_weight == 1.0 else None  # of the trained model alone
        won_P = None if own is None else self.ranked.win_rate_P(own)
        self.win_rate = None if won_P is None else float(won_P.mean())
        if log_metric is not None:
            log_metric("calibrated_reward", float((ranked.rank_B / ranked.num_ref_B).mean()))
            # Several raw rewards have no common scale: the first stands for them in the log.
            log_metric("raw_reward", float(rewards.reshape(len(rewards), -1)[:, 0].mean()))
            log_metric("tie_mass", self.ranked.tie_mass)
            if self.win_rate is not None:
                log_metric("win_rate", self.win_rate)
        self.follow(self.ranked)  # after use: a reward must not depend on its own noise
        return tilt_B.tolist()

    def score(
        self, prompts: Sequence[Any], completions: Sequence[Any], prompt_id: Sequence[str], **columns: Any
    ) -> Float:
        """Raw rewards of responses to known prompts, shape (B,), or (B, M) of several sources.

        After `take_columns_from` the source is shown the prompts and columns given there, and nothing that a trainer
        adds, so that it sees what it saw when the references were scored.

        Raises:
            InputError: If a prompt's columns are to be taken from its row and the prompt is unknown.
            RewardError: If the source leaves a response without a finite score.
        """
        if self._prompt_of:
            self.rows(prompt_id)
            known = [self._prompt_of[i] for i in prompt_id]
            prompts, columns = [prompt.prompt for prompt in known], columns_of(known, self._columns)
        scores = self.source.score_rows(prompts, completions, **{**columns, "prompt_id": list(prompt_id)})
        rewards = scores.rewards
        finite_B = np.isfinite(rewards).reshape(len(rewards), -1).all(axis=1)
        if not finite_B.all():
            bad = np.flatnonzero(~finite_B)
            raise RewardError(
                f"{len(bad)} of {len(rewards)} responses have no finite reward, the first to prompt "
                f"{prompt_id[bad[0]]} ({scores.errors[bad[0]] or rewards[bad[0]]})",
                where=str(self.source),
                hint="In training every response needs a number; fix the reward for such responses",
            )
        return rewards

    def rank(self, rewards: Float, prompt_id: Sequence[str]) -> RankedRollouts:
        """Compare raw `rewards`, as in `calibrate`, with their prompts' references: once, ties by lot included."""
        rows = self.rows(prompt_id)
        below_B, equal_B = self.calibrator.compare(rewards, prompt_index=rows)
        rank_B, tied_B = self.calibrator.resolve(below_B, equal_B)
        return RankedRollouts(rows, below_B, equal_B, self.calibrator.num_ref_P[rows], rank_B, tied_B)

    def follow(self, ranked: RankedRollouts) -> None:
        """Let a self-consistent transform take in rollouts of the policy; other transforms stay as they are."""
        if isinstance(self.transform, SelfConsistentTransform):
            self.transform.update(ranked)
            self._forget_tilts()

    def state(self) -> dict[str, Any]:
        """What changes during training, JSON-able."""
        following = self.transform.state() if isinstance(self.transform, SelfConsistentTransform) else None
        return {"beta": self.beta, "transform": following}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        if isinstance(self.transform, SelfConsistentTransform):
            self.transform.load_state(state.get("transform") or {})
        self.beta = state["beta"]

    def rows(self, prompt_id: Sequence[str]) -> NDArray[np.intp]:
        """Which of the calibrator's rows belong to these prompts, shape (B,).

        Raises:
            InputError: If the calibrator does not know one of them.
        """
        try:
            return np.array([self._row_of[i] for i in prompt_id], dtype=np.intp)
        except KeyError as missing:
            raise InputError(
                f"prompt {missing.args[0]!r} has no reference rollouts to calibrate with",
                where="TransformedReward",
                hint="Draw reference rollouts for every training prompt first",
            ) from None

    def _forget_tilts(self) -> None:
        self._tilt_of_K: dict[int, Float] = {}
        self._tilt_of_row: dict[int, RankTable] = {}

    def _tilt_by_rank(self, num_ref: int) -> Float:
        assert not isinstance(self.transform, SelfConsistentTransform), "it has a table for every prompt"
        if num_ref not in self._tilt_of_K:
            self._tilt_of_K[num_ref] = self.strength * tilt_by_rank(self.transform, self.beta, num_ref, self.tilt_cap)
        return self._tilt_of_K[num_ref]

    def _tilt_table(self, row: int) -> RankTable:
        assert isinstance(self.transform, SelfConsistentTransform), "others have one table for all prompts"
        if row not in self._tilt_of_row:
            if row not in self._levels_of_row:
                self._levels_of_row[row] = self.calibrator.level_counts(row)
            # A tie rule that decides ties leaves no levels: every rank is then its own.
            levels = self._levels_of_row[row] if self.calibrator.ties == "midrank" else None
            reward = self.transform.reward(int(self.calibrator.num_ref_P[row]), row, levels)
            self._tilt_of_row[row] = tilt_of_reward(reward, self.beta, self.tilt_cap).times(self.strength)
        return self._tilt_of_row[row]
