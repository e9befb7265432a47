"""What learned stand-ins are after a restart, a kill, damage, and beside another router that keeps them."""

from __future__ import annotations

import fcntl
import logging
import os
import stat
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from router.errors import MeansDamaged, MeansUnusable
from router.loading import EngineOptions
from router.means_file import MeansIdentity, means_path, read_means, set_aside, write_means
from router.means_keeper import MeansKeeper, StandInOptions, is_due
from router.output_means import HALF_LIFE_USES, MIN_USES, LayerMeans, OutputMeans
from router.request import GenerationRequest, SamplingParams
from router.routing_choice import RoutingChoice
from router.scoring import PRESETS
from tests.engines import open_engine, run_to_end

IDENTITY = MeansIdentity("ab" * 32, "bfloat16", "model", (1, 3), num_experts=4, width=6)
HOUR_S = 3600.0


def learned(seed: int = 0) -> OutputMeans:
    means = OutputMeans(IDENTITY.num_experts, IDENTITY.width, IDENTITY.layers)
    generator = torch.Generator().manual_seed(seed)
    for layer in IDENTITY.layers:
        output_ED = torch.randn(4, 6, generator=generator)
        means.restore(
            layer, LayerMeans(output_ED, output_ED.norm(dim=1), torch.tensor([0.0, 63.0, 64.5, 4e3]))
        )
    means.num_learned = 100
    return means


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return means_path(tmp_path / "state", IDENTITY.store_hash)


def written(path: Path, seed: int = 0) -> OutputMeans:
    means = learned(seed)
    assert write_means(path, IDENTITY, means.copy)
    return means


def opened(path: Path, means: OutputMeans, interval_s: float = HOUR_S) -> MeansKeeper:
    return MeansKeeper(means, IDENTITY, path, interval_s)


def empty() -> OutputMeans:
    return OutputMeans(IDENTITY.num_experts, IDENTITY.width, IDENTITY.layers)


def test_what_is_read_is_what_was_written_rounded_to_bfloat16(path: Path) -> None:
    means = written(path)
    kept = read_means(path, IDENTITY)
    assert sorted(kept) == [1, 3]
    for layer, found in kept.items():
        was = means.copy(layer)
        assert torch.equal(found.output_ED, was.output_ED.bfloat16())
        assert torch.equal(found.norm_E, was.norm_E) and torch.equal(found.uses_E, was.uses_E)
    assert path.stat().st_size == IDENTITY.file_bytes
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700


def test_no_file_is_nothing_learned(path: Path) -> None:
    assert read_means(path, IDENTITY) == {}


def test_kept_means_decide_alike_after_a_restart(path: Path) -> None:
    before = written(path)
    after = empty()
    opened(path, after).close()
    for layer in IDENTITY.layers:
        assert torch.equal(after.sizes(layer), before.sizes(layer))
    assert after.num_known == before.num_known == 4, "two experts of two layers have enough uses"


Damage = Callable[[bytes], bytes]


def _flipped(raw: bytes) -> bytes:
    return raw[:-60] + bytes([raw[-60] ^ 1]) + raw[-59:]


@pytest.mark.parametrize(
    "damage",
    [lambda raw: raw[:-1], lambda raw: raw + b"\0", lambda raw: b"", lambda raw: b"\0" * len(raw), _flipped],
    ids=["cut", "longer", "empty", "zeros", "one bit"],
)
def test_damage_is_set_aside_said_so_and_learned_anew(
    path: Path, damage: Damage, caplog: pytest.LogCaptureFixture
) -> None:
    written(path)
    path.write_bytes(damage(path.read_bytes()))
    means = empty()
    with caplog.at_level(logging.WARNING):
        keeper = opened(path, means)
    assert means.num_known == 0
    assert "learning anew" in caplog.text and str(path) in caplog.text
    assert path.with_name(f"{path.name}.damaged").exists() and not path.exists()
    means.num_learned = 1
    keeper.close()
    assert sorted(read_means(path, IDENTITY)) == [1, 3]


def test_numbers_that_no_mean_has_are_not_believed(path: Path) -> None:
    zeros = torch.zeros(4)
    for bad in (
        LayerMeans(torch.full((4, 6), torch.nan), zeros, zeros),
        LayerMeans(torch.zeros(4, 6), zeros - 1, zeros),
        LayerMeans(torch.zeros(4, 6), zeros, zeros - 1),
        LayerMeans(torch.zeros(4, 6), zeros, zeros + 1e30),
    ):
        write_means(path, IDENTITY, lambda layer, bad=bad: bad)
        with pytest.raises(MeansDamaged, match="no mean can have"):
            read_means(path, IDENTITY)


@pytest.mark.parametrize(
    "other", [{"quantisation": "int8"}, {"store_hash": "cd" * 32}, {"component": "talk."}], ids=str
)
def test_means_of_another_store_are_refused(path: Path, other: dict[str, str]) -> None:
    written(path)
    with pytest.raises(MeansDamaged):
        read_means(path, replace(IDENTITY, **other))


def test_a_link_or_a_folder_is_not_read(path: Path, tmp_path: Path) -> None:
    written(tmp_path / "elsewhere")
    path.parent.mkdir(parents=True)
    path.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(MeansUnusable):
        read_means(path, IDENTITY)
    path.unlink()
    path.mkdir()
    with pytest.raises(MeansUnusable, match="is no file"):
        read_means(path, IDENTITY)


def test_a_killed_writer_leaves_the_file_before_and_its_rest_is_written_over(path: Path) -> None:
    first = written(path)

    def killed(layer: int) -> LayerMeans:
        if layer == IDENTITY.layers[-1]:
            raise KeyboardInterrupt
        return first.copy(layer)

    with pytest.raises(KeyboardInterrupt):
        write_means(path, IDENTITY, killed)
    assert torch.equal(read_means(path, IDENTITY)[1].norm_E, first.copy(1).norm_E)
    second = written(path, seed=1)
    assert torch.equal(read_means(path, IDENTITY)[1].norm_E, second.copy(1).norm_E)
    assert sorted(entry.name for entry in path.parent.iterdir()) == [path.name, f"{path.name}.lock"]


def test_while_another_router_writes_nothing_is_written(path: Path) -> None:
    first = written(path)
    lock_file = os.open(f"{path}.lock", os.O_RDWR)
    fcntl.flock(lock_file, fcntl.LOCK_EX)
    assert not write_means(path, IDENTITY, learned(1).copy)
    os.close(lock_file)
    assert torch.equal(read_means(path, IDENTITY)[1].norm_E, first.copy(1).norm_E)


def test_a_folder_that_cannot_be_written_is_said_once(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path.parent.parent.write_text("a file where the folder would be")
    means = learned()
    with caplog.at_level(logging.WARNING):
        keeper = opened(path, means)
        keeper.close()
    assert caplog.text.count("not kept for now") == 1
    assert not keeper.status()["is_kept"]


def test_set_aside_replaces_what_was_set_aside_before(path: Path) -> None:
    for seed in range(3):
        written(path, seed)
        aside = set_aside(path)
    assert sorted(entry.name for entry in path.parent.iterdir()) == [aside.name, f"{path.name}.lock"]


def test_saving_waits_for_news_and_comes_more_rarely_the_more_is_known() -> None:
    assert not is_due(MIN_USES * 10 - 1, 0, num_experts=10)
    assert is_due(MIN_USES * 10, 0, num_experts=10)
    assert not is_due(12_000, 10_000, num_experts=10) and is_due(12_500, 10_000, num_experts=10)
    last = 10**7
    assert not is_due(last + 10 * HALF_LIFE_USES - 1, last, num_experts=10)
    assert is_due(last + 10 * HALF_LIFE_USES, last, num_experts=10)


def test_an_engine_saves_at_its_end_and_spares_from_its_first_step_after_a_restart(
    stories_store: Path, tmp_path: Path
) -> None:
    quarter = 6 * 16 * 36864 * 2
    options = EngineOptions(
        expert_budget_bytes=quarter, snarc=PRESETS["thrifty"], stand_ins=StandInOptions(str(tmp_path))
    )

    def stand_ins_of(name: str, num_repeats: int) -> int:
        loaded = open_engine(stories_store, options)
        prompt = tuple(range(300, 340)) * num_repeats
        request = GenerationRequest(
            name, prompt, SamplingParams(max_tokens=8, temperature=0.0), routing=RoutingChoice("snarc")
        )
        found: list[int] = []
        whole = loaded.engine.step
        loaded.engine.step = lambda: (  # type: ignore[method-assign]
            [found.append(e.routing.stand_ins) or e if e.routing else e for e in whole()]  # type: ignore[func-returns-value]
        )
        run_to_end(loaded.engine, [request])
        loaded.close()
        return found[-1]

    assert stand_ins_of("first", 1) == 0, "too little is known of every expert"
    stand_ins_of("learns", 24)
    assert stand_ins_of("restarted", 1) > 0
