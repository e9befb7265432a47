"""Compiles the products of `native/` into one shared library beside their source, where there is a compiler.

Run by the build hook (`hatch_build.py`) at every install, and by hand in a checkout: `python experts/native_build.py`.
Needs the standard library only. Without a compiler nothing is built, and PyTorch's products are used.
"""

from __future__ import annotations

import logging
import os
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

SOURCES = Path(__file__).parent / "native"
LIBRARY = SOURCES / "_products.so"
FLAGS = ("-O3", "-std=gnu11", "-shared", "-fPIC", "-ffp-contract=off", "-Wno-psabi")
"""No contraction: which operations are rounded together is written down, not left to the compiler."""
COMPILE_TIMEOUT_S = 300.0

logger = logging.getLogger(__name__)


def build(environment: Mapping[str, str] = os.environ, library: Path = LIBRARY) -> Path | None:
    """The library, made anew, or None where it cannot be made; then an older one is gone.

    environment: `CC` names a compiler that is tried first.
    """
    compilers = [environment.get("CC", ""), "cc", "gcc", "clang"]
    for compiler in dict.fromkeys(filter(None, compilers)):
        if shutil.which(compiler) and _compile(compiler, library):
            return library
    library.unlink(missing_ok=True)
    logger.warning("no C compiler here could build experts/native: PyTorch's products will be used")
    return None


def _compile(compiler: str, library: Path) -> bool:
    """Whole or not at all: a process that has the old one mapped keeps it."""
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        command = [compiler, *FLAGS, *map(str, sorted(SOURCES.glob("*.c"))), "-o", str(made)]
        try:
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S)
        except (OSError, subprocess.SubprocessError) as error:
            logger.warning("%s: %s", compiler, getattr(error, "stderr", None) or error)
            return False
        os.replace(made, library)
    return True


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if found := build():
        logger.info("built %s", found)
