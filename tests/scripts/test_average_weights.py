import runpy

import jax
import numpy as np
import pytest
from flax import nnx

from dopfn_jax.checkpoints import from_pretrained, save_checkpoint
from dopfn_jax.config import Config
from dopfn_jax.model.transformer import DoPFN

MAIN = runpy.run_path("scripts/average_weights.py")["main"]


def write(folder, config, seed):
    """A checkpoint of random weights, and its borders evenly spaced."""
    save_checkpoint(folder, DoPFN(config.model, rngs=nnx.Rngs(seed)), config, 10)
    return str(folder)


def params(checkpoint):
    return jax.tree.leaves(nnx.state(from_pretrained(checkpoint).model, nnx.Param))


@pytest.mark.slow
def test_the_mean_is_written_beside_the_losses_of_all(tmp_path, capsys):
    config = Config.load("smoke")
    one, two = write(tmp_path / "one", config, 1), write(tmp_path / "two", config, 2)
    assert MAIN([one, one, two, "--output", str(tmp_path / "mean")]) == 0
    for mean, a, b in zip(*map(params, (tmp_path / "mean", one, two)), strict=True):
        np.testing.assert_allclose(mean, (2 * a + b) / 3, atol=1e-6)
    assert from_pretrained(tmp_path / "mean").steps == 20  # each once
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == [one, two, "mean"]
    losses = [float(line.split("validation_loss=")[1].split()[0]) for line in lines]
    assert len(set(losses)) == 3 and np.isfinite(losses).all()


def test_weights_that_do_not_fit_together_are_refused(tmp_path, capsys):
    config = Config.load("smoke")
    one = write(tmp_path / "one", config, 1)
    other = write(tmp_path / "other", Config.load("smoke", ["model.buckets=7"]), 1)
    assert MAIN([one, other, "--output", str(tmp_path / "mean")]) == 2
    assert f"{other} has another architecture than {one}" in capsys.readouterr().err
    assert not (tmp_path / "mean").exists()
