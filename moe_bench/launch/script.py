"""What the scripts of all launchers hold alike. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from moe_bench.config.knobs import KNOBS, says
from moe_bench.config.run import ResolvedRun

SECRETS = ("WANDB_API_KEY", "HF_TOKEN")
"""Variables that ranks may need and no script holds: a container must be told to take them over by their names."""

KUBERNETES_KNOBS = tuple(name for name in KNOBS if name.startswith("K8S_"))
SLURM_KNOBS = (
    *("ACCOUNT", "PARTITION", "QOS", "RESERVATION", "CONSTRAINT", "EXCLUDE", "NODELIST", "SEGMENT"),
    *("GRES", "MEM", "CPUS_PER_TASK", "EXCLUSIVE", "DEPENDENCY", "RUN_NAME", "RUN_TIME"),
    *("SIGNAL_BEFORE_S", "MAX_REQUEUES", "SRUN_MPI"),
)
CONTAINER_KNOBS = ("CONTAINER_IMAGE", "CONTAINER_MOUNTS", "CONTAINER_RUNTIME")


def without_effect(
    run: ResolvedRun, names: Iterable[str], why: str, *, only_from: str | None = None
) -> Iterator[str]:
    """One sentence for each of the knobs that is set. `only_from`: the one layer that counts, where other layers speak to others."""
    for name in names:
        knob = run.knobs.get(name)
        if knob is not None and knob.value and only_from in (None, knob.origin.layer):
            yield f"{says(name, knob)} {why}"


def python_path(run: ResolvedRun, project: str, *, in_image: bool) -> str:
    """PYTHONPATH for the ranks: the project's folder, then what a .conf or the model's YAML puts there.

    In an image without .deps, where the entry scripts put what this machine's Python lacks.
    """
    said = run.env["PYTHONPATH"].value.split(":") if "PYTHONPATH" in run.env else []
    left_out = ("", project, f"{project}/.deps") if in_image else ("", project)
    return ":".join([project, *(folder for folder in said if folder not in left_out)])


def printable(text: str) -> str:
    """For a comment: on one line, whatever it holds."""
    return "".join(char if char.isprintable() else "?" for char in text)


def by_flag(words: Iterable[str]) -> list[list[str]]:
    """Each flag with its values, for a line of its own."""
    lines: list[list[str]] = []
    for word in words:
        if word.startswith("--") or not lines:
            lines.append([])
        lines[-1].append(word)
    return lines


def before_python(run: ResolvedRun, *, trace: str) -> tuple[str, ...]:
    """The programs that start the ranks' python: Nsight Systems where Megatron's flags begin its capture, and BINDPCIE_PATH.

    `trace`: the file, without its suffix, that nsys writes.
    """
    binding = run.knob("BINDPCIE_PATH")
    return (*(_nsys(trace) if _is_traced(run) else ()), *((binding,) if binding else ()))


def is_on_cpu(run: ResolvedRun) -> bool:
    """Whether the ranks talk over gloo, so that there is no CUDA."""
    backend = run.args.get("--distributed-backend")
    return backend is not None and backend.value == "gloo"


def _is_traced(run: ResolvedRun) -> bool:
    by_torch = "--use-pytorch-profiler" in run.args
    return "--profile" in run.args and not by_torch and not is_on_cpu(run)


def _nsys(trace: str) -> tuple[str, ...]:
    return (
        *("nsys", "profile", "--sample=none", "--cpuctxsw=none", "--trace=cuda,nvtx"),
        *("--capture-range=cudaProfilerApi", "--capture-range-end=stop", "--cuda-graph-trace=node"),
        *("--force-overwrite=true", f"--output={trace}"),
    )
