"""What is wrong with a request, in one plain message that names the field and says what it should be."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from infalign._io.wording import counted

_WANTED: dict[str, Callable[[Mapping[str, Any]], str]] = {
    "missing": lambda limit: "this field is required",
    "extra_forbidden": lambda limit: "this field is not known; leave it out",
    "string_type": lambda limit: "this must be text",
    "string_unicode": lambda limit: "the text holds half of a surrogate pair",
    "string_too_long": lambda limit: f"this must be text of at most {counted(limit['max_length'], 'character')}",
    "int_type": lambda limit: "this must be a whole number",
    "int_from_float": lambda limit: "this must be a whole number",
    "float_type": lambda limit: "this must be a number",
    "finite_number": lambda limit: "this must be a finite number",
    "bool_type": lambda limit: "this must be true or false",
    "list_type": lambda limit: "this must be a list",
    "dict_type": lambda limit: "this must be an object",
    "model_type": lambda limit: "this must be an object",
    "model_attributes_type": lambda limit: "this must be an object",
    "literal_error": lambda limit: f"this must be {limit['expected']}",
    "greater_than": lambda limit: f"this must be more than {limit['gt']:,}",
    "greater_than_equal": lambda limit: f"this must be at least {limit['ge']:,}",
    "less_than": lambda limit: f"this must be less than {limit['lt']:,}",
    "less_than_equal": lambda limit: f"this must be at most {limit['le']:,}",
    "too_short": lambda limit: f"there must be at least {counted(limit['min_length'], 'entry', 'entries')}",
    "too_long": lambda limit: f"there must be at most {counted(limit['max_length'], 'entry', 'entries')}",
}


def explain(errors: Sequence[Mapping[str, Any]]) -> str:
    """The error that says most, in words.

    Args:
        errors: As pydantic gives them.
    """
    # Where several kinds of value may stand, each kind complains: the one that was meant is the one that got furthest.
    worst = max(errors, key=lambda one: (one["type"] not in ("string_type", "list_type"), len(one["loc"])))
    limit = worst.get("ctx", {})
    if worst["type"] == "json_invalid":
        return f"the request is not valid JSON ({limit.get('error', worst['msg'])})"
    where = _field(worst)
    if not where:
        wants_object = worst["type"] in ("missing", "dict_type", "model_type", "model_attributes_type")
        return "the request must be a JSON object" if wants_object else _own_words(worst)
    if {"string_type", "list_type"} <= {one["type"] for one in errors if _field(one) == where}:
        return f"{where}: this must be text or a list"
    wanted = _WANTED.get(worst["type"])
    return f"{where}: {_own_words(worst) if wanted is None else wanted(limit)}"


def _field(error: Mapping[str, Any]) -> str:
    """The field's name with dots; the kinds of value among which pydantic chose are no part of it."""
    named = [str(part) for part in error["loc"][1:] if isinstance(part, int) or str(part).isidentifier()]
    return ".".join(part for part in named if part != "str")


def _own_words(error: Mapping[str, Any]) -> str:
    """What a check of ours said."""
    return str(error["msg"]).removeprefix("Value error, ")
