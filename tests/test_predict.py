import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from export_sets import read_again
from hotcoco import mask as rle
from PIL import Image
from tiny import assert_refused
from tiny import tailseg as tailseg_command

import tailseg
from tailseg import predict
from tailseg.checkpoint import read_tensors, save_model, write_tensors
from tailseg.data.annotations.annotations import Category
from tailseg.data.importers.convert import READERS
from tailseg.errors import UserError
from tailseg.evaluation.tta import View, detect_views
from tailseg.model.build import build_detector
from tailseg.predict import Model, export_predictions, predict_files, to_picture
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import override

SETTINGS = (
    "model.backbone.pretrained=false",
    "model.neck.channels=16",
    "model.rpn={pre_nms_test: 50, post_nms_test: 20}",
    "model.box_head.width=32",
    "model.mask_head={channels: 8, convs: 1}",
    "data={test_short_edge: 64, long_edge: 96}",
    "test.max_detections=9",
)
CATEGORIES = (Category(5, "fork", "f", 9, 9), Category(7, "egg_cup", "r", 1, 1), Category(40, "owl", "c", 3, 3))


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of random weights."""
    torch.manual_seed(0)
    recipe = resolve("demo/seesaw", SETTINGS)
    path = tmp_path_factory.mktemp("model") / "m.safetensors"
    save_model(path, build_detector(recipe, len(CATEGORIES)), recipe, CATEGORIES, step=0)
    return path


@pytest.fixture(scope="module")
def model(path: Path) -> Model:
    return tailseg.load(path, "cpu")


@pytest.fixture(scope="module")
def picture() -> np.ndarray:
    """60 x 80 pixels of coloured rectangles."""
    pixels = np.full((60, 80, 3), 120, np.uint8)
    pixels[10:40, 20:50] = (250, 30, 20)
    pixels[30:55, 55:75] = (10, 40, 240)
    return pixels


def assert_equal(one: Any, other: Any) -> None:
    assert one.image_hw == other.image_hw
    one, other = (getattr(found, "raw", found) for found in (one, other))
    for field in ("boxes", "scores", "labels", "masks"):
        assert torch.equal(getattr(one, field), getattr(other, field))
    assert (one.mask_scores is None) == (other.mask_scores is None)
    assert one.mask_scores is None or torch.equal(one.mask_scores, other.mask_scores)


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
    for image in (
        tmp_path / "p.png",
        str(tmp_path / "p.png"),
        Image.fromarray(picture),
        torch.from_numpy(picture).permute(2, 0, 1),
        picture[::-1][::-1],
    ):
        assert_equal(model.predict(image), found)


def test_load_gives_the_saved_model(path: Path, model: Model, picture: np.ndarray) -> None:
    assert model.names == ["fork", "egg_cup", "owl"]
    assert model.categories == CATEGORIES
    assert model.recipe == resolve("demo/seesaw", SETTINGS)
    assert model.device == torch.device("cpu")
    assert not model.detector.training
    assert_equal(tailseg.load(str(path), torch.device("cpu")).predict(picture), model.predict(picture))


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

    monkeypatch.setattr(predict, "build_detector", noted)
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


def test_modes_are_shown_as_people_see_them(picture: np.ndarray) -> None:
    grey = Image.fromarray(picture).convert("L")
    assert np.array_equal(to_picture(grey), np.repeat(np.asarray(grey)[:, :, None], 3, axis=2))
    turned = Image.fromarray(picture)
    turned.getexif()[0x0112] = 6  # to be turned by 90 degrees clockwise
    assert np.array_equal(to_picture(turned), np.rot90(picture, -1))


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK", "I;16"])
def test_a_pillow_image_is_read_as_its_file_is(mode: str, picture: np.ndarray, tmp_path: Path) -> None:
    if mode == "I;16":
        image = Image.fromarray((picture[:, :, 0].astype(np.uint16) << 8) + 7)
    else:
        image = Image.fromarray(picture).convert(mode)
    if mode in ("RGBA", "LA"):
        alpha = np.zeros((60, 80), np.uint8)
        alpha[:, 40:] = 255
        image.putalpha(Image.fromarray(alpha))
    file = tmp_path / ("p.tif" if mode == "CMYK" else "p.png")
    image.save(file)
    assert np.array_equal(to_picture(image), to_picture(file))


@pytest.mark.parametrize(
    "image",
    [
        np.zeros((4, 4), np.uint8),
        np.zeros((3, 4, 4), np.uint8),
        np.zeros((4, 4, 4), np.uint8),
        np.zeros((4, 4, 3), np.float32),
        np.zeros((0, 4, 3), np.uint8),
        torch.zeros(4, 4, 3, dtype=torch.uint8),
        torch.zeros(3, 4, 4),
        torch.zeros(1, 3, 4, 4, dtype=torch.uint8),
        torch.zeros(3, 4, 0, dtype=torch.uint8),
    ],
)
def test_arrays_of_another_shape(model: Model, image: Any) -> None:
    with pytest.raises(ValueError, match=r"^expected a uint8 (array \(H, W, 3\)|tensor \(3, H, W\)), received"):
        model.predict(image)


@pytest.mark.parametrize("hw", [(1, 1), (1, 500), (500, 1), (3, 2)])
def test_images_of_odd_shapes(model: Model, hw: tuple[int, int]) -> None:
    found = model.predict(np.full((*hw, 3), 90, np.uint8))
    assert found.image_hw == hw
    assert bool(found.boxes.isfinite().all())


def test_files(model: Model, picture: np.ndarray, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("a", "b")]
    for folder in folders:
        folder.mkdir()
        Image.fromarray(picture).save(folder / "p.png")
    (tmp_path / "broken.png").write_bytes((tmp_path / "a" / "p.png").read_bytes()[:60])
    (tmp_path / "text.jpg").write_text("no image")
    images = [folders[0] / "p.png", tmp_path / "broken.png", tmp_path / "gone.png", tmp_path / "text.jpg"]
    images += [folders[1] / "p.png", folders[0] / "p.png"]
    out = tmp_path / "new" / "out"
    faults = predict_files(model, images, out, min_score=0, show=False)
    assert [str(name) in fault for name, fault in zip(images[1:4], faults, strict=True)] == [True] * 3
    assert not any("\n" in fault for fault in faults)
    assert sorted(path.name for path in out.iterdir()) == [
        "p-2.json", "p-2.png", "p-3.json", "p-3.png", "p.json", "p.png",
    ]  # fmt: skip
    content = json.loads((out / "p-2.json").read_text())
    found = model.predict(picture)
    assert content["image"] == str(folders[1] / "p.png")
    assert (content["height"], content["width"]) == (60, 80)
    assert [row["score"] for row in content["detections"]] == pytest.approx(found.scores.tolist())
    assert predict_files(model, [], out, show=False) == []
    assert predict_files(model, images[:1], out, min_score=1, show=False) == []  # written again under its own name
    assert json.loads((out / "p.json").read_text())["detections"] == []
    with pytest.raises(UserError, match=r"p\.json: the folder cannot be made"):
        predict_files(model, images, out / "p.json", show=False)


def test_inputs_are_never_written_over(model: Model, picture: np.ndarray, tmp_path: Path) -> None:
    """In the folder of the results, by a link, and as a twin that comes earlier in the list."""
    for name in ("p.png", "q.png"):
        Image.fromarray(picture).save(tmp_path / name)
    (tmp_path / "q-2.png").write_bytes((tmp_path / "q.png").read_bytes())
    elsewhere = tmp_path / "elsewhere"
    elsewhere.symlink_to(tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.glob("*.png")}
    inputs = [elsewhere / "q.png", tmp_path / "q-2.png", tmp_path / "p.png"]
    assert predict_files(model, inputs, tmp_path, show=False) == []
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["p-2.json", "q-2-2.json", "q-3.json"]


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
    assert predict_files(model, [tmp_path / "p.png"], tmp_path / "out", min_score=0, show=False) == []
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


@pytest.fixture
def photographs(picture: np.ndarray, tmp_path: Path) -> list[Path]:
    """Two of the same name, one of them turned by the camera, and a broken one."""
    paths = [tmp_path / "a" / "p q.jpg", tmp_path / "b" / "p q.jpg", tmp_path / "broken.png"]
    exif = Image.Exif()
    exif[0x0112] = 6
    for path, kept in zip(paths, (Image.Exif(), exif, None), strict=True):
        path.parent.mkdir(exist_ok=True)
        if kept is not None:
            Image.fromarray(picture).save(path, exif=kept)
    paths[2].write_bytes(b"no image")
    return paths


@pytest.mark.parametrize("kind", ["coco", "yolo", "labelme", "cvat"])
def test_predictions_that_a_tool_can_open(
    kind: str, path: Path, model: Model, photographs: list[Path], tmp_path: Path
) -> None:
    """Through the command and back by the importers: the same classes, and masks that differ by their outlines only."""
    out = tmp_path / "out"
    score = float(model.predict(photographs[0]).scores[4])
    done = tailseg_command("predict", path, *photographs, "--out", out, "--format", kind, "--score", score, "--quiet")
    assert done.returncode == 1
    assert done.stderr.startswith(f"tailseg: {photographs[2]}: ")
    found = [model.predict(image) for image in photographs[:2]]
    found = [one[one.scores >= score] for one in found]
    count = sum(map(len, found))
    assert done.stdout.splitlines()[0] == f"2 of 3 images with {count} objects in {out}"
    assert "- 1 images renamed" in done.stdout
    again = read_again(READERS[kind](out))["train"]
    assert set(again) == {image.read_bytes() for image in photographs[:2]}
    for image, one in zip(photographs, found, strict=False):
        objects = again[image.read_bytes()]
        for item, expected in zip(objects, one.to_dict()["detections"], strict=True):
            assert item["name"] == expected["category"]
            ours, theirs = item["pixels"], rle.decode(expected["segmentation"])
            assert (ours & theirs).sum() >= 0.9 * (ours | theirs).sum()
            assert kind != "coco" or item["score"] == expected["score"]


def test_no_format_is_written_without_an_image(path: Path, photographs: list[Path], tmp_path: Path) -> None:
    line = ("predict", path, photographs[2], "--out", tmp_path / "out", "--quiet", "--format")
    assert_refused(tailseg_command(*line, "coco"), str(photographs[2]))
    assert not (tmp_path / "out").exists()
    assert tailseg_command(*line, "voc").returncode == 2
    exported, faults = export_predictions(tailseg.load(path, "cpu"), [], tmp_path / "out", "yolo", show=False)
    assert (exported.images, faults) == ({"": 0}, [])
    assert_refused(tailseg_command(*line, "coco"), "is not empty")
