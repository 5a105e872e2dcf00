"""The plan of the real DeepSeek-V3, from sparse files with its published names and shapes."""

from __future__ import annotations

import itertools
import json
import re
import struct
import time
from pathlib import Path

import pytest

from moe_bench.checkpoint.importing import ImportOptions, run_import
from moe_bench.checkpoint.plan import Plan, plan_import
from moe_bench.errors import CheckpointError
from tests.support import hf_models

CONFIG = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "vocab_size": 129280,
    "hidden_size": 7168,
    "intermediate_size": 18432,
    "moe_intermediate_size": 2048,
    "num_hidden_layers": 61,
    "num_nextn_predict_layers": 1,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "n_shared_experts": 1,
    "n_routed_experts": 256,
    "routed_scaling_factor": 2.5,
    "kv_lora_rank": 512,
    "q_lora_rank": 1536,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "qk_nope_head_dim": 128,
    "n_group": 8,
    "topk_group": 4,
    "num_experts_per_tok": 8,
    "moe_layer_freq": 1,
    "first_k_dense_replace": 3,
    "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "quantization_config": {"quant_method": "fp8", "weight_block_size": [128, 128]},
}


PUBLISHED = """
lm_head.weight BF16 129280,7168
model.embed_tokens.weight BF16 129280,7168
model.norm.weight BF16 7168
model.layers.0-2.mlp.down_proj.weight F8_E4M3 7168,18432
model.layers.0-2.mlp.down_proj.weight_scale_inv F32 56,144
model.layers.0-2.mlp.gate_proj.weight F8_E4M3 18432,7168
model.layers.0-2.mlp.gate_proj.weight_scale_inv F32 144,56
model.layers.0-2.mlp.up_proj.weight F8_E4M3 18432,7168
model.layers.0-2.mlp.up_proj.weight_scale_inv F32 144,56
model.layers.0-61.input_layernorm.weight BF16 7168
model.layers.0-61.post_attention_layernorm.weight BF16 7168
model.layers.0-61.self_attn.kv_a_layernorm.weight BF16 512
model.layers.0-61.self_attn.kv_a_proj_with_mqa.weight F8_E4M3 576,7168
model.layers.0-61.self_attn.kv_a_proj_with_mqa.weight_scale_inv F32 5,56
model.layers.0-61.self_attn.kv_b_proj.weight F8_E4M3 32768,512
model.layers.0-61.self_attn.kv_b_proj.weight_scale_inv F32 256,4
model.layers.0-61.self_attn.o_proj.weight F8_E4M3 7168,16384
model.layers.0-61.self_attn.o_proj.weight_scale_inv F32 56,128
model.layers.0-61.self_attn.q_a_layernorm.weight BF16 1536
model.layers.0-61.self_attn.q_a_proj.weight F8_E4M3 1536,7168
model.layers.0-61.self_attn.q_a_proj.weight_scale_inv F32 12,56
model.layers.0-61.self_attn.q_b_proj.weight F8_E4M3 24576,1536
model.layers.0-61.self_attn.q_b_proj.weight_scale_inv F32 192,12
model.layers.3-61.mlp.experts.0-255.down_proj.weight F8_E4M3 7168,2048
model.layers.3-61.mlp.experts.0-255.down_proj.weight_scale_inv F32 56,16
model.layers.3-61.mlp.experts.0-255.gate_proj.weight F8_E4M3 2048,7168
model.layers.3-61.mlp.experts.0-255.gate_proj.weight_scale_inv F32 16,56
model.layers.3-61.mlp.experts.0-255.up_proj.weight F8_E4M3 2048,7168
model.layers.3-61.mlp.experts.0-255.up_proj.weight_scale_inv F32 16,56
model.layers.3-61.mlp.gate.e_score_correction_bias F32 256
model.layers.3-61.mlp.gate.weight BF16 256,7168
model.layers.3-61.mlp.shared_experts.down_proj.weight F8_E4M3 7168,2048
model.layers.3-61.mlp.shared_experts.down_proj.weight_scale_inv F32 56,16
model.layers.3-61.mlp.shared_experts.gate_proj.weight F8_E4M3 2048,7168
model.layers.3-61.mlp.shared_experts.gate_proj.weight_scale_inv F32 16,56
model.layers.3-61.mlp.shared_experts.up_proj.weight F8_E4M3 2048,7168
model.layers.3-61.mlp.shared_experts.up_proj.weight_scale_inv F32 16,56
model.layers.61.eh_proj.weight BF16 7168,14336
model.layers.61.embed_tokens.weight BF16 129280,7168
model.layers.61.enorm.weight BF16 7168
model.layers.61.hnorm.weight BF16 7168
model.layers.61.shared_head.head.weight BF16 129280,7168
model.layers.61.shared_head.norm.weight BF16 7168
"""
"""Every tensor of the 163 files that DeepSeek publishes (an inventory of DeepSeek-R1's, which are V3's in names and shapes)."""


def published() -> dict[str, tuple[str, tuple[int, ...]]]:
    """Type and shape by name, the ranges written out."""
    found = {}
    for line in PUBLISHED.split("\n")[1:-1]:
        pattern, dtype, shape = line.split()
        ranges = [
            range(int(low), int(high or low) + 1)
            for low, high in re.findall(r"(?<=\.)(\d+)(?:-(\d+))?(?=\.)", pattern)
        ]
        template = re.sub(r"(?<=\.)\d+(?:-\d+)?(?=\.)", "{}", pattern)
        for place in itertools.product(*ranges):
            found[template.format(*place)] = (dtype, tuple(map(int, shape.split(","))))
    return found


def write_sparse(folder: Path, shards: int) -> int:
    """The published model's headers over files that take no space; the number of tensors."""
    entries: dict[str, tuple[str, list[int], int]] = {}
    for name, shape in hf_models.shapes(CONFIG).items():
        count = 1
        for size in shape:
            count *= size
        if "_proj" in name and "eh_proj" not in name:
            entries[name] = ("F8_E4M3", list(shape), count)
            grid = [-(-size // 128) for size in shape]
            entries[name + "_scale_inv"] = ("F32", grid, 4 * grid[0] * grid[1])
        elif name.endswith("e_score_correction_bias"):
            entries[name] = ("F32", list(shape), 4 * count)
        else:
            entries[name] = ("BF16", list(shape), 2 * count)
    names = list(entries)
    step = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        file, table, at = f"model-{i + 1:05d}-of-{shards:06d}.safetensors", {}, 0
        for name in names[i * step : (i + 1) * step]:
            dtype, shape, size = entries[name]
            table[name] = {"dtype": dtype, "shape": shape, "data_offsets": [at, at + size]}
            weight_map[name] = file
            at += size
        header = json.dumps(table).encode()
        with (folder / file).open("wb") as out:
            out.write(struct.pack("<Q", len(header)) + header)
            out.truncate(8 + len(header) + at)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "config.json").write_text(json.dumps(CONFIG))
    return len(names)


@pytest.fixture(scope="module")
def planned(tmp_path_factory: pytest.TempPathFactory) -> tuple[int, Plan, float]:
    folder = tmp_path_factory.mktemp("deepseek-v3")
    tensors = write_sparse(folder, 163)
    started = time.perf_counter()
    plan = plan_import(folder)
    return tensors, plan, time.perf_counter() - started


def test_the_shapes_are_the_published_ones(planned: tuple[int, Plan, float]) -> None:
    tensors, plan, _ = planned
    assert tensors == 91_991  # entries of the published model.safetensors.index.json
    assert {name: (t.dtype, t.shape) for name, t in plan.source.tensors.items()} == published()
    parameters = sum(
        p.tensor.num_elements for p in plan.tensors if not p.tensor.key.startswith("mtp.")
    )
    assert round(parameters / 1e9, 2) == 671.03


def test_every_megatron_tensor_is_planned_and_no_chunk_is_large(
    planned: tuple[int, Plan, float],
) -> None:
    _, plan, _ = planned
    assert len(plan.tensors) == 925
    assert 1.36e12 < plan.num_bytes < 1.38e12
    longest = max(
        unit.offsets[i + 1] - unit.offsets[i]
        for unit in plan.units
        for i in range(len(unit.chunks))
    )
    assert longest <= (64 << 20) + 2048


def test_a_disk_that_is_too_small_is_said_before_anything_is_written(
    planned: tuple[int, Plan, float], tmp_path: Path
) -> None:
    _, plan, _ = planned
    with pytest.raises(CheckpointError, match=r"1\.24 TiB are still to be written and .* are free"):
        run_import(plan, tmp_path / "out", ImportOptions())
    assert not any((tmp_path / "out" / "release").iterdir())
