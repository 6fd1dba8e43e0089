"""What training does on meshes of eight simulated devices, seen from one process of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.distributed

REPOSITORY = Path(__file__).parents[2]


def run_checks(*arguments: str, **environment: str) -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), **environment}
    checks = Path(__file__).with_name("mesh_checks.py")
    result = subprocess.run(
        [sys.executable, str(checks), *arguments], env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert "No accelerator: simulating 8 devices on this host's CPU." in result.stderr
    return json.loads(result.stdout)


@pytest.fixture(scope="module")
def seen() -> dict[str, Any]:
    return run_checks("adamw", "5", "1,8,2x4", "8,4x2", "2x4")


def require_equal_gradients(errors: dict[str, dict[str, float]]) -> None:
    for mesh, by_leaf in errors.items():
        wrong = {name: error for name, error in by_leaf.items() if not error < 1e-5}
        assert not wrong, (mesh, wrong)


def test_data_is_bitwise_the_same_on_every_mesh(seen: dict[str, Any]) -> None:
    assert seen["data"].keys() == {"1", "8", "2x4"}
    assert len(set(seen["data"].values())) == 1


def test_gradients_equal_those_of_one_device(seen: dict[str, Any]) -> None:
    assert seen["row_gradient"].keys() == {"8", "4x2"}
    require_equal_gradients(seen["row_gradient"])
    # Two heads on a model axis of four: attention is replicated, the MLP split.
    assert seen["cell_gradient"].keys() == {"2x4"}
    require_equal_gradients(seen["cell_gradient"])


def test_losses_equal_those_of_one_device(seen: dict[str, Any]) -> None:
    one = np.array(seen["losses"]["1"])
    for mesh in ("8", "4x2"):
        np.testing.assert_allclose(seen["losses"][mesh][0], one[0], rtol=1e-6)
        np.testing.assert_allclose(seen["losses"][mesh], one, atol=1e-4)


def test_a_step_compiles_once_and_keeps_its_shardings(seen: dict[str, Any]) -> None:
    for mesh in ("8", "4x2"):
        first, *later = seen[mesh]["compiled"]
        assert first >= 1
        assert not any(later)
        assert seen[mesh]["as_declared"]


def test_parameters_are_split_as_the_rules_say(seen: dict[str, Any]) -> None:
    specs, shares = seen["4x2"]["shardings"], seen["4x2"]["shares"]
    query, out = "layers.row_attention.query.kernel", "layers.row_attention.out.kernel"
    up, down, norm = "layers.up.kernel", "layers.down.kernel", "layers.mlp_norm.scale"

    def value(names: dict[str, Any], start: str) -> Any:
        (name,) = [name for name in names if name.startswith(start)]
        return names[name]

    for name, spec in {
        query: [None, "data", "model"],
        out: [None, "model", "data"],
        up: [None, "data", "model"],
        down: [None, "model", "data"],
    }.items():
        assert value(specs, name) == spec
        assert value(shares, name) == 1 / 8
        moments = {k: v for k, v in seen["4x2"]["moments"].items() if name in k}
        assert all(moment == spec for moment in moments.values())
        assert len(moments) == 3  # Adam's two, and the gradient that this test keeps
    assert value(shares, norm) == 1
    # Without a model axis, everything that is split is split eight ways all the same.
    assert value(seen["8"]["shares"], up) == 1 / 8


def test_errors_name_the_remedy(seen: dict[str, Any]) -> None:
    assert (
        "a mesh of 16x1 needs 16 devices, found 8 (cpu): start a fresh process" in seen["too_few"]
    )
    indivisible = seen["indivisible"]
    assert indivisible["code"] == 2
    assert (
        "training.shapes has 8 tasks, which a data axis of 3 devices does not divide"
        in (indivisible["message"])
    )
    assert not indivisible["folder"]


@pytest.mark.slow
def test_every_mesh_with_muon_and_cell_tokens() -> None:
    seen = run_checks(
        "muon",
        "20",
        "1,2,4,8,4x2,2x4",
        "2,4,8,4x2,2x4",
        "2,8,4x2,2x4",
        JAX_DISABLE_MOST_OPTIMIZATIONS="0",  # the programs that users run
    )
    assert len(set(seen["data"].values())) == 1
    require_equal_gradients(seen["row_gradient"])
    require_equal_gradients(seen["cell_gradient"])
    for losses in seen["losses"].values():
        np.testing.assert_allclose(losses[0], seen["losses"]["1"][0], rtol=1e-6)
        np.testing.assert_allclose(losses, seen["losses"]["1"], atol=1e-4)
