"""Compiles the Seesaw kernels to machine code of two GPU generations; needs no GPU, but Triton's interpreter off."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tailseg.losses import seesaw_triton

TYPES = {"logits": "*bf16", "result": "*bf16", "labels": "*i64", "row_stride": "i64", "classes": "i32"}
TYPES |= {"log_eps": "fp32", "q": "constexpr", "block": "constexpr"}  # the others are float32 tensors

for kernel in (seesaw_triton._forward_kernel, seesaw_triton._backward_kernel):
    signature = {name: TYPES.get(name, "*fp32") for name in kernel.arg_names}
    for q in (0.0, 2.0):
        for architecture in (80, 90):
            source = ASTSource(kernel, signature=signature, constexprs={"q": q, "block": 1024})
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
            print(kernel.__name__, q, architecture, len(compiled.asm["cubin"]))
