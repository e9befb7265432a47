"""`sage-moe extract` and `inspect` as a user runs them when something is wrong: one line, exit code, nothing left."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from experts.store import ExpertStore
from extraction.errors import PathRefused
from extraction.extract import extract
from extraction.layouts import layout_for
from extraction.manifest import ROLES
from extraction.safetensors_file import write_header
from gateway.stores.source import resolve_store
from tests.checkpoints import SIZES
from tests.conftest import REPOSITORY

SLOW = """
import os, time, extraction.copying, gateway.cli
def wait(meter, nbytes):
    os.write(1, b"copying" + os.linesep.encode())
    time.sleep(0.1)
extraction.copying.Meter.add = wait
gateway.cli.main()
"""
"""The command, waiting after each tensor: more than a minute in all."""

BELIEVES_IN_SPACE = """
import extraction.atomic_folder, gateway.cli
free_bytes, answers = extraction.atomic_folder.free_bytes, [1 << 40]
extraction.atomic_folder.free_bytes = lambda folder: answers.pop() if answers else free_bytes(folder)
gateway.cli.main()
"""
"""The command, told at first that the disk is large, as if others filled it during the work."""


def _command(script: str, *arguments: str) -> list[str]:
    return [sys.executable, "-c", script, *arguments]


def _run(
    *arguments: str, script: str = "import gateway.cli; gateway.cli.main()", cwd: Path = REPOSITORY
) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "COLUMNS": "200"}
    return subprocess.run(
        _command(script, *arguments), capture_output=True, text=True, timeout=60, cwd=cwd, env=environment
    )


def _error(result: subprocess.CompletedProcess[str]) -> str:
    """The one line on stderr."""
    assert (result.returncode, result.stdout) == (1, ""), result.stderr
    assert result.stderr.startswith("error: ")
    assert result.stderr.endswith("\n")
    message = result.stderr.removeprefix("error: ")[:-1]
    assert message.isprintable()
    return message


def _missing_bytes(message: str) -> int:
    figures = re.search(r"the disk is full; (\d+) bytes needed, (\d+) free, (\d+) missing$", message)
    assert figures, message
    needed, free, missing = map(int, figures.groups())
    assert missing == needed - free > 0
    return missing


def test_disk_too_small_for_the_store_is_said_before_copying(mount_disk: Callable[[str], Path]) -> None:
    disk = mount_disk("size=8m")
    missing = _missing_bytes(_error(_run("extract", "stories", str(disk / "parent/store"))))
    assert missing > (31 - 8) << 20
    assert os.listdir(disk) == []


def test_disk_that_fills_up_while_copying_says_what_is_missing_and_is_left_empty(
    mount_disk: Callable[[str], Path],
) -> None:
    disk = mount_disk("size=8m")
    result = _run("extract", "stories", str(disk / "parent/store"), script=BELIEVES_IN_SPACE)
    assert _missing_bytes(_error(result)) > (31 - 8) << 20
    assert os.listdir(disk) == []


def test_store_that_just_fits_is_written(mount_disk: Callable[[str], Path]) -> None:
    disk = mount_disk("size=33m")
    assert _run("extract", "stories", str(disk / "store")).returncode == 0
    assert len(ExpertStore.open(disk / "store").expert_keys()) == 384


@pytest.mark.parametrize(
    ("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signal_while_copying_leaves_nothing(tmp_path: Path, number: signal.Signals, code: int) -> None:
    _interrupt(tmp_path / "parent/store", number, code)
    assert os.listdir(tmp_path) == []


def test_killed_extraction_leaves_only_what_is_hidden_and_the_next_one_works(tmp_path: Path) -> None:
    _interrupt(tmp_path / "store", signal.SIGKILL, -signal.SIGKILL)
    (left,) = os.listdir(tmp_path)
    assert re.fullmatch(r"\.store\.[0-9a-f]{8}\.partial", left)
    assert _run("extract", "stories", str(tmp_path / "store")).returncode == 0
    assert os.listdir(tmp_path) == ["store"]


def _interrupt(dest: Path, number: signal.Signals, code: int) -> None:
    with subprocess.Popen(
        _command(SLOW, "extract", "stories", str(dest)),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=REPOSITORY,
    ) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == "copying\n"
            process.send_signal(number)
            _, stderr = process.communicate(timeout=30)
        finally:
            process.kill()
    assert process.returncode == code, stderr
    assert stderr.count("\n") <= 1
    assert not dest.exists()


def test_source_and_destination_may_be_relative(tiny_checkpoint: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_checkpoint, tmp_path / "checkpoint")
    assert _run("extract", "checkpoint", "store", cwd=tmp_path).returncode == 0
    assert _run("extract", "./checkpoint", "x/index", "--index-only", cwd=tmp_path).returncode == 0
    store = ExpertStore.open(tmp_path / "x/index")
    assert store.manifest.source_root == str(tmp_path / "checkpoint")
    assert store.read_expert(store.expert_keys()[0]).numel()


@pytest.mark.parametrize(
    ("source", "reason"),
    [("x" * 5000, "is no checkpoint folder"), ("/dev/null", "is no checkpoint folder"), ("", "config.json")],
)
def test_source_that_is_no_folder_is_one_line(tmp_path: Path, source: str, reason: str) -> None:
    assert reason in _error(_run("extract", source, str(tmp_path / "store"), cwd=tmp_path))
    assert os.listdir(tmp_path) == []


def test_folder_whose_name_is_no_text_is_copied_but_not_indexed(
    tiny_checkpoint: Path, tmp_path: Path
) -> None:
    source = os.fsdecode(os.fsencode(tmp_path) + b"/\xff\x1b")
    shutil.copytree(tiny_checkpoint, source)
    assert "no UTF-8" in _error(_run("extract", source, str(tmp_path / "index"), "--index-only"))
    assert extract(Path(source), tmp_path / "store").num_experts == 16


def test_inspect_takes_a_path_literally(tiny_store: Path, tmp_path: Path) -> None:
    """Rich would take these brackets for markup and fail on the closing tag."""
    store = shutil.copytree(tiny_store, tmp_path / "[red]" / "x[/green]")
    shown = _run("inspect", str(store))
    assert (shown.returncode, shown.stderr) == (0, "")
    assert "[red]/x[/green]  (qwen3_moe, copied, float32)" in shown.stdout.replace("\n", "")


def test_inspect_of_an_endless_name_is_one_line(tmp_path: Path) -> None:
    result = _run("inspect", "x" * 5000)
    assert result.returncode == 1
    assert result.stderr.count("\n") == 1
    assert "Traceback" not in result.stderr


def test_user_without_a_home_is_told_how_to_name_a_cache(
    tiny_checkpoint: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", fail)
    monkeypatch.delenv("SAGE_MOE_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    with pytest.raises(PathRefused, match="set SAGE_MOE_CACHE"):
        resolve_store(str(tiny_checkpoint), announce=print)


def test_checkpoint_with_the_longest_name_gets_an_index(tiny_checkpoint: Path, tmp_path: Path) -> None:
    checkpoint = shutil.copytree(tiny_checkpoint, tmp_path / ("ü" * 127))
    root = resolve_store(str(checkpoint), announce=print, cache_dir=tmp_path / "cache")
    assert len(ExpertStore.open(root).expert_keys()) == 16


def test_extraction_of_a_large_checkpoint_takes_little_memory(tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Tensors of 24 MiB, 290 MiB in all; the shard is sparse and so takes no space itself."""
    source = tmp_path / "checkpoint"
    source.mkdir()
    sizes = {"hidden_size": 2048, "moe_intermediate_size": 3072, "num_experts": 8, "vocab_size": 512}
    _write_zeros(source, sizes)
    script = (
        "import resource, sys; from pathlib import Path; from extraction.extract import extract\n"
        "extract(Path(sys.argv[1]), Path(sys.argv[2]))\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "report = extract(Path(sys.argv[3]), Path(sys.argv[4]))\n"
        "after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "print(report.weight_bytes >> 20, after - before >> 10)\n"
    )
    small = [str(tiny_checkpoint), str(tmp_path / "small")]
    result = _run(*small, str(source), str(tmp_path / "large"), script=script)
    assert result.returncode == 0, result.stderr
    weights_mib, growth_mib = map(int, result.stdout.split())
    assert weights_mib > 280
    assert growth_mib < 40
    shutil.rmtree(tmp_path / "large")


def _write_zeros(source: Path, sizes: dict[str, int]) -> None:
    config = SIZES | sizes | {"model_type": "qwen3_moe", "num_hidden_layers": 1}
    (layout,) = layout_for(config).components
    assert layout.decoder is not None
    shapes = {
        f"model.{name}": shape for name, shape in layout.backbone_shapes.items() if name != "lm_head.weight"
    }
    shapes["lm_head.weight"] = layout.backbone_shapes["lm_head.weight"]
    for key in layout.experts:
        for role in ROLES:
            name = f"model.layers.{key.layer}.mlp.experts.{key.expert}.{role}_proj.weight"
            shapes[name] = layout.decoder.expert_shape(role)
    table = [(name, "BF16", shape, 2 * math.prod(shape)) for name, shape in shapes.items()]
    header = write_header(table)
    with open(source / "model.safetensors", "wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(nbytes for *_, nbytes in table))
    (source / "config.json").write_text(json.dumps(config))
