"""Number formats inside kernels: products and roundings that the interpreter gets right, too.

Triton's interpreter keeps bfloat16 as 16-bit integers. It would multiply those integers, and it
rounds by cutting bits off, twice as coarse as a GPU and always towards zero. What these functions
do beyond one call happens there only; a compiler never sees it.
"""

import triton
import triton.language as tl

from dflash_kernels._launch import is_interpreted

IS_INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def product(a, b, total):
    """Add the matrix product `a @ b` to `total`, in float32.

    float32 operands are multiplied as such: Triton's default would be tf32, with errors near 3e-4.
    """
    if IS_INTERPRETED:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, total, input_precision="ieee")


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """Round float32 to `dtype`, to the nearest and ties to even."""
    if IS_INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.uint32, bitcast=True)
        bits += 0x7FFF + ((bits >> 16) & 1)  # carries where the cut bits are above one half
        x = (bits & 0xFFFF0000).to(tl.float32, bitcast=True)
    return x.to(dtype)
