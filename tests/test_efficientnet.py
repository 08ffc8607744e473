"""The EfficientNet-Lite tower: its arithmetic by hand and by the published code, and its place in a checkpoint."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from pipeline.errors import ConfigError
from pipeline.models.mobilevlm import MobileVLMConfig, MobileVLMForCausalLM
from pipeline.models.mobilevlm.efficientnet import (
    EfficientNetLiteConfig,
    EfficientNetLiteLayers,
    FrozenBatchNorm,
    SameConvolution,
)
from pipeline.models.mobilevlm.model import TOWER_PREFIX
from pipeline.models.stub import load_teacher
from pipeline.models.teacher_plan import plan_teacher
from pipeline.shapes import ShapeError
from pipeline.targets.targets import AttentionTarget, LogitsTarget, VisionTarget

# Three halvings: 32 pixels become 4 x 4 patches of width 8.
TOWER = {"image_size": 32, "stem_channels": 4, "blocks": [[1, 1, 4, 3, 1], [2, 2, 6, 3, 2], [1, 2, 8, 5, 2]]}
SMALL = {"vision_tower_type": "efficientnet_lite", "vision_config": TOWER}


@pytest.fixture
def model(tiny_model):
    model = tiny_model(**SMALL)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5, generator=torch.Generator().manual_seed(len(name)))
    return model


@pytest.fixture
def pixels() -> torch.Tensor:
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_the_odd_pixel_of_padding_goes_to_the_right_and_the_bottom():
    convolution = SameConvolution(1, 1, 3, 2, bias=False)
    torch.nn.init.ones_(convolution.weight)
    assert convolution(torch.ones(1, 1, 4, 4)).tolist() == [[[[9.0, 6.0], [6.0, 4.0]]]]


def test_padding_is_even_where_the_stride_is_one():
    convolution = SameConvolution(1, 1, 3, bias=False)
    torch.nn.init.ones_(convolution.weight)
    assert convolution(torch.ones(1, 1, 2, 2)).tolist() == [[[[4.0, 4.0], [4.0, 4.0]]]]


def test_batch_normalisation_uses_the_stored_statistics_in_training_too():
    norm = FrozenBatchNorm(1, eps=0.0).train()
    norm.running_mean.fill_(3.0)
    norm.running_var.fill_(4.0)
    norm.weight.data.fill_(10.0)
    norm.bias.data.fill_(1.0)
    assert norm(torch.tensor([[[[5.0]]], [[[1.0]]]])).flatten().tolist() == [11.0, -9.0]
    assert norm.running_mean.item() == 3.0


def test_lite0_equals_the_published_code():
    published = pytest.importorskip("efficientnet_lite_pytorch").EfficientNet.from_name("efficientnet-lite0")
    layers = EfficientNetLiteLayers(EfficientNetLiteConfig())
    own = layers.state_dict()
    layers.load_state_dict({name: value for name, value in published.state_dict().items() if name in own})
    published.eval()
    images = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = published._swish(published._bn0(published._conv_stem(images)))
        for block in published._blocks:
            expected = block(expected)
        assert torch.equal(layers(images), expected) and expected.shape == (1, 320, 2, 2)


def test_lite0_makes_64_patches_of_an_image_of_256_pixels():
    config = MobileVLMConfig(vision_tower_type="efficientnet_lite", vision_config={})
    assert (config.tower.image_size, config.tower.hidden_size, len(config.tower.blocks)) == (256, 320, 7)
    assert config.to_dict()["mm_hidden_size"] == 320


def test_patches_are_in_reading_order_and_without_gradient(model, pixels):
    features = model.get_patch_features(pixels.requires_grad_())
    grid = model.model.vision_tower.vision_tower(pixels)
    assert features.shape == (2, 16, 8) and not features.requires_grad
    assert torch.equal(features[:, 5], grid[:, :, 1, 1])
    assert not any(parameter.requires_grad for parameter in model.model.vision_tower.parameters())


def test_a_checkpoint_with_this_tower_reads_back_the_same(model, pixels, tmp_path):
    model.save_pretrained(tmp_path)
    again = MobileVLMForCausalLM.from_pretrained(tmp_path).eval()
    assert again.config.tower.blocks == model.config.tower.blocks and again.config.tower.image_size == 32
    mine, theirs = (m.get_image_features(pixels).pooler_output for m in (again, model))
    assert torch.equal(mine, theirs)
    assert torch.equal(again.train().get_patch_features(pixels), model.get_patch_features(pixels))


def test_the_stub_loads_the_whole_tower_with_its_statistics_and_equals_the_teacher(model, pixels, tmp_path):
    model.save_pretrained(tmp_path)
    targets = {"vision": VisionTarget(), "attention": AttentionTarget(layers=[0])}
    plan = plan_teacher(str(tmp_path), targets=targets)
    tower = {name for name in model.state_dict() if name.startswith(TOWER_PREFIX)}
    assert tower <= set(plan.tensors) and any("running_var" in name for name in tower)
    stub = load_teacher(plan, dtype=torch.float32, device=torch.device("cpu"))
    features = stub.encode_images([{"pixel_values": image[None]} for image in pixels], [4, 4])
    assert torch.equal(features.flat, model.get_image_features(pixels).pooler_output.flatten(0, 1))


def test_the_whole_teacher_needs_every_tensor(model, tmp_path):
    model.save_pretrained(tmp_path)
    plan = plan_teacher(str(tmp_path), targets={"logits": LogitsTarget()})
    assert set(plan.tensors) == set(load_file(tmp_path / "model.safetensors"))


def test_a_tower_that_is_not_in_the_checkpoint_is_told(model, tmp_path):
    model.save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    rest = {name: value for name, value in load_file(file).items() if not name.startswith(TOWER_PREFIX)}
    save_file(rest, file, metadata={"format": "pt"})
    with pytest.raises(ConfigError, match=r"lacks \d+ tensors of the model, first 'model.vision_tower"):
        MobileVLMForCausalLM.from_pretrained(tmp_path)


def test_images_of_another_size_are_refused(model):
    with pytest.raises(ShapeError, match="pixel_values: expected axes 'I 3 32 32'"):
        model.get_patch_features(torch.zeros(1, 3, 64, 64))


def test_an_unknown_tower_is_answered_with_the_known_ones():
    with pytest.raises(ConfigError, match="unknown tower 'siglip'; known are clip, efficientnet_lite"):
        MobileVLMConfig(vision_tower_type="siglip", vision_config={})
