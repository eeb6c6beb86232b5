"""The two kinds of record that the testbed trains on: a text with its prompt, and a preference between two texts."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """One prompt with the completion that a reference policy should learn to write.

    Args:
        prompt: The text given to the model, its end-of-prompt marker included.
        completion: The text that should follow, without an end-of-sequence token.
        held_out: True if the example is for measuring only, never for training.
        source: Where it comes from (for docstrings: the qualified name); free text, not used in training.
    """

    prompt: str
    completion: str
    held_out: bool = False
    source: str = ""


@dataclass(frozen=True)
class Pair:
    """One preference: after `prompt`, `chosen` is better than `rejected`.

    Args:
        prompt: The text given to the model, its end-of-prompt marker included.
        chosen: The better completion.
        rejected: The worse completion.
        kind: What is wrong with `rejected`; accuracies are reported for each kind separately.
        held_out: True if the pair is for measuring only, never for training.
        source: Where it comes from; free text, not used in training.
    """

    prompt: str
    chosen: str
    rejected: str
    kind: str = "preference"
    held_out: bool = False
    source: str = ""
