import csv
import json
from pathlib import Path

import pytest

from tailseg.errors import UserError
from tailseg.evaluation.run_files import RunFiles, find_runs

CLASSES = [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}]


def evaluation(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "detections.json").write_text("[]")
    return folder


def test_what_a_run_can_be(tmp_path: Path) -> None:
    own = evaluation(tmp_path / "own")
    file = tmp_path / "found.json.gz"
    file.write_bytes(b"")
    trained = evaluation(tmp_path / "trained")
    (trained / "recipe.yaml").write_text("")
    found = find_runs([own, str(file), trained], "photos", "val")
    assert [run.detections for run in found] == [own / "detections.json", file, trained / "detections.json"]
    assert [run.folder for run in found] == [own, None, trained]
    assert [run.name for run in found] == [str(own), str(file), str(trained)]
    # An evaluation on the data at hand comes before that of the training.
    later = evaluation(trained / "eval-photos-val")
    assert find_runs([own, trained], "photos", "val")[1].folder == later
    assert find_runs([own, trained], "others", "val")[1].folder == trained


def test_a_training_was_not_evaluated_on_its_training_split(tmp_path: Path) -> None:
    own, trained = evaluation(tmp_path / "own"), evaluation(tmp_path / "trained")
    (trained / "recipe.yaml").write_text("")
    message = rf"^{trained}: has no detections.json of photos, train; evaluate first, with `tailseg eval {trained}"
    with pytest.raises(UserError, match=message):
        find_runs([own, trained], "photos", "train")
    later = evaluation(trained / "eval-photos-train")
    assert find_runs([own, trained], "photos", "train")[1].folder == later


def test_what_is_no_run(tmp_path: Path) -> None:
    own = evaluation(tmp_path / "own")
    (tmp_path / "model.safetensors").write_bytes(b"")
    evaluation(tmp_path / "run" / "eval-photos-val")
    (tmp_path / "empty").mkdir()
    for runs, message in (
        ([own], f"^{own}: a comparison needs two runs or more"),
        ([], "^no run: a comparison needs two runs or more"),
        ([own, tmp_path / "gone"], "gone: no such folder or file"),
        ([own, tmp_path / "model.safetensors"], "is a model; name the folder of its evaluation"),
        ([own, tmp_path / "empty"], "empty: has no detections.json of set, val; evaluate first"),
        ([own, tmp_path / "run"], "run: has no detections.json of set, val; did you mean .*run/eval-photos-val"),
        ([own, own / "detections.json"], "detections.json: has the same detections as .*own; name each run once"),
    ):
        with pytest.raises(UserError, match=message):
            find_runs(runs, "set", "val")


def with_classes(folder: Path, rows: list[tuple[object, ...]]) -> RunFiles:
    with (folder / "classes.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "name", "frequency", "bbox_AP"), *rows])
    return RunFiles(name="run", detections=folder / "detections.json", folder=folder)


def test_groups_of_an_evaluation(tmp_path: Path) -> None:
    assert with_classes(tmp_path, [(5, "dog", "r", ""), (3, "cat", "f", 0.5)]).groups(CLASSES) == {3: "f", 5: "r"}
    assert with_classes(tmp_path, [(5, "dog", "", ""), (3, "cat", "f", 0.5)]).groups(CLASSES) is None
    assert RunFiles(name="run", detections=tmp_path / "d.json", folder=None).groups(CLASSES) is None
    (tmp_path / "classes.csv").unlink()
    assert RunFiles(name="run", detections=tmp_path / "d.json", folder=tmp_path).groups(CLASSES) is None


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([(3, "cat", "f", 1), (5, "wolf", "f", 1)], "category 5 is 'wolf' there but 'dog' in the data"),
        ([(3, "cat", "f", 1)], "category 5 is missing there but 'dog' in the data"),
        ([(3, "cat", "f", 1), (5, "dog", "f", 1), (6, "owl", "f", 1)], "category 6 is 'owl' there but missing in"),
        ([("x", "cat", "f", 1)], "is not a table of classes"),
    ],
)
def test_other_classes(tmp_path: Path, rows: list[tuple[object, ...]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_classes(tmp_path, rows).groups(CLASSES)


def test_the_evaluation_was_on_this_data(tmp_path: Path) -> None:
    run = RunFiles(name="run", detections=tmp_path / "detections.json", folder=tmp_path)
    run.require_same_score("bbox", 0.5, "photos")  # there are no metrics
    metrics = tmp_path / "metrics.json"

    def state(**values: float | None) -> None:
        metrics.write_text(json.dumps({"bbox": values}))

    state(AP=0.5, AR300=0.6)
    run.require_same_score("bbox", 0.5 + 1e-9, "photos")
    with pytest.raises(UserError, match=r"its bbox AP is 50.00, but its detections have 40.00 on photos;"):
        run.require_same_score("bbox", 0.4, "photos")
    with pytest.raises(UserError, match=r"its bbox AP is 50.00, but its detections have none on photos;"):
        run.require_same_score("bbox", None, "photos")
    state(AP=None, AR300=None)
    run.require_same_score("bbox", None, "photos")
    state(AP=0.5, AR100=0.6)  # with another limit
    run.require_same_score("bbox", 0.4, "photos")
    state(AR300=0.5)
    with pytest.raises(UserError, match="has no bbox AP as `tailseg eval` writes it"):
        run.require_same_score("bbox", 0.4, "photos")
    metrics.write_text("[")
    with pytest.raises(UserError, match="has no bbox AP"):
        run.require_same_score("bbox", 0.4, "photos")
