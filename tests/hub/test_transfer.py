"""Push and pull through the commands, against a local server that answers as the hub does."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from hub_server import TOKEN, Hub, local_hub
from huggingface_hub import constants, file_download
from tiny import SMALL_RECIPE, assert_done, assert_refused
from tiny import tailseg as command

import tailseg
from tailseg.checkpoint import load_model, save_model
from tailseg.data.annotations.annotations import Category
from tailseg.errors import UserError
from tailseg.hub import transfer
from tailseg.model.build import build_detector
from tailseg.recipes.resolve import resolve

CATEGORIES = (Category(3, "owl", "r", 1, 2), Category(17, "café", "f", 200, 400))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "best.safetensors"
    recipe = resolve("demo/seesaw", SMALL_RECIPE)
    metrics = {"segm": {"AP": 0.25, "APr": 0.125}}
    save_model(path, build_detector(recipe, len(CATEGORIES)), recipe, CATEGORIES, step=7, metrics=metrics)
    return path


def _set_endpoint(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What HF_ENDPOINT and HF_HUB_DISABLE_XET do before the hub's library is loaded."""
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True, raising=False)  # a protocol of the hub's own, compiled
    monkeypatch.setattr(constants, "ENDPOINT", url)
    for place in (constants, file_download):  # versions before 1 keep it twice
        template = url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(place, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    with local_hub() as running:
        _set_endpoint(running.url, monkeypatch)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.chdir(tmp_path)
        yield running


def test_a_model_comes_back_as_it_was_pushed(model: Path, hub: Hub) -> None:
    pushed = command("hub", "push", model.parent, "anna/owls", "--license", "mit", "--trained-on", "Owls of 2026.")
    assert_done(pushed)
    assert pushed.stdout == f"{model.parent} is at {hub.url}/anna/owls\n"
    assert hub.files["anna/owls"]["model.safetensors"] == model.read_bytes()
    card = hub.files["anna/owls"]["README.md"].decode()
    assert card.startswith("---\nlicense: mit\n")
    assert "Owls of 2026." in card
    assert "| AP, rare classes | 12.5 |" in card
    assert hub.private == {"anna/owls": False}

    pulled = command("hub", "pull", "anna/owls")
    assert_done(pulled)
    assert pulled.stderr == ""
    assert Path("owls.safetensors").read_bytes() == model.read_bytes()
    assert tailseg.load("owls.safetensors").names == ["owl", "café"]
    assert os.listdir() == ["owls.safetensors"]  # nothing is left beside it
    assert load_model(tailseg.hub.pull("anna/owls", "again.safetensors", revision="main")).step == 7


def test_a_push_again_replaces_the_files(model: Path, hub: Hub, tmp_path: Path) -> None:
    (tmp_path / "metrics.json").write_text('{"segm": {"AP": 0.5}}')
    assert transfer.push(model, "anna/owls", licence="mit", private=True) == f"{hub.url}/anna/owls"
    assert hub.private == {"anna/owls": True}
    assert_done(command("hub", "push", model, "anna/owls", "--license", "cc-by-4.0", "--metrics", "metrics.json"))
    card = hub.files["anna/owls"]["README.md"].decode()
    assert "license: cc-by-4.0\n" in card
    assert "| AP | 50.0 |" in card


def test_what_is_pulled_is_read_before_it_takes_its_place(model: Path, hub: Hub, tmp_path: Path) -> None:
    content = bytearray(model.read_bytes())
    content[-5] ^= 1
    hub.files["anna/owls"] = {"model.safetensors": bytes(content)}
    assert_refused(command("hub", "pull", "anna/owls"), "anna/owls/model.safetensors", "checksum differs")
    hub.files["anna/owls"] = {"model.safetensors": b"\x80\x04."}
    assert_refused(command("hub", "pull", "anna/owls"), "anna/owls/model.safetensors", "not a tailseg checkpoint")
    recipe = resolve("demo/seesaw", SMALL_RECIPE)
    other = build_detector(recipe, 5)
    save_model(tmp_path / "odd.safetensors", other, recipe, CATEGORIES, step=0)
    hub.files["anna/owls"] = {"model.safetensors": (tmp_path / "odd.safetensors").read_bytes()}
    assert_refused(command("hub", "pull", "anna/owls"), "anna/owls/model.safetensors", "does not fit its recipe")
    hub.files["anna/owls"] = {"pytorch_model.bin": b""}
    assert_refused(command("hub", "pull", "anna/owls"), "anna/owls", "holds no model.safetensors")
    assert os.listdir() == ["odd.safetensors"]


def test_sizes_are_bounded_before_and_while_a_file_is_pulled(
    model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.files["anna/owls"] = {"model.safetensors": model.read_bytes()}
    monkeypatch.setattr(transfer, "MOST_BYTES", 1 << 20)
    hub.claimed_size = 5 << 20
    assert_refused(command("hub", "pull", "anna/owls"), "is of 5 MiB, more than a model may have")
    assert [line for line in hub.asked if line.startswith("GET")] == []
    hub.claimed_size = 1000  # of which the server then sends more
    assert_refused(command("hub", "pull", "anna/owls"), "anna/owls: could not be pulled")
    assert os.listdir() == []


def test_refusals_of_the_hub_are_one_sentence(model: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    assert_refused(command("hub", "pull", "anna/gone"), "anna/gone: could not be pulled", "no such repository")
    hub.files["anna/owls"] = {"model.safetensors": model.read_bytes()}
    assert_refused(command("hub", "pull", "anna/owls", "--revision", "v9"), "no such revision")
    monkeypatch.setenv("HF_TOKEN", "hf_wrong")
    assert_refused(command("hub", "push", model, "anna/owls", "--license", "mit"), "anna/owls", "hf auth login")
    hub.status = 503
    assert_refused(command("hub", "pull", "anna/owls"), "the hub answers 503")


def test_a_hub_that_is_not_there_is_one_sentence(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _set_endpoint("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    monkeypatch.chdir(tmp_path)
    assert_refused(command("hub", "pull", "anna/owls"), "anna/owls: could not be pulled", "check the network")
    pushed = command("hub", "push", model, "anna/owls", "--license", "mit")
    assert_refused(pushed, "anna/owls: could not be pushed", "check the network")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert_refused(command("hub", "pull", "anna/owls"), "HF_HUB_OFFLINE is set")


@pytest.mark.parametrize("name", ["owls", "a/b/c", "../x", "a/..", "a/b.", "", "-a/b", "http://x/y", "a b/c"])
def test_names_that_are_none_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="is no name of a repository"):
        transfer.pull(name)


def test_what_is_wrong_here_is_said_before_the_hub_is_asked(model: Path, tmp_path: Path, hub: Hub) -> None:
    (tmp_path / "there.safetensors").touch()
    assert_refused(command("hub", "pull", "a/b", "there.safetensors"), "there.safetensors: is there already")
    assert_refused(command("hub", "pull", "a/b", "x.pth"), "x.pth: a model's name ends in .safetensors")
    assert_refused(command("hub", "pull", "a/b", "none/x.safetensors"), "none/x.safetensors: its folder is not there")
    assert_refused(command("hub", "push", "none.safetensors", "a/b", "--license", "mit"), "none.safetensors")
    assert_refused(command("hub", "push", model, "a/b", "--license", "My own"), "'My own'", "apache-2.0")
    assert_refused(command("hub", "push", model, "a/b", "--license", "mit", "--metrics", "m.json"), "m.json")
    assert command("hub", "push", model, "a/b").returncode == 2  # no licence is assumed
    assert hub.asked == []
