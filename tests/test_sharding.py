import dataclasses

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P

from dopfn_jax.config import ModelConfig
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.sharding import MeshError, ShardingRules, make_mesh, parse_mesh, state_shardings


@pytest.mark.parametrize(
    ("text", "mesh"), [("1", (1, 1)), ("8", (8, 1)), ("4x2", (4, 2)), ("2X4", (2, 4))]
)
def test_mesh_text(text: str, mesh: tuple[int, int]) -> None:
    assert parse_mesh(text) == mesh


@pytest.mark.parametrize("text", ["", "0", "-1", "8x0", "x2", "4x", "4x2x1", "four", "4*2", "2.0"])
def test_a_mesh_that_cannot_be_read(text: str) -> None:
    with pytest.raises(MeshError, match=r"write the number of devices \(8\) or data x model"):
        parse_mesh(text)


def test_too_few_devices() -> None:
    jax.devices()  # from here on their number is fixed
    with pytest.raises(MeshError, match=r"a mesh of 1000x2 needs 2000 devices, found \d+ \(cpu\)"):
        make_mesh((1000, 2))


def test_all_devices_are_data_parallel_by_default() -> None:
    assert make_mesh().shape == {"data": jax.device_count(), "model": 1}


def test_rules_map_axes_and_replicate_the_rest() -> None:
    rules = ShardingRules()
    assert rules.spec((None, "embed", "mlp")) == P(None, "data", "model")
    assert dataclasses.replace(rules, embed=None).spec(("mlp", "embed")) == P("model", None)


def test_rules_that_collide_are_refused() -> None:
    with pytest.raises(ValueError, match="one mesh axis cannot split two"):
        ShardingRules().spec(("heads", "mlp"))
    with pytest.raises(ValueError, match="one mesh axis cannot split two"):
        ShardingRules(mlp="data").spec(("embed", "mlp"))


def test_an_axis_without_a_rule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"no rule for logical axes \['kv'\]"):
        ShardingRules().spec(("embed", "kv"))


@pytest.mark.parametrize(
    ("heads", "mesh", "query", "up"),
    [
        (4, (2, 2), P(None, "data", "model"), P(None, "data", "model")),
        # Two heads on a model axis of four: attention stays whole along the heads.
        (2, (2, 4), P(None, "data", None), P(None, "data", "model")),
        # A width of 12 on a data axis of eight stays whole.
        (4, (8, 2), P(None, None, "model"), P(None, None, "model")),
    ],
)
def test_what_a_mesh_axis_does_not_divide_stays_whole(
    heads: int, mesh: tuple[int, int], query: P, up: P
) -> None:
    config = ModelConfig(width=12, layers=2, heads=heads, features_per_token=0)
    params = nnx.state(nnx.eval_shape(lambda: DoPFN(config, rngs=nnx.Rngs(0))), nnx.Param)
    devices = AbstractMesh(mesh, ("data", "model"), axis_types=(AxisType.Auto,) * 2)
    shardings = state_shardings(params, devices, heads)
    layers = shardings["layers"]
    assert layers["row_attention"]["query"]["kernel"].get_raw_value().spec == query
    assert layers["up"]["kernel"].get_raw_value().spec == up
    assert shardings["head"]["kernel"].get_raw_value().spec == P(None, None)


def test_arrays_without_axes_are_replicated() -> None:
    shardings = state_shardings({"step": jnp.int32(0)}, make_mesh((1, 1)), 4)
    assert shardings["step"].spec == P()
