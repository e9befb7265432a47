"""API keys: read once, kept and compared as SHA-256 digests, asked for on every path but /health.

A key is never part of a message, a log, a status or a dry run. Called by `gateway.service.command` (which keys there
are), `gateway.http.request_envelope` (whether a request has one) and the commands that are clients.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from gateway.errors import ApiError, KeysRefused
from gateway.text_file import read_text_file

KEYS_VARIABLE = "SAGE_MOE_API_KEYS"
"""Keys separated by commas or spaces. The service takes all of them, a client sends the first."""
MAX_KEY_CHARS = 512
MAX_KEYS = 1024
MAX_FILE_BYTES = 1024 * 1024
OPEN_PATH = "/health"
OWNER_CHARS = 32
_KEY = re.compile(r"[!-+\--~]+")
"""Visible ASCII without the comma, which separates keys in the variable."""
_SEPARATORS = re.compile(r"[,\s]+")


@dataclass(frozen=True, repr=False)
class KeyRing:
    """Digests of the keys that open the service. Without any, it is open to whoever reaches it."""

    digests: tuple[bytes, ...] = ()

    @classmethod
    def of(cls, keys: Iterable[str]) -> KeyRing:
        """Raises KeysRefused when there are too many."""
        digests = tuple(dict.fromkeys(_digest(key.encode("ascii")) for key in keys))
        if len(digests) > MAX_KEYS:
            raise KeysRefused("the keys", f"are {len(digests)}; at most {MAX_KEYS} are kept")
        return cls(digests)

    def __len__(self) -> int:
        return len(self.digests)

    def __repr__(self) -> str:
        return f"<{len(self)} keys>"

    def knows(self, key: bytes) -> bool:
        """Compares with every key, whichever matches, so that the time tells nothing about any of them."""
        digest, is_known = _digest(key), False
        for known in self.digests:
            is_known |= hmac.compare_digest(known, digest)
        return is_known


NO_KEYS = KeyRing()


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def check_key(scope: Mapping[str, Any], keys: KeyRing) -> str:
    """Returns a name of whoever has the key, which tells nothing of it; empty where no key is asked for.

    Raises ApiError 401. scope: of ASGI, type http.

    Only the exact path /health is open, as it was sent and as it is routed: no other spelling of it, whatever it
    would be routed to, and no other method than GET and HEAD.
    """
    if not keys or _is_open(scope):
        return ""
    sent = [value for name, value in scope["headers"] if name.lower() == b"authorization"]
    if not sent:
        raise _unauthorized("No API key was sent; send the header Authorization: Bearer KEY.")
    scheme, _, key = sent[0].partition(b" ")
    key = key.strip(b" \t")
    if len(sent) > 1 or scheme.lower() != b"bearer" or not keys.knows(key):
        raise _unauthorized("Incorrect API key provided.")
    return hashlib.sha256(b"owner" + _digest(key)).hexdigest()[:OWNER_CHARS]


def _is_open(scope: Mapping[str, Any]) -> bool:
    raw_path = scope.get("raw_path")
    return (
        scope["method"] in ("GET", "HEAD")
        and scope["path"] == OPEN_PATH
        and raw_path in (None, OPEN_PATH.encode())
        and scope.get("root_path", "") in ("", "/")
    )


def _unauthorized(message: str) -> ApiError:
    return ApiError(401, message, code="invalid_api_key")


def keys_of_option(value: str) -> list[str]:
    """What `--api-key` was given: a key, or `@FILE`. Raises KeysRefused."""
    return read_key_file(value[1:]) if value.startswith("@") else [_checked(value, "--api-key")]


def keys_of_environment(environment: Mapping[str, str]) -> list[str]:
    """Raises KeysRefused."""
    given = environment.get(KEYS_VARIABLE, "")
    return [_checked(key, KEYS_VARIABLE) for key in _SEPARATORS.split(given) if key]


def client_key(option: str | None, environment: Mapping[str, str]) -> str | None:
    """The key that a client sends: the option's, else the environment's first. Raises KeysRefused."""
    keys = keys_of_environment(environment) if option is None else keys_of_option(option)
    return keys[0] if keys else None


def bearer_headers(key: str | None) -> dict[str, str]:
    return {} if key is None else {"Authorization": f"Bearer {key}"}


def read_key_file(path: str) -> list[str]:
    """One key a line; blank lines and lines that begin with # are left out.

    Raises FileUnusable when it cannot be read; KeysRefused when everybody may read or change it, or it has no keys.
    """
    file = read_text_file(path, MAX_FILE_BYTES)
    if not file.is_private:
        raise KeysRefused(path, f"can be read or changed by everybody; run: chmod 600 {path}")
    lines = file.text.splitlines()
    keys = [
        _checked(line.strip(), f"{path}: line {number}")
        for number, line in enumerate(lines, start=1)
        if line.strip() and not line.strip().startswith("#")
    ]
    if not keys:
        raise KeysRefused(path, "holds no keys; write one a line")
    return keys


def _checked(key: str, source: str) -> str:
    """The key itself stays out of the message."""
    if len(key) > MAX_KEY_CHARS or not _KEY.fullmatch(key):
        reason = f"holds a key that is not 1 to {MAX_KEY_CHARS} visible ASCII characters without comma"
        raise KeysRefused(source, reason)
    return key
