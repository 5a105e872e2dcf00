"""`data demo`: from a folder of the user's own, and again without work."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import Result

from moe_bench.data.inspection import inspect_dataset

type Data = Callable[..., Result]


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    folder = tmp_path / "mine"
    folder.mkdir()
    for name in ("one", "two"):
        paragraphs = [f"{name}: paragraph {n * 7919} says {n**5} again. " * 20 for n in range(30)]
        (folder / f"{name}.txt").write_text("\n\n".join(paragraphs))
    return folder


@pytest.mark.parametrize(
    ("tokenizer", "kind", "vocab_size"),
    [("bytes", "NullTokenizer", 257), ("bpe-400", "HuggingFaceTokenizer", 400)],
)
def test_demo_from_own_text_says_how_to_train(
    data: Data, corpus: Path, tmp_path: Path, tokenizer: str, kind: str, vocab_size: int
):
    options = ["--corpus", corpus, "--output", tmp_path / "cache", "--tokenizer", tokenizer]
    first = data("demo", *options)
    found = json.loads(first.output.splitlines()[-1])
    assert (found["tokenizer_type"], found["vocab_size"]) == (kind, vocab_size)
    inspection = inspect_dataset(Path(found["data_prefix"]), tokenizer=None, first=9, verify=True)
    assert inspection.num_documents == found["documents"] >= 8
    assert data("demo", *options, "--json").output == first.output.splitlines()[-1] + "\n"


def test_the_same_text_gives_the_same_tokenizer(data: Data, corpus: Path, tmp_path: Path):
    for name in ("a", "b"):
        data("demo", "--corpus", corpus, "--output", tmp_path / name, "--tokenizer", "bpe-400")
    one, two = (sorted((tmp_path / name).glob("*-tokenizer/*")) for name in ("a", "b"))
    assert len(one) == 2
    assert [path.read_bytes() for path in one] == [path.read_bytes() for path in two]


def test_a_damaged_dataset_is_made_anew(data: Data, corpus: Path, tmp_path: Path):
    options = ["--corpus", corpus, "--output", tmp_path / "cache", "--json"]
    prefix = Path(json.loads(data("demo", *options).output)["data_prefix"])
    tokens = prefix.with_name(prefix.name + ".bin")
    whole = tokens.read_bytes()
    tokens.write_bytes(whole[:100])
    data("demo", *options)
    assert tokens.read_bytes() == whole


def test_without_an_index_it_names_the_ways_out(tmp_path: Path):
    pip = tmp_path / "uv"
    pip.write_text("#!/bin/sh\necho 'no route to host' >&2\nexit 1\n")
    pip.chmod(0o755)
    interpreter = tmp_path / "python"
    interpreter.symlink_to(sys.executable)
    script = (
        "import sys; from moe_bench.data import corpus; from moe_bench.cli.main import main;"
        f"sys.executable = {str(interpreter)!r};"
        f"sys.argv = ['moe_bench', 'data', 'demo', '--output', {str(tmp_path / 'cache')!r}]; main()"
    )
    result = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert result.returncode == 2
    assert "no route to host" in result.stderr
    for way_out in ("MOE_BENCH_CORPUS", "DATA_PATH", "--mock-data"):
        assert way_out in result.stderr
    assert "Traceback" not in result.stderr


def test_it_refuses_what_it_cannot_make(data: Data, tmp_path: Path):
    assert "bpe-4096" in str(data("demo", "--tokenizer", "gpt2").exception)
    assert "300 to 65000" in str(data("demo", "--tokenizer", "bpe-7").exception)
    assert "no folder with .txt" in str(data("demo", "--corpus", tmp_path).exception)
