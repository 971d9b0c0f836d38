"""The high-water mark of this process's memory, as Linux counts it. Shared by the benchmarks of this folder."""

import re
from pathlib import Path


def high_water_mark() -> int:
    """Peak resident memory since the mark was reset, in bytes."""
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


def reset_high_water_mark() -> int:
    """Set the mark to what is resident now, and return it in bytes."""
    Path("/proc/self/clear_refs").write_text("5")
    return high_water_mark()
