"""A procedure that a recipe names by what it does, to be measured: any decoder that returns one response per prompt.

    procedure: {kind: fitted, decoder: {beam: 4}}
    procedure: {kind: fitted, decoder: {top_p: 0.9}, rollouts_per_prompt: 8}
    procedure: {kind: fitted, decoder: {proxy: "module:function", n: 4}}      # the best of 4 by a cheaper reward
    procedure: {kind: fitted, decoder: "module:function"}

Only the description is here; `infalign.select.black_box` runs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from infalign.errors import InputError

_FORMS = '"module:function", {beam: 4}, {top_p: 0.9} or {proxy: <reward>, n: 4}'


@dataclass(frozen=True)
class MeasuredProcedure:
    """A decoder, and how often it is run on each prompt to find its distortion.

    Attributes:
        rollouts_per_prompt: Outputs per prompt; 1 for beam search, which always returns the same.
        function: `module:function`, called with `model`, `tokenizer`, `prompts`, `max_new_tokens` and `seed`; returns
            one text per prompt.
        beam: Beams of a beam search.
        top_p: Nucleus of a sampling.
        proxy: Reward by which the best of `n` samples is chosen: `module:function`, or a reward model.
        n: Samples among which the proxy chooses.
    """

    rollouts_per_prompt: int = 4
    function: str | None = None
    beam: int | None = None
    top_p: float | None = None
    proxy: str | None = None
    n: int | None = None

    @classmethod
    def parse(cls, description: Mapping[str, Any]) -> MeasuredProcedure:
        """From the recipe's mapping.

        Raises:
            InputError: It is not one of the forms above.
        """
        unknown = set(description) - {"kind", "decoder", "rollouts_per_prompt"}
        if unknown:
            raise InputError(f"unknown key {min(unknown)}", where="procedure",
                             hint="A measured procedure has kind, decoder and rollouts_per_prompt")  # fmt: skip
        decoder = description["decoder"]
        given: object = {"function": decoder} if isinstance(decoder, str) else decoder
        settings: Mapping[str, Any] = cast("Mapping[str, Any]", given) if isinstance(given, Mapping) else {}
        if set(settings) not in ({"function"}, {"beam"}, {"top_p"}, {"proxy", "n"}):
            raise InputError(f"{decoder!r} is no decoder", where="procedure.decoder", hint=f"Write {_FORMS}")
        for name in ("beam", "n"):
            if name in settings and not (_whole(settings[name]) and settings[name] >= 2):
                raise InputError(f"{name} is {settings[name]!r}", where="procedure.decoder", hint="Give 2 or more")
        top_p = settings.get("top_p", 0.5)
        if isinstance(top_p, bool) or not isinstance(top_p, int | float) or not 0 < top_p < 1:
            raise InputError(f"top_p is {top_p!r}", where="procedure.decoder", hint="Give a number between 0 and 1")
        for name in ("function", "proxy"):
            if name in settings and not isinstance(settings[name], str):
                raise InputError(f"{name} is {settings[name]!r}", where="procedure.decoder", hint=f"Write {_FORMS}")
        if ":" not in settings.get("function", ":"):
            raise InputError(f"{settings['function']!r} does not name a function", where="procedure.decoder",
                             hint=f"Write {_FORMS}")  # fmt: skip
        count = description.get("rollouts_per_prompt", 1 if "beam" in settings else 4)
        if not _whole(count) or count < 1 or ("beam" in settings and count > 1):
            raise InputError(f"rollouts_per_prompt is {count!r}", where="procedure",
                             hint="Give 1 or more, and 1 for beam search, which always returns the same")  # fmt: skip
        return cls(count, **settings)

    @property
    def label(self) -> str:
        """A short name."""
        if self.beam is not None:
            return f"beam search, {self.beam} beams"
        if self.top_p is not None:
            return f"top-p {self.top_p:g}"
        return self.function or f"best of {self.n} by {self.proxy}"


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
