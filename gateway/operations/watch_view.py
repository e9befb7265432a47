"""What `sage-moe status --watch` draws, for a terminal of 80 columns or more, and the line where there is none.

Pure. Called by `gateway.operations.watch`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rich import box
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from gateway.operations.status_view import mib, printable
from gateway.operations.watch_state import Status, WatchState

FEW_DECISIONS, MANY_DECISIONS, HIGH_TERMINAL = 3, 8, 36
"""That are shown, and from how many lines on many of them."""
MIN_ROWS = 3
"""Of each table, however low the terminal is."""
FRAME_LINES = 12
"""Of everything but rows, decisions and what waits."""
NUM_TEXTS = 3
"""Columns of a table, from the left, that are no numbers."""
MIB = 1 << 20


def render_watch(state: WatchState, url: str, height: int, now_s: float) -> RenderableType:
    """height: lines of the terminal. now_s: of the clock that the state goes by."""
    if state.status is None:
        return Text(f"{url} does not answer: {state.error}", style="red")
    status = printable(state.status)
    is_high = height >= HIGH_TERMINAL
    decisions = _decisions(status, MANY_DECISIONS if is_high else FEW_DECISIONS, is_whole=is_high)
    lines = [
        *_pending(status, MIN_ROWS if is_high else 1),
        *decisions,
        *map(Text.from_markup, printable(list(state.events))),
    ]
    taken = len(lines) + (len(decisions) if is_high else 0)
    room = max(2 * MIN_ROWS, height - FRAME_LINES - taken)
    nodes = _node_rows(status)
    num_nodes = min(len(nodes), max(MIN_ROWS, room // 3))
    processes = _process_rows(status, state.rates.by_router)
    shown = [_nodes(nodes, num_nodes), _processes(processes, max(MIN_ROWS, room - num_nodes))]
    return Group(*_head(state, status, url, now_s), *shown, *lines)


def watch_line(state: WatchState, clock: str) -> str:
    """The state in one line, for logs and pipes. No markup."""
    if state.status is None or state.is_lost:
        return f"{clock} no answer: {state.error}"
    status, requests = state.status, state.status["requests"]
    actors = [actor["state"] for actor in status["actors"]]
    routers = [router["state"] for router in status["routers"]]
    resident = sum(num_bytes for _, num_bytes in _resident(status))
    words = (
        clock,
        status["capacity"]["state"],
        f"running={requests['running']} waiting={requests['waiting']}",
        f"tokens_per_s={_rate(state.rates.generated)} prompt_tokens_per_s={_rate(state.rates.prompt)}",
        f"routers={routers.count('ready')}/{len(routers)} actors={actors.count('ready')}/{len(actors)}",
        f"nodes={sum(node['state'] == 'alive' for node in status['nodes'])}",
        f"resident={mib(resident).replace(' ', '')} hits={_share_of_hits(_workers(status)) or '-'}",
        f"pending={len(_cluster(status).get('pending', ()))}",
    )
    return " ".join(words)


def decision_line(decision: Mapping[str, Any]) -> str:
    """No markup."""
    return f"{decision['at']} {decision['kind']} {decision['name']}: {decision['reason']}"


def _head(state: WatchState, status: Status, url: str, now_s: float) -> list[RenderableType]:
    title = f"[bold]{status['model']}[/] at {printable(url)}  {status['capacity']['shown']}"
    if state.lost_since_s is not None:
        since, age = now_s - state.lost_since_s, now_s - state.answered_at_s
        title += f"  [red]no answer for {since:.0f} s: all below is {age:.0f} s old[/]"
    requests, rates = status["requests"], state.rates
    told = (
        f"{requests['running']} running, {requests['waiting']} waiting",
        f"{_rate(rates.generated)} tokens/s and {_rate(rates.prompt)} of prompts",
        f"{requests['generated_tokens']:,} in all",
    )
    return [Text.from_markup(title), Text("; ".join(told)), Text("")]


# Nodes


def _node_rows(status: Status) -> list[tuple[str, ...]]:
    """Those that live first."""
    resident: dict[str, int] = {}
    disk: dict[str, int] = {}
    counts: dict[str, int] = {}
    for worker, num_bytes in _resident(status):
        key = _node_of(status, worker)
        resident[key] = resident.get(key, 0) + num_bytes
        disk[key] = disk.get(key, 0) + worker.get("store", {}).get("bytes_done", 0)
        counts[key] = counts.get(key, 0) + 1
    bad = {name[:12]: count for name, count in _cluster(status).get("quarantines", {}).items()}
    nodes = sorted(status["nodes"], key=lambda node: (node["state"] != "alive", node["address"]))
    return [
        (
            node["node"][:12],
            node["address"],
            node["state"] + (f", {bad[node['node']]} quarantined" if node["node"] in bad else ""),
            f"{node['cpus']:g}",
            f"{node['gpus']:g}",
            str(counts.get(node["node"], 0)),
            _mib(resident.get(node["node"], 0)),
            _mib(disk[node["node"]]) if disk.get(node["node"]) else "",
        )
        for node in nodes
    ]


def _node_of(status: Status, worker: Mapping[str, Any]) -> str:
    """The node that a process runs on: as Ray says, or by its address."""
    if "node_id" in worker:
        return str(worker["node_id"])
    found = (node["node"] for node in status["nodes"] if node["address"] == worker.get("node"))
    return str(next(found, ""))


def _nodes(rows: Sequence[tuple[str, ...]], num_shown: int) -> Table:
    columns = ("node", "address", "state", "CPUs", "GPUs", "runs", "memory", "fetched")
    return _table("Nodes: processes; MiB of experts in memory, fetched", columns, rows, num_shown)


# Processes


def _process_rows(status: Status, tokens_per_s: Mapping[str, float]) -> list[tuple[str, ...]]:
    """Routers, then actors by group, in the order of the plan."""
    routers = [
        (
            router["name"],
            _painted(router["state"]),
            f"{router['open_requests']} open, {_rate(tokens_per_s.get(router['name']))} tok/s",
            *_memory(router.get("experts", {})),
        )
        for router in status["routers"]
    ]
    sizes = _replicas(status["actors"])
    actors = [
        (actor["name"], _painted(actor["state"]), _group(actor, sizes), *_memory(actor))
        for actor in status["actors"]
    ]
    return [*routers, *actors]


def _replicas(actors: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    counts: dict[str, int] = {}
    for actor in actors:
        counts[actor.get("group_name", "")] = counts.get(actor.get("group_name", ""), 0) + 1
    return counts


def _group(actor: Mapping[str, Any], sizes: Mapping[str, int]) -> str:
    """ "experts-0 2/3 (192)": the group, which of its replicas where there are several, and its experts."""
    name = actor.get("group_name", "")
    place = f" {actor.get('replica', 0) + 1}/{sizes[name]}" if sizes[name] > 1 else ""
    return f"{name}{place} ({actor['group']})".strip()


def _memory(worker: Mapping[str, Any]) -> tuple[str, str, str]:
    """What is resident, of what may be, and the hit rates."""
    if "resident_bytes" not in worker:
        return "", "", ""
    budget = worker.get("budget_bytes")
    return _mib(worker["resident_bytes"]), "all" if budget is None else _mib(budget), _hits(worker)


def _hits(worker: Mapping[str, Any]) -> str:
    """ "lfu 83 lru 80 trust 73": first what is in use, then what the shadow caches would have hit."""
    rates = worker.get("hit_rates") or {}
    if not rates:
        return _share_of_hits([worker]).removesuffix("%")
    return " ".join(f"{name} {rate * 100:.0f}" for name, rate in rates.items())


def _processes(rows: Sequence[tuple[str, ...]], num_shown: int) -> Table:
    columns = ("process", "state", "group (experts)", "MiB", "of", "hits % (shadows)")
    table = _table("Routers and expert actors", columns, rows, num_shown)
    table.columns[-1].justify = "left"
    return table


def _painted(state: str) -> str:
    colour = {"ready": "green", "lost": "red", "quarantined": "red", "failed": "red"}.get(state, "yellow")
    return f"[{colour}]{state}[/]"


# Below the tables


def _pending(status: Status, most: int) -> list[Text]:
    pending = _cluster(status).get("pending", ())
    lines = [
        Text.from_markup(
            f"[yellow]waits for a machine[/] with {_mib(entry['memory_bytes'])} MiB: {entry['name']}"
        )
        for entry in pending[:most]
    ]
    hidden = len(pending) - len(lines)
    return [*lines, Text(f"and {hidden} more wait")] if hidden else lines


def _decisions(status: Status, most: int, *, is_whole: bool) -> list[Text]:
    """The last ones, the newest below. is_whole: also those that take more than a line."""
    decisions = _cluster(status).get("decisions", ())[-most:]
    lines = [Text.from_markup(f"{d['at'][11:19]} {d['kind']} {d['name']}: {d['reason']}") for d in decisions]
    if not is_whole:
        for line in lines:
            line.no_wrap, line.overflow = True, "ellipsis"
    return [Text("Decisions (UTC)", style="italic"), *lines] if lines else []


# Both


def _cluster(status: Status) -> Mapping[str, Any]:
    return status.get("cluster") or {}


def _workers(status: Status) -> list[Mapping[str, Any]]:
    """Routers' own experts, and actors."""
    return [router["experts"] for router in status["routers"] if "experts" in router] + list(status["actors"])


def _resident(status: Status) -> list[tuple[Mapping[str, Any], int]]:
    """Every process with the bytes of experts that it has in memory."""
    routers = [(router, router.get("experts", {}).get("resident_bytes", 0)) for router in status["routers"]]
    return routers + [(actor, actor.get("resident_bytes", 0)) for actor in status["actors"]]


def _share_of_hits(workers: Sequence[Mapping[str, Any]]) -> str:
    """Of all uses since the start; nothing where nothing was used."""
    hits = sum(worker.get("hits", 0) for worker in workers)
    uses = hits + sum(worker.get("misses", 0) for worker in workers)
    return f"{hits / uses:.0%}" if uses else ""


def _mib(num_bytes: float) -> str:
    return f"{num_bytes / MIB:,.1f}"


def _rate(tokens_per_s: float | None) -> str:
    return "-" if tokens_per_s is None else f"{tokens_per_s:.1f}"


def _table(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]], num_shown: int) -> Table:
    """The first three columns are texts, the others numbers."""
    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, show_edge=False, padding=(0, 1, 0, 0)
    )
    for index, column in enumerate(columns):
        justify: Literal["left", "right"] = "left" if index < NUM_TEXTS else "right"
        least = {"MiB": 6, "of": 6, "hits % (shadows)": 22}.get(column)
        table.add_column(column, justify=justify, no_wrap=True, overflow="ellipsis", min_width=least)
    for row in rows[:num_shown]:
        table.add_row(*row)
    hidden = len(rows) - num_shown
    table.caption, table.caption_justify = f"and {hidden} more" if hidden > 0 else " ", "left"
    return table
