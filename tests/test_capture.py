"""What stage 1 stores of a sample: the teacher's own values, whoever its neighbours are, or a reject."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from small_experiment import (
    RARE,
    copy_of_teacher,
    shard_members,
    stored_arrays,
    training_records,
    weights,
    write_shard,
)

from cache import Store, summarise, verify
from pipeline.data.load_preparation import load_preparation
from pipeline.data.shards import read_shard
from pipeline.models.mobilevlm import IMAGE_TOKEN_ID, MobileVLMForCausalLM
from pipeline.positions import IGNORE_INDEX
from pipeline.teacher_cache.teacher import cache_teacher


def samples_of(experiment) -> dict[str, list[tuple[str, bytes]]]:
    members: dict[str, list[tuple[str, bytes]]] = {}
    for number in range(3):
        for name, data in shard_members(experiment.shard(number)):
            members.setdefault(name.split(".")[0], []).append((name, data))
    return members


@settings(max_examples=6, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data(), batch_size=st.integers(1, 7))
def test_stored_values_do_not_depend_on_batch_size_or_neighbours(
    experiment, tmp_path_factory, data, batch_size
):
    samples = samples_of(experiment)
    order = data.draw(st.permutations(sorted(samples)))[: data.draw(st.integers(1, len(samples)))]
    folder = tmp_path_factory.mktemp("neighbours")
    write_shard(folder / "one.tar", [member for key in order for member in samples[key]])
    overrides = [f"data.shards={folder}", f"cache.path={folder}/store", f"teacher.batch_size={batch_size}"]
    cache_teacher(experiment.config(folder, *overrides))
    reference, found = stored_arrays(experiment.store), stored_arrays(folder / "store")
    assert list(found) == order
    for key in order:
        for name, values in found[key].items():
            # Logits are kept in float16: two values on both sides of a rounding differ by one step.
            relative = 2**-10 if name.startswith("logits/") else 0
            assert len(values) == len(reference[key][name])
            for mine, theirs in zip(values, reference[key][name], strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-5, rtol=relative, err_msg=name)


def test_an_image_is_stored_once_within_a_shard(experiment):
    summary = summarise(experiment.store)
    vision = next(array for array in summary.arrays if array.name == "vision")
    per_shard = []
    for number in range(3):
        samples = read_shard(experiment.shard(number))
        per_shard.append([digest for sample in samples for digest in sample.image_digests])
    assert vision.rows == summary.distinct_images == sum(len(set(digests)) for digests in per_shard)
    assert summary.image_references == sum(map(len, per_shard)) > summary.distinct_images


# What is stored is what transformers computes


@pytest.fixture(scope="module")
def eager(experiment) -> MobileVLMForCausalLM:
    model = MobileVLMForCausalLM.from_pretrained(experiment.teacher, attn_implementation="eager")
    return model.float().eval()


def whole_sequences(experiment, eager):
    """Of every sample alone: key, whether each position is an image's, labels, logits and eager attention."""
    config = experiment.config(experiment.file.parent)
    preparation = load_preparation(config.teacher.model, config.data)
    for number in range(3):
        for sample in read_shard(experiment.shard(number)):
            tokens = preparation.tokenize(sample.conversations)
            is_vision = [token == IMAGE_TOKEN_ID for token in tokens.input_ids]
            pixels = [preparation.preprocess(image)["pixel_values"] for image in sample.images]
            with torch.no_grad():
                vision = eager.get_image_features(torch.cat(pixels)) if pixels else None
                outputs = eager(
                    torch.tensor([tokens.input_ids]),
                    mm_encoder_outputs={"image": vision},
                    output_attentions=True,
                )
            features = [] if vision is None else vision.pooler_output
            yield sample.key, is_vision, tokens.labels, outputs.logits[0], outputs.attentions, features


def test_stored_attention_and_vision_are_those_of_eager_attention(experiment, eager):
    store = Store(experiment.store)
    for key, is_vision, _, _, attentions, vision in whole_sequences(experiment, eager):
        columns = [n for n, is_image in enumerate(is_vision) if is_image]
        rows = [n for n, is_image in enumerate(is_vision) if not is_image and columns and n > columns[0]]
        assert len(columns) == 4 * len(vision)
        names = ["attention/layer_0", "attention/layer_1", "vision"]
        stored = store.read(key, names)
        for layer in (0, 1):
            found = stored[f"attention/layer_{layer}"]
            assert len(found) == len(vision)
            for image, block in enumerate(found):  # 'T H N'
                expected = attentions[layer][0][:, rows][:, :, columns[4 * image : 4 * image + 4]]
                np.testing.assert_allclose(block, expected.transpose(0, 1).numpy(), atol=1e-5, err_msg=key)
        for block, features in zip(stored["vision"], vision, strict=True):
            np.testing.assert_allclose(block, features.T.numpy(), atol=1e-5)


def test_stored_logits_are_the_top_of_the_full_distribution_and_the_mass_of_the_rest(experiment, eager):
    store = Store(experiment.store)
    for key, _, labels, logits, _, _ in whole_sequences(experiment, eager):
        predicts = [n - 1 for n, label in enumerate(labels) if label != IGNORE_INDEX]
        full = logits[predicts].double().log_softmax(dim=-1)
        stored = store.read(key, ["logits/ids", "logits/log_probs", "logits/tail"])
        ids = torch.from_numpy(stored["logits/ids"].astype(np.int64))
        assert ids.shape == (len(predicts), 8)
        torch.testing.assert_close(full.topk(8).indices, ids)
        rest = full.exp().scatter(1, ids, 0).sum(dim=1).log().clamp(min=-30)
        for expected, name in ((full.gather(1, ids), "logits/log_probs"), (rest, "logits/tail")):
            np.testing.assert_allclose(stored[name], expected.clamp(min=-30).numpy(), rtol=2**-10, atol=1e-5)


def test_a_stub_stores_the_same_attention_and_vision_as_the_whole_teacher(experiment, tmp_path):
    overrides = ["targets.logits=null", "losses.logits=null", f"cache.path={tmp_path}/store"]
    cache_teacher(experiment.config(tmp_path, *overrides))
    manifest, whole = Store(tmp_path / "store").manifest, Store(experiment.store).manifest
    assert manifest.teacher["is_stub"] and not whole.teacher["is_stub"]
    assert manifest.teacher["num_tensors_used"] < whole.teacher["num_tensors_used"]
    reference = stored_arrays(experiment.store)
    for key, arrays in stored_arrays(tmp_path / "store").items():
        assert "logits/ids" not in arrays and "vision" in arrays
        for name, values in arrays.items():
            for mine, theirs in zip(values, reference[key][name], strict=True):
                np.testing.assert_allclose(mine, theirs, atol=1e-6, err_msg=f"{key} {name}")


# Values that cannot be stored


def test_a_sample_whose_values_are_not_finite_is_rejected_with_the_reason(experiment, tmp_path):
    teacher = copy_of_teacher(experiment, tmp_path / "teacher")
    ids = {key: set(arrays["input_ids"].tolist()) for key, arrays in stored_arrays(experiment.store).items()}
    only_rare = ids["rare"] - set().union(*(found for key, found in ids.items() if key != "rare"))
    assert only_rare, f"no token of {RARE!r} is rare"
    tensors = weights(teacher)
    tensors["model.embed_tokens.weight"][sorted(only_rare)[0]] = float("nan")
    save_file(tensors, teacher / "model.safetensors", metadata={"format": "pt"})
    overrides = [f"teacher.model={teacher}", f"cache.path={tmp_path}/store"]
    run = cache_teacher(experiment.config(tmp_path, *overrides))
    assert (run.cached, run.rejected) == (len(training_records()) - 1, 1)
    store = Store(tmp_path / "store")
    rejects = [reject for part in store.parts for reject in store.rejects(part)]
    assert [key for key, _ in rejects] == ["rare"]
    assert rejects[0][1].startswith("value that cannot be stored: Array 'attention/layer_0'")
    assert "not finite" in rejects[0][1]
    assert verify(tmp_path / "store", deep=True).problems == ()


def test_features_beyond_a_codec_reject_the_image_samples_and_keep_the_text(experiment, tmp_path):
    overrides = ["targets.vision.codec=fixed_point", f"targets.vision.step={2**-40}"]
    run = cache_teacher(experiment.config(tmp_path, *overrides, f"cache.path={tmp_path}/store"))
    assert (run.cached, run.rejected) == (2, len(training_records()) - 2)
    store = Store(tmp_path / "store")
    assert sorted(store.keys()) == ["t0", "t1"]
    reasons = [reason for part in store.parts for _, reason in store.rejects(part)]
    assert all(reason.startswith("value that cannot be stored: Array 'vision': value ") for reason in reasons)
    assert all("use a larger step or float16" in reason for reason in reasons)
