"""A model YAML is read as written, with lines; what would be misread is refused."""

from __future__ import annotations

import pytest

from moe_bench.config.model_file import parse
from moe_bench.errors import ConfigError


def test_values_keep_their_spelling_and_line() -> None:
    text = "ENV_VARS:\n  A: 010\nMODEL_ARGS:\n  --lr: 1e-06  # why\n  --bf16: true\n  --split: 99,1,0\n  --x: 'a: b'\n"
    found = parse(text, name="X.yaml")
    assert [(entry.name, entry.words, entry.place) for entry in found.model_args] == [
        ("--lr", ("1e-06",), "X.yaml:4"),
        ("--bf16", ("true",), "X.yaml:5"),
        ("--split", ("99,1,0",), "X.yaml:6"),
        ("--x", ("a: b",), "X.yaml:7"),
    ]
    assert found.env_vars[0].words == ("010",)


def test_a_list_keeps_its_items() -> None:
    (entry,) = parse("MODEL_ARGS:\n  --recompute-modules: [mlp, moe]\n", name="X").model_args
    assert entry.words == ("mlp", "moe")


def test_an_empty_section_is_none_at_all() -> None:
    assert parse("ENV_VARS:\nMODEL_ARGS:\n  --a: 1\n", name="X").env_vars == ()


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("MODEL_ARGS:\n  --a: 1\n  --b: 2\n  --a: 3\n", "X:4: --a is already set in line 2"),
        (
            "MODEL_ARGS:\n  --a: 1\nMODEL_ARGS:\n  --b: 1\n",
            "X:3: MODEL_ARGS is already set in line 1",
        ),
        ("MODEL_ARGS:\n\t--a: 1\n", "indent with spaces, not tabs"),
        ("MODEL_ARGS:\n  --a: [1\n", "not readable as YAML"),
        ("MODEL_ARGS:\n  --a: {b: c}\n", "X:2: --a must be a value or a list"),
        ("MODEL_ARGS:\n  --a: [[1]]\n", "list of plain values"),
        ("MODEL_ARGS:\n  --a: []\n", "at least one item"),
        ("MODEL_ARGS:\n  --a:\n", "X:2: --a has no value; write true"),
        ("MODEL_ARGS:\n  a: 1\n", "X:2: 'a' is not a Megatron flag"),
        ("MODEL_ARGS:\n  --a=1: 1\n", "'--a=1' is not a Megatron flag"),
        ("MODEL_ARGS: 3\n", "MODEL_ARGS must be a mapping"),
        ("MODEL_ARGS:\n- --a\n", "MODEL_ARGS must be a mapping"),
        ("ENV_VARS:\n  A: 1\n", "no MODEL_ARGS"),
        ("ENV_VARS:\n  A B: 1\nMODEL_ARGS:\n  --a: 1\n", "not the name of an environment variable"),
        (
            "ENV_VAR:\n  A: 1\nMODEL_ARGS:\n  --a: 1\n",
            "X:1: unknown section 'ENV_VAR'; did you mean ENV_VARS?",
        ),
        ("MODEL_ARGS: &x\n  --a: 1\nENV_VARS:\n  <<: *x\n", "X:4: keys must be plain names"),
        ("", "must be a mapping"),
        ("[1, 2]", "must be a mapping"),
        ("just words", "must be a mapping"),
        ("MODEL_ARGS:\n  --a: \x07\n", "X"),
    ],
)
def test_a_file_of_another_shape_is_refused_with_its_line(text: str, said: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, name="X")
    assert said in str(caught.value)
