"""Many slow things at the same time, in threads that never keep the program from ending, and limits to their time."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar, copy_context
from queue import Empty, SimpleQueue
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_end: ContextVar[float] = ContextVar("end", default=float("inf"))
_stopped: ContextVar[threading.Event | None] = ContextVar("stopped", default=None)


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """What is asked of servers in this block, and in the threads that it starts, must be done within this time."""
    token = _end.set(min(_end.get(), time.monotonic() + seconds))
    try:
        yield
    finally:
        _end.reset(token)


def time_left() -> float:
    """Seconds until the end of the innermost `time_limit`; infinite outside of one."""
    return _end.get() - time.monotonic()


def pause(seconds: float) -> bool:
    """Wait; False where nobody waits for this thread's result any more."""
    event = _stopped.get()
    if event is None:
        time.sleep(seconds)
        return True
    return not event.wait(seconds)


def in_threads(
    work: Callable[[Item], Result], items: Iterable[Item], num_threads: int, *, tick: float | None = None
) -> Iterator[tuple[int, Result] | None]:
    """Do `work` on each item, several at the same time; gives results as they come.

    Items are taken up only as threads become free. Where the caller stops early, by an error or Ctrl-C, the program
    does not wait for threads that are busy.

    Args:
        work: Called with each item, in the caller's context (`time_limit` among it).
        items: What to work on.
        num_threads: Most items at the same time.
        tick: Give None each time that so many seconds pass without a result.

    Yields:
        The position of an item and its result, in the order in which they are done.

    Raises:
        BaseException: The first that `work` raised.
    """
    found: SimpleQueue[tuple[int, Any, BaseException | None] | None] = SimpleQueue()
    numbered, taking, stopped = enumerate(items), threading.Lock(), threading.Event()

    def take_and_work() -> None:
        _stopped.set(stopped)
        while not stopped.is_set():
            position = -1
            try:
                with taking:
                    position, item = next(numbered, (None, None))
                if position is None:
                    break
                found.put((position, work(item), None))  # pyright: ignore[reportArgumentType]
            except BaseException as error:
                found.put((position or 0, None, error))
                break
        found.put(None)

    running = 0
    for _ in range(num_threads):
        threading.Thread(target=copy_context().run, args=(take_and_work,), daemon=True).start()
        running += 1
    try:
        while running:
            try:
                one = found.get(timeout=tick)
            except Empty:
                yield None
                continue
            if one is None:
                running -= 1
                continue
            position, result, error = one
            if error is not None:
                raise error
            yield position, result
    finally:
        stopped.set()


def each_in_threads(work: Callable[[Item], Result], items: Iterable[Item], num_threads: int) -> list[Result]:
    """The results of `work` on all items, in their order; see `in_threads`."""
    results = {one[0]: one[1] for one in in_threads(work, items, num_threads) if one is not None}
    return [results[position] for position in sorted(results)]


def in_a_thread(work: Callable[[], Result]) -> Result:
    """The result of `work`, done in a thread of its own."""
    return each_in_threads(lambda _: work(), [None], 1)[0]
