"""What ranks tell one another each step comes out as it went in: counts of experts, and figures that a GPU may not tell."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from moe_bench.mcore.expert_load import ExpertCounter
from moe_bench.mcore.step_exchange import TIMERS, RankReading, StepExchange
from moe_bench.results.records import GpuSample, told

READING = RankReading(
    memory_bytes=2.0**30, stop_requested=False, gpu=None, timers_s=[0.0] * len(TIMERS)
)


@pytest.fixture(scope="module", autouse=True)
def _one_rank(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = torch.distributed.FileStore(str(tmp_path_factory.mktemp("store") / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield
    torch.distributed.destroy_process_group()


class Router(torch.nn.Module):
    """Sends token t to expert t modulo 3 of 4."""

    topk = 1

    def __init__(self, layer: int) -> None:
        super().__init__()
        self.layer_number = layer
        self.weight = torch.nn.Parameter(torch.zeros(4, 1))
        self.config = SimpleNamespace(moe_pad_expert_input_to_capacity=False)

    def forward(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        chosen = torch.arange(len(tokens)) % 3
        probs = torch.nn.functional.one_hot(chosen, 4) * 0.5
        pads = self.config.moe_pad_expert_input_to_capacity
        return probs, torch.ones_like(probs).bool() if pads else probs.bool()


@pytest.fixture
def model() -> torch.nn.ModuleDict:
    layers = {
        f"layer{number}": torch.nn.ModuleDict({"router": Router(number)}) for number in (2, 3)
    }
    return torch.nn.ModuleDict(layers)


def counted(model: torch.nn.ModuleDict) -> ExpertCounter:
    return ExpertCounter([model], num_layers=3, num_mtp_layers=0, num_experts=4)


def test_each_token_counts_once_whatever_ran_beside_the_step(model: torch.nn.ModuleDict) -> None:
    counter = counted(model)
    router = model["layer2"]["router"]
    router(torch.zeros(5))
    counter.clear()  # a step begins
    with torch.no_grad():
        router(torch.zeros(7))  # the first of two forwards under recomputation
    router(torch.zeros(7))
    router(torch.zeros(2))  # the next micro-batch
    model.eval()
    router(torch.zeros(9))
    (load,) = StepExchange(counter).run(READING).expert_load
    assert (load.layer, load.tokens_per_expert) == (2, (4, 3, 2, 0))
    assert (load.dead_experts, load.dropped_tokens) == (1, 0)


def test_layers_of_multi_token_prediction_are_numbered_after_the_decoders() -> None:
    layers = torch.nn.ModuleList(torch.nn.ModuleDict({"router": Router(1)}) for _ in range(2))
    model = torch.nn.ModuleDict({"mtp": torch.nn.ModuleDict({"layers": layers})})
    counter = ExpertCounter([model], num_layers=3, num_mtp_layers=2, num_experts=4)
    for tokens, layer in enumerate(layers, 1):
        layer["router"](torch.zeros(tokens))
    loads = StepExchange(counter).run(READING).expert_load
    assert [(load.layer, sum(load.tokens_per_expert)) for load in loads] == [(4, 1), (5, 2)]


def test_what_a_capacity_factor_drops_is_counted(model: torch.nn.ModuleDict) -> None:
    counter = counted(model)
    router = model["layer3"]["router"]
    router.topk = 2  # twice as many were offered as the map kept
    router(torch.zeros(6))
    (load,) = StepExchange(counter).run(READING).expert_load
    assert (load.layer, load.dropped_tokens) == (3, 6)


def test_what_fills_experts_up_to_their_capacity_is_not_counted(model: torch.nn.ModuleDict) -> None:
    counter = counted(model)
    router = model["layer3"]["router"]
    router.config.moe_pad_expert_input_to_capacity = True
    router(torch.zeros(5))
    (load,) = StepExchange(counter).run(READING).expert_load
    assert load.tokens_per_expert == (2, 2, 1, 0)


def test_the_runs_before_a_cuda_graph_is_captured_are_not_counted(
    model: torch.nn.ModuleDict, monkeypatch: pytest.MonkeyPatch
) -> None:
    graphs = SimpleNamespace(is_graph_warmup=lambda: True)
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.cuda_graphs", graphs)
    counter = counted(model)
    model["layer2"]["router"](torch.zeros(5))
    assert not counter.table.any()


def test_what_is_counted_stays_in_one_place(model: torch.nn.ModuleDict) -> None:
    """A CUDA graph holds the addresses: what it replays must be read where it was recorded."""
    counter = counted(model)
    where = counter.table.data_ptr()
    for _ in range(2):
        model["layer2"]["router"](torch.zeros(3))
        StepExchange(counter).run(READING)
        counter.clear()
    assert counter.table.data_ptr() == where


def test_a_figure_that_a_gpu_does_not_tell_is_none_and_not_zero() -> None:
    mig = GpuSample(
        rank=0, power_w=None, sm_clock_mhz=1980.0, utilization=None, memory_used_gib=0.0
    )
    exchange = StepExchange(None)
    assert exchange.run(replace(READING, gpu=mig)).gpus == (mig,)
    assert exchange.run(READING).gpus == ()
    whole = replace(mig, power_w=350.0)
    assert told([mig, whole], "power_w") == [350.0]
    assert told([mig], "utilization") == []
