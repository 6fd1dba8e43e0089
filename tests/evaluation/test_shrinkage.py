import dataclasses

import numpy as np
import pytest
from flax import nnx

import dopfn_jax.evaluation.shrinkage as module
from dopfn_jax.checkpoints import from_pretrained
from dopfn_jax.evaluation.shrinkage import KINDS, shrinkage


@pytest.fixture
def two_small_kinds(monkeypatch):
    kinds = [kind._replace(rows=120, noise=(0.01, 0.02)) for kind in (KINDS[0], KINDS[5])]
    monkeypatch.setattr(module, "KINDS", kinds)


@pytest.mark.slow
def test_little_noise_shrinks_nothing_and_a_silent_model_everything(two_small_kinds) -> None:
    checkpoint = from_pretrained("do_pfn_wide_cpu")
    clean, after = shrinkage(checkpoint, tables=16).to_dict("records")
    assert clean["count"] > 8 and clean["noise"] == "0.01 to 0.02"
    assert clean["slope"] == pytest.approx(1, abs=0.1)
    assert clean["rms"] < 0.1 and clean["rms_linear"] < 0.3
    assert after["rms_linear"] > 2 * clean["rms_linear"]

    model = nnx.clone(checkpoint.model)
    model.head.kernel[...] *= 0
    silent, _ = shrinkage(dataclasses.replace(checkpoint, model=model), tables=16).to_dict(
        "records"
    )
    assert silent["rms"] > 3 * clean["rms"]
    assert silent["rms_linear"] == pytest.approx(clean["rms_linear"])
    assert np.isfinite(silent["rms"])
