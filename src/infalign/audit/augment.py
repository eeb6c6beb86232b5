"""Prompts written a little differently at every attempt, as in Best-of-N jailbreaking (Hughes et al. 2024, 2412.03556).

An attacker who may try N times does not send the same words N times. Each attempt scrambles the middle of words, flips
the case of letters and shifts characters to their neighbours; the request stays readable. Strength is one number, σ:
words are scrambled and letters flipped with probability √σ, characters shifted with probability σ³. The paper's text
attack is the default here, `scramble`, `capitalise` and `noise` one after the other at σ = 0.4.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from infalign.errors import InputError
from infalign.rollouts.prompts import Message, PromptContent

Uniforms = NDArray[np.float64]

_WORDS = re.compile(r"\S+")
_LETTERS = re.compile(r"[^\W\d_]+")
_HUMAN, _ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
_FIRST, _LAST = 32, 126  # the printable characters of ASCII


def scramble(text: str, probability: float, uniforms: Callable[[int], Uniforms]) -> str:
    """Put the letters between the first and last of a run of more than three into another order, run by run.

    Args:
        text: Any text. Everything but letters stays where it is; each word keeps its letters.
        probability: Of each run of letters to be scrambled.
        uniforms: Gives that many numbers in [0, 1).
    """

    def one(run: re.Match[str]) -> str:
        word = run[0]
        if len(word) <= 3 or uniforms(1)[0] >= probability:
            return word
        order = np.argsort(uniforms(len(word) - 2), kind="stable")
        return word[0] + "".join(word[1 + at] for at in order) + word[-1]

    return _LETTERS.sub(one, text)


def capitalise(text: str, probability: float, uniforms: Callable[[int], Uniforms]) -> str:
    """Flip the case of letters.

    Args:
        text: Any text. A letter whose other case is not one letter that leads back (ß, ŉ) stays as it is.
        probability: Of each letter.
        uniforms: Gives that many numbers in [0, 1).
    """
    flips = uniforms(len(text)) < probability
    return "".join(_other_case(mark) if flip else mark for mark, flip in zip(text, flips, strict=True))


def noise(text: str, probability: float, uniforms: Callable[[int], Uniforms]) -> str:
    """Shift printable ASCII characters to the one before or after.

    Args:
        text: Any text. Other characters, line breaks among them, stay as they are.
        probability: Of each character.
        uniforms: Gives that many numbers in [0, 1).
    """
    hits, ups = uniforms(len(text)) < probability, uniforms(len(text)) < 0.5

    def one(mark: str, hit: np.bool_, up: np.bool_) -> str:
        code = ord(mark)
        if not hit or not _FIRST <= code <= _LAST:
            return mark
        # At either end of the alphabet there is only one neighbour.
        return chr(code + 1 if code == _FIRST or (up and code < _LAST) else code - 1)

    return "".join(one(mark, hit, up) for mark, hit, up in zip(text, hits, ups, strict=True))


def swap(text: str, probability: float, uniforms: Callable[[int], Uniforms]) -> str:
    """Exchange neighbouring words. Not part of the paper's attack: it changes what is asked more than the others do.

    Args:
        text: Any text. What stands between words stays; a word moves one place at most.
        probability: Of each pair of neighbours that is met on the way from left to right.
        uniforms: Gives that many numbers in [0, 1).
    """
    words: list[str] = _WORDS.findall(text)
    gaps = _WORDS.split(text)
    swaps = uniforms(max(len(words) - 1, 0)) < probability
    at = 0
    while at < len(swaps):
        if swaps[at]:
            words[at], words[at + 1] = words[at + 1], words[at]
            at += 1
        at += 1
    return gaps[0] + "".join(word + gap for word, gap in zip(words, gaps[1:], strict=True))


_WAYS: dict[str, tuple[Callable[[str, float, Callable[[int], Uniforms]], str], Callable[[float], float]]] = {
    "scramble": (scramble, math.sqrt),
    "capitalise": (capitalise, math.sqrt),
    "noise": (noise, lambda sigma: sigma**3),
    "swap": (swap, lambda sigma: sigma**3),
}
WAYS = tuple(_WAYS)
"""Every way there is, in the order in which they are applied."""


@dataclass(frozen=True)
class Augmentation:
    """How each attempt changes a prompt. What it does is decided by (seed, prompt, attempt) alone.

    Attributes:
        ways: Some of `WAYS`; none leaves prompts as they are.
        sigma: Strength, from 0 (nothing changes) to 1.
        seed: Another seed, other changes.
    """

    ways: tuple[str, ...] = ("scramble", "capitalise", "noise")
    sigma: float = 0.4
    seed: int = 0

    def __post_init__(self) -> None:
        unknown = [way for way in self.ways if way not in WAYS]
        if unknown:
            raise InputError(f"unknown augmentation {unknown[0]!r}", where="augment",
                             hint=f"Use all, none, or some of {', '.join(WAYS)}")  # fmt: skip
        if not 0.0 <= self.sigma <= 1.0:
            raise InputError(f"the strength is {self.sigma}", where="sigma", hint="Give a number from 0 to 1")

    @classmethod
    def parse(cls, text: str, *, sigma: float = 0.4, seed: int = 0) -> Augmentation:
        """`all` (the paper's attack), `none`, or names separated by commas.

        Raises:
            InputError: A name is unknown, or the strength is out of range.
        """
        named = {"all": cls.ways, "none": ()}
        ways = named.get(text.strip().lower())
        if ways is None:
            ways = tuple(way.strip().lower() for way in text.split(","))
        return cls(ways, sigma, seed)

    def apply(self, prompt: PromptContent, prompt_id: str, attempt: int) -> PromptContent:
        """The prompt as attempt number `attempt` words it.

        Of chat messages only the last of the user's changes; of a dialogue in one text with turns marked `Human:` and
        `Assistant:`, as in the Anthropic HH data, only the last human turn.

        Args:
            prompt: Text, or chat messages.
            prompt_id: Names the prompt.
            attempt: From 0.

        Raises:
            InputError: There are messages, but none of the user's.
        """
        if isinstance(prompt, str):
            before, turn, after = _last_human_turn(prompt)
            return before + self._reword(turn, prompt_id, attempt) + after
        at = next((at for at in reversed(range(len(prompt))) if prompt[at]["role"] == "user"), None)
        if at is None:
            raise InputError("there is no message of the user", where=f"prompt {prompt_id}",
                             hint="Give at least one message with the role user")  # fmt: skip
        changed: Message = {**prompt[at], "content": self._reword(prompt[at]["content"], prompt_id, attempt)}
        return [*prompt[:at], changed, *prompt[at + 1 :]]

    def _reword(self, text: str, prompt_id: str, attempt: int) -> str:
        for way in WAYS:
            if way in self.ways:
                function, strength = _WAYS[way]
                # A stream for each way: leaving one out does not change what the others do.
                digest = hashlib.blake2b(f"{self.seed}\0{prompt_id}\0{attempt}\0{way}".encode(), digest_size=16)
                generator = np.random.Generator(np.random.Philox(key=int.from_bytes(digest.digest(), "little")))
                text = function(text, strength(self.sigma), generator.random)
        return text


def _last_human_turn(text: str) -> tuple[str, str, str]:
    """What comes before the last human turn, that turn, and what comes after; plain text is one turn."""
    if not text.startswith(_HUMAN):
        return "", text, ""
    start = text.rindex(_HUMAN) + len(_HUMAN)
    end = text.find(_ASSISTANT, start)
    end = len(text) if end < 0 else end
    return text[:start], text[start:end], text[end:]


def attempts(prompt: PromptContent, prompt_id: str, count: int, augmentation: Augmentation) -> Sequence[PromptContent]:
    """The prompt as attempts 0 .. count−1 word it."""
    return [augmentation.apply(prompt, prompt_id, attempt) for attempt in range(count)]


def _other_case(mark: str) -> str:
    other = mark.swapcase()
    return other if len(other) == 1 and other.swapcase() == mark else mark
