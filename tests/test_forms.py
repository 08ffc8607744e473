"""Annotations in the forms of other tools: each becomes LLaVA's turns with an <image> for each image, or a reason."""

from __future__ import annotations

import base64
import json
from pathlib import Path
from typing import Any

import pytest
from test_packing import picture, rejects_of, samples_of, write

from pipeline.data.dialogues import read_dialogue
from pipeline.errors import BadSample
from pipeline.packing.pack import pack

INLINE = picture(8)
DATA_URL = "data:image/png;base64," + base64.b64encode(INLINE).decode()


@pytest.fixture
def images(tmp_path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    for number in range(3):
        (folder / f"{number}.png").write_bytes(picture(number))
    return folder


def said(*texts: str, system: str = "") -> list[dict[str, str]]:
    """LLaVA's turns with these texts."""
    first = [{"from": "system", "value": system}] if system else []
    return first + [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts)]


def asked(content: Any, answer: Any = "A.", **roles: str) -> list[dict[str, Any]]:
    """Messages with a question and an answer."""
    return [
        {"role": roles.get("user", "user"), "content": content},
        {"role": roles.get("assistant", "assistant"), "content": answer},
    ]


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


# What another tool's documentation shows, the turns it must become, and the images in their order.
FORMS: dict[str, tuple[dict[str, Any], list[dict[str, str]], list[Any]]] = {
    "LLaMA-Factory": (
        {"messages": asked("<image>Who?", "They."), "images": ["0.png"]},
        said("<image>Who?", "They."), ["0.png"],
    ),
    "LLaMA-Factory, ShareGPT": (
        {"conversations": said("<image>Who?", "They."), "images": ["0.png"], "system": "Be brief."},
        said("<image>Who?", "They.", system="Be brief."), ["0.png"],
    ),
    "LLaMA-Factory, Alpaca": (
        {"instruction": "<image>Say", "input": "it.", "output": "It.", "history": [["Hi", "Ho"]],
         "images": ["0.png"]},
        said("Hi", "Ho", "<image>Say\nit.", "It."), ["0.png"],
    ),
    "ms-swift": (
        {"messages": [{"role": "system", "content": "S"}, *asked("<image><image>Which?")],
         "images": ["1.png", "0.png"]},
        said("<image><image>Which?", "A.", system="S"), ["1.png", "0.png"],
    ),
    "ms-swift, queries": (
        {"query": "<image>Q", "response": "R", "history": [], "images": ["0.png"]},
        said("<image>Q", "R"), ["0.png"],
    ),
    "TRL, images in a column": (
        {"messages": asked([{"type": "image"}, text("Q")], [text("A.")]), "images": ["0.png"]},
        said("<image>Q", "A."), ["0.png"],
    ),
    "TRL, no place said": (
        {"messages": asked("Q"), "images": ["0.png", "1.png"]},
        said("<image><image>Q", "A."), ["0.png", "1.png"],
    ),
    "TRL, prompt and completion": (
        {"prompt": [{"role": "user", "content": "Q"}], "completion": [{"role": "assistant", "content": "A."}],
         "image": "0.png"},
        said("<image>Q", "A."), ["0.png"],
    ),
    "TRL, by index": (
        {"messages": asked([{"index": None, "text": "Q", "type": "text"}, {"index": 1, "text": None, "type": "image"},
                            {"index": 0, "text": None, "type": "image"}]), "images": ["0.png", "1.png"]},
        said("Q<image><image>", "A."), ["1.png", "0.png"],
    ),
    "transformers": (
        {"messages": asked([{"type": "image", "path": "2.png"}, text("Q"), {"type": "image", "url": "0.png"}])},
        said("<image>Q<image>", "A."), ["2.png", "0.png"],
    ),
    "Qwen": (
        {"messages": asked([{"type": "image", "image": "file:///{images}/1.png"}, text("Q")])},
        said("<image>Q", "A."), ["file:///{images}/1.png"],
    ),
    "OpenAI": (
        {"messages": asked([text("Q"), {"type": "image_url", "image_url": {"url": DATA_URL}}])},
        said("Q<image>", "A."), [DATA_URL],
    ),
    "Anthropic": (
        {"messages": asked([{"type": "image", "source": {"type": "base64", "media_type": "image/png",
                                                         "data": DATA_URL.split(",")[1]}}, text("Q")])},
        said("<image>Q", "A."), [DATA_URL.replace("image/png", "")],
    ),
    "the Cauldron": (
        {"images": ["0.png"], "texts": [{"user": "Q", "assistant": "A.", "source": "s"},
                                        {"user": "Q2", "assistant": "A2"}]},
        said("<image>Q", "A.", "Q2", "A2"), ["0.png"],
    ),
    "visual questions": (
        {"image": "0.png", "question": "Q", "answer": "A."}, said("<image>Q", "A."), ["0.png"],
    ),
    "captions": ({"image": "0.png", "caption": "A dog."}, said("<image>", "A dog."), ["0.png"]),
    "Qwen-VL and ms-swift, images in the text": (
        {"query": "Picture 1: <img>1.png</img>\nQ", "response": "R"}, said("Picture 1: <image>\nQ", "R"), ["1.png"],
    ),
    "Qwen-VL, LLaVA's turns": (
        {"conversations": said("<img>0.png</img>Q", "A.")}, said("<image>Q", "A."), ["0.png"],
    ),
    "Qwen-VL, parts without types": (
        {"messages": asked([{"image": "1.png"}, {"text": "Q"}], [{"text": "A."}])}, said("<image>Q", "A."), ["1.png"],
    ),
    "a system turn of another name": (
        {"query": "Q", "response": "A.", "system_prompt": "S", "label": True}, said("Q", "A.", system="S"), [],
    ),
    "a table without an image": (
        {"messages": asked("Q"), "images": [{"bytes": None, "path": None}]}, said("Q", "A."), [],
    ),
    "no calls of tools": (
        {"messages": asked("Q"), "tools": "[]", "label": None}, said("Q", "A."), [],
    ),
    "text alone": ({"messages": asked("Q"), "images": []}, said("Q", "A."), []),
    "roles of other tools": (
        {"messages": [{"role": "developer", "content": "S"}, *asked("Q", user="human", assistant="model")]},
        said("Q", "A.", system="S"), [],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMS)
def test_the_form_of_a_tool_becomes_turns_and_images_in_their_order(name):
    record, turns, images = FORMS[name]
    found = read_dialogue(record)
    assert found.turns == turns
    assert list(found.images) == images


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_every_form_is_packed_with_its_images_and_read_back_from_the_shard(tmp_path, images, name):
    records = [
        json.loads(json.dumps(record).replace("{images}", str(images)[1:])) for record, _, _ in FORMS.values()
    ]
    summary = pack(write(tmp_path, records, name), tmp_path / "out", image_folder=images)
    assert (summary.packed, summary.rejects_by_reason) == (len(FORMS), {})
    found = {sample.key: sample for sample in samples_of(tmp_path / "out")}
    for number, (_, turns, wanted) in enumerate(FORMS.values(), start=1):
        sample = found[f"data-{number}"]
        assert sample.conversations == turns
        numbers = {(images / f"{n}.png").read_bytes(): f"{n}.png" for n in range(3)} | {INLINE: DATA_URL}
        named = [DATA_URL if "base64" in image else image.rsplit("/", 1)[-1] for image in wanted]
        assert [numbers[data] for data in sample.images] == named


def test_other_keys_of_an_entry_are_kept_and_its_images_are_not_written_twice(tmp_path, images):
    entry = {
        "id": 7,
        "messages": asked([{"type": "image"}, text("Q")]),
        "images": [DATA_URL],
        "question_type": "who",
    }
    pack(write(tmp_path, [entry]), tmp_path / "out", image_folder=images)
    [sample] = samples_of(tmp_path / "out")
    assert (sample.key, sample.metadata) == ("7", {"id": 7, "question_type": "who"})


REFUSED = [
    ({"messages": asked("<image>Q"), "images": []}, "<image> in the text, but no image: 1 asked for"),
    ({"messages": asked("<image>Q"), "images": ["a", "b"]},
     "number of <image> differs from number of images: 1 and 2"),
    ({"messages": asked([{"type": "image", "index": 4}, text("Q")]), "images": ["a"]},
     "<image> in the text, but no image: image 4 of 1 asked for"),
    ({"messages": asked([{"type": "video", "video": "a.mp4"}, text("Q")])},
     "media without a placeholder: turn 1 has a part of type 'video'"),
    ({"messages": asked("Q"), "videos": ["a.mp4"]}, "media without a placeholder: videos: ['a.mp4']; only images"),
    ({"messages": asked("Q", None)}, "malformed turn: turn 2 has no text, found None"),
    ({"messages": asked("Q", assistant="tool")}, "unknown role: turn 2 is from 'tool', must be one of human, user"),
    ({"messages": asked('[{"type":"image"}]')}, "malformed turn: turn 1 is a JSON text of its parts; write"),
    ({"messages": "Q"}, "messages is not a list: str"),
    ({"messages": [{"role": "user"}]}, "malformed turn: turn 1 must be"),
    ({"messages": [*asked("Q"), {"role": "system", "content": "S"}]}, "wrong role order"),
    ({"texts": [{"user": "Q"}]}, "malformed turn: exchange 1 must be"),
    ({"question": "Q", "answers": ["A", "B"]}, "no answer: answer is missing, found question, answers; name it so"),
    ({"prompt": "Q", "chosen": "A", "rejected": "B"}, "no answer: completion is missing, found prompt, chosen"),
    ({"question": "Q", "choices": ["A", "B"], "answer": "B"}, "question with choices: choices: ['A', 'B']; write"),
    ({"messages": asked(["Q", "Q2"])}, "several texts for one turn: turn 1 is ['Q', 'Q2']; name one of them"),
    ({"image": "a.png", "caption": ["A", "B"]}, "several texts for one turn: turn 2 is"),
    ({"instruction": {"a": 1}, "output": "A"}, "malformed turn: instruction and input must be texts"),
    ({"file_name": "a.png", "text": "A dog."}, "caption without an image: text is an image's caption"),
    ({"image": "a.png", "text": "USER: <image> ASSISTANT: A"}, "caption with an <image>: text must be"),
    ({"messages": asked([{"type": "image", "index": 0}, text("Q")]), "images": ["a", "b"]},
     "number of <image> differs from number of images: image 1 is never shown"),
    *(({"messages": asked(f"{mark}Q"), "images": ["a"]}, f"mark of another tool: turn 1 holds '{mark}'")
      for mark in ("<|image_1|>", "<image_00>", "<image 1>", "<ImageHere>", "[IMG]", "<img>", "<|image_pad|>",
                   "<bbox>", "<ref-object>", "<video>", "<audio>")),
    *(({"messages": [*asked("Q"), *asked("Q"), {"role": "user", "content": "Q"},
                     {"role": "assistant", "content": "", key: value}]}, reason)
      for key, value, reason in (
          ("tool_calls", [{"id": "1"}], "more than text and images: turn 6 has tool_calls"),
          ("function_call", {"name": "f"}, "more than text and images: turn 6 has function_call"),
          ("reasoning_content", "so", "more than text and images: turn 6 has reasoning_content: 'so'"),
          ("weight", 0, "answer that is not to be trained: turn 6 has weight: 0"),
          ("loss", False, "answer that is not to be trained: turn 6 has loss: False"))),
    ({"messages": asked([{"type": "image", "file_id": "f"}, text("Q")]), "images": ["a"]},
     "image is no path: a part of type image has file_id; name the image's path as image"),
    ({"messages": asked("Q"), "tools": [{"name": "f"}]}, "more than text and images: tools: [{'name': 'f'}]"),
    ({"prompt": "Q", "completion": "A", "label": False}, "answer that is marked as bad: label: False"),
    ({"messages": asked("Q"), "kto_tag": False}, "answer that is marked as bad: kto_tag: False"),
    *(({key: value, "question": "Q", "answer": "A"}, f"media without a placeholder: {key}: ")
      for key, value in (("jpg", "a.jpg"), ("jpg", b"bytes"), ("decoded_image", "a"), ("image_bytes", "a"),
                         ("page", {"bytes": b"a", "path": None}), ("screenshot", "a"), ("file_name", "a.PNG"))),
    ({"image": "a.png", "image_2": "b.png", "question": "Q", "answer": "A"}, "media without a placeholder: image_2"),
    ({"image": "a.png", "mask": {"bytes": b"b", "path": None}, "question": "Q", "answer": "A"},
     "media without a placeholder: mask: "),
    ({"image": "a.png", "label": 3}, "no conversations: found image, label; known are conversations, messages"),
    ({"query": "Q", "response": "R", "history": [["only one"]]}, "malformed turn: history must be"),
]  # fmt: skip


@pytest.mark.parametrize(("record", "reason"), REFUSED, ids=[reason[:40] for _, reason in REFUSED])
def test_what_no_form_can_say_is_refused_with_the_reason(record, reason):
    with pytest.raises(BadSample) as caught:
        read_dialogue(record)
    assert caught.value.reason.startswith(reason)


def test_a_list_over_many_blocks_is_read_entry_by_entry(tmp_path, images, monkeypatch):
    """Values, numbers and spaces are cut anywhere by the window's end."""
    monkeypatch.setattr("pipeline.packing.json_list.BLOCK", 7)
    entries = [{"id": n, "messages": asked("ü" * n, 'ö \\ " \U0001f600')} for n in range(1, 40)]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries, indent=3, ensure_ascii=False), encoding="utf-8-sig")
    assert pack(path, tmp_path / "out", image_folder=images).packed == 39
    path.write_text("[1, 234567890123456,\n  {]")
    with pytest.raises(
        Exception, match=r"property name enclosed in double quotes at line 2, column 4; correct it"
    ):
        pack(path, tmp_path / "other", image_folder=images)


def test_entries_a_line_are_read_by_any_name(tmp_path, images):
    path = write(tmp_path, [{"messages": asked(f"Q{n}")} for n in range(3)], "data.jsonl").rename(
        tmp_path / "data.json"
    )
    assert pack(path, tmp_path / "out").packed == 3
    assert rejects_of(tmp_path / "out") == []
