"""Does a generating process stay within the memory that its budget was counted to?

A child generates under a hard memory cap (`memory_cap`) while its resident set size is sampled. It must stay within
what an empty worker takes (the process with the engine loaded and no expert) plus the budget, the KV cache and the
buffers of a step, each as `router.footprint` states it; the cap is the same sum. The same child without a budget shows
what there is to save. The experts are random and larger than all other memory together, so that a leak cannot hide.

    python -m benchmarks.bench_rss [--tokens 10000] [--budget 12.5%] [--keep]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import save_file

from benchmarks.memory_cap import memory_cap
from benchmarks.random_store import QWEN3_30B_A3B
from benchmarks.report import finish
from experts.budget import BudgetRequest
from experts.store import ExpertStore
from extraction.extract import extract
from gateway.byte_sizes import parse_budget
from gateway.service.memory import plan_engine
from router.batcher import BatchLimits
from router.loading import EngineOptions, load_engine
from router.request import GenerationRequest, SamplingParams

LIMITS = BatchLimits(max_batch_tokens=64, max_running=4)
REQUEST_TOKENS = 250
SAMPLE_S = 0.02
CAP_SLACK_BYTES = 16 << 20
"""The cap also counts kernel memory and pages of files that are being read, which no process holds."""
CONFIG = QWEN3_30B_A3B | {
    "vocab_size": 2048,
    "hidden_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "num_experts": 64,
    "num_experts_per_tok": 4,
    "moe_intermediate_size": 512,
    "max_position_embeddings": 512,
    "torch_dtype": "bfloat16",
}
"""256 experts of 1.5 MiB."""


def write_random_checkpoint(folder: Path) -> Path:
    """A checkpoint of CONFIG as it would be published, with random weights."""
    width, inner, head = CONFIG["hidden_size"], CONFIG["moe_intermediate_size"], CONFIG["head_dim"]
    queries, keys = CONFIG["num_attention_heads"] * head, CONFIG["num_key_value_heads"] * head
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (CONFIG["vocab_size"], width),
        "model.norm.weight": (width,),
        "lm_head.weight": (CONFIG["vocab_size"], width),
    }
    for layer in range(CONFIG["num_hidden_layers"]):
        prefix = f"model.layers.{layer}."
        for name in ("input_layernorm", "post_attention_layernorm"):
            shapes[f"{prefix}{name}.weight"] = (width,)
        for name, rows in (("q", queries), ("k", keys), ("v", keys)):
            shapes[f"{prefix}self_attn.{name}_proj.weight"] = (rows, width)
        for name in ("q_norm", "k_norm"):
            shapes[f"{prefix}self_attn.{name}.weight"] = (head,)
        shapes[prefix + "self_attn.o_proj.weight"] = (width, queries)
        shapes[prefix + "mlp.gate.weight"] = (CONFIG["num_experts"], width)
        for expert in range(CONFIG["num_experts"]):
            for name, shape in (("gate", (inner, width)), ("up", (inner, width)), ("down", (width, inner))):
                shapes[f"{prefix}mlp.experts.{expert}.{name}_proj.weight"] = shape
    generator = torch.Generator().manual_seed(0)
    weights = {
        name: torch.ones(shape, dtype=torch.bfloat16)
        if len(shape) == 1
        else torch.empty(shape, dtype=torch.bfloat16).normal_(0.0, shape[1] ** -0.5, generator=generator)
        for name, shape in shapes.items()
    }
    folder.mkdir(parents=True)
    save_file(weights, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return folder


def options_for(root: Path, budget: str | None) -> tuple[EngineOptions, dict[str, int]]:
    """The child's options and what they were counted to."""
    store = ExpertStore.open(root)
    options = EngineOptions(limits=LIMITS, kv_budget_bytes=32 << 20, max_model_len=512)
    requests = (parse_budget(budget) if budget else BudgetRequest(),)
    resolved, plan = plan_engine(store, options, requests)
    store.close()
    row = plan.router
    counted = {
        "budget": row.budget_bytes,
        "kv": row.kv_bytes,
        "buffers": row.buffer_bytes,
        "experts": row.expert_bytes,
    }
    return (resolved if budget else options), counted


def run_child(root: Path, budget: str | None, num_tokens: int) -> dict[str, Any]:
    """Generate in this process; returns its resident bytes when empty and at their highest, and what is counted."""
    options, counted = options_for(root, budget)
    loaded = load_engine(ExpertStore.open(root), options)
    process = psutil.Process()
    empty = process.memory_info().rss
    peak = [empty]
    is_done = threading.Event()

    def sample() -> None:
        while not is_done.wait(SAMPLE_S):
            peak[0] = max(peak[0], process.memory_info().rss)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    engine, generated, number = loaded.engine, 0, 0
    while generated < num_tokens:
        while engine.num_running + engine.num_waiting < LIMITS.max_running:
            number += 1
            prompt = tuple((number * 131 + place * 17) % loaded.config.vocab_size for place in range(24))
            params = SamplingParams(max_tokens=REQUEST_TOKENS, temperature=1.0, seed=number)
            engine.submit(GenerationRequest(f"r{number}", prompt, params))
        generated += sum(len(event.token_ids) for event in engine.step())
    is_done.set()
    sampler.join()
    stats = loaded.worker.stats
    result = {
        "counted": counted,
        "empty_rss": empty,
        "peak_rss": max(peak[0], process.memory_info().rss),
        "expert_bytes_held": loaded.worker.resident_bytes,
        "tokens": generated,
        "misses": stats.misses,
        "hits": stats.hits,
    }
    loaded.close()
    return result


def measure(root: Path, budget: str | None, num_tokens: int, limit_bytes: int | None) -> dict[str, Any]:
    """The same in a process of its own, under a cap where there is a limit and the machine allows one."""
    command = [
        sys.executable,
        "-m",
        "benchmarks.bench_rss",
        "--child",
        str(root),
        "--tokens",
        str(num_tokens),
    ]
    command += ["--budget", budget] if budget else []
    with memory_cap(limit_bytes or 1 << 50, "sage-moe-rss") as cap:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            preexec_fn=cap.enter if limit_bytes else None,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            check=False,
        )
        is_capped = cap.is_enforced and limit_bytes is not None
        group = {"is_capped": is_capped, "cap_bytes": limit_bytes, "no_cap_because": cap.reason}
    if done.returncode:
        return group | {"exit_code": done.returncode, "stderr": done.stderr[-2000:]}
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return group | {"exit_code": 0} | result


def allowance(result: dict[str, Any]) -> int:
    """What a child's resident set size may come to."""
    counted = result["counted"]
    return int(result["empty_rss"] + counted["budget"] + counted["kv"] + counted["buffers"])


def compare(root: Path, budget: str, num_tokens: int) -> dict[str, Any]:
    """Without a budget, then with one, uncapped for a moment to learn the allowance, then capped to it."""
    unlimited = measure(root, None, min(num_tokens, 2000), None)
    free = measure(root, budget, 50, None)
    capped = measure(root, budget, num_tokens, allowance(free) + CAP_SLACK_BYTES)
    return {"unlimited": unlimited, "capped": capped}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--tokens", type=int, default=10_000)
    parser.add_argument("--budget", default=None)
    parser.add_argument("--child", type=Path, default=None)
    parser.add_argument("--keep", action="store_true")
    chosen = parser.parse_args()
    if chosen.child is not None:
        print(json.dumps(run_child(chosen.child, chosen.budget, chosen.tokens)))
        return
    budget = chosen.budget or "12.5%"
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = write_random_checkpoint(Path(folder) / "checkpoint")
        extract(checkpoint, Path(folder) / "store")
        results = compare(Path(folder) / "store", budget, chosen.tokens)
    capped = results["capped"]
    if not capped["exit_code"]:
        left = allowance(capped) - capped["peak_rss"]
        print(f"peak {capped['peak_rss']}, allowed {allowance(capped)}, left {left}", file=sys.stderr)
    finish("bench_rss", {"budget": budget, "tokens": chosen.tokens}, results, is_kept=chosen.keep)


if __name__ == "__main__":
    main()
