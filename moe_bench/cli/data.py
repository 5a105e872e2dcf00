"""`python -m moe_bench data`: text to Megatron's indexed datasets."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from moe_bench.errors import DataError


@click.group()
def command() -> None:
    """Turn text into data that Megatron trains on; look at such data."""


@command.command()
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@click.option(
    "--output",
    required=True,
    type=click.Path(path_type=Path),
    help="Prefix of the .bin, .idx and .json to write.",
)
@click.option(
    "--tokenizer",
    required=True,
    help="`bytes`, a folder with tokenizer.json, a tokenizer.json, or a SentencePiece .model.",
)
@click.option(
    "--format",
    "form",
    type=click.Choice(["jsonl", "text"]),
    help="Form of the inputs; by default their suffixes tell.",
)
@click.option(
    "--json-key",
    "--json-keys",
    "json_keys",
    multiple=True,
    default=("text",),
    show_default=True,
    help="Key of the text in JSONL; repeat it for one output each.",
)
@click.option(
    "--text",
    "text_mode",
    type=click.Choice(["file", "paragraph", "line"]),
    default="file",
    show_default=True,
    help="What a document is in plain text: a whole file, what blank lines divide, or a line.",
)
@click.option(
    "--document-separator", help="String that divides documents in plain text, instead of --text."
)
@click.option(
    "--append-eod/--no-append-eod",
    default=False,
    show_default=True,
    help="End each document with the tokenizer's end token.",
)
@click.option(
    "--keep-empty",
    is_flag=True,
    help="Keep an entry without tokens for an empty document, as Megatron's own tool does.",
)
@click.option(
    "--on-error",
    type=click.Choice(["fail", "skip"]),
    default="fail",
    show_default=True,
    help="Stop at a document that cannot be used, or leave it out, list it and count it.",
)
@click.option(
    "--workers",
    type=click.IntRange(min=1),
    help="Processes; by default one for each core. The output does not depend on it.",
)
@click.option(
    "--max-document-mib",
    type=click.IntRange(min=1),
    default=64,
    show_default=True,
    help="Longest document.",
)
@click.option("--licence", help="Licence of the text, for the manifest.")
@click.option("--overwrite", is_flag=True, help="Replace another dataset of this name.")
@click.option("--restart", is_flag=True, help="Forget an unfinished preparation of this name.")
@click.option("--json", "as_json", is_flag=True, help="Print the manifest as JSON.")
def prepare(**options: Any) -> None:
    """Turn text or JSONL (plain, .gz, .zst; files, folders, - for stdin) into PREFIX.bin and PREFIX.idx.

    Interrupted at any moment, the same command goes on where it was; the output's bytes are the same. Sentences are not
    split: GPT training does not use them.
    """
    from moe_bench.data.prepare import prepare as make
    from moe_bench.data.progress import Meter

    preparation = _preparation(options)
    sources = preparation.inputs.sources
    known = all(source.path for source in sources)
    with Meter(total_raw_bytes=sum(s.size for s in sources) if known else None) as meter:
        prepared = make(preparation, meter)
    if options["as_json"]:
        click.echo(json.dumps(prepared.manifest))
        return
    rate = meter.text_bytes / 1e6 / max(meter.elapsed_s, 1e-9)
    for line in _summary(prepared.manifest, preparation.output):
        click.echo(line)
    if prepared.already_there:
        click.echo("already there: made from the same inputs, with the same options")
    else:
        click.echo(f"{meter.elapsed_s:.1f} s, {rate:.2f} MB/s with {preparation.workers} worker(s)")
    if few := _too_few(preparation):
        click.echo(few)


def _preparation(options: dict[str, Any]) -> Any:
    from moe_bench.data.documents import UNIT_BYTES, DocumentRules
    from moe_bench.data.encode import EncodingRules
    from moe_bench.data.prepare import Preparation, available_cores
    from moe_bench.data.sources import find_sources

    _refuse_nameless(options["output"], "--output ")
    skip = options["on_error"] == "skip"
    keys = tuple(key for given in options["json_keys"] for key in given.split())
    if options["document_separator"] == "":
        raise DataError("--document-separator: is empty; give the string between documents")
    if len(set(keys)) != len(keys) or not keys:
        raise DataError(f"--json-key: {' '.join(keys)!r} names a key twice or none")
    rules = EncodingRules(
        tokenizer=options["tokenizer"],
        documents=DocumentRules(
            json_keys=keys,
            text_mode=options["text_mode"],
            separator=options["document_separator"],
            max_document_bytes=max(options["max_document_mib"] << 20, UNIT_BYTES),
        ),
        append_eod=options["append_eod"],
        keep_empty=options["keep_empty"],
    )
    return Preparation(
        inputs=find_sources(options["inputs"], form=options["form"], skip_duplicates=skip),
        output=options["output"],
        rules=rules,
        skip_problems=skip,
        workers=options["workers"] or available_cores(),
        licence=options["licence"],
        overwrite=options["overwrite"],
        restart=options["restart"],
    )


def _refuse_nameless(prefix: Path, option: str) -> None:
    """`.` and `/` name folders; `--output ''` is read as `.`."""
    if prefix.name in {"", ".."}:
        raise DataError(
            f"{option}{prefix}: is a folder, where the prefix of a .bin/.idx pair must be; add a name: {prefix / 'text'}"
        )


def _too_few(preparation: Any) -> str | None:
    from moe_bench.data.index_header import index_path, read_header
    from moe_bench.data.split import FEWEST_FOR_USUAL, USUAL

    rules = preparation.rules.documents
    indexes = [index_path(preparation.prefix_of(key)) for key in rules.json_keys]
    count = min(read_header(index).num_sequences for index in indexes)
    if count >= FEWEST_FOR_USUAL:
        return None
    forms = {source.form for source in preparation.inputs.sources}
    more = "cut text into more with --text paragraph or line (and --overwrite)"
    return (
        f"few documents: --split {USUAL} needs {FEWEST_FOR_USUAL} or more, and leaves none of {count} to validate on; "
        f"{more if 'text' in forms else 'add more'}, or train with --split 100,0,0 --eval-iters 0"
    )


def _summary(manifest: dict[str, Any], output: Path) -> list[str]:
    tokenizer = manifest["tokenizer"]
    names = [str(output.with_name(entry["prefix"])) for entry in manifest["outputs"].values()]
    lines = [
        f"wrote {', '.join(names)} (.bin, .idx) and {output}.json",
        f"documents {manifest['documents']:,}, tokens {manifest['tokens']:,}, text {manifest['text_bytes']:,} bytes",
    ]
    skipped = manifest["skipped"]
    if skipped:
        counts = ", ".join(f"{count} {reason}" for reason, count in skipped.items())
        lines.append(
            f"left out {sum(skipped.values())}: {counts} (each one in {output}.skipped.jsonl)"
        )
    else:
        lines.append("left out 0")
    if manifest["blank_lines"]:
        lines.append(f"blank lines {manifest['blank_lines']} (no documents)")
    for key, title in (
        ("ignored_files", "not text, not read"),
        ("duplicate_files", "given twice, read once"),
    ):
        if manifest[key]:
            lines.append(f"{title}: {len(manifest[key])} file(s): {', '.join(manifest[key][:5])}")
    new, old = (" ".join(tokenizer[f"megatron_arguments{age}"]) for age in ("", "_before_0.18"))
    lines.append(f"train on it with: --data-path {names[0]} {new}")
    if new != old:
        lines.append(f"with Megatron-Core 0.11 to 0.17: --data-path {names[0]} {old}")
    return lines


@command.command()
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path(__file__).parents[2] / ".cache" / "corpus",
    help="Folder for what is fetched and made.  [default: .cache/corpus in the project]",
)
@click.option(
    "--tokenizer",
    default="bytes",
    show_default=True,
    help="`bytes`, or `bpe-N`: a BPE of N tokens trained on the corpus.",
)
@click.option(
    "--corpus",
    envvar="MOE_BENCH_CORPUS",
    type=click.Path(path_type=Path),
    help="Folder of .txt files to use instead of Shakespeare  [env: MOE_BENCH_CORPUS]",
)
@click.option("--json", "as_json", is_flag=True, help="Print one line of JSON alone.")
def demo(output: Path, tokenizer: str, corpus: Path | None, as_json: bool) -> None:
    """Prepare a small real English corpus (once), and say how to train on it."""
    from moe_bench.data.demo import DemoRequest, find_demo

    request = DemoRequest(output=output, tokenizer=tokenizer, corpus=corpus)
    found = find_demo(request)
    if found is None:
        from moe_bench.data.corpus import build_demo

        found = build_demo(request)
    if not as_json:
        click.echo(
            f"{found['documents']:,} documents, {found['tokens']:,} tokens at {found['data_prefix']}"
        )
        click.echo(
            f"train on it with: --data-path {found['data_prefix']} {' '.join(found['tokenizer_args'])}"
        )
    click.echo(json.dumps(found))


@command.command()
@click.argument("prefix", type=click.Path(path_type=Path))
@click.option("--tokenizer", help="As in `prepare`; by default the manifest tells.")
@click.option(
    "--first", type=click.IntRange(min=0), default=40, show_default=True, help="Tokens to show."
)
@click.option("--verify", is_flag=True, help="Also compare both files with the manifest's SHA-256.")
def inspect(prefix: Path, tokenizer: str | None, first: int, verify: bool) -> None:
    """Show what PREFIX.bin and PREFIX.idx hold, after checking that they are whole."""
    from moe_bench.data.inspection import inspect_dataset

    if prefix.suffix in {".bin", ".idx"}:
        prefix = prefix.with_suffix("")
    _refuse_nameless(prefix, "")
    found = inspect_dataset(prefix, tokenizer=tokenizer, first=first, verify=verify)
    click.echo(
        f"{prefix}: {found.num_documents:,} documents, {found.num_tokens:,} tokens of {found.dtype}"
    )
    click.echo(
        f"sequences {found.num_sequences:,}, of {found.shortest:,} to {found.longest:,} tokens; empty documents {found.empty_documents:,}"
    )
    click.echo(f"largest id {found.largest_id:,}")
    click.echo(f"first ids: {' '.join(map(str, found.first_ids))}")
    click.echo(
        f"first text: {found.first_text!r}"
        if found.first_text is not None
        else "first text: unknown tokenizer; name it with --tokenizer"
    )
    if found.manifest is not None:
        for line in _summary(found.manifest, prefix)[1:]:
            click.echo(line)
    click.echo(
        "whole: sizes, offsets and hashes agree"
        if found.verified
        else "whole: sizes and offsets agree"
    )
