import json
import os
import re
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from predictions import rectangles
from tiny import ENVIRONMENT, assert_done, assert_refused
from tiny import tailseg as tailseg_command

import tailseg
from tailseg.errors import UserError
from tailseg.predict import video as video_files
from tailseg.predict.video import VideoFile, open_video

FRAMES, FPS = 7, 12.5


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    """A red square that moves to the right, 64 x 96 pixels; written by OpenCV alone."""
    path = tmp_path / "clip.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), FPS, (96, 64))
    for i in range(FRAMES):
        frame = np.full((64, 96, 3), 120, np.uint8)
        frame[20:50, 8 * i : 8 * i + 30] = (20, 30, 250)
        writer.write(frame)
    writer.release()
    return path


def test_frames(clip: Path) -> None:
    video = open_video(clip)
    assert (video.fps, video.stated_frames) == (FPS, FRAMES)
    frames = list(video.frames())
    assert len(frames) == FRAMES
    for i, frame in enumerate(frames):
        assert frame.shape == (64, 96, 3)
        red = (frame[..., 0].astype(int) - frame[..., 2]) > 120
        assert abs(int(red.any(axis=0).nonzero()[0][0]) - 8 * i) <= 1  # RGB, and in order


def test_a_written_video_has_the_frames_and_their_rate(tmp_path: Path) -> None:
    frames = [np.full((33, 45, 3), (200, 10 * i, 30), np.uint8) for i in range(6)]
    with VideoFile(tmp_path / "a.mp4", 29.97) as video:
        for frame in frames:
            video.add(frame)
    again = open_video(tmp_path / "a.mp4")
    assert again.fps == pytest.approx(29.97, abs=0.01)
    seen = list(again.frames())
    assert [frame.shape for frame in seen] == [(34, 46, 3)] * 6  # sides are even
    for frame, one in zip(frames, seen, strict=True):
        assert np.abs(one.astype(int).mean((0, 1)) - frame.mean((0, 1))).max() < 6
    with VideoFile(tmp_path / "none.mp4", 5):
        pass
    assert not (tmp_path / "none.mp4").exists()
    with pytest.raises(UserError, match=r"nowhere/a\.mp4: the video could not be written"):
        VideoFile(tmp_path / "nowhere" / "a.mp4", 5).add(frames[0])


def test_a_turned_video_is_shown_upright(tmp_path: Path) -> None:
    """The display matrix of the track, as phones write it, stands in the file's header."""
    path = tmp_path / "a.mp4"
    with VideoFile(path, 10) as video:
        for _ in range(3):
            frame = np.zeros((32, 64, 3), np.uint8)
            frame[:, :32] = 255  # the left half is white
            video.add(frame)
    content = bytearray(path.read_bytes())
    one = (1 << 16).to_bytes(4, "big")
    plain = one + bytes(12) + one + bytes(12) + (1 << 30).to_bytes(4, "big")
    place = content.index(plain, content.index(b"tkhd"))
    turned = bytes(4) + one + bytes(4) + (-(1 << 16)).to_bytes(4, "big", signed=True) + bytes(16)
    content[place : place + 36] = turned + (1 << 30).to_bytes(4, "big")
    path.write_bytes(content)
    frame = next(open_video(path).frames())
    assert frame.shape == (64, 32, 3)  # turned by 90 degrees clockwise: left is up
    assert frame[4:28].mean() > 200
    assert frame[36:60].mean() < 50


def test_videos_that_cannot_be_decoded(tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video at all" * 10)
    (tmp_path / "empty.mp4").write_bytes(b"")
    (tmp_path / "list.mp4").write_text("#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1:9/x.ts\n")
    for name in ("bad.mp4", "empty.mp4", "list.mp4"):
        with pytest.raises(UserError, match=f"{name}: not a video that can be decoded; convert it to H.264"):
            open_video(tmp_path / name)
    with pytest.raises(UserError, match=r"gone\.mp4: no such video"):
        open_video(tmp_path / "gone.mp4")


def test_lists_of_other_files_are_no_videos(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "list.mp4").write_text(f"ffconcat version 1.0\nfile {clip.name}\n")
    Image.new("RGB", (8, 8)).save(tmp_path / "picture.mp4", "JPEG")
    for name in ("list.mp4", "picture.mp4"):
        with pytest.raises(UserError, match=f"{name}: not a video that can be decoded; convert it to H.264"):
            open_video(tmp_path / name)


@pytest.mark.parametrize(
    ("ending", "code", "begin"),
    [
        (".mp4", "mp4v", b"....ftyp"),
        (".mov", "mp4v", b"....ftyp"),
        (".mkv", "mp4v", b"\x1aE\xdf\xa3"),
        (".avi", "MJPG", b"RIFF....AVI "),
        (".mpg", "MPG1", b"\0\0\x01\xba"),
        (".ts", "MPG2", b"G"),
        (".m2ts", "MPG2", b"....G"),
        (".flv", "FLV1", b"FLV"),
        (".wmv", "WMV2", b"\x30\x26\xb2\x75"),
        (".ogv", "THEO", b"OggS"),
    ],
)
def test_containers(tmp_path: Path, ending: str, code: str, begin: bytes) -> None:
    path = tmp_path / f"clip{ending}"
    writer = cv2.VideoWriter(str(path), cv2.CAP_FFMPEG, cv2.VideoWriter.fourcc(*code), 25, (96, 64))
    if not writer.isOpened():
        pytest.skip("FFmpeg cannot write it here")
    for _ in range(5):
        writer.write(np.full((64, 96, 3), 120, np.uint8))
    writer.release()
    assert re.match(re.escape(begin).replace(rb"\.", b"."), path.read_bytes(), re.DOTALL)
    assert next(open_video(path).frames()).shape == (64, 96, 3)


def test_a_quicktime_file_may_begin_with_its_pictures(tmp_path: Path) -> None:
    with VideoFile(tmp_path / "a.mp4", 25) as video:
        video.add(np.zeros((32, 32, 3), np.uint8))
    content = (tmp_path / "a.mp4").read_bytes()
    (tmp_path / "a.mov").write_bytes(b"\0\0\0\x08wide" + content)
    assert len(list(open_video(tmp_path / "a.mov").frames())) == 1


def test_a_name_that_is_not_utf_8(tmp_path: Path, clip: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.avi")
    try:
        clip.rename(path)
    except OSError:
        pytest.skip("no such names on this disk")
    with pytest.raises(UserError, match="the name of a video must be UTF-8, and this is not; rename the file"):
        open_video(path)


def test_frames_of_too_many_pixels_are_not_decoded(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(video_files, "MAX_PIXELS", 64 * 96)
    assert open_video(clip).fps == FPS
    monkeypatch.setattr(video_files, "MAX_PIXELS", 64 * 96 - 1)
    with pytest.raises(UserError, match=r"clip\.avi: the frames are too large \(6,144 pixels, the limit is 6,143\)"):
        open_video(clip)


def test_a_video_that_is_cut_off_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, rng = tmp_path / "a.avi", np.random.default_rng(0)
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter.fourcc(*"MJPG"), FPS, (96, 64))
    for _ in range(40):
        writer.write(rng.integers(0, 255, (64, 96, 3), np.uint8))
    writer.release()
    assert len(list(open_video(path).frames())) == 40
    assert caplog.text == ""
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    count = len(list(open_video(path).frames()))
    assert 10 < count < 30
    assert f"a.avi: only the first {count} of 40 frames can be decoded" in caplog.text


def test_prediction_on_a_video(clip: Path, model: tailseg.Model) -> None:
    found = list(model.predict(clip, batch=3))
    assert [one.source for one in found] == [f"{clip} frame {i}" for i in range(FRAMES)]
    frames = list(open_video(clip).frames())
    for one, frame in zip(found, frames, strict=True):
        assert one.image_hw == (64, 96)
        assert one.scores.tolist() == pytest.approx(model.predict(frame).scores.tolist(), abs=1e-4)
        assert np.array_equal(one.picture, frame)


def test_the_command_writes_a_video_and_lines_of_json(path: Path, model: tailseg.Model, clip: Path) -> None:
    out = clip.parent / "out"
    score = float(model.predict(next(open_video(clip).frames())).scores[2])
    done = tailseg_command("predict", path, clip, "--out", out, "--score", score, "--quiet")
    assert_done(done)
    rows = [json.loads(line) for line in (out / "clip.jsonl").read_text().splitlines()]
    objects, empty = sum(len(row["detections"]) for row in rows), sum(not row["detections"] for row in rows)
    assert done.stdout.startswith(f"{FRAMES} pictures, {objects} objects, {empty} empty")
    assert sorted(file.name for file in out.iterdir()) == ["clip.jsonl", "clip.mp4"]
    drawn = open_video(out / "clip.mp4")
    assert drawn.fps == pytest.approx(FPS)
    frames = list(drawn.frames())
    assert [frame.shape for frame in frames] == [(512, 768, 3)] * FRAMES  # enlarged: names need room
    assert [row["frame"] for row in rows] == list(range(FRAMES))
    assert [row["seconds"] for row in rows] == pytest.approx([i / FPS for i in range(FRAMES)])
    assert {(row["video"], row["height"], row["width"]) for row in rows} == {(str(clip), 64, 96)}
    found = model.predict(next(open_video(clip).frames()), score=score)
    assert [item["category"] for item in rows[0]["detections"]] == found.names

    done = tailseg_command("predict", path, clip, "--out", clip.parent, "--format", "json", "--limit", 4, "--quiet")
    assert_done(done)
    assert done.stdout.startswith("4 pictures, ")
    assert len((clip.parent / "clip.jsonl").read_text().splitlines()) == 4
    assert not (clip.parent / "clip.mp4").exists()


def test_a_video_is_never_written_over(path: Path, tmp_path: Path) -> None:
    with VideoFile(tmp_path / "a.mp4", 5) as video:
        for _ in range(2):
            video.add(rectangles())
    before = (tmp_path / "a.mp4").read_bytes()
    assert_done(tailseg_command("predict", path, tmp_path / "a.mp4", "--out", tmp_path, "--quiet"))
    assert (tmp_path / "a.mp4").read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["a-2.jsonl", "a-2.mp4", "a.mp4"]


def test_a_set_of_frames(path: Path, clip: Path) -> None:
    out = clip.parent / "set"
    done = tailseg_command("predict", path, clip, "--out", out, "--format", "labelme", "--limit", 2, "--quiet")
    assert_done(done)
    assert sorted(file.name for file in out.rglob("*.png")) == ["clip-000000.png", "clip-000001.png"]


def test_the_command_on_a_video_that_is_none(path: Path, tmp_path: Path) -> None:
    (tmp_path / "bad.mp4").write_bytes(b"no video at all")
    done = tailseg_command("predict", path, tmp_path / "bad.mp4", "--out", tmp_path / "out", "--quiet")
    assert_refused(done, "bad.mp4: not a video that can be decoded")
    assert done.stdout == ""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no such limit")
def test_a_video_that_the_disk_cannot_take_is_told(tmp_path: Path) -> None:
    """OpenCV's writer itself says nothing. What stood there before is left."""
    (tmp_path / "a.mp4").write_bytes(b"old")
    code = """
import resource, signal, sys
from pathlib import Path
import numpy as np
from tailseg.errors import UserError
from tailseg.predict.video import VideoFile
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))
noise = np.random.default_rng(0)
try:
    with VideoFile(Path("a.mp4"), 25) as video:
        for _ in range(15):
            video.add(noise.integers(0, 255, (240, 320, 3), dtype=np.uint8))
except UserError as error:
    sys.exit(str(error))
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, env=ENVIRONMENT)
    sentence = "a.mp4: the video could not be written; make room or choose another --out"
    assert (done.returncode, done.stderr) == (1, f"{sentence}\n")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == {"a.mp4": b"old"}


def test_a_video_has_its_name_when_it_is_whole(tmp_path: Path) -> None:
    path, frame = tmp_path / "a.mp4", np.zeros((32, 32, 3), np.uint8)
    with VideoFile(path, 25) as video:
        video.add(frame)
        assert not path.exists()
    assert [file.name for file in tmp_path.iterdir()] == ["a.mp4"]
    with pytest.raises(KeyboardInterrupt):
        interrupted(path, frame)
    assert len(list(open_video(path).frames())) == 3  # what was found until then


def interrupted(path: Path, frame: np.ndarray) -> None:
    with VideoFile(path, 25) as video:
        for _ in range(3):
            video.add(frame)
        raise KeyboardInterrupt
