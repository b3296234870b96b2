"""Compiles the NMS kernels to machine code of two GPU generations; needs no GPU, but Triton's interpreter off."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tailseg.model import nms_triton

TYPES = {"boxes": "*fp32", "labels": "*i64", "starts": "*i32", "words": "*i64", "valid": "*u8", "keep": "*u8"}
TYPES |= {"threshold": "fp32"}  # the others are int32
BOTH = {"lists": 5, "tile": nms_triton.TILE}
OPTIONS = {"num_warps": 8, "enable_fp_fusion": False}
KERNELS = (
    (nms_triton._overlap_kernel, BOTH | {"grouped": False}),
    (nms_triton._overlap_kernel, BOTH | {"grouped": True}),
    (nms_triton._keep_kernel, BOTH | {"row_block": nms_triton.ROW_BLOCK}),
)

for kernel, constants in KERNELS:
    for architecture in (80, 90):
        signature = {name: TYPES.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature, constexprs=constants)
        target = GPUTarget("cuda", architecture, 32)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=OPTIONS)
        ptx = compiled.asm["ptx"]
        exact = "fma.rn.f32" not in ptx and "div.full.f32" not in ptx
        print(kernel.__name__, architecture, len(compiled.asm["cubin"]), "exact" if exact else "inexact")
