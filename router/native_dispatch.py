"""Dispatch and combine by the C source in `experts/native`, for layers that nobody looks at with experts elsewhere.

One call goes from rows to an expert call by the checkpoint's own routing, another one from the answered rows to the
layer's; or a single one does the second, the next layer's attention, and the first; or one does all that for many
layers, whose actors it asks itself (`experts.exchange`). `router.dispatch` is the same operation by operation, with
the same bits, for everything else. Called by `router.decoder_layer` and `router.asked_run`.
"""

from __future__ import annotations

import ctypes
import struct
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from experts.call import ExpertCall
from experts.exchange import Exchange
from router.moe_block import MoeBlock
from router.native_attention import expect
from router.native_layer import NativeLayer
from router.native_step import NativeStep, OpenHalf
from router.native_structures import AskedLayerStructure, DispatchedStructure
from router.scoring import Routing


class AskedLayer(NamedTuple):
    """A layer whose rows go to their own experts, wherever these are."""

    native: NativeLayer
    moe: MoeBlock


class NativeDispatch:
    """Of one step's layers, one after another: `dispatch` or `reach`, then `combine` or the next `reach`; or `ask` for
    many."""

    def __init__(self, step: NativeStep) -> None:
        self._step = step
        config = step.config
        self._num_slots = num_slots = step.places.num_tokens * config.experts_per_token
        self._shape = (step.places.num_tokens, config.experts_per_token)
        self._experts = array("q", bytes(8 * num_slots))
        """One layer after another, as the weights are."""
        self._weights = array("f", bytes(4 * num_slots))
        self._row_of = array("q", bytes(8 * num_slots))
        self._maps = array("I", bytes(4 * (2 * min(config.num_experts, num_slots) + num_slots)))
        self._num_used = array("q", (0,))
        rooms = self._experts, self._weights, self._row_of, self._maps, self._num_used
        self._shared = _shared_rooms(step)
        self._structure = DispatchedStructure(
            None,
            *(room.buffer_info()[0] for room in rooms),
            *(None if room is None else room.data_ptr() for room in self._shared),
        )
        self._address = ctypes.addressof(self._structure)
        self._place = 0
        """Of the last layer among these."""
        self._hidden_TD: Tensor | None = None
        """To which the call's rows are added."""
        self._open: OpenHalf | None = None
        """Of `dispatch` or `combine`."""
        self._attention_ns = array("q", (0,))
        self._before_TD, self._after_TD = (torch.empty(step.shape, dtype=step.dtype) for _ in range(2))

    def dispatch(
        self, layer: NativeLayer, moe: MoeBlock, hidden_TD: Tensor, trace: str, until_ns: int | None = None
    ) -> ExpertCall | None:
        """A call for the layer's own choice of experts with the rows' norm.

        until_ns: see `OpenHalf.run`; where something is left, None is returned, and the next call with the same
        arguments goes on. Raises ValueError where anything does not fit, MemoryError."""
        step = self._step
        if self._open is None:
            expect(hidden_TD, step.shape, step.dtype)
            self._hidden_TD, normed_TD = hidden_TD, self._new_normed()
            address = step.begin(
                step.library.begin_dispatch,
                *(layer.address, hidden_TD.data_ptr(), self._address, torch.get_num_threads()),
            )
            self._open = OpenHalf(step.library, address, hidden_TD, normed_TD)
        dispatched_TD = self._go_on(self._open, until_ns)
        return None if dispatched_TD is None else self._call(moe, dispatched_TD, trace)

    def _go_on(self, half: OpenHalf, until_ns: int | None) -> Tensor | None:
        if not half.run(until_ns):
            return None
        self._open = None
        half.close()
        return half.out_TD

    def reach(
        self,
        layer: NativeLayer,
        moe: MoeBlock,
        index: int,
        hidden_TD: Tensor,
        rows_RD: Tensor | None,
        trace: str,
    ) -> ExpertCall:
        """The same after the layer's attention, and after the sum of the rows of the layer before, where it was reached
        like this: then rows_RD are these, and hidden_TD is not looked at.

        index: of the layer in the cache that the step is bound to. Raises as `dispatch` and `combine`.
        """
        step, rows = self._step, None
        step.expect_closed()
        if rows_RD is not None:
            assert self._hidden_TD is self._after_TD, "the layer before was not reached"
            expect(rows_RD, (self._num_slots, step.shape[1]), step.dtype)
            hidden_TD, rows = self._after_TD, rows_RD.data_ptr()
        else:
            expect(hidden_TD, step.shape, step.dtype)
        self._hidden_TD, normed_TD = self._after_TD, self._new_normed()
        step.run(
            step.library.reach_experts,
            *(layer.address, index, step.config.window(index) or 0, hidden_TD.data_ptr(), rows),
            *(self._before_TD.data_ptr(), self._after_TD.data_ptr(), self._address),
            self._attention_ns.buffer_info()[0],
        )
        return self._call(moe, normed_TD, trace)

    def ask(
        self,
        exchange: Exchange,
        layers: Sequence[AskedLayer],
        first: int,
        hidden_TD: Tensor,
        rows_RD: Tensor | None,
        trace: str,
    ) -> tuple[int, Tensor] | None:
        """As `reach` and what the call is answered, layer after layer: how many layers are done, all of them or up to
        one at which something was amiss, and the last one's rows. None where the connections are not there any more.

        exchange: of these layers. first: of them in the cache that the step is bound to. Raises as `reach`, and
        ExpertError.
        """
        step, place, rows = self._step, self._place, None
        step.expect_closed()
        if rows_RD is not None:
            assert self._hidden_TD is self._after_TD, "the layer before was not reached"
            expect(rows_RD, (self._num_slots, step.shape[1]), step.dtype)
            hidden_TD, rows, place = self._after_TD, rows_RD.data_ptr(), place + 1
        else:
            expect(hidden_TD, step.shape, step.dtype)
        placed = self._placed(layers, exchange.owners, first)
        normed_TD, here_RD = self._new_normed(), self._after_TD.new_empty(self._num_slots, step.shape[1])
        if not exchange.begin(trace):
            return None
        try:
            self._place_at(place, len(layers))
            step.run(
                step.library.ask_layers,
                *(ctypes.addressof(placed), len(layers), hidden_TD.data_ptr(), rows),
                *(self._before_TD.data_ptr(), self._after_TD.data_ptr(), self._address),
                *(exchange.addresses[0], here_RD.data_ptr(), exchange.addresses[1]),
                self._attention_ns.buffer_info()[0],
            )
        except MemoryError:
            exchange.end()
            raise
        self._hidden_TD, num_done = self._after_TD, exchange.num_done
        if num_done == len(layers):
            exchange.end()
            self._place_at(place + num_done - 1)
            return num_done, here_RD
        self._place_at(place + num_done)
        return num_done + 1, exchange.resume(self._call(layers[num_done].moe, normed_TD, trace), here_RD)

    def _placed(
        self, layers: Sequence[AskedLayer], owners: Sequence[int], first: int
    ) -> ctypes.Array[AskedLayerStructure]:
        window = self._step.config.window
        return (AskedLayerStructure * len(layers))(
            *(
                AskedLayerStructure(layer.native.address, index, window(index) or 0, layer.moe.layer, owner)
                for index, (layer, owner) in enumerate(zip(layers, owners, strict=True), first)
            )
        )

    def _place_at(self, place: int, num_layers: int = 1) -> None:
        """Let C write the routing of layers from this place on."""
        missing = (place + num_layers) * self._num_slots - len(self._experts)
        if missing > 0:
            self._experts.frombytes(bytes(8 * missing))
            self._weights.frombytes(bytes(4 * missing))
        structure, self._place = self._structure, place
        structure.chosen = self._experts.buffer_info()[0] + 8 * place * self._num_slots
        structure.weights = self._weights.buffer_info()[0] + 4 * place * self._num_slots

    @property
    def attention_s(self) -> float:
        """What attention took of the last `reach`."""
        return self._attention_ns[0] * 1e-9

    def _new_normed(self) -> Tensor:
        """Room for what the experts are given: whoever audits an answer may keep it."""
        normed_TD = torch.empty_like(self._after_TD)
        self._structure.normed = normed_TD.data_ptr()
        return normed_TD

    def _call(self, moe: MoeBlock, normed_TD: Tensor, trace: str) -> ExpertCall:
        num_used, num_slots = self._num_used[0], self._num_slots
        maps = struct.unpack_from(f"{2 * num_used + num_slots}I", self._maps)
        experts, counts = maps[:num_used], maps[num_used : 2 * num_used]
        return ExpertCall(moe.component, moe.layer, experts, counts, maps[2 * num_used :], normed_TD, trace)

    def combine(self, rows_RD: Tensor, until_ns: int | None = None) -> Tensor | None:
        """hidden + the weighted sum of each token's rows, rank by rank, (T, D) in the model's dtype.

        rows_RD: of the call that `dispatch` has made. until_ns: as of `dispatch`. Raises ValueError where they do not
        fit, MemoryError.
        """
        step, hidden_TD = self._step, self._hidden_TD
        if self._open is None:
            assert hidden_TD is not None, "nothing was dispatched"
            expect(rows_RD, (self._num_slots, step.shape[1]), step.dtype)
            out_TD = torch.empty_like(hidden_TD)
            address = step.begin(
                step.library.begin_combine,
                *(hidden_TD.data_ptr(), rows_RD.data_ptr(), self._address, out_TD.data_ptr()),
            )
            self._open = OpenHalf(step.library, address, hidden_TD, out_TD)
        combined_TD = self._go_on(self._open, until_ns)
        if combined_TD is not None:
            self._hidden_TD = None
        return combined_TD

    def routing(self, back: int = 0) -> Routing:
        """How a layer's rows were routed; the caller's own. back: so many before the last one, of those that `ask` did
        together."""
        part = slice((self._place - back) * self._num_slots, (self._place - back + 1) * self._num_slots)
        experts, weights = self._experts[part], self._weights[part]
        return Routing(
            torch.frombuffer(experts, dtype=torch.int64).view(self._shape),
            torch.frombuffer(weights, dtype=torch.float32).view(self._shape),
        )


def _shared_rooms(step: NativeStep) -> tuple[Tensor | None, Tensor | None]:
    """For the expert that every row passes: its gate's outputs and its rows; none where layers have no such expert."""
    if step.config.shared_width is None:
        return None, None
    return torch.empty(step.shape[0], dtype=step.dtype), torch.empty(step.shape, dtype=step.dtype)
