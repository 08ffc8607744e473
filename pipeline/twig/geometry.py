"""Where a twig grows, and how many vision tokens the pruned model keeps."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

from pipeline.config.twig_settings import TwigConfig
from pipeline.errors import ConfigError


@dataclass(frozen=True)
class Geometry:
    """A twig's place on a base of `num_base_layers` decoder layers (L).

    `attach_layer` (K) base layers run before the twig, which has `num_layers` (T) of its own. Pruned layers are K to
    Kf-1; before layer `wipe_layer` (Kf) the vision tokens that are left are dropped, too. Raises `ConfigError` for
    numbers that do not fit together.
    """

    attach_layer: int
    num_layers: int
    wipe_layer: int
    num_base_layers: int

    def __post_init__(self) -> None:
        first, own, wipe, base = self.attach_layer, self.num_layers, self.wipe_layer, self.num_base_layers
        if own < 1 or first < 0 or first + own > base:
            raise ConfigError(
                f"twig: attach_layer (K) {first} and num_layers (T) {own} asked for, the base has {base} layers; "
                f"choose K from 0 on and T from 1 on, with K + T at most {base}"
            )
        if not first < wipe <= base:
            raise ConfigError(
                f"twig: wipe_layer (Kf) {wipe} asked for, the twig is attached at layer {first} of {base}; choose it "
                f"from {first + 1} to {base} ({base}: nothing is wiped)"
            )

    def num_kept(self, num_tokens: int, keep: float) -> int:
        """Return R, the vision tokens of `num_tokens` (M) that stay after layer K.

        `keep` is the share of vision tokens kept on average over all layers, the wiped ones included (R̄ / M):
        R = ceil((L keep M - K M) / (Kf - K)), TwigVLM's Eq. 6, always rounded up. Raises `ConfigError` unless
        1 <= R <= M.
        """
        first, wipe, base = self.attach_layer, self.wipe_layer, self.num_base_layers
        # A share such as 1/9 is a float a little off: exact fractions would round its error up to a whole token.
        budget = (base * Fraction(keep).limit_denominator(10**6) - first) * num_tokens / (wipe - first)
        kept = math.ceil(budget)
        if 1 <= kept <= num_tokens:
            return kept
        spent, most = first / base, wipe / base
        raise ConfigError(
            f"keep: {keep:.4g} of {num_tokens} vision tokens asked for, which would leave {kept} from layer {first} "
            f"on; the layers before the twig alone use {spent:.4g}, and the layers before layer {wipe} use at most "
            f"{most:.4g}: choose a share between"
        )


def geometry_of(settings: TwigConfig, num_base_layers: int) -> Geometry:
    """Return where the config's twig grows. Raises `ConfigError` for numbers that do not fit together."""
    wipe = settings.wipe_layer_of(num_base_layers)
    return Geometry(settings.attach_layer, settings.num_layers, wipe, num_base_layers)
