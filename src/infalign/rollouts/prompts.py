"""Read prompts and preference rows: JSON lines, Parquet, or a Hugging Face data set; split them without leaks."""

from __future__ import annotations

import difflib
import gzip
import hashlib
import itertools
import json
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, overload

from infalign._io.hub import require_data_set
from infalign._io.plain import plain, plain_row
from infalign.errors import InputError, StorageError

Message = dict[str, Any]
PromptContent = str | list[Message]
Row = dict[str, Any]

_JSON_LINES = (".jsonl", ".jsonl.gz", ".ndjson", ".ndjson.gz", ".json.gz")
_PARQUET = (".parquet", ".pq")


@dataclass(frozen=True)
class Prompt:
    """One prompt.

    Attributes:
        prompt: Plain text, used as it is; or chat messages, rendered by the model's chat template.
        row: The whole row it came from, for rewards that need more than the prompt (an answer, a rubric).
        id: 16 hexadecimal digits that depend on the content of `prompt` alone.
        rendered_at: The moment, in ISO 8601, that a chat template with a date in it is told; None for the present. A
            run fixes it once, so that all its stages see one rendering.
    """

    prompt: PromptContent
    row: Row = field(default_factory=dict, compare=False, hash=False, repr=False)
    id: str = ""
    rendered_at: str | None = field(default=None, compare=False, hash=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", prompt_id(self.prompt))

    @property
    def text(self) -> str:
        """The prompt for a reader: its text, or its messages one under the other."""
        return prompt_text(self.prompt)


@dataclass(frozen=True)
class PromptSet(Sequence[Prompt]):
    """Prompts without duplicates, in their order of first appearance.

    Attributes:
        prompts: The prompts.
        duplicates: How many rows were left out because their prompt had come before.
    """

    prompts: tuple[Prompt, ...]
    duplicates: int = 0

    def __len__(self) -> int:
        return len(self.prompts)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> PromptSet: ...
    def __getitem__(self, index: int | slice) -> Prompt | PromptSet:
        if isinstance(index, slice):
            return PromptSet(self.prompts[index], self.duplicates)
        return self.prompts[index]

    @property
    def ids(self) -> list[str]:
        """The prompts' ids, in order."""
        return [prompt.id for prompt in self.prompts]

    def rendered_at(self, moment: str | None) -> PromptSet:
        """The same prompts, their chat messages rendered at this moment."""
        return PromptSet(tuple(replace(prompt, rendered_at=moment) for prompt in self.prompts), self.duplicates)


def prompt_id(prompt: PromptContent) -> str:
    """The id of a prompt: a hash of its content, the same on every machine and in every run."""
    content = prompt if isinstance(prompt, str) else json.dumps(prompt, sort_keys=True, ensure_ascii=False)
    kind = "text" if isinstance(prompt, str) else "chat"
    return hashlib.sha256(f"{kind}\0{content}".encode("utf-8", "surrogatepass")).hexdigest()[:16]


def prompt_text(prompt: PromptContent) -> str:
    """A prompt for a reader or a plain-text reward: its text, or `role: content` paragraphs."""
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role']}: {message_text(message)}" for message in prompt)


def message_text(message: Message) -> str:
    """The text of a message; the calls of tools as JSON behind it, since they may be all that it has."""
    parts = [message.get("content") or ""]
    parts += [json.dumps(call, ensure_ascii=False) for call in message.get("tool_calls") or ()]
    return "\n".join(part for part in parts if part)


# --- rows ------------------------------------------------------------------------------------------------------------


def read_rows(
    source: str | os.PathLike[str],
    *,
    columns: Sequence[str] | None = None,
    split: str | None = None,
    limit: int | None = None,
) -> list[Row]:
    """Read rows of a JSON lines or Parquet file, or of a Hugging Face data set.

    Args:
        source: A `.jsonl`, `.jsonl.gz` or `.parquet` file; a folder that `datasets` can load; or a data set's name on
            the hub.
        columns: Keep these columns, all of which must be there; every column when None.
        split: Split of a data set; needed where it has several.
        limit: Read no more rows than this.

    Returns:
        The rows as dictionaries.

    Raises:
        InputError: The source is missing or empty, is not UTF-8 or JSON (says the line), or lacks a column.
    """
    rows = list(itertools.islice(_iterate_rows(source, columns=columns, split=split), limit))
    if not rows:
        raise InputError("there are no rows", where=str(source))
    return rows


def _iterate_rows(
    source: str | os.PathLike[str], *, columns: Sequence[str] | None = None, split: str | None = None
) -> Iterator[Row]:
    path = Path(source)
    name = path.name.lower()
    if path.is_file() and split not in (None, "train"):
        raise InputError(f"a file has no split {split!r}", where=str(source),
                         hint="Leave the split out, or give a data set")  # fmt: skip
    if path.is_file() and name.endswith(_JSON_LINES):
        rows = _json_lines(path)
    elif path.is_file() and name.endswith(_PARQUET):
        rows = _parquet_rows(path)
    elif path.is_file():
        known = ", ".join(_JSON_LINES[:2] + _PARQUET[:1])
        raise InputError("this kind of file is not known", where=str(source), hint=f"Use one of {known}")
    else:
        rows = _dataset_rows(source, split)
    for number, row in enumerate(rows, start=1):
        if columns is None:
            yield row
            continue
        for column in columns:
            if column not in row:
                raise _missing_column(column, row, f"{source}, row {number}")
        yield {column: row[column] for column in columns}


def _missing_column(column: str, row: Row, where: str) -> InputError:
    near = difflib.get_close_matches(column, row, n=1, cutoff=0.5)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return InputError(f"there is no column {column!r}", where=where, hint=f"{hint}There are: {', '.join(row)}")


def _json_lines(path: Path) -> Iterator[Row]:
    opener = gzip.open if path.name.lower().endswith(".gz") else open
    number = 0
    try:
        with opener(path, "rb") as lines:
            for number, line in enumerate(lines, start=1):
                where = f"{path}, line {number}"
                if not line.strip():
                    continue
                try:
                    # A byte order mark is no part of the text, and only ever stands at the very start.
                    row = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                except UnicodeDecodeError as error:
                    raise InputError("this line is not UTF-8", where=where, hint="Convert the file to UTF-8") from error
                except (json.JSONDecodeError, RecursionError) as error:
                    raise InputError(f"this line is not JSON ({getattr(error, 'msg', error)})", where=where,
                                     hint="Write one JSON object per line") from error  # fmt: skip
                if not isinstance(row, dict):
                    raise InputError("this line is not a JSON object", where=where, hint="Write one object per line")
                yield row
    except (OSError, EOFError, zlib.error) as error:
        if isinstance(error, (gzip.BadGzipFile, EOFError, zlib.error)):
            raise InputError(
                f"the compressed file is damaged after line {number} ({error})", where=str(path)
            ) from error
        raise StorageError(f"the file cannot be read ({error})", where=str(path)) from error


def _parquet_rows(path: Path) -> Iterator[Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=1024):
                yield from batch.to_pylist()
    except pa.ArrowException as error:
        raise InputError(f"this is not a readable Parquet file ({error})", where=str(path)) from error


def _no_split(split: str, there: Sequence[str], where: str) -> InputError:
    near = difflib.get_close_matches(split, there, n=1, cutoff=0.4)
    hint = f"Did you mean {near[0]!r}? " if near else ""
    return InputError(f"there is no split {split!r}", where=where, hint=f"{hint}There are: {', '.join(there)}")


def _dataset_rows(source: str | os.PathLike[str], split: str | None) -> Iterator[Row]:
    name, path = str(source), Path(source)
    # `owner/name` can be on the hub; anything that is written like a path cannot.
    looks_like_path = path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or bool(
        name.lower().endswith((*_JSON_LINES, *_PARQUET, ".json", ".csv", ".gz", ".txt"))
    )  # fmt: skip
    if not path.exists() and looks_like_path:
        raise InputError("there is no such file or folder", where=name)
    import datasets

    try:
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            loaded: Any = datasets.load_from_disk(name)
            if split is not None:
                splits = loaded if isinstance(loaded, dict) else {"train": loaded}
                if split not in splits:
                    raise _no_split(split, list(map(str, splits)), name)
                loaded = splits[split]
        else:
            if not path.exists():
                require_data_set(name)
            loaded = datasets.load_dataset(name, split=split)
    except InputError:
        raise
    except Exception as error:  # whatever goes wrong inside, the user's source is what cannot be loaded
        if split is not None and str(error).startswith("Unknown split"):  # as datasets says it
            raise _no_split(split, re.findall(r"'([^']+)'", str(error).partition("one of")[2]), name) from error
        raise InputError(
            f"no data set can be loaded from here ({type(error).__name__}: {error})",
            where=name,
            hint="Check the spelling; a local file needs its whole path",
        ) from error
    if isinstance(loaded, dict):
        if len(loaded) != 1:
            raise InputError(
                f"the data set has the splits {', '.join(map(str, loaded))}", where=name, hint="Name a split"
            )
        loaded = next(iter(loaded.values()))
    yield from loaded


# --- prompts ---------------------------------------------------------------------------------------------------------


def load_prompts(
    source: str | os.PathLike[str],
    column: str = "prompt",
    *,
    split: str | None = None,
    limit: int | None = None,
    held_out: float | None = None,
    side: Literal["train", "held_out"] = "train",
) -> PromptSet:
    """Read prompts, without duplicates, and optionally one side of a leak-free split.

    Args:
        source: As in `read_rows`.
        column: The column that holds the prompt: text, or chat messages `[{"role": ..., "content": ...}, ...]`, with
            whatever else a chat template reads (`tool_calls`, `name`, …). The last one is to be answered, so it is
            not the assistant's.
        split: As in `read_rows`.
        limit: Stop after this many prompts (counted after duplicates and the other side are left out).
        held_out: Share of prompts to hold out, by `is_held_out`; no split when None.
        side: Which side to return.

    Returns:
        The prompts, each with its whole row as plain JSON values (`plain.py`), and how many duplicates were left out.

    Raises:
        InputError: As in `read_rows`; or a prompt is empty, neither text nor messages, or ends with its answer; or a
            column holds what cannot be kept (says the row).
    """
    seen: set[str] = set()
    prompts: list[Prompt] = []
    duplicates = other_side = 0
    for number, row in enumerate(_iterate_rows(source, split=split), start=1):
        if limit is not None and len(prompts) >= limit:
            break
        if column not in row:
            raise _missing_column(column, row, f"{source}, row {number}")
        where = f"{source}, row {number}"
        prompt = Prompt(_check_prompt(row[column], f"{where}, column {column!r}"), plain_row(row, where))
        if held_out is not None and is_held_out(prompt.prompt, held_out) != (side == "held_out"):
            other_side += 1
            continue
        if prompt.id in seen:
            duplicates += 1
            continue
        seen.add(prompt.id)
        prompts.append(prompt)
    if not prompts:
        if not other_side:
            raise InputError("there are no prompts", where=str(source))
        raise InputError(
            f"no prompt falls on the {side.replace('_', '-')} side with a share of {held_out} held out",
            where=str(source),
            hint="Give more prompts or another share",
        )
    return PromptSet(tuple(prompts), duplicates)


def _check_prompt(value: Any, where: str) -> PromptContent:
    if isinstance(value, str):
        if not value.strip():
            raise InputError("the prompt is empty", where=where, hint="Remove the row or give it a prompt")
        _require_unicode(value, where)
        return value
    if isinstance(value, (list, tuple)):
        messages = [_check_message(message, where) for message in value]
        if not messages or not any(message_text(message).strip() for message in messages):
            raise InputError("the prompt is empty", where=where, hint="Remove the row or give it a prompt")
        if messages[-1]["role"] == "assistant":
            raise InputError(
                "the last message is the assistant's answer, and what is drawn would answer that",
                where=where,
                hint="Leave the last message out: a prompt ends with the turn that is to be answered",
            )
        return messages
    raise InputError(f"a prompt is a {type(value).__name__}", where=where, hint="Give text or a list of chat messages")


def _check_message(message: Any, where: str) -> Message:
    """A message with all its fields, as plain values; fields that are None, which tables fill in, are left out."""
    if not isinstance(message, dict) or not isinstance(message.get("role"), str):
        raise InputError("a message is not {role, content} with two texts", where=where)
    calls = message.get("tool_calls") or message.get("function_call")
    content = message.get("content")
    if isinstance(content, (list, tuple)):
        raise InputError(
            "the content of a message is a list of parts",
            where=where,
            hint="Write it as one text; images and other parts are not supported",
        )
    if not isinstance(content, str) and not (content is None and calls):
        raise InputError("a message is not {role, content} with two texts", where=where)
    found: Message = plain({name: value for name, value in message.items() if value is not None}, where)
    _require_unicode(json.dumps(found, ensure_ascii=False), where)
    return {"role": found.pop("role"), "content": found.pop("content", None), **found}


def _require_unicode(text: str, where: str) -> None:
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise InputError(
            "the prompt holds half of a surrogate pair", where=where, hint="Remove the row or repair its text"
        ) from error


# --- splitting -------------------------------------------------------------------------------------------------------


def group_key(prompt: PromptContent) -> str:
    """What related prompts have in common: the first human turn of a dialogue, else the prompt; case and spaces aside.

    Dialogues that start with the same turn (as those of the Anthropic HH data do) get one key.
    """
    if not isinstance(prompt, str):
        turn = next((message["content"] for message in prompt if message["role"] == "user"), None)
        text = prompt_text(prompt) if turn is None else turn
    elif prompt.startswith("\n\nHuman:"):
        text = prompt.removeprefix("\n\nHuman:").partition("\n\nAssistant:")[0]
    else:
        text = prompt
    return " ".join(text.lower().split())


def is_held_out(prompt: PromptContent, fraction: float, *, seed: str = "infalign") -> bool:
    """Whether a prompt is on the held-out side of a split that never parts related prompts.

    The side depends on `group_key` and `seed` alone, so it is the same in every file and run, and a prompt held out at
    one fraction stays held out at every larger one.

    Raises:
        InputError: The fraction is not between 0 and 1.
    """
    if not 0.0 <= fraction <= 1.0:
        raise InputError(f"the fraction held out is {fraction}", where="held_out", hint="Give a number from 0 to 1")
    digest = hashlib.sha256((seed + group_key(prompt)).encode("utf-8", "surrogatepass")).digest()
    return int.from_bytes(digest[:8], "big") < fraction * 2**64
