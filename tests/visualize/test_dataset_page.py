import shutil

from checked_data import RECIPE, SOUND, SOUND_VAL, write

from tailseg.data.diagnosis.dataset_report import check_data
from tailseg.data.sources import open_data
from tailseg.visualize.dataset_page import write_page


def test_page_without_objects_or_images(tmp_path):
    folder = write(tmp_path, [], [])
    splits = open_data(str(folder), show=False)
    write_page(check_data("<x>", splits, RECIPE), splits.train, tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert "There are no objects." in text
    assert "<x>" not in text
    shutil.copy(write(tmp_path / "other", SOUND, SOUND_VAL) / "train.json", folder / "train.json")
    shutil.rmtree(folder / "images")
    (folder / "images").mkdir()
    splits = open_data(str(folder), show=False, examine=True)
    write_page(check_data("x", splits, RECIPE), splits.train, tmp_path / "page.html")
    assert "cannot be trained on yet" in (tmp_path / "page.html").read_text()
