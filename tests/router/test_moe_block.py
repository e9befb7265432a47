"""A layer's experts on their way: computed in parts, with pauses between them, for the same bits."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from experts.call import ExpertCall
from experts.directory import LocalDirectory
from experts.expert_table import ExpertTable
from experts.worker import ExpertWorker
from extraction.extract import extract
from router.backbone import ForwardPass
from router.kv_cache import KvPool
from router.loading import EngineOptions, LoadedEngine
from router.moe_block import FIRST_SHARE, Mixture, MoeBlock
from router.step_batch import Span, StepBatch
from router.step_routing import NATIVE
from tests.checkpoints import write_tiny
from tests.engines import open_engine

NUM_TOKENS = 40
PAST_NS = 1
HOUR_NS = 3600 * 10**9


class NotedDirectory(LocalDirectory):
    """Notes which experts it is asked for; has tables until they are taken away."""

    has_tables = True

    def __init__(self, worker: ExpertWorker) -> None:
        super().__init__(worker)
        self.asked: list[tuple[int, ...]] = []

    def table(self, component: str, layer: int) -> ExpertTable | None:
        return super().table(component, layer) if self.has_tables else None

    def run(self, call: ExpertCall) -> Tensor:
        self.asked.append(call.experts)
        return super().run(call)


@pytest.fixture(scope="module", params=["qwen3_moe", "qwen2_moe"])
def loaded(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[LoadedEngine]:
    """One family has a shared expert."""
    folder = tmp_path_factory.mktemp(request.param)
    extract(write_tiny(request.param, folder / "checkpoint"), folder / "store")
    loaded = open_engine(folder / "store", EngineOptions(), NotedDirectory)
    loaded.worker.load_all()
    yield loaded
    loaded.close()


def _directory(loaded: LoadedEngine) -> NotedDirectory:
    assert isinstance(loaded.directory, NotedDirectory)
    loaded.directory.asked.clear()
    return loaded.directory


def _block(loaded: LoadedEngine) -> MoeBlock:
    return next(layer.moe for layer in loaded.engine.backbone.layers if layer.moe is not None)


def _rows(loaded: LoadedEngine) -> Tensor:
    shape = NUM_TOKENS, loaded.config.hidden_size
    return torch.randn(shape, generator=torch.Generator().manual_seed(3)).to(loaded.dtype)


@torch.inference_mode()
def test_parts_have_the_bits_of_the_whole_and_ask_for_each_expert_once(loaded: LoadedEngine) -> None:
    block, rows_PD, directory = _block(loaded), _rows(loaded), _directory(loaded)
    whole_TD = block.forward(rows_PD, NUM_TOKENS)
    [experts] = directory.asked
    assert len(experts) > 3
    directory.asked.clear()
    mixture = Mixture(block, rows_PD, NUM_TOKENS, NATIVE, "")
    num_pauses = 0
    while (found_TD := mixture.advance(PAST_NS)) is None:
        num_pauses += 1
    assert num_pauses == len(experts) - 1, "an expert is computed however little time there is"
    assert sorted(directory.asked) == [(expert,) for expert in experts]
    assert torch.equal(found_TD, whole_TD)


@torch.inference_mode()
def test_what_is_left_is_computed_at_once_when_nobody_waits_any_more(loaded: LoadedEngine) -> None:
    block, rows_PD, directory = _block(loaded), _rows(loaded), _directory(loaded)
    whole_TD = block.forward(rows_PD, NUM_TOKENS)
    [experts] = directory.asked
    directory.asked.clear()
    mixture = Mixture(block, rows_PD, NUM_TOKENS, NATIVE, "")
    assert mixture.advance(PAST_NS) is None
    found_TD = mixture.advance()
    assert [len(part) for part in directory.asked] == [1, len(experts) - 1]
    assert found_TD is not None and torch.equal(found_TD, whole_TD)


@torch.inference_mode()
def test_parts_are_as_large_as_there_is_time_for(loaded: LoadedEngine) -> None:
    """The first one is small where nothing is known; with plenty of time the rest is one part."""
    block, rows_PD, directory = _block(loaded), _rows(loaded), _directory(loaded)
    mixture = Mixture(block, rows_PD, NUM_TOKENS, NATIVE, "")
    assert mixture.advance(time.monotonic_ns() + HOUR_NS) is not None
    sizes = [len(part) for part in directory.asked]
    assert sizes == [max(1, int(FIRST_SHARE * sum(sizes))), sizes[-1]]
    assert mixture.expert_s > 0
    directory.asked.clear()
    known = Mixture(block, rows_PD, NUM_TOKENS, NATIVE, "", expert_s=3600 / 3.5)
    assert known.advance(time.monotonic_ns() + HOUR_NS) is not None
    assert len(directory.asked[0]) == 3, "an hour is enough for three"
    assert directory.asked[0] != tuple(sorted(sum(directory.asked, ()))[:3]), "from all over the layer"


@torch.inference_mode()
def test_tables_that_go_while_a_half_pauses_change_no_bit(loaded: LoadedEngine) -> None:
    """As when the first actor joins a service whose router has computed all experts itself."""
    if loaded.kernel.product != "native":
        pytest.skip("only our own products compute with tables")
    directory, backbone = _directory(loaded), loaded.engine.backbone
    pool = KvPool(loaded.config, 4, loaded.dtype)
    expected = backbone.forward(_batch(), pool).logits_LV
    forward = ForwardPass(backbone, _batch())
    try:
        while not (forward.is_in_half and forward.next_half == "experts"):
            assert not forward.is_done
            forward.advance(pool, PAST_NS)
        directory.has_tables = False
        while not forward.is_done:
            forward.advance(pool, PAST_NS)
    finally:
        directory.has_tables = True
    assert directory.asked, "later layers found no tables"
    assert torch.equal(forward.finish().logits_LV, expected)


def _batch() -> StepBatch:
    positions = torch.arange(NUM_TOKENS)
    rows = tuple(range(NUM_TOKENS))
    return StepBatch((Span((1, 2), 0, NUM_TOKENS),), positions + 5, positions.expand(3, -1), rows)
