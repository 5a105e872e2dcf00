"""The W&B dashboard as data: which panels it has, and how the public wandb-workspaces library is told of them."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from moe_bench.errors import LaunchError, MissingExtraError, RecordError
from moe_bench.results.wandb import SERVER, check_reachable

BUILTIN = Path(__file__).parent / "dashboard.yaml"


class Panel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One line plot."""

    title: str
    metrics: tuple[str, ...] = ()
    """Names as the mirror logs them."""
    regex: str | None = None
    """In place of `metrics`: matches their names."""
    log_y: bool = False
    needs: str | None = None
    """What a run must have to log these: GPU. None for every run."""


class Section(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A titled group of panels."""

    name: str
    panels: tuple[Panel, ...]


class Dashboard(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A W&B workspace."""

    name: str
    sections: tuple[Section, ...]

    @property
    def panels(self) -> tuple[Panel, ...]:
        """Of all sections, in order."""
        return tuple(panel for section in self.sections for panel in section.panels)


def read_dashboard(path: Path = BUILTIN) -> Dashboard:
    """Raises RecordError for a file that describes none."""
    try:
        found = msgspec.yaml.decode(path.read_bytes(), type=Dashboard)
    except OSError as error:
        raise RecordError(f"{path}: the dashboard cannot be read: {error.strerror}") from error
    except msgspec.MsgspecError as error:
        raise RecordError(
            f"{path}: not a dashboard: {error}; see `python -m moe_bench dashboard show` for one"
        ) from error
    for panel in found.panels:
        if bool(panel.metrics) == bool(panel.regex):
            raise RecordError(
                f"{path}: panel {panel.title!r} must have either metrics or a regex; give one"
            )
    return found


def workspace(dashboard: Dashboard, *, entity: str, project: str) -> Any:
    """The library's own Workspace, not yet saved. Raises MissingExtraError without wandb-workspaces."""
    try:
        library = importlib.import_module("wandb_workspaces.workspaces")
        reports = importlib.import_module("wandb_workspaces.reports.v2")
    except ImportError as error:
        raise MissingExtraError(
            "wandb-workspaces", extra="dashboard", needed_for="the W&B dashboard"
        ) from error
    return library.Workspace(
        name=dashboard.name,
        entity=entity,
        project=project,
        sections=[
            library.Section(
                name=section.name,
                is_open=True,
                panels=[_plot(reports, panel) for panel in section.panels],
            )
            for section in dashboard.sections
        ],
    )


def save(made: Any, *, environment: Mapping[str, str]) -> str:
    """Make it on the server and return its address. Raises LaunchError with W&B's words, never with the key."""
    errors = importlib.import_module("wandb.errors")
    requests = importlib.import_module("requests.exceptions")
    secret = environment.get("WANDB_API_KEY", "")
    try:
        check_reachable(environment.get("WANDB_BASE_URL") or SERVER)
        made.save()
    except (errors.Error, ValueError, OSError, requests.RequestException) as error:
        said = " ".join(str(error).split())
        said = said.replace(secret, "<hidden>") if secret else said
        raise LaunchError(
            f"W&B did not take the dashboard for {made.entity}/{made.project}: {said}; "
            "is WANDB_API_KEY set, the project there, and the network open?"
        ) from None
    return str(made.url)


def specification(made: Any) -> bytes:
    """What saving the workspace sends, as JSON."""
    spec: str = made._to_model().spec.model_dump_json(by_alias=True, exclude_none=True)
    sent: bytes = msgspec.json.format(spec.encode(), indent=2)
    return sent


def _plot(reports: Any, panel: Panel) -> Any:
    return reports.LinePlot(
        title=panel.title,
        x="Step",
        y=list(panel.metrics),
        metric_regex=panel.regex,
        log_y=panel.log_y,
    )
