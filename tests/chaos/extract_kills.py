"""Kills extractions at random moments, lets the next run continue, and compares the store with an undisturbed one's.

Each kill may cost at most one file: the next run must begin no further back. `make chaos` runs it with 100 kills;
`tests/extraction/test_resume.py` with a few. The imports are paid once: every run is a fork of this process, which has
a single thread.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import struct
import tempfile
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NoReturn

from extraction.extract import extract, prepare
from extraction.store_files import source_bytes

MESSAGE = struct.Struct("<?Q")
"""Whether bytes were copied or found done, and how many are done in all."""


@dataclass
class Outcome:
    """What happened in all runs."""

    kills: int = 0
    finished: int = 0
    resumed: int = 0
    """Runs that found something done."""
    most_rework_bytes: int = 0


def main() -> None:
    """Print one JSON line; exit with an error where a promise was broken."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("checkpoint", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="kills-") as folder:
        outcome = kill_extractions(arguments.checkpoint, Path(folder), arguments.kills, arguments.seed)
    print(json.dumps(asdict(outcome) | {"seed": arguments.seed}))


def kill_extractions(checkpoint: Path, folder: Path, kills: int, seed: int) -> Outcome:
    """Raises AssertionError when a store differs, a run lost more than a file, or something is left behind."""
    chance, outcome = random.Random(seed), Outcome()
    _run(checkpoint, folder / "undisturbed", None, chance, 0)
    expected = _digests(folder / "undisturbed")
    layout = prepare(checkpoint).layout
    assert layout is not None
    sizes = [source_bytes(step.pieces) for step in layout.steps]
    dest, reached = folder / "store", 0
    while outcome.kills < kills:
        target = reached + int(chance.uniform(-0.2, 0.3) * sum(sizes))
        is_free = target > 1.1 * sum(sizes)
        run = _run(checkpoint, dest, None if is_free else target, chance, sum(sizes))
        outcome.kills += run.is_killed
        if run.has_copied:
            rework = reached - run.resumed_bytes
            assert rework <= max(sizes), f"{rework} bytes done again after a kill, a step has {max(sizes)}"
            outcome.most_rework_bytes = max(outcome.most_rework_bytes, rework)
            outcome.resumed += run.resumed_bytes > 0
            reached = run.reached_bytes
        if dest.exists():
            outcome.finished += 1
            assert _digests(dest) == expected, "the store differs from an undisturbed run's"
            shutil.rmtree(dest)
            reached = 0
    _run(checkpoint, dest, None, chance, 0)
    assert _digests(dest) == expected, "the store differs from an undisturbed run's"
    assert sorted(os.listdir(folder)) == ["store", "undisturbed"], os.listdir(folder)
    return outcome


@dataclass
class Run:
    """One extraction in a process of its own."""

    resumed_bytes: int = 0
    """What it found done and did not copy."""
    reached_bytes: int = 0
    has_copied: bool = False
    is_killed: bool = False


def _run(checkpoint: Path, dest: Path, target: int | None, chance: random.Random, total: int) -> Run:
    """Extract, and kill the process some time after `target` bytes; None lets it finish."""
    read_end, write_end = os.pipe()
    pid = os.fork()
    if pid == 0:
        _extract_and_exit(checkpoint, dest, write_end)
    os.close(write_end)
    run = Run()
    with open(read_end, "rb") as pipe:
        while message := pipe.read(MESSAGE.size):
            _note(run, message)
            if target is not None and not run.is_killed and run.reached_bytes >= min(target, total):
                # Beyond the last byte come synchronising, descriptions and the renaming.
                time.sleep(chance.uniform(0, 0.001 if target < total else 0.03))
                os.kill(pid, signal.SIGKILL)
                run.is_killed = True
    _, status = os.waitpid(pid, 0)
    run.is_killed = os.WIFSIGNALED(status)
    assert run.is_killed or os.waitstatus_to_exitcode(status) == 0, "an extraction failed"
    return run


def _note(run: Run, message: bytes) -> None:
    is_copied, done = MESSAGE.unpack(message)
    run.reached_bytes = done
    run.has_copied = run.has_copied or is_copied
    if not run.has_copied:
        run.resumed_bytes = done


def _extract_and_exit(checkpoint: Path, dest: Path, write_end: int) -> NoReturn:
    code = 1
    try:

        def tell(done: int, total: int) -> None:
            # What was found done is counted by the main thread, what is copied by the others.
            is_copied = threading.current_thread() is not threading.main_thread()
            os.write(write_end, MESSAGE.pack(is_copied, done))

        extract(checkpoint, dest, progress=tell)
        code = 0
    finally:
        os._exit(code)


def _digests(store: Path) -> dict[str, str]:
    return {
        str(path.relative_to(store)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(store.rglob("*"))
        if path.is_file()
    }


if __name__ == "__main__":
    main()
