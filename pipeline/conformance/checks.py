"""The checks of the suite: each compares what a model gives through the door with what it gives by itself."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.conformance.specimen import Specimen, answers_of
from pipeline.models.files.checkpoint import Checkpoint
from pipeline.models.stub import load_teacher
from pipeline.models.tap import TAPPED
from pipeline.models.teacher_plan import plan_tensors
from pipeline.models.vlm import Forward
from pipeline.targets.attention import AttentionTarget

ROUNDING = 2e-6  # between two ways to compute one softmax in float32
ROUNDING_OF_LOGITS = 1e-4  # of the largest logit, between two ways to compute a whole forward


@dataclass(frozen=True)
class Check:
    """The result of a check: the largest difference that was found, and the largest that is allowed."""

    name: str
    found: float
    allowed: float

    @property
    def passed(self) -> bool:
        return self.found <= self.allowed  # not for NaN


@torch.no_grad()
def tap_equals_eager(specimen: Specimen, *, on_the_left: bool) -> Check:
    """The rows of the tap are those of eager attention."""
    batch, features = specimen.batch(on_the_left=on_the_left), specimen.features()
    vlm = specimen.vlm
    made = _all_layers(specimen, batch, features)
    vlm.decoder.set_attn_implementation({"": "eager"})
    try:
        outputs = vlm.network(**vlm.inputs(batch, features), use_cache=False, output_attentions=True)
    finally:
        vlm.decoder.set_attn_implementation({"": TAPPED})
    eager = [attention for attention in outputs.attentions if attention is not None]
    found = max(_largest(_taken(whole, made), made.attention[layer]) for layer, whole in enumerate(eager))
    side = "left" if on_the_left else "right"
    return Check(f"the tap equals eager attention, padding on the {side}", found, ROUNDING)


def _taken(whole: Tensor, made: Forward) -> Tensor:
    """Return text rows and vision columns of eager attention 'B H S S': 'B H T J', zero where there are none."""
    text, vision = made.slots.text, made.slots.vision
    rows = whole.gather(2, text.clamp(min=0)[:, None, :, None].expand(-1, whole.shape[1], -1, whole.shape[3]))
    columns = vision.clamp(min=0)[:, None, None].expand(*rows.shape[:3], -1)
    real = (text >= 0)[:, None, :, None] & (vision >= 0)[:, None, None, :]
    return rows.gather(3, columns) * real


@torch.no_grad()
def samples_do_not_depend_on_their_batch(specimen: Specimen) -> Check:
    """A sample's attention is the same alone and padded among others."""
    together = _all_layers(specimen, specimen.batch(), specimen.features())
    found = 0.0
    for number in range(len(specimen.samples)):
        alone = _all_layers(specimen, specimen.batch([number]), specimen.features([number]))
        for layer, attention in alone.attention.items():
            rows, columns = attention.shape[2:]
            inside = together.attention[layer][number : number + 1, :, :rows, :columns]
            found = max(found, _largest(inside, attention))
    return Check("a sample's attention does not depend on its batch", found, ROUNDING)


@torch.no_grad()
def features_given_equal_features_computed(specimen: Specimen) -> Check:
    """Logits from features that were computed before are those from pixels, to the last bit."""
    chosen = [n for n, sample in enumerate(specimen.samples) if sample.sizes]
    batch, features = specimen.batch(chosen), specimen.features(chosen)
    vlm = specimen.vlm
    given = vlm.inputs(batch, features)
    pixels = vlm.joined(specimen.pixels(chosen))
    computed = {name: value for name, value in given.items() if name != "mm_encoder_outputs"}
    computed |= {name: value for name, value in pixels.items() if name in vlm.accepted}
    real = batch["attention_mask"].bool()
    one, other = (vlm.network(**inputs, use_cache=False).logits[real] for inputs in (given, computed))
    return Check("features given equal features computed", _largest(one, other), 0.0)


@torch.no_grad()
def stub_equals_whole(specimen: Specimen) -> Check:
    """A stub, which has only the tensors that a target needs, gives the same attention to the last bit."""
    assert specimen.plan is not None
    whole = _all_layers(specimen, specimen.batch(), specimen.features())
    found = 0.0
    for layer in range(specimen.num_attentions):
        targets = {"attention": AttentionTarget(layers=[layer], heads="each")}
        plan = plan_tensors(Checkpoint(str(specimen.plan.checkpoint.folder)), specimen.plan.config, targets)
        stub = load_teacher(plan, dtype=torch.float32, device=torch.device("cpu"))
        pixels, sizes = specimen.pixels(), [size for sample in specimen.samples for size in sample.sizes]
        forward = stub.forward(specimen.batch(), stub.encode_images(pixels, sizes) if pixels else None)
        found = max(found, _largest(forward.attention[layer], whole.attention[layer]))
    return Check("a stub equals the whole model", found, 0.0)


def gradients_survive_checkpointing(specimen: Specimen) -> Check:
    """Gradients of attention and logits are the same with gradient checkpointing."""
    network = specimen.vlm.network
    network.requires_grad_(True)
    plain = _gradients(specimen)
    network.train()
    network.activation_checkpointing_enable({"use_reentrant": False})
    try:
        again = _gradients(specimen)
    finally:
        network.activation_checkpointing_disable()
        network.eval().requires_grad_(False)
    largest = max(float(one.abs().max()) for one in plain.values())
    found = max(_largest(one, again[name]) for name, one in plain.items()) / largest
    return Check("gradients are the same with gradient checkpointing", found, ROUNDING)


def _gradients(specimen: Specimen) -> dict[str, Tensor]:
    """Return the gradient of a sum over attention and logits in every parameter that has one."""
    specimen.vlm.network.zero_grad(set_to_none=True)
    made = _all_layers(specimen, specimen.batch(), specimen.features())
    assert made.logits is not None
    total = made.logits.float().logsumexp(dim=-1).mean()
    for attention in made.attention.values():
        total = total + attention.square().sum() * 10
    total.backward()
    named = specimen.vlm.network.named_parameters()
    found = {name: p.grad.clone() for name, p in named if p.grad is not None}
    specimen.vlm.network.zero_grad(set_to_none=True)
    return found


@torch.no_grad()
def it_generates(specimen: Specimen) -> Check:
    """The first generated token is the likeliest one of the same prompt's forward; counts the samples where not."""
    vlm, wrong = specimen.vlm, 0
    for number in range(len(specimen.samples)):
        batch, features = specimen.batch([number]), specimen.features([number])
        # Without a least number of tokens, which would forbid an answer that ends at once.
        made = vlm.generate(batch, features, max_new_tokens=2, do_sample=False)
        last = torch.zeros_like(batch["attention_mask"], dtype=torch.bool)
        last[:, -1] = True
        logits = vlm.forward(batch, features, answers=last).logits
        assert logits is not None
        wrong += int(logits.argmax(dim=-1) != made[:, 0])
    return Check("generation begins as the forward says", float(wrong), 0.0)


CHECKS: tuple[Callable[[Specimen], Check], ...] = (
    lambda specimen: tap_equals_eager(specimen, on_the_left=False),
    lambda specimen: tap_equals_eager(specimen, on_the_left=True),
    samples_do_not_depend_on_their_batch,
    features_given_equal_features_computed,
    stub_equals_whole,
    gradients_survive_checkpointing,
    it_generates,
)


def _all_layers(specimen: Specimen, batch: dict[str, Any], features: Any) -> Forward:
    return specimen.vlm.forward(
        batch, features, layers=range(specimen.num_attentions), answers=answers_of(batch)
    )


def _largest(one: Tensor, other: Tensor) -> float:
    """Return the largest absolute difference; NaN where one has NaN, 0 of nothing."""
    difference = (one.float() - other.float()).abs()
    return float(difference.max()) if difference.numel() else 0.0
