"""Which release's flags hold: what is said, what the checkout is, what is installed."""

from __future__ import annotations

from pathlib import Path

import pytest

from moe_bench.config.release import find_release, installed
from moe_bench.config.run import Origin, Setting
from moe_bench.errors import ConfigError


def setting(value: str) -> Setting:
    return Setting(value=value, origin=Origin(layer="environment", place="environment"))


@pytest.mark.parametrize(
    ("said", "release"),
    [
        ("0.11.0", "0.11.0"),
        ("v0.11.0", "0.11.0"),
        ("core_v0.13.1", "0.13.1"),
        ("0.16", "0.16"),
        ("core_r0.15.0", None),
        ("0.12.0rc3", "0.12.0"),
        ("latest", None),
        ("11", None),
    ],
)
def test_spellings_of_a_release(said: str, release: str | None) -> None:
    if release is None:
        with pytest.raises(ConfigError, match="is not a Megatron-Core release"):
            find_release(setting(said), None)
    else:
        assert find_release(setting(said), None).value == release


def test_a_checkout_says_its_own(tmp_path: Path) -> None:
    info = tmp_path / "megatron" / "core" / "package_info.py"
    info.parent.mkdir(parents=True)
    info.write_text("MAJOR = 0\nMINOR = 14\nPATCH = 2\nPRE_RELEASE = ''\n")
    found = find_release(None, setting(str(tmp_path)))
    assert (found.value, found.origin.layer) == ("0.14.2", "default")


def test_the_installed_one_is_found_by_its_folder(tmp_path: Path) -> None:
    (tmp_path / "megatron_core-0.17.1.dist-info").mkdir()
    assert installed(["/nowhere", str(tmp_path)]) == "0.17.1"
    assert installed(["/nowhere"]) is None
