"""Copies of experts from host memory to a device, and the host memory that they leave from.

`Transfers` has two implementations: CUDA's, on a stream of its own beside the one that computes, from pinned memory;
and a plain one, in which a copy is done when it was started, for whatever else PyTorch calls a device. Used by
`experts.device_tier`, under the worker's lock.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from experts.buffers import PLAIN_MEMORY, HostMemory, PlainMemory

logger = logging.getLogger(__name__)


class Transfer(Protocol):
    """One copy that was started."""

    def join(self) -> None:
        """What is computed from now on finds the copy done. The host waits for nothing."""
        ...

    def wait(self) -> None:
        """Returns when the host's memory was read, and may be written to again."""
        ...


class Transfers(Protocol):
    @property
    def device(self) -> torch.device: ...

    @property
    def memory(self) -> HostMemory:
        """Where to keep what will be copied."""
        ...

    def follow(self) -> None:
        """Copies that are started from now on wait for what the device was given to compute until now, which may still
        read the memory that they write to."""
        ...

    def start(self, source: Tensor, target: Tensor) -> Transfer:
        """Copy a host tensor to one of the same size on the device. Nothing may change either until it is done."""
        ...

    def close(self) -> None:
        """After the last copy: lets go of the memory that was taken from `memory`."""
        ...


class DoneTransfer:
    def join(self) -> None: ...

    def wait(self) -> None: ...


_DONE = DoneTransfer()


class PlainTransfers:
    """Copies at once."""

    def __init__(self, device: torch.device, memory: HostMemory = PLAIN_MEMORY) -> None:
        self.device, self.memory = device, memory

    def follow(self) -> None:
        """Nothing is under way when anything is started."""

    def start(self, source: Tensor, target: Tensor) -> Transfer:
        target.copy_(source)
        return _DONE

    def close(self) -> None:
        """Python does the rest."""


class CudaTransfer:
    def __init__(self, done: torch.cuda.Event, device: torch.device) -> None:
        self._done, self._device = done, device

    def join(self) -> None:
        torch.cuda.current_stream(self._device).wait_event(self._done)

    def wait(self) -> None:
        self._done.synchronize()


class CudaTransfers:
    """Copies on a stream of its own; calls come from threads that compute on the device's current stream."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.memory = PinnedMemory(device)
        self._stream = torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def follow(self) -> None:
        self._stream.wait_stream(torch.cuda.current_stream(self.device))

    def start(self, source: Tensor, target: Tensor) -> Transfer:
        done = torch.cuda.Event()  # type: ignore[no-untyped-call]
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            done.record(self._stream)
        return CudaTransfer(done, self.device)

    def close(self) -> None:
        self._stream.synchronize()
        self.memory.close()


class PinnedMemory:
    """Plain memory that CUDA was told to leave where it is, so that copies pass the processor by.

    PyTorch's own pinned memory is rounded up to a power of two, which a budget would not see.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._plain = PlainMemory()
        self._pinned: dict[int, Tensor] = {}
        """By address. Held here, since memory must not go back to the system while it is pinned."""

    def take(self, nbytes: int, *, is_aligned: bool) -> Tensor:
        """Not pinned where the system lets no more memory be: copies then wait for the processor, and stay right."""
        # Pages of its own: CUDA refuses to pin a page twice.
        buffer = self._plain.take(nbytes, is_aligned=True)
        with torch.cuda.device(self._device):
            code = int(torch.cuda.cudart().cudaHostRegister(buffer.data_ptr(), nbytes, 0))  # type: ignore[no-untyped-call]
        if code:
            logger.warning("%d bytes of host memory cannot be pinned: CUDA error %d", nbytes, code)
            with suppress(RuntimeError):  # CUDA tells an error again at the next call, which is not to blame
                torch.zeros(1, device=self._device)
        else:
            self._pinned[buffer.data_ptr()] = buffer
        return buffer

    def release(self, buffer: Tensor) -> None:
        if self._pinned.pop(buffer.data_ptr(), None) is not None:
            with torch.cuda.device(self._device):
                torch.cuda.cudart().cudaHostUnregister(buffer.data_ptr())  # type: ignore[no-untyped-call]

    def close(self) -> None:
        for buffer in tuple(self._pinned.values()):
            self.release(buffer)


def open_transfers(device: torch.device) -> Transfers:
    return CudaTransfers(device) if device.type == "cuda" else PlainTransfers(device)
