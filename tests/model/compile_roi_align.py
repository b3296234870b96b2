"""Compiles the kernel of RoIAlign to machine code of an H100; needs no GPU, but Triton's interpreter off."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tailseg.model import roi_align_triton

FOUR = {"s0": 4, "s1": 8, "s2": 16, "s3": 32, "levels": 4, "side": 7, "samples": 0, "aligned": True}
ONE = {"s0": 8, "s1": 1, "s2": 1, "s3": 1, "levels": 1, "side": 14, "samples": 2, "aligned": False}
BLOCKS = {"cell_block": roi_align_triton.CELL_BLOCK, "channel_block": roi_align_triton.CHANNEL_BLOCK, "channels": 256}

kernel = roi_align_triton._roi_align_kernel
for settings, backward in ((FOUR, False), (FOUR, True), (ONE, True)):
    types = dict.fromkeys(roi_align_triton.TENSORS, "*fp32" if backward else "*bf16") | {"rois": "*fp32"}
    constants = settings | BLOCKS | {"vectors": not backward, "backward": backward}
    signature = {name: types.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    source = ASTSource(kernel, signature, constexprs=constants)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": 1})
    print(kernel.__name__, "backward" if backward else "forward", len(compiled.asm["cubin"]))
