"""The Ray shell that asks every node of a running cluster what it is, and how fast it is reached.

One small actor a node, pinned there, which lives for the question. Contains no decision. Called by `sage-moe doctor`,
and by whoever plans on the cluster that this process is connected to.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from cluster.addresses import data_plane_host, is_local_only
from cluster.errors import NodeAddressInvalid
from cluster.joining import HEAD_RESOURCE
from cluster.link_rate import SECRET_BYTES, Link, LinkEnd, measure_link
from cluster.machine_facts import MachineFacts, read_machine
from cluster.node_report import Arithmetic, CardReport, ExpertShape, NodeReport, StoreQuestion
from cluster.resources import NO_CPUS
from experts.cores import num_cores, useful_threads
from experts.store_source import STORE_CACHE_VARIABLE
from extraction.errors import ExtractionError
from extraction.manifest import store_hash

ANSWER_TIMEOUT_S = 60.0
MAX_REASON_CHARS = 300


@dataclass(frozen=True)
class NodeAnswer:
    """What a node says of itself."""

    machine: MachineFacts
    arithmetic: Arithmetic
    disk_bytes_s: float
    has_store: bool
    card: CardReport | None = None


class NodeProbe:
    """On one node: answers, and holds the far end of one link."""

    def __init__(self) -> None:
        self._end: LinkEnd | None = None

    def answer(self, question: StoreQuestion | None) -> NodeAnswer:
        # On that node alone: whoever asks, such as the supervisor, needs no PyTorch.
        from cluster.node_speed import measure_arithmetic, measure_disk

        machine = read_machine(_environment(question))
        shape = question.shape if question else ExpertShape()
        threads = useful_threads(num_cores(), 2 * shape.expert_width * shape.width)
        root = Path(question.root) if question else None
        has_store = root is not None and question is not None and _hash_of(root) == question.hash
        files = [root / name for name in question.files] if root and question and has_store else []
        folder = Path(machine.cache_folder)
        existing = next(path for path in (folder, *folder.parents) if path.exists())
        card = read_card(shape, threads) if question and question.has_cards else None
        return NodeAnswer(
            machine, measure_arithmetic(shape, threads), measure_disk(files, existing), has_store, card
        )

    def listen(self, host: str, secret: bytes) -> int:
        """The port on which one peer is served. Raises OSError."""
        self._end = LinkEnd(host, secret)
        return self._end.port


def gather(
    question: StoreQuestion | None = None, only: Collection[str] | None = None
) -> tuple[NodeReport, ...]:
    """One report for each node that is alive, the head's first. Takes some seconds; links are measured one by one.

    only: ids of the nodes that are asked.
    """
    alive = [node for node in _nodes() if node["Alive"] and (only is None or node["NodeID"] in only)]
    alive.sort(key=lambda node: (HEAD_RESOURCE not in node["Resources"], str(node["NodeManagerAddress"])))
    here = str(ray.get_runtime_context().get_node_id())
    probes = {str(node["NodeID"]): _start_probe(str(node["NodeID"])) for node in alive}
    try:
        asked = {node_id: probe.answer.remote(question) for node_id, probe in probes.items()}
        answers = {node_id: _await(answer) for node_id, answer in asked.items()}
        local = is_local_only([str(node["NodeManagerAddress"]) for node in _nodes() if node["Alive"]])
        return tuple(
            _report(node, answers[str(node["NodeID"])], probes[str(node["NodeID"])], here, local)
            for node in alive
        )
    finally:
        for probe in probes.values():
            ray.kill(probe)


def _report(
    node: Mapping[str, Any], answer: NodeAnswer | str, probe: Any, here: str, is_local: bool
) -> NodeReport:
    node_id, address = str(node["NodeID"]), str(node["NodeManagerAddress"])
    facts = (node_id, address, HEAD_RESOURCE in node["Resources"], node_id == here)
    labels = dict(node.get("Labels") or {})
    if isinstance(answer, str):
        return NodeReport(*facts, problem=answer, labels=labels)
    known = (answer.machine, answer.arithmetic, answer.disk_bytes_s, answer.has_store)
    card = answer.card if node["Resources"].get("GPU") else None  # Ray would give an actor none
    if node_id == here:
        return NodeReport(*facts, *known, labels=labels, card=answer.card)
    link, problem = _measure(probe, address, is_local)
    return NodeReport(*facts, *known, link=link, link_problem=problem, labels=labels, card=card)


def _measure(probe: Any, address: str, is_local: bool) -> tuple[Link | None, str]:
    """The link to a node, or why there is none."""
    secret = secrets.token_bytes(SECRET_BYTES)
    try:
        host = data_plane_host(address, is_local)
        port = ray.get(probe.listen.remote(host, secret), timeout=ANSWER_TIMEOUT_S)
        return measure_link(host, port, secret), ""
    except (OSError, NodeAddressInvalid, ray.exceptions.RayError) as error:
        return None, _reason(error)


def read_card(shape: ExpertShape, num_threads: int) -> CardReport | None:
    """Of the process's machine; None where PyTorch sees none."""
    from cluster.node_speed import measure_arithmetic  # as in NodeProbe.answer
    from experts.devices import CUDA, read_device_memory, why_no_cuda

    if why_no_cuda() is not None:
        return None
    return CardReport(read_device_memory(CUDA), measure_arithmetic(shape, num_threads, CUDA))


def _start_probe(node_id: str) -> Any:
    strategy = NodeAffinitySchedulingStrategy(node_id, soft=False)
    return ray.remote(NodeProbe).options(num_cpus=NO_CPUS, scheduling_strategy=strategy).remote()


def _await(answer: Any) -> NodeAnswer | str:
    """What a node answers, or why it does not."""
    try:
        result: NodeAnswer = ray.get(answer, timeout=ANSWER_TIMEOUT_S)
        return result
    except (ray.exceptions.RayError, TimeoutError) as error:
        return _reason(error)


def _reason(error: Exception) -> str:
    cause = getattr(error, "cause", None) or error
    lines = str(cause).strip().splitlines() or [type(cause).__name__]
    return lines[-1].strip()[:MAX_REASON_CHARS]


def _nodes() -> Sequence[Mapping[str, Any]]:
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return nodes


def _environment(question: StoreQuestion | None) -> Mapping[str, str]:
    """This process's, with the store cache that a service names where the node has none of its own."""
    named = question.cache_folder if question is not None else None
    return os.environ if named is None else {STORE_CACHE_VARIABLE: named} | os.environ


def _hash_of(root: Path) -> str:
    """Empty where there is no store."""
    try:
        return store_hash(root)
    except (ExtractionError, OSError):
        return ""
