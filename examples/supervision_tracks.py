"""The objects of a video followed from frame to frame with ByteTrack, listed and drawn.

    pip install 'tailseg[supervision]' && pip install --no-deps trackers
    python examples/supervision_tracks.py MODEL VIDEO OUT.mp4

supervision's trackers live in a package of their own, `trackers`. It asks for opencv-python, which would lie over the
opencv-python-headless of tailseg; with `--no-deps` it takes that one.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path

import supervision
from trackers import ByteTrackTracker

import tailseg
from tailseg.predict.video import VideoFile


def tracks(
    model: tailseg.Model, video: str, tracker: ByteTrackTracker, score: float = 0.1
) -> Iterator[tuple[tailseg.Detections, supervision.Detections]]:
    """Each frame with the objects that are followed in it; ``tracker_id`` says which is which.

    Ask for low scores: ByteTrack begins tracks at sure objects only, but continues them at unsure ones.
    """
    for frame in model.predict(video, score=score):
        objects = tracker.update(frame.to_supervision())
        yield frame, objects[objects.tracker_id >= 0]  # -1: not, or not yet


def main(arguments: list[str] | None = None) -> None:
    """Write the drawn video and print the frames of each track."""
    parser = argparse.ArgumentParser(description="Objects of a video, followed with ByteTrack.")
    parser.add_argument("model", help="a model file of tailseg")
    parser.add_argument("video", help="a video file")
    parser.add_argument("out", type=Path, help="the .mp4 file to be written")
    parser.add_argument("--sure", type=float, default=0.5, help="score from which a track begins (default 0.5)")
    given = parser.parse_args(arguments)
    fps = supervision.VideoInfo.from_video_path(given.video).fps
    tracker = ByteTrackTracker(
        frame_rate=fps, track_activation_threshold=given.sure, high_conf_det_threshold=given.sure
    )
    mask, trace, label = supervision.MaskAnnotator(), supervision.TraceAnnotator(), supervision.LabelAnnotator()
    seen: dict[str, list[int]] = {}  # frames of each track
    with VideoFile(given.out, fps) as video:
        for number, (frame, objects) in enumerate(tracks(tailseg.load(given.model), given.video, tracker)):
            names = [f"{track} {objects['class_name'][i]}" for i, track in enumerate(objects.tracker_id)]
            for name in names:
                seen.setdefault(name, []).append(number)
            drawn = trace.annotate(mask.annotate(frame.picture.copy(), objects), objects)
            video.add(label.annotate(drawn, objects, names))
    for name, frames in seen.items():
        print(f"{name}: {len(frames)} frames, {frames[0]} to {frames[-1]}")


if __name__ == "__main__":
    main()
