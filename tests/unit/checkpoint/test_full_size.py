"""The plan of the real DeepSeek-V3, from sparse files with its published names and shapes."""

from __future__ import annotations

import json
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
