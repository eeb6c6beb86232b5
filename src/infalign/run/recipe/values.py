"""The short notations of a recipe: a procedure, a transform, a comparator, and the numbers that a setting may hold."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from infalign._io.http import check_address, check_variable
from infalign.errors import InputError
from infalign.procedures import procedure_from_dict, procedure_from_name
from infalign.procedures.measured import MeasuredProcedure
from infalign.training.methods import comparator_from_dict, comparator_kinds
from infalign.transforms import Exponential, Identity, Log, RewardTransform

NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"  # can be a folder
_SECRET = re.compile(r"(?i)(?:^|_)(?:token|key|secret|password|passwd|credentials?)$")
_SPECIAL_TOKENS = frozenset(f"{name}_token" for name in ("eos", "bos", "pad", "unk", "cls", "sep", "mask", "image"))


def _procedure_dict(value: Any) -> Any:
    """`best-of-4` for `{kind: best-of-n, n: 4}`; anything else as it is."""
    if isinstance(value, str):
        named = procedure_from_name(value)
        value = {"kind": value} if named is None else named.to_dict()
    if not isinstance(value, Mapping) or "kind" not in value:
        raise ValueError("a procedure is written best-of-4, worst-of-4, 3-of-5, standard, or {kind: best-of-n, n: 4}")
    if value["kind"] == "fitted" and "decoder" in value:
        MeasuredProcedure.parse(value)
    else:
        procedure_from_dict(dict(value))
    return dict(value)


def _transform_value(value: Any) -> Any:
    """`optimal`, `self-consistent`, `identity`, `log`, `{exponential: t}` or `{file: transform.json}`."""
    if isinstance(value, str) and value in {"optimal", "self-consistent", "identity", "log"}:
        return value
    if isinstance(value, Mapping) and len(value) == 1:
        (kind, argument), *_ = value.items()
        if kind == "exponential" and isinstance(argument, int | float | str) and not isinstance(argument, bool):
            return {"exponential": _exponent(argument)}
        if kind == "file" and isinstance(argument, str):
            return {"file": argument}
    raise ValueError(
        "a transform is one of: optimal, self-consistent, identity, log, {exponential: t}, {file: transform.json}"
    )


def _compared_value(value: Any) -> Any:
    """A transform, or a comparator: `{baseline: raw}`."""
    if isinstance(value, Mapping) and "baseline" in value:
        try:
            comparator_from_dict(value)
        except InputError as error:
            raise ValueError(f"{error.what}; {error.hint}" if error.hint else error.what) from error
        return dict(value)
    if isinstance(value, str) and value in comparator_kinds():
        raise ValueError(f"{value} is a baseline, not a transform; write {{baseline: {value}}}")
    return _transform_value(value)


def _exponent(value: float | str) -> float:
    """A finite number; also from text, for to YAML 1e2 is text."""
    try:
        return Exponential(float(value)).t
    except InputError as error:
        raise ValueError(error.what) from error
    except ValueError as error:
        raise ValueError(f"t = {value!r} is not a number") from error


def _without_secrets(value: Any) -> Any:
    """Settings of a library as they are, unless one of them is a key: a recipe is stored and passed on."""
    if isinstance(value, Mapping):
        for name, one in value.items():
            if isinstance(one, str) and one and _SECRET.search(str(name)) and name not in _SPECIAL_TOKENS:
                raise ValueError(
                    f"{name} is a secret, and a recipe is stored with its run; leave it out and log in with "
                    "`hf auth login`, or put it into the environment variable that its library reads, such as HF_TOKEN"
                )
            _without_secrets(one)
    elif isinstance(value, list):
        for one in value:
            _without_secrets(one)
    return value


def _address(value: str) -> str:
    """An http address that holds no key."""
    check_address(value)
    return value


def _variable(value: str) -> str:
    """The name of an environment variable, not its content."""
    check_variable(value)
    return value


Settings = Annotated[dict[str, Any], BeforeValidator(_without_secrets)]
Address = Annotated[str, AfterValidator(_address)]
Variable = Annotated[str, AfterValidator(_variable)]
Procedure = Annotated[dict[str, Any], BeforeValidator(_procedure_dict)]
Transform = Annotated[str | dict[str, Any], BeforeValidator(_transform_value)]
Compared = Annotated[str | dict[str, Any], BeforeValidator(_compared_value)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(gt=0, lt=1)]


def transform_name(transform: str | Mapping[str, Any]) -> str:
    """A short name that can be a folder: `optimal`, `exponential+10`, `transform`."""
    if isinstance(transform, str):
        return transform
    if "exponential" in transform:
        return f"exponential{transform['exponential']:+g}"
    return Path(transform["file"]).stem


def named_transform(transform: str | Mapping[str, Any]) -> RewardTransform | None:
    """The transform itself; `None` for `optimal` and `self-consistent`, which depend on the procedure."""
    if isinstance(transform, str):
        return {"optimal": None, "self-consistent": None, "identity": Identity(), "log": Log()}[transform]
    if "exponential" in transform:
        return Exponential(transform["exponential"])
    return RewardTransform.load(Path(transform["file"]))
