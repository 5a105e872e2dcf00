"""Devices: every request for a CUDA device is served with host memory."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from moe_bench.mcore.cpu.embedding_memory import total_memory_bytes

CPU = torch.device("cpu")

CAPABILITY = (8, 0)
"""Compute capability shown: below 9.0, so that no Hopper-only path is chosen."""


@dataclass
class _Presented:
    """What torch.cuda says about this process."""

    device_count: int = 1
    current: int = 0


_presented = _Presented()


def present(device_count: int) -> None:
    """Show `device_count` devices, one for each rank of this machine."""
    _presented.device_count = device_count
    _presented.current = 0


def on_cpu(device: Any) -> Any:
    """The device to use where `device` was asked for: host memory for CUDA, `device` itself for any other."""
    if isinstance(device, int):
        return CPU
    if isinstance(device, str):
        return CPU if device.startswith("cuda") else device
    if isinstance(device, torch.device) and device.type == "cuda":
        return CPU
    return device


def factory(function: Callable[..., Any]) -> Callable[..., Any]:
    """A tensor factory whose `device=` may name CUDA, and whose `pin_memory=` has no effect."""

    @functools.wraps(function)
    def create(*args: Any, **kwargs: Any) -> Any:
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = on_cpu(device)
        kwargs.pop("pin_memory", None)
        return function(*args, **kwargs)

    return create


def mover(function: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.to`: a move to CUDA stays where it is; a move to the *string* "cpu" is a copy.

    Copying is what a device-to-host transfer does: a checkpoint that is written in the background must not see the
    next step's weights (megatron/core/dist_checkpointing/strategies/filesystem_async.py, 0.19).
    """

    @functools.wraps(function)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        if args:
            first = args[0]
            if first is CPU or isinstance(first, torch.dtype):
                return function(self, *args, **kwargs)
            if isinstance(first, (str, int, torch.device)):
                args = (on_cpu(first), *args[1:])
        device = kwargs.get("device")
        if device is not None:
            kwargs["device"] = on_cpu(device)
        moved = function(self, *args, **kwargs)
        if moved is self and "cpu" in (device, args[0] if args else None):
            return self.clone()
        return moved

    return to


def module_mover(function: Callable[..., Any]) -> Callable[..., Any]:
    """`Module.to` with CUDA understood as the host."""

    @functools.wraps(function)
    def to(self: Any, *args: Any, **kwargs: Any) -> Any:
        args = tuple(on_cpu(a) if isinstance(a, (str, int, torch.device)) else a for a in args)
        if kwargs.get("device") is not None:
            kwargs["device"] = on_cpu(kwargs["device"])
        return function(self, *args, **kwargs)

    return to


def loader(function: Callable[..., Any]) -> Callable[..., Any]:
    """`torch.load` with `map_location` CUDA understood as the host."""

    @functools.wraps(function)
    def load(*args: Any, **kwargs: Any) -> Any:
        if isinstance(kwargs.get("map_location"), (str, torch.device)):
            kwargs["map_location"] = on_cpu(kwargs["map_location"])
        return function(*args, **kwargs)

    return load


def stay(self: Any, *_args: Any, **_kwargs: Any) -> Any:
    """`.cuda()` and `.pin_memory()`: the tensor or module is already there."""
    return self


def copy_to_host(self: Any, *_args: Any, **_kwargs: Any) -> Any:
    """`Tensor.cpu`: a copy, as from a device."""
    return self.clone()


def type_name(function: Callable[..., Any]) -> Callable[..., Any]:
    """`Tensor.type`: names the CUDA type, which Megatron's optimizer tells precisions apart by."""

    @functools.wraps(function)
    def type_(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not args and not kwargs:
            return function(self).replace("torch.", "torch.cuda.", 1)
        if args and isinstance(args[0], str):
            args = (args[0].replace("torch.cuda.", "torch."), *args[1:])
        return function(self, *args, **kwargs)

    return type_


is_cuda = property(lambda _tensor: True)


def is_true(*_args: Any, **_kwargs: Any) -> bool:
    """Yes."""
    return True


def is_false(*_args: Any, **_kwargs: Any) -> bool:
    """No."""
    return False


def nothing(*_args: Any, **_kwargs: Any) -> None:
    """There is nothing to do on a host."""


def device_count() -> int:
    """One device for each rank of this machine."""
    return _presented.device_count


def current_device() -> int:
    """The ordinal last given to `set_device`."""
    return _presented.current


def set_device(device: Any) -> None:
    """Remember the ordinal."""
    index = device if isinstance(device, int) else torch.device(device).index
    _presented.current = index or 0


@contextlib.contextmanager
def device_context(device: Any) -> Iterator[None]:
    """`torch.cuda.device`: another current ordinal within the block."""
    before = _presented.current
    set_device(device)
    try:
        yield
    finally:
        _presented.current = before


def get_device_capability(*_args: Any, **_kwargs: Any) -> tuple[int, int]:
    """See CAPABILITY."""
    return CAPABILITY


def get_device_name(*_args: Any, **_kwargs: Any) -> str:
    """Says what it is."""
    return "cpu (moe_bench embedding)"


@dataclass(frozen=True)
class DeviceProperties:
    """What `torch.cuda.get_device_properties` returns."""

    name: str = "cpu (moe_bench embedding)"
    major: int = CAPABILITY[0]
    minor: int = CAPABILITY[1]
    multi_processor_count: int = 1
    total_memory: int = 0
    gcnArchName: str = ""  # noqa: N815 - torch's spelling
    warp_size: int = 32


def get_device_properties(*_args: Any, **_kwargs: Any) -> DeviceProperties:
    """The host's memory on one multiprocessor."""
    return DeviceProperties(total_memory=total_memory_bytes())
