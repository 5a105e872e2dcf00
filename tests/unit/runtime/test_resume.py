"""Going on from the newest whole checkpoint."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from moe_bench.checkpoint import metadata
from moe_bench.checkpoint.metadata import Box, Metadata, ObjectEntry, TensorEntry
from moe_bench.errors import CheckpointError
from moe_bench.results.records import Event
from moe_bench.results.writer import RunWriter
from moe_bench.runtime import resume


def save(checkpoints: Path, step: int) -> Path:
    """A torch_dist folder of one tensor and one object, whole as far as its metadata tells."""
    folder = checkpoints / f"iter_{step:07d}"
    folder.mkdir(parents=True)
    box = Box(offsets=(0,), sizes=(4,), file="__0_0.distcp", offset=0, length=100)
    contents = Metadata(
        tensors={"weight": TensorEntry(dtype="F32", shape=(4,), boxes=(box,))},
        objects={"rng": ObjectEntry(file="__1_0.distcp", offset=10, length=40)},
    )
    (folder / "__0_0.distcp").write_bytes(bytes(100))
    (folder / "__1_0.distcp").write_bytes(bytes(50))
    (folder / ".metadata").write_bytes(metadata.dump(contents))
    (folder / "metadata.json").write_text('{"sharded_backend": "torch_dist"}')
    return folder


def test_newest_whole_checkpoint_is_found(tmp_path: Path) -> None:
    save(tmp_path, 20)
    newest = save(tmp_path, 40)
    found = resume.Saved(tmp_path).newest()
    assert found is not None
    assert (found.step, found.checkpoint, found.passed_over) == (40, newest, ())


@pytest.mark.parametrize(
    ("file", "reason"),
    [
        ("metadata.json", "the save did not end"),
        ("__1_0.distcp", "is missing"),
        (".metadata", ".metadata"),
    ],
)
def test_a_damaged_newest_checkpoint_is_passed_over_with_the_reason(
    file: str, reason: str, tmp_path: Path
) -> None:
    save(tmp_path, 20)
    (save(tmp_path, 40) / file).unlink()
    found = resume.Saved(tmp_path).newest()
    assert found is not None
    assert found.step == 20
    assert reason in found.passed_over[0]


def test_a_truncated_shard_is_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 40)
    (folder / "__0_0.distcp").write_bytes(bytes(99))
    assert resume.damage(folder) == "__0_0.distcp holds 99 bytes of at least 100"


def test_garbage_in_place_of_the_metadata_is_damage(tmp_path: Path) -> None:
    folder = save(tmp_path, 40)
    (folder / ".metadata").write_bytes(b"cos\nsystem\n(S'touch /tmp/pwned'\ntR.")
    assert resume.damage(folder) is not None
    assert not Path("/tmp/pwned").exists()


def test_nothing_saved_means_a_fresh_start(tmp_path: Path) -> None:
    assert resume.Saved(tmp_path / "absent").newest() is None


def test_only_damaged_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    (save(tmp_path, 20) / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="move the folder away"):
        resume.Saved(tmp_path).newest()


def test_a_continuation_loads_its_own_optimizer_and_random_state(tmp_path: Path) -> None:
    argv = [
        "--lr",
        "1e-3",
        "--load",
        "/weights",
        "--finetune",
        "--no-load-optim",
        "--ckpt-step=7",
        "--swiglu",
    ]
    assert resume.continued(argv, tmp_path) == ["--lr", "1e-3", "--swiglu", "--load", str(tmp_path)]


def test_the_tracker_is_pointed_at_the_step_that_is_loaded(tmp_path: Path) -> None:
    (tmp_path / resume.TRACKER).write_text("40")
    resume.point_tracker(tmp_path, 20)
    assert (tmp_path / resume.TRACKER).read_text() == "20"
    assert [p.name for p in tmp_path.iterdir()] == [resume.TRACKER]


def test_a_first_save_that_never_ended_is_a_fresh_start_with_the_reason(tmp_path: Path) -> None:
    folder = tmp_path / "iter_0000020"
    folder.mkdir()
    (folder / "__0_0.distcp").write_bytes(bytes(7))
    assert resume.Saved(tmp_path).newest() is None
    assert resume.Saved(tmp_path).unfinished() == (f"{folder}: the save did not end",)


def test_an_unfinished_save_beside_a_damaged_one_is_no_fresh_start(tmp_path: Path) -> None:
    (save(tmp_path, 20) / "__1_0.distcp").unlink()
    (tmp_path / "iter_0000040").mkdir()
    with pytest.raises(CheckpointError, match="move the folder away"):
        resume.Saved(tmp_path).newest()


def told_of(run_dir: Path, folder: Path, *steps: int) -> None:
    """This run's record of having saved."""
    writer = RunWriter(run_dir)
    for step in steps:
        fields = {"step": step, "path": str(folder / f"iter_{step:07d}"), "duration_s": 1.0}
        writer.event(Event(event="checkpoint_saved", time_unix_s=1.0, fields=fields))
    writer.close()


def test_of_a_folder_that_runs_share_only_its_own_checkpoints_are_a_runs(tmp_path: Path) -> None:
    run_dir, shared = tmp_path / "run", tmp_path / "shared"
    for step in (20, 40, 60):
        save(shared, step)
    told_of(run_dir, shared, 20, 40, 80)
    told_of(run_dir, tmp_path / "elsewhere", 60)
    steps = resume.saved_steps(run_dir, shared)
    assert steps == {20, 40, 80}
    found = resume.Saved(shared, steps=steps).newest()
    assert found is not None
    assert found.step == 40


def test_a_run_that_has_saved_nothing_starts_afresh_beside_anothers_checkpoints(
    tmp_path: Path,
) -> None:
    save(tmp_path, 20)
    steps = resume.saved_steps(tmp_path / "run", tmp_path)
    assert resume.Saved(tmp_path, steps=steps).newest() is None
    assert resume.Saved(tmp_path, steps=steps).unfinished() == ()


def save_by_rank(checkpoints: Path, step: int) -> Path:
    """--ckpt-format torch, of two tensor ranks."""
    folder = checkpoints / f"iter_{step:07d}"
    for rank in ("mp_rank_00", "mp_rank_01"):
        (folder / rank).mkdir(parents=True)
        with zipfile.ZipFile(folder / rank / "model_optim_rng.pt", "w") as archive:
            archive.writestr("data.pkl", bytes(1000))
    (checkpoints / resume.TRACKER).write_text(str(step))
    return folder


def test_files_of_single_ranks_are_a_checkpoint_once_the_tracker_says_so(tmp_path: Path) -> None:
    save_by_rank(tmp_path, 20)
    newest = save_by_rank(tmp_path, 40)
    found = resume.Saved(tmp_path, kind="torch").newest()
    assert found is not None
    assert (found.step, found.passed_over) == (40, ())
    (tmp_path / resume.TRACKER).write_text("20")
    found = resume.Saved(tmp_path, kind="torch").newest()
    assert found is not None
    assert found.step == 20
    assert resume.Saved(tmp_path).unfinished() == (f"{newest}: the save did not end",)


@pytest.mark.parametrize("harm", ["cut short", "is missing"])
def test_a_file_of_a_rank_that_is_harmed_is_damage(harm: str, tmp_path: Path) -> None:
    save_by_rank(tmp_path, 20)
    file = save_by_rank(tmp_path, 40) / "mp_rank_01" / "model_optim_rng.pt"
    if harm == "is missing":
        file.unlink()
    else:
        file.write_bytes(file.read_bytes()[:-30])
    found = resume.Saved(tmp_path, kind="torch").newest()
    assert found is not None
    assert found.step == 20
    assert harm in found.passed_over[0]


def test_a_checkpoint_of_torchs_own_format_needs_no_file_of_megatrons(tmp_path: Path) -> None:
    (save(tmp_path, 40) / "metadata.json").unlink()
    found = resume.Saved(tmp_path, kind="torch_dcp").newest()
    assert found is not None
    assert found.step == 40
