"""Imports point one way: extraction <- experts <- router <- cluster <- gateway."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGES = ("extraction", "experts", "router", "cluster", "gateway")
REPOSITORY = Path(__file__).parent.parent
RAY_SHELLS = {
    "experts/actor.py",
    "cluster/joining.py",
    "cluster/lease.py",
    "cluster/living_nodes.py",
    "cluster/ray_topology.py",
    "cluster/resources.py",
    "cluster/supervisor.py",
    "cluster/supervisor_handle.py",
    "cluster/head_watch.py",
    "cluster/actor_pool.py",
    "cluster/actor_notices.py",
    "cluster/service_record.py",
    "cluster/ray_directory.py",
    "cluster/trust_keeper.py",
    "cluster/disk_keeper.py",
    "cluster/weight_keeper.py",
    "cluster/node_sync.py",
    "gateway/stores/sync_cluster.py",
    "gateway/batch/ray_shell.py",
    "gateway/service/application.py",
    "gateway/service/gateway_replica.py",
    "gateway/service/router_replica.py",
    "gateway/service/launch.py",
    "gateway/routers/serve_router_client.py",
    "gateway/service/serve_instance.py",
}


def _imported(path: Path) -> Iterator[str]:
    """Top-level names of all imports of a file, those inside functions too."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports relatively"
            yield str(node.module).split(".")[0]


@pytest.mark.parametrize("package", PACKAGES)
def test_package_imports_only_itself_and_those_below(package: str) -> None:
    allowed = set(PACKAGES[: PACKAGES.index(package) + 1])
    files = sorted((REPOSITORY / package).glob("**/*.py"))
    assert files
    for path in files:
        ours = {name for name in _imported(path) if name in (*PACKAGES, "tests", "benchmarks")}
        assert ours <= allowed, f"{path.name} imports {sorted(ours - allowed)}"


def test_ray_appears_only_in_its_shells() -> None:
    users = {
        str(path.relative_to(REPOSITORY))
        for package in PACKAGES
        for path in (REPOSITORY / package).glob("**/*.py")
        if "ray" in set(_imported(path))
    }
    assert users <= RAY_SHELLS


def test_reference_implementation_appears_only_where_it_is_compared_with() -> None:
    users = {
        str(path.relative_to(REPOSITORY))
        for package in PACKAGES
        for path in (REPOSITORY / package).glob("**/*.py")
        if "transformers" in set(_imported(path))
    }
    assert users == {"gateway/stores/published_layers.py"}


@pytest.mark.parametrize("module", ["gateway.service.gateway_replica", "cluster.supervisor"])
def test_process_that_computes_nothing_starts_without_pytorch(module: str) -> None:
    """Which takes a second of a core to import, at every start of a service."""
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=120).returncode == 0
