"""What `bench/reading.py` makes of its readings: rates, ratios and bytes of each contestant, bars, and tables."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from typing import Any

OURS, WINDOWS = "ours", "ours, windows of 32"
MODES = {"codes": False, "float32": True}
ANY_SAMPLE = "any sample"
READ_ACCESS = {
    OURS: ANY_SAMPLE,
    WINDOWS: "windows of 32 neighbours, shuffled inside",
    "webdataset": "sequential, shuffle buffer of 64",
    "lmdb": ANY_SAMPLE,
    "arrow": ANY_SAMPLE,
    "litdata": "its own shuffle",
    "mds": ANY_SAMPLE,
}
# What is asked of the store; the rates are samples a second.
MIN_WARM_RATE, MAX_BYTES_RATIO = 300, 1.3


def summary(name: str, readings: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Median, least and greatest of a contestant's rates, of ours over its own, repeat by repeat, and bytes."""
    figures: dict[str, Any] = {"contestant": name, "access": READ_ACCESS[name]}
    for mode in MODES:
        for files in ("cold", "warm"):
            mine = _rates(readings, name, mode, files)
            figures[f"{mode} {files}"] = {"samples_per_second": _spread(mine)} | {
                f"{which}_over_it": _ratios(_rates(readings, whose, mode, files), mine)
                for which, whose in (("ours", OURS), ("windows", WINDOWS))
            }
        warm = [
            row for row in readings if (row["contestant"], row["mode"], row["files"]) == (name, mode, "warm")
        ]
        figures[f"{mode} cpu_ms"] = statistics.median(
            1000 * row["cpu_seconds"] / row["samples"] for row in warm
        )
    mine = [row for row in readings if row["contestant"] == name]
    cold = [row for row in mine if row["files"] == "cold"]
    for field, rows in (("used_bytes", mine), ("asked_bytes", mine), ("disk_bytes", cold)):
        figures[f"{field}_per_sample"] = statistics.median(row[field] / row["samples"] for row in rows)
    return figures


def _rates(readings: Sequence[dict[str, Any]], name: str, mode: str, files: str) -> list[float]:
    wanted = {"contestant": name, "mode": mode, "files": files}
    rows = [row for row in readings if wanted.items() <= row.items()]
    return [row["samples"] / row["seconds"] for row in sorted(rows, key=lambda row: row["repeat"])]


def _ratios(ours: Sequence[float], theirs: Sequence[float]) -> dict[str, float]:
    return _spread([our / their for our, their in zip(ours, theirs, strict=True)])


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "least": min(values), "greatest": max(values)}


def bars(contestants: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """What was asked of the store, what was found, and whether that is enough."""
    ours = next(figures for figures in contestants if figures["contestant"] == OURS)
    peers = [figures for figures in contestants if figures["contestant"] not in (OURS, WINDOWS)]
    found: list[tuple[str, float, str, float]] = []
    for mode in MODES:
        found += [(bar, ratio, ">=", 1.0) for bar, ratio in _against(peers, mode)]
        rate = ours[f"{mode} warm"]["samples_per_second"]["median"]
        found.append((f"{mode}, warm: samples a second", rate, ">=", MIN_WARM_RATE))
    for field, what in (("asked_bytes", "asked for"), ("disk_bytes", "that the disk gave, cold")):
        ratio = ours[f"{field}_per_sample"] / ours["used_bytes_per_sample"]
        found.append((f"bytes {what} over bytes used", ratio, "<=", MAX_BYTES_RATIO))
    return [
        {"bar": bar, "found": value, "asked": f"{sign} {limit:g}",
         "met": value >= limit if sign == ">=" else value <= limit}
        for bar, value, sign, limit in found
    ]  # fmt: skip


def _against(peers: Sequence[dict[str, Any]], mode: str) -> Iterator[tuple[str, float]]:
    """Cold the best peer, and the best of those with the same kind of access; warm WebDataset, in both ways."""
    cold, warm = f"{mode} cold", f"{mode} warm"
    direct = [figures for figures in peers if figures["access"] == ANY_SAMPLE]
    nearby = [figures for figures in peers if figures["access"] != ANY_SAMPLE]
    for some, which, what in (
        (peers, "ours", "ours over the best peer"),
        (direct, "ours", "ours over the best that gets any sample"),
        (nearby, "windows", f"{WINDOWS}, over the best that shuffles nearby"),
    ):
        if some:
            best = max(some, key=lambda figures: figures[cold]["samples_per_second"]["median"])
            yield f"{mode}, cold: {what}, {best['contestant']}", best[cold][f"{which}_over_it"]["median"]
    for figures in peers:
        if figures["contestant"] == "webdataset":
            yield f"{mode}, warm: ours over webdataset", figures[warm]["ours_over_it"]["median"]
            yield f"{mode}, warm: {WINDOWS}, over webdataset", figures[warm]["windows_over_it"]["median"]


def table(figures: dict[str, Any]) -> str:
    """Rates, bytes and bars as text."""
    parts = [
        f"{figures['samples_read']} of {figures['samples']} synthetic samples of {figures['sample_bytes']:,.0f} "
        f"bytes, one process, {figures['repeats']} repeats: median (least..greatest)"
    ]
    parts += [_aligned(_rates_table(figures, mode, files)) for mode in MODES for files in ("cold", "warm")]
    rows = [("bytes a sample", "used", "asked for by read calls", "given by the disk, cold", "access")]
    for contestant in figures["contestants"]:
        numbers = (contestant[f"{field}_bytes_per_sample"] for field in ("used", "asked", "disk"))
        rows.append((contestant["contestant"], *(f"{n:,.0f}" for n in numbers), contestant["access"]))
    parts.append(_aligned(rows))
    rows = [("bar", "found", "asked", "met")]
    rows += [
        (bar["bar"], f"{bar['found']:.2f}", bar["asked"], "yes" if bar["met"] else "NO")
        for bar in figures["bars"]
    ]
    parts.append(_aligned(rows))
    parts += [f"absent: {peer}: {reason}" for peer, reason in figures["absent"].items()]
    return "\n\n".join(parts)


def _rates_table(figures: dict[str, Any], mode: str, files: str) -> list[tuple[str, ...]]:
    rows = [(f"{mode}, {files}", "samples/s", "ours over it", "windows over it", "CPU ms, warm")]
    for contestant in figures["contestants"]:
        found = contestant[f"{mode} {files}"]
        rates = _spelled(found["samples_per_second"], 0)
        ratios = (_spelled(found[f"{which}_over_it"], 2) for which in ("ours", "windows"))
        rows.append((contestant["contestant"], rates, *ratios, f"{contestant[f'{mode} cpu_ms']:.2f}"))
    return rows


def _spelled(spread: dict[str, float], digits: int) -> str:
    return f"{spread['median']:.{digits}f} ({spread['least']:.{digits}f}..{spread['greatest']:.{digits}f})"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows
    )
