"""The parts of the page that show the validation set: images by their mistakes, and classes with examples."""

from __future__ import annotations

from typing import Any

import gradio as gr

from tailseg.app import html
from tailseg.app.browser import CLASS_HEAD, KIND_NAMES, MISTAKES, Browser, Query
from tailseg.data.annotations.frequency import GROUPS

ON_A_PAGE = 6  # images
EXAMPLES = 4  # of each kind, on the page of a class
ALL = ""
OPTIONS: dict[str, Any] = {
    "concurrency_limit": 4,
    "concurrency_id": "validation",
    "show_progress": "minimal",
    "api_visibility": "private",
}


class ValidationTab:
    """Handlers and layout.

    Args:
        browser: of the validation set.
    """

    def __init__(self, browser: Browser) -> None:
        self._browser = browser

    def images(self, kind: str, group: str, category: str | int, first: int) -> tuple[str, int]:
        """A page of images, and the position of its first one."""
        chosen = Query(
            kind if kind in KIND_NAMES else MISTAKES,
            category if isinstance(category, int) else None,
            group if group in [*GROUPS] else None,
        )
        images = self._browser.images(chosen)
        first = min(max(int(first or 0), 0), max((len(images) - 1) // ON_A_PAGE * ON_A_PAGE, 0))
        shown = images[first : first + ON_A_PAGE].tolist()
        if not shown:
            return html.note("No image has that."), 0
        last = first + len(shown)
        count = (
            f"Images {first + 1} to {last} of {len(images)}, most of it first; detections with a score of "
            f"{self._browser.findings.threshold:.2f} or more, the best F1 of all classes together."
        )
        return html.note(count) + html.pairs([self._pair(image, chosen) for image in shown]), first

    def one_class(self, category: int | None) -> str:
        """The page of a class."""
        browser = self._browser
        if category is None or not 0 <= category < len(browser.categories):
            return html.note("Choose a class, here or by a click on its row.")
        facts = html.facts(browser.categories[category]["name"], browser.class_facts(category))
        parts = [facts, browser.class_chart(category) or ""]
        for title, kind in (("Right", "right"), ("Mistakes", MISTAKES)):
            chosen = Query(kind, category)
            images = browser.images(chosen)[:EXAMPLES].tolist()
            if images:
                parts += [html.subheading(title), html.pairs([self._pair(image, chosen) for image in images])]
        return html.joined(parts)

    def _pair(self, image: int, chosen: Query) -> html.Pair:
        browser = self._browser
        return html.Pair(browser.name(image), browser.pair(image), browser.lines(image, chosen))

    def build(self) -> None:
        """Lay the parts out, inside of `gr.Tabs`."""
        with gr.Tab("Validation set", id="validation"):
            self._build_images()
        with gr.Tab("Classes", id="classes"):
            self._build_classes()

    def _build_images(self) -> None:
        browser = self._browser
        groups = [("all", ALL), *((name, key) for key, name in GROUPS.items() if key in browser.groups)]
        with gr.Row():
            kind = gr.Dropdown(
                [(name, key) for key, name in KIND_NAMES.items()], value=MISTAKES, label="Show", elem_id="kind"
            )
            group = gr.Dropdown(groups, value=ALL, label="Frequency group", visible=len(groups) > 1)
            category = gr.Dropdown([("all", ALL), *browser.class_choices()], value=ALL, label="Class")
        first = gr.State(0)
        with gr.Row():
            back, onward = gr.Button("Previous", size="sm"), gr.Button("Next", size="sm")
        shown = gr.HTML(self.images(MISTAKES, ALL, ALL, 0)[0], elem_id="validation")
        chosen = [kind, group, category]

        def begin(kind: str, group: str, category: str | int) -> tuple[str, int]:
            return self.images(kind, group, category, 0)

        def move(step: int) -> Any:
            return lambda kind, group, category, first: self.images(kind, group, category, first + step)

        gr.on([one.input for one in chosen], begin, chosen, [shown, first], **OPTIONS)
        back.click(move(-ON_A_PAGE), [*chosen, first], [shown, first], **OPTIONS)
        onward.click(move(ON_A_PAGE), [*chosen, first], [shown, first], **OPTIONS)

    def class_of_row(self, event: gr.SelectData) -> tuple[int | None, str]:
        """The class whose row of the table was clicked, and its page."""
        category = self._browser.class_named(str(event.row_value[0]))
        return category, self.one_class(category)

    def _build_classes(self) -> None:
        browser = self._browser
        table = gr.Dataframe(
            browser.class_table(),
            headers=list(CLASS_HEAD),
            datatype=["str", "str", *["number"] * 6],
            label="AP of masks, precision and recall in percent; the lowest AP first",
            interactive=False,
            max_height=330,
            elem_id="class-table",
        )
        category = gr.Dropdown(browser.class_choices(), value=None, label="Class", elem_id="class")
        shown = gr.HTML(self.one_class(None), elem_id="class-page")
        category.input(self.one_class, category, shown, **OPTIONS)
        table.select(self.class_of_row, None, [category, shown], **OPTIONS)
