"""Keeps XLA's CPU compiler from fusing a product with a reduction of it, which jaxlib 0.10.2 computes wrongly in places.

It puts a matrix product or convolution, what follows elementwise and a sum or maximum over that into one fusion of the
library YNNPACK. In the last rows of large arrays some of these fusions read other rows (0.12.0.1 does not):

    jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))     # wrong at the end of 32,769 rows

The compiler's option that leaves reductions to XLA cures it too, but makes training a fourth slower on CPU:
XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce. So the products that are reduced are kept apart one by one.
"""

import jax
import jax.numpy as jnp
from jax import lax


def _unfusable(x):
    # Rounding to the precision that x has changes nothing, but YNNPACK has no such operation, so a fusion ends there. An
    # optimization_barrier does not do: the compiler removes it before it fuses.
    precision = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, precision.nexp, precision.nmant)


@jax.custom_jvp
def apart(x: jax.Array) -> jax.Array:
    """x itself, of floats; on CPU it is in no fusion with what uses it."""
    return lax.platform_dependent(x, cpu=_unfusable, default=lambda x: x)


@apart.defjvp
def _apart_jvp(primals, tangents):
    return apart(*primals), tangents[0]
