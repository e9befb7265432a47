"""`sage-moe plan` as a user runs it: from every kind of source, for one machine and for several."""

from __future__ import annotations

import io
import json
import shlex
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import pytest

from benchmarks.random_store import QWEN3_30B_A3B
from cluster.errors import RouterTooSmall
from cluster.model_sizes import measure_model
from extraction.quantised_parts import NOT_QUANTISED
from gateway.cli import main
from gateway.http.api_keys import NO_KEYS
from gateway.planning.nodes import Workload, plan_topology, router_memory
from gateway.planning.nodes_file import NodeEntry, NodesFile
from gateway.planning.source import read_model
from gateway.service.option_values import merge_values
from gateway.service.options import compose_options
from tests.hub_stand_in import COMMIT, running_hub

THREE = """
router: desktop
nodes:
  - {name: desktop, memory: 30GiB, cores: 16, speed: 35GB/s}
  - {name: server, memory: 48GiB, speed: 60GB/s, bandwidth: 10Gb/s, round-trip: 0.1ms, disk: 200GiB}
  - {name: laptop, memory: 14GiB, round-trip: 0.4ms, disk: 50GiB}
"""


def _run(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> tuple[int, str, str]:
    stdout, stderr = io.StringIO(), io.StringIO()
    monkeypatch.setattr(sys, "argv", ["sage-moe", *arguments])
    monkeypatch.setenv("COLUMNS", "120")
    with redirect_stdout(stdout), redirect_stderr(stderr):
        try:
            main()
            code = 0
        except SystemExit as end:
            code = int(end.code or 0)
    return code, stdout.getvalue(), stderr.getvalue()


def _report(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> dict[str, Any]:
    code, stdout, stderr = _run(monkeypatch, "plan", *arguments, "--json")
    assert code == 0, stderr
    report: dict[str, Any] = json.loads(stdout)
    return report


@pytest.fixture
def published(tmp_path: Path) -> Path:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(QWEN3_30B_A3B | {"torch_dtype": "bfloat16"}))
    return path


@pytest.fixture
def three(tmp_path: Path) -> Path:
    path = tmp_path / "nodes.yaml"
    path.write_text(THREE)
    return path


def test_parts_that_see_hear_and_speak_are_counted(
    omni_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, stdout, stderr = _run(monkeypatch, "plan", str(omni_checkpoint))
    assert code == 0, stderr
    assert "images and sound" in stdout and "speech" in stdout
    memory = _report(monkeypatch, str(omni_checkpoint))["router_memory"]
    assert memory["media_bytes"] > 0 and memory["speech_bytes"] > 0
    silent = _report(monkeypatch, str(omni_checkpoint), "--no-speech")
    assert silent["router_memory"]["speech_bytes"] == 0
    assert silent["router_memory"]["media_bytes"] == memory["media_bytes"]
    assert silent["commands"][0].endswith(" --no-speech")


def test_bundled_model_fits_this_machine_and_is_started_by_the_printed_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    code, stdout, stderr = _run(monkeypatch, "plan", "stories")
    assert code == 0, stderr
    assert "fits: every expert is in memory" in stdout
    command = shlex.split(stdout.strip().splitlines()[-1])
    assert command[:3] == ["sage-moe", "serve", "stories"]
    code, stdout, stderr = _run(monkeypatch, *command[1:], "--dry-run", "--json")
    assert code == 0, stderr
    plan = json.loads(stdout)["options"]
    assert (plan["max-model-len"], plan["max-num-seqs"]) == (2048, 1)


def test_one_machine_is_told_nothing_of_others(
    monkeypatch: pytest.MonkeyPatch, published: Path, three: Path
) -> None:
    _, alone, _ = _run(monkeypatch, "plan", "stories")
    _, spread, _ = _run(monkeypatch, "plan", str(published), "--nodes", str(three))
    for words in ("messages:", "on one machine only", "whole layers to machines", "calls", "network alone"):
        assert words not in alone
        assert words in spread
    assert "1 stream of 2048 tokens" in alone


def test_printed_cache_is_what_the_service_then_takes(
    monkeypatch: pytest.MonkeyPatch, stories_store: Path
) -> None:
    report = _report(monkeypatch, str(stories_store), "--context", "512", "--streams", "3")
    command = shlex.split(report["commands"][-1])
    code, stdout, stderr = _run(monkeypatch, *command[1:], "--dry-run", "--json")
    assert code == 0, stderr
    (router,) = json.loads(stdout)["memory"]["processes"]
    assert router["kv_bytes"] == report["router_memory"]["kv_bytes"]
    assert router["backbone_bytes"] == report["router_memory"]["backbone_bytes"]
    assert router["expert_bytes"] == report["total_expert_bytes"]


def test_every_kind_of_source_gives_the_same_numbers(
    monkeypatch: pytest.MonkeyPatch, stories_checkpoint: Path, stories_store: Path, tmp_path: Path
) -> None:
    nodes = tmp_path / "nodes.yaml"
    nodes.write_text("nodes: [{name: a, memory: 4GiB}]")
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    sources = [stories_checkpoint, stories_checkpoint / "config.json", stories_store]
    reports = [_report(monkeypatch, str(source), "--nodes", str(nodes)) for source in sources]
    with running_hub({"acme/stories": stories_checkpoint}) as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        reports.append(_report(monkeypatch, f"acme/stories@{COMMIT}", "--nodes", str(nodes)))
        assert hub.downloads() == ["config.json"]
    for report in reports[1:]:
        for name in ("experts", "num_experts", "expert_bytes", "router_memory", "forecast"):
            assert report[name] == reports[0][name]
    assert reports[-1]["commands"][-1].startswith(f"sage-moe serve acme/stories@{COMMIT} ")


def test_published_model_is_spread_over_three_uneven_machines(
    monkeypatch: pytest.MonkeyPatch, published: Path, three: Path
) -> None:
    report = _report(monkeypatch, str(published), "--nodes", str(three))
    nodes = {node["node"]: node for node in report["nodes"]}
    assert sum(node["num_experts"] for node in nodes.values()) == 6144
    assert all(node["left_bytes"] >= 0 for node in nodes.values())
    assert (
        nodes["server"]["num_experts"] > nodes["desktop"]["num_experts"] > nodes["laptop"]["num_experts"] > 0
    )
    assert nodes["desktop"]["messages"] == 0
    assert report["verdict"].startswith("fits")
    assert report["num_unsafe"] == 0
    low, high = report["forecast"]["tokens_per_s"]
    assert 0 < low < high
    assert report["other_grouping"]["traffic"]["messages"] < report["forecast"]["traffic"]["messages"]


def test_table_names_every_machine_and_fits_a_terminal(
    monkeypatch: pytest.MonkeyPatch, published: Path, three: Path
) -> None:
    code, stdout, _ = _run(monkeypatch, "plan", str(published), "--nodes", str(three), "--quantize", "int4")
    assert code == 0
    assert all(name in stdout for name in ("desktop", "(router)", "server", "laptop", "Machines"))
    assert "sage-moe extract CHECKPOINT STORE --quantize int4 --group-size 32" in stdout
    assert "sage-moe serve STORE --kv-budget" in stdout


def test_lone_copies_are_named_as_not_safe(
    monkeypatch: pytest.MonkeyPatch, published: Path, tmp_path: Path
) -> None:
    text = THREE.replace("speed: 35GB/s}", "speed: 35GB/s, has-store: false, disk: 30GiB}")
    path = tmp_path / "nodes.yaml"
    path.write_text(text)
    report = _report(monkeypatch, str(published), "--nodes", str(path))
    assert report["num_unsafe"] > 0
    assert any(
        note.startswith(f"not failover-safe: {report['num_unsafe']} experts") for note in report["notes"]
    )


def test_less_memory_than_experts_runs_from_disk_and_says_how_much(
    monkeypatch: pytest.MonkeyPatch, published: Path, tmp_path: Path
) -> None:
    path = tmp_path / "nodes.yaml"
    path.write_text("nodes: [{name: a, memory: 24GiB}]")
    report = _report(monkeypatch, str(published), "--nodes", str(path))
    assert report["verdict"].startswith("runs from disk: 29% of the experts")
    assert report["forecast"]["miss_rate"] == pytest.approx(0.7, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["nowhere"], "is no store or checkpoint folder"),
        (["stories", "--context", "4096"], "--context must be at most the model's 2048"),
        (["stories", "--grouping", "row"], "--grouping must be expert or layer"),
        (["stories", "--dtype", "float64"], "--dtype must be float32 or bfloat16"),
        (["stories", "--trace", "nowhere.parquet"], "nowhere.parquet"),
        (["stories", "--nodes", "nowhere.yaml"], "nowhere.yaml"),
    ],
)
def test_mistake_is_one_line(monkeypatch: pytest.MonkeyPatch, arguments: list[str], complaint: str) -> None:
    code, stdout, stderr = _run(monkeypatch, "plan", *arguments)
    assert (code, stdout) == (1, "")
    assert complaint in stderr
    assert stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["--quantize", "int2"], "int2"),
        (["--quantize", "int8", "--group-size", "32"], "--group-size"),
        (["--quantize-head", "int4", "--group-size", "31"], "--group-size"),
    ],
)
def test_quantisation_that_cannot_be_is_refused_as_usage(
    monkeypatch: pytest.MonkeyPatch, arguments: list[str], complaint: str
) -> None:
    code, stdout, stderr = _run(monkeypatch, "plan", "stories", *arguments)
    assert (code, stdout) == (2, "")
    assert complaint in stderr


def test_quantised_parts_are_planned_as_the_store_that_the_printed_command_makes_them(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    nodes = tmp_path / "nodes.yaml"
    nodes.write_text("nodes: [{name: a, memory: 4GiB}]")
    parts = [
        "--quantize",
        "int4",
        "--quantize-backbone",
        "int8",
        "--quantize-head",
        "int4",
        "--group-size",
        "64",
    ]
    ahead = _report(monkeypatch, "stories", *parts, "--nodes", str(nodes))
    words = shlex.split(ahead["commands"][0])
    assert words[:4] == ["sage-moe", "extract", "stories", "STORE"]
    store = tmp_path / "store"
    assert _run(monkeypatch, "extract", "stories", str(store), *words[4:])[0] == 0
    made = _report(monkeypatch, str(store), "--nodes", str(nodes))
    assert ahead["quantization"] == made["quantization"] == "int4-g64+backbone-int8+head-int4-g64"
    for name in ("experts", "expert_bytes", "router_memory", "nodes", "forecast"):
        assert made[name] == ahead[name]
    plain = _report(monkeypatch, "stories", "--nodes", str(nodes))
    assert plain["quantization"] is None
    assert plain["forecast"]["backbone_s"] > ahead["forecast"]["backbone_s"]


def test_hostile_configuration_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for content in (
        "[]",
        "{",
        '{"model_type": "qwen3_moe"}',
        json.dumps(QWEN3_30B_A3B | {"num_experts": 10**9}),
    ):
        path = tmp_path / "config.json"
        path.write_text(content)
        code, _, stderr = _run(monkeypatch, "plan", str(path))
        assert code == 1
        assert stderr.startswith("error: ") and stderr.count("\n") == 1


def test_machine_without_room_for_the_router_is_refused_with_both_numbers() -> None:
    model = measure_model(QWEN3_30B_A3B, read_model("stories", None, NOT_QUANTISED).sizes.dtype)
    file = NodesFile.model_construct(
        router="a", nodes=(NodeEntry.model_construct(name="a", memory=4 << 30, cores=2),)
    )
    workload = Workload(4096, 1)
    needed = router_memory(model, workload, 4 << 30).total_bytes
    with pytest.raises(
        RouterTooSmall, match=rf"a cannot run the router: {needed} bytes .* {4 << 30} are there"
    ):
        plan_topology(file, model, workload)


def test_trace_tells_which_experts_are_worth_their_memory(
    monkeypatch: pytest.MonkeyPatch, stories_store: Path, tmp_path: Path
) -> None:
    trace, nodes = tmp_path / "trace.parquet", tmp_path / "nodes.yaml"
    arguments = ["generate", str(stories_store), "--prompt", "Once upon a time", "--max-tokens", "40"]
    code, _, stderr = _run(monkeypatch, *arguments, "--trace", str(trace))
    assert code == 0, stderr
    model = read_model(str(stories_store), None, NOT_QUANTISED).sizes
    beside = router_memory(model, Workload(2048, 1), 0).total_bytes
    memory_kib = (
        (beside + model.total_expert_bytes // 4) * 10 // 9 // 1024
    )  # less the tenth that is left free
    nodes.write_text(f"nodes: [{{name: a, memory: {memory_kib}KiB}}]")
    even = _report(monkeypatch, str(stories_store), "--nodes", str(nodes))
    traced = _report(monkeypatch, str(stories_store), "--nodes", str(nodes), "--trace", str(trace))
    assert even["forecast"]["miss_rate"] == pytest.approx(0.75, abs=0.02)
    assert traced["forecast"]["miss_rate"] < even["forecast"]["miss_rate"] - 0.02


def test_trace_of_another_model_is_refused(
    monkeypatch: pytest.MonkeyPatch, published: Path, three: Path, tmp_path: Path
) -> None:
    trace = tmp_path / "trace.parquet"
    arguments = ["generate", "stories", "--prompt", "Once", "--max-tokens", "2", "--trace", str(trace)]
    assert _run(monkeypatch, *arguments)[0] == 0
    code, _, stderr = _run(monkeypatch, "plan", str(published), "--nodes", str(three), "--trace", str(trace))
    assert code == 1
    assert "is of another model" in stderr


def test_command_for_several_machines_is_one_that_serve_takes_and_starts_this_plan(
    monkeypatch: pytest.MonkeyPatch, published: Path, three: Path
) -> None:
    report = _report(
        monkeypatch, str(published), "--nodes", str(three), "--grouping", "layer", "--streams", "3"
    )
    words = shlex.split(report["commands"][-1])
    assert words[:3] == ["sage-moe", "serve", "CHECKPOINT"]
    names = [word.removeprefix("--") for word in words[3::2]]
    given: dict[str, Any] = dict(zip(names, words[4::2], strict=True))
    given |= {name: int(given[name]) for name in ("max-model-len", "max-num-seqs")}
    options = compose_options(merge_values(given, {}, ""), Path("store"), "m", NO_KEYS)
    assert (options.ray_address, options.is_placed) == ("auto", True)
    assert (options.grouping, options.max_num_seqs, options.max_model_len) == ("layer", 3, 4096)
    assert options.store_cache is not None, "two of the machines have to fetch"
    assert any("serve measures the machines itself" in note for note in report["notes"])


def test_machines_are_described_or_asked(monkeypatch: pytest.MonkeyPatch, three: Path) -> None:
    code, _, stderr = _run(monkeypatch, "plan", "stories", "--nodes", str(three), "--address", "auto")
    assert code == 1
    assert "give one of the two" in stderr
