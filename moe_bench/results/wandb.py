"""Mirrors a run to Weights & Biases from a thread of its own: training neither waits for it nor fails with it."""

from __future__ import annotations

import importlib
import queue
import re
import statistics
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_bench.errors import MissingExtraError
from moe_bench.results.manifest import Manifest, Value, read_manifest
from moe_bench.results.records import Event, StepRecord

MODES = ("online", "offline", "disabled", "shared")
DEFAULT_PROJECT = "moe_bench"
MOST_WAITING = 4096
"""Steps kept while W&B is slow; beyond that they are left out of the mirror, and counted."""
_SECRET_NAME = re.compile(r"(^|_)(API_?KEY|TOKEN|SECRET|PASSWORD)S?$", re.IGNORECASE)
_HIDDEN = "<hidden>"


def choose_mode(environment: Mapping[str, str]) -> str:
    """WANDB_MODE where set; else online with a WANDB_API_KEY, offline with only a WANDB_PROJECT, disabled without both."""
    mode = environment.get("WANDB_MODE", "")
    if mode:
        return {"dryrun": "offline", "run": "online"}.get(mode, mode)
    if environment.get("WANDB_API_KEY"):
        return "online"
    return "offline" if environment.get("WANDB_PROJECT") else "disabled"


class WandbMirror:
    """Sends each step to W&B. Every failure becomes one `warning` event; nothing is ever raised."""

    def __init__(
        self,
        run_dir: Path,
        *,
        environment: Mapping[str, str],
        report: Callable[[Event], None],
        rank: int = 0,
    ) -> None:
        """Start mirroring `run_dir`.

        Args:
            run_dir: The run's directory; W&B's files go to `wandb/` in it.
            environment: Read for WANDB_MODE, WANDB_PROJECT, WANDB_ENTITY, WANDB_RUN_GROUP and COMMENT. The key stays
                where it is: the wandb client takes WANDB_API_KEY from the process's environment by itself.
            report: Takes the events, from the mirror's thread: `RunWriter.event`.
            rank: Whose mirror this is, for its events.
        """
        self.mode = choose_mode(environment)
        self._run_dir = run_dir
        self._environment = environment
        self._report = report
        self._rank = rank
        self._secrets = tuple(
            value
            for name, value in environment.items()
            if _SECRET_NAME.search(name) and len(value) > 7
        )
        self._waiting: queue.Queue[dict[str, object] | None] = queue.Queue(MOST_WAITING)
        self._left_out = 0
        self._thread: threading.Thread | None = None
        if self.mode != "disabled":
            self._thread = threading.Thread(target=self._work, name="wandb-mirror", daemon=True)
            self._thread.start()

    def step(self, record: StepRecord) -> None:
        """Queue one step; returns at once."""
        self._put(metrics(record))

    def event(self, event: Event) -> None:
        """Queue the losses of an evaluation; other events are not mirrored."""
        losses = event.fields.get("losses")
        if event.event == "evaluation" and isinstance(losses, Mapping):
            split = event.fields.get("split", "validation")
            self._put(
                {"step": event.fields.get("step")}
                | {f"evaluation/{split}/{name}": value for name, value in losses.items()}
            )

    def close(self, *, patience_s: float = 30.0) -> None:
        """Let W&B finish, for `patience_s` at most; what it has not sent by then stays in `wandb/` for `wandb sync`."""
        if self._thread is None:
            return
        try:
            self._waiting.put(None, timeout=patience_s)
        except queue.Full:
            self._warn(
                f"W&B took nothing for {patience_s:.0f} s and was left behind; {self._sync_hint}"
            )
            return
        self._thread.join(patience_s)
        if self._thread.is_alive():
            self._warn(f"W&B did not finish within {patience_s:.0f} s; {self._sync_hint}")
        if self._left_out:
            self._warn(
                f"W&B was too slow: {self._left_out} steps are missing there, not in the record"
            )

    def _put(self, figures: dict[str, object]) -> None:
        if self._thread is None or not self._thread.is_alive():
            return
        try:
            self._waiting.put_nowait(figures)
        except queue.Full:
            self._left_out += 1

    @property
    def _sync_hint(self) -> str:
        return f"send the rest with: wandb sync {self._run_dir / 'wandb'}"

    def _work(self) -> None:
        with _Reporting(self._warn_of):
            wandb = _client()
            run = self._begin(wandb)
            while (figures := self._waiting.get()) is not None:
                run.log(figures, step=figures["step"])
            run.finish()

    def _begin(self, wandb: Any) -> Any:
        manifest = read_manifest(self._run_dir)
        self._run_dir.joinpath("wandb").mkdir(exist_ok=True)
        run = wandb.init(
            project=_flag(manifest, "--wandb-project")
            or self._environment.get("WANDB_PROJECT")
            or DEFAULT_PROJECT,
            entity=self._environment.get("WANDB_ENTITY") or None,
            name=experiment_name(manifest, self._environment),
            notes=self._environment.get("COMMENT") or None,
            group=self._environment.get("WANDB_RUN_GROUP") or None,
            config=config_of(manifest, secrets=self._secrets),
            dir=str(self._run_dir),
            mode=self.mode,
            settings=wandb.Settings(silent=True, console="off", disable_git=True, init_timeout=60),
        )
        place = {"path": str(run.dir)} if self.mode == "offline" else {"url": str(run.url)}
        self._say("wandb", mode=self.mode, **place)
        return run

    def _warn_of(self, error: BaseException) -> None:
        self._warn(
            f"W&B mirror stopped ({type(error).__name__}: {error}); training and its record go on"
        )

    def _warn(self, message: str) -> None:
        self._say("warning", message=_without(message, self._secrets))

    def _say(self, name: str, **fields: object) -> None:
        event = Event(event=name, time_unix_s=time.time(), rank=self._rank, fields=fields)
        self._report(event)


def experiment_name(manifest: Manifest, environment: Mapping[str, str]) -> str:
    """`--wandb-exp-name`, or the run's id, with the COMMENT appended where it is not part of it already."""
    name = _flag(manifest, "--wandb-exp-name") or manifest.run_id
    comment = environment.get("COMMENT", "").strip()
    return name if not comment or comment in name else f"{name}-{comment}"


def config_of(manifest: Manifest, *, secrets: tuple[str, ...] = ()) -> dict[str, object]:
    """The resolved run for W&B's config: values to filter by, origins beside them, and no secret."""

    def values(settings: Mapping[str, Value]) -> dict[str, str]:
        return {
            name.lstrip("-"): _HIDDEN if _SECRET_NAME.search(name) else _without(s.value, secrets)
            for name, s in settings.items()
        }

    def origins(settings: Mapping[str, Value]) -> dict[str, str]:
        return {name.lstrip("-"): s.origin.place for name, s in settings.items()}

    layers = {"knobs": manifest.knobs, "args": manifest.args, "env": manifest.env}
    return {
        "run_id": manifest.run_id,
        "model": manifest.model,
        "rehearsal": manifest.rehearsal,
        **{name: values(layer) for name, layer in layers.items()},
        "origins": {name: origins(layer) for name, layer in layers.items()},
    }


def metrics(record: StepRecord) -> dict[str, object]:
    """One step under W&B's names; what is None is left out."""
    loads = record.expert_load
    figures: dict[str, object] = {
        "step": record.step,
        "consumed_tokens": record.consumed_tokens,
        "optimizer/grad_norm": record.grad_norm,
        "optimizer/learning_rate": record.learning_rate,
        "optimizer/skipped": int(record.skipped),
        "speed/step_time_s": record.step_time_s,
        "speed/tokens_per_s": record.tokens_per_s,
        "speed/tflops_per_gpu": record.tflops_per_gpu,
        "memory/largest_gib": record.peak_memory_gib,
        **{f"loss/{name}": value for name, value in record.losses.items()},
        **{f"timers/{name}_s": value for name, value in record.timers_s.items()},
        **{f"experts/layer_{load.layer}/max_over_mean": load.max_over_mean for load in loads},
    }
    if loads:
        figures["experts/worst_max_over_mean"] = max(load.max_over_mean for load in loads)
        figures["experts/entropy"] = statistics.fmean(load.entropy for load in loads)
        figures["experts/dead"] = max(load.dead_experts for load in loads)
        figures["experts/dropped_tokens"] = sum(load.dropped_tokens for load in loads)
    if record.gpus:
        figures["gpu/power_w"] = sum(gpu.power_w for gpu in record.gpus)
        figures["gpu/utilization"] = statistics.fmean(gpu.utilization for gpu in record.gpus)
    return {name: value for name, value in figures.items() if value is not None}


class _Reporting:
    """Hands whatever goes wrong inside to `report`, and ends it there."""

    def __init__(self, report: Callable[[BaseException], None]) -> None:
        self._report = report

    def __enter__(self) -> None:
        return None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> bool:
        if error is not None:
            self._report(error)
        return True


def _flag(manifest: Manifest, name: str) -> str | None:
    setting = manifest.args.get(name)
    return setting.value if setting else None


def _client() -> Any:
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise MissingExtraError("wandb", extra="train", needed_for="the W&B mirror") from error


def _without(text: str, secrets: tuple[str, ...]) -> str:
    for secret in secrets:
        text = text.replace(secret, _HIDDEN)
    return text
