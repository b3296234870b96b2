import os

import pytest
from annotation_files import content, load

from tailseg.errors import UserError


@pytest.mark.parametrize(
    ("entry", "place"),
    [
        ({"file_name": "a.jpg"}, "a.jpg"),
        ({"file_name": "deep/a.jpg"}, "deep/a.jpg"),
        ({"file_name": "a.jpg"}, "val2017/a.jpg"),
        ({"coco_url": "http://images/train2017/a.jpg"}, "a.jpg"),
        ({"coco_url": "http://images/train2017/a.jpg"}, "train2017/a.jpg"),
        ({"file_name": "gone.jpg", "coco_url": "http://images/test2017/a.jpg"}, "test2017/a.jpg"),
        ({"file_name": "COCO_train2014_000000000009.jpg"}, "train2017/000000000009.jpg"),
        ({"file_name": "COCO_val2014_000000000009.jpg"}, "COCO_val2014_000000000009.jpg"),
    ],
)
def test_images_are_found(tmp_path, entry, place):
    path = tmp_path / "images" / place
    path.parent.mkdir(parents=True)
    path.touch()
    data = load(tmp_path, content([], images=[{"id": 1, "height": 4, "width": 5, **entry}]))
    data.check_images()
    assert data.image_path(0) == path


@pytest.mark.parametrize(
    "name", ["../secret.jpg", "/etc/passwd", "deep/../../secret.jpg", "..\\secret.jpg", "C:/x.jpg"]
)
def test_names_that_climb_out_are_refused(tmp_path, name):
    (tmp_path / "images").mkdir()
    (tmp_path / "secret.jpg").touch()
    data = load(tmp_path, content([], images=[{"id": 1, "height": 4, "width": 5, "file_name": name}]))
    with pytest.raises(UserError, match="image 1 leads out of the image folder"):
        data.image_path(0)


def test_links_may_not_lead_out_but_folders_may_be_links(tmp_path):
    (tmp_path / "images").mkdir()
    (tmp_path / "store" / "sub").mkdir(parents=True)
    for name in ("secret.jpg", "store/5.jpg", "store/sub/1.jpg"):
        (tmp_path / name).touch()
    os.symlink(tmp_path / "secret.jpg", tmp_path / "images" / "1.jpg")
    os.symlink(tmp_path / "store", tmp_path / "images" / "train2017")
    data = load(tmp_path)
    assert data.image_path(0) == tmp_path / "images" / "train2017" / "5.jpg"
    with pytest.raises(UserError, match=r"image 1: .*1\.jpg is a link that leads out"):
        data.image_path(1)
    os.symlink(tmp_path, tmp_path / "images" / "up")
    nested = content([], images=[{"id": 1, "height": 4, "width": 5, "file_name": "up/secret.jpg"}])
    with pytest.raises(UserError, match="is a link that leads out"):
        load(tmp_path, nested).image_path(0)
