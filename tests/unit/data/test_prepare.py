"""`data prepare`: every input form, every failure, any number of processes."""

from __future__ import annotations

import gzip
import hashlib
import json
import os
import resource
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import zstandard
from click.testing import Result

from moe_bench.data import (
    documents as documents_module,
    prepare as prepare_module,
    sources as sources_module,
)
from moe_bench.data.indexed import open_dataset, token_dtype
from moe_bench.data.store import PartialStore

type Data = Callable[..., Result]


def texts_of(prefix: Path) -> list[str]:
    """Decode a byte-level dataset, document by document."""
    dataset = open_dataset(prefix)
    ends = np.cumsum(dataset.lengths)
    return [
        bytes(int(i) for i in dataset.tokens[end - length : end] if i < 256).decode()
        for end, length in zip(ends, dataset.lengths, strict=True)
    ]


def error_of(result: Result) -> str:
    assert result.exception is not None, result.output
    assert getattr(result.exception, "exit_code", None) == 2
    return str(result.exception)


def prepare(data: Data, *inputs: object, output: Path, stdin: bytes | None = None) -> Result:
    return data("prepare", *inputs, "--output", output, "--tokenizer", "bytes", stdin=stdin)


def test_every_text_comes_back(data: Data, jsonl: Path, documents: list[str], tmp_path: Path):
    prepare(data, jsonl, output=tmp_path / "out")
    assert texts_of(tmp_path / "out") == documents


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, "uint16"), (65_500, "int32")])
def test_a_vocabulary_takes_the_width_that_megatron_gives_it(vocab_size: int, dtype: str) -> None:
    """DType.optimal_dtype of megatron/core/datasets/indexed_dataset.py."""
    assert token_dtype(vocab_size) == np.dtype(dtype)


@pytest.mark.parametrize("compress", [gzip.compress, zstandard.compress])
def test_compressed_input_gives_the_same_bytes(
    data: Data, jsonl: Path, tmp_path: Path, compress: Callable[[bytes], bytes]
):
    suffix = ".gz" if compress is gzip.compress else ".zst"
    half = len(jsonl.read_bytes()) // 2
    raw = jsonl.read_bytes()
    packed = tmp_path / ("in2.jsonl" + suffix)
    packed.write_bytes(compress(raw[:half]) + compress(raw[half:]))
    prepare(data, jsonl, output=tmp_path / "plain")
    prepare(data, packed, output=tmp_path / "packed")
    for end in (".bin", ".idx"):
        assert (tmp_path / f"plain{end}").read_bytes() == (tmp_path / f"packed{end}").read_bytes()


def test_standard_input_gives_the_same_bytes(data: Data, jsonl: Path, tmp_path: Path):
    prepare(data, jsonl, output=tmp_path / "file")
    prepare(data, "-", "--format", "jsonl", output=tmp_path / "stdin", stdin=jsonl.read_bytes())
    assert (tmp_path / "file.bin").read_bytes() == (tmp_path / "stdin.bin").read_bytes()


def test_the_number_of_workers_does_not_change_a_byte(
    data: Data, jsonl: Path, bpe_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(documents_module, "UNIT_BYTES", 5000)
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 1000)
    for workers in (1, 2, 3):
        result = data(
            "prepare", jsonl, "--output", tmp_path / f"w{workers}", "--tokenizer", bpe_folder,
            "--append-eod", "--workers", workers,
        )  # fmt: skip
        assert result.exit_code == 0, result.exception
    for end in (".bin", ".idx"):
        one, two, three = ((tmp_path / f"w{n}{end}").read_bytes() for n in (1, 2, 3))
        assert one == two == three


def test_units_of_any_size_give_the_same_bytes(
    data: Data, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    prepare(data, jsonl, output=tmp_path / "big")
    monkeypatch.setattr(documents_module, "UNIT_BYTES", 1)
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 100)
    prepare(data, jsonl, output=tmp_path / "small")
    assert (tmp_path / "big.bin").read_bytes() == (tmp_path / "small.bin").read_bytes()
    assert (tmp_path / "big.idx").read_bytes() == (tmp_path / "small.idx").read_bytes()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--text", "file"], ["one\nstill one\n\ntwo\n\n\n\nthree\n"]),
        (["--text", "line"], ["one", "still one", "two", "three"]),
        (["--text", "paragraph"], ["one\nstill one", "two", "three"]),
        (["--document-separator", "two"], ["one\nstill one", "\n\nthree"]),
    ],
)
def test_text_modes(data: Data, tmp_path: Path, options: list[str], expected: list[str]):
    source = tmp_path / "a.txt"
    source.write_bytes(b"\xef\xbb\xbfone\r\nstill one\r\n\r\ntwo\n\n \t\n\nthree\n")
    body = source.read_bytes()
    assert b"\r\n" in body
    result = prepare(data, source, *options, "--on-error", "skip", output=tmp_path / "o")
    assert result.exit_code == 0, result.exception
    found = texts_of(tmp_path / "o")
    assert [text.replace(" \t\n", "\n") for text in found] == expected


@pytest.mark.parametrize("size", [1, 2, 3, 7, 50])
def test_paragraphs_do_not_depend_on_where_units_are_cut(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: int
):
    source = tmp_path / "a.txt"
    source.write_text("\n \nfirst\nline\n\n  \n   indented\n\n\n\nlast  \n \n\n")
    monkeypatch.setattr(documents_module, "UNIT_BYTES", size)
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", size)
    prepare(data, source, "--text", "paragraph", output=tmp_path / "o")
    assert texts_of(tmp_path / "o") == ["first\nline", "   indented", "last  "]


def test_a_folder_is_read_in_order_and_names_what_it_ignored(data: Data, tmp_path: Path):
    folder = tmp_path / "texts"
    (folder / "sub").mkdir(parents=True)
    (folder / "b.txt").write_text("b")
    (folder / "a.jsonl").write_text('{"text": "a"}\n')
    (folder / "sub" / "c.md").write_text("c")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    result = prepare(data, folder, output=tmp_path / "o")
    assert texts_of(tmp_path / "o") == ["a", "b", "c"]
    assert "not text, not read: 1 file(s)" in result.output
    assert "picture.png" in result.output


BAD_LINES = {
    b'{"text": "bad \xff byte"}': "not UTF-8",
    b'{"text": ': "not JSON",
    b"[1, 2]": "not a JSON object",
    b'{"txt": "x"}': "key missing",
    b'{"text": 17}': "text is not a string",
    b'{"text": ""}': "empty document",
    b'{"text": "\\ud800"}': "lone surrogate",
    b"[" * 100_000: "not JSON",
}


@pytest.mark.parametrize(("line", "reason"), BAD_LINES.items(), ids=range(len(BAD_LINES)))
def test_a_bad_line_is_an_error_that_names_file_and_line(
    data: Data, tmp_path: Path, line: bytes, reason: str
):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "ok"}\n\n' + line + b'\n{"text": "also ok"}\n')
    message = error_of(prepare(data, source, output=tmp_path / "o"))
    assert message.startswith(f"{source}:3: {reason}: ")
    assert "--on-error skip" in message
    assert not (tmp_path / "o.idx").exists()


def test_skipped_documents_are_counted_and_listed(data: Data, tmp_path: Path):
    source = tmp_path / "in.jsonl"
    source.write_bytes(b'{"text": "ok"}\n' + b"\n".join(BAD_LINES) + b'\n{"text": "also ok"}')
    result = prepare(data, source, "--on-error", "skip", output=tmp_path / "o")
    assert texts_of(tmp_path / "o") == ["ok", "also ok"]
    manifest = json.loads((tmp_path / "o.json").read_text())
    assert sum(manifest["skipped"].values()) == len(BAD_LINES)
    assert manifest["skipped"]["not JSON"] == 2
    listed = [json.loads(line) for line in (tmp_path / "o.skipped.jsonl").open()]
    assert [one["reason"] for one in listed] == list(BAD_LINES.values())
    assert [one["line"] for one in listed] == list(range(2, 2 + len(BAD_LINES)))
    assert f"left out {len(BAD_LINES)}" in result.output


@pytest.mark.parametrize("form", ["gz", "zst"])
def test_a_cut_off_archive_is_an_error_or_a_counted_skip(data: Data, tmp_path: Path, form: str):
    compress = gzip.compress if form == "gz" else zstandard.compress
    source = tmp_path / f"cut.jsonl.{form}"
    # Random text: archives of repetitive text are too small to lose only their end.
    noise = np.random.default_rng(1).integers(32, 127, 400_000, dtype=np.uint8)
    lines = [json.dumps({"text": bytes(part).decode()}) for part in np.split(noise, 400)]
    source.write_bytes(compress("\n".join(lines).encode())[:-1000])
    message = error_of(prepare(data, source, output=tmp_path / "o"))
    assert "cut off" in message
    assert str(source) in message
    prepare(data, source, "--on-error", "skip", "--restart", output=tmp_path / "o")
    kept = texts_of(tmp_path / "o")
    assert 0 < len(kept) < 400
    assert kept == [json.loads(line)["text"] for line in lines[: len(kept)]]
    manifest = json.loads((tmp_path / "o.json").read_text())
    assert manifest["skipped"] == {"source damaged or cut off": 1}


def test_a_line_longer_than_allowed_is_bounded(data: Data, tmp_path: Path):
    source = tmp_path / "in.jsonl"
    long_line = b'{"text": "' + b"x" * (3 << 20) + b'"}\n'
    source.write_bytes(b'{"text": "a"}\n' + long_line + b'{"text": "b"}\n')
    limits = ["--max-document-mib", "1"]
    message = error_of(prepare(data, source, *limits, output=tmp_path / "o"))
    assert f"{source}:2: document too long" in message
    result = prepare(
        data, source, *limits, "--on-error", "skip", "--restart", output=tmp_path / "o"
    )
    assert result.exit_code == 0, result.exception
    assert texts_of(tmp_path / "o") == ["a", "b"]


def test_a_full_disk_is_an_error_and_the_run_resumes(data: Data, jsonl: Path, tmp_path: Path):
    prepare(data, jsonl, output=tmp_path / "whole")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        message = error_of(prepare(data, jsonl, output=tmp_path / "o"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "cannot be written" in message
    assert "same command" in message
    assert prepare(data, jsonl, output=tmp_path / "o").exit_code == 0
    assert (tmp_path / "o.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_a_target_that_is_no_folder_is_an_error(data: Data, jsonl: Path, tmp_path: Path):
    (tmp_path / "file").write_text("")
    message = error_of(prepare(data, jsonl, output=tmp_path / "file" / "o"))
    assert "cannot be written" in message


def test_unreadable_and_missing_inputs_are_named(data: Data, jsonl: Path, tmp_path: Path):
    assert "no-such" in error_of(prepare(data, tmp_path / "no-such.txt", output=tmp_path / "o"))
    empty = tmp_path / "empty"
    empty.mkdir()
    assert "holds no text" in error_of(prepare(data, empty, output=tmp_path / "o"))
    assert "given twice" in error_of(prepare(data, jsonl, jsonl, output=tmp_path / "o"))
    odd = tmp_path / "data.parquet"
    odd.write_bytes(b"PAR1")
    assert "--format" in error_of(prepare(data, odd, output=tmp_path / "o"))
    assert "no document" in error_of(prepare(data, _blank(tmp_path), output=tmp_path / "o"))


def test_a_pipe_given_as_a_file_loses_nothing_unseen(data: Data, tmp_path: Path):
    pipe = tmp_path / "pipe.jsonl"
    os.mkfifo(pipe)
    message = error_of(prepare(data, pipe, output=tmp_path / "o"))
    assert f"{pipe}: is a pipe or a device" in message
    assert "--format" in message


def test_the_text_itself_is_never_written_over(data: Data, tmp_path: Path):
    source = tmp_path / "corpus.json"
    source.write_text('{"text": "mine"}\n')
    for more in ((), ("--overwrite",)):
        message = error_of(prepare(data, source, *more, output=tmp_path / "corpus"))
        assert f"would write over the input {source}" in message
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "other"}\n')
    message = error_of(prepare(data, other, "--overwrite", output=tmp_path / "corpus"))
    assert f"its manifest over {source}, which is another file" in message
    assert source.read_text() == '{"text": "mine"}\n'


@pytest.mark.parametrize("text", ['[{"text": "a"}]', '[\n{"text": "a"}\n]'])
def test_one_json_array_is_told_how_to_become_lines(data: Data, tmp_path: Path, text: str):
    source = tmp_path / "in.json"
    source.write_text(text)
    assert "jq -c '.[]' FILE" in error_of(prepare(data, source, output=tmp_path / "o"))


def test_many_small_files_cost_the_ledger_nothing_each(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(prepare_module, "COMMIT_INTERVAL_S", 0.0)
    monkeypatch.setattr(PartialStore, "remove", PartialStore.close)
    folder = tmp_path / "files"
    folder.mkdir()
    for number in range(200):
        (folder / f"{number}.txt").write_text(f"text {number}")
    assert prepare(data, folder, "--workers", 1, output=tmp_path / "o").exit_code == 0
    lines = (tmp_path / "o.partial" / "ledger.jsonl").read_bytes().splitlines()
    assert len(lines[-1]) < len(lines[0]) + 50
    sources = json.loads((tmp_path / "o.json").read_text())["sources"]
    found = {Path(one["name"]).name: one["sha256"] for one in sources}
    assert found["105.txt"] == hashlib.sha256(b"text 105").hexdigest()


def _blank(folder: Path) -> Path:
    path = folder / "blank.jsonl"
    path.write_text("\n\n")
    return path


def test_a_finished_dataset_is_not_made_again_nor_overwritten(
    data: Data, jsonl: Path, tmp_path: Path
):
    prepare(data, jsonl, output=tmp_path / "o")
    before = (tmp_path / "o.idx").stat().st_mtime_ns
    assert "already there" in prepare(data, jsonl, output=tmp_path / "o").output
    assert (tmp_path / "o.idx").stat().st_mtime_ns == before
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "other"}\n')
    assert "--overwrite" in error_of(prepare(data, other, output=tmp_path / "o"))
    prepare(data, other, "--overwrite", output=tmp_path / "o")
    assert texts_of(tmp_path / "o") == ["other"]


def test_an_unfinished_run_with_other_options_is_refused(data: Data, tmp_path: Path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "ok"}\nbad\n')
    error_of(prepare(data, source, output=tmp_path / "o"))
    message = error_of(prepare(data, source, "--append-eod", output=tmp_path / "o"))
    assert "begun with other --append-eod;" in message
    assert "--restart" in message


def test_several_keys_give_one_dataset_each(data: Data, tmp_path: Path):
    source = tmp_path / "in.jsonl"
    source.write_text('{"q": "why", "a": "so"}\n{"q": "who", "a": "me"}\n')
    prepare(data, source, "--json-key", "q", "--json-key", "a", output=tmp_path / "o")
    assert texts_of(tmp_path / "o_q_document") == ["why", "who"]
    assert texts_of(tmp_path / "o_a_document") == ["so", "me"]


def test_an_end_token_that_no_one_named_is_an_error(
    data: Data, jsonl: Path, bpe_folder: Path, tmp_path: Path
):
    bare = tmp_path / "tokenizer.json"
    bare.write_bytes((bpe_folder / "tokenizer.json").read_bytes())
    result = data("prepare", jsonl, "--output", tmp_path / "o", "--tokenizer", bare, "--append-eod")
    assert "names no end token" in error_of(result)


def test_tokenizers_that_cannot_be_used_are_named(data: Data, jsonl: Path, tmp_path: Path):
    broken = tmp_path / "tokenizer.json"
    broken.write_text("{}")
    bad_model = tmp_path / "x.model"
    bad_model.write_text("no model")
    for spec in ("nonsense", broken, bad_model, tmp_path / "in.jsonl"):
        result = data("prepare", jsonl, "--output", tmp_path / "o", "--tokenizer", spec)
        assert str(spec) in error_of(result)


def test_few_documents_are_said_to_be_few(data: Data, tmp_path: Path):
    book = tmp_path / "book.txt"
    book.write_text("\n\n".join(f"paragraph {number}" for number in range(60)))
    call = ("prepare", book, "--output", tmp_path / "o", "--tokenizer", "bytes")
    said = data(*call).output.splitlines()[-1]
    assert said.startswith("few documents: --split 99,1,0 needs 51 or more")
    assert "--text paragraph" in said
    assert "--split 100,0,0 --eval-iters 0" in said
    again = data(*call, "--overwrite", "--text", "paragraph")
    assert "documents 60" in again.output
    assert "few documents" not in again.output


@pytest.mark.parametrize("output", ["", ".", "/", "..", "x/.."])
def test_an_output_without_a_name_is_refused(data: Data, jsonl: Path, output: str):
    result = data("prepare", jsonl, "--output", output, "--tokenizer", "bytes")
    assert "is a folder, where the prefix of a .bin/.idx pair must be" in error_of(result)


def test_an_empty_input_is_not_the_current_folder(
    data: Data, jsonl: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.chdir(jsonl.parent)
    result = data("prepare", "", "--output", tmp_path / "o", "--tokenizer", "bytes")
    assert "an input is empty" in error_of(result)
