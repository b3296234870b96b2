import torch

from tailseg.training.learner import copy_values


def test_values_are_copied_in_a_call_for_each_type(monkeypatch):
    given = [torch.ones(2), torch.arange(3), torch.full((1, 2), 2.0), torch.zeros(0)]
    taken = [torch.zeros_like(value) for value in given]
    calls, copy = [], torch._foreach_copy_

    def counted(targets, sources):
        calls.append({value.dtype for value in targets})
        copy(targets, sources)

    monkeypatch.setattr(torch, "_foreach_copy_", counted)
    copy_values(given, taken)
    assert all(torch.equal(one, other) for one, other in zip(given, taken, strict=True))
    assert calls == [{torch.float32}, {torch.int64}]
    copy_values([], [])
    assert len(calls) == 2
