"""Whether the contenders of `bench_peers` compute the same model, and what is read off their answers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from benchmarks.bench_peers import Measure, Rounds, single_measures
from benchmarks.bench_roofline import add_bounds
from benchmarks.peer_gguf import gguf_tensors, write_gguf
from benchmarks.peer_models import BUNDLED, PeerModel
from benchmarks.peer_run import Contender, Generated
from benchmarks.peer_sage import SageContender
from benchmarks.peer_transformers import TransformersContender
from benchmarks.read_bandwidth import Bandwidth
from benchmarks.step_watch import StepWatch

TOKENS = 12
MEAN_LOGPROB_TOLERANCE = 0.1
"""Between programs whose bfloat16 products round otherwise, so that now and then a token gets another eighth expert; a
wrong rotation or norm moves logits by more than 1."""
CLEAR_MARGIN = 0.5
"""Between the two likeliest tokens: above it both programs must take the same."""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> PeerModel:
    return PeerModel(tmp_path_factory.mktemp("peers"), "qwen3_moe", is_tiny=True)


@pytest.fixture(scope="module")
def sage(tiny: PeerModel) -> SageContender:
    return SageContender(tiny.store("bf16"), 2)


def check_same_model(one: Contender, other: Contender, model: PeerModel) -> None:
    prompts = model.prompts(3, 40, seed=1)
    ours, theirs = one.generate(prompts, TOKENS), other.generate(prompts, TOKENS)
    assert ours.num_tokens == theirs.num_tokens == 3 * TOKENS
    for prompt in prompts:
        mine, yours = one.top_logprobs(prompt, 5), dict(other.top_logprobs(prompt, 100))
        differences = [abs(value - yours[token]) for token, value in mine]
        assert sum(differences) / len(differences) < MEAN_LOGPROB_TOLERANCE
        if mine[0][1] - mine[1][1] > CLEAR_MARGIN:
            assert mine[0][0] == max(yours, key=yours.__getitem__)
    assert len(set(map(tuple, ours.tokens))) == 3, "three prompts have three answers"


def test_transformers_and_the_engine_compute_the_same_model(tiny: PeerModel, sage: SageContender) -> None:
    check_same_model(sage, TransformersContender(tiny.checkpoint(), 1), tiny)


@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_llama_cpp_and_the_engine_compute_the_same_model(tmp_path: Path, family: str) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra bench")
    from benchmarks.peer_llama import LlamaContender

    model = PeerModel(tmp_path, family, is_tiny=True)
    sage = SageContender(model.store("bf16"), 2)
    llama = LlamaContender(model.gguf("bf16", 2), 2, 4096)
    check_same_model(sage, llama, model)
    assert llama.facts().head_bytes == sage.facts().head_bytes
    llama.close()
    sage.close()


def test_llama_cpp_and_the_engine_write_the_same_story(tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="needs the extra bench")
    from benchmarks.peer_llama import LlamaContender

    model = PeerModel(tmp_path, BUNDLED)
    check_same_model(
        SageContender(model.store("bf16"), 2), LlamaContender(model.gguf("bf16", 2), 2, 4096), model
    )


def test_every_tensor_of_the_bundled_model_has_its_place_in_a_gguf_file() -> None:
    checkpoint = PeerModel(Path(), BUNDLED).checkpoint()
    config = json.loads((checkpoint / "config.json").read_text())
    tensors = load_file(checkpoint / "model.safetensors")
    found = gguf_tensors({name: tuple(tensor.shape) for name, tensor in tensors.items()}, config)
    sources = [source for tensor in found for source in tensor.sources]
    assert sorted(sources) == sorted(set(tensors) - {"lm_head.weight"}), "the head is the embedding"
    experts = next(tensor for tensor in found if tensor.name == "blk.0.ffn_down_exps.weight")
    assert experts.shape == (64, 256, 48)


def test_a_tensor_without_a_place_is_refused() -> None:
    with pytest.raises(ValueError, match="no place"):
        gguf_tensors({"model.surprise": (1,)}, {"num_hidden_layers": 0})


def test_gguf_of_another_family_is_refused(tmp_path: Path) -> None:
    pytest.importorskip("gguf", reason="needs the extra bench")
    (tmp_path / "config.json").write_text('{"model_type": "mixtral"}')
    with pytest.raises(ValueError, match="mixtral"):
        write_gguf(tmp_path, tmp_path / "x.gguf")


def test_figures_of_an_answer() -> None:
    got = Generated([[1, 2, 3], [4, 5, 6]], 6, [0.5, 1.0], [2.0, 3.0])
    assert (got.prefill_s, got.decode_tokens_per_s, got.tokens_per_s) == (1.0, 2.0, 2.0)


def test_ratios_are_taken_inside_a_round() -> None:
    rounds = Rounds(["sage-moe", "transformers"])
    for ours, theirs in ((10.0, 5.0), (30.0, 10.0), (8.0, 8.0)):
        rounds.add("decode", "sage-moe", {"tokens_per_s": ours}, "")
        rounds.add("decode", "transformers", {"tokens_per_s": theirs}, "eager")
    found = rounds.summary([("sage-moe", "transformers")])["decode"]
    assert found["ratios"]["sage-moe / transformers"]["median"] == 2.0
    assert found["contenders"]["sage-moe"]["tokens_per_s"]["median"] == 10.0
    assert found["how"] == {"transformers": "eager"}


def test_prompts_are_no_longer_than_the_context() -> None:
    def names(measures: list[Measure]) -> list[str]:
        return [measure.name for measure in measures]

    assert names(single_measures(40960)) == ["decode", "prefill 512", "prefill 2048"]
    assert names(single_measures(2048)) == ["decode", "prefill 512", "prefill 2047"]
    assert names(single_measures(256)) == ["decode", "prefill 255"]


def test_prompts_are_the_same_for_everybody_and_differ_by_seed(tiny: PeerModel) -> None:
    assert tiny.prompts(2, 30, seed=1) == tiny.prompts(2, 30, seed=1) != tiny.prompts(2, 30, seed=2)
    assert max(token for prompt in tiny.prompts(20, 50, seed=3) for token in prompt) < 511
    book = PeerModel(Path(), BUNDLED).prompts(2, 30, seed=1)
    assert [len(prompt) for prompt in book] == [30, 30] and book[0] != book[1]


def test_a_watched_step_counts_the_bytes_of_the_experts_that_it_used(
    tiny: PeerModel, sage: SageContender
) -> None:
    plain = sage.generate(tiny.prompts(2, 20, seed=4), 4).tokens
    watched = SageContender(tiny.store("bf16"), 2)
    watch = StepWatch(watched.loaded)
    from router.request import GenerationRequest, SamplingParams

    sampling = SamplingParams(max_tokens=4, temperature=0.0)
    for number, prompt in enumerate(tiny.prompts(2, 20, seed=4)):
        watched.loaded.engine.submit(GenerationRequest(str(number), tuple(prompt), sampling))
    first, _ = watch.step()
    second, drawn = watch.step()
    config = watched.loaded.config
    assert (first.num_rows, second.num_rows, drawn) == (40, 2, 2)
    assert second.num_positions == 2 * 21
    used = sum(len(experts) for experts in second.experts.values())
    assert config.experts_per_token * 2 <= used <= 2 * 2 * config.experts_per_token
    counted = watch.step_bytes(second)
    assert counted["experts"] == used * 3 * 2 * config.expert_width * config.hidden_size
    assert counted["head"] == 512 * 64 * 2
    assert counted["gate and dispatch"] == 2 * 16 * 64 * 2
    assert min(second.seconds.values()) >= 0.0
    watched.close()
    assert plain == sage.generate(tiny.prompts(2, 20, seed=4), 4).tokens


def test_bounds_follow_from_bytes_and_products() -> None:
    def figures(step_ms: float, tokens_per_s: float, needed: int) -> dict[str, object]:
        return {"step_ms": {"median": step_ms}, "tokens_per_s": tokens_per_s, "bytes": {"head": needed}}

    found = {1: figures(20.0, 50.0, 10**8), 4: figures(40.0, 100.0, 2 * 10**8)}
    add_bounds(found, Bandwidth(1e10, "stated"), 1e9, {"head": 2.5e6})
    assert found[1]["bound_ms"] == pytest.approx({"bytes": 10.0, "products": 5.0})
    assert (found[1]["of_bandwidth"], found[4]["of_bound"]) == pytest.approx((0.5, 0.5))
    assert found[4]["of_ideal_scaling"] == pytest.approx(1.0)


def test_the_quick_run_compares_processes_and_prints_one_json(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.bench_peers", "--quick", "--folder", str(tmp_path)]
    command += [
        "--part",
        "streams",
        "--streams",
        "2",
        "--rounds",
        "2",
        "--contenders",
        "sage-moe",
        "transformers",
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, check=True)
    record = json.loads(done.stdout.splitlines()[-1])
    found = record["results"]["2 streams"]
    assert set(found["contenders"]) == {"sage-moe", "transformers"}
    assert found["contenders"]["sage-moe"]["tokens_per_s"]["samples"] == 2
    assert record["config"]["contenders"]["transformers"]["memory"]["peak"] > 10**8
    assert torch.__version__ == record["environment"]["packages"]["torch"]
