"""Imports that let other processes go first."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from experts.polite_import import NICENESS, import_politely

pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="threads have a priority of their own on Linux"
)


def test_only_the_import_has_a_low_priority(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "told_niceness.py").write_text("import os\nNICENESS = os.getpriority(os.PRIO_PROCESS, 0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    before = os.getpriority(os.PRIO_PROCESS, 0)
    import_politely("told_niceness")
    seen = sys.modules.pop("told_niceness").NICENESS
    assert seen == max(before, NICENESS)
    assert os.getpriority(os.PRIO_PROCESS, 0) == before


def test_what_is_not_there_is_left_to_who_needs_it() -> None:
    import_politely("experts.no_such_module")
    assert "experts.no_such_module" not in sys.modules
