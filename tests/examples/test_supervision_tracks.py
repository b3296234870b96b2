import re
from pathlib import Path

import numpy as np
import pytest
from colour_model import colour_model, drawn, example
from predictions import save_random_model

from tailseg.predict.video import VideoFile, open_video

pytest.importorskip("supervision")
pytest.importorskip("trackers")
tracks = example("supervision_tracks")

HEIGHT, WIDTH, FRAMES = 101, 151, 20


@pytest.fixture
def video(tmp_path: Path) -> str:
    """Two forks that pass each other, one to the right and one to the left, and an owl from frame 8 on."""
    path = tmp_path / "in.mp4"
    with VideoFile(path, 10) as file:
        for t in range(FRAMES):
            owl = [(75, 85, 9, 2)] if t >= 8 else []
            file.add(drawn(HEIGHT, WIDTH, [(25 + 5 * t, 20, 10, 0), (125 - 5 * t, 55, 10, 0), *owl]))
    return str(path)


def followed(model: object, video: str) -> list[dict[int, tuple[str, float]]]:
    """For each frame: track -> its name and the x of its centre."""
    tracker = tracks.ByteTrackTracker(frame_rate=10, track_activation_threshold=0.5)
    rows = []
    for frame, objects in tracks.tracks(model, video, tracker):
        assert frame.image_hw == (HEIGHT + 1, WIDTH + 1)  # a video has even sides
        assert objects.mask.shape[1:] == frame.image_hw
        centres = (objects.xyxy[:, 0] + objects.xyxy[:, 2]) / 2
        numbers = objects.tracker_id.tolist()
        rows.append({n: (str(objects["class_name"][i]), float(centres[i])) for i, n in enumerate(numbers)})
    return rows


def test_objects_keep_their_number(video: str) -> None:
    rows = followed(colour_model(HEIGHT + 1), video)
    assert len(rows) == FRAMES
    assert rows[0] == {}  # a track begins with its second frame
    assert all(len(row) == 2 for row in rows[1:9])
    assert all(len(row) == 3 for row in rows[9:])
    right, left = sorted(rows[1], key=lambda n: rows[1][n][1])
    for t, row in enumerate(rows[1:], start=1):
        assert row[right] == ("fork", pytest.approx(25.5 + 5 * t, abs=2))
        assert row[left] == ("fork", pytest.approx(125.5 - 5 * t, abs=2))
    (owl,) = set(rows[9]) - {right, left}
    assert all(row[owl] == ("owl", pytest.approx(75.5, abs=2)) for row in rows[9:])


def test_a_video_without_objects(tmp_path: Path) -> None:
    with VideoFile(tmp_path / "empty.mp4", 10) as file:
        for _ in range(3):
            file.add(drawn(HEIGHT, WIDTH, []))
    tracker = tracks.ByteTrackTracker()
    assert [len(objects) for _, objects in tracks.tracks(colour_model(100), str(tmp_path / "empty.mp4"), tracker)] == [
        0, 0, 0,
    ]  # fmt: skip


def test_the_command_lists_the_tracks_and_draws(
    video: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(tracks.tailseg, "load", lambda path: colour_model(HEIGHT + 1))
    tracks.main(["m.safetensors", video, str(tmp_path / "out.mp4")])
    lines = sorted(line.split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines())
    assert lines == ["fork: 19 frames, 1 to 19", "fork: 19 frames, 1 to 19", "owl: 11 frames, 9 to 19"]
    out = open_video(tmp_path / "out.mp4")
    assert out.fps == 10
    before, after = list(open_video(Path(video)).frames()), list(out.frames())
    assert len(after) == FRAMES
    assert np.abs(after[15].astype(int) - before[15]).max() > 50  # drawn on
    assert np.abs(after[0].astype(int) - before[0]).mean() < 8  # nothing is followed yet


def test_the_command_takes_a_model_file(video: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of random weights."""
    save_random_model(tmp_path / "m.safetensors")
    tracks.main([str(tmp_path / "m.safetensors"), video, str(tmp_path / "out.mp4")])
    lines = capsys.readouterr().out.splitlines()
    assert lines
    assert all(re.fullmatch(r"\d+ (fork|egg_cup|owl): \d+ frames, \d+ to \d+", line) for line in lines)
    assert len(list(open_video(tmp_path / "out.mp4").frames())) == FRAMES
