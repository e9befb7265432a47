"""`--config FILE`: a YAML mapping of option names to values, read with limits. Says nothing about what they mean.

Called by `gateway.serve_command`; `gateway.service_options` checks names and values.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import yaml

from gateway.errors import ConfigFileInvalid

MAX_FILE_BYTES = 64 * 1024
MAX_NODES = 2000
"""Values, keys and brackets. Aliases are refused, so the document cannot grow beyond what is written."""


def read_config(path: Path) -> dict[str, Any]:
    """Raises ConfigFileInvalid."""
    text = _read(path)
    try:
        _check_shape(text, path)
        value = yaml.load(text, Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}" if mark else ""
        raise ConfigFileInvalid(str(path), f"is not valid YAML{where}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigFileInvalid(str(path), "is not valid YAML") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise ConfigFileInvalid(
            str(path), "must be a mapping of option names to values, such as 'port: 8000'"
        )
    return value


def is_private(path: Path) -> bool:
    """Whether only the owner, and perhaps a group, may read or change the file."""
    return not os.stat(path).st_mode & stat.S_IRWXO


def _read(path: Path) -> str:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "no such path"
        raise ConfigFileInvalid(str(path), f"cannot be read: {reason}") from error
    with open(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
            raise ConfigFileInvalid(str(path), "is no regular file")
        content = file.read(MAX_FILE_BYTES + 1)
    if len(content) > MAX_FILE_BYTES:
        raise ConfigFileInvalid(str(path), f"is larger than {MAX_FILE_BYTES} bytes")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ConfigFileInvalid(str(path), f"is not UTF-8 at byte {error.start}") from error


def _check_shape(text: str, path: Path) -> None:
    """Walks the events, which builds nothing."""
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise ConfigFileInvalid(str(path), f"uses an alias (*{event.anchor}); write the value out")
        if number > MAX_NODES:
            raise ConfigFileInvalid(str(path), f"has more than {MAX_NODES} values")


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, but a key that comes twice is an error: readers differ in which one they take."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(problem=f"{name} comes twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)
