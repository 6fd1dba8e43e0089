"""How fast tasks come out of the prior, against a loop in NumPy and the published generator."""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
from jax.sharding import Mesh

from dopfn_jax.benchmarks.machine import cores
from dopfn_jax.benchmarks.numpy_prior import Workers
from dopfn_jax.benchmarks.timing import Contender, Measurement, race, rates
from dopfn_jax.config import PriorConfig, TableShape
from dopfn_jax.prior import Task
from dopfn_jax.scm.noise import NOISE_FAMILIES
from dopfn_jax.sharding import make_mesh
from dopfn_jax.training.step import sample_batch

OURS, LOOP, PUBLISHED = "dopfn_jax", "NumPy loop", "published generator"
# SCMs that a process draws in one call: enough for its messages not to count.
_LOOP_TASKS = 256


@dataclass(frozen=True)
class Setting:
    """Sizes of a batch. All units are observed, and nearly all of them also intervened on."""

    batch: int = 1024
    rows: int = 1000
    nodes: int = 7
    families: tuple[str, ...] = ("gaussian",)

    @property
    def prior(self) -> PriorConfig:
        """The paper's prior at this number of nodes, all covariates shown."""
        return PriorConfig(
            min_nodes=self.nodes,
            max_nodes=self.nodes,
            max_hidden=0,
            noise_families=self.families,
        )

    def shape(self, tasks: int) -> TableShape:
        """So many tasks at this number of rows."""
        return TableShape(rows=self.rows, context=(10, self.rows - 10), tasks=tasks)

    @property
    def names(self) -> dict[str, Any]:
        """As tables show it."""
        families = "all four" if len(self.families) > 1 else self.families[0]
        return {"batch": self.batch, "rows": self.rows, "nodes": self.nodes, "noise": families}


# The first is the one that targets are about: 1,000 rows and 5 covariates.
FULL = (
    Setting(),
    *(Setting(batch=batch) for batch in (1, 16, 256)),
    *(Setting(rows=rows) for rows in (100, 2200)),
    *(Setting(nodes=nodes) for nodes in (4, 12)),
    Setting(families=NOISE_FAMILIES),
)
QUICK = (Setting(),)
SMALLEST = (Setting(batch=8, rows=32, nodes=4),)


def measure(
    settings: tuple[Setting, ...], repetitions: int, published: Path | None
) -> Iterator[Measurement]:
    """Throughput of every setting.

    Args:
        settings: what to sample.
        repetitions: laps of every contender.
        published: a checkout of the published generator, which joins at the first setting.
    """
    meshes = [make_mesh((count, 1)) for count in sorted({1, len(jax.devices())})]
    with Workers(1) as one, Workers(cores()) as all_cores:
        for index, setting in enumerate(settings):
            contenders = [_ours(setting, mesh) for mesh in meshes if setting.batch % mesh.size == 0]
            contenders += [_loop(setting, workers) for workers in (one, all_cores)]
            if published and index == 0:
                contenders.append(_published(setting, published))
            laps = race(contenders, repetitions)
            quantities = {"SCMs": 1.0, "rows": float(setting.rows)}
            yield from rates("prior", setting.names, laps, quantities)


def _ours(setting: Setting, mesh: Mesh) -> Contender:
    prior, shape = setting.prior, setting.shape(setting.batch)
    sample = jax.jit(lambda key: sample_batch(key, prior, shape, mesh))
    keys = itertools.count()

    def run() -> Task:
        with jax.set_mesh(mesh):
            return sample(jax.random.key(next(keys)))

    return Contender(f"{OURS}, {mesh.size} {_plural('device', mesh.size)}", run, setting.batch)


def _loop(setting: Setting, workers: Workers) -> Contender:
    count = workers.processes
    return Contender(
        f"{LOOP}, {count} {_plural('process', count)}",
        partial(workers.sample, setting.prior, setting.shape(_LOOP_TASKS)),
        work=count * _LOOP_TASKS,
        cpu_clock=workers.cpu_clock,
    )


def _published(setting: Setting, folder: Path) -> Contender:
    """The released code's `get_batch`, an SCM a call: a batch of several would share one.

    It draws its hidden choices from global state, which it seeds by `seed`.
    """
    sys.path.insert(0, str(folder))
    try:
        import torch
        from priors.doscm import get_batch
    except ImportError as error:
        raise ValueError(
            f"--published {folder}: priors.doscm cannot be imported ({error}); give the root of a "
            "checkout of the released Do-PFN code, and install what it needs"
        ) from error
    finally:
        sys.path.remove(str(folder))
    torch.set_num_threads(1)
    hyperparameters = {
        "num_unobserved": 0,
        "noise_std": 0.3,
        "exo_std": 1.0,
        "zero_one_treatment": True,
        "inference_cov": "pre_interventional",
        "test": False,
        **dict.fromkeys(("graph", "t_idx", "y_idx", "x_idcs")),
    }
    seeds = itertools.count()

    def run() -> None:
        get_batch(
            batch_size=1,
            seq_len=setting.rows,
            num_features=setting.nodes - 2,
            hyperparameters={**hyperparameters, "seed": next(seeds)},
            device="cpu",
        )

    return Contender(f"{PUBLISHED}, 1 process", run)


def _plural(noun: str, count: int) -> str:
    ending = "es" if noun.endswith("s") else "s"
    return noun + (ending if count > 1 else "")
