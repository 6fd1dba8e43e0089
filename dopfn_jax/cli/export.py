"""Writes a checkpoint as one file that runs on CPU, CUDA and TPU without this package's model code.

The file holds the compiled-for-everywhere program (StableHLO, for any numbers of context and query
rows) and the weights. Reading it back needs JAX, but neither Flax nor the checkpoint.

Examples:
    dopfn-jax export do_pfn_cpu --output do_pfn.zip
    dopfn-jax export runs/cpu --output server.zip --platforms cuda

In Python:
    from dopfn_jax.export import load

    predictor = load("do_pfn.zip")
    answer = predictor(x, t, y, query_x, query_t)   # float arrays, NaN where a covariate is missing
    answer.mean, answer.quantile(0.9)               # of p(y | do(query_t), query_x), a row each
"""

import argparse
import json
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what the command takes."""
    add = parser.add_argument
    add("checkpoint", help="a shipped name, a folder, or hf:OWNER/NAME")
    add("--output", type=Path, required=True, metavar="FILE", help="file to write")
    add("--platforms", nargs="+", metavar="P", help="of cpu, cuda and tpu (default: all)")
    add("--json", action="store_true", help="print one JSON object instead of text")


def run(options: argparse.Namespace) -> None:
    """Writes the file.

    Raises:
        ValueError: no such checkpoint or platform.
        OSError: the file cannot be written.
        ImportError: flatbuffers is missing.
    """
    from dopfn_jax.checkpoints import from_pretrained
    from dopfn_jax.cli.stages import say
    from dopfn_jax.export import PLATFORMS, export

    if not options.output.absolute().parent.is_dir():
        raise ValueError(f"--output {options.output}: there is no folder {options.output.parent}.")
    platforms = options.platforms or PLATFORMS
    checkpoint = from_pretrained(options.checkpoint)
    say(f"lowering the model for {', '.join(platforms)}")
    export(checkpoint, options.output, platforms)
    size = options.output.stat().st_size
    if options.json:
        facts = {"file": str(options.output), "bytes": size, "platforms": list(platforms)}
        print(json.dumps(facts, indent=2))
    else:
        print(f"{options.output}: {size / 1e6:.1f} MB, runs on {', '.join(platforms)}")
