"""Where values are read: the environment, files, and bash for the `.conf` programs. The edge of the login-node half."""

from __future__ import annotations

import os
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path

from moe_bench.config.conf import ConfFile, ConfVariables, complaint, is_whole, variables
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
        data = path.read_bytes()
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


def run_confs(
    files: tuple[ConfFile, ...], environment: Mapping[str, str], shown: Callable[[str], str]
) -> ConfVariables:
    """The variables after running the files, in order, in one bash. Raises ConfigError with bash's own message."""
    if not files:
        return variables(b"", (), environment, shown)
    for file in files:
        read_text(Path(file.path), shown=file.shown, what="a bash .conf file")
    given = {name: value for name, value in environment.items() if name not in _NOT_FOR_BASH}
    with tempfile.TemporaryFile() as log:
        driven = given | {
            "MOE_BENCH_CONF_FD": str(log.fileno()),
            "MOE_BENCH_CONF_GIVEN": " ".join(name for name in given if name.isidentifier()),
        }
        try:
            done = subprocess.run(
                ["bash", "--noprofile", "--norc", str(_DRIVER), *(file.path for file in files)],
                env=driven,
                pass_fds=[log.fileno()],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                timeout=_TIME_LIMIT_S,
                check=False,
            )
        except subprocess.TimeoutExpired:
            names = ", ".join(file.shown for file in files)
            raise ConfigError(
                f"{names}: still running after {_TIME_LIMIT_S} s; a .conf may not wait"
            ) from None
        log.seek(0)
        written = log.read()
    if done.returncode != 0 or not is_whole(written, files):
        raise complaint(written, files, done.stdout.decode(errors="replace"), done.returncode)
    return variables(written, files, given, shown)


def is_file(path: Path) -> bool:
    """True when the path names a file that is there."""
    return path.is_file()


def names_in(folder: Path, suffix: str) -> list[str]:
    """Stems of the folder's files with this suffix, sorted; empty when there is no such folder."""
    return sorted(path.stem for path in folder.glob(f"*{suffix}"))
