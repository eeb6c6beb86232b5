"""What a stage or a checkpoint left on the disk: sizes and digests, by which damage is found before it is used.

A file that keeps its size and its time of change is taken for whole without being read, as build tools do; any other is
read. A moved or copied folder is therefore read once more, and found to be the same.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from infalign.errors import StorageError

MANIFEST, SOURCE = "manifest.json", "source.json"  # without them the files beside them mean nothing
# What may change or go without harm: cards that are written again, what is sealed and computed again where it is not
# whole, locks, and what killed writers left.
_NO_CONTENT = re.compile(r"README\.md|kl\.json|tries\.json|\.lock|.*\.(tmp|part|partial)|\..*\.partial")
_LEFTOVER = re.compile(
    r"\..*\.part|.*\.\d+\.tmp|(result|infalign_state)\.json\.tmp|report\..*\.partial|policy\.json\.part"
)
_SAID_BY_TEXT = {"text", "prompt_id", "index", "finish_reason", "reward"}


def is_leftover(name: str) -> bool:
    """Whether a file of this name is what a killed writer left, and nobody's result."""
    return bool(_LEFTOVER.fullmatch(name))


def file_digest(path: Path) -> str:
    """A short stable hash of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()[:16]


def take_inventory(root: Path, names: Iterable[str]) -> dict[str, Any]:
    """Every file of these files and folders, with its size, time of change and digest.

    Args:
        root: What the names are relative to.
        names: Files and folders; one that is not there has no files.

    Returns:
        JSON-able: `files`, and `rows`: for each folder of Parquet files a digest of its rows, however they are spread
        over files.
    """
    files: dict[str, list[Any]] = {}
    tables: dict[str, list[Path]] = {}
    for path in _files(root, names):
        name = path.relative_to(root).as_posix()
        about = path.stat()
        files[name] = [about.st_size, about.st_mtime_ns, file_digest(path)]
        if path.suffix == ".parquet":
            tables.setdefault(path.parent.relative_to(root).as_posix(), []).append(path)
    return {"files": files, "rows": {name: _rows_digest(paths) for name, paths in tables.items()}}


def is_inventory(content: Mapping[str, Any]) -> bool:
    """Whether `take_inventory` can have written this: names that stay in the folder, each with size, time, digest."""
    files = content.get("files", {})
    return isinstance(files, dict) and all(_stays_inside(name) and _is_known(known) for name, known in files.items())


def damaged_files(root: Path, inventory: Mapping[str, Any]) -> list[str]:
    """The files of an inventory that are missing, or not what they were."""
    return [name for name, known in inventory.get("files", {}).items() if not _is_whole(root / name, *known)]


def require_whole(folder: str | Path, stages: Iterable[str]) -> None:
    """Refuse to read what finished stages of a run left where it is no longer what they wrote.

    Args:
        folder: A run folder; in any other nothing is known, and nothing refused.
        stages: Names of stages; `*` stands for any characters.

    Raises:
        StorageError: Naming the first file, and what makes it again.
    """
    root = Path(folder)
    for path in [path for stage in stages for path in sorted(root.glob(f"stages/{stage}.json"))]:
        try:
            stamp = read_object(path)
            known = stamp["inventory"] if is_inventory(stamp["inventory"]) else {}
            damaged = damaged_files(root, known) if stamp.get("done") else []
        except (StorageError, KeyError, TypeError, AttributeError):
            continue  # the stage is done again by the next run; of an earlier version nothing is known
        if damaged:
            raise StorageError(
                "this file of the run is damaged or missing", where=str(root / damaged[0]), hint=run_again(root)
            )


def run_again(folder: str | Path) -> str:
    """A hint for a damaged file of a run."""
    return f"Run its recipe again, `infalign run RECIPE --out {folder}`: what is whole is kept, the rest is made again"


def read_object(path: str | Path, hint: str | None = None) -> dict[str, Any]:
    """What a JSON file holds that is to hold an object.

    Raises:
        StorageError: It cannot be read, is damaged, or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is damaged"
        raise StorageError(f"the file cannot be read ({reason})", where=str(path), hint=hint) from error
    if not isinstance(content, dict):
        raise StorageError("the file is damaged (it holds no object)", where=str(path), hint=hint)
    return content


def sealed(content: Mapping[str, Any]) -> dict[str, Any]:
    """JSON-able content with a digest of its own, by which `read_sealed` tells whether it is whole."""
    return {**content, "digest": _digest(content)}


def read_sealed(path: Path) -> dict[str, Any] | None:
    """What was sealed; None where there is nothing, or it is damaged. Files of earlier versions have no seal."""
    try:
        content = read_object(path)
    except StorageError:
        return None
    seal = content.pop("digest", None)
    return content if seal is None or seal == _digest(content) else None


def same_content(then: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Whether what there was is there again: the same rows in tables, the same bytes in all other files."""
    digests = {name: known[2] for name, known in now.get("files", {}).items()}
    return all(
        digests.get(name) == known[2] for name, known in then.get("files", {}).items() if not name.endswith(".parquet")
    ) and all(now.get("rows", {}).get(name) == digest for name, digest in then.get("rows", {}).items())


def unreadable_files(root: Path, names: Iterable[str]) -> list[str]:
    """Of the tables and the JSON of unfinished work those that cannot be read; nothing else can be told of them."""
    found: list[str] = []
    for name in names:
        top = root / name
        paths = [top] if top.is_symlink() or not top.is_dir() else sorted(top.rglob("*"))
        for path in paths:
            known = path.suffix in (".parquet", ".json")
            if known and os.path.lexists(path) and not path.is_dir() and not _can_be_read(path):
                found.append(path.relative_to(root).as_posix())
    return found


def what_falls_with(name: str) -> str:
    """What means nothing without this file: its folder for the files that say what lies beside them, else itself."""
    path = Path(name)
    return (path.parent if path.name in (MANIFEST, SOURCE) else path).as_posix()


def _stays_inside(name: object) -> bool:
    """Whether a name from a file is a plain path below the folder, so that nothing outside can be moved or removed."""
    if not isinstance(name, str) or not name or "\0" in name:
        return False
    path = Path(name)
    return not path.is_absolute() and ".." not in path.parts and path.as_posix() != "."


def _is_known(known: object) -> bool:
    return (
        isinstance(known, list)
        and len(known) == 3
        and isinstance(known[0], int)
        and isinstance(known[1], int)
        and isinstance(known[2], str)
    )


def _digest(content: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()[:16]


def _files(root: Path, names: Iterable[str]) -> Iterator[Path]:
    for name in names:
        top = root / name
        paths = sorted(top.rglob("*")) if top.is_dir() else [top]
        yield from (path for path in paths if path.is_file() and not _NO_CONTENT.fullmatch(path.name))


def _is_whole(path: Path, size: int, changed: int, digest: str) -> bool:
    try:
        about = path.stat()
        if not stat.S_ISREG(about.st_mode) or about.st_size != size:
            return False
        return about.st_mtime_ns == changed or file_digest(path) == digest
    except OSError:
        return False


def _can_be_read(path: Path) -> bool:
    try:
        if not path.is_file():
            return False
        if path.suffix == ".json":
            return isinstance(json.loads(path.read_text(encoding="utf-8")), dict)
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            file.read()
    except (OSError, ValueError, RecursionError, pa.ArrowException):
        return False
    return True


def _rows_digest(paths: Iterable[Path]) -> str:
    """The same for the same rows in any order, whatever rounding there is in numbers that only repeat the text."""
    total = 0
    for path in paths:
        with pq.ParquetFile(path, page_checksum_verification=True) as file:
            names = [name for name in file.schema_arrow.names if name in _SAID_BY_TEXT]
            table = file.read(columns=names or None)
        for row in zip(*(table[name].to_pylist() for name in table.column_names), strict=True):
            total += int.from_bytes(hashlib.sha256(repr(row).encode("utf-8", "surrogatepass")).digest()[:16], "little")
    return f"{total % (1 << 128):032x}"
