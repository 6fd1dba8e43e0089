"""Runs in a process of its own, with eight simulated devices; prints what it saw as JSON.

Whole training steps on several meshes, with an optimiser that also keeps the gradient.
"""

import contextlib
import dataclasses
import hashlib
import io
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import Mesh

from dopfn_jax.config import Config, ModelConfig, PriorConfig, TableShape, TrainingConfig
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.prior import Task
from dopfn_jax.scm.noise import NOISE_FAMILIES
from dopfn_jax.sharding import MeshError, make_mesh, parse_mesh
from dopfn_jax.training import step as step_module
from dopfn_jax.training.score import score
from dopfn_jax.training.step import Trainer, TrainState, sample_batch
from scripts.train import main

SHAPE = TableShape(rows=20, context=(6, 12), tasks=8)
SMALL = ModelConfig(width=16, layers=2, mlp_ratio=2, heads=4, features_per_token=0, buckets=8)
# All that the prior can draw, and what compiles quickly.
PRIOR = PriorConfig(max_nodes=5, noise_families=NOISE_FAMILIES)
SMALL_PRIOR = PriorConfig(case_study="observed_confounder")
# Four heads can be split over two or four devices; two heads only over two.
ROW_TOKENS = Config(
    prior=SMALL_PRIOR,
    model=SMALL,
    training=TrainingConfig(steps=20, shapes=(SHAPE,), validation=SHAPE, warmup_steps=2),
)
CELL_TOKENS = dataclasses.replace(SMALL, heads=2, features_per_token=1)

# An entry for every program that is compiled, or taken from the compilation cache.
COMPILATIONS: list[str] = []


def count_compilation(event: str, duration: float, **_: Any) -> None:
    if event == "/jax/core/compile/backend_compile_duration":
        COMPILATIONS.append(event)


jax.monitoring.register_event_duration_secs_listener(count_compilation)


def mesh_of(name: str) -> Mesh:
    return make_mesh(parse_mesh(name))


def by_name(tree: Any) -> dict[str, Any]:
    paths, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in paths}


def digest(task: Task) -> str:
    leaves = [np.asarray(leaf).tobytes() for leaf in jax.tree.leaves(task)]
    return hashlib.sha256(b"".join(leaves)).hexdigest()


def data(name: str) -> str:
    """Digest of a batch on this mesh."""
    mesh = mesh_of(name)
    task = sample_batch(jax.random.key(0), PRIOR, SHAPE, mesh)
    return digest(jax.device_get(task))


def keep_gradient(make: Callable[..., optax.GradientTransformation]) -> Callable[..., Any]:
    """The same optimiser, with the last gradient in front of its state."""
    keep = optax.GradientTransformation(
        lambda params: jax.tree.map(jnp.zeros_like, params),
        lambda updates, state, params=None: (updates, updates),
    )
    return lambda *arguments: optax.chain(keep, make(*arguments))


def run(
    config: Config, name: str, start: TrainState | None, steps: int
) -> tuple[TrainState, dict[str, Any]]:
    """`steps` steps on this mesh from `start`, which it returns with what was seen."""
    trainer = Trainer(config, mesh_of(name))
    if start is None:
        start = trainer.init()
    # A copy, because steps donate it and meshes may share buffers.
    copy = jax.jit(lambda s: jax.tree.map(jnp.copy, s), out_shardings=trainer.shardings)
    state = copy(jax.device_put(start, trainer.shardings))
    losses, gradient, compiled = [], {}, []
    for k in range(steps):
        before = len(COMPILATIONS)
        with jax.transfer_guard("disallow"):
            state, metrics = trainer.step(state, SHAPE)
        compiled.append(len(COMPILATIONS) - before)
        losses.append(float(metrics.loss))
        if k == 0:
            gradient = {n: np.asarray(g) for n, g in by_name(state.opt_state[0]).items()}
    kept = jax.tree.map(lambda a: a.sharding, state)
    return start, {
        "losses": losses,
        "gradient": gradient,
        "compiled": compiled,
        "shardings": {n: list(s.spec) for n, s in by_name(kept.params).items()},
        "moments": {n: list(s.spec) for n, s in by_name(kept.opt_state).items()},
        "as_declared": jax.tree.leaves(kept) == jax.tree.leaves(trainer.shardings),
        "shares": {
            n: a.addressable_shards[0].data.size / a.size for n, a in by_name(state.params).items()
        },
    }


def cell_gradient(name: str, task: Task, params: Any, constants: Any) -> dict[str, np.ndarray]:
    """Gradient of a model with a token per cell, its parameters and the batch on this mesh."""
    trainer = Trainer(dataclasses.replace(ROW_TOKENS, model=CELL_TOKENS), mesh_of(name))
    split = jax.NamedSharding(trainer.mesh, jax.P("data"))

    def loss(params: Any, constants: Any, task: Task) -> jax.Array:
        return score(nnx.merge(trainer.graphdef, params, constants), task).loss

    gradient = jax.jit(
        jax.grad(loss),
        in_shardings=(trainer.shardings.params, trainer.shardings.constants, split),
        out_shardings=trainer.shardings.params,
    )
    with jax.set_mesh(trainer.mesh):
        return {n: np.asarray(g) for n, g in by_name(gradient(params, constants, task)).items()}


def errors(have: dict[str, np.ndarray], want: dict[str, np.ndarray]) -> dict[str, float]:
    """Relative norm of the difference, for every leaf."""
    return {
        name: float(np.linalg.norm(have[name] - want[name]) / np.linalg.norm(want[name]))
        for name in want
    }


def message_of(function: Callable[[], Any]) -> str:
    try:
        function()
    except MeshError as error:
        return str(error)
    return ""


def indivisible() -> dict[str, Any]:
    """The script on a mesh that does not divide the preset's batch."""
    with tempfile.TemporaryDirectory() as parent, contextlib.redirect_stderr(io.StringIO()) as err:
        folder = Path(parent, "run")
        code = main(["--config", "smoke", "--mesh", "3", "--workdir", str(folder)])
        return {"code": code, "message": err.getvalue(), "folder": folder.exists()}


def checks(
    optimizer: str,
    steps: int,
    data_meshes: list[str],
    step_meshes: list[str],
    cell_meshes: list[str],
) -> dict[str, Any]:
    mesh_of("8")  # first, because it decides how many devices there are
    step_module.make_optimizer = keep_gradient(step_module.make_optimizer)
    training = dataclasses.replace(ROW_TOKENS.training, optimizer=optimizer)
    config = dataclasses.replace(ROW_TOKENS, training=training)
    start, one = run(config, "1", None, steps)
    seen: dict[str, Any] = {"losses": {"1": one["losses"]}, "row_gradient": {}, "cell_gradient": {}}
    for name in step_meshes:
        _, many = run(config, name, start, steps)
        seen["losses"][name] = many.pop("losses")
        seen["row_gradient"][name] = errors(many.pop("gradient"), one["gradient"])
        seen[name] = many
    seen["data"] = {name: data(name) for name in data_meshes}

    model = nnx.jit(lambda: DoPFN(CELL_TOKENS, rngs=nnx.Rngs(0)))()
    params, constants = jax.device_get(nnx.state(model, nnx.Param, ...))
    task = jax.device_get(sample_batch(jax.random.key(0), PRIOR, SHAPE, mesh_of("1")))
    want = cell_gradient("1", task, params, constants)
    for name in cell_meshes:
        seen["cell_gradient"][name] = errors(cell_gradient(name, task, params, constants), want)

    seen["too_few"] = message_of(lambda: make_mesh((16, 1)))
    seen["indivisible"] = indivisible()
    return seen


if __name__ == "__main__":
    print(
        json.dumps(
            checks(sys.argv[1], int(sys.argv[2]), *(meshes.split(",") for meshes in sys.argv[3:]))
        )
    )
