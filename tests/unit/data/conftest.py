"""Small inputs, tokenizers trained on the spot, and the verb as a function."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from click.testing import CliRunner, Result
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

from moe_bench.cli.data import command
from moe_bench.errors import MoeBenchError

SENTENCES = [
    "The quick brown fox jumps over the lazy dog.",
    "Größe, naïveté, 東京 and 🙂 are not ASCII.",
    "  Leading space, tabs\tand\r\nline breaks stay within a JSON string. ",
    "A",
    "Nothing is but what is not; and all our yesterdays have lighted fools the way to dusty death.",
]


@pytest.fixture
def documents() -> list[str]:
    """700 texts of 1 to 900 characters: several units once repeated."""
    return [" ".join(SENTENCES[: 1 + i % 5]) * (1 + i % 3) + str(i) for i in range(700)]


@pytest.fixture
def jsonl(tmp_path: Path, documents: list[str]) -> Path:
    path = tmp_path / "in.jsonl"
    path.write_text("".join(json.dumps({"text": one, "n": 1}) + "\n" for one in documents))
    return path


@pytest.fixture(scope="session")
def bpe_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Hugging Face folder that starts each text with <s>."""
    folder = tmp_path_factory.mktemp("bpe")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(SENTENCES, trainer)
    bpe.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    bpe.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "</s>", "bos_token": "<s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="session")
def sentencepiece_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("sp") / "tokenizer"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES * 20),
        model_prefix=str(prefix),
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


@pytest.fixture
def data() -> Callable[..., Result]:
    """Run `data VERB ...`; a user's error is the result's exception."""

    def run(*arguments: object, stdin: bytes | None = None) -> Result:
        result = CliRunner().invoke(command, [str(one) for one in arguments], input=stdin)
        if result.exception is not None and not isinstance(
            result.exception, MoeBenchError | SystemExit
        ):
            raise result.exception
        return result

    return run
