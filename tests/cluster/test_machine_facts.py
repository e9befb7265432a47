"""What a machine says of itself."""

from __future__ import annotations

from pathlib import Path

import pytest

from cluster import machine_facts


@pytest.mark.parametrize(
    "source", ["experts/worker.py", "experts/native/products.c", "experts/native/rows.h"]
)
def test_change_of_any_source_changes_the_digest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    path = tmp_path / source
    path.parent.mkdir(parents=True)
    path.write_text("one")
    monkeypatch.setattr(machine_facts, "__file__", str(tmp_path / "cluster" / "machine_facts.py"))
    before = machine_facts.code_digest.__wrapped__()
    path.write_text("another")
    assert machine_facts.code_digest.__wrapped__() != before
