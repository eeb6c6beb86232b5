"""Real text that every Python installation carries: the docstrings of the standard library.

The sources are read with `ast`, never imported. One example per public, documented function or method: the prompt is
its qualified name and signature on one line (the line break is the end-of-prompt marker), the completion is the first
sentence of its docstring. What is found depends on the Python version alone, not on the order of the file system.
"""

from __future__ import annotations

import ast
import hashlib
import os
import random
import re
import sysconfig
import warnings
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path

from infalign.errors import InputError
from infalign.run.testbed.examples import Example, Pair

SKIPPED_FOLDERS = frozenset(
    {
        "__pycache__",
        "dist-packages",
        "ensurepip",
        "idle_test",
        "idlelib",
        "lib2to3",
        "site-packages",
        "test",
        "tests",
        "turtledemo",
    }
)
MIN_WORDS, MAX_WORDS = 3, 12
MAX_PARAMETERS = 5
MAX_DEFAULT_LENGTH = 12
MAX_PROMPT_LENGTH = 96
HELD_OUT_SHARE = 0.25
"""Not demonstrated to the reference: alignment and evaluation draw their prompts from these."""
KINDS = ("other", "sibling", "truncated", "shuffled", "repeated")
"""What can be wrong with a rejected sentence: it belongs to another function, to another function of the same module,
it breaks off, its words are shuffled, or a phrase of it is said twice."""

_Function = ast.FunctionDef | ast.AsyncFunctionDef
_SENTENCE_END = re.compile(r"(?<!\be\.g)(?<!\bi\.e)(?<!\bvs)(?<!\betc)[.!?](?=\s+[A-Z(]|\s*$)")
_FORBIDDEN = re.compile(r"->|=>|>>>|\\|[^\x20-\x7e]")


def docstring_examples(root: str | os.PathLike[str] | None = None) -> list[Example]:
    """Read one example per public, documented function and method of the standard library.

    Completions are unique, so no completion is both in the training and in the held-out part. A full stop is added
    where the author left it out, so that every completion ends the same way.

    Args:
        root: Folder of Python sources; the running Python's standard library if not given.

    Returns:
        Examples sorted by qualified name (their `source`). Whether one is held out is decided by a hash of that name.

    Raises:
        InputError: If no documented function is found under `root`.
    """
    folder = Path(root if root is not None else sysconfig.get_paths()["stdlib"])
    prompts: dict[str, tuple[str, str]] = {}
    for path in sorted(_source_files(folder)):
        module = _module_name(path.relative_to(folder))
        if module is None:
            continue
        for qualified_name, function in _public_functions(_parse(path), module):
            sentence = first_sentence(ast.get_docstring(function) or "")
            if sentence is not None and qualified_name not in prompts:
                prompts[qualified_name] = (render_prompt(qualified_name, function), sentence)
    examples: list[Example] = []
    seen: set[str] = set()
    for qualified_name, (prompt, sentence) in sorted(prompts.items()):
        if sentence.casefold() not in seen:
            seen.add(sentence.casefold())
            examples.append(Example(prompt, sentence, held_out=_is_held_out(qualified_name), source=qualified_name))
    if not examples:
        raise InputError(
            "no documented public function found",
            where=str(folder),
            hint="The testbed needs the sources of the standard library (.py files), which this Python seems to lack",
        )
    return examples


def preference_pairs(examples: Sequence[Example], seed: int, *, per_example: int = 3) -> list[Pair]:
    """Set every true sentence against plausible wrong ones.

    The kinds of `KINDS` are dealt in turn within each part, so they are equally frequent; a kind that an example does
    not allow (a module with a single function has no sibling) is replaced by "other". Wrong sentences for held-out
    examples come from held-out examples, for training examples from training examples.

    Args:
        examples: Examples whose `source` is a dotted qualified name; at least two in each part that is not empty.
        seed: Seed of every random choice.
        per_example: Pairs per example, each of another kind as far as there are kinds.

    Returns:
        `per_example` pairs for each example, in the order of `examples`.

    Raises:
        InputError: If a part has a single example, or `per_example` is not positive.
    """
    if per_example < 1:
        raise InputError(f"per_example must be at least 1, not {per_example}", where="preference_pairs")
    parts: dict[bool, list[Example]] = {side: [e for e in examples if e.held_out == side] for side in (False, True)}
    siblings: dict[tuple[bool, str], list[Example]] = defaultdict(list)
    for example in examples:
        siblings[example.held_out, _module_of(example)].append(example)
    for held_out, part in parts.items():
        if len(part) == 1:
            name = "held-out" if held_out else "training"
            raise InputError(f"the {name} part has a single example", where="preference_pairs", hint="Give two or more")

    rng = random.Random(seed)
    dealt = {held_out: rng.randrange(len(KINDS)) for held_out in parts}
    pairs: list[Pair] = []
    for example in examples:
        for _ in range(per_example):
            kind = KINDS[dealt[example.held_out] % len(KINDS)]
            dealt[example.held_out] += 1
            rejected = None
            if kind == "sibling":
                rejected = _another(example, siblings[example.held_out, _module_of(example)], rng)
            elif kind != "other":
                rejected = _spoil(example.completion, kind, rng)
            if rejected is None:
                kind, rejected = "other", _another(example, parts[example.held_out], rng)
            if rejected is None:
                raise InputError("all completions are the same text", where="preference_pairs")
            pairs.append(Pair(example.prompt, example.completion, rejected, kind, example.held_out, example.source))
    return pairs


def first_sentence(docstring: str) -> str | None:
    """The first sentence of a docstring on one line, or None if it is too short, too long or not plain text.

    Args:
        docstring: A docstring as `ast.get_docstring` returns it.

    Returns:
        A sentence of `MIN_WORDS` to `MAX_WORDS` words, without back-quotes, that ends in ".", "!" or "?".
    """
    paragraph = " ".join(docstring.split("\n\n")[0].split()).replace("`", "")
    end = _SENTENCE_END.search(paragraph)
    sentence = paragraph[: end.end()] if end else paragraph
    if not end and (sentence[-1:].isalnum() or sentence.endswith((")", '"', "'"))):
        sentence += "."
    words = sentence.split()
    plain = sentence[:1].isalpha() and sentence.endswith((".", "!", "?")) and not _FORBIDDEN.search(sentence)
    return sentence if plain and MIN_WORDS <= len(words) <= MAX_WORDS else None


def render_prompt(qualified_name: str, function: _Function) -> str:
    r"""The prompt of a function: ``json.dumps(obj, *, skipkeys=False, ...)\n``.

    Annotations and `self` or `cls` are left out, long defaults become "...", as do parameters after the first few.
    """
    spec = function.args
    positional = [*spec.posonlyargs, *spec.args]
    defaults = [None] * (len(positional) - len(spec.defaults)) + list(spec.defaults)
    parameters = [_parameter(a, d) for a, d in zip(positional, defaults, strict=True)]
    if positional and positional[0].arg in {"self", "cls", "mcs", "metacls"}:
        parameters = parameters[1:]
    if spec.vararg:
        parameters.append(f"*{spec.vararg.arg}")
    elif spec.kwonlyargs:
        parameters.append("*")
    parameters += [_parameter(a, d) for a, d in zip(spec.kwonlyargs, spec.kw_defaults, strict=True)]
    if spec.kwarg:
        parameters.append(f"**{spec.kwarg.arg}")
    shown = parameters[:MAX_PARAMETERS]
    while True:
        text = f"{qualified_name}({', '.join(shown + ['...'] * (len(shown) < len(parameters)))})"
        if len(text) <= MAX_PROMPT_LENGTH or not shown:
            return text + "\n"
        shown = shown[:-1]


def _parameter(argument: ast.arg, default: ast.expr | None) -> str:
    if default is None:
        return argument.arg
    value = ast.unparse(default)
    return f"{argument.arg}={value if len(value) <= MAX_DEFAULT_LENGTH else '...'}"


def _source_files(folder: Path) -> Iterator[Path]:
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name not in SKIPPED_FOLDERS]
        yield from (Path(parent, name) for name in files if name.endswith(".py"))


def _module_name(path: Path) -> str | None:
    """The public dotted name of a source file, None if it is private; `_pydecimal` and its like are public twins."""
    parts = [part.removeprefix("_py") for part in path.with_suffix("").parts]
    if parts[-1] == "__init__":
        parts = parts[:-1]
    return ".".join(parts) if parts and all(part.isidentifier() and part[0] != "_" for part in parts) else None


def _parse(path: Path) -> ast.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's string literals
        try:
            return ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):  # sources that are broken on purpose, or written for another Python
            return ast.Module(body=[], type_ignores=[])


def _public_functions(node: ast.AST, prefix: str) -> Iterator[tuple[str, _Function]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.With | ast.ExceptHandler):
            yield from _public_functions(child, prefix)
        elif isinstance(child, _Function | ast.ClassDef) and not child.name.startswith("_"):
            name = f"{prefix}.{child.name}"
            if isinstance(child, ast.ClassDef):
                yield from _public_functions(child, name)
            else:
                yield name, child


def _is_held_out(qualified_name: str) -> bool:
    digest = hashlib.sha256(qualified_name.encode()).digest()
    return int.from_bytes(digest[:8], "big") / 2**64 < HELD_OUT_SHARE


def _module_of(example: Example) -> str:
    return example.source.split(".")[0]


def _another(example: Example, pool: Sequence[Example], rng: random.Random) -> str | None:
    if not any(other.completion != example.completion for other in pool):
        return None
    while True:
        other = rng.choice(pool)
        if other.completion != example.completion:
            return other.completion


def _spoil(sentence: str, kind: str, rng: random.Random) -> str | None:
    """The sentence made wrong in the given way; None if that way leaves it as it was."""
    words = sentence.split()
    if kind == "truncated":
        kept = words[: rng.randint(max(1, len(words) // 3), len(words) - 1)]
        spoilt = " ".join(kept).rstrip(".!?,;:")
    elif kind == "shuffled":
        mixed = words.copy()
        rng.shuffle(mixed)
        spoilt = " ".join(mixed)
    elif kind == "repeated":
        length = rng.randint(1, min(3, len(words) - 1))
        start = rng.randint(0, len(words) - length - 1)
        spoilt = " ".join(words[: start + length] + words[start:])
    else:
        raise ValueError(kind)
    return spoilt if spoilt != sentence else None
