"""Plan a sweep: `--vary key=value,value` becomes named runs, each with a labels-only run as its baseline."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml

from pipeline.config.config import Config, LossesConfig, labels_only
from pipeline.config.yaml_text import read_yaml
from pipeline.errors import ConfigError

LOSS_SET = "losses"
SEED = "train.seed"
LABELS = "supervised"
LEAVE_ONE_OUT = "leave-one-out"

LoadConfig = Callable[[Sequence[str]], Config]


@dataclass(frozen=True)
class Variation:
    """One run of a sweep: its values, its config, and the name of the labels-only run that it is compared with."""

    values: Mapping[str, Any]
    config: Config
    baseline: str

    @property
    def name(self) -> str:
        return name_of(self.values)


def parse_vary(texts: Sequence[str]) -> dict[str, list[Any]]:
    """Parse texts `key=value,value` into lists by key. Values are YAML, so `[[0, 0]]` may be one."""
    vary: dict[str, list[Any]] = {}
    for text in texts:
        key, equals, values = text.partition("=")
        try:
            parsed = read_yaml(f"[{values}]") if equals else None
        except (yaml.YAMLError, RecursionError) as error:
            raise ConfigError(f"--vary {text!r}: the values are not readable as YAML: {error}") from error
        if not key or not parsed:
            raise ConfigError(f"--vary {text!r}: expected key=value,value such as losses=none,all")
        if key in vary:
            raise ConfigError(f"--vary {text!r}: {key} is varied twice; give all its values at once")
        vary[key] = parsed
    return vary


def plan_runs(
    load: LoadConfig, vary: Mapping[str, list[Any]], *, one_at_a_time: bool = False
) -> list[Variation]:
    """Return every combination of the values once, seed by seed, each after its baseline.

    With `one_at_a_time`: the config as it is, and then each value of each key alone. `load` makes a config from
    overrides. A value that a run does not use (a setting of a loss that it leaves out) is left out of its name, so
    runs that differ in it alone are one. Raises `ConfigError` for what the config refuses.
    """
    config = load([])
    labels_only(config)  # raises if no baseline can be made
    available = [name for name in config.losses.active() if name != LABELS]
    for (
        key
    ) in vary:  # a setting of a loss that the config lacks would be used by no run, and never be checked
        section, *rest = key.split(".")
        if section == LOSS_SET and rest and rest[0] not in (LABELS, *available):
            raise ConfigError(
                f"--vary {key}: the config has no losses.{rest[0]}; its losses are {', '.join((LABELS, *available))}"
            )
    axes = {key: _loss_sets(values, available) if key == LOSS_SET else values for key, values in vary.items()}
    runs: dict[str, Variation] = {}
    for combination in _combinations(axes, one_at_a_time=one_at_a_time):
        values = {LOSS_SET: "all"} | combination
        for chosen in ({**values, LOSS_SET: "none"}, values):
            run = _variation(load, chosen, available)
            if runs.setdefault(run.name, run).config != run.config:
                raise ConfigError(
                    f"--vary: two runs would share the name {run.name!r}; write the values otherwise"
                )
    return list(runs.values())


def name_of(values: Mapping[str, Any], *, between: str = ",") -> str:
    """Return a run's name, which is also its folder's: `losses=all,data.fraction=0.1,train.seed=0`."""
    texts = {
        key: value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
        for key, value in values.items()
    }
    return between.join(f"{key}={text}" for key, text in texts.items()).replace("/", "_")


def _combinations(axes: Mapping[str, list[Any]], *, one_at_a_time: bool) -> Iterator[dict[str, Any]]:
    """Values by key, the seed in the outermost loop."""
    seeds = {key: values for key, values in axes.items() if key == SEED}
    others = {key: values for key, values in axes.items() if key != SEED}
    grids = [{}, *({key: values} for key, values in others.items())] if one_at_a_time else [others]
    for of_seed in product(*seeds.values()):
        for grid in grids:
            for values in product(*grid.values()):
                yield dict(zip((*seeds, *grid), (*of_seed, *values), strict=True))


def _variation(load: LoadConfig, values: Mapping[str, Any], available: Sequence[str]) -> Variation:
    kept = _losses_of(str(values[LOSS_SET]), available)
    # The loss set first, the seed last, the others in the order given.
    ordered = dict(sorted(values.items(), key=lambda item: (item[0] != LOSS_SET, item[0] == SEED)))
    used = {key: value for key, value in ordered.items() if _is_used(key, kept)}
    config = load([f"{key}={json.dumps(value)}" for key, value in used.items() if key != LOSS_SET])
    losses = {name: getattr(config.losses, name) for name in (LABELS, *kept)}
    config = config.model_copy(update={"losses": LossesConfig(**losses), "baseline": False})
    baseline = {key: value for key, value in used.items() if _is_used(key, ())} | {LOSS_SET: "none"}
    return Variation(used, config, name_of(baseline))


def _is_used(key: str, kept: Sequence[str]) -> bool:
    section, *rest = key.split(".")
    return section != LOSS_SET or not rest or rest[0] in (LABELS, *kept)


def _loss_sets(values: Sequence[Any], available: Sequence[str]) -> list[str]:
    """Expand `leave-one-out`, and put joined names in the config's order, since any order is the same set."""
    expanded: list[str] = []
    for value in map(str, values):
        expanded += [f"all-{name}" for name in available] if value == LEAVE_ONE_OUT else [value]
    return ["+".join(_losses_of(value, available)) if "+" in value else value for value in expanded]


def _losses_of(loss_set: str, available: Sequence[str]) -> list[str]:
    """Names of the losses of a set: `none`, `all`, `all-attention`, or names joined by `+`."""
    if loss_set == "none":
        return []
    whole, _, left_out = loss_set.partition("-")
    if whole == "all" and (not left_out or left_out in available):
        return [name for name in available if name != left_out]
    chosen = loss_set.split("+")
    if unknown := [name for name in chosen if name not in available]:
        raise ConfigError(
            f"--vary losses: {unknown[0]!r} is no loss set of this config; its losses are "
            f"{', '.join(available) or 'none but labels'}, to be joined by +; or none, all, all-<loss>, "
            f"{LEAVE_ONE_OUT}"
        )
    return [name for name in available if name in chosen]
