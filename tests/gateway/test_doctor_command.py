"""`sage-moe doctor` and `sage-moe join` as far as they go without a Ray."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

from cluster import local_ray
from cluster.errors import ClusterError
from cluster.findings import failure, ok, warning
from gateway.cli import app
from gateway.errors import OptionInvalid
from gateway.operations.doctor_view import Examination, render
from tests.cluster.fake_head import FakeHead, listening
from tests.cluster.machines import node


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """No Ray on this machine, whatever else runs here, and a token of the user's own. Returns its file."""
    monkeypatch.setattr(local_ray, "local_rays", list)
    monkeypatch.setattr("cluster.joining.local_rays", list)
    token = tmp_path / "token"
    token.write_text("right")
    token.chmod(0o600)
    monkeypatch.delenv("RAY_AUTH_TOKEN", raising=False)
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", str(token))
    return token


def _run(*arguments: str) -> Result:
    return CliRunner().invoke(app, list(arguments))


def _examined(*arguments: str) -> tuple[int, Any]:
    result = _run("doctor", *arguments, "--json")
    return result.exit_code, json.loads(result.stdout)


def test_doctor_without_a_ray_looks_at_this_machine_alone() -> None:
    _, found = _examined()
    whats = [finding["what"] for finding in found["findings"]]
    assert any(what.startswith("no Ray runs on this machine") for what in whats)
    assert any("of memory" in what or "memory are free" in what for what in whats)
    assert (found["head"], found["nodes"]) == (None, [])


def test_doctor_names_the_mend_of_a_token_that_others_may_read(alone: Path) -> None:
    alone.chmod(0o644)
    result = _run("doctor")
    assert f"-> chmod 600 {alone}" in result.stdout


@pytest.mark.parametrize(
    ("token", "words"), [("other", "is not the cluster's"), (None, "token authentication is off")]
)
def test_doctor_of_a_head_that_would_not_work_exits_with_1(token: str | None, words: str) -> None:
    with listening(FakeHead(token)) as address:
        code, found = _examined(address)
    assert code == 1 and found["has_failed"]
    failed = [finding["what"] for finding in found["findings"] if finding["level"] == "failure"]
    assert any(words in what for what in failed)
    assert "right" not in json.dumps(found["head"])


def test_doctor_from_outside_compares_versions_and_says_how_to_join() -> None:
    with listening(FakeHead("right")) as address:
        _, found = _examined(address)
    assert found["head"]["ray_version"] == "2.60.0"
    assert any(finding["mend"].startswith(f"sage-moe join {address}") for finding in found["findings"])


def test_findings_are_shown_with_their_mends_and_safe_names() -> None:
    findings = (ok("a", "fine"), warning("node\x1b[2J", "slow", "buy"), failure("b", "broken", "mend it"))
    text = render(Examination(findings))
    assert "\x1b" not in text
    assert "-> mend it" in text
    assert text.endswith("1 failure, 1 warning\n")
    assert render(Examination(findings[:1])).endswith("all is well\n")


def test_examination_is_plain_json() -> None:
    found = Examination((ok("a", "fine"),), None, (node(),)).as_json()
    assert json.loads(json.dumps(found))["nodes"][0]["link"]["round_trip_s"] == 80e-6


def _refusal(*arguments: str) -> str:
    result = _run("join", *arguments)
    assert isinstance(result.exception, ClusterError | OptionInvalid), result.exception
    return str(result.exception)


def test_join_refuses_before_ray_is_started(alone: Path, free_port: int) -> None:
    assert "Connection refused" in _refusal(f"127.0.0.1:{free_port}")
    assert "is no HOST" in _refusal("head:port")
    assert "--memory" in _refusal("head", "--memory", "much")
    assert "--labels" in _refusal("head", "--labels", "x")
    with listening(FakeHead("other")) as address:
        assert "is not the cluster's" in _refusal(address)
    with listening(FakeHead("right")) as address:
        assert "3.10.1 at the head" in _refusal(address)
    alone.unlink()
    assert "cannot be read" in _refusal(f"127.0.0.1:{free_port}")
