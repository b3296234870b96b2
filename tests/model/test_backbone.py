"""The backbone against the recordings, torchvision's, timm's; what is frozen stays frozen."""

import json
import re
from functools import partial

import pytest
import timm
import torch
from tiny import made
from torch import nn
from torchvision.models.resnet import Bottleneck, ResNet

from tailseg.checkpoint import load_weights
from tailseg.errors import UserError
from tailseg.layers.deform_conv import ModulatedDeformConv2d
from tailseg.model import pretrained
from tailseg.model.backbone import Backbone
from tailseg.model.build import build_detector, stored_recipe
from tailseg.model.pretrained import load_pretrained
from tailseg.recipes.resolve import resolve


def narrow_resnet50(**options) -> Backbone:
    """A ResNet-50 an eighth as wide, stem included."""
    return made(Backbone, "resnet50", stem_channels=8, options={"channels": (8, 16, 32, 64)}, **options)


def check_recorded(check, case, outputs, backbone, image, own=str) -> None:
    """Features and gradients; ``own`` turns the recording's names of parameters to ours."""
    backbone.eval()
    image = image.clone().requires_grad_()
    features = backbone(image)
    for i, feature in enumerate(features):
        check(case, f"out{i}", feature, outputs[f"out{i}"])
    sum((feature**2).sum() / 2 for feature in features).backward()
    check(case, "grad.image", image.grad, outputs["grad.image"])
    parameters = dict(backbone.net.named_parameters())
    norms = torch.stack([parameters[own(name)].grad.double().norm() for name in case["settings"]["parameters"]])
    check(case, "param_grad_norms", norms, outputs["param_grad_norms"])
    assert len(parameters) == len(norms)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("name", "stages"), [("backbone_resnet", ()), ("backbone_resnet_dcn", (2, 3, 4))])
def test_recorded_resnet(recorded, check, name, stages, checkpointing):
    (case, inputs, state, outputs), *others = recorded(name)
    assert not others
    backbone = narrow_resnet50(frozen_stages=-1, deformable_stages=stages, checkpointing=checkpointing)
    lost = backbone.net.load_state_dict(state, strict=False)
    assert not lost.unexpected_keys
    assert all(key.endswith("num_batches_tracked") for key in lost.missing_keys)
    check_recorded(check, case, outputs, backbone, inputs["image"])


def test_recorded_resnest(recorded, check):
    (case, inputs, state, outputs), *others = recorded("backbone_resnest")
    assert not others

    def own(name: str) -> str:
        return name.replace("stem.7.", "bn1.").replace("stem.", "conv1.")

    backbone = made(Backbone, "resnest50d", frozen_stages=-1, options={"channels": (8, 16, 32, 64), "stem_width": 8})
    backbone.net.load_state_dict({own(key): value for key, value in state.items()})
    check_recorded(check, case, outputs, backbone, inputs["image"], own)


def their_resnet(stride_in_1x1: bool, eps: float) -> ResNet:
    """torchvision's, two blocks in its second stage and one in the others, with statistics that make eps matter."""
    torch.manual_seed(0)
    net = ResNet(Bottleneck, [1, 2, 1, 1], norm_layer=partial(nn.BatchNorm2d, eps=eps)).double().eval()
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.01, 0.1)
            nn.init.uniform_(module.weight, 0.1, 0.4)
    if stride_in_1x1:
        for layer in (net.layer2, net.layer3, net.layer4):
            layer[0].conv1.stride, layer[0].conv2.stride = (2, 2), (1, 1)
    return net


@pytest.mark.parametrize("stride_in_1x1", [False, True])
@pytest.mark.parametrize("eps", [None, 0.1])
def test_features_equal_those_of_torchvision(stride_in_1x1, eps, batch):
    theirs = their_resnet(stride_in_1x1, eps or 1e-5)
    ours = made(
        Backbone, "resnet50", stride_in_1x1=stride_in_1x1, norm_eps=eps, options={"layers": (1, 2, 1, 1)}
    ).double()
    state = {key: value for key, value in theirs.state_dict().items() if not key.startswith("fc.")}
    ours.net.load_state_dict(state)
    ours.eval()
    with torch.no_grad():
        features = ours(batch[:, :, :, :64].double())
        x = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(batch[:, :, :, :64].double()))))
        for feature, layer in zip(features, (theirs.layer1, theirs.layer2, theirs.layer3, theirs.layer4), strict=True):
            x = layer(x)
            torch.testing.assert_close(feature, x, rtol=1e-9, atol=1e-9)
            assert x.std() > 1e-3  # not all zero after the last rectifier
    # The options say something: without them the same weights give other features.
    if stride_in_1x1 or eps:
        plain = made(Backbone, "resnet50", options={"layers": (1, 2, 1, 1)}).double().eval()
        plain.net.load_state_dict(state)
        with torch.no_grad():
            assert (plain(batch[:, :, :, :64].double())[-1] - features[-1]).abs().max() > 1e-3


def test_a_networks_own_epsilon_stays():
    for name, eps in (("resnet18", 1e-5), ("tf_efficientnet_lite0", 1e-3)):
        assert {m.eps for m in made(Backbone, name).modules() if isinstance(m, nn.BatchNorm2d)} == {eps}
        changed = made(Backbone, name, norm_eps=0.25)
        assert {m.eps for m in changed.modules() if isinstance(m, nn.BatchNorm2d)} == {0.25}


@pytest.mark.parametrize("stages", [-1, 0, 1, 2])
def test_a_narrow_stem_is_frozen_like_any_other(stages, batch):
    backbone = narrow_resnet50(frozen_stages=stages, train_norm=True, stride_in_1x1=True).train()
    shapes = {key: tuple(p.shape) for key, p in backbone.net.named_parameters()}
    assert shapes["conv1.weight"] == (8, 3, 7, 7)
    assert shapes["layer1.0.conv1.weight"] == (8, 8, 1, 1)
    assert shapes["layer1.0.downsample.0.weight"] == (32, 8, 1, 1)
    assert backbone.channels == (32, 64, 128, 256)
    features = backbone(batch)
    assert [tuple(f.shape[1:]) for f in features] == [(32, 16, 24), (64, 8, 12), (128, 4, 6), (256, 2, 3)]
    sum(f.square().mean() for f in features if f.requires_grad).backward()
    parts = ("conv1.", "bn1.", "layer1.", "layer2.")
    frozen = parts[: {-1: 0, 0: 2, 1: 3, 2: 4}[stages]]
    for key, parameter in backbone.net.named_parameters():
        assert parameter.requires_grad != key.startswith(frozen), key
        assert (parameter.grad is None) == key.startswith(frozen), key
    for key, module in backbone.net.named_modules():
        if key and any(True for _ in module.parameters()):
            assert module.training != f"{key}.".startswith(frozen), key


@pytest.mark.parametrize("name", ["resnet18", "resnet50d", "tf_efficientnet_lite0"])
def test_networks_without_such_a_stem_are_refused(name):
    with pytest.raises(UserError, match=rf"^model\.backbone\.stem_channels: '{name}' .*; leave it out$"):
        made(Backbone, name, stem_channels=8)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0"])
def test_networks_without_bottlenecks_have_no_stride_to_move(name):
    with pytest.raises(UserError, match=rf"^model\.backbone\.stride_in_1x1: '{name}' .*; leave it out$"):
        made(Backbone, name, stride_in_1x1=True)


@pytest.fixture(scope="module")
def batch():
    return torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("name", "channels"),
    [("resnet18", (64, 128, 256, 512)), ("tf_efficientnet_lite0", (24, 40, 112, 320))],
)
def test_channels_and_strides(name, channels, batch):
    backbone = made(Backbone, name).eval()
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
    ("resnest14d", 0): {"conv1", "bn1"},
    ("resnest14d", 1): {"conv1", "bn1", "layer1"},
}


@pytest.mark.parametrize(("name", "stages"), FROZEN)
def test_frozen_stages(name, stages, batch):
    expected = FROZEN[name, stages]
    backbone = made(Backbone, name, frozen_stages=stages, train_norm=True).train()
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
    backbone = made(Backbone, name)
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
def test_unusable_networks_are_the_users_to_fix(name, options):
    with pytest.raises(UserError, match=rf"model\.backbone.*'{name}'"):
        made(Backbone, name, options=options)


def test_a_stem_as_wide_as_the_first_stage():
    """There timm has no shortcut convolution, since its own stem of 64 channels is as wide as the stage."""
    backbone = made(Backbone, "resnet50", options={"channels": (16, 32, 64, 128)}, stem_channels=16).eval()
    with torch.no_grad():
        features = backbone(torch.zeros(1, 3, 64, 64))
    assert [feature.shape[1] for feature in features] == [64, 128, 256, 512]
    assert backbone.net["layer1"][0].downsample[0].weight.shape == (64, 16, 1, 1)


@pytest.mark.parametrize(
    ("name", "options", "key"),
    [
        ("resnetblur50", {"stride_in_1x1": True}, "stride_in_1x1"),
        ("resnet50", {"stem_channels": 8, "options": {"avg_down": True}}, "stem_channels"),
    ],
)
def test_networks_that_surgery_does_not_fit(name, options, key):
    with pytest.raises(UserError, match=rf"model\.backbone\.{key}: '{name}'.*leave it out"):
        made(Backbone, name, **options)


def test_networks_that_are_no_chain_can_only_be_trained_whole():
    assert made(Backbone, "hrnet_w18_small", frozen_stages=-1).channels == (128, 256, 512, 1024)
    for options in ({}, {"frozen_stages": -1, "checkpointing": True}, {"frozen_stages": -1, "deformable_stages": (4,)}):
        with pytest.raises(UserError, match=r"^model\.backbone: 'hrnet_w18_small' is no chain .*frozen_stages=-1"):
            made(Backbone, "hrnet_w18_small", **options)


DEFORMABLE = {
    "resnet18": ((3,), {f"layer3.{block}.conv{i}" for block in (0, 1) for i in (1, 2)}),
    "resnext50_32x4d": ((4, 2), {f"layer{i}.{block}.conv2" for i, n in ((2, 4), (4, 3)) for block in range(n)}),
    "resnest14d": ((2, 3), {"layer2.0.conv2.conv", "layer3.0.conv2.conv"}),
    "tf_efficientnet_lite0": (
        (3, 4),
        {f"blocks.{i}.{block}.conv_dw" for i, n in ((3, 3), (4, 3), (5, 4), (6, 1)) for block in range(n)},
    ),
    "convnext_atto": ((4,), {"stages_3.downsample.1", "stages_3.blocks.0.conv_dw", "stages_3.blocks.1.conv_dw"}),
}


def lively(net: nn.Module) -> None:
    """Random statistics and scales, so that every branch of a network counts and none explodes."""
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_mean, -0.1, 0.1)
            nn.init.uniform_(module.running_var, 0.5, 1)
            nn.init.uniform_(module.weight, 0.3, 0.6)


def filled(monkeypatch, name: str, **options) -> tuple[Backbone, nn.Module]:
    """A backbone that has loaded the weights of a whole network, and that network cut down to its features."""
    torch.manual_seed(0)
    backbone = made(Backbone, name, frozen_stages=1, **options).eval()
    source, plain = timm.create_model(name), timm.create_model(name, features_only=True, out_indices=(-4, -3, -2, -1))
    lively(source)
    with monkeypatch.context() as patch:
        patch.setattr(pretrained.timm, "create_model", lambda *_, **__: source)
        patch.setattr(pretrained.huggingface_hub, "get_hf_file_metadata", lambda *_, **__: None)
        patch.setattr(pretrained, "WEIGHT_PACKAGES", {})
        assert load_pretrained(backbone).startswith(f"{name} with timm's weights")
    state = source.state_dict()
    flat = {key: re.sub(r"^(stem|stages)_", r"\1.", key) for key in plain.state_dict()}
    plain.load_state_dict({own: state[theirs] for own, theirs in flat.items()})
    return backbone, plain.eval()


def check_same_features(backbone: Backbone, plain: nn.Module, images: torch.Tensor, *, tolerance: float) -> None:
    with torch.no_grad():
        for ours, theirs in zip(backbone(images), plain(images), strict=True):
            assert theirs.std() > 1e-3
            assert (ours - theirs).abs().max() < tolerance * theirs.std()


@pytest.mark.parametrize("name", DEFORMABLE)
def test_deformable_networks_start_as_the_pretrained_plain_ones(monkeypatch, batch, name):
    stages, names = DEFORMABLE[name]
    backbone, plain = filled(monkeypatch, name, deformable_stages=stages)
    found = {key: m for key, m in backbone.net.named_modules() if isinstance(m, ModulatedDeformConv2d)}
    assert found.keys() == names
    for key, layer in found.items():
        assert torch.equal(layer.weight, 2 * plain.get_submodule(key).weight)
    check_same_features(backbone, plain, batch, tolerance=1e-4)
    check_same_features(backbone, plain, batch[:, :, :43, :61], tolerance=1e-4)
    # Shifts are learnt, and change something.
    backbone.train()
    sum(feature.square().mean() for feature in backbone(batch)).backward()
    assert all(layer.conv_offset.weight.grad.any() for layer in found.values())
    with torch.no_grad():
        before = backbone(batch)[-1]
        next(iter(found.values())).conv_offset.bias.fill_(0.5)
        assert not torch.equal(backbone(batch)[-1], before)


def test_fresh_deformable_networks_are_what_plain_ones_are(batch):
    backbone = made(Backbone, "resnet18", deformable_stages=(2, 4)).eval()
    plain = timm.create_model("resnet18", features_only=True, out_indices=(1, 2, 3, 4)).eval()
    state = backbone.net.state_dict()
    found = {key for key, m in backbone.net.named_modules() if isinstance(m, ModulatedDeformConv2d)}
    halves = {key: value / 2 if key.removesuffix(".weight") in found else value for key, value in state.items()}
    plain.load_state_dict({key: halves[key] for key in plain.state_dict()})
    check_same_features(backbone, plain, batch, tolerance=1e-4)


def test_resnest200_with_deformable_stages(monkeypatch):
    backbone, plain = filled(monkeypatch, "resnest200e", deformable_stages=(2, 3, 4))
    check_same_features(backbone, plain, torch.randn(1, 3, 64, 64), tolerance=1e-5)
    assert backbone.channels == (256, 512, 1024, 2048)
    assert sum(p.numel() for p in plain.parameters()) == 68_152_544
    assert sum(p.numel() for p in backbone.parameters()) == 71_513_477
    found = {key: m for key, m in backbone.net.named_modules() if isinstance(m, ModulatedDeformConv2d)}
    assert len(found) == 24 + 36 + 3
    assert all(key.endswith(".conv2.conv") and key[:7] != "layer1." for key in found)
    assert {tuple(layer.conv_offset.weight.shape[:2]) for layer in found.values()} == {(27, 128), (27, 256), (27, 512)}


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet18", {"deformable_stages": (2, 5)}, "there is no stage 5; choose from 1 to 4"),
        ("resnet18", {"deformable_stages": (0,), "frozen_stages": -1}, "there is no stage 0; choose from 1 to 4"),
        ("resnet18", {"deformable_stages": (2,), "frozen_stages": 2}, "stage 2 is frozen by .*frozen_stages=2; .*"),
        (
            "poolformer_s12",
            {"deformable_stages": (1,), "frozen_stages": 0},
            "stage 1 .*'poolformer_s12' has no .*; leave 1 out",
        ),
        (
            "nf_regnet_b0",
            {"deformable_stages": (3,)},
            r"stage 3 of 'nf_regnet_b0' cannot be .* \(a ScaledStdConv.*; leave it out",
        ),
    ],
)
def test_stages_that_cannot_be_deformable(name, options, message):
    with pytest.raises(UserError, match=rf"^model\.backbone\.deformable_stages: {message}$"):
        made(Backbone, name, **options)


def held(backbone: Backbone, images: torch.Tensor) -> int:
    """Values that a forward pass keeps for the backward pass."""
    kept = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[id(tensor)] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone(images)
    return sum(tensor.numel() for tensor in kept.values() if not isinstance(tensor, nn.Parameter))


@pytest.mark.parametrize(
    ("name", "frozen", "train_norm", "deformable"),
    [
        ("resnet18", 1, False, (4,)),
        ("resnet18", 1, True, (4,)),
        ("resnet18", -1, True, ()),
        ("resnest14d", 1, True, (4,)),
        ("tf_efficientnet_lite0", 2, True, ()),
        ("regnetx_002", 0, True, ()),  # whose stages do not tell their blocks
    ],
)
def test_checkpointing_changes_nothing_but_the_memory(name, frozen, train_norm, deformable, batch):
    images = batch[:, :, :, :64].double()
    backbones = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        options = {"frozen_stages": frozen, "train_norm": train_norm, "deformable_stages": deformable}
        if name.startswith("res"):
            options["options"] = {"channels": (16, 32, 64, 128)}
        backbone = made(Backbone, name, checkpointing=checkpointing, **options)
        lively(backbone)
        backbones.append(backbone.double().train())
    plain, recomputed = backbones
    assert held(recomputed, images) < 0.8 * held(plain, images)
    for backbone in backbones:
        sum(feature.square().mean() for feature in backbone(images)).backward()
    assert list(plain.state_dict()) == list(recomputed.state_dict())
    torch.testing.assert_close(dict(recomputed.state_dict()), dict(plain.state_dict()), rtol=0, atol=1e-12)
    for (key, ours), theirs in zip(recomputed.named_parameters(), plain.parameters(), strict=True):
        assert (ours.grad is None) == (theirs.grad is None) == (not ours.requires_grad), key
        if ours.grad is not None:
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-9, atol=1e-12)
    counts = {m.num_batches_tracked.item() for m in recomputed.modules() if isinstance(m, nn.BatchNorm2d)}
    assert counts == ({2} if frozen < 0 else {0, 2} if train_norm else {0})  # two forward passes


@pytest.mark.parametrize(("arguments", "stored"), [({}, True), ({"channels": [8, 16, 24, 32]}, False)])
def test_a_backbone_from_a_folder_is_stored_by_its_architecture(tmp_path, arguments, stored):
    """A model file may name neither folder nor hub."""
    config = {"architecture": "resnet18", "model_args": arguments, "pretrained_cfg": {"num_classes": 1000}}
    (tmp_path / "config.json").write_text(json.dumps(config))
    name = f"local-dir:{tmp_path}"
    recipe = resolve("demo/seesaw", [f"model.backbone.name={name}", "model.backbone.pretrained=false"])
    detector = build_detector(recipe, 3)
    if stored:
        kept = stored_recipe(recipe, detector)
        assert kept.model.backbone.name == "resnet18"
        load_weights(build_detector(kept, 3), detector.state_dict(), tmp_path)
    else:
        with pytest.raises(UserError, match=rf"^model\.backbone\.name: '{name}' is no plain 'resnet18'"):
            stored_recipe(recipe, detector)
    plain = resolve("demo/seesaw")
    assert stored_recipe(plain, build_detector(plain, 3)) is plain
