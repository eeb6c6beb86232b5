"""The processes of one distributed run, as `accelerate launch` or `torchrun` starts them.

All of them train; everything else is done by the main process alone, which tells the others what to train next. The
others do nothing between two trainings but wait, so they cannot read a file that is half written, and it does not
matter how long the main process takes.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from datetime import timedelta
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from numpy.typing import NDArray

# How launchers say how many processes there are: torchrun and accelerate, then the MPI families.
_COUNTS = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LONGEST_STEP = timedelta(hours=2)  # a process may be this late at one step of a training (a slow reward)
_LONGEST_WAIT = timedelta(days=365)
_control: Any = None  # the group over which the main process gives its orders


def launched() -> int:
    """How many processes the launcher started; 1 without a launcher."""
    return max(int(os.environ.get(name) or 1) for name in _COUNTS)


def join() -> None:
    """Meet the other processes; nothing to do in a single process, or a second time."""
    global _control
    if launched() == 1 or _control is not None:
        return
    import torch
    from accelerate import PartialState

    # As the trainer will do it, so that it finds what it expects: NCCL on GPUs, gloo without.
    on_gpu = torch.cuda.is_available()
    PartialState(cpu=not on_gpu, **({"timeout": _LONGEST_STEP} if not torch.distributed.is_initialized() else {}))
    _control = torch.distributed.new_group(backend="gloo", timeout=_LONGEST_WAIT)


def leave() -> None:
    """Part from the other processes, all having come to their end."""
    global _control
    if _control is not None:
        import torch

        torch.distributed.destroy_process_group()
        _control = None


def is_main() -> bool:
    """Whether this is the process that does everything but training by itself."""
    return _rank() == 0


def wait_for_all() -> None:
    """Go on when all processes have come here."""
    if _connected():
        import torch

        torch.distributed.barrier()


def tell(order: Any) -> None:
    """Main process: give the others their next order, any picklable object; `None` sends them home."""
    _broadcast(order)


def hear() -> Any:
    """Other processes: wait for the next order.

    Raises:
        SystemExit: If the main process is gone; it has said why.
    """
    try:
        return _broadcast(None)
    except RuntimeError:  # the connection is closed
        sys.exit(1)


def gathered(arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
    """Arrays of all processes, joined along the first axis in the order of the processes; the same everywhere."""
    if not _connected():
        return list(arrays)
    import numpy as np
    import torch

    everyones: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(everyones, list(arrays))
    return [np.concatenate(parts) for parts in zip(*everyones, strict=True)]


def first_to_fail() -> bool:
    """Whether no other process has failed yet: one error makes all of them fail, and is to be shown once."""
    if _control is None:
        return _rank() == 0
    from torch.distributed import distributed_c10d

    try:
        return distributed_c10d._get_default_store().add("infalign/failures", 1) == 1
    except RuntimeError:  # the store's own process has failed and is gone
        return False


def _rank() -> int:
    if _connected():
        import torch

        return torch.distributed.get_rank()
    return int(os.environ.get("RANK", "0")) if launched() > 1 else 0


def _connected() -> bool:
    """Whether there are other processes that this one can talk to; loads no torch to find out."""
    torch = sys.modules.get("torch")
    return (
        torch is not None
        and torch.distributed.is_available()
        and torch.distributed.is_initialized()
        and torch.distributed.get_world_size() > 1
    )


def _broadcast(content: Any) -> Any:
    if _control is None:
        return content
    import torch

    box = [content]
    torch.distributed.broadcast_object_list(box, src=0, group=_control, device=torch.device("cpu"))
    return box[0]
