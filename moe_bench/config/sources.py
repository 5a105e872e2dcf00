"""Where values are read: the environment, files, and bash for the `.conf` programs. The edge of the login-node half."""

from __future__ import annotations

import itertools
import os
import select
import signal
import stat
import subprocess
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO

import msgspec

from moe_bench.config.conf import (
    ConfFile,
    ConfLog,
    ConfVariables,
    Notes,
    complaint,
    notes,
    split,
    variables,
)
from moe_bench.errors import ConfigError

_DRIVER = Path(__file__).with_name("conf.sh")
_NOT_FOR_BASH = ("BASH_ENV", "ENV", "SHELLOPTS", "BASHOPTS", "PS4", "BASH_XTRACEFD")
_TIME_LIMIT_S = 60


def process_environment() -> dict[str, str]:
    """The caller's environment."""
    return dict(os.environ)


def read_text(path: Path, *, shown: str, what: str) -> str:
    """The file as UTF-8. Raises ConfigError for what an editor or a transfer may have done to it."""
    try:
        data = _bytes_of(path, shown)
    except FileNotFoundError:
        raise ConfigError(f"{shown}: there is no such file; it should be {what}") from None
    except IsADirectoryError:
        raise ConfigError(f"{shown} is a directory; it should be {what}") from None
    except OSError as error:
        raise ConfigError(f"{shown} cannot be read: {error.strerror}") from error
    if data.startswith(b"\xef\xbb\xbf"):
        raise ConfigError(
            f"{shown} begins with a byte order mark; remove it: sed -i '1s/^\\xef\\xbb\\xbf//' {shown}"
        )
    if b"\r\n" in data:
        line = data[: data.index(b"\r\n")].count(b"\n") + 1
        raise ConfigError(
            f"{shown}:{line} has Windows line ends; remove them: sed -i 's/\\r$//' {shown}"
        )
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise ConfigError(f"{shown}:{line} is not UTF-8 text ({error.reason})") from error


def _bytes_of(path: Path, shown: str) -> bytes:
    found = path.stat()
    if not (stat.S_ISREG(found.st_mode) or stat.S_ISDIR(found.st_mode)):
        raise ConfigError(f"{shown} is a device, a pipe or a socket; it should be a plain file")
    if found.st_size > _LARGEST_BYTES:
        raise ConfigError(
            f"{shown} has {found.st_size} bytes; more than {_LARGEST_BYTES} is no configuration"
        )
    return path.read_bytes()


_LARGEST_BYTES = 4 << 20


def run_confs_each(
    files: tuple[ConfFile, ...],
    environments: Sequence[Mapping[str, str]],
    shown: Callable[[str], str],
    meanwhile: Callable[[], object] = lambda: None,
) -> Iterator[ConfVariables | ConfigError]:
    """The variables after running the files, in order, in one bash: for many environments, each by itself, in order.

    A few bash processes run those to come meanwhile. Bash's own message is in the error of an environment where a file fails.
    What a default would have been but for the caller is found out once for each MODEL and told of the others, too: it is
    half of the work, and only shown. An error of one stands in its place. Raises ConfigError for files that cannot be read or do not end.
    `meanwhile` is called once bash works on another core.
    """
    if not files:
        yield from (variables(_NOTHING, (), one, shown) for one in environments)
        return
    for file in files:
        read_text(Path(file.path), shown=file.shown, what="a bash .conf file")
    given = [_for_bash(environment) for environment in environments]
    firsts = {one.get("MODEL"): index for index, one in reversed(list(enumerate(given)))}
    asked = [_Asked(given=one, notes=firsts[one.get("MODEL")] == i) for i, one in enumerate(given)]
    batches = iter([asked[at : at + _BATCH] for at in range(0, len(asked), _BATCH)])
    processes = min(len(os.sched_getaffinity(0)), _MOST_PROCESSES)
    running = deque(_Pass(files, batch) for batch in itertools.islice(batches, processes))
    meanwhile()
    noted: dict[str | None, tuple[Notes, ...]] = {}
    try:
        while running:
            ran = running.popleft()
            ended = ran.outcomes(shown, noted)
            running.extend(_Pass(files, batch) for batch in itertools.islice(batches, 1))
            yield from ended
    finally:
        for left in running:
            left.end()


_NOTHING = ConfLog(records=(), status=0)
_MOST_PROCESSES = 8
_BATCH = 32
"""Environments that one bash process runs."""


def _for_bash(environment: Mapping[str, str]) -> dict[str, str]:
    return {name: value for name, value in environment.items() if name not in _NOT_FOR_BASH}


class _Asked(msgspec.Struct, frozen=True, kw_only=True):
    """One environment to run the files in."""

    given: Mapping[str, str]
    notes: bool
    """Whether the log is to tell of built names and of defaults."""


class _Pass:
    """One bash that runs the files once for each of some environments."""

    def __init__(self, files: tuple[ConfFile, ...], asked: list[_Asked]) -> None:
        self._files, self._asked = files, asked
        pairs = [set(one.given.items()) for one in asked]
        shared = dict(pairs[0].intersection(*pairs[1:]))
        self._log, self._said = _memory("log"), _memory("said")
        with _memory("asked") as input_:
            input_.write(b"".join(_encoded(one, shared) for one in asked))
            input_.seek(0)
            self._process = subprocess.Popen(
                ["bash", "--noprofile", "--norc", str(_DRIVER), *(file.path for file in files)],
                env=shared
                | {
                    "MOE_BENCH_CONF_FD": str(self._log.fileno()),
                    "MOE_BENCH_CONF_INPUT": str(input_.fileno()),
                },
                pass_fds=[self._log.fileno(), input_.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=self._said,
                stderr=subprocess.STDOUT,
                process_group=0,
            )

    def outcomes(
        self, shown: Callable[[str], str], noted: dict[str | None, tuple[Notes, ...]]
    ) -> list[ConfVariables | ConfigError]:
        """Waits for the process. Adds to `noted` what was found out for a MODEL. Raises ConfigError when a file does not end."""
        with self._log, self._said:
            self._wait()
            self._log.seek(0)
            logs = split(self._log.read())
            self._said.seek(0)
            said = self._said.read().decode(errors="replace").split("\0")[1:]
        found: list[ConfVariables | ConfigError] = []
        for index, asked in enumerate(self._asked):
            log = logs[index] if index < len(logs) else None
            if log is None or not log.is_whole(self._files):
                words = said[index] if index < len(said) else ""
                found.append(complaint(log, self._files, words))
                continue
            model = asked.given.get("MODEL")
            if asked.notes:
                noted[model] = notes(log, self._files, shown)
            if not asked.notes and model not in noted:  # the one that was to tell of it failed
                [alone] = run_confs_each(self._files, [asked.given], shown)
                found.append(alone)
            else:
                found.append(variables(log, self._files, asked.given, shown, noted[model]))
        return found

    def _wait(self) -> None:
        """For bash alone: what a file leaves in the background is the user's. Nothing is left of one that does not end."""
        limit_s = _TIME_LIMIT_S + 0.1 * len(self._asked)
        try:
            self._wait_for_end(limit_s)
        except subprocess.TimeoutExpired:
            self.end()
            names = ", ".join(file.shown for file in self._files)
            raise ConfigError(
                f"{names}: still running after {limit_s:.0f} s; a .conf may not wait"
            ) from None
        except BaseException:  # Ctrl-C reaches this process alone
            self.end()
            raise

    def _wait_for_end(self, limit_s: float) -> None:
        """Told by the kernel at once: Popen.wait with a limit looks every few milliseconds. Raises TimeoutExpired."""
        try:
            descriptor = os.pidfd_open(self._process.pid)
        except OSError:  # a kernel before 5.3, or a sandbox without it
            self._process.wait(timeout=limit_s)
            return
        try:
            poll = select.poll()
            poll.register(descriptor, select.POLLIN)
            if not poll.poll(1000 * limit_s):
                raise subprocess.TimeoutExpired(self._process.args, limit_s)
        finally:
            os.close(descriptor)
        self._process.wait()

    def end(self) -> None:
        """Leave nothing of it."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


def _memory(name: str) -> BinaryIO:
    """A file without a name or a disk, far cheaper than one of the tempfile module; bash inherits its descriptor."""
    return os.fdopen(os.memfd_create(f"moe_bench {name}"), "w+b")


def _encoded(asked: _Asked, shared: Mapping[str, str]) -> bytes:
    """One environment as conf.sh reads it."""
    names = " ".join(name for name in asked.given if name.isidentifier())
    own = [
        (name, value)
        for name, value in asked.given.items()
        if name.isidentifier() and shared.get(name) != value
    ]
    pairs = (text for pair in own for text in pair)
    fields = [str(int(asked.notes)), names, str(len(own)), *pairs]
    return b"".join(os.fsencode(text) + b"\0" for text in fields)


def is_file(path: Path) -> bool:
    """True when the path names a file that is there."""
    return path.is_file()


def names_in(folder: Path, suffix: str) -> list[str]:
    """Stems of the folder's files with this suffix, sorted; empty when there is no such folder."""
    return sorted(path.stem for path in folder.glob(f"*{suffix}"))
