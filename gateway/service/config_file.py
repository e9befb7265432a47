"""`--config FILE`: a YAML mapping of option names to values, read with limits. Says nothing about what they mean.

Called by `gateway.service.command`; `gateway.service.option_values` checks names and values.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from gateway.errors import FileUnusable
from gateway.text_file import read_text_file

MAX_FILE_BYTES = 64 * 1024
MAX_DEPTH = 4
MAX_NODES = 2000
"""Values, keys and brackets. Aliases are refused, so the document cannot grow beyond what is written."""


def read_config(path: Path) -> dict[str, Any]:
    """Raises FileUnusable, also where the file holds a key and everybody may read it."""
    file = read_text_file(str(path), MAX_FILE_BYTES)
    value = _parse(file.text, path)
    if "api-key" in value and not file.is_private:
        raise FileUnusable(str(path), f"holds a key and can be read by everybody; run: chmod 600 {path}")
    return value


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        _check_shape(text, path)
        value = yaml.load(text, Loader=_UniqueKeys)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" at line {mark.line + 1}" if mark else ""
        raise FileUnusable(str(path), f"is not valid YAML{where}: {error.problem}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise FileUnusable(str(path), "is not valid YAML") from error
    if value is None:
        return {}
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise FileUnusable(str(path), "must be a mapping of option names to values, such as 'port: 8000'")
    return value


def _check_shape(text: str, path: Path) -> None:
    """Walks the events, which builds nothing."""
    depth = 0
    for number, event in enumerate(yaml.parse(text, Loader=yaml.SafeLoader)):
        if isinstance(event, yaml.AliasEvent):
            raise FileUnusable(str(path), f"uses an alias (*{event.anchor}); write the value out")
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if depth > MAX_DEPTH:
            raise FileUnusable(str(path), f"is nested deeper than {MAX_DEPTH} levels")
        if number > MAX_NODES:
            raise FileUnusable(str(path), f"has more than {MAX_NODES} values")


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, but a key that comes twice is an error: readers differ in which one they take."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
        for name in names:
            if names.count(name) > 1:
                raise yaml.MarkedYAMLError(problem=f"{name} comes twice", problem_mark=node.start_mark)
        return super().construct_mapping(node, deep)
