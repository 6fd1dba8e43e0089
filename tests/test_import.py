import importlib.metadata
import subprocess
import sys

import pytest

import dopfn_jax

# JAX refuses to change the number of devices once a backend is initialised.
NO_BACKEND_YET = """
import jax
jax.config.update("jax_num_cpu_devices", 3)
assert jax.device_count() == 3
"""

IMPORT_EVERYTHING = """
import importlib, pkgutil
import dopfn_jax
for module in pkgutil.walk_packages(dopfn_jax.__path__, "dopfn_jax."):
    try:
        importlib.import_module(module.name)
    except ModuleNotFoundError as error:
        assert error.name == "torch", error  # the peer of a benchmark is an extra
"""

NO_HEAVY_MODULES = """
import sys
import dopfn_jax
heavy = {"flax", "optax", "orbax", "pandas", "sklearn", "tensorboardX"} & set(sys.modules)
assert not heavy, heavy
"""


SAME_IN_FLOAT64 = """
import jax, numpy as np
from dopfn_jax.checkpoints import from_pretrained
from dopfn_jax.config import PriorConfig
from dopfn_jax.prior import sample_task

def draw():
    return sample_task(jax.random.key(0), PriorConfig(), 16, (6, 8))

expected = draw()
jax.config.update("jax_enable_x64", True)
found = draw()
for field in ("context_x", "context_y", "query_y"):
    ours, theirs = getattr(expected, field), getattr(found, field)
    assert theirs.dtype == ours.dtype == np.float32, (field, theirs.dtype)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)
assert from_pretrained().model.borders[...].dtype == np.float32
"""


def test_a_process_in_float64_has_the_same_prior_and_reads_the_weights() -> None:
    run(SAME_IN_FLOAT64)


def run(code: str) -> None:
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("code", ["import dopfn_jax", IMPORT_EVERYTHING], ids=["package", "all"])
def test_import_initialises_no_backend(code: str) -> None:
    run(code + NO_BACKEND_YET)


def test_import_is_light() -> None:
    run(NO_HEAVY_MODULES)


@pytest.mark.parametrize("name", dopfn_jax.__all__)
def test_public_name_resolves_and_is_listed(name: str) -> None:
    assert getattr(dopfn_jax, name) is not None
    assert name in dir(dopfn_jax)


def test_version_is_that_of_the_installed_distribution() -> None:
    assert dopfn_jax.__version__ == importlib.metadata.version("dopfn-jax")


def test_unknown_name_raises() -> None:
    with pytest.raises(AttributeError, match="no attribute 'DoPFNClassifier'"):
        _ = dopfn_jax.DoPFNClassifier
