"""Is there such a model or data set? Asked once and quickly, before libraries try six times to reach it."""

from __future__ import annotations

from pathlib import Path

from infalign.errors import InputError

_SECONDS = 10.0
_FILES = ("config.json", "adapter_config.json")


def require_model(model: str | Path, where: str | None = None) -> None:
    """Refuse a name behind which there is neither a folder nor a model of the hub.

    Args:
        model: Folder or hub name.
        where: For the message; the name itself by default.

    Raises:
        InputError: A path that is not there; a name that the hub does not know; or the hub cannot be reached and this
            machine holds no copy.
    """
    name, where = str(model), where or str(model)
    if Path(model).exists():
        return
    # `owner/name` can be on the hub; anything else that is written like a path cannot.
    if isinstance(model, Path) or name.startswith((".", "/", "~")) or name.count("/") > 1 or "\\" in name:
        raise InputError(
            "there is no such folder",
            where=where,
            hint="A recipe's paths are relative to the recipe, others to where you are",
        )
    reason = _missing("model", name)
    if reason is not None:
        raise InputError(
            f"there is no folder of this name, and {reason}",
            where=where,
            hint="Give a model folder, or the name of a model on the hub",
        )


def require_data_set(name: str) -> None:
    """Refuse a name behind which there is no data set of the hub.

    Args:
        name: The data set's name there.

    Raises:
        InputError: The hub does not know it, or cannot be reached and this machine holds no copy.
    """
    reason = _missing("data set", name)
    if reason is not None:
        raise InputError(
            f"there is no file or folder of this name, and {reason}",
            where=name,
            hint="Check the spelling; a local file needs its whole path",
        )


def _has_copy(kind: str, name: str) -> bool:
    """Whether this machine holds a copy, as far as can be told quickly."""
    from huggingface_hub import constants, try_to_load_from_cache

    if kind == "model":
        return any(isinstance(try_to_load_from_cache(name, file), str) for file in _FILES)
    from datasets import config

    folders = (
        Path(constants.HF_HUB_CACHE) / f"datasets--{name.replace('/', '--')}",
        Path(config.HF_DATASETS_CACHE) / name.replace("/", "___"),
    )
    return any(folder.exists() for folder in folders)


def _missing(kind: str, name: str) -> str | None:
    """Why the hub does not give a model or data set; None where it does, or may."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
    )

    try:
        if _has_copy(kind, name):
            return None
        HfApi().repo_info(name, repo_type="model" if kind == "model" else "dataset", timeout=_SECONDS)
    except HFValidationError:
        return f"this cannot be the name of a {kind} on the hub"
    except GatedRepoError:
        return None  # whoever downloads says how to get access
    except RepositoryNotFoundError:
        return f"the hub knows no such {kind}, or does not show it to you"
    except HfHubHTTPError:
        return None  # it answers, if not this: a mirror may know less than the hub
    except OfflineModeIsEnabled:
        return f"the hub is switched off (HF_HUB_OFFLINE) and this machine holds no copy of such a {kind}"
    except Exception as error:  # of whichever HTTP library the hub's client is built on
        told = f"{type(error).__name__}: {error}".strip(": ")
        return f"the hub cannot be reached ({told}) and this machine holds no copy of such a {kind}"
    return None
