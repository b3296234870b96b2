import torch
from torch import Tensor
from torch.autograd import forward_ad

from tailseg.layers.watched import is_transformed, is_watched


def test_transforms_and_forward_derivatives_watch():
    seen = []

    def noted(x: Tensor) -> Tensor:
        seen.append((is_transformed(), is_watched()))
        return x.sum()

    x = torch.ones(2, 3)
    noted(x.clone().requires_grad_()).backward()
    torch.func.grad(noted)(x)
    torch.func.vmap(noted)(x)
    with forward_ad.dual_level():
        noted(forward_ad.make_dual(x, x))
    noted(x)
    assert seen == [(False, False), (True, True), (True, True), (True, True), (False, False)]


def test_a_compiler_watches():
    torch.compiler.reset()

    @torch.compile(backend="eager", fullgraph=True)
    def step(x: Tensor) -> Tensor:
        return x + 1 if is_watched() else x

    assert step(torch.zeros(2)).tolist() == [1, 1]
