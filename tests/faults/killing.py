"""Runs in forked processes, killed at the operations on files that they make.

Nothing in the package knows of this: in the child the operating system's and the libraries' functions are replaced by
ones that count, and at the chosen one the process kills itself, before it, after it, or with half of it written.
"""

import builtins
import io
import json
import os
import re
import signal
import sys
import traceback
from contextlib import suppress
from pathlib import Path

HOW = ("before", "after", "torn")


class Recorder:
    """A reporter that writes each line to a file, so that a killed process has told what it told."""

    def __init__(self, path):
        self.file = io.open(path, "a", encoding="utf-8")  # noqa: SIM115, UP020

    def say(self, text):
        self.file.write(text + "\n")
        self.file.flush()

    def stage(self, title):
        from contextlib import contextmanager

        @contextmanager
        def stage():
            self.say(f"{title} …")
            yield lambda done, total, text: None

        return stage()


class FileOperations:
    """Counts the operations on files below a folder; kills this process at one of them.

    Args:
        folder: The folder.
        kill_at: Which: its number, or a pair of its name and a pattern for the path, of which the first counts.
        how: One of `HOW`.
        record: A list for what there was.
    """

    def __init__(self, folder, kill_at=None, how="before", record=None):
        self.folder, self.kill_at, self.how, self.record = str(folder), kill_at, how, record
        self.count = 0

    def arm(self):
        """Replace the functions; for good."""
        import pyarrow.parquet as pq
        import safetensors.torch
        import torch

        for name in ("replace", "rename", "unlink", "remove", "mkdir", "rmdir", "fsync"):
            setattr(os, name, self._counted(f"os.{name}", getattr(os, name)))
        opened = self._opening(io.open)
        builtins.open = io.open = opened
        safetensors.torch.serialize_file = self._counted("safetensors", safetensors.torch.serialize_file, torn=1)
        torch.save = self._counted("torch.save", torch.save, torn=1)
        pq.write_table = self._counted("parquet", pq.write_table, torn=1)

    def _counted(self, name, function, torn=None):
        def counting(*args, **kwargs):
            place = self._place(args)
            if place is None:
                return function(*args, **kwargs)
            mine = self._next(name, place)
            if mine and (self.how == "before" or (self.how == "torn" and torn is None)):
                die()
            result = function(*args, **kwargs)
            if mine:
                if self.how == "torn":
                    written = _path_of(args[torn])
                    if hasattr(args[torn], "flush"):
                        args[torn].flush()
                    os.truncate(written, os.path.getsize(written) // 2)
                die()
            return result

        return counting

    def _opening(self, function):
        def opening(file, mode="r", *args, **kwargs):
            writes = isinstance(file, str | os.PathLike) and any(letter in mode for letter in "wxa")
            if not writes or not os.path.abspath(file).startswith(self.folder):
                return function(file, mode, *args, **kwargs)
            mine = self._next("open", os.path.abspath(file))
            if mine and self.how == "before":
                die()
            opened = function(file, mode, *args, **kwargs)
            if mine:
                if self.how == "torn":
                    with suppress(TypeError):
                        opened.write('{"half')
                        opened.flush()
                die()
            return opened

        return opening

    def _place(self, args):
        """The paths that an operation is on, if one is ours; names relative to an open folder are taken for ours."""
        paths = [path for one in args[:2] if (path := _path_of(one)) is not None]
        if not paths:
            return "nothing with a name"
        ours = any(not os.path.isabs(path) or path.startswith(self.folder) for path in paths)
        return " -> ".join(paths) if ours else None

    def _next(self, name, place):
        self.count += 1
        if self.record is not None:
            self.record.append((name, str(place).removeprefix(self.folder)))
        if isinstance(self.kill_at, tuple):
            return name == self.kill_at[0] and bool(re.search(self.kill_at[1], str(place)))
        return self.count - 1 == self.kill_at


def _path_of(one):
    """The path of a path, a descriptor or an open file; None of anything else."""
    if isinstance(one, str | os.PathLike):
        return os.fspath(one)
    with suppress(Exception):
        descriptor = one if isinstance(one, int) and one > 2 else one.fileno()
        return os.readlink(f"/proc/self/fd/{descriptor}")
    return None


def die():
    """As a power cut: nothing is flushed, no handler runs."""
    os.kill(os.getpid(), signal.SIGKILL)


def run_in_child(job, out, overrides, log, *, kill_at=None, how="before", after=None, list_to=None, work=None):
    """One attempt at a run in a forked process.

    Args:
        job: Folder with the recipe.
        out: Run folder.
        overrides: Changes to the recipe.
        log: File that its lines are added to.
        kill_at: Kill it at this operation on files, as for `FileOperations`; None to let it end.
        how: "before", "after" or "torn".
        after: Kill it after so many seconds.
        list_to: File to write the operations to, as JSON.
        work: What to do instead of the run, given the pipeline.

    Returns:
        "done", "killed", or the error: an `InfalignError`'s message, or a traceback that starts with "Traceback".
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        said = "done"
        try:
            with io.open(log, "a") as quiet:  # noqa: UP020  (whatever libraries print)
                os.dup2(quiet.fileno(), 1)
                os.dup2(quiet.fileno(), 2)
            if after is not None:
                signal.setitimer(signal.ITIMER_REAL, after)  # nobody handles it: the process ends
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a parent in the background ignores it
            _attempt(job, out, overrides, log, kill_at, how, list_to, work)
        except KeyboardInterrupt as error:
            said = f"stopped: {error}"
        except BaseException as error:
            from infalign.errors import InfalignError

            said = str(error) if isinstance(error, InfalignError) else traceback.format_exc()
        os.write(writer, said.encode()[:60_000])
        os._exit(0)
    os.close(writer)
    said = b""
    while chunk := os.read(reader, 1 << 16):
        said += chunk
    os.close(reader)
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) else said.decode()


def _attempt(job, out, overrides, log, kill_at, how, list_to, work):
    import torch

    from infalign.cli.console import silence_libraries
    from infalign.run.pipeline import Pipeline
    from infalign.run.recipe import load_recipe

    torch.set_num_threads(1)
    silence_libraries()
    sys.path.insert(0, str(job))
    pipeline = Pipeline(load_recipe(Path(job) / "recipe.yaml", overrides), Path(out), Recorder(log))
    record = [] if list_to else None
    if kill_at is not None or list_to is not None:
        FileOperations(out, kill_at, how, record).arm()
    (work or Pipeline.run)(pipeline)
    if list_to is not None:
        with io.open(list_to, "w") as file:  # noqa: UP020
            json.dump(record, file)


def import_all():
    """Import what runs need before forking, and start no thread."""
    import peft  # noqa: F401
    import torch

    import infalign.run.pipeline
    import infalign.training.online  # noqa: F401

    torch.set_num_threads(1)
