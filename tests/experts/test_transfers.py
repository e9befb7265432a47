"""CUDA's calls in their order, and pinned memory's books, against a stand-in for CUDA.

tests/experts/test_gpu_tier.py asks the real one.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

from experts.transfers import CudaTransfers, PinnedMemory, PlainTransfers, open_transfers

DEVICE = torch.device("cuda", 1)
ALREADY_REGISTERED = 712


class Cuda:
    """Writes down what is asked of it."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []
        self.inside: list[str] = []
        self.registered: dict[int, int] = {}
        self.answer = 0

    @contextmanager
    def within(self, what: Any) -> Iterator[None]:
        self.inside.append(str(what))
        yield
        self.inside.pop()

    def cudart(self) -> Cuda:
        return self

    def cudaHostRegister(self, address: int, nbytes: int, flags: int) -> int:
        assert self.inside == [str(DEVICE)], "in the context of the device that is copied to"
        if not self.answer:
            self.registered[address] = nbytes
        return self.answer

    def cudaHostUnregister(self, address: int) -> int:
        assert self.inside == [str(DEVICE)]
        del self.registered[address]
        return 0


class Stream:
    def __init__(self, cuda: Cuda, name: str) -> None:
        self._cuda, self.name = cuda, name

    def __str__(self) -> str:
        return self.name

    def wait_stream(self, other: Stream) -> None:
        self._cuda.calls.append((self.name, "waits for", other.name))

    def wait_event(self, event: Event) -> None:
        self._cuda.calls.append((self.name, "waits for event of", event.stream))

    def synchronize(self) -> None:
        self._cuda.calls.append((self.name, "synchronize"))


class Event:
    def __init__(self, cuda: Cuda) -> None:
        self._cuda, self.stream = cuda, ""

    def record(self, stream: Stream) -> None:
        assert self._cuda.inside == ["copies"]
        self.stream = stream.name
        self._cuda.calls.append(("event on", stream.name))

    def synchronize(self) -> None:
        self._cuda.calls.append(("host waits for event of", self.stream))


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> Cuda:
    cuda = Cuda()
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream(cuda, "copies"))
    monkeypatch.setattr(torch.cuda, "Event", lambda: Event(cuda))
    monkeypatch.setattr(torch.cuda, "stream", cuda.within)
    monkeypatch.setattr(torch.cuda, "device", cuda.within)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: Stream(cuda, "computes"))
    monkeypatch.setattr(torch.cuda, "cudart", cuda.cudart)
    return cuda


def test_copies_follow_what_was_computed_and_are_followed_by_what_joins_them(cuda: Cuda) -> None:
    transfers = open_transfers(DEVICE)
    assert isinstance(transfers, CudaTransfers)
    source, target = torch.arange(5, dtype=torch.uint8), torch.zeros(5, dtype=torch.uint8)
    transfers.follow()
    copy = transfers.start(source, target)
    copy.join()
    copy.wait()
    transfers.close()
    assert torch.equal(source, target)
    assert cuda.calls == [
        ("copies", "waits for", "computes"),
        ("event on", "copies"),
        ("computes", "waits for event of", "copies"),
        ("host waits for event of", "copies"),
        ("copies", "synchronize"),
    ]


def test_memory_is_pinned_in_whole_pages_and_let_go_before_it_goes_back(cuda: Cuda) -> None:
    memory = PinnedMemory(DEVICE)
    buffers = [memory.take(nbytes, is_aligned=False) for nbytes in (100, 5000, 1 << 21)]
    assert list(cuda.registered.values()) == [100, 5000, 1 << 21]
    assert not any(address % 4096 for address in cuda.registered)
    memory.release(buffers[1])
    assert list(cuda.registered.values()) == [100, 1 << 21]
    memory.close()
    assert not cuda.registered


def test_memory_that_cannot_be_pinned_is_used_all_the_same(
    cuda: Cuda, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(torch, "zeros", _tell_the_error)
    cuda.answer = ALREADY_REGISTERED
    memory = PinnedMemory(DEVICE)
    buffer = memory.take(100, is_aligned=True)
    buffer.fill_(3)
    assert "100 bytes of host memory cannot be pinned: CUDA error 712" in caplog.text
    memory.release(buffer)
    memory.close()


def _tell_the_error(*shape: int, device: torch.device) -> torch.Tensor:
    assert device == DEVICE
    raise RuntimeError("CUDA error: resource already mapped")


def test_other_devices_have_plain_copies() -> None:
    assert isinstance(open_transfers(torch.device("privateuseone", 0)), PlainTransfers)
