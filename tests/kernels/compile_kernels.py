"""Compiles every kernel for an H100 and prints the sizes of the results. Run as a script, where kernels are not interpreted."""

from __future__ import annotations

import sys

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from memgen.kernels import insert, logprob

FLOAT, ROW, INDEX, MASK = "*bf16", "*fp32", "*i64", "*i1"
CASES = {
    "weave": (
        insert._weave_fwd_kernel,
        {"table": FLOAT, "tokens": INDEX, "latents": ROW, "sources": INDEX, "woven": FLOAT},
        {"TILE": 8, "BLOCK": 512},
    ),
    "weave_rows": (
        insert._weave_rows_fwd_kernel,
        {"table": FLOAT, "latents": ROW, "woven": FLOAT, "latent_mask": MASK, "valid_mask": MASK}
        | dict.fromkeys(("tokens", "lengths", "points", "sizes", "firsts", "positions", "sources"), INDEX),
        {"POINTS": 8, "TILE": 8, "BLOCK": 512},
    ),
    "weave_bwd": (
        insert._weave_bwd_kernel,
        {"grad": FLOAT, "order": INDEX, "starts": INDEX, "latents_grad": ROW},
        {"WIDE": tl.float32, "BLOCK": 512},
    ),
    "linear_logprob": (
        logprob._linear_logprob_fwd_kernel,
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
        logprob._linear_logprob_bwd_kernel,
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
