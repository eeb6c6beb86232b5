"""Where a model is that a file names by a path, when the folder of the file has been moved since."""

from __future__ import annotations

from pathlib import Path

from infalign._io.inventory import read_object
from infalign.errors import StorageError

ADAPTER = "adapter_config.json"
_REPAIR = "Copy this model folder again"


def found_after_move(folder: Path, named: str) -> str:
    """A path that a file in `folder` names, as it can be opened now.

    If nothing is there, the run folder that the file lies in is asked: it may hold the model itself, at the end of the
    old path, or its recipe may name it.

    Returns:
        A path; the name as it is where nothing is found, as for a model of the hub.
    """
    if Path(named).exists():
        return named
    run = next((one for one in folder.resolve().parents if (one / "run.json").is_file()), None)
    if run is None:
        return named
    parts = Path(named).parts
    inside = (run.joinpath(*parts[start:]) for start in range(1, len(parts)))
    given = _given(run)
    candidates = [*inside, *([Path(given)] if given and Path(given).name == Path(named).name else [])]
    return next((str(one) for one in candidates if one.is_dir()), named)


def recorded_base(model: str | Path) -> str | None:
    """The base that an adapter folder names; None for any other model.

    Raises:
        StorageError: Its adapter_config.json is damaged.
    """
    config = Path(model) / ADAPTER
    if not config.is_file():
        return None
    named = read_object(config, _REPAIR).get("base_model_name_or_path")
    if not isinstance(named, str) or not named:
        raise StorageError("it does not say which model it adapts", where=str(config),
                           hint="Set base_model_name_or_path to a folder or a hub name")  # fmt: skip
    return named


def adapter_base(model: str | Path) -> str:
    """The name of the model that an adapter folder adapts, as it can be opened; any other name as it is."""
    named = recorded_base(model)
    return str(model) if named is None else found_after_move(Path(model), named)


def _given(run: Path) -> str | None:
    try:
        policy = read_object(run / "recipe.json").get("policy")
    except StorageError:
        return None
    model = policy.get("model") if isinstance(policy, dict) else None
    return model if isinstance(model, str) else None
