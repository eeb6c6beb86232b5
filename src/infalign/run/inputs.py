"""What a recipe reads: prompts, and the text of its testbed."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from infalign._io.wording import counted
from infalign.errors import InputError
from infalign.rollouts.prompts import Prompt, PromptSet, load_prompts, prompt_text, read_rows
from infalign.run.folder import file_fingerprint
from infalign.run.recipe import Recipe, Rows
from infalign.run.testbed.corpus import docstring_corpus, examples_from_rows, pairs_from_rows
from infalign.run.testbed.examples import Example, Pair


def testbed_text(recipe: Recipe) -> tuple[list[Example], list[Pair]]:
    """Demonstrations and preferences to train the testbed's models on.

    Raises:
        InputError: If a file or column is missing.
    """
    testbed = recipe.testbed
    assert testbed is not None, "the caller checked"
    if testbed.corpus == "docstrings":
        return docstring_corpus(recipe.seed)
    shown = testbed.demonstrations
    assert shown is not None, "held by the recipe"
    rows = _rows(shown, [shown.prompt, shown.completion])
    examples = examples_from_rows(rows, prompt=shown.prompt, completion=shown.completion, held_out=testbed.held_out)
    pairs: list[Pair] = []
    for told in testbed.preferences:
        columns = {"prompt": told.prompt, "chosen": told.chosen, "rejected": told.rejected}
        pairs += pairs_from_rows(_rows(told, list(columns.values())), **columns, held_out=testbed.held_out)
    return examples, pairs


def split_prompts(recipe: Recipe) -> tuple[PromptSet, PromptSet]:
    """Training prompts and evaluation prompts, without overlap, each in a random order that the seed decides.

    Files are often sorted. The first rows of one, or the first quarter of the training prompts, which no update sees,
    would then be other prompts than the rest. In a random order every part is like the whole. The testbed's prompts are
    those that its reference was not trained on.

    Raises:
        InputError: If a file or column is missing, a prompt is empty, or two given files overlap.
    """
    settings = recipe.prompts
    if settings.source is None:
        examples, _ = testbed_text(recipe)
        demonstrated = {Prompt(e.prompt).id for e in examples if not e.held_out}
        found = PromptSet(tuple(p for p in _unique(Prompt(e.prompt) for e in examples) if p.id not in demonstrated))
        fresh = _shuffled(found, recipe.seed)
        return fresh[settings.evaluation :][: settings.train], fresh[: settings.evaluation]
    one_file = settings.evaluation_source is None
    held_out = settings.held_out if one_file else None
    common: dict[str, Any] = {"column": settings.column, "split": settings.split, "held_out": held_out}
    train = _short(load_prompts(settings.source, **common), recipe)
    evaluation_source = settings.evaluation_source or settings.source
    side: Literal["train", "held_out"] = "held_out" if one_file else "train"
    evaluation = _short(load_prompts(evaluation_source, **common, side=side), recipe)
    if len({isinstance(prompt.prompt, str) for prompt in (*train, *evaluation)}) > 1:
        raise InputError("some prompts are text and some are chat messages", where=settings.source,
                         hint="Write all of them one way")  # fmt: skip
    train = _shuffled(train, recipe.seed)[: settings.train]
    evaluation = _shuffled(evaluation, recipe.seed)[: settings.evaluation]
    overlap = set(train.ids) & set(evaluation.ids)
    if overlap:
        raise InputError(
            f"{counted(len(overlap), 'evaluation prompt is', 'evaluation prompts are')} also used for training",
            where=str(settings.evaluation_source),
            hint="Remove them from one of the two files",
        )
    return train, evaluation


def testbed_fingerprint(recipe: Recipe) -> Any:
    """What the testbed's text is made from, for a stage's fingerprint."""
    testbed = recipe.testbed
    assert testbed is not None, "the caller checked"
    if testbed.corpus == "docstrings":
        return {"python": platform.python_version()}
    return [source_fingerprint(rows.source) for rows in (testbed.demonstrations, *testbed.preferences) if rows]


def prompts_fingerprint(recipe: Recipe) -> Any:
    """What the prompts are read from, for a stage's fingerprint."""
    settings = recipe.prompts
    if settings.source is None:
        return {"testbed": testbed_fingerprint(recipe), "seed": recipe.seed}
    sources = [source_fingerprint(source) for source in (settings.source, settings.evaluation_source) if source]
    return {"sources": sources, "seed": recipe.seed}


def source_fingerprint(source: str) -> str:
    """Content hash of a file; a hub name stands for itself."""
    path = Path(source)
    return file_fingerprint(path) if path.is_file() else source


def _rows(settings: Rows, columns: list[str]) -> list[dict[str, Any]]:
    rows = read_rows(settings.source, columns=columns, split=settings.split)
    if settings.max_characters is not None:
        rows = [row for row in rows if len(prompt_text(row[settings.prompt])) <= settings.max_characters]
    if not rows:
        raise InputError("every prompt is longer than max_characters", where=settings.source, hint="Raise it")
    return rows[: settings.limit]


def _short(prompts: PromptSet, recipe: Recipe) -> PromptSet:
    longest = recipe.prompts.max_characters
    if longest is None:
        return prompts
    kept = tuple(prompt for prompt in prompts if len(prompt.text) <= longest)
    if not kept:
        raise InputError(
            f"every prompt is longer than prompts.max_characters={longest}",
            where=str(recipe.prompts.source),
            hint="Raise it",
        )
    return PromptSet(kept, prompts.duplicates)


def _shuffled(prompts: PromptSet, seed: int) -> PromptSet:
    """In the order of a hash: which prompts come first depends on the seed, and not on the other prompts."""

    def place(prompt: Prompt) -> bytes:
        return hashlib.sha256(f"{seed}:{prompt.id}".encode()).digest()

    return PromptSet(tuple(sorted(prompts, key=place)), prompts.duplicates)


def _unique(prompts: Iterable[Prompt]) -> list[Prompt]:
    return list({prompt.id: prompt for prompt in prompts}.values())
