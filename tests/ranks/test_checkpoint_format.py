"""What is written by hand here, torch reads as its own: chunks, objects and the table of contents."""

from __future__ import annotations

import io
import pickle
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import FileSystemReader

from moe_bench.checkpoint import metadata
from moe_bench.checkpoint.importing import COMMON, ImportOptions, run_import
from moe_bench.checkpoint.plan import plan_import
from moe_bench.checkpoint.torch_dist import BoxReader, TorchDist, open_torch_dist
from moe_bench.checkpoint.torchsave import frame, framed_length
from tests.support import hf_models


@pytest.fixture(scope="module")
def release(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("format")
    hf = hf_models.make_model(folder / "hf", hf_models.DEEPSEEK_V3)
    run_import(plan_import(hf), folder / "out", ImportOptions())
    return folder / "out" / "release"


@pytest.mark.parametrize("shape", [(), (1,), (7,), (3, 5), (1, 2, 300, 4), (2**9, 2**8)])
@pytest.mark.parametrize("dtype", ["BF16", "F32", "F16"])
@pytest.mark.parametrize("base", [0, 17, 2**31 + 5])
def test_a_framed_tensor_is_what_torch_load_reads(
    shape: tuple[int, ...], dtype: str, base: int
) -> None:
    kind = {"BF16": torch.bfloat16, "F32": torch.float32, "F16": torch.float16}[dtype]
    tensor = torch.randn(shape).to(kind)
    raw = bytes(tensor.reshape(-1).view(torch.uint8).numpy())
    head, tail = frame(dtype, shape, 0x1234, base)
    assert (base + len(head)) % 64 == 0
    assert len(head) + len(raw) + len(tail) == framed_length(dtype, shape, base)
    found = torch.load(io.BytesIO(head + raw + tail), weights_only=True)
    assert found.dtype == kind
    assert torch.equal(found, tensor)


def test_torch_reads_the_table_of_contents_as_we_do(release: Path) -> None:
    ours = metadata.load(release / ".metadata")
    theirs = FileSystemReader(release).read_metadata()
    assert set(theirs.state_dict_metadata) == set(ours.tensors) | set(ours.objects)
    for key, entry in ours.tensors.items():
        stored = theirs.state_dict_metadata[key]
        assert tuple(stored.size) == entry.shape
        assert [tuple(c.offsets) for c in stored.chunks] == [b.offsets for b in entry.boxes]
    assert len(theirs.storage_data) == len(ours.objects) + sum(
        len(t.boxes) for t in ours.tensors.values()
    )


def test_what_torch_pickles_we_read(release: Path, tmp_path: Path) -> None:
    theirs = FileSystemReader(release).read_metadata()
    for protocol in (2, 4, pickle.HIGHEST_PROTOCOL):
        (tmp_path / ".metadata").write_bytes(pickle.dumps(theirs, protocol=protocol))
        assert metadata.load(tmp_path / ".metadata") == metadata.load(release / ".metadata")


def test_both_forms_of_the_common_state_are_there(release: Path) -> None:
    """Megatron-Core up to 0.16 opens common.pt; 0.19 reads an object inside a .distcp file."""
    assert torch.load(release / "common.pt", weights_only=True) == COMMON
    entry = open_torch_dist(release).metadata.objects["common_state/shard_0_1"]
    raw = (release / entry.file).read_bytes()[entry.offset : entry.offset + entry.length]
    assert torch.load(io.BytesIO(raw), weights_only=True) == [COMMON]


def test_a_chunk_that_torch_saved_is_read(tmp_path: Path) -> None:
    """With its zip64 records and a view into a larger storage."""
    big = torch.arange(24, dtype=torch.bfloat16).view(4, 6)
    stream = io.BytesIO()
    torch.save(big[1:3], stream)
    raw = stream.getvalue()
    (tmp_path / "a.distcp").write_bytes(b"pad" + raw)
    box = metadata.Box((0, 0), (2, 6), "a.distcp", 3, len(raw))
    table = metadata.Metadata({"a": metadata.TensorEntry("BF16", (2, 6), (box,))}, {})
    found = BoxReader(TorchDist(tmp_path, table)).rows("a", (), 0, 2)
    assert found.tobytes() == bytes(big[1:3].contiguous().reshape(-1).view(torch.uint8).numpy())
    reader = BoxReader(TorchDist(tmp_path, table))
    crc, stated = reader.crc("a", table.tensors["a"], box)
    assert crc == stated
