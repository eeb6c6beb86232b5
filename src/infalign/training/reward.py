"""Score → calibrate → transform: what RL maximises, as a TRL reward function.

The object here goes unchanged into any trainer that calls `reward(prompts=…, completions=…, **columns)`, such as
TRL's `RLOOTrainer` and `GRPOTrainer`; the data set only needs a `prompt_id` column. What it pays is said by its target
(`target.py`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.errors import InputError, RewardError
from infalign.procedures import InferenceProcedure
from infalign.rewards.score import column_names, columns_of
from infalign.rewards.source import RewardSource
from infalign.rollouts.prompts import Prompt
from infalign.training.drop_in import calling_trainer, texts_in_context, warn_of_settings
from infalign.training.mixture import check_weight
from infalign.training.ranked import RankedRollouts
from infalign.training.target import Maximised, Scale, Target, Utility, follower_of, levels_of, target_of

Float = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Paid:
    """Some rollouts, compared once with their references, and the target that they are paid by.

    What they are paid and the log Z that belongs to it both come from here, in whatever order they are asked for, also
    after the target of the next step is another one.

    Attributes:
        ranked: The comparison.
        target: The target at the time.
    """

    ranked: RankedRollouts
    target: Target

    @property
    def nats_B(self) -> Float:  # noqa: N802
        """What each rollout is paid, in nats."""
        return self.target.nats(self.ranked)

    @property
    def log_partition_B(self) -> Float:  # noqa: N802
        """Log Z on each one's prompt, in nats."""
        return self.target.log_partition(self.ranked.prompt_B)


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
        transform: Φ; a `SelfConsistentTransform` follows the policy from one call to the next. Or the utility of a
            comparator, which is paid for raw rewards (`methods/`).
        beta: β > 0, in units of Φ per nat. May be changed during training (`reward.beta = …`).
        procedure: What the policy will be used through, for the win rate in the log; a `SelfConsistentTransform` knows.
        mixture_weight: ε in (0, 1], below 1 for training inside a mixture with the reference (M19): the policy's share.
            By default a `SelfConsistentTransform`'s own, else 1.

    Attributes:
        follower: The transform, if it follows the policy; else None.
        strength: Share of the tilt that is in force, in (0, 1]; below 1 while training anneals (`steering.py`).
        tilt_cap: Most nats that a tilt may lie above log Z (`tilt.py`); None for no cap.
        paid: The rollouts of this process that were scored last, and the target that they were paid by.
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
        transform: Maximised,
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
        self.follower = follower_of(transform)
        own_weight = 1.0 if self.follower is None else self.follower.weight
        self.mixture_weight = check_weight(own_weight if mixture_weight is None else mixture_weight)
        self.procedure = procedure
        if self.follower is not None:
            self.follower.weight = self.mixture_weight
            self.procedure = self.follower.procedure
        self._prompt_of: dict[str, Prompt] = {}
        self._columns: list[str] = []
        self.paid: Paid | None = None
        self.ranked: RankedRollouts | None = None
        self.win_rate: float | None = None
        self._checked = False  # whether the calling trainer's settings have been looked at
        self._row_of = {prompt_id: row for row, prompt_id in enumerate(prompt_ids)}
        self._levels = levels_of(calibrator)
        self._target: Target | None = None  # made when it is first needed
        self._strength = 1.0
        self._tilt_cap: float | None = None
        self.beta = beta
        kind = "reward" if isinstance(transform, Utility) else "transformed reward"
        self.__name__ = f"{transform.label} {kind}"  # the name TRL logs it under

    @property
    def beta(self) -> float:
        """KL coefficient, in units of Φ per nat."""
        return self._beta

    @beta.setter
    def beta(self, beta: float) -> None:
        if not (np.isfinite(beta) and beta > 0):
            raise InputError(f"beta must be a positive number, not {beta}", where="TransformedReward")
        self._beta = float(beta)
        self._target = None

    @property
    def strength(self) -> float:
        """Share s of the tilt that is in force: the policy aimed at is p^(1 − s)·π*^s, normalised."""
        return self._strength

    @strength.setter
    def strength(self, strength: float) -> None:
        if strength != self._strength:
            self._strength = strength
            self._target = None

    @property
    def tilt_cap(self) -> float | None:
        """Most nats that a tilt may lie above log Z; uncalibrated rewards have none."""
        return self._tilt_cap

    @tilt_cap.setter
    def tilt_cap(self, cap: float | None) -> None:
        if cap is not None and not (np.isfinite(cap) and cap > 0):
            raise InputError(f"tilt_cap must be a positive number of nats, not {cap}", where="TransformedReward")
        self._tilt_cap = cap
        self._target = None

    def take_columns_from(self, prompts: Sequence[Prompt]) -> None:
        """Give the source the columns of these prompts' rows, as scoring a store does, not those of a data set."""
        self._prompt_of = {prompt.id: prompt for prompt in prompts}
        self._columns = column_names(prompts)

    def calibrate(self, rewards: Float, prompt_id: Sequence[str]) -> Float:
        """Calibrated rewards C in [0, 1] (M5) of raw `rewards`, shape (B,), or (B, M) of several sources."""
        return self.calibrator.calibrate(rewards, prompt_index=self.rows(prompt_id))

    @property
    def target(self) -> Target:
        """What a response would be paid now: at the present β, strength, cap and estimate of the policy."""
        if self._target is None:
            scale = Scale(self.beta, self.strength, self.tilt_cap, self.mixture_weight)
            self._target = target_of(self.transform, self.calibrator, scale, self._levels)
        return self._target

    def pay(self, rewards: Float, prompt_id: Sequence[str]) -> Paid:
        """Compare raw `rewards`, as in `calibrate`, with their prompts' references, once, and pay by the target."""
        return Paid(self.rank(rewards, prompt_id), self.target)

    def tilt(self, rewards: Float, prompt_id: Sequence[str]) -> Float:
        """Φ_K(b)/β in nats (M6, M17), times `strength`, shape (B,), of raw `rewards` as in `calibrate`."""
        return self.pay(rewards, prompt_id).nats_B

    def log_normalizer(self, prompt_id: Sequence[str]) -> Float:
        """Log Z = log E_p exp(Φ_K(b)/β) of each prompt (M6) by the present target, in nats, shape (B,)."""
        return self.target.log_partition(self.rows(prompt_id))

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
        paid = self.paid = self.pay(rewards, prompt_id)
        ranked, nats_B = paid.ranked, paid.nats_B
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
        return nats_B.tolist()

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
        return RankedRollouts(rows, below_B, equal_B, self.calibrator.num_ref_P[rows], rank_B, tied_B, rewards)

    def follow(self, ranked: RankedRollouts) -> None:
        """Let a transform that follows the policy take in rollouts of it; others stay as they are."""
        if self.follower is not None:
            self.follower.update(ranked)
            self._target = None

    def restart(self) -> None:
        """Let a transform that follows the policy begin at the reference again."""
        if self.follower is not None:
            self.follower.restart()
            self._target = None

    def state(self) -> dict[str, Any]:
        """What changes during training, JSON-able."""
        return {"beta": self.beta, "transform": None if self.follower is None else self.follower.state()}

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Go on from a state."""
        if self.follower is not None:
            self.follower.load_state(state.get("transform") or {})
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
