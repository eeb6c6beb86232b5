"""Run an inference-time procedure: draw candidates, score them, return the one that the procedure picks."""

from __future__ import annotations

import hashlib
import itertools
import threading
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import NDArray

from infalign._io.progress import Progress, no_progress
from infalign._io.wording import counted
from infalign.calibration.calibrator import RewardCalibrator
from infalign.calibration.combined import CombinedCalibrator
from infalign.errors import InfalignError, InputError, RewardError
from infalign.procedures import BestOfN, EarlyStopping, InferenceProcedure, check_is_procedure, whole_number
from infalign.rewards.score import column_names, columns_of
from infalign.rewards.source import RewardSource, Scores
from infalign.rollouts.prompts import Message, Prompt
from infalign.select.candidates import CandidateSampler, Request

Float = NDArray[np.float64]


@dataclass(frozen=True)
class Candidate:
    """One response that was drawn.

    Attributes:
        text: The response.
        reward: Its reward; None where it was not or could not be scored.
        calibrated_reward: Its quantile among the reference's own responses (M5); None without a calibration.
        num_tokens: Tokens generated, with the end token; None where the sampler cannot tell.
        finish_reason: "stop" if it ended by itself, "length" if it was cut.
        error: Why it could not be scored.
    """

    text: str
    reward: float | None
    calibrated_reward: float | None
    num_tokens: int | None
    finish_reason: str
    error: str | None = None


@dataclass(frozen=True)
class Decoded:
    """What a procedure made of one prompt.

    Attributes:
        prompt: The prompt.
        chosen: The response that the user gets; one of the candidates.
        candidates: All that were drawn, in the order in which they were drawn.
        num_tokens: Tokens generated for all candidates; None where the sampler cannot tell.
        seconds: From the start of the call until this prompt was decided.
        procedure: What was done; for a mixture the part that was drawn.
    """

    prompt: Prompt
    chosen: Candidate
    candidates: tuple[Candidate, ...]
    num_tokens: int | None
    seconds: float
    procedure: InferenceProcedure


@dataclass
class Task:
    """One prompt under way; for decoders built on this one."""

    prompt: Prompt
    stream: str
    rng: np.random.Generator
    procedure: InferenceProcedure
    n: int
    blocks: list[int]  # how many candidates to draw, round by round, as long as it is not decided
    candidates: list[Candidate] = field(default_factory=list)
    num_tokens: int | None = 0


class Decoder:
    """Best-of-N, Worst-of-N, any order statistic, mixtures of them and early stopping, as real samplers.

    A procedure picks by the rank of the reward among its n candidates. Ties are broken at random, so where the policy's
    CDF of rewards is F, that of what comes out is exactly H(F), ties or not (a value that holds the mass from a to b
    comes out with probability H(b) - H(a)). A `Mixture` draws its part anew for every prompt.

    A candidate that could not be scored has no rank: its prompt fails, and says why, rather than being answered by a
    procedure of fewer candidates. `Standard` needs no reward, and takes one only to report it.

    May be used from several threads: a local model and a reward that runs in this process serve one call at a time.

    Args:
        sampler: Where candidates come from.
        reward: What scores them; may be None for `Standard`.
        procedure: What is done with them. Any procedure with a finite n and selection weights, or `EarlyStopping`.
        calibrator: Fitted on the reference's rewards; gives calibrated rewards for the prompts that it knows. Several
            rewards (`CombinedReward`) are combined by it, so every prompt must be one of them.
        prompt_ids: The prompt id of each of the calibrator's rows.
        stop_reward: Draw the candidates of a `BestOfN` in blocks and stop once one has this reward. Where it is the
            greatest that the reward can give, nothing is lost: what comes out has the distribution of Best-of-N, for
            responses that tie at the top are draws of the same law whichever of them is returned.
        block: Candidates per block with `stop_reward`.
        seed: Decides, with the prompt and the number of the call, what is drawn.

    Raises:
        InputError: The procedure cannot be decoded, or something that it needs was not given.
    """

    def __init__(
        self,
        sampler: CandidateSampler,
        reward: RewardSource | None,
        procedure: InferenceProcedure,
        *,
        calibrator: RewardCalibrator | CombinedCalibrator | None = None,
        prompt_ids: Sequence[str] | None = None,
        stop_reward: float | None = None,
        block: int = 1,
        seed: int = 0,
    ) -> None:
        check_is_procedure(procedure, "Decoder")
        if (calibrator is None) != (prompt_ids is None):
            raise InputError("a calibrator goes with the prompt ids of its rows", where="Decoder", hint="Give both")
        if calibrator is not None and prompt_ids is not None and len(prompt_ids) != calibrator.num_prompts:
            raise InputError(
                f"{len(prompt_ids)} prompt ids for a calibrator of {counted(calibrator.num_prompts, 'prompt')}",
                where="Decoder",
                hint="Give one id per row that the calibrator was fitted on, in the same order",
            )
        if stop_reward is not None and not np.isfinite(stop_reward):
            raise InputError(f"stop_reward is {stop_reward}", where="Decoder", hint="Give a finite number")
        self.sampler = sampler
        self.reward = reward
        self.procedure = procedure
        self.calibrator = calibrator
        self.stop_reward = stop_reward
        self.block = whole_number(block, "block", "Decoder")
        self.seed = seed
        self._row_of = {prompt_id: row for row, prompt_id in enumerate(prompt_ids or ())}
        self._calls = itertools.count()
        self._scoring = nullcontext() if reward is not None and reward.concurrent else threading.Lock()
        for _, part in procedure.components:
            self._require(part)

    def decode(
        self,
        prompts: Sequence[Prompt | str | list[Message]],
        progress: Progress | None = None,
        *,
        call: int | None = None,
    ) -> list[Decoded]:
        """Answer every prompt.

        Args:
            prompts: Text, chat messages, or `Prompt`s, whose columns go to the reward. The same prompt may come several
                times; each gets its own candidates.
            progress: Called after each round of draws with the prompts that are answered, and all.
            call: Which row of draws to take. By default every call draws afresh. With a number, what comes out depends
                on the seed, the number and the prompt alone, not on earlier calls or on the other prompts.

        Returns:
            One answer per prompt, in their order.

        Raises:
            InfalignError: The first of a prompt, of those that `decode_each` names. Use that to keep the
                answers of the others.
        """
        answers: list[Decoded] = []
        for answer in self.decode_each(prompts, progress, call=call):
            if isinstance(answer, InfalignError):
                raise answer
            answers.append(answer)
        return answers

    def decode_each(
        self,
        prompts: Sequence[Prompt | str | list[Message]],
        progress: Progress | None = None,
        *,
        call: int | None = None,
    ) -> list[Decoded | InfalignError]:
        """As `decode`, but with the error in the place of an answer that cannot be given.

        Returns:
            For each prompt its answer, or: an InputError (it leaves no room for a response; nothing to calibrate it
            with, where the procedure needs that), an EndpointError (the server did not answer), a RewardError (a
            candidate has no reward).
        """
        started = time.perf_counter()
        call = next(self._calls) if call is None else call
        report = progress or no_progress
        answers: dict[int, Decoded | InfalignError] = {}
        seen: Counter[str] = Counter()
        tasks: dict[int, Task] = {}
        for at, given in enumerate(prompts):
            prompt = given if isinstance(given, Prompt) else Prompt(given)
            tasks[at] = self._begin(prompt, f"{prompt.id}/{seen[prompt.id]}/{call}")
            seen[prompt.id] += 1
            if isinstance(tasks[at].procedure, EarlyStopping) and prompt.id not in self._row_of:
                answers[at] = InputError(
                    f"prompt {prompt.id} has no reference rewards to find its quantiles with",
                    where=tasks[at].procedure.label,
                    hint="Calibrate on this prompt, use Best-of-N, or stop at a reward (stop_reward)",
                )
                del tasks[at]
        names = column_names([task.prompt for task in tasks.values()])
        while tasks:
            report(len(answers), len(prompts), "")
            for at, answer in self._round(tasks, names).items():
                answers[at] = answer if isinstance(answer, InfalignError) else replace(
                    answer, seconds=time.perf_counter() - started
                )  # fmt: skip
                del tasks[at]
        report(len(answers), len(prompts), "")
        return [answers[at] for at in range(len(prompts))]

    # --- inside -------------------------------------------------------------------------------------------------------

    def _require(self, part: InferenceProcedure) -> None:
        """Refuse a part that cannot be run, before anything is drawn."""
        if part.n is None:
            raise InputError(
                f"{part.label} does not say how many candidates it draws",
                where="Decoder",
                hint="Use one with a finite n: Standard, BestOfN, WorstOfN, OrderStatistic, or a Mixture of them",
            )
        if self.reward is None and part.n > 1:
            raise InputError(f"{part.label} needs a reward to rank candidates by", where="Decoder", hint="Give one")
        if isinstance(part, EarlyStopping):
            if self.calibrator is None:
                raise InputError(
                    f"{part.label} stops at a calibrated reward, and there is no calibration",
                    where="Decoder",
                    hint="Give a calibrator with its prompt ids, or stop at a reward (stop_reward)",
                )
        else:
            part.selection_weights(part.n)
        if self.stop_reward is not None and not isinstance(part, BestOfN | EarlyStopping):
            raise InputError(
                f"stop_reward is for Best-of-N: the first good response does not decide {part.label}", where="Decoder"
            )

    def _begin(self, prompt: Prompt, stream: str) -> Task:
        digest = hashlib.blake2b(f"{self.seed}\0{stream}\0choice".encode(), digest_size=16).digest()
        rng = np.random.Generator(np.random.Philox(key=int.from_bytes(digest, "little")))
        components = self.procedure.components
        _, part = components[int(rng.choice(len(components), p=[weight for weight, _ in components]))]
        n = part.n or 1  # never None: `_require` saw to that
        blocks = [n]
        if isinstance(part, EarlyStopping):
            blocks = list(part.block_sizes)
        elif self.stop_reward is not None:
            blocks = list(EarlyStopping(n, 1.0, min(self.block, n)).block_sizes)
        return Task(prompt, stream, rng, part, n, blocks)

    def _round(self, tasks: dict[int, Task], names: Sequence[str]) -> dict[int, Decoded | InfalignError]:
        """Draw and score one block for every task; returns those that are decided by it."""
        requests: list[Request] = []
        for task in tasks.values():
            first = len(task.candidates)
            requests.append(Request(task.prompt, task.stream, range(first, first + task.blocks.pop(0))))
        decided: dict[int, Decoded | InfalignError] = {}
        new: dict[int, list[Candidate]] = {}
        for (at, task), drawn in zip(tasks.items(), self.sampler.draw(requests, self.seed), strict=True):
            if isinstance(drawn, InfalignError):
                decided[at] = drawn
                continue
            if drawn.num_tokens is None or task.num_tokens is None:
                task.num_tokens = None
            else:
                task.num_tokens += drawn.num_tokens
            new[at] = [Candidate(one.text, None, None, one.num_tokens, one.finish_reason) for one in drawn.draws]
        for at, scored in self._score({at: (tasks[at], candidates) for at, candidates in new.items()}, names).items():
            task = tasks[at]
            if isinstance(scored, InfalignError):
                decided[at] = scored
                continue
            task.candidates += scored
            try:
                chosen = self._choose(task)
            except RewardError as error:
                decided[at] = error
                continue
            if chosen is not None:
                decided[at] = Decoded(task.prompt, chosen, tuple(task.candidates), task.num_tokens, 0.0, task.procedure)
        return decided

    def _choose(self, task: Task) -> Candidate | None:
        """The candidate that the procedure picks; None while it wants more of them."""
        part, candidates = task.procedure, task.candidates
        if task.n == 1:
            return candidates[0]
        unscored = [one for one in candidates if one.reward is None]
        if unscored:
            raise RewardError(
                f"{len(unscored)} of {counted(len(candidates), 'candidate')} for prompt {task.prompt.id} could "
                f"not be scored ({unscored[0].error or 'no reason given'})",
                where=str(self.reward),
                hint=f"Fix the reward: {part.label} is a matter of ranks, and needs every candidate's",
            )
        good = any(self._good_enough(part, one) for one in candidates)
        if task.blocks and not good:
            return None
        # The best of what there is, where drawing was stopped; else the rank that the procedure picks of its n.
        rank = len(candidates) - 1
        if not isinstance(part, EarlyStopping) and len(candidates) == task.n:
            rank = int(task.rng.choice(task.n, p=part.selection_weights(task.n)))
        rewards = np.array([one.reward for one in candidates], dtype=np.float64)
        return candidates[int(np.lexsort((task.rng.random(len(candidates)), rewards))[rank])]

    def _good_enough(self, part: InferenceProcedure, candidate: Candidate) -> bool:
        if self.stop_reward is not None and candidate.reward is not None and candidate.reward >= self.stop_reward:
            return True
        return (
            isinstance(part, EarlyStopping)
            and candidate.calibrated_reward is not None
            and candidate.calibrated_reward >= part.stop_at
        )

    def _score(
        self, new: dict[int, tuple[Task, list[Candidate]]], names: Sequence[str]
    ) -> dict[int, list[Candidate] | InfalignError]:
        """The candidates with their rewards. Where scoring all at once fails, each prompt is tried by itself."""
        if self.reward is None or not new:
            return {at: candidates for at, (_, candidates) in new.items()}
        flat = [(task.prompt, candidate) for task, candidates in new.values() for candidate in candidates]
        try:
            with self._scoring:
                owners = [prompt for prompt, _ in flat]
                texts = [candidate.text for _, candidate in flat]
                prompts = [prompt.prompt for prompt in owners]
                scores = self.reward.score_rows(prompts, texts, **columns_of(owners, names))
                rewards, calibrated = self._calibrate(owners, scores)
        except InfalignError as error:
            if len(new) == 1:
                return dict.fromkeys(new, error)
            return {key: value for at in new for key, value in self._score({at: new[at]}, names).items()}
        scored = iter(
            replace(
                candidate,
                reward=None if np.isnan(reward) else float(reward),
                calibrated_reward=None if np.isnan(quantile) else float(quantile),
                error=reason,
            )
            for (_, candidate), reward, quantile, reason in zip(flat, rewards, calibrated, scores.errors, strict=True)
        )
        return {at: list(itertools.islice(scored, len(candidates))) for at, (_, candidates) in new.items()}

    def _calibrate(self, owners: Sequence[Prompt], scores: Scores) -> tuple[Float, Float]:
        """One reward for each candidate, and its calibrated reward (M5), NaN where there is none."""
        row_B = np.array([self._row_of.get(prompt.id, -1) for prompt in owners])
        known = np.flatnonzero((row_B >= 0) & ~np.isnan(scores.rewards).reshape(len(owners), -1).any(axis=1))
        rewards, quantiles = scores.rewards, np.full(len(owners), np.nan)
        if rewards.ndim == 2:
            if not isinstance(self.calibrator, CombinedCalibrator) or (row_B < 0).any():
                raise InputError(
                    "several rewards can only be combined by where they lie among a reference's, and there is none",
                    where=str(self.reward),
                    hint="Calibrate on this prompt, or decode with one reward",
                )
            rewards = np.full(len(owners), np.nan)
            rewards[known] = self.calibrator.score(scores.rewards[known], prompt_index=row_B[known])
        if self.calibrator is not None:
            quantiles[known] = self.calibrator.calibrate(scores.rewards[known], prompt_index=row_B[known])
        return rewards, quantiles
