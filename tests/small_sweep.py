"""A sweep's folder as `alignkd sweep` leaves it, written by hand: three variations, two seeds, known numbers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from small_store import fill_part, manifest

from cache import StoreWriter

TYPES = {"colour": 40, "yes/no": 60}
TEACHER = {"colour": 1.0, "yes/no": 0.9}
# Variation -> shares by seed and type; beside them the means over seeds.
SHARES: dict[str, list[dict[str, float]]] = {
    "all": [{"colour": 0.95, "yes/no": 0.85}, {"colour": 0.85, "yes/no": 0.85}],  # colour 0.90, yes/no 0.85
    "attention": [{"colour": 0.9, "yes/no": 0.75}, {"colour": 0.8, "yes/no": 0.75}],  # 0.85, 0.75
    "none": [{"colour": 0.8, "yes/no": 0.65}, {"colour": 0.7, "yes/no": 0.65}],  # 0.75, 0.65
}
TERMS = {
    "none": ("supervised",),
    "attention": ("supervised", "attention"),
    "all": ("supervised", "attention", "vision_all"),
}
STEPS, SAMPLES_SEEN = 30, 96
SEEDS = (0, 1)


def overall(shares: dict[str, float]) -> float:
    return sum(shares[name] * TYPES[name] for name in TYPES) / sum(TYPES.values())


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def write_sweep(
    folder: Path,
    *,
    store: Path,
    variations: Sequence[str] = tuple(SHARES),
    test_sets: Sequence[str] = ("test",),
    gradient_shares: bool = True,
) -> Path:
    """`losses` is varied. A variation not in `SHARES` has the numbers of `all`."""
    folder.mkdir(parents=True)
    lines = [
        _line(name, seed, shares, test_sets)
        for name in variations
        for seed, shares in zip(SEEDS, SHARES.get(name, SHARES["all"]), strict=True)
    ]
    rows = [_row(name, test_set) for test_set in test_sets for name in variations]
    teacher = {name: {t: [TEACHER[t], n] for t, n in TYPES.items()} for name in test_sets}
    for scores in teacher.values():
        scores["all"] = [overall(TEACHER), sum(TYPES.values())]
    config = {"output_dir": "runs/sweep", "cache": {"path": str(store)}, "train": {"seed": 0}}
    _write(
        folder / "sweep.json", {"config": config, "runs": {line["name"]: line["identity"] for line in lines}}
    )
    _write(folder / "summary.json", {"rows": rows, "teacher": teacher})
    (folder / "runs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for line in lines:
        write_run(folder / line["folder"], line["terms"], config=config, gradient_shares=gradient_shares)
    return folder


def write_run(
    folder: Path,
    terms: Sequence[str],
    *,
    config: dict[str, Any],
    gradient_shares: bool = True,
    scale: float = 1,
) -> None:
    """A run's log and provenance; a term falls as 4/2^(step/10), weighted by a half, of equal gradient."""
    history = []
    for step in range(10, STEPS + 1, 10):
        entry: dict[str, float] = {"step": step, "epoch": 0.1, "loss": 1.0, "learning_rate": 1e-3}
        for term in terms:
            entry[f"loss/{term}"] = 4 * scale / 2 ** (step / 10)
            entry[f"loss/{term}_weighted"] = entry[f"loss/{term}"] / 2
            if gradient_shares:
                entry[f"gradient_share/{term}"] = 1 / len(terms)
        history.append(entry)
    end = {"train_runtime": 48.0, "train_samples_per_second": 2.0, "train_steps_per_second": 0.625,
           "samples_seen": SAMPLES_SEEN}  # fmt: skip
    folder.mkdir(parents=True)
    _write(folder / "trainer_state.json",
           {"global_step": STEPS, "log_history": [*history, {"step": STEPS, **end}]})  # fmt: skip
    _write(folder / "provenance.json", {
        "config": config, "git_commit": "0123456789abcdef", "command": "alignkd sweep",
        "created": "2025-11-21T10:00:00+00:00", "versions": {"python": "3.11", "torch": "2.13"},
    })  # fmt: skip


def write_timed_store(path: Path) -> Path:
    """Six samples in two parts, 1.5 seconds each."""
    writer = StoreWriter.open(path, manifest())
    for name, prefix in (("shard-000000", "a"), ("shard-000001", "b")):
        with writer.part(name, source={}) as part:
            fill_part(part, prefix)
            part.commit(seen=4, seconds=1.5)
    return path


def change(file: Path, **values: object) -> None:
    """Put other values into a JSON file."""
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def _line(name: str, seed: int, shares: dict[str, float], test_sets: Sequence[str]) -> dict[str, Any]:
    scores = {t: [share, TYPES[t]] for t, share in shares.items()}
    scores["all"] = [overall(shares), sum(TYPES.values())]
    run = f"losses={name},train.seed={seed}"
    return {
        "name": run,
        "values": {"losses": name, "train.seed": seed},
        "baseline": f"losses=none,train.seed={seed}",
        "folder": f"runs/{run}",
        "accuracy": dict.fromkeys(test_sets, scores),
        "terms": dict.fromkeys(TERMS.get(name, TERMS["all"]), 0.5),
        "steps": STEPS,
        "samples_seen": SAMPLES_SEEN,
        "train_seconds": 48.0 + seed,
        "samples_per_second": 2.0 + seed,
        "threads": 1,
        "identity": "0",
    }


def _row(name: str, test_set: str) -> dict[str, Any]:
    by_seed = [overall(shares) for shares in SHARES.get(name, SHARES["all"])]
    none = [overall(shares) for shares in SHARES["none"]]
    difference = mean(by_seed) - mean(none)
    gain = {"difference": difference, "low": difference - 0.04, "high": difference + 0.03,
            "num_questions": 100, "num_images": 20, "num_seeds": 2}  # fmt: skip
    way = overall(TEACHER) - mean(none)
    return {
        "variation": {"losses": name},
        "label": f"losses={name}",
        "seeds": list(SEEDS),
        "test_set": test_set,
        "accuracy": mean(by_seed),
        "accuracy_by_seed": by_seed,
        "by_type": {t: mean([s[t] for s in SHARES.get(name, SHARES["all"])]) for t in TYPES},
        "baseline_by_type": {t: mean([s[t] for s in SHARES["none"]]) for t in TYPES} | {"all": mean(none)},
        "questions": 100,
        "gain": None if name == "none" else gain,
        "gap_closed": None if name == "none" else difference / way,
    }


def _write(file: Path, value: Any) -> None:
    file.write_text(json.dumps(value, indent=1) + "\n")
