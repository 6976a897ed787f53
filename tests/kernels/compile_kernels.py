"""Compiles every kernel for an H100 and prints the sizes of the results. Run as a script, where kernels are not interpreted."""

from __future__ import annotations

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memgen.kernels import triton_interleave, triton_logprob

FLOAT, ROW, INDEX = "*bf16", "*fp32", "*i64"
CASES = {
    "interleave": (
        triton_interleave._interleave_fwd_kernel,
        {"table": FLOAT, "tokens": INDEX, "latents": ROW, "sources": INDEX, "packed": FLOAT},
        {"TILE": 8, "BLOCK": 512},
    ),
    "interleave_bwd": (
        triton_interleave._interleave_bwd_kernel,
        {"grad": FLOAT, "order": INDEX, "starts": INDEX, "latents_grad": ROW},
        {"WIDE": tl.float32, "BLOCK": 512},
    ),
    "linear_logprob": (
        triton_logprob._linear_logprob_fwd_kernel,
        {"logits": FLOAT, "targets": INDEX, "logprobs": ROW, "normalisers": ROW, "entropies": ROW},
        {
            "V": 151_936,
            "WIDE": tl.float32,
            "ENTROPY": True,
            "DERIVATIVE": True,
            "BLOCK": 8192,
            "INVERSE": 1.25,
        },
    ),
    "linear_logprob_bwd": (
        triton_logprob._linear_logprob_bwd_kernel,
        {"logits": FLOAT, "normalisers": ROW, "entropies": ROW, "grads": ROW},
        {"WIDE": tl.float32, "BLOCK": 8192, "INVERSE": 1.25},
    ),
}

if __name__ == "__main__":
    for case, (kernel, pointers, constants) in CASES.items():
        signature = {
            name: "constexpr" if name in constants else pointers.get(name, "i32") for name in kernel.arg_names
        }
        places = {(kernel.arg_names.index(name),): value for name, value in constants.items()}
        compiled = triton.compile(
            ASTSource(fn=kernel, signature=signature, constexprs=places), target=GPUTarget("cuda", 90, 32)
        )
        sys.stdout.write(f"{case} {len(compiled.asm['cubin'])}\n")
