"""Cross-entropy against Seesaw on real photographs: repeated splits of the 128 pictures of coco128-lvis.

    python benchmarks/photographs.py [--out DIR] [--data FOLDER] [--splits 5] [--jobs 2]

The annotated pictures are divided again by each seed (a fifth of every class's pictures to validation, one at least to
training), and each division is trained on twice from ImageNet weights: `small/cross-entropy` and `small/seesaw`. What
is complete in DIR is not repeated and interrupted runs go on. Writes benchmarks/results/photographs.json and
docs/results/photographs.md.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from miniature import METRICS, ROOT, SEED, TITLES, Method, about, collect, differences, run_all, table, values

from tailseg.data.importers.split import class_images, stratified_validation
from tailseg.data.sources import open_splits
from tailseg.errors import UserError
from tailseg.recipes.resolve import resolve

PHOTOGRAPHS = ROOT.parent / "shared" / "data" / "coco128-lvis"
RECIPES = {"cross-entropy": "Cross-entropy", "seesaw": "Seesaw"}
COMMON = (
    *("schedule.epochs=20", "schedule.milestones=[14,18]", "training.evaluate_every=20"),
    *("data.short_edges=[192,224,256]", "data.test_short_edge=256", "data.long_edge=320"),
    # 80 of LVIS's 1,203 classes: limits of the groups and of detections that go with so few pictures and classes.
    *("data.rare_max=2", "data.common_max=5", "test.max_detections=20"),
)


def divide(source: Path, out: Path, seed: int) -> Path:
    """Write one division of the pictures in ``source``; returns the YAML file that names its parts."""
    parts = [json.loads((source / f"{split}.json").read_text()) for split in ("train", "val")]
    images = [row for part in parts for row in part["images"]]
    annotations = [row for part in parts for row in part["annotations"]]
    categories = [
        {key: row[key] for key in ("id", "name", "synset", "def", "synonyms")} for row in parts[0]["categories"]
    ]
    image_ids, category_ids = ([row["id"] for row in rows] for rows in (images, categories))
    pairs = class_images(annotations, image_ids, category_ids)
    chosen = stratified_validation(pairs, len(images), len(categories), 0.2, seed)
    folder = out / f"split-{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    for name, members in (("train", ~chosen), ("val", chosen)):
        ids = {image_ids[i] for i in np.flatnonzero(members).tolist()}
        rows = [row | {"id": number} for number, row in enumerate(annotations, start=1) if row["image_id"] in ids]
        content = {
            "images": [row for row in images if row["id"] in ids],
            "annotations": rows,
            "categories": categories,
        }
        (folder / f"{name}.json").write_text(json.dumps(content))
    file = folder / "data.yaml"
    file.write_text(f"train: train.json\nval: val.json\nimages: {json.dumps(str((source / 'images').resolve()))}\n")
    return file


def split_rows(file: Path, seed: int) -> dict[str, Method]:
    """Both methods on one division; the rows of all divisions are put together afterwards."""
    return {
        f"{name}-split{seed}": Method(title, COMMON, recipe=f"small/{name}", data=str(file))
        for name, title in RECIPES.items()
    }


def together(found: dict[str, Any], splits: int) -> dict[str, Any]:
    """A row a method, a run a division."""
    rows = {}
    for name, title in RECIPES.items():
        runs = [found[f"{name}-split{seed}"]["runs"][0] for seed in range(SEED, SEED + splits)]
        about = {"title": title, "command": found[f"{name}-split{SEED}"]["command"]}
        rows[name] = about | {"seeds": list(range(SEED, SEED + splits)), "runs": runs}
    return rows


def page(results: dict[str, Any]) -> str:
    found, data = results["methods"], results["data"]
    plain, seesaw = found["cross-entropy"], found["seesaw"]
    gain = differences(seesaw, plain)[1].replace(" [", " points of mask AP, 95 % interval [")
    wins = sum(a > b for a, b in zip(values(seesaw, "segm", "AP"), values(plain, "segm", "AP"), strict=True))
    lowest, highest = min(data["val_images"]), max(data["val_images"])
    return "\n".join(
        [
            "# Real photographs, a hundred of them",
            "",
            "<!-- made by benchmarks/photographs.py -->",
            "",
            f"On {data['images']} photographs with {data['classes']} classes, divided again {results['splits']} times, "
            f"Seesaw minus cross-entropy is {gain}; it is ahead in {wins} of {results['splits']} divisions. "
            f"The mask AP itself is {mean(values(seesaw, 'segm', 'AP')):.1f}: so few pictures teach a detector little "
            "that holds for new ones.",
            "",
            *_of_other_pixels(results),
            f"Both recipes start from ImageNet weights and see {results['images_seen']} images; {lowest} to {highest} "
            "pictures of a division are for validation. In a division a class is rare with at most 2 training "
            "pictures, common with 3 to 5; an image may have 20 detections, LVIS's 300 scaled by the classes. "
            "Percent, mean ± standard deviation over the divisions:",
            "",
            *table(found),
            "",
            "Difference of the two on the same division, with its 95 % interval (Student's t):",
            "",
            f"| | {' | '.join(TITLES)} |",
            "|---|" + "---:|" * len(METRICS),
            f"| Seesaw − Cross-entropy | {' | '.join(differences(seesaw, plain))} |",
            "",
            "The divisions share their pictures, so the interval is narrower than that of new pictures would be; a "
            "rare class has a handful of validation objects, so APr hangs on single ones. The table says whether the "
            "two losses train equally well on real pictures, not how far Seesaw helps on a long tail.",
            "",
            *(f"- **{method['title']}**: `{method['command']}`" for method in found.values()),
            "",
            f"Made by `python benchmarks/photographs.py` on {results['machine']}.",
            "",
        ]
    )


def _of_other_pixels(results: dict[str, Any]) -> list[str]:
    """What to know of results that the recipes of today would not give, as paragraphs."""
    now = resolve("small/seesaw").model.pixel_mean
    if results.get("pixel_mean") == list(now):
        return []
    return [
        "The runs were made before `small/*` scaled pixels as the weights of their network want it "
        f"(`model.pixel_mean` of {now[0]:g}): models of today's recipes will differ.",
        "",
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "photographs", help="folder of splits and runs")
    parser.add_argument("--data", type=Path, default=PHOTOGRAPHS, help="a data set in LVIS format")
    parser.add_argument("--splits", type=int, default=5)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, a thread each")
    arguments = parser.parse_args()
    if not (arguments.data / "train.json").is_file():
        sys.exit(f"photographs.py: {arguments.data}: holds no train.json; name a data set in LVIS format with --data")
    if arguments.splits < 2:
        parser.error("--splits: at least 2, for the spread")
    rows: dict[str, Method] = {}
    val_images = []
    for seed in range(SEED, SEED + arguments.splits):
        file = divide(arguments.data, arguments.out, seed)
        try:
            data = open_splits(file)
        except UserError as error:
            sys.exit(f"photographs.py: {error}")
        assert data.val is not None
        val_images.append(len(data.val))
        rows |= split_rows(file, seed)
    run_all(rows, 1, arguments.jobs, arguments.out)
    made = about(data, arguments.splits, arguments.out / f"cross-entropy-split{SEED}-{SEED}")
    steps = json.loads((arguments.out / f"seesaw-split{SEED}-{SEED}/metrics.jsonl").read_text().splitlines()[-1])[
        "step"
    ]
    assert data.train is not None
    results = {
        "data": {
            "classes": made["data"]["classes"],
            "images": len(data.train) + val_images[-1],
            "val_images": val_images,
        },
        "splits": arguments.splits,
        "images_seen": 4 * steps,  # a batch of the small recipes is 4
        "machine": made["machine"],
        "pixel_mean": resolve("small/seesaw").model.pixel_mean,
        "methods": together(collect(rows, 1, arguments.out), arguments.splits),
    }
    (ROOT / "benchmarks/results/photographs.json").write_text(json.dumps(results, indent=1) + "\n")
    (ROOT / "docs/results/photographs.md").write_text(page(results))
    print("\n".join(table(results["methods"])))


if __name__ == "__main__":
    main()
