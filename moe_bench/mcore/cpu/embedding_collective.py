"""Process groups: NCCL's are gloo's."""

from __future__ import annotations

import functools
from collections.abc import Callable
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


def mesh_maker(function: Callable[..., Any]) -> Callable[..., Any]:
    """`init_device_mesh` over hosts."""

    @functools.wraps(function)
    def init_device_mesh(device_type: str, *args: Any, **kwargs: Any) -> Any:
        return function("cpu" if device_type == "cuda" else device_type, *args, **kwargs)

    return init_device_mesh


def averaging_in_place(function: Callable[..., Any]) -> Callable[..., Any]:
    """`all_reduce` with ReduceOp.AVG, which gloo lacks: the sum of the parts over the group's size."""

    @functools.wraps(function)
    def all_reduce(
        tensor: torch.Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False
    ) -> Any:
        if op == dist.ReduceOp.AVG:
            tensor.div_(dist.get_world_size(group))
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


def _gloo(backend: str) -> str:
    return "gloo" if "nccl" in backend else backend
