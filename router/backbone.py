"""The decoder without its experts: embeddings, attention, norms, gates, dense layers, head.

Computes one step for a batch of token rows that belong to any mix of sequences and positions, layer by layer as
`router.decoder_layer` does. Called by `router.engine`.
"""

from __future__ import annotations

import time

import torch
from torch import Tensor

from experts.devices import upload
from experts.directory import ExpertDirectory
from experts.numerics import RowKernel, computing_threads
from experts.packed_matrix import linear
from experts.store import ExpertStore
from router.asked_run import AskedRun, find_asked_run
from router.decoder_layer import LayerArithmetic
from router.kv_cache import KvPool
from router.layer_run import LayerRun, RunTimes, compute_run, find_run
from router.linears import FLOAT, LinearForms
from router.model_config import ModelConfig
from router.native_head import NativeHead
from router.prefetch import Prefetcher
from router.step_batch import Half, StepBatch, StepOutput
from router.weights import TensorLoader, load_layer


class Backbone:
    """Weights on one device, and the forward pass of a step."""

    def __init__(
        self,
        store: ExpertStore,
        component: str,
        config: ModelConfig,
        kernel: RowKernel,
        directory: ExpertDirectory,
        dtype: torch.dtype,
        forms: LinearForms = FLOAT,
    ) -> None:
        """Reads every backbone tensor of the component. forms: of its quantised matrices.

        Raises WeightMismatch, or what reading the store raises.
        """
        self.config, self.kernel, self.dtype = config, kernel, dtype
        self.directory = directory
        load = TensorLoader(store, component, dtype, kernel, forms)
        width = config.hidden_size
        self.embeddings_VD = load("embed_tokens.weight", config.vocab_size, width)
        self.layers = [
            load_layer(load, index, component, config, kernel, directory)
            for index in range(config.num_layers)
        ]
        self.norm_D = load("norm.weight", width)
        self.head_VD = load.head(config, self.embeddings_VD)
        self.arithmetic = LayerArithmetic(config, kernel, dtype)
        self.native_head: NativeHead | None = None
        if kernel.product == "native":
            self.native_head = NativeHead.of(kernel.level, self.norm_D, self.head_VD, config.rms_norm_eps)
        self.prefetcher: Prefetcher | None = None
        """Hints each layer's successor's experts; None hints nothing."""
        self.run_times = RunTimes()
        self.asked_times = RunTimes()
        """The same of layers whose experts are asked for: beside a layer without experts they may take long."""
        self.progressed_at = time.monotonic()
        """When a layer was last finished; a step of a large model may take long without being stuck."""

    @property
    def nbytes(self) -> int:
        """Resident bytes of the weights; a head that is the embedding counts once."""
        head_bytes = 0 if self.head_VD is self.embeddings_VD else self.head_VD.nbytes
        layers = sum(layer.nbytes for layer in self.layers)
        return self.embeddings_VD.nbytes + self.norm_D.nbytes + head_bytes + layers

    def forward(self, batch: StepBatch, pool: KvPool) -> StepOutput:
        """Run one step: reads and extends the KV cache of the batch's sequences.

        Raises ExpertError when an expert could not be computed; the cache positions of this step are then
        undefined and may be computed again.
        """
        forward = self.begin(batch)
        while not forward.is_done:
            forward.advance(pool)
        return forward.finish()

    def begin(self, batch: StepBatch) -> ForwardPass:
        """The same, a layer at a time where the caller wants it."""
        return ForwardPass(self, batch)

    @torch.inference_mode()
    def logits(self, hidden_LD: Tensor) -> Tensor:
        """Float32 logits of final hidden states, in host memory. No rows are a chunk that does not reach its prompt's
        end."""
        return self.logits_and_best(hidden_LD)[0]

    @torch.inference_mode()
    def logits_and_best(self, hidden_LD: Tensor) -> tuple[Tensor, list[int]]:
        """The same, with each row's likeliest token: of equal ones the first, -1 where a logit is not finite."""
        if not len(hidden_LD):
            return torch.empty(0, self.config.vocab_size, dtype=torch.float32), []
        if self.native_head is not None:
            return self.native_head.logits(hidden_LD)
        normed_LD = self.arithmetic.norm(hidden_LD, self.norm_D)
        logits_LV = linear(self.kernel, normed_LD, self.head_VD).float().cpu()
        are_finite_L = torch.isfinite(logits_LV).all(dim=1)
        return logits_LV, torch.where(are_finite_L, logits_LV.argmax(dim=1), -1).tolist()

    def divisible(self) -> frozenset[Half]:
        """Which halves can pause in the middle, in every layer."""
        halves: tuple[Half, ...] = ("attention", "experts")
        return frozenset(
            half for half in halves if all(self.arithmetic.is_divisible(layer, half) for layer in self.layers)
        )

    def embed(self, batch: StepBatch) -> Tensor:
        """(P, D) inputs of the first layer."""
        hidden_TD = self.embeddings_VD.index_select(0, upload(batch.token_ids_T, self.kernel.device))
        for run in batch.embeddings:
            hidden_TD[run.first : run.end] = run.rows_ND.to(self.kernel.device, self.dtype)
        return self.arithmetic.pad(hidden_TD)


class ForwardPass:
    """The way of a step's rows through the layers: `advance` until `is_done`, then `finish`.

    May pause between any two halves of layers, and in the middle of those that are `is_next_divisible`. A row's bits
    depend on its own inputs and on keys and values that are there before it is computed, so what other passes compute
    meanwhile changes nothing.
    """

    @torch.inference_mode()
    def __init__(self, backbone: Backbone, batch: StepBatch) -> None:
        self.batch = batch
        self._backbone = backbone
        self._hidden_PD = backbone.embed(batch)
        self._inputs = backbone.arithmetic.prepare(batch)
        self._captured: dict[int, Tensor] = {}
        self._phases = {"attention": 0.0, "experts": 0.0, "head": 0.0}
        self._num_done = 0
        self.next_half: Half = "attention"
        """Of the layer that is computed next, or is on its way."""
        self.is_in_half = False
        """Whether it pauses in the middle of that half."""
        self._threads = backbone.arithmetic.threads_for(batch.num_tokens)

    @property
    def num_done(self) -> int:
        """Layers that are complete."""
        return self._num_done

    @property
    def num_left(self) -> int:
        """Layers that are not."""
        return len(self._backbone.layers) - self._num_done

    @property
    def is_done(self) -> bool:
        return self.num_left == 0

    @property
    def is_in_layer(self) -> bool:
        return self.is_in_half or self.next_half == "experts"

    @property
    def is_next_divisible(self) -> bool:
        """Whether `advance` can pause in the middle of the next half."""
        if self.is_done:
            return False
        return self._backbone.arithmetic.is_divisible(self._backbone.layers[self._num_done], self.next_half)

    @torch.inference_mode()
    def advance(self, pool: KvPool, until_ns: int | None = None, most_layers: int | None = None) -> None:
        """Compute a layer, or the rest of one, or some that nobody looks into: reads and extends the KV cache of the
        batch's sequences.

        until_ns: monotonic clock; then one half at most is computed, and of one that can pause in the middle what can
        be done until then, at least some. most_layers: otherwise. Raises ExpertError when an expert could not be
        computed; the cache positions of this pass are then undefined and may be computed again.
        """
        # Pieces between steps of streams are short: waiting for a second thread could take longer than they do.
        if until_ns is not None or self._threads == torch.get_num_threads():
            self._advance(pool, until_ns, most_layers)
        else:
            with computing_threads(self._threads):
                self._advance(pool, until_ns, most_layers)

    def _advance(self, pool: KvPool, until_ns: int | None, most_layers: int | None) -> None:
        run = self._find_run(most_layers or len(self._backbone.layers)) if until_ns is None else None
        if isinstance(run, AskedRun):
            self._compute_asked(run, pool)
            return
        if run is not None:
            self._compute_run(run, pool)
            return
        backbone, index = self._backbone, self._num_done
        layer, arithmetic = backbone.layers[index], backbone.arithmetic
        if self.next_half == "attention":
            started = time.perf_counter()
            found_PD = arithmetic.attention(index, layer, self._hidden_PD, self._inputs, pool, until_ns)
            self._note("attention", started, found_PD)
            if until_ns is not None:
                return
        started = time.perf_counter()
        found_PD = arithmetic.feed_forward(layer, self._hidden_PD, self._inputs, until_ns)
        self._note("experts", started, found_PD)
        if found_PD is not None:
            self._end_layer()

    def _find_run(self, most: int) -> LayerRun | AskedRun | None:
        """Of so many layers at most; None where a layer has begun, or somebody wants to see each one's rows."""
        backbone = self._backbone
        if self.is_in_layer or backbone.prefetcher is not None:
            return None
        timed = backbone.run_times.most_layers(self.batch.num_tokens)
        run = find_run(self._num_done, backbone.layers, self._inputs, min(timed, most))
        return run or find_asked_run(self._num_done, backbone.layers, self._inputs, most)

    def _compute_asked(self, run: AskedRun, pool: KvPool) -> None:
        run_times, num_tokens = self._backbone.asked_times, self.batch.num_tokens
        for times in run.compute(self._hidden_PD, pool, run_times.most_layers(num_tokens)):
            self._phases["attention"] += times.attention_s
            self._phases["experts"] += times.experts_s
            run_times.note(num_tokens, times.num_layers, times.attention_s + times.experts_s)
            self._backbone.progressed_at = time.monotonic()
        self._hidden_PD = run.finish()
        self._num_done += len(run.layers) - 1
        self._end_layer()

    def _compute_run(self, run: LayerRun, pool: KvPool) -> None:
        backbone = self._backbone
        output = compute_run(run, self._hidden_PD, self._inputs, pool, backbone.arithmetic.clock)
        self._hidden_PD = output.hidden_TD
        self._phases["attention"] += output.attention_s
        self._phases["experts"] += output.experts_s
        seconds = output.attention_s + output.experts_s
        backbone.run_times.note(self.batch.num_tokens, len(run.layers), seconds)
        backbone.progressed_at = time.monotonic()
        self._num_done += len(run.layers) - 1
        self._end_layer()

    def _note(self, half: Half, started: float, found_PD: Tensor | None) -> None:
        self._phases[half] += time.perf_counter() - started
        self._backbone.progressed_at = time.monotonic()
        self.is_in_half = found_PD is None
        if found_PD is not None:
            self._hidden_PD = found_PD
            self.next_half = "experts" if half == "attention" else "attention"

    def _end_layer(self) -> None:
        """Hand out and add what was asked for."""
        backbone, batch, index, hidden_PD = self._backbone, self.batch, self._num_done, self._hidden_PD
        if backbone.prefetcher is not None:
            backbone.prefetcher.hint(index, hidden_PD, batch.num_tokens)
        if index in batch.capture_layers:
            self._captured[index] = hidden_PD[: batch.num_tokens].to("cpu", copy=True)
        for run in batch.injections.get(index, ()):
            hidden_PD[run.first : run.end] += run.rows_ND.to(backbone.kernel.device, backbone.dtype)
        self._num_done += 1

    @torch.inference_mode()
    def finish(self) -> StepOutput:
        """Logits and whatever else was asked for, after the last layer."""
        assert self.is_done
        started = time.perf_counter()
        hidden_LD = _select(self._hidden_PD, self.batch.logit_rows)
        logits_LV, best_L = self._backbone.logits_and_best(hidden_LD)
        self._phases["head"] = time.perf_counter() - started
        scored_RD = _select(self._hidden_PD, self.batch.scored_rows)
        return StepOutput(logits_LV, self._captured, self._phases, scored_RD, best_L)


def _select(hidden_PD: Tensor, rows: tuple[int, ...]) -> Tensor:
    if not rows:
        return hidden_PD[:0]
    if rows == tuple(range(len(hidden_PD))):
        return hidden_PD
    return hidden_PD.index_select(0, upload(torch.tensor(rows, dtype=torch.int64), hidden_PD.device))
