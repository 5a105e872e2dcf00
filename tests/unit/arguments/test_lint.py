import importlib.util
import re
from importlib import metadata
from pathlib import Path

import msgspec
import pytest

from moe_bench.arguments import compiled, lint as lint_module, schema
from moe_bench.arguments.conditions import Condition, flags_in, matches
from moe_bench.arguments.findings import Finding
from moe_bench.arguments.lint import (
    BUILTIN,
    Rule,
    all_rules,
    builtin_rules,
    lint,
    packages_here,
    read_rules,
    versions_here,
)
from moe_bench.arguments.schema.renames import RENAMES, Renames, read_renames
from moe_bench.config.gather import MODELS, RUNTIME
from moe_bench.config.knobs import KNOBS
from moe_bench.errors import ConfigError, MoeBenchError
from tests.support.lint_cases import BASE, CASES, laid_over, packages_of, run_of, versions_of
from tests.support.projects import Project
from tests.support.runs import make_run

RULES = {rule.name: rule for rule in builtin_rules()}


def findings(*texts: str, rules: tuple[Rule, ...] | None = None) -> list[Finding]:
    settings = laid_over(BASE, *texts)
    known, has = schema.load(settings["mcore"]), packages_of(settings)
    return lint(run_of(settings), known, versions_of(settings), rules, has)


def names(found: list[Finding]) -> set[str]:
    return {finding.rule for finding in found}


def test_what_is_compiled_is_what_the_yaml_says() -> None:
    edited = "lint_rules.yaml or renames.yaml has changed: python tools/compile_rules.py"
    assert compiled.load(BUILTIN, tuple[Rule, ...]) == read_rules(BUILTIN, "builtin"), edited
    assert compiled.load(RENAMES, Renames) == read_renames(), edited


def test_an_edited_yaml_is_read_in_place_of_what_was_compiled_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    edited = tmp_path / "lint_rules.yaml"
    edited.write_text(
        BUILTIN.read_text().replace("name: permute-fusion", "name: our-permute-fusion")
    )
    edited.with_suffix(".json").write_bytes(BUILTIN.with_suffix(".json").read_bytes())
    monkeypatch.setattr(lint_module, "BUILTIN", edited)
    builtin_rules.cache_clear()
    try:
        assert "our-permute-fusion-needs-te-2.1" in {rule.name for rule in builtin_rules()}
    finally:
        builtin_rules.cache_clear()


def test_every_rule_has_a_case_and_every_case_a_rule() -> None:
    assert set(CASES) == set(RULES)


@pytest.mark.parametrize("name", CASES)
def test_the_rule_speaks_at_its_case_and_is_silent_once_mended(name: str) -> None:
    fires, mended = CASES[name]
    found = [finding for finding in findings(fires) if finding.rule == name]
    assert [finding.severity for finding in found] == [RULES[name].severity]
    assert name not in names(findings(fires, mended))


def test_no_rule_is_kept_from_speaking_by_a_check_before_it(tmp_path: Path) -> None:
    project = Project(tmp_path)
    project.write(RUNTIME, "")
    base = {name: value for name, value in laid_over(BASE).items() if name.startswith("--")}
    lines = (f"  {flag}: {value or 'true'}\n" for flag, value in base.items())
    project.write(f"{MODELS}/Tiny-Test.yaml", "MODEL_ARGS:\n" + "".join(lines))
    silent = [name for name in CASES if RULES[name].reason not in _said(project, CASES[name][0])]
    assert [name for name in silent if not _lacks_what_is_here(RULES[name])] == []


def _lacks_what_is_here(rule: Rule) -> bool:
    packages = [one.lacks for one in rule.when if one.lacks is not None]
    return any(importlib.util.find_spec(package) is not None for package in packages)


def _said(project: Project, fires: str) -> str:
    """Errors and notes of the case as a user would ask for it: flags, variables, a release."""
    settings = {"mcore": "0.19.2", "te": "2.9.0", "torch": "2.11.0", "compute": "9.0"}
    settings |= laid_over(fires)
    gpu = {"8.0": "a100", "9.0": "h100", "10.0": "b200"}.get(settings["compute"], "h100")
    given = {"MCORE_RELEASE_VERSION": settings["mcore"], "GPU_ARCH": gpu, "NNODES": "1"}
    given |= {"TE_VERSION": settings["te"], "TORCH_VERSION": settings["torch"]}
    given |= {name: value for name, value in settings.items() if name.isupper()}
    flags = {name: value for name, value in settings.items() if name.startswith("--")}
    gone = [part.strip()[1:] for part in fires.split(";") if part.strip().startswith("!--")]
    flags |= dict.fromkeys(gone, "false")
    words = [word for name, value in flags.items() for word in (name, *value.split())]
    try:
        return "\n".join(project.resolve(given, words, local="lacks" in settings).notes)
    except MoeBenchError as error:
        return str(error)


def test_the_base_run_of_the_cases_is_clean_in_every_release() -> None:
    for line in schema.release_lines():
        known = schema.load(line)
        settings = laid_over(BASE, f"mcore={line}")
        assert lint(run_of(settings), known, versions_of(settings)) == [], line


def test_every_flag_a_rule_names_exists_in_some_release_it_covers() -> None:
    for rule in RULES.values():
        lines = [line for line in schema.release_lines() if matches(line, rule.megatron)]
        for flag in flags_in(rule.when):
            assert any(schema.load(line).knows(flag) for line in lines), (rule.name, flag)


def test_every_pattern_a_rule_names_fits_a_flag_of_some_release() -> None:
    known = {flag for line in schema.release_lines() for flag in schema.load(line).flags}
    for rule in RULES.values():
        for pattern in [pattern for one in rule.when for pattern in one.says]:
            stem = pattern.removesuffix("*")
            fits = [
                flag
                for flag in known
                if (flag.startswith(stem) if stem != pattern else flag == stem)
            ]
            assert fits, (rule.name, pattern)


OTHER_PROGRAMS = ("rl", "sft", "retro", "vision", "biencoder", "In-process restart")
"""Groups of Megatron's parser that plain GPT training reads nothing of."""


@pytest.mark.parametrize("line", schema.release_lines())
def test_what_the_installed_megatrons_entry_cannot_serve_is_refused_in_every_release(
    line: str,
) -> None:
    known = schema.load(line).flags
    asked = [
        flag
        for flag, spec in known.items()
        if spec.group in OTHER_PROGRAMS and not flag.startswith(("--qk-", "--no-qk-"))
    ]
    entry = {name for name in RULES if "entry" in name or "own-script" in name}
    for flag in asked:
        found = names(findings(f"mcore={line}; {flag} 1")) & entry
        assert len(found) == 1, flag


def test_what_megatron_lms_own_entry_serves_is_let_through_with_it() -> None:
    for flag in ("--sft", "--fim-data", "--inprocess-restart", "--hybrid-context-parallel"):
        assert "needs-megatron-lms-own-entry" in names(findings(flag))
        assert names(findings(flag, "MEGATRON_PATH=/mlm")) == set()


def test_the_refusal_names_the_flag_its_place_and_the_way_out() -> None:
    (found,) = findings("--sft")
    assert str(found).startswith(
        "--sft (environment): what reads it is in Megatron-LM's pretrain_gpt.py"
    )
    assert "set MEGATRON_PATH to a Megatron-LM checkout" in str(found)


def test_every_rule_says_where_its_evidence_is() -> None:
    assert [rule.name for rule in RULES.values() if not rule.source] == []


def test_every_knob_that_a_way_out_names_exists() -> None:
    known = {*KNOBS, "NVIDIA", "MTP"}
    for rule in RULES.values():
        words = set(re.findall(r"(?<![\w-])[A-Z][A-Z0-9_]+\b", rule.fix)) - known
        assert all(word.startswith(("CUDA_", "PYTORCH_", "NCCL_")) for word in words), rule.name


def test_an_unknown_transformer_engine_gives_a_note_that_says_how_to_tell() -> None:
    found = findings("--moe-permute-fusion; !te")
    assert [(one.rule, one.severity) for one in found] == [("permute-fusion-needs-te-2.1", "note")]
    assert "TE_VERSION" in found[0].reason


def test_a_finding_names_flag_value_place_reason_and_way_out() -> None:
    (found,) = findings("--mtp-num-layers 1; --position-embedding-type yarn")
    assert str(found) == (
        "--mtp-num-layers 1 with --position-embedding-type yarn (environment): prediction layers work with learned, rope, "
        "mrope or no position embedding; use --position-embedding-type rope or leave out --mtp-num-layers"
    )


def test_a_release_outside_the_range_is_left_alone() -> None:
    text = "--cross-entropy-loss-fusion; --cross-entropy-fusion-impl te"
    assert "te-cross-entropy-is-refused" in names(findings(text))
    assert "te-cross-entropy-is-refused" not in names(findings(text, "mcore=0.17.1"))


def test_users_add_rules_and_replace_one_of_the_same_name(tmp_path: Path) -> None:
    folder = tmp_path / "lint_rules"
    folder.mkdir()
    (folder / "ours.yaml").write_text(
        "- name: our-fabric\n  severity: warning\n  when: [{flag: --expert-model-parallel-size, above: 8}]\n"
        "  reason: our fabric is slow beyond a node\n  fix: use EP=8 or less\n"
        "- name: two-precisions\n  when: [{env: NCCL_DEBUG, in: [TRACE]}]\n  reason: r\n  fix: f\n"
    )
    rules = all_rules(tmp_path)
    assert len(rules) == len(RULES) + 1
    found = findings(
        "--num-experts 64; --expert-model-parallel-size 16; --bf16; --fp16", rules=rules
    )
    assert "our-fabric" in names(found)
    assert "two-precisions" not in names(found)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("nonsense", "rules are a list"),
        ("- name: a", "missing required field"),
        ("- {name: a, when: [], reason: r, fix: f}", "when is empty"),
        ("- {name: a, wen: [], reason: r, fix: f}", "did you mean when"),
        ("- {name: a, when: [{flag: --x, above: 1, below: 2}], reason: r, fix: f}", "takes 1 test"),
        (
            "- {name: a, when: [{flag: --x, contain: y}], reason: r, fix: f}",
            "did you mean contains",
        ),
        ("- {name: a, when: [{te: new}], reason: r, fix: f}", "no version range"),
        ("- {name: a, when: [{lacks: flash-attn}], reason: r, fix: f}", "is no package"),
        ("- {name: a, when: [{is: on}], reason: r, fix: f}", "is about one of"),
        (
            "- {name: a, severity: fatal, when: [{flag: --x, is: on}], reason: r, fix: f}",
            "severity",
        ),
        (
            "- {name: a, megatron: new, when: [{flag: --x, is: on}], reason: r, fix: f}",
            "no version",
        ),
        ("- [", "not YAML"),
    ],
)
def test_a_malformed_rule_is_refused_with_its_file(tmp_path: Path, text: str, said: str) -> None:
    path = tmp_path / "bad.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"bad\.yaml") as refused:
        all_rules(tmp_path, more=str(path))
    assert said in str(refused.value)


@pytest.mark.parametrize(
    ("condition", "said"),
    [
        ("{flag: --expert-model-paralel-size, above: 8}", "mean --expert-model-parallel-size"),
        ("{flag: EP, above: 8}", "EP is a knob, and rules are about what the ranks get"),
        ("{env: EP, in: ['8']}", "write flag: --expert-model-parallel-size"),
        ("{env: CLUSTER, in: [a]}", "CLUSTER is a knob"),
        ("{flag: nosuch, is: on}", "no release has a flag nosuch; flags are written --like-this"),
        ("{says: [--moe-enable-deeped]}", "mean --moe-enable-deepep"),
        ("any: [{flag: --swigluu, is: on}]", "mean --swiglu"),
        ("{flag: --seq-length, above: --seq-lenght}", "mean --seq-length"),
    ],
)
def test_a_rule_of_the_users_that_could_never_speak_is_refused(
    tmp_path: Path, condition: str, said: str
) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text(f"- {{name: a, when: [{condition}], reason: r, fix: f}}\n")
    rules = all_rules(tmp_path, more=str(path))
    with pytest.raises(ConfigError, match=r"ours\.yaml \(a\): ") as refused:
        findings("--bf16", rules=rules)
    assert said in str(refused.value)


def test_a_rule_may_be_about_another_release_or_a_checkouts_own_flag(tmp_path: Path) -> None:
    path = tmp_path / "ours.yaml"
    path.write_text(
        "- name: a\n  when: [{flag: --moe-extended-tp, is: on}, {says: [--moe-ext*]}, {env: PROFILE, is: set}]\n"
        "  reason: r\n  fix: f\n"
    )
    findings("--bf16", rules=all_rules(tmp_path, more=str(path)))
    path = tmp_path / "checkout.yaml"
    path.write_text("- {name: a, when: [{flag: --ours, is: on}], reason: r, fix: f}\n")
    rules = all_rules(tmp_path, more=str(path))
    for known in ({"stands_in": True}, {"unread": ("somewhere.py:1",)}):
        checkout = msgspec.structs.replace(schema.load("0.19"), **known)
        assert names(lint(run_of(laid_over(BASE)), checkout, {}, rules[-1:])) == set()
    [note] = lint(run_of(laid_over(BASE)), schema.load("0.19"), {}, rules[-1:])
    assert (note.severity, note.subject) == ("note", "--ours")


def test_versions_come_from_the_variables_before_what_is_installed() -> None:
    told = {"TE_VERSION": "1.9", "TORCH_VERSION": "2.4", "GPU_ARCH": "B200"}
    assert versions_here(make_run(), told, local=True) == {
        "te": "1.9",
        "torch": "2.4",
        "compute": "10.0",
    }


def test_a_cluster_run_says_nothing_of_what_is_installed_on_the_login_node() -> None:
    assert set(versions_here(make_run(), {}, local=False).values()) == {None}


@pytest.mark.parametrize("variable", ["TE_VERSION", "TORCH_VERSION"])
def test_what_is_no_version_is_refused(variable: str) -> None:
    with pytest.raises(ConfigError, match=rf"{variable}=newest \(environment\) is not a version"):
        versions_here(make_run(), {variable: "newest"}, local=False)
    assert versions_here(make_run(), {variable: "2.11.0+cu128"}, local=False)


def test_an_unknown_gpu_is_refused() -> None:
    with pytest.raises(ConfigError, match="GPU_ARCH=h1000"):
        versions_here(make_run(), {"GPU_ARCH": "h1000"}, local=False)


def test_a_local_run_knows_what_is_installed_here() -> None:
    torch = metadata.version("torch")
    assert versions_here(make_run(), {}, local=True)["torch"] == torch


def test_an_image_may_hold_other_versions_than_this_machine() -> None:
    run = make_run(CONTAINER_IMAGE="/images/pytorch.sqsh")
    assert versions_here(run, {}, local=True)["torch"] is None


NEEDS_YAML = Rule(
    name="needs-yaml",
    when=(Condition(flag="--bf16", is_="on"), Condition(lacks="no_such_package")),
    reason="it is read with it",
    fix="install it",
)


def test_a_package_that_this_interpreter_lacks_is_an_error_where_the_ranks_use_it() -> None:
    settings = laid_over(BASE)
    run, known = run_of(settings), schema.load(settings["mcore"])
    here = lint(run, known, {}, (NEEDS_YAML,), packages_here(run, local=True))
    assert [one.severity for one in here] == ["error"]
    there = lint(run, known, {}, (NEEDS_YAML,), packages_here(run, local=False))
    assert [one.severity for one in there] == ["note"]
    assert "what the ranks' interpreter has is unknown here" in str(there[0])
    found = msgspec.structs.replace(NEEDS_YAML, when=(Condition(lacks="yaml"),))
    assert lint(run, known, {}, (found,), packages_here(run, local=True)) == []


def test_a_flag_of_a_package_is_refused_where_the_package_is_not() -> None:
    settings = laid_over(BASE, "--kitchen-recipe-number 1; --modelopt-enabled")
    run, known = run_of(settings), schema.load(settings["mcore"])
    asked: list[str] = []

    def has(package: str) -> bool:
        asked.append(package)
        return package == "modelopt"

    found = [one for one in lint(run, known, {}, (), has) if one.rule == "flag-of-a-package"]
    assert [one.subject for one in found] == ["--kitchen-recipe-number 1"]
    assert "only where nvidia-kitchen is installed" in found[0].reason
    assert sorted(asked) == ["modelopt", "nvidia_kitchen"]
