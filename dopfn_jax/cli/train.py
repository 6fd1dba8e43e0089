"""Trains a Do-PFN from its prior, on one device, on a mesh of them, or on several machines.

Presets: do_pfn, do_pfn_graph, do_pfn_mixed, do_pfn_short, dont_pfn; for two cores cpu, cpu_wide,
do_pfn_graph_cpu, do_pfn_mixed_cpu, do_pfn_short_cpu, dont_pfn_cpu; smoke. Fields of a config are
changed by section.field=value (sections: prior, wide, model, training). Ctrl-C saves and prints the
command that goes on. The work directory holds metrics, checkpoints and weights; `dopfn-jax predict
--checkpoint` takes it.

Examples:
    dopfn-jax train --config smoke --workdir runs/smoke
    dopfn-jax train --config do_pfn --mesh 8 --workdir runs/do_pfn
    dopfn-jax train --config cpu --workdir runs/cpu training.learning_rate=1e-3
    srun dopfn-jax train --distributed --config do_pfn --workdir runs/do_pfn
"""

import argparse
import dataclasses
import json
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from dopfn_jax.checkpoints import Checkpoint
    from dopfn_jax.config import Config
    from dopfn_jax.training.step import TrainState


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what the command takes."""
    add = parser.add_argument
    add("--config", required=True, help="a preset, see above, or a TOML file")
    add("--workdir", required=True, help="folder for metrics, checkpoints and weights")
    add("--mesh", help="devices: N (data-parallel) or DxM (data x model); default: all there are")
    add("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    add("--init-from", help="start a new run from these weights: a shipped name or a folder")
    add("--steps", type=int, help="length of the schedule (training.steps)")
    add("--stop-after", type=int, help="stop at this step without changing the schedule")
    add("--seed", type=int, help="training.seed")
    add("--distributed", action="store_true", help="one of several processes; see docs/training.md")
    add("--evaluate-every", type=int, metavar="N", help="score the case studies every N steps")
    add("--data", type=Path, metavar="DIR", help="folder with case_studies_dev/, to score them")
    add("--peak", type=float, metavar="FLOPS", help="FLOP/s of all devices; default: measured")
    add("--profile", action="store_true", help="write a jax.profiler trace of a few steps")
    add("--json", action="store_true", help="print one JSON object instead of text at the end")
    add("overrides", nargs="*", metavar="section.field=value", help="changes to the config")


def run(options: argparse.Namespace) -> None:
    """Trains, and prints how far it came.

    Raises:
        ValueError: options, weights or a work directory that cannot be used.
        OSError: files that cannot be read or written.
        RuntimeError: the run cannot recover; the message names the steps.
    """
    # After parsing, so that --help and typing errors do not wait for JAX.
    import jax

    config = _config(options)
    steps_done = int(_train(config, options).step)
    if jax.process_index() != 0:
        return
    command = resume_command(options) if steps_done < config.training.steps else None
    if options.json:
        facts = {"workdir": options.workdir, "step": steps_done, "steps": config.training.steps}
        print(json.dumps({**facts, "resume_command": command}, indent=2))
        return
    print(f"{options.workdir}: {steps_done} of {config.training.steps} steps done")
    if command:
        print(f"go on with: {command}")


def _config(options: argparse.Namespace) -> "Config":
    from dopfn_jax.config import Config, ConfigError

    overrides = list(options.overrides)
    overrides += [f"training.steps={options.steps}"] if options.steps is not None else []
    overrides += [f"training.seed={options.seed}"] if options.seed is not None else []
    config = Config.load(options.config, overrides)
    for name in ("stop_after", "evaluate_every", "peak"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: must be 1 or more")
    if (options.evaluate_every is None) != (options.data is None):
        raise ConfigError("--evaluate-every and --data: give both or neither")
    return config


def _train(config: "Config", options: argparse.Namespace) -> "TrainState":
    import jax

    from dopfn_jax.checkpoints import from_pretrained
    from dopfn_jax.config import ConfigError
    from dopfn_jax.sharding import make_mesh, parse_mesh
    from dopfn_jax.training.flops import measured_peak
    from dopfn_jax.training.host import keep_compiled_programs, keep_freed_memory
    from dopfn_jax.training.loop import Observers, train
    from dopfn_jax.training.run_directory import has_checkpoint

    # Orbax reports every file that it touches; its errors also reach us as exceptions.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    keep_freed_memory()
    keep_compiled_programs()
    if options.distributed:
        try:
            # Finds the others through Slurm, Open MPI, Kubernetes or the TPU's own metadata.
            jax.distributed.initialize()
        except (ValueError, RuntimeError) as error:
            raise ConfigError(
                f"--distributed: cannot join the other processes ({error}); leave it out for one "
                "process, or start them as docs/training.md says"
            ) from error
    mesh = make_mesh(parse_mesh(options.mesh) if options.mesh else None)
    goes_on = options.resume and has_checkpoint(options.workdir)
    init_from = from_pretrained(options.init_from) if options.init_from and not goes_on else None
    observers = Observers(peak=options.peak or measured_peak(config, mesh), profile=options.profile)
    if options.data:
        observers = dataclasses.replace(
            observers,
            evaluate=_case_studies(options.data / "case_studies_dev", config.covariates),
            evaluate_every=options.evaluate_every,
        )
    return train(
        config,
        options.workdir,
        mesh,
        resume=options.resume,
        init_from=init_from,
        stop_after=options.stop_after,
        observers=observers,
    )


def _case_studies(folder: Path, covariates: int) -> "Callable[[Checkpoint], dict[str, float]]":
    """Scores weights on the released case studies: median normalised MSE by task and case.

    Leaves out datasets with more covariates than the weights will know. Only the first process
    scores, so the others need no files.
    """
    import pandas as pd

    from dopfn_jax.config import ConfigError
    from dopfn_jax.estimators import DoPFNRegressor
    from dopfn_jax.evaluation.datasets import load_datasets
    from dopfn_jax.evaluation.metrics import Answer, score
    from dopfn_jax.training.processes import is_first_process

    studies = [
        data
        for data in (load_datasets(folder) if is_first_process() else [])
        if data.x.shape[1] <= covariates and not data.is_degenerate
    ]
    if is_first_process() and not studies:
        raise ConfigError(
            f"{folder}: no dataset has at most {covariates} covariates, which is all that this "
            "prior draws; leave out --evaluate-every and --data"
        )

    def evaluate(checkpoint: "Checkpoint") -> dict[str, float]:
        rows = []
        for data in studies:
            model = DoPFNRegressor(checkpoint=checkpoint).fit(data.x, data.t, data.y)
            cid = model.predict(data.query_x, data.query_t)
            scores = score(data, Answer(cid=cid, cate=model.cate(data.query_x)))
            rows.append({f"{task}/{data.case}": scores[task] for task in ("cid", "cate")})
        return {str(name): float(value) for name, value in pd.DataFrame(rows).median().items()}

    return evaluate


def resume_command(options: argparse.Namespace) -> str:
    """The command that goes on with this run to its end; works as printed, from this folder."""
    python = shutil.which("python")
    same = python is not None and os.path.dirname(python) == os.path.dirname(sys.executable)
    script = Path(sys.argv[0])
    is_script = script.name == "train.py"
    program = [os.path.relpath(script)] if is_script else ["-m", "dopfn_jax.cli", "train"]
    words = ["python" if same else sys.executable, *program]
    names = ("config", "workdir", "mesh", "init_from", "steps", "seed")
    for name in (*names, "evaluate_every", "data", "peak"):
        value = getattr(options, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    words += ["--distributed"] if options.distributed else []
    return shlex.join([*words, "--resume", *options.overrides])
