"""Attempts at prompts as rollouts: which text each attempt sends, and which rollout of that text it is.

A rollout store knows prompts by their content. Attempt j at prompt i sends the text that augmentation gives it, and is
rollout 0 of that text, or rollout k if k earlier attempts happened to send the same (all of them, without
augmentation). So more attempts later, or a run started again, draw exactly what is missing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from infalign.audit.augment import Augmentation
from infalign.errors import InputError
from infalign.rewards.source import RewardSource, Scores
from infalign.rollouts.prompts import Prompt, PromptContent
from infalign.rollouts.store import RolloutStore

_ASKED = "audited_prompt"


@dataclass(frozen=True)
class Attempts:
    """M attempts at each of P prompts.

    Attributes:
        prompts: What is asked, P prompts.
        sent_PM: What each attempt sends; its row holds what is asked.
        index_PM: Which rollout of that text the attempt is.
    """

    prompts: Sequence[Prompt]
    sent_PM: list[list[Prompt]]  # noqa: N815
    index_PM: NDArray[np.int64]  # noqa: N815

    def rendered_at(self, moment: str) -> Attempts:
        """The same, what is sent rendered at this moment (`Prompt.rendered_at`)."""
        sent_PM = [[replace(prompt, rendered_at=moment) for prompt in row] for row in self.sent_PM]
        return replace(self, sent_PM=sent_PM)

    @property
    def by_count(self) -> dict[int, list[Prompt]]:
        """The different texts, by how many rollouts of each are needed."""
        counts = Counter(prompt.id for row in self.sent_PM for prompt in row)
        found: dict[int, dict[str, Prompt]] = {}
        for row in self.sent_PM:
            for prompt in row:
                found.setdefault(counts[prompt.id], {})[prompt.id] = prompt
        return {count: list(prompts.values()) for count, prompts in sorted(found.items())}

    def gather(self, values: dict[tuple[str, int], Any], dtype: Any) -> NDArray[Any]:
        """One value for each attempt, shape (P, M), from values by text and rollout."""
        gathered = np.empty(self.index_PM.shape, dtype)
        for p, row in enumerate(self.sent_PM):
            for m, prompt in enumerate(row):
                gathered[p, m] = values[prompt.id, int(self.index_PM[p, m])]
        return gathered

    def rewards_PM(self, store: RolloutStore, source: RewardSource) -> NDArray[np.float64]:  # noqa: N802
        """The reward of each attempt.

        Raises:
            InputError: One is missing or could not be scored.
        """
        values: dict[tuple[str, int], float] = {}
        for count, prompts in self.by_count.items():
            ids = [prompt.id for prompt in prompts]
            rewards_PK = store.rewards_PK(source.key, ids, count)
            values.update(((ids[p], k), rewards_PK[p, k]) for p in range(len(ids)) for k in range(count))
        return self.gather(values, np.float64)

    def column_PM(self, store: RolloutStore, column: str) -> NDArray[Any]:  # noqa: N802
        """A column of the rollouts, such as `text`, for each attempt."""
        values: dict[tuple[str, int], Any] = {}
        for count, prompts in self.by_count.items():
            ids = [prompt.id for prompt in prompts]
            column_PK = store.column_PK(column, ids, count)
            values.update(((ids[p], k), column_PK[p, k]) for p in range(len(ids)) for k in range(count))
        return self.gather(values, object)


def plan_attempts(prompts: Sequence[Prompt], count: int, augmentation: Augmentation) -> Attempts:
    """What each of `count` attempts at each prompt sends.

    Raises:
        InputError: Two prompts become the same text, or a prompt has no turn of the user.
    """
    seen: Counter[str] = Counter()
    owner: dict[str, str] = {}
    sent_PM: list[list[Prompt]] = []
    index_PM = np.zeros((len(prompts), count), np.int64)
    for p, prompt in enumerate(prompts):
        row = {**prompt.row, _ASKED: prompt.prompt}
        sent_PM.append([Prompt(augmentation.apply(prompt.prompt, prompt.id, m), row) for m in range(count)])
        for m, sent in enumerate(sent_PM[-1]):
            if owner.setdefault(sent.id, prompt.id) != prompt.id:
                # A store could not tell whose attempt it was, and both would be judged as one.
                raise InputError(f"prompt {prompt.id} and prompt {owner[sent.id]} become the same text",
                                 where="augment", hint="Leave one out, or change sigma or the seed")  # fmt: skip
            index_PM[p, m] = seen[sent.id]
            seen[sent.id] += 1
    return Attempts(prompts, sent_PM, index_PM)


class JudgedAsAsked(RewardSource):
    """Scores an attempt's response against what was asked, not against the spoilt spelling that was sent.

    Args:
        source: What scores.
    """

    def __init__(self, source: RewardSource) -> None:
        self.source = source
        self.key = source.key
        self.description = source.description

    def __str__(self) -> str:
        return str(self.source)

    def render_at(self, moment: str | None) -> None:
        """As `RewardSource.render_at`."""
        self.source.render_at(moment)

    def score_rows(
        self, prompts: Sequence[PromptContent], completions: Sequence[PromptContent], **columns: Any
    ) -> Scores:
        """As `RewardSource.score_rows`."""
        return self.source.score_rows(columns.pop(_ASKED), completions, **columns)
