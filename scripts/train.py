"""Trains a Do-PFN from its prior.

Examples:
    python scripts/train.py --config smoke --workdir runs/smoke
    python scripts/train.py --config do_pfn --mesh 8 --workdir runs/do_pfn
    python scripts/train.py --config cpu --workdir runs/cpu training.learning_rate=1e-3
"""

import argparse
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Sequence

from dopfn_jax.config import Config, ConfigError, preset_names


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parse(arguments)
    overrides = list(options.overrides)
    overrides += [f"training.steps={options.steps}"] if options.steps is not None else []
    overrides += [f"training.seed={options.seed}"] if options.seed is not None else []
    try:
        config = Config.load(options.config, overrides)
        if options.stop_after is not None and options.stop_after < 1:
            raise ConfigError(f"--stop-after {options.stop_after}: must be 1 or more")
        return _train(config, options)
    except (ValueError, RuntimeError, OSError) as error:
        # Our own errors say what to do, which a traceback would hide; others need theirs.
        if not isinstance(error, OSError) and not type(error).__module__.startswith("dopfn_jax"):
            raise
        print(f"train.py: {error}", file=sys.stderr)
        return 2


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--config", required=True, help=f"a preset ({', '.join(preset_names())}) or a TOML file")
    add("--workdir", required=True, help="folder for metrics, checkpoints and weights")
    add("--mesh", help="devices: N (data-parallel) or DxM (data x model); default: all there are")
    add("--resume", action="store_true", help="go on from the last checkpoint, if there is one")
    add("--init-from", help="start a new run from these weights: a shipped name or a folder")
    add("--steps", type=int, help="length of the schedule (training.steps)")
    add("--stop-after", type=int, help="stop at this step without changing the schedule")
    add("--seed", type=int, help="training.seed")
    add("overrides", nargs="*", metavar="section.field=value", help="changes to the config")
    return parser.parse_intermixed_args(arguments)


def _train(config: Config, options: argparse.Namespace) -> int:
    # After parsing, so that --help and typing errors do not wait for JAX.
    from dopfn_jax.checkpoints import from_pretrained
    from dopfn_jax.sharding import make_mesh, parse_mesh
    from dopfn_jax.training.host import keep_compiled_programs, keep_freed_memory
    from dopfn_jax.training.loop import train

    logging.getLogger("absl").setLevel(logging.ERROR)  # Orbax reports every file that it touches
    keep_freed_memory()
    keep_compiled_programs()
    mesh = make_mesh(parse_mesh(options.mesh) if options.mesh else None)
    init_from = from_pretrained(options.init_from) if options.init_from else None
    state = train(
        config,
        options.workdir,
        mesh,
        resume=options.resume,
        init_from=init_from,
        stop_after=options.stop_after,
    )
    step = int(state.step)
    print(f"{options.workdir}: {step} of {config.training.steps} steps done")
    if step < config.training.steps:
        print(f"go on with: {_resume_command(options)}")
    return 0


def _resume_command(options: argparse.Namespace) -> str:
    """The command that goes on with this run to its end; works as printed, from this folder."""
    python = shutil.which("python")
    same = python is not None and os.path.dirname(python) == os.path.dirname(sys.executable)
    words = ["python" if same else sys.executable, os.path.relpath(__file__)]
    for name in ("config", "workdir", "mesh", "init_from", "steps", "seed"):
        value = getattr(options, name)
        words += [] if value is None else [f"--{name.replace('_', '-')}", str(value)]
    return shlex.join([*words, "--resume", *options.overrides])


if __name__ == "__main__":
    sys.exit(main())
