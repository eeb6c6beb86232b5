"""A mixture of policies: each response is drawn from one of them, chosen beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from queue import SimpleQueue
from threading import Event
from typing import Any

import numpy as np

from infalign._io.threads import in_threads
from infalign.errors import InfalignError, InputError
from infalign.rollouts.batches import Missing
from infalign.rollouts.decode import uniforms
from infalign.rollouts.key import RolloutKey, combined_fingerprint
from infalign.rollouts.logprobs import Scoring
from infalign.rollouts.policy import Float, Policy, Rows, UnfinishedError
from infalign.rollouts.prompts import Prompt


class MixturePolicy(Policy):
    """The mixture (1 − ε) p + ε q of a base and an aligned policy, over whole responses; or of several aligned ones.

    It draws from q with probability ε and from p otherwise, so it costs what one model costs. Which of them draws
    rollout (seed, stream, index) is decided by a random number of its own, independent of those that decide the tokens.
    A rollout that comes from the aligned policy at one ε does so at every larger ε.

    Drawing leaves log-probabilities null, since they take a pass of the other model: see `logprobs`. The mixture of
    several policies is M16 in METHOD, (a).

    Args:
        base: The base p: a policy, or a model that `open_policy` opens.
        aligned: The aligned policy q, or several.
        weight: ε in [0, 1]; for several aligned policies one weight of each, with a sum of at most 1.
        name: What to call it.

    Raises:
        InputError: A weight is out of range, or the policies are of different kinds or have different tokenizers.
    """

    def __init__(self, base: Any, aligned: Any, weight: float | Sequence[float], *, name: str | None = None) -> None:
        several = isinstance(aligned, Sequence) and not isinstance(aligned, str)
        self.base, self.aligned = opened_together(base, aligned if several else [aligned])
        self.weights = checked_weights(weight, len(self.aligned))
        self.parts: list[tuple[float, Policy]] = [
            (max(0.0, 1.0 - sum(self.weights)), self.base),
            *zip(self.weights, self.aligned, strict=True),
        ]
        self.name = name or " + ".join(f"{w:.3g} {one.name}" for w, one in self.parts)
        self.sampler = self.base.sampler
        self.tokenizer = self.base.tokenizer
        require_alike([one for _, one in self.parts])
        self._upto_C = np.cumsum([*self.weights, self.parts[0][0]])

    @property
    def fingerprint(self) -> str:
        """Of its parts and their weights."""
        return combined_fingerprint("mixture", [one.fingerprint for _, one in self.parts], {"weights": self.weights})

    def prompt_tokens(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        """As `Policy.prompt_tokens`; the response must fit into every part's context."""
        tokens, *_ = [one.prompt_tokens(prompts, max_new_tokens) for _, one in self.parts]
        return tokens

    def part_of(self, seed: int, stream: str, index: int) -> int:
        """Which part draws rollout (seed, stream, index): 0 for the base, 1.. for the aligned policies."""
        place = int(np.searchsorted(self._upto_C, uniforms(seed, f"{stream}\0part", index, 1)[0], side="right"))
        # Rounding may leave the sum of the weights just below one.
        return place + 1 if place < len(self.weights) else 0

    def draw_rows(self, missing: Sequence[Missing], key: RolloutKey, batch_size: int | None = None) -> Iterator[Rows]:
        """As `Policy.draw_rows`; log-probabilities are null."""
        for _, rows in self.draw_parts(missing, key, batch_size):
            yield {**rows, "logprob": [None] * len(rows["index"])}

    def draw_parts(
        self, missing: Sequence[Missing], key: RolloutKey, batch_size: int | None = None
    ) -> Iterator[tuple[int, Rows]]:
        """As `draw_rows`, but says which part drew a batch and leaves that part's own log-probabilities in it."""
        drawing: dict[int, Callable[[], Iterator[Rows]]] = {}
        for part, (_, policy) in enumerate(self.parts):
            asked = [
                replace(one, indices=indices, stream=f"{one.decided_by}\0from part {part}")
                for one in missing
                if (indices := [i for i in one.indices if self.part_of(key.seed, one.decided_by, i) == part])
            ]
            if asked:
                drawing[part] = lambda policy=policy, asked=asked: policy.draw_rows(asked, key, batch_size)
        failures: dict[str, InfalignError] = {}
        together = self.sampler != "transformers"  # servers work at the same time, models here one after another
        for part, rows in _at_once(drawing, failures) if together else _in_turn(drawing, failures):
            yield part, rows
        if failures:
            raise UnfinishedError(failures, len(missing))

    @property
    def components(self) -> list[tuple[float, Scoring]]:
        """The models that responses come from."""
        return [(weight * inner, one) for weight, part in self.parts for inner, one in part.components]

    def logprobs(
        self,
        prompt_ids_list: Sequence[Sequence[int]],
        completion_ids_list: Sequence[Sequence[int]],
        batch_size: int = 64,
    ) -> Float:
        """As `Policy.logprobs`: log Σ_c w_c π_c(y), by a pass of each part."""
        used = [(weight, one) for weight, one in self.parts if weight > 0]
        logprob_CB = np.array([one.logprobs(prompt_ids_list, completion_ids_list, batch_size) for _, one in used])
        return np.logaddexp.reduce(np.log([weight for weight, _ in used])[:, None] + logprob_CB, axis=0)


def opened_together(base: Any, aligned: Sequence[Any]) -> tuple[Policy, list[Policy]]:
    """Policies as they are, and the others opened, with one base in memory where adapters share it."""
    if isinstance(base, Policy) and all(isinstance(one, Policy) for one in aligned):
        return base, list(aligned)
    from infalign.rollouts.opening import open_policies

    policies = open_policies([base, *aligned])
    return policies[0], policies[1:]


def checked_weights(weight: float | Sequence[float], count: int) -> tuple[float, ...]:
    """Weights of the aligned policies.

    Raises:
        InputError: Their number is not `count`, one is not in [0, 1], or their sum is more than one.
    """
    weights = tuple(float(w) for w in weight) if isinstance(weight, Sequence) else (float(weight),)
    if len(weights) != count or not all(0.0 <= w <= 1.0 for w in weights) or sum(weights) > 1.0 + 1e-9:
        raise InputError(f"the weights are {list(weights)} for {count} aligned policies", where="weight",
                         hint="Give each one weight in [0, 1]; their sum is at most 1")  # fmt: skip
    return weights


def require_alike(policies: Sequence[Policy]) -> None:
    """Raise InputError unless the policies are drawn from in the same way and write the same tokens."""
    first, *others = policies
    for one in others:
        if one.sampler != first.sampler:
            raise InputError(f"{first.name} is drawn by {first.sampler}, {one.name} by {one.sampler}", where="mixture",
                             hint="Use two models of this process, or two of a server")  # fmt: skip
        if first.tokenizer is None or one.tokenizer is None:
            continue
        same = first.tokenizer.get_vocab() == one.tokenizer.get_vocab()
        if not (same and first.tokenizer.eos_token_id == one.tokenizer.eos_token_id):
            raise InputError(f"{first.name} and {one.name} have different tokenizers", where="mixture",
                             hint="Use a model that was trained from the base")  # fmt: skip


def _in_turn(
    drawing: Mapping[int, Callable[[], Iterator[Rows]]], failures: dict[str, InfalignError]
) -> Iterator[tuple[int, Rows]]:
    for part, start in drawing.items():
        try:
            for rows in start():
                yield part, rows
        except UnfinishedError as error:
            failures |= error.failures


def _at_once(
    drawing: Mapping[int, Callable[[], Iterator[Rows]]], failures: dict[str, InfalignError]
) -> Iterator[tuple[int, Rows]]:
    """As `_in_turn`, all parts at the same time."""
    if len(drawing) <= 1:
        yield from _in_turn(drawing, failures)
        return
    found: SimpleQueue[tuple[int, Rows]] = SimpleQueue()
    stopped = Event()

    def work(part: int) -> dict[str, InfalignError]:
        rows_of = drawing[part]()
        try:
            for rows in rows_of:
                found.put((part, rows))
                if stopped.is_set():
                    rows_of.close()  # pyright: ignore[reportAttributeAccessIssue]
                    break
        except UnfinishedError as error:
            return dict(error.failures)
        return {}

    try:
        for done in in_threads(work, list(drawing), len(drawing), tick=0.02):
            while not found.empty():
                yield found.get()
            failures |= {} if done is None else done[1]
    except GeneratorExit:
        raise
    except BaseException:  # what has come is not lost
        while not found.empty():
            yield found.get()
        raise
    finally:
        stopped.set()
