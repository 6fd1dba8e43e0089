import subprocess
import sys
import zipfile

import jax
import numpy as np
import pytest
from flax import nnx

from dopfn_jax.checkpoints import Checkpoint
from dopfn_jax.config import Config, ModelConfig, PriorConfig
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.predict import encode, predict

pytest.importorskip("flatbuffers")
from dopfn_jax.export import ExportError, export, load

PROGRAM = """
import sys
import numpy as np
from dopfn_jax.export import load

parts = np.load(sys.argv[2])
answer = load(sys.argv[1])(*(parts[name] for name in ("x", "t", "y", "query", "query_t")))
np.savez(sys.argv[3], logits=answer.logits, borders=answer.borders, mean=answer.mean)
assert not {"flax", "dopfn_jax.model.transformer"} & set(sys.modules)
"""


@pytest.fixture(scope="module")
def checkpoint() -> Checkpoint:
    model = ModelConfig(
        width=16, layers=2, heads=2, features_per_token=1, linear_fit=True, buckets=16
    )
    config = Config(prior=PriorConfig(max_nodes=6), model=model)

    def build() -> DoPFN:
        model = DoPFN(config.model, rngs=nnx.Rngs(0))
        model.head.kernel[...] *= 100
        return model

    graphdef, _ = nnx.split(nnx.eval_shape(build))
    state = jax.jit(lambda: nnx.state(build()))()
    return Checkpoint("tiny", nnx.merge(graphdef, state), config, 0)


@pytest.fixture(scope="module")
def artefact(checkpoint, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "tiny.zip"
    export(checkpoint, path)
    return path


def table(covariates: int = 3) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    x, query = (generator.normal(size=(n, covariates)).astype(np.float32) for n in (12, 5))
    x[0] = np.nan
    t = (np.arange(12) % 2).astype(np.float32)
    y = generator.normal(size=12).astype(np.float32) + t
    return {"x": x, "t": t, "y": y, "query": query, "query_t": np.float32([0, 1, 0, 1, 1])}


def test_a_process_without_flax_gives_the_same_answers(checkpoint, artefact, tmp_path) -> None:
    parts = table()
    np.savez(tmp_path / "in.npz", **parts)
    command = [sys.executable, "-c", PROGRAM, artefact, tmp_path / "in.npz", tmp_path / "out.npz"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    found = np.load(tmp_path / "out.npz")
    x, t, y, query, query_t = parts.values()
    context = jax.jit(encode)(checkpoint.model, x, t, y)
    expected = jax.jit(predict)(checkpoint.model, context, query, query_t)
    # Logits of this head reach 12, and regressions of so few rows magnify rounding.
    np.testing.assert_allclose(found["logits"], expected.logits, atol=1e-3)
    np.testing.assert_allclose(found["borders"], expected.borders, rtol=1e-5)
    assert np.std(found["mean"]) > 0.01


def test_it_is_one_file_without_code_of_ours(artefact) -> None:
    assert sorted(zipfile.ZipFile(artefact).namelist()) == [
        "artefact.json",
        "program.bin",
        "weights.safetensors",
    ]
    predictor = load(artefact)
    assert predictor.platforms == ("cpu", "cuda", "tpu")
    assert (predictor.name, predictor.covariates) == ("tiny", 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": np.zeros(3)}, r"t \(3,\)"),
        ({"query": np.zeros((2, 2))}, r"query_x \(2, 2\)"),
        ({"x": np.zeros((12, 5)), "query": np.zeros((5, 5))}, "5 covariates, but at most 4 fit"),
    ],
)
def test_shapes_that_do_not_fit(artefact, change: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        load(artefact)(*{**table(), **change}.values())


def test_files_that_are_no_artefact(tmp_path) -> None:
    with pytest.raises(FileNotFoundError):
        load(tmp_path / "nothing")
    (tmp_path / "text").write_text("text")
    with pytest.raises(ExportError, match="text: not an exported checkpoint"):
        load(tmp_path / "text")


def test_unknown_platforms(checkpoint, tmp_path) -> None:
    with pytest.raises(ExportError, match=r"platforms are \['abacus'\]: choose from cpu, cuda"):
        export(checkpoint, tmp_path / "x", ["abacus"])
    assert list(tmp_path.iterdir()) == []


def test_an_artefact_for_other_machines_is_refused(checkpoint, tmp_path) -> None:
    export(checkpoint, tmp_path / "x", ["tpu"])
    with pytest.raises(ExportError, match="runs on tpu, but JAX uses cpu"):
        load(tmp_path / "x")
