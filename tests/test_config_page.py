"""docs/config.md: no key without a meaning, and what it says of readers, store and run is what the code does."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from small_experiment import rewrite_store

from docs.config_page import Key, config_page, keys_of, sections_of
from pipeline.config.cache_settings import CacheConfig
from pipeline.config.config import Config
from pipeline.distill.parts import open_dataset
from pipeline.distill.training.run_identity import RunIdentity
from pipeline.evaluation.answer_scores import metrics_for
from pipeline.evaluation.experiment import run_experiment
from pipeline.evaluation.scores import evaluate_checkpoint
from pipeline.settings import Section
from pipeline.teacher_cache.teacher import cache_teacher, plan_capture
from pipeline.twig.training.train import train_twig

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SECTIONS = dict(sections_of("", Config))
KEYS = {
    f"{path}.{key.name}".strip("."): key for path, section in SECTIONS.items() for key in keys_of(section)
}


def test_the_page_is_what_the_models_say():
    assert (ROOT / "docs" / "config.md").read_text() == config_page(), "stale; run `python -m docs.generate`"


@pytest.mark.parametrize("path", SECTIONS)
def test_every_key_has_a_meaning_a_unit_and_a_reader(path: str):
    section = SECTIONS[path]
    assert section.__doc__ and len(section.__doc__) > 10
    for key in keys_of(section):  # raises for a docstring of another form
        assert len(key.meaning) > 10 and key.meaning.endswith("."), key.name


class _Wrong(Section):
    """Keys as they must not be."""

    undescribed: int = 1
    no_reader: str = ""
    """What it means. [text]"""
    no_unit: float = 1.0
    """What it means. [stage 2]"""
    a_unit_of_a_word: str = ""
    """What it means. [bytes; stage 2]"""
    unknown_part: str = ""
    """What it means. [stage 2; shop]"""


@pytest.mark.parametrize("name", _Wrong.model_fields)
def test_a_key_without_what_the_page_needs_is_refused(name: str):
    with pytest.raises(ValueError, match=name):
        Key.of(name, _Wrong.model_fields[name])


# Who reads a key

# Between them these configs use every key.
VARIANTS = (
    [
        "evaluate=null",
        "data.max_length=60",
        "data.mirror={tmp}/mirror",
    ],  # a sample is too long, and is rejected
    [
        "baseline=true",
        "cache.mirror={tmp}/mirror",
        "data.mirror={tmp}/mirror",
        "targets.attention.codec=fixed_point",
        "targets.vision.codec=fixed_point",
        "targets.logits.tail_samples=2",
        "targets.hidden_states={}",
        "targets.final_hidden={}",
        "targets.query_attention={layer: 0}",
        "losses.logits.direction=forward",
        "student.lora={}",
    ],
)
A_TWIG = ["student=null", "evaluate=null", "losses={query_attention: {}, prediction: {}}"]
A_TWIG += ["targets={hidden_states: {layer: 1}, query_attention: {layer: 0}, final_hidden: {}}"]
A_TWIG += ["twig={attach_layer: 1, num_layers: 1, keep: 0.5, lora: {}, pruning_head: true}"]
REINFORCED = [one for one in A_TWIG if not one.startswith("losses")] + [
    "losses={policy: {keep: [0.5], group: 2}}"
]
REINFORCED += ["losses.supervised=null", "twig.first_weights={tmp}/3/run/twig", "twig.lora=null"]
SEVERAL = ["cache=null", 'caches=[{path: "{tmp}/0/store"}]', "evaluate=null", "data.max_length=60"]


@contextmanager
def recorded_reads() -> Iterator[set[tuple[type, str]]]:
    """Record which keys of which section are read as attributes."""
    reads: set[tuple[type, str]] = set()
    plain = Section.__getattribute__

    def record(self: Section, name: str) -> Any:
        reads.update((kind, name) for kind in type(self).__mro__ if name in getattr(kind, "model_fields", ()))
        return plain(self, name)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Section, "__getattribute__", record)
        yield reads


def test_the_readers_of_a_key_are_those_that_read_it(experiment, tmp_path, capsys):
    reads: dict[str, set[tuple[type, str]]] = {"stage 1": set(), "stage 2": set(), "evaluate": set()}
    for number, variant in enumerate((*VARIANTS, SEVERAL, A_TWIG, REINFORCED)):
        output = tmp_path / str(number)
        store = [f"cache.path={output}/store"] if variant is not SEVERAL else []
        overrides = [text.replace("{tmp}", str(tmp_path)) for text in (*variant, *store)]
        config = experiment.config(output, *overrides)
        works: dict[str, Callable[[], Any]] = {"stage 2": lambda c=config: run_experiment(c, say=print)}
        if variant in (A_TWIG, REINFORCED):
            works = {"stage 2": lambda c=config, run=output / "run": train_twig(c, run)}
        if variant is not SEVERAL:
            works = {"stage 1": lambda c=config: cache_teacher(c), **works}
        if config.evaluate is not None:
            works["evaluate"] = lambda c=config: metrics_for(
                c.evaluate, evaluate_checkpoint(c, str(experiment.teacher))
            )
        for name, work in works.items():
            with recorded_reads() as of_work:
                work()
            reads[name] |= of_work
    found = {
        f"{path}.{key.name}".strip("."): tuple(name for name in reads if (section, key.name) in reads[name])
        for path, section in SECTIONS.items()
        for key in keys_of(section)
    }
    # An entry of `caches` takes the keys of `cache`, which stage 1 reads, too.
    of_cache = {f"caches.{key.name}": found[f"cache.{key.name}"] for key in keys_of(CacheConfig)}
    assert {name: key.readers for name, key in KEYS.items()} == found | of_cache


# What a key is part of

ANY = "[tokenizer, template, image_preprocessing, capture]"  # fields of the fingerprint
ONE_STORE = [f"cache.allow_mismatch={ANY}"]
MEANS = [*ONE_STORE, "losses.attention.heads=mean"]


def caches(path: str = "{store}", allowed: str = ANY, **more: str) -> list[str]:
    """Return overrides for a list of one store."""
    others = "".join(f", {name}: {value}" for name, value in more.items())
    return ["cache=null", f"caches=[{{path: '{path}', allow_mismatch: {allowed}{others}}}]"]


def of_target(name: str, setting: str, needed: str = "") -> tuple[list[str], list[str]]:
    """Return overrides that add a target with what it needs, and with a setting."""
    plain = [*ONE_STORE, f"targets.{name}={{{needed}}}"]
    return plain, [*plain, f"targets.{name}.{setting.replace(': ', '=')}"]


TWIG = [*ONE_STORE, "student=null", "losses={}", "targets={hidden_states: {layer: 1}}"]
TWIG += ["twig={attach_layer: 1, num_layers: 2, lora: {}}"]
DISTILLED = [*TWIG, "targets={hidden_states: {layer: 1}, query_attention: {layer: 0}, final_hidden: {}}"]
DISTILLED += ["losses={query_attention: {}, prediction: {}}", "twig.pruning_head=true"]
REINFORCING = [*TWIG, "losses={policy: {}, supervised: null}", "twig.pruning_head=true", "twig.lora=null"]
REINFORCING += ["data.held_out_shards={shard}", "train.eval_strategy=epoch", "train.save_strategy=epoch"]
REINFORCING += ["train.load_best_model_at_end=true", "twig.first_weights={tmp}/twig"]


# Key -> another value, or the overrides of two configs that differ in this key alone. Places are filled in.
OTHER: dict[str, str | tuple[list[str], list[str]]] = {
    "output_dir": "{tmp}/elsewhere",
    "on_missing": (caches(), [*caches(), "on_missing=skip"]),
    "train": "{learning_rate: 0.5}",
    "baseline": "true",
    "log_gradient_shares": "true",
    "teacher.model": "{student}",
    "teacher.dtype": "bfloat16",
    "teacher.device": "cpu:0",
    "teacher.batch_size": "7",
    "teacher.blind_ok": "true",
    "student.model": "{other_student}",
    "student.dtype": "bfloat16",
    "student.gradient_checkpointing": "true",
    "student.projector_learning_rate": "0.5",
    "student.head_learning_rate": "0.5",
    "student.patch_feature_cache_bytes": "1000",
    "student.lora.rank": "3",
    "student.lora.alpha": "3",
    "student.lora.dropout": "0.5",
    "student.lora.target_modules": "[q_proj]",
    "twig.attach_layer": (TWIG, [*TWIG, "targets.hidden_states={layer: 0}", "twig.attach_layer=0"]),
    "twig.num_layers": "1",
    "twig.wipe_layer": "3",
    "twig.keep": "0.5",
    "twig.pruning_head": (
        [*DISTILLED, "losses.query_attention.weight=0"],
        [*DISTILLED, "losses.query_attention=null", "twig.pruning_head=false"],
    ),
    "twig.draft_vocabulary": "4",
    "twig.first_weights": "random",
    "twig.dtype": "bfloat16",
    "twig.gradient_checkpointing": "true",
    "twig.lora.rank": "3",
    "twig.lora.alpha": "3",
    "twig.lora.dropout": "0.5",
    "twig.lora.target_modules": "[q_proj]",
    "data.shards": "{shard}",
    "data.held_out_shards": "{shard}",
    "data.mirror": "{tmp}/mirror",
    "data.mirror_bytes": "1000",
    "data.fraction": "0.5",
    "data.template": "plain",
    "data.max_length": "199",
    "data.max_image_pixels": "1000000",
    "data.image_aspect_ratio": "square",
    "data.on_bad_sample": "fail",
    "data.shuffle_block": "2",
    "caches.path": (caches(), caches(path="{other_store}")),
    "caches.mirror": (caches(), caches(mirror="{tmp}/mirror")),
    "caches.mirror_bytes": (caches(), caches(mirror_bytes="1000")),
    "caches.allow_mismatch": (caches(), caches(allowed="[capture]")),
    "caches.targets": (caches(), caches(targets="[attention, vision, logits]")),
    "cache.path": "{other_store}",
    "cache.mirror": "{tmp}/mirror",
    "cache.mirror_bytes": "1000",
    "cache.allow_mismatch": "[capture]",
    "targets.attention.source": "recompute",
    "targets.attention.layers": "[0, 1, 2]",
    "targets.attention.heads": (MEANS, [*MEANS, "targets.attention.heads=mean"]),
    "targets.attention.codec": "float16",
    "targets.attention.step": "0.5",
    "targets.vision.source": "recompute",
    "targets.vision.codec": "float16",
    "targets.vision.step": "0.5",
    "targets.logits.top_k": "7",
    "targets.logits.tail_samples": "2",
    "targets.hidden_states.source": of_target("hidden_states", "source: recompute"),
    "targets.hidden_states.layer": of_target("hidden_states", "layer: 1"),
    "targets.hidden_states.codec": of_target("hidden_states", "codec: float32"),
    "targets.final_hidden.source": of_target("final_hidden", "source: recompute"),
    "targets.final_hidden.codec": of_target("final_hidden", "codec: float32"),
    "targets.query_attention.source": of_target("query_attention", "source: recompute", "layer: 0"),
    "targets.query_attention.layer": of_target("query_attention", "layer: 1", "layer: 0"),
    "targets.query_attention.heads": of_target("query_attention", "heads: each", "layer: 0"),
    "targets.query_attention.codec": of_target("query_attention", "codec: float16", "layer: 0"),
    "losses.supervised.weight": "0.5",
    "losses.attention.weight": "0.5",
    "losses.attention.distance": "mse",
    "losses.attention.heads": "mean",
    "losses.attention.layers": "[[0, 0]]",
    "losses.vision_all.weight": "0.5",
    "losses.vision_focus.weight": "0.5",
    "losses.vision_focus.k": "1",
    "losses.vision_focus.layer": "1",
    "losses.logits.weight": "0.5",
    "losses.logits.direction": "forward",
    "losses.logits.temperature": "2",
    "losses.logits.tail": "bucket",
    "losses.query_attention.weight": (DISTILLED, [*DISTILLED, "losses.query_attention.weight=0.5"]),
    "losses.prediction.weight": (DISTILLED, [*DISTILLED, "losses.prediction.weight=0.5"]),
    "losses.prediction.temperature": (DISTILLED, [*DISTILLED, "losses.prediction.temperature=2"]),
    "losses.prediction.clip": (DISTILLED, [*DISTILLED, "losses.prediction.clip=null"]),
    "losses.policy.weight": (REINFORCING, [*REINFORCING, "losses.policy.weight=0.5"]),
    "losses.policy.group": (REINFORCING, [*REINFORCING, "losses.policy.group=3"]),
    "losses.policy.keep": (REINFORCING, [*REINFORCING, "losses.policy.keep=[0.4]"]),
    "losses.policy.annealing": (REINFORCING, [*REINFORCING, "losses.policy.annealing=0"]),
    "losses.policy.patience": (REINFORCING, [*REINFORCING, "losses.policy.patience=1"]),
    "evaluate.shards": "{shard}",
    "evaluate.max_new_tokens": "1",
    "evaluate.dtype": "bfloat16",
    "evaluate.batch_size": "1",
    "evaluate.metrics": "[rouge_l]",
}  # fmt: skip


@pytest.fixture(scope="module")
def configs_of(experiment, tiny_model, tmp_path_factory) -> Callable[[str], tuple[Config, Config]]:
    """Returns for a key two configs that differ in it alone. Both allow the experiment's store to differ."""
    folder = tmp_path_factory.mktemp("parts")
    student = shutil.copytree(experiment.student, folder / "student")
    tiny_model(seed=3, vocab_size=512, hidden_size=24, num_hidden_layers=2).save_pretrained(student)
    places = {
        "{tmp}": folder,
        "{store}": experiment.store,
        "{student}": experiment.student,
        "{other_student}": student,
        "{other_store}": rewrite_store(experiment.store, folder / "store", fingerprint={"teacher": "0" * 64}),
        "{shard}": experiment.shard(0),
    }

    def build(overrides: Sequence[str]) -> Config:
        for place, path in places.items():
            overrides = [override.replace(place, str(path)) for override in overrides]
        return experiment.config(folder, *overrides)

    def both(key: str) -> tuple[Config, Config]:
        if isinstance(other := OTHER[key], tuple):
            return build(other[0]), build(other[1])
        base = [*ONE_STORE, "student.lora={}"] if key.startswith("student.lora.") else ONE_STORE
        base = TWIG if key.startswith("twig.") else base
        return build(base), build([*base, f"{key}={other}"])

    return both


def test_another_value_is_known_of_every_key():
    assert OTHER.keys() == KEYS.keys()


# Stage 1 refuses `caches`, and its fingerprint does not know of stores that lack samples.
@pytest.mark.parametrize(
    "name", [key for key in KEYS if key != "on_missing" and not key.startswith("caches.")]
)
def test_a_key_is_part_of_the_store_if_another_value_changes_its_fingerprint(name: str, configs_of):
    before, after = (plan_capture(config).manifest.fingerprint for config in configs_of(name))
    assert (before != after) == ("store" in KEYS[name].parts)


@pytest.mark.parametrize("name", KEYS)
def test_a_key_is_part_of_the_run_if_another_value_is_another_training(name: str, configs_of):
    before, after = (RunIdentity.of(config, open_dataset(config)[0]) for config in configs_of(name))
    assert bool(after.changes(before.to_json())) == ("run" in KEYS[name].parts)
