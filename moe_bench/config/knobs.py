"""The guide's upper-case knobs, as data: what each accepts and which Megatron flag says the same thing."""

from __future__ import annotations

import re
from collections.abc import Mapping

import msgspec

from moe_bench.config.nearest import nearest
from moe_bench.config.run import Setting
from moe_bench.errors import ConfigError


class Knob(msgspec.Struct, frozen=True, kw_only=True):
    """One upper-case name of the interface."""

    name: str
    kind: str
    """count (1, 2, ...), number (0, 1, ...), count_or_false, choice, switch (0 or 1), duration (HH:MM:SS, UNLIMITED), or text."""
    about: str
    flag: str | None = None
    """The Megatron flag with the same meaning: a trailing one sets the knob, the knob sets it where the YAML does not."""
    choices: tuple[str, ...] = ()
    default: str | None = None


def _counts(*rows: tuple[str, str | None, str]) -> tuple[Knob, ...]:
    return tuple(
        Knob(name=name, kind="count", flag=flag, about=about) for name, flag, about in rows
    )


def _texts(*rows: tuple[str, str]) -> tuple[Knob, ...]:
    return tuple(Knob(name=name, kind="text", about=about) for name, about in rows)


_LAYOUT = (
    *_counts(
        ("TP", "--tensor-model-parallel-size", "tensor parallel size"),
        ("PP", "--pipeline-model-parallel-size", "pipeline parallel size"),
        ("EP", "--expert-model-parallel-size", "expert parallel size"),
        ("CP", "--context-parallel-size", "context parallel size"),
        ("ETP", "--expert-tensor-parallel-size", "tensor parallel size of the experts"),
        ("VPP", None, "virtual pipeline stages of a rank"),
    ),
    Knob(
        name="PP_FIRST", kind="count_or_false", about="decoder layers of the first pipeline stage"
    ),
    Knob(name="PP_LAST", kind="count_or_false", about="decoder layers of the last pipeline stage"),
    Knob(
        name="LAYERS_PER_VP",
        kind="count_or_false",
        about="decoder layers of a virtual pipeline stage",
    ),
)
_BATCH = _counts(
    ("MBS", "--micro-batch-size", "samples of a micro-batch"),
    ("GBS", "--global-batch-size", "samples of a step"),
    ("NUM_LAYERS", "--num-layers", "decoder layers"),
    ("SEQ_LEN", "--seq-length", "tokens of a sample"),
    ("NNODES", None, "nodes"),
    ("GPUS_PER_NODE", None, "ranks of a node"),
    ("REHEARSE_RANKS", None, "most ranks of a rehearsal, up to 8"),
    ("SEGMENT", None, "nodes of an NVLink segment (Slurm)"),
    ("MASTER_PORT", None, "port of the rendezvous"),
    ("CPUS_PER_TASK", None, "cores to ask for each rank (Slurm)"),
    ("SIGNAL_BEFORE_S", None, "seconds before RUN_TIME at which a job saves and requeues"),
    ("K8S_SHM_GIB", None, "GiB of a pod's /dev/shm"),
)
_NUMBERS = (
    Knob(
        name="TRAIN_ITERS",
        kind="count_or_false",
        about="steps to train; false where --train-samples says it",
        flag="--train-iters",
    ),
    Knob(
        name="NODE_RANK",
        kind="number",
        about="this node's number in a run over several machines without a scheduler",
    ),
    Knob(
        name="MAX_REQUEUES",
        kind="number",
        about="times a job may put itself back into the queue; 0 never",
    ),
)
_CHOICES = (
    Knob(
        name="PR",
        kind="choice",
        about="precision",
        choices=("bf16", "fp8", "mxfp8", "fp32"),
        default="bf16",
    ),
    Knob(
        name="MOE_TOKEN_DISPATCHER",
        kind="choice",
        about="how tokens travel to their experts",
        flag="--moe-token-dispatcher-type",
        choices=("alltoall", "allgather", "flex", "deepep", "hybridep"),
    ),
    Knob(
        name="DISPATCHER",
        kind="choice",
        about="newer spelling of MOE_TOKEN_DISPATCHER",
        choices=("alltoall", "allgather", "deepep", "hybridep"),
    ),
    Knob(
        name="MOE_GROUPED_GEMM",
        kind="choice",
        about="all experts of a rank in one grouped GEMM",
        flag="--moe-grouped-gemm",
        choices=("true", "false"),
    ),
    Knob(
        name="PROFILE",
        kind="choice",
        about="0 off; 1: Nsight Systems, or torch where it cannot be; nsys; torch; memory (docs/profiling.md)",
        choices=("0", "1", "nsys", "torch", "memory"),
        default="0",
    ),
    Knob(name="PRETRAIN", kind="switch", about="1 from scratch, 0 from LOAD_PATH", default="1"),
    Knob(
        name="OPTIMIZER_OFFLOAD", kind="switch", about="optimizer states on the host", default="0"
    ),
    Knob(name="A2A_OVERLAP", kind="switch", about="overlap expert all-to-all, 1F1B", default="0"),
    Knob(name="GB200_CLUSTER", kind="switch", about="4 GPUs a node, NVL72 domains", default="0"),
    Knob(
        name="REHEARSE",
        kind="switch",
        about="1: a shrunken stand-in of the model, on this machine",
        default="0",
    ),
    Knob(
        name="DRY_RUN", kind="switch", about="1: print what would run, start nothing", default="0"
    ),
    Knob(name="EXCLUSIVE", kind="switch", about="0: share nodes with other jobs"),
    Knob(name="RUN_TIME", kind="duration", about="time limit of the job"),
    Knob(
        name="WANDB_MODE",
        kind="choice",
        about="online, offline or disabled",
        choices=("online", "offline", "disabled", "shared", "dryrun", "run"),
    ),
    Knob(
        name="K8S_KIND",
        kind="choice",
        about="what carries the pods",
        choices=("Job", "JobSet"),
    ),
    Knob(
        name="K8S_TOOL",
        kind="choice",
        about="what submits to Kubernetes",
        choices=("kubectl", "helm"),
    ),
    Knob(name="K8S_HOST_NETWORK", kind="switch", about="1: pods use their node's network"),
    Knob(
        name="MOE_BENCH_DEVICE",
        kind="choice",
        about="overrides what the machine is found to have",
        choices=("cpu", "cuda"),
    ),
)
_TEXTS = _texts(
    ("MODEL", "name of a file in model_configs/benchmarking"),
    ("CLUSTER", "name of a file in cluster_configs/benchmarking"),
    ("MCORE_RELEASE_VERSION", "Megatron-Core release the flags are checked against"),
    (
        "MEGATRON_PATH",
        "a Megatron-LM checkout whose pretrain_gpt.py runs; unset: the installed one",
    ),
    ("TRAINING_SCRIPT_PATH", "training script; set by common.conf from MEGATRON_PATH"),
    ("TRAINING_PARAMS_PATH", "model YAML; default model_configs/benchmarking/$MODEL.yaml"),
    ("TRAINING_PARAMS", "more Megatron flags, of the environment's rank"),
    ("CONTAINER_IMAGE", "container image, a path or an address"),
    ("CONTAINER_MOUNTS", "container mounts, host:container,..."),
    ("COMMENT", "appended to the W&B experiment's name"),
    ("WANDB_PROJECT", "W&B project"),
    ("WANDB_ENTITY", "W&B team or user"),
    ("WANDB_RUN_GROUP", "W&B group, for example of a sweep"),
    ("WANDB_TAGS", "W&B tags: a,b"),
    ("DATASET", "key of the cluster file's DATA_PATHS"),
    ("OUTPUT_PATH", "runs are written under it; default: runs"),
    ("DATA_PATH", "tokenized data; unset: the demo corpus here, made-up tokens on a cluster"),
    ("TOKENIZER_MODEL", "tokenizer"),
    ("LOAD_PATH", "checkpoint to start from"),
    ("ACCOUNT", "Slurm account"),
    ("PARTITION", "Slurm partition"),
    ("RUN_NAME", "part of the Slurm job's name"),
    ("MASTER_ADDR", "host of the rendezvous"),
    ("CONTAINER_RUNTIME", "pyxis, apptainer, docker or none"),
    ("SRUN_MPI", "srun's --mpi"),
    ("QOS", "Slurm quality of service"),
    ("RESERVATION", "Slurm reservation"),
    ("CONSTRAINT", "Slurm node features"),
    ("GRES", "what to ask of each node, for example gpu:8, where --exclusive does not give it"),
    ("MEM", "memory to ask of each node, for example 200G; 0 for all"),
    ("EXCLUDE", "nodes to avoid"),
    ("NODELIST", "nodes to use"),
    ("DEPENDENCY", "Slurm dependency, for example singleton"),
    ("BINDPCIE_PATH", "a program put before python, for CPU affinity"),
    ("RUN_ID", "name of the run; default: model, time and a random tail"),
    (
        "LAUNCHER",
        "where the two scripts send a run: local, slurm, kubernetes, or your own FILE.py:CLASS",
    ),
    ("K8S_NAMESPACE", "Kubernetes namespace"),
    ("K8S_VOLUMES", "volumes of a pod: pvc:CLAIM:/mount,host:/path:/mount"),
    ("K8S_OUTPUT_PATH", "OUTPUT_PATH as the pods see it; default: the same path"),
    ("K8S_WORKSPACE", "this project's folder in the image; default /opt/moe_bench"),
    ("K8S_NODE_SELECTOR", "labels of the nodes to use: key=value,..."),
    ("K8S_TOLERATIONS", "taints to bear: key[=value][:effect],..."),
    ("K8S_RESOURCE", "the device plugin's name of a GPU; default nvidia.com/gpu"),
    ("K8S_RESOURCES", "more resources of a pod: rdma/hca=8,memory=900Gi,..."),
    ("K8S_SECRET", "a Secret that holds WANDB_API_KEY, HF_TOKEN"),
    ("K8S_PULL_SECRET", "a Secret for the image's registry"),
    ("K8S_QUEUE", "Kueue's local queue"),
)

KNOBS: Mapping[str, Knob] = {
    knob.name: knob for knob in (*_LAYOUT, *_BATCH, *_NUMBERS, *_CHOICES, *_TEXTS)
}
"""Every knob by name."""

BOUND = {knob.flag: knob.name for knob in KNOBS.values() if knob.flag}
"""Megatron flag -> the knob with the same meaning."""


PARAMS = "TRAINING_PARAMS"
"""The place of what its flags say."""


def says(name: str, setting: Setting) -> str:
    """`TP=2 (environment)`, `--num-layers 8 (command line)`: how every message names a knob, as the user wrote it.

    Its value may be of any length and hold anything.
    """
    value = setting.value if len(setting.value) <= _SHOWN else f"{setting.value[:_SHOWN]}..."
    shown = value if value.isprintable() else ascii(value)
    is_flag = setting.origin.layer == "flag" or setting.origin.place == PARAMS
    flag = KNOBS[name].flag if name in KNOBS and is_flag else None
    return (
        f"{flag} {shown} ({setting.origin.place})"
        if flag
        else f"{name}={shown} ({setting.origin.place})"
    )


_SHOWN = 160


def check(name: str, setting: Setting) -> None:
    """Raises ConfigError when the value is none the knob accepts."""
    _CHECKS[KNOBS[name].kind](KNOBS[name], setting)


def whole(text: str) -> int | None:
    """The whole number that bash, Python and Megatron all read here; None for `08`, `+4`, `4.0`, `²` and what is beyond 12 digits."""
    return int(text) if _WHOLE.fullmatch(text) else None


_WHOLE = re.compile(r"0|[1-9][0-9]{0,11}")


def as_count(name: str, setting: Setting) -> int:
    """The whole number >= 1 that the knob must hold; raises ConfigError otherwise."""
    number = whole(setting.value)
    if number is None:
        raise ConfigError(f"{says(name, setting)} is not a whole number; use 1, 2, 3, ...")
    if number < 1:
        raise ConfigError(f"{says(name, setting)} must be at least 1")
    return number


def _check_count(knob: Knob, setting: Setting) -> None:
    as_count(knob.name, setting)


def _check_count_or_false(knob: Knob, setting: Setting) -> None:
    if setting.value not in ("false", ""):
        as_count(knob.name, setting)


def _check_number(knob: Knob, setting: Setting) -> None:
    if whole(setting.value) is None:
        raise ConfigError(f"{says(knob.name, setting)} is not a whole number; use 0, 1, 2, ...")


def _check_choice(knob: Knob, setting: Setting) -> None:
    if setting.value in knob.choices:
        return
    guess = nearest(setting.value, knob.choices)
    hint = f"; did you mean {guess[0]}?" if guess else ""
    raise ConfigError(f"{says(knob.name, setting)} is not one of {', '.join(knob.choices)}{hint}")


def _check_switch(knob: Knob, setting: Setting) -> None:
    if setting.value not in ("0", "1"):
        raise ConfigError(f"{says(knob.name, setting)} must be 0 or 1")


_DURATION = re.compile(r"([0-9]{1,4}-)?[0-9]{1,6}(:[0-9]{1,4}){0,2}")
UNLIMITED = ("UNLIMITED", "INFINITE")
"""A duration without an end, in Slurm's words; small letters do, too."""


def _check_duration(knob: Knob, setting: Setting) -> None:
    if not _DURATION.fullmatch(setting.value) and setting.value.upper() not in UNLIMITED:
        raise ConfigError(
            f"{says(knob.name, setting)} is not a time limit; write HH:MM:SS, or UNLIMITED"
        )


def _check_text(knob: Knob, setting: Setting) -> None:
    if "\0" in setting.value:
        raise ConfigError(f"{knob.name} ({setting.origin.place}) holds a NUL byte")
    if knob.name in _FILE_NAMES or knob.name.endswith("_PATH"):
        parts = setting.value.encode(errors="surrogateescape").split(b"/")
        if max(len(part) for part in parts) > _LONGEST_FILE_NAME:
            raise ConfigError(f"{says(knob.name, setting)} is longer than any file's name can be")
    if knob.name == "MODEL" and "/" in setting.value:
        raise ConfigError(
            f"{says(knob.name, setting)} is a path; MODEL is the name of a model, as MODEL=DeepSeek-V3, and "
            "TRAINING_PARAMS_PATH=path/to/a.yaml may say where its YAML is"
        )


_FILE_NAMES = ("MODEL", "CLUSTER")
_LONGEST_FILE_NAME = 250  # with .yaml or .conf 255, Linux' limit


_CHECKS = {
    "count": _check_count,
    "count_or_false": _check_count_or_false,
    "number": _check_number,
    "choice": _check_choice,
    "switch": _check_switch,
    "duration": _check_duration,
    "text": _check_text,
}
