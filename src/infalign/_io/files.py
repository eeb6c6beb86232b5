"""Files and folders that appear whole or not at all, under names that nobody can have prepared.

Every file that this package writes goes through `write_file`: it is written under a random hidden name that did not
exist before, flushed to the disk, and then given its own name. A link that stands in its place is replaced, not
followed. What a killed process leaves behind is a hidden `.part`, which no reader looks at.
"""

from __future__ import annotations

import errno
import json
import os
import re
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from infalign.errors import InputError, StorageError

HINT = "Make room or fix the permissions, and start again: nothing is lost"
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+=, ()-]{0,199}")
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)
_STREAMS = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/self/fd/")


def write_file(path: Path, write: Callable[[BinaryIO], object], *, parents: bool = True) -> None:
    """Let `write` fill a file, which gets its name only when it is complete and on the disk.

    A device or a stream of the shell, such as /dev/stdout, is written to as it is.

    Args:
        path: The file.
        write: Writes the content to the open file that it is given.
        parents: Make the file's folder if it is not there.

    Raises:
        StorageError: The disk is full or the folder cannot be written. A file that was there before is unchanged then.
    """
    part = path.with_name(_hidden())
    try:
        if _is_stream(path):
            with path.open("wb") as file:
                write(file)
            return
        if parents:
            path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666), "wb") as file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
            part.replace(path)
        except BaseException:
            part.unlink(missing_ok=True)
            raise
        sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise _not_written(path, error) from error


def write_text(path: Path, text: str, *, parents: bool = True) -> None:
    r"""Write text as UTF-8, whole or not at all; half a surrogate pair becomes what JSON writes for it, as \ud83d.

    Raises:
        StorageError: As for `write_file`.
    """
    content = text.encode("utf-8", "backslashreplace")
    write_file(path, lambda file: file.write(content), parents=parents)


def write_json(path: Path, content: Any) -> None:
    """Write JSON, whole or not at all.

    Raises:
        StorageError: As for `write_file`.
    """
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A fresh hidden folder beside `path`, which takes its place if the block succeeds.

    A link that stands in its place is replaced, not followed.

    Raises:
        StorageError: The disk is full or the folder cannot be written. What was there before is unchanged then.
    """
    part = path.with_name(_hidden())
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part.mkdir()
        try:
            yield part
            old = path.with_name(_hidden())
            if os.path.lexists(path):
                path.rename(old)
            part.rename(path)
            remove(old)
        except BaseException:
            remove(part)
            raise
        sync_folder(path.parent)
    except OSError as error:
        if isinstance(error, StorageError):
            raise
        raise _not_written(path, error) from error


def remove_unfinished(folder: Path, *, below: bool = False) -> None:
    """Remove what killed processes left in a folder; for whoever holds the folder's lock.

    Args:
        folder: The folder.
        below: Also in the folders below it.
    """
    for part in list(folder.rglob(".*.part") if below else folder.glob(".*.part")):
        remove(part)


def sync_folder(folder: Path) -> None:
    """See to it that the names in a folder are on the disk."""
    if os.name != "posix":  # elsewhere a folder cannot be opened, nor needs to be
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def refuse_links_out(folder: Path) -> None:
    """Refuse a folder to be written in if a link below it leads to a folder elsewhere.

    Links to files need no check where files are written by this module, which replaces them.

    Raises:
        StorageError: There is such a link; says which.
    """
    root = folder.resolve()
    for parent, folders, _ in os.walk(folder):
        for name in folders:
            path = Path(parent) / name
            if path.is_symlink() and not path.resolve().is_relative_to(root):
                raise _leads_out(path)


def refuse_file_links(folder: Path) -> None:
    """Refuse a folder that a library is going to write in by name if it, or anything below it, is a link.

    Raises:
        StorageError: There is a link; says which.
    """
    if folder.is_symlink():
        raise _leads_out(folder)
    for parent, folders, files in os.walk(folder):
        for name in (*folders, *files):
            if (path := Path(parent) / name).is_symlink():
                raise _leads_out(path)


def storage_failure(error: Exception) -> str | None:
    """Why a file could not be read or written, if that is what this error says; libraries say it in several ways."""
    if isinstance(error, OSError):
        return str(error)
    if type(error).__name__ == "SafetensorError" and "I/O error" in str(error):
        return str(error)
    if type(error) is Exception and "(os error " in str(error):  # the tokenizers library's
        return str(error)
    if isinstance(error, RuntimeError) and any(sign in str(error) for sign in ("inline_container", "iostream error")):
        return "a file could not be written to its end"  # PyTorch's own words say no more
    return None


def disk_failure(error: Exception) -> str | None:
    """As `storage_failure`, but only where a disk is full, at its quota, read-only or broken."""
    if isinstance(error, OSError) and error.errno not in _DISK:
        return None
    return storage_failure(error)


def plain_name(name: object, where: str) -> str:
    """A name that was read from a file and becomes a part of a path.

    Raises:
        InputError: It is not text, or more than one plain part: `../x`, `/x`, a hidden or an empty name.
    """
    if not isinstance(name, str) or _NAME.fullmatch(name) is None or name.endswith((".", " ")):
        raise InputError(
            f"{str(name)[:80]!r} cannot be the name of a file",
            where=where,
            hint="Use letters, digits, dots, hyphens and underscores, a letter or digit first",
        )
    return name


def _hidden() -> str:
    return f".{secrets.token_hex(8)}.part"


def _is_stream(path: Path) -> bool:
    """Whether a path is a device, or one of the shell's streams: there is nothing to replace."""
    if str(path).startswith(_STREAMS):
        return True
    try:
        return stat.S_ISCHR(path.lstat().st_mode)
    except OSError:
        return False


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with what is in it, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _not_written(path: Path, error: OSError) -> StorageError:
    misnamed = isinstance(error, FileNotFoundError | NotADirectoryError | FileExistsError | IsADirectoryError)
    hint = "Check the names of its folders" if misnamed else HINT
    if path.is_dir():
        hint = "A folder is in its place: move it away, and give the same command again"
    return StorageError(f"cannot be written ({error.strerror or error})", where=str(path), hint=hint)


def _leads_out(link: Path) -> StorageError:
    return StorageError(
        "this is a link, and writing would follow it out of the folder",
        where=str(link),
        hint="Put what it points to in its place, or remove it",
    )
