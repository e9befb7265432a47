"""Stand-ins: an expert's mean output in place of the expert, where it is not resident and hardly weighs.

Reading an expert for a token to which it contributes a few percent is what a small budget spends most of its time on.
Dropping it costs quality; what it says on average, learned from the traffic, costs one vector in memory and recovers
most of that. Only for requests whose routing is not native, and named in their answers. Pure functions, asked by
`router.choosing`; the means are those of `router.output_means`.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from router.native_choosing import sum_means
from router.scoring import ABSENT, Routing, StandIns


def spare(routing: Routing, cold_TK: Tensor, size_E: Tensor, threshold: float) -> Tensor | None:
    """Which of the chosen experts need not be computed: (T, K) bool, or None where there is none.

    Those that are not resident, whose mean is known, and whose part in the token's output is less than `threshold` of
    an even share: part = mixing weight / sum of weights * K * the expert's size. A token's heaviest expert is always
    computed. cold_TK: bool, which of them are not resident. size_E: how large the experts' outputs are, around 1, and
    infinite where their means are not known; see `OutputMeans.sizes`.
    """
    weights_TK = routing.weights_TK
    least_T1 = weights_TK.sum(-1, keepdim=True) * (threshold / weights_TK.shape[1])
    spared_TK = (weights_TK * size_E[routing.experts_TK] < least_T1) & cold_TK
    if not bool(spared_TK.any()):
        return None
    spared_TK.scatter_(-1, weights_TK.argmax(-1, keepdim=True), False)
    return spared_TK if bool(spared_TK.any()) else None


def replace_spared(
    routing: Routing, spared_TK: Tensor, means_ED: Tensor, level: str | None = None
) -> Routing:
    """The routing without the spared experts, with the weighted sum of their means in their place.

    The weights of the others stay: giving them more was tried, and cost far more quality than it saved. level: of our
    own products, where the model is computed by them.
    """
    experts_TK, weights_TK = routing.experts_TK, routing.weights_TK
    if len(spared_TK) == 1:
        rows_N = torch.zeros(1, dtype=torch.int64)
    else:
        rows_N = spared_TK.any(-1).nonzero().squeeze(-1)
    kept_TK = weights_TK.masked_fill(spared_TK, 0.0)
    if level is not None:
        output_ND = sum_means(level, rows_N, experts_TK, weights_TK, spared_TK, means_ED)
    else:
        replaced_NK = (weights_TK - kept_TK).index_select(0, rows_N)
        experts_NK = experts_TK.index_select(0, rows_N)
        output_ND = embedding_bag(experts_NK, means_ED, mode="sum", per_sample_weights=replaced_NK)
    absent_TK = experts_TK.masked_fill(spared_TK, ABSENT)
    return Routing(absent_TK, kept_TK, has_absent=True, stand_ins=StandIns(rows_N, output_ND))
