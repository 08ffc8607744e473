"""A twig as a folder beside its base: `twig.safetensors`, and `config.json` that names the base by its digest."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from torch import Tensor

from pipeline.config.provenance import replace_text
from pipeline.errors import ConfigError, building, writing
from pipeline.models.anatomy import empty_network
from pipeline.models.checkpoint_names import source_names
from pipeline.models.files.broken_files import named_if_broken
from pipeline.models.files.checkpoint import Checkpoint
from pipeline.twig.base_identity import BaseIdentity
from pipeline.twig.geometry import Geometry
from pipeline.twig.module import Twig

WEIGHTS = "twig.safetensors"
CONFIG = "config.json"
DRAFT_IDS = "draft_ids"  # a tensor of ids beside the parameters
ATTACH_LAYER = "attach_layer"  # also beside the tensors: they fit any layer, and were trained for one
MODEL_TYPE = "alignkd_twig"
FORMAT = 1


def save_twig(folder: Path, twig_tensors: dict[str, Tensor], geometry: Geometry, base: BaseIdentity) -> None:
    """Write a twig's tensors, as `Twig.state_dict` names them, and what it belongs to.

    Whether it has a pruning head is known from the names of its tensors.
    """
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "model_type": MODEL_TYPE,
        "format": FORMAT,
        "attach_layer": geometry.attach_layer,
        "num_layers": geometry.num_layers,
        "wipe_layer": geometry.wipe_layer,
        "base": base.to_json(),
    }
    with writing(folder):
        # Not save_file, whose files only their owner may read.
        tensors = {name: tensor.contiguous() for name, tensor in twig_tensors.items()}
        (folder / WEIGHTS).write_bytes(save(tensors, metadata={ATTACH_LAYER: str(geometry.attach_layer)}))
        replace_text(folder / CONFIG, json.dumps(fields, indent=1) + "\n")


def read_twig_config(folder: Path) -> tuple[Geometry, BaseIdentity]:
    """Return where a twig grows and what it belongs to. Raises `ConfigError` for a folder without a twig."""
    file = folder / CONFIG
    if not file.is_file():
        raise ConfigError(f"{folder}: no {CONFIG}; name a folder that `alignkd twig train` wrote")
    with named_if_broken(file, kind="a twig's config", then="train the twig again, or restore the file"):
        fields = json.loads(file.read_text())
        if fields.get("model_type") != MODEL_TYPE or fields.get("format") != FORMAT:
            found = f"{fields.get('model_type')!r}, format {fields.get('format')}"
            raise ConfigError(
                f"{file}: {MODEL_TYPE!r} of format {FORMAT} was asked for, found {found}; name a folder that "
                "`alignkd twig train` wrote"
            )
        base = BaseIdentity.from_json(fields["base"])
        places = [fields[name] for name in (ATTACH_LAYER, "num_layers", "wipe_layer")]
        if strange := [place for place in (*places, base.num_layers) if type(place) is not int]:
            raise ValueError(f"a whole number of layers was expected, found {strange[0]!r}")
    try:
        return Geometry(*places, num_base_layers=base.num_layers), base
    except ConfigError as error:
        raise ConfigError(f"{file}: {error}") from error


def load_twig(folder: str | Path, network: Any) -> Twig:
    """Load a twig for its base, a model in memory, in the base's dtype and on its device, for generation.

    Raises `ConfigError` if it belongs to another base, or if its files do not fit together.
    """
    folder = Path(folder)
    geometry, base = read_twig_config(folder)
    base.check_is(network, asked_by=f"the twig in {folder}")
    tensors = read_tensors(folder)
    _check_attach_layer(folder, geometry)
    prunes = any(name.startswith("pruning_head.") for name in tensors)
    twig = Twig.empty(network.config, geometry, dtype=network.dtype, prunes=prunes)
    fill_twig(twig, tensors, source=folder)
    return twig.to(network.device, network.dtype).eval().requires_grad_(False)


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """Return the tensors of a twig's folder."""
    file = folder / WEIGHTS
    if not file.is_file():
        raise ConfigError(f"{folder}: no {WEIGHTS}; name a folder that `alignkd twig train` wrote")
    with named_if_broken(file):
        return load_file(file)


def _check_attach_layer(folder: Path, geometry: Geometry) -> None:
    """Raise `ConfigError` if the tensors were trained on another layer. Earlier versions wrote none beside them."""
    with safe_open(folder / WEIGHTS, framework="pt") as tensors:
        trained = (tensors.metadata() or {}).get(ATTACH_LAYER)
    if trained not in (None, str(geometry.attach_layer)):
        raise ConfigError(
            f"{folder / CONFIG}: attach_layer is {geometry.attach_layer}, but {WEIGHTS} was trained on layer "
            f"{trained}; use the config.json that belongs to the twig"
        )


def fill_twig(twig: Twig, tensors: dict[str, Tensor], *, source: object) -> None:
    """Fill a twig that has no weights. Raises `ConfigError` unless the tensors are just those that it has."""
    expected, ids = twig.state_dict(), tensors.get(DRAFT_IDS)
    tensors = {name: tensor for name, tensor in tensors.items() if name != DRAFT_IDS}
    strange = sorted(expected.keys() ^ tensors.keys())
    strange += [
        name for name, tensor in tensors.items() if name in expected and tensor.shape != expected[name].shape
    ]
    if strange:
        raise ConfigError(
            f"{source}: its tensors are not those of a twig of this base; {strange[0]!r} is missing, unknown or of "
            "another shape; use the config.json that belongs to the twig"
        )
    if ids is not None:
        _check_draft_ids(ids, len(expected["head.weight"]), source)
    with building(f"twig {source}", then="use the files that `alignkd twig train` wrote"):
        twig.load_state_dict(tensors, assign=True)
    if ids is not None:
        twig.shorten(ids)


def _check_draft_ids(ids: Tensor, vocab_size: int, source: object) -> None:
    is_list = ids.dtype == torch.int64 and ids.ndim == 1 and len(ids) > 0
    if not is_list or int(ids.min()) < 0 or int(ids.max()) >= vocab_size:
        raise ConfigError(
            f"{source}: {DRAFT_IDS} {ids.dtype} {tuple(ids.shape)} are no list of ids from 0 to {vocab_size - 1}; "
            "use the files that `alignkd twig train` wrote"
        )


def first_weights(
    twig: Twig, checkpoint: Checkpoint, config: Any, *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return the tensors that a twig begins with: those of base layers K..K+T-1, of its norm and of its head.

    Reads these tensors of the checkpoint, and no others. Raises `ConfigError` if one is missing.
    """
    return read_as(twig.names_in_base(config), checkpoint, empty_network(config), dtype=dtype)


def read_as(
    names: Mapping[str, str], checkpoint: Checkpoint, network: Any, *, dtype: torch.dtype
) -> dict[str, Tensor]:
    """Return tensors of a checkpoint by names of ours; `names` gives for each its name in the network."""
    sources = source_names(network, checkpoint.names())
    wanted: dict[str, list[str]] = {}
    for name, of_network in names.items():
        wanted.setdefault(sources.get(of_network, of_network), []).append(name)
    tensors: dict[str, Tensor] = {}
    for source, tensor in checkpoint.tensors(wanted):
        tensors |= {name: tensor.to(dtype).clone() for name in wanted[source]}
    return tensors
