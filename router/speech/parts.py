"""What a store speaks with, in memory: the talker with its experts, its projections, and the code predictor.

Computed on the CPU whatever computes the text. Read by `open_speaker` when the first speech is asked for.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from experts.devices import upload
from experts.directory import LocalDirectory
from experts.numerics import RowKernel, calibrate
from experts.store import ExpertStore
from experts.worker import ExpertWorker
from extraction.decoder_config import read_size
from extraction.errors import ConfigInvalid
from router.backbone import Backbone
from router.errors import ConfigUnsupported
from router.linears import prove_linears
from router.model_config import ModelConfig, read_model_config
from router.self_test import prove_row_invariance
from router.speech.code_predictor import CodePredictor, read_predictor_config
from router.speech.facts import CODE_PREDICTOR, TALKER
from router.speech.projections import Projection
from router.weights import TensorLoader

logger = logging.getLogger(__name__)

ProveKernel = Callable[[ModelConfig, torch.dtype], RowKernel]


@dataclass(frozen=True)
class SpeechParts:
    """Weights, and what is computed with them alone."""

    thinker_VD: Tensor
    """The text decoder's embeddings, wherever they are."""
    talker: Backbone
    worker: ExpertWorker
    """Of the talker's experts."""
    text_projection: Projection
    hidden_projection: Projection
    predictor: CodePredictor

    @property
    def nbytes(self) -> int:
        """Resident bytes, without the experts."""
        projections = self.text_projection.nbytes + self.hidden_projection.nbytes
        return self.talker.nbytes + self.predictor.nbytes + projections

    @property
    def dtype(self) -> torch.dtype:
        return self.talker.dtype

    def text(self, ids: Sequence[int]) -> Tensor:
        """(N, D) what the talker is shown of text tokens."""
        numbers = upload(torch.tensor(ids), self.thinker_VD.device)
        return self.text_projection(self.thinker_VD.index_select(0, numbers).cpu())

    def embed_frames(self, frames: Sequence[Sequence[int]]) -> Tensor:
        """(F, D) sums of their codes' embeddings: in float32, code after code."""
        codes_FC = torch.tensor(frames)
        total_FD = self.talker.embeddings_VD.index_select(0, codes_FC[:, 0]).float()
        for number, embeddings_VD in enumerate(self.predictor.embeddings):
            total_FD += embeddings_VD.index_select(0, codes_FC[:, number + 1]).float()
        return total_FD.to(self.dtype)

    def close(self) -> None:
        self.worker.close()


def read_parts(
    store: ExpertStore,
    thinker_VD: Tensor,
    dtype: torch.dtype,
    budget_bytes: int | None,
    most_frames: int,
    prove: ProveKernel = prove_row_invariance,
) -> SpeechParts:
    """budget_bytes: of the talker's resident experts; None means all of them. most_frames: of one step.

    Raises ConfigUnsupported, WeightMismatch, NotRowInvariant, or what reading the store raises.
    """
    logger.info("reading the talker and its code predictor")
    config = read_model_config(store.component(TALKER).config)
    predictor_config = read_predictor_config(store.component(CODE_PREDICTOR).config)
    if predictor_config.hidden_size != config.hidden_size:
        raise ConfigUnsupported("code_predictor_config.hidden_size", "is not the talker's")
    kernel = prove(config, dtype)
    widths = {TALKER: config.hidden_size}
    worker = ExpertWorker(store, kernel, dtype, widths=widths, budget_bytes=budget_bytes)
    try:
        directory = LocalDirectory(worker)
        forms = prove_linears(store.quantised, config, kernel, dtype)
        talker = Backbone(store, TALKER, config, kernel, directory, dtype, forms)
        text, hidden = _read_projections(store, thinker_VD.shape[1], config.hidden_size, kernel, dtype)
        own = prove(predictor_config, dtype)
        own_forms = prove_linears(store.quantised, predictor_config, own, dtype)
        predictor = CodePredictor(store, predictor_config, own, directory, dtype, most_frames, own_forms)
    except BaseException:
        worker.close()
        raise
    return SpeechParts(thinker_VD, talker, worker, text, hidden, predictor)


def _read_projections(
    store: ExpertStore, inputs: int, outputs: int, kernel: RowKernel, dtype: torch.dtype
) -> tuple[Projection, Projection]:
    """Of embeddings, and of hidden states. kernel: of the talker, whose shapes are others."""
    try:
        inner = read_size(store.component(TALKER).config, "intermediate_size", 2048)
    except ConfigInvalid as error:
        raise ConfigUnsupported(error.key, error.reason) from error
    if kernel.product != "native":
        kernel = calibrate([(inner, inputs), (outputs, inner)], dtype)
    load, widths = TensorLoader(store, TALKER, dtype, kernel), (inputs, inner, outputs)
    return (
        Projection(load, "text_projection", widths, kernel),
        Projection(load, "hidden_projection", widths, kernel),
    )
