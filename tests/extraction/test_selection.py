"""Partial stores: what is chosen, what is said about it, and that nothing runs on them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cluster.placement import split_experts
from experts.errors import StoreDamaged
from experts.store import ExpertStore
from extraction.errors import OptionRefused
from extraction.expert_index import INDEX_NAME, read_expert_index, write_expert_index
from extraction.extract import extract
from extraction.manifest import ExpertKey, GroupShare, LeftOut, read_manifest, write_manifest
from extraction.plan import ExtractionPlan, PlannedComponent, SourceTensor, plan_extraction
from extraction.safetensors_file import TensorHeader
from extraction.selection import Selection, parse_groups, parse_layers, select, without
from extraction.verify import verify
from gateway.cli import app
from gateway.errors import StorePartial
from gateway.stores.source import resolve_runnable


@pytest.mark.parametrize(
    ("text", "layers"),
    [("0-7", range(8)), ("3", [3]), ("0-3,8", [0, 1, 2, 3, 8]), ("5-5, 1", [1, 5]), ("2,2-3", [2, 3])],
)
def test_layers_are_ranges_and_numbers(text: str, layers: list[int]) -> None:
    assert parse_layers(text) == frozenset(layers)


@pytest.mark.parametrize("text", ["", ",", "a", "3-1", "1-", "-1", "1.0", "0-999999", "1 2", "٣"])
def test_layers_of_another_form_are_refused(text: str) -> None:
    with pytest.raises(OptionRefused, match="--layers"):
        parse_layers(text)


def _tensor(name: str) -> SourceTensor:
    return SourceTensor("shard", TensorHeader(name, "BF16", (1,), 0, 2))


def _two_decoders() -> ExtractionPlan:
    """A thinker of four layers, the last dense, a talker of two, and a vision part with layers of its own."""
    backbones = {
        "thinker": ["embed_tokens.weight", *(f"layers.{n}.norm.weight" for n in range(4))],
        "talker": [f"layers.{n}.norm.weight" for n in range(2)],
        "vision": ["layers.0.weight", "layers.9.weight"],
    }
    components = tuple(
        PlannedComponent(name, {}, {tensor: _tensor(f"{name}.{tensor}") for tensor in tensors})
        for name, tensors in backbones.items()
    )
    keys = [ExpertKey("talker", n, 0) for n in range(2)] + [ExpertKey("thinker", n, 0) for n in range(3)]
    return ExtractionPlan(
        Path("x"), "family", {}, {}, components, {key: (_tensor("t"),) * 3 for key in keys}, {}
    )


def test_everything_asked_for_is_no_partial_store() -> None:
    plan = _two_decoders()
    assert select(plan, Selection())[1] is None
    everything = Selection(frozenset(range(4)), frozenset({"thinker", "talker", "vision"}))
    assert select(plan, everything) == (plan, None)


def test_layers_are_those_of_each_component_with_experts() -> None:
    plan, left_out = select(_two_decoders(), Selection(layers=frozenset({1, 3})))
    assert list(plan.experts) == [ExpertKey("talker", 1, 0), ExpertKey("thinker", 1, 0)]
    thinker, talker, vision = plan.components
    assert list(thinker.backbone) == [
        "embed_tokens.weight",
        "layers.1.norm.weight",
        "layers.3.norm.weight",
    ]
    assert list(talker.backbone) == ["layers.1.norm.weight"]
    assert list(vision.backbone) == ["layers.0.weight", "layers.9.weight"]
    assert left_out == LeftOut(components=(), layers={"talker": (0,), "thinker": (0, 2)})


def test_components_are_left_out_whole() -> None:
    plan, left_out = select(
        _two_decoders(), Selection(components=frozenset({"talker"}), layers=frozenset({1}))
    )
    assert [part.name for part in plan.components] == ["talker"]
    assert left_out == LeftOut(components=("thinker", "vision"), layers={"talker": (0,)})


@pytest.mark.parametrize(
    ("selection", "reason"),
    [
        (Selection(layers=frozenset({4})), "no layer 4"),
        (Selection(layers=frozenset({3})), "none of these layers has experts"),
        (Selection(components=frozenset({"thinker", "mouth"})), "no mouth; this checkpoint has talker"),
        (Selection(components=frozenset({"vision"})), "nothing with experts"),
    ],
)
def test_selection_of_what_is_not_there_is_refused(selection: Selection, reason: str) -> None:
    with pytest.raises(OptionRefused, match=reason):
        select(_two_decoders(), selection)


def test_what_a_store_says_it_leaves_out_gives_the_same_plan_again() -> None:
    for selection in (
        Selection(layers=frozenset({1, 3})),
        Selection(components=frozenset({"thinker", "vision"})),
        Selection(),
    ):
        kept, left_out = select(_two_decoders(), selection)
        assert without(_two_decoders(), left_out) == kept
    with pytest.raises(OptionRefused, match="mouth"):
        without(_two_decoders(), LeftOut(components=("mouth",), layers={}))


@pytest.mark.parametrize("index_only", [False, True])
def test_partial_store_says_what_it_lacks_and_holds_the_rest(
    tiny_checkpoint: Path, tmp_path: Path, index_only: bool
) -> None:
    root = tmp_path / "store"
    chosen = Selection(layers=frozenset({0, 1}))
    report = extract(tiny_checkpoint, root, index_only=index_only, selection=chosen)
    assert report.left_out == read_manifest(root).left_out == LeftOut(components=(), layers={"model": (2,)})
    store = ExpertStore.open(root)
    assert {key.layer for key in store.expert_keys()} == {0}  # layer 1 is dense
    names = {entry.name for entry in store.component("model").tensors}
    whole = {name for part in plan_extraction(tiny_checkpoint).components for name in part.backbone}
    assert names == {name for name in whole if not name.startswith("layers.2.")}
    for entry in store.component("model").tensors:
        store.read_tensor("model", entry.name)
    store.close()


def test_partial_store_is_shown_and_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    root = tmp_path / "store"
    extract(tiny_checkpoint, root, selection=Selection(layers=frozenset({0})))
    run = CliRunner()
    shown = run.invoke(app, ["inspect", str(root)])
    assert "PARTIAL, cannot be served; left out: layers 1-2 of model" in shown.stdout
    facts = json.loads(run.invoke(app, ["inspect", str(root), "--json"]).stdout)
    assert facts["left_out"] == {"components": [], "layers": {"model": [1, 2]}, "groups": None}
    for command in (["serve", str(root)], ["generate", str(root), "--prompt", "x"]):
        refused = run.invoke(app, command)
        assert isinstance(refused.exception, StorePartial)
        assert str(refused.exception).count("\n") == 0
        assert "2 layers of model" in str(refused.exception)
    with pytest.raises(StorePartial):
        resolve_runnable(str(root), announce=print)


def test_index_is_not_converted(tiny_checkpoint: Path, tmp_path: Path) -> None:
    with pytest.raises(OptionRefused, match="--dtype"):
        extract(tiny_checkpoint, tmp_path / "store", index_only=True, dtype="bfloat16")


@pytest.mark.parametrize(
    ("text", "share"),
    [
        ("1/4", GroupShare(total=4, kept=(1,))),
        ("0-1/8", GroupShare(total=8, kept=(0, 1))),
        ("3,0/4", GroupShare(total=4, kept=(0, 3))),
        ("0/1", None),
        ("0-3/4", None),
    ],
)
def test_groups_are_read(text: str, share: GroupShare | None) -> None:
    assert parse_groups(text) == share


@pytest.mark.parametrize(
    "text", ["", "1", "1/", "/4", "4/4", "1/0", "2-1/4", "1/4/2", "-1/4", "1/5000", "a/4"]
)
def test_groups_that_cannot_be_are_refused(text: str) -> None:
    with pytest.raises(OptionRefused, match="--groups"):
        parse_groups(text)


def test_groups_are_what_actors_hold_and_together_the_whole(tiny_checkpoint: Path, tmp_path: Path) -> None:
    plan = plan_extraction(tiny_checkpoint)
    expected = split_experts(tuple(plan.experts), 3)
    for number in range(3):
        share = GroupShare(total=3, kept=(number,))
        report = extract(tiny_checkpoint, tmp_path / f"{number}", selection=Selection(groups=share))
        assert report.left_out == LeftOut(components=(), layers={}, groups=share)
        store = ExpertStore.open(tmp_path / f"{number}")
        assert store.expert_keys() == expected[number]
        for key in store.expert_keys():
            store.read_expert(key)
        assert len(store.component("model").tensors) == plan.num_backbone_tensors
        store.close()
        assert verify(tmp_path / f"{number}", tiny_checkpoint).num_experts == len(expected[number])


def test_share_of_the_experts_is_complete_or_refused(tiny_checkpoint: Path, tmp_path: Path) -> None:
    selection = Selection(frozenset({0, 1}), groups=GroupShare(total=4, kept=(1, 2)))
    extract(tiny_checkpoint, tmp_path / "store", selection=selection)
    manifest = read_manifest(tmp_path / "store")
    index = read_expert_index(tmp_path / "store", manifest)
    assert [key.expert for key in index] == [1, 2, 5, 6]
    del index[ExpertKey("model", 0, 5)]
    entry = write_expert_index(tmp_path / "store", index.values())
    files = {**manifest.files, INDEX_NAME: entry}
    write_manifest(tmp_path / "store", manifest.model_copy(update={"files": files}))
    with pytest.raises(StoreDamaged, match="lacks experts in layer 0"):
        ExpertStore.open(tmp_path / "store")


def test_share_of_the_experts_is_shown_and_not_run(tiny_checkpoint: Path, tmp_path: Path) -> None:
    run, root = CliRunner(), tmp_path / "store"
    done = run.invoke(app, ["extract", str(tiny_checkpoint), str(root), "--groups", "0,2/5"])
    assert done.exit_code == 0 and "partial, as asked for" in done.stdout, done.output
    shown = run.invoke(app, ["inspect", str(root)])
    assert "left out: all experts but those of groups 0,2 of 5" in shown.stdout
    with pytest.raises(StorePartial, match="the experts of 3 groups"):
        resolve_runnable(str(root), announce=print)
    with pytest.raises(OptionRefused, match="fewer experts than 4000 groups"):
        extract(
            tiny_checkpoint,
            tmp_path / "none",
            selection=Selection(groups=GroupShare(total=4000, kept=(3999,))),
        )
