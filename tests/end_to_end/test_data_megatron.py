"""What `data prepare` writes, against Megatron's own tokenizers, builder, tool and dataset."""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import sentencepiece
from click.testing import CliRunner
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moe_bench.cli.data import command
from moe_bench.data.split import shares_of

WORDS = """the of and Größe naïve 東京 🙂 fox's dog, don't {x: 1} 3.14159 ÿ \u0301e A. b; "Q" -- I'll""".split()
WORDS += [
    "",
    " ",
    "\n\n",
    "two\ttabs",
    "line\r\nbreaks\n",
    "end.\n\n\n  indented",
    "\u00a0hard",
    "\u3000wide",
]
CHECKOUT = os.environ.get("MEGATRON_LM_CHECKOUT")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


@pytest.fixture(scope="module")
def jsonl(folder: Path) -> Path:
    """Texts of all shapes, lists of sentences among them."""
    generator = random.Random(5)
    path = folder / "in.jsonl"
    with path.open("w") as target:
        for number in range(400):
            text = " ".join(generator.choices(WORDS, k=generator.randrange(1, 300)))
            value = [text, "second sentence"] if number % 50 == 7 else text
            target.write(json.dumps({"text": value}, ensure_ascii=number % 2 == 0) + "\n")
    return path


@pytest.fixture(scope="module")
def tokenizers(folder: Path, jsonl: Path) -> dict[str, str]:
    lines = [json.dumps(json.loads(line)["text"]) for line in jsonl.open()]
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=special, initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(lines, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    (folder / "bpe").mkdir()
    bpe.save(str(folder / "bpe" / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (folder / "bpe" / "tokenizer_config.json").write_text(json.dumps(config))
    for kind in ("bpe", "unigram"):
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(lines),
            model_prefix=str(folder / kind),
            vocab_size=250 if kind == "unigram" else 500,
            model_type=kind,
            byte_fallback=kind == "bpe",
            character_coverage=1.0,
            hard_vocab_limit=False,
            minloglevel=2,
        )
    return {
        "bytes": "bytes",
        "huggingface": str(folder / "bpe"),
        "sentencepiece-bpe": str(folder / "bpe.model"),
        "sentencepiece-unigram": str(folder / "unigram.model"),
    }


def prepared(folder: Path, jsonl: Path, tokenizer: str, name: str) -> tuple[Path, list[str]]:
    """Our dataset, and the flags it says to train with."""
    output = folder / f"ours-{name}"
    call = ["prepare", str(jsonl), "--output", str(output), "--tokenizer", tokenizer]
    result = CliRunner().invoke(command, [*call, "--append-eod", "--json", "--workers", "1"])
    assert result.exit_code == 0, result.exception
    return output, json.loads(result.stdout)["tokenizer"]["megatron_arguments"]


def megatron_tokenizer(arguments: list[str]) -> Any:
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.arguments import _add_tokenizer_args

    parsed = _add_tokenizer_args(argparse.ArgumentParser()).parse_args(arguments)
    parsed.rank, parsed.make_vocab_size_divisible_by, parsed.tensor_model_parallel_size = 1, 128, 1
    return build_tokenizer(parsed)


def ids_of(tokenizer: Any, name: str, text: str) -> list[int]:
    """Megatron has no command-line tokenizer for bytes: they are their own ids."""
    return list(text.encode()) if name == "bytes" else tokenizer.tokenize(text)


@pytest.mark.parametrize(
    "name", ["bytes", "huggingface", "sentencepiece-bpe", "sentencepiece-unigram"]
)
def test_bytes_are_those_of_megatrons_tokenizer_and_builder(
    folder: Path, jsonl: Path, tokenizers: dict[str, str], name: str
):
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    ours, arguments = prepared(folder, jsonl, tokenizers[name], name)
    tokenizer = megatron_tokenizer(arguments)
    theirs = folder / f"theirs-{name}"
    builder = IndexedDatasetBuilder(
        f"{theirs}.bin", dtype=DType.optimal_dtype(tokenizer.vocab_size)
    )
    for line in jsonl.open():
        value = json.loads(line)["text"]
        parts = [
            ids_of(tokenizer, name, one) for one in ([value] if isinstance(value, str) else value)
        ]
        parts[-1].append(tokenizer.eod)
        builder.add_document([i for part in parts for i in part], list(map(len, parts)))
    builder.finalize(f"{theirs}.idx")
    for end in (".bin", ".idx"):
        assert Path(f"{ours}{end}").read_bytes() == Path(f"{theirs}{end}").read_bytes()


def test_a_vocabulary_of_65500_is_stored_as_megatron_would():
    from megatron.core.datasets.indexed_dataset import DType

    from moe_bench.data.indexed import token_dtype

    for size in (257, 65499, 65500, 200_000):
        assert token_dtype(size) == np.dtype(DType.optimal_dtype(size))


def test_split_divides_as_megatrons_does():
    from megatron.core.datasets.blended_megatron_dataset_config import (
        convert_split_vector_to_split_matrix,
        parse_and_normalize_split,
    )

    generator = random.Random(2)
    drawn = [",".join(str(generator.randrange(1000) / 10) for _ in range(3)) for _ in range(2000)]
    for split in ("969, 30, 1", "99,1,0", "90,5,5", "0,1,1", "1,0,1", "100", "0.5,.5", *drawn):
        theirs = convert_split_vector_to_split_matrix(parse_and_normalize_split(split))
        assert shares_of(split) == tuple(theirs), split


def test_megatrons_dataset_reads_it_and_agrees_on_the_end_token(
    folder: Path, jsonl: Path, tokenizers: dict[str, str]
):
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig

    prefix, arguments = prepared(folder, jsonl, tokenizers["bytes"], "bytes")
    tokenizer = megatron_tokenizer(arguments)
    assert (tokenizer.vocab_size, tokenizer.eod) == (257, 256)
    config = GPTDatasetConfig(
        random_seed=1,
        sequence_length=4096,
        blend=([str(prefix)], None),
        split="90,10,0",
        reset_position_ids=True,
        reset_attention_mask=False,
        eod_mask_loss=True,
        tokenizer=tokenizer,
        path_to_cache=str(folder / "cache"),
        mid_level_dataset_surplus=0.005,
    )
    train, valid, _ = BlendedMegatronDatasetBuilder(
        GPTDataset, [20, 2, 0], lambda: True, config
    ).build()
    assert len(train) >= 20
    assert len(valid) >= 2
    sample = train[0]
    ends = (sample["tokens"] == 256).nonzero().flatten()
    assert len(ends) > 0
    assert sample["position_ids"][ends[0] + 1] == 0
    assert (sample["loss_mask"][ends] == 0).all()


@pytest.mark.skipif(CHECKOUT is None, reason="MEGATRON_LM_CHECKOUT names no Megatron-LM checkout")
@pytest.mark.parametrize("name", ["huggingface", "sentencepiece-bpe", "sentencepiece-unigram"])
@pytest.mark.parametrize("append_eod", [True, False])
def test_bytes_are_those_of_megatrons_tool(
    folder: Path, jsonl: Path, tokenizers: dict[str, str], name: str, append_eod: bool
):
    option = ["--append-eod"] if append_eod else []
    output = folder / f"tool-{name}-{append_eod}"
    call = [
        "prepare",
        str(jsonl),
        "--output",
        str(output),
        "--tokenizer",
        tokenizers[name],
        *option,
    ]
    made = CliRunner().invoke(command, [*call, "--json", "--workers", "1"])
    arguments = json.loads(made.stdout)["tokenizer"]["megatron_arguments"]
    tool = [sys.executable, f"{CHECKOUT}/tools/preprocess_data.py", "--input", str(jsonl)]
    subprocess.run(
        [*tool, "--output-prefix", f"{output}-theirs", "--workers", "2", *arguments, *option],
        check=True,
        capture_output=True,
        timeout=300,
    )
    for end in (".bin", ".idx"):
        theirs = Path(f"{output}-theirs_text_document{end}")
        assert Path(f"{output}{end}").read_bytes() == theirs.read_bytes()
