"""A workaround for a bug of jaxlib 0.10.2 on CPU: fusing a product with its reduction can give wrong results.

XLA fuses a matrix product or convolution, the elementwise operations after it and a sum or maximum over them into one YNNPACK
operation. For large arrays some of these fusions read wrong rows at the end (0.12.0.1 does not):

    jax.jit(jax.vmap(lambda row: jnp.sum((jnp.eye(3) @ row) ** 2)))     # wrong at the end of 32,769 rows

XLA_FLAGS=--xla_cpu_experimental_ynn_fusion_type=-reduce avoids it too, but makes training on CPU a quarter slower. Therefore
`apart` separates each product from its reduction.
"""

import jax
import jax.numpy as jnp
from jax import lax


def _unfusable(x):
    # Rounding to x's own precision changes nothing, but ends the fusion, since YNNPACK has no such operation. An
    # optimization_barrier does not help: the compiler removes it before it fuses.
    precision = jnp.finfo(x.dtype)
    return lax.reduce_precision(x, precision.nexp, precision.nmant)


@jax.custom_jvp
def apart(x: jax.Array) -> jax.Array:
    """The identity on floats; on CPU it is not fused with its consumer."""
    return lax.platform_dependent(x, cpu=_unfusable, default=lambda x: x)


@apart.defjvp
def _apart_jvp(primals, tangents):
    return apart(*primals), tangents[0]
