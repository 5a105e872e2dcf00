"""Damaged, lying and hostile inputs: each is refused by name, and nothing is taken for a checkpoint that is none."""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import struct
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from moe_bench.checkpoint import metadata
from moe_bench.checkpoint.exporting import ExportOptions, plan_export, run_export
from moe_bench.checkpoint.importing import ImportOptions, run_import
from moe_bench.checkpoint.inspecting import inspect
from moe_bench.checkpoint.layout import TRACKER
from moe_bench.checkpoint.part_file import PartFile
from moe_bench.checkpoint.plan import plan_import
from moe_bench.checkpoint.torch_dist import open_torch_dist
from moe_bench.checkpoint.verifying import verify
from moe_bench.errors import CheckpointError
from tests.support import hf_models
from tests.support.hf_models import MIXTRAL, Tensors

GATE = "model.layers.1.block_sparse_moe.gate.weight"
FP8 = {
    **hf_models.DEEPSEEK_V3,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]},
}


def drop(tensors: Tensors) -> None:
    del tensors[GATE]


def reshape(tensors: Tensors) -> None:
    dtype, bits = tensors[GATE]
    tensors[GATE] = (dtype, bits[:, :-1].copy())


def transpose(tensors: Tensors) -> None:
    dtype, bits = tensors[GATE]
    tensors[GATE] = (dtype, bits.T.copy())


def add_unknown(tensors: Tensors) -> None:
    tensors["model.layers.1.surprise.weight"] = tensors[GATE]


def integers(tensors: Tensors) -> None:
    tensors[GATE] = ("I64", np.zeros((3, 24), np.int64))


def nan(tensors: Tensors) -> None:
    tensors[GATE][1][1, 2] = 0x7FC0


def negative_infinity(tensors: Tensors) -> None:
    tensors[GATE][1][0, 0] = 0xFF80


def mixed_types(tensors: Tensors) -> None:
    tensors[GATE] = ("F32", np.zeros((3, 24), np.uint32))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (drop, "is missing"),
        (reshape, r"has the shape \[3, 23\].*\[3, 24\]"),
        (transpose, r"has the shape \[24, 3\]"),
        (add_unknown, "have no place in family 'mixtral'.*surprise"),
        (integers, "is I64"),
        (nan, "NaN or infinity"),
        (negative_infinity, "NaN or infinity"),
        (mixed_types, "which has one type"),
    ],
)
def test_a_wrong_tensor_is_named_with_its_file_and_nothing_looks_whole(
    damage: Callable[[Tensors], None], words: str, tmp_path: Path
) -> None:
    tensors = hf_models.random_tensors(MIXTRAL)
    damage(tensors)
    hf = hf_models.write_model(tmp_path / "hf", MIXTRAL, tensors)
    with pytest.raises(CheckpointError, match=words) as caught:
        run_import(plan_import(hf), tmp_path / "out", ImportOptions())
    assert "hf" in str(caught.value)
    assert re.search(r"surprise|gate\.weight", str(caught.value))
    assert not (tmp_path / "out" / TRACKER).exists()


def test_non_finite_weights_pass_when_they_are_meant(tmp_path: Path) -> None:
    tensors = hf_models.random_tensors(MIXTRAL)
    nan(tensors)
    hf = hf_models.write_model(tmp_path / "hf", MIXTRAL, tensors)
    run_import(plan_import(hf), tmp_path / "out", ImportOptions(allow_non_finite=True))
    assert verify(hf, tmp_path / "out").differences == ()


def fp8_tensors() -> Tensors:
    return hf_models.quantize(hf_models.random_tensors(FP8), 8)


def test_an_fp8_tensor_without_its_scale_is_refused(tmp_path: Path) -> None:
    tensors = fp8_tensors()
    del tensors["model.layers.3.mlp.experts.1.up_proj.weight_scale_inv"]
    hf = hf_models.write_model(tmp_path / "hf", FP8, tensors)
    with pytest.raises(
        CheckpointError, match=r"experts\.1\.up_proj\.weight' is FP8 and its scale .* is missing"
    ):
        plan_import(hf)


def test_a_scale_that_no_tensor_uses_is_refused(tmp_path: Path) -> None:
    tensors = hf_models.random_tensors(FP8)
    tensors["model.layers.3.mlp.experts.1.up_proj.weight_scale_inv"] = (
        "F32",
        np.ones((2, 3), np.uint32),
    )
    hf = hf_models.write_model(tmp_path / "hf", FP8, tensors)
    with pytest.raises(CheckpointError, match="scales of tensors that are not quantised"):
        plan_import(hf)


def mxfp4_model(tmp_path: Path, damage: Callable[[Tensors], object]) -> Path:
    config = hf_models.GPT_OSS_MXFP4
    tensors = hf_models.pack_experts(hf_models.random_tensors(config))
    damage(tensors)
    return hf_models.write_model(tmp_path / "hf", config, tensors)


SCALES = "model.layers.1.mlp.experts.down_proj_scales"


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (lambda t: t.pop(SCALES), rf"MXFP4 and its scales '{SCALES}' are missing"),
        (
            lambda t: t.update({SCALES: ("U8", t[SCALES][1][:, :-1].copy())}),
            r"needs U8 \[3, 64, 3\]",
        ),
        (lambda t: t[SCALES][1].fill(255), "NaN or infinity"),
    ],
)
def test_mxfp4_scales_that_are_wrong_are_named(
    damage: Callable[[Tensors], object], words: str, tmp_path: Path
) -> None:
    hf = mxfp4_model(tmp_path, damage)
    with pytest.raises(CheckpointError, match=words):
        run_import(plan_import(hf), tmp_path / "out", ImportOptions())


def test_a_family_that_the_local_spec_cannot_build_has_no_local_keys(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.QWEN3_NEXT)
    with pytest.raises(
        CheckpointError, match="--dialect local: Megatron's local layer spec cannot"
    ):
        plan_import(hf, dialect="local")


def test_fp8_without_a_block_size_is_refused(tmp_path: Path) -> None:
    hf = hf_models.write_model(tmp_path / "hf", hf_models.DEEPSEEK_V3, fp8_tensors())
    with pytest.raises(CheckpointError, match="no quantization_config"):
        plan_import(hf)


def test_a_scale_of_the_wrong_shape_is_refused(tmp_path: Path) -> None:
    tensors = fp8_tensors()
    name = "model.layers.3.mlp.experts.1.up_proj.weight_scale_inv"
    tensors[name] = ("F32", np.ones((2, 2), np.uint32))
    hf = hf_models.write_model(tmp_path / "hf", FP8, tensors)
    with pytest.raises(CheckpointError, match=r"needs F32 \[2, 3\]"):
        plan_import(hf)


def test_an_mtp_copy_that_differs_is_not_dropped_in_silence(tmp_path: Path) -> None:
    tensors = hf_models.random_tensors(hf_models.DEEPSEEK_V3)
    name = "model.layers.5.shared_head.head.weight"
    dtype, bits = tensors[name]
    tensors[name] = (dtype, bits ^ 1)
    hf = hf_models.write_model(tmp_path / "hf", hf_models.DEEPSEEK_V3, tensors)
    with pytest.raises(
        CheckpointError, match=r"shared_head\.head\.weight' differs from 'lm_head\.weight'"
    ):
        run_import(plan_import(hf), tmp_path / "out", ImportOptions())
    assert not any((tmp_path / "out" / "release").iterdir()), "it is found before work is done"


@pytest.fixture
def hf(tmp_path: Path) -> Path:
    return hf_models.make_model(tmp_path / "hf", MIXTRAL)


def first_shard(hf: Path) -> Path:
    return sorted(hf.glob("*.safetensors"))[0]


def edit_header(path: Path, edit: Callable[[dict], object]) -> None:
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    table = json.loads(raw[8 : 8 + length])
    header = json.dumps(edit(table) or table).encode()
    path.write_bytes(struct.pack("<Q", len(header)) + header + raw[8 + length :])


@pytest.mark.parametrize("keep", [0, 7, 100, -1, -1000])
def test_a_truncated_file_is_named(keep: int, hf: Path) -> None:
    path = first_shard(hf)
    raw = path.read_bytes()
    path.write_bytes(raw[:keep])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        plan_import(hf)


def test_bytes_after_the_last_tensor_are_refused(hf: Path) -> None:
    with first_shard(hf).open("ab") as file:
        file.write(b"x" * 64)
    with pytest.raises(CheckpointError, match="64 bytes after the last tensor"):
        plan_import(hf)


def test_overlapping_tensors_are_refused(hf: Path) -> None:
    def overlap(table: dict) -> None:
        same = [e for n, e in table.items() if n.endswith("layernorm.weight")]
        same[1]["data_offsets"] = same[0]["data_offsets"]

    edit_header(first_shard(hf), overlap)
    with pytest.raises(CheckpointError, match=r"overlaps another|leaves a gap"):
        plan_import(hf)


def test_a_size_that_the_shape_does_not_have_is_refused(hf: Path) -> None:
    def lie(table: dict) -> None:
        next(e for n, e in table.items() if n != "__metadata__")["shape"] = [10**9, 10**9]

    edit_header(first_shard(hf), lie)
    with pytest.raises(CheckpointError, match="but the header gives it"):
        plan_import(hf)


@pytest.mark.parametrize("shape", [[-1, 5], [2.5], "x", [True, 2]])
def test_a_shape_that_is_none_is_refused(shape: object, hf: Path) -> None:
    def lie(table: dict) -> None:
        next(e for n, e in table.items() if n != "__metadata__")["shape"] = shape

    edit_header(first_shard(hf), lie)
    with pytest.raises(CheckpointError, match="malformed"):
        plan_import(hf)


@pytest.mark.parametrize("name", ["a\0b", "a\x1b[31mb", "a\ud800b"])
def test_a_name_that_no_terminal_should_print_is_refused(name: str, hf: Path) -> None:
    nothing = {"dtype": "BF16", "shape": [0], "data_offsets": [0, 0]}
    edit_header(first_shard(hf), lambda table: table.update({name: nothing}))
    with pytest.raises(CheckpointError, match="malformed") as caught:
        plan_import(hf)
    assert str(caught.value).isprintable()


def test_a_header_of_nested_brackets_is_refused(hf: Path) -> None:
    path = first_shard(hf)
    header = b"[" * 200_000
    path.write_bytes(struct.pack("<Q", len(header)) + header)
    with pytest.raises(CheckpointError, match="header is damaged"):
        plan_import(hf)


def test_a_doubled_tensor_is_named_with_both_files(hf: Path) -> None:
    (hf / "model.safetensors.index.json").unlink()
    shutil.copy(first_shard(hf), hf / "again.safetensors")
    with pytest.raises(CheckpointError, match=r"is in both .*again\.safetensors and .*model-00001"):
        plan_import(hf)


def test_an_index_that_lies_about_a_file_is_refused(hf: Path) -> None:
    index = hf / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    name = "model.norm.weight"
    others = set(table["weight_map"].values()) - {table["weight_map"][name]}
    table["weight_map"][name] = others.pop()
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"says that 'model\.norm\.weight' is in"):
        plan_import(hf)


@pytest.mark.parametrize("file", ["../../etc/passwd.safetensors", "/etc/x.safetensors", 7])
def test_an_index_that_points_elsewhere_is_refused(file: object, hf: Path) -> None:
    index = hf / "model.safetensors.index.json"
    table = json.loads(index.read_text())
    table["weight_map"]["model.norm.weight"] = file
    index.write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="in the same folder"):
        plan_import(hf)


def test_a_missing_shard_is_named(hf: Path) -> None:
    first_shard(hf).unlink()
    with pytest.raises(
        CheckpointError, match=r"names 'model-00001-of-00002\.safetensors', which is missing"
    ):
        plan_import(hf)


def test_pickled_weights_are_not_read(hf: Path) -> None:
    for path in hf.glob("*.safetensors*"):
        path.unlink()
    (hf / "pytorch_model.bin").write_bytes(pickle.dumps({}))
    with pytest.raises(CheckpointError, match=r"pickled \.bin weights are not read"):
        plan_import(hf)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"num_local_experts": 4}, r"has the shape \[3, 24\], but config.json gives it \[4, 24\]"),
        ({"num_hidden_layers": 4}, r"layers\.3\.\S+ .* is missing"),
        ({"num_hidden_layers": 2}, "have no place"),
        ({"hidden_size": 32}, "has the shape"),
        ({"hidden_size": None}, "config.json has none of hidden_size"),
        ({"hidden_size": -24}, "hidden_size = -24 is not a positive whole number"),
        ({"hidden_size": "24"}, "hidden_size = '24' is not a positive whole number"),
        ({"num_hidden_layers": 10**9}, "1000000000 layers of 3 experts: more than any model"),
        ({"num_local_experts": 10**8}, "3 layers of 100000000 experts: more than any model"),
        ({"architectures": "MixtralForCausalLM"}, "architectures = 'Mixtral.*is not a list"),
        ({"architectures": [["MixtralForCausalLM"]]}, "which is not one of"),
        ({"architectures": ["MixtralForCausaLM"]}, "nearest known is MixtralForCausalLM"),
        ({"architectures": []}, "names the architecture nothing"),
    ],
)
def test_a_config_of_another_model_is_refused(change: dict, words: str, hf: Path) -> None:
    (hf / "config.json").write_text(json.dumps({**MIXTRAL, **change}))
    with pytest.raises(CheckpointError, match=words):
        plan_import(hf)


@pytest.mark.parametrize(
    ("model", "change", "words"),
    [
        ("qwen3_moe", {"mlp_only_layers": 1}, "mlp_only_layers = 1 is not a list"),
        ("qwen3_moe", {"decoder_sparse_step": "1"}, "decoder_sparse_step = '1' is not a positive"),
        ("qwen3_next with MTP", {"layer_types": ["linear_attention"]}, "names 1 layers, too few"),
        ("deepseek_v3 with MTP", {"num_nextn_predict_layers": "one"}, "= 'one' is not a positive"),
        ("deepseek_v3 with MTP", {"n_group": [2]}, r"n_group = \[2\] is not a positive"),
        ("deepseek_v3 with MTP", {"first_k_dense_replace": 2.5}, "= 2.5 is not a positive whole"),
    ],
)
def test_a_config_of_the_wrong_types_is_refused(
    model: str, change: dict, words: str, tmp_path: Path
) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.MODELS[model])
    (hf / "config.json").write_text(json.dumps({**hf_models.MODELS[model], **change}))
    with pytest.raises(CheckpointError, match=words):
        plan_import(hf)


@pytest.mark.parametrize(
    "change",
    [
        {"rope_scaling": [1]},
        {"rope_parameters": "yarn"},
        {"rope_theta": "large"},
        {"rope_scaling": {"type": "yarn"}},
        {"rope_scaling": {"type": "yarn", "factor": 10**400}},
        {"num_hidden_layers": 10**9},
        {"architectures": ["MyMoEForCausalLM"], "auto_map": {"AutoModel": "evil.py--Evil"}},
    ],
)
def test_a_model_that_nothing_describes_can_be_looked_at_all_the_same(
    change: dict, hf: Path
) -> None:
    (hf / "config.json").write_text(json.dumps({**MIXTRAL, **change}))
    found = inspect(hf)
    assert len(found.tensors) == 51
    assert found.flags == ()
    assert "none: config.json" in found.facts.get("Megatron flags", found.facts["family"])


def test_rope_that_megatron_has_no_flag_for_is_said_and_does_not_stop_an_inspection(
    tmp_path: Path,
) -> None:
    scaling = {"type": "yarn", "factor": 32.0, "beta_fast": 1.0, "beta_slow": 1.0}
    config = {**hf_models.DEEPSEEK_V3, "rope_scaling": scaling}  # Kimi-K2's
    found = inspect(hf_models.make_model(tmp_path / "hf", config))
    assert found.flags == ()
    assert "beta_fast = 1.0 has no Megatron flag" in found.facts["Megatron flags"]
    assert (
        "--multi-latent-attention"
        in inspect(hf_models.make_model(tmp_path / "plain", hf_models.DEEPSEEK_V3)).flags
    )


def test_stacked_keys_of_a_model_with_dense_layers_are_refused(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.DEEPSEEK_V3)
    with pytest.raises(CheckpointError, match="use --layer-keys per-layer"):
        plan_import(hf, layer_keys="stacked")


def test_a_good_checkpoint_is_never_written_over(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_import(plan_import(hf), out, ImportOptions())
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    other = hf_models.make_model(tmp_path / "other", {**MIXTRAL, "vocab_size": 38})
    with pytest.raises(CheckpointError, match="already holds a whole checkpoint"):
        run_import(plan_import(other), out, ImportOptions())
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    assert run_import(plan_import(hf), out, ImportOptions()).units_written == 0


def test_a_folder_with_something_else_in_it_is_refused(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "thesis.txt").write_text("mine")
    with pytest.raises(CheckpointError, match="is not empty"):
        run_import(plan_import(hf), tmp_path / "out", ImportOptions())


def test_an_unfinished_import_of_another_source_is_refused(hf: Path, tmp_path: Path) -> None:
    (tmp_path / "out" / ".convert").mkdir(parents=True)
    (tmp_path / "out" / ".convert" / "plan").write_text("0" * 64)
    with pytest.raises(CheckpointError, match="unfinished conversion of another source"):
        run_import(plan_import(hf), tmp_path / "out", ImportOptions())


def test_too_little_memory_is_said_with_what_is_enough(hf: Path, tmp_path: Path) -> None:
    with pytest.raises(
        CheckpointError, match="--memory-mib 50 is too little for 2 processes; at least"
    ):
        run_import(plan_import(hf), tmp_path / "out", ImportOptions(memory_bytes=50 << 20))


def test_a_target_that_cannot_be_written_is_named(hf: Path) -> None:
    with pytest.raises(CheckpointError, match="/proc/self/nowhere: cannot be written"):
        run_import(plan_import(hf), Path("/proc/self/nowhere"), ImportOptions())


@pytest.mark.skipif(os.getuid() != 0, reason="becomes another user for a moment")
def test_a_folder_that_may_not_be_written_is_named(hf: Path) -> None:
    plan = plan_import(hf)
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o555)
        os.seteuid(65534)
        try:
            with pytest.raises(
                CheckpointError, match=f"{folder}/out: cannot be written: Permission"
            ):
                run_import(plan, Path(folder) / "out", ImportOptions())
        finally:
            os.seteuid(0)


def test_a_disk_that_fills_up_while_writing_is_said_with_the_way_on(tmp_path: Path) -> None:
    (tmp_path / "a.distcp.part").symlink_to("/dev/full")
    file = PartFile(tmp_path / "a.distcp")
    try:
        with pytest.raises(CheckpointError, match=r"a\.distcp\.part: the disk is full; free some"):
            file.write(b"x" * 4096, 0)
    finally:
        file.close()
    assert not (tmp_path / "a.distcp").exists()


class Evil:
    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, ("touch /tmp/moe_bench_was_owned",)


def test_a_metadata_pickle_that_would_run_a_command_is_not_run(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_import(plan_import(hf), out, ImportOptions())
    (out / "release" / ".metadata").write_bytes(pickle.dumps(Evil()))
    with pytest.raises(CheckpointError, match="which no torch_dist metadata needs"):
        open_torch_dist(out)
    assert not Path("/tmp/moe_bench_was_owned").exists()


def test_a_metadata_that_names_files_outside_is_refused(tmp_path: Path) -> None:
    box = metadata.Box((0,), (2,), "../../secret", 0, 10)
    table = metadata.Metadata({"a": metadata.TensorEntry("F32", (2,), (box,))}, {})
    (tmp_path / ".metadata").write_bytes(metadata.dump(table))
    with pytest.raises(CheckpointError, match="outside the checkpoint"):
        metadata.load(tmp_path / ".metadata")


@pytest.mark.parametrize("keep", [0, 10, 500, -1])
def test_a_cut_metadata_is_refused(keep: int, hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_import(plan_import(hf), out, ImportOptions())
    path = out / "release" / ".metadata"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match=re.escape(str(path))):
        open_torch_dist(out)


def test_a_flipped_bit_in_a_chunk_is_found_and_named(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_import(plan_import(hf), out, ImportOptions())
    checkpoint = open_torch_dist(out)
    box = checkpoint.tensors["output_layer.weight"].boxes[0]
    with (checkpoint.folder / box.file).open("r+b") as file:
        file.seek(box.offset + box.length - 1200)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 4]))
    reasons = {d.name: d.reason for d in verify(hf, out).differences}
    assert "CRC-32" in reasons["output_layer.weight"]
    assert "differs in 1 of 888 values, by up to " in reasons["lm_head.weight"]


def test_a_difference_names_layer_and_expert_and_says_how_far(hf: Path, tmp_path: Path) -> None:
    tensors = hf_models.random_tensors(MIXTRAL)
    _, bits = tensors["model.layers.1.block_sparse_moe.experts.2.w2.weight"]
    bits[5, 7] = 0x3F80  # 1.0 in bfloat16
    bits[5, 8] = 0x7FC0  # not a number
    other = hf_models.write_model(tmp_path / "other", MIXTRAL, tensors)
    for source, out in ((hf, "a"), (other, "b")):
        run_import(plan_import(source), tmp_path / out, ImportOptions(allow_non_finite=True))
    verdict = verify(tmp_path / "a", tmp_path / "b")
    (found,) = verdict.differences
    assert verdict.tensors == len(open_torch_dist(tmp_path / "a").tensors)
    assert found.name == "decoder.layers.mlp.experts.experts.linear_fc2.weight[1, 2]"
    assert found.reason == "differs in 2 of 480 values, by up to inf, first in row 5"


def test_a_full_disk_is_seen_before_an_export_begins(
    hf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run_import(plan_import(hf), tmp_path / "out", ImportOptions())
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    options = ExportOptions()
    with pytest.raises(CheckpointError, match="still to be written and 1000 B are free"):
        run_export(plan_export(tmp_path / "out", None, options), tmp_path / "back", options)


def test_a_checkpoint_given_as_a_model_is_told_from_one(hf: Path, tmp_path: Path) -> None:
    run_import(plan_import(hf), tmp_path / "out", ImportOptions())
    with pytest.raises(CheckpointError, match="is a Megatron checkpoint; `convert export` reads"):
        plan_import(tmp_path / "out")


def test_a_cut_data_file_is_named_on_export(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_import(plan_import(hf), out, ImportOptions())
    path = out / "release" / "__0_0.distcp"
    path.write_bytes(path.read_bytes()[:-5000])
    options = ExportOptions()
    with pytest.raises(CheckpointError, match=r"__0_0\.distcp.*cut off"):
        run_export(plan_export(out, None, options), tmp_path / "back", options)
    assert not (tmp_path / "back" / "config.json").exists()
    assert not (tmp_path / "back" / "model.safetensors.index.json").exists()


def test_a_half_written_checkpoint_is_not_taken_for_one(hf: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_import(plan_import(hf), out, ImportOptions())
    (out / TRACKER).unlink()
    with pytest.raises(CheckpointError, match=r"a half-written one has no tracker"):
        open_torch_dist(out)


def test_trained_weights_are_not_forced_back_into_their_old_fp8(tmp_path: Path) -> None:
    hf = hf_models.write_model(tmp_path / "hf", FP8, fp8_tensors())
    out = tmp_path / "out"
    run_import(plan_import(hf), out, ImportOptions())
    checkpoint = open_torch_dist(out)
    box = checkpoint.tensors["decoder.layers.0.mlp.linear_fc2.weight"].boxes[0]
    with (checkpoint.folder / box.file).open("r+b") as file:
        file.seek(box.offset + box.length - 900)
        file.write(struct.pack("<H", 0x1234))
    options = ExportOptions(fp8=True)
    with pytest.raises(CheckpointError, match="no longer has the values of its quantised source"):
        run_export(plan_export(out, None, options), tmp_path / "back", options)
