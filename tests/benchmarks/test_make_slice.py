"""Slices at tiny widths: complete checkpoints, read by extraction and `transformers`, that route as asked."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from benchmarks import make_slice
from benchmarks.make_slice import DiskTooSmall, SliceSpec, write_slice
from benchmarks.one_layer import measure_layer
from benchmarks.published import PUBLISHED
from benchmarks.slice_probe import probe_routing
from experts.store import ExpertStore
from extraction.extract import extract
from gateway.text.tokenizer import TextTokenizer
from router.model_config import read_model_config

SIZES = {
    "vocab_size": 512,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 16,
    "intermediate_size": 24,
    "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 40,
    "eos_token_id": 511,
}


def tiny(family: str, **overrides: Any) -> dict[str, Any]:
    """The published configuration, with sizes made small where it has them."""
    published = PUBLISHED[family]
    return dict(published) | {k: v for k, v in SIZES.items() if k in published} | overrides


@pytest.mark.parametrize("family", sorted(PUBLISHED))
@pytest.mark.parametrize("is_stacked", [False, True])
def test_slice_of_every_family_is_a_checkpoint_that_extraction_takes(
    tmp_path: Path, family: str, is_stacked: bool
) -> None:
    write_slice(SliceSpec(tiny(family), skew=0.7, locality=0.45, is_stacked=is_stacked), tmp_path / "slice")
    extract(tmp_path / "slice", tmp_path / "store")
    store = ExpertStore.open(tmp_path / "store")
    config = read_model_config(store.served.config)
    assert len(store.expert_keys()) == 2 * config.num_experts
    first, second = (store.read_expert(key) for key in store.expert_keys()[:2])
    assert not torch.equal(first, second)
    assert TextTokenizer.from_folder(tmp_path / "slice").decode([104, 105]) == "hi"


def test_transformers_reads_a_slice_and_its_hidden_states_stay_finite(tmp_path: Path) -> None:
    import transformers

    write_slice(SliceSpec(tiny("qwen3_moe"), is_stacked=True), tmp_path / "slice")
    model, loading = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "slice", output_loading_info=True
    )
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    logits = model(torch.arange(40).unsqueeze(0)).logits
    assert torch.isfinite(logits).all()


def test_running_a_slice_shows_the_routing_that_was_asked_for(tmp_path: Path) -> None:
    config = tiny("qwen3_moe", num_experts=32, num_experts_per_tok=4)
    write_slice(SliceSpec(config, skew=0.75, locality=0.35), tmp_path / "slice")
    extract(tmp_path / "slice", tmp_path / "store", index_only=True)
    layers = probe_routing(tmp_path / "store", 600)
    assert sorted(layers) == [0, 1]
    for facts in layers.values():
        assert facts.skew == pytest.approx(0.75, abs=0.08)
        assert facts.locality == pytest.approx(0.35, abs=0.08)


def test_same_seed_writes_the_same_bytes_and_another_does_not(tmp_path: Path) -> None:
    shards = []
    for number, seed in enumerate((1, 1, 2)):
        folder = tmp_path / str(number)
        write_slice(SliceSpec(tiny("qwen3_moe"), seed=seed), folder)
        shards.append((folder / "model-00001-of-00001.safetensors").read_bytes())
    assert shards[0] == shards[1] != shards[2]


def test_slice_that_does_not_fit_the_disk_is_refused_before_anything_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Usage(NamedTuple):
        free: int

    monkeypatch.setattr(make_slice.shutil, "disk_usage", lambda path: Usage(1000))
    with pytest.raises(DiskTooSmall, match=r"needs [0-9]+ bytes of disk and 1000 are free"):
        write_slice(SliceSpec(tiny("qwen3_moe")), tmp_path / "slice")
    assert list(tmp_path.iterdir()) == []


def test_command_refuses_an_existing_folder_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(make_slice.PUBLISHED, "qwen3_moe", tiny("qwen3_moe"))  # type: ignore[arg-type]
    monkeypatch.setattr(sys, "argv", ["make_slice", str(tmp_path), "--layers", "1"])
    with pytest.raises(SystemExit, match="is there already"):
        make_slice.main()


def test_command_says_how_the_slice_routes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(make_slice.PUBLISHED, "qwen3_moe", tiny("qwen3_moe"))  # type: ignore[arg-type]
    arguments = [str(tmp_path / "slice"), "--layers", "1", "--near-uniform", "--probe-tokens", "64"]
    monkeypatch.setattr(sys, "argv", ["make_slice", *arguments])
    make_slice.main()
    assert "layer   0: skew 0." in capsys.readouterr().out
    facts = json.loads((tmp_path / "slice" / "slice.json").read_text())
    assert facts["asked"] == {"skew": 0.6, "locality": 0.16}


def test_an_expert_in_host_memory_is_used_where_it_lies(tmp_path: Path) -> None:
    write_slice(SliceSpec(tiny("qwen3_moe")), tmp_path / "slice")
    extract(tmp_path / "slice", tmp_path / "store")
    samples = measure_layer(ExpertStore.open(tmp_path / "store"), 10)
    assert samples.moved_experts == 0
    assert len(samples.block_ms) == len(samples.bare_ms) == 10
