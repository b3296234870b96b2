"""Compiles the kernel of pasted masks to machine code of two GPU generations; needs no GPU and no interpreter."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tailseg.layers import paste_triton

TYPES = {"grids": "*fp32", "boxes": "*fp64", "numbers": "*i32", "offsets": "*i64", "places": "*i64"}  # others: int32
kernel = paste_triton._change_kernel
numbers = [one.name for one in kernel.params if one.name not in TYPES and not one.is_constexpr]
assert all(one.do_not_specialize for one in kernel.params if one.name in numbers)  # 1 pixel would be another kernel

for write in (False, True):
    constants = {"write": write, "block": paste_triton.ROWS_AT_ONCE}
    signature = {name: TYPES.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    for architecture in (80, 90):
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        options = {"enable_fp_fusion": False}
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        how = "inexact" if "fma.rn" in compiled.asm["ptx"] else "exact"
        print(kernel.__name__, write, architecture, len(compiled.asm["cubin"]), how)
