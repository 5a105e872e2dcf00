"""The CPU embedding: what torch says while it is in place, and that nothing of it stays."""

from __future__ import annotations

import operator
from collections.abc import Iterator

import pytest

torch = pytest.importorskip("torch")
if torch.cuda.is_available():
    pytest.skip("the embedding is for machines without CUDA", allow_module_level=True)

from moe_bench.errors import ArgumentsError  # noqa: E402
from moe_bench.mcore.cpu.embedding import TABLE, Embedding, install, installed  # noqa: E402
from moe_bench.mcore.cpu.embedding_refusals import refuse  # noqa: E402


@pytest.fixture
def embedding() -> Iterator[Embedding]:
    with install(local_world_size=4) as placed:
        yield placed


def _named(target: str) -> object:
    path, _, name = target.removeprefix("torch").lstrip(".").rpartition(".")
    owner = operator.attrgetter(path)(torch) if path else torch
    return vars(owner).get(name, "absent")


def test_removing_restores_every_name_of_torch_exactly() -> None:
    before = [_named(row.target) for row in TABLE]
    with install():
        within = [_named(row.target) for row in TABLE]
    assert all(now is not was for now, was in zip(within, before, strict=True))
    assert [_named(row.target) for row in TABLE] == before
    assert installed() is None
    assert not torch.cuda.is_available()


def test_every_row_gives_a_reason_and_no_name_twice() -> None:
    assert all(row.reason for row in TABLE)
    assert len({row.target for row in TABLE}) == len(TABLE)


def test_installing_twice_is_one_embedding(embedding: Embedding) -> None:
    assert install() is embedding


@pytest.mark.usefixtures("embedding")
@pytest.mark.parametrize("device", ["cuda", "cuda:3", 0, torch.device("cuda", 1)])
def test_every_spelling_of_a_device_is_the_host(device: object) -> None:
    assert torch.empty(2, device=device).device.type == "cpu"
    assert torch.ones(2).to(device).device.type == "cpu"
    assert torch.ones(2).new_zeros(3, device=device).device.type == "cpu"
    assert torch.nn.Linear(1, 1).to(device).weight.device.type == "cpu"


@pytest.mark.usefixtures("embedding")
def test_a_copy_to_the_host_does_not_see_later_changes() -> None:
    weight = torch.zeros(2)
    by_method, by_name, moved = weight.cpu(), weight.to("cpu", non_blocking=True), weight.cuda()
    weight += 1
    assert by_method.tolist() == by_name.tolist() == [0, 0]
    assert moved.tolist() == [1, 1]


@pytest.mark.usefixtures("embedding")
def test_meta_tensors_stay_meta() -> None:
    with torch.device("meta"):
        assert torch.empty(2).is_meta
    assert torch.empty(2, device="meta").is_meta


@pytest.mark.usefixtures("embedding")
def test_moving_to_another_dtype_or_tensor_keeps_working() -> None:
    tensor = torch.ones(2)
    assert tensor.to(torch.bfloat16).type() == "torch.cuda.BFloat16Tensor"
    assert tensor.to(torch.zeros(1, dtype=torch.float64)).dtype is torch.float64
    assert tensor.type("torch.cuda.HalfTensor").dtype is torch.float16


@pytest.mark.usefixtures("embedding")
def test_one_device_for_each_local_rank() -> None:
    assert torch.cuda.device_count() == 4
    torch.cuda.set_device(3)
    assert torch.cuda.current_device() == 3
    with torch.cuda.device(1):
        assert torch.cuda.current_device() == 1
    assert torch.cuda.current_device() == 3


@pytest.mark.usefixtures("embedding")
def test_the_device_generator_replays_what_it_drew() -> None:
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(3, device="cuda")
    torch.cuda.set_rng_state(state)
    assert torch.equal(torch.rand(3, device="cuda"), first)
    assert torch.cuda.default_generators[0].initial_seed() == 5


@pytest.mark.usefixtures("embedding")
def test_streams_nest_and_events_measure_time() -> None:
    default, side = torch.cuda.current_stream(), torch.cuda.Stream()
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    with torch.cuda.stream(side):
        assert torch.cuda.current_stream() is side
        torch.ones(1000).sum()
    end.record()
    assert torch.cuda.current_stream() is default
    assert begin.elapsed_time(end) > 0


@pytest.mark.usefixtures("embedding")
def test_reported_memory_is_this_process() -> None:
    before = torch.cuda.memory_allocated()
    block = torch.ones(64, 1 << 20, dtype=torch.uint8)
    grown = torch.cuda.memory_allocated() - before
    assert 48 << 20 < grown < 96 << 20
    assert block.numel() == 64 << 20
    assert torch.cuda.max_memory_allocated() >= before + grown - (8 << 20)


@pytest.mark.parametrize(
    ("argv", "named"),
    [
        (["--fp8-format", "hybrid"], "--fp8-format hybrid"),
        (["--moe-token-dispatcher-type=flex"], "--moe-token-dispatcher-type flex"),
        (["--moe-enable-deepep"], "--moe-enable-deepep"),
        (["--cuda-graph-impl", "local"], "--cuda-graph-impl local"),
        (["--distributed-backend", "nccl"], "--distributed-backend nccl"),
    ],
)
def test_what_a_cpu_cannot_do_is_refused_by_name(argv: list[str], named: str) -> None:
    with pytest.raises(ArgumentsError, match=named):
        refuse(["--num-layers", "2", *argv])


def test_all_refusals_are_said_at_once() -> None:
    with pytest.raises(ArgumentsError) as refused:
        refuse(["--fp8-format", "e4m3", "--tp-comm-overlap"])
    assert len(str(refused.value).splitlines()) == 2


def test_flags_that_work_are_not_refused() -> None:
    refuse(["--moe-token-dispatcher-type", "alltoall", "--cuda-graph-impl", "none", "--bf16"])
