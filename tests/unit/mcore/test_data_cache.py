"""Runs that share --data-cache-path: none reads an index that another is writing."""

from __future__ import annotations

import contextlib
import io
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

numpy = pytest.importorskip("numpy")
pytest.importorskip("torch")
pytest.importorskip("megatron.core")

from megatron.core.datasets.blended_dataset import BlendedDataset  # noqa: E402
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig, MockGPTDataset  # noqa: E402
from megatron.core.datasets.utils import Split  # noqa: E402

from moe_bench.errors import DataError  # noqa: E402
from moe_bench.mcore.patches import NO_ENDLESS_COUNT, WHOLE_INDEX_FILES  # noqa: E402

FILES = 3 + 2
"""Indices of a dataset and of a blend."""


class NoTokenizer:
    """All that Megatron asks of a tokenizer for mock data."""

    unique_identifiers = ("none",)
    vocab_size = 128
    eod = 0


def config_of(cache: Path) -> GPTDatasetConfig:
    return GPTDatasetConfig(
        random_seed=1,
        sequence_length=64,
        split="1,0,0",
        path_to_cache=str(cache),
        tokenizer=NoTokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
    )


def build(cache: Path) -> list[Any]:
    """The indices of Megatron's own datasets: built and saved, or those of the cache."""
    config = config_of(cache)
    low_level = MockGPTDataset.build_low_level_dataset("", config)
    documents = numpy.arange(64, dtype=numpy.int32)
    part = MockGPTDataset(low_level, "", documents, 100, Split.train, config)
    blend = BlendedDataset([part, part], [0.5, 0.5], 150, config)
    own = [part.document_index, part.sample_index, part.shuffle_index]
    return [*own, blend.dataset_index, blend.dataset_sample_index]


Meanwhile = dict[int, Callable[[], None]]


@pytest.fixture
def half_saved(monkeypatch: pytest.MonkeyPatch) -> Iterator[Meanwhile]:
    """What is put in under N happens when half of the Nth index is on the disk."""
    meanwhile: Meanwhile = {}
    numbers = itertools.count()
    save = numpy.save

    def in_halves(file: Any, array: Any, **options: Any) -> None:
        whole = io.BytesIO()
        save(whole, array, **options)
        data = whole.getvalue()
        with contextlib.ExitStack() as stack:
            stream = file
            if isinstance(file, str):
                stream = stack.enter_context(Path(file).open("wb"))
            stream.write(data[: len(data) // 2])
            stream.flush()
            meanwhile.get(next(numbers), lambda: None)()
            stream.write(data[len(data) // 2 :])

    monkeypatch.setattr(numpy, "save", in_halves)
    with contextlib.ExitStack() as stack:
        for patch in WHOLE_INDEX_FILES:
            stack.enter_context(patch.applied())
        yield meanwhile


@pytest.mark.parametrize("number", range(FILES))
def test_a_run_that_starts_while_another_saves_an_index_gets_the_same_indices(
    number: int, half_saved: Meanwhile, tmp_path: Path
) -> None:
    found: list[list[Any]] = []
    half_saved[number] = lambda: found.append(build(tmp_path))
    built = build(tmp_path)
    [others] = found
    for mine, theirs, cached in zip(built, others, build(tmp_path), strict=True):
        assert mine.tolist() == theirs.tolist() == cached.tolist()


@pytest.mark.parametrize("number", range(FILES))
def test_a_run_that_ends_in_the_middle_of_a_save_leaves_nothing_that_another_would_read(
    number: int, half_saved: Meanwhile, tmp_path: Path
) -> None:
    def fill_the_disk() -> None:
        raise OSError("no space is left")

    half_saved[number] = fill_the_disk
    with pytest.raises(OSError, match="no space is left"):
        build(tmp_path)
    assert len([path for path in tmp_path.iterdir() if path.suffix != ".txt"]) == number
    again = build(tmp_path)
    assert len(list(tmp_path.glob("*.npy"))) == FILES
    for mine, cached in zip(again, build(tmp_path), strict=True):
        assert mine.tolist() == cached.tolist()


@pytest.mark.timeout(60)  # Megatron's own count has no end
def test_a_share_without_tokens_is_an_error_and_no_endless_count(tmp_path: Path) -> None:
    config = config_of(tmp_path)
    low_level = MockGPTDataset.build_low_level_dataset("", config)
    low_level.path_prefix = "my/text"
    none = numpy.arange(0, dtype=numpy.int32)
    said = "my/text: --split leaves no token for its valid share"
    with NO_ENDLESS_COUNT.applied(), pytest.raises(DataError, match=said):
        MockGPTDataset(low_level, "", none, 100, Split.valid, config)
