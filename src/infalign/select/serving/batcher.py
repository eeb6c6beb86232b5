"""A bounded queue in front of slow work: what waits is taken up together, what does not fit is refused at once."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Generic, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_LONGEST_WAIT = 60


class BusyError(Exception):
    """There is no room for another request now.

    Args:
        retry_after: Whole seconds after which there may be.
    """

    def __init__(self, retry_after: int) -> None:
        super().__init__(retry_after)
        self.retry_after = retry_after


class StoppingError(Exception):
    """The server takes no more requests."""


class LateError(Exception):
    """A request was not finished in time.

    Args:
        began: Whether work on it had begun; it then goes on, and keeps its place until it ends.
    """

    def __init__(self, began: bool) -> None:
        super().__init__(began)
        self.began = began


@dataclass(eq=False)
class _Job(Generic[Item, Result]):
    item: Item
    future: Future[Result] = field(default_factory=Future)


class Batcher(Generic[Item, Result]):
    """Hands items to `work` in batches made of whatever waits, from threads of its own.

    A batch that fails is tried again item by item, so that one bad item does not take others with it.

    Args:
        work: Takes a batch; gives one result per item, in order, or the exception of that item.
        capacity: Most items taken in and not finished.
        max_batch: Most items per batch.
        workers: Batches under way at the same time; `work` must then be safe to call from several threads.
    """

    def __init__(
        self,
        work: Callable[[Sequence[Item]], Sequence[Result | Exception]],
        *,
        capacity: int,
        max_batch: int,
        workers: int = 1,
    ) -> None:
        self.capacity = capacity
        self._work = work
        self._max_batch = max_batch
        self._workers = workers
        self._waiting: deque[_Job[Item, Result]] = deque()
        self._open = 0
        self._began: dict[int, float] = {}  # by the thread that works on it
        self._stopping = False
        self._changed = threading.Condition()
        self._seconds_per_item = 0.0  # a running mean, all workers together
        for number in range(workers):
            threading.Thread(target=self._run, name=f"batcher-{number}", daemon=True).start()

    @property
    def num_open(self) -> int:
        """Items taken in and not finished."""
        return self._open

    @property
    def longest_under_way(self) -> float:
        """Seconds that the oldest batch has been under way; 0 where none is."""
        began = list(self._began.values())
        return time.monotonic() - min(began) if began else 0.0

    @property
    def num_waiting(self) -> int:
        """Items that no worker has taken up."""
        return len(self._waiting)

    async def do(self, item: Item, *, timeout: float) -> Result:
        """The result of one item.

        Args:
            item: What `work` takes.
            timeout: Seconds until it is given up.

        Raises:
            BusyError: There is no room.
            StoppingError: `stop` has been called.
            LateError: The time is over.
            Exception: What `work` raised or gave for this item.
        """
        job = self._take_in(item)
        result = asyncio.wrap_future(job.future)
        try:
            done, _ = await asyncio.wait({result}, timeout=timeout)
        except asyncio.CancelledError:  # nobody waits for it any more
            job.future.cancel()
            raise
        if not done:
            began = not job.future.cancel()
            result.cancel()
            raise LateError(began)
        return result.result()

    def stop(self) -> None:
        """Take in nothing more; what was taken in is finished."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()

    def _take_in(self, item: Item) -> _Job[Item, Result]:
        job = _Job[Item, Result](item)
        with self._changed:
            if self._stopping:
                raise StoppingError
            if self._open >= self.capacity:
                raise BusyError(self._retry_after())
            self._open += 1
            self._waiting.append(job)
            self._changed.notify()
        job.future.add_done_callback(lambda _: self._put_away(job))
        return job

    def _put_away(self, job: _Job[Item, Result]) -> None:
        with self._changed:
            self._open -= 1
            if job in self._waiting:  # given up before a worker took it
                self._waiting.remove(job)

    def _retry_after(self) -> int:
        return max(1, min(_LONGEST_WAIT, math.ceil(self._seconds_per_item * self._open)))

    def _run(self) -> None:
        while True:
            with self._changed:
                while not self._waiting:
                    if self._stopping:
                        return
                    self._changed.wait()
                taken = [self._waiting.popleft() for _ in range(min(self._max_batch, len(self._waiting)))]
            batch = [job for job in taken if job.future.set_running_or_notify_cancel()]
            if batch:
                started = self._began[threading.get_ident()] = time.monotonic()
                self._finish(batch)
                del self._began[threading.get_ident()]
                self._learn_pace((time.monotonic() - started) / (len(batch) * self._workers))

    def _finish(self, batch: Sequence[_Job[Item, Result]]) -> None:
        try:
            results = list(self._work([job.item for job in batch]))
            if len(results) != len(batch):
                raise AssertionError(f"{len(results)} results for {len(batch)} items")
        except Exception as error:
            if len(batch) == 1:
                batch[0].future.set_exception(error)
            else:
                for job in batch:
                    self._finish([job])
            return
        for job, result in zip(batch, results, strict=True):
            if isinstance(result, Exception):
                job.future.set_exception(result)
            else:
                job.future.set_result(result)

    def _learn_pace(self, seconds: float) -> None:
        with self._changed:
            self._seconds_per_item += 0.2 * (seconds - self._seconds_per_item) if self._seconds_per_item else seconds
