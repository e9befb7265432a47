"""What `sage-moe status` prints for people; `--json` prints the service's answer as it is."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType
from rich.markup import escape
from rich.table import Table

from cluster.expert_names import name_experts
from extraction.errors import one_line
from gateway.service.memory_view import render_memory
from router.speech.wish import SAMPLE_RATE

NUM_DECISIONS = 5
"""That are shown; `--json` has more."""


def render_status(status: Mapping[str, Any]) -> RenderableType:
    """Tables of actors, nodes and requests. The service may be anybody's: its texts are made safe to print."""
    status = printable(status)
    router, requests = status["router"], status["requests"]
    actors = Table(title="Routers and expert actors", title_justify="left")
    for column in ("name", "pid", "node", "group", "state", "resident", "hits (shadows)"):
        actors.add_column(column, justify="right" if column in ("pid", "group", "resident") else "left")
    for each in status["routers"]:
        experts = each.get("experts", {})
        actors.add_row(
            each["name"],
            str(each.get("pid", "")),
            str(each.get("node", "")),
            "",
            each["state"],
            mib(experts.get("resident_bytes", 0)),
            _rates(experts.get("hit_rates", {})),
        )
    own = router["experts"]
    for actor in status["actors"]:
        actors.add_row(
            actor["name"],
            str(actor.get("pid", "")),
            str(actor.get("node", "")),
            f"{actor['group']} experts",
            actor["state"],
            mib(actor.get("resident_bytes", 0)),
            _rates(actor.get("hit_rates", {})),
        )
    nodes = Table(title="Nodes", title_justify="left")
    for column in ("node", "address", "state", "cpus", "gpus"):
        nodes.add_column(column)
    for node in status["nodes"]:
        nodes.add_row(node["node"], node["address"], node["state"], f"{node['cpus']:g}", f"{node['gpus']:g}")
    resident = {actor["name"]: actor.get("resident_bytes", 0) for actor in status["actors"]}
    for each in status["routers"]:
        resident[each["name"]] = each.get("experts", {}).get("resident_bytes", 0)
    plan = [render_memory(status["memory"], resident, _behind(status))] if status.get("memory") else []
    memory = f"backbone {mib(router['backbone_bytes'])}, KV cache {mib(router['kv_bytes'])}"
    memory += _prefixes(router.get("prefix_cache")) + _media(router.get("media"))
    memory += _speech(router.get("speech"))
    fetching = [line for actor in status["actors"] if (line := _fetching(actor))]
    line = f"Requests: {requests['running']} running, {requests['waiting']} waiting; {memory}"
    if "capacity" in status:
        line = f"{status['capacity']['shown']}. {line}"
    if own.get("prefetched"):
        line += f". Prefetched {own['prefetched']:,} experts, {own['prefetched_used'] / own['prefetched']:.0%} used"
    line += _trouble(router.get("expert_calls", {}))
    line += "".join(f". {notice}" for notice in _not_kept(router))
    quantization = router.get("quantization")
    title = f"{status['model']} ({router['numerics_class']})"
    title += f", quantised ({quantization}): answers are modified" if quantization else ""
    return Group(title, actors, *plan, nodes, *fetching, *_cluster_lines(status.get("cluster") or {}), line)


def _behind(status: Mapping[str, Any]) -> dict[str, int]:
    """Bytes of experts in host memory behind devices, by process."""
    told = [(each["name"], each.get("experts", {})) for each in status["routers"]]
    told += [(actor["name"], actor) for actor in status["actors"]]
    return {name: entry["behind"]["resident_bytes"] for name, entry in told if entry.get("behind")}


def _prefixes(cache: Mapping[str, Any] | None) -> str:
    """What is kept for requests that begin alike; nothing where nothing is."""
    if not cache:
        return ""
    found = f"{cache['hit_tokens']:,} tokens found in it"
    return f" ({mib(cache['bytes'])} of it kept for prompts that begin alike, {found})"


def _media(stats: Mapping[str, Any] | None) -> str:
    """What sees and hears; nothing where nothing has been shown yet."""
    if not stats or not stats["tower_bytes"]:
        return ""
    held = mib(stats["tower_bytes"] + stats["kept_bytes"])
    return f", images and sound {held} ({stats['encoded']:,} encoded, {stats['found']:,} found encoded)"


def _speech(status: Mapping[str, Any] | None) -> str:
    """What speaks; nothing where nothing has been spoken yet."""
    if not status or not status["is_loaded"]:
        return ""
    speeches = f"{status['running']:,} running, {status['waiting']:,} waiting"
    seconds = status["samples"] / SAMPLE_RATE
    return f", speech {mib(status['resident_bytes'])} ({speeches}, {seconds:,.0f} s spoken)"


def _cluster_lines(cluster: Mapping[str, Any]) -> list[str]:
    """What waits for a machine, and the last decisions with their reasons."""
    lines = [
        f"Waits for a machine with {mib(entry['memory_bytes'])} of memory: {entry['name']}"
        for entry in cluster.get("pending", ())
    ]
    disks = cluster.get("disks") or {}
    for name, words in (("single_copies", "on one disk only"), ("absent", "on no disk")):
        if layers := disks.get(name):
            number = sum(map(len, layers.values()))
            lines.append(f"Not failover-safe: {number} experts {words}: {name_experts(layers)}")
    decisions = cluster.get("decisions", ())[-NUM_DECISIONS:]
    return lines + [f"{d['at']} {d['kind']} {d['name']}: {d['reason']}" for d in decisions]


def _trouble(calls: Mapping[str, Any]) -> str:
    """What went wrong on the way to the experts; nothing where nothing did."""
    text = ""
    if calls.get("failovers"):
        kinds = ", ".join(f"{count:,} {kind}" for kind, count in calls["failovers_by_kind"].items() if count)
        text += f". Expert calls computed elsewhere: {kinds}"
    if calls.get("quarantined"):
        text += f". Asked no more: {', '.join(calls['quarantined'])}"
    return text


def _not_kept(router: Mapping[str, Any]) -> list[str]:
    """What is learned and will be forgotten."""
    states = {"Trust is": router.get("trust"), "Stand-ins are": router.get("stand_ins")}
    return [
        f"{text} learned but not kept, see the router's log"
        for text, state in states.items()
        if state and not state["is_kept"]
    ]


def _fetching(actor: Mapping[str, Any]) -> str:
    """How far an actor's group is on its machine's disk; nothing where all of it is."""
    store = actor.get("store", {})
    done, total = store.get("records_done", 0), store.get("records_total", 0)
    if done == total:
        return ""
    sizes = f"{mib(store['bytes_done'])} of {mib(store['bytes_total'])}"
    trouble = f"; {store['last_error']}" if store.get("last_error") else ""
    return f"{actor['name']} fetches its group: {done} of {total} experts, {sizes}{trouble}"


def printable(value: Any) -> Any:
    """The value with control characters and rich's markup escaped in every text."""
    if isinstance(value, str):
        return escape(one_line(value))
    if isinstance(value, Mapping):
        return {key: printable(item) for key, item in value.items()}
    return [printable(item) for item in value] if isinstance(value, list) else value


def _rates(hit_rates: Mapping[str, float]) -> str:
    """ "trust 83%, lfu 80%, lru 73%"; nothing where everything fits."""
    return ", ".join(f"{printable(eviction)} {rate:.0%}" for eviction, rate in hit_rates.items())


def mib(num_bytes: float) -> str:
    return f"{num_bytes / 2**20:.1f} MiB"
