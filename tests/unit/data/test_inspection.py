"""`data inspect`: what a dataset holds, and every way it can be damaged."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from moe_bench.errors import DataError

type Data = Callable[..., Result]


@pytest.fixture
def prefix(data: Data, jsonl: Path, tmp_path: Path) -> Path:
    path = tmp_path / "v1.0"
    data("prepare", jsonl, "--output", path, "--tokenizer", "bytes", "--append-eod")
    return path


def test_it_counts_and_decodes(data: Data, prefix: Path, documents: list[str]):
    output = data("inspect", prefix, "--verify").output
    tokens = sum(len(one.encode()) + 1 for one in documents)
    assert f"{len(documents):,} documents, {tokens:,} tokens of uint16" in output
    assert repr(documents[0][:30])[1:-1] in output
    assert "whole: sizes, offsets and hashes agree" in output
    assert "--tokenizer-type NullTokenizer --vocab-size 257" in output


def damage_tokens(prefix: Path) -> Path:
    path = Path(f"{prefix}.bin")
    path.write_bytes(path.read_bytes()[:-2])
    return path


def damage_index_end(prefix: Path) -> Path:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:-2])
    return path


def damage_index_head(prefix: Path) -> Path:
    path = Path(f"{prefix}.idx")
    path.write_bytes(path.read_bytes()[:20])
    return path


def damage_magic(prefix: Path) -> Path:
    path = Path(f"{prefix}.idx")
    path.write_bytes(b"X" + path.read_bytes()[1:])
    return path


def damage_offset(prefix: Path) -> Path:
    path = Path(f"{prefix}.idx")
    raw = bytearray(path.read_bytes())
    raw[-700 * 8 - 100] ^= 1
    path.write_bytes(raw)
    return path


def remove_tokens(prefix: Path) -> Path:
    path = Path(f"{prefix}.bin")
    path.unlink()
    return path


@pytest.mark.parametrize(
    "damage",
    [
        damage_tokens,
        damage_index_end,
        damage_index_head,
        damage_magic,
        damage_offset,
        remove_tokens,
    ],
)
def test_damage_is_found_and_named(data: Data, prefix: Path, damage: Callable[[Path], Path]):
    path = damage(prefix)
    result = data("inspect", prefix)
    assert getattr(result.exception, "exit_code", None) == 2
    assert str(path) in str(result.exception)


def test_a_dataset_of_several_keys_finds_the_manifest_they_share(data: Data, tmp_path: Path):
    source = tmp_path / "my_data.jsonl"
    source.write_text('{"the_text": "one", "n": "two"}\n')
    keys = ("--json-key", "the_text", "--json-key", "n", "--tokenizer", "bytes")
    data("prepare", source, *keys, "--output", tmp_path / "my_data")
    (tmp_path / "my.json").write_text('{"text": "another file"}\n')
    found = data("inspect", tmp_path / "my_data_the_text_document", "--verify")
    assert "sizes, offsets and hashes agree" in found.output
    assert "first text: 'one'" in found.output


def test_a_dataset_beside_a_file_of_its_name_can_be_looked_at(data: Data, prefix: Path):
    Path(f"{prefix}.json").write_text('{"text": "what it was made of"}\n')
    found = data("inspect", prefix, "--tokenizer", "bytes")
    assert found.exit_code == 0, found.exception


def test_a_flipped_token_is_found_by_its_hash(data: Data, prefix: Path):
    path = Path(f"{prefix}.bin")
    raw = bytearray(path.read_bytes())
    raw[0] ^= 1
    path.write_bytes(raw)
    assert data("inspect", prefix).exit_code == 0
    assert "SHA-256" in str(data("inspect", prefix, "--verify").exception)


def test_another_tokenizer_with_fewer_ids_is_refused(
    data: Data, jsonl: Path, bpe_folder: Path, tmp_path: Path
):
    data("prepare", jsonl, "--output", tmp_path / "o", "--tokenizer", bpe_folder)
    assert data("inspect", tmp_path / "o").exit_code == 0
    result = data("inspect", tmp_path / "o", "--tokenizer", "bytes")
    assert "another tokenizer" in str(result.exception)


@pytest.mark.parametrize("prefix", ["", ".", "/", ".."])
def test_a_folder_is_no_dataset(data: Data, prefix: str):
    result = data("inspect", prefix)
    assert isinstance(result.exception, DataError)
    assert "is a folder, where the prefix" in str(result.exception)
