"""A device that is host memory, but as strict as a real one: what mixes its tensors with the host's fails.

`simulated()` makes PyTorch's calls of this thread tell tensors of `DEVICE` from others: an operator takes tensors of
one side alone, a tensor changes sides by `to`, `cpu` and `copy_` only, and nobody gets its address. Numbers are those
of the CPU's operators. What is read back is kept, so that tests can count it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

DEVICE = torch.device("privateuseone", 0)
READING = {"cpu", "item", "tolist", "numpy", "__int__", "__float__", "__bool__", "__index__", "equal"}
REFUSED = {"data_ptr", "storage", "untyped_storage", "pin_memory", "__array__"}


class DeviceTensor(torch.Tensor):
    """Of the simulated device."""

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]


@dataclass
class Readings:
    """(operator, shape) of all that came back to the host."""

    done: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)


class _Simulation(TorchFunctionMode):
    def __init__(self, readings: Readings) -> None:
        super().__init__()
        self._readings = readings

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        owner = getattr(func, "__self__", None)
        if name == "__get__" and owner is not None and args and isinstance(args[0], DeviceTensor):
            return self._attribute(func, owner, args)
        leaves = tree_leaves((args, kwargs))
        tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
        ours = [tensor for tensor in tensors if isinstance(tensor, DeviceTensor)]
        wanted = [leaf for leaf in leaves if isinstance(leaf, torch.device) or leaf == "cpu"]
        if name == "to" and wanted:
            return self._move(func, args, kwargs, wanted[0])
        if wanted and wanted[0] == DEVICE and not ours:
            kwargs["device"] = torch.device("cpu")
            return _wrapped(func(*args, **kwargs))
        if not ours:
            return func(*args, **kwargs)
        assert name not in REFUSED, f"{name} of a device's tensor"
        if name in READING:
            self._read(name, ours[0])
            return tree_map(_unwrapped, func(*map(_unwrapped, args), **kwargs))
        if name != "copy_":
            others = [t for t in tensors if not isinstance(t, DeviceTensor) and torch.Tensor.dim(t)]
            assert not others, (
                f"{name} mixes the device's tensors with the host's: {[t.shape for t in others]}"
            )
        if kwargs.get("device") == DEVICE:
            del kwargs["device"]
        return _wrapped(func(*args, **kwargs))

    def _attribute(self, func: Any, owner: Any, args: tuple[Any, ...]) -> Any:
        if owner is torch.Tensor.device:
            return DEVICE
        if owner is torch.Tensor.is_cpu:
            return False
        return _wrapped(func(*args))

    def _move(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], target: Any) -> Any:
        is_ours, goes_there = isinstance(args[0], DeviceTensor), target == DEVICE
        plain = (_unwrapped(args[0]), *(torch.device("cpu") if arg == target else arg for arg in args[1:]))
        if kwargs.get("device") is not None:
            kwargs["device"] = torch.device("cpu")
        if is_ours != goes_there:
            kwargs["copy"] = True
        if is_ours and not goes_there:
            self._read("to", args[0])
        moved = func(*plain, **kwargs)
        return _wrapped(moved) if goes_there else moved

    def _read(self, name: str, tensor: torch.Tensor) -> None:
        with torch._C.DisableTorchFunction():
            self._readings.done.append((name, tuple(tensor.shape)))


def _wrapped(result: Any) -> Any:
    with torch._C.DisableTorchFunction():
        return tree_map(lambda x: x.as_subclass(DeviceTensor) if isinstance(x, torch.Tensor) else x, result)


def _unwrapped(value: Any) -> Any:
    if not isinstance(value, DeviceTensor):
        return value
    with torch._C.DisableTorchFunction():
        return value.as_subclass(torch.Tensor)


@contextmanager
def simulated() -> Iterator[Readings]:
    """The device is there while the context lasts, for this thread."""
    readings = Readings()
    with _Simulation(readings):
        yield readings
