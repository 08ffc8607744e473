"""What a sweep varies: `--vary key=value,value` becomes named runs, each paired with one on labels alone."""

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
    """One run of a sweep: its values, its config, and the name of the run on labels alone that it is held against."""

    values: Mapping[str, Any]
    config: Config
    baseline: str

    @property
    def name(self) -> str:
        return name_of(self.values)


def parse_vary(texts: Sequence[str]) -> dict[str, list[Any]]:
    """`key=value,value` of each text, by key; values are YAML, so `[[0, 0]]` may be one."""
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
    """Every combination once, seed by seed, each with its baseline before it.

    With `one_at_a_time` the config as it is, and then each value of each key alone: as many runs as values.

    `load` makes the config from overrides. Of a value that a run does not use (a setting of a loss that it leaves
    out) nothing is said in its name, so such runs are one. Raises `ConfigError` for what the config refuses.
    """
    labels_only(load([]))  # every run is held against it
    available = [name for name in load([]).losses.active() if name != LABELS]
    _check_losses(vary, available)
    axes = {key: _expanded(key, values, available) for key, values in vary.items()}
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


def _combinations(axes: Mapping[str, list[Any]], *, one_at_a_time: bool) -> Iterator[dict[str, Any]]:
    """Values by key, the seed in the outermost loop."""
    seeds = {key: values for key, values in axes.items() if key == SEED}
    others = {key: values for key, values in axes.items() if key != SEED}
    grids = [{}, *({key: values} for key, values in others.items())] if one_at_a_time else [others]
    for of_seed in product(*seeds.values()):
        for grid in grids:
            for values in product(*grid.values()):
                yield dict(zip((*seeds, *grid), (*of_seed, *values), strict=True))


def name_of(values: Mapping[str, Any], *, between: str = ",") -> str:
    """`losses=all,data.fraction=0.1,train.seed=0`: a run's name, and its folder's."""
    return between.join(f"{key}={_text(value)}" for key, value in values.items()).replace("/", "_")


def _variation(load: LoadConfig, values: Mapping[str, Any], available: Sequence[str]) -> Variation:
    kept = _losses_of(str(values[LOSS_SET]), available)
    used = {key: value for key, value in values.items() if _is_used(key, kept)}
    config = load([f"{key}={json.dumps(value)}" for key, value in used.items() if key != LOSS_SET])
    losses = {name: getattr(config.losses, name) for name in (LABELS, *kept)}
    baseline = {key: value for key, value in used.items() if _is_used(key, ())} | {LOSS_SET: "none"}
    config = config.model_copy(update={"losses": LossesConfig(**losses), "baseline": False})
    return Variation(_ordered(used), config, name_of(_ordered(baseline)))


def _check_losses(vary: Mapping[str, list[Any]], available: Sequence[str]) -> None:
    """A setting of a loss that the config does not have would be used by no run, and so never be read."""
    for key in vary:
        section, *rest = key.split(".")
        if section == LOSS_SET and rest and rest[0] not in (LABELS, *available):
            raise ConfigError(
                f"--vary {key}: the config has no losses.{rest[0]}; its losses are {', '.join((LABELS, *available))}"
            )


def _is_used(key: str, kept: Sequence[str]) -> bool:
    section, *rest = key.split(".")
    return section != LOSS_SET or not rest or rest[0] in (LABELS, *kept)


def _ordered(values: Mapping[str, Any]) -> dict[str, Any]:
    """The loss set first, the seed last, the others as they were given."""
    return dict(sorted(values.items(), key=lambda item: (item[0] != LOSS_SET, item[0] == SEED)))


def _expanded(key: str, values: Sequence[Any], available: Sequence[str]) -> list[Any]:
    if key != LOSS_SET:
        return list(values)
    expanded: list[str] = []
    for value in map(str, values):
        expanded += [f"all-{name}" for name in available] if value == LEAVE_ONE_OUT else [value]
    # Names joined in another order are the same set.
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


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, separators=(",", ":"))
