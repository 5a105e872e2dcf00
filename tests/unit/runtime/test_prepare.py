"""A rank that is to compute on a GPU never falls back in silence: what it lacks is said, with the ways out."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from moe_bench.arguments.schema.store import releases_with
from moe_bench.errors import LaunchError
from moe_bench.mcore.imports import has_transformer_engine, hide_old_resiliency_extension
from moe_bench.runtime import pretrain, rank


def test_a_run_for_gpus_does_not_start_without_one() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    with pytest.raises(LaunchError) as caught:
        pretrain.prepare(rank.rank_context(), ["--transformer-impl", "local"], on_cpu=False)
    for part in ("this run is for GPUs", torch.__version__, "MOE_BENCH_DEVICE=cpu", "doctor"):
        assert part in str(caught.value)


def test_layers_that_are_not_installed_are_named_with_those_that_are() -> None:
    if has_transformer_engine():
        pytest.skip("Transformer Engine is installed")
    with pytest.raises(LaunchError) as caught:
        pretrain._check_layers(["--num-layers", "2"])
    assert "Megatron's default" in str(caught.value)
    assert " ".join(pretrain.PLAIN_LAYERS) in str(caught.value)
    pretrain._check_layers(["--num-layers", "2", *pretrain.PLAIN_LAYERS])


def test_the_plain_layers_flags_are_megatrons() -> None:
    for word in pretrain.PLAIN_LAYERS:
        assert not word.startswith("--") or "0.19" in releases_with(word), word


def test_a_broken_transformer_engine_is_not_taken_for_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    broken = tmp_path / "transformer_engine"
    broken.mkdir()
    (broken / "__init__.py").write_text("raise RuntimeError('Found empty meta package')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(LaunchError, match="cannot be imported: Found empty meta package; install"):
        has_transformer_engine()


def test_without_a_compiler_megatron_compiles_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHDYNAMO_DISABLE", raising=False)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", "")
    assert rank.export_for_gpu() == "a C compiler (gcc)"
    assert os.environ["TORCHDYNAMO_DISABLE"] == "1"


def test_a_caller_who_turned_compiling_off_or_on_is_heeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setenv("TORCHDYNAMO_DISABLE", "0")
    assert rank.export_for_gpu() is None
    assert os.environ["TORCHDYNAMO_DISABLE"] == "0"


def test_a_cpu_rank_sees_no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    rank.export_for_cpu()
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


@pytest.mark.parametrize(("version", "is_hidden"), [("0.4.1+cuda13", True), ("0.6.0", False)])
def test_a_resiliency_extension_that_megatron_stumbles_over_is_left_out(
    version: str, is_hidden: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / f"nvidia_resiliency_ext-{version}.dist-info"
    info.mkdir()
    said = f"Metadata-Version: 2.1\nName: nvidia-resiliency-ext\nVersion: {version}\n"
    (info / "METADATA").write_text(said)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "nvidia_resiliency_ext", sys)  # restored, whatever happens
    del sys.modules["nvidia_resiliency_ext"]
    hide_old_resiliency_extension()
    assert ("nvidia_resiliency_ext" in sys.modules) == is_hidden
