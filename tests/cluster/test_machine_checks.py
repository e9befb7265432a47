"""Whether one machine is fit to be a node, and what is said where it is not."""

from __future__ import annotations

import pytest
import torch

from cluster.findings import Finding
from cluster.machine_checks import check_machine
from cluster.machine_facts import read_machine, store_cache_folder
from experts.native_products import VARIABLE, chosen_level
from experts.node_memory import NodeMemory
from experts.store_source import STORE_CACHE_VARIABLE
from tests.cluster.machines import GIB, machine

MIB = 1 << 20


def _wrong(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(finding.level, finding.mend) for finding in findings if finding.level != "ok"]


def test_machine_without_fault_needs_no_mend() -> None:
    findings = check_machine(machine(), "node-7", store_bytes=60 * GIB)
    assert {finding.level for finding in findings} == {"ok"}
    assert not any(finding.mend for finding in findings)


@pytest.mark.parametrize(
    ("differs", "level", "mend"),
    [
        ({"open_files": 4096}, "warning", "ulimit -n 65536"),
        ({"open_files": 4096, "open_files_most": 4096}, "warning", "/etc/security/limits.conf"),
        ({"open_files": 256}, "failure", "ulimit -n 65536"),
        ({"memory": NodeMemory(2 * GIB, 2 * GIB)}, "warning", "memory limit"),
        ({"memory": NodeMemory(64 * GIB, 500 * MIB)}, "failure", "memory limit"),
        ({"shared_free_bytes": 64 * MIB}, "warning", "--shm-size"),
        ({"shared_free_bytes": None}, "warning", "--shm-size"),
        ({"cache_free_bytes": 10 * GIB}, "warning", "--store-cache"),
        ({"is_cache_writable": False}, "warning", "--store-cache"),
        ({"products": ""}, "warning", "install a C compiler"),
        ({"products_problem": "X=y is not here"}, "failure", "SAGE_MOE_PRODUCTS"),
    ],
)
def test_each_fault_is_one_finding_with_its_mend(differs: dict[str, object], level: str, mend: str) -> None:
    (found,) = _wrong(check_machine(machine(**differs), "node-7", store_bytes=60 * GIB))
    assert found[0] == level
    assert mend in found[1]


def test_a_container_s_limit_is_named_beside_the_machine_s_memory() -> None:
    findings = check_machine(machine(memory=NodeMemory(8 * GIB, 7 * GIB)), "node-7")
    assert any("a container's limit; the machine has 64.0 GiB" in finding.what for finding in findings)


def test_this_machine_can_be_read() -> None:
    facts = read_machine({STORE_CACHE_VARIABLE: "/none/of/this/is/there"})
    assert facts.cache_folder == "/none/of/this/is/there"
    assert facts.products == (chosen_level(torch.bfloat16) or "")
    assert "avx9000" in read_machine({VARIABLE: "avx9000"}).products_problem
    assert facts.num_cores >= 1
    assert 0 < facts.memory.available_bytes <= facts.machine_bytes
    assert facts.versions.ray.startswith("2.")
    assert len(facts.versions.code) == 12


def test_store_cache_is_the_variable_s_folder_or_the_user_s() -> None:
    assert str(store_cache_folder({STORE_CACHE_VARIABLE: "/data"})) == "/data"
    assert store_cache_folder({}).parts[-3:] == (".cache", "sage-moe", "records")
