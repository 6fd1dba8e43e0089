"""Keeps the benchmark alive: what it says of speed at these sizes means nothing, so nobody asks."""

import dataclasses
import importlib.util
import json
import math
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from dopfn_jax.benchmarks import numpy_prior, training
from dopfn_jax.benchmarks.report import Results
from dopfn_jax.benchmarks.timing import Contender, Laps, fitted_exponent, race, rates
from dopfn_jax.config import Config, ModelConfig, PriorConfig, TableShape
from dopfn_jax.model.transformer import DoPFN
from dopfn_jax.prior import Task, sample_tasks
from dopfn_jax.training.score import score
from dopfn_jax.training.step import shape_of_step
from scripts.benchmark import main

# The devices' meshes take as long to compile as all the others together; see the last test.
FAST = ("prior", "training", "inference")


def run_smallest(folder: Path, *questions: str) -> Results:
    """Leaves figures and page in the folder."""
    figures = folder / "figures.json"
    options = ["--smallest", "--json", str(figures), "--report", str(folder)]
    assert main([*questions, *options]) == 0
    return Results.read(figures)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    run_smallest(folder, *FAST)
    return folder


@pytest.fixture(scope="module")
def results(folder: Path) -> Results:
    return Results.read(folder / "figures.json")


def test_every_question_is_answered_in_figures_with_unit_and_spread(results: Results) -> None:
    assert {row.question for row in results.measurements} == set(FAST)
    for row in results.measurements:
        value = row.value
        assert row.unit and row.contender and row.quantity
        assert math.isfinite(value.median) and value.low <= value.median <= value.high


def test_every_speed_has_its_ratio_to_every_peer_of_its_race(results: Results) -> None:
    rows = [row for row in results.measurements if row.unit in ("SCMs/s", "tasks/s")]
    for row in rows:
        race = {r.contender for r in rows if (r.setting, r.unit) == (row.setting, row.unit)}
        assert set(row.times_faster_than) == race - {row.contender}
        for peer, ratio in row.times_faster_than.items():
            (other,) = (r for r in rows if (r.setting, r.contender) == (row.setting, peer))
            assert ratio.median == pytest.approx(row.value.median / other.value.median)


def test_the_parts_of_a_step_add_up_to_it(results: Results) -> None:
    shares = {
        row.quantity: row.value.median for row in results.measurements if row.unit == "% of step"
    }
    assert tuple(shares) == training.PARTS
    assert sum(shares.values()) == pytest.approx(100)


def test_absent_peers_are_reported(results: Results) -> None:
    if importlib.util.find_spec("tabpfn"):
        pytest.skip("it is installed")
    assert "tabpfn" in {absent.peer for absent in results.absent}


def test_the_page_holds_every_table_and_says_what_it_ran_on(folder: Path, results: Results) -> None:
    page = (folder / "benchmarks.md").read_text()
    assert "{{" not in page
    assert "Not measured in this run." in page  # the devices
    assert f"| {results.machine['devices']} |" in page
    for row in results.measurements:
        assert row.contender in page
    for question in FAST:
        assert f"(figures/benchmark_{question}.png)" in page
        assert (folder / "figures" / f"benchmark_{question}.png").stat().st_size > 0


def test_a_report_from_saved_figures_is_the_same(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--read", str(folder / "figures.json"), "--report", str(tmp_path)]) == 0
    assert "NumPy loop" in capsys.readouterr().out
    for name in ("benchmarks.md", "results/benchmarks.json"):
        assert (tmp_path / name).read_text() == (folder / name).read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["speed"], "choose from prior, training"), (["--read", "other.json"], "not written by")],
)
def test_mistakes_are_explained(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("other.json").write_text(json.dumps({"a": 1}))
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_every_size_names_shapes_that_can_be_trained_on_alone() -> None:
    for sizes in (training.FULL, training.QUICK, training.SMALLEST):
        config = Config.load(sizes.config)
        for index in sizes.shapes:
            alone = training.with_one_shape(config, config.training.shapes[index]).training
            assert shape_of_step(alone.shapes, alone.seed, 0).rows == alone.shapes[0].rows


def test_contenders_take_turns_after_they_have_warmed_up() -> None:
    calls: list[str] = []

    def contender(name: str) -> Contender:
        def run() -> None:
            calls.append(name)
            time.sleep(0.21)  # longer than a lap, so that a lap is one call

        return Contender(name, run)

    race([contender("a"), contender("b")], repetitions=2)
    assert "".join(calls) == "aabb" + "abab"


def test_rates_compare_lap_by_lap() -> None:
    def laps(*seconds: float) -> Laps:
        return Laps(wall=np.array(seconds), cpu=2 * np.array(seconds))

    # The machine was three times slower in the last lap, for both.
    rows = rates("q", {}, {"us": laps(1, 1, 3), "them": laps(2, 2, 6)}, {"rows": 10})
    by_unit = {row.unit: row for row in rows if row.contender == "us"}
    assert by_unit["rows/s"].value.median == 10
    assert by_unit["rows/CPU-s"].value.median == 5
    ratio = by_unit["rows/s"].times_faster_than["them"]
    assert (ratio.low, ratio.median, ratio.high) == (2, 2, 2)


def test_the_exponent_of_a_power_is_found() -> None:
    assert fitted_exponent([1, 2, 8], [3, 12, 192]) == pytest.approx(2)


TASKS = TableShape(rows=24, context=(8, 20), tasks=1000)


@pytest.mark.parametrize("target", ["interventional", "observational"])
def test_the_numpy_loop_draws_from_the_same_prior(target: str) -> None:
    prior = PriorConfig(min_nodes=2, max_nodes=6, zero_effect_share=0.2, target=target)
    keys = jax.random.split(jax.random.key(0), TASKS.tasks)
    ours = jax.device_get(
        jax.jit(lambda keys: sample_tasks(keys, prior, TASKS.rows, TASKS.context))(keys)
    )
    theirs = numpy_prior.sample_tasks(np.random.default_rng(0), prior, TASKS)
    for name, array in dataclasses.asdict(theirs).items():
        if array is not None:
            assert array.shape == getattr(ours, name).shape, name
            assert array.dtype == getattr(ours, name).dtype, name
    for (name, own), their in zip(facts(ours).items(), facts(theirs).values(), strict=True):
        error = math.sqrt(own.var() / own.size + their.var() / their.size)
        assert abs(own.mean() - their.mean()) < 4 * error + 1e-9, name


def facts(task: Task) -> dict[str, np.ndarray]:
    """Numbers of every task, whose means must agree."""
    valid = task.valid
    mask = task.context_mask[valid]

    def mean(values: np.ndarray) -> np.ndarray:
        return (values * mask).sum(axis=1) / mask.sum(axis=1)

    t, y = task.context_t[valid], task.context_y[valid]
    deviation = np.sqrt(mean((y - mean(y)[:, None]) ** 2))
    same = (task.query_t == 1) == (task.query_t.mean(axis=1, keepdims=True) > 0.5)
    return {
        "valid": valid.astype(float),
        "context rows": task.context_mask.sum(axis=1).astype(float),
        "columns": task.covariate_mask.sum(axis=1).astype(float),
        "treated": mean(t),
        "spread of y": np.log(deviation),
        "zero": mean(np.abs(y) < 1e-6),
        "association": np.abs(mean((t - mean(t)[:, None]) * y)) / deviation,
        "treated queries": (task.query_t * task.query_mask).sum(axis=1)[valid],
        "one arm of queries": same.mean(axis=1)[valid],
        "spread of x": np.log1p(np.abs(task.query_x).mean(axis=(1, 2)))[valid],
        "spread of query y": np.log1p(np.abs(task.query_y).mean(axis=1))[valid],
    }


@pytest.mark.parametrize("group", [0, 2])
def test_pytorch_computes_the_same_network_and_loss(group: int) -> None:
    torch = pytest.importorskip("torch")
    from dopfn_jax.benchmarks.torch_model import Trainer
    from dopfn_jax.config import Config

    config = Config(
        model=ModelConfig(width=16, layers=2, heads=2, features_per_token=group, buckets=8)
    )
    shape = TableShape(rows=24, context=(8, 20), tasks=3)
    task = numpy_prior.sample_tasks(np.random.default_rng(0), config.prior, shape)
    assert task.valid.all()
    model = DoPFN(config.model, rngs=nnx.Rngs(0))
    flat = nnx.to_flat_state(nnx.state(model))
    # Large enough everywhere that every path from input to loss counts.
    rng = np.random.default_rng(1)
    weights = {}
    for path, value in flat:
        name = ".".join(map(str, path))
        noise = 0 if name == "borders" else 0.2 * rng.normal(size=value.shape)
        weights[name] = np.asarray(value[...] + noise, np.float32)
        value[...] = weights[name]
    peer = Trainer(config, weights, "cpu")
    batch = peer.load(task)
    with torch.no_grad():
        logits, loss = peer.model(batch)[0].numpy(), float(peer.model.loss(batch))
    ours = np.asarray(jax.jit(training.logits_of)(model, task))
    np.testing.assert_allclose(logits, ours, atol=1e-4 * np.abs(ours).max())
    assert loss == pytest.approx(float(jax.jit(lambda m, t: score(m, t).loss)(model, task)), 1e-4)
    first = peer.step(batch)
    assert first == pytest.approx(loss, 1e-5)
    assert peer.step(batch) < first


@pytest.mark.slow
def test_meshes_compute_the_same_loss(tmp_path: Path) -> None:
    rows = run_smallest(tmp_path, "devices").measurements
    differences = [row.value.median for row in rows if row.quantity == "loss"]
    assert differences and max(differences) < 1e-4
