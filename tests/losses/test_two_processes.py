"""Two processes with half a batch each learn what one process learns with the whole (gloo)."""

import importlib.util
from pathlib import Path

import pytest
import torch
from tiny import run_together

SCRIPT = Path(__file__).with_name("half_a_batch.py")


@pytest.fixture(scope="module")
def half_a_batch():
    spec = importlib.util.spec_from_file_location("half_a_batch", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def halves(tmp_path_factory):
    folder = tmp_path_factory.mktemp("processes")
    outs = [folder / f"{rank}.pt" for rank in range(2)]
    assert run_together(str(SCRIPT), *((rank, folder / "meet", out) for rank, out in enumerate(outs))) == [0, 0]
    return [torch.load(out, weights_only=True) for out in outs]


@pytest.mark.parametrize("name", ["seesaw", "compensated", "classification", "eql-v2"])
def test_losses_gradients_and_counts_are_those_of_one_process(half_a_batch, halves, name):
    whole = half_a_batch.learn(half_a_batch.kinds()[name], slice(None), average=False)
    for half in halves:
        assert half[name].keys() == whole.keys()
        for key, value in half[name].items():
            if value.dtype == torch.int64:
                assert torch.equal(value, whole[key])
            else:
                # EQL v2 keeps its gradients in float32, added up in another order.
                loose = {"rtol": 1e-5, "atol": 1e-7} if name == "eql-v2" else {"rtol": 1e-12, "atol": 1e-13}
                torch.testing.assert_close(value, whole[key], **loose)


def test_unsynchronised_counts_are_of_each_process_alone(half_a_batch, halves):
    whole = half_a_batch.learn(half_a_batch.kinds()["seesaw"], slice(None), average=False)
    counts = [half["unsynchronised"]["counts"] for half in halves]
    assert not torch.equal(counts[0], counts[1])
    assert torch.equal(counts[0] + counts[1], whole["counts"])


def test_counts_of_a_group_are_those_of_its_processes(halves):
    for half in halves:
        assert torch.equal(half["group of one"]["counts"], half["unsynchronised"]["counts"])
