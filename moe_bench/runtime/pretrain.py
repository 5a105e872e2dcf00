"""One rank of a training run: `python -m moe_bench.runtime.pretrain <Megatron flags>` under torchrun or srun."""

from __future__ import annotations

import contextlib
import logging
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moe_bench.commits import commits
from moe_bench.errors import LaunchError, MoeBenchError
from moe_bench.results.records import STEPS_LEFT_FILE, STOP_FILE
from moe_bench.results.wandb import WandbMirror, choose_mode
from moe_bench.results.writer import RunWriter
from moe_bench.runtime import resume
from moe_bench.runtime.fitting import fitting
from moe_bench.runtime.rank import (
    RankContext,
    device_ordinal,
    environment,
    export,
    export_device,
    export_for_cpu,
    export_for_gpu,
    fill_in,
    rank_context,
)
from moe_bench.runtime.stopping import graceful_stop

if TYPE_CHECKING:
    from moe_bench.mcore.cpu.embedding import Embedding
    from moe_bench.mcore.profiling import StepProfiler
    from moe_bench.mcore.recording import Recorder

log = logging.getLogger(__name__)


def main(argv: Sequence[str]) -> int:
    """Prepare this process and train. Returns the exit code; a user's error is said without a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    argv = fill_in(argv)
    try:
        context = rank_context()
        export(context)
        on_cpu = environment().get("MOE_BENCH_DEVICE") == "cpu"
        train(context, argv, prepare(context, argv, on_cpu=on_cpu))
    except MoeBenchError as error:
        log.error("%s", error)
        return error.exit_code
    return 0


def prepare(context: RankContext, argv: Sequence[str], *, on_cpu: bool) -> Embedding | None:
    """Import torch and Megatron, the CPU embedding in place where there is no CUDA: all that ranks can share.

    `on_cpu`: there is none for this run, whatever the machine has. Returns the embedding; None on a GPU. Raises
    ArgumentsError for what a CPU cannot do, LaunchError where this rank lacks the GPU or the libraries that `argv` needs.
    """
    missing = None
    if on_cpu:
        export_for_cpu()
    else:
        missing = export_for_gpu()
    import torch  # noqa: PLC0415 - seconds; after the environment has been checked

    embedding = None
    if on_cpu or (not torch.cuda.is_available() and _flag(argv, *_BACKEND) == "gloo"):
        from moe_bench.mcore.cpu.embedding import install  # noqa: PLC0415
        from moe_bench.mcore.cpu.embedding_refusals import refuse  # noqa: PLC0415

        refuse(argv)
        export_for_cpu()
        embedding = install(local_world_size=context.local_world_size)
    else:
        _take_device(context)
        _check_layers(argv)
        if missing is not None and context.rank == 0:
            log.warning("torch.compile is off: %s is not here, and Triton needs it", missing)
    from moe_bench.mcore.imports import import_megatron  # noqa: PLC0415

    import_megatron(checkout=context.megatron_path, on_cpu=embedding is not None)
    return embedding


_BACKEND = ("--distributed-backend", "nccl")


def _take_device(context: RankContext) -> None:
    import torch  # noqa: PLC0415

    if not torch.cuda.is_available():
        reason = "it sees no device"
        try:
            torch.cuda.init()
        except (RuntimeError, AssertionError) as error:
            reason = " ".join(str(error).split())
        raise LaunchError(
            f"this run is for GPUs (no --distributed-backend gloo), and torch {torch.__version__} "
            f"(CUDA {torch.version.cuda}) of {sys.executable} cannot use one: {reason}; "
            "`python -m moe_bench doctor` looks closer, docs/gpu.md says which torch fits which driver, and "
            "MOE_BENCH_DEVICE=cpu trains on the CPU"
        )
    ordinal = device_ordinal(context.local_rank, torch.cuda.device_count())
    export_device(ordinal)
    torch.cuda.set_device(ordinal)


def _check_layers(argv: Sequence[str]) -> None:
    """Raise LaunchError where `argv` ask for Transformer Engine's layers and it is not here."""
    from moe_bench.mcore.imports import has_transformer_engine  # noqa: PLC0415 - imports torch

    asked = _flag(argv, "--transformer-impl", "transformer_engine")
    if not has_transformer_engine() and asked == "transformer_engine":
        raise LaunchError(
            f"--transformer-impl transformer_engine (Megatron's default) needs Transformer Engine, which {sys.executable} "
            "does not have; install transformer-engine[pytorch], use an image that has it, or take plain layers: "
            f"{' '.join(PLAIN_LAYERS)}"
        )


PLAIN_LAYERS = (
    *(
        "--transformer-impl",
        "local",
        "--no-gradient-accumulation-fusion",
        "--no-persist-layer-norm",
    ),
    *("--no-rope-fusion", "--no-masked-softmax-fusion", "--no-bias-swiglu-fusion"),
    "--no-bias-dropout-fusion",
)
"""What a GPU without Transformer Engine needs; a local launch adds it by itself."""


def train(context: RankContext, argv: Sequence[str], embedding: Embedding | None) -> bool:
    """Run Megatron's training on this rank, recorded when the run has a directory.

    Returns True when a signal told this process to stop.
    """
    import torch  # noqa: PLC0415

    from moe_bench.mcore import patches  # noqa: PLC0415
    from moe_bench.mcore.imports import has_transformer_engine  # noqa: PLC0415

    torch.set_num_threads(context.threads)
    sys.argv = ["pretrain_gpt.py", *_without_wandb(context, argv), *_profiling_flags(context, argv)]
    with contextlib.ExitStack() as stack:
        recorder = stack.enter_context(_recorder(context, embedding)) if context.run_dir else None
        for patch in patches.ALWAYS:
            stack.enter_context(patch.applied())
        if embedding is not None:
            _announce(context, embedding, stack, recorder)
        elif not has_transformer_engine():
            _use_reference_layers(context, stack, recorder)
        if recorder is not None:
            stack.enter_context(recorder.hooks())
            assert context.run_dir is not None
            stack.enter_context(graceful_stop(recorder, context.run_dir))
            sys.argv = _going_on(context, sys.argv, recorder)
        for patch, said in fitting(sys.argv):
            stack.enter_context(patch.applied())
            _say(context, recorder, patch.attribute, said)
        _run_megatron(context)
    if recorder is not None and recorder.stopped_early:
        _mark_steps_left(context)
    return recorder is not None and recorder.stop_requested


def _going_on(context: RankContext, argv: list[str], recorder: Recorder) -> list[str]:
    """`argv`, loading the run's own newest whole checkpoint when it has one: the run was stopped and starts again.

    Raises CheckpointError when it has checkpoints and none is whole.
    """
    assert context.run_dir is not None
    (context.run_dir / STEPS_LEFT_FILE).unlink(missing_ok=True)
    if environment().get("MOE_BENCH_SEPARATE_RUN_DIRS"):
        return argv  # another machine's directory may know of other checkpoints than this one's
    checkpoints = Path(_flag(argv, "--save", str(context.run_dir / "checkpoints")))
    steps = None
    is_own = checkpoints.absolute().is_relative_to(context.run_dir.absolute())
    if not is_own and environment().get("MOE_BENCH_CHAIN") != str(checkpoints):
        # Other runs may share the folder: of it only what this very run has saved. More is loaded when --load says so.
        steps = resume.saved_steps(context.run_dir, checkpoints)
    saved = resume.Saved(checkpoints, kind=_flag(argv, "--ckpt-format", "torch_dist"), steps=steps)
    found = saved.newest()
    if found is None:
        for reason in saved.unfinished() if context.rank == 0 else ():
            recorder.event("warning", message=f"starting over: {reason}")
            sys.stdout.write(f"moe_bench: starting over: {reason}\n")
        return argv
    if context.rank == 0:
        resume.point_tracker(checkpoints, found.step)
        for reason in found.passed_over:
            recorder.event("warning", message=f"damaged checkpoint passed over: {reason}")
            sys.stdout.write(f"moe_bench: damaged checkpoint passed over: {reason}\n")
        sys.stdout.write(f"moe_bench: going on after step {found.step} of {found.checkpoint}\n")
    return resume.continued(argv, checkpoints)


def _say(context: RankContext, recorder: Recorder | None, replaced: str, said: str) -> None:
    if context.rank != 0:
        return
    sys.stdout.write(f"moe_bench: {said}\n")
    if recorder is not None:
        recorder.event("embedding", replaced=[replaced], summary=said)


def _mark_steps_left(context: RankContext) -> None:
    """Tell the job's script that there is more to do: an exit status cannot, since srun ends a step at the first bad one.

    Every node says it: on Kubernetes each pod looks for itself as soon as its own ranks have ended.
    """
    assert context.run_dir is not None
    if context.local_rank == 0:
        (context.run_dir / STEPS_LEFT_FILE).touch()


def _run_megatron(context: RankContext) -> None:
    try:
        if context.megatron_path is not None:
            runpy.run_path(str(context.megatron_path / "pretrain_gpt.py"), run_name="__main__")
            return
        from moe_bench.mcore import entry  # noqa: PLC0415

        entry.train(entry.parse())
    except SystemExit as leaving:
        # Megatron's way out after a signal, --exit-interval, --exit-duration-in-mins or --ckpt-convert-format (training.py);
        # and, without a status, of what cannot go on: its checkpoint loader, --adlr-autoresume (checkpointing.py,
        # global_vars.py; all in megatron/training, 0.19.2).
        from moe_bench.mcore.validation import own_frame  # noqa: PLC0415

        frame = own_frame(leaving)
        left_from = "" if frame is None else Path(frame.filename).name
        if leaving.code is None and left_from in ("checkpointing.py", "global_vars.py"):
            why = "could not read the checkpoint and " if left_from == "checkpointing.py" else ""
            raise MoeBenchError(
                f"Megatron {why}ended the run; what it said last, above, tells why"
            ) from leaving
        if leaving.code:
            raise


def _use_reference_layers(
    context: RankContext, stack: contextlib.ExitStack, recorder: Recorder | None
) -> None:
    """A GPU without Transformer Engine: Megatron's own local layers refuse much of what the presets need."""
    from moe_bench.mcore.cpu.spec import reference_layers  # noqa: PLC0415

    layers = stack.enter_context(reference_layers(on_cpu=False))
    said = f"Transformer Engine is not installed: {len(layers)} parts in plain torch take its place"
    if context.rank == 0:
        sys.stdout.write(said + "\n")
        if recorder is not None:
            names = [f"{row.module}.{row.attribute}" for row in layers]
            recorder.event("embedding", replaced=names, summary=said)


def _announce(
    context: RankContext,
    embedding: Embedding,
    stack: contextlib.ExitStack,
    recorder: Recorder | None,
) -> None:
    """Put the reference layers in place, and say what a CPU rank replaces."""
    from moe_bench.mcore.cpu.spec import reference_layers  # noqa: PLC0415

    layers = stack.enter_context(reference_layers())
    if context.rank != 0:
        return
    sys.stdout.write(embedding.summary() + "\n")
    if recorder is not None:
        names = [*embedding.replaced(), *(f"{row.module}.{row.attribute}" for row in layers)]
        recorder.event("embedding", replaced=names, summary=embedding.summary())


@contextlib.contextmanager
def _recorder(context: RankContext, embedding: Embedding | None) -> Iterator[Recorder]:
    from moe_bench.mcore.recording import Recorder  # noqa: PLC0415
    from moe_bench.runtime.meters import meters  # noqa: PLC0415

    assert context.run_dir is not None
    gauges = meters(context.rank, on_cpu=embedding is not None)
    writer = RunWriter(context.run_dir, rank=context.rank)
    recorder = Recorder(
        writer,
        gauges,
        rank=context.rank,
        world_size=context.world_size,
        observers=_mirrors(context, writer),
        facts=_facts(context, embedding),
        is_told=(context.run_dir / STOP_FILE).exists if context.rank == 0 else lambda: False,
    )
    profiler = _profiler(context, gauges, recorder)
    try:
        with recorder:
            if profiler is not None:
                recorder.watch(profiler)
            yield recorder
            if profiler is not None:
                _finish(profiler, recorder, context)
    finally:
        gauges.close()


def _without_wandb(context: RankContext, argv: Sequence[str]) -> list[str]:
    """The flags less those that make Megatron start W&B itself: on a recorded run the mirror takes them from run.json.

    Megatron's own writer (megatron/training/global_vars.py _set_wandb_writer, 0.19.2) waits for the network before
    the first step, and ends the training when it fails.
    """
    kept = list(argv)
    for name in ("--wandb-project", "--wandb-exp-name", "--wandb-save-dir", "--wandb-entity"):
        for position in reversed([i for i, word in enumerate(kept) if word.split("=")[0] == name]):
            del kept[position : position + (1 if "=" in kept[position] else 2)]
    return kept if context.run_dir else list(argv)


def _mirrors(context: RankContext, writer: RunWriter) -> tuple[WandbMirror, ...]:
    """W&B, from the rank that writes the steps, where the environment asks for it."""
    assert context.run_dir is not None
    asked = choose_mode(environment()) != "disabled"
    if context.rank != context.world_size - 1 or not asked:
        return ()
    return (WandbMirror(context.run_dir, environment=environment(), report=writer.event),)


def _profiler(context: RankContext, gauges: Any, recorder: Recorder) -> StepProfiler | None:
    if context.profile not in ("torch", "memory"):
        return None
    from moe_bench.mcore.profiling import StepProfiler  # noqa: PLC0415

    assert context.run_dir is not None
    first, last = _profiled_steps(sys.argv)
    return StepProfiler(
        kind=context.profile,
        folder=context.run_dir / "profiles",
        rank=context.rank,
        first=first,
        last=last,
        memory_bytes=gauges.memory_bytes,
        tell=lambda kind, path: recorder.event("profile", kind=kind, path=path),
    )


def _finish(profiler: StepProfiler, recorder: Recorder, context: RankContext) -> None:
    profiler.finish()
    if not profiler.has_written and context.rank == 0:
        asked = f"steps {profiler.first} to {profiler.last}, --profile-step-start and -end"
        said = f"PROFILE={profiler.kind}: nothing was profiled: the run made none of the steps asked for ({asked})"
        recorder.event("warning", message=said)


def _profiled_steps(argv: Sequence[str]) -> tuple[int, int]:
    """Steps 3 and 4, or what --profile-step-start and --profile-step-end say."""
    first = int(_flag(argv, "--profile-step-start", "2")) + 1
    last = int(_flag(argv, "--profile-step-end", "4"))
    steps = int(_flag(argv, "--train-iters", str(last)))
    return min(first, steps), min(last, steps)


def _profiling_flags(context: RankContext, argv: Sequence[str]) -> tuple[str, ...]:
    from moe_bench.mcore.profiling import PER_PHASE_TIMERS  # noqa: PLC0415

    asked = any(token.partition("=")[0] == PER_PHASE_TIMERS[0] for token in argv)
    profiled = context.profile or environment().get("PROFILE", "0") not in ("", "0")
    return () if asked or not profiled else PER_PHASE_TIMERS


def _flag(argv: Sequence[str], name: str, default: str) -> str:
    for position, token in enumerate(argv):
        flag, joined, value = token.partition("=")
        if flag == name:
            return value if joined else argv[position + 1]
    return default


def _facts(context: RankContext, embedding: Embedding | None) -> dict[str, object]:
    """What the record's start, which rank 0 writes, says of the code and the device."""
    import torch  # noqa: PLC0415

    from moe_bench.runtime.meters import began_unix_s, processor  # noqa: PLC0415

    if context.rank != 0:
        return {}
    facts = {
        "began_unix_s": began_unix_s(by_torchrun="TORCHELASTIC_RUN_ID" in environment()),
        "commits": commits(str(context.megatron_path or "")),
        "processor": processor(),
    }
    if embedding is not None:
        return {**facts, "device": "cpu"}
    is_off = environment().get("TORCHDYNAMO_DISABLE", "0") not in ("", "0")
    compiled = "off" if is_off else "on"
    return {**facts, "device": torch.cuda.get_device_name(), "torch_compile": compiled}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
