"""Compiles the kernels of RoIAlign and of residual blocks for an H100; needs no GPU, but Triton's interpreter off."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tailseg.layers import fused_norm_triton
from tailseg.model import roi_align_triton

FOUR = {"s0": 4, "s1": 8, "s2": 16, "s3": 32, "levels": 4, "side": 7, "samples": 0, "aligned": True}
ONE = {"s0": 8, "s1": 1, "s2": 1, "s3": 1, "levels": 1, "side": 14, "samples": 2, "aligned": False}
MAPS = {"cell_block": roi_align_triton.CELL_BLOCK, "channel_block": roi_align_triton.CHANNEL_BLOCK, "channels": 256}
BLOCKS = {"place_block": fused_norm_triton.PLACE_BLOCK, "channel_block": fused_norm_triton.CHANNEL_BLOCK}
BLOCKS |= {"channels": 512, "added": True, "vectors": True}
FORWARD = dict.fromkeys(roi_align_triton.TENSORS, "*bf16") | {"rois": "*fp32"}
BACKWARD = dict.fromkeys(roi_align_triton.TENSORS, "*fp32")
NORM = dict.fromkeys(fused_norm_triton.TENSORS, "*fp32") | {"x": "*bf16", "shortcut": "*bf16", "eps": "fp32"}
CASES = (
    ("forward", roi_align_triton._roi_align_kernel, FORWARD, FOUR | MAPS | {"backward": False, "vectors": True}, 1),
    ("backward", roi_align_triton._roi_align_kernel, BACKWARD, ONE | MAPS | {"backward": True, "vectors": False}, 1),
    ("block", fused_norm_triton._norm_relu_kernel, NORM, BLOCKS, 4),
)

for name, kernel, types, constants, warps in CASES:
    signature = {each: types.get(each, "i32") for each in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps})
    by_eight = "ld.global.v4.b32" in compiled.asm["ptx"]
    print(name, len(compiled.asm["cubin"]), "wide" if by_eight else "narrow")
