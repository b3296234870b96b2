"""Icons over photographs: names become classes, counts are LVIS's, masks are what can be seen, styles stay apart."""

import io
import json
import subprocess
import tarfile
from pathlib import Path
from types import ModuleType, SimpleNamespace

import cv2
import numpy as np
import pytest
from hotcoco import mask as rle

from tailseg.data.sources import open_splits
from tailseg.errors import UserError
from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import diff

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def icons(monkeypatch) -> SimpleNamespace:
    monkeypatch.syspath_prepend(str(FOLDER))
    import icon_data
    import icon_scenes
    import icon_sets
    import icons

    return SimpleNamespace(sets=icon_sets, scenes=icon_scenes, data=icon_data, script=icons)


def block(colour: tuple[int, int, int], height: int = 20, width: int = 20) -> np.ndarray:
    """An opaque icon of one colour (BGR)."""
    icon = np.full((height, width, 4), 255, np.uint8)
    icon[..., :3] = colour
    return icon


# ---------------------------------------------------------------------------------------------------------
# Sets


def package(icons: dict[str, str], **more: object) -> bytes:
    content = {
        "prefix": "x",
        "height": 16,
        "width": 16,
        "icons": {name: {"body": body} for name, body in icons.items()},
    }
    return packed("package/icons.json", json.dumps(content | more).encode())


def packed(name: str, content: bytes, kind: bytes = tarfile.REGTYPE) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        member = tarfile.TarInfo(name)
        member.type, member.size = kind, len(content) if kind == tarfile.REGTYPE else 0
        archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()


def test_icons_of_a_package(icons):
    shape = '<path d="M0 0h1v1z" fill="url(#a)"/>'
    style = icons.sets.STYLES[0]
    made = package({"cat": shape, "hand-dark-skin-tone": shape, "photo": '<image href="/etc/passwd"/>'})
    found, undrawn = icons.sets.icons_of(made, style)
    assert list(found) == ["cat"]
    assert undrawn == 1
    assert 'viewBox="0.0 0.0 16 16"' in found["cat"]
    assert shape in found["cat"]


def test_icons_are_squares(icons):
    wide = icons.sets.svg({"body": "", "width": 30, "height": 20, "left": 1}, {"width": 16, "height": 16})
    assert 'viewBox="1.0 -5.0 30 30"' in wide


@pytest.mark.parametrize(
    "body", ['<use href="a.svg#b"/>', '<use xlink:href="http://a/b"/>', '<g fill="url(a.svg#b)"/>', "<script/>"]
)
def test_what_refers_to_something_outside_is_no_drawing(icons, body):
    assert not icons.sets.is_drawing(body)
    assert icons.sets.is_drawing('<use xlink:href="#a"/>')


def test_a_package_that_cannot_be_used_is_one_sentence(icons, monkeypatch):
    style = icons.sets.STYLES[0]
    for wrong in (b"", packed("package/other.json", b"{}"), packed("package/icons.json", b"{")):
        with pytest.raises(UserError, match=r"@iconify-json/noto 1.2.9: package/icons.json cannot be read"):
            icons.sets.icons_of(wrong, style)
    with pytest.raises(UserError, match="is no file"):
        icons.sets.icons_of(packed("package/icons.json", b"", tarfile.SYMTYPE), style)
    monkeypatch.setattr(icons.sets, "MOST_UNPACKED", 10)
    with pytest.raises(UserError, match="is no file of at most 10 bytes"):
        icons.sets.icons_of(package({"cat": "<path/>"}), style)


def test_download_needs_npm_and_the_package_of_the_digest(icons, monkeypatch, tmp_path):
    style = icons.sets.STYLES[0]
    monkeypatch.setattr(icons.sets.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="npm was not found"):
        icons.sets.download(style, tmp_path)
    monkeypatch.setattr(icons.sets.shutil, "which", lambda name: name)
    refused = subprocess.CompletedProcess([], 1, "", "npm error code ENOTFOUND\nmore")
    monkeypatch.setattr(icons.sets.subprocess, "run", lambda *_, **__: refused)
    with pytest.raises(UserError, match=r"could not fetch @iconify-json/noto@1.2.9 \(npm error code ENOTFOUND\)"):
        icons.sets.download(style, tmp_path)
    done = subprocess.CompletedProcess([], 0, "", "")
    monkeypatch.setattr(icons.sets.subprocess, "run", lambda *_, **__: done)
    (tmp_path / "iconify-json-noto-1.2.9.tgz").write_bytes(b"other")
    with pytest.raises(UserError, match="differs from the one"):
        icons.sets.download(style, tmp_path)


def test_rendering_needs_resvg(icons, monkeypatch):
    def missing(name: str) -> ModuleType:
        raise ImportError(name)

    monkeypatch.setattr(icons.sets.importlib, "import_module", missing)
    with pytest.raises(UserError, match="pip install resvg-py"):
        icons.sets.renderer()


def test_names_are_matched_with_hyphens_or_without(icons):
    sets = {"a": {"red-heart": "", "cat": ""}, "b": {"redheart": "", "cat": ""}, "c": {"red-heart": "", "dog": ""}}
    assert icons.sets.shared_names(sets, 3) == {"red_heart": {"a": "red-heart", "b": "redheart", "c": "red-heart"}}
    assert list(icons.sets.shared_names(sets, 2)) == ["red_heart", "cat"]


def test_of_icons_that_look_alike_one_is_left(icons):
    left = block((0, 0, 200))
    left[:, 10:] = (0, 200, 0, 255)
    looks = {
        "west": {"a": left, "b": block((255, 0, 0)), "c": block((9, 9, 9))},
        "east": {"a": left[:, ::-1], "b": block((0, 0, 255)), "c": block((99, 9, 9))},  # west in a mirror, in one set
        "sky": {"a": block((255, 0, 0)), "b": block((0, 255, 0))},  # another set's west is of this colour
        "sea": {"a": block((255, 0, 2)), "b": block((0, 255, 255))},
    }
    assert icons.sets.without_twins(looks) == ["east", "sea"]
    looks["sky"]["c"] = block((200, 200, 200))
    assert icons.sets.without_twins(looks) == ["east", "sky"]  # has more styles than the sea


# ---------------------------------------------------------------------------------------------------------
# Counts


def test_counts_are_those_of_lvis_in_the_ratio_of_the_images(icons):
    lvis = [20] * 5 + [5, 2, 1]  # 108 in all, 3.6 an image: 30 images
    assert icons.data.image_counts(lvis, 30, 1).tolist() == lvis
    assert icons.data.image_counts(lvis, 300, 1).tolist() == [10 * count for count in lvis]
    # Half of the images, of which the rarest classes keep one.
    fewer = icons.data.image_counts(lvis, 15, 1)
    assert fewer[-1] == 1
    assert abs(fewer.sum() - 54) <= 5
    val = icons.data.image_counts(lvis, 30, 8)
    assert val.min() == 8
    assert abs(val.sum() - 108) <= 5
    with pytest.raises(UserError, match="17 images are too few for 8 of each of 8 classes; draw 18"):
        icons.data.image_counts(lvis, 17, 8)


def test_ranks_keep_both_ends_of_the_tail(icons):
    assert icons.data.ranks(5, 5).tolist() == [0, 1, 2, 3, 4]
    assert icons.data.ranks(3, 1203).tolist() == [0, 601, 1202]


def test_plan(icons):
    counts = np.array([30, 12, 5, 1])
    plan = icons.data.plan_images(counts, 30, np.random.default_rng(0))
    assert [sum(rank in image for image in plan) for rank in range(4)] == counts.tolist()
    assert all(len(set(image)) == len(image) for image in plan)
    assert {len(image) for image in plan} <= {1, 2, 3}


# ---------------------------------------------------------------------------------------------------------
# A picture


def test_an_icon_keeps_its_colour_and_area(icons, monkeypatch):
    monkeypatch.setattr(icons.scenes, "TURN", 0)
    monkeypatch.setattr(icons.scenes, "STRETCH", 0)
    alpha, colour = icons.scenes.place_icon(block((0, 200, 0), 40, 20), 30, np.random.default_rng(0))
    assert alpha.sum() == pytest.approx(30 * 15, rel=0.02)
    assert alpha.max() == pytest.approx(1)
    assert colour[..., [0, 2]].max() == 0
    inside = colour[..., 1][alpha == 1] / 200
    assert inside.min() > 0.65 * 0.92 * 0.75
    assert inside.max() < 1.2 * 1.08 * 1.25


def test_masks_are_the_visible_pixels_of_more_than_half_alpha(icons):
    """Green objects on a black photograph: the masks are the green pixels, whichever lies on top."""
    faint = block((0, 200, 0), 40, 40)
    faint[:, 20:, 3] = 100  # below one half
    wanted = [icons.scenes.Wanted(0, block((0, 200, 0), 40, 40))] * 3 + [icons.scenes.Wanted(1, faint)]
    wanted.append(icons.scenes.Wanted(0, block((0, 200, 0)), annotated=False))
    wanted.append(icons.scenes.Wanted(-1, block((0, 0, 255), 64, 20)))  # covers, and is no object
    for seed in range(5):
        scene = icons.scenes.draw_scene(wanted, np.zeros((80, 90, 3), np.uint8), 96, np.random.default_rng(seed))
        assert scene.image.shape == (96, 96, 3)
        labels = np.array([one.label for one in scene.objects])
        of_label = np.where(scene.owner >= 0, labels[scene.owner], -2)
        bright = scene.image[..., 1] > 45  # light is at least 0.65 * 0.92 * 0.75 * 0.75 of 200, faint 0.4 of that
        solid = cv2.erode((of_label == 0).astype(np.uint8), np.ones((5, 5))).astype(bool)
        assert bright[solid].mean() > 0.98
        nothing = cv2.erode((of_label == -2).astype(np.uint8), np.ones((5, 5))).astype(bool)
        assert (scene.image[..., 2][nothing] < 45).all()
        rows = icons.scenes.annotation_rows(scene, [7, 8])
        annotated = [i for i, one in enumerate(scene.objects) if one.annotated and one.label >= 0]
        assert [row["category_id"] for row in rows] == [7 + labels[i] for i in annotated]
        for row, index in zip(rows, annotated, strict=True):
            mask = rle.decode(row["segmentation"]).astype(bool)
            assert (mask == (scene.owner == index)).all()
            assert row["area"] == mask.sum() >= icons.scenes.MIN_PIXELS * (96 / 128) ** 2
            x, y, width, height = map(int, row["bbox"])
            assert mask[y : y + height, x : x + width].sum() == mask.sum()
            assert mask[y].any()
            assert mask[:, x + width - 1].any()


def test_faint_halves_are_no_mask(icons, monkeypatch):
    monkeypatch.setattr(icons.scenes, "MIN_VISIBLE", 1.0)  # wholly inside
    icon = block((0, 200, 0), 40, 40)
    icon[:, 20:, 3] = 100
    whole = icons.scenes.Wanted(0, block((0, 200, 0), 40, 40))
    areas = {}
    for name, one in {"whole": whole, "half": icons.scenes.Wanted(0, icon)}.items():
        scene = icons.scenes.draw_scene([one], np.zeros((80, 80, 3), np.uint8), 96, np.random.default_rng(3))
        areas[name] = icons.scenes.annotation_rows(scene, [1])[0]["area"]
    assert areas["half"] == pytest.approx(areas["whole"] / 2, rel=0.15)


def test_no_objects(icons):
    scene = icons.scenes.draw_scene([], np.full((50, 50, 3), 99, np.uint8), 32, np.random.default_rng(0))
    assert icons.scenes.annotation_rows(scene, []) == []
    assert (scene.owner == -1).all()


# ---------------------------------------------------------------------------------------------------------
# A data set


@pytest.fixture
def files(icons, tmp_path, monkeypatch) -> tuple[Path, Path]:
    """An archive whose held-out style is blue, all others red, with dark photographs for training; LVIS's counts."""
    monkeypatch.setattr(icons.data, "CLASSES_PER_IMAGE", 1.6)  # of four
    looks = {}
    for index, name in enumerate(("big_cat", "cat", "dog", "tree")):
        sides = (20 + 5 * index, 40 - 5 * index)
        looks[name] = {style: block((0, 0, 255), *sides) for style in ("noto", "fxemoji")}
        looks[name]["twemoji"] = block((255, 0, 0), *sides)
    photos = [bytes(cv2.imencode(".jpg", np.full((60, 60, 3), grey, np.uint8))[1]) for grey in (20, 24, 120)]
    size = icons.sets.write_archive(tmp_path / "icons.npz", looks, photos, [True, True, False])
    assert size == (tmp_path / "icons.npz").stat().st_size
    lvis = tmp_path / "lvis.csv"
    lvis.write_text(
        "id,name,frequency,image_count,instance_count\n1,a,r,1,1\n2,b,f,300,900\n3,c,c,20,20\n4,d,f,200,200\n"
    )
    return tmp_path / "icons.npz", lvis


def drawn(icons, files, out: Path, jobs: int = 1) -> Path:
    settings = icons.data.Settings(classes=4, train_images=24, val_images=20, size=64, seed=0)
    lines = icons.data.draw(*files, settings, out, jobs=jobs, progress=lambda done: None)
    assert [line.split(":")[0] for line in lines] == ["train", "val", "val_heldout"]
    return out


def test_a_data_set(icons, files, tmp_path):
    folder = drawn(icons, files, tmp_path / "data")
    content = {split: json.loads((folder / f"{split}.json").read_text()) for split in icons.data.SPLITS}
    assert "CC-BY-4.0" in content["train"]["info"]["description"]
    groups = sorted(row["frequency"] for row in content["train"]["categories"])
    assert groups == ["c", "f", "f", "r"]
    rare = next(row for row in content["train"]["categories"] if row["frequency"] == "r")
    assert rare["image_count"] == rare["instance_count"] == 1
    for split in ("val", "val_heldout"):
        assert min(row["image_count"] for row in content[split]["categories"]) >= 8
    for found in content.values():
        present = {image["id"]: set() for image in found["images"]}
        for row in found["annotations"]:
            present[row["image_id"]].add(row["category_id"])
        assert not any(present[image["id"]] & set(image["neg_category_ids"]) for image in found["images"])
        assert all(set(image["not_exhaustive_category_ids"]) <= present[image["id"]] for image in found["images"])
    ids = [image["id"] for found in content.values() for image in found["images"]]
    assert len(set(ids)) == len(ids) == 64
    for data, count in ((folder, 20), (folder / "heldout.yaml", 20)):
        splits = open_splits(data)
        assert (len(splits.train), len(splits.val)) == (24, count)
        assert splits.train.report.empty_images == 0


def test_styles_and_photographs_stay_apart(icons, files, tmp_path):
    folder = drawn(icons, files, tmp_path / "data")
    # Light makes 9 to 32 of the training photographs and 54 to 158 of the other.
    for split, ground, colour in (("train", (5, 40), 2), ("val", (45, 170), 2), ("val_heldout", (45, 170), 0)):
        content = json.loads((folder / f"{split}.json").read_text())
        masks = {image["id"]: np.zeros((64, 64), bool) for image in content["images"]}
        for row in content["annotations"]:
            masks[row["image_id"]] |= rle.decode(row["segmentation"]).astype(bool)
        for image in content["images"]:
            pixels = cv2.imread(str(folder / "images" / image["file_name"])).astype(float)
            inside, outside = pixels[masks[image["id"]]], pixels[~masks[image["id"]]]
            assert inside.mean(axis=0).argmax() == colour
            if not image["not_exhaustive_category_ids"]:
                assert ground[0] < np.median(outside) < ground[1]


def test_drawing_does_not_depend_on_the_processes(icons, files, tmp_path):
    one, two = drawn(icons, files, tmp_path / "one"), drawn(icons, files, tmp_path / "two", jobs=2)
    names = sorted(path.relative_to(one) for path in one.rglob("*") if path.is_file())
    assert len(names) == 24 + 20 + 20 + 4
    assert names == sorted(path.relative_to(two) for path in two.rglob("*") if path.is_file())
    assert all((one / name).read_bytes() == (two / name).read_bytes() for name in names)


def test_negatives_share_a_word_first(icons, files, tmp_path):
    settings = icons.data.Settings(classes=4, train_images=24, val_images=20, size=64, seed=0)
    painter = icons.data.Painter(icons.sets.Archive(files[0]), files[1], settings, tmp_path)
    rank = painter.names.index("cat")
    found = painter.negatives({rank}, np.random.default_rng(0))
    assert painter.names[found[0]] == "big_cat"
    assert sorted(found) == sorted(set(range(4)) - {rank})


def test_what_cannot_be_drawn_is_one_sentence(icons, files, tmp_path):
    settings = icons.data.Settings(classes=5, train_images=24, val_images=25, size=64, seed=0)
    with pytest.raises(UserError, match="5 classes: choose 2 to 4"):
        icons.data.draw(*files, settings, tmp_path / "new", jobs=1, progress=lambda done: None)
    assert not (tmp_path / "new").exists()
    with pytest.raises(UserError, match="is there already"):
        icons.data.draw(*files, settings, tmp_path, jobs=1, progress=lambda done: None)
    with pytest.raises(UserError, match=r"icons\.npz\.png cannot be read .*make it with `icons.py fetch`"):
        icons.sets.Archive(tmp_path / "icons.npz.png")


# ---------------------------------------------------------------------------------------------------------
# Runs and page


def test_rows_differ_in_the_classifier_only(icons):
    common = icons.script.shared_settings(400, 160, ("data.workers=2",))
    rows = icons.script.methods(Path("/data"), common)
    recipes = {name: resolve(row.recipe, row.settings) for name, row in rows.items() if row.tested_from is None}
    assert list(recipes) == list(icons.script.COLOURS)
    for recipe in recipes.values():
        assert all(key.startswith("classifier.") for key, _, _ in diff(recipes["cross-entropy"], recipe))
        assert recipe.test.max_detections == 100
        assert recipe.schedule.epochs == 1
        assert recipe.data.test_short_edge == 160
    assert (recipes["seesaw-p0"].classifier.p, recipes["seesaw"].classifier.p) == (0, 0.8)
    held_out = [row for row in rows.values() if row.tested_from is not None]
    assert [row.data for row in held_out] == ["/data/heldout.yaml"] * 3
    assert [icons.script.limit_of(classes) for classes in (20, 120, 1203)] == [10, 30, 300]


def test_runs_name_their_data(icons, tmp_path):
    import miniature

    rows = icons.script.methods(tmp_path / "data", icons.script.shared_settings(20, 64, ()))
    assert miniature.command(rows["seesaw"], "seesaw", 1, tmp_path)[3:5] == ["--data", str(tmp_path / "data")]
    tested = miniature.command(rows["seesaw-held-out"], "seesaw-held-out", 1, tmp_path)
    assert tested[1:5] == [
        "eval",
        str(tmp_path / "seesaw-1" / "last.safetensors"),
        "--data",
        f"{tmp_path}/data/heldout.yaml",
    ]


def results(icons) -> dict:
    common = icons.script.shared_settings(1203, 128, ())
    shared = " ".join(f"--set {setting}" for setting in common if "[" not in setting)
    made = {
        "data": {
            **{"classes": 1203, "classes_by_frequency": {"r": 337, "c": 461, "f": 405}, "train_images": 100000},
            **{"val_images": 3342, "size": 128, "objects": 690000, "fewest_images": 1, "most_images": 1977},
            **{"fewest_objects": 1, "most_objects": 5000},
        },
        **{"seeds": 2, "images_seen": 100000, "max_detections": 300, "machine": "none", "settings": common, "set": []},
    }

    def row(name: str, *rare: float) -> dict:
        metrics = [{"AP": 0.2, "APr": value, "APc": 0.1, "APf": 0.3} for value in rare]
        return {"title": name, "command": f"a {shared}", "runs": [{"bbox": m, "segm": m} for m in metrics]}

    for test, factor in (("val", 1.0), ("held_out", 0.5)):
        titles = zip(icons.script.COLOURS, (0.0, 0.04, 0.12), strict=True)
        made[test] = {name: row(name, factor * rare, factor * (rare + 0.02)) for name, rare in titles}
    return {"1203": made}


def test_page(icons, tmp_path):
    found = results(icons)
    page = icons.script.page(found)
    assert page.index("![") < page.index("Icons of 1,203 classes, in 5 styles") < page.index("| box AP |")
    assert (
        "cross-entropy has mask AP 1.0, Seesaw without its mitigation factor (p = 0) 5.0 and with it (p = 0.8) 13.0"
        in page
    )
    assert "with 0.5, 2.5 and 6.5." in page
    assert "| seesaw minus Seesaw-p0 | +0.0 [0.0, 0.0] | +0.0 [0.0, 0.0] | +8.0 [8.0, 8.0] |" in page
    assert "CC-BY-4.0" in page
    assert "draw runs/icons-1203/data --classes 1203 --images 100000 --val-images 3342 --size 128" in page
    icons.script.picture(found, tmp_path / "p.png")
    assert (tmp_path / "p.png").read_bytes().startswith(b"\x89PNG")


def test_the_page_in_the_docs_is_that_of_the_recorded_results(icons):
    if not icons.script.RESULTS.is_file():
        pytest.skip("no results recorded yet")
    recorded = json.loads(icons.script.RESULTS.read_text())
    assert (FOLDER.parent / "docs" / "results" / "icons.md").read_text() == icons.script.page(recorded)
