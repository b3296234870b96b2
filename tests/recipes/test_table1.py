from tailseg.recipes.resolve import resolve
from tailseg.recipes.values import diff, flatten


def test_the_spec_of_table_1() -> None:
    """Spec, sections 2, 5, 6, 22 and 24, and the report's section 1.1."""
    flat = flatten(resolve("table1/seesaw").model_dump())
    expected = {
        "model.backbone.name": "resnet50.tv_in1k",
        "model.backbone.frozen_stages": 1,
        "classifier.loss": "seesaw",
        "classifier.normalized": True,
        "classifier.temperature": 20.0,
        "classifier.objectness": True,
        "classifier.p": 0.8,
        "classifier.q": 0.0,
        "data.short_edges": (640, 672, 704, 736, 768, 800),
        "data.test_short_edge": 800,
        "data.long_edge": 1333,
        "optimizer.name": "sgd",
        "optimizer.lr": 0.02,
        "optimizer.reference_batch": 16,
        "optimizer.momentum": 0.9,
        "optimizer.weight_decay": 1e-4,
        "optimizer.clip": None,
        "schedule.epochs": 12,
        "schedule.milestones": (8, 11),
        "schedule.gamma": 0.1,
        "schedule.warmup_steps": 500,
        "schedule.warmup_factor": 0.001,
        "training.precision": "fp32",
        "training.ema": None,
        "test.score_threshold": 1e-4,
        "test.nms_iou": 0.5,
        "test.max_detections": 300,
    }
    assert {key: flat[key] for key in expected} == expected


def test_equalization_loss_in_table_1() -> None:
    """Spec, sections 9 and 26: a plain linear layer, and λ for LVIS v1."""
    found = diff(resolve("table1/cross-entropy"), resolve("table1/eql"))
    assert found == [("classifier.loss", "cross-entropy", "eql"), ("classifier.threshold", None, 0.0011)]
    assert not resolve("table1/eql").classifier.normalized


def test_pairs_differ_in_the_classifier_only() -> None:
    for family in ("table1", "small", "demo"):
        found = diff(resolve(f"{family}/cross-entropy"), resolve(f"{family}/seesaw"))
        assert found == [
            ("classifier.loss", "cross-entropy", "seesaw"),
            ("classifier.normalized", False, True),
            ("classifier.objectness", None, True),
            ("classifier.p", None, 0.8),
            ("classifier.q", None, 0.0),
        ]
    assert diff(resolve("demo/seesaw"), resolve("demo/seesaw")) == []
