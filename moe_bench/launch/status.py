"""What became of runs: the scheduler's word where it has one, the run's own files always."""

from __future__ import annotations

import re
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moe_bench.errors import LaunchError, RecordError
from moe_bench.launch import registry
from moe_bench.launch.job import Submission, submissions
from moe_bench.launch.job_log import LastWords, last_words
from moe_bench.launch.launcher import AnyJobState
from moe_bench.launch.local import LOG
from moe_bench.results.manifest import read_manifest
from moe_bench.results.reader import read_events
from moe_bench.results.state import Standing, State, standing
from moe_bench.results.triage import Diagnosis, Rule, diagnose, last_error_line

TAIL_BYTES = 64 * 1024
"""Of each log that is read for an error."""
_RANK_LOG = re.compile(r"rank-(\d+)\.log\Z")


_PROJECT = Path(__file__).parents[2]
type _Entries = dict[tuple[str, str], AnyJobState]
"""By launcher and job id."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunStatus:
    """Everything `status` shows of one run."""

    run_id: str
    model: str
    state: str
    """A `State` of the files, or Slurm's (lower case) where Slurm knows more."""
    job_id: str | None = None
    why: str | None = None
    """Why it waits or ended, in plain words."""
    step: int | None = None
    train_steps: int | None = None
    tokens_per_s: float | None = None
    eta_s: float | None = None
    """None unless it is training."""
    failure: Failure | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """The first rank that failed and what its words mean."""

    rank: int | None
    """None when only the job's own log tells."""
    line: str
    diagnosis: Diagnosis | None

    @property
    def short(self) -> str:
        """The kind where it is known, else the line."""
        return self.diagnosis.name if self.diagnosis else self.line


def statuses(run_dirs: Iterable[Path], rules: Sequence[Rule]) -> tuple[list[RunStatus], str | None]:
    """One status a run, in the order given, and what a scheduler said when it did not answer (files alone are used then)."""
    runs = list(run_dirs)
    submitted = {run_dir: _last_submission(run_dir) for run_dir in runs}
    entries, trouble = _ask(one for one in submitted.values() if one is not None)
    return [_status(run_dir, submitted[run_dir], entries, rules) for run_dir in runs], trouble


def _ask(submitted: Iterable[Submission]) -> tuple[_Entries, str | None]:
    """What each launcher's scheduler knows of its jobs, and what was wrong where one did not answer."""
    jobs: dict[str, list[str]] = {}
    for one in submitted:
        if one.job_id is not None:
            jobs.setdefault(one.launcher, []).append(one.job_id)
    entries: _Entries = {}
    trouble = None
    for name, job_ids in jobs.items():
        try:
            launcher = registry.load(name, project=_PROJECT, python=sys.executable)
            entries |= {(name, job): state for job, state in launcher.query(job_ids).items()}
        except LaunchError as error:
            trouble = str(error)
    return entries, trouble


def _last_submission(run_dir: Path) -> Submission | None:
    try:
        submitted = submissions(run_dir)
    except RecordError:
        return None  # the run's own files still tell
    return submitted[-1] if submitted else None


def _status(
    run_dir: Path,
    submission: Submission | None,
    entries: _Entries,
    rules: Sequence[Rule],
) -> RunStatus:
    job_id = submission.job_id if submission else None
    entry = entries.get((submission.launcher, job_id)) if submission and job_id else None
    try:
        manifest, now = read_manifest(run_dir), standing(run_dir)
    except RecordError as error:
        return RunStatus(
            run_id=run_dir.name, model="?", state="unreadable", job_id=job_id, why=str(error)
        )
    if submission is not None and submission.refused is not None:
        return RunStatus(
            run_id=run_dir.name, model=manifest.model, state="refused", why=submission.refused
        )
    words = LastWords() if job_id is None else last_words(run_dir / "logs", job_id)
    state, why = _state(now, entry, words, submission)
    last = now.last_steps[-1] if now.last_steps else None
    training = last is not None and state in {State.RUNNING, "running"}
    step_time_s = (
        statistics.median(s.step_time_s for s in now.last_steps) if now.last_steps else None
    )
    return RunStatus(
        run_id=run_dir.name,
        model=manifest.model,
        state=state,
        job_id=job_id,
        why=why,
        step=last.step if last else None,
        train_steps=last.train_steps if last else None,
        tokens_per_s=statistics.median(s.tokens_per_s for s in now.last_steps) if last else None,
        eta_s=(last.train_steps - last.step) * step_time_s
        if training and last and step_time_s
        else None,
        failure=_failure(run_dir, state, words, rules) if _went_wrong(state) else None,
    )


def _state(
    now: Standing, entry: AnyJobState | None, words: LastWords, submission: Submission | None
) -> tuple[str, str | None]:
    """Slurm knows of waiting and of ends from outside; the files know what training did."""
    if entry is None:
        return _state_from_files(now, words, submission)
    if entry.state == "PENDING":
        ended = words.line or _lost_host(words)
        return "pending", entry.explanation + (f"; before that: {ended}" if ended else "")
    if entry.ended:
        return _ended_state(now, entry, words)
    if now.state in {State.NOT_STARTED, State.STOPPED, State.FAILED}:  # of the attempt before
        return "starting", f"on {entry.nodes}, nothing written yet"
    return now.state, None


def _ended_state(now: Standing, entry: AnyJobState, words: LastWords) -> tuple[str, str | None]:
    if now.state is State.COMPLETED:
        return now.state, None
    if entry.state == "COMPLETED":
        return (State.STOPPED, words.line) if now.state is State.STOPPED else ("completed", None)
    said = None if entry.reason == "None" else entry.explanation
    if entry.state == "NODE_FAIL":
        said = _lost_host(words) or said
    return entry.state.lower().replace("_", " "), words.line or said


def _lost_host(words: LastWords) -> str | None:
    """Slurm's word on the end of an attempt reaches the log through the node that ran the script, and only through it."""
    if words.silent_host is None:
        return None
    return f"Node failure on {words.silent_host}, which ran the job's script"


def _state_from_files(
    now: Standing, words: LastWords, submission: Submission | None
) -> tuple[str, str | None]:
    """The job's own log says how it ended where the record ends without a word."""
    if now.state is State.COMPLETED:
        return now.state, None
    if words.ending is not None:
        return words.ending, words.line
    if submission is not None and submission.cancelled:
        return "cancelled", None
    why = None
    if now.state is State.SILENT:
        why = f"nothing written for {now.silent_s:.0f} s"
    elif now.state is State.NOT_STARTED and submission is not None:
        why = f"job {submission.job_id} has written nothing, and no queue says more"
    return now.state, why


def _failure(run_dir: Path, state: str, words: LastWords, rules: Sequence[Rule]) -> Failure | None:
    """What Slurm did to the job outranks what the ranks said of it; a rank's own failure comes first otherwise."""
    outside = diagnose([state.upper().replace(" ", "_")], rules) or (
        diagnose([words.line], rules) if words.line and words.from_outside else None
    )
    if outside is None:
        return _first_failure(run_dir / "logs", words, rules) or find_failure(run_dir, rules)
    if outside.name == "cancelled":
        return None
    return Failure(rank=None, line=words.line or state, diagnosis=outside)


def _first_failure(logs: Path, words: LastWords, rules: Sequence[Rule]) -> Failure | None:
    """Of the rank that srun saw end first: its own words, or srun's where it was killed without any."""
    if words.first_rank is None:
        return None
    path = logs / f"rank-{words.first_rank}.log"
    lines = [line for line in _tail(path) if "*** STEP" not in line] if path.is_file() else []
    line = None if "exit code" not in words.first_line else last_error_line(lines)
    if line is None:
        line, lines = words.first_line, [words.first_line]
    return Failure(rank=words.first_rank, line=line, diagnosis=diagnose(lines, rules))


def _went_wrong(state: str) -> bool:
    fine = {
        State.COMPLETED,
        State.RUNNING,
        State.NOT_STARTED,
        State.STOPPED,
        "refused",
        "pending",
        "starting",
        "running",
        "completed",
    }
    return state not in fine


def find_failure(run_dir: Path, rules: Sequence[Rule]) -> Failure | None:
    """Of the rank that the record says failed first, else of the log that was silent first among those that end in an error.

    Where its words are of no known kind, those of the others tell it: some of Megatron's are rank 0's alone. None when no
    log holds an error. Raises RecordError.
    """
    named = first_failing_log(run_dir)
    found: list[tuple[bool, float, Failure]] = []
    for path in (run_dir / "logs").glob("*.log"):
        lines = _tail(path)
        line = last_error_line(lines)
        if line is None:
            continue
        match = _RANK_LOG.search(path.name)
        failure = Failure(
            rank=int(match[1]) if match else None, line=line, diagnosis=diagnose(lines, rules)
        )
        found.append((path != named, path.stat().st_mtime, failure))
    if not found:
        return None
    ordered = [one for *_, one in sorted(found, key=lambda one: (*one[:2], one[2].rank or 0))]
    first = next((one for one in ordered if one.rank is not None), ordered[0])
    known = (one.diagnosis for one in (first, *ordered) if one.diagnosis is not None)
    return replace(first, diagnosis=next(known, None))


def first_failing_log(run_dir: Path) -> Path | None:
    """The log of the rank that failed first, by the record of the newest attempt, else by torchrun. Raises RecordError.

    None where neither names one that there is.
    """
    logs = run_dir / "logs"
    events = read_events(run_dir).records
    begun = max((i for i, event in enumerate(events) if event.event == "start"), default=0)
    errors = (event for event in events[begun:] if event.event == "error")
    ranks = [event.fields.get("failed_rank", event.rank) for event in errors]
    if not ranks and (own := run_dir / LOG).is_file():
        ranks = _FIRST_FAILED.findall(own.read_text(errors="replace"))
    found = (logs / f"rank-{rank}.log" for rank in ranks)
    return next((log for log in found if log.is_file()), None)


_FIRST_FAILED = re.compile(r"^Root Cause.*?^ *rank *: (\d+)", re.MULTILINE | re.DOTALL)
"""As torchrun says it (torch/distributed/elastic/multiprocessing/errors, 2.11)."""


def _tail(path: Path) -> list[str]:
    with path.open("rb") as file:
        size = file.seek(0, 2)
        file.seek(max(0, size - TAIL_BYTES))
        return file.read().decode(errors="replace").splitlines()
