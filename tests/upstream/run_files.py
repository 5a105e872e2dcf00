"""Runs a Megatron-LM checkout's own unit tests, unmodified, on CPU ranks: see run.sh beside this file.

torch, Megatron and the reference layers are imported once; for each file all ranks are forked anew, and each runs pytest on
it, as Megatron-LM's own CI does with torchrun. A test counts as passed when it passed on every rank that did not skip it.
"""

from __future__ import annotations

import argparse
import collections
import contextlib
import datetime
import importlib
import itertools
import json
import os
import re
import resource
import shutil
import signal
import socket
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PATIENCE_S = 20.0
TESTS = Path("tests/unit_tests")
WORST_FIRST = ("failed", "error", "hung", "not run", "passed", "skipped")
BAD = ("failed", "error")
OPEN = ("hung", "not run")


@dataclass
class Result:
    """What a file's tests came to."""

    file: str
    ranks: int
    seconds: float = 0.0
    tests: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By name: an outcome of WORST_FIRST and, unless it passed, why."""

    def count(self, *outcomes: str) -> int:
        """How many tests came to one of these."""
        return sum(outcome in outcomes for outcome, _ in self.tests.values())


def main() -> int:
    """Run the files that are asked for; 1 when a test did not pass."""
    options = _options()
    checkout = options.checkout.resolve()
    options.output.mkdir(parents=True, exist_ok=True)
    signal.signal(signal.SIGTERM, lambda number, _frame: sys.exit(128 + number))
    results = []
    files = _files(options)
    with _megatron_on_a_cpu(checkout, options):
        for file, ranks in files:
            result = run_file(file, ranks, options)
            results.append(result)
            print(_line(result), *_reasons(result), sep="\n", flush=True)
            _write(options.output / "results.json", results)
    print(f"{_totals(results)}; every test's outcome: {options.output}/results.json")
    return 1 if any(result.count(*BAD, *OPEN) for result in results) else 0


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("checkout", type=Path)
    parser.add_argument("files", nargs="*", help="relative to tests/unit_tests; default: files.txt")
    parser.add_argument("--ranks", type=int, help="instead of what files.txt says (8)")
    parser.add_argument("--file-timeout", type=float, default=900.0, metavar="S")
    parser.add_argument(
        "--test-timeout", type=float, default=120.0, metavar="S", help="a collective's, too"
    )
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--pytest", default="", help="more of pytest's arguments, in one word")
    options = parser.parse_intermixed_args()
    for file in options.files:
        if not (options.checkout / TESTS / file.partition("::")[0]).is_file():
            parser.error(f"{file}: no such file in {options.checkout / TESTS}")
    return options


def _files(options: argparse.Namespace) -> list[tuple[str, int]]:
    """What is to be run, and on how many ranks. A file that this release lacks is passed over, by name."""
    listed = {}
    for line in Path(__file__).with_name("files.txt").read_text().splitlines():
        name, _, ranks = line.partition("#")[0].strip().partition(" ")
        if name:
            listed[name] = int(ranks or 8)
    absent = [name for name in listed if not (options.checkout / TESTS / name).is_file()]
    if absent and not options.files:
        print("not in this release:", *absent)
    return [
        (name, options.ranks or listed.get(name.partition("::")[0], 8))
        for name in options.files or listed
        if name not in absent
    ]


@contextlib.contextmanager
def _megatron_on_a_cpu(checkout: Path, options: argparse.Namespace) -> Iterator[None]:
    """Import all that ranks share."""
    ranks = options.ranks or 8
    os.chdir(checkout)
    sys.path[0] = str(checkout)  # its package `tests`, not this project's
    os.environ |= {"OMP_NUM_THREADS": "1", "LOCAL_WORLD_SIZE": str(ranks)}
    # NVIDIA's container; where none is named, tests take an old one and skip optimizers that it lacks.
    os.environ.setdefault("NVIDIA_PYTORCH_VERSION", "26.01")
    import torch

    from moe_bench.mcore.cpu.embedding import install
    from moe_bench.mcore.imports import lend_compiled_helper, quiet_about_gpu_libraries
    from moe_bench.mcore.patches import COMPILED_HELPERS
    from moe_bench.runtime.rank import export_for_cpu

    torch.set_num_threads(1)
    export_for_cpu()
    install(local_world_size=ranks)
    _bound_collectives(torch.distributed, datetime.timedelta(seconds=options.test_timeout))
    lend_compiled_helper(checkout)
    sys.modules["tests.test_utils.python_scripts.download_unit_tests_dataset"] = _no_downloads()
    with quiet_about_gpu_libraries():
        for name in ("torch._dynamo", "megatron.training"):
            importlib.import_module(name)
        from megatron.core import parallel_state

        from moe_bench.mcore.cpu.spec import reference_layers

        _end_groups(parallel_state, torch.distributed)

        with reference_layers(), COMPILED_HELPERS.applied():
            yield


def _bound_collectives(distributed: Any, timeout: datetime.timedelta) -> None:
    """Groups give up when a test would, whatever their maker asks for."""

    def bounded(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: function(*args, **{**kwargs, "timeout": timeout})

    for name in ("init_process_group", "new_group"):
        setattr(distributed, name, bounded(getattr(distributed, name)))


def _end_groups(parallel_state: Any, distributed: Any) -> None:
    """Groups end when the next layout's are there, which no rank makes before it has done with them.

    Megatron only forgets them, and those of a hundred tests are all the threads there are.
    """
    initialize = parallel_state.initialize_model_parallel
    known = distributed.distributed_c10d._world.pg_map
    own: list[Any] = []

    def initialize_model_parallel(*args: Any, **kwargs: Any) -> None:
        before = set(known)
        initialize(*args, **kwargs)
        for group in own:
            if group in known:
                distributed.destroy_process_group(group)
        own[:] = [group for group in known if group not in before]

    parallel_state.initialize_model_parallel = initialize_model_parallel


def _no_downloads() -> types.ModuleType:
    """In place of the module through which Megatron-LM's conftest fetches its test data."""

    def download_and_extract_asset(**_options: object) -> None:
        raise ImportError("nothing is downloaded here")

    module = types.ModuleType("download_unit_tests_dataset")
    module.__dict__["download_and_extract_asset"] = download_and_extract_asset
    return module


@contextlib.contextmanager
def _asked_for_fp8(test_file: Path) -> Iterator[None]:
    """Answers what a file asks Transformer Engine at its top, whether there is FP8: no.

    Megatron itself has been imported before and goes on without Transformer Engine.
    """
    names = ("transformer_engine", "transformer_engine.pytorch", "transformer_engine.pytorch.fp8")
    if not re.search(rf"^from {names[-1]} import", test_file.read_text(), re.MULTILINE):
        yield
        return
    answers = types.ModuleType(names[-1])
    for name in ("check_fp8_support", "check_nvfp4_support"):
        setattr(answers, name, lambda: (False, "there is no FP8 on a CPU"))
    answers.__dict__["fp8_autocast"] = contextlib.nullcontext
    sys.modules |= {names[0]: types.ModuleType(names[0]), names[1]: types.ModuleType(names[1])}
    sys.modules[names[-1]] = answers
    try:
        yield
    finally:
        for name in names:
            del sys.modules[name]


def run_file(file: str, ranks: int, options: argparse.Namespace) -> Result:
    """Run one file's tests on so many forked ranks, again for the rest of them when the ranks have parted."""
    folder = options.output / re.sub(r"\W+", "_", file)
    temporary = (
        folder / "temporary"
    )  # one for all ranks, as their conftest wants it, and no other run's
    temporary.mkdir(parents=True, exist_ok=True)
    _import_what_it_imports(TESTS / file.partition("::")[0])
    argv = _pytest_arguments(file, options)
    result = Result(file, ranks)
    began_s = time.monotonic()
    deadline_s = began_s + options.file_timeout
    for attempt in itertools.count():
        logs = [folder / f"{attempt}-rank-{rank}.log" for rank in range(ranks)]
        port, done = _free_port(), frozenset(result.tests)
        for log in logs:
            _lines_of(log).touch()
        with _asked_for_fp8(TESTS / file.partition("::")[0]):
            children = [_fork(rank, ranks, port, argv, log, done) for rank, log in enumerate(logs)]
        _wait(children, logs, deadline_s, options.test_timeout)
        outcomes = [_read(log) for log in logs]
        found = _merged(outcomes)
        result.tests |= found
        left = {nodeid for rank in outcomes for nodeid in rank} - set(result.tests)
        if not left or not found or time.monotonic() > deadline_s:
            break
    shutil.rmtree(temporary)
    result.tests |= dict.fromkeys(left, ("not run", "the file's time was over before"))
    result.seconds = time.monotonic() - began_s
    return result


def _import_what_it_imports(test_file: Path) -> None:
    """So that its ranks need not, each for itself. What cannot be imported is theirs to report."""
    for name in re.findall(
        r"^(?:from|import) (megatron[\w.]*)", test_file.read_text(), re.MULTILINE
    ):
        with contextlib.suppress(ImportError):
            importlib.import_module(name)


def _pytest_arguments(file: str, options: argparse.Namespace) -> list[str]:
    timeout = f"--timeout={options.test_timeout}"
    unused = ("cacheprovider", "xdist", "hypothesispytest", "anyio")
    plugins = [word for name in unused for word in ("-p", f"no:{name}")]
    # Its own settings stop at the first failure and print every test's output.
    settings = [
        "--continue-on-collection-errors",
        "-c",
        os.devnull,
        f"--rootdir={Path.cwd()}",
        "-W",
        "ignore",
        "--tb=short",
        "-q",
    ]
    chosen = ["-m", "not flaky_in_dev and not experimental"]
    target = f"tests/unit_tests/{file}"
    return [*plugins, *settings, *chosen, timeout, *options.pytest.split(), target]


def _free_port() -> int:
    with socket.socket() as listening:
        listening.bind(("127.0.0.1", 0))
        return int(listening.getsockname()[1])


def _fork(
    rank: int, ranks: int, port: int, argv: Sequence[str], log: Path, done: frozenset[str]
) -> int:
    child = os.fork()
    if child:
        return child
    try:
        os.setpgid(0, 0)  # what a test starts is ended with it
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        _leave_memory()
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        os.environ |= {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        sys.argv = ["pytest"]
        from moe_bench.mcore.cpu.embedding import install

        install(local_world_size=ranks)
        import pytest

        with _lines_of(log).open("w", buffering=1) as lines:
            own = f"--basetemp={log.parent / 'temporary' / str(rank)}"
            pytest.main([*argv, own], plugins=[Outcomes(lines, done)])
    finally:
        sys.stdout.flush()
        os._exit(0)


def _leave_memory() -> None:
    """No rank takes more than half of the machine's: there are tests that fill what memory a device says it has."""
    half = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    resource.setrlimit(resource.RLIMIT_DATA, (half, half))


class Outcomes:
    """A pytest plugin: one line of JSON when a test begins and whenever something is known of it."""

    def __init__(self, lines: Any, done: frozenset[str]) -> None:
        """`done`: tests that are not run again."""
        self._lines, self._done = lines, done

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Leave out what is done."""
        items[:] = [item for item in items if item.nodeid not in self._done]

    def pytest_collection_finish(self, session: Any) -> None:
        """What is to come."""
        for item in session.items:
            self._say(item.nodeid, "not run", "")

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        """Until more is heard, it hangs."""
        self._say(nodeid, "hung", "it did not end in time, or ended its rank")

    def pytest_runtest_logreport(self, report: Any) -> None:
        """What one phase of a test came to."""
        if report.failed:
            self._say(report.nodeid, "failed" if report.when == "call" else "error", _why(report))
        elif report.skipped:
            why = "expected to fail" if hasattr(report, "wasxfail") else report.longrepr[2]
            self._say(report.nodeid, "skipped", why)
        elif report.when == "call":
            self._say(report.nodeid, "passed", "")

    def pytest_collectreport(self, report: Any) -> None:
        """A file that cannot be imported, or that is skipped as one."""
        if report.failed:
            self._say(report.nodeid, "error", _why(report))
        elif report.skipped:
            self._say(report.nodeid, "skipped", report.longrepr[2])

    def _say(self, nodeid: str, outcome: str, why: str) -> None:
        self._lines.write(json.dumps([nodeid, outcome, why]) + "\n")


def _why(report: Any) -> str:
    crash = getattr(report.longrepr, "reprcrash", None)
    text = f"{crash.path}:{crash.lineno}: {crash.message}" if crash else str(report.longrepr)[-300:]
    return " ".join(text.split())[:500]


def _wait(
    children: Sequence[int], logs: Sequence[Path], deadline_s: float, test_timeout_s: float
) -> None:
    """Until all have ended, or the time is over or the ranks have parted: then all are ended.

    Ranks have parted when a test failed on one of them and another still waits for it after PATIENCE_S, or when a test
    outlasts its time in a collective, where pytest's own limit does not reach it.
    """
    running = set(children)
    parted_s: float | None = None
    try:
        while running and time.monotonic() < deadline_s:
            running -= {child for child in running if os.waitpid(child, os.WNOHANG)[0]}
            time.sleep(0.2)
            if not _apart(logs, test_timeout_s):
                parted_s = None
            elif parted_s is None:
                parted_s = time.monotonic()
            elif time.monotonic() - parted_s > PATIENCE_S:
                break
    finally:  # also when this process is told to end
        for child in children:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child, signal.SIGKILL)
        for child in running:
            os.waitpid(child, 0)


def _apart(logs: Sequence[Path], test_timeout_s: float) -> bool:
    """Whether a test that failed on one rank has not ended on another, or lasts too long."""
    ranks = [_read(log) for log in logs]
    waiting = {
        nodeid for rank in ranks for nodeid, (outcome, _) in rank.items() if outcome == "hung"
    }
    failed = {nodeid for rank in ranks for nodeid, (outcome, _) in rank.items() if outcome in BAD}
    idle_s = time.time() - max(_lines_of(log).stat().st_mtime for log in logs)
    return bool(waiting & failed) or (bool(waiting) and idle_s > test_timeout_s)


def _lines_of(log: Path) -> Path:
    return log.with_suffix(".jsonl")


def _read(log: Path) -> dict[str, tuple[str, str]]:
    """The last word on each test; a failure before it stays."""
    found: dict[str, tuple[str, str]] = {}
    text = _lines_of(log).read_text()
    for line in text[: text.rfind("\n") + 1].splitlines():
        nodeid, outcome, why = json.loads(line)
        if found.get(nodeid, ("not run", ""))[0] in OPEN or outcome == "error":
            found[nodeid] = (outcome, why)
    return found


def _merged(ranks: Sequence[dict[str, tuple[str, str]]]) -> dict[str, tuple[str, str]]:
    """The worst of what a test came to on all ranks, with the rank whose reason it is.

    Only up to the first test that is not over on all of them, of which one may have been ended or have ended itself: what
    those ahead have met since is its consequence.
    """
    merged = {}
    for nodeid in dict.fromkeys(nodeid for rank in ranks for nodeid in rank):
        found = [(*rank[nodeid], number) for number, rank in enumerate(ranks) if nodeid in rank]
        outcome, why, rank = min(found, key=lambda each: WORST_FIRST.index(each[0]))
        open_somewhere = any(each[0] in OPEN for each in found)
        if open_somewhere and all(each[0] not in ("hung", *BAD) for each in found):
            break
        merged[nodeid] = (outcome, f"rank {rank}: {why}" if why else "")
        if open_somewhere:
            break
    return merged


def _line(result: Result) -> str:
    counts = collections.Counter(outcome for outcome, _ in result.tests.values())
    said = ", ".join(f"{counts[outcome]} {outcome}" for outcome in WORST_FIRST if counts[outcome])
    return f"{result.file:<60} {result.ranks} ranks {result.seconds:5.0f} s  {said or 'nothing'}"


def _reasons(result: Result) -> Iterator[str]:
    """A line for each reason why tests did not pass."""
    reasons = collections.Counter(
        (outcome, why.partition(": ")[2]) for outcome, why in result.tests.values() if why
    )
    for (outcome, why), count in sorted(reasons.items()):
        yield f"    {count} {outcome}: {why[:200]}"


def _totals(results: Sequence[Result]) -> str:
    counts = [(outcome, sum(r.count(outcome) for r in results)) for outcome in WORST_FIRST]
    return ", ".join(f"{count} {outcome}" for outcome, count in counts)


def _write(path: Path, results: Sequence[Result]) -> None:
    path.write_text(
        json.dumps(
            [{"file": r.file, "ranks": r.ranks, "tests": r.tests} for r in results], indent=1
        )
    )


if __name__ == "__main__":
    sys.exit(main())
