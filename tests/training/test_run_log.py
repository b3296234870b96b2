"""The log of a run: lines of losses and evaluations, cut back to a checkpoint."""

import json
from pathlib import Path

import pytest
import torch

from tailseg.training.run_log import RunLog


@pytest.fixture
def log(tmp_path: Path) -> RunLog:
    return RunLog(tmp_path / "metrics.jsonl", writes=True)


def test_means_over_the_batches_since_the_last_line(log: RunLog) -> None:
    assert log.means()[:2] == ({}, 0)
    for value in (1.0, 2.0):
        log.collect({"box": torch.tensor(value), "mask": torch.tensor(4 * value)})
    means, batches, seconds = log.means()
    assert (means, batches) == ({"box": 1.5, "mask": 6.0}, 2)
    assert seconds >= 0
    assert log.means()[:2] == ({}, 0)


def test_metrics_of_a_step(log: RunLog) -> None:
    assert log.metrics_at(6) is None
    log.write({"step": 6, "loss": 1.0})
    assert log.metrics_at(6) is None
    log.write({"step": 6, "epoch": 1, "metrics": {"segm": {"AP": 0.25}}})
    log.write({"step": 12, "loss": 0.5})
    assert log.metrics_at(6) == {"segm": {"AP": 0.25}}
    assert log.metrics_at(12) is None


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 6, "metrics": {"sefm": {"AP": 0.5}}}',
        '{"step": 6, "metrics": {"segm": {"AP": "0.5"}}}',
        '{"step": 6, "metrics": {"segm": {"AQ": 0.5}}}',
        '{"step": 6, "metrics": [1]}',
        '{"step": "6", "metrics": {"segm": {"AP": 0.5}}}',
        '{"step": 6.0, "metrics": {"segm": {"AP": 0.5}}}',
        '{"step": 6' + "0" * 5000 + "}",
        "[" * 100_000,
    ],
    ids=range(8),
)
def test_damaged_lines_are_no_evaluations(log: RunLog, line: str) -> None:
    log.path.write_text(line + "\n")
    assert log.metrics_at(6) is None
    log.cut(6)


def test_cut_back_to_a_checkpoint(log: RunLog) -> None:
    rows = [{"step": 6, "loss": 1.0}, {"step": 6, "metrics": {"segm": {"AP": 0.5}}}, {"step": 8, "loss": 0.5}]
    for row in rows:
        log.write(row)
    with log.path.open("a") as file:
        file.write('{"step": 6, "metr')
    log.cut(6)
    assert [json.loads(line) for line in log.path.read_text().splitlines()] == rows[:2]
    assert log.metrics_at(6) == rows[1]["metrics"]


def test_a_log_cut_at_any_byte_goes_on(log: RunLog) -> None:
    rows = [{"step": 1, "loss": 1.0}, {"step": 2, "epoch": 1, "metrics": {"segm": {"AP": 0.5}}}, {"step": 3, "loss": 2}]
    for row in rows:
        log.write(row)
    whole = log.path.read_bytes()
    ends = [len(whole[: i + 1]) for i, byte in enumerate(whole) if byte == ord("\n")]
    for length in range(len(whole) + 1):
        for tail in (b"", b"\0\0\xff"):  # a file system may leave zeros, or anything
            log.path.write_bytes(whole[:length] + tail)
            log.cut(2)
            complete = sum(end <= length or (end - 1 == length and not tail) for end in ends)
            expected = rows[: min(complete, 2)]
            assert [json.loads(line) for line in log.path.read_text().splitlines()] == expected
            assert (log.metrics_at(2) is not None) == (complete >= 2)
            log.write({"step": 3, "loss": 0.5})
            assert json.loads(log.path.read_text().splitlines()[-1]) == {"step": 3, "loss": 0.5}
    assert [path.name for path in log.path.parent.iterdir()] == ["metrics.jsonl"]


def test_a_kill_while_the_log_is_cut_leaves_it_whole(log: RunLog, monkeypatch: pytest.MonkeyPatch) -> None:
    log.write({"step": 1, "loss": 1.0})

    def killed(*_: object) -> None:
        raise SystemExit

    monkeypatch.setattr("tailseg.training.run_log.os.replace", killed)
    with pytest.raises(SystemExit):
        log.cut(0)
    assert json.loads(log.path.read_text()) == {"step": 1, "loss": 1.0}


def test_another_process_writes_nothing(tmp_path: Path) -> None:
    other = RunLog(tmp_path / "metrics.jsonl", writes=False)
    other.write({"step": 1})
    other.cut(0)
    assert not other.path.exists()
