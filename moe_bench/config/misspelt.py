"""Names that look like a knob and are none. Pure.

A misspelt variable is otherwise silent: `GPUS_PER_NOD=4` would train on whatever the table says. Letter case always
counts (`tp=2`). Other spellings count for knobs of five letters and more: one edit away (a letter more, less, other, or
two swapped), and for long names of several words two. A name that a file of the run mentions, in a comment too, is meant.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from functools import lru_cache

import msgspec

from moe_bench.config.knobs import KNOBS
from moe_bench.config.model_file import ModelFile
from moe_bench.config.run import Setting
from moe_bench.errors import ConfigError
from moe_bench.secrets import is_secret

OTHERS = (
    "GPU_ARCH",
    "MOE_BENCH_CHAIN",
    "MOE_BENCH_CORPUS",
    "MOE_BENCH_MODEL",
    "MOE_BENCH_PROFILE",
    "MOE_BENCH_PYTHON",
    "MOE_BENCH_RANK_PIDS",
    "MOE_BENCH_RULES",
    "MOE_BENCH_RUN_DIR",
    "MOE_BENCH_RUN_ID",
    "MOE_BENCH_SEPARATE_RUN_DIRS",
    "MOE_BENCH_TRIAGE",
    "TE_VERSION",
    "TORCH_VERSION",
    "WANDB_API_KEY",
    "WANDB_BASE_URL",
    "WORKSPACE",
)
"""Variables that the project reads and that are no knobs."""

FOREIGN = (
    "BASH_", "BUILD_", "CI_", "CONDA_", "CUDA_", "DBUS_", "DOCKER_", "ENROOT_", "GITHUB_", "GIT_", "HF_", "I_MPI_",
    "JENKINS_", "KUBERNETES_", "LC_", "LESS", "LD_", "LMOD_", "MPI_", "NCCL_", "NVIDIA_", "NVTE_", "NV_", "OMPI_",
    "OMP_", "PMIX_", "PMI_", "PYTEST_", "PYTHON", "PYTORCH_", "RUNNER_", "SBATCH_", "SLURMD_", "SLURM_", "SSH_",
    "SYSTEMD_", "TORCHELASTIC_", "TORCHINDUCTOR_", "TORCH_", "TRANSFORMERS_", "TRITON_", "UCX_", "UV_", "VIRTUAL_ENV", "VTE_",
    "XDG_", "_",
)  # fmt: skip
"""How other programs' variables begin: never taken for a knob of ours."""

WORDS = frozenset({"MODE", "NODES", "RUNTIME", "JAVA_PATH", "MASTER_HOST", "META_PATH"})
"""Names that are near a knob and that other programs use: said, not refused. Plurals of a knob's name are too."""

_SHORTEST = 5
_LONG = 12


class Misspelt(msgspec.Struct, frozen=True, kw_only=True):
    """A variable's name beside the one that was probably meant."""

    name: str
    meant: str
    is_certain: bool
    """False for a name that may well be another program's."""


def check(
    given: Mapping[str, str],
    assigned: Mapping[str, Setting],
    file: ModelFile,
    texts: Mapping[str, str],
) -> tuple[str, ...]:
    """What may be misspelt, one sentence each; raises ConfigError for what surely is.

    `given` is the caller's environment, `assigned` what the .conf files left, `texts` every file of the run by its shown
    name: a name that one of their lines mentions (another line than the one that assigns it) is meant.
    """
    lines = [line for text in texts.values() for line in text.splitlines()]
    own = {entry.name: entry.place for entry in file.defaults}
    own |= {
        name: setting.origin.place
        for name, setting in assigned.items()
        if setting.origin.layer != "environment"
    }
    values = {entry.name: entry.words[0] for entry in file.defaults}
    values |= {name: assigned[name].value for name in own if name in assigned}
    set_here = (name for name, value in given.items() if value)
    found = [
        (one, given[one.name], "environment")
        for one in misspelt(set_here, (*KNOBS, *own))
        if not _mentions(one.name, lines)
    ]
    found += [
        (one, values[one.name], own[one.name])
        for one in misspelt(own, KNOBS)
        if _mentions(one.name, lines) < 2
    ]
    certain: list[str] = []
    perhaps: list[str] = []
    for one, value, place in found:
        said = one.name if is_secret(one.meant) else f"{one.name}={value}"
        sentence = f"{said} ({place}) is no knob; did you mean {one.meant}?"
        (certain if one.is_certain else perhaps).append(sentence)
    if certain:
        cluster = list(texts)[-1]
        raise ConfigError(
            "\n".join(certain)
            + f"\nrename it or take it away; if another program needs it, name it in a comment of {cluster}"
        )
    return tuple(perhaps)


def _mentions(name: str, lines: Iterable[str]) -> int:
    word = re.compile(rf"(?<![A-Za-z0-9_]){re.escape(name)}(?![A-Za-z0-9_])")
    return sum(1 for line in lines if name in line and word.search(line))


def misspelt(names: Iterable[str], knobs: Iterable[str]) -> list[Misspelt]:
    """The names that are none of `knobs` or `OTHERS` but look like one, in the order given."""
    return list(_misspelt(tuple(names), tuple(dict.fromkeys((*knobs, *OTHERS)))))


@lru_cache(maxsize=256)
def _misspelt(names: tuple[str, ...], among: tuple[str, ...]) -> tuple[Misspelt, ...]:
    """Kept, because the points of a sweep set the same names."""
    known = dict.fromkeys(among)
    by_length: dict[int, list[str]] = {}
    for name in known:
        by_length.setdefault(len(name), []).append(name)
    found = (_meant(name, known, by_length) for name in names if name not in known)
    return tuple(one for one in found if one is not None)


def _meant(
    name: str, known: Mapping[str, None], by_length: Mapping[int, list[str]]
) -> Misspelt | None:
    upper = name.upper()
    if upper != name:
        return Misspelt(name=name, meant=upper, is_certain=True) if upper in known else None
    if name.startswith("MOE_BENCH_"):
        near = _near(name, by_length, limit=4)
        return Misspelt(name=name, meant=near, is_certain=True) if near else None
    if name.startswith(FOREIGN):
        return None
    near = _near(name, by_length, limit=1) or _near(name, by_length, limit=2)
    if near is None:
        return None
    return Misspelt(name=name, meant=near, is_certain=name not in WORDS and name != f"{near}S")


def _near(name: str, by_length: Mapping[int, list[str]], *, limit: int) -> str | None:
    """The first known name within `limit` edits; two and more are allowed only in long names of several words."""
    shortest = _SHORTEST if limit == 1 else _LONG
    for length in range(max(len(name) - limit, shortest), len(name) + limit + 1):
        for known in by_length.get(length, ()):
            if (limit == 1 or ("_" in known and known[0] == name[0])) and within(
                name, known, limit
            ):
                return known
    return None


def within(one: str, other: str, limit: int) -> bool:
    """True when at most `limit` letters put in, taken out, replaced, or swapped with the next make one into the other."""
    start = 0
    while start < len(one) and start < len(other) and one[start] == other[start]:
        start += 1
    one, other = one[start:], other[start:]
    while one and other and one[-1] == other[-1]:
        one, other = one[:-1], other[:-1]
    if not one or not other:
        return len(one) + len(other) <= limit
    if limit == 0 or abs(len(one) - len(other)) > limit:
        return False
    if (
        len(one) > 1
        and one[:2] == other[1::-1]
        and len(other) > 1
        and within(one[2:], other[2:], limit - 1)
    ):
        return True
    return any(
        within(*pair, limit - 1)
        for pair in ((one[1:], other), (one, other[1:]), (one[1:], other[1:]))
    )
