"""Rows as plain JSON values, so that a reward is shown the same columns whether or not a file lies in between."""

from __future__ import annotations

import base64
import datetime
import decimal
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from infalign.errors import InputError


def plain(value: Any, where: str = "value") -> Any:
    """A value as JSON holds it: what `json.loads(json.dumps(…))` would give back.

    Text, numbers, truth values and None stay as they are. Dates and times become ISO 8601 text, decimals and UUIDs
    their text, bytes base64 text, durations seconds, arrays and tuples lists; keys of mappings become text.

    Args:
        value: What a file or data set holds.
        where: What it is, for the message.

    Raises:
        InputError: There is no such form for it, as for an image.
    """
    if value is None or isinstance(value, str):
        return value if value is None else str(value)
    if isinstance(value, bool | int | float):
        return value if type(value) in (bool, int, float) else _number(value)
    if isinstance(value, Mapping):
        return {_key(key, where): plain(inner, where) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner, where) for inner in value]
    if isinstance(value, set | frozenset):
        return sorted((plain(inner, where) for inner in value), key=repr)
    if isinstance(value, datetime.datetime | datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, decimal.Decimal | uuid.UUID | Path):
        return str(value)
    if isinstance(value, bytes | bytearray | memoryview):
        return base64.b64encode(bytes(value)).decode("ascii")
    if hasattr(value, "tolist"):  # arrays, tensors and their scalars
        listed = value.tolist()
        if type(listed) is not type(value):
            return plain(listed, where)
    raise InputError(f"it holds a {type(value).__name__}, which cannot be kept with the prompt", where=where,
                     hint="Remove this column, or write it as text or numbers")  # fmt: skip


def plain_row(row: Mapping[str, Any], where: str) -> dict[str, Any]:
    """A row with all its columns `plain`.

    Raises:
        InputError: As `plain`, naming the column.
    """
    return {str(name): plain(value, f"{where}, column {str(name)!r}") for name, value in row.items()}


def _number(value: Any) -> Any:
    for kind in (bool, int, float):
        if isinstance(value, kind):
            return kind(value)
    raise AssertionError("held by the caller")


def _key(key: Any, where: str) -> str:
    found = plain(key, where)
    return found if isinstance(found, str) else str(found)
