"""How often the teacher agrees with the labels: a poor teacher is seen in `info` and `plan`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from command_lines import ROOT
from small_experiment import rewrite_store
from small_store import flip_bit

from cache import Store
from pipeline.teacher_cache.teacher import cache_teacher
from pipeline.upkeep.agreement import IGNORED, agreement_in
from pipeline.upkeep.describe import describe_info, describe_plan
from pipeline.upkeep.information import inform
from pipeline.upkeep.plan import plan_store


def labels_of(arrays) -> np.ndarray:
    labels = arrays["labels"][1:]
    return labels[labels != IGNORED]


def agreeing(key, arrays):
    """The arrays of a teacher whose first choice is the label, with probability 0.9 but for the rest."""
    ids = arrays["logits/ids"].copy()
    log_probs = np.full(ids.shape, np.log(0.01), np.float16)
    for row, label in enumerate(labels_of(arrays).tolist()):
        others = [number for number in range(3, 20) if number != label]
        ids[row] = [label, *others[: ids.shape[1] - 1]]
    log_probs[:, 0] = np.log(0.9)
    return {**arrays, "logits/ids": ids, "logits/log_probs": log_probs}


def mixed(key, arrays):
    """The arrays of a teacher for which the label comes first, third, or outside of the top K, in turn."""
    ids = arrays["logits/ids"].copy()
    for row, label in enumerate(labels_of(arrays).tolist()):
        others = [number for number in range(3, 20) if number != label][: ids.shape[1]]
        at = (0, 2, None)[row % 3]
        ids[row] = others if at is None else [*others[:at], label, *others[at:-1]]
    return {**arrays, "logits/ids": ids}


@pytest.fixture
def good(experiment, tmp_path) -> Path:
    return rewrite_store(experiment.store, tmp_path / "good", agreeing)


def test_a_teacher_that_agrees_is_seen_and_not_warned_about(good):
    found = agreement_in(Store(good))
    assert found.top1 == found.known == 1
    assert found.log_prob == pytest.approx(np.log(0.9), abs=1e-3)
    page = describe_info(inform(good))
    assert f"the teacher's first choice is the label at 100.0% of {found.tokens:,} answer tokens" in page
    assert "(13 samples, all 13)" in page and "WARNING" not in page


def test_a_random_teacher_is_warned_about_by_info_and_plan(experiment, tmp_path):
    found = agreement_in(Store(experiment.store))
    assert found.is_poor and found.top1 < 0.2 and found.log_prob < -3
    page = describe_info(inform(experiment.store))
    assert "WARNING: the teacher agrees with the labels at" in page and "at most, exact for" in page
    plan = plan_store(experiment.config(tmp_path, f"cache.path={tmp_path}/store"), num_samples=30)
    assert (plan.agreement.samples, plan.agreement.top1) == (found.samples, found.top1)
    assert plan.agreement.log_prob == pytest.approx(found.log_prob, abs=1e-3)
    assert "WARNING: the teacher agrees with the labels at" in describe_plan(plan)
    assert plan.to_json()["agreement"]["is_poor"] is True


def test_it_is_what_a_plain_loop_finds(experiment, tmp_path):
    store = Store(rewrite_store(experiment.store, tmp_path / "mixed", mixed))
    firsts, log_probs, known = [], [], []
    for key in store.keys():  # noqa: SIM118
        arrays = store.read(key, ["labels", "logits/ids", "logits/log_probs", "logits/tail"])
        for row, label in enumerate(labels_of(arrays).tolist()):
            ids = arrays["logits/ids"][row].tolist()
            of_ids = arrays["logits/log_probs"][row].astype(float)
            firsts.append(ids[0] == label)
            known.append(label in ids)
            most = min(float(arrays["logits/tail"][row]), of_ids[-1])
            log_probs.append(of_ids[ids.index(label)] if label in ids else most)
    found = agreement_in(store)
    assert found.tokens == len(firsts) and 0 < sum(firsts) < sum(known) < len(known)
    assert (found.top1, found.known) == pytest.approx((np.mean(firsts), np.mean(known)))
    assert found.log_prob == pytest.approx(np.mean(log_probs))


def test_the_mean_is_at_least_the_real_one(experiment, tmp_path):
    """Stored with the whole vocabulary, every label is exact."""
    whole = [f"cache.path={tmp_path}/whole", "targets.logits.top_k=512"]
    cache_teacher(experiment.config(tmp_path, *whole))
    exact, bound = agreement_in(Store(tmp_path / "whole")), agreement_in(Store(experiment.store))
    assert exact.known == 1 and bound.known < 1
    assert exact.top1 == bound.top1 and exact.log_prob < bound.log_prob


def test_a_sample_of_the_keys_is_drawn_by_the_seed(experiment):
    store = Store(experiment.store)
    some = agreement_in(store, num_samples=5)
    assert (some.samples, some.of_samples) == (5, 13) and "5 samples, drawn with seed 0 from 13" in str(some)
    assert some == agreement_in(store, num_samples=5)
    assert len({agreement_in(store, num_samples=5, seed=seed).tokens for seed in range(5)}) > 1


def test_drawn_tokens_make_more_labels_exact(experiment, tmp_path):
    draws = [f"cache.path={tmp_path}/draws", "targets.logits.tail_samples=64"]
    cache_teacher(experiment.config(tmp_path, *draws))
    assert agreement_in(Store(tmp_path / "draws")).known > agreement_in(Store(experiment.store)).known


def test_a_store_without_logits_says_nothing(experiment, tmp_path):
    without = [f"cache.path={tmp_path}/store", "targets.logits=null", "losses.logits=null"]
    cache_teacher(experiment.config(tmp_path, *without))
    found = inform(tmp_path / "store")
    assert found.agreement is None and not found.absent
    assert "answer tokens" not in describe_info(found)


def test_damaged_logits_are_named_and_the_rest_is_described(good):
    files = [
        file for file in good.rglob("*") if file.is_file() and "logits" in str(file) and "/c/" in str(file)
    ]
    for file in files:
        flip_bit(file, offset=file.stat().st_size // 2)
    page = describe_info(inform(good))
    assert "whether the teacher agrees with the labels cannot be read: " in page and "13 cached" in page


def test_info_has_it_as_json_and_needs_no_torch(good):
    code = (
        f"import json, sys; sys.path.insert(0, {str(ROOT)!r}); from pipeline.upkeep.information import inform; "
        f"print(json.dumps([inform({str(good)!r}).to_json()['agreement'], 'torch' in sys.modules]))"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    agreement, has_torch = json.loads(ran.stdout)
    assert agreement["top1"] == 1 and agreement["is_poor"] is False and not has_torch
