"""Answers of `/sage/status` for what shows them."""

from __future__ import annotations

from typing import Any

MIB = 1 << 20


def made_up_status(num_actors: int = 2, num_tokens: int = 100, first_pid: int = 100) -> dict[str, Any]:
    """Of one router on a machine of its own, and actors of two groups that take turns on two others."""
    actors = [
        {
            "name": f"experts-{index}",
            "state": "ready",
            "group": 192,
            "group_name": f"experts-{index % 2}",
            "replica": index // 2,
            "node": f"10.0.0.{index % 2 + 2}",
            "node_id": f"node{index % 2 + 1}",
            "pid": first_pid + 1 + index,
            "resident_bytes": 13 * MIB,
            "budget_bytes": 14 * MIB,
            "hits": 90,
            "misses": 10,
            "hit_rates": {"lfu": 0.83, "lru": 0.80, "trust": 0.73},
            "store": {"records_done": 1, "records_total": 1, "bytes_done": 40 * MIB, "bytes_total": 40 * MIB},
        }
        for index in range(num_actors)
    ]
    requests = {"running": 2, "waiting": 1, "generated_tokens": num_tokens, "prompt_tokens": num_tokens // 5}
    own = {"name": "router", "resident_bytes": 5 * MIB, "budget_bytes": None, "hits": 10, "misses": 0}
    router = {"name": "router", "state": "ready", "open_requests": 3, "pid": first_pid, "node": "10.0.0.1"}
    return {
        "model": "stories",
        "router": {
            "backbone_bytes": 4 * MIB,
            "kv_bytes": 192 * MIB,
            "numerics_class": "cpu/avx512",
            "experts": own,
        },
        "routers": [router | {"experts": own | {"hit_rates": {}}, "requests": requests}],
        "actors": actors,
        "requests": requests,
        "capacity": {"state": "wake", "shown": "WAKE (4 experts a layer)"},
        "memory": None,
        "nodes": [
            {
                "node": f"node{index}",
                "address": f"10.0.0.{index + 1}",
                "state": "alive",
                "cpus": 8.0,
                "gpus": 0.0,
            }
            for index in range(3)
        ],
        "cluster": {"pending": [], "decisions": []},
    }


def decision(second: int, kind: str = "spawn", reason: str = "nobody answers") -> dict[str, str]:
    return {
        "at": f"2026-01-01T10:00:{second:02}Z",
        "kind": kind,
        "name": f"experts-{second}",
        "reason": reason,
    }
