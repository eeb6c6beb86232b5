"""A run's folder: which stages are done, and with what.

Every stage has a fingerprint made of its settings, the fingerprints of the stages before it and the content of the
files it reads. A finished stage whose fingerprint is unchanged is kept; one whose fingerprint changed is moved to
`superseded/` and done again, and so is exactly what depends on it. A finished stage whose files are damaged or missing
is done again too, and what depends on it where something else came out.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from importlib import metadata
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from infalign._io.files import refuse_links_out, remove_unfinished, write_json
from infalign._io.inventory import (
    damaged_files,
    file_digest,
    is_inventory,
    is_leftover,
    same_content,
    take_inventory,
    unreadable_files,
    what_falls_with,
)
from infalign.errors import MismatchError, StorageError

FORMAT = 2  # raised where folders of before would be misread
RECIPE = "recipe.json"  # the recipe that a calibrated run was made with


def fingerprint(content: Any) -> str:
    """A short stable hash of JSON-able content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def file_fingerprint(path: Path) -> str:
    """A short stable hash of a file's bytes."""
    return file_digest(path)


@dataclass(frozen=True)
class StageStamp:
    """What the folder knows of one stage.

    Attributes:
        fingerprint: Of its settings.
        settings: What it was done with.
        done: Whether it is finished.
        seconds: How long it took.
        inventory: The files that it left (`take_inventory`); empty in folders of earlier versions.
        again: How often it was done again with another outcome, its files having been damaged.
    """

    fingerprint: str
    settings: dict[str, Any]
    done: bool
    seconds: float = 0.0
    inventory: dict[str, Any] = field(default_factory=dict)
    again: int = 0

    @property
    def print(self) -> str:
        """What the stages after it depend on."""
        return f"{self.fingerprint}-{self.again}" if self.again else self.fingerprint


def read_stamp(path: Path) -> StageStamp | None:
    """What a stage's file says; None where there is none, or nothing that makes sense."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        stamp = StageStamp(**{name: content[name] for name in StageStamp.__dataclass_fields__ if name in content})
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    makes_sense = (
        isinstance(stamp.fingerprint, str)
        and isinstance(stamp.settings, dict)
        and isinstance(stamp.done, bool)
        and isinstance(stamp.inventory, dict)
        and is_inventory(stamp.inventory)
        and isinstance(stamp.again, int)
    )
    return stamp if makes_sense else None


class RunFolder:
    """The folder of one run.

    Args:
        path: The folder; made if it does not exist.
        name: The recipe's name; a folder that holds another recipe's run is refused.
        say: Tells the user one plain line: what is put aside, or done again, and why.

    Raises:
        MismatchError: If the folder holds something else.
        StorageError: If it cannot be made or written.
    """

    def __init__(self, path: Path, name: str, say: Callable[[str], None] = lambda text: None) -> None:
        self.path = path
        self.say = say
        marker = path / "run.json"
        try:
            found = _read_marker(marker)
            if found is not None and found.get("name") != name:
                raise MismatchError(
                    f"this folder holds a run of {found.get('name')!r}, not of {name!r}",
                    where=str(path),
                    hint="Choose another folder with --out",
                )
            require_format(path)
            if found is None and path.exists() and not _was_begun(path):
                raise MismatchError(
                    "this folder is not empty and holds no run", where=str(path), hint="Choose another with --out"
                )
            if found is None and os.path.lexists(marker):
                say("run.json is damaged; it is written again, and the stages say what is done")
            refuse_links_out(path)
            path.mkdir(parents=True, exist_ok=True)
            if found is None:
                write_json(marker, {"name": name, "format": FORMAT})
            (path / "stages").mkdir(exist_ok=True)
        except OSError as error:
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
        """What is known of a stage; `None` if it never started, or if the file that says so is damaged."""
        return read_stamp(self._stamp_path(stage))

    def begin(
        self, stage: str, settings: Mapping[str, Any], outputs: Sequence[str], files: Sequence[str] | None = None
    ) -> bool:
        """Make ready to run a stage.

        Args:
            stage: Its name.
            settings: What it is to be done with.
            outputs: Files and folders that belong to these settings: put aside when the settings change.
            files: Files and folders that it must have left to be done; `outputs` if not given.

        Returns:
            False if the stage is done with these settings, and its files are whole. True if it must run: from scratch,
            or from where a stopped attempt with the same settings left its outputs.
        """
        stamp, mine = self.stamp(stage), fingerprint(settings)
        if stamp is None or stamp.fingerprint != mine:
            # Outputs that no stamp vouches for may be of any settings: they are put aside as those of others are.
            if kept := self._put_aside(stage, "unknown" if stamp is None else stamp.fingerprint[:8], outputs):
                self.say(f"  {stage}: {_why_aside(stamp, settings)}; it is kept in {kept}")
            self._write_stamp(stage, StageStamp(mine, dict(settings), done=False))
            return True
        if stamp.done:
            damaged = damaged_files(self.path, stamp.inventory)
            if not damaged:
                return False
            self._say_damage(stage, damaged, "damaged or missing; it is done again")
            self._clear(stage, self._spoilt_by(damaged, outputs))
            self._write_stamp(stage, replace(stamp, done=False))
            return True
        spoilt = unreadable_files(self.path, dict.fromkeys([*outputs, *(files or ())]))
        if spoilt:
            self._say_damage(stage, spoilt, "damaged; what it held is made again")
            self._clear(stage, [what_falls_with(name) for name in spoilt])
        return True

    def finish(self, stage: str, seconds: float, files: Iterable[str] = ()) -> None:
        """Record that a stage is done.

        Args:
            stage: Its name.
            seconds: How long it took.
            files: As for `begin`: files and folders whose content is looked after from now on.
        """
        stamp = self.stamp(stage)
        assert stamp is not None, "finish follows begin"
        inventory = take_inventory(self.path, files)
        again = stamp.again + (not same_content(stamp.inventory, inventory))
        done = replace(stamp, done=True, seconds=seconds, inventory=inventory, again=again)
        self._write_stamp(stage, done)

    def require(self, stage: str, settings: Mapping[str, Any], command: str) -> None:
        """Refuse to build on a stage that is missing, unfinished or made with other settings.

        Args:
            stage: Its name.
            settings: What it should have been done with.
            command: The command that does it.

        Raises:
            MismatchError: Saying which command does it, or which settings differ.
            StorageError: If a file of it is damaged or missing.
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
        if damaged := damaged_files(self.path, stamp.inventory):
            raise StorageError(
                f"this file of the stage {stage!r} is damaged or missing",
                where=str(self.path / damaged[0]),
                hint=f"Do the stage again with `{command}`, or everything with `infalign run RECIPE`",
            )

    def _spoilt_by(self, damaged: Sequence[str], outputs: Sequence[str]) -> list[str]:
        """What has to go for a stage to be done again: of a rollout store what is damaged, else all outputs."""
        spoilt: list[str] = []
        for name in damaged:
            whole = [output for output in outputs if Path(name).is_relative_to(output)]
            in_store = name.startswith("rollouts/")
            spoilt += [what_falls_with(name)] if in_store or not whole else whole
        if any(not name.startswith("rollouts/") for name in damaged):
            spoilt += [output for output in outputs if not output.startswith("rollouts/")]
        return list(dict.fromkeys(spoilt))

    def _clear(self, stage: str, spoilt: Sequence[str]) -> None:
        """Put spoilt files aside, and with rollouts all that was computed from them."""
        self._put_aside(stage, "damaged", spoilt)
        from infalign.rollouts.store import RolloutStore

        for store in sorted({Path(*Path(name).parts[:2]) for name in spoilt if name.startswith("rollouts/")}):
            lost = any(Path(name).is_relative_to(store / "rollouts") for name in spoilt)
            if lost and (self.path / store / "manifest.json").is_file():
                self._put_aside(stage, "damaged", [f"{store.as_posix()}/kl.json"])
                RolloutStore.read(self.path / store).forget_missing()

    def _say_damage(self, stage: str, names: Sequence[str], what: str) -> None:
        others = f" and {len(names) - 1} more" if len(names) > 1 else ""
        verb = "are" if others else "is"
        self.say(f"  {stage}: {names[0]}{others} {verb} {what}")

    def _put_aside(self, stage: str, why: str, names: Iterable[str]) -> str | None:
        """Move files and folders to `superseded/`; nothing is deleted. Returns where they are, if there were any."""
        folder: Path | None = None
        for name in names:
            source = self.path / name
            if os.path.lexists(source):
                folder = folder or self._new_folder(f"{stage}-{why}-{int(time.time())}")
                target = folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                source.rename(target)
        return None if folder is None else folder.relative_to(self.path).as_posix()

    def _new_folder(self, name: str) -> Path:
        """A folder of its own, also for the second in one second."""
        number = 1
        while True:
            folder = self.path / "superseded" / (name if number == 1 else f"{name}-{number}")
            try:
                folder.mkdir(parents=True)
            except FileExistsError:
                number += 1
            else:
                return folder

    def _stamp_path(self, stage: str) -> Path:
        return self.path / "stages" / f"{stage}.json"

    def _write_stamp(self, stage: str, stamp: StageStamp) -> None:
        write_json(self._stamp_path(stage), asdict(stamp))


def require_format(path: Path) -> None:
    """Raise MismatchError if a run folder was written by a version whose folders this one would misread."""
    found = _read_marker(path / "run.json")
    if found is not None and found["format"] != FORMAT:
        raise MismatchError(
            f"another version of infalign wrote this folder (its format is {found['format']}, this version's {FORMAT})",
            where=str(path),
            hint="Use that version, or make the run again with another --out",
        )


def _read_marker(path: Path) -> dict[str, Any] | None:
    """What run.json says; None where there is none, or it is damaged."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (ValueError, RecursionError):
        return None
    except OSError:
        if path.is_symlink() or not path.is_file():
            return None
        raise
    return content if isinstance(content, dict) and "name" in content and "format" in content else None


def _was_begun(path: Path) -> bool:
    """Whether this folder is empty, or what a run left that was killed while it began or that lost its run.json."""
    names = {one.name for one in path.iterdir()}
    stages = path / "stages"
    if stages.is_dir() and names & {".lock", "run.json"}:
        return True  # nobody else makes such a folder
    if any(read_stamp(one) is not None for one in stages.glob("*.json")):
        return True
    empty = not stages.is_dir() or all(is_leftover(one.name) for one in stages.iterdir())
    return empty and all(name in ("stages", ".lock", "run.json") or is_leftover(name) for name in names)


def _why_aside(stamp: StageStamp | None, settings: Mapping[str, Any]) -> str:
    if stamp is None:
        return "nothing says with which settings it was made"
    made = "it was made" if stamp.done else "an unfinished attempt was made"
    return f"{made} with other settings ({_differences(stamp.settings, settings)})"


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
