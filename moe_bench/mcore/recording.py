"""Records Megatron's training loop from inside: hooks on its own functions, found by name, arguments by name.

Written against megatron/training/training.py of 0.16 to 0.19. Each hook is a `Patch` that is undone when training ends.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import itertools
import math
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import torch

from moe_bench.mcore.expert_load import ExpertCounter
from moe_bench.mcore.patches import Patch
from moe_bench.mcore.step_exchange import TIMERS, Exchanged, RankReading, StepExchange
from moe_bench.mcore.versions import megatron_version, versions
from moe_bench.results.records import Event, GpuSample, StepRecord
from moe_bench.results.writer import RunWriter

TRAINING = "megatron.training.training"
CHECKPOINTING = "megatron.training.checkpointing"
_COUNTERS = ("advanced iterations", "skipped iterations", "nan iterations")


class Meters(Protocol):
    """What a rank can measure about itself, cheaply."""

    def memory_bytes(self) -> float:
        """Peak allocated on the GPU, or the resident set."""
        ...

    def gpu(self) -> GpuSample | None:
        """The latest sample; None without a GPU."""
        ...

    def complaints(self) -> list[str]:
        """What is wrong with the device or with measuring it, since the last call."""
        ...


class Observer(Protocol):
    """Who else wants the steps: a mirror, a test."""

    def step(self, record: StepRecord) -> None:
        """After a step has been written. Called on the writing rank."""
        ...

    def event(self, event: Event) -> None:
        """After an event of that rank has been written."""
        ...

    def close(self) -> None:
        """When training has ended."""
        ...


class Watcher(Protocol):
    """Who looks at the process around its steps, on every rank: a profiler."""

    def before_first_step(self, first_step: int) -> None:
        """The first step that this process makes is about to begin."""
        ...

    def after_step(self, step: int) -> None:
        """That step is on record."""
        ...


class LossTap(dict[str, Any]):
    """Stands in for Megatron's `total_loss_dict` and remembers what each step adds to it, to the last bit.

    Megatron's `training_log` (0.17 to 0.19.2) first adds a step's losses to the sums it finds here, then goes through
    them to print and reset. While it adds, it finds no sum, so that what it sets is the step's own; the sum is kept here.
    """

    def __init__(self) -> None:
        super().__init__()
        self.step: dict[str, Any] = {}
        self._adding = True

    def begin_step(self) -> None:
        """Megatron is about to add a step's losses."""
        self.step, self._adding = {}, True

    def __iter__(self) -> Iterator[str]:
        """Megatron begins to print."""
        self._adding = False
        return super().__iter__()

    def __contains__(self, key: object) -> bool:
        return (not self._is_new(key)) and super().__contains__(key)

    def get(self, key: str, default: Any = None) -> Any:
        """The sum; while a step's losses are added, `default` for one that it has not yet brought."""
        return default if self._is_new(key) else super().get(key, default)

    def __setitem__(self, key: str, value: Any) -> None:
        if self._is_new(key):
            self.step[key] = value
            value = super().get(key, 0.0) + value
        super().__setitem__(key, value)

    def _is_new(self, key: object) -> bool:
        return self._adding and key not in _COUNTERS and key not in self.step


@dataclass
class _Clock:
    """When the present step began, and what of it was not training."""

    began_s: float | None = None
    excluded_s: float = 0.0
    timers_s: dict[str, float] = field(default_factory=dict)

    def lap(self) -> float:
        now = time.perf_counter()
        assert self.began_s is not None
        elapsed = now - self.began_s - self.excluded_s
        self.began_s, self.excluded_s = now, 0.0
        return elapsed


class Recorder:
    """Writes a run's steps and events from one rank's point of view. A context manager around the training.

    Every rank has one; the last rank writes the steps (there Megatron has the losses), rank 0 the run's events.
    """

    def __init__(
        self,
        writer: RunWriter,
        meters: Meters,
        *,
        rank: int,
        world_size: int,
        observers: tuple[Observer, ...] = (),
        facts: Mapping[str, object] | None = None,
        is_told: Callable[[], bool] = lambda: False,
    ) -> None:
        """`facts`: what the `start` event says besides what Megatron knows. `is_told`: whether to stop, asked each step."""
        self.stop_requested = False
        self._is_told = is_told
        self._writer, self._meters, self._observers = writer, meters, observers
        self._rank, self._world_size = rank, world_size
        self._watchers: list[Watcher] = []
        self._facts = dict(facts or {})
        self._tap = LossTap()
        self._clock = _Clock()
        self._flops = 0.0
        self._exchange: StepExchange | None = None
        self._counter: ExpertCounter | None = None
        self._step = 0
        self._warned: set[str] = set()
        self._splits: Iterator[str] = itertools.repeat("validation")
        self._stopping = False

    @property
    def writes_steps(self) -> bool:
        """True on the one rank that writes `results/steps.jsonl`."""
        return self._rank == self._world_size - 1

    @property
    def training(self) -> bool:
        """True once the first step has begun."""
        return self._clock.began_s is not None

    @property
    def stopped_early(self) -> bool:
        """True when all ranks agreed to end on a signal and steps were left."""
        return self._stopping and self._step < int(_megatron_args().train_iters)

    def watch(self, watcher: Watcher) -> None:
        """Tell `watcher` of the steps, too."""
        self._watchers.append(watcher)

    def event(self, name: str, **fields: object) -> None:
        """Write an event of this rank."""
        event = Event(event=name, time_unix_s=time.time(), rank=self._rank, fields=fields)
        self._writer.event(event)
        for observer in self._observers:
            observer.event(event)

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Megatron's functions report to this recorder within the block."""
        with contextlib.ExitStack() as stack:
            for module, attribute, make, reason in self._hooks():
                patch = Patch(
                    module=module,
                    attribute=attribute,
                    make=make,
                    upstream=f"{module.replace('.', '/')}.py {attribute}, 0.16 to 0.19.2",
                    reason=reason,
                    remove_when="Megatron offers a callback there",
                )
                stack.enter_context(patch.applied())
            yield

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._counter is not None:
            self._counter.remove()
        told = self.stop_requested and isinstance(error, SystemExit)  # before the first step
        failed = error is not None and not told and not _is_clean_exit(error)
        if failed:
            lines = traceback.format_exception(kind, error, trace)
            self.event("error", message=lines[-1].strip()[:2000], traceback="".join(lines)[-8000:])
        if self._rank == 0:
            outcome = "failed" if failed else "stopped" if self._stopping or told else "completed"
            self.event("end", outcome=outcome, step=self._step)
        for observer in self._observers:
            observer.close()
        self._writer.close()

    def _hooks(self) -> tuple[tuple[str, str, Callable[[Any], Any], str], ...]:
        return (
            *((TRAINING, *hook) for hook in self._training_hooks()),
            (CHECKPOINTING, "schedule_async_save", self._around_schedule, "when it is on disk"),
        )

    def _training_hooks(self) -> tuple[tuple[str, Callable[[Any], Any], str], ...]:
        return (
            ("setup_model_and_optimizer", self._around_setup, "routers are counted, start is told"),
            ("train_step", self._around_train_step, "the first step's beginning"),
            ("num_floating_point_operations", self._around_flops, "the formula's result"),
            ("training_log", self._around_training_log, "all figures of a step"),
            ("evaluate", self._around_evaluate, "losses of an evaluation"),
            (
                "evaluate_and_print_results",
                self._around_evaluations,
                "of which set; not training time",
            ),
            ("save_checkpoint_and_time", self._around_save, "checkpoints; not training time"),
            ("load_checkpoint", self._around_load, "checkpoints"),
            ("checkpoint_and_decide_exit", self._around_decide_exit, "all ranks stop together"),
        )

    def _around_setup(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def setup_model_and_optimizer(*args: Any, **kwargs: Any) -> Any:
            built = original(*args, **kwargs)
            self._step = int(getattr(_megatron_args(), "iteration", 0))
            self._start(built[0])
            return built

        return setup_model_and_optimizer

    def _start(self, model: list[torch.nn.Module]) -> None:
        args = _megatron_args()
        experts = getattr(args, "num_experts", None) or 0
        if experts:
            self._counter = ExpertCounter(
                model,
                num_layers=args.num_layers,
                num_mtp_layers=getattr(args, "mtp_num_layers", None) or 0,
                num_experts=experts,
            )
        self._exchange = StepExchange(self._counter)
        total, active = count_parameters(model, args)
        if self._rank == 0:
            self.event(
                "start",
                versions={**versions(), "megatron-core": megatron_version()},
                world_size=self._world_size,
                flop_formula=f"{TRAINING}.num_floating_point_operations, megatron-core "
                f"{megatron_version()}; per GPU: divided by step time and world size",
                routing_mode=_routing_mode(args),
                hostname=socket.gethostname(),
                num_parameters=total,
                num_active_parameters=active,
                threads_per_rank=torch.get_num_threads(),
                layout=_layout(args),
                **self._facts,
            )

    def _around_train_step(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def train_step(*args: Any, **kwargs: Any) -> Any:
            if self._clock.began_s is None:
                for watcher in self._watchers:
                    watcher.before_first_step(self._step + 1)
                self._clock.began_s = time.perf_counter()
            if self._counter is not None:
                self._counter.clear()  # of what ran since the last step: a CUDA graph's warm-up
            return original(*args, **kwargs)

        return train_step

    def _around_flops(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def num_floating_point_operations(*args: Any, **kwargs: Any) -> Any:
            self._flops = original(*args, **kwargs)
            return self._flops

        return num_floating_point_operations

    def _around_training_log(self, original: Callable[..., Any]) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def training_log(*args: Any, **kwargs: Any) -> Any:
            call = signature.bind(*args, **kwargs)
            timers_s = self._read_timers()
            self._tap.begin_step()
            call.arguments["total_loss_dict"] = self._tap
            result = original(*call.args, **call.kwargs)
            self._remember_timers()
            self._record(call.arguments, timers_s)
            return result

        return training_log

    def _record(self, call: Mapping[str, Any], timers_s: list[float]) -> None:
        assert self._exchange is not None
        exchanged = self._exchange.run(
            RankReading(
                memory_bytes=self._meters.memory_bytes(),
                stop_requested=self.stop_requested or self._is_told(),
                gpu=self._meters.gpu(),
                timers_s=timers_s,
            )
        )
        for complaint in self._meters.complaints():
            self.event("warning", step=int(call["iteration"]), message=complaint)
        self._stopping = exchanged.stop_requested
        step_time_s = self._clock.lap()
        self._step = int(call["iteration"])
        if self.writes_steps:
            record = self._step_record(call, exchanged, step_time_s)
            self._writer.step(record)
            for observer in self._observers:
                observer.step(record)
        for watcher in self._watchers:
            watcher.after_step(self._step)

    def _step_record(
        self, call: Mapping[str, Any], exchanged: Exchanged, step_time_s: float
    ) -> StepRecord:
        args = _megatron_args()
        skipped = bool(call["skipped_iter"])
        grad_norm = None if skipped or call["grad_norm"] is None else float(call["grad_norm"])
        losses = configured_losses(_floats({**self._tap.step, **call["loss_dict"]}), args)
        not_finite = not_finite_values(losses | {"grad_norm": grad_norm})
        self._warn_of(not_finite)
        tokens = args.seq_length * _global_batch_size()
        return StepRecord(
            step=self._step,
            time_unix_s=time.time(),
            train_steps=args.train_iters,
            consumed_samples=args.consumed_train_samples,
            consumed_tokens=args.consumed_train_samples * args.seq_length,
            losses={name: None if name in not_finite else losses[name] for name in losses},
            grad_norm=None if "grad_norm" in not_finite else grad_norm,
            learning_rate=float(call["learning_rate"] or 0.0),
            step_time_s=step_time_s,
            tokens_per_s=tokens / step_time_s,
            tflops_per_gpu=self._flops / step_time_s / self._world_size / 1e12,
            skipped=skipped,
            memory_gib=exchanged.memory_gib,
            expert_load=exchanged.expert_load,
            timers_s=exchanged.timers_s,
            gpus=exchanged.gpus,
            not_finite=not_finite,
        )

    def _warn_of(self, not_finite: Mapping[str, str]) -> None:
        """An event the first time that a value is not finite; every step's record has it too."""
        for name in sorted(not_finite.keys() - self._warned):
            self._warned.add(name)
            value = not_finite[name]
            self.event("warning", step=self._step, message=f"step {self._step}: {name} is {value}")

    def _read_timers(self) -> list[float]:
        """Seconds of each timer since Megatron last logged."""
        return [
            now - self._clock.timers_s.get(name, 0.0)
            for name, now in zip(TIMERS, self._elapsed(), strict=True)
        ]

    def _remember_timers(self) -> None:
        """Where the next step's reading starts: Megatron resets its timers at its log interval only."""
        self._clock.timers_s = dict(zip(TIMERS, self._elapsed(), strict=True))

    def _elapsed(self) -> list[float]:
        timers = _megatron_timers()._timers
        return [timers[n].elapsed(reset=False) if n in timers else 0.0 for n in TIMERS]

    def _around_evaluate(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def evaluate(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            losses = result[0] if isinstance(result, tuple) else None
            if self.writes_steps and losses:
                found = _floats(losses)
                self.event("evaluation", step=self._step, split=next(self._splits), losses=found)
                self._warn_of(not_finite_values(found))
            return result

        return evaluate

    def _around_evaluations(self, original: Callable[..., Any]) -> Callable[..., Any]:
        timed = self._excluded(original)

        @functools.wraps(original)
        def evaluate_and_print_results(prefix: str, *args: Any, **kwargs: Any) -> Any:
            self._splits = evaluated_splits(prefix, _megatron_args())
            return timed(prefix, *args, **kwargs)

        return evaluate_and_print_results

    def _excluded(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def excluded(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            result = original(*args, **kwargs)
            self._clock.excluded_s += time.perf_counter() - began_s
            return result

        return excluded

    def _around_save(self, original: Callable[..., Any]) -> Callable[..., Any]:
        timed = self._excluded(original)

        @functools.wraps(original)
        def save_checkpoint_and_time(*args: Any, **kwargs: Any) -> Any:
            before_s = self._clock.excluded_s
            with _signals_held():
                result = timed(*args, **kwargs)
            if self._rank == 0 and not _megatron_args().async_save:
                duration_s = self._clock.excluded_s - before_s
                path = self._saved_to(is_temporary=bool(kwargs.get("non_persistent_ckpt")))
                self.event("checkpoint_saved", step=self._step, path=path, duration_s=duration_s)
            return result

        return save_checkpoint_and_time

    def _around_schedule(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Of --async-save: the checkpoint is written while training goes on, and is one when Megatron has finished it."""

        @functools.wraps(original)
        def schedule_async_save(async_request: Any) -> Any:
            step, path, began_s = self._step, self._saved_to(), time.perf_counter()

            def on_disk() -> None:
                duration_s = time.perf_counter() - began_s
                self.event("checkpoint_saved", step=step, path=path, duration_s=duration_s)

            if self._rank == 0:
                async_request.add_finalize_fn(on_disk)
            return original(async_request)

        return schedule_async_save

    def _saved_to(self, *, is_temporary: bool = False) -> str:
        """The folder of the checkpoint of the present step. Temporary ones: --non-persistent-save-interval."""
        args = _megatron_args()
        folder = Path(args.save)
        if is_temporary:
            given = (args.non_persistent_global_ckpt_dir, args.non_persistent_local_ckpt_dir)
            folder = Path(next(filter(None, given), folder / "non_persistent"))
        return str(folder / f"iter_{self._step:07d}")

    def _around_load(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            began_s = time.perf_counter()
            folder = _loaded_from(_megatron_args())
            result = original(*args, **kwargs)
            step = int(result[0])
            if self._rank == 0 and (folder is not None or step):
                self.event(
                    "checkpoint_loaded",
                    step=step,
                    path=folder or str(_megatron_args().load),
                    duration_s=time.perf_counter() - began_s,
                )
            return result

        return load_checkpoint

    def _around_decide_exit(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(original)
        def checkpoint_and_decide_exit(*args: Any, **kwargs: Any) -> Any:
            if self._stopping:  # agreed by all ranks in this step's exchange
                _megatron_args().exit_interval = 1  # Megatron's own way out: save, then exit
            leaving = original(*args, **kwargs)
            if leaving and getattr(_megatron_args(), "exit_signal_handler", False):
                # --exit-signal-handler: Megatron listens itself, in our handler's place. Collective over all ranks.
                heard = sys.modules["megatron.training.global_vars"].get_signal_handler()
                self._stopping = self._stopping or any(heard.signals_received())
            return leaving

        return checkpoint_and_decide_exit


@contextlib.contextmanager
def _signals_held() -> Iterator[None]:
    """SIGTERM and SIGINT wait, here and for good in the processes that a save starts.

    Megatron keeps a queue's server between saves (dist_checkpointing/strategies/filesystem_async.py, 0.19.2). Slurm
    signals every process of a step: a server that SIGTERM ends fails the very save that the signal asks for.
    """
    held = {signal.SIGTERM, signal.SIGINT}
    before = signal.pthread_sigmask(signal.SIG_BLOCK, held)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def count_parameters(model: list[torch.nn.Module], args: Any) -> tuple[int, int]:
    """(all, active for one token) parameters of the whole model. Collective over all ranks.

    A parameter that several ranks hold is counted on the first of them.
    """
    from megatron.core import mpu  # noqa: PLC0415 - the embedding comes first

    dense = experts = 0
    first_tp = mpu.get_tensor_model_parallel_rank() == 0
    first_dp = mpu.get_data_parallel_rank(with_context_parallel=True) == 0
    for name, parameter in (each for chunk in model for each in chunk.named_parameters()):
        split = getattr(parameter, "tensor_model_parallel", False)
        duplicate = getattr(parameter, "shared", False) and not mpu.is_pipeline_first_stage()
        if not getattr(parameter, "allreduce", True):  # over expert ranks, not data ranks
            here = mpu.get_expert_data_parallel_rank() == 0
        else:
            here = first_dp and (split or first_tp) and not duplicate
        if ".experts." in name:
            experts += parameter.numel() * here
        else:
            dense += parameter.numel() * here
    counts = torch.tensor([dense, experts], dtype=torch.int64, device=torch.cuda.current_device())
    torch.distributed.all_reduce(counts)
    dense, experts = counts.tolist()
    share = args.moe_router_topk / args.num_experts if args.num_experts else 0.0
    return dense + experts, dense + round(experts * share)


def _loaded_from(args: Any) -> str | None:
    """The folder whose checkpoint Megatron is about to load; None where it finds none and trains from scratch.

    As megatron/training/checkpointing.py load_checkpoint chooses it, 0.16 to 0.19.2.
    """
    exists = sys.modules[CHECKPOINTING].checkpoint_exists
    for folder in (args.load, getattr(args, "pretrained_checkpoint", None)):
        if folder is not None and (exists(folder) or getattr(args, "ckpt_step", None)):
            return str(folder)
    return None


def evaluated_splits(prefix: str, args: Any) -> Iterator[str]:
    """Name each set that one evaluation goes through: "test", "validation", or "validation-NAME" for several validation sets.

    Only Megatron's prefix tells the last test from a validation (megatron/training/training.py pretrain, 0.19.2).
    """
    split = "test" if prefix.endswith("on test set") else "validation"
    if not getattr(args, "multiple_validation_sets", False):
        return itertools.repeat(split)
    names = getattr(args, "validation_set_names", None) or itertools.count()
    return (f"{split}-{name}" for name in names)


_BALANCING = {
    "load_balancing_loss": "aux_loss",
    "seq_load_balancing_loss": "seq_aux_loss",
    "global_load_balancing_loss": "global_aux_loss",
}
"""Megatron's name of a loss in its log, and the --moe-router-load-balancing-type it belongs to."""


def configured_losses(losses: Mapping[str, float], args: Any) -> dict[str, float]:
    """`losses` without those that Megatron logs as zero although nothing asks for them.

    It looks for a type's name anywhere in --moe-router-load-balancing-type (megatron/training/training.py
    training_log, 0.16 to 0.19.2), so "aux_loss" is found in "seq_aux_loss"; and a coefficient of 0 does not stop it.
    """
    kinds = getattr(args, "moe_router_load_balancing_type", None) or ()
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    weights = getattr(args, "moe_aux_loss_coeff", 0.0)
    weights = list(weights) if isinstance(weights, list | tuple) else [weights] * len(kinds)
    active = {kind for kind, weight in zip(kinds, weights, strict=False) if weight}
    return {
        name: value for name, value in losses.items() if _BALANCING.get(name, "") in active | {""}
    }


def not_finite_values(values: Mapping[str, float | None]) -> dict[str, str]:
    """Names and spellings ("nan", "inf", "-inf") of what JSON cannot hold."""
    return {
        name: str(value)
        for name, value in values.items()
        if value is not None and not math.isfinite(value)
    }


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
    return {name: float(value) for name, value in values.items()}


def _routing_mode(args: Any) -> str:
    if getattr(args, "moe_router_force_load_balancing", False):
        return "forced-random"
    return "forced-biased" if getattr(args, "moe_router_force_biased", None) else "natural"


def _layout(args: Any) -> dict[str, int]:
    return {
        "tp": args.tensor_model_parallel_size,
        "cp": args.context_parallel_size,
        "pp": args.pipeline_model_parallel_size,
        "vpp": args.virtual_pipeline_model_parallel_size or 1,
        "ep": args.expert_model_parallel_size,
        "etp": args.expert_tensor_parallel_size or args.tensor_model_parallel_size,
        "dp": args.data_parallel_size,
    }


def _is_clean_exit(error: BaseException) -> bool:
    return isinstance(error, SystemExit) and error.code in (None, 0)


def _megatron_args() -> Any:
    return sys.modules["megatron.training.global_vars"].get_args()


def _megatron_timers() -> Any:
    return sys.modules["megatron.training.global_vars"].get_timers()


def _global_batch_size() -> int:
    calculator = sys.modules["megatron.core.num_microbatches_calculator"]
    return int(calculator.get_current_running_global_batch_size())
