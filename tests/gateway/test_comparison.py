"""`sage-moe compare`: stores of every family against `transformers`, one layer at a time."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

from experts.store import ExpertStore
from extraction.errors import OptionRefused
from extraction.extract import extract
from extraction.plan import plan_extraction
from extraction.quantise import Quantization
from extraction.quantised_parts import QuantisedParts
from extraction.selection import Selection
from gateway.cli import app
from gateway.errors import ComparisonRefused, ExtraMissing, OptionInvalid
from gateway.stores.comparison import Comparison, ComparisonOptions, compare
from gateway.stores.published_layers import PublishedLayers
from router.single_layer import SingleLayers
from tests.checkpoints import FAMILIES, write_tiny

NUM_TOKENS = 70
"""More than one block of keys."""
WINDOW = {"sliding_window": 16}
DYNAMIC = {"rope_parameters": {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 4.0}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {family: (family, {}) for family in FAMILIES} | {
    "stacked experts": ("qwen3_moe", {"is_stacked": True}),
    "several shards": ("mixtral", {"shard_size": "20KB"}),
    "dense layers": ("qwen2_moe", {"num_hidden_layers": 3, "mlp_only_layers": [1]}),
    "dense thinker layers": ("qwen3_omni_moe", {"mlp_only_layers": [0]}),
    "window in all layers": ("mixtral", WINDOW),
    "window in some layers": (
        "qwen2_moe",
        {"use_sliding_window": True, **WINDOW, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "text beyond the original context": ("mixtral", DYNAMIC | {"max_position_embeddings": 32}),
    "clipped": ("olmoe", {"clip_qkv": 0.7}),
}


def _compare(checkpoint: Path, store: Path, **options: Any) -> Comparison:
    return compare(
        checkpoint, store, ComparisonOptions(num_tokens=NUM_TOKENS, **options), lambda _found: None
    )


@pytest.mark.parametrize("case", list(CASES))
def test_store_of_any_family_agrees_with_transformers(case: str, tmp_path: Path) -> None:
    family, overrides = CASES[case]
    checkpoint = write_tiny(family, tmp_path / "checkpoint", **overrides)
    extract(checkpoint, tmp_path / "store")
    found = _compare(checkpoint, tmp_path / "store")
    assert found.is_within, found
    assert len(found.layers) == overrides.get("num_hidden_layers", 2)
    assert all(0 < layer.relative < 1e-5 and layer.rerouted == 0 for layer in found.layers)


def _with_change(checkpoint: Path, folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> Path:
    """A store of the checkpoint with some of its weights changed."""
    tensors = load_file(checkpoint / "model.safetensors")
    change(tensors)
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors")
    (folder / "config.json").write_bytes((checkpoint / "config.json").read_bytes())
    extract(folder, folder.parent / "store")
    return folder.parent / "store"


def _scale(name: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = tensors[name] * 1.01

    return change


def _swap(tensors: dict[str, torch.Tensor]) -> None:
    """An expert's gate and up projection, which have the same shape."""
    gate, up = (f"model.layers.2.mlp.experts.5.{name}_proj.weight" for name in ("gate", "up"))
    tensors[gate], tensors[up] = tensors[up], tensors[gate]


@pytest.mark.parametrize(
    ("change", "layer"),
    [
        (_scale("model.layers.2.mlp.experts.5.down_proj.weight"), 2),
        (_scale("model.layers.1.mlp.up_proj.weight"), 1),
        (_scale("model.layers.0.self_attn.v_proj.weight"), 0),
        (_scale("model.layers.2.input_layernorm.weight"), 2),
        (_swap, 2),
    ],
)
def test_wrong_weight_is_found_in_its_layer_and_in_no_other(
    change: Callable[[dict[str, torch.Tensor]], None], layer: int, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    store = _with_change(tiny_checkpoint, tmp_path / "changed", change)
    found = _compare(tiny_checkpoint, store)
    assert [row.layer for row in found.layers if not row.is_within] == [layer]


def test_quantised_experts_are_outside_and_the_verdict_says_why(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    extract(
        tiny_checkpoint,
        tmp_path / "store",
        quantised=QuantisedParts(Quantization(scheme="int4", group_size=32)),
    )
    result = CliRunner().invoke(app, ["compare", str(tiny_checkpoint), str(tmp_path / "store")])
    assert result.exit_code == 1
    assert result.output.endswith("tolerance of 0.0001; the store is quantised (int4-g32)\n")


def test_command_prints_a_line_a_layer_and_fails_with_the_layer_s_name(
    tiny_checkpoint: Path, tiny_store: Path, tmp_path: Path
) -> None:
    good = CliRunner().invoke(app, ["compare", str(tiny_checkpoint), str(tiny_store)])
    assert good.exit_code == 0, good.output
    assert good.output.count("within\n") == 3 and "all 3 layers agree with transformers" in good.output
    change = _scale("model.layers.2.mlp.experts.5.down_proj.weight")
    store = _with_change(tiny_checkpoint, tmp_path / "changed", change)
    bad = CliRunner().invoke(app, ["compare", str(tiny_checkpoint), str(store)])
    assert bad.exit_code == 1
    assert "OUTSIDE" in bad.output and "layer 2 is outside the tolerance of 0.0001" in bad.output
    answer = CliRunner().invoke(
        app, ["compare", str(tiny_checkpoint), str(store), "--layers", "1-2", "--json"]
    )
    table = json.loads(answer.stdout)
    assert answer.exit_code == 1
    assert [(row["layer"], row["is_within"]) for row in table["layers"]] == [(1, True), (2, False)]


def test_later_layer_gets_the_rows_that_the_layers_before_it_made(
    tiny_checkpoint: Path, tiny_store: Path
) -> None:
    whole = _compare(tiny_checkpoint, tiny_store)
    assert _compare(tiny_checkpoint, tiny_store, layers=frozenset({2})).layers == whole.layers[2:]


def test_partial_store_is_compared_where_it_has_layers(tiny_checkpoint: Path, tmp_path: Path) -> None:
    extract(tiny_checkpoint, tmp_path / "store", selection=Selection(frozenset({0, 2})))
    found = _compare(tiny_checkpoint, tmp_path / "store")
    assert [row.layer for row in found.layers] == [0, 2] and found.is_within
    with pytest.raises(OptionRefused, match="the store has no layer 1"):
        _compare(tiny_checkpoint, tmp_path / "store", layers=frozenset({1}))
    with pytest.raises(OptionRefused, match="the checkpoint has no layer 3"):
        _compare(tiny_checkpoint, tmp_path / "store", layers=frozenset({0, 3}))


def test_index_over_the_checkpoint_itself_agrees(tiny_checkpoint: Path, tmp_path: Path) -> None:
    extract(tiny_checkpoint, tmp_path / "store", index_only=True)
    assert _compare(tiny_checkpoint, tmp_path / "store").is_within


def test_experts_that_do_not_fit_at_once_are_computed_in_waves(tiny_store: Path) -> None:
    store = ExpertStore.open(tiny_store)
    layers = SingleLayers(store, store.served)
    hidden_TD = torch.randn(NUM_TOKENS, 64, generator=torch.Generator().manual_seed(0))
    whole, waves = (layers.compute(0, hidden_TD, nbytes) for nbytes in (1 << 30, 3 * 64 * 24 * 4))
    store.close()
    assert torch.equal(whole.hidden_TD, waves.hidden_TD)


def test_layer_that_does_not_fit_the_memory_is_refused_with_what_it_needs(
    tiny_checkpoint: Path, tiny_store: Path
) -> None:
    with pytest.raises(ComparisonRefused, match="--memory 1MiB is too little: layer 0 needs 100MiB"):
        _compare(tiny_checkpoint, tiny_store, memory_bytes=1 << 20)
    assert _compare(tiny_checkpoint, tiny_store, memory_bytes=100 << 20).is_within


def test_store_of_another_checkpoint_is_refused(tiny_store: Path, tmp_path: Path) -> None:
    other = write_tiny("qwen3_moe", tmp_path / "other", num_hidden_layers=3, mlp_only_layers=[2])
    with pytest.raises(ComparisonRefused, match=r"config\.json differ in mlp_only_layers"):
        _compare(other, tiny_store)
    foreign = write_tiny("mixtral", tmp_path / "foreign")
    with pytest.raises(ComparisonRefused, match=r"holds a qwen3_moe, .*foreign is a mixtral"):
        _compare(foreign, tiny_store)


def test_store_without_the_text_decoder_is_refused(tmp_path: Path) -> None:
    checkpoint = write_tiny("qwen3_omni_moe", tmp_path / "checkpoint")
    extract(checkpoint, tmp_path / "store", selection=Selection(components=frozenset({"talker"})))
    with pytest.raises(ComparisonRefused, match="leaves out thinker"):
        _compare(checkpoint, tmp_path / "store")


def test_missing_transformers_is_said_with_what_to_install(
    tiny_checkpoint: Path, tiny_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ExtraMissing, match=r"pip install 'sage-moe\[compare\]'"):
        _compare(tiny_checkpoint, tiny_store)


def test_more_tokens_than_the_context_are_refused(tiny_checkpoint: Path, tiny_store: Path) -> None:
    with pytest.raises(OptionInvalid, match="--tokens is beyond the model's context of 256"):
        compare(tiny_checkpoint, tiny_store, ComparisonOptions(num_tokens=257), lambda _found: None)


def test_layer_s_memory_goes_with_the_layer(tiny_checkpoint: Path) -> None:
    layers = PublishedLayers(plan_extraction(tiny_checkpoint))
    hidden = layers.embed([3, 1, 4])
    for index in range(layers.num_layers):
        hidden = layers.compute(index, hidden).hidden_TD
    assert all(parameter.is_meta for layer in layers._empty_layers for parameter in layer.parameters())
