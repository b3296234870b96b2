"""The part of the page where pictures are dropped: masks, a lowest score, classes, a table, downloads."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr
from gradio.data_classes import FileData, ListFiles

from tailseg.app import html
from tailseg.app.pictures import (
    MOST_BYTES,
    MOST_PICTURES,
    TABLE_HEAD,
    Choice,
    Finder,
    Seen,
    classes_found,
    look,
    picture_shown,
    sentence,
    table,
)
from tailseg.app.sessions import Sessions
from tailseg.data.images import IMAGE_SUFFIXES

KEPT_FOR = 3600  # seconds after which a user's pictures are let go
DRAWN_AT_ONCE = 4  # pictures
NOTHING_YET = "Drop pictures to see what is in them."
GONE = "The pictures were let go, to make room or after an hour; drop them again."

Rows = list[list[str | float | int]]


def file_contents(payload: ListFiles | FileData | None) -> list[tuple[str, bytes]]:
    """Names and contents of uploaded files, of which one byte more than is allowed is read."""
    files = [] if payload is None else [payload] if isinstance(payload, FileData) else list(payload)
    return [(file.orig_name or Path(file.path).name, _content_of(Path(file.path))) for file in files]


def _content_of(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(MOST_BYTES + 1)


class DetectionTab:
    """Handlers and layout.

    Args:
        model: finds the objects.
        sessions: keeps what users have dropped.
    """

    def __init__(self, model: Finder, sessions: Sessions) -> None:
        self._model = model
        self._sessions = sessions
        self._one_at_a_time = Lock()

    def detect(self, files: Sequence[tuple[str, bytes]], key: str | None, score: float) -> tuple[Any, ...]:
        """Look at new pictures, which replace those before; results are updates of all that `build` lays out."""
        with self._one_at_a_time:
            seen, faults = look(self._model, files)
        self._sessions.drop(key)
        key = self._sessions.add(seen) if seen else None
        names = [(f"{number + 1}. {one.name}", number) for number, one in enumerate(seen)]
        several = len(seen) > 1
        return (
            *(key, None, html.faults(faults)),
            gr.Dropdown(choices=names, value=0 if seen else None, visible=several),
            gr.Dropdown(choices=classes_found(seen), value=[]),
            *self._shown(key, seen, 0, Choice(score)),
        )

    def show(self, key: str | None, position: int | None, score: float, labels: Sequence[int]) -> tuple[Any, ...]:
        """Draw what was found before."""
        seen = self._sessions.get(key)
        if not seen:
            return html.note(GONE if key else NOTHING_YET), "", [], ""
        return self._shown(key, seen, position or 0, Choice(score, frozenset(labels or ())))

    def _shown(
        self, key: str | None, seen: Sequence[Seen], position: int, choice: Choice
    ) -> tuple[str, str, Rows, str]:
        if key is None or not 0 <= position < len(seen):
            return "", "", [], ""
        about = sentence(seen, choice, position)
        drawn = html.picture(picture_shown(seen[position], choice), about)
        return html.note(about), drawn, table(seen[position], choice), html.links(key, choice)

    def build(self) -> None:
        """Lay the part out, inside of a `gr.Blocks`."""
        key = gr.State(None, time_to_live=KEPT_FOR, delete_callback=self._sessions.drop)
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                files = gr.File(
                    label=f"Pictures, up to {MOST_PICTURES}",
                    file_count="multiple",
                    file_types=["image", *IMAGE_SUFFIXES],
                    height=160,
                    elem_id="pictures",
                )
                # Whatever their type: it is the reader of pictures that refuses files, in its own words. Of a class
                # derived from `gr.File`, gradio would write a stub beside this module.
                files.preprocess = file_contents
                faults = gr.HTML(elem_id="faults")
                position = gr.Dropdown(label="Picture", choices=[], visible=False, elem_id="picture")
            with gr.Column(scale=3, min_width=320):
                with gr.Row():
                    score = gr.Slider(0, 1, 0.5, step=0.01, label="Lowest score", min_width=300, elem_id="score")
                    labels = gr.Dropdown(
                        label="Classes (none chosen: all)",
                        choices=[],
                        multiselect=True,
                        min_width=300,
                        elem_id="classes",
                    )
                about = gr.HTML(html.note(NOTHING_YET), elem_id="about")
                picture = gr.HTML(elem_id="result")
                links = gr.HTML(elem_id="downloads")
                rows = gr.Dataframe(
                    headers=list(TABLE_HEAD),
                    datatype=["str", "str", *["number"] * 6],
                    label="Objects; boxes and areas in pixels",
                    interactive=False,
                    max_height=360,
                    elem_id="objects",
                )
        shown = [about, picture, rows, links]
        files.upload(
            self.detect,
            [files, key, score],
            [key, files, faults, position, labels, *shown],
            concurrency_limit=1,
            concurrency_id="model",
            show_progress_on=[picture],
            api_name="detect",
        )
        gr.on(
            [score.change, labels.input, position.input],
            self.show,
            [key, position, score, labels],
            shown,
            concurrency_limit=DRAWN_AT_ONCE,
            concurrency_id="drawing",
            trigger_mode="always_last",
            show_progress="hidden",
            api_name="show",
        )
