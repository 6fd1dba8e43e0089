"""Model FLOPs against a count of the matrix products that the model makes."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

from dopfn_jax.config import Config, TableShape
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.sharding import make_mesh
from dopfn_jax.training.flops import measured_peak, model_flops

SHAPE = TableShape(rows=1500, context=(1000, 1000), tasks=2)


def matrix_flops(jaxpr: Any) -> float:
    """FLOPs of all products in a jaxpr; loops count as often as they run."""
    total = 0.0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            left = equation.invars[0].aval.shape
            inner = math.prod(left[axis] for axis in contracted)
            total += 2 * inner * math.prod(equation.outvars[0].aval.shape)
        for value in equation.params.values():
            inside = getattr(value, "jaxpr", value)
            if hasattr(inside, "eqns"):
                total += equation.params.get("length", 1) * matrix_flops(inside)
    return total


@pytest.mark.parametrize("preset", ["do_pfn", "cpu"])
@pytest.mark.parametrize("group", [0, 1, 3])
def test_equals_three_forward_passes(preset: str, group: int) -> None:
    config = Config.load(preset, ["model.remat=false", f"model.features_per_token={group}"])
    graphdef, state = nnx.split(nnx.eval_shape(lambda: DoPFN(config.model, rngs=nnx.Rngs(0))))
    n, m, f = 1000, 500, config.prior.covariates
    shapes = [(n, f), (n,), (n,), (n,), (f,), (m, f), (m,)]
    dtypes = [jnp.float32] * 3 + [jnp.bool] * 2 + [jnp.float32] * 2
    inputs = [
        jax.ShapeDtypeStruct((SHAPE.tasks, *shape), dtype)
        for shape, dtype in zip(shapes, dtypes, strict=True)
    ]
    forward = jax.make_jaxpr(lambda state, *inputs: nnx.merge(graphdef, state)(*inputs)[0])
    counted = 3 * matrix_flops(forward(state, *inputs).jaxpr)
    assert model_flops(config, SHAPE) == pytest.approx(counted, rel=0.05)
    assert model_flops(config, SHAPE) <= counted  # embeddings are left out


def test_queries_under_both_arms_count_where_they_exist() -> None:
    config = Config()
    training = dataclasses.replace(config.training, effect_weight=1.0)
    both = dataclasses.replace(config, training=training)
    # Of 500 query rows the last 250, twice.
    assert model_flops(both, SHAPE) == model_flops(config, SHAPE)
    # Of the last 150 rows 100 or more are queries, 143.7 on average.
    varied = dataclasses.replace(SHAPE, rows=1200, context=(900, 1100))
    fewer, more = (dataclasses.replace(SHAPE, rows=rows) for rows in (1287, 1288))
    assert model_flops(config, fewer) < model_flops(both, varied) < model_flops(config, more)


def test_padding_and_recomputation_do_not_count() -> None:
    config = Config()
    padded = dataclasses.replace(SHAPE, context=(900, 1100))
    assert model_flops(config, padded) == model_flops(config, SHAPE)
    remat = dataclasses.replace(config, model=dataclasses.replace(config.model, remat=True))
    assert model_flops(remat, SHAPE) == model_flops(config, SHAPE)


def test_a_peak_is_measured() -> None:
    assert measured_peak(Config(), make_mesh()) > 1e8
