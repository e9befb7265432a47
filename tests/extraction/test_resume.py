"""What a killed extraction has done is not done again, and never changes the result."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from extraction import atomic_folder
from extraction.errors import CheckpointDamaged, PathRefused
from extraction.extract import extract
from extraction.journal import JOURNAL_NAME, Journal, is_journal_of
from extraction.selection import Selection
from tests.checkpoints import write_tiny_qwen3_moe
from tests.conftest import REPOSITORY


def test_killed_runs_end_in_the_same_store_and_repeat_at_most_one_file_each(tmp_path: Path) -> None:
    """A dozen kills; `make chaos` does a hundred."""
    sizes = {"hidden_size": 128, "moe_intermediate_size": 64}
    checkpoint = write_tiny_qwen3_moe(tmp_path / "checkpoint", shard_size="300KB", **sizes)
    command = [sys.executable, "-m", "tests.chaos.extract_kills", str(checkpoint), "--kills", "12"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["kills"] >= 12
    assert outcome["resumed"] > 0


@pytest.fixture
def killed(sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The workspace of an extraction to `store` that was killed after all steps but the last."""
    steps = []
    add = Journal.add

    def die_late(journal: Journal, step: str, digests: dict[str, str]) -> None:
        steps.append(step)
        if len(steps) == 12:
            shutil.copytree(tmp_path, tmp_path.parent / "saved", symlinks=True)
            raise KeyboardInterrupt
        add(journal, step, digests)

    monkeypatch.setattr(Journal, "add", die_late)
    with pytest.raises(KeyboardInterrupt):
        extract(sharded, tmp_path / "store")
    monkeypatch.setattr(Journal, "add", add)
    assert os.listdir(tmp_path) == []
    for path in (tmp_path.parent / "saved").iterdir():
        shutil.move(path, tmp_path)
    (tmp_path.parent / "saved").rmdir()
    (workspace,) = tmp_path.iterdir()
    return workspace


def _hashes(root: Path) -> dict[str, str]:
    files = [path for path in sorted(root.rglob("*")) if path.is_file()]
    return {str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def undisturbed(sharded: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("undisturbed") / "store"
    extract(sharded, root)
    return _hashes(root)


def _flip(path: Path, offset: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[offset] ^= 1
    path.write_bytes(raw)


def _damage_a_weight(workspace: Path) -> None:
    path = min((workspace / "store/experts").iterdir())
    _flip(path, path.stat().st_size // 3)


def _damage_a_header(workspace: Path) -> None:
    _flip(min((workspace / "store/experts").iterdir()), 9)


def _cut_a_file(workspace: Path) -> None:
    path = min((workspace / "store/experts").iterdir())
    os.truncate(path, 5000)


def _remove_a_file(workspace: Path) -> None:
    min((workspace / "store/experts").iterdir()).unlink()


def _tear_the_journal(workspace: Path) -> None:
    path = workspace / JOURNAL_NAME
    path.write_bytes(path.read_bytes()[:-100])


def _lie_in_the_journal(workspace: Path) -> None:
    lines = (workspace / JOURNAL_NAME).read_text().splitlines()
    entry = json.loads(lines[1])
    entry["digests"] = dict.fromkeys(entry["digests"], "0" * 64)
    (workspace / JOURNAL_NAME).write_text("\n".join([lines[0], json.dumps(entry), *lines[2:]]) + "\n")


def _append_nonsense(workspace: Path) -> None:
    with open(workspace / JOURNAL_NAME, "ab") as file:
        file.write(b'[]\n{"step": 1}\n' + bytes(4096))


def _leave_as_it_is(workspace: Path) -> None:
    """A kill and nothing more."""


DAMAGE = [
    _leave_as_it_is,
    _damage_a_weight,
    _damage_a_header,
    _cut_a_file,
    _remove_a_file,
    _tear_the_journal,
    _lie_in_the_journal,
    _append_nonsense,
]


@pytest.mark.parametrize("damage", DAMAGE)
def test_what_was_damaged_after_a_kill_is_written_again(
    killed: Path,
    sharded: Path,
    tmp_path: Path,
    undisturbed: dict[str, str],
    damage: Callable[[Path], None],
) -> None:
    damage(killed)
    report = extract(sharded, tmp_path / "store")
    assert 0 < report.resumed_bytes < report.weight_bytes
    assert _hashes(tmp_path / "store") == undisturbed
    assert os.listdir(tmp_path) == ["store"]


def _touch_a_shard(checkpoint: Path) -> dict[str, object]:
    os.utime(min(checkpoint.glob("*.safetensors")), ns=(1, 1))
    return {}


def _edit_a_small_file(checkpoint: Path) -> dict[str, object]:
    (checkpoint / "tokenizer_config.json").write_text("{}")
    return {}


@pytest.mark.parametrize(
    "change",
    [
        _touch_a_shard,
        _edit_a_small_file,
        lambda checkpoint: {"dtype": "bfloat16"},
        lambda checkpoint: {"selection": Selection(layers=frozenset({1}))},
        lambda checkpoint: {"index_only": True},
    ],
)
def test_another_plan_removes_what_was_left(
    killed: Path, sharded: Path, tmp_path: Path, change: Callable[[Path], dict[str, object]]
) -> None:
    """The checkpoint is moved aside and copied back, so that it can be changed; times and path stay."""
    aside = tmp_path.parent / "aside"
    shutil.copytree(sharded, aside)
    try:
        report = extract(sharded, tmp_path / "store", **change(sharded))  # type: ignore[arg-type]
    finally:
        for path in aside.iterdir():
            shutil.copy2(path, sharded / path.name)
        shutil.rmtree(aside)
    assert report.resumed_bytes == 0
    assert os.listdir(tmp_path) == ["store"]


def test_files_of_the_workspace_are_never_followed_out_of_it(
    killed: Path, sharded: Path, tmp_path: Path
) -> None:
    precious = tmp_path.parent / "precious"
    precious.write_text("mine")
    victim = min((killed / "store/experts").iterdir())
    victim.unlink()
    victim.symlink_to(precious)
    with pytest.raises(PathRefused, match="store"):
        extract(sharded, tmp_path / "store")
    assert precious.read_text() == "mine"
    assert os.listdir(tmp_path) == []


def test_space_that_the_killed_run_took_counts_as_free(
    killed: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(atomic_folder, "free_bytes", lambda folder: 400_000)
    assert extract(sharded, tmp_path / "store").resumed_bytes > 0


def test_error_leaves_nothing_to_continue(
    killed: Path, sharded: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise CheckpointDamaged("shard", "is gone")

    monkeypatch.setattr("extraction.copying.Copier.copy", fail)
    with pytest.raises(CheckpointDamaged):
        extract(sharded, tmp_path / "store")
    assert os.listdir(tmp_path) == []


def test_journal_is_read_up_to_its_torn_tail_and_continued_behind_it(tmp_path: Path) -> None:
    journal = Journal(tmp_path, "key")
    journal.add("one", {"a": "1"})
    journal.add("two", {"b": "2"})
    journal.close()
    path = tmp_path / JOURNAL_NAME
    whole = path.read_bytes()
    for length in range(len(whole)):
        path.write_bytes(whole[:length])
        lines = whole[:length].count(b"\n")
        assert is_journal_of(tmp_path, "key") == (lines > 0)
        assert not is_journal_of(tmp_path, "other")
        again = Journal(tmp_path, "key")
        assert list(again.done) == ["one", "two"][: max(0, lines - 1)]
        again.add("three", {})
        again.close()
        reread = Journal(tmp_path, "key")
        assert list(reread.done)[-1] == "three"
        reread.close()
