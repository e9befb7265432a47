"""What was learned about experts, shown, exported and forgotten from the command line."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from typer.testing import CliRunner, Result

from experts.store import ExpertStore
from experts.trust_ledger import TrustLedger, ledger_path
from extraction.errors import PathRefused
from gateway.cli import app
from gateway.errors import OptionInvalid
from gateway.service.state_folder import resolve_state_folder
from gateway.stores.trust_view import TrustRow
from router.loading import EngineOptions
from router.request import GenerationRequest, SamplingParams
from router.trust_options import TrustOptions
from router.trust_session import trust_identity
from tests.engines import open_engine, run_to_end


@pytest.fixture
def learned(tiny_store: Path, tmp_path: Path) -> Path:
    """A state folder in which something was learned about the tiny store."""
    folder = tmp_path / "state"
    loaded = open_engine(tiny_store, EngineOptions(trust=TrustOptions(str(folder), layers_a_look=1)))
    prompt = tuple(range(60))
    run_to_end(loaded.engine, [GenerationRequest("a", prompt, SamplingParams(max_tokens=20, seed=1))])
    loaded.close()
    return folder


def _run(*words: object) -> Result:
    return CliRunner().invoke(app, ["store", "trust", *map(str, words)])


def test_show_lists_both_ends_with_the_parts_of_their_scores(tiny_store: Path, learned: Path) -> None:
    result = _run("show", tiny_store, "--top", 3, "--state-dir", learned)
    assert result.exit_code == 0, result.output
    for word in ("Most trusted", "Least trusted", "convergence", "stability", "efficiency", "observations"):
        assert word in result.stdout
    assert "of 16 experts observed over 79 tokens" in result.stdout


def test_show_json_has_every_expert(tiny_store: Path, learned: Path) -> None:
    answer = json.loads(_run("show", tiny_store, "--json", "--state-dir", learned).stdout)
    assert answer["tokens"] == 79 and len(answer["store_hash"]) == 64
    experts = [TrustRow(**row) for row in answer["experts"]]
    assert [(row.layer, row.expert) for row in experts] == [
        (layer, expert) for layer in (0, 2) for expert in range(8)
    ]
    assert all(0 <= row.trust <= 1 for row in experts)
    assert len({row.trust for row in experts}) > 1


def test_show_of_a_store_that_was_never_served_says_so(tiny_store: Path, tmp_path: Path) -> None:
    result = _run("show", tiny_store, "--state-dir", tmp_path)
    assert result.exit_code == 0
    assert "nothing was learned yet" in result.stdout
    assert not list(tmp_path.iterdir()), "looking leaves nothing behind"


def test_exports_agree_in_all_formats(tiny_store: Path, learned: Path, tmp_path: Path) -> None:
    for suffix in ("json", "csv", "parquet"):
        result = _run("export", tiny_store, tmp_path / f"trust.{suffix}", "--state-dir", learned)
        assert result.exit_code == 0 and result.stdout.startswith("16 experts in ")
    rows = json.loads((tmp_path / "trust.json").read_text())["experts"]
    table = pq.read_table(tmp_path / "trust.parquet")
    assert table.to_pylist() == rows
    assert len(table.schema.metadata[b"store_hash"]) == 64
    with (tmp_path / "trust.csv").open(newline="") as file:
        assert [{name: str(value) for name, value in row.items()} for row in rows] == list(
            csv.DictReader(file)
        )
    assert sorted(path.name for path in tmp_path.glob("*trust.*")) == [
        "trust.csv",
        "trust.json",
        "trust.parquet",
    ]


@pytest.mark.parametrize("name", ["trust.xlsx", "trust", "missing/trust.json"])
def test_export_that_cannot_be_written_is_one_line(
    tiny_store: Path, learned: Path, tmp_path: Path, name: str
) -> None:
    result = _run("export", tiny_store, tmp_path / name, "--state-dir", learned)
    assert isinstance(result.exception, OptionInvalid)
    assert "\n" not in str(result.exception)


def test_reset_asks_and_then_forgets(tiny_store: Path, learned: Path) -> None:
    words = ["store", "trust", "reset", str(tiny_store), "--state-dir", str(learned)]
    assert CliRunner().invoke(app, words, input="n\n").exit_code == 1
    assert json.loads(_run("show", tiny_store, "--json", "--state-dir", learned).stdout)["tokens"] == 79
    assert "is forgotten" in CliRunner().invoke(app, words, input="y\n").stdout
    assert json.loads(_run("show", tiny_store, "--json", "--state-dir", learned).stdout)["tokens"] == 0
    assert "nothing is kept" in CliRunner().invoke(app, [*words, "--yes"]).stdout


def test_reset_while_a_service_runs_is_refused(tiny_store: Path, learned: Path) -> None:
    store = ExpertStore.open(tiny_store)
    ledger = TrustLedger(ledger_path(learned, store.hash), trust_identity(store))
    result = _run("reset", tiny_store, "--yes", "--state-dir", learned)
    ledger.close()
    store.close()
    assert "another process keeps this trust ledger" in str(result.exception)


def test_component_without_experts_is_refused(tiny_store: Path, learned: Path) -> None:
    result = _run("show", tiny_store, "--component", "vision", "--state-dir", learned)
    assert "vision" in str(result.exception)


def test_state_folder_is_the_chosen_one_then_xdg_then_home(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("XDG_STATE_HOME", "/var/state")
    assert resolve_state_folder("/srv/state") == Path("/srv/state")
    assert resolve_state_folder("state") == Path.cwd() / "state"
    assert resolve_state_folder() == Path("/var/state/sage-moe")
    for useless in ("", "relative/state"):
        monkeypatch.setenv("XDG_STATE_HOME", useless)
        assert resolve_state_folder() == tmp_path / ".local" / "state" / "sage-moe"


def test_state_folder_without_a_home_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("XDG_STATE_HOME", raising=False)

    def no_home() -> Path:
        raise RuntimeError("no home")

    monkeypatch.setattr(Path, "home", no_home)
    with pytest.raises(PathRefused, match="--state-dir"):
        resolve_state_folder()
