"""The secret that closes a weight server, in a file that only its owner can read. Called by `sage-moe store`."""

from __future__ import annotations

import os
import re
import secrets

from gateway.errors import SecretRefused
from gateway.text_file import read_text_file

MIN_CHARS = 32
"""A shorter one, or one that people make up, can be guessed by whoever heard a handshake."""
MAX_FILE_BYTES = 4096
_SECRET = re.compile(r"[\x21-\x7e]+")


def read_secret(path: str) -> bytes:
    """Raises FileUnusable or SecretRefused; the secret is in no message."""
    file = read_text_file(path, MAX_FILE_BYTES)
    if not file.is_private:
        raise SecretRefused(path, f"can be read or changed by everybody; run: chmod 600 {path}")
    secret = file.text.strip()
    if len(secret) < MIN_CHARS or not _SECRET.fullmatch(secret):
        raise SecretRefused(
            path, f"holds no secret of at least {MIN_CHARS} visible ASCII characters in one line"
        )
    return secret.encode("ascii")


def make_secret(path: str) -> bool:
    """Write a new secret where there is no such file. Returns whether it did. Raises SecretRefused."""
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except FileExistsError:
        return False
    except OSError as error:
        raise SecretRefused(path, f"cannot be made: {error.strerror}") from error
    with os.fdopen(descriptor, "w") as file:
        file.write(f"{secrets.token_hex(32)}\n")
    return True
