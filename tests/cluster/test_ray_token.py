"""Ray's token, found where Ray looks for it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.errors import TokenUnusable
from cluster.ray_token import find_token


def _file(path: Path, content: bytes, mode: int = 0o600) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(mode)
    return path


def test_variable_goes_before_named_file_before_usual_file(tmp_path: Path) -> None:
    usual = _file(tmp_path / ".ray" / "auth_token", b"usual\n")
    named = _file(tmp_path / "named", b"named")
    both = {"RAY_AUTH_TOKEN": " variable ", "RAY_AUTH_TOKEN_PATH": str(named)}
    found = [
        find_token(environment, tmp_path) for environment in (both, {"RAY_AUTH_TOKEN_PATH": str(named)}, {})
    ]
    assert [token.value for token in found if token] == ["variable", "named", "usual"]
    assert [token.source for token in found if token] == ["RAY_AUTH_TOKEN", str(named), str(usual)]


def test_nothing_there_is_no_token(tmp_path: Path) -> None:
    assert find_token({}, tmp_path) is None


@pytest.mark.parametrize(
    ("mode", "is_private"), [(0o600, True), (0o400, True), (0o640, False), (0o604, False)]
)
def test_file_s_mode_tells_who_may_read_it(tmp_path: Path, mode: int, is_private: bool) -> None:
    path = _file(tmp_path / "token", b"secret", mode)
    token = find_token({"RAY_AUTH_TOKEN_PATH": str(path)}, tmp_path)
    assert token is not None
    assert token.is_private == is_private
    assert "secret" not in repr(token)


@pytest.mark.parametrize(
    "content", [b"", b" \n", b"two words", b"line\nline", b"\xff\xfe", b"a\x1bb", b"x" * 5000]
)
def test_what_can_be_no_token_is_refused_without_being_shown(tmp_path: Path, content: bytes) -> None:
    path = _file(tmp_path / "token", content)
    with pytest.raises(TokenUnusable) as refused:
        find_token({"RAY_AUTH_TOKEN_PATH": str(path)}, tmp_path)
    assert str(path) in str(refused.value)
    assert "words" not in str(refused.value)


def test_named_file_that_is_not_there_and_a_fifo_are_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "fifo")
    for name in ("none", "fifo", "."):
        with pytest.raises(TokenUnusable, match="Ray's token"):
            find_token({"RAY_AUTH_TOKEN_PATH": str(tmp_path / name)}, tmp_path)
