"""Requests that come together travel together, and each is answered for itself."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence

import pytest

from gateway.errors import RouterSilent, RouterUnavailable
from gateway.routers import submissions as submissions_module
from gateway.routers.submissions import QUIET_TURNS, Submissions
from router.errors import QueueFull
from router.request import GenerationRequest


def _request(name: str) -> GenerationRequest:
    return GenerationRequest(name, (1,))


class _Router:
    """Answers a call when it is told to."""

    def __init__(self) -> None:
        self.calls: list[list[str]] = []
        self.may_answer = asyncio.Event()
        self.refusals: dict[str, Exception] = {}
        self.failure: BaseException | None = None

    async def take(self, requests: tuple[GenerationRequest, ...]) -> Sequence[Exception | None]:
        self.calls.append([request.request_id for request in requests])
        await self.may_answer.wait()
        if self.failure is not None:
            raise self.failure
        return [self.refusals.get(request.request_id) for request in requests]


async def _submitted(submissions: Submissions, *names: str) -> list[asyncio.Task[None]]:
    tasks = [asyncio.create_task(submissions.submit(_request(name))) for name in names]
    await asyncio.sleep(0.01)
    return tasks


def test_those_that_come_in_neighbouring_turns_of_the_loop_go_together() -> None:
    async def run() -> None:
        router = _Router()
        router.may_answer.set()
        submissions = Submissions(router.take)
        tasks = []
        for name in "abcd":
            tasks.append(asyncio.create_task(submissions.submit(_request(name))))
            for _ in range(QUIET_TURNS - 2):
                await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert router.calls == [["a", "b", "c", "d"]]

    asyncio.run(run())


def test_nobody_waits_long_for_others_that_come_and_come(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(submissions_module, "GATHER_S", 0.0)

    async def run() -> None:
        router = _Router()
        router.may_answer.set()
        submissions = Submissions(router.take)
        await asyncio.gather(*(submissions.submit(_request(name)) for name in "ab"))
        assert router.calls == [["a", "b"]]
        tasks = []
        for name in "cdef":
            tasks.append(asyncio.create_task(submissions.submit(_request(name))))
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)
        assert len(router.calls) > 2

    asyncio.run(run())


def test_those_that_come_while_a_call_is_on_its_way_go_in_the_next() -> None:
    async def run() -> None:
        router = _Router()
        submissions = Submissions(router.take)
        first = await _submitted(submissions, "a")
        assert router.calls == [["a"]]
        others = await _submitted(submissions, "b", "c", "d")
        assert router.calls == [["a"]]
        router.may_answer.set()
        await asyncio.gather(*first, *others)
        assert router.calls == [["a"], ["b", "c", "d"]]
        await asyncio.gather(*await _submitted(submissions, "e"))
        assert router.calls[2:] == [["e"]]

    asyncio.run(run())


def test_refusal_of_one_is_raised_for_that_one_alone() -> None:
    async def run() -> None:
        router = _Router()
        submissions = Submissions(router.take)
        router.refusals = {"b": QueueFull(3, 1.0)}
        tasks = await _submitted(submissions, "a", "b", "c")
        router.may_answer.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert outcomes == [None, router.refusals["b"], None]

    asyncio.run(run())


def test_call_that_nobody_answers_fails_those_too_that_have_waited_for_it() -> None:
    async def run() -> None:
        router = _Router()
        submissions = Submissions(router.take)
        router.failure = RouterSilent("it does not answer")
        first, behind = await _submitted(submissions, "a"), await _submitted(submissions, "b", "c")
        router.may_answer.set()
        outcomes = await asyncio.gather(*first, *behind, return_exceptions=True)
        # Those behind were not sent, so that nobody has to cancel them.
        assert [type(outcome) for outcome in outcomes] == [RouterSilent, RouterUnavailable, RouterUnavailable]
        assert router.calls == [["a"]]

    asyncio.run(run())


def test_call_that_fails_otherwise_fails_none_that_were_not_in_it() -> None:
    async def run() -> None:
        router = _Router()
        submissions = Submissions(router.take)
        router.failure = KeyError("a bug")
        first, behind = await _submitted(submissions, "a"), await _submitted(submissions, "b", "c")
        asyncio.get_running_loop().call_soon(router.may_answer.set)
        with pytest.raises(KeyError):
            await first[0]
        router.failure = None
        await asyncio.gather(*behind)
        assert router.calls == [["a"], ["b", "c"]]

    asyncio.run(run())


def test_call_that_is_cancelled_leaves_nobody_waiting() -> None:
    async def run() -> None:
        router = _Router()
        submissions = Submissions(router.take)
        router.failure = asyncio.CancelledError()
        first, behind = await _submitted(submissions, "a", "b"), await _submitted(submissions, "c")
        router.may_answer.set()
        await asyncio.wait([*first, *behind], timeout=5.0)
        assert [type(task.exception()) for task in first] == [RouterSilent, RouterSilent]
        assert type(behind[0].exception()) is RouterUnavailable
        router.failure = None
        await asyncio.gather(*await _submitted(submissions, "d"))

    asyncio.run(run())


@pytest.mark.parametrize("num_answers", [0, 1, 3])
def test_call_with_another_number_of_answers_leaves_nobody_waiting(num_answers: int) -> None:
    async def run() -> None:
        async def take(_requests: tuple[GenerationRequest, ...]) -> Sequence[Exception | None]:
            return [None] * num_answers

        tasks = await _submitted(Submissions(take), "a", "b")
        await asyncio.wait(tasks, timeout=5.0)
        assert [type(task.exception()) for task in tasks] == [RouterSilent, RouterSilent]

    asyncio.run(run())


def test_call_that_fails_fails_its_requests_and_no_later_ones() -> None:
    async def run() -> None:
        router = _Router()
        submissions = Submissions(router.take)
        router.failure = TimeoutError()
        router.may_answer.set()
        for task in await _submitted(submissions, "a"):
            with pytest.raises(TimeoutError):
                await task
        router.failure = None
        await asyncio.gather(*await _submitted(submissions, "b"))

    asyncio.run(run())


def test_whoever_stops_waiting_keeps_nobody_else_from_being_answered() -> None:
    async def run() -> None:
        router = _Router()
        submissions = Submissions(router.take)
        tasks = await _submitted(submissions, "a", "b", "c")
        tasks[1].cancel()
        router.may_answer.set()
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert outcomes[0] is outcomes[2] is None
        assert isinstance(outcomes[1], asyncio.CancelledError)

    asyncio.run(run())
