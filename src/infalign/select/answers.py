"""Answers on disk: one JSON object per line, added batch by batch, so that a stopped run goes on where it was."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from infalign.errors import MismatchError, StorageError
from infalign.select.decoder import Decoded

_BEGINNING = b'{"prompt_id"'  # of every line that `append` writes


def answer_row(answer: Decoded) -> dict[str, Any]:
    """An answer as plain data: the prompt, the response chosen, and all candidates with the chosen one's place."""
    return {
        "prompt_id": answer.prompt.id,
        "prompt": answer.prompt.prompt,
        "response": answer.chosen.text,
        "reward": answer.chosen.reward,
        "calibrated_reward": answer.chosen.calibrated_reward,
        "procedure": answer.procedure.label,
        "num_tokens": answer.num_tokens,
        "seconds": round(answer.seconds, 4),
        "chosen": next(i for i, one in enumerate(answer.candidates) if one is answer.chosen),
        "candidates": [asdict(one) for one in answer.candidates],
    }


class AnswerFile:
    """A JSONL file of answers, each with what made it.

    Every batch is written at once and is on the disk when `append` returns; a process killed at any instant loses at
    most the batch that it was writing, and what it had written of it is removed by the next.

    Args:
        path: The file; made when first written to.
        made_by: What decides an answer, as JSON-able data; a file made with other settings is refused.
    """

    def __init__(self, path: str | Path, made_by: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.made_by: dict[str, Any] = json.loads(json.dumps(made_by))  # as it will be read back

    @contextmanager
    def writing(self) -> Iterator[set[str]]:
        """Hold the right to append; yields the ids of the prompts that are answered.

        Raises:
            MismatchError: The file was made with other settings; says which.
            StorageError: Another process is writing to it, or it cannot be read or written.
        """
        lock = FileLock(str(self.path.with_name(f".{self.path.name}.lock")), timeout=0)
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            lock.acquire()
        except Timeout as error:
            raise StorageError("another process is writing to this file", where=str(self.path),
                               hint="Wait until it has ended") from error  # fmt: skip
        except OSError as error:
            raise StorageError(f"cannot be written ({error.strerror})", where=str(self.path)) from error
        try:
            yield self._read()
        finally:
            lock.release()

    def append(self, answers: Sequence[Decoded]) -> None:
        """Add answers; inside `writing`.

        Raises:
            StorageError: They cannot be written.
        """
        lines = [json.dumps({**answer_row(answer), "made_by": self.made_by}, ensure_ascii=False) for answer in answers]
        if not lines:
            return
        try:
            with self.path.open("ab") as file:
                # Half a surrogate pair, which no UTF-8 can hold, becomes what JSON writes for it: \ud83d.
                file.write(("\n".join(lines) + "\n").encode("utf-8", "backslashreplace"))
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise StorageError(f"cannot be written ({error.strerror})", where=str(self.path),
                               hint="Make room and start again: what is done is kept") from error  # fmt: skip

    def _read(self) -> set[str]:
        """Prompts answered; drops a last line that was cut short."""
        found: set[str] = set()
        try:
            if not self.path.exists():
                return found
            whole = 0
            with self.path.open("rb") as file:
                for number, line in enumerate(file, start=1):
                    if not line.endswith(b"\n"):
                        if not _BEGINNING.startswith(line[: len(_BEGINNING)]):  # not a line of ours that was cut
                            self._prompt_of(line, number)
                        break
                    whole += len(line)
                    if line.strip():
                        found.add(self._prompt_of(line, number))
            if whole < self.path.stat().st_size:
                os.truncate(self.path, whole)
        except OSError as error:
            if isinstance(error, StorageError):
                raise
            raise StorageError(f"cannot be read ({error.strerror})", where=str(self.path)) from error
        return found

    def _prompt_of(self, line: bytes, number: int) -> str:
        where = f"{self.path}, line {number}"
        try:
            row: dict[str, Any] = json.loads(line.decode("utf-8"))
            prompt_id, there = str(row["prompt_id"]), dict(row["made_by"])
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            raise StorageError("this line is not an answer", where=where, hint="Give another file") from error
        now = self.made_by
        if there != now:
            different = [f"{name} was {there.get(name)!r} and is now {now.get(name)!r}"
                         for name in {**there, **now} if there.get(name) != now.get(name)]  # fmt: skip
            raise MismatchError("these answers were made with other settings: " + "; ".join(different), where=where,
                                hint="Give another file, or go back to what made them")  # fmt: skip
        return prompt_id
