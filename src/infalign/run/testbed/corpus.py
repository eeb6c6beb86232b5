"""The text a testbed is trained on, from the embedded corpus or from rows of the user's own data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from infalign.rollouts.prompts import is_held_out
from infalign.run.testbed.docstrings import docstring_examples, preference_pairs
from infalign.run.testbed.examples import Example, Pair


def docstring_corpus(seed: int) -> tuple[list[Example], list[Pair]]:
    """Demonstrations and preferences from the docstrings of Python's standard library."""
    examples = docstring_examples()
    return examples, preference_pairs(examples, seed)


def examples_from_rows(
    rows: Iterable[Mapping[str, Any]], *, prompt: str, completion: str, held_out: float
) -> list[Example]:
    """Demonstrations from rows; a share is held out by prompt, related prompts together.

    Args:
        rows: The rows.
        prompt: Name of the prompt column.
        completion: Name of the completion column.
        held_out: Share held out.
    """
    return [Example(row[prompt], row[completion], is_held_out(row[prompt], held_out)) for row in rows]


def pairs_from_rows(
    rows: Iterable[Mapping[str, Any]], *, prompt: str, chosen: str, rejected: str, held_out: float
) -> list[Pair]:
    """Preferences from rows; a share is held out by prompt, related prompts together.

    Args:
        rows: The rows.
        prompt: Name of the prompt column.
        chosen: Name of the column of better completions.
        rejected: Name of the column of worse completions.
        held_out: Share held out.
    """
    return [Pair(row[prompt], row[chosen], row[rejected], held_out=is_held_out(row[prompt], held_out)) for row in rows]
