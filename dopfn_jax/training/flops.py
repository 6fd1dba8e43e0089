"""Model FLOPs: the arithmetic that a training step needs, and what a device can do of it."""

import time

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from dopfn_jax.config import Config, TableShape


def model_flops(config: Config, shape: TableShape) -> float:
    """FLOPs of the matrix products of one training step on a batch of this shape.

    Forward, and twice that backward. Rows that exist, at the mean context size: padded rows and
    recomputation (`remat`) are no work that the model needs, so they do not count. Columns count
    as many as the shape has room for, which matters where tokens are cells. Embeddings, norms and
    softmax are left out; they are below a few per cent.
    """
    model = config.model
    width, group = model.width, model.features_per_token
    covariates = shape.covariates[1] if shape.wide else config.prior.covariates
    context = sum(shape.context) / 2
    query = shape.rows - context
    if config.training.effect_weight:
        low, high = shape.context
        asked = (shape.rows - low) // 2
        # Under both arms, those of the last rows that are no context.
        query = 2 * float(np.minimum(asked, shape.rows - np.arange(low, high + 1)).mean())
    tokens = -(-covariates // group) + 2 if group else 1  # of a row
    linear = 2 * width**2  # a square matrix, one token
    mlp = 2 * model.mlp_ratio * linear
    # Queries have no keys and values that anybody reads.
    reading = 4 * context * width
    context_row, query_row = 4 * linear + mlp + reading, 2 * linear + mlp + reading
    mixing = (context + query) * (4 * linear + 4 * tokens * width) if group else 0.0
    layer = tokens * (context * context_row + query * query_row + mixing)
    # Of the last layer's context, nothing but keys and values is read.
    unread = tokens * context * (context_row - 2 * linear)
    head = query * (2 * linear + 4 * width * model.buckets)
    return 3 * shape.tasks * (model.layers * layer - unread + head)


def measured_peak(config: Config, mesh: Mesh) -> float:
    """FLOP/s of a large matrix product on all devices of the mesh, in the model's arithmetic.

    Simulated devices share one processor, which counts once.
    """
    device = mesh.local_devices[0]
    on_cpu = device.platform == "cpu"
    size, products = (1024, 4) if on_cpu else (8192, 16)
    dtype = jnp.dtype(config.model.compute_dtype)

    @jax.jit
    def multiply(a: jax.Array) -> jax.Array:
        for _ in range(products):
            a = a @ a
        return a

    matrix = jax.device_put(jnp.full((size, size), 1 / size, dtype), device)
    multiply(matrix).block_until_ready()
    seconds = []
    for _ in range(5):
        start = time.perf_counter()
        multiply(matrix).block_until_ready()
        seconds.append(time.perf_counter() - start)
    devices = 1 if on_cpu else mesh.size
    return devices * products * 2 * size**3 / min(seconds)
