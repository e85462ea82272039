"""Admission: order, refusals, and slots that are never lost."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from magistral_mlx.server.slots import ClosingError, FullError, Slots


def test_first_come_first_served():
    async def main() -> list[int]:
        slots, order = Slots(running=1, waiting=5), list[int]()

        async def take_slot(number: int) -> None:
            with await slots.take():
                order.append(number)
                await asyncio.sleep(0)

        await asyncio.gather(*map(take_slot, range(6)))
        assert (slots.running, slots.waiting) == (0, 0)
        return order

    assert asyncio.run(main()) == [0, 1, 2, 3, 4, 5]


def test_a_full_queue_is_refused_with_a_retry_time():
    async def main() -> None:
        slots = Slots(running=1, waiting=0)
        with await slots.take(), pytest.raises(FullError) as caught:
            await slots.take()
        assert 1 <= caught.value.retry_after <= 600
        (await slots.take()).release()

    asyncio.run(main())


def test_close_refuses_waiting_and_new_requests():
    async def main() -> None:
        slots = Slots(running=1, waiting=2)
        held = await slots.take()
        waiting = [asyncio.create_task(slots.take()) for _ in range(2)]
        await asyncio.sleep(0)
        slots.close()
        assert all(
            isinstance(outcome, ClosingError)
            for outcome in await asyncio.gather(*waiting, return_exceptions=True)
        )
        with pytest.raises(ClosingError):
            await slots.take()
        held.release()
        assert (slots.running, slots.waiting) == (0, 0)

    asyncio.run(main())


def test_releasing_a_slot_twice_counts_once():
    async def main() -> None:
        slots = Slots(running=2, waiting=0)
        slot, _ = await slots.take(), await slots.take()
        slot.release()
        slot.release()
        assert slots.running == 1

    asyncio.run(main())


@given(st.lists(st.sampled_from(["take", "cancel", "release", "both", "pause"]), max_size=60))
def test_no_slot_is_ever_lost(steps: list[str]):
    """Whichever request is cancelled when: never more run or wait than allowed, and all slots end free."""

    async def main() -> None:
        slots, tasks = Slots(running=2, waiting=3), list[asyncio.Task]()
        held = []
        for at, step in enumerate(steps):
            waiting = [task for task in tasks if not task.done()]
            if step == "take":
                tasks.append(asyncio.create_task(slots.take()))
            if (
                step in ("release", "both") and held
            ):  # "both": the slot goes to a request that is cancelled at that moment
                held.pop(at % len(held)).release()
            if step in ("cancel", "both") and waiting:
                waiting[0].cancel()
            if step != "both":
                await asyncio.sleep(0)
            done = [task for task in tasks if task.done()]
            tasks = [task for task in tasks if not task.done()]
            held += [task.result() for task in done if not task.cancelled() and not task.exception()]
            assert slots.running <= 2
            assert slots.waiting <= 3
        for task in tasks:
            task.cancel()
        for outcome in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(outcome, asyncio.CancelledError | FullError)
        for slot in held:
            slot.release()
        assert (slots.running, slots.waiting) == (0, 0)

    asyncio.run(main())
