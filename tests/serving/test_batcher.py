"""The queue in front of slow work: what waits goes together, what does not fit is refused, nothing is lost."""

import asyncio
import threading
import time

import pytest

from infalign.select.serving.batcher import Batcher, BusyError, LateError, StoppingError


class Work:
    """Doubles numbers, as slowly and as badly as asked; remembers its batches."""

    def __init__(self, hold=False):
        self.batches, self.go = [], threading.Event()
        if not hold:
            self.go.set()

    def __call__(self, items):
        assert self.go.wait(20)
        self.batches.append(list(items))
        if "bad" in items:
            raise ValueError("bad item")
        return [KeyError(item) if item == "sad" else 2 * item for item in items]


async def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        await asyncio.sleep(0.005)


def run(scenario):
    return asyncio.run(scenario())


def test_what_waits_goes_together_and_in_order():
    work = Work(hold=True)
    batcher = Batcher(work, capacity=20, max_batch=4)

    async def scenario():
        first = asyncio.ensure_future(batcher.do(0, timeout=20))
        await until(lambda: batcher.num_open == 1 and batcher.num_waiting == 0)  # taken up alone
        others = [asyncio.ensure_future(batcher.do(i, timeout=20)) for i in range(1, 10)]
        await until(lambda: batcher.num_waiting == 9)
        work.go.set()
        assert await asyncio.gather(first, *others) == [2 * i for i in range(10)]

    run(scenario)
    assert work.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8], [9]]
    assert batcher.num_open == batcher.num_waiting == 0


def test_beyond_its_capacity_it_refuses_at_once_and_then_takes_in_again():
    work = Work(hold=True)
    batcher = Batcher(work, capacity=3, max_batch=1)

    async def scenario():
        taken = [asyncio.ensure_future(batcher.do(i, timeout=20)) for i in range(3)]
        await until(lambda: batcher.num_open == 3)
        with pytest.raises(BusyError) as busy:
            await batcher.do(9, timeout=20)
        assert 1 <= busy.value.retry_after <= 60
        work.go.set()
        assert await asyncio.gather(*taken) == [0, 2, 4]
        assert await batcher.do(9, timeout=20) == 18

    run(scenario)
    assert [9] in work.batches


def test_one_bad_item_does_not_take_others_with_it():
    work = Work(hold=True)
    batcher = Batcher(work, capacity=20, max_batch=8)

    async def scenario():
        first = asyncio.ensure_future(batcher.do(0, timeout=20))
        await until(lambda: batcher.num_open == 1 and batcher.num_waiting == 0)
        others = [asyncio.ensure_future(batcher.do(item, timeout=20)) for item in (1, "bad", 2, "sad")]
        await until(lambda: batcher.num_waiting == 4)
        work.go.set()
        assert await first == 0
        return await asyncio.gather(*others, return_exceptions=True)

    one, bad, two, sad = run(scenario)
    assert (one, two) == (2, 4)
    assert isinstance(bad, ValueError)
    assert isinstance(sad, KeyError)


def test_late_items_are_dropped_if_not_begun_and_keep_their_place_if_begun():
    work = Work(hold=True)
    batcher = Batcher(work, capacity=2, max_batch=1)

    async def scenario():
        begun = asyncio.ensure_future(batcher.do(1, timeout=0.2))
        await until(lambda: batcher.num_open == 1 and batcher.num_waiting == 0)
        with pytest.raises(LateError) as waited:
            await batcher.do(2, timeout=0.05)
        assert not waited.value.began
        assert batcher.num_waiting == 0
        with pytest.raises(LateError) as late:
            await begun
        assert late.value.began
        assert batcher.num_open == 1  # it is still being worked on
        work.go.set()
        await until(lambda: batcher.num_open == 0)

    run(scenario)
    assert work.batches == [[1]]


def test_an_item_that_nobody_waits_for_is_not_begun():
    work = Work(hold=True)
    batcher = Batcher(work, capacity=5, max_batch=1)

    async def scenario():
        first = asyncio.ensure_future(batcher.do(1, timeout=20))
        await until(lambda: batcher.num_open == 1 and batcher.num_waiting == 0)
        left = asyncio.ensure_future(batcher.do(2, timeout=20))
        await until(lambda: batcher.num_waiting == 1)
        left.cancel()
        await until(lambda: batcher.num_waiting == 0 and batcher.num_open == 1)
        work.go.set()
        assert await first == 2

    run(scenario)
    assert work.batches == [[1]]


def test_stopped_it_finishes_what_it_took_in():
    work = Work(hold=True)
    batcher = Batcher(work, capacity=5, max_batch=1)

    async def scenario():
        taken = [asyncio.ensure_future(batcher.do(i, timeout=20)) for i in range(3)]
        await until(lambda: batcher.num_open == 3)
        batcher.stop()
        with pytest.raises(StoppingError):
            await batcher.do(9, timeout=20)
        work.go.set()
        assert await asyncio.gather(*taken) == [0, 2, 4]

    run(scenario)
    assert [9] not in work.batches


def test_several_workers_work_at_the_same_time():
    together = threading.Barrier(3)

    def meet(items):
        together.wait(20)
        return items

    batcher = Batcher(meet, capacity=3, max_batch=1, workers=3)

    async def scenario():
        return await asyncio.gather(*(batcher.do(i, timeout=20) for i in range(3)))

    assert run(scenario) == [0, 1, 2]


def test_a_time_out_of_the_work_itself_is_its_own_error():
    def late(items):
        raise TimeoutError("of the work")

    batcher = Batcher(late, capacity=3, max_batch=1)

    async def scenario():
        with pytest.raises(TimeoutError, match="of the work"):
            await batcher.do(1, timeout=20)

    run(scenario)
