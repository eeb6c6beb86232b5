"""An append-only table in a folder: numbered Parquet files, each written whole or not at all.

Every append is one file: written under a hidden name, flushed to the disk, then renamed. A process killed at any
instant leaves complete files and at most one hidden one, which the next writer removes. One writer at a time, held by a
file lock that the system itself releases when a process dies; readers need no lock.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq
from filelock import FileLock, Timeout

from infalign._io.files import HINT, remove_unfinished, write_file
from infalign.errors import StorageError

_SHARD = re.compile(r"\d{6,}\.parquet")


class ShardLog:
    """One append-only table.

    Args:
        folder: Where its shards are; made when first written to.
        schema: Columns of the table.
    """

    def __init__(self, folder: Path, schema: pa.Schema) -> None:
        self.folder = folder
        self.schema = schema
        self._lock = FileLock(str(folder / ".lock"), timeout=0)

    @property
    def shards(self) -> list[Path]:
        """The complete shards, oldest first."""
        if not self.folder.is_dir():
            return []
        return sorted(path for path in self.folder.iterdir() if _SHARD.fullmatch(path.name))

    def read(self, columns: Sequence[str] | None = None) -> pa.Table:
        """All rows, oldest first.

        Raises:
            StorageError: A shard cannot be read.
        """
        schema = self.schema if columns is None else pa.schema([self.schema.field(name) for name in columns])
        tables = [schema.empty_table()]
        for shard in self.shards:
            try:
                tables.append(_read_shard(shard, schema))
            except (OSError, pa.ArrowException) as error:
                raise StorageError(f"the shard cannot be read ({error})", where=str(shard),
                                   hint="Delete this one file and give the same command again: "
                                        "what it held is made again") from error  # fmt: skip
        return pa.concat_tables(tables)

    @contextmanager
    def writing(self) -> Iterator[None]:
        """Hold the right to append; may be nested.

        Raises:
            StorageError: Another process or store object holds it, or the folder cannot be written.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            self._lock.acquire()
        except Timeout as error:
            raise StorageError("somebody else is writing to this store", where=str(self.folder),
                               hint="Wait until the other process has ended") from error  # fmt: skip
        except OSError as error:
            raise StorageError(f"the folder cannot be written ({error})", where=str(self.folder)) from error
        try:
            if self._lock.lock_counter == 1:
                remove_unfinished(self.folder)
            yield
        finally:
            self._lock.release()

    def append(self, table: pa.Table) -> Path:
        """Add rows as one new shard; they are on the disk when this returns.

        Raises:
            StorageError: The disk is full or the folder cannot be written; nothing was added.
        """
        with self.writing():
            shards = self.shards
            number = int(shards[-1].stem) + 1 if shards else 0
            final = self.folder / f"{number:06d}.parquet"
            try:
                write_file(final, lambda file: _write_shard(table.cast(self.schema), file))
            except pa.ArrowException as error:
                raise StorageError(f"cannot be written ({error})", where=str(final), hint=HINT) from error
            return final

    def keep_only(self, wanted: Callable[[pa.Table], pa.ChunkedArray | pa.Array]) -> None:
        """Rewrite the table without the rows for which `wanted` is false; killed on the way, it may hold rows twice.

        Raises:
            StorageError: A shard cannot be read, or the folder cannot be written.
        """
        with self.writing():
            before, table = self.shards, self.read()
            kept = table.filter(wanted(table))
            if kept.num_rows < table.num_rows:
                self.append(kept)
                for shard in before:
                    shard.unlink()


def _read_shard(shard: Path, schema: pa.Schema) -> pa.Table:
    with pq.ParquetFile(shard, page_checksum_verification=True) as file:
        return file.read(columns=schema.names).cast(schema)


def _write_shard(table: pa.Table, file: BinaryIO) -> None:
    pq.write_table(table, file, write_page_checksum=True)  # a changed byte is an error, not another reward
