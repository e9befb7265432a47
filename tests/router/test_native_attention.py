"""Our own attention: against the same in float64, bit by bit against itself, and what it refuses."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from experts.native_products import LEVELS, library
from router.attention import BLOCK_POSITIONS
from router.kv_cache import KvPool, blocks_for
from router.model_config import ModelConfig
from router.native_attention import NO_NORMS, HeadNorms, Places, attend_in_cache, norm_rows
from router.rope import rotate
from router.step_batch import Span
from tests.router.configs import tiny_config

BUILT = library()
if BUILT is None:
    pytest.skip("native products are not built here", allow_module_level=True)
LEVELS_HERE = LEVELS[: LEVELS.index(BUILT.best_level) + 1]
NUM_BLOCKS = 12
TOLERANCES = {torch.float32: 1e-5, torch.bfloat16: 2e-2}
EPS = 1e-6


def _config(head_dim: int, window: int | None = None) -> ModelConfig:
    config = replace(tiny_config(head_dim=head_dim), sliding_window=window, rms_norm_eps=EPS)
    return replace(config, windowed_layers=frozenset(range(config.num_layers) if window else ()))


class Texts:
    """Rows of several sequences by position, and a cache that they are written to, span by span."""

    def __init__(self, config: ModelConfig, dtype: torch.dtype, *, has_norms: bool = True) -> None:
        generator = torch.Generator().manual_seed(7)
        width = config.q_width + 2 * config.kv_width
        self.config, self.dtype = config, dtype
        self.rows = torch.randn(3, 300, width, generator=generator).to(dtype)
        self.angles = torch.randn(300, 1, config.head_dim, generator=generator)
        weights = torch.rand(2, config.head_dim, generator=generator).add_(0.5).to(dtype)
        self.norms = HeadNorms(weights[0], weights[1]) if has_norms else NO_NORMS
        self.pool = KvPool(config, NUM_BLOCKS, dtype)

    def attend(self, level: str, *spans: tuple[int, Span]) -> list[Tensor]:
        """spans: with the number of their text."""
        qkv = torch.cat([self.rows[text, span.first : span.first + span.count] for text, span in spans])
        angles = torch.cat([self.angles[span.first : span.first + span.count] for _, span in spans])
        rotation = angles.cos(), angles.sin()
        places = Places.of([span for _, span in spans])
        out = attend_in_cache(level, self.config, qkv, self.norms, rotation, self.pool, 1, places)
        return list(out.split([span.count for _, span in spans]))

    def plain(self, text: int, count: int) -> Tensor:
        """The first rows of a text in float64 but for what the cache rounds."""
        config = self.config
        heads = self.rows[text, :count].view(count, -1, config.head_dim)
        q, k, v = heads.split([config.num_heads, config.num_kv_heads, config.num_kv_heads], dim=1)
        cos, sin = self.angles[:count].cos(), self.angles[:count].sin()
        q, k = (rotate(self._normed(x, w), cos, sin) for x, w in ((q, self.norms.q), (k, self.norms.k)))
        shared = config.num_heads // config.num_kv_heads
        k, v = (x.to(self.dtype).double().repeat_interleave(shared, dim=1).transpose(0, 1) for x in (k, v))
        scores = q.double().transpose(0, 1) @ k.transpose(1, 2) * config.head_dim**-0.5
        seen = torch.ones(count, count).tril().bool()
        if config.sliding_window is not None:
            seen &= ~torch.ones(count, count).tril(-config.sliding_window).bool()
        weights = scores.masked_fill(~seen, float("-inf")).softmax(dim=-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    def _normed(self, x: Tensor, weight: Tensor | None) -> Tensor:
        if weight is None:
            return x.float()
        wide = x.float()
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)
        return ((wide * scale).to(self.dtype) * weight).float()


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("head_dim", "window"), [(12, None), (16, 9), (64, None), (70, 100), (128, None)])
@pytest.mark.parametrize("has_norms", [True, False])
def test_rows_agree_with_a_plain_reference(
    level: str, dtype: torch.dtype, head_dim: int, window: int | None, has_norms: bool
) -> None:
    texts = Texts(_config(head_dim, window), dtype, has_norms=has_norms)
    (found,) = texts.attend(level, (0, Span((3, 7, 2), 0, 150)))
    expected = texts.plain(0, 150)
    assert (found.double() - expected).abs().max() <= TOLERANCES[dtype] * expected.abs().max()


@pytest.mark.parametrize("level", LEVELS_HERE)
@given(
    cuts=st.lists(st.integers(1, 199), max_size=8),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
    window=st.sampled_from([None, 1, 50, 64, 100]),
    threads=st.integers(1, 3),
)
@settings(max_examples=15, deadline=None)
def test_chunks_beside_others_have_the_bits_of_the_whole(
    level: str, cuts: list[int], dtype: torch.dtype, window: int | None, threads: int
) -> None:
    texts = Texts(_config(16, window), dtype)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        (whole,) = texts.attend(level, (0, Span((1, 2, 3, 4), 0, 200)))
        (other,) = texts.attend(level, (1, Span((5, 6, 7, 8), 0, 200)))
        torch.set_num_threads(threads)
        edges = sorted({0, 200, *cuts})
        for first, end in pairwise(edges):
            mine = (0, Span((9, 11, 10, 1), first, end - first))
            beside = (1, Span((5, 6, 7, 8), 199 - first, 1))
            part, alone = (
                texts.attend(level, mine, beside) if first % 2 else texts.attend(level, beside, mine)[::-1]
            )
            assert torch.equal(part, whole[first:end])
            assert torch.equal(alone, other[199 - first : 200 - first])
    finally:
        torch.set_num_threads(before)


def _rows_of(texts: Texts, level: str) -> tuple[Tensor, Tensor]:
    """Keys and values of the cache, one row of a position after another: level `avx512bf16` keeps them in pairs."""
    keys, values = texts.pool.keys, texts.pool.values
    if level != "avx512bf16" or texts.dtype != torch.bfloat16:
        return keys, values
    *outer, positions, width = keys.shape
    paired_keys = keys.view(*outer, width // 2, positions, 2)
    paired_values = values.view(*outer, positions // 2, width, 2)
    return paired_keys.transpose(-3, -2).reshape(keys.shape), paired_values.transpose(-2, -1).reshape(
        values.shape
    )


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [16, 70])
def test_cache_has_what_was_written_and_nothing_else(level: str, dtype: torch.dtype, head_dim: int) -> None:
    texts = Texts(_config(head_dim), dtype, has_norms=False)
    texts.attend(level, (0, Span((3, 7), 60, 10)))
    config = texts.config
    written = texts.rows[0, 60:70, config.q_width :].view(10, 2, config.num_kv_heads, head_dim)
    turned = rotate(written[:, 0].float(), texts.angles[60:70].cos(), texts.angles[60:70].sin()).to(dtype)
    for cache, rows in zip(_rows_of(texts, level), (turned, written[:, 1]), strict=True):
        torch.testing.assert_close(cache[1, 3, :, 60:], rows[:4].transpose(0, 1))
        torch.testing.assert_close(cache[1, 7, :, :6], rows[4:].transpose(0, 1))
        assert int((cache.abs().sum(dim=(2, 4)) > 0).sum()) == 10


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [None, 9])
def test_what_others_left_in_a_block_changes_nothing(
    level: str, dtype: torch.dtype, window: int | None
) -> None:
    """Blocks are handed on as they are, with numbers in them; so are positions before a window."""
    clean, used = Texts(_config(30, window), dtype), Texts(_config(30, window), dtype)
    generator = torch.Generator().manual_seed(2)
    for cache in (used.pool.keys, used.pool.values):
        cache.copy_(torch.randn(cache.shape, generator=generator).mul_(100))
    for first, count in ((0, 61), (61, 1), (62, 1), (63, 2), (65, 1), (66, 30)):
        span = 0, Span((3, 7), first, count)
        assert torch.equal(*(texts.attend(level, span)[0] for texts in (clean, used)))


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_numbers_that_are_none_and_others_left_in_a_block_change_nothing(
    level: str, dtype: torch.dtype
) -> None:
    """Positions behind the rows' own, an odd and an even number of them."""
    clean, used = Texts(_config(30), dtype), Texts(_config(30), dtype)
    for cache in (used.pool.keys, used.pool.values):
        cache.fill_(float("nan"))
    for first, count in ((0, 5), (5, 1), (6, 1), (7, 30), (37, 27), (64, 1)):
        span = 0, Span((3, 7), first, count)
        assert torch.equal(*(texts.attend(level, span)[0] for texts in (clean, used)))


def test_row_of_numbers_that_are_none_spoils_no_other_sequence() -> None:
    texts = Texts(_config(16), torch.float32)
    clean = texts.attend(LEVELS_HERE[-1], (0, Span((1,), 0, 9)), (1, Span((2,), 0, 9)))
    texts.rows[0, 3] = float("nan")
    spoilt = texts.attend(LEVELS_HERE[-1], (0, Span((1,), 0, 9)), (1, Span((2,), 0, 9)))
    assert bool(spoilt[0][3:].isnan().all())
    assert torch.equal(spoilt[1], clean[1])


@pytest.mark.parametrize("span", [Span((1,), 60, 5), Span((), 0, 1), Span((1,), -1, 1), Span((-1,), 0, 1)])
def test_span_that_its_blocks_do_not_cover_is_refused(span: Span) -> None:
    with pytest.raises(ValueError, match="rows from position"):
        Places.of([span])


def test_what_does_not_fit_is_refused() -> None:
    texts = Texts(_config(16), torch.float32)
    level, config, pool = LEVELS_HERE[0], texts.config, texts.pool
    qkv, rotation = texts.rows[0, :2], (texts.angles[:2].cos(), texts.angles[:2].sin())
    places = Places.of([Span((1,), 0, 2)])
    attend_in_cache(level, config, qkv, texts.norms, rotation, pool, 0, places)
    wrong = [
        (qkv[:1], texts.norms, rotation, 0, places),
        (qkv.bfloat16(), texts.norms, rotation, 0, places),
        (qkv[:, ::2].repeat(1, 2).t().contiguous().t(), texts.norms, rotation, 0, places),
        (qkv, HeadNorms(torch.ones(15), None), rotation, 0, places),
        (qkv, texts.norms, (rotation[0][:1], rotation[1]), 0, places),
        (qkv, texts.norms, rotation, config.num_layers, places),
        (qkv, texts.norms, rotation, -1, places),
        (qkv, texts.norms, rotation, 0, Places.of([Span((NUM_BLOCKS,), 0, 2)])),
    ]
    for rows, norms, turned, layer, where in wrong:
        with pytest.raises(ValueError, match=r"expected|no layer"):
            attend_in_cache(level, config, rows, norms, turned, pool, layer, where)


@pytest.mark.parametrize("level", LEVELS_HERE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("width", [1, 19, 64, 2048])
def test_norm_is_that_of_the_definition_and_of_the_row_alone(
    level: str, dtype: torch.dtype, width: int
) -> None:
    generator = torch.Generator().manual_seed(width)
    rows = torch.randn(70, width, generator=generator).to(dtype)
    weight = torch.rand(width, generator=generator).add_(0.5).to(dtype)
    found = norm_rows(level, rows, weight, EPS)
    wide = rows.double()
    expected = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS) * weight.double()
    tolerance = 2e-6 if dtype is torch.float32 else 1e-2
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
    for row in (0, 31, 32, 69):
        assert torch.equal(norm_rows(level, rows[row : row + 1], weight, EPS)[0], found[row])
    with pytest.raises(ValueError, match="expected"):
        norm_rows(level, rows, weight[:-1] if width > 1 else torch.ones(2, dtype=dtype), EPS)


def test_blocks_are_as_long_as_the_library_takes_them() -> None:
    assert BLOCK_POSITIONS == 64
    assert blocks_for(65) == 2
