import os

import pytest
from foreign_files import coco_set, converted

from tailseg.data.importers.convert import convert
from tailseg.errors import UserError


def test_out_must_be_new_and_source_may_be_on_a_system_without_links(tmp_path, monkeypatch):
    root = coco_set(tmp_path / "src", "train.json", "images", range(10))
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "a").touch()
    with pytest.raises(UserError, match="is not empty"):
        convert("coco", root, tmp_path / "full")

    def refuse(*_):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    _, notes = converted("coco", root, tmp_path)
    assert "images are copies" in notes
    assert (tmp_path / "out/images/3.jpg").read_bytes() == (root / "images/3.jpg").read_bytes()
    assert not os.path.samefile(tmp_path / "out/images/3.jpg", root / "images/3.jpg")
