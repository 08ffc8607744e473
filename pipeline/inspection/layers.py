"""Which of a teacher's layers look at the image: measured at the last prompt position, without labels."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from pipeline.config.config import Config
from pipeline.data.load_preparation import load_preparation
from pipeline.data.preparation import Preparation, pad_tokens
from pipeline.data.shard_names import expand_shards
from pipeline.data.shards import Sample
from pipeline.data.swapped_samples import Item, pairs_of, samples_in_turns, with_images_of
from pipeline.errors import ConfigError, building
from pipeline.losses.divergences import jensen_shannon
from pipeline.models.anatomy import anatomy_of
from pipeline.models.loading import load_network
from pipeline.models.tap import query_to_vision, recording
from pipeline.models.vlm import VisionLanguageModel
from pipeline.positions import find_slots, last_prompt_positions

MIN_SAMPLES = 8
READ_FOR_ONE = 8  # samples read for each that is measured: an image may have several questions
AT_ONCE = 2  # triples: query and key of all layers are in memory
SMALLEST = 1e-12

# A sample, one with another question about its images, and one with other images.
Triple = tuple[Sample, Sample, Sample]


@dataclass(frozen=True)
class LayerLook:
    """How a layer looks from the last prompt position: means over samples, all from 0 to 1.

    `on_image` is the share of its attention that falls on vision tokens. `by_question` and `by_image` say how much
    its distribution over them changes with another sample's question, and with another sample's image: Jensen-Shannon
    divergences as shares of the largest one, log 2.
    """

    layer: int
    on_image: float
    by_question: float
    by_image: float

    @property
    def score(self) -> float:
        """How much attention the question moves: what a layer that looks for the asked thing has most of."""
        return self.on_image * self.by_question


@dataclass(frozen=True)
class LayerLooks:
    """The layers of `teacher`; `questions` and `images` are the samples that were compared with another one of these.

    Only layers before `wipe_layer` are suggested: behind it a pruned model sees no vision token.
    """

    teacher: str
    looks: Sequence[LayerLook]
    questions: int
    images: int
    wipe_layer: int | None = None

    @property
    def why(self) -> str:
        """Why no layer is suggested; empty if one is."""
        if self.questions < MIN_SAMPLES:
            return f"{self.questions} images with two questions were found, and {MIN_SAMPLES} are needed"
        return ""

    @property
    def suggested(self) -> int | None:
        """The layer whose attention the question moves most; None if that could not be measured."""
        seen = [look for look in self.looks if self.wipe_layer is None or look.layer < self.wipe_layer]
        return None if self.why else max(seen, key=lambda look: look.score).layer

    def to_json(self) -> str:
        fields: dict[str, Any] = asdict(self) | {"suggested": self.suggested, "why": self.why}
        return json.dumps(fields, indent=1) + "\n"


def measure_layers(config: Config, *, num_samples: int) -> LayerLooks:
    """Measure every layer with attention of the config's teacher, on samples of `data.shards`.

    Raises `ConfigError` if no two samples of these have images.
    """
    name = config.teacher.model
    preparation = load_preparation(name, config.data)
    shards = expand_shards(config.data.captured_shards())
    with closing(samples_in_turns(shards, preparation, only_new=False)) as samples:
        triples = triples_of(list(islice(samples, READ_FOR_ONE * num_samples)), num_samples)
    if not triples:
        raise ConfigError(
            "data.shards: no two samples with images and different answers were found, so that no image can be "
            "swapped; name shards with images"
        )
    network = load_network(name, dtype=config.teacher.dtype).eval()
    with building(f"teacher {name} on a GPU", then="set teacher.dtype to bfloat16"):
        network = network.to("cuda" if torch.cuda.is_available() else "cpu")
    found = list(_Measurement(VisionLanguageModel(network), preparation).of(triples))
    num_layers = len(anatomy_of(network.config).attention)
    wipe_layer = None if config.twig is None else config.twig.wipe_layer_of(num_layers)
    return _means(name, found, wipe_layer)


def triples_of(samples: Sequence[Sample], most: int) -> list[Triple]:
    """Return at most `most` samples, each of images that no other one has, with another question and another image.

    The other question is about the same image, where there is one; which of an image's questions comes first differs
    from image to image, because data often begin with the same kind.
    """
    by_images: dict[tuple[str, ...], list[Sample]] = {}
    for sample in samples:
        by_images.setdefault(tuple(sample.image_digests), []).append(sample)
    chosen = [group[n % len(group)] for n, group in enumerate(by_images.values())]
    triples = []
    for one, other in pairs_of(chosen[:most]):
        alike = by_images[tuple(one.image_digests)]
        asking = next((sample for sample in alike if _question(sample) != _question(one)), other)
        triples.append((one, asking, other))
    return triples


def _question(sample: Sample) -> str:
    return sample.conversations[0]["value"]


def _means(name: str, found: Sequence[_OfTriple], wipe_layer: int | None) -> LayerLooks:
    num_layers = len(found[0].on_image) if found else 0
    asked = [one.by_question for one in found if one.by_question is not None]
    imaged = [one.by_image for one in found if one.by_image is not None]

    def mean(of: Sequence[Tensor], layer: int) -> float:
        return float(torch.stack(list(of))[:, layer].mean()) if of else 0.0

    looks = [
        LayerLook(n, mean([one.on_image for one in found], n), mean(asked, n), mean(imaged, n))
        for n in range(num_layers)
    ]
    return LayerLooks(name, looks, len(asked), len(imaged), wipe_layer)


@dataclass(frozen=True)
class _OfTriple:
    """Of one triple, float32 'L' each; None where the questions are alike, or the numbers of vision tokens differ."""

    on_image: Tensor
    by_question: Tensor | None
    by_image: Tensor | None


@dataclass(frozen=True)
class _Measurement:
    vlm: VisionLanguageModel
    preparation: Preparation

    def of(self, triples: Sequence[Triple]) -> Iterator[_OfTriple]:
        """Yield what each triple that can be used shows."""
        read = [found for triple in triples if (found := self._items(triple)) is not None]
        for start in range(0, len(read), AT_ONCE):
            some = read[start : start + AT_ONCE]
            on_image, shares, numbers = self._attention([item for three in some for item in three])
            for place, (own, other_question, other_image) in zip(
                range(0, 3 * len(some), 3), some, strict=True
            ):
                mine, asked, seen = (shares[:, place + n, : numbers[place + n]] for n in range(3))
                if not all(bool(one.any()) for one in (mine, asked, seen)):
                    continue  # a question before any image
                is_asked = _prompt(own) != _prompt(other_question)
                is_seen = own[0].sizes == other_image[0].sizes
                yield _OfTriple(
                    on_image[:, place],
                    _change(mine, asked) if is_asked else None,
                    _change(mine, seen) if is_seen else None,
                )

    def _items(self, triple: Triple) -> tuple[Item, Item, Item] | None:
        """Return a sample, the other question about its images, and its own question about the other images."""
        one, asking, other = triple
        own = with_images_of(self.preparation, one, one)
        asked = with_images_of(self.preparation, asking, one)
        seen = with_images_of(self.preparation, one, other)
        return (own, asked, seen) if own and asked and seen else None

    @torch.inference_mode()
    def _attention(self, items: Sequence[Item]) -> tuple[Tensor, Tensor, list[int]]:
        """Return the share on the images 'L B', the shares of vision tokens 'L B J', and J of each item."""
        vlm = self.vlm
        tokens, images = [one for one, _ in items], [image for _, of_item in items for image in of_item]
        sizes = [size for one in tokens for size in one.sizes]
        batch = pad_tokens(tokens, self.preparation.image_token_id)
        batch = {name: one.to(vlm.device) if isinstance(one, Tensor) else one for name, one in batch.items()}
        slots = find_slots(batch["is_vision"], batch["attention_mask"])
        rows = last_prompt_positions(batch["labels"], batch["attention_mask"])
        layers = range(len(anatomy_of(vlm.config).attention))
        with recording(layers, stop_at=layers[-1]) as made:
            vlm.network(**vlm.inputs(batch, vlm.encode(images, sizes)), use_cache=False)
        whole, alone = (
            torch.stack(
                [
                    query_to_vision(made.kept[n], rows, slots.vision, whole_row=w).mean(dim=1).cpu()
                    for n in layers
                ]
            )
            for w in (True, False)
        )
        return whole.sum(dim=2), alone, [sum(one.sizes) for one in tokens]


def _prompt(item: Item) -> tuple[int, ...]:
    """Return the ids before the first answer."""
    ids, labels = item[0].input_ids, item[0].labels
    first = next(n for n, label in enumerate(labels) if label >= 0)
    return tuple(ids[:first])


def _change(one: Tensor, other: Tensor) -> Tensor:
    """Return the Jensen-Shannon divergence of distributions 'L J', as a share of the largest: 'L'."""
    logs = ((shares / shares.sum(dim=1, keepdim=True)).clamp(min=SMALLEST).log() for shares in (one, other))
    return jensen_shannon(*logs) / math.log(2)
