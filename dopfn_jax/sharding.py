"""The device mesh, and one set of rules from logical axes to mesh axes."""

import contextlib
import dataclasses
import math
import os
import sys
from dataclasses import dataclass
from typing import Any

import jax
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

# XLA's own way to simulate devices; JAX refuses to be told twice.
_SIMULATE_FLAG = "--xla_force_host_platform_device_count"


@dataclass(frozen=True)
class ShardingRules:
    """Which mesh axis splits each logical axis; None replicates.

    Tasks are data-parallel. Parameters and moments are split over "data" along the residual width
    (FSDP: a step gathers the parameters, which are small beside its activations) and over "model"
    along heads and the MLP's hidden width (tensor parallelism: activations stay split between the
    two products, one all-reduce after each).
    """

    task: str | None = "data"
    embed: str | None = "data"
    heads: str | None = "model"
    mlp: str | None = "model"

    def spec(self, axes: tuple[str | None, ...]) -> P:
        """PartitionSpec of an array with these logical axes.

        Raises:
            ValueError: an unknown axis, or two that would share a mesh axis.
        """
        rules = dataclasses.asdict(self)
        unknown = [axis for axis in axes if axis is not None and axis not in rules]
        if unknown:
            raise ValueError(f"no rule for logical axes {unknown}: known are {', '.join(rules)}")
        mesh_axes = [None if axis is None else rules[axis] for axis in axes]
        used = [axis for axis in mesh_axes if axis is not None]
        if len(used) != len(set(used)):
            raise ValueError(
                f"logical axes {axes} map to mesh axes {mesh_axes}: one mesh axis cannot split two"
            )
        return P(*mesh_axes)


class MeshError(ValueError):
    """A mesh that these devices or this run cannot have; the message names the remedy."""


def parse_mesh(text: str) -> tuple[int, int]:
    """`"8"` -> (8, 1): data-parallel; `"4x2"` -> (4, 2): data x model."""
    sizes = text.lower().split("x")
    if len(sizes) > 2 or not all(size.isdecimal() and int(size) > 0 for size in sizes):
        raise MeshError(f"--mesh {text!r}: write the number of devices (8) or data x model (4x2)")
    data, model = [int(size) for size in sizes] + [1] * (2 - len(sizes))
    return data, model


def make_mesh(shape: tuple[int, int] | None = None) -> Mesh:
    """A mesh with axes ("data", "model") over the first devices; by default all, data-parallel.

    On a host with no accelerator the devices are simulated on its CPU, with a message that says so.
    This must then be the first use of JAX in the process. Several processes share one mesh of all
    their devices; on CPUs, JAX_NUM_CPU_DEVICES says how many each of them has.

    Raises:
        MeshError: fewer devices than the mesh needs, or processes that it would leave out.
    """
    alone = not jax.distributed.is_initialized()
    if alone and shape is not None and _SIMULATE_FLAG not in os.environ.get("XLA_FLAGS", ""):
        # Only concerns the CPU platform, and raises once JAX has been used.
        with contextlib.suppress(RuntimeError):
            jax.config.update("jax_num_cpu_devices", math.prod(shape))
    devices = jax.devices()
    shape = shape or (len(devices), 1)
    count, platform = math.prod(shape), devices[0].platform
    if len(devices) < count:
        remedy = (
            "start a fresh process: CPU devices can only be simulated before JAX is first used"
            if platform == "cpu"
            else f"use --mesh {len(devices)} or fewer, or JAX_PLATFORMS=cpu to simulate devices"
        )
        raise MeshError(
            f"a mesh of {shape[0]}x{shape[1]} needs {count} devices, found {len(devices)} "
            f"({platform}): {remedy}"
        )
    if not alone and count < len(devices):
        raise MeshError(
            f"a mesh of {shape[0]}x{shape[1]} leaves out some of the {len(devices)} devices of "
            f"{jax.process_count()} processes: use all of them, or start fewer processes"
        )
    if alone and platform == "cpu" and count > 1:
        print(f"No accelerator: simulating {count} devices on this host's CPU.", file=sys.stderr)
    return jax.make_mesh(
        shape, ("data", "model"), axis_types=(AxisType.Auto,) * 2, devices=devices[:count]
    )


def state_shardings(abstract_state: Any, mesh: Mesh, heads: int) -> Any:
    """Shardings of a pytree of arrays: parameters and moments by the axes that the model gave them.

    An axis stays whole where its size, or the number of heads, is not a multiple of the mesh axis.
    Everything without logical axes is replicated.
    """
    rules = ShardingRules()
    if heads % mesh.shape["model"]:
        rules = dataclasses.replace(rules, heads=None)

    def of_variable(variable: Any) -> Any:
        axes = variable.get_metadata().get("axes", ()) if isinstance(variable, nnx.Variable) else ()

        def of_array(array: jax.ShapeDtypeStruct) -> NamedSharding:
            # Stacked layers put their axis in front; an optimiser's placeholders are smaller than
            # the parameter.
            stacked = array.ndim - len(axes)
            names = (None,) * stacked + tuple(axes) if stacked >= 0 else ()
            spec = [
                axis if axis is not None and size % mesh.shape[axis] == 0 else None
                for size, axis in zip(array.shape, rules.spec(names), strict=False)
            ]
            return NamedSharding(mesh, P(*spec))

        return jax.tree.map(of_array, variable)

    return jax.tree.map(
        of_variable, abstract_state, is_leaf=lambda node: isinstance(node, nnx.Variable)
    )
