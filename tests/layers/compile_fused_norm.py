"""Compiles batch norm with shortcut and ReLU to machine code of an H100; needs no GPU, but Triton's interpreter off."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tailseg.layers import fused_norm_triton

TYPES = dict.fromkeys(fused_norm_triton.TENSORS, "*fp32") | {"x": "*bf16", "shortcut": "*bf16", "eps": "fp32"}
BLOCKS = {"place_block": fused_norm_triton.PLACE_BLOCK, "channel_block": fused_norm_triton.CHANNEL_BLOCK}

kernel = fused_norm_triton._norm_relu_kernel
for added in (True, False):
    constants = BLOCKS | {"channels": 512, "added": added, "vectors": True}
    signature = {name: TYPES.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    compiled = triton.compile(ASTSource(kernel, signature, constexprs=constants), target=GPUTarget("cuda", 90, 32))
    print(kernel.__name__, added, len(compiled.asm["cubin"]), "ld.global.v4.b32" in compiled.asm["ptx"])
