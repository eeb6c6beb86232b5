"""A reshaped policy: the base's responses weighted by a function of how much more an aligned policy likes them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from threading import Lock
from typing import Any, Protocol

import numpy as np

from infalign._io.files import write_text
from infalign._io.inventory import read_sealed, sealed
from infalign._io.progress import Progress
from infalign.errors import InfalignError, InputError
from infalign.reshape.reshaping import log_mixture
from infalign.rollouts.batches import Missing
from infalign.rollouts.decode import uniforms
from infalign.rollouts.fill import response_token_ids
from infalign.rollouts.key import RolloutKey, combined_fingerprint
from infalign.rollouts.logprobs import LogRatios, flat_responses
from infalign.rollouts.mixture import MixturePolicy
from infalign.rollouts.policy import Float, Policy, Rows, UnfinishedError
from infalign.rollouts.prompts import Prompt
from infalign.rollouts.store import RolloutStore
from infalign.rollouts.tokens import prompt_token_ids

TRIES = "tries.json"
# Rounding of the models' own arithmetic may lift an acceptance just above one.
_ROUNDING = 1e-6
_MOST_AHEAD = 64
_SCORED_AT_ONCE = 256


class Reshapes(Protocol):
    """What a `ReshapedPolicy` needs of a reshaping."""

    @property
    def weights(self) -> tuple[float, ...]:
        """Weights of the aligned policies in the proposal."""
        ...

    @property
    def log_bound(self) -> float:
        """Upper bound of log g(l) − log(1 − ε + ε e^l) over all l."""
        ...

    def log_density(self, log_ratios: Any) -> Any:
        """Log g(l)."""
        ...

    def to_dict(self) -> dict[str, Any]:
        """As plain data."""
        ...


@dataclass
class Tries:
    """What it took to draw some rollouts.

    Attributes:
        tries: Proposals drawn.
        accepted: How many of them were accepted.
        tokens: Tokens generated for all of them.
        weight: Sum over the proposals of g(l) / (1 − ε + ε e^l), whose mean is Z_x.
    """

    tries: int = 0
    accepted: int = 0
    tokens: int = 0
    weight: float = 0.0

    @property
    def acceptance(self) -> float:
        """Share of the proposals that were accepted; NaN before the first."""
        return self.accepted / self.tries if self.tries else float("nan")

    def add(self, other: Tries) -> None:
        """Count these too."""
        self.tries += other.tries
        self.accepted += other.accepted
        self.tokens += other.tokens
        self.weight += other.weight


@dataclass(frozen=True)
class _Asked:
    """One prompt's rollouts that are still to be drawn."""

    one: Missing
    waiting: set[int]
    tries: Tries = field(default_factory=Tries)


class ReshapedPolicy(Policy):
    """The policy π_g(y|x) = p(y|x) g(l(x, y)) / Z_x with l = log q(y|x) − log p(y|x) (M16), drawn exactly.

    It draws from the mixture (1 − ε) p + ε q and accepts a response with probability g(l) / (C (1 − ε + ε e^l)), where
    log C is the reshaping's `log_bound`: rejection sampling, with one scoring pass of the model that did not draw.
    Try a = 0, 1, … of rollout (seed, stream, index) is decided by these four numbers alone, so that a rollout does not
    depend on its batch. All rollouts that wait have their next try drawn together, or their next few
    where few are accepted; the first accepted one counts.

    `counts` keeps, for each prompt, what it took, and `total` for all of them.

    Over a server, drawing needs log-probabilities of given text and a tokenizer. A response's text is tokenised anew
    then, so that what is accepted is exact up to other ways of writing the same text.

    Args:
        base: The base p: a policy, or a model that `open_policy` opens.
        aligned: The aligned policy q, or several.
        reshaping: The function g with its proposal, an `infalign.reshape.Reshaping`.
        max_tries: Tries of one rollout after which its prompt is given up, with an error that says so.
        name: What to call it.

    Raises:
        InputError: As `MixturePolicy`.
    """

    def __init__(
        self, base: Any, aligned: Any, reshaping: Reshapes, *, max_tries: int = 10_000, name: str | None = None
    ) -> None:
        if max_tries < 1:
            raise InputError(f"max_tries is {max_tries}", where="ReshapedPolicy", hint="Give at least 1")
        self.proposal = MixturePolicy(base, aligned, reshaping.weights)
        self.base, self.aligned = self.proposal.base, self.proposal.aligned
        self.reshaping = reshaping
        self.max_tries = max_tries
        self.name = name or f"reshaped {' + '.join(one.name for one in self.aligned)}"
        self.sampler = self.proposal.sampler
        self.tokenizer = self.proposal.tokenizer
        self.counts: dict[str, Tries] = {}
        self.total = Tries()
        self._counting = Lock()

    @property
    def fingerprint(self) -> str:
        """Of its models and the reshaping."""
        prints = [one.fingerprint for one in (self.base, *self.aligned)]
        return combined_fingerprint("reshaped", prints, {"reshaping": self.reshaping.to_dict()})

    def prompt_tokens(self, prompts: Sequence[Prompt], max_new_tokens: int) -> list[list[int]]:
        """As `Policy.prompt_tokens`."""
        return self.proposal.prompt_tokens(prompts, max_new_tokens)

    # --- drawing ---------------------------------------------------------------------------------------------------

    def told(self) -> str:
        """The share of accepted proposals."""
        return f", {self.total.acceptance:.0%} accepted" if self.counts else ""

    def draw_rows(self, missing: Sequence[Missing], key: RolloutKey, batch_size: int | None = None) -> Iterator[Rows]:
        """As `Policy.draw_rows`; log-probabilities are null.

        Raises:
            InputError: The temperature or top_p is not 1, for which log-ratios are not defined, or the reshaping's
                bound does not hold.
            UnfinishedError: Some prompts reached the cap on tries, or their server failed.
        """
        if not key.samples_the_policy:
            raise InputError(f"temperature is {key.temperature} and top_p {key.top_p}", where="ReshapedPolicy",
                             hint="A reshaped policy is drawn at temperature 1 and top_p 1")  # fmt: skip
        asked = {str(at): _Asked(one, set(one.indices)) for at, one in enumerate(missing)}
        failures: dict[str, InfalignError] = {}
        attempt = 0
        while attempt < self.max_tries and any(a.waiting for a in asked.values()):
            ahead = min(self._tries_ahead(), self.max_tries - attempt)
            waiting = {at: sorted(a.waiting) for at, a in asked.items() if a.waiting}
            tries = [
                replace(a.one, prompt_id=f"{at} {i}", indices=waiting[at], stream=f"{a.one.decided_by}\0try {i}")
                for at, a in asked.items()
                for i in range(attempt, attempt + ahead)
                if a.waiting
            ]
            held: dict[tuple[str, int], tuple[int, Rows]] = {}
            try:
                for part, rows in self.proposal.draw_parts(tries, key, batch_size):
                    for at, index, tried, row in self._accepted(asked, part, rows, key.seed):
                        # The first accepted try counts, whatever was drawn ahead.
                        if (at, index) not in held or tried < held[at, index][0]:
                            held[at, index] = tried, row
                    if ahead == 1:
                        yield from _taken(asked, held)
            except UnfinishedError as error:
                for name, reason in error.failures.items():
                    at = name.split()[0]
                    failures[asked[at].one.prompt_id] = reason
                    asked[at].waiting.clear()
            yield from _taken(asked, held)
            attempt += ahead
        for a in asked.values():
            if a.waiting:
                failures[a.one.prompt_id] = self._given_up(a)
        if failures:
            raise UnfinishedError(failures, len(missing))

    def _tries_ahead(self) -> int:
        """Tries of a rollout to draw at once: half of those that it takes on average, so that few are in vain."""
        acceptance = self.total.accepted / max(self.total.tries, 1)
        return 1 if not self.counts else int(np.clip(0.5 / max(acceptance, 1e-9), 1, _MOST_AHEAD))

    def draw(
        self,
        prompts: Sequence[Prompt],
        num_samples: int,
        *,
        store: RolloutStore,
        batch_size: int | None = None,
        progress: Progress | None = None,
    ) -> int:
        """As `Policy.draw`; what it took is added to `tries.json` in the store's folder."""
        before, there = replace(self.total), len(store)
        try:
            return super().draw(prompts, num_samples, store=store, batch_size=batch_size, progress=progress)
        finally:
            _add_tries(store.path / TRIES, before, self.total, len(store) - there)

    def _accepted(
        self, asked: Mapping[str, _Asked], part: int, rows: Rows, seed: int
    ) -> Iterator[tuple[str, int, int, Rows]]:
        """The accepted ones of some proposals: whose they are, their index, which try, and the row itself."""
        names = [name.split() for name in rows["prompt_id"]]
        places = [asked[at] for at, _ in names]
        log_ratios = self._log_ratios_of(part, rows, [a.one for a in places])
        log_mixture_B = log_mixture(self.proposal.weights, log_ratios)
        log_weight_B = np.asarray(self.reshaping.log_density(log_ratios), dtype=np.float64) - log_mixture_B
        log_chance_B = log_weight_B - self.reshaping.log_bound
        if np.isnan(log_chance_B).any():
            at = int(np.flatnonzero(np.isnan(log_chance_B))[0])
            raise InputError(
                f"a response to prompt {places[at].one.prompt_id} has no log-ratio",
                where=self.name,
                hint="Check both models' weights and data type",
            )
        if log_chance_B.max() > _ROUNDING:
            raise InputError(
                f"a response would be accepted with probability {np.exp(log_chance_B.max()):.6g}",
                where=self.name,
                hint="The reshaping's log_bound is too small: fit it anew",
            )
        for b, ((at, tried), a, index) in enumerate(zip(names, places, rows["index"], strict=True)):
            uniform = uniforms(seed, f"{a.one.decided_by}\0accept {tried}", index, 1)[0]
            accept = bool(uniform < np.exp(log_chance_B[b]))
            count = Tries(1, int(accept), rows["num_tokens"][b] or 0, float(np.exp(log_weight_B[b])))
            with self._counting:
                for counts in (a.tries, self.total, self.counts.setdefault(a.one.prompt_id, Tries())):
                    counts.add(count)
            if accept:
                row = {name: [values[b]] for name, values in rows.items()}
                yield at, index, int(tried), {**row, "prompt_id": [a.one.prompt_id], "logprob": [None]}

    def _log_ratios_of(self, part: int, rows: Rows, missing: Sequence[Missing]) -> Float:
        """Log-ratios of proposals: the part that drew them has told its log-probabilities, the others score them."""
        if self.tokenizer is None:
            raise InputError(
                "without a tokenizer no given text can be scored", where=self.name, hint="Give ServedPolicy a tokenizer"
            )
        prompt_ids_list = [self._prompt_ids(one) for one in missing]
        completion_ids_list = response_token_ids(self.tokenizer, rows)
        logprob_CB = np.empty((len(self.proposal.parts), len(missing)))
        for c, (_, policy) in enumerate(self.proposal.parts):
            if c == part and not any(value is None for value in rows["logprob"]):
                logprob_CB[c] = rows["logprob"]
            else:
                logprob_CB[c] = policy.logprobs(prompt_ids_list, completion_ids_list, _SCORED_AT_ONCE)
        return _relative(logprob_CB)

    def _prompt_ids(self, one: Missing) -> list[int]:
        if one.tokens:
            return one.tokens
        assert one.prompt is not None, "a server is sent the prompt itself"
        return prompt_token_ids(self.tokenizer, [one.prompt])[0]

    def _given_up(self, a: _Asked) -> InputError:
        told = f"{a.tries.accepted} of {a.tries.tries:,} tries were accepted"
        return InputError(
            f"rollout {min(a.waiting)} of prompt {a.one.prompt_id} was not accepted in {self.max_tries:,} tries "
            f"({told} for this prompt)",
            where=self.name,
            hint="Fit the reshaping on prompts like this one, or raise max_tries",
        )

    # --- log-probabilities -----------------------------------------------------------------------------------------

    def aligned_log_ratios(
        self,
        prompt_ids_list: Sequence[Sequence[int]],
        completion_ids_list: Sequence[Sequence[int]],
        batch_size: int = 64,
    ) -> Float:
        """Log q(y|x) − log p(y|x) of each response: shape (B,), or (B, M) for M > 1 aligned policies."""
        return _relative(
            np.array(
                [one.logprobs(prompt_ids_list, completion_ids_list, batch_size) for one in (self.base, *self.aligned)]
            )
        )

    def logprobs(
        self,
        prompt_ids_list: Sequence[Sequence[int]],
        completion_ids_list: Sequence[Sequence[int]],
        batch_size: int = 64,
    ) -> Float:
        """Refused: it is known up to Z_x only. `log_ratios` estimates that."""
        raise InputError("its log-probabilities are known up to a constant of each prompt", where=self.name,
                         hint="Use log_ratios with rollouts of the reference")  # fmt: skip

    def log_partition(self, prompt_ids: Sequence[str]) -> Float:
        """Log Z_x of each prompt from the proposals that this object drew: log of the mean of g / (1 − ε + ε e^l).

        Raises:
            InputError: It drew nothing for a prompt.
        """
        unknown = [one for one in prompt_ids if one not in self.counts]
        if unknown:
            raise InputError(f"nothing was drawn for prompt {unknown[0]}", where=self.name,
                             hint="Draw, or give rollouts of the reference")  # fmt: skip
        return np.log([self.counts[one].weight / self.counts[one].tries for one in prompt_ids])

    def log_ratios(
        self,
        reference: Policy,
        prompts: Sequence[Prompt],
        token_ids_PG: Sequence[Sequence[Sequence[int]]],
        *,
        ref_token_ids_PK: Sequence[Sequence[Sequence[int]]] | None = None,
        batch_size: int = 64,
        progress: Progress | None = None,
    ) -> LogRatios:
        """Log g(l) − log Z_x of responses that this policy drew; both fields of the result hold it.

        The KL at single prefixes is not known for a reshaped policy, so the log-ratios stand for it. Z_x is estimated
        from both sides' rollouts (`bridge_log_partition`); without those of the reference, from the proposals that
        this object drew (`log_partition`).

        Raises:
            InputError: As `Policy.log_ratios`, or there is nothing to estimate Z_x from.
        """
        if reference.fingerprint != self.base.fingerprint:
            raise InputError(f"it is relative to {self.base.name}, not to {reference.name}", where=self.name,
                             hint="Give its base as the reference")  # fmt: skip
        own_PG = self._log_density(prompts, token_ids_PG, batch_size)
        if progress is not None:
            progress(own_PG.size, own_PG.size, "")
        if ref_token_ids_PK is None:
            log_partition_P = self.log_partition([prompt.id for prompt in prompts])
        else:
            log_partition_P = bridge_log_partition(self._log_density(prompts, ref_token_ids_PK, batch_size), own_PG)
        ratios_PG = own_PG - log_partition_P[:, None]
        return LogRatios(ratios_PG, ratios_PG)

    def _log_density(self, prompts: Sequence[Prompt], token_ids_PG: Any, batch_size: int) -> Float:
        prompt_ids_list, completion_ids_list, shape = flat_responses(self.tokenizer, prompts, token_ids_PG)
        log_ratios = self.aligned_log_ratios(prompt_ids_list, completion_ids_list, batch_size)
        return np.asarray(self.reshaping.log_density(log_ratios), dtype=np.float64).reshape(shape)


def bridge_log_partition(ref_log_density_PK: Float, log_density_PG: Float, *, steps: int = 1000) -> Float:
    """Log Z_x = log E_p[g] of each prompt, from K responses of p and G of p g / Z_x (Meng and Wong's bridge, 1996).

    It solves Z = E_p[g / (s g + (1 − s) Z)] / E_π[1 / (s g + (1 − s) Z)] with s = G / (G + K), whose error is the
    smallest that these two samples allow. It needs no bound on g: responses that p hardly has come from π.

    Args:
        ref_log_density_PK: Log g of the reference's responses.
        log_density_PG: Log g of the reshaped policy's.
        steps: Most steps of the iteration; it stops when nothing moves.

    Returns:
        Shape (P,).
    """
    both = np.concatenate([ref_log_density_PK, log_density_PG], axis=1)
    shift_P1 = both.max(axis=1, keepdims=True)
    ref_PK, own_PG = np.exp(ref_log_density_PK - shift_P1), np.exp(log_density_PG - shift_P1)
    share = own_PG.shape[1] / both.shape[1]
    z_P1 = np.maximum(ref_PK.mean(axis=1, keepdims=True), np.finfo(float).tiny)
    for _ in range(steps):
        above_P1 = (ref_PK / (share * ref_PK + (1 - share) * z_P1)).mean(axis=1, keepdims=True)
        below_P1 = (1.0 / (share * own_PG + (1 - share) * z_P1)).mean(axis=1, keepdims=True)
        new_P1 = above_P1 / below_P1
        moved = np.abs(np.log(new_P1 / z_P1)).max()
        z_P1 = new_P1
        if moved < 1e-12:
            break
    return (np.log(z_P1) + shift_P1)[:, 0]


def _taken(asked: Mapping[str, _Asked], held: dict[tuple[str, int], tuple[int, Rows]]) -> Iterator[Rows]:
    """What was accepted, as one batch; it waits no longer."""
    if not held:
        return
    for at, index in held:
        asked[at].waiting.discard(index)
    rows = [row for _, row in held.values()]
    held.clear()
    yield {name: [value for row in rows for value in row[name]] for name in rows[0]}


def _add_tries(path: Path, before: Tries, after: Tries, delivered: int) -> None:
    """Add what was counted between two moments, and the responses that came of it, to a file.

    Tries of a process that was killed are not counted, and neither are the responses that it delivered.
    """
    kept = read_sealed(path) or {}  # of a damaged count neither the tries nor what came of them count
    content = {
        name: kept.get(name, 0) + getattr(after, name) - getattr(before, name)
        for name in ("tries", "accepted", "tokens")
    }
    content["delivered"] = kept.get("delivered", 0) + delivered
    if content["tries"]:
        content["acceptance"] = content["accepted"] / content["tries"]
        write_text(path, json.dumps(sealed(content)))


def _relative(logprob_CB: Float) -> Float:
    """Log-ratios to the first row: shape (B,) for one other row, (B, M) for M."""
    log_ratio_BM = (logprob_CB[1:] - logprob_CB[0]).T
    return log_ratio_BM[:, 0] if log_ratio_BM.shape[1] == 1 else log_ratio_BM
