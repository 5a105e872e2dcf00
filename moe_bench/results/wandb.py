"""Mirrors a run to Weights & Biases from a thread of its own: training neither waits for it nor fails with it."""

from __future__ import annotations

import contextlib
import importlib
import os
import queue
import re
import shlex
import signal
import ssl
import statistics
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from moe_bench.errors import MissingExtraError
from moe_bench.results.manifest import Manifest, Value, read_manifest
from moe_bench.results.records import Event, StepRecord, told
from moe_bench.secrets import is_secret

MODES = ("online", "offline", "disabled", "shared")
DEFAULT_PROJECT = "moe_bench"
MOST_WAITING = 4096
"""Steps kept while W&B is slow; beyond that they are left out of the mirror, and counted."""
SERVER = "https://api.wandb.ai"
"""Where W&B is unless WANDB_BASE_URL says otherwise."""
REACH_TIMEOUT_S = 10
"""How long the server has to answer at all, ..."""
INIT_TIMEOUT_S = 60
"""... and to take the run, before the run is kept offline."""
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
            value for name, value in environment.items() if is_secret(name) and len(value) > 7
        )
        self._waiting: queue.Queue[dict[str, object] | None] = queue.Queue(MOST_WAITING)
        self._left_out = 0
        self._folder: Path | None = None
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
        deadline_s = time.monotonic() + patience_s
        with contextlib.suppress(queue.Full):  # it took nothing: what follows ends it
            self._waiting.put(None, timeout=patience_s)
        self._thread.join(max(0.0, deadline_s - time.monotonic()))
        if self._thread.is_alive():
            end_service()
            rest = f"; send the rest with: {sync_command(self._folder)}" if self._folder else ""
            self._warn(f"W&B did not finish within {patience_s:.0f} s{rest}")
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

    def _work(self) -> None:
        with _Reporting(self._warn_of):
            wandb = _client()
            run = self._begin(wandb)
            while (figures := self._waiting.get()) is not None:
                run.log(figures, step=figures["step"])
            run.finish()
            wandb.teardown()  # its service has written everything only when it has ended

    def _begin(self, wandb: Any) -> Any:
        manifest = read_manifest(self._run_dir)
        self._run_dir.joinpath("wandb").mkdir(exist_ok=True)
        try:
            if self.mode == "online":
                check_reachable(self._environment.get("WANDB_BASE_URL") or SERVER)
            run = self._init(wandb, manifest)
        except (wandb.Error, ValueError, OSError) as error:  # ValueError: a key of another shape
            if self.mode != "online":
                raise
            self._warn(f"W&B cannot be used ({error}); the run is kept offline")
            wandb.teardown()  # the refused run would hold on to its id
            self.mode = "offline"
            run = self._init(wandb, manifest)
        self._folder = Path(run.dir).parent
        if self.mode == "offline":
            place = {"path": str(self._folder), "sync": sync_command(self._folder)}
        else:
            place = {"url": str(run.url)}
        self._say("wandb", mode=self.mode, **place)
        return run

    def _init(self, wandb: Any, manifest: Manifest) -> Any:
        def said(name: str) -> str | None:
            knob = manifest.knobs.get(name)
            return (knob.value if knob else "") or self._environment.get(name) or None

        return wandb.init(
            project=_flag(manifest, "--wandb-project") or said("WANDB_PROJECT") or DEFAULT_PROJECT,
            entity=said("WANDB_ENTITY"),
            name=experiment_name(manifest, self._environment),
            notes=said("COMMENT"),
            group=said("WANDB_RUN_GROUP") or _sweep_of(manifest),
            id=re.sub(r"[^A-Za-z0-9_-]", "-", manifest.run_id),
            resume="allow"
            if self.mode == "online"
            else None,  # a requeued run goes on as the same one
            job_type="rehearsal" if manifest.rehearsal else "train",
            config=config_of(manifest, secrets=self._secrets),
            dir=str(self._run_dir),
            mode=self.mode,
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                init_timeout=INIT_TIMEOUT_S,
            ),
        )

    def _warn_of(self, error: BaseException) -> None:
        self._warn(
            f"W&B mirror stopped ({type(error).__name__}: {error}); training and its record go on"
        )

    def _warn(self, message: str) -> None:
        self._say("warning", message=_without(message, self._secrets))

    def _say(self, name: str, **fields: object) -> None:
        event = Event(event=name, time_unix_s=time.time(), rank=self._rank, fields=fields)
        self._report(event)


def check_reachable(server: str) -> None:
    """Raises OSError when nothing at that address speaks HTTP.

    wandb 0.26 would ask for more than a minute, in rounds that its init_timeout does not bound (sdk/wandb_init.py,
    inform_init), and keep nothing of the steps meanwhile.
    """
    try:
        urllib.request.urlopen(server, timeout=REACH_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # an answer, whatever it is
    except urllib.error.URLError as error:
        if not isinstance(error.reason, ssl.SSLError):  # its own certificates may be known to wandb
            raise ConnectionError(f"{server}: {error.reason}") from error


def sync_command(folder: Path) -> str:
    """What sends the W&B run in `folder`, by this interpreter's own wandb."""
    return shlex.join([sys.executable, "-m", "wandb", "sync", str(folder)])


def end_service() -> None:
    """End the wandb client's service process, which this process started.

    wandb 0.26 waits for it at exit without bound (sdk/lib/service/service_connection.py, teardown), and it tries for
    hours to reach a server. What it has taken is in the run's folder already.
    """
    for pid in _children():
        with contextlib.suppress(OSError):
            if Path(f"/proc/{pid}/comm").read_text().startswith("wandb-core"):
                os.kill(pid, signal.SIGKILL)


def _children() -> list[int]:
    found: list[int] = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            found += [int(pid) for pid in (task / "children").read_text().split()]
    return found


def experiment_name(manifest: Manifest, environment: Mapping[str, str]) -> str:
    """`--wandb-exp-name`, or the run's id, with the COMMENT appended where it is not part of it already.

    A point of a sweep has its own id in its name, which says what varies.
    """
    name = _flag(manifest, "--wandb-exp-name") or manifest.run_id
    if manifest.point is not None and manifest.run_id not in name:
        name = f"{name}-{manifest.run_id}"
    knob = manifest.knobs.get("COMMENT")
    comment = (knob.value if knob else environment.get("COMMENT", "")).strip()
    return name if not comment or comment in name else f"{name}-{comment}"


def config_of(manifest: Manifest, *, secrets: tuple[str, ...] = ()) -> dict[str, object]:
    """The resolved run for W&B's config: values to filter by, origins beside them, and no secret."""

    def values(settings: Mapping[str, Value]) -> dict[str, str]:
        return {
            name.lstrip("-"): _HIDDEN if is_secret(name) else _without(s.value, secrets)
            for name, s in settings.items()
        }

    def origins(settings: Mapping[str, Value]) -> dict[str, str]:
        return {name.lstrip("-"): s.origin.place for name, s in settings.items()}

    layers = {"knobs": manifest.knobs, "args": manifest.args, "env": manifest.env}
    return {
        "run_id": manifest.run_id,
        "model": manifest.model,
        "rehearsal": manifest.rehearsal,
        **_point_config(manifest),
        **{name: values(layer) for name, layer in layers.items()},
        "origins": {name: origins(layer) for name, layer in layers.items()},
    }


def _sweep_of(manifest: Manifest) -> str | None:
    return manifest.point.sweep_id if manifest.point else None


def _point_config(manifest: Manifest) -> dict[str, object]:
    """What a sweep varies, to group and plot by: `sweep.TP`."""
    point = manifest.point
    if point is None:
        return {}
    varied = {name.lstrip("-"): value for name, value in point.values.items()}
    return {"sweep": {"id": point.sweep_id, "point": point.number, **varied}}


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
    for name, figure, over_gpus in _OF_GPUS:
        if values := told(record.gpus, figure):
            figures[f"gpu/{name}"] = over_gpus(values)
    return {name: value for name, value in figures.items() if value is not None}


_OF_GPUS: tuple[tuple[str, str, Callable[[list[float]], float]], ...] = (
    ("power_w", "power_w", sum),
    ("utilization", "utilization", statistics.fmean),
    ("slowest_sm_clock_mhz", "sm_clock_mhz", min),
    ("largest_memory_gib", "memory_used_gib", max),
)


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
