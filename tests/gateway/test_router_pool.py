"""Requests that outlive their routers: kill points, refusals, hangs, and what clients see of them."""

from __future__ import annotations

import asyncio
import itertools
import random
from collections.abc import Awaitable, Callable
from contextlib import aclosing
from typing import Any, cast

import pytest

from gateway.errors import GatewayError, RouterBusy, RouterLost, RouterUnavailable
from gateway.routers.pool import PoolLimits, RouterPool
from router.request import GenerationRequest, SamplingParams, TokenEvent
from tests.gateway.fake_router import MortalRouter, Step, token_at

NUM_TOKENS = 12
QUICK = PoolLimits(retry_s=0.0, watch_interval_s=0.001, patience_s=3.0)


def _request(name: str = "a", *, seed: int = 0, group: str | None = None) -> GenerationRequest:
    return GenerationRequest(name, (5, 6, 7), SamplingParams(NUM_TOKENS, seed=seed), group=group)


def _expected(request: GenerationRequest) -> list[int]:
    return [token_at(request, position) for position in range(NUM_TOKENS)]


def _pool(*routers: MortalRouter, limits: PoolLimits = QUICK) -> RouterPool:
    """On a clock that goes on by a second whenever somebody looks at it."""
    seconds = itertools.count()
    links = {f"router-{index}": router for index, router in enumerate(routers)}
    return RouterPool(links, limits, lambda: float(next(seconds)))


async def _collect(pool: RouterPool, request: GenerationRequest) -> list[TokenEvent]:
    return [event async for event in pool.generate(request)]


def _tokens(events: list[TokenEvent]) -> list[int]:
    return [token for event in events for token in event.token_ids]


def _play(scenario: Callable[[], Awaitable[None]]) -> None:
    async def bounded() -> None:
        async with asyncio.timeout(60.0):
            await scenario()

    asyncio.run(bounded())


@pytest.mark.parametrize("num_routers", [1, 2])
@pytest.mark.parametrize("num_deaths", [1, 2, 3])
def test_no_token_is_lost_or_doubled_wherever_routers_die(num_routers: int, num_deaths: int) -> None:
    """Every set of kill points of the only router, or of the first of two that dies whenever it is given the rest."""

    async def scenario() -> None:
        request = _request(seed=7)
        for dies_at in itertools.combinations(range(1, NUM_TOKENS), num_deaths):
            routers = [MortalRouter(f"router-{index}") for index in range(num_routers)]
            for router in routers:
                router.dies_at = set(dies_at)
            events = await _collect(_pool(*routers), request)
            assert _tokens(events) == _expected(request)
            assert {event.request_id for event in events} == {"a"}
            assert [event.finish_reason for event in events] == [None] * (NUM_TOKENS - 1) + ["length"]
            assert sum(router.num_given for router in routers) == NUM_TOKENS
            assert not any(router.num_open for router in routers)

    _play(scenario)


def test_all_requests_of_a_router_that_dies_go_on_in_the_other() -> None:
    async def scenario() -> None:
        routers = MortalRouter("router-0"), MortalRouter("router-1")
        routers[0].dies_at = {30}
        pool = _pool(*routers)
        requests = [_request(f"r{index}", seed=index) for index in range(10)]
        answers = await asyncio.gather(*(_collect(pool, request) for request in requests))
        for request, events in zip(requests, answers, strict=True):
            assert _tokens(events) == _expected(request)
        assert len(routers[0].attempts) == 5 and len(routers[1].attempts) == 10
        text = await pool.metrics()
        assert "sage_moe_requests_resumed_total 5.0" in text
        assert 'sage_moe_router_up{router="0"} 0.0' in text

    _play(scenario)


def test_random_deaths_of_three_routers_change_no_answer() -> None:
    async def scenario() -> None:
        chance = random.Random(11)
        routers = [MortalRouter(f"router-{index}") for index in range(3)]
        pool = _pool(*routers)
        requests = [_request(f"r{index}", seed=index) for index in range(60)]

        async def murder() -> None:
            while True:
                await asyncio.sleep(0)
                if chance.random() < 0.05:
                    chance.choice(routers).kill()

        murderer = asyncio.create_task(murder())
        answers = await asyncio.gather(
            *(_collect(pool, request) for request in requests), return_exceptions=True
        )
        murderer.cancel()
        num_whole = 0
        for request, answer in zip(requests, answers, strict=True):
            if isinstance(answer, list):
                assert _tokens(answer) == _expected(request)
                num_whole += 1
            else:
                assert isinstance(answer, RouterLost)  # each of several routers died before its next token
        assert num_whole > len(requests) // 2

    _play(scenario)


def test_new_requests_are_spread_and_those_of_a_group_are_not() -> None:
    async def scenario() -> None:
        routers = [MortalRouter(f"router-{index}") for index in range(2)]
        pool = _pool(*routers)
        await asyncio.gather(*(_collect(pool, _request(f"r{index}")) for index in range(6)))
        assert [len(router.attempts) for router in routers] == [3, 3]
        await asyncio.gather(*(_collect(pool, _request(f"g{index}", group="g")) for index in range(6)))
        assert sorted(len(router.attempts) for router in routers) == [3, 9]

    _play(scenario)


@pytest.mark.parametrize(
    "ending",
    [
        Step((), "error", "the engine failed", is_resumable=True),
        Step((), "cancelled"),
    ],
)
def test_request_that_its_router_gives_up_goes_on_in_another(ending: Step) -> None:
    async def scenario() -> None:
        routers = [MortalRouter(f"router-{index}") for index in range(2)]
        routers[0].ending = ending
        request = _request()
        assert _tokens(await _collect(_pool(*routers), request)) == _expected(request)

    _play(scenario)


def test_error_of_the_request_s_own_is_its_end() -> None:
    async def scenario() -> None:
        routers = [MortalRouter(f"router-{index}") for index in range(2)]
        routers[0].ending = Step((), "error", "non-finite")
        events = await _collect(_pool(*routers), _request())
        assert [(event.finish_reason, event.error) for event in events] == [("error", "non-finite")]
        assert not routers[1].attempts

    _play(scenario)


def test_request_is_refused_only_where_all_that_live_are_full() -> None:
    async def scenario() -> None:
        full, roomy, dead = MortalRouter("full"), MortalRouter("roomy"), MortalRouter("dead")
        full.is_full = True
        request = _request()
        assert _tokens(await _collect(_pool(full, roomy), request)) == _expected(request)
        dead.kill()
        dead.refusals_until_back = 10**6
        with pytest.raises(RouterBusy):
            await _collect(_pool(dead, full), request)

    _play(scenario)


def test_answer_that_has_begun_waits_for_room_where_another_is_refused() -> None:
    async def scenario() -> None:
        mortal, full = MortalRouter("mortal"), MortalRouter("full")
        mortal.dies_at = {4}
        mortal.refusals_until_back = 10**6
        full.is_full = True
        pool = _pool(mortal, full)
        request = _request()
        events = cast(Any, pool.generate(request))
        tokens = [token for _ in range(4) for token in (await anext(events)).token_ids]
        rest = asyncio.create_task(_rest(events))
        while len(full.attempts) < 5:
            await asyncio.sleep(0)
        full.is_full = False
        assert tokens + await rest == _expected(request)

    async def _rest(events: Any) -> list[int]:
        return [token async for event in events for token in event.token_ids]

    _play(scenario)


@pytest.mark.parametrize("num_before", [0, 5])
def test_loss_that_is_not_made_good_in_time_is_an_error(num_before: int) -> None:
    """Never a silent end; and a request that nobody ever took is not said to be lost."""

    async def scenario() -> None:
        router = MortalRouter()
        router.refusals_until_back = 10**6
        router.dies_at = {num_before}
        if not num_before:
            router.kill()
        pool = _pool(router, limits=PoolLimits(resume_timeout_s=20.0, retry_s=0.0, watch_interval_s=0.001))
        received: list[TokenEvent] = []
        with pytest.raises(RouterUnavailable) as caught:
            async for event in pool.generate(_request()):
                received.append(event)
        assert len(received) == num_before
        assert isinstance(caught.value, RouterLost) == bool(num_before)
        assert f"sage_moe_requests_not_resumed_total {float(num_before > 0)}" in await _own_metrics(
            pool, router
        )

    _play(scenario)


async def _own_metrics(pool: RouterPool, router: MortalRouter) -> str:
    router.refusals_until_back = 0
    async with aclosing(cast(Any, pool.generate(_request("other")))) as events:
        await anext(events)
        return await pool.metrics()


def test_request_that_ends_every_router_is_given_up() -> None:
    async def scenario() -> None:
        routers = [MortalRouter(f"router-{index}") for index in range(3)]
        for router in routers:
            router.ending = Step((), "error", "the engine failed", is_resumable=True)
        with pytest.raises(RouterLost, match="the engine failed"):
            await _collect(_pool(*routers), _request())
        assert sum(len(router.attempts) for router in routers) == 4

    _play(scenario)


def test_requests_leave_a_router_that_hangs() -> None:
    async def scenario() -> None:
        routers = [MortalRouter(f"router-{index}") for index in range(2)]
        routers[0].hangs_at = 6
        request = _request()
        pool = _pool(*routers)
        assert _tokens(await _collect(pool, request)) == _expected(request)
        assert not routers[0].num_open
        # It is not asked again before it says that it is ready.
        await _collect(pool, _request("b"))
        assert [len(router.attempts) for router in routers] == [1, 2]
        routers[0].hangs_at, routers[0].is_ready = None, True
        while len(routers[0].attempts) == 1:
            await _collect(pool, _request("c"))
            await asyncio.sleep(0.001)

    _play(scenario)


def test_client_that_leaves_while_its_request_waits_leaves_nothing_open() -> None:
    async def scenario() -> None:
        router = MortalRouter()
        router.dies_at, router.refusals_until_back = {3}, 10**6
        pool = _pool(router, limits=PoolLimits(retry_s=0.001, resume_timeout_s=1e9))
        task = asyncio.create_task(_collect(pool, _request()))
        while len(router.attempts) < 3:
            await asyncio.sleep(0)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert not router.num_open
        assert 'router_open_requests{router="0"} 0.0' in await _revived_metrics(pool, router)

    async def _revived_metrics(pool: RouterPool, router: MortalRouter) -> str:
        router.refusals_until_back = 0
        await _collect(pool, _request("b"))
        return await pool.metrics()

    _play(scenario)


def test_pool_is_ready_while_one_router_is() -> None:
    async def scenario() -> None:
        first, second = MortalRouter("router-0"), MortalRouter("router-1")
        pool = _pool(first, second)
        assert (await pool.health()).is_ready
        first.kill()
        health = await pool.health()
        assert (health.is_ready, health.detail) == (True, "router-0: it does not answer; router-1: idle")
        second.kill()
        assert not (await pool.health()).is_ready

    _play(scenario)


def test_status_names_every_router_and_adds_up_their_requests() -> None:
    async def scenario() -> None:
        first, second, dead = (MortalRouter(f"router-{index}") for index in range(3))
        first.num_open, second.num_open = 2, 3
        dead.kill()
        status: Any = await _pool(first, second, dead).status()
        assert [(each["name"], each["state"]) for each in status["routers"]] == [
            ("router-0", "ready"),
            ("router-1", "ready"),
            ("router-2", "lost"),
        ]
        assert status["router"]["experts"]["name"] == "router-0"
        assert status["requests"] == {"running": 5, "waiting": 0}

    _play(scenario)


def test_feedback_reaches_whichever_router_gave_the_answer() -> None:
    async def scenario() -> None:
        routers = [MortalRouter(f"router-{index}") for index in range(2)]
        routers[0].dies_at = {4}
        pool = _pool(*routers)
        await _collect(pool, _request("a"))
        assert await pool.feedback("a", 1.0)  # from the second, while the first is dead
        assert not await pool.feedback("unknown", 1.0)
        routers[1].kill()
        with pytest.raises(RouterUnavailable):
            await pool.feedback("a", 1.0)

    _play(scenario)


def test_nothing_is_told_where_no_router_answers() -> None:
    async def scenario() -> None:
        router = MortalRouter()
        router.kill()
        pool = _pool(router)
        for ask in (pool.status, pool.metrics):
            with pytest.raises(GatewayError):
                await ask()

    _play(scenario)
