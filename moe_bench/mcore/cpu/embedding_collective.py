"""Process groups: NCCL's are gloo's."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist


def starter(function: Callable[..., Any]) -> Callable[..., Any]:
    """`init_process_group` and `new_group` over gloo, whatever device backend they ask for."""

    @functools.wraps(function)
    def start(*args: Any, **kwargs: Any) -> Any:
        for unsupported in ("device_id", "pg_options"):
            kwargs.pop(unsupported, None)
        if args and isinstance(args[0], str):
            args = (_gloo(args[0]), *args[1:])
        if kwargs.get("backend") is not None:
            kwargs["backend"] = _gloo(kwargs["backend"])
        elif function.__name__ == "init_process_group" and not args:
            kwargs["backend"] = "gloo"
        return function(*args, **kwargs)

    return start


def grouper(function: Callable[..., Any]) -> Callable[..., Any]:
    """`new_group` over gloo, also when the ranks name different members in the same call.

    torch counts calls and gives all groups of one call one name. NCCL connects a group when it is first used, gloo at
    once, and then its members must not meet another group's.
    """
    start = starter(function)

    @functools.wraps(function)
    def new_group(ranks: Any = None, *args: Any, **kwargs: Any) -> Any:
        _meeting_place[:] = [] if ranks is None else [f"ranks {sorted(ranks)}"]
        try:
            return start(ranks, *args, **kwargs)
        finally:
            _meeting_place.clear()

    return new_group


_meeting_place: list[str] = []
"""Below which name of the store the members of the group that is being made find each other."""


def mesh_maker(function: Callable[..., Any]) -> Callable[..., Any]:
    """`init_device_mesh` over hosts."""

    @functools.wraps(function)
    def init_device_mesh(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return function("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return init_device_mesh


def mesh_starter(function: Callable[..., None]) -> Callable[..., None]:
    """`DeviceMesh.__init__`, through which `DeviceMesh.from_group` goes too."""

    @functools.wraps(function)
    def __init__(self: Any, device_type: str, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        function(self, "cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return __init__


class Done:
    """The handle of a collective that had nothing to do."""

    def wait(self, *_args: Any) -> bool:
        """Already over."""
        return True

    def is_completed(self) -> bool:
        """Already over."""
        return True


def averaging_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """`all_reduce` with ReduceOp.AVG, which gloo lacks: the sum of the parts over the group's size.

    Of one part nothing is asked of gloo, which would hand it to a thread and wait.
    """

    @functools.wraps(function)
    def all_reduce(
        tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        size = dist.get_world_size(group)
        if size == 1:
            return Done() if async_op else None
        if op == dist.ReduceOp.AVG:
            tensor.div_(size)
            op = dist.ReduceOp.SUM
        return function(tensor, op=op, group=group, async_op=async_op)

    return all_reduce


def averaging_scatter(function: Callable[..., Any]) -> Callable[..., Any]:
    """`reduce_scatter_tensor` with ReduceOp.AVG, which gloo lacks. The input is not changed."""

    @functools.wraps(function)
    def reduce_scatter_tensor(
        output: torch.Tensor,
        input: torch.Tensor,
        op: Any = dist.ReduceOp.SUM,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        if op == dist.ReduceOp.AVG:
            input, op = input / dist.get_world_size(group), dist.ReduceOp.SUM
        return function(output, input, op=op, group=group, async_op=async_op)

    return reduce_scatter_tensor


class PaddedGather:
    """The handle of an all-gather whose parts were padded to one length."""

    def __init__(self, work: Any, padded: list[torch.Tensor], parts: list[torch.Tensor]) -> None:
        self._work, self._padded, self._parts = work, padded, parts

    def wait(self, *args: Any) -> bool:
        """Until the parts are whole."""
        done = self._work is None or self._work.wait(*args)
        for part, padded in zip(self._parts, self._padded, strict=True):
            part.copy_(padded[: part.numel()].view_as(part))
        return done


def gathering_uneven(function: Callable[..., Any]) -> Callable[..., Any]:
    """`all_gather` of parts that differ in size, which gloo refuses: padded to the longest.

    Experts under ETP and EP gather different numbers of tokens (megatron/core/tensor_parallel/mappings.py
    _gather_along_first_dim with output_split_sizes, 0.19.2).
    """

    @functools.wraps(function)
    def all_gather(
        tensor_list: list[torch.Tensor],
        tensor: torch.Tensor,
        group: Any = None,
        async_op: bool = False,
    ) -> Any:
        longest = max((part.numel() for part in tensor_list), default=0)
        if all(part.numel() == longest for part in tensor_list):
            return function(tensor_list, tensor, group=group, async_op=async_op)
        mine = tensor.new_zeros(longest)
        mine[: tensor.numel()] = tensor.reshape(-1)
        padded = [torch.empty_like(mine) for _ in tensor_list]
        work = function(padded, mine, group=group, async_op=async_op)
        gather = PaddedGather(work, padded, tensor_list)
        return gather if async_op else gather.wait() and None

    return all_gather


class _OneDevice(type):
    """What is called in place of `ProcessGroupGloo`: every group of this process listens through one gloo device.

    torch makes a device for each group, and each device has a thread that wakes up a hundred times a second
    (gloo/transport/tcp/loop.cc). Megatron makes some 20 groups a rank: with several ranks on a few cores, their threads
    take a tenth of the machine, and of a process that lays its groups out again and again all of it.
    """

    original: Any
    _device: tuple[int, Any] | None = None

    def __call__(cls, store: Any, rank: int, size: int, timeout: timedelta) -> Any:
        for name in _meeting_place:
            store = dist.PrefixStore(name, store)
        options = cls.original._Options()
        options._devices = [cls._shared()]
        options._threads = 2  # torch's own number for one device
        options._timeout = timeout
        return cls.original(store, rank, size, options)

    def _shared(cls) -> Any:
        if cls._device is None or cls._device[0] != os.getpid():  # a fork has no threads
            cls._device = (os.getpid(), cls.original.create_default_device())
        return cls._device[1]

    def __instancecheck__(cls, instance: object) -> bool:
        return isinstance(instance, cls.original)

    def __getattr__(cls, name: str) -> Any:
        return getattr(cls.original, name)


def on_one_device(process_group: type) -> Any:
    """`ProcessGroupGloo` whose groups share one device; for `isinstance` it is the original."""
    return _OneDevice("ProcessGroupGloo", (), {"original": process_group})


def _gloo(backend: str) -> str:
    return "gloo" if "nccl" in backend else backend
