"""What both ends of the data plane do alike: frames without a body, and rows as the bytes of a body.

Used by `experts.connection` and `experts.server`.
"""

from __future__ import annotations

import ctypes

import torch
from torch import Tensor

from experts.errors import LinkLost
from experts.frame import Agreement, Header, Kind, check_exact, encode_header


def short_frame(kind: Kind, agreed: Agreement) -> bytes:
    return encode_header(Header(kind, incarnation=agreed.incarnation))


def check_short(header: Header, agreed: Agreement) -> None:
    """Heartbeats must be exactly that; a goodbye raises LinkLost. Other frames are the caller's to check."""
    if header.kind in (Kind.HEARTBEAT, Kind.GOODBYE):
        check_exact(header, Header(header.kind, incarnation=agreed.incarnation))
        if header.kind == Kind.GOODBYE:
            raise LinkLost("the peer said goodbye", True)


def new_rows(num_rows: int, agreed: Agreement) -> tuple[memoryview, Tensor]:
    """Memory for rows, as flat bytes and as a (rows, D) tensor."""
    rows_RD = torch.empty(num_rows, agreed.width, dtype=agreed.dtype)
    return _memory_of(rows_RD, num_rows * agreed.row_bytes), rows_RD


def bytes_of(rows_RD: Tensor, agreed: Agreement) -> memoryview:
    """The memory of contiguous rows on the CPU."""
    return _memory_of(rows_RD, rows_RD.shape[0] * agreed.row_bytes)


def _memory_of(tensor: Tensor, nbytes: int) -> memoryview:
    """Good for as long as the tensor is. By its address: on this path, which runs between two waits, each call into
    PyTorch costs several times what it costs in a loop."""
    return memoryview((ctypes.c_char * nbytes).from_address(tensor.data_ptr())).cast("B")
