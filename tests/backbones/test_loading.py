from __future__ import annotations

import pytest
import torch
from torch import nn

from xbt.backbones import load_backbone, rebuild_backbone
from xbt.encoders import load_encoder
from xbt.errors import ConfigError, EncoderError
from xbt.space import draw_probe_images


def count(module):
    return sum(parameter.numel() for parameter in module.parameters())


def features_of(backbone, size, seed=0):
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        return backbone.eval()(pixels)


@pytest.mark.parametrize(
    ("spec", "size", "dim"),
    [
        ("small_resnet", None, 128),
        ("small_resnet:2", 48, 256),
        ("timm:resnet18", 64, 512),
        ("timm:vit_tiny_patch16_224", 32, 192),
        ("torchvision:resnet18", 64, 512),
        ("torchvision:mobilenet_v3_small", 64, 1024),
    ],
)
def test_gives_one_trainable_vector_per_image(spec, size, dim):
    backbone = load_backbone(spec, size)
    assert backbone.spec == spec
    assert backbone.training
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert backbone.image_size == (size or 32)
    assert backbone.feature_dim == dim
    assert features_of(backbone, backbone.image_size).shape == (2, dim)
    assert not any(
        isinstance(module, nn.Linear) and module.out_features == 1000 for module in backbone.modules()
    )


def test_finding_the_dimension_leaves_batch_norms_alone():
    for module in load_backbone("small_resnet").modules():
        if isinstance(module, nn.BatchNorm2d):
            assert module.num_batches_tracked == 0
            assert torch.equal(module.running_mean, torch.zeros_like(module.running_mean))


def test_small_resnet_is_small():
    backbone = load_backbone("small_resnet")
    assert 250_000 < count(backbone) < 350_000
    assert features_of(backbone, 32).std() > 0
    assert "small_resnet" in repr(backbone)


def test_default_sizes_are_the_architectures_own():
    assert load_backbone("torchvision:resnet18").image_size == 224
    assert load_backbone("timm:resnet18").image_size == 224


def test_torchvision_features_are_what_its_classifier_saw():
    torch.manual_seed(0)
    backbone = load_backbone("torchvision:resnet18", 64)
    from torchvision.models import resnet18

    torch.manual_seed(0)
    whole = resnet18(weights=None).eval()
    seen = []
    whole.fc.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    features = features_of(backbone, 64)
    with torch.no_grad():
        whole(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    torch.testing.assert_close(features, seen[0])


@pytest.fixture(params=["open_clip_spec", "transformers_spec"])
def clip_spec(request):
    return request.getfixturevalue(request.param)


def test_clip_tower_is_the_encoders(clip_spec):
    encoder, backbone = load_encoder(clip_spec), load_backbone(f"clip:{clip_spec}")
    assert backbone.feature_dim == encoder.dim
    assert backbone.image_size == 32
    assert all(parameter.requires_grad for parameter in backbone.parameters())
    assert count(backbone) < count(encoder.module)
    assert not any("text" in name or "token_embedding" in name for name in backbone.state_dict())
    transform = backbone.preprocessing.evaluation()
    images = draw_probe_images()
    with torch.no_grad():
        vectors = backbone.eval()(torch.stack([transform(image) for image in images]))
    expected = encoder.encode_images(images)
    torch.testing.assert_close(nn.functional.normalize(vectors, dim=1), expected, atol=1e-4, rtol=1e-4)
    exact = torch.stack([encoder.preprocess(image) for image in images])
    with torch.no_grad():
        torch.testing.assert_close(nn.functional.normalize(backbone(exact), dim=1), expected)


def test_clip_tower_is_rebuilt_without_its_files(clip_spec, monkeypatch):
    backbone = load_backbone(f"clip:{clip_spec}")

    def refuse(*_):
        raise AssertionError("the encoder was loaded")

    monkeypatch.setattr("xbt.encoders.load_encoder", refuse)
    again = rebuild_backbone(backbone.description())
    assert again.description() == backbone.description()
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(features_of(again, 32), features_of(backbone, 32))


def test_siglip_tower(tmp_path):
    import tiny

    spec = tiny.tiny_siglip(tmp_path)
    backbone, encoder = load_backbone(f"clip:{spec}"), load_encoder(spec)
    assert backbone.preprocessing.resize_mode == "squash"
    again = rebuild_backbone(backbone.description())
    again.load_state_dict(backbone.state_dict())
    images = draw_probe_images()
    pixels = torch.stack([encoder.preprocess(image) for image in images])
    with torch.no_grad():
        vectors = nn.functional.normalize(again.eval()(pixels), dim=1)
    torch.testing.assert_close(vectors, encoder.encode_images(images))


@pytest.mark.parametrize("spec", ["small_resnet:2", "timm:resnet10t", "torchvision:resnet18"])
def test_rebuilt_from_its_description(spec):
    backbone = load_backbone(spec, 64)
    again = rebuild_backbone(backbone.description())
    again.load_state_dict(backbone.state_dict())
    assert torch.equal(features_of(again, 64), features_of(backbone, 64))


def test_rebuilding_downloads_nothing(monkeypatch):
    import timm

    asked = []
    original = timm.create_model

    def create_model(name, **options):
        asked.append(options["pretrained"])
        return original(name, **{**options, "pretrained": False})

    monkeypatch.setattr(timm, "create_model", create_model)
    backbone = load_backbone("timm:resnet18", 64, pretrained=True)
    assert backbone.preprocessing.crop_fraction < 1
    rebuild_backbone(backbone.description())
    assert asked[0] is True
    assert asked[-1] is False


def test_pretrained_weights_of_torchvision_bring_their_preprocessing(monkeypatch):
    from torchvision import models

    original = models.get_model
    monkeypatch.setattr(
        models, "get_model", lambda name, weights, **size: original(name, weights=None, **size)
    )
    backbone = load_backbone("torchvision:resnet18", pretrained=True)
    weights = models.ResNet18_Weights.DEFAULT.transforms()
    image = draw_probe_images()[3]
    pixels = backbone.preprocessing.evaluation()(image)
    torch.testing.assert_close(pixels, weights(image), atol=1e-6, rtol=1e-5)
    assert backbone.image_size == 224


@pytest.mark.parametrize(
    ("spec", "options", "message"),
    [
        ("resnet18", {}, "'resnet18' is not a backbone; write one of: small_resnet"),
        ("timm:", {}, "'timm:' is not a backbone"),
        ("mlp:3", {}, "'mlp:3' is not a backbone"),
        ("small_resnet:wide", {}, "the width must be a whole number"),
        ("small_resnet:0", {}, "the width must be a whole number"),
        ("small_resnet:", {}, "the width must be a whole number"),
        ("small_resnet", {"pretrained": True}, "no weights of small_resnet"),
        ("timm:resnet_nothing", {}, "timm knows no model 'resnet_nothing'"),
        ("timm:botnet50ts_256", {"pretrained": True}, "timm has no pretrained weights of 'botnet50ts_256'"),
        ("torchvision:resnet_nothing", {}, "torchvision knows no image classifier"),
        ("torchvision:fcn_resnet50", {}, "torchvision knows no image classifier"),
        ("torchvision:squeezenet1_1", {}, "does not end in a linear layer"),
        ("timm:vit_tiny_patch16_224", {"image_size": 8}, "cannot take images of 8 x 8 pixels"),
        ("torchvision:alexnet", {"image_size": 16}, "cannot take images of 16 x 16 pixels"),
    ],
)
def test_refuses(spec, options, message):
    with pytest.raises(ConfigError, match=message):
        load_backbone(spec, **options)


def test_refuses_what_is_no_clip(open_clip_spec):
    with pytest.raises(EncoderError, match="is not an encoder specification"):
        load_backbone("clip:resnet")
    with pytest.raises(ConfigError, match="takes 32 pixels; leave it out"):
        load_backbone(f"clip:{open_clip_spec}", image_size=64)
    description = load_backbone(f"clip:{open_clip_spec}").description()
    with pytest.raises(EncoderError, match="saved without its architecture"):
        rebuild_backbone({**description, "architecture": None})
    with pytest.raises(EncoderError, match="cannot build an image tower"):
        rebuild_backbone({**description, "architecture": {"library": "jax", "config": {}}})
