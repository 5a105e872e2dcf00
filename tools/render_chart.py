"""Render the Helm chart with Helm's own engine into tests/golden: run after every change of the chart.

    uv run --no-project --with helm-python-sdk --with-requirements locks/dev.txt tools/render_chart.py

The engine comes with the package helm-python-sdk (Helm 4, 240 MB), which is too large to be one of the tests' own.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from moe_bench.launch.kubernetes_values import CHART  # noqa: E402
from tests.unit.launch.test_kubernetes import GOLDEN, chart_sha256, helm_values  # noqa: E402


def main() -> None:
    """Write one file for each kind."""
    from helm_python import Chart  # noqa: PLC0415 - only here is it needed

    for kind in ("Job", "JobSet"):
        values = helm_values(kind)
        with Chart.load(CHART) as chart:
            rendered = chart.render(
                values=values, name=values["name"], namespace=values["namespace"]
            )
        path = GOLDEN / f"kubernetes_helm_{kind.lower()}.yaml"
        head = f"# Helm's own rendering of the chart {chart_sha256()}; see tools/render_chart.py.\n"
        path.write_text(head + "\n---\n".join(rendered.values()))
        print(path)


if __name__ == "__main__":
    main()
