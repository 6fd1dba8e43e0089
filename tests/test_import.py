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
