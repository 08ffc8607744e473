"""Energy of the processor, where the machine says it: Linux' powercap, which needs the rights to read it."""

from __future__ import annotations

from pathlib import Path

POWERCAP = Path("/sys/class/powercap")


class EnergyMeter:
    """Counters of microjoules. `joules` is None where none can be read."""

    def __init__(self, folder: Path = POWERCAP) -> None:
        self.zones = [
            zone for zone in sorted(folder.glob("intel-rapl:?")) if _number(zone / "energy_uj") is not None
        ]
        self.before = self._read()

    def joules(self) -> float | None:
        """Return the joules since the meter was made or last read; counters that began again are continued."""
        if not self.zones:
            return None
        now = self._read()
        microjoules = sum(
            later - earlier
            if later >= earlier
            else later - earlier + (_number(zone / "max_energy_range_uj") or 0)
            for zone, earlier, later in zip(self.zones, self.before, now, strict=True)
        )
        self.before = now
        return microjoules / 1e6

    def _read(self) -> list[int]:
        return [_number(zone / "energy_uj") or 0 for zone in self.zones]


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):
        return None
