"""What processes are spared while they start."""

from __future__ import annotations

import gc
import os
import subprocess
import sys

import pytest
import ray

from cluster.light_start import COLLECTED_FROM, SPARING, UNUSED, starting_lightly
from cluster.processes import descendants, end_processes, quietly
from cluster.resources import FIRST_IMPORTS, start_ray


def loads(code: str) -> bool:
    """Whether the code, in a process of its own, brings in what is spared."""
    code = f"import sys; {code}; sys.exit(bool(sys.modules.get({UNUSED!r})))"
    return subprocess.run([sys.executable, "-c", code], timeout=120).returncode != 0


def test_serve_starts_without_what_it_does_not_need() -> None:
    assert loads("from ray import serve"), f"Serve needs no sparing of {UNUSED} any more"
    assert not loads("import cluster.worker_start; from ray import serve")


def test_others_find_what_serve_is_spared() -> None:
    """Ray Data among them, by which a batch computes on a service's Ray."""
    assert loads("import cluster.worker_start; from ray import serve; import ray.data")


def test_everything_is_as_before_afterwards() -> None:
    thresholds, finders = gc.get_threshold(), tuple(sys.meta_path)
    with pytest.raises(ZeroDivisionError), starting_lightly():
        assert gc.get_threshold()[0] == COLLECTED_FROM and SPARING in sys.meta_path
        raise ZeroDivisionError
    assert gc.get_threshold() == thresholds
    assert tuple(sys.meta_path) == finders


def test_what_is_there_already_stays() -> None:
    code = (
        f"import sys; import {UNUSED}; import cluster.worker_start; sys.exit(sys.modules[{UNUSED!r}] is None)"
    )
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0


@pytest.mark.ray
@pytest.mark.parametrize("is_for_service", [True, False])
def test_every_process_of_a_service_starts_lightly_and_no_other(is_for_service: bool) -> None:
    start_ray(num_cpus=1, is_for_service=is_for_service)
    assert FIRST_IMPORTS not in os.environ, "what this process starts next may need what is spared"

    @ray.remote(num_cpus=0)
    def is_spared() -> tuple[bool, bool]:
        from ray import serve  # noqa: F401

        return gc.get_threshold()[0] == COLLECTED_FROM, UNUSED not in sys.modules

    try:
        assert ray.get(is_spared.remote()) == (is_for_service, is_for_service)
    finally:
        started = descendants()
        quietly(ray.shutdown)
        end_processes(started, 2.0)
