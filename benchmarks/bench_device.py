"""How far does a GPU get: decoding beside `transformers`, experts' products beside the card, two tiers beside the link?

- `link`: copies of one expert and of many, from pinned host memory.
- `experts`: one layer's experts, by every product that is sound there (our own kernel, PyTorch's grouped matmul, one by
  one), and as int8 and int4 codes: of few tokens against the card's measured memory bandwidth (goal 0.5), of a prompt
  against its measured matmul rate (goal 0.4).
- `decode`: a slice of 16 layers, one stream and eight, beside `transformers` on the same card (goal 2.0), in turns.
- `tiers`: the same slice, in bfloat16 and in int4, with 10% of the experts on the card and all in host memory: of the
  bound, which is what the bytes that were copied take at the link's rate, or what the step takes with all experts
  there, if that is longer (goal 0.8).

Needs an NVIDIA GPU with 64 GB, a CUDA build of PyTorch, `transformers`, 64 GB of host memory and 22 GB of disk; with
--quick next to nothing of all but the first two, and its speeds mean nothing. Has not been run on a GPU yet.

Usage: python -m benchmarks.bench_device [--part link experts decode tiers] [--layers N] [--quick] [--keep]
"""

from __future__ import annotations

import argparse
import statistics
import sys
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from benchmarks import device_rates as rates
from benchmarks.device_rates import ExpertShape
from benchmarks.peer_models import PeerModel
from benchmarks.peer_run import Contender
from benchmarks.peer_sage import KV_BUDGET_BYTES, SageContender
from benchmarks.report import finish, spread
from experts.device_proof import prove_experts, sound_groupings
from experts.devices import settle_arithmetic, why_no_cuda
from experts.numerics import RowKernel
from experts.store import ExpertStore
from experts.transfers import open_transfers
from extraction.quantise import Quantization
from router.loading import EngineOptions
from router.model_config import read_model_config

PARTS = ("link", "experts", "decode", "tiers")
GOALS = {"bandwidth_share": 0.5, "matmul_share": 0.4, "decode_ratio": 2.0, "tiers_share": 0.8}
NEEDS = "bench_device needs an NVIDIA GPU and a CUDA build of PyTorch (docs/memory.md)"
PROMPT_TOKENS = 64
FORMS = ("bf16", "int4")
CODES = (Quantization(scheme="int8", group_size=None), Quantization(scheme="int4", group_size=32))
RESIDENT = Fraction(1, 10)


@dataclass(frozen=True)
class Sizes:
    """What is measured, and how often."""

    repeats: int = 50
    buffer_bytes: int = 1 << 30
    matmul_size: int = 8192
    copies: int = 3
    """Layers of experts whose products take turns."""
    few_tokens: tuple[int, ...] = (1, 8, 64)
    prompt_tokens: int = 512
    streams: tuple[int, ...] = (1, 8)
    new_tokens: int = 128
    rounds: int = 5


QUICK = Sizes(2, 1 << 22, 256, 2, (1, 8), 64, (1, 2), 8, 1)


def measure_link(device: torch.device, shape: ExpertShape, sizes: Sizes) -> dict[str, float]:
    """Bytes a second of copies of one expert, and of as many as fill the buffer."""
    transfers = open_transfers(device)
    found = {
        "one_expert": rates.link_bytes_s(transfers, shape.bytes_each, sizes.repeats),
        "many": rates.link_bytes_s(transfers, sizes.buffer_bytes, sizes.repeats),
    }
    transfers.close()
    return found


def measure_experts(
    device: torch.device, shape: ExpertShape, model: PeerModel, sizes: Sizes
) -> dict[str, Any]:
    """By product, each that is sound here: seconds, and what they are of the card's own rates."""
    config, dtype = _config(model), torch.bfloat16
    widths = config.hidden_size, config.expert_width
    kernel = prove_experts(*widths, dtype, device)
    memory = rates.memory_bytes_s(device, sizes.buffer_bytes, sizes.repeats)
    matmul = rates.matmul_flops(device, sizes.matmul_size, sizes.repeats)
    found: dict[str, Any] = {"kernel": kernel.name, "memory_bytes_s": memory, "matmul_flops": matmul}
    ways: list[tuple[str, RowKernel, Quantization | None]] = [
        (grouping or "one by one", replace(kernel, grouping=grouping), None)
        for grouping in sound_groupings(*widths, kernel, dtype)
    ]
    ways += [(form.name, kernel, form) for form in CODES]
    for name, way, form in ways:
        layers = [rates.make_experts(way, shape, form) for _ in range(sizes.copies)]
        for num_tokens in (*sizes.few_tokens, sizes.prompt_tokens):
            took_s = rates.experts_s(way, shape, layers, num_tokens, sizes.repeats)
            call = rates.spread_call(shape, torch.empty(num_tokens, shape.width))
            found[f"{name}, {num_tokens} tokens"] = {
                "seconds": took_s,
                "bandwidth_share": rates.touched_bytes(call, layers[0]) / took_s / memory,
                "matmul_share": call.num_rows * shape.flops_per_row / took_s / matmul,
            }
    return found


def measure_decode(device: torch.device, model: PeerModel, sizes: Sizes) -> dict[str, Any]:
    """Tokens a second after the first ones, in turns; the ratio is ours against theirs of the same round."""
    from benchmarks.peer_transformers import TransformersContender

    contenders: dict[str, Contender] = {
        "sage-moe": SageContender(model.store("bf16"), torch.get_num_threads(), _engine(device)),
        "transformers": TransformersContender(model.checkpoint(), torch.get_num_threads(), device),
    }
    found: dict[str, Any] = {}
    for streams in sizes.streams:
        speeds: dict[str, list[float]] = {name: [] for name in contenders}
        for turn in range(1 + sizes.rounds):  # the first is for warming up
            prompts = model.prompts(streams, PROMPT_TOKENS, turn)
            for name, contender in contenders.items():
                speed = contender.generate(prompts, sizes.new_tokens).decode_tokens_per_s
                speeds[name] += [speed] if turn else []
        ratios = [ours / theirs for ours, theirs in zip(*speeds.values(), strict=True)]
        measured = {name: spread(values * 2) for name, values in speeds.items()}
        found[f"{streams} streams"] = measured | {"ratio": statistics.median(ratios)}
    found["facts"] = {name: contender.facts().setting for name, contender in contenders.items()}
    for contender in contenders.values():
        contender.close()
    return found


def measure_tiers(
    device: torch.device, shape: ExpertShape, model: PeerModel, form: str, sizes: Sizes
) -> dict[str, Any]:
    """One stream with a tenth of the experts on the device."""
    link = measure_link(device, shape, sizes)["one_expert"]
    root, stored = model.store(form), store_bytes(model.store(form))
    whole_s, _ = _seconds_a_token(device, model, root, sizes, None)
    budget = max(int(sum(stored) * RESIDENT), max(stored))
    tenth_s, moved = _seconds_a_token(device, model, root, sizes, budget)
    bound_s = max(whole_s, moved / link)
    return {
        "link_bytes_s": link,
        "seconds_a_token_all_there": whole_s,
        "seconds_a_token": tenth_s,
        "bytes_moved_a_token": moved,
        "bound_s": bound_s,
        "tiers_share": bound_s / tenth_s,
    }


def store_bytes(root: Path) -> list[int]:
    """Of every expert."""
    store = ExpertStore.open(root)
    sizes = [store.record(key).nbytes for key in store.expert_keys()]
    store.close()
    return sizes


def _seconds_a_token(
    device: torch.device, model: PeerModel, root: Path, sizes: Sizes, budget: int | None
) -> tuple[float, float]:
    """And the bytes that were copied for one. All experts are in host memory before it is measured."""
    sage = SageContender(root, torch.get_num_threads(), _engine(device, budget))
    worker = sage.loaded.worker
    sage.generate(model.prompts(1, PROMPT_TOKENS, 0), sizes.new_tokens)
    took, moved = [], []
    for turn in range(1, 1 + sizes.rounds):
        before = worker.stats.behind
        generated = sage.generate(model.prompts(1, PROMPT_TOKENS, turn), sizes.new_tokens)
        after = worker.stats.behind
        took.append(1 / generated.decode_tokens_per_s)
        if before is not None and after is not None:
            moved.append((after.bytes_moved - before.bytes_moved) / sizes.new_tokens)
    sage.close()
    return statistics.median(took), statistics.median(moved) if moved else 0.0


def _engine(device: torch.device, budget: int | None = None) -> EngineOptions:
    return EngineOptions(
        dtype="bfloat16", kv_budget_bytes=KV_BUDGET_BYTES, device=device, expert_budget_bytes=budget
    )


def _config(model: PeerModel) -> Any:
    store = ExpertStore.open(model.store("bf16"))
    config = read_model_config(store.served.config)
    store.close()
    return config


def expert_shape(model: PeerModel) -> ExpertShape:
    config = _config(model)
    return ExpertShape(config.num_experts, config.experts_per_token, config.hidden_size, config.expert_width)


def measure(device: torch.device, model: PeerModel, parts: tuple[str, ...], sizes: Sizes) -> dict[str, Any]:
    settle_arithmetic(device)
    shape = expert_shape(model)
    found: dict[str, Any] = {}
    if "link" in parts:
        found["link"] = measure_link(device, shape, sizes)
    if "experts" in parts:
        found["experts"] = measure_experts(device, shape, model, sizes)
    if "decode" in parts:
        found["decode"] = measure_decode(device, model, sizes)
    if "tiers" in parts:
        found["tiers"] = {form: measure_tiers(device, shape, model, form, sizes) for form in FORMS}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--layers", type=int, default=16, help="of the slice")
    parser.add_argument("--folder", type=Path, default=Path(".bench"), help="where models are kept")
    parser.add_argument("--quick", action="store_true", help="a tiny model; no speed of it means anything")
    parser.add_argument("--keep", action="store_true", help="keep the result under benchmarks/results")
    options = parser.parse_args()
    reason = why_no_cuda()
    if reason is not None:
        sys.exit(f"{NEEDS}: {reason}")
    device = torch.device("cuda", 0)
    model = PeerModel(options.folder, "qwen3_moe", options.layers, is_tiny=options.quick)
    sizes = QUICK if options.quick else Sizes()
    found = measure(device, model, tuple(options.part), sizes)
    facts = torch.cuda.get_device_properties(device)
    config = {"model": model.name, "goals": GOALS, "device": facts.name, "memory": facts.total_memory}
    finish("bench_device", config | {"cuda": torch.version.cuda}, found, is_kept=options.keep)


if __name__ == "__main__":
    main()
