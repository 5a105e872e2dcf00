"""A preparation that is killed or stopped goes on to the same bytes."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import count
from pathlib import Path

import pytest
from click.testing import Result

from moe_bench.data import (
    documents as documents_module,
    prepare as prepare_module,
    sources as sources_module,
)
from tests.support.processes import living, wait_for_end

type Data = Callable[..., Result]


def hashes(prefix: Path) -> list[str]:
    return [
        hashlib.sha256(prefix.with_name(prefix.name + end).read_bytes()).hexdigest()
        for end in (".bin", ".idx", ".json")
    ]


def die_at_durable_step(step: int, run: Callable[[], object]) -> bool:
    """Fork; the child ends without cleaning up at its n-th fsync or rename. False when it had fewer."""
    child = os.fork()
    if child == 0:
        steps = count(1)
        fsync, replace = os.fsync, Path.replace

        def counted_fsync(descriptor: int) -> None:
            if next(steps) == step:
                os._exit(9)
            fsync(descriptor)

        def counted_replace(self: Path, target: Path) -> Path:
            if next(steps) == step:
                os._exit(9)
            return replace(self, target)

        os.fsync, Path.replace = counted_fsync, counted_replace  # type: ignore[method-assign]
        run()
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9


def test_death_at_any_durable_step_changes_no_byte(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(documents_module, "UNIT_BYTES", 400)
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 100)
    monkeypatch.setattr(prepare_module, "COMMIT_INTERVAL_S", 0.0)
    for name in ("a", "b"):
        lines = [json.dumps({"text": f"{name} {i} " * 9}) for i in range(5)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines[:3], "not json", *lines[3:]]))

    def run(prefix: Path) -> Result:
        return data(
            "prepare", tmp_path / "a.jsonl", tmp_path / "b.jsonl", "--output", prefix,
            "--tokenizer", "bytes", "--append-eod", "--on-error", "skip", "--workers", 1,
        )  # fmt: skip

    assert run(tmp_path / "whole" / "o").exit_code == 0
    wanted = hashes(tmp_path / "whole" / "o")
    for step in count(1):
        prefix = tmp_path / f"step{step}" / "o"
        died = die_at_durable_step(step, lambda prefix=prefix: run(prefix))
        assert run(prefix).exit_code == 0
        assert hashes(prefix) == wanted, f"died at durable step {step}"
        skipped = prefix.with_name("o.skipped.jsonl").read_text()
        assert skipped.count("not JSON") == 2
        assert sorted(path.name for path in prefix.parent.iterdir()) == [
            "o.bin", "o.idx", "o.json", "o.skipped.jsonl",
        ]  # fmt: skip
        if not died:
            break
    assert step > 20


def command(source: Path | str, output: Path, tokenizer: object, workers: int) -> list[str]:
    return [
        sys.executable, "-m", "moe_bench", "data", "prepare", str(source), "--output", str(output),
        "--format", "jsonl", "--tokenizer", str(tokenizer), "--append-eod", "--workers", str(workers),
    ]  # fmt: skip


@pytest.fixture
def large_jsonl(tmp_path: Path, documents: list[str]) -> Path:
    """About 6 MB: some seconds of work for the BPE, so that a kill falls into it."""
    path = tmp_path / "large.jsonl"
    generator = random.Random(3)
    with path.open("w") as target:
        for number in range(5000):
            words = " ".join(generator.choices(documents, k=4))
            target.write(json.dumps({"text": f"{number} {words}"}) + "\n")
    return path


def kill_and_resume(
    trial: int, source: Path, folder: Path, tokenizer: Path, size: int
) -> list[str]:
    """Start, kill -9 when a random part of the output's `size` bytes is there, twice; then let it finish."""
    generator = random.Random(trial)
    output = folder / f"trial{trial}" / "o"
    call = command(source, output, tokenizer, workers=1 + trial % 2)
    for _ in range(2):
        process = subprocess.Popen(
            call, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        wait_for_size(output.with_name("o.partial") / "0.bin", generator.randrange(size), process)
        process.send_signal(signal.SIGKILL)
        process.wait()
        wait_for_end(process.pid)  # until then the output is its workers'
    subprocess.run(call, check=True, capture_output=True)
    return hashes(output)


def wait_for_size(path: Path, size: int, process: subprocess.Popen[bytes]) -> None:
    """Until the file has that many bytes or the process has ended, however slow the machine is."""
    while process.poll() is None and not (path.exists() and path.stat().st_size >= size):
        time.sleep(0.01)


def run_trials(trials: range, source: Path, folder: Path, tokenizer: Path) -> None:
    subprocess.run(
        command(source, folder / "whole" / "o", tokenizer, workers=2),
        check=True,
        capture_output=True,
    )
    wanted = hashes(folder / "whole" / "o")
    size = (folder / "whole" / "o.bin").stat().st_size
    same = [kill_and_resume(n, source, folder, tokenizer, size) == wanted for n in trials]
    assert all(same), f"{sum(same)} of {len(same)} trials gave the same bytes"


def test_kill_at_random_moments_changes_no_byte(
    large_jsonl: Path, tmp_path: Path, bpe_folder: Path
):
    run_trials(range(3), large_jsonl, tmp_path, bpe_folder)


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_kill_campaign_of_twenty_trials_changes_no_byte(
    large_jsonl: Path, tmp_path: Path, bpe_folder: Path
):
    run_trials(range(100, 120), large_jsonl, tmp_path, bpe_folder)


@pytest.fixture
def stream(large_jsonl: Path, tmp_path: Path) -> Path:
    """More than any queue between reader, workers and writer holds."""
    path = tmp_path / "stream.jsonl"
    path.write_bytes(large_jsonl.read_bytes() * 6)
    return path


def half_way(call: list[str], stream: Path, partial: Path) -> subprocess.Popen[bytes]:
    """The command in the middle of its work: it has written, and the rest of its input does not come."""
    process = subprocess.Popen(
        call,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
    )
    assert process.stdin is not None
    written = partial / "0.bin"
    with stream.open("rb") as source:
        while not (written.exists() and written.stat().st_size > 0):
            piece = source.read(1 << 16)
            assert piece, "it has read everything and written nothing"
            process.stdin.write(piece)
            process.stdin.flush()
    assert process.poll() is None
    return process


def test_ctrl_c_says_how_to_go_on_and_leaves_no_process(stream: Path, tmp_path: Path):
    call = command("-", tmp_path / "o", "bytes", workers=2)
    process = half_way(call, stream, tmp_path / "o.partial")
    os.killpg(process.pid, signal.SIGINT)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 130, said
    assert b"run the same command to go on" in said
    assert b"Traceback" not in said
    assert living(process.pid) == []
    with stream.open("rb") as whole:
        assert subprocess.run(call, stdin=whole, check=False, capture_output=True).returncode == 0


def test_a_killed_run_leaves_no_worker_behind(stream: Path, tmp_path: Path):
    call = command("-", tmp_path / "o", "bytes", workers=2)
    process = half_way(call, stream, tmp_path / "o.partial")
    process.kill()
    process.communicate()
    wait_for_end(process.pid)


def test_input_that_changed_since_is_refused(
    data: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(documents_module, "UNIT_BYTES", 50)
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 50)
    monkeypatch.setattr(prepare_module, "COMMIT_INTERVAL_S", 0.0)

    def run(text: bytes) -> Result:
        options = ["-", "--format", "jsonl", "--output", tmp_path / "o", "--tokenizer", "bytes"]
        return data("prepare", *options, stdin=text)

    good = b"".join(b'{"text": "number %d, long enough to fill a unit"}\n' % i for i in range(20))
    assert run(good + b"broken\n").exit_code != 0
    changed = run(good.replace(b"number 1,", b"number X,"))
    assert "is not what it was" in str(changed.exception)
    assert run(good).exit_code == 0


@pytest.fixture
def small_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A few documents fill a unit, and each unit is stored at once."""
    monkeypatch.setattr(documents_module, "UNIT_BYTES", 400)
    monkeypatch.setattr(sources_module, "BLOCK_BYTES", 100)
    monkeypatch.setattr(prepare_module, "COMMIT_INTERVAL_S", 0.0)


@pytest.fixture
def with_bad_line(tmp_path: Path) -> list[Path]:
    """Two sources; the second has a bad line after some units."""
    sources = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for source in sources:
        lines = [json.dumps({"text": f"{source.stem} {i} " * 9}) for i in range(40)]
        source.write_text("\n".join(lines))
    sources[1].write_text(sources[1].read_text().replace(lines[30], "not json"))
    return sources


def stored_units(prefix: Path) -> int:
    ledger = prefix.with_name(prefix.name + ".partial") / "ledger.jsonl"
    return int(json.loads(ledger.read_text().splitlines()[-1])["progress"]["units"])


@pytest.mark.usefixtures("small_units")
def test_each_way_out_of_a_bad_line_goes_on_to_the_bytes_of_a_fresh_run(
    data: Data, with_bad_line: list[Path], tmp_path: Path
):
    def run(prefix: Path, *more: str) -> Result:
        options = ("--output", prefix, "--tokenizer", "bytes", "--workers", 1, *more)
        return data("prepare", *with_bad_line, *options)

    for name in ("skipped", "mended"):
        said = str(run(tmp_path / name).exception)
        assert "b.jsonl:31: not JSON" in said
        assert stored_units(tmp_path / name) > 5
    assert run(tmp_path / "fresh-skipped", "--on-error", "skip").exit_code == 0
    assert run(tmp_path / "skipped", "--on-error", "skip").exit_code == 0
    assert_same(tmp_path, "skipped")
    with_bad_line[1].write_text(
        with_bad_line[1].read_text().replace("not json", '{"text": "mended"}')
    )
    assert run(tmp_path / "fresh-mended").exit_code == 0
    assert run(tmp_path / "mended").exit_code == 0
    assert_same(tmp_path, "mended")


def assert_same(folder: Path, name: str) -> None:
    """Also the manifest, but for the prefix that it names."""
    fresh, resumed = folder / f"fresh-{name}", folder / name
    assert hashes(resumed)[:2] == hashes(fresh)[:2]
    manifests = [path.with_name(path.name + ".json").read_text() for path in (fresh, resumed)]
    assert manifests[0].replace("fresh-", "") == manifests[1]


@pytest.mark.usefixtures("small_units")
def test_what_was_left_out_is_not_asked_for_again(
    data: Data, with_bad_line: list[Path], tmp_path: Path
):
    worse = with_bad_line[0]
    worse.write_text("not json\n" + worse.read_text())

    def run(*more: str) -> Result:
        options = ("--output", tmp_path / "o", "--tokenizer", "bytes", "--workers", 1, *more)
        return data("prepare", *with_bad_line, *options)

    assert die_at_durable_step(25, lambda: run("--on-error", "skip"))
    assert stored_units(tmp_path / "o") > 1
    assert "begun with other --on-error;" in str(run().exception)
    worse.touch()
    assert "begun with other sources;" in str(run("--on-error", "skip").exception)


@pytest.mark.usefixtures("small_units")
def test_a_source_that_is_read_may_not_change(
    data: Data, with_bad_line: list[Path], tmp_path: Path
):
    options = ("--output", tmp_path / "o", "--tokenizer", "bytes", "--workers", 1)
    assert data("prepare", *with_bad_line, *options).exit_code != 0
    changed = data("prepare", *reversed(with_bad_line), *options)
    assert "begun with other sources;" in str(changed.exception)
    half = data("prepare", with_bad_line[0], *options)
    assert "begun with other sources;" in str(half.exception)
    with_bad_line[0].touch()
    assert "begun with other sources;" in str(data("prepare", *with_bad_line, *options).exception)
