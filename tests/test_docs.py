"""The docs are run: commands parse, Python blocks execute, configs validate, links lead somewhere, messages exist."""

from __future__ import annotations

import ast
import importlib
import re
import runpy
import textwrap
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from command_lines import MAKE_TARGETS, ROOT, check_line
from small_store import write_store
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from unscored import Unscored

import cli
from pipeline.config.config import Config, load_config, read_yaml
from pipeline.losses.inputs import TeacherTargets
from pipeline.models.mobilevlm import MobileVLMForCausalLM
from pipeline.positions import Slots

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *(ROOT / "assets").rglob("*.md")])
BLOCK = re.compile(r"^(?P<indent> *)```(?P<language>\w+)\n(?P<text>.*?)^(?P=indent)```$", re.M | re.S)


def _name(page: Path) -> str:
    return str(page.relative_to(ROOT))


def _blocks(page: Path, language: str) -> list[str]:
    blocks = BLOCK.finditer(page.read_text())
    return [textwrap.dedent(block["text"]) for block in blocks if block["language"] == language]


def _pages_with(language: str) -> list[Path]:
    return [page for page in PAGES if _blocks(page, language)]


def test_the_command_line_page_is_what_the_command_line_says():
    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["cli_page"]()
    assert (ROOT / "docs" / "cli.md").read_text() == page, "stale; run `python -m docs.generate`"


@pytest.mark.slow
def test_the_tables_of_the_experiments_are_what_the_sweeps_lines_say():
    page = runpy.run_path(str(ROOT / "docs" / "generate.py"))["experiments_page"]()
    assert page.count("<!-- sweep ") > 0
    assert (ROOT / "docs" / "experiments.md").read_text() == page, "stale; run `python -m docs.generate`"


# docs/tutorial.md makes its config on the way: tests/test_tutorial.py runs it.
@pytest.mark.parametrize("page", [p for p in _pages_with("bash") if p.name != "tutorial.md"], ids=_name)
def test_every_command_in_a_page_would_be_understood(page: Path):
    for block in _blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            check_line(line)


@pytest.mark.parametrize(
    "line",
    [
        "alignkd distil --config configs/demo.yaml",
        "alignkd verify store --deeper",
        "alignkd info",
        "alignkd distill --config configs/demo.yaml train.learning_rat=1",
        "make destill",
        "make distill ARGZ=1",
        "make distill ARGS='losses.logit.weight=1'",
        "python -m pipeline.studies.demo dater",
        "torchrun --nproc-per-node 8 cli.py distil",
    ],
)
def test_the_look_at_commands_sees_a_wrong_one(line: str):
    with pytest.raises(
        Exception, match=r"(?i)no such|missing|unknown|make (has|reads) no|TrainingArguments has no"
    ):
        check_line(line)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_command_named_in_a_sentence_exists(page: Path):
    text = BLOCK.sub("", page.read_text())
    commands = {"alignkd": set(typer.main.get_command(cli.app).commands), "make": MAKE_TARGETS}
    for program, name in re.findall(r"`(alignkd|make) ([a-z][a-z-]*)[^`]*`", text):
        assert name in commands[program], f"{_name(page)}: `{program} {name}`"


@pytest.mark.parametrize("page", _pages_with("yaml"), ids=_name)
def test_every_config_in_a_page_is_valid(page: Path):
    whole = read_yaml((ROOT / "configs" / "demo.yaml").read_text())
    for block in _blocks(page, "yaml"):
        Config.model_validate(_merged(whole, read_yaml(block)))


def _merged(below: Any, above: Any) -> Any:
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    return below | {key: _merged(below.get(key), value) for key, value in above.items()}


@pytest.fixture
def place_of_the_docs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that holds, small, what the pages speak of: the demo's store, MobileLLaMA and CLIP."""
    write_store(tmp_path / "runs" / "demo" / "teacher.zarr")
    torch.manual_seed(0)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    llama = LlamaForCausalLM(LlamaConfig(**small, vocab_size=96))
    llama.save_pretrained(tmp_path / "MobileLLaMA-1.4B-Chat")
    (tmp_path / "MobileLLaMA-1.4B-Chat" / "tokenizer.model").write_bytes(b"any")
    clip = CLIPVisionModel(CLIPVisionConfig(**small, image_size=56, patch_size=14, projection_dim=16))
    clip.save_pretrained(tmp_path / "clip-vit-large-patch14-336")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _run(page: Path) -> dict[str, Any]:
    """Execute a page's Python blocks in order; one that begins with `# FILE` as if it stood in that file."""
    names: dict[str, Any] = {"__name__": "page"}
    for block in _blocks(page, "python"):
        if file := re.match(r"# (\S+)\.py\n", block):
            names = vars(importlib.import_module(file[1].replace("/", "."))) | names | {"__name__": file[1]}
        exec(compile(block, _name(page), "exec", dont_inherit=True), names)
    return names


# docs/python.md needs a whole experiment: tests/test_python_pages.py runs it; tests/test_twig_page.py has twig.md's.
OWN_TESTS = ("python.md", "twig.md")


@pytest.mark.parametrize("page", [p for p in _pages_with("python") if p.name not in OWN_TESTS], ids=_name)
def test_every_python_block_of_a_page_runs(page: Path, place_of_the_docs: Path):
    _run(page)


def test_the_student_that_the_walkthrough_makes_is_its_parts(place_of_the_docs: Path):
    _run(ROOT / "docs" / "walkthrough.md")
    student = MobileVLMForCausalLM.from_pretrained("mobilellama_1.4b_chat_clip_fresh_projector")
    language = LlamaForCausalLM.from_pretrained("MobileLLaMA-1.4B-Chat").state_dict()
    tower = CLIPVisionModel.from_pretrained("clip-vit-large-patch14-336").state_dict()
    mine = student.state_dict()
    assert all(torch.equal(mine[name], value) for name, value in language.items())
    prefix = "model.vision_tower.vision_tower.vision_model."
    assert all(torch.equal(mine[prefix + n.removeprefix("vision_model.")], v) for n, v in tower.items())


def test_the_loss_of_the_extending_page_is_zero_at_the_teacher():
    names = _run(ROOT / "docs" / "extending.md")
    loss = names["row"]["vision_cosine"]
    vision = torch.randn(12, 8, generator=torch.Generator().manual_seed(0))
    none = torch.zeros(1, 0).long()
    slots = Slots(text=none, vision=torch.arange(12)[None], sizes=(3, 4, 5))
    student = Unscored(torch.zeros(0, 8), torch.zeros(0).long(), slots=slots, vision=vision).scored(
        TeacherTargets()
    )
    total, count = loss.compute(student, TeacherTargets(vision=vision), torch.nn.Identity(), loss.settings())
    assert float(total) == pytest.approx(0, abs=1e-5) and float(count) == 3
    total, count = loss.compute(student, TeacherTargets(), None, loss.settings())
    assert (float(total), float(count)) == (0, 0)


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_relative_link_leads_somewhere(page: Path):
    for path, anchor in re.findall(r"\]\(([^)#\s]*)(#[^)\s]*)?\)", BLOCK.sub("", page.read_text())):
        if re.match(r"[a-z]+:", path):
            continue
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{_name(page)}: {path}"
        if anchor:
            assert anchor.removeprefix("#") in _anchors(target), f"{_name(page)}: {path}{anchor}"


def _anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.+)$", BLOCK.sub("", page.read_text()), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=_name)
def test_every_file_named_in_a_page_exists(page: Path):
    named = re.findall(
        r"`((?:pipeline|cache|configs|docs|tests|assets|examples)/[\w./-]+)`", page.read_text()
    )
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing


def test_every_message_of_the_troubleshooting_page_is_one_of_ours():
    headings = re.findall(r"^### `(.+)`$", (ROOT / "docs" / "troubleshooting.md").read_text(), flags=re.M)
    messages = set(_messages())
    assert len(headings) > 20
    gone = [start for start in headings if not any(message.startswith(start) for message in messages)]
    assert not gone


def _messages() -> Iterator[str]:
    """Every string of the source, `…` for what is filled in."""
    for file in [ROOT / "cli.py", *(ROOT / "cache").rglob("*.py"), *(ROOT / "pipeline").rglob("*.py")]:
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = (part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
                yield "".join(map(str, parts)).strip()
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                yield node.value


def test_the_default_config_of_make_loads():
    load_config(ROOT / re.findall(r"^CONFIG \?= (\S+)$", (ROOT / "Makefile").read_text(), flags=re.M)[0])


def test_committed_text_names_no_folder_of_somebodys_machine():
    files = [*PAGES, *(ROOT / "configs").rglob("*.yaml"), ROOT / "Makefile", ROOT / ".ci" / "run"]
    for file in files:
        assert not re.search(r"(?<![\w.])/(home|root|tmp|Users|mnt|work)/", file.read_text()), _name(file)
