"""Presents this process's host as the one CUDA device that Megatron asks for.

Megatron-Core has no CPU back end: it names "cuda" in some 200 places. Its arithmetic, schedules and collectives do not
need a GPU, so the whole of it runs once `torch.cuda` answers for the host. Everything that answers is in `TABLE`, one
row a replaced name; `install` puts the table in place, `Embedding.remove` restores torch as it was. Import Megatron
after `install`, since it binds some of these names when it is imported.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed
import torch.utils._device

from moe_bench.mcore.cpu import (
    embedding_collective as collective,
    embedding_device as device,
    embedding_memory as memory,
    embedding_random as random,
    embedding_stream as stream,
)

WRITTEN_AGAINST = "megatron-core 0.19.2, torch 2.11.0"
"""Upstream versions whose use of torch.cuda the table was made from. It goes when Megatron gains a CPU device."""

_ABSENT = object()


@dataclass(frozen=True, kw_only=True, slots=True)
class Replacement:
    """One name of torch that answers for the host."""

    target: str
    """Dotted, from `torch`."""
    value: Any
    """What takes its place; with `wraps`, a function from the original to it."""
    reason: str
    wraps: bool = False


def _rows(
    prefix: str, reason: str, values: dict[str, Any], *, wraps: bool = False
) -> tuple[Replacement, ...]:
    return tuple(
        Replacement(target=f"{prefix}.{name}", value=value, reason=reason, wraps=wraps)
        for name, value in values.items()
        if wraps is False or _exists(f"{prefix}.{name}")
    )


def _exists(target: str) -> bool:
    try:
        operator.attrgetter(target.removeprefix("torch."))(torch)
    except AttributeError:
        return False
    return True


_FACTORIES = (
    "empty zeros ones full tensor rand randn randint arange as_tensor empty_like zeros_like ones_like linspace "
    "eye randperm empty_strided rand_like randn_like full_like randint_like logspace range asarray tril_indices "
    "triu_indices normal"
).split()
_METHOD_FACTORIES = "new_empty new_zeros new_ones new_tensor new_full new_empty_strided".split()
_LEGACY_TYPES = "Float Long Int Half BFloat16 Byte Double Bool Short Char".split()


def _compile_nothing(model: Any = None, **_kwargs: Any) -> Any:
    return (lambda function: function) if model is None else model


TABLE: tuple[Replacement, ...] = (
    *_rows(
        "torch.cuda",
        "Megatron refuses to start without a device, and asks which one it is",
        {
            "is_available": device.is_true,
            "is_initialized": device.is_true,
            "is_bf16_supported": device.is_true,
            "is_current_stream_capturing": device.is_false,
            "init": device.nothing,
            "_lazy_init": device.nothing,
            "_lazy_call": random.call_now,
            "device_count": device.device_count,
            "current_device": device.current_device,
            "set_device": device.set_device,
            "device": device.device_context,
            "get_device_capability": device.get_device_capability,
            "get_device_name": device.get_device_name,
            "get_device_properties": device.get_device_properties,
            "ipc_collect": device.nothing,
        },
    ),
    *_rows(
        "torch.cuda",
        "work on a host is done when the call returns",
        {
            "Stream": stream.Stream,
            "Event": stream.Event,
            "stream": stream.stream_context,
            "current_stream": stream.current_stream,
            "default_stream": stream.default_stream,
            "set_stream": stream.set_stream,
            "synchronize": device.nothing,
        },
    ),
    *_rows(
        "torch.accelerator",
        "a DataLoader with workers asks here; torch would ask the driver",
        {
            "current_device_index": device.current_device,
            "current_device_idx": device.current_device,
            "set_device_index": device.set_device,
            "set_device_idx": device.set_device,
            "current_stream": stream.current_stream,
            "set_stream": stream.set_stream,
            "synchronize": device.nothing,
        },
    ),
    *_rows(
        "torch.cuda.nvtx",
        "there is no NVTX; --profile uses torch's profiler",
        {
            "range_push": device.nothing,
            "range_pop": device.nothing,
            "mark": device.nothing,
            "range": stream.empty_context,
        },
    ),
    *(
        row
        for module in ("torch.cuda", "torch.cuda.random")
        for row in _rows(
            module,
            "the device generator is the host's",
            {
                "get_rng_state": random.get_rng_state,
                "set_rng_state": random.set_rng_state,
                "get_rng_state_all": random.get_rng_state_all,
                "set_rng_state_all": random.set_rng_state_all,
                "manual_seed": random.manual_seed,
                "manual_seed_all": random.manual_seed,
                "initial_seed": random.initial_seed,
            },
        )
    ),
    *_rows(
        "torch.cuda",
        "the device generator is the host's",
        {"default_generators": random.DefaultGenerators()},
    ),
    *_rows(
        "torch.cuda",
        "reported memory is the resident set of this process",
        {
            "memory_allocated": memory.resident_bytes,
            "memory_reserved": memory.resident_bytes,
            "device_memory_used": memory.resident_bytes,
            "max_memory_allocated": memory.peak_resident_bytes,
            "max_memory_reserved": memory.peak_resident_bytes,
            "memory_stats": memory.memory_stats,
            "mem_get_info": memory.mem_get_info,
            "reset_peak_memory_stats": memory.reset_peak,
            "empty_cache": device.nothing,
        },
    ),
    *_rows(
        "torch.cuda",
        "Megatron tells precisions apart by these names",
        {f"{name}Tensor": getattr(torch, f"{name}Tensor") for name in _LEGACY_TYPES},
    ),
    *_rows(
        "torch",
        "device='cuda' is the host",
        dict.fromkeys(_FACTORIES, device.factory),
        wraps=True,
    ),
    *_rows("torch", "map_location='cuda' is the host", {"load": device.loader}, wraps=True),
    *_rows(
        "torch.Tensor",
        "device='cuda' is the host",
        dict.fromkeys(_METHOD_FACTORIES, device.factory),
        wraps=True,
    ),
    *_rows(
        "torch.Tensor",
        "a tensor counts as the device's; a move to it stays, a move to the host copies",
        {
            "cuda": device.stay,
            "pin_memory": device.stay,
            "cpu": device.copy_to_host,
            "record_stream": device.nothing,
            "is_cuda": device.is_cuda,
        },
    ),
    *_rows(
        "torch.Tensor",
        "a tensor counts as the device's; a move to it stays, a move to the host copies",
        {"to": device.mover, "type": device.type_name},
        wraps=True,
    ),
    *_rows("torch.nn.Module", "a module is already there", {"cuda": device.stay}),
    *_rows("torch.nn.Module", "device='cuda' is the host", {"to": device.module_mover}, wraps=True),
    *_rows(
        "torch.distributed",
        "NCCL's groups are gloo's",
        {
            "init_process_group": collective.starter,
            "new_group": collective.grouper,
            "new_subgroups": collective.starter,
            "new_subgroups_by_enumeration": collective.starter,
            "init_device_mesh": collective.mesh_maker,
            "device_mesh.init_device_mesh": collective.mesh_maker,
            "device_mesh.DeviceMesh.__init__": collective.mesh_starter,
        },
        wraps=True,
    ),
    *_rows(
        "torch.distributed",
        "gloo has no ReduceOp.AVG",
        {
            "all_reduce": collective.averaging_in_place,
            "reduce_scatter_tensor": collective.averaging_scatter,
        },
        wraps=True,
    ),
    *_rows(
        "torch.distributed",
        "gloo gathers parts of one size only",
        {"all_gather": collective.gathering_uneven},
        wraps=True,
    ),
    *_rows(
        "torch.distributed.distributed_c10d",
        "gloo's device of each group has a thread that keeps waking up",
        {"ProcessGroupGloo": collective.on_one_device},
        wraps=True,
    ),
    *_rows(
        "torch",
        "Megatron compiles small functions for a GPU; here they run as written",
        {"compile": _compile_nothing},
    ),
)


class Embedding:
    """A table in place. `remove`, or leaving the `with` block, restores torch exactly."""

    def __init__(self, undo: list[tuple[Any, str, Any]]) -> None:
        self._undo = undo

    @property
    def active(self) -> bool:
        """True until `remove`."""
        return bool(self._undo)

    def remove(self) -> None:
        """Restore every replaced name."""
        while self._undo:
            owner, name, original = self._undo.pop()
            if original is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, original)
        _installed.clear()

    def replaced(self) -> tuple[str, ...]:
        """The dotted names, in the table's order."""
        return tuple(row.target for row in TABLE)

    def summary(self) -> str:
        """One line for the log."""
        return (
            f"CPU embedding: torch.cuda is presented by this host ({len(TABLE)} names of torch replaced: devices, "
            "streams, random numbers, memory, tensor moves; NCCL groups are gloo's; torch.compile is off). "
            "No figure of this run is a GPU's."
        )

    def __enter__(self) -> Embedding:
        return self

    def __exit__(
        self,
        _kind: type[BaseException] | None,
        _value: BaseException | None,
        _trace: TracebackType | None,
    ) -> None:
        self.remove()


_installed: list[Embedding] = []


def install(*, local_world_size: int = 1) -> Embedding:
    """Put the table in place and show `local_world_size` devices. A second call returns the first's embedding."""
    device.present(local_world_size)
    if _installed:
        return _installed[0]
    # torch caches its set of factories by identity (torch/utils/_device.py): fill it before they are wrapped, so that
    # `with torch.device("meta")` still knows them.
    torch.utils._device._device_constructors()
    undo: list[tuple[Any, str, Any]] = []
    for row in TABLE:
        path, _, name = row.target.removeprefix("torch").lstrip(".").rpartition(".")
        owner = operator.attrgetter(path)(torch) if path else torch
        undo.append((owner, name, vars(owner).get(name, _ABSENT)))
        setattr(owner, name, _made(row, getattr(owner, name, None)))
    embedding = Embedding(undo)
    _installed.append(embedding)
    return embedding


def installed() -> Embedding | None:
    """The embedding in place, if any."""
    return _installed[0] if _installed else None


def _made(row: Replacement, original: Any) -> Any:
    if not row.wraps:
        return row.value
    maker: Callable[[Any], Any] = row.value
    made = maker(original)
    return made if isinstance(made, type) else functools.update_wrapper(made, original)
