"""Where the service keeps what it has learned, between one start and the next."""

from __future__ import annotations

import os
from pathlib import Path

from extraction.errors import PathRefused


def resolve_state_folder(chosen: str | None = None) -> Path:
    """`--state-dir`, else `$XDG_STATE_HOME/sage-moe`, else `~/.local/state/sage-moe`; absolute, need not exist.

    Raises PathRefused where there is no home folder.
    """
    if chosen:
        return Path(chosen).absolute()
    state = os.environ.get("XDG_STATE_HOME", "")
    if os.path.isabs(state):  # others are to be ignored, says the XDG base directory specification
        return Path(state) / "sage-moe"
    try:
        return Path.home() / ".local" / "state" / "sage-moe"
    except RuntimeError as error:
        raise PathRefused("~", "is no home folder to keep state in; name one with --state-dir") from error
