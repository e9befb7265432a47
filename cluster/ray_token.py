"""Ray's authentication token, found where Ray itself looks for it. Reads one small file, and never shows the token.

Source of the order: Ray's own documentation of token authentication. Called by `cluster.head_probe`'s callers.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from cluster.errors import TokenUnusable

MODE_VARIABLE = "RAY_AUTH_MODE"
TOKEN_VARIABLE = "RAY_AUTH_TOKEN"
PATH_VARIABLE = "RAY_AUTH_TOKEN_PATH"
DEFAULT_FILE = Path(".ray") / "auth_token"
MAX_TOKEN_BYTES = 4096


@dataclass(frozen=True)
class Token:
    """source: the variable or file that it is from. mode: the file's permissions; None for a variable."""

    value: str = field(repr=False)
    source: str
    mode: int | None = None

    @property
    def is_private(self) -> bool:
        """Whether no other user of the machine may read it."""
        return self.mode is None or not self.mode & (stat.S_IRWXG | stat.S_IRWXO)


def find_token(environment: Mapping[str, str], home: Path) -> Token | None:
    """The token of this user: a variable's, the file's that a variable names, or the usual file's; None without any.

    Raises TokenUnusable for a file that is named and is not there, or for what can be no token.
    """
    if value := environment.get(TOKEN_VARIABLE, "").strip():
        return Token(_checked(value, TOKEN_VARIABLE), TOKEN_VARIABLE)
    if named := environment.get(PATH_VARIABLE, ""):
        return _read(Path(named))
    usual = home / DEFAULT_FILE
    return _read(usual) if os.path.lexists(usual) else None


def _read(path: Path) -> Token:
    try:
        with open(path, "rb", opener=_opened_without_waiting) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise TokenUnusable(str(path), "is no file")
            content = file.read(MAX_TOKEN_BYTES + 1)
    except OSError as error:
        raise TokenUnusable(str(path), f"cannot be read: {error.strerror}") from error
    if len(content) > MAX_TOKEN_BYTES:
        raise TokenUnusable(str(path), f"is longer than {MAX_TOKEN_BYTES} bytes")
    value = content.decode("ascii", errors="replace").strip()
    return Token(_checked(value, str(path)), str(path), stat.S_IMODE(status.st_mode))


def _opened_without_waiting(path: str, flags: int) -> int:
    """A FIFO would wait for somebody who writes."""
    return os.open(path, flags | os.O_NONBLOCK | os.O_CLOEXEC)


def _checked(value: str, source: str) -> str:
    """It travels in a header of HTTP/2: printable ASCII without spaces."""
    if not value:
        raise TokenUnusable(source, "is empty")
    if not all("!" <= character <= "~" for character in value):
        raise TokenUnusable(source, "holds what no token may: only printable ASCII, without spaces")
    return value
