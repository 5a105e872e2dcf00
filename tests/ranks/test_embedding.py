"""The embedding across ranks: what gloo lacks, random numbers of tensor-parallel ranks, and errors that come back."""

from __future__ import annotations

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("megatron.core")
if torch.cuda.is_available():
    pytest.skip("the embedding is for machines without CUDA", allow_module_level=True)

from tests.support.ranks import run_ranks  # noqa: E402

pytestmark = pytest.mark.ranks(2)


def test_nccl_groups_average_over_gloo() -> None:
    def body() -> tuple[str, list[float], list[float], list[float]]:
        import torch.distributed as dist

        group = dist.new_group(backend="nccl")
        rank = dist.get_rank()
        whole = torch.tensor([1.0 + rank, 2.0], device="cuda")
        dist.all_reduce(whole, op=dist.ReduceOp.AVG, group=group)
        source, part = torch.tensor([1.0, 3.0]) * (rank + 1), torch.empty(1)
        dist.reduce_scatter_tensor(part, source, op=dist.ReduceOp.AVG, group=group)
        return dist.get_backend(group), whole.tolist(), part.tolist(), source.tolist()

    first, second = run_ranks(body)
    assert first == ("gloo", [1.5, 2.0], [1.5], [1.0, 3.0])
    assert second == ("gloo", [1.5, 2.0], [4.5], [2.0, 6.0])


def test_parts_of_different_sizes_are_gathered_over_gloo() -> None:
    def body() -> tuple[list[list[float]], list[list[float]], list[float]]:
        import torch.distributed as dist

        rank = dist.get_rank()
        mine = torch.full((3 - 2 * rank, 1), 1.0 + rank, device="cuda")
        at_once, later = ([torch.empty(3, 1), torch.empty(1, 1)] for _ in range(2))
        dist.all_gather(at_once, mine)
        dist.all_gather(later, mine, async_op=True).wait()
        part = torch.empty(3 - 2 * rank)
        dist.reduce_scatter(part, [torch.ones(3), torch.ones(1) * 5])  # its backward pass
        return *(
            [part.flatten().tolist() for part in got] for got in (at_once, later)
        ), part.tolist()

    first, second = run_ranks(body)
    gathered = [[1.0, 1.0, 1.0], [2.0]]
    assert first == (gathered, gathered, [2.0, 2.0, 2.0])
    assert second == (gathered, gathered, [10.0])


def test_groups_share_the_thread_that_listens() -> None:
    def body() -> tuple[int, int, bool]:
        from pathlib import Path

        import torch.distributed as dist
        from torch.distributed.distributed_c10d import ProcessGroupGloo

        def threads() -> int:
            return len(list(Path("/proc/self/task").iterdir()))

        groups, before = [dist.new_group()], threads()
        groups += [dist.new_group() for _ in range(8)]
        backend = groups[0]._get_backend(torch.device("cpu"))
        return before, threads(), isinstance(backend, ProcessGroupGloo)

    for before, after, is_gloo in run_ranks(body):
        assert is_gloo
        assert after - before <= 8 * 2  # the two workers of each group, and nothing that listens


def test_ranks_may_name_different_groups_in_one_call_as_with_nccl() -> None:
    def body() -> float:
        import torch.distributed as dist

        rank = dist.get_rank()
        group = dist.new_group([rank % 2, rank % 2 + 2])
        mine = torch.tensor([1.0 + rank])
        dist.all_reduce(mine, group=group)
        return mine.item()

    assert run_ranks(body, 4) == [4.0, 6.0, 4.0, 6.0]


def test_meshes_and_enumerated_groups_are_the_hosts() -> None:
    def body() -> tuple[str, str, list[str]]:
        import torch.distributed as dist
        from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

        group, _ = dist.new_subgroups_by_enumeration([[0, 1]], backend="nccl")
        of_group = DeviceMesh.from_group(group, "cuda")
        return (
            dist.get_backend(group),
            dist.get_backend(dist.new_subgroups(2, backend="nccl")[0]),
            [of_group.device_type, init_device_mesh("cuda", (2,)).device_type],
        )

    assert run_ranks(body) == [("gloo", "gloo", ["cpu", "cpu"])] * 2


def test_tensor_parallel_ranks_draw_alike_outside_and_differently_inside_the_tracker() -> None:
    def body() -> tuple[list[float], list[float], list[float]]:
        from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

        alike = torch.rand(4, device="cuda")
        with get_cuda_rng_tracker().fork():
            different = torch.rand(4, device="cuda")
        return alike.tolist(), different.tolist(), torch.rand(4, device="cuda").tolist()

    first, second = run_ranks(body, layout={"tensor_model_parallel_size": 2})
    assert first[0] == second[0]
    assert first[2] == second[2]
    assert first[1] != second[1]


def test_recomputation_draws_the_same_dropout_again() -> None:
    def body() -> bool:
        from megatron.core.tensor_parallel.random import checkpoint, get_cuda_rng_tracker

        def forward(x: torch.Tensor) -> torch.Tensor:
            with get_cuda_rng_tracker().fork():
                x = torch.nn.functional.dropout(x, 0.5)
            return torch.nn.functional.dropout(x * x, 0.5)

        x = torch.arange(1.0, 65.0, requires_grad=True)
        out = checkpoint(forward, False, x)  # noqa: FBT003 - positional upstream
        out.sum().backward()
        # d(4x^2)... only where both dropouts kept the element: the gradient's zeros are the output's.
        return torch.equal(x.grad != 0, out != 0) and bool((out == 0).any())

    assert run_ranks(body, layout={"tensor_model_parallel_size": 2}) == [True, True]


def test_an_error_of_any_rank_reaches_the_test_with_its_traceback() -> None:
    def body() -> None:
        if torch.distributed.get_rank() == 1:
            raise ValueError("expert 7 is missing")
        torch.distributed.barrier()

    with pytest.raises(AssertionError, match=r"rank 1 of 2:(.|\n)*expert 7 is missing"):
        run_ranks(body)
