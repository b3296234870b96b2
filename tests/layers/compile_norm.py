"""Compiles the kernels of batch norm to machine code of an H100; needs no GPU and no interpreter."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tailseg.layers import norm_triton

FLAGS = {"masked": True, "scaled": True, "shifted": True, "tracked": True}
TYPES = dict.fromkeys(("x", "y", "grad", "result"), "*bf16") | {"rows": "*u8", "shares": "*fp64"}
TYPES |= dict.fromkeys(("weight", "bias", "running_mean", "running_var", "kept", "sums"), "*fp32")
TYPES |= {"momentum": "fp32", "eps": "fp32"}  # the others are int32

for kernel in (
    norm_triton._statistics_kernel,
    norm_triton._values_kernel,
    norm_triton._sums_kernel,
    norm_triton._gradient_kernel,
):
    for last, (tile, width) in norm_triton.TILES.items():
        every = FLAGS | {"last": last, "tile": tile, "width": width}
        constants = {name: value for name, value in every.items() if name in kernel.arg_names}
        signature = {name: TYPES.get(name, "i32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32))
        print(kernel.__name__, last, len(compiled.asm["cubin"]))
