"""`alignkd plan --on-paper`: the bytes of a store and the hours of both stages, from two config.json alone.

No shard, weight or processor is read, and nothing is measured. What no config says is assumed, and the result lists
every assumption.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from math import prod
from typing import Any

import numpy as np

from cache import CODECS, ArraySpec
from pipeline.config.config import Config
from pipeline.data.pairing import check_pair
from pipeline.errors import ConfigError, building
from pipeline.models.anatomy import anatomy_of, empty_network
from pipeline.models.configuration import read_config
from pipeline.models.files.checkpoint import small_files
from pipeline.models.teacher_plan import facts_of_config
from pipeline.models.vlm import VisionLanguageModel
from pipeline.readable import readable_bytes, readable_seconds
from pipeline.targets.target import Target, TeacherFacts
from pipeline.targets.targets import deepest_layer, hidden_layer
from pipeline.text_table import text_table
from pipeline.upkeep.assumptions import Assumptions

PARTS: tuple[str, ...] = ("tower", "projector", "embeddings", "layers", "head")
# A forward and a backward, which computes the gradients of inputs and of weights.
FORWARDS_OF_TRAINING = 3
LEFT_OUT = (
    "attention's own products, losses, trained heads, the optimizer, decoding of images, loading of data, "
    "compression and the index of the store, the baseline"
)
NOT_COMPARED = "tokenizer, chat template, image preprocessing, vision tokens that differ from image to image"


@dataclass(frozen=True)
class PaperModel:
    """A model without weights: its facts, and its parameters, name -> (part, number of values).

    Parameters that no forward reads are left out.
    """

    config: Any
    facts: TeacherFacts
    sizes: Mapping[str, tuple[str, int]]

    def parameters(self, deepest: int | None = None, hidden: int | None = None) -> dict[str, int]:
        """Return the parameters by part that are read, as `Anatomy.needed`."""
        count = Counter(dict.fromkeys(PARTS, 0))
        for name in self.sizes.keys() & set(anatomy_of(self.config).needed(deepest, hidden)):
            part, size = self.sizes[name]
            count[part] += size
        return dict(count)

    def forward(
        self, lengths: Mapping[str, float], deepest: int | None = None, hidden: int | None = None
    ) -> dict[str, float]:
        """Return the operations of a sample's forward by part: 2 for each parameter and position."""
        weights = self.parameters(deepest, hidden)
        if deepest is None:  # a tied head has the embeddings' parameters
            weights["head"] = self.facts.hidden_size * self.facts.vocab_size
        return {part: 2 * weights[part] * lengths[part] for part in PARTS}

    def training(self, lengths: Mapping[str, float], *, checkpointing: bool) -> float:
        """Return the operations of a sample's training step; the frozen tower runs forward alone.

        Checkpointing runs the layers of the decoder forward once more.
        """
        once = self.forward(lengths)
        tower = once.pop("tower")
        return tower + FORWARDS_OF_TRAINING * sum(once.values()) + checkpointing * once["layers"]

    def to_json(self) -> dict[str, Any]:
        return asdict(self.facts) | {"parameters": self.parameters()}


@dataclass(frozen=True)
class PaperTarget:
    """A target's bytes, before compression; 0 if it is not stored."""

    name: str
    source: str
    bytes_per_sample: float
    total_bytes: float


@dataclass(frozen=True)
class PaperPlan:
    """What two configs say of an experiment. Operations are of a sample, hours of all samples once.

    `stub_share` is the share of the teacher's parameters that the targets without logits need; None without such.
    """

    teacher: PaperModel
    student: PaperModel
    stub_share: float | None
    targets: tuple[PaperTarget, ...]
    stage_1_operations: float
    stage_2_operations: float
    assumptions: Assumptions

    @property
    def total_bytes(self) -> float:
        return sum(target.total_bytes for target in self.targets)

    def hours(self, operations: float) -> float:
        """Return the hours of all samples at the assumed speed."""
        return operations * self.assumptions.samples / (1e12 * self.assumptions.tflops) / 3600

    def to_json(self) -> dict[str, Any]:
        return {
            "teacher": self.teacher.to_json(),
            "student": self.student.to_json(),
            "stub_share": self.stub_share,
            "targets": [asdict(target) for target in self.targets],
            "bytes_per_sample": sum(target.bytes_per_sample for target in self.targets),
            "total_bytes": self.total_bytes,
            "stage_1": {
                "operations_per_sample": self.stage_1_operations,
                "hours": self.hours(self.stage_1_operations),
            },
            "stage_2": {
                "operations_per_sample": self.stage_2_operations,
                "hours": self.hours(self.stage_2_operations),
            },
            "assumptions": self.assumptions.model_dump(),
            "left_out": LEFT_OUT,
            "not_compared": NOT_COMPARED,
        }


def plan_on_paper(config: Config, assumptions: Assumptions) -> PaperPlan:
    """Return the plan of an experiment. Raises `ConfigError` for a pair that stage 2 would refuse by its configs."""
    teacher, student = (_model(role, getattr(config, role).model) for role in ("teacher", "student"))
    check_pair(config, student.config, teacher.facts, of=config.teacher.model)
    assumed = assumptions.completed(teacher.facts, student.facts)
    targets, without_logits = config.targets, _of_a_stub(config.targets.active())
    sizes = tuple(_target(name, target, teacher.facts, assumed) for name, target in targets.active().items())
    training = student.training(assumed.of_student(), checkpointing=config.student.gradient_checkpointing)
    return PaperPlan(
        teacher=teacher,
        student=student,
        stub_share=_share(teacher, without_logits) if without_logits else None,
        targets=sizes,
        stage_1_operations=_of_targets(teacher, targets.cached(), assumed),
        stage_2_operations=training + _of_targets(teacher, targets.recomputed(), assumed),
        assumptions=assumed,
    )


def _model(role: str, name: str) -> PaperModel:
    folder = small_files(name)
    if folder is None:
        raise ConfigError(
            f"{role}.model {name}: no such local folder, and the hub gave no config.json; check the path, or the "
            "name and the network"
        )
    config = read_config(folder)
    with building(f"{role} {name}", then="use the config.json that belongs to the checkpoint"):
        network = empty_network(config)
        groups, projector = anatomy_of(config).groups(), VisionLanguageModel(network).connector_names
        sizes = {
            parameter: (_part(groups[parameter], parameter in projector), tensor.numel())
            for parameter, tensor in network.named_parameters()
            if parameter in groups
        }
        return PaperModel(config, facts_of_config(name, config), sizes)


def _part(group: str, is_projector: bool) -> str:
    if group == "vision":
        return "projector" if is_projector else "tower"
    return "layers" if group.startswith("layer") else group


def _of_a_stub(targets: Mapping[str, Target]) -> dict[str, Target]:
    return {name: target for name, target in targets.items() if target.deepest is not None}


def _share(teacher: PaperModel, targets: Mapping[str, Target]) -> float:
    needed = teacher.parameters(deepest_layer(targets), hidden_layer(targets))
    return sum(needed.values()) / sum(teacher.parameters().values())


def _of_targets(teacher: PaperModel, targets: Mapping[str, Target], assumed: Assumptions) -> float:
    """Operations of a sample's forward of as much of the teacher as the targets need."""
    if not targets:
        return 0.0
    forward = teacher.forward(assumed.of_teacher(), deepest_layer(targets), hidden_layer(targets))
    return sum(forward.values())


def _target(name: str, target: Target, facts: TeacherFacts, assumed: Assumptions) -> PaperTarget:
    specs = target.arrays(facts)  # raises what the teacher cannot give, also if it is not stored
    each = 0.0 if target.is_recomputed else sum(_stored_bytes(spec, assumed) for spec in specs)
    source = "recompute" if target.is_recomputed else "cache"
    return PaperTarget(name, source, each, each * assumed.samples)


def _stored_bytes(spec: ArraySpec, assumed: Assumptions) -> float:
    """Bytes of a sample's rows, as the codec stores them before compression."""
    images = assumed.images_per_sample
    positions = assumed.of_teacher()["layers"]
    by_axis = {"R": images * assumed.text_rows, "I": images, "P": assumed.answer_tokens, "S": positions}
    rows = by_axis[spec.axes[0]]
    of_one = spec.with_tokens(assumed.vision_tokens)
    return rows * sum(
        prod(array.row_shape) * np.dtype(array.dtype).itemsize for array in CODECS[spec.codec].stored(of_one)
    )


def describe_on_paper(plan: PaperPlan) -> str:
    """Return the page that `alignkd plan --on-paper` prints."""
    sizes = [(t.name, t.source, t.bytes_per_sample, t.total_bytes) for t in plan.targets]
    sizes.append(("store", "", sum(size[2] for size in sizes), plan.total_bytes))
    rows = [[name, source, *map(readable_bytes, of)] for name, source, *of in sizes]
    stub = "no target here can come from a stub of the teacher"
    if plan.stub_share is not None:
        stub = f"stub: the targets without logits need {plan.stub_share:.1%} of the teacher's parameters"
    blocks = [
        "on paper: the two config.json were read, and nothing was measured",
        text_table([["", "teacher", "student"], *_model_rows(plan.teacher, plan.student)]),
        stub,
        text_table([["before compression", "source", "bytes a sample", "in all"], *rows]),
        _time("stage 1", plan, plan.stage_1_operations) + "\n"
        + _time("stage 2", plan, plan.stage_2_operations) + ", for one epoch of one student",
        text_table([["assumed", "", ""], *_assumed(plan)]),
        f"left out: {LEFT_OUT}\nnot compared: {NOT_COMPARED}",
    ]  # fmt: skip
    return "\n\n".join(blocks)


def _assumed(plan: PaperPlan) -> Iterator[list[str]]:
    fixed = {
        "vision_tokens": plan.teacher.facts.num_vision_tokens,
        "student_vision_tokens": plan.student.facts.num_vision_tokens,
    }
    for name, value in plan.assumptions.model_dump().items():
        yield [name, f"{value:,}", "fixed by config.json" if fixed.get(name) else ""]


def _time(stage: str, plan: PaperPlan, operations: float) -> str:
    time, speed = readable_seconds(3600 * plan.hours(operations)), plan.assumptions.tflops
    return f"{stage}: {operations / 1e12:.3g} TFLOP a sample, {time} at {speed:g} TFLOP/s"


def _model_rows(*models: PaperModel) -> Iterator[list[str]]:
    """Rows of both models side by side: facts, then millions of parameters by part."""
    facts = [asdict(model.facts) for model in models]
    for field in facts[0]:
        yield [field.replace("_", " "), *(_shown(of[field]) for of in facts)]
    parameters = [model.parameters() for model in models]
    for part in PARTS:
        yield [f"{part}, M parameters", *(f"{of[part] / 1e6:,.1f}" for of in parameters)]
    yield ["all, M parameters", *(f"{sum(of.values()) / 1e6:,.1f}" for of in parameters)]


def _shown(value: Any) -> str:
    return "by the image" if value is None else str(value)
