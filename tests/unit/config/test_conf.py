"""`.conf` files are programs: real bash runs them once, and each value keeps the line that made it."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.config.conf import ConfFile, ConfVariables, declared
from moe_bench.config.sources import run_confs_each
from moe_bench.errors import ConfigError

NAMES = ("common", "runtime", "cluster")


def run_confs(files: tuple[ConfFile, ...], environment: dict[str, str]) -> ConfVariables:
    """One environment's outcome; an error is raised."""
    [found] = run_confs_each(files, [environment], lambda path: Path(path).name)
    if isinstance(found, ConfigError):
        raise found
    return found


def run(tmp_path: Path, *texts: str, **environment: str) -> ConfVariables:
    files = []
    for name, text in zip(NAMES, texts, strict=False):
        path = tmp_path / f"{name}.conf"
        path.write_text(text)
        files.append(ConfFile(path=str(path), layer=name, shown=f"{name}.conf"))
    given = {"PATH": "/usr/bin:/bin"} | environment
    return run_confs(tuple(files), given)


def test_a_default_of_the_file_is_used_and_its_line_named(tmp_path: Path) -> None:
    found = run(tmp_path, "# comment\nexport TP=${TP:-2}\n").settings["TP"]
    assert (found.value, found.origin.layer, found.origin.place) == ("2", "common", "common.conf:2")


@pytest.mark.parametrize(
    "line",
    [
        "export TP=${TP:-$((1 + 1))}",
        'export TP="${TP:-2}"',
        "TP=${TP:-2}",
        ': "${TP:=2}"',
        ": ${TP:=2}",
        "declare -A T=([a]=2); x=a; export TP=${TP:-${T[$x]}}",
    ],
)
def test_the_environment_wins_and_what_it_overrode_is_kept(tmp_path: Path, line: str) -> None:
    found = run(tmp_path, line, TP="8").settings["TP"]
    assert (found.value, found.origin.layer) == ("8", "environment")
    (lost,) = found.overrode
    assert (lost.value, lost.origin.place) == ("2", "common.conf:1")


def test_a_file_that_assigns_without_looking_beats_the_environment_and_shows_it(
    tmp_path: Path,
) -> None:
    found = run(tmp_path, "export TP=1", TP="8").settings["TP"]
    assert (found.value, found.origin.place) == ("1", "common.conf:1")
    assert [(lost.value, lost.origin.layer) for lost in found.overrode] == [("8", "environment")]


def test_a_later_file_overrides_an_earlier_one_and_the_chain_is_kept(tmp_path: Path) -> None:
    found = run(tmp_path, "A=1", "\nA=2", "A=3").settings["A"]
    assert found.origin.place == "cluster.conf:1"
    assert [lost.origin.place for lost in found.overrode] == ["runtime.conf:2", "common.conf:1"]


def test_tables_functions_and_namerefs_work_as_in_bash(tmp_path: Path) -> None:
    text = """
declare -A MODELS=(
    [Mixtral-8x7B]=" 1 4 8"
)
pick() {
    local -n table=$1
    local row=(${table[$2]})
    export TP=${TP:-${row[0]}}
    export PP=${PP:-${row[1]}}
    if [[ $PP -gt 1 ]]; then
        export VPP=false
    fi
}
pick MODELS ${MODEL}
"""
    found = run(tmp_path, text, MODEL="Mixtral-8x7B", PP="2").settings
    assert (found["TP"].value, found["TP"].origin.place) == ("1", "common.conf:8")
    assert found["PP"].overrode[0].value == "4"
    assert found["VPP"].origin.place == "common.conf:11"


def test_names_built_in_a_loop_keep_their_line(tmp_path: Path) -> None:
    text = 'names=(TP PP)\nrow=(3 5)\nfor i in 0 1; do\n  export "${names[i]}=${!names[i]:-${row[i]}}"\ndone\n'
    found = run(tmp_path, text, PP="7").settings
    assert (found["TP"].value, found["TP"].origin.place) == ("3", "common.conf:4")
    assert (found["PP"].value, found["PP"].overrode[0].value) == ("7", "5")


@pytest.mark.parametrize(
    "value",
    [
        "a b",
        "it's",
        'say "x"',
        "a|b",
        "$HOME",
        "`id`",
        "$(id)",
        "two\nlines",
        "tab\there",
        "*",
        "ä€",
        "\\n",
        " lead ",
        "#x",
        "a;b",
    ],
)
def test_values_pass_through_exactly(tmp_path: Path, value: str) -> None:
    text = 'export COPY="$GIVEN"\nexport KEPT=${KEPT:-other}\n'
    found = run(tmp_path, text, GIVEN=value, KEPT=value).settings
    assert found["COPY"].value == value
    assert found["KEPT"].value == value


def test_a_default_that_would_run_a_command_is_never_run_for_show(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    found = run(tmp_path, f"export A=${{A:-$(touch {marker}; echo 1)}}", A="2").settings["A"]
    assert found.value == "2"
    assert not marker.exists()


def test_only_exported_variables_are_said_to_be_exported(tmp_path: Path) -> None:
    found = run(tmp_path, "A=1\nexport B=2\n")
    assert "B" in found.exported
    assert "A" not in found.exported


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ('export A="open\n', "unexpected EOF"),
        ("export A=(\n", "unexpected EOF"),
        ("if true; then\n", "syntax error"),
        ("echo 'Error: no such model.'; exit 1\n", "Error: no such model."),
        ("false\n", "ended the shell with status 1"),
        ("export A=$UNSET\n", "UNSET: unbound variable"),
        ("exit 0\n", "ended the shell with status 0"),
        ("nonsense_command\n", "command not found"),
        ("return 3\n", "status 3"),
    ],
)
def test_a_file_that_fails_is_named_with_bashs_own_words(
    tmp_path: Path, text: str, said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        run(tmp_path, "A=1\n", text)
    assert "runtime.conf" in str(caught.value)
    assert said in str(caught.value)


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"A=1\r\nB=2\r\n", "runtime.conf:1 has Windows line ends"),
        (b"\xef\xbb\xbfA=1\n", "byte order mark"),
        (b"A=\xff\n", "runtime.conf:1 is not UTF-8"),
    ],
)
def test_what_editors_leave_behind_is_refused(tmp_path: Path, data: bytes, said: str) -> None:
    path = tmp_path / "runtime.conf"
    path.write_bytes(data)
    file = ConfFile(path=str(path), layer="runtime", shown="runtime.conf")
    with pytest.raises(ConfigError, match=said):
        run_confs((file,), {"PATH": "/usr/bin:/bin"})


def test_a_directory_in_place_of_a_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.conf").mkdir()
    file = ConfFile(path=str(tmp_path / "x.conf"), layer="common", shown="x.conf")
    with pytest.raises(ConfigError, match="is a directory"):
        run_confs((file,), {})


@pytest.mark.parametrize(
    "text",
    ["set -x\nA=1\nset +x", "set +eu\nA=1\nfalse\necho $NONE", "IFS=,\nA=1", "trap - DEBUG\nA=1"],
)
def test_a_file_may_change_the_shells_options(tmp_path: Path, text: str) -> None:
    found = run(tmp_path, text, "export B=${B:-2}").settings
    assert (found["A"].value, found["B"].value, found["B"].origin.place) == (
        "1",
        "2",
        "runtime.conf:1",
    )


def test_hostile_settings_of_the_caller_do_not_reach_bash(tmp_path: Path) -> None:
    marker = tmp_path / "marker"
    start = tmp_path / "start.sh"
    start.write_text(f"touch {marker}\n")
    run(tmp_path, "A=1", BASH_ENV=str(start), SHELLOPTS="noexec", PS4="$(touch x)")
    assert not marker.exists()


def test_many_environments_in_one_pass_end_as_each_does_alone(tmp_path: Path) -> None:
    path = tmp_path / "common.conf"
    path.write_text(
        "declare -a LIST=(first second)\n"
        "export TP=${TP:-1}\n"
        'export NOTE="${NOTE:-none} of $TP"\n'
        'if ((TP > 3)); then echo "TP=$TP is too much" >&2; return 1; fi\n'
        "leak=${leak:-}$TP\n"
    )
    files = (ConfFile(path=str(path), layer="common", shown="common.conf"),)
    values = ["1", "2", "3", "4", "9"] * 10
    notes = ["plain", "two\nlines", 'a "b" $c `d` \\e', "\x1b\x01\x7f", "ä€ 'x'", ""]
    environments = [
        {"PATH": "/usr/bin:/bin", "TP": tp, "NOTE": notes[index % len(notes)]}
        for index, tp in enumerate(values)
    ]
    environments[7].pop("NOTE")
    together = list(run_confs_each(files, environments, lambda name: Path(name).name))
    assert len(together) == len(environments)
    for environment, found in zip(environments, together, strict=True):
        if int(environment["TP"]) > 3:
            assert isinstance(found, ConfigError)
            assert f"common.conf failed: TP={environment['TP']} is too much" in str(found)
            continue
        assert isinstance(found, ConfVariables)
        alone = run_confs(files, environment)
        assert (found.settings, found.exported) == (alone.settings, alone.exported)
        assert found.settings["NOTE"].value == (
            f"{environment.get('NOTE') or 'none'} of {environment['TP']}"
        )
        assert found.settings["leak"].value == environment["TP"], "one environment saw another"
        assert found.settings["LIST"].value == "first"


def test_a_file_that_leaves_the_shell_in_one_environment_leaves_the_others_alone(
    tmp_path: Path,
) -> None:
    path = tmp_path / "common.conf"
    path.write_text("[[ $TP != 2 ]] || exit 3\nexport PP=$TP\n")
    files = (ConfFile(path=str(path), layer="common", shown="common.conf"),)
    environments = [{"PATH": "/usr/bin:/bin", "TP": tp} for tp in ("1", "2", "3")]
    one, two, three = run_confs_each(files, environments, lambda name: Path(name).name)
    assert isinstance(one, ConfVariables)
    assert isinstance(three, ConfVariables)
    assert (one.settings["PP"].value, three.settings["PP"].value) == ("1", "3")
    assert "common.conf failed" in str(two)
    assert "status 3" in str(two)


def test_declarations_are_read_from_an_old_bash_too() -> None:
    """Before version 5 bash wrote a line break within quotes as it is, so a value may hold what looks like a declaration."""
    text = (
        b'declare -x A="one\ndeclare -x B=\\"two\\"\n"\ndeclare -- C="\\$HOME"\n'
        b'declare -a D=([0]="first" [1]=$\'sec\\nond\')\ndeclare -n E="A"\ndeclare -x F\n'
    )
    assert declared(text) == {
        "A": ('one\ndeclare -x B="two"\n', True),
        "C": ("$HOME", False),
        "D": ("first", False),
    }


def test_places_and_defaults_are_found_though_the_first_environment_of_a_model_fails(
    tmp_path: Path,
) -> None:
    path = tmp_path / "common.conf"
    path.write_text(
        '[[ $TP != 1 ]]\nnames=(PP EP)\nfor i in 0 1; do\n  export "${names[i]}=${!names[i]:-7}"\ndone\n'
    )
    files = (ConfFile(path=str(path), layer="common", shown="common.conf"),)
    environments = [{"PATH": "/usr/bin:/bin", "TP": tp, "EP": "2"} for tp in ("1", "2", "3")]
    failed, *others = run_confs_each(files, environments, lambda name: Path(name).name)
    assert isinstance(failed, ConfigError)
    for found in others:
        assert isinstance(found, ConfVariables)
        assert found.settings["PP"].origin.place == "common.conf:4"
        assert [lost.value for lost in found.settings["EP"].overrode] == ["7"]


def test_a_file_that_ends_the_shell_in_silence_is_told_where_and_what_to_write(
    tmp_path: Path,
) -> None:
    with pytest.raises(
        ConfigError, match=r"with status 3 at line 2, 'exit 3', .* return leaves it"
    ):
        run(tmp_path, "A=1\nexit 3\n")
