"""Requests of lmms-eval get the prompts and answers of the suite; `bench.lmms_eval` runs lmms-eval itself."""

from __future__ import annotations

import ast
import io
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from benchmark_files import write_gqa, write_scienceqa
from PIL import ExifTags, Image
from small_experiment import picture
from tiny_families import write_checkpoint

from pipeline.benchmarks.answering import Answerer, HowToAsk, prompt_of
from pipeline.benchmarks.benchmark import BenchmarkQuestion
from pipeline.benchmarks.lmms_requests import (
    RequestAnswerer,
    RequestSettings,
    cut,
    how_to_ask,
    prompt_of_request,
)
from pipeline.benchmarks.places import ImageFile
from pipeline.benchmarks.suite import BENCHMARKS
from pipeline.data.decoding import decode_image
from pipeline.errors import ConfigError, PipelineError

ROOT = Path(__file__).parent.parent
GREEDY = {"max_new_tokens": 6, "temperature": 0.0, "do_sample": False, "until": ["\n\n"]}


@dataclass(frozen=True)
class Asked:
    """What the plugin reads of an `Instance` of lmms-eval."""

    args: tuple[Any, ...]


def opened(data: bytes) -> Image.Image:
    return Image.open(io.BytesIO(data))


def messages_of(document: Any) -> list[dict[str, Any]]:
    """Messages as lmms-eval makes them of a picture and a text."""
    content = [{"type": "image", "url": image} for image in document.get("images", ())]
    return [{"role": "user", "content": [*content, {"type": "text", "text": document["text"]}]}]


def request(number: int, task: str = "gqa", **settings: Any) -> Asked:
    return Asked(("context", messages_of, GREEDY | settings, number, task, "test"))


def written(messages: Any) -> tuple[Asked, dict[str, Any]]:
    """A request with these messages, and the documents that it comes from."""
    return Asked(("context", lambda document: document, GREEDY, 0, "gqa", "test")), {
        "gqa": {"test": [messages]}
    }


def documents_of(questions: Sequence[BenchmarkQuestion]) -> list[dict[str, Any]]:
    return [{"images": [opened(one.image.read())], "text": one.text} for one in questions]


def read(task: str, data: Path) -> list[BenchmarkQuestion]:
    return BENCHMARKS[task].read({"gqa": write_gqa, "scienceqa": write_scienceqa}[task](data))


def by_suite(model: Path, task: str, questions: Sequence[BenchmarkQuestion], tokens: int) -> list[str]:
    answerer, benchmark = Answerer(str(model), HowToAsk()), replace(BENCHMARKS[task], max_new_tokens=tokens)
    batches = answerer.answers(benchmark, answerer.preparation(benchmark), questions)
    return [answer for _, answers in batches for answer in answers]


def answered(model: Path, requests: Sequence[Any], documents: Any, batch_size: int = 2) -> list[str]:
    made = RequestAnswerer(Answerer(str(model), how_to_ask(str(model), batch_size, None)))
    found = dict(made.answers(requests, documents))
    return [found[number] for number in range(len(requests))]


# Answers


def test_answers_are_the_suites_in_the_order_of_the_requests(experiment, tmp_path):
    asked = {task: read(task, tmp_path) for task in ("gqa", "scienceqa")}
    documents = {f"{task}_img": {"test": documents_of(questions)} for task, questions in asked.items()}
    # Two tasks in turn, of which one is cropped, and answers of two lengths.
    numbers = [(2, "gqa", 6), (1, "scienceqa", 6), (0, "gqa", 3), (0, "scienceqa", 6), (1, "gqa", 6)]
    requests = [
        request(number, f"{task}_img", max_new_tokens=most, until=None) for number, task, most in numbers
    ]
    expected = [
        by_suite(experiment.student, task, asked[task][number : number + 1], most)[0]
        for number, task, most in numbers
    ]
    assert answered(experiment.student, requests, documents) == expected
    assert len(set(expected)) > 2


def test_scienceqa_alone_is_cropped():
    crops = {task: RequestSettings.of(request(0, task)).crops for task in ("gqa", "scienceqa_img", "pope")}
    assert crops == {"gqa": False, "scienceqa_img": True, "pope": False}


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "qwen2_5_vl"])
def test_other_families_answer_as_in_the_suite(family, tmp_path):
    model, questions = write_checkpoint(family, tmp_path / "model", seed=1), read("gqa", tmp_path)
    requests = [request(number, until=None) for number in range(len(questions))]
    documents = {"gqa": {"test": documents_of(questions)}}
    expected = by_suite(model, "gqa", questions, 6)
    assert answered(model, requests, documents, batch_size=3) == expected and all(expected)


@pytest.mark.slow
def test_several_images_stand_in_their_order_and_none_is_needed(tmp_path):
    model = write_checkpoint("llava", tmp_path / "model", seed=1)
    pictures = [opened(picture(number)) for number in (1, 2)]
    documents = [
        {"images": pictures, "text": "Which?"},
        {"images": pictures[::-1], "text": "Which?"},
        {"text": "Which?"},
        {"images": pictures, "text": "Which?"},
    ]
    answers = answered(model, [request(number) for number in range(4)], {"gqa": {"test": documents}}, 1)
    assert answers[0] == answers[3] and len(set(answers)) == 3
    together = answered(model, [request(number) for number in range(4)], {"gqa": {"test": documents}}, 4)
    assert together == answers


def test_an_answer_ends_before_the_first_of_the_texts_that_end_it():
    assert cut("yes\n\nIt is.", ["\n\n"]) == cut("yes\n\nIt is.", "\n\n") == "yes"
    assert cut("a b. c", ["c", "b"]) == cut("a b. c", ["b", "c"]) == "a"
    assert cut("yes ", None) == cut("yes", []) == cut("yes", ["", "no"]) == "yes"


# Prompts


def test_the_prompt_is_that_of_the_suite(experiment, tmp_path):
    [question, *_] = read("gqa", tmp_path)
    preparation = Answerer(str(experiment.student), HowToAsk()).preparation(BENCHMARKS["gqa"])
    prompt = prompt_of_request(request(0), {"gqa": {"test": documents_of([question])}})
    ids = preparation.prompt(prompt.turns, preparation.sizes_of([data for _, data in prompt.images]))
    assert ids == prompt_of(preparation, question, question.image.read())


def test_messages_become_turns_with_their_images_in_order():
    first, second = (opened(picture(number)) for number in (1, 2))
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "One "}, {"type": "text", "text": "and two?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "Two."}]},
        {
            "role": "user",
            "content": [
                {"type": "image", "url": second},
                {"type": "image", "url": first},
                {"type": "text", "text": "Like"},
                {"type": "image", "url": second},
            ],
        },
    ]
    prompt = prompt_of_request(*written(messages))
    assert prompt.turns == [
        {"from": "system", "value": "Be brief."},
        {"from": "human", "value": "One and two?"},
        {"from": "gpt", "value": "Two."},
        {"from": "human", "value": "<image>\n<image>\nLike\n<image>"},
    ]
    names = [name for name, _ in prompt.images]
    assert names[0] == names[2] != names[1]
    shown = [decode_image(data).tobytes() for _, data in prompt.images]
    assert shown == [image.convert("RGB").tobytes() for image in (second, first, second)]


@pytest.mark.parametrize("form", ["RGB", "P", "LA", "CMYK", "I;16", "turned"])
def test_a_picture_in_memory_gives_the_pixels_of_its_file(form, tmp_path):
    image, file = opened(picture(3, size=(40, 30))), tmp_path / ("a.tif" if form == "CMYK" else "a.png")
    if form == "I;16":
        image = Image.new("I;16", (40, 30), 40_000)
    elif form != "turned":
        image = image.convert(form)
    exif = image.getexif()
    if form == "turned":
        exif[ExifTags.Base.Orientation] = 6
    image.save(file, exif=exif)
    message = {"role": "user", "content": [{"type": "image", "url": Image.open(file)}]}
    [(_, data)] = prompt_of_request(*written([message])).images
    expected = decode_image(file.read_bytes())
    assert expected.size == ((30, 40) if form == "turned" else (40, 30))
    assert decode_image(data).tobytes() == expected.tobytes()


def test_an_image_may_be_a_path(tmp_path):
    place = ImageFile(tmp_path / "a.png")
    place.path.write_bytes(picture(1))
    message = {"role": "user", "content": [{"type": "image", "url": str(place.path)}]}
    [(_, data)] = prompt_of_request(*written([message])).images
    assert data == place.read()


# Refusals


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (
            [{"type": "video", "url": "a.mp4"}],
            "document 0 of gqa holds video; alignkd's models read images and text",
        ),
        ([{"type": "text", "text": "a <image> b"}], "its text holds <image>, which stands for an image"),
        ([{"type": "image", "url": "none.png"}], r"its image none.png cannot be read \(.*No such file"),
        ([{"type": "image", "url": 3}], "its image is a int; alignkd reads pictures of Pillow and paths"),
    ],
)
def test_what_no_model_of_ours_reads_is_refused(content, said):
    with pytest.raises(PipelineError, match=said):
        prompt_of_request(*written([{"role": "user", "content": content}]))


@pytest.mark.parametrize(
    "messages", [[], [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]]
)
def test_an_answer_that_is_begun_is_refused(messages):
    with pytest.raises(
        PipelineError, match="its last message is not the user's; alignkd answers questions only"
    ):
        prompt_of_request(*written(messages))


@pytest.mark.parametrize("settings", [{"do_sample": True}, {"do_sample": False, "num_beams": 2}])
def test_other_than_greedy_decoding_is_refused(settings):
    with pytest.raises(
        ConfigError, match=r"task gqa asks for sampling or a beam .* add --gen_kwargs temperature=0"
    ):
        RequestSettings.of(request(0, **settings))


def test_a_temperature_samples_unless_sampling_is_off():
    settings = {name: value for name, value in GREEDY.items() if name != "do_sample"} | {"temperature": 0.7}
    with pytest.raises(ConfigError, match=r"temperature 0\.7"):
        RequestSettings.of(Asked(("", messages_of, settings, 0, "gqa", "test")))
    assert RequestSettings.of(request(0, temperature=0.7)).max_new_tokens == 6


def test_a_request_without_a_length_gets_that_of_textvqa():
    assert RequestSettings.of(request(0, max_new_tokens=None)).max_new_tokens == 128
    assert BENCHMARKS["textvqa"].max_new_tokens == 128


def test_the_batch_size_is_a_number_and_the_dtype_is_the_suites(experiment):
    model = str(experiment.student)
    with pytest.raises(ConfigError, match="--batch_size auto: alignkd needs a number"):
        how_to_ask(model, "auto", None)
    how = how_to_ask(model, "4", None)
    assert how.batch_size == 4 and how.dtype_for(model) == HowToAsk().dtype_for(model)
    assert how_to_ask(model, 1, "bfloat16").dtype_for(model) == "bfloat16"


# The plugin


def test_the_entry_point_names_the_function_and_the_class_that_are_there():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    module, _, function = project["entry-points"]["lmms_eval.models"]["alignkd"].partition(":")
    tree = ast.parse((ROOT / module.replace(".", "/")).with_suffix(".py").read_text())
    names = {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.ClassDef)}
    assert names == {function, "AlignKD"}
