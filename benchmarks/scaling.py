"""What would a cluster of so many machines give? Simulated, for docs/scaling.md: nobody has these machines here.

Qwen3-30B-A3B in bfloat16 (58 GB of experts), routing drawn as skewed and local as a slice's: the busier half of the
experts takes 75%, neighbouring tokens share 30% (`benchmarks.slice_routing`); placed by `cluster.placement` from the
routing of other tokens, decoded by `cluster.simulator`. Machines: desktops that read weights at 25 GB/s and have 16 GB
for experts; a "mixed" cluster has every second one with 6 GB at 10 GB/s. The router is one more desktop, with 8 GB
left; a "fast router" reads the backbone at 500 GB/s. Links of 1, 10 and 100 Gb/s with 150 us from call to answer.
Where memory is short the rest is read from disk, at 2 GB/s. What software takes beside weights, links and disks is what
`benchmarks.bench_simulator` has measured here and kept, layer by layer.

Usage: python -m benchmarks.scaling [--steps N] [--keep]
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
import torch

from benchmarks.random_store import QWEN3_30B_A3B
from benchmarks.report import RESULTS, finish
from benchmarks.slice_routing import calibrate, popularity, token_walk
from cluster.autoscaler import ScalerSettings
from cluster.demand import Demand, counted_demand
from cluster.model_sizes import ModelSizes, measure_model
from cluster.placement import PlacementOptions, place
from cluster.plan import ServicePlan
from cluster.simulated_worker import Costs, ModelShape, RouterCosts
from cluster.simulator import NodeEvent, Report, Simulation
from cluster.topology import NodeFacts, Topology
from extraction.manifest import ExpertKey
from gateway.evaluation.plots import new_figure, to_png

NODES = (1, 2, 4, 8, 16, 32, 64)
"""Beside the router's."""
STREAMS = (1, 16)
SKEW, LOCALITY, TOPICS = 0.75, 0.3, 64
WEIGHT_BYTES_S = 25e9
FAST_BYTES_S = 500e9
CASES = (("even", 1), ("even", 10), ("even", 100), ("mixed", 10), ("fast router", 10), ("fast router", 100))
"""Kinds of cluster, and their links in Gb/s."""
CORES = 8
"""Of every machine; a worker uses all of them."""
DISK_BYTES_S = 2e9
ROUND_TRIP_S = 150e-6
GB = 10**9
LEARNED_TOKENS = 256
"""From whose routing experts are placed, before the tokens that are decoded."""


Growth = dict[str, dict[str, float]]
"""What `summarise` says, by name of the case."""


def draw_routing(model: ModelSizes, num_streams: int, num_steps: int, seed: int) -> np.ndarray:
    """(steps, streams, layers, K) int16: every stream keeps to a topic for a while."""
    config = model.config
    layers = len(config.moe_layers)
    shape = calibrate(SKEW, LOCALITY, config.num_experts, config.experts_per_token, TOPICS)
    tastes = torch.Generator().manual_seed(7)  # the model's: every draw has the same
    popular_LE = torch.stack([popularity(config.num_experts, tastes) for _ in range(layers)])
    taste_LXE = torch.randn(layers, TOPICS, config.num_experts, generator=tastes)
    generator = torch.Generator().manual_seed(seed)
    walks = [token_walk(num_steps, TOPICS, TOPICS, generator) for _ in range(num_streams)]
    topic_ST = torch.stack(walks, dim=1)
    chosen = []
    for layer in range(layers):
        noise = torch.randn(num_steps, num_streams, config.num_experts, generator=generator)
        logits = (
            shape.busy * popular_LE[layer] + shape.topical * taste_LXE[layer][topic_ST] + shape.rest * noise
        )
        chosen.append(logits.topk(config.experts_per_token, dim=-1).indices)
    return torch.stack(chosen, dim=2).numpy().astype(np.int16)


def learned_demand(model: ModelSizes, seed: int) -> Demand:
    """What a service would know of its traffic after a while."""
    routing = draw_routing(model, 1, LEARNED_TOKENS, seed)[:, 0]
    counts: Counter[ExpertKey] = Counter()
    for index, layer in enumerate(sorted(model.config.moe_layers)):
        experts, numbers = np.unique(routing[:, index], return_counts=True)
        for expert, number in zip(experts.tolist(), numbers.tolist(), strict=True):
            counts[ExpertKey(model.component, layer, expert)] = number
    return counted_demand(model.expert_sizes(), counts, model.config.experts_per_token, model.row_bytes)


def software_costs(num_layers: int) -> Costs:
    """What `bench_simulator` has kept, for a model of so many layers: a step's own costs grow with them."""
    kept = json.loads((RESULTS / "bench_simulator.json").read_text())["results"]
    values = {name: value for name, value in kept["costs"].items() if name != "round_trip_s"}
    layers = num_layers / kept["num_layers"]
    for name in ("near", "far"):
        own = RouterCosts(**values.pop(name))
        values[name] = replace(own, step_s=layers * own.step_s, row_s=layers * own.row_s)
    return Costs(**values | {"threads": CORES})


def make_topology(num_nodes: int, link_gbit: float, *, is_mixed: bool) -> Topology:
    router = NodeFacts(
        "router",
        "10.0.0.1",
        8 * GB,
        CORES,
        WEIGHT_BYTES_S,
        float("inf"),
        60e-6,
        disk_bytes_s=DISK_BYTES_S,
        has_store=True,
    )
    nodes = [router]
    for index in range(num_nodes):
        is_small = is_mixed and index % 2 == 1
        nodes.append(
            NodeFacts(
                f"node-{index:02}",
                f"10.0.1.{index + 1}",
                (6 if is_small else 16) * GB,
                CORES,
                10e9 if is_small else WEIGHT_BYTES_S,
                link_gbit * 1e9 / 8,
                ROUND_TRIP_S,
                disk_bytes_s=DISK_BYTES_S,
                has_store=True,
            )
        )
    return Topology(tuple(nodes), "router")


@dataclass(frozen=True)
class Service:
    """What every case shares."""

    model: ModelSizes
    demand: Demand
    costs: Costs
    """Without the backbone's weights."""

    def costs_of(self, kind: str) -> Costs:
        """The step's own weights are read by the router: attention, gates and head."""
        rate = FAST_BYTES_S if kind == "fast router" else WEIGHT_BYTES_S
        return replace(self.costs, weights_s=self.model.active_bytes / rate)

    @property
    def shape(self) -> ModelShape:
        layers = tuple(sorted(self.model.config.moe_layers))
        return ModelShape(self.model.component, layers, self.model.expert_bytes, self.model.row_bytes)

    def plan(self, topology: Topology, num_streams: int, replicas: int = 1) -> ServicePlan:
        options = PlacementOptions(num_streams=num_streams, replicas=replicas, message_s=self.costs.message_s)
        return place(topology, self.demand, None, options)

    def simulate(
        self,
        topology: Topology,
        plan: ServicePlan,
        routing: np.ndarray,
        events: Sequence[NodeEvent] = (),
        scaling: ScalerSettings | None = None,
        kind: str = "even",
    ) -> Report:
        router = topology.node(topology.router_node)
        simulation = Simulation(
            self.shape,
            topology,
            plan,
            self.costs_of(kind),
            router_budget_bytes=router.room_bytes,
            events=events,
            scaling=scaling,
        )
        for experts_TLK in routing:
            simulation.step(experts_TLK)
        return simulation.report


def summarise(report: Report, warm_up: int) -> dict[str, float]:
    """The first steps, in which caches fill, are left out of the times."""
    counted = report.step_s[warm_up:]
    tokens = report.num_tokens * len(counted) / len(report.step_s)
    return {
        "tokens_per_s": tokens / sum(counted),
        "step_p50_ms": float(np.percentile(counted, 50)) * 1e3,
        "step_p99_ms": float(np.percentile(counted, 99)) * 1e3,
        "hit_rate": report.hit_rate,
        "messages_per_token": report.messages / report.num_tokens,
        "megabytes_per_token": report.bytes_sent / report.num_tokens / 1e6,
        "used_in_router": report.uses_by_router / report.uses,
        "software_ms": report.router_s / len(report.step_s) * 1e3,
        "messages_ms": report.messages_s / len(report.step_s) * 1e3,
        "step_ms": report.seconds / len(report.step_s) * 1e3,
    }


def measure_growth(service: Service, num_steps: int) -> Growth:
    """By number of streams, kind of cluster, link and number of nodes."""
    found = {}
    for streams in STREAMS:
        routing = draw_routing(service.model, streams, num_steps, seed=2)
        for (kind, link), number in itertools.product(CASES, NODES):
            topology = make_topology(number, link, is_mixed=kind == "mixed")
            report = service.simulate(topology, service.plan(topology, streams), routing, kind=kind)
            name = name_of(streams, kind, link, number)
            found[name] = summarise(report, num_steps // 4)
            figures = found[name]
            print(
                f"{name}: {figures['tokens_per_s']:.2f} tokens/s, p99 {figures['step_p99_ms']:.0f} ms, hits "
                f"{figures['hit_rate']:.2f}, {figures['messages_per_token']:.0f} messages and "
                f"{figures['megabytes_per_token']:.2f} MB a token",
                flush=True,
            )
    return found


def measure_loss(service: Service, num_steps: int) -> dict[str, Any]:
    """Eight nodes, one of which is lost in the middle: with and without replicas; the autoscaler moves its actor."""
    found = {}
    topology = make_topology(8, 10, is_mixed=False)
    routing = draw_routing(service.model, 1, num_steps, seed=3)
    for replicas in (1, 2):
        plan = service.plan(topology, 1, replicas)
        steady = service.simulate(topology, plan, routing)
        half_s = steady.seconds / 2
        lost = next(actor.node_id for actor in plan.actors if actor.node_id != "router")
        assert lost is not None
        scaling = ScalerSettings(min_actors=len(plan.actors), max_actors=len(plan.actors) + 1)
        report = service.simulate(topology, plan, routing, [NodeEvent(half_s, lost)], scaling)
        ends = np.cumsum(report.step_s)
        usual_s = float(np.median(steady.step_s[num_steps // 4 :]))
        after = np.array(report.step_s)[ends > half_s]
        found[f"{replicas} replicas"] = {
            "actors": len(plan.actors),
            "usual_ms": usual_s * 1e3,
            "longest_ms": float(after.max()) * 1e3,
            "lost_s": float(np.maximum(0.0, after - usual_s).sum()),
            "steps_lost": float(np.maximum(0.0, after - usual_s).sum() / usual_s),
            "last_quarter_ms": float(np.median(after[-len(after) // 4 :])) * 1e3,
            "decisions": [
                f"{decision.kind} {decision.group}: {decision.reason}" for _, decision in report.decisions
            ],
        }
        print(f"a node is lost, {replicas} replicas: {found[f'{replicas} replicas']}", flush=True)
    return found


def name_of(streams: int, kind: str, link: int, number: int) -> str:
    return f"{streams} streams, {kind}, {link} Gb/s, {number} nodes"


def draw_growth(growth: Growth) -> bytes:
    """Tokens/s by number of nodes: a panel for each number of streams."""
    figure = new_figure(10.0, 4.2)
    for axes, streams in zip(figure.subplots(1, len(STREAMS)), STREAMS, strict=True):
        for kind, link in CASES:
            rates = [growth[name_of(streams, kind, link, number)] for number in NODES]
            style = {"even": "o-", "mixed": "s--", "fast router": "^-."}[kind]
            axes.plot(
                NODES,
                [rate["tokens_per_s"] for rate in rates],
                style,
                label=f"{kind}, {link} Gb/s",
                markersize=4,
            )
        _label(axes, streams, "tokens/s of all streams")
        axes.legend(fontsize=8)
    return to_png(figure)


def draw_parts(growth: Growth, weights_ms: float) -> bytes:
    """What a step's time is made of, by number of nodes, in an even cluster with links of 10 Gb/s; and its p99."""
    figure = new_figure(10.0, 4.2)
    for axes, streams in zip(figure.subplots(1, len(STREAMS)), STREAMS, strict=True):
        rates = [growth[name_of(streams, "even", 10, number)] for number in NODES]
        router = [weights_ms] * len(NODES)
        software = [rate["software_ms"] for rate in rates]
        messages = [rate["messages_ms"] for rate in rates]
        known = [sum(parts) for parts in zip(router, software, messages, strict=True)]
        # A message's time counts as the router's even where it overlaps with waiting for another one.
        waiting = [max(0.0, rate["step_ms"] - ms) for rate, ms in zip(rates, known, strict=True)]
        labels = (
            "router: its weights",
            "router: software",
            "router: messages",
            "experts, disks, links: waiting",
        )
        axes.stackplot(NODES, router, software, messages, waiting, labels=labels, alpha=0.85)
        axes.plot(NODES, [rate["step_p99_ms"] for rate in rates], "k:", label="p99 of a step")
        _label(axes, streams, "ms of a step")
        axes.set_ylim(0, 2 * rates[NODES.index(4)]["step_ms"])  # where memory is short, steps go beyond
        axes.legend(fontsize=8, loc="upper right")
    return to_png(figure)


def _label(axes: Any, streams: int, quantity: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_xticks(NODES, [str(number) for number in NODES])
    axes.set_ylim(bottom=0)
    axes.set_xlabel("machines beside the router's")
    axes.set_ylabel(quantity)
    axes.set_title("one stream" if streams == 1 else f"{streams} streams")
    axes.grid(alpha=0.3)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=120, help="of each case; a quarter of them warms up")
    parser.add_argument(
        "--keep", action="store_true", help="keep result and picture under benchmarks/results"
    )
    options = parser.parse_args()
    model = measure_model(QWEN3_30B_A3B, torch.bfloat16)
    costs = software_costs(model.config.num_layers)
    service = Service(model, learned_demand(model, seed=1), costs)
    growth = measure_growth(service, options.steps)
    results = {"growth": growth, "loss": measure_loss(service, 4 * options.steps)}
    if options.keep:
        (RESULTS / "scaling.png").write_bytes(draw_growth(growth))
        weights_ms = service.costs_of("even").weights_s * 1e3
        (RESULTS / "scaling_parts.png").write_bytes(draw_parts(growth, weights_ms))
    config = {
        "model": "Qwen3-30B-A3B, bfloat16",
        "steps": options.steps,
        "expert_gigabytes": model.total_expert_bytes / GB,
        "active_backbone_gigabytes": model.active_bytes / GB,
        "weight_bytes_s": WEIGHT_BYTES_S,
        "round_trip_s": ROUND_TRIP_S,
        "software": asdict(costs),
    }
    finish("scaling", config, results, is_kept=options.keep)


if __name__ == "__main__":
    main()
