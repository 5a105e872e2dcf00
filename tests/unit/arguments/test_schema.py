import sys
from pathlib import Path

import pytest

from moe_bench.arguments import schema
from moe_bench.arguments.findings import Finding, raise_errors
from moe_bench.arguments.flags import Flags
from moe_bench.arguments.schema.extract import extract
from moe_bench.arguments.schema.flag_schema import OLD
from moe_bench.arguments.schema.renames import renames
from moe_bench.config.run import Origin, Setting
from moe_bench.errors import ArgumentsError

LINES = ("0.11", "0.12", "0.13", "0.14", "0.15", "0.16", "0.17", "0.18", "0.19")
ORIGIN = Origin(layer="model", place="model_configs/benchmarking/X.yaml:7")


def check(release: str, flag: str, *words: str) -> list[Finding]:
    value = Setting(value=" ".join(words) or "true", origin=ORIGIN, words=words or None)
    return schema.load(release).check({flag: value})


def only(found: list[Finding]) -> Finding:
    (finding,) = found
    return finding


def test_the_table_covers_every_release_line_from_0_11_to_0_19() -> None:
    assert schema.release_lines() == LINES


@pytest.mark.parametrize(
    ("flag", "lines"),
    [
        ("--num-experts", LINES),
        ("--moe-enable-deepep", LINES[1:]),
        ("--moe-router-padding-for-fp8", LINES[2:]),
        ("--overlap-moe-expert-parallel-comm", LINES[3:]),
        ("--moe-flex-dispatcher-backend", LINES[5:]),
        ("--cuda-graph-modules", LINES[7:]),
        ("--moe-extended-tp", LINES[:6]),
        ("--use-custom-fsdp", ("0.12", "0.13")),
        ("--moe-extended-ep", ()),
    ],
)
def test_each_flag_is_in_exactly_the_releases_whose_parser_has_it(
    flag: str, lines: tuple[str, ...]
) -> None:
    assert schema.releases_with(flag) == lines


def test_a_patch_release_is_its_line() -> None:
    assert schema.load("0.19.2").flags == schema.load("0.19").flags


def test_a_release_outside_the_table_says_how_to_go_on() -> None:
    with pytest.raises(ArgumentsError, match=r"MCORE_RELEASE_VERSION=0\.10\.0.*MEGATRON_PATH"):
        schema.load("0.10.0")


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--num-layers", ("32",)),
        ("--lr", ("1e-4",)),
        ("--bf16", ()),
        ("--moe-layer-freq", ("([0]*3+[1]*58)",)),
        ("--moe-layer-freq", ("2",)),
        ("--data-path", ("0.3", "a", "0.7", "b")),
        ("--rampup-batch-size", ("16", "16", "1000")),
        ("--exit-signal", ("SIGTERM",)),
        ("--attention-backend", ("flash",)),
        ("--moe-router-load-balancing-type", ("aux_loss", "seq_aux_loss")),
        ("--no-gradient-accumulation-fusion", ()),
    ],
)
def test_what_the_parser_takes_is_accepted(flag: str, words: tuple[str, ...]) -> None:
    assert check("0.19.2", flag, *words) == []


@pytest.mark.parametrize(
    ("flag", "words", "said"),
    [
        ("--num-layers", ("many",), "'many' is not a whole number"),
        ("--num-layers", ("32.0",), "'32.0' is not a whole number"),
        ("--num-layers", (), "needs exactly one value and has none"),
        ("--num-layers", ("1", "2"), "needs exactly one value and has 2"),
        ("--lr", ("fast",), "'fast' is not a number"),
        ("--bf16", ("yes",), "takes no value, but has 'yes'"),
        ("--moe-layer-freq", ("[0]*3;import",), "list expression"),
        ("--rampup-batch-size", ("1", "2"), "exactly 3 values and has 2"),
        ("--moe-token-dispatcher-type", ("altoall",), "not one of allgather, alltoall, flex"),
        ("--exit-signal", ("SIGFOO",), "not a signal"),
        ("--attention-backend", ("fast",), "not one of flash"),
    ],
)
def test_what_the_parser_refuses_is_refused_with_its_place(
    flag: str, words: tuple[str, ...], said: str
) -> None:
    finding = only(check("0.19.2", flag, *words))
    assert finding.severity == "error"
    assert finding.place == ORIGIN.place
    assert said in finding.reason


def test_choices_are_those_of_the_release() -> None:
    assert check("0.12.0", "--moe-token-dispatcher-type", "flex") == []
    assert only(check("0.11.0", "--moe-token-dispatcher-type", "flex")).rule == "bad-value"


@pytest.mark.parametrize(
    ("flag", "fix"),
    [
        ("--tp", "TP is a knob: write TP=... before the command"),
        ("--seq-len", "SEQ_LEN is a knob: write SEQ_LEN=... before the command"),
        ("--tensor_model_parallel_size", "write --tensor-model-parallel-size"),
    ],
)
def test_another_spelling_of_what_there_is_gets_the_right_one(flag: str, fix: str) -> None:
    finding = only(check("0.19.2", flag, "2"))
    assert (finding.severity, finding.fix) == ("error", fix)


def test_a_secret_given_as_a_flag_is_refused_without_its_value() -> None:
    finding = only(check("0.19.2", "--wandb-api-key", "hunter2"))
    assert "--wandb-api-key" in str(finding)
    assert "hunter2" not in str(finding)


def test_a_misspelt_flag_names_the_nearest() -> None:
    finding = only(check("0.19.2", "--moe-routr-topk", "8"))
    assert (finding.severity, finding.rule) == ("error", "unknown-flag")
    assert "did you mean --moe-router-topk" in finding.fix


def test_an_abbreviation_is_an_error_with_the_full_name() -> None:
    finding = only(check("0.19.2", "--expert-tensor-parallel-si", "1"))
    assert "no abbreviations" in finding.reason
    assert finding.fix == "write --expert-tensor-parallel-size"


def test_a_flag_of_a_newer_release_names_the_releases_that_have_it() -> None:
    finding = only(check("0.11.0", "--mtp-num-layers", "1"))
    assert "0.12 to 0.19 have it" in finding.reason


@pytest.mark.parametrize(
    ("release", "flag", "now"),
    [
        ("0.19.2", "--use-custom-fsdp", "--use-megatron-fsdp"),
        ("0.16.1", "--cuda-graph-modules", "--cuda-graph-scope"),
        ("0.15.3", "--moe-flex-dispatcher-backend", "--moe-enable-deepep"),
        ("0.15.3", "--moe-router-padding-for-quantization", "--moe-router-padding-for-fp8"),
        ("0.18.2", "--moe-extended-tp", "--expert-tensor-parallel-size"),
    ],
)
def test_a_renamed_flag_names_the_spelling_of_this_release(
    release: str, flag: str, now: str
) -> None:
    finding = only(check(release, flag))
    assert (finding.severity, finding.rule) == ("error", "renamed-flag")
    assert now in finding.fix


@pytest.mark.parametrize("line", LINES)
def test_the_guides_extended_ep_is_left_out_aloud_in_every_release(line: str) -> None:
    finding = only(check(line, "--moe-extended-ep"))
    assert (finding.severity, finding.rule) == ("warning", "removed-flag")
    assert schema.load(line).harmless_without("--moe-extended-ep") is not None


def test_a_removed_flag_that_meant_something_is_an_error() -> None:
    finding = only(check("0.18.2", "--use-legacy-models"))
    assert (finding.severity, finding.rule) == ("error", "removed-flag")


def test_a_flag_megatron_refuses_though_it_parses_it_is_an_error() -> None:
    finding = only(check("0.19.2", "--batch-size", "8"))
    assert (finding.severity, finding.rule) == ("error", "deprecated-flag")
    assert "--micro-batch-size" in finding.fix


def test_two_spellings_of_one_thing_that_differ_are_an_error() -> None:
    setting = Setting(value="10", origin=ORIGIN)
    other = Setting(value="20", origin=ORIGIN)
    known = schema.load("0.19.2")
    found = known.check({"--save-interval": setting, "--persistent-save-interval": other})
    assert only(found).rule == "said-twice"
    assert known.check({"--save-interval": setting, "--persistent-save-interval": setting}) == []


def test_several_errors_are_told_at_once() -> None:
    known = schema.load("0.19.2")
    wrong = {
        "--nmu-layers": Setting(value="1", origin=ORIGIN),
        "--lr": Setting(value="x", origin=ORIGIN),
    }
    with pytest.raises(ArgumentsError, match="2 settings cannot be used"):
        raise_errors(known.check(wrong))


def test_every_flag_of_the_rename_table_is_or_was_a_flag() -> None:
    known = {flag for line in LINES for flag in schema.load(line).flags} | {"--moe-extended-ep"}
    table = renames()
    named = {flag for entry in table.same for flag in entry.flags}
    named |= {entry.flag for entry in table.gone} | {entry.flag for entry in table.deprecated}
    assert named - known == set()


def test_the_deprecated_flags_of_the_table_are_those_looked_for() -> None:
    assert {entry.flag for entry in renames().deprecated} == OLD


def test_reading_the_installed_megatron_gives_the_shipped_table() -> None:
    root = next(
        (Path(p) for p in sys.path if (Path(p) / "megatron/training/arguments.py").is_file()), None
    )
    if root is None:
        pytest.skip("megatron-core is not installed")
    found = extract(root)
    shipped = schema.load(found.release).flags
    assert found.unread == ()
    assert {spec.options: spec for spec in found.flags} == {
        spec.options: spec for spec in shipped.values() if spec.needs != "nvidia-modelopt"
    }


ARGUMENTS = """
import argparse
from megatron.core.enums import Backend
from megatron.core.config import TrainConfig
from megatron.training.argument_utils import ArgumentGroupFactory

def parse_args(extra_args_provider=None):
    parser = argparse.ArgumentParser(allow_abbrev=False)
    parser = _add_args(parser)
    return parser.parse_args()

def _add_args(parser):
    group = parser.add_argument_group(title="network")
    group.add_argument("--num-layers", type=int, default=None)
    group.add_argument("--backend", type=lambda name: Backend[name], choices=list(Backend), default=Backend.flash)
    group.add_argument("--mystery", choices=compute_choices())
    ArgumentGroupFactory(TrainConfig, exclude=["hidden"]).build_group(parser, "training")
    return parser
"""
CONFIG = '''
from dataclasses import dataclass, field
from typing import Literal, Optional
@dataclass
class Base:
    seed: int = 1234
@dataclass
class TrainConfig(Base):
    fused: bool = True
    fast: bool = False
    style: Literal["cosine", "linear"] = "cosine"
    sizes: Optional[list[int]] = field(default=None, metadata={"argparse_meta": {"nargs": 3}})
    hidden: int = 0
'''  # fmt: skip


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A tree with a parser that declares flags in each way Megatron does."""
    for name, text in {
        "training/arguments.py": ARGUMENTS,
        "core/config.py": CONFIG,
        "core/enums.py": "import enum\nclass Backend(enum.Enum):\n    flash = 1\n    fused = 2\n",
        "core/package_info.py": "MAJOR = 0\nMINOR = 21\nPATCH = 3\n",
    }.items():
        path = tmp_path / "megatron" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path


def test_a_checkout_of_an_unknown_release_says_its_own_flags(checkout: Path) -> None:
    known = schema.schema_for(checkout)
    assert known.release == "0.21.3"
    assert known.flags["--backend"].choices == ("flash", "fused")
    assert known.flags["--backend"].default == "flash"
    assert known.flags["--seed"].type == "int"
    assert known.flags["--sizes"].nargs == "3"
    assert known.flags["--style"].choices == ("cosine", "linear")
    assert known.flags["--no-fused"].kind == "false"
    assert known.flags["--disable-fused"].dest == "fused"
    assert known.is_switch("--fast")
    assert not known.knows("--hidden")


def test_a_checkout_that_only_the_container_has_is_read_through_its_mount(checkout: Path) -> None:
    def knob(value: str) -> Setting:
        return Setting(value=value, origin=Origin(layer="environment", place="environment"))

    inside = {
        "MCORE_RELEASE_VERSION": knob("0.19"),
        "MEGATRON_PATH": knob(f"/opt/{checkout.name}"),
        "CONTAINER_MOUNTS": knob(f"/data:/data,{checkout.parent}:/opt:ro"),
    }
    assert Flags.of_release(inside).known == schema.schema_for(checkout)
    assert Flags.of_release({**inside, "CONTAINER_MOUNTS": knob("/data:/data")}).known.stands_in


def test_what_only_running_would_tell_is_listed_and_softens_unknown_flags(checkout: Path) -> None:
    known = schema.schema_for(checkout)
    assert [line for line in known.unread if "compute_choices" in line] == list(known.unread)
    found = known.check({"--from-a-plugin": Setting(value="1", origin=ORIGIN)})
    assert only(found).severity == "warning"


def test_a_checkouts_flags_are_kept_until_one_of_its_files_changes(
    checkout: Path, tmp_path: Path
) -> None:
    cache = tmp_path / "cache"
    before = schema.schema_for(checkout, cache_dir=cache)
    kept = next(cache.glob("*.json"))
    assert schema.schema_for(checkout, cache_dir=cache) == before
    config = checkout / "megatron" / "core" / "config.py"
    config.write_text(config.read_text() + "    brand_new: int = 5\n")
    assert schema.schema_for(checkout, cache_dir=cache).knows("--brand-new")
    kept.write_text("torn")
    assert schema.schema_for(checkout, cache_dir=cache).knows("--brand-new")


def test_a_folder_that_is_no_checkout_says_so(tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match="not a Megatron-LM checkout"):
        schema.schema_for(tmp_path)
