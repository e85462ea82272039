"""The computer this runs on: chip, cores, memory and its bandwidth.

Asks the system and trusts its answers; what fails is left out. Does not know models.
"""

import os
import platform
import re
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

CHIPS = (
    {"M1": 68, "M1 Pro": 200, "M1 Max": 400, "M1 Ultra": 800}
    | {"M2": 100, "M2 Pro": 200, "M2 Max": 400, "M2 Ultra": 800}
    | {"M3": 100, "M3 Pro": 150, "M3 Max": 400, "M3 Ultra": 819}
    | {"M4": 120, "M4 Pro": 273, "M4 Max": 546}
    | {"M5": 153, "M5 Pro": 307, "M5 Max": 614}
)
"""Memory bandwidth as stated by Apple, GB/s; sources are in `docs/benchmarks.md`."""
SMALLER = {"M3 Max": 300, "M4 Max": 410, "M5 Max": 460}
"""The same for variants with fewer than 40 GPU cores."""


@dataclass(frozen=True, kw_only=True)
class Computer:
    """cores: how many of each kind ("performance", "efficiency", "gpu"; "cpu" where kinds are not known)."""

    chip: str
    cores: Mapping[str, int]
    memory_bytes: int
    system: str

    @property
    def name(self) -> str:
        """For a file name: chip and memory, nothing that identifies the owner."""
        name = f"{self.chip} {self.memory_bytes / 2**30:.0f}gb".lower()
        return re.sub(r"[^a-z0-9]+", "-", name).strip("-")


def this_computer() -> Computer:
    """This computer, as far as the system tells."""
    mac = sys.platform == "darwin"
    return Computer(
        chip=(_sysctl("machdep.cpu.brand_string") if mac else _cpu_model()) or platform.machine(),
        cores=(_mac_cores() if mac else {}) or {"cpu": os.cpu_count() or 1},
        memory_bytes=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"macOS {platform.mac_ver()[0]}"
        if mac
        else f"{platform.system()} {platform.release().partition('-')[0]}",
    )


def bandwidth_of(computer: Computer) -> float | None:
    """Bytes per second by the table; None for a chip that is not in it (a virtual one, say)."""
    found = re.fullmatch(r"Apple (M\d+(?: \w+)?)", computer.chip)
    if not found or found[1] not in CHIPS:
        return None
    small = computer.cores.get("gpu", 40) < 40
    return 1e9 * (SMALLER.get(found[1], CHIPS[found[1]]) if small else CHIPS[found[1]])


def measured_bandwidth(nbytes: int = 2**27) -> float:
    """Bytes per second at which MLX sums (reads) or negates (reads and writes) an array; the faster one."""
    import mlx.core as mx

    x = mx.ones(nbytes // 4)
    best = 0.0
    for run, moved in ((lambda: [mx.sum(x) for _ in range(8)], 8), (lambda: [-x, -x], 4)):
        for _ in range(3):
            mx.eval(x)
            start = time.perf_counter()
            mx.eval(run())
            best = max(best, moved * x.nbytes / (time.perf_counter() - start))
    mx.clear_cache()
    return best


def _mac_cores() -> dict[str, int]:
    cores: dict[str, int] = {}
    for level in range(3):
        count = _sysctl(f"hw.perflevel{level}.physicalcpu")
        if count.isdigit():
            cores[_sysctl(f"hw.perflevel{level}.name").lower() or f"level {level}"] = int(count)
    if gpu := re.search(
        r'"sppci_cores"\s*:\s*"(\d+)"', _output_of("system_profiler", "SPDisplaysDataType", "-json")
    ):
        cores["gpu"] = int(gpu[1])
    return cores


def _cpu_model() -> str:
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def _sysctl(name: str) -> str:
    return _output_of("sysctl", "-n", name)


def _output_of(*command: str) -> str:
    """The output of a command; empty if it fails in any way."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError, ValueError):
        return ""
    return done.stdout.strip()
