"""Compiles the Seesaw kernels to machine code of two GPU generations; needs no GPU, but Triton's interpreter off."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from tailseg.losses import seesaw_triton

TYPES = {"logits": "*bf16", "gradient": "*bf16", "labels": "*i64", "valid": "*u8", "counts": "*i64", "ticket": "*i32"}
TYPES |= dict.fromkeys(("number", "classes", "last", "rows", "width", "row_stride"), "i32")
TYPES |= {"p": "fp32", "log_eps": "fp32"}  # the others are float32 tensors
MEAN = {"counted": True, "pair": True, "mean": True, "select": False, "has_valid": True}
SAMPLES = {"counted": False, "pair": False, "mean": False, "select": False, "has_valid": False}
WHOLE_ROW = {"q": 0.0, "block": 2048}
AT_ONCE = {"at_once": 1024}
CASES = [(seesaw_triton._count, {"has_valid": flag, "block": 1024}) for flag in (True, False)]
CASES += [(seesaw_triton._loss, MEAN | WHOLE_ROW | AT_ONCE), (seesaw_triton._loss, SAMPLES | WHOLE_ROW | AT_ONCE)]
CASES += [(seesaw_triton._loss, MEAN | {"q": 2.0, "block": 16384} | AT_ONCE)]
BACKWARD = {name: MEAN[name] for name in ("pair", "mean", "has_valid")}
CASES += [(seesaw_triton._gradient, BACKWARD | {"q": q, "block": block}) for q, block in ((0.0, 2048), (2.0, 16384))]
CASES += [(seesaw_triton._gradient, dict.fromkeys(BACKWARD, False) | WHOLE_ROW)]

for launcher, constants in CASES:
    kernel = launcher.kernel
    signature = {name: TYPES.get(name, "*fp32") for name in kernel.arg_names} | dict.fromkeys(constants, "constexpr")
    for architecture in (80, 90):
        options = launcher.options | {"num_warps": seesaw_triton._warps(constants["block"])}
        source = ASTSource(kernel, signature=signature, constexprs=constants)
        compiled = triton.compile(source, target=GPUTarget("cuda", architecture, 32), options=options)
        asserts = "assertion" if "__assertfail" in compiled.asm["ptx"] else "no-assertion"
        print(kernel.__name__, architecture, len(compiled.asm["cubin"]), asserts)
