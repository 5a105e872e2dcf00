"""What the real wandb client wrote offline, by its own reader of its files."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import msgspec


@dataclass
class OfflineRun:
    """One offline run."""

    run: Any = None
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    system: set[str] = field(default_factory=set)
    """Names of the system metrics."""


def read_offline(run_dir: Path) -> OfflineRun:
    """The one offline run below `run_dir`."""
    records = importlib.import_module("wandb.proto.wandb_internal_pb2")
    store = importlib.import_module("wandb.sdk.internal.datastore").DataStore()
    [path] = (run_dir / "wandb").glob("offline-run-*/run-*.wandb")
    store.open_for_scan(str(path))
    found = OfflineRun()
    while (data := store.scan_data()) is not None:
        record = records.Record.FromString(data)
        if record.HasField("run"):
            found.run = record.run
            items = record.run.config.update
            found.config |= {item.key: msgspec.json.decode(item.value_json) for item in items}
        elif record.HasField("history"):
            row = {
                item.key or ".".join(item.nested_key): msgspec.json.decode(item.value_json)
                for item in record.history.item
            }
            found.history.append(row)
        elif record.HasField("stats"):
            found.system |= {item.key for item in record.stats.item}
    return found
