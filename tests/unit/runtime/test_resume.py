"""Going on from the newest whole checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.checkpoint import metadata
from moe_bench.checkpoint.metadata import Box, Metadata, ObjectEntry, TensorEntry
from moe_bench.errors import CheckpointError
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
    found = resume.find(tmp_path)
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
    found = resume.find(tmp_path)
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
    assert resume.find(tmp_path / "absent") is None


def test_only_damaged_checkpoints_are_an_error_and_not_a_fresh_start(tmp_path: Path) -> None:
    (save(tmp_path, 20) / "metadata.json").unlink()
    with pytest.raises(CheckpointError, match="move the folder away"):
        resume.find(tmp_path)


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
    assert resume.find(tmp_path) is None
    assert resume.unfinished(tmp_path) == (f"{folder}: the save did not end",)


def test_an_unfinished_save_beside_a_damaged_one_is_no_fresh_start(tmp_path: Path) -> None:
    (save(tmp_path, 20) / "__1_0.distcp").unlink()
    (tmp_path / "iter_0000040").mkdir()
    with pytest.raises(CheckpointError, match="move the folder away"):
        resume.find(tmp_path)
