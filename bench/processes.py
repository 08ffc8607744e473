"""What a process counts of itself, from /proc; imports nothing but the standard library."""

from __future__ import annotations

from pathlib import Path


def counters(file: str) -> dict[str, int]:
    """Return the numbers of /proc/self/FILE (status, io, smaps_rollup) by name; what is listed in kB as bytes."""
    found = {}
    for line in Path("/proc/self", file).read_text().splitlines():
        name, _, value = line.partition(":")
        number, *unit = value.split() or [""]
        if number.isdigit():
            found[name] = int(number) * (1024 if unit == ["kB"] else 1)
    return found


def reset_peak() -> None:
    """Make VmHWM, the peak of the resident memory, begin at what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
