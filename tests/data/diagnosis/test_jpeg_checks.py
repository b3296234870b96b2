from io import BytesIO

import numpy as np
import pytest
from PIL import Image

from tailseg.data.diagnosis.jpeg_checks import data_run_out
from tailseg.data.images import decode


def photograph(mode="RGB", size=(120, 90), seed=0):
    """A smooth picture with noise."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[: size[1], : size[0]]
    pixels = np.stack([x * 255 / size[0], y * 255 / size[1], 128 + 60 * np.sin(x / 9)], 2) + rng.integers(0, 20)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).convert(mode)


def jpeg(image, **options):
    file = BytesIO()
    image.save(file, "JPEG", **options)
    return file.getvalue()


def run_out(tmp_path, content):
    path = tmp_path / "a.jpg"
    path.write_bytes(content)
    return data_run_out(path, decode(path)[0])


KINDS = [{}, {"progressive": True}, {"quality": 95, "subsampling": 0}, {"quality": 30, "subsampling": 2}]


@pytest.mark.parametrize("options", KINDS)
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_data_cut_within_the_last_scan_are_found(tmp_path, options, mode):
    good = jpeg(photograph(mode), **options)
    assert not run_out(tmp_path, good)
    assert not run_out(tmp_path, good + b"something behind")
    scan = good.rfind(b"\xff\xda")
    begin = scan + 2 + int.from_bytes(good[scan + 2 : scan + 4], "big")
    for share in (0.2, 0.5, 0.8):
        place = begin + int(share * (len(good) - 2 - begin))
        assert run_out(tmp_path, good[:place] + b"\xff\xd9"), share


@pytest.mark.parametrize("seed", range(3))
def test_a_piece_missing_in_the_middle_is_found(tmp_path, seed):
    good = jpeg(photograph(size=(300, 200), seed=seed), quality=90)
    place = len(good) // 2 + 10 * seed
    assert run_out(tmp_path, good[:place] + good[place + 600 :])


@pytest.mark.parametrize("options", KINDS)
def test_grey_images_are_sound(tmp_path, options):
    for mode, colour in (("RGB", (128, 128, 128)), ("L", 128), ("RGB", (0, 0, 0))):
        assert not run_out(tmp_path, jpeg(Image.new(mode, (100, 70), colour), **options))


def test_other_formats_are_not_looked_at(tmp_path):
    file = BytesIO()
    Image.new("RGB", (8, 8), (128, 128, 128)).save(file, "PNG")
    assert not run_out(tmp_path, file.getvalue())
    assert not run_out(tmp_path, jpeg(Image.new("CMYK", (16, 16))))
