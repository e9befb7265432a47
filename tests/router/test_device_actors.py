"""Expert actors on a device, which is simulated here, behind sockets in this process: docs/exactness.md holds.

tests/router/test_gpu_actors.py asks the same of a GPU where there is one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from torch import Tensor

from experts import numerics
from experts.numerics import RowKernel
from experts.remote_directory import RemoteDirectory
from experts.roster import Roster
from experts.server import ExpertServer
from extraction.extract import extract
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from router.loading import EngineOptions, LoadedEngine
from router.request import GenerationRequest, SamplingParams
from router.self_test import prove_row_invariance
from router.step_routing import RoutingWatcher
from tests import engines
from tests.checkpoints import SIZES, write_tiny
from tests.engines import Outcome, assert_same_bits, open_engine, run_to_end
from tests.expert_servers import PATIENT, SECRET, expert_servers
from tests.simulated_device import DEVICE, Readings, simulated

JOIN_AT = (0, 2, 1, 0)
ALL = (99, 99)
"""Budgets, in experts on the device and behind it, that hold everything."""
BUDGETS = [ALL, (3, 2), (1, 1)]


@pytest.fixture(scope="module", params=["float experts", "int4 experts"])
def root(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("device-actors")
    parts = {}
    if request.param == "int4 experts":
        parts = {"quantised": QuantisedParts(Quantization(scheme="int4", group_size=32))}
    extract(write_tiny("qwen3_moe", folder / "checkpoint"), folder / "store", **parts)
    return folder / "store"


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def device() -> Iterator[Readings]:
    with simulated() as readings:
        yield readings


def _requests() -> list[GenerationRequest]:
    return [
        GenerationRequest(
            f"r{index}",
            tuple(range(3, 3 + length)),
            SamplingParams(max_tokens=(6, 3)[index % 2], temperature=(0.0, 0.8)[index % 2], seed=index),
            num_logprobs=(None, 2)[index % 2],
            num_prompt_logprobs=(1, None)[index % 2],
        )
        for index, length in enumerate((5, 70, 1, 130))
    ]


@contextmanager
def _engine(root: Path, options: EngineOptions, roster: Roster) -> Iterator[LoadedEngine]:
    loaded = open_engine(root, options, lambda local: RemoteDirectory(local, roster, SECRET, limits=PATIENT))
    try:
        yield loaded
    finally:
        loaded.close()


def _run(
    root: Path,
    options: EngineOptions,
    *,
    when_running: Callable[[], None] | None = None,
    num_actors: int = 2,
    **serving: Any,
) -> tuple[Outcome, LoadedEngine]:
    """when_running: called once, in the middle of the answers."""
    with (
        expert_servers(root, num_actors, options.dtype, **serving) as roster,
        _engine(root, options, roster) as loaded,
    ):
        if when_running is not None:
            loaded.engine.watchers = (*loaded.engine.watchers, _Once(when_running))
        return run_to_end(loaded.engine, _requests(), JOIN_AT), loaded


class _Once(RoutingWatcher):
    """Disturbs after some layers."""

    def __init__(self, disturb: Callable[[], None]) -> None:
        self._disturb, self._left = disturb, 7

    def watch(self, *layer: object, **more: object) -> None:
        self._left -= 1
        if not self._left:
            self._disturb()


def _local(root: Path, options: EngineOptions) -> Outcome:
    loaded = open_engine(root, options)
    outcome = run_to_end(loaded.engine, _requests(), JOIN_AT)
    loaded.close()
    return outcome


@pytest.mark.parametrize("num_actors", [1, 3])
def test_router_and_actors_on_devices_give_the_bits_of_one_process(
    root: Path, device: Readings, dtype: str, num_actors: int
) -> None:
    options = EngineOptions(dtype=dtype, device=DEVICE)
    alone = _local(root, options)
    for budgets in BUDGETS:
        outcome, loaded = _run(root, options, num_actors=num_actors, budgets=budgets)
        assert_same_bits(outcome, alone)
        stats = loaded.directory.stats()
        assert (stats.foreign_rows, stats.local_rows, stats.failovers) == (0, 0, 0)
        assert stats.remote_rows > 0


def test_killed_actor_on_a_device_changes_no_bit(root: Path, device: Readings, dtype: str) -> None:
    """The router computes what it had, on a device of the same class, with room for one expert."""
    options = EngineOptions(dtype=dtype, device=DEVICE)
    alone = _local(root, options)
    servers: list[ExpertServer] = []
    outcome, loaded = _run(
        root, options, when_running=lambda: servers[0].stop(), budgets=(2, 1), servers=servers
    )
    assert_same_bits(outcome, alone)
    stats = loaded.directory.stats()
    assert stats.local_rows > 0 and stats.remote_rows > 0 and stats.foreign_rows == 0


def test_router_and_actors_are_of_one_class_where_the_backbone_s_products_need_fewer_rows(
    root: Path, device: Readings, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Experts' products go by the experts' shapes alone, in every process."""
    sound = numerics._is_invariant

    def is_sound(kernel: RowKernel, x: Tensor, weight: Tensor) -> bool:
        return (kernel.row_multiple < 64 or weight.shape[0] != SIZES["vocab_size"]) and sound(
            kernel, x, weight
        )

    monkeypatch.setattr(numerics, "_is_invariant", is_sound)
    monkeypatch.setattr(engines, "prove_once", prove_row_invariance)
    options = EngineOptions(dtype=dtype, device=DEVICE)
    alone = _local(root, options)
    outcome, loaded = _run(root, options, num_actors=2, budgets=(2, 1))
    assert_same_bits(outcome, alone)
    assert (loaded.directory.stats().foreign_rows, loaded.directory.stats().local_rows) == (0, 0)
    assert loaded.kernel.row_multiple == 32 and "/blocks64" in loaded.worker.numerics_class
    assert "/blocks32-1/norm-" in loaded.numerics_class, "its own products are another's"


def test_router_on_a_cpu_has_one_answer_from_actors_on_devices(
    root: Path, device: Readings, dtype: str
) -> None:
    """Its own rows are of another class, and are not asked for while a replica of the device's class is left."""
    options = EngineOptions(dtype=dtype)
    first, loaded = _run(root, options, num_actors=1, budgets=ALL)
    remote = loaded.directory.stats()
    assert (remote.foreign_rows, remote.local_rows) == (remote.remote_rows, 0)
    for num_actors, budgets in ((2, (3, 2)), (3, (1, 1))):
        assert_same_bits(_run(root, options, num_actors=num_actors, budgets=budgets)[0], first)
    servers: list[ExpertServer] = []
    outcome, loaded = _run(
        root,
        options,
        when_running=lambda: servers[0].stop(),
        budgets=(3, 2),
        replicas=2,
        servers=servers,
    )
    assert_same_bits(outcome, first)
    stats = loaded.directory.stats()
    assert (stats.local_rows, stats.foreign_rows) == (0, stats.remote_rows)


def test_router_on_a_device_takes_rows_of_actors_on_cpus_and_counts_them(
    root: Path, device: Readings
) -> None:
    options = EngineOptions(dtype="float32", device=DEVICE)
    outcome, loaded = _run(root, options)
    stats = loaded.directory.stats()
    assert stats.foreign_rows == stats.remote_rows > 0
    assert outcome.tokens == _local(root, options).tokens


def test_tokens_are_read_back_once_a_layer_for_all_actors(root: Path, device: Readings) -> None:
    options = EngineOptions(dtype="float32", device=DEVICE)
    with expert_servers(root, 3, "float32", budgets=ALL) as roster, _engine(root, options, roster) as loaded:
        sampling = SamplingParams(max_tokens=5, temperature=0.0)
        # A first prompt's layers, of which nobody knows what they take, ask for their experts in parts.
        run_to_end(loaded.engine, [GenerationRequest("first", tuple(range(3, 40)), sampling)])
        device.done.clear()
        before = loaded.engine.stats.steps
        run_to_end(loaded.engine, [GenerationRequest("r", tuple(range(4, 41)), sampling)])
        width, steps = loaded.config.hidden_size, loaded.engine.stats.steps - before
        read = [shape for _, shape in device.done if shape[-1] == width]
        assert len(read) == len(loaded.config.moe_layers) * steps
