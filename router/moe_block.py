"""One layer's mixture of experts: gate, scoring, dispatch, experts, combine. Called by `router.backbone`."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, islice

from torch import Tensor

from experts.call import ExpertCall
from experts.directory import ExpertDirectory
from experts.expert_table import ExpertTable
from experts.numerics import RowKernel
from experts.shares import take
from router.dispatch import combine, dispatch
from router.model_config import ModelConfig
from router.shared_expert import SharedExpert
from router.step_routing import NATIVE, GateOutput, StepRouting

EXPERT_ROWS = 16
"""So many rows take about as long as what an expert takes however few it has: its weights, and being asked for."""
FIRST_SHARE = 1 / 16
"""Of the experts, those that are computed first where it is not known how long one takes."""


@dataclass(frozen=True)
class MoeBlock:
    """The gate of one layer and the way to its experts."""

    component: str
    layer: int
    gate_ED: Tensor
    config: ModelConfig
    kernel: RowKernel
    directory: ExpertDirectory
    shared: SharedExpert | None = None
    """The expert that every token passes."""

    @property
    def nbytes(self) -> int:
        """Resident bytes of what is computed here."""
        return self.gate_ED.nbytes + (self.shared.nbytes if self.shared is not None else 0)

    def gate(self, hidden_PD: Tensor, num_tokens: int) -> GateOutput:
        """What the gate says about the first `num_tokens` rows; the rest is padding."""
        logits_TE = self.kernel.linear(hidden_PD, self.gate_ED)[:num_tokens]
        if not self.kernel.is_on_cpu:
            logits_TE = logits_TE.cpu()  # the one reading back of a layer: routing is decided on the host
        config = self.config
        return GateOutput(
            self.layer,
            hidden_PD[:num_tokens],
            logits_TE,
            config.experts_per_token,
            config.normalise_top_k,
            self.kernel.level or None,
        )

    def table(self) -> ExpertTable | None:
        """All experts of the layer, where they stay in this process; see `ExpertDirectory.table`."""
        return self.directory.table(self.component, self.layer)

    def note_use(self, table: ExpertTable, used: Sequence[int], num_tokens: int) -> None:
        """Tokens were sent to their own experts without `forward`. used: numbers of these experts."""
        self.directory.note_use(table, used, num_tokens * self.config.experts_per_token)

    def forward(
        self, hidden_PD: Tensor, num_tokens: int, steering: StepRouting = NATIVE, trace: str = ""
    ) -> Tensor:
        """(P, D) normalised rows, of which the first `num_tokens` are real -> (num_tokens, D) float32."""
        mixed_TD = Mixture(self, hidden_PD, num_tokens, steering, trace).advance()
        assert mixed_TD is not None
        return mixed_TD


class CallInParts:
    """A call on its way: for some of its experts at a time, where others wait.

    The same bits whatever the parts are: an expert's rows do not depend on who is asked for beside it.
    """

    def __init__(self, directory: ExpertDirectory, call: ExpertCall, expert_s: float = 0.0) -> None:
        """expert_s: what an average expert of such a step took in the layer before; 0 where none is known."""
        self._directory, self._call = directory, call
        self._left = list(range(len(call.experts)))
        """Indices of the call's experts that are still to be computed."""
        self._starts = [0, *accumulate(call.counts)]
        self._rows_RD: Tensor | None = None
        """Those that are there; the others' places are not written to yet."""
        mean = EXPERT_ROWS + call.num_rows / len(call.counts)
        self._sizes = [(EXPERT_ROWS + count) / mean for count in call.counts]
        """What each expert takes, in average ones."""
        self.expert_s = expert_s
        """What an average one has taken lately."""

    def advance(self, until_ns: int | None = None) -> Tensor | None:
        """The call's rows, (R, D) in the expert dtype.

        until_ns: monotonic clock; None is returned where experts are left that would probably take longer, and the next
        call goes on. At least one is computed. Raises ExpertError.
        """
        if until_ns is None and self._rows_RD is None:
            return self._directory.run(self._call)
        self._compute(self._next_part(until_ns))
        while self._left:
            next_s = self.expert_s * self._sizes[self._left[0]]
            if until_ns is not None and time.monotonic_ns() + next_s * 1e9 > until_ns:
                return None
            self._compute(self._next_part(until_ns))
        assert self._rows_RD is not None
        return self._rows_RD

    def _next_part(self, until_ns: int | None) -> list[int]:
        """As many of the experts as there is time for, from all over the layer: neighbours may have the same owner."""
        left = self._left
        if until_ns is None:
            return left
        room_s = (until_ns - time.monotonic_ns()) * 1e-9
        fitting = room_s / self.expert_s if self.expert_s else FIRST_SHARE * len(left)
        count = min(max(1, int(fitting)), len(left))
        part = [left[number * len(left) // count] for number in range(count)]
        ends = accumulate(self._sizes[index] for index in part)
        return part[:1] + [
            index for index, end in zip(part[1:], islice(ends, 1, None), strict=True) if end <= fitting
        ]

    def _compute(self, part: list[int]) -> None:
        started = time.perf_counter()
        self._place(part, self._directory.run(take(self._call, part).call))
        taken = set(part)
        self._left = [index for index in self._left if index not in taken]
        if part:
            self.expert_s = (time.perf_counter() - started) / sum(self._sizes[index] for index in part)

    def _place(self, part: list[int], some_RD: Tensor) -> None:
        """At once, and not all together when the last ones have come: that would take longer than others wait."""
        if self._rows_RD is None:
            self._rows_RD = some_RD.new_empty(self._call.num_rows, some_RD.shape[1])
        first = 0
        for index in part:
            begin, end = self._starts[index], self._starts[index + 1]
            self._rows_RD[begin:end] = some_RD[first : first + end - begin]
            first += end - begin


class Mixture:
    """A layer's experts on their way: routed once, and added when all of their rows are there."""

    def __init__(
        self,
        block: MoeBlock,
        hidden_PD: Tensor,
        num_tokens: int,
        steering: StepRouting,
        trace: str,
        expert_s: float = 0.0,
    ) -> None:
        """Gates and routes. expert_s: as of `CallInParts`."""
        self._block, self._steering = block, steering
        self._hidden_PD, self._num_tokens = hidden_PD, num_tokens
        self._gate = block.gate(hidden_PD, num_tokens)
        self._routing = steering.route(self._gate)
        self._dispatched = dispatch(block.component, block.layer, self._gate.hidden_TD, self._routing, trace)
        self._parts = CallInParts(block.directory, self._dispatched.call, expert_s)

    @property
    def expert_s(self) -> float:
        """See `CallInParts.expert_s`."""
        return self._parts.expert_s

    def advance(self, until_ns: int | None = None) -> Tensor | None:
        """The mixed rows, (num_tokens, D) float32. until_ns: as of `CallInParts.advance`. Raises ExpertError."""
        rows_RD = self._parts.advance(until_ns)
        return None if rows_RD is None else self._combine(rows_RD)

    def _combine(self, rows_RD: Tensor) -> Tensor:
        self._steering.watch(self._gate, self._routing, self._dispatched, rows_RD)
        routed_TD = combine(self._dispatched, rows_RD)
        block, routing = self._block, self._routing
        if routing.stand_ins is not None:
            # Not by `index_add`: its threads wait for each other, for tens of milliseconds where others use the cores.
            rows_N, output_ND = (part.to(block.kernel.device) for part in routing.stand_ins)
            routed_TD.index_copy_(0, rows_N, routed_TD.index_select(0, rows_N) + output_ND)
        return routed_TD if block.shared is None else block.shared.add_to(routed_TD, self._hidden_PD)
