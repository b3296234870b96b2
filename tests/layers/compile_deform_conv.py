"""Compiles the deformable kernels to machine code of two GPU generations; needs no GPU, but no interpreter either."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tailseg.layers import deform_conv_triton

CONSTANTS = {"taps": 9, "cell_block": deform_conv_triton.CELL_BLOCK, "channel_block": deform_conv_triton.CHANNEL_BLOCK}
TENSORS = ("features", "columns", "offset", "modulation", "grad_features", "grad_offset", "grad_modulation")

for kernel in (deform_conv_triton._gather_kernel, deform_conv_triton._scatter_kernel):
    for dtype in ("*bf16", "*fp32"):
        types = dict.fromkeys(TENSORS, "*fp32") | dict.fromkeys(("features", "columns"), dtype)
        types |= dict.fromkeys(CONSTANTS, "constexpr")
        signature = {name: types.get(name, "i32") for name in kernel.arg_names}
        for architecture in (80, 90):
            source = ASTSource(kernel, signature=signature, constexprs=CONSTANTS)
            compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
            print(kernel.__name__, dtype, architecture, len(compiled.asm["cubin"]))
