"""Encoding by remembered pieces gives the library's own ids, whatever the text."""

from __future__ import annotations

import json
import random
import re
import string
from collections.abc import Callable
from pathlib import Path

import pytest
import sentencepiece
from hypothesis import given, settings, strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

from moe_bench.data.pieces import KNOWN_SPLITS, PieceCache
from moe_bench.data.tokenizer import HuggingFaceTokenizer, SentencePieceTokenizer

WORDS = """the The fox's I'll don't 'tis end. stop! (a) "b" -- x=1; 3.14159 12345 a1b2 Größe naïve e\u0301 \u0301 東京 カナ 🙂 👩‍🚀
\ufeff _ ' \u2581 \u2581a a\u2581b <s> </s> < > {} ///  \u200b ÿ ﬁ Ⅷ ½ ١٢ \u0149""".split()
SPACES = [
    " ",
    "  ",
    "   ",
    "\n",
    "\n\n",
    " \n",
    "\n ",
    "\r\n",
    "\t",
    "\u00a0",
    "\u3000",
    "\x0b",
    "\x1c",
    "\x85",
    "",
    "",
]
TEXTS = st.lists(st.sampled_from(WORDS + SPACES * 4) | st.text(max_size=3), max_size=30).map(
    "".join
)


def corpus() -> list[str]:
    generator = random.Random(1)
    return ["".join(generator.choices(WORDS + SPACES * 2, k=60)) for _ in range(300)]


def split_by(name: str) -> pre_tokenizers.PreTokenizer:
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    kinds = {
        "llama": [one for one in KNOWN_SPLITS if r"|\p{N}{1,3}|" in one],
        "qwen": [one for one in KNOWN_SPLITS if r"|\p{N}|" in one],
        "deepseek": [
            *(
                one
                for one in KNOWN_SPLITS
                if one in (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+")
            ),
            *(one for one in KNOWN_SPLITS if one.startswith("[!")),
        ],
    }
    splits = [pre_tokenizers.Split(Regex(one), "isolated") for one in kinds[name]]
    assert splits
    return pre_tokenizers.Sequence([*splits, byte_level])


@pytest.fixture(scope="module", params=["gpt2", "gpt2 with NFC", "llama", "qwen", "deepseek"])
def fast(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    bpe = Tokenizer(models.BPE())
    if request.param.startswith("gpt2"):
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.normalizer = normalizers.NFC() if "NFC" in request.param else None
    else:
        bpe.pre_tokenizer = split_by(request.param)
    trainer = trainers.BpeTrainer(
        vocab_size=900,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(corpus(), trainer)
    path = tmp_path_factory.mktemp("fast") / "tokenizer.json"
    bpe.save(str(path))
    return path


@pytest.fixture(scope="module", params=["with byte fallback", "without"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    prefix = tmp_path_factory.mktemp("sp") / "m"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*corpus(), string.ascii_letters + string.punctuation]),
        model_prefix=str(prefix),
        vocab_size=700,
        model_type="bpe",
        byte_fallback=request.param == "with byte fallback",
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        character_coverage=1.0,
        allow_whitespace_only_pieces=True,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def test_every_kind_is_cut_into_pieces(fast: Path, model: Path):
    assert HuggingFaceTokenizer(fast)._pieces is not None
    assert SentencePieceTokenizer(model)._pieces is not None


def lists(encode: Callable, texts: list[str]) -> list[list[int]]:
    ids, counts = encode(texts)
    ends = counts.cumsum()
    return [ids[end - count : end].tolist() for end, count in zip(ends, counts, strict=True)]


def test_huggingface_ids_are_the_librarys(fast: Path):
    ours, library = HuggingFaceTokenizer(fast), Tokenizer.from_file(str(fast))

    @settings(max_examples=100, deadline=None)
    @given(st.lists(TEXTS, max_size=4))
    def same(texts: list[str]) -> None:
        assert lists(ours.encode, texts) == [library.encode(text).ids for text in texts]

    same()


def test_sentencepiece_ids_are_the_librarys(model: Path):
    ours = SentencePieceTokenizer(model)
    library = sentencepiece.SentencePieceProcessor(model_file=str(model))

    @settings(max_examples=100, deadline=None)
    @given(st.lists(TEXTS, max_size=4))
    def same(texts: list[str]) -> None:
        assert lists(ours.encode, texts) == [library.encode(text) for text in texts]

    same()


def test_tokenizers_of_which_nothing_is_known_are_not_cut(fast: Path, tmp_path: Path):
    definition = json.loads(fast.read_text())
    changes = [
        {"normalizer": {"type": "NFKC"}},
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": None},
    ]  # fmt: skip
    for change in changes:
        path = tmp_path / "tokenizer.json"
        path.write_text(json.dumps(definition | change))
        assert HuggingFaceTokenizer(path)._pieces is None, change


def test_unigram_models_are_not_cut(tmp_path: Path):
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(corpus()), model_prefix=str(tmp_path / "u"), vocab_size=300,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    assert SentencePieceTokenizer(tmp_path / "u.model")._pieces is None


def test_the_memory_of_pieces_is_bounded(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("moe_bench.data.pieces.CACHE_CHARACTERS", 500)
    cache = PieceCache(re.compile("[a-z0-9]+"), lambda piece: [len(piece)])
    for number in range(300):
        assert cache.ids_of([f"w{number} {'x' * 100}"]) == [[len(f"w{number}"), 100]]
        assert sum(map(len, cache._ids)) < 600
