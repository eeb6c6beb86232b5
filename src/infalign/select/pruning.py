"""Best-of-N that rejects hopeless candidates part-way, where a reward can judge beginnings. A heuristic.

All candidates of a prompt are drawn some tokens at a time; after each stage their beginnings are scored, and only the
best of them go on. What that loses depends on how well beginnings foretell the reward: unlike early stopping it has no
theory, so measure it (`benchmarks/decode.py`) before relying on it.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from infalign._io.wording import counted
from infalign.errors import InfalignError, InputError, RewardError
from infalign.procedures import BestOfN, InferenceProcedure, whole_number
from infalign.rewards.source import RewardSource
from infalign.select.candidates import CandidateSampler
from infalign.select.decoder import Candidate, Decoded, Decoder, Task
from infalign.select.local import Beginning, LocalSampler

REJECTED = "rejected"


@dataclass(frozen=True)
class Pruning:
    """When beginnings are judged, and how many go on.

    Args:
        every: Tokens between two looks.
        keep: At each look an unfinished candidate goes on if it is in this upper share of those that are still in the
            running or have come to their end; in (0, 1].
    """

    every: int
    keep: float = 0.5

    def __post_init__(self) -> None:
        object.__setattr__(self, "every", whole_number(self.every, "every", "Pruning"))
        if not 0.0 < self.keep <= 1.0:
            raise InputError(f"keep is {self.keep}", where="Pruning", hint="Give a share in (0, 1], such as 0.5")


class PruningDecoder(Decoder):
    """`Decoder` for Best-of-N on a local model that gives candidates up part-way.

    Candidate `index` of a prompt is the same as without pruning, as far as it gets, so the two can be compared pair by
    pair. A rejected candidate keeps its text so far and the reward of that, has `finish_reason` "rejected", and is
    never chosen. Candidates are listed in the order in which they ended or were rejected.

    Args:
        sampler: A local model.
        reward: Scores whole responses and beginnings alike.
        procedure: Best-of-N.
        pruning: When to look and how many to keep.
        **settings: As for `Decoder`: calibrator, prompt_ids, seed.

    Raises:
        InputError: As for `Decoder`; or the procedure is not Best-of-N, or the model is not in this process.
    """

    def __init__(
        self,
        sampler: CandidateSampler,
        reward: RewardSource | None,
        procedure: InferenceProcedure,
        pruning: Pruning,
        **settings: Any,
    ) -> None:
        if not isinstance(procedure, BestOfN):
            raise InputError(
                "only Best-of-N can reject what is not among the best so far", where="PruningDecoder",
                hint="Use Decoder for other procedures",
            )  # fmt: skip
        if not isinstance(sampler, LocalSampler):
            raise InputError("the model must be in this process", where="PruningDecoder", hint="Give a LocalSampler")
        if settings.get("stop_reward") is not None:
            raise InputError("stop_reward does not go with pruning", where="PruningDecoder", hint="Leave one out")
        super().__init__(sampler, reward, procedure, **settings)
        self.pruning = pruning
        self._local = sampler

    def _round(self, tasks: dict[int, Task], names: Sequence[str]) -> dict[int, Decoded | InfalignError]:
        """All stages of every task."""
        decided: dict[int, Decoded | InfalignError] = {}
        running: dict[int, list[Beginning]] = {}
        for at, task in tasks.items():
            try:
                self._local.prompt_tokens(task.prompt)
            except InputError as error:
                decided[at] = error
                continue
            running[at] = [Beginning(task.prompt, task.stream, index) for index in range(task.n)]
        while running:
            longer = iter(
                self._local.extend([one for some in running.values() for one in some], self.pruning.every, self.seed)
            )
            running = {at: list(itertools.islice(longer, len(some))) for at, some in running.items()}
            new = {at: (tasks[at], [self._candidate(one) for one in some]) for at, some in running.items()}
            for at, scored in self._score(new, names).items():
                outcome = self._look(tasks[at], running[at], scored)
                if isinstance(outcome, list):
                    running[at] = outcome
                else:
                    decided[at] = outcome
                    del running[at]
        return decided

    def _look(
        self, task: Task, beginnings: list[Beginning], scored: list[Candidate] | InfalignError
    ) -> list[Beginning] | Decoded | InfalignError:
        """After a stage: what goes on, or the answer once nothing does. The task keeps whatever has come to its end."""
        if isinstance(scored, InfalignError):
            return scored
        unscored = [one for one in scored if one.reward is None]
        if unscored:
            return RewardError(
                f"{len(unscored)} of {counted(len(scored), 'candidate')} for prompt {task.prompt.id} could not "
                f"be scored ({unscored[0].error or 'no reason given'})",
                where=str(self.reward),
                hint="Fix the reward: it must be able to judge beginnings as well",
            )
        ended = [one for one in task.candidates if one.finish_reason != REJECTED]
        # Those that have ended cost nothing more, so they stay; they count among the best, and so reject others.
        places = ended + scored
        rewards = np.array([one.reward for one in places], dtype=np.float64)
        order = np.lexsort((task.rng.random(len(places)), -rewards))
        best = set(order[: math.ceil(self.pruning.keep * len(places))].tolist())
        going: list[Beginning] = []
        for place, (beginning, candidate) in enumerate(zip(beginnings, scored, strict=True), start=len(ended)):
            if beginning.finish_reason is not None:
                task.candidates.append(candidate)
            elif place in best:
                going.append(beginning)
            else:
                task.candidates.append(replace(candidate, finish_reason=REJECTED))
        if going:
            return going
        ended = [one for one in task.candidates if one.finish_reason != REJECTED]
        chosen = max(ended, key=lambda one: (one.reward, task.rng.random()))
        tokens = sum(one.num_tokens or 0 for one in task.candidates)
        return Decoded(task.prompt, chosen, tuple(task.candidates), tokens, 0.0, task.procedure)

    def _candidate(self, beginning: Beginning) -> Candidate:
        text, reason = self._local.text(beginning), beginning.finish_reason or "unfinished"
        return Candidate(text, None, None, len(beginning.token_ids), reason)
