"""Compiles the CARAFE kernels to machine code of GPUs; needs no GPU, but Triton's interpreter off."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tailseg.layers import carafe_triton

TYPES = {"x": "*bf16", "out": "*bf16", "grad": "*bf16", "kernels": "*fp32", "result": "*fp32"}  # sizes are int32
WINDOWS = {80: {"groups": 1, "up": 2, "down": 1}, 90: {"groups": 2, "up": 1, "down": 2}}  # each on another generation
BLOCKS = {"channel_block": carafe_triton.CHANNEL_BLOCK, "cell_block": carafe_triton.CELL_BLOCK}
TAP_BLOCKS = {"channel_block": carafe_triton.TAP_CHANNEL_BLOCK, "cell_block": carafe_triton.TAP_CELL_BLOCK}
KERNELS = (
    (carafe_triton._forward_kernel, BLOCKS),
    (carafe_triton._grad_x_kernel, BLOCKS),
    (carafe_triton._grad_kernels_kernel, TAP_BLOCKS | {"tap_block": 32}),
)

for kernel, blocks in KERNELS:
    for architecture, window in WINDOWS.items():
        constants = {"k": 5, **window, **blocks}
        signature = {argument: TYPES.get(argument, "i32") for argument in kernel.arg_names}
        source = ASTSource(kernel, signature | dict.fromkeys(constants, "constexpr"), constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32))
        print(kernel.__name__, architecture, len(compiled.asm["cubin"]))
