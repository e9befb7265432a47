"""A model's layers and the actors that own their experts, as the C source asks them: many layers in one call.

Exists where for each expert there is one actor that would be asked first, and while the connections to these stay open.
`native/exchange.c` sends shares and takes rows; whatever is not the right answer in time is left to `resume`, which
hands what is on its way to the directory. Accounts are kept as `experts.asking` keeps them, after the call. Made by
`experts.remote_directory`, used by `router.native_dispatch`.
"""

from __future__ import annotations

import ctypes
from array import array
from collections.abc import Callable, Mapping, Sequence
from enum import IntEnum

import torch
from torch import Tensor

from experts.asking import Asker, Begun, Heard, Question
from experts.call import ExpertCall
from experts.call_times import EXPERT_FLOOR_S, FLOOR_S
from experts.channel import TransportLimits, to_ns
from experts.connection import ExpertConnection
from experts.frame import MAX_TRACE_BYTES
from experts.native_plane import Errand, ErrandStructure, ExchangeStructure, PeerStructure
from experts.shares import Place, Share, split_by_place

PATIENCE_S = 0.05
"""After so long without an answer it is Python that waits, whose clock of silence then starts anew."""
MOST_PEERS = 255
"""Owners are bytes for the C source."""


class _State(IntEnum):
    """`errand_state` of exchange.h."""

    NOT_ASKED = 0
    ASKED = 1
    ANSWERED = 2
    PEER_LOST = 3


Conclude = Callable[[ExpertCall, Mapping[Place, Share], Mapping[Place, Begun]], Tensor]
"""All rows of a call, some shares of which have been begun."""


class Exchange:
    """Of consecutive layers. Any thread may use it: whoever has begun holds all connections until the end."""

    def __init__(
        self,
        component: str,
        places: Sequence[Sequence[str]],
        links: Mapping[str, ExpertConnection],
        asker: Asker,
        limits: TransportLimits,
        conclude: Conclude,
    ) -> None:
        """places: of each layer's experts. links: of all of these. Raises ValueError where there are too many, or one
        does not have the component."""
        self.names = tuple(sorted(links))
        """As calls hold them."""
        if len(self.names) > MOST_PEERS:
            raise ValueError(f"{len(self.names)} actors, at most {MOST_PEERS}")
        self._links = [links[name] for name in self.names]
        numbers = {name: number for number, name in enumerate(self.names)}
        self._owners = [array("B", [numbers[name] for name in layer]) for layer in places]
        self.owners = [layer.buffer_info()[0] for layer in self._owners]
        """Of each layer, for the C source."""
        components = [link.component_of(component) for link in self._links]
        if None in components:
            raise ValueError(f"not all of {self.names} have component {component!r}")
        self._components = components
        self._asker, self._conclude = asker, conclude
        self._usual = [asker.times.usual_ns(name) for name in self.names]
        self._peers = (PeerStructure * len(self.names))()
        self._errands = (ErrandStructure * (len(places) * len(self.names)))()
        self._structure = ExchangeStructure(
            *(ctypes.addressof(self._peers), len(self.names), b"", 0),
            *map(to_ns, (limits.silence_s, PATIENCE_S)),
            *map(to_ns, (asker.times.longest_s, FLOOR_S, EXPERT_FLOOR_S)),
            0,
        )
        self.addresses = ctypes.addressof(self._structure), ctypes.addressof(self._errands)
        """Of itself and of what becomes of its shares, for the C source."""

    def takes(self, num_tokens: int, num_rows: int, width: int, dtype: torch.dtype) -> bool:
        """Whether calls of this size fit every connection, in one frame."""
        return all(
            (link.info.width, link.info.dtype) == (width, dtype)
            and max(num_tokens, num_rows) <= link.max_rows
            for link in self._links
        )

    def begin(self, request_id: str) -> bool:
        """Hold all connections for one call of the C source, after which `end` or `resume` must follow on the same
        thread. False where one is not open any more, or the id does not fit a frame."""
        if not (request_id.isascii() and request_id.isprintable() and len(request_id) <= MAX_TRACE_BYTES):
            return False
        for number, link in enumerate(self._links):
            peer = link.lend()
            if peer is None:
                for held, earlier in zip(self._peers, self._links[:number], strict=False):
                    earlier.take_back(held)
                return False
            peer.component, peer.usual_ns = self._components[number], self._usual[number].buffer_info()[0]
            self._peers[number] = peer
        structure = self._structure
        structure.trace, structure.trace_bytes, structure.num_done = request_id.encode(), len(request_id), 0
        return True

    @property
    def num_done(self) -> int:
        """Layers whose rows the last call has brought; until the connections are let go."""
        return self._structure.num_done  # type: ignore[no-any-return]

    def answered(self, layer: int) -> list[Errand]:
        """Of the shares of a layer that is done, by its place among the layers; until the connections are let go."""
        first = layer * len(self.names)
        errands = self._errands[first : first + len(self.names)]
        return [errand for errand in errands if errand.state == _State.ANSWERED]

    def end(self) -> None:
        """After a call that has asked nothing that is not answered."""
        self._count(self.num_done)
        self._let_go()

    def resume(self, call: ExpertCall, rows_RD: Tensor) -> Tensor:
        """The rows of the layer at which the C source has ended early. rows_RD: those that came, where they belong.
        Raises ExpertError."""
        num_done = self.num_done
        owners = self._owners[num_done]
        shares = split_by_place(call, [self.names[owners[expert]] for expert in call.experts])
        begun: dict[Place, Begun] = {}
        for number, name in enumerate(self.names):
            errand = self._errands[num_done * len(self.names) + number]
            if name in shares and errand.state != _State.NOT_ASKED:
                begun[name] = self._begun(number, shares[name], errand, rows_RD)
        self._count(num_done)
        self._let_go()
        return self._conclude(call, shares, begun)

    def _begun(self, number: int, share: Share, errand: ErrandStructure, rows_RD: Tensor) -> Begun:
        name, link, asker = self.names[number], self._links[number], self._asker
        if errand.state == _State.ASKED:
            return asker.take_over(name, link, share, errand)
        if errand.state == _State.PEER_LOST:
            asker.note_waited(errand)
            return asker.fail(name, link, share, link.lose(errand.loss))
        asker.note_answered(name, [errand])
        if len(share.rows) < len(rows_RD):
            rows_RD = rows_RD.index_select(0, torch.tensor(share.rows))
        return Heard(Question(name, link, share, errand.asked_ns * 1e-9), rows_RD)

    def _count(self, num_layers: int) -> None:
        for number, (name, link) in enumerate(zip(self.names, self._links, strict=True)):
            places = range(number, num_layers * len(self.names), len(self.names))
            errands = [each for place in places if (each := self._errands[place]).state == _State.ANSWERED]
            if errands:
                self._asker.note_answered(name, errands)
                self._asker.count_rows(link, sum(errand.num_rows for errand in errands))

    def _let_go(self) -> None:
        for peer, link in zip(self._peers, self._links, strict=True):
            link.take_back(peer)
