"""The queue's promises, on a clock that the test moves."""

from __future__ import annotations

import asyncio

import pytest

from trimtab_operator.workqueue import Backoff, WorkQueue


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def queue(clock: Clock) -> WorkQueue[str]:
    return WorkQueue(clock, Backoff(first=1, cap=8, jitter=0.5), chance=lambda: 0.5)


async def ready(queue: WorkQueue[str]) -> str | None:
    """The next key that is due now, if any."""
    try:
        return await asyncio.wait_for(queue.get(), 0.02)
    except TimeoutError:
        return None


async def test_a_key_that_is_asked_for_many_times_is_looked_at_once(queue: WorkQueue[str]) -> None:
    for _ in range(50):
        queue.add("a")
    assert await ready(queue) == "a"
    queue.done("a")
    assert await ready(queue) is None


async def test_a_key_never_runs_twice_at_once_and_is_looked_at_again_after(queue: WorkQueue[str]) -> None:
    queue.add("a")
    assert await ready(queue) == "a"
    queue.add("a")
    assert await ready(queue) is None
    queue.done("a")
    assert await ready(queue) == "a"


async def test_the_earlier_date_wins(queue: WorkQueue[str], clock: Clock) -> None:
    queue.add("a", after=60)
    queue.add("a", after=5)
    queue.add("a", after=30)
    assert await ready(queue) is None
    clock.now += 5
    assert await ready(queue) == "a"
    queue.done("a")
    clock.now += 100
    assert await ready(queue) is None


async def test_failures_wait_longer_up_to_the_cap_and_success_forgets_them(queue: WorkQueue[str], clock: Clock) -> None:
    delays = []
    for _ in range(5):
        queue.add("a")
        clock.now += 100
        assert await ready(queue) == "a"
        delays.append(queue.failed("a"))
    assert delays == [1, 2, 4, 8, 8]
    clock.now += 100
    assert await ready(queue) == "a"
    queue.done("a")
    queue.add("a")
    assert await ready(queue) == "a"
    assert queue.failed("a") == 1


async def test_a_failing_key_is_not_hurried_by_what_was_asked_while_it_ran(queue: WorkQueue[str], clock: Clock) -> None:
    queue.add("a")
    assert await ready(queue) == "a"
    queue.add("a")
    queue.failed("a")
    assert await ready(queue) is None
    clock.now += 1
    assert await ready(queue) == "a"


async def test_a_waiting_worker_is_woken(queue: WorkQueue[str]) -> None:
    waiting = asyncio.create_task(queue.get())
    await asyncio.sleep(0)
    queue.add("a")
    assert await asyncio.wait_for(waiting, 1) == "a"


async def test_depth_and_age_are_of_due_keys(queue: WorkQueue[str], clock: Clock) -> None:
    queue.add("a")
    queue.add("b", after=50)
    clock.now += 7
    assert queue.depth == 1
    assert queue.oldest == 7


@pytest.mark.parametrize(("chance", "delay"), [(0.0, 0.5), (0.5, 1.0), (0.999, 1.499)])
def test_jitter_spreads_the_delay(chance: float, delay: float) -> None:
    assert Backoff(first=1, cap=8, jitter=0.5).delay(1, chance) == pytest.approx(delay, abs=0.01)


async def test_a_long_queue_that_moves_is_no_stall(queue: WorkQueue[str], clock: Clock) -> None:
    for key in "abc":
        queue.add(key)
    for key in "ab":
        clock.now += 100
        assert await ready(queue) == key
        assert queue.stalled == 0
        queue.done(key)
    assert queue.oldest == 200
    clock.now += 130
    assert queue.stalled == 130
    queue.done(str(await ready(queue)))
    clock.now += 130
    assert queue.stalled == 0, "nothing is due"
