"""Averages the weights of runs from a common start, and says whether the mean is better than each.

Prints the losses of each and of their mean on held-out tasks of the first one's prior, and writes
the mean as a checkpoint folder. A run that is named twice counts twice.

Examples:
    python scripts/train.py --config cpu --workdir runs/one --init-from do_pfn_cpu training.seed=1
    python scripts/train.py --config cpu --workdir runs/two --init-from do_pfn_cpu training.seed=2
    python scripts/average_weights.py runs/one runs/two --output runs/mean
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; returns the exit code."""
    options = _parse(arguments)
    try:
        _average(options)
    except (ValueError, OSError) as error:
        print(f"average_weights.py: {error}", file=sys.stderr)
        return 2
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="average_weights.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("checkpoints", nargs="+", metavar="CHECKPOINT", help="a shipped name, a folder or a run")
    add("--output", type=Path, required=True, metavar="DIR", help="folder of the mean")
    return parser.parse_args(arguments)


def _average(options: argparse.Namespace) -> None:
    # After parsing, so that --help and typing errors do not wait for JAX.
    from dopfn_jax.checkpoints import average, from_pretrained, save_checkpoint
    from dopfn_jax.sharding import make_mesh
    from dopfn_jax.training.step import Trainer

    checkpoints = [from_pretrained(name) for name in options.checkpoints]
    mean = average(checkpoints)
    trainer = Trainer(mean.config, make_mesh((1, 1)))
    by_name = {checkpoint.name: checkpoint.model for checkpoint in checkpoints}
    for name, model in {**by_name, "mean": mean.model}.items():
        losses = trainer.validate(trainer.with_weights(model))
        print(name, *(f"{key}={float(value):.4f}" for key, value in losses.items()), flush=True)
    save_checkpoint(options.output, mean.model, mean.config, mean.steps, seeds=mean.seeds)


if __name__ == "__main__":
    sys.exit(main())
