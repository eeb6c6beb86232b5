"""Checkpoints: which of them a training can go on from, and one more when the user stops it.

Beside the trainer's own files lies `infalign_state.json`, written last: what a solver knows, and the digest of every
file that going on needs. A checkpoint without it was cut short; one whose files are others by now is damaged, and the
one before it serves.
"""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Trainer, TrainerCallback

from infalign._io.files import write_text
from infalign._io.inventory import damaged_files, take_inventory
from infalign._io.processes import launched, wait_for_all
from infalign.errors import Interrupted

STATE = "infalign_state.json"
FOLDER, FRESH = "checkpoints", "fresh"  # in the folder of a training
_NAME = re.compile(r"checkpoint-(\d+)")


def keep_state(args: Any, state: Any, content: Mapping[str, Any]) -> None:
    """Keep what a solver knows beside the trainer's own checkpoint of this step, which it marks as complete.

    Args:
        args: The trainer's arguments, as a callback's `on_save` gets them.
        state: The trainer's state, likewise.
        content: What to keep, JSON-able.
    """
    wait_for_all()  # each process writes a part of the checkpoint
    checkpoint = Path(args.output_dir) / f"checkpoint-{state.global_step}"
    if state.is_world_process_zero and checkpoint.is_dir():
        (checkpoint / STATE).unlink(missing_ok=True)
        out = checkpoint.parent.parent
        files = take_inventory(out, [f"{checkpoint.parent.name}/{checkpoint.name}", FRESH])
        write_text(checkpoint / STATE, json.dumps({**content, "inventory": files}))


def read_state(checkpoint: Path) -> dict[str, Any]:
    """What `keep_state` kept of a complete checkpoint."""
    return json.loads((checkpoint / STATE).read_text())


def last_checkpoint(folder: Path) -> Path | None:
    """The newest checkpoint in `folder` that was written to its end."""
    complete = [
        one for one in _checkpoints(folder) if (one / STATE).is_file() and (one / "trainer_state.json").is_file()
    ]
    return complete[-1] if complete else None


def step_of(checkpoint: Path | None) -> int:
    """The step that a checkpoint is of; 0 for none."""
    found = None if checkpoint is None else _NAME.fullmatch(checkpoint.name)
    return 0 if found is None else int(found[1])


def discard_damaged(out: Path) -> list[str]:
    """Remove the newest checkpoints of a training as far as it cannot go on from them.

    Args:
        out: Folder of the training.

    Returns:
        What to tell the user: which were damaged. Those cut short while they were written are nothing to tell of.
    """
    told: list[str] = []
    for checkpoint in reversed(_checkpoints(out / FOLDER)):
        if not (checkpoint / STATE).is_file():
            _remove(checkpoint)
            continue
        damaged = _damage(out, checkpoint)
        if not damaged:
            break
        told.append(f"{checkpoint.name} is damaged ({damaged[0]}) and is left out")
        _remove(checkpoint)
        for name in damaged:
            parts = Path(name).parts
            if parts[0] == FRESH and len(parts) > 1 and ".." not in parts:  # it is drawn anew when its time comes
                _remove(out / FRESH / parts[1])
    return told


def resuming(out: Path, steps: int) -> list[str]:
    """Make ready to go on; what to tell the user of it.

    Args:
        out: Folder of the training.
        steps: Steps in all.
    """
    told = discard_damaged(out)
    done = step_of(last_checkpoint(out / FOLDER))
    if done:
        told.append(f"goes on from step {done} of {steps}")
    elif told:
        told.append("no checkpoint is left: the training starts again")
    return told


class KeepsLastStep(TrainerCallback):
    """Lets Ctrl-C stop a training between two updates of the weights, so that the last finished step can be kept.

    While weights, records and checkpoints of a step are written, a first Ctrl-C waits for their end; a second does not.
    """

    def __init__(self) -> None:
        self._updating = False
        self._waiting = False
        self._random: dict[str, Any] = {}

    @contextmanager
    def listening(self) -> Iterator[None]:
        """While this lasts, Ctrl-C is ours; not outside of the main thread, or where somebody else listens."""
        mine = threading.current_thread() is threading.main_thread()
        if not mine or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
            yield
            return
        signal.signal(signal.SIGINT, self._stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, signal.default_int_handler)

    def save(self, trainer: Trainer, out: Path) -> Interrupted:
        """Keep the last finished step as a checkpoint, if that can be; the exception says what is gone on from."""
        state, steps = trainer.state, trainer.state.max_steps
        done = step_of(last_checkpoint(out / FOLDER))
        if state.global_step > done and not self._updating and launched() == 1:
            self._set_random()
            trainer._save_checkpoint(trainer.model, None)  # pyright: ignore[reportArgumentType]
            trainer.callback_handler.on_save(trainer.args, state, trainer.control)
            done = step_of(last_checkpoint(out / FOLDER))
        where = f"goes on from step {done} of {steps}" if done else "starts this training again"
        return Interrupted(f"Stopped; the same command {where}.")

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """All of the step before is written."""
        self._finished()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """As `on_step_begin`, after the last."""
        self._finished()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """From here on the weights are between two steps."""
        self._updating = True

    def _finished(self) -> None:
        self._updating = False
        self._random = {"python": random.getstate(), "numpy": np.random.get_state(), "torch": torch.get_rng_state()}  # noqa: NPY002
        if torch.cuda.is_available():
            self._random["cuda"] = torch.cuda.get_rng_state_all()
        if self._waiting:
            raise KeyboardInterrupt

    def _set_random(self) -> None:
        if not self._random:
            return
        random.setstate(self._random["python"])
        np.random.set_state(self._random["numpy"])  # noqa: NPY002
        torch.set_rng_state(self._random["torch"])
        if "cuda" in self._random:
            torch.cuda.set_rng_state_all(self._random["cuda"])

    def _stop(self, *_: Any) -> None:
        if self._updating and not self._waiting:
            self._waiting = True
            return
        raise KeyboardInterrupt


def _checkpoints(folder: Path) -> list[Path]:
    """All that are called a checkpoint, oldest first."""
    if not folder.is_dir():
        return []
    return sorted((one for one in folder.iterdir() if _NAME.fullmatch(one.name)), key=step_of)


def _damage(out: Path, checkpoint: Path) -> list[str]:
    try:
        state = read_state(checkpoint)
        json.loads((checkpoint / "trainer_state.json").read_text())
        return damaged_files(out, state.get("inventory", {}))
    except (OSError, ValueError, TypeError, AttributeError, RecursionError):
        return [STATE]


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    elif os.path.lexists(path):
        path.unlink()
