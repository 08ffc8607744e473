"""`alignkd plan --on-paper` on the three shipped pairs, from config.json alone, against small calculations."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from command_lines import ROOT

import cli
from pipeline.upkeep.assumptions import Assumptions

pytestmark = pytest.mark.slow

MODELS = ROOT / "tests" / "fixtures" / "configs"
SAMPLES = 665_000
TERA = 10**12


@dataclass(frozen=True)
class Pair:
    """A shipped config with the fixtures that stand for its models, and what its header assumes."""

    config: str
    teacher: str
    student: str
    assumed: tuple[str, ...]
    published: tuple[float, float]  # parameters in billions

    @property
    def file(self) -> Path:
        return ROOT / "configs" / self.config

    @property
    def models(self) -> tuple[str, str]:
        return f"teacher.model={MODELS / self.teacher}", f"student.model={MODELS / self.student}"


SMOL_TOKENS = (
    "vision_tokens=1053",
    "patches_per_vision_token=9",
    "student_vision_tokens=832",
    "student_patches_per_vision_token=16",
    "text_rows=150",
)
PAIRS = {
    "qwen3_vl": Pair(
        "qwen3_vl/8b_to_2b.yaml", "qwen3_vl_8b", "qwen3_vl_2b", ("vision_tokens=300",), (8.8, 2.1)
    ),
    "smolvlm2": Pair("smolvlm2/2.2b_to_500m.yaml", "smolvlm2_2.2b", "smolvlm2_500m", SMOL_TOKENS, (2.2, 0.5)),
    "llava": Pair(
        "llava/13b_to_7b.yaml",
        "llava_13b",
        "llava_7b",
        ("vision_tokens=576", "patches_per_vision_token=1"),
        (13, 7),
    ),
}
EVERY_PAIR = pytest.mark.parametrize("name", PAIRS)


@pytest.fixture
def run(capsys):
    """Runs the command on a config; gives exit code, stdout and stderr."""

    def run_command(file: Path, *rest: str, assumed: tuple[str, ...] = ()) -> tuple[int, str, str]:
        words = ["plan", "--config", str(file), "--on-paper"]
        words += [word for one in assumed for word in ("--assume", one)]
        with pytest.raises(SystemExit) as stopped:
            cli.main([*words, *rest])
        return int(stopped.value.code or 0), *capsys.readouterr()

    return run_command


@pytest.fixture
def plan(run):
    """The JSON of a pair's plan, with the assumptions of its header."""

    def plan_pair(name: str, *overrides: str, assumed: tuple[str, ...] = ()) -> dict[str, Any]:
        pair = PAIRS[name]
        given = (f"samples={SAMPLES}", *pair.assumed, *assumed)
        code, out, err = run(pair.file, "--json", *pair.models, *overrides, assumed=given)
        assert code == 0, err
        return json.loads(out)

    return plan_pair


# The independent calculation: textbook formulas over the fixtures' own numbers.


def _fields(model: str) -> dict[str, Any]:
    return json.loads((MODELS / model / "config.json").read_text())


def _decoder_layers(model: str) -> int:
    """A LLaMA layer: queries and output, keys and values, three maps of the MLP, two norms; Qwen's two more norms."""
    of = _fields(model)["text_config"]
    width, heads = of["hidden_size"], of["num_attention_heads"]
    head = of.get("head_dim", width // heads)
    attention = 2 * width * heads * head + 2 * width * of["num_key_value_heads"] * head
    norms = 2 * width + (2 * head if "qwen3" in of["model_type"] else 0)
    return of["num_hidden_layers"] * (attention + 3 * width * of["intermediate_size"] + norms)


def _tower_layers(model: str) -> int:
    """The layers of a vision transformer: four maps of attention, two of the MLP, their biases, two norms."""
    of = _fields(model)["vision_config"]
    width, inner = of["hidden_size"], of["intermediate_size"]
    each = 4 * width**2 + 2 * width * inner + 9 * width + inner
    return of.get("depth", of.get("num_hidden_layers")) * each


def _table(model: str) -> int:
    of = _fields(model)["text_config"]
    return of["hidden_size"] * of["vocab_size"]


def _projector(model: str) -> int:
    fields = _fields(model)
    width, patch = fields["text_config"]["hidden_size"], fields["vision_config"]["hidden_size"]
    if fields["model_type"] == "smolvlm":
        return patch * fields["scale_factor"] ** 2 * width
    if fields["model_type"] == "llava":
        return (patch + 1) * width + (width + 1) * width
    wide = 4 * patch  # a merger: norm over a patch, or for the deepstack over four, then two maps
    maps = (wide + 1) * wide + (wide + 1) * width
    deepstack = len(fields["vision_config"]["deepstack_visual_indexes"])
    return (maps + 2 * patch) + deepstack * (maps + 2 * wide)


@EVERY_PAIR
def test_the_parameters_are_those_of_the_published_models(name, plan):
    found = plan(name)
    for role, published in zip(("teacher", "student"), PAIRS[name].published, strict=True):
        model, parameters = getattr(PAIRS[name], role), found[role]["parameters"]
        assert sum(parameters.values()) == pytest.approx(published * 1e9, rel=0.03)
        norm = _fields(model)["text_config"]["hidden_size"]
        is_tied = _fields(model).get("tie_word_embeddings", False)
        assert parameters["layers"] == _decoder_layers(model)
        assert parameters["embeddings"] == _table(model)
        assert parameters["head"] == norm + (0 if is_tied else _table(model))
        assert parameters["projector"] == _projector(model)
        assert parameters["tower"] == pytest.approx(_tower_layers(model), rel=0.02)  # + patches and positions


@EVERY_PAIR
def test_hours_are_operations_over_the_assumed_speed(name, plan):
    found = plan(name, assumed=("tflops=100", "images_per_sample=2", "text_before=20", "answer_tokens=50"))
    assumed = found["assumptions"]
    for stage, role, prefix in (("stage_1", "teacher", ""), ("stage_2", "student", "student_")):
        model = getattr(PAIRS[name], role)
        tokens = 2 * assumed[f"{prefix}vision_tokens"]
        tower = 2 * found[role]["parameters"]["tower"] * tokens * assumed[f"{prefix}patches_per_vision_token"]
        layers = 2 * _decoder_layers(model) * (20 + tokens + assumed["text_rows"])
        rest = 2 * _projector(model) * tokens + 2 * _table(model) * 50
        # Training: three forwards' worth without the tower, and the layers once more for gradient checkpointing.
        expected = tower + (layers + rest if role == "teacher" else 4 * layers + 3 * rest)
        assert found[stage]["operations_per_sample"] == pytest.approx(expected)
        assert found[stage]["hours"] == pytest.approx(expected * SAMPLES / (100 * TERA) / 3600)


@pytest.mark.parametrize(
    ("name", "attention", "vision", "logits"),
    [
        ("qwen3_vl", 110 * (300 + 2), 4096 * 300 * 2, 60 * (32 * (4 + 2) + 2)),
        ("llava", 110 * (576 + 2), 5120 * 576 * 2, 60 * (32 * (2 + 2) + 2)),
        ("smolvlm2", None, None, 60 * (32 * (2 + 2) + 2)),
    ],
)
def test_bytes_are_those_of_the_codes(name, attention, vision, logits, plan):
    found = plan(name)
    expected = {"attention": attention, "vision": vision, "logits": logits}
    kept = {target: size for target, size in expected.items() if size is not None}
    assert {t["name"]: t["bytes_per_sample"] for t in found["targets"]} == kept
    assert {t["name"]: t["total_bytes"] for t in found["targets"]} == {
        k: v * SAMPLES for k, v in kept.items()
    }
    assert found["total_bytes"] == SAMPLES * sum(kept.values()) == SAMPLES * found["bytes_per_sample"]


@EVERY_PAIR
def test_the_headers_figures_are_what_the_command_says(name, plan):
    pair, found = PAIRS[name], plan(name)
    header = re.sub(r"\n# *", " ", pair.file.read_text().partition("\noutput_dir")[0])
    for assumption in (f"samples={SAMPLES}", *pair.assumed):
        assert f"--assume {assumption} " in header
    assert header.count("--assume ") == 1 + len(pair.assumed)
    times = re.findall(r"([\d.]+) TFLOP a sample: ([\d.]+) hours", header)
    expected = [(found[s]["operations_per_sample"] / TERA, found[s]["hours"]) for s in ("stage_1", "stage_2")]
    assert times == [(f"{operations:.3g}", f"{hours:.3g}") for operations, hours in expected]
    sizes = re.findall(r"([\d.]+ [GT])B (attention|vision|logits)", header)
    assert len(sizes) == len(found["targets"])
    for size, target in sizes:
        [written] = [t["total_bytes"] for t in found["targets"] if t["name"] == target]
        number, unit = size.split()
        assert float(number) == pytest.approx(written / {"G": 1e9, "T": TERA}[unit], rel=5e-3)


@pytest.fixture
def mobilevlm(tmp_path) -> tuple[str, str]:
    """Overrides with config.json of MobileVLM V2's 7B and 1.7B."""
    sizes = {
        "teacher": (4096, 32, 32, 11008),
        "student": (2048, 24, 16, 5632),
    }
    names = ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size")
    for role, of in sizes.items():
        fields = {"model_type": "mobilevlm", "vocab_size": 32000, **dict(zip(names, of, strict=True))}
        fields["num_key_value_heads"] = fields["num_attention_heads"]
        (tmp_path / role).mkdir()
        (tmp_path / role / "config.json").write_text(json.dumps(fields))
    return f"teacher.model={tmp_path}/teacher", f"student.model={tmp_path}/student"


def test_the_figures_of_mobilevlm_v2_are_near_those_of_its_config(run, mobilevlm):
    header = (ROOT / "configs" / "mobilevlm_v2" / "finetune.yaml").read_text()
    for figure in ("2.86 TB vision", "0.039 TB attention", "0.019 TB logits", "21 hours", "17 hours"):
        assert figure in header
    code, out, err = run(
        ROOT / "configs" / "mobilevlm_v2" / "finetune.yaml",
        "--json",
        *mobilevlm,
        assumed=("samples=2_428_000", "vision_tokens=999"),  # the config fixes 144
    )
    assert code == 0, err
    found = json.loads(out)
    terabytes = {target["name"]: target["total_bytes"] / TERA for target in found["targets"]}
    assert terabytes == pytest.approx({"attention": 0.039, "vision": 2.86, "logits": 0.019}, rel=0.01)
    assert found["assumptions"]["vision_tokens"] == found["assumptions"]["student_vision_tokens"] == 144
    # The header leaves the tower out, and lets the head run at every position.
    assert (found["stage_1"]["hours"], found["stage_2"]["hours"]) == pytest.approx((21, 17), rel=0.08)
    assert sum(found["student"]["parameters"].values()) == pytest.approx(1.7e9, rel=0.05)


def test_without_logits_a_stub_runs_stage_1(plan):
    whole, stub = plan("llava"), plan("llava", "targets.logits=null", "losses.logits=null")
    tower, projector = (whole["teacher"]["parameters"][part] for part in ("tower", "projector"))
    queries_and_keys = 2 * 5120**2 + 5120  # and the norm before them
    read = tower + projector + _table("llava_13b") + queries_and_keys
    assert stub["stub_share"] == whole["stub_share"]
    assert stub["stub_share"] == pytest.approx(read / sum(whole["teacher"]["parameters"].values()))
    positions = 35 + 576 + 110
    expected = 2 * (576 * (tower + projector) + positions * queries_and_keys)
    assert stub["stage_1"]["operations_per_sample"] == pytest.approx(expected)


def test_a_recomputed_target_moves_from_the_disk_to_stage_2(plan):
    stored = plan("qwen3_vl")
    moved = plan("qwen3_vl", "targets.vision.source=recompute")
    vision = {t["name"]: t for t in moved["targets"]}["vision"]
    assert (vision["source"], vision["total_bytes"]) == ("recompute", 0)
    assert moved["total_bytes"] == stored["total_bytes"] - 4096 * 300 * 2 * SAMPLES
    parameters = stored["teacher"]["parameters"]
    more = 2 * 300 * (4 * parameters["tower"] + parameters["projector"])
    assert moved["stage_2"]["operations_per_sample"] == pytest.approx(
        stored["stage_2"]["operations_per_sample"] + more
    )
    assert moved["stage_1"] == stored["stage_1"]  # logits need the whole teacher anyway


def test_without_checkpointing_the_layers_run_once_less(plan):
    on, off = plan("llava"), plan("llava", "student.gradient_checkpointing=false")
    fewer = on["stage_2"]["operations_per_sample"] - off["stage_2"]["operations_per_sample"]
    assert fewer == pytest.approx(2 * _decoder_layers("llava_7b") * (35 + 576 + 110))


def test_the_page_lists_every_assumption_and_what_is_left_out(run, mobilevlm):
    pair = PAIRS["qwen3_vl"]
    code, page, _ = run(pair.file, *pair.models, assumed=("samples=665000", "vision_tokens=300"))
    assert code == 0 and not (ROOT / "FILL_IN").exists()
    for name in Assumptions.model_fields:
        assert re.search(rf"^{name} +\d", page, re.M), name
    for line in (
        r"vision +cache +2\.46 MB +1\.63 TB",
        r"samples +665,000",
        r"stage 1: 7\.35 TFLOP a sample, 10\.9 hours at 125 TFLOP/s",
        r"all, M parameters +8,767\.1 +2,127\.5",
        r"stub: the targets without logits need 13\.9% of the teacher's parameters",
        r"left out: attention's own products",
        r"not compared: tokenizer",
    ):
        assert re.search(line, page), line
    assert "fixed by config.json" not in page
    page = run(ROOT / "configs" / "mobilevlm_v2" / "finetune.yaml", *mobilevlm)[1]
    assert re.search(r"^vision_tokens +144 +fixed by config.json$", page, re.M)


@pytest.mark.parametrize(
    ("assumption", "message"),
    [
        ("text_row=3", "--assume text_row=3: no such assumption; did you mean 'text_rows'?"),
        ("speed", "--assume speed: no such assumption; known: answer_tokens, "),
        ("tflops=fast", "--assume tflops=fast: expected KEY=VALUE with a number, such as tflops=125"),
        ("tflops", "--assume tflops: expected KEY=VALUE with a number"),
        ("tflops=0", "--assume tflops=0: Input should be greater than 0"),
        ("tflops=nan", "--assume tflops=nan: Input should be "),
        ("samples=1.5", "--assume samples=1.5: Input should be a valid integer"),
    ],
)
def test_an_assumption_that_cannot_be_made_is_refused(assumption, message, run):
    pair = PAIRS["llava"]
    code, out, err = run(pair.file, *pair.models, assumed=(assumption,))
    assert (code, out) == (2, "") and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize("role", ["teacher", "student"])
def test_a_model_without_a_config_is_refused(role, run, tmp_path):
    pair = PAIRS["llava"]
    code, _, err = run(pair.file, *pair.models, f"{role}.model={tmp_path}")
    assert code == 2 and f"{tmp_path / 'config.json'}: no such file; name a folder that holds a" in err
    for nowhere in ("/no/such/folder", "no/such/model"):
        code, _, err = run(pair.file, *pair.models, f"{role}.model={nowhere}")
        assert (
            code == 2 and f"{role}.model {nowhere}: no such local folder, and the hub gave no config" in err
        )


def test_a_family_that_is_not_let_in_is_refused(run, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "fuyu"}')
    pair = PAIRS["llava"]
    code, _, err = run(pair.file, *pair.models, f"teacher.model={tmp_path}")
    assert code == 2 and "the family 'fuyu' is not let in; run `alignkd models check " in err


def test_a_pair_that_stage_2_would_refuse_is_refused(run):
    pair = PAIRS["llava"]
    code, _, err = run(pair.file, *pair.models, f"student.model={MODELS / 'qwen3_vl_2b'}")
    assert code == 2 and "losses.logits compares token by token, but student.model " in err
    code, _, err = run(pair.file, *pair.models, "losses.attention.layers=[[0, 32]]")
    assert code == 2 and "asks for the student's layer 32, but " in err
    code, _, err = run(pair.file, *pair.models, "targets.attention.layers=[0, 40]")
    assert code == 2 and "asks for layer 40, but the teacher has layers 0 to 39" in err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on-paper", "--max-bytes", "1TB"], "are of a probe"),
        (["--on-paper", "--samples", "64"], "are of a probe"),
        (["--assume", "tflops=1"], "--assume belongs to --on-paper"),
    ],
)
def test_options_of_the_probe_and_of_the_paper_do_not_mix(words, message, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main(["plan", "--config", str(PAIRS["llava"].file), *words])
    assert stopped.value.code == 2 and message in " ".join(capsys.readouterr().err.split())


def test_a_twigs_targets_by_hand(plan):
    """LLaVA of 13B: 5,120 channels of 2 bytes at 721 positions and at 60 answers, 576 columns of 4 bytes."""
    twig = "targets={hidden_states: {layer: 2}, final_hidden: {}, query_attention: {layer: 19}}"
    planned = plan("llava", twig, "losses={supervised: {}}")
    found = {target["name"]: target["bytes_per_sample"] for target in planned["targets"]}
    assert found == {
        "hidden_states": 5120 * 2 * 721, "final_hidden": 5120 * 2 * 60, "query_attention": 576 * 4,
    }  # fmt: skip
    recomputed = plan("llava", twig, "losses={supervised: {}}", "targets.hidden_states.source=recompute")
    layers = _decoder_layers("llava_13b") * 2 / 40
    shared = recomputed["stage_2"]["operations_per_sample"] - planned["stage_2"]["operations_per_sample"]
    parts = planned["teacher"]["parameters"]
    assert shared == pytest.approx(2 * (layers * 721 + (parts["tower"] + parts["projector"]) * 576), rel=1e-6)
