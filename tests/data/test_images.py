import os
import re
import subprocess
import sys
import zlib
from io import BytesIO

import numpy as np
import pytest
from PIL import Image, features
from PIL.PngImagePlugin import PngInfo

from tailseg.data import images as images_module
from tailseg.data.images import (
    FORMATS,
    IMAGE_SUFFIXES,
    MAX_PIXELS,
    MOST_SCANS,
    ImageTooLargeError,
    decode,
    fitted_size,
    read_content,
    read_header,
    read_image,
    to_rgb,
)
from tailseg.errors import UserError

ORIENTATION = 0x0112
# The upper left corner of the picture as people see it, and of how it is stored for each orientation.
SHOWN = np.arange(24, dtype=np.uint8).reshape(4, 6) * 10
STORED = {
    1: SHOWN,
    2: SHOWN[:, ::-1],
    3: SHOWN[::-1, ::-1],
    4: SHOWN[::-1],
    5: SHOWN.T,
    6: np.rot90(SHOWN),
    7: SHOWN[::-1, ::-1].T,
    8: np.rot90(SHOWN, -1),
}
EXACT = {  # suffixes of formats that keep every pixel, and how to write them so
    ".png": {},
    ".apng": {},
    ".webp": {"lossless": True},
    ".bmp": {},
    ".dib": {},
    ".tif": {},
    ".tiff": {"compression": "tiff_lzw"},
    ".gif": {},
    ".ppm": {},
    ".pgm": {},
    ".pnm": {},
    ".tga": {},
    ".jp2": {},
}


def oriented(number: int) -> Image.Exif:
    exif = Image.Exif()
    exif[ORIENTATION] = number
    return exif


def grey(image: np.ndarray) -> np.ndarray:
    """The one channel of a picture whose channels are equal."""
    assert image.dtype == np.uint8
    assert (image == image[:, :, :1]).all()
    return image[:, :, 0]


# ---------------------------------------------------------------------------------------------------------
# Formats


def test_all_suffixes_of_the_formats_are_known():
    expected = {suffix for suffix, owner in Image.registered_extensions().items() if owner in FORMATS}
    assert set(IMAGE_SUFFIXES) == expected
    assert {".jpg", ".jpeg", ".jfif", ".jpe", ".png", ".mpo", ".gif", ".tif", ".webp", ".bmp"} < expected
    assert all(suffix == suffix.lower() for suffix in IMAGE_SUFFIXES)
    assert not {".eps", ".ps", ".pdf", ".ico", ".h5"} & expected


@pytest.mark.parametrize("suffix", IMAGE_SUFFIXES)
def test_a_file_of_each_suffix_is_read(tmp_path, suffix):
    """Those that keep every pixel, to the bit; the others nearly."""
    if suffix in (".avif", ".avifs") and not features.check("avif"):
        pytest.skip("this Pillow writes no AVIF")
    owner = Image.EXTENSION[suffix]
    ramp = np.tile(np.arange(0, 256, 8, dtype=np.uint8), (24, 1))
    picture = Image.fromarray(ramp)
    if suffix == ".pbm":
        ramp = np.where(ramp < 128, 0, 255).astype(np.uint8)
        picture = Image.fromarray(ramp).convert("1")
    path = tmp_path / f"a{suffix}"
    if suffix == ".pfm":  # floating point by its nature
        Image.fromarray(ramp.astype(np.float32)).save(path)
        with pytest.raises(UserError, match="floating point"):
            read_image(path)
        return
    if owner == "MPO":  # two photographs, of which the first counts
        picture.save(path, "MPO", save_all=True, append_images=[Image.new("L", picture.size)])
    else:
        picture.save(path, **EXACT.get(suffix, {}))
    assert read_header(path).shown_hw == ramp.shape
    image = read_image(path).astype(int)
    assert image.shape == (24, 32, 3)
    assert np.abs(image - ramp[:, :, None]).max() <= (0 if suffix in EXACT or suffix == ".pbm" else 8)


def test_a_suffix_does_not_decide_the_format(tmp_path):
    Image.fromarray(SHOWN).save(tmp_path / "a.jpg", "PNG")
    np.testing.assert_array_equal(grey(read_image(tmp_path / "a.jpg")), SHOWN)


def test_postscript_is_not_run(tmp_path, monkeypatch):
    """A file that is called JPEG but would start Ghostscript."""
    monkeypatch.setattr(subprocess, "check_call", lambda *_args, **_named: pytest.fail("a program was started"))
    path = tmp_path / "a.jpg"
    Image.new("RGB", (40, 40)).save(path, "EPS")
    for read in (read_header, read_image):
        with pytest.raises(UserError, match=r"a\.jpg: not an image that can be read; replace it by a JPEG or PNG"):
            read(path)


# ---------------------------------------------------------------------------------------------------------
# Size and orientation


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("suffix", [".png", ".webp", ".tif"])
def test_every_orientation_is_applied_once(tmp_path, suffix, orientation):
    """The stored pixels of each orientation all give the same picture; Pillow has turned a TIFF by then."""
    path = tmp_path / f"a{suffix}"
    stored = np.ascontiguousarray(STORED[orientation])
    how = {"tiffinfo": {ORIENTATION: orientation}} if suffix == ".tif" else {"exif": oriented(orientation)}
    Image.fromarray(stored).save(path, **EXACT[suffix], **how)
    np.testing.assert_array_equal(grey(read_image(path)), SHOWN)
    header = read_header(path)
    assert header.shown_hw == (4, 6)
    assert header.stored_hw == ((4, 6) if suffix == ".tif" else stored.shape)
    assert header.orientation == (1 if suffix == ".tif" else orientation)
    as_stored = to_rgb(decode(path)[0], path, upright=False)
    np.testing.assert_array_equal(grey(as_stored), SHOWN if suffix == ".tif" else stored)


@pytest.mark.parametrize("orientation", [0, 1, 6, 9])
def test_orientations_of_photographs(tmp_path, orientation):
    exif = Image.Exif()
    exif[ORIENTATION] = orientation
    Image.new("RGB", (80, 40)).save(tmp_path / "a.jpg", exif=exif)
    header = read_header(tmp_path / "a.jpg")
    assert header.orientation == (6 if orientation == 6 else 1)
    assert header.stored_hw == (40, 80)
    assert header.shown_hw == ((80, 40) if orientation == 6 else (40, 80))
    assert read_image(tmp_path / "a.jpg").shape[:2] == header.shown_hw


def png_with_a_late_chunk(path, kind: bytes, content: bytes) -> None:
    """A picture stored for orientation 6, and one more chunk between its pixels and its end."""
    Image.fromarray(np.ascontiguousarray(STORED[6])).save(path)
    whole = path.read_bytes()
    chunk = len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")
    path.write_bytes(whole[:-12] + chunk + whole[-12:])


@pytest.mark.parametrize("holder", ["eXIf", "iTXt", "date", "nothing"])
def test_an_orientation_behind_the_pixels_of_a_png(tmp_path, monkeypatch, holder):
    """The header tells what decoding will find, and decodes only where something may be found."""
    path = tmp_path / "a.png"
    xmp = b"XML:com.adobe.xmp\0\0\0\0\0" + b'<x tiff:Orientation="6"/>'
    chunks = {"eXIf": (b"eXIf", oriented(6).tobytes()[6:]), "iTXt": (b"iTXt", xmp), "date": (b"tEXt", b"date\0today")}
    if holder == "nothing":
        Image.fromarray(np.ascontiguousarray(STORED[6])).save(path)
    else:
        png_with_a_late_chunk(path, *chunks[holder])
    found = holder in ("eXIf", "iTXt")
    shown_hw = read_image(path).shape[:2]
    assert shown_hw == ((4, 6) if found else (6, 4))
    if not found:
        monkeypatch.setattr(Image.Image, "load", lambda _self: pytest.fail("decoded"))
    assert read_header(path).shown_hw == shown_hw


def test_an_orientation_in_the_texts_of_a_png(tmp_path):
    info = PngInfo()
    info.add_itxt("XML:com.adobe.xmp", '<x tiff:Orientation="8"/>')
    Image.fromarray(np.ascontiguousarray(STORED[8])).save(tmp_path / "a.png", pnginfo=info)
    assert read_header(tmp_path / "a.png").orientation == 8
    np.testing.assert_array_equal(grey(read_image(tmp_path / "a.png")), SHOWN)


def test_a_header_of_an_open_file(tmp_path):
    path = tmp_path / "a.jpg"
    Image.new("RGB", (80, 40)).save(path)
    with path.open("rb") as file:
        file.seek(99)
        assert read_header(path, file) == read_header(path)
        assert not file.closed


# ---------------------------------------------------------------------------------------------------------
# Pixels


def test_every_kind_of_picture_becomes_rgb(tmp_path):
    ramp = np.tile(np.arange(0, 250, 10, dtype=np.uint8), (4, 1))
    rgb = np.stack([ramp, 255 - ramp, ramp // 2], axis=2)
    pictures = {
        "rgb.png": Image.fromarray(rgb),
        "grey.png": Image.fromarray(ramp),
        "grey16.png": Image.fromarray(ramp.astype(np.uint16) * 257),
        "palette.png": Image.fromarray(rgb).quantize(64),
        "cmyk.tif": Image.fromarray(rgb).convert("CMYK"),
        "bits.png": Image.fromarray(ramp > 100),
        "alpha.png": Image.fromarray(np.dstack([rgb, np.where(ramp > 100, 255, 0).astype(np.uint8)])),
    }
    for name, picture in pictures.items():
        picture.save(tmp_path / name)
    read = {name: read_image(tmp_path / name).astype(int) for name in pictures}
    assert all(image.shape == (4, 25, 3) and image.max() <= 255 for image in read.values())
    np.testing.assert_array_equal(read["rgb.png"], rgb)
    np.testing.assert_array_equal(read["grey.png"], np.repeat(ramp[:, :, None], 3, 2))
    np.testing.assert_array_equal(read["grey16.png"], read["grey.png"])
    assert np.abs(read["palette.png"] - rgb).max() < 20
    assert np.abs(read["cmyk.tif"] - rgb).max() <= 1
    np.testing.assert_array_equal(read["bits.png"][:, :, 0], np.where(ramp > 100, 255, 0))
    np.testing.assert_array_equal(read["alpha.png"], np.where(ramp[:, :, None] > 100, rgb, 255))


def test_pixels_can_be_written_to(tmp_path):
    for picture in (Image.new("RGB", (4, 4)), Image.new("L", (4, 4)), Image.fromarray(np.zeros((4, 4), np.uint16))):
        picture.save(tmp_path / "a.png")
        assert read_image(tmp_path / "a.png").flags.writeable
        assert to_rgb(picture, tmp_path, upright=True).flags.writeable


@pytest.mark.parametrize("suffix", [".tif", ".png", ".pgm", ".jp2"])
def test_of_16_bits_the_upper_8_count(tmp_path, suffix):
    values = np.array([[0, 255, 256, 3800], [257 * 100, 32768, 65279, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a{suffix}")
    assert grey(read_image(tmp_path / f"a{suffix}")).tolist() == [[0, 0, 1, 14], [100, 128, 254, 255]]
    assert grey(to_rgb(Image.fromarray(values), tmp_path, upright=True)).tolist()[1] == [100, 128, 254, 255]


def test_of_16_bits_with_a_sign_the_upper_8_count(tmp_path):
    values = np.array([[-300, 0, 256, 32767]], np.int16)
    picture = Image.fromarray(values.view(np.uint16))
    picture.save(tmp_path / "a.tif", tiffinfo={0x0153: 2})
    assert decode(tmp_path / "a.tif")[0].mode == "I"
    assert grey(read_image(tmp_path / "a.tif")).tolist() == [[0, 0, 1, 127]]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([[0, 19, 95]], [[0, 51, 255]]),
        ([[0, 380, 3800]], [[0, 25, 255]]),
        ([[7, 7, 7]], [[255, 255, 255]]),
        ([[0, 0, 0]], [[0, 0, 0]]),
        ([[-5, 0, 2**31 - 1]], [[0, 0, 255]]),
    ],
)
def test_greyscale_of_32_bits_is_scaled_by_its_largest_value(tmp_path, values, expected):
    picture = Image.fromarray(np.array(values, np.int32))
    picture.save(tmp_path / "a.tif")
    assert grey(read_image(tmp_path / "a.tif")).tolist() == expected
    assert grey(to_rgb(picture, tmp_path, upright=True)).tolist() == expected


def test_greyscale_of_32_bits_without_sign(tmp_path):
    values = np.array([[0, 2**31, 2**32 - 1]], np.uint32)
    Image.fromarray(values.view(np.int32)).save(tmp_path / "a.tif")
    signed, unsigned = (b"\x53\x01\x03\x00\x01\x00\x00\x00" + kind for kind in (b"\2", b"\1"))  # SampleFormat, 1 short
    content = (tmp_path / "a.tif").read_bytes()
    assert content.count(signed) == 1
    (tmp_path / "a.tif").write_bytes(content.replace(signed, unsigned))
    assert grey(read_image(tmp_path / "a.tif")).tolist() == [[0, 127, 255]]


def test_greyscale_of_16_and_32_bits_is_turned(tmp_path):
    stored = np.ascontiguousarray(STORED[6]).astype(np.uint16) * 256
    Image.fromarray(stored).save(tmp_path / "a.png", exif=oriented(6))
    Image.fromarray(stored.astype(np.int32)).save(tmp_path / "a.tif", tiffinfo={ORIENTATION: 6})
    np.testing.assert_array_equal(grey(read_image(tmp_path / "a.png")), SHOWN)
    np.testing.assert_array_equal(grey(read_image(tmp_path / "a.tif")), SHOWN.astype(int) * 255 // 230)


def test_a_reduced_jpeg(tmp_path):
    Image.new("RGB", (160, 80)).save(tmp_path / "a.jpg")
    Image.new("RGB", (160, 80)).save(tmp_path / "a.png")
    Image.new("RGB", (161, 80)).save(tmp_path / "b.jpg")
    for name, reduced in (("a.jpg", 4), ("a.png", 1), ("b.jpg", 1)):
        image, by = decode(tmp_path / name, 4)
        assert (by, image.height) == (reduced, 80 // reduced)


# ---------------------------------------------------------------------------------------------------------
# Files at fault


def test_unreadable_images_are_named(tmp_path):
    good = tmp_path / "good.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (80, 80, 3), dtype=np.uint8)).save(good)
    cases = {
        "cut.jpg": (good.read_bytes()[:3000], "broken or cut off"),
        "empty.jpg": (b"", "the file is empty"),
        "text.jpg": (b"hello", "not an image"),
    }
    Image.fromarray(np.zeros((40, 40, 3), np.uint8)).save(tmp_path / "x.png")
    png = (tmp_path / "x.png").read_bytes()
    cases["broken.png"] = (png[:43] + b"\xff\xff\xff\xff" + png[47:], "broken or cut off")
    for name, (content, message) in cases.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: .*{message}.*; ") as caught:
            read_image(tmp_path / name)
        assert "\n" not in str(caught.value)
    for path in (tmp_path / "nowhere.png", good / "a.png"):
        with pytest.raises(UserError, match=r"\.png: no such image; check the path"):
            read_image(path)
    Image.fromarray(np.zeros((4, 4), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(UserError, match="floating point"):
        read_image(tmp_path / "float.tif")


def with_scans(more: int) -> bytes:
    """A progressive JPEG whose last scan stands there again and again."""
    buffer = BytesIO()
    Image.new("L", (64, 64), 128).save(buffer, "JPEG", progressive=True)
    content = buffer.getvalue()
    last = content[content.rindex(b"\xff\xda") : -2]
    return content[:-2] + more * last + content[-2:]


def test_scans_of_a_jpeg_are_counted(tmp_path):
    usual = with_scans(0).count(b"\xff\xda")
    assert 1 < usual < 20
    path = tmp_path / "a.jpg"
    path.write_bytes(with_scans(MOST_SCANS - usual))
    assert (read_image(path) == 128).all()
    path.write_bytes(with_scans(MOST_SCANS - usual + 1))
    for read in (lambda: read_image(path), lambda: read_content(path.read_bytes(), str(path)), lambda: decode(path, 2)):
        with pytest.raises(UserError) as refused:
            read()
        assert str(refused.value) == (
            f"{path}: the JPEG file has more than 500 scans of its pixels, which would take too long to decode; save "
            "it again with another program"
        )


def test_what_only_looks_like_scans_is_no_fault(tmp_path):
    """In a text of the file, and behind its end, where phones put a film."""
    path, marks = tmp_path / "a.jpg", b"\xff\xda" * 900
    content = with_scans(3)
    comment = b"\xff\xfe" + (len(marks) + 2).to_bytes(2, "big") + marks
    path.write_bytes(content[:2] + comment + content[2:] + marks)
    assert (read_image(path) == 128).all()


@pytest.mark.parametrize("read", [read_header, read_image])
def test_a_folder_is_no_image(tmp_path, read):
    with pytest.raises(UserError) as caught:
        read(tmp_path)
    assert str(caught.value) == f"{tmp_path}: it is a folder; give an image file"


@pytest.mark.skipif(os.name == "nt" or os.geteuid() == 0, reason="an administrator may read everything")
def test_an_image_without_rights(tmp_path):
    Image.new("L", (4, 4)).save(tmp_path / "a.png")
    (tmp_path / "a.png").chmod(0)
    with pytest.raises(UserError, match=r"a\.png: the image cannot be read \(Permission denied\); check the path and"):
        read_image(tmp_path / "a.png")


def test_a_name_that_is_too_long(tmp_path):
    with pytest.raises(UserError, match=r"the image cannot be read \(.*\); check the path and its rights"):
        read_image(tmp_path / ("a" * 300))


def bitmap_of_size(path, width: int, height: int) -> None:
    """A BMP file whose header states that size; the pixels are not there."""
    Image.new("L", (8, 8)).save(path, "BMP")
    content = bytearray(path.read_bytes())
    content[18:26] = width.to_bytes(4, "little") + height.to_bytes(4, "little")
    path.write_bytes(content)


def test_the_limit_is_pillows():
    assert MAX_PIXELS == 2 * Image.MAX_IMAGE_PIXELS


@pytest.mark.parametrize("read", [read_header, read_image])
def test_an_image_of_too_many_pixels(tmp_path, read):
    """Known from its header: nothing is decoded, and it is not called broken."""
    path = tmp_path / "a.png"
    bitmap_of_size(path, 14_000, 13_000)
    with pytest.raises(ImageTooLargeError) as caught:
        read(path)
    problem = "the image is too large (182,000,000 pixels, the limit is 178,956,970)"
    assert str(caught.value) == f"{path}: {problem}; shrink it or cut it into pieces"


def test_a_caller_may_take_fewer_pixels(tmp_path):
    bitmap_of_size(tmp_path / "a.bmp", 30, 20)
    content = (tmp_path / "a.bmp").read_bytes()
    problem = r"^a: the image is too large \(600 pixels, the limit is 599\); shrink it or cut it into pieces$"
    with pytest.raises(ImageTooLargeError, match=problem):
        read_content(content, "a", 599)
    with pytest.raises(UserError, match="broken or cut off"):  # there are no pixels in it
        read_content(content, "a", 600)


def test_an_image_within_the_limit_is_opened_without_a_warning(tmp_path):
    path = tmp_path / "a.png"
    bitmap_of_size(path, 13_300, 13_300)
    script = "import sys, pathlib, tailseg.data.images as i; print(i.read_header(pathlib.Path(sys.argv[1])))"
    done = subprocess.run([sys.executable, "-c", script, path], capture_output=True, text=True, check=True)
    assert "stored_hw=(13300, 13300)" in done.stdout
    assert done.stderr == ""


def test_too_little_memory_is_not_called_a_broken_image(tmp_path, monkeypatch):
    Image.new("L", (8, 8)).save(tmp_path / "a.png")

    def fail(*_args, **_named):
        raise MemoryError

    monkeypatch.setattr(images_module.Image, "open", fail)
    with pytest.raises(MemoryError):
        read_image(tmp_path / "a.png")


def test_images_are_opened_in_one_place():
    source = images_module.Path(images_module.__file__).parents[1]
    places = [file.name for file in source.rglob("*.py") if re.search(r"Image\.open\(|imread\(", file.read_text())]
    assert places == ["images.py"]


@pytest.mark.parametrize(
    ("image_hw", "within", "expected"),
    [
        ((480, 640), None, (600, 800)),
        ((480, 640), (600, 800), (600, 800)),
        ((640, 480), (600, 800), (600, 450)),  # turned, it would not fit
        ((480, 640), (640, 640), (480, 640)),
        ((10, 1000), (32, 64), (1, 64)),
    ],
)
def test_fitted_within_a_size(image_hw, within, expected):
    assert fitted_size(image_hw, 600, 1000, within) == expected
