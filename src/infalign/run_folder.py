"""A run's folder: which stages are done, and with what.

Every stage has a fingerprint made of its settings, the fingerprints of the stages before it and the content of the
files it reads. A finished stage whose fingerprint is unchanged is kept; one whose fingerprint changed is moved to
`superseded/` and done again, and so is exactly what depends on it.
"""

from __future__ import annotations

import hashlib
import json
import platform
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from infalign.errors import MismatchError, StorageError
from infalign.files import refuse_links_out, remove_unfinished, write_json

FORMAT = 1
RECIPE = "recipe.json"  # the recipe that a calibrated run was made with


def fingerprint(content: Any) -> str:
    """A short stable hash of JSON-able content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """A short stable hash of a file's bytes."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


@dataclass(frozen=True)
class StageStamp:
    """What the folder knows of one stage."""

    fingerprint: str
    settings: dict[str, Any]
    done: bool
    seconds: float = 0.0


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder; made if it does not exist.
        name: The recipe's name; a folder that holds another recipe's run is refused.

    Raises:
        MismatchError: If the folder holds something else.
        StorageError: If it cannot be made or written.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path = path
        marker = path / "run.json"
        try:
            if marker.exists():
                found = json.loads(marker.read_text())
                if found.get("name") != name or found.get("format") != FORMAT:
                    raise MismatchError(
                        f"this folder holds a run of {found.get('name')!r}, not of {name!r}",
                        where=str(path),
                        hint="Choose another folder with --out",
                    )
            elif path.exists() and any(path.iterdir()):
                raise MismatchError(
                    "this folder is not empty and holds no run", where=str(path), hint="Choose another with --out"
                )
            refuse_links_out(path)
            path.mkdir(parents=True, exist_ok=True)
            (path / "stages").mkdir(exist_ok=True)
            write_json(marker, {"name": name, "format": FORMAT})
        except (OSError, json.JSONDecodeError) as error:
            if isinstance(error, StorageError | MismatchError):
                raise
            raise StorageError(
                f"cannot use this folder ({error})", where=str(path), hint="Choose another with --out"
            ) from error

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the right to work in this folder; the system itself releases it when the process dies.

        Raises:
            StorageError: If another process holds it.
        """
        lock = FileLock(str(self.path / ".lock"), timeout=0)
        try:
            lock.acquire()
        except Timeout as error:
            raise StorageError(
                "another process is working in this folder", where=str(self.path), hint="Wait until it has ended"
            ) from error
        except OSError as error:  # no permission, or a link in the lock's place
            raise StorageError(
                f"this folder cannot be locked ({error.strerror or error})",
                where=str(self.path / ".lock"),
                hint="Remove this file, or fix the folder's permissions",
            ) from error
        try:
            remove_unfinished(self.path, below=True)
            yield
        finally:
            lock.release()

    def stamp(self, stage: str) -> StageStamp | None:
        """What is known of a stage; `None` if it never started."""
        path = self.path / "stages" / f"{stage}.json"
        return StageStamp(**json.loads(path.read_text())) if path.exists() else None

    def begin(self, stage: str, settings: Mapping[str, Any], outputs: Iterable[str]) -> bool:
        """Make ready to run a stage.

        Returns:
            False if the stage is done with these settings. True if it must run: from scratch, or from where a
            stopped attempt with the same settings left its outputs.
        """
        stamp, mine = self.stamp(stage), fingerprint(settings)
        if stamp is not None and stamp.fingerprint == mine:
            return not stamp.done
        # Outputs that no stamp vouches for may be of any settings: they are put aside as those of other settings are.
        self._supersede(stage, "unknown" if stamp is None else stamp.fingerprint, outputs)
        self._write_stamp(stage, StageStamp(mine, dict(settings), done=False))
        return True

    def finish(self, stage: str, seconds: float) -> None:
        """Record that a stage is done."""
        stamp = self.stamp(stage)
        assert stamp is not None, "finish follows begin"
        self._write_stamp(stage, StageStamp(stamp.fingerprint, stamp.settings, done=True, seconds=seconds))

    def require(self, stage: str, settings: Mapping[str, Any], command: str) -> None:
        """Refuse to build on a stage that is missing, unfinished or made with other settings.

        Args:
            stage: Its name.
            settings: What it should have been done with.
            command: The command that does it.

        Raises:
            MismatchError: Saying which command does it, or which settings differ.
        """
        stamp = self.stamp(stage)
        if stamp is None or not stamp.done:
            raise MismatchError(
                f"the stage {stage!r} has not been done",
                where=str(self.path),
                hint=f"Do it first with `{command}`, or do everything with `infalign run RECIPE`",
            )
        if stamp.fingerprint != fingerprint(settings):
            raise MismatchError(
                f"the stage {stage!r} was done with other settings ({_differences(stamp.settings, settings)})",
                where=str(self.path),
                hint="Use `infalign run` to redo what changed, or another folder with --out",
            )

    def _supersede(self, stage: str, made_by: str, outputs: Iterable[str]) -> None:
        """Put the outputs of other or unknown settings aside; nothing is deleted."""
        for output in outputs:
            source = self.path / output
            if source.exists():
                target = self.path / "superseded" / f"{stage}-{made_by[:8]}-{int(time.time())}" / output
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(target)

    def _write_stamp(self, stage: str, stamp: StageStamp) -> None:
        write_json(self.path / "stages" / f"{stage}.json", stamp.__dict__)


def _differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> str:
    """Setting by setting, where two fingerprints differ; those of a section as `section.setting`."""
    then, now = _flat(old), _flat(new)
    missing = "no such setting"
    changed = [
        f"{key}: {then.get(key, missing)} then, {now.get(key, missing)} now"
        for key in {**then, **now}
        if then.get(key) != now.get(key)
    ]
    return "; ".join(changed)[:400] or "the same ones, in the way of another version"


def _flat(settings: Mapping[str, Any], within: str = "") -> dict[str, str]:
    """Every setting as the JSON that its fingerprint is made of: 1 and 1.0 are two values, (1,) and [1] are one."""
    out: dict[str, str] = {}
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            out |= _flat(value, f"{within}{key}.")
        else:
            out[f"{within}{key}"] = json.dumps(value, sort_keys=True, ensure_ascii=False)
    return out


def versions() -> dict[str, str]:
    """Exact versions of what a run depends on."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for package in ("infalign", "torch", "transformers", "trl", "accelerate", "peft", "datasets", "numpy", "scipy"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
