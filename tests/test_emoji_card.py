"""The card of the emoji study's teacher."""

from __future__ import annotations

import torch

from pipeline.evaluation.predictions import Prediction
from pipeline.studies.emoji.card import write_emoji_card


def test_the_card_gives_each_set_a_row_and_what_the_commonest_answer_gets(tmp_path):
    asked = [
        ("new_scene", "count", "2", "2"),
        ("new_scene", "count", "3", "2"),
        ("new_scene", "kind", "tool", "food"),
        ("unseen_style", "count", "3", "3"),
        ("unseen_style", "kind", "food", "food"),
    ]
    predictions = [Prediction(str(n), "i", kind, a, p, name) for n, (name, kind, a, p) in enumerate(asked)]
    training = [
        {
            "question_type": kind,
            "conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": answer}],
        }
        for kind, answer in (("count", "3"), ("count", "3"), ("count", "2"), ("kind", "tool"))
    ]
    write_emoji_card(
        tmp_path / "README.md",
        predictions,
        training_records=training,
        learned={"model.mm_projector.a": torch.zeros(1000), "model.layers.0.lora_A": torch.zeros(8, 30)},
    )
    text = (tmp_path / "README.md").read_text()
    assert "low-rank changes of rank 8" in text and "`unseen_concept`: 31 concepts" in text
    assert "from 28,800 questions about 4,800 scenes" in text
    assert "| | count | kind | all |" in text
    assert "| new_scene | 50.0 | 0.0 | 33.3 |\n| unseen_style | 100.0 | 100.0 | 100.0 |" in text
    assert "| most frequent answer | 66.7 | 50.0 | 60.0 |" in text
    assert "LDPNetV2, 1,000 parameters" in text and "(240 parameters), float16: 0.0 MB" in text
