"""Hugging Face -> torch_dist -> Hugging Face, byte for byte, for every family."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from moe_bench.checkpoint import exporting, importing
from moe_bench.checkpoint.arithmetic import E4M3, dequantize_mxfp4, to_bfloat16, widen
from moe_bench.checkpoint.exporting import ExportOptions, plan_export, run_export
from moe_bench.checkpoint.importing import ImportOptions, run_import
from moe_bench.checkpoint.inspecting import inspect
from moe_bench.checkpoint.output import MANIFEST
from moe_bench.checkpoint.plan import plan_import
from moe_bench.checkpoint.source import open_hf
from moe_bench.checkpoint.torch_dist import BoxReader, open_torch_dist
from moe_bench.checkpoint.verifying import verify
from moe_bench.errors import CheckpointError
from tests.support import hf_models


def import_model(hf: Path, out: Path, **plan: Any) -> Path:
    run_import(plan_import(hf, **plan), out, ImportOptions())
    return out


def export_model(megatron: Path, out: Path, **options: Any) -> Path:
    asked = ExportOptions(**options)
    run_export(plan_export(megatron, None, asked), out, asked)
    return out


def contents(hf: Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """Type, shape and bytes of every tensor, read the plain way."""
    found = {}
    for name, t in open_hf(hf).tensors.items():
        with t.file.open("rb") as file:
            file.seek(t.offset)
            found[name] = (t.dtype, t.shape, file.read(t.num_bytes))
    return found


def hashes(folder: Path) -> dict[str, str]:
    return {
        str(p.relative_to(folder)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in sorted(folder.rglob("*"))
        if p.is_file()
    }


@pytest.mark.parametrize("name", hf_models.MODELS)
def test_every_family_comes_back_byte_for_byte(name: str, tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.MODELS[name])
    keys = "per-layer" if "dense layer" in name else "auto"
    megatron = import_model(hf, tmp_path / "megatron", layer_keys=keys)
    back = export_model(megatron, tmp_path / "back")
    assert contents(back) == contents(hf)
    assert verify(hf, megatron).differences == ()
    assert (back / "tokenizer.json").read_bytes() == (hf / "tokenizer.json").read_bytes()


def test_one_file_written_by_several_workers_has_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.QWEN3)
    megatron = import_model(hf, tmp_path / "megatron")
    one = export_model(megatron, tmp_path / "one", processes=1)
    monkeypatch.setattr(exporting, "PORTION_BYTES", 500)  # some forty portions
    many = export_model(megatron, tmp_path / "many", processes=3)
    assert hashes(many) == hashes(one)
    assert not list(many.glob("*.part"))


def test_pieces_smaller_than_a_tensor_give_the_same_bytes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, config in (("qwen3", hf_models.QWEN3), ("fp8", FP8)):
        tensors = hf_models.random_tensors(config)
        if name == "fp8":
            tensors = hf_models.quantize(tensors, 8)
        hf = hf_models.write_model(tmp_path / name, config, tensors)
        whole = import_model(hf, tmp_path / f"{name}-whole")
        with monkeypatch.context() as patch:
            patch.setattr(importing, "_PIECE_BYTES", 1)  # a row at a time
            pieces = import_model(hf, tmp_path / f"{name}-pieces")
        assert hashes(pieces) == hashes(whole)


@pytest.mark.parametrize("dialect", ["te", "local", "both"])
def test_any_dialect_comes_back(dialect: str, tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.DEEPSEEK_V3)
    megatron = import_model(hf, tmp_path / "megatron", dialect=dialect)
    assert contents(export_model(megatron, tmp_path / "back")) == contents(hf)


def test_both_dialects_name_the_same_bytes(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.MIXTRAL)
    one, both = (open_torch_dist(import_model(hf, tmp_path / d, dialect=d)) for d in ("te", "both"))
    te = both.tensors["decoder.layers.pre_mlp_layernorm.weight"]
    assert both.tensors["decoder.layers.mlp.linear_fc1.layer_norm_weight"] == te
    size = [sum(p.stat().st_size for p in c.folder.glob("__[0-9]*")) for c in (one, both)]
    assert size[0] == size[1]


def test_stacked_and_per_layer_keys_hold_the_same_weights(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.QWEN3)
    for keys in ("stacked", "per-layer"):
        megatron = import_model(hf, tmp_path / keys, layer_keys=keys)
        assert verify(megatron, hf).differences == ()
    names = open_torch_dist(tmp_path / "per-layer").tensors
    assert "decoder.layers.2.self_attention.linear_qkv.weight" in names


def test_query_key_value_rows_are_grouped(tmp_path: Path) -> None:
    tensors = hf_models.random_tensors(hf_models.MIXTRAL)
    hf = hf_models.write_model(tmp_path / "hf", hf_models.MIXTRAL, tensors)
    reader = BoxReader(open_torch_dist(import_model(hf, tmp_path / "megatron")))
    found = reader.rows("decoder.layers.self_attention.linear_qkv.weight", (1,), 0, 80)
    q, k, v = (tensors[f"model.layers.1.self_attn.{x}_proj.weight"][1] for x in "qkv")
    # 2 groups: three heads of 8 rows each, then one of k, one of v
    expected = np.concatenate([q[:24], k[:8], v[:8], q[24:], k[8:], v[8:]])
    assert np.array_equal(found, expected)


def test_interleaved_experts_of_gpt_oss_become_gate_then_up(tmp_path: Path) -> None:
    tensors = hf_models.random_tensors(hf_models.GPT_OSS)
    hf = hf_models.write_model(tmp_path / "hf", hf_models.GPT_OSS, tensors)
    reader = BoxReader(open_torch_dist(import_model(hf, tmp_path / "megatron")))
    found = reader.rows("decoder.layers.mlp.experts.experts.linear_fc1.weight", (2, 1), 0, 40)
    fused = tensors["model.layers.2.mlp.experts.gate_up_proj"][1][1]
    assert np.array_equal(found[:20], fused[:, 0::2].T)
    assert np.array_equal(found[20:], fused[:, 1::2].T)


FP8 = {
    **hf_models.DEEPSEEK_V3,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [8, 8]},
}


class TestFp8:
    @pytest.fixture
    def hf(self, tmp_path: Path) -> Path:
        tensors = hf_models.quantize(hf_models.random_tensors(FP8), 8)
        return hf_models.write_model(tmp_path / "hf", FP8, tensors)

    def test_a_block_is_its_codes_times_its_scale_rounded_once(
        self, hf: Path, tmp_path: Path
    ) -> None:
        megatron = import_model(hf, tmp_path / "megatron")
        name = "model.layers.0.mlp.down_proj.weight"
        codes = np.frombuffer(contents(hf)[name][2], np.uint8).reshape(24, 36)
        scales = np.frombuffer(contents(hf)[name + "_scale_inv"][2], np.float32).reshape(3, 5)
        spread = scales.repeat(8, 0)[:24].repeat(8, 1)[:, :36]
        found = BoxReader(open_torch_dist(megatron)).rows(
            "decoder.layers.0.mlp.linear_fc2.weight", (), 0, 24
        )
        assert np.array_equal(found, to_bfloat16(E4M3[codes] * spread))

    def test_export_restores_codes_and_scales_exactly(self, hf: Path, tmp_path: Path) -> None:
        megatron = import_model(hf, tmp_path / "megatron")
        back = export_model(megatron, tmp_path / "back", fp8=True)
        assert contents(back) == contents(hf)
        assert "quantization_config" in json.loads((back / "config.json").read_text())

    def test_plain_export_is_bfloat16_and_says_so(self, hf: Path, tmp_path: Path) -> None:
        megatron = import_model(hf, tmp_path / "megatron")
        back = export_model(megatron, tmp_path / "back")
        assert {t.dtype for t in open_hf(back).tensors.values()} == {"BF16", "F32"}
        assert "quantization_config" not in json.loads((back / "config.json").read_text())
        assert verify(hf, back).differences == ()


class TestMxfp4:
    @pytest.fixture
    def hf(self, tmp_path: Path) -> Path:
        config = hf_models.GPT_OSS_MXFP4
        tensors = hf_models.pack_experts(hf_models.random_tensors(config))
        return hf_models.write_model(tmp_path / "hf", config, tensors)

    def test_every_code_is_its_value_times_two_to_the_scale(self) -> None:
        codes = np.arange(256, dtype=np.uint8).reshape(16, 1, 16).repeat(251, axis=1)
        scales = np.arange(251, dtype=np.uint8)[None].repeat(16, axis=0)
        found = widen(dequantize_mxfp4(codes, scales).tobytes(), "BF16").reshape(16, 251, 16, 2)
        magnitude = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
        values = np.array([*magnitude, *(-m for m in magnitude)])
        nibbles = np.stack([codes & 15, codes >> 4], axis=-1)
        expected = values[nibbles] * 2.0 ** (scales.astype(np.int64) - 127)[..., None, None]
        assert np.array_equal(found, expected.astype(np.float32))
        assert np.array_equal(np.signbit(found), nibbles >= 8)

    def test_a_scale_of_255_is_not_a_number(self) -> None:
        bits = dequantize_mxfp4(np.zeros((1, 1, 16), np.uint8), np.full((1, 1), 255, np.uint8))
        assert np.isnan(widen(bits.tobytes(), "BF16")).all()

    def test_rows_are_gate_then_up(self, hf: Path, tmp_path: Path) -> None:
        megatron = import_model(hf, tmp_path / "megatron")
        found = BoxReader(open_torch_dist(megatron)).rows(
            "decoder.layers.mlp.experts.experts.linear_fc1.weight", (2, 1), 0, 192
        )
        name = "model.layers.2.mlp.experts.gate_up_proj_"
        codes = np.frombuffer(contents(hf)[name + "blocks"][2], np.uint8).reshape(3, 192, 2, 16)
        scales = np.frombuffer(contents(hf)[name + "scales"][2], np.uint8).reshape(3, 192, 2)
        whole = dequantize_mxfp4(codes[1], scales[1])
        assert np.array_equal(found, np.concatenate([whole[0::2], whole[1::2]]))

    def test_export_restores_codes_and_scales_exactly(self, hf: Path, tmp_path: Path) -> None:
        megatron = import_model(hf, tmp_path / "megatron")
        back = export_model(megatron, tmp_path / "back", fp8=True)
        assert contents(back) == contents(hf)
        assert verify(hf, megatron).differences == ()

    def test_plain_export_is_bfloat16_as_transformers_names_it(
        self, hf: Path, tmp_path: Path
    ) -> None:
        back = export_model(import_model(hf, tmp_path / "megatron"), tmp_path / "back")
        found = open_hf(back).tensors["model.layers.0.mlp.experts.gate_up_proj"]
        assert (found.dtype, found.shape) == ("BF16", (3, 64, 192))
        assert "quantization_config" not in json.loads((back / "config.json").read_text())
        assert verify(hf, back).differences == ()


def test_the_norm_that_hugging_face_centres_on_one_loses_no_bit(tmp_path: Path) -> None:
    """bfloat16 could not hold 0.1 - 1: Megatron's value is kept in float32."""
    tensors = hf_models.random_tensors(hf_models.QWEN3_NEXT)
    name = "model.layers.0.linear_attn.norm.weight"
    values = np.array([0.1, 1.0, 1.0078125, -3.25, 2**-12], np.float32)
    tensors[name] = ("BF16", to_bfloat16(values))
    hf = hf_models.write_model(tmp_path / "hf", hf_models.QWEN3_NEXT, tensors)
    megatron = import_model(hf, tmp_path / "megatron")
    key = "decoder.layers.0.self_attention.out_norm.weight"
    found = BoxReader(open_torch_dist(megatron)).rows(key, (), 0, 5).view(np.float32)
    assert np.array_equal(found + 1, widen(tensors[name][1].tobytes(), "BF16"))
    assert contents(export_model(megatron, tmp_path / "back")) == contents(hf)


def test_the_delta_nets_projection_is_sorted_by_what_it_projects_to(tmp_path: Path) -> None:
    tensors = hf_models.random_tensors(hf_models.QWEN3_NEXT)
    hf = hf_models.write_model(tmp_path / "hf", hf_models.QWEN3_NEXT, tensors)
    reader = BoxReader(open_torch_dist(import_model(hf, tmp_path / "megatron")))
    # 2 key heads: each 4 rows of query, 4 of key, then of its 3 value heads 15 of value and 15 of z
    whole = tensors["model.layers.1.linear_attn.in_proj_qkvz.weight"][1].reshape(2, 38, 24)
    stem = "decoder.layers.1.self_attention.in_proj.weight."
    cuts = {"query": (0, 4), "key": (4, 8), "value": (8, 23), "z": (23, 38)}
    for name, (first, end) in cuts.items():
        expected = whole[:, first:end].reshape(-1, 24)
        assert np.array_equal(reader.rows(stem + name, (), 0, len(expected)), expected)


def test_a_gated_query_is_followed_by_its_gate_in_each_group(tmp_path: Path) -> None:
    tensors = hf_models.random_tensors(hf_models.QWEN3_NEXT)
    hf = hf_models.write_model(tmp_path / "hf", hf_models.QWEN3_NEXT, tensors)
    reader = BoxReader(open_torch_dist(import_model(hf, tmp_path / "megatron")))
    found = reader.rows("decoder.layers.2.self_attention.linear_qkv.weight", (), 0, 128)
    q, k, v = (tensors[f"model.layers.2.self_attn.{x}_proj.weight"][1] for x in "qkv")
    heads = q.reshape(6, 2, 8, 24)
    for group in range(2):
        own = heads[3 * group : 3 * group + 3]
        rows = slice(8 * group, 8 * group + 8)
        expected = [own[:, 0].reshape(-1, 24), own[:, 1].reshape(-1, 24), k[rows], v[rows]]
        assert np.array_equal(found[64 * group : 64 * group + 64], np.concatenate(expected))


def test_the_expert_bias_stays_float32_and_a_bfloat16_one_is_widened(tmp_path: Path) -> None:
    tensors = hf_models.random_tensors(hf_models.DEEPSEEK_V3)
    name = "model.layers.3.mlp.gate.e_score_correction_bias"
    tensors[name] = ("BF16", to_bfloat16(tensors[name][1].view(np.float32)))
    hf = hf_models.write_model(tmp_path / "hf", hf_models.DEEPSEEK_V3, tensors)
    megatron = import_model(hf, tmp_path / "megatron")
    assert (
        open_torch_dist(megatron).tensors["decoder.layers.3.mlp.router.expert_bias"].dtype == "F32"
    )
    assert contents(export_model(megatron, tmp_path / "back")) == contents(hf)


def test_processes_memory_and_nodes_do_not_change_a_byte(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.DEEPSEEK_V3)
    plan = plan_import(hf)
    run_import(plan, tmp_path / "one", ImportOptions(processes=1, memory_bytes=200 << 20))
    run_import(plan, tmp_path / "four", ImportOptions(processes=4, memory_bytes=1 << 30))
    for node in (1, 0):
        run_import(plan, tmp_path / "nodes", ImportOptions(node=node, nodes=2))
    assert hashes(tmp_path / "one") == hashes(tmp_path / "four") == hashes(tmp_path / "nodes")


def test_a_hub_cache_entry_and_a_single_file_are_sources(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.MIXTRAL, shards=1)
    snapshot = tmp_path / "models--a--b" / "snapshots" / "0123"
    blobs = tmp_path / "models--a--b" / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for (
        path
    ) in hf.iterdir():  # as huggingface_hub lays them: contents by their hash, names as links
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        path.rename(blobs / digest)
        (snapshot / path.name).symlink_to(f"../../blobs/{digest}")
    (tmp_path / "models--a--b" / "refs").mkdir()
    (tmp_path / "models--a--b" / "refs" / "main").write_text("0123\n")
    by_cache = plan_import(tmp_path / "models--a--b")
    by_file = plan_import(snapshot / "model.safetensors")
    assert by_cache.hash == by_file.hash
    run_import(by_cache, tmp_path / "out", ImportOptions())
    assert verify(tmp_path / "models--a--b", tmp_path / "out").differences == ()
    assert contents(export_model(tmp_path / "out", tmp_path / "back")) == contents(snapshot)
    assert (tmp_path / "back" / "tokenizer.json").is_file()


KINDS = ["linear_attention", "linear_attention", "full_attention", "linear_attention"]


@pytest.mark.parametrize(
    "config", [hf_models.DEEPSEEK_V3, {**hf_models.QWEN3_NEXT, "layer_types": KINDS}]
)
def test_the_first_layers_alone_are_a_model(config: dict[str, Any], tmp_path: Path) -> None:
    whole = hf_models.make_model(tmp_path / "hf", config)
    back = export_model(import_model(whole, tmp_path / "megatron", layers=2), tmp_path / "back")
    shorter = json.loads((back / "config.json").read_text())
    assert shorter["num_hidden_layers"] == 2
    assert shorter.get("layer_types", KINDS[:2]) == KINDS[:2]
    kept = contents(back)
    assert set(kept) == {
        tensor
        for tensor in contents(whole)
        if not tensor.startswith("mtp.")
        and not any(tensor.startswith(f"model.layers.{i}.") for i in range(2, 9))
    }
    assert all(kept[tensor] == contents(whole)[tensor] for tensor in kept)
    assert verify(back, tmp_path / "megatron").differences == ()
    with pytest.raises(
        CheckpointError, match=r"holds 2 layers .* compare it with what `convert export`"
    ):
        verify(whole, tmp_path / "megatron")
    flags = inspect(tmp_path / "megatron").flags
    assert flags == inspect(back).flags
    assert flags[flags.index("--num-layers") + 1] == "2"


def test_more_layers_than_there_are_is_refused(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.MIXTRAL)
    with pytest.raises(CheckpointError, match="--layers 4: the model has 3"):
        plan_import(hf, layers=4)


def test_files_are_as_large_as_asked(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.QWEN3)
    megatron = import_model(hf, tmp_path / "megatron")
    back = export_model(megatron, tmp_path / "back", shard_bytes=9000)
    sizes = [sum(t.num_bytes for t in open_hf(back).tensors.values() if t.file == file)
             for file in sorted(back.glob("*.safetensors"))]  # fmt: skip
    assert len(sizes) > 2
    assert max(sizes) <= 9000
    assert sizes[0] + sizes[1] > 9000
    assert contents(back) == contents(hf)


def test_tokenizer_and_licence_travel_there_and_back(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.MIXTRAL)
    names = ("generation_config.json", "LICENSE", "NOTICE.txt", "tokenizer.model.v3")
    for name in names:
        (hf / name).write_text(name)
    (hf / "pytorch_model.bin").write_bytes(b"weights of another kind")
    back = export_model(import_model(hf, tmp_path / "megatron"), tmp_path / "back")
    assert [(back / name).read_text() for name in names] == list(names)
    assert not (back / "pytorch_model.bin").exists()


def test_the_manifest_names_sources_checksums_and_tool(tmp_path: Path) -> None:
    hf = hf_models.make_model(tmp_path / "hf", hf_models.MIXTRAL)
    manifest = json.loads((import_model(hf, tmp_path / "megatron") / MANIFEST).read_bytes())
    assert [s["name"] for s in manifest["sources"]] == [
        p.name for p in sorted(hf.glob("*.safetensors"))
    ]
    assert manifest["tool"]["name"] == "moe_bench convert"
    tokenizer = hashlib.sha256((hf / "tokenizer.json").read_bytes()).hexdigest()
    assert manifest["carried_sha256"]["tokenizer.json"] == tokenizer
    assert all(isinstance(crc, int) for file in manifest["files"] for crc in file["payload_crc32"])
