import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from predictions import CATEGORIES, SETTINGS
from tiny import assert_refused
from tiny import tailseg as tailseg_command

import tailseg
from tailseg.checkpoint import read_tensors, save_model, write_tensors
from tailseg.errors import UserError
from tailseg.evaluation.tta import View, detect_views
from tailseg.model.build import build_detector
from tailseg.predict import Model
from tailseg.predict import model as module
from tailseg.predict.writing import Request, predict_files
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import override


def assert_equal(one: Any, other: Any) -> None:
    assert one.image_hw == other.image_hw
    one, other = (getattr(found, "raw", found) for found in (one, other))
    for field in ("boxes", "scores", "labels", "masks"):
        assert torch.equal(getattr(one, field), getattr(other, field))
    assert (one.mask_scores is None) == (other.mask_scores is None)
    assert one.mask_scores is None or torch.equal(one.mask_scores, other.mask_scores)


def assert_close(one: Any, other: Any) -> None:
    """Equal but for the rounding of sums in another order."""
    assert one.image_hw == other.image_hw
    assert torch.equal(one.labels, other.labels)
    for field in ("boxes", "scores", "masks"):
        torch.testing.assert_close(getattr(one.raw, field), getattr(other.raw, field), rtol=1e-4, atol=1e-4)


def test_every_kind_of_input_gives_the_same(model: Model, picture: np.ndarray, tmp_path: Path) -> None:
    Image.fromarray(picture).save(tmp_path / "p.png")
    found = model.predict(picture)
    assert found.image_hw == (60, 80)
    assert 0 < len(found) <= 9
    assert found.boxes.device.type == "cpu"
    assert bool((found.boxes >= 0).all())
    assert bool((found.boxes <= torch.tensor([80.0, 60, 80, 60]) + 1e-4).all())
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
    assert set(found.labels.tolist()) <= {0, 1, 2}
    content = (tmp_path / "p.png").read_bytes()
    for image in (
        tmp_path / "p.png",
        str(tmp_path / "p.png"),
        Image.fromarray(picture),
        torch.from_numpy(picture).permute(2, 0, 1),
        torch.from_numpy(picture).permute(2, 0, 1) / 255,
        picture[::-1][::-1],
        content,
        bytearray(content),
        io.BytesIO(content),
    ):
        one = model.predict(image)
        assert isinstance(one, tailseg.Detections)
        assert_equal(one, found)
    with (tmp_path / "p.png").open("rb") as file:
        assert_equal(model.predict(file), found)
    assert_equal(model.predict(picture[:, :, ::-1], bgr=True), found)
    assert_equal(model.predict(str(tmp_path / "p.png"), bgr=True), found)  # files are no arrays


def test_many_pictures_give_a_list_or_a_stream(model: Model, picture: np.ndarray, tmp_path: Path) -> None:
    for name in ("a.png", "b.png", "c.png"):
        Image.fromarray(picture[: 60 - 10 * (name == "b.png")]).save(tmp_path / name)
    first, second = model.predict(tmp_path / "a.png"), model.predict(tmp_path / "b.png")
    listed = model.predict([tmp_path / "a.png", picture[:50], Image.fromarray(picture)])
    assert isinstance(listed, list)
    assert isinstance(model.predict((picture,)), list)
    for one, other in zip(listed, (first, second, first), strict=True):
        assert_close(one, other)
    assert [one.source for one in listed] == [str(tmp_path / "a.png"), "image 1", "image 2"]
    assert model.predict([]) == []
    for source in (tmp_path, str(tmp_path / "*.png"), (tmp_path / name for name in ("a.png", "b.png", "c.png"))):
        stream = model.predict(source)
        assert isinstance(stream, Iterator)
        found = list(stream)
        assert [Path(one.source or "").name for one in found] == ["a.png", "b.png", "c.png"]
        for one, other in zip(found, (first, second, first), strict=True):
            assert_close(one, other)
    inside_a_list = model.predict([tmp_path, picture])
    assert [len(one) for one in inside_a_list] == [len(one) for one in (first, second, first, first)]


def test_a_batch_gives_what_one_picture_at_a_time_gives(path: Path, picture: np.ndarray) -> None:
    """Pictures of two padded sizes in turn, and more of them than a batch holds."""
    model = tailseg.load(path, "cpu")
    rng = np.random.default_rng(0)
    pictures = [rng.integers(0, 256, (60, 80, 3) if i % 3 else (80, 60, 3), np.uint8) for i in range(7)]
    sizes: list[int] = []
    model.detector.backbone.register_forward_pre_hook(lambda _module, inputs: sizes.append(len(inputs[0])))
    together, alone = model.predict(pictures, batch=4), model.predict(pictures, batch=1)
    assert sizes == [2, 2, 2, 1] + [1] * 7
    for one, other in zip(together, alone, strict=True):
        assert len(one) > 0
        assert_close(one, other)


def test_a_stream_looks_no_further_ahead_than_a_batch(model: Model, picture: np.ndarray) -> None:
    taken: list[int] = []

    def endless() -> Iterator[np.ndarray]:
        for i in itertools.count():
            taken.append(i)
            yield picture

    stream = model.predict(endless(), batch=3)
    assert taken == []
    for _ in range(4):
        next(stream)
    assert taken == list(range(6))


def test_broken_files(model: Model, picture: np.ndarray, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """One picture and a list raise; a stream leaves them out, says so, and goes on."""
    for name in ("a.png", "c.png"):
        Image.fromarray(picture).save(tmp_path / name)
    broken = tmp_path / "b.png"
    broken.write_bytes((tmp_path / "a.png").read_bytes()[:60])
    for source in (broken, [tmp_path / "a.png", broken], [tmp_path / "none.png"], b"no image", b""):
        with pytest.raises(UserError):
            model.predict(source)
    paths = [tmp_path / name for name in ("a.png", "b.png", "gone.png", "c.png")]
    for source, faults in ((tmp_path, [broken]), (iter(paths), paths[1:3]), (iter([*paths, tmp_path / "none"]), [])):
        caplog.clear()
        found = list(model.predict(source, batch=2))
        assert [one.source for one in found] == [str(paths[0]), str(paths[3])]
        said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert said[-1].endswith("pictures could not be read and were left out.")
        assert all(str(fault) in line for fault, line in zip(faults, said, strict=False))
        assert len(said) == 1 + (len(faults) or 3)


@pytest.mark.parametrize(
    ("source", "received"),
    [(None, "NoneType"), (3, "int"), ({"a.jpg": 1}, "dict"), ({"a.jpg"}, "set"), (io.StringIO("a.jpg"), "StringIO")],
)
def test_anything_else_is_a_type_error(model: Model, source: Any, received: str) -> None:
    for given in (source, [source]):
        with pytest.raises(TypeError) as error:
            model.predict(given)
        assert str(error.value) == (
            "predict takes a path, folder, glob pattern, http(s) address, video file, Pillow image, array, tensor, "
            f"bytes, or a list or iterator of these; received {received}"
        )


def test_score_classes_and_number(model: Model, picture: np.ndarray) -> None:
    every = model.predict(picture, score=0, max_detections=1000)
    assert len(every) > 9  # more than the recipe keeps
    assert float(every.scores.min()) < model.recipe.test.score_threshold
    level = float(every.scores[len(every) // 2])
    some = model.predict(picture, score=level, max_detections=1000)
    assert torch.equal(some.scores, every.scores[every.scores >= level])
    assert torch.equal(model.predict(picture, max_detections=3).scores, every.scores[:3])
    owls = model.predict(picture, classes="owl", score=0, max_detections=1000)
    assert set(owls.names) == {"owl"}
    assert torch.equal(owls.scores, every.scores[every.labels == 2])
    for classes in ([7, "owl"], ("owl", "egg_cup"), ["owl", 40, 7]):
        found = model.predict(picture, classes=classes, score=0, max_detections=1000)
        assert set(found.names) == {"owl", "egg_cup"}
    assert_equal(model.predict(picture, classes=7), model.predict(picture, classes=["egg_cup"]))
    assert_equal(model.predict(picture, classes=np.int64(7)), model.predict(picture, classes=[7]))
    assert len(model.predict(picture, classes=[])) == 0
    assert len(model.predict(picture, score=1)) == 0
    for classes, sentence in (
        ("egg cup", "the model has no class 'egg cup'; the nearest is 'egg_cup'"),
        ([5, 6], "the model has no class of id 6; its ids lie between 5 and 40"),
    ):
        with pytest.raises(UserError) as error:
            model.predict(picture, classes=classes)
        assert str(error.value) == sentence


def test_the_same_choice_among_averaged_views(path: Path, picture: np.ndarray) -> None:
    model = tailseg.load(path, "cpu", TTA)
    every = model.predict(picture, score=0, max_detections=1000)
    level = float(every.scores[len(every) // 2])
    found = model.predict([picture, picture], score=level, classes=["owl"], max_detections=2)
    wanted = every.scores[(every.labels == 2) & (every.scores >= level)][:2]
    assert [one.scores.tolist() for one in found] == [wanted.tolist()] * 2


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"score": 1.5}, "expected a score from 0 to 1, received 1.5"),
        ({"max_detections": 0}, "expected max_detections of at least 1, received 0"),
        ({"batch": 0}, "expected a batch of at least one picture, received 0"),
        ({"slices": 0}, "expected slices of at least one pixel, received 0"),
        ({"overlap": 1.0}, "expected an overlap from 0 to 0.9, received 1.0"),
    ],
)
def test_options_out_of_range(model: Model, picture: np.ndarray, options: Any, sentence: str) -> None:
    with pytest.raises(ValueError, match="expected") as error:
        model.predict(picture, **options)
    assert str(error.value) == sentence


def test_load_gives_the_saved_model(path: Path, model: Model, picture: np.ndarray) -> None:
    assert model.names == ["fork", "egg_cup", "owl"]
    assert model.categories == CATEGORIES
    assert model.recipe == resolve("demo/seesaw", SETTINGS)
    assert model.device == torch.device("cpu")
    assert not model.detector.training
    assert_equal(tailseg.load(str(path), torch.device("cpu")).predict(picture), model.predict(picture))


def test_another_default_type_changes_nothing(path: Path, model: Model, picture: np.ndarray) -> None:
    found = model.predict(picture)
    torch.set_default_dtype(torch.float64)
    try:
        again = tailseg.load(path, "cpu").predict(picture)
        sides = tailseg.load(path, "cpu").predict(picture, slices=50)
        masks, polygons = again.masks, again.polygons()
        assert torch.get_default_dtype() == torch.float64
    finally:
        torch.set_default_dtype(torch.float32)
    assert_equal(again, found)
    assert torch.equal(masks, found.masks)
    assert len(polygons) == len(found)
    assert_equal(sides, model.predict(picture, slices=50))


def test_settings_of_the_test_can_be_changed(path: Path, picture: np.ndarray) -> None:
    few = tailseg.load(path, "cpu", ["test.max_detections=2"])
    assert few.recipe.test.max_detections == 2
    assert len(few.predict(picture)) == 2
    for setting, sentence in (
        ("classifier.p=0", "--set classifier.p=0: a trained model allows test., data.test_short_edge, "),
        ("test.nms=1", "unknown key 'test.nms'; the nearest valid key is 'test.nms_iou'"),
        (
            "test.tta_flip=false",
            "--set test.tta_flip=false: without views it changes nothing; add --tta, or test.tta=true",
        ),
        ("test.tau_norm=1", "test.tau_norm = 1 does not go with a normalised classifier; set it to 0"),
    ):
        with pytest.raises(UserError) as error:
            tailseg.load(path, "cpu", [setting])
        assert sentence in str(error.value)


def test_tau_norm_of_a_trained_model(tmp_path: Path, picture: np.ndarray) -> None:
    torch.manual_seed(0)
    recipe = resolve("demo/cross-entropy", SETTINGS)
    save_model(tmp_path / "m.safetensors", build_detector(recipe, len(CATEGORIES)), recipe, CATEGORIES, step=0)
    plain, rebalanced = (
        tailseg.load(tmp_path / "m.safetensors", "cpu", settings) for settings in ((), ("test.tau_norm=1",))
    )
    assert not torch.equal(plain.predict(picture).scores, rebalanced.predict(picture).scores)


def test_a_checkpoint_that_does_not_fit_its_recipe(path: Path, tmp_path: Path) -> None:
    tensors, about = read_tensors(path)
    about["recipe"]["model"]["neck"]["channels"] = 8
    write_tensors(tmp_path / "edited", tensors, about)
    with pytest.raises(UserError, match="edited: does not fit its recipe"):
        tailseg.load(tmp_path / "edited")


def test_a_small_file_cannot_claim_a_large_model(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compared on `meta`, before memory is taken."""
    tensors, about = read_tensors(path)
    about["recipe"]["model"]["box_head"]["width"] = 16384
    about["recipe"]["model"]["neck"]["channels"] = 4096  # fc1 alone: 13 GB
    write_tensors(tmp_path / "edited", tensors, about)
    build, devices = build_detector, []

    def noted(*arguments: Any) -> Any:
        detector = build(*arguments)
        devices.append(next(detector.parameters()).device.type)
        return detector

    monkeypatch.setattr(module, "build_detector", noted)
    with pytest.raises(UserError, match="edited: does not fit its recipe, first at"):
        tailseg.load(tmp_path / "edited")
    assert devices == ["meta"]


def test_attacks_by_model_files_are_one_sentence(path: Path, tmp_path: Path) -> None:
    tensors, about = read_tensors(path)
    evil, edited = tmp_path / "evil.pth", tmp_path / "edited.safetensors"
    evil.write_bytes(b"")
    for place, value, sentence in (
        ("options", {"checkpoint_path": str(evil)}, "model.backbone.options: 'checkpoint_path' is no option"),
        ("options", {"channels": [1, 1, 1]}, "is not usable as a timm backbone|does not fit"),
        ("options", {"act_layer": "evil"}, "is not usable as a timm backbone"),
        ("name", f"local-dir:{tmp_path}", "comes from a hub or a folder, which a model file may not ask for"),
        ("name", "hf-hub:evil/model", "comes from a hub or a folder, which a model file may not ask for"),
    ):
        other = json.loads(json.dumps(about))
        other["recipe"]["model"]["backbone"][place] = value
        write_tensors(edited, tensors, other)
        with pytest.raises(UserError, match=sentence):
            tailseg.load(edited)
    changed = {**tensors, "rpn.conv.bias": tensors["rpn.conv.bias"] * torch.nan}
    write_tensors(edited, changed, about)
    result = tailseg_command("predict", edited, tmp_path / "none.jpg", "--out", tmp_path / "out")
    assert_refused(result, f"{edited}: 'rpn.conv.bias' holds values that are not finite")
    write_tensors(edited, {**tensors, "rpn.conv.bias": tensors["rpn.conv.bias"].half()}, about)
    with pytest.raises(UserError, match=r"'rpn\.conv\.bias' is of type float16, but float32 was expected"):
        tailseg.load(edited)


@pytest.mark.parametrize("hw", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_images_of_odd_shapes(model: Model, hw: tuple[int, int]) -> None:
    found = model.predict(np.full((*hw, 3), 90, np.uint8))
    assert found.image_hw == hw
    assert bool(found.boxes.isfinite().all())


@pytest.fixture(scope="module")
def scoring(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights that scores masks, with all that the last row of table 2 has."""
    torch.manual_seed(0)
    narrow = ("model.mask_iou={channels: 8, width: 12}", "model.tsd.shift_width=8", "model.mask_head.convs=1")
    recipe = resolve("demo-table2/06-mask-scoring", [*SETTINGS, *narrow])
    detector = build_detector(recipe, len(CATEGORIES))
    torch.nn.init.constant_(detector.mask_iou.predictor.bias, 0.5)
    path = tmp_path_factory.mktemp("scoring") / "m.safetensors"
    save_model(path, detector, recipe, CATEGORIES, step=0)
    return path


def test_mask_scores_are_kept_and_written(scoring: Path, picture: np.ndarray, tmp_path: Path) -> None:
    model = tailseg.load(scoring, "cpu")
    found = model.predict(picture)
    assert 0 < len(found) <= 9
    assert found.mask_scores is not None
    assert found.mask_scores.shape == found.scores.shape
    assert bool((found.mask_scores <= found.scores).all())
    assert bool((found.mask_scores > 0).any())
    assert torch.equal(found.scores, found.scores.sort(descending=True).values)
    assert_equal(tailseg.load(scoring, "cpu").predict(picture), found)
    Image.fromarray(picture).save(tmp_path / "p.png")
    assert predict_files(model, Request([tmp_path / "p.png"], min_score=0.05), tmp_path / "out").faults == []
    rows = json.loads((tmp_path / "out" / "p.json").read_text())["detections"]
    assert [row["mask_score"] for row in rows] == pytest.approx(found.mask_scores.tolist())
    assert [row["score"] for row in rows] == pytest.approx(found.scores.tolist())


TTA = ("test.tta=true", "test.tta_long_edges=[48, 112]")
VIEWS = tuple(View(edge, mirrored) for edge in (48, 112) for mirrored in (False, True))


def test_views_are_averaged_if_the_recipe_says_so(path: Path, scoring: Path, picture: np.ndarray) -> None:
    for file in (path, scoring):
        plain, averaging = (tailseg.load(file, "cpu", settings) for settings in ((), TTA))
        found = averaging.predict(picture)
        assert 0 < len(found) <= 9
        assert_equal(found, detect_views(plain.detector, picture, VIEWS))
        assert not torch.equal(found.scores, plain.predict(picture).scores)
        unmirrored = tailseg.load(file, "cpu", [*TTA, "test.tta_flip=false"]).predict(picture)
        assert_equal(unmirrored, detect_views(plain.detector, picture, VIEWS[::2]))
        assert tailseg.load(file, "cpu", [*TTA, "test.score_threshold=1"]).predict(picture).boxes.shape == (0, 4)


@pytest.mark.parametrize("hw", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_views_of_images_of_odd_shapes(path: Path, hw: tuple[int, int]) -> None:
    found = tailseg.load(path, "cpu", TTA).predict(np.full((*hw, 3), 90, np.uint8))
    assert found.image_hw == hw
    assert bool(found.boxes.isfinite().all())


@pytest.mark.parametrize(
    ("divisor", "plain", "views"),
    [(32, (64, 96), {(64, 64), (96, 128)}), (64, (64, 128), {(64, 64), (128, 128)})],
)
def test_images_are_padded_to_what_the_neck_asks_for(
    model: Model,
    picture: np.ndarray,
    divisor: int,
    plain: tuple[int, int],
    views: set[tuple[int, int]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """64 x 85 pixels, and in the views 36 x 48 and 84 x 112."""
    shapes: list[tuple[int, ...]] = []
    record = lambda _module, inputs: shapes.append(tuple(inputs[0].shape[2:]))  # noqa: E731
    hook = model.detector.backbone.register_forward_pre_hook(record)
    monkeypatch.setattr(model.detector, "divisor", divisor)
    for settings in ((), TTA):
        recipe = override(model.recipe, settings)
        assert len(Model(model.detector, recipe, CATEGORIES).predict(picture)) > 0
    hook.remove()
    assert shapes[0] == plain
    assert len(shapes[1:]) == 3 * 4 - 2
    assert set(shapes[1:]) == views
