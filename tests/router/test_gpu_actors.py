"""Expert actors on a GPU, where there is one: the actor itself behind its socket, for routers on the GPU and the CPU.

tests/router/test_device_actors.py and tests/cluster/test_device_actors.py hold the same code on machines without one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest
import ray
import torch

from cluster.placement import plan_local, split_experts
from cluster.plan import CardShare
from cluster.supervisor import start_supervisor, stop_supervisor
from experts.actor import ActorSpec, ExpertActor
from experts.eviction import DEFAULT_EVICTION
from experts.remote_directory import RemoteDirectory
from experts.roster import Roster
from experts.store import ExpertStore
from router.loading import EngineOptions, LoadedEngine, stored_dtype
from router.model_config import read_model_config
from router.request import GenerationRequest, SamplingParams
from tests.engines import Outcome, assert_same_bits, open_engine, run_to_end
from tests.expert_servers import PATIENT, SECRET
from tests.gpu import GPU
from tests.ray_nodes import WAIT_S, patient_directory, ray_nodes, service_spec

pytestmark = GPU
DEVICE = torch.device("cuda", 0)
JOIN_AT = (0, 2, 1, 0)
EXPERT_BYTES = 73728
"""One expert of the bundled model in bfloat16."""


def _requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            f"r{index}",
            tuple((7 * i + index) % 500 + 3 for i in range(length)),
            SamplingParams(max_tokens=(16, 5)[index % 2], temperature=(0.0, 0.8)[index % 2], seed=index),
        )
        for index, length in enumerate((5, 70, 1, 300))
    ]


def _specs(root: Path, num_actors: int, budgets: tuple[int, int]) -> list[ActorSpec]:
    """budgets: experts on the card, and in host memory behind it."""
    store = ExpertStore.open(root)
    config = read_model_config(store.served.config)
    specs = [
        ActorSpec(
            f"experts-{index}",
            index + 1,
            str(root),
            stored_dtype(store),
            group,
            config.hidden_size,
            config.expert_width,
            budgets[0] * EXPERT_BYTES,
            DEFAULT_EVICTION,
            1,
            "127.0.0.1",
            0.0,
            SECRET,
            device="cuda",
            host_budget_bytes=budgets[1] * EXPERT_BYTES,
        )
        for index, group in enumerate(split_experts(store.expert_keys(store.served.name), num_actors))
    ]
    store.close()
    return specs


@contextmanager
def _acting(specs: Sequence[ActorSpec]) -> Iterator[list[ExpertActor]]:
    with ExitStack() as stack:
        actors = []
        for spec in specs:
            actors.append(ExpertActor(spec))
            stack.callback(actors[-1].stop)
        yield actors


@contextmanager
def _engine(root: Path, device: torch.device, actors: Sequence[ExpertActor]) -> Iterator[LoadedEngine]:
    owners = {key: (actor.endpoint().name,) for actor in actors for key in actor._spec.group}
    roster = Roster(1, {actor.endpoint().name: actor.endpoint() for actor in actors}, owners)
    loaded = open_engine(
        root,
        EngineOptions(device=device),
        lambda local: RemoteDirectory(local, roster, SECRET, limits=PATIENT),
    )
    try:
        yield loaded
    finally:
        loaded.close()


def _alone(root: Path) -> Outcome:
    loaded = open_engine(root, EngineOptions(device=DEVICE))
    outcome = run_to_end(loaded.engine, _requests(), JOIN_AT)
    loaded.close()
    return outcome


@pytest.mark.parametrize("budgets", [(999, 999), (20, 8), (1, 1)])
def test_actors_and_router_on_a_gpu_give_the_bits_of_one_process(
    stories_store: Path, budgets: tuple[int, int]
) -> None:
    with (
        _acting(_specs(stories_store, 2, budgets)) as actors,
        _engine(stories_store, DEVICE, actors) as loaded,
    ):
        assert_same_bits(run_to_end(loaded.engine, _requests(), JOIN_AT), _alone(stories_store))
        assert loaded.directory.foreign_rows == 0
        actors[0].set_limits(EXPERT_BYTES, Fraction(1))
        assert actors[0].status()["resident_bytes"] <= EXPERT_BYTES
        assert_same_bits(run_to_end(loaded.engine, _requests(), JOIN_AT), _alone(stories_store))
        actors[1].stop()
        assert_same_bits(run_to_end(loaded.engine, _requests(), JOIN_AT), _alone(stories_store))


def test_router_on_a_cpu_gets_one_answer_whatever_actors_on_a_gpu_hold(stories_store: Path) -> None:
    outcomes = []
    for num_actors, budgets in ((1, (999, 999)), (2, (20, 8)), (3, (1, 1))):
        with (
            _acting(_specs(stories_store, num_actors, budgets)) as actors,
            _engine(stories_store, torch.device("cpu"), actors) as loaded,
        ):
            outcomes.append(run_to_end(loaded.engine, _requests(), JOIN_AT))
            assert loaded.directory.stats().local_rows == 0 < loaded.directory.foreign_rows
    assert_same_bits(outcomes[1], outcomes[0])
    assert_same_bits(outcomes[2], outcomes[0])


@pytest.mark.ray
def test_ray_gives_actors_their_card(stories_store: Path) -> None:
    store = ExpertStore.open(stories_store)
    keys = store.expert_keys(store.served.name)
    store.close()
    budget = 20 * EXPERT_BYTES
    plan = plan_local(keys, 2, (budget, budget), CardShare(0.5, 8 * EXPERT_BYTES))
    expected = _alone(stories_store).tokens
    with ray_nodes(1, num_gpus=(1,)):
        supervisor = start_supervisor(service_spec(stories_store, plan, expert_device="cuda"))
        try:
            ray.get(supervisor.wait_ready.remote(), timeout=WAIT_S)
            loaded = open_engine(stories_store, replace(EngineOptions(), device=DEVICE), patient_directory)
            assert run_to_end(loaded.engine, _requests(), JOIN_AT).tokens == expected
            assert loaded.directory.foreign_rows == 0
            loaded.close()
        finally:
            stop_supervisor()
