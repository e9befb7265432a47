"""Rotary tables, captured states and injections against the published implementation of Qwen3-Omni's thinker.

Tolerance: tables within 1e-6 (the published code multiplies and turns in the same order), hidden states within
1e-4 of the largest value's size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM
from transformers.models.qwen3_omni_moe.configuration_qwen3_omni_moe import Qwen3OmniMoeTextConfig
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import (
    Qwen3OmniMoeThinkerTextModel,
    Qwen3OmniMoeThinkerTextRotaryEmbedding,
)

from router.backbone import Backbone
from router.batcher import BatchLimits
from router.errors import ConfigUnsupported
from router.loading import EngineOptions, LoadedEngine
from router.prompt_inputs import InputRows, PromptInputs
from router.request import GenerationRequest, SamplingParams
from router.rope import MOST_KEPT, RotaryEmbedding, rotate
from tests.checkpoints import SIZES
from tests.engines import RecordingEngine, open_engine, small_engine
from tests.router.configs import tiny_config

SECTION = (4, 2, 2)
NUM_TOKENS = 40
RELATIVE_TOLERANCE = 1e-4


@pytest.mark.parametrize(
    ("head_dim", "section"),
    [(128, (24, 20, 20)), (16, (4, 2, 2)), (16, (2, 3, 3)), (64, (8, 12, 12)), (24, (0, 6, 6))],
)
def test_tables_for_different_rows_agree_with_transformers(
    head_dim: int, section: tuple[int, int, int]
) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": list(section)}
    config = tiny_config(head_dim=head_dim, rope_theta=None, rope_parameters=rope)
    published = Qwen3OmniMoeThinkerTextRotaryEmbedding(
        Qwen3OmniMoeTextConfig(head_dim=head_dim, rope_parameters=rope)
    )
    generator = torch.Generator().manual_seed(head_dim)
    positions = torch.randint(0, 30000, (3, 50), generator=generator)
    expected = published(torch.zeros(1), positions.unsqueeze(1))
    for table, reference in zip(RotaryEmbedding(config).tables(positions), expected, strict=True):
        torch.testing.assert_close(table.squeeze(1), reference[0], rtol=0, atol=1e-6)


def test_equal_rows_make_the_plain_form() -> None:
    sectioned = tiny_config(rope_scaling={"mrope_section": list(SECTION), "rope_type": "default"})
    positions = torch.arange(100).expand(3, -1)
    for one, other in zip(
        RotaryEmbedding(sectioned).tables(positions),
        RotaryEmbedding(tiny_config()).tables(positions),
        strict=True,
    ):
        assert torch.equal(one, other)


def test_a_row_has_the_same_bits_whatever_comes_with_it() -> None:
    rope = RotaryEmbedding(tiny_config(head_dim=128))
    positions = torch.randint(0, 30000, (3, 77), generator=torch.Generator().manual_seed(0))
    x = torch.randn(77, 3, 128, generator=torch.Generator().manual_seed(1))
    whole = rotate(x, *rope.tables(positions))
    for first, count in ((0, 1), (5, 2), (76, 1), (30, 17)):
        rows = slice(first, first + count)
        assert torch.equal(rotate(x[rows], *rope.tables(positions[:, rows])), whole[rows])


def test_kept_positions_have_the_same_bits_in_every_order_and_company() -> None:
    """Text alone, text beside rows of media, positions that are not kept, and a table that grew in other steps."""
    text = torch.tensor([0, 1023, 1024, 5000, MOST_KEPT - 1, MOST_KEPT, MOST_KEPT + 70, 3])
    media = torch.tensor([[7, 8], [9, 8], [7, 40000]])
    grown, asked_once = (RotaryEmbedding(tiny_config(head_dim=128)) for _ in range(2))
    parts = [grown.tables(position.expand(3, 1)) for position in text]
    mixed = asked_once.tables(torch.cat((text.expand(3, -1), media), dim=1))
    for table, alone, among in zip(
        asked_once.tables(text.expand(3, -1)), zip(*parts, strict=True), mixed, strict=True
    ):
        assert torch.equal(table, torch.cat(alone)) and torch.equal(table, among[:-2])
    for table, among in zip(asked_once.tables(media), mixed, strict=True):
        assert torch.equal(table, among[-2:])
    angles = text.double()[:, None] * 10000.0 ** -(torch.arange(0, 128, 2).double() / 128)
    expected = torch.cat((angles, angles), dim=1)
    for table, exact in zip(mixed, (expected.cos(), expected.sin()), strict=True):
        assert (table[:-2].squeeze(1) - exact).abs().max() < 5e-3  # of angles in float32


def test_frequencies_for_a_length_do_not_depend_on_the_rows_beside_them() -> None:
    """The dynamic kind: a short text beside a long one, whatever the order."""
    rope = RotaryEmbedding(tiny_config(rope_parameters={"rope_type": "dynamic", "factor": 4.0}))
    positions = torch.randint(0, 1000, (3, 60), generator=torch.Generator().manual_seed(0))
    lengths = torch.randint(1, 1000, (60,), generator=torch.Generator().manual_seed(1))
    cos, sin = rope.tables(positions, lengths)
    for first, count in ((0, 1), (5, 2), (59, 1), (20, 31)):
        rows = slice(first, first + count)
        part = rope.tables(positions[:, rows], lengths[rows])
        assert torch.equal(part[0], cos[rows]) and torch.equal(part[1], sin[rows])
    within, beyond = (rope.tables(positions, torch.full((60,), length))[0] for length in (256, 257))
    assert not torch.equal(within, beyond)


def test_sections_in_one_piece_are_refused() -> None:
    rope = {"rope_type": "default", "mrope_section": list(SECTION), "mrope_interleaved": False}
    with pytest.raises(ConfigUnsupported, match="interleaved"):
        tiny_config(rope_parameters=rope)


@dataclass(frozen=True)
class Thinker:
    """The tiny model twice, with mrope: as published, and ours."""

    published: Qwen3OmniMoeThinkerTextModel
    loaded: LoadedEngine

    def hidden_states(self, **inputs: object) -> list[torch.Tensor]:
        """After each layer, before anything is added there, as transformers collects them."""
        collected: list[torch.Tensor] = []
        hooks = [
            layer.register_forward_hook(lambda module, args, output: collected.append(output[0]))
            for layer in self.published.layers
        ]
        with torch.no_grad():
            self.published(use_cache=False, **inputs)
        for hook in hooks:
            hook.remove()
        return collected

    def captured(self, prompt: tuple[int, ...], inputs: PromptInputs) -> dict[int, torch.Tensor]:
        """Ours, in chunks of 16, without the generated token."""
        pieces: dict[int, list[torch.Tensor]] = {}

        def keep(layer: int, first: int, hidden: torch.Tensor) -> None:
            pieces.setdefault(layer, []).append(hidden)

        wish = replace(inputs, capture_layers=(0, 1, 2), on_capture=keep)
        engine: RecordingEngine = small_engine(self.loaded, 4, BatchLimits(max_batch_tokens=16))
        engine.submit(GenerationRequest("r", prompt, SamplingParams(max_tokens=1)), wish)
        while engine.has_work:
            engine.step()
        return {layer: torch.cat(rows) for layer, rows in pieces.items()}


@pytest.fixture(scope="module")
def thinker(tiny_checkpoint: Path, tiny_store: Path) -> Iterator[Thinker]:
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": list(SECTION)}
    sizes = SIZES | {"num_hidden_layers": 3, "mlp_only_layers": [1]}
    config = Qwen3OmniMoeTextConfig(
        **sizes, rope_parameters=rope, attn_implementation="eager", experts_implementation="eager"
    )
    published = Qwen3OmniMoeThinkerTextModel(config).eval()
    plain = AutoModelForCausalLM.from_pretrained(tiny_checkpoint, dtype=torch.float32)
    published.load_state_dict(plain.model.state_dict())
    loaded = open_engine(tiny_store, EngineOptions(dtype="float32"))
    backbone = Backbone(
        loaded.store,
        "model",
        replace(loaded.config, rope=replace(loaded.config.rope, mrope_section=SECTION, theta=10000.0)),
        loaded.kernel,
        loaded.directory,
        loaded.dtype,
    )
    loaded.engine.backbone = backbone
    yield Thinker(published, loaded)
    loaded.close()


def _prompt() -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(2)
    return tuple(torch.randint(0, 500, (NUM_TOKENS,), generator=generator).tolist())


def _assert_close(captured: dict[int, torch.Tensor], published: list[torch.Tensor]) -> None:
    assert list(captured) == [0, 1, 2]
    for layer, expected in enumerate(published):
        worst = (captured[layer] - expected).abs().max() / expected.abs().max()
        assert worst < RELATIVE_TOLERANCE, f"layer {layer}: {worst}"


def test_captured_states_equal_the_published_ones(thinker: Thinker) -> None:
    prompt = _prompt()
    ids = torch.tensor([prompt])
    published = thinker.hidden_states(input_ids=ids)
    _assert_close(thinker.captured(prompt, PromptInputs()), published)
    with torch.no_grad():
        listed = thinker.published(input_ids=ids, output_hidden_states=True).hidden_states
    for layer in (0, 1):
        assert torch.equal(listed[layer + 1][0], published[layer]), "the hook sees what transformers lists"


def test_positions_embeddings_and_injections_do_what_the_published_model_does(thinker: Thinker) -> None:
    """Media in the middle of a prompt: embeddings of its own, three position rows, deepstack in two layers."""
    prompt = _prompt()
    generator = torch.Generator().manual_seed(3)
    positions = torch.randint(0, 90, (3, NUM_TOKENS), generator=generator)
    media = range(10, 26)
    embeddings = torch.randn(len(media), 64, generator=generator)
    added = torch.randn(2, len(media), 64, generator=generator)
    inputs = PromptInputs(
        (InputRows(media.start, embeddings),),
        positions,
        {layer: (InputRows(media.start, added[layer]),) for layer in (0, 1)},
    )
    with torch.no_grad():
        inputs_embeds = thinker.published.embed_tokens(torch.tensor([prompt]))
    inputs_embeds[0, media.start : media.stop] = embeddings
    mask = torch.zeros(1, NUM_TOKENS, dtype=torch.bool)
    mask[0, media.start : media.stop] = True
    published = thinker.hidden_states(
        inputs_embeds=inputs_embeds,
        position_ids=positions.unsqueeze(1),
        visual_pos_masks=mask,
        deepstack_visual_embeds=list(added),
    )
    _assert_close(thinker.captured(prompt, inputs), published)
