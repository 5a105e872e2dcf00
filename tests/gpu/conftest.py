"""Whole trainings by the user's own command, on real GPUs and beside them on the CPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

from moe_bench.results.reader import read_events, read_expert_loads, read_steps
from moe_bench.results.records import Event, StepRecord
from tests.support.projects import REPOSITORY

RUN_TIMEOUT_S = 600
CALLER = {name: value for name, value in os.environ.items() if name != "TORCHDYNAMO_DISABLE"}
"""tests/conftest.py turns compiling off for the CPU's tests; a user has it on."""
STEPS = 10
COMMON = (
    *("--mock-data", "--eval-iters", "0", "--lr-decay-style", "constant", "--lr-warmup-iters", "0"),
    *("--ckpt-format", "torch_dist"),
)
FROM_WEIGHTS = ("--finetune", "--no-load-optim", "--no-load-rng")


@functools.cache
def gpus() -> tuple[int, str]:
    """How many torch can use, and if none why."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.device_count(), ""
    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return 0, " ".join(str(error).split())
    return 0, "it sees no device"


def need_gpus(count: int) -> None:
    """Skip the test, saying why, where there are fewer."""
    found, why = gpus()
    if found < count:
        reason = why or f"torch sees {found}"
        pytest.skip(f"needs {count} GPU{'s' * (count > 1)}: {reason}")


@dataclass(frozen=True)
class Trained:
    """A run that ended well."""

    run_dir: Path

    @property
    def steps(self) -> list[StepRecord]:
        steps = read_steps(self.run_dir).records
        return list(read_expert_loads(self.run_dir, frozenset(step.step for step in steps)))

    @property
    def losses(self) -> list[float]:
        losses = [step.loss for step in read_steps(self.run_dir).records]
        assert None not in losses, losses
        return [loss for loss in losses if loss is not None]

    @property
    def checkpoints(self) -> Path:
        """Where it saved."""
        return self.run_dir / "checkpoints"

    def events(self, name: str) -> list[Event]:
        return [event for event in read_events(self.run_dir).records if event.event == name]


type Train = Callable[..., Trained]


@pytest.fixture(scope="session")
def hiding(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for PYTHONPATH that makes a Python behave as if Transformer Engine and Apex were not installed."""
    folder = tmp_path_factory.mktemp("hiding")
    names = "'transformer_engine', 'transformer_engine_torch', 'apex', 'amp_C', 'fused_weight_gradient_mlp_cuda'"
    (folder / "sitecustomize.py").write_text(
        f"import sys\nfor name in ({names}):\n    sys.modules[name] = None\n"
    )
    return folder


@pytest.fixture(scope="session")
def train(tmp_path_factory: pytest.TempPathFactory, hiding: Path) -> Train:
    """Train by `interactive_benchmarking.sh`; a failure shows what a user would see and the ranks' last words."""
    base = tmp_path_factory.mktemp("runs")

    def run(
        name: str,
        flags: Sequence[str] = (),
        *,
        layers: str = "as installed",
        save_every: int | None = None,
        **knobs: str,
    ) -> Trained:
        environment: Mapping[str, str] = CALLER | {
            "MOE_BENCH_PYTHON": sys.executable,
            "OUTPUT_PATH": str(base),
            "RUN_ID": name,
            "MODEL": "Tiny-Qwen3",
            "TRAIN_ITERS": str(STEPS),
            "GPUS_PER_NODE": "1",
            "EP": "1",
            **({"PYTHONPATH": str(hiding)} if layers == "plain" else {}),
            **knobs,
        }
        command = ["bash", str(REPOSITORY / "interactive_benchmarking.sh"), *COMMON, *flags]
        if save_every is not None:
            command += ["--save", str(base / name / "checkpoints"), "--save-interval"]
            command += [str(save_every)]
        done = subprocess.run(
            command,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=RUN_TIMEOUT_S,
        )
        assert done.returncode == 0, f"{done.stdout}\n{done.stderr}\n{_last_words(base / name)}"
        return Trained(base / name)

    return run


def _last_words(run_dir: Path) -> str:
    logs = sorted((run_dir / "logs").glob("*.log"))
    return "\n".join(f"== {log}\n{log.read_text(errors='replace')[-3000:]}" for log in logs)


@dataclass(frozen=True)
class Reference:
    """A model's weights and how it trains from them on the CPU."""

    model: str
    start: tuple[str, ...]
    """Flags that load the weights."""
    fp32: list[float]
    """The losses."""
    bf16: list[float]

    def bound(self, precision: str) -> float:
        """How far a loss may be off, relative: 3 times what bf16 changes on the CPU; fp32 gets 1e-3, since it may be TF32."""
        if precision == "fp32":
            return 1e-3
        return 3 * max(2e-3, farthest(self.bf16, self.fp32))


def farthest(losses: Sequence[float], reference: Sequence[float]) -> float:
    """The largest relative difference of any step."""
    assert len(losses) == len(reference), (losses, reference)
    return max(abs(a - b) / abs(b) for a, b in zip(losses, reference, strict=True))


@pytest.fixture(scope="session")
def reference_of(train: Train) -> Callable[[str], Reference]:
    """The reference of a model. Megatron draws other weights on a GPU, so all start from one checkpoint, the CPU's."""

    @functools.cache
    def of(model: str) -> Reference:
        on_cpu = {"MODEL": model, "MOE_BENCH_DEVICE": "cpu", "PR": "fp32"}
        made = train(
            f"{model}-weights",
            ["--lr", "1e-30", "--min-lr", "0", "--no-save-optim"],
            save_every=1,
            **(on_cpu | {"TRAIN_ITERS": "1"}),
        )
        start = ("--load", str(made.checkpoints), *FROM_WEIGHTS)
        fp32 = train(f"{model}-cpu-fp32", start, **on_cpu)
        assert fp32.events("start")[0].fields["device"] == "cpu", "the GPU was not hidden"
        bf16 = train(f"{model}-cpu-bf16", start, **(on_cpu | {"PR": "bf16"}))
        return Reference(model=model, start=start, fp32=fp32.losses, bf16=bf16.losses)

    return of


@pytest.fixture(params=["te", "plain"])
def layers(request: pytest.FixtureRequest) -> str:
    """Transformer Engine's layers, and those of a machine that lacks it."""
    if request.param == "te":
        need_transformer_engine()
    return str(request.param)


def need_transformer_engine() -> None:
    """Skip the test where there is none."""
    if importlib.util.find_spec("transformer_engine") is None:
        pytest.skip(f"Transformer Engine is not installed in {sys.prefix}")
