"""Machines and nodes as tests describe them: a good one, and what differs."""

from __future__ import annotations

from typing import Any

from cluster.link_rate import Link
from cluster.machine_facts import MachineFacts, Versions
from cluster.node_report import Arithmetic, NodeReport
from experts.node_memory import NodeMemory

GIB = 1 << 30
VERSIONS = Versions("0.1.0", "abc", "2.60.0", "3.11.9", "2.13.0")
ARITHMETIC = Arithmetic("cpu/avx512/bfloat16/torch-2.13.0/mm-1", "d1", 20e9)


def machine(**differs: Any) -> MachineFacts:
    """A machine without fault, but for what differs."""
    facts: dict[str, Any] = {
        "name": "node-7",
        "versions": VERSIONS,
        "num_cores": 16,
        "open_files": 65536,
        "open_files_most": 65536,
        "memory": NodeMemory(64 * GIB, 60 * GIB),
        "machine_bytes": 64 * GIB,
        "shared_free_bytes": 32 * GIB,
        "cache_folder": "/data/records",
        "cache_free_bytes": 500 * GIB,
        "is_cache_writable": True,
        "products": "avx2",
    }
    return MachineFacts(**facts | differs)


def node(address: str = "192.0.2.7", **differs: Any) -> NodeReport:
    """A node without fault, not this machine's, but for what differs."""
    facts: dict[str, Any] = {
        "node_id": f"id-{address}",
        "address": address,
        "is_head": False,
        "is_here": False,
        "machine": machine(),
        "arithmetic": ARITHMETIC,
        "disk_bytes_s": 1e9,
        "link": Link(1.1e9, 80e-6),
    }
    return NodeReport(**facts | differs)
