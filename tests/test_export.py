import json
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

predictor = load(sys.argv[1])
for question in sys.argv[2:]:
    parts = np.load(question)
    answer = predictor(*(parts[name] for name in ("x", "t", "y", "query", "query_t")))
    found = {"logits": answer.logits, "borders": answer.borders, "mean": answer.mean}
    np.savez(question + ".answer.npz", **found)
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


def table(rows: int = 12, queries: int = 5, covariates: int = 3) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    x, query = (generator.normal(size=(n, covariates)).astype(np.float32) for n in (rows, queries))
    x[0] = np.nan
    t, query_t = ((np.arange(n) % 2).astype(np.float32) for n in (rows, queries))
    y = generator.normal(size=rows).astype(np.float32) + t
    return {"x": x, "t": t, "y": y, "query": query, "query_t": query_t}


def test_a_process_without_flax_gives_the_same_answers(checkpoint, artefact, tmp_path) -> None:
    """To tables of two sizes: neither number of rows is part of the program."""

    @jax.jit
    def answer(model: DoPFN, x, t, y, query, query_t):
        return predict(model, encode(model, x, t, y), query, query_t)

    questions = {str(tmp_path / f"{n}.npz"): table(n, m) for n, m in ((12, 5), (9, 2))}
    for path, parts in questions.items():
        np.savez(path, **parts)
    command = [sys.executable, "-c", PROGRAM, artefact, *questions]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for path, parts in questions.items():
        found = np.load(path + ".answer.npz")
        expected = answer(checkpoint.model, *parts.values())
        largest = np.abs(expected.logits).max()
        np.testing.assert_allclose(found["logits"], expected.logits, atol=1e-5 * largest)
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
        ({"query_t": np.zeros(2)}, r"query_t has shape \(2,\), but must be a scalar or \(5,\)"),
        ({"x": np.zeros((12, 5)), "query": np.zeros((5, 5))}, "5 covariates, but at most 4 fit"),
    ],
)
def test_shapes_that_do_not_fit(artefact, change: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        load(artefact)(*{**table(), **change}.values())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"t": np.arange(12) % 2 + 1}, "t must hold 0 and 1"),
        ({"query_t": 7.0}, "query_t must hold 0 and 1"),
        ({"x": np.full((12, 3), np.inf)}, "x holds values that are not finite"),
        ({"y": np.full(12, np.nan)}, "y holds values that are not finite"),
        ({"y": 1e12 + np.arange(12)}, "float32 cannot hold"),
    ],
)
def test_values_that_cannot_be_answered_for(artefact, change: dict, message: str) -> None:
    with pytest.raises(ExportError, match=message):
        load(artefact)(*{**table(), **change}.values())


def test_units_and_places_of_columns_do_not_matter(artefact) -> None:
    predictor, question = load(artefact), table()
    question["x"][0, 0] = np.nan
    near = predictor(*question.values())
    moved = {name: 1e6 + 2.0 * question[name].astype(np.float64) for name in ("x", "query")}
    moved["y"] = 1e3 + 5.0 * question["y"].astype(np.float64)
    far = predictor(*{**question, **moved}.values())
    np.testing.assert_allclose((far.mean - 1e3) / 5, near.mean, atol=1e-3)
    np.testing.assert_allclose(far.logits, near.logits, atol=1e-3)


def test_a_constant_column_has_no_scale(artefact) -> None:
    answers = load(artefact)
    parts = table() | {"x": table()["x"].astype(np.float64)}
    parts["x"][:, 2] = 0.1
    parts["query"] = parts["query"].astype(np.float64)
    means = []
    for value in (0.25, 0.1):  # the second is not exact in binary
        query = parts["query"].copy()
        query[:, 2] = value + 0.1
        parts["x"][:, 2] = value
        arguments = {name: parts[name] for name in ("x", "t", "y")}
        means.append(answers(**arguments, query_x=query, query_t=parts["query_t"]).mean)
    np.testing.assert_allclose(*means, atol=1e-5)


def test_a_gpus_own_kernels_are_not_exported(checkpoint, tmp_path, monkeypatch) -> None:
    """On a host with CUDA, networks in 16 bits compute attention by cuDNN."""
    from dopfn_jax.model import attention

    model = ModelConfig(width=32, layers=2, heads=2, buckets=16, compute_dtype="bfloat16")
    config = Config(prior=checkpoint.config.prior, model=model)
    network = DoPFN(config.model, rngs=nnx.Rngs(0))
    monkeypatch.setattr(attention, "_platform", lambda: "cuda")
    queries = jax.ShapeDtypeStruct((1, 1, 4, 2, 16), "bfloat16")
    assert attention.uses_cudnn(queries, "cuda")
    export(Checkpoint("half", network, config, 0), tmp_path / "half.zip")
    assert load(tmp_path / "half.zip").platforms == ("cpu", "cuda", "tpu")


def test_a_damaged_program_is_named(artefact, tmp_path) -> None:
    whole = artefact.read_bytes()
    for place in range(200, len(whole) - 200, len(whole) // 40):
        damaged = bytearray(whole)
        damaged[place] ^= 0xFF
        (tmp_path / "damaged.zip").write_bytes(damaged)
        with pytest.raises(ExportError, match="not an exported checkpoint"):
            load(tmp_path / "damaged.zip")


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


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"platforms": ["tpu"]}, "runs on tpu, but JAX uses cpu"),
        ({"format": 99}, "written by a later version"),
    ],
)
def test_what_cannot_run_here_is_refused(artefact, tmp_path, change: dict, message: str) -> None:
    path = tmp_path / "changed.zip"
    with zipfile.ZipFile(artefact) as old, zipfile.ZipFile(path, "w") as new:
        for name in old.namelist():
            content = old.read(name)
            if name == "artefact.json":
                content = json.dumps({**json.loads(content), **change}).encode()
            new.writestr(name, content)
    with pytest.raises(ExportError, match=message):
        load(path)
