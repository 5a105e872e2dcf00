"""NVIDIA's management library for tests: the real nvidia-ml-py loads a stub of the driver's shared object."""

from __future__ import annotations

import subprocess
from pathlib import Path

HEALTHY = {
    "init": "0",
    "driver": "580",
    "cuda": "13000",
    "count": "1",
    "first": "0",
    "name": "1",
    "GPU-aa": "0",
    "power_mw": "350500",
    "sm_clock_mhz": "1980",
    "utilization": "97",
    "memory_used": str(3 << 29),
    "reasons": "4",
    "ecc": "2",
}
"""One GPU of UUID aa; its power cap (4) and two old ECC errors are no fault."""


class NvmlStub:
    """A folder with the library, and what it answers."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._answers = folder, folder / "answers"
        source = Path(__file__).with_name("nvml_stub.c")
        library = folder / "libnvidia-ml.so.1"
        command = ["cc", "-shared", "-fPIC", "-Wall", "-Werror", "-o", str(library), str(source)]
        subprocess.run(command, check=True)
        self.answer(HEALTHY)

    def answer(self, answers: dict[str, str]) -> None:
        """From now on."""
        aside = self._folder / "answers.part"
        aside.write_text("".join(f"{name} {value}\n" for name, value in answers.items()))
        aside.replace(self._answers)

    @property
    def environment(self) -> dict[str, str]:
        """For a process that is to find it."""
        return {"LD_LIBRARY_PATH": str(self._folder), "NVML_STUB": str(self._answers)}
