"""Lists the shipped weights, or describes a checkpoint: its size, its limits, its training.

Examples:
    dopfn-jax info
    dopfn-jax info do_pfn_cpu
    dopfn-jax info runs/cpu --json
"""

import argparse
import json
from typing import Any


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declares what the command takes."""
    parser.add_argument("checkpoint", nargs="?", help="a shipped name, a folder, or hf:OWNER/NAME")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")


def run(options: argparse.Namespace) -> None:
    """Prints.

    Raises:
        ValueError: no such checkpoint, or a damaged one.
    """
    facts = _installation() if options.checkpoint is None else describe(options.checkpoint)
    if options.json:
        print(json.dumps(facts, indent=2))
        return
    for name, value in facts.items():
        if name != "config":
            shown = ", ".join(value) if isinstance(value, list) else value
            print(f"{name.replace('_', ' ')}: {shown}")


def _installation() -> dict[str, Any]:
    import jax

    import dopfn_jax
    from dopfn_jax.checkpoints import DEFAULT_CHECKPOINT, checkpoint_names

    return {
        "version": dopfn_jax.__version__,
        "jax": jax.__version__,
        "devices": [str(device) for device in jax.devices()],
        "checkpoints": checkpoint_names(),
        "default_checkpoint": DEFAULT_CHECKPOINT,
    }


def describe(name_or_path: str) -> dict[str, Any]:
    """What a checkpoint is, in plain values.

    Raises:
        CheckpointError: nothing there, or damaged.
    """
    import jax

    from dopfn_jax.checkpoints import from_pretrained
    from dopfn_jax.estimators.inference import context_bytes, encoding_bytes

    checkpoint = from_pretrained(name_or_path)
    model, covariates = checkpoint.config.model, checkpoint.covariates
    return {
        "checkpoint": checkpoint.name,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(checkpoint.model)),
        "training_steps": checkpoint.steps,
        "most_covariates": covariates,
        "layers": model.layers,
        "width": model.width,
        "megabytes_of_a_context_of_1000_rows": context_bytes(model, 1000, covariates) / 1e6,
        "megabytes_to_encode_1000_rows": encoding_bytes(model, 1000, covariates) / 1e6,
        "config": checkpoint.config.to_dict(),
    }
