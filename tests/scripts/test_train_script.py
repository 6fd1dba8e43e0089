"""Whole runs of scripts/train.py: in this process, and in processes that get signals."""

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

from dopfn_jax.checkpoints import from_pretrained, save_checkpoint
from dopfn_jax.config import Config
from dopfn_jax.sharding import make_mesh
from dopfn_jax.training.run_directory import RunDirectory, RunDirectoryError
from dopfn_jax.training.score import score
from dopfn_jax.training.step import Trainer, sample_batch
from scripts.train import main

REPOSITORY = Path(__file__).parents[2]
SCRIPT = REPOSITORY / "scripts" / "train.py"
STEPS = 24
OVERRIDES = [
    "training.log_every=1",
    "training.validate_every=10",
    "training.checkpoint_minutes=0",  # after every step
    # With spaces, so that the printed command has to quote it.
    "training.validation={ rows = 64, context = [32, 32], tasks = 32 }",
]


def arguments(folder: Path, steps: int = STEPS) -> list[str]:
    run = ["--config", "smoke", "--workdir", str(folder), "--mesh", "1", "--steps", str(steps)]
    return [*run, "--seed", "0", "--peak", "1e11", *OVERRIDES]


def config_of_run(steps: int = STEPS) -> Config:
    return Config.load("smoke", [*OVERRIDES, f"training.steps={steps}", "training.seed=0"])


@pytest.fixture(scope="module", autouse=True)
def _environment() -> Iterator[None]:
    """For processes that are started."""
    make_mesh()  # so that --mesh cannot change this process's devices any more
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(REPOSITORY))
        yield


@dataclass
class Process:
    """A training process and its work directory."""

    popen: subprocess.Popen[str]
    folder: Path

    def wait_for_step(self, step: int) -> None:
        while self.popen.poll() is None and not any(
            line["step"] >= step for line in read_log(self.folder)
        ):
            time.sleep(0.01)
        assert self.popen.poll() is None, self.popen.communicate()

    def stop(self, number: int) -> tuple[int, str, str]:
        self.popen.send_signal(number)
        stdout, stderr = self.popen.communicate(timeout=600)
        return self.popen.returncode, stdout, stderr


def start(command: list[str], folder: Path) -> Process:
    pipe = subprocess.PIPE
    return Process(subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True), folder)


def read_log(folder: Path) -> list[dict[str, Any]]:
    """The complete lines of a log that may be growing."""
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def printed_command(stdout: str) -> list[str]:
    (line,) = [line for line in stdout.splitlines() if line.startswith("go on with: ")]
    words = shlex.split(line.removeprefix("go on with: "))
    assert "--stop-after" not in words
    return words


def last_state(folder: Path, steps: int = STEPS) -> list[np.ndarray]:
    """Every array of the last checkpoint: parameters, average, optimiser, step, key."""
    config = config_of_run(steps)
    directory = RunDirectory(folder, config, resume=True)
    state = directory.restore(Trainer(config, make_mesh()).abstract_state)
    assert directory.latest_step() == int(state.step) == steps
    directory.close()
    state = state.replace(key=jax.random.key_data(state.key))
    return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]


def require_same_run(folder: Path, reference: Path, steps: int = STEPS) -> None:
    """Same final state and same logged metrics, bit by bit."""
    for a, b in zip(last_state(folder, steps), last_state(reference, steps), strict=True):
        assert a.dtype == b.dtype and a.tobytes() == b.tobytes()
    exact = ("step", "loss", "mean_loss", "gradient_norm", "learning_rate")
    exact += ("masked_tasks", "skipped")
    have, want = (
        [[line[name] for name in exact] for line in read_log(f)] for f in (folder, reference)
    )
    assert have == want
    for name in ("validation_loss", "validation_median_mse"):
        have_by_step, want_by_step = (
            {line["step"]: line[name] for line in read_log(f) if name in line}
            for f in (folder, reference)
        )
        assert want_by_step.items() <= have_by_step.items()
    models = [nnx.state(from_pretrained(f).model) for f in (folder, reference)]
    for a, b in zip(*map(jax.tree.leaves, models), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody interrupted."""
    folder = tmp_path_factory.mktemp("train") / "reference"
    assert main(arguments(folder)) == 0
    return folder


def test_a_run_leaves_log_config_checkpoints_and_weights(reference: Path) -> None:
    log = read_log(reference)
    assert [line["step"] for line in log] == list(range(1, STEPS + 1))
    for line in log:
        assert {"step", "loss", "mean_loss", "tasks_per_second", "masked_tasks"} <= line.keys()
    assert [line["step"] for line in log if "validation_loss" in line] == [10, 20, STEPS]
    assert Config.from_dict(json.loads((reference / "config.json").read_text())) == config_of_run()
    assert list((reference / "events").iterdir())
    assert sorted(path.name for path in (reference / "checkpoints").iterdir()) == ["23", "24"]
    checkpoint = from_pretrained(reference)
    assert checkpoint.steps == STEPS
    assert checkpoint.config == config_of_run()


@pytest.mark.slow
def test_stops_signals_and_a_kill_change_nothing(
    tmp_path: Path, reference: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Five processes' worth of one run end in the very state of the run that was left alone."""
    folder = tmp_path / "a run"  # the printed command has to quote it
    assert main([*arguments(folder), "--stop-after", "3"]) == 0
    assert [line["step"] for line in read_log(folder)] == [1, 2, 3]
    command = printed_command(capfd.readouterr().out)

    for number, step in ((signal.SIGTERM, 7), (signal.SIGINT, 11)):
        process = start(command, folder)
        process.wait_for_step(step)
        with pytest.raises(RunDirectoryError, match="another run is using it"):
            RunDirectory(folder, config_of_run(), resume=True)
        code, stdout, stderr = process.stop(number)
        assert code == 0, stderr
        assert "Traceback" not in stderr
        assert "step/s" not in stderr  # no progress bar without a terminal
        assert "Stopping after this step" in stderr
        last = read_log(folder)[-1]["step"]
        assert step <= last < STEPS
        assert f"{last} of {STEPS} steps done" in stdout
        assert from_pretrained(folder).steps == last
        command = printed_command(stdout)

    process = start(command, folder)
    process.wait_for_step(15)
    process.stop(signal.SIGKILL)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 16, "lo')

    assert main([*arguments(folder), "--resume"]) == 0
    require_same_run(folder, reference)


def write_case_study(folder: Path, number: int) -> None:
    """A table of 24 rows in the format of the released ones, whose effect is 2."""
    rng = np.random.default_rng(number)
    x, t, t_int = rng.normal(size=24), np.tile([0.0, 1.0], 12), rng.integers(0, 2, 24)
    folder.mkdir(parents=True, exist_ok=True)
    np.savez(
        folder / f"{number}.npz",
        x_obs=np.stack([t, x], axis=1),
        x_int=np.stack([t_int, x], axis=1),
        y_obs=x + 2 * t,
        y_int=x + 2 * t_int,
        y0=x,
        y1=x + 2,
    )


@pytest.mark.slow
def test_observers_see_a_run_and_do_not_change_it(tmp_path: Path, reference: Path) -> None:
    for number in (1, 2):
        write_case_study(tmp_path / "data" / "case_studies_dev" / "linear", number)
    folder = tmp_path / "observed"
    observers = ["--profile", "--evaluate-every", "20", "--data", str(tmp_path / "data")]
    assert main([*arguments(folder), *observers]) == 0
    log = read_log(folder)
    scored = {line["step"]: line for line in log if "cid/linear" in line}
    assert list(scored) == [20, STEPS]
    assert scored[20]["cid/linear"] != scored[STEPS]["cid/linear"] > 0
    assert scored[STEPS]["cate/linear"] > 0
    for line in log:
        rate = line["model_flops_per_second"]
        assert line["utilisation"] == pytest.approx(rate / 1e11)
    assert list((folder / "profile").rglob("*.xplane.pb"))
    require_same_run(folder, reference)


@pytest.mark.slow
def test_a_run_that_cannot_recover_ends_with_the_steps_and_sound_checkpoints(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "diverged"
    assert main([*arguments(folder, 200), "training.learning_rate=1e38"]) == 2
    # The warm-up starts at a rate of 0, so the first step is a good one.
    assert "steps 2 to 51: the gradient was never finite" in capsys.readouterr().err
    assert [line["skipped"] for line in read_log(folder)] == [0] + [1] * 49
    weights = nnx.state(from_pretrained(folder).model)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))
    config = Config.load("smoke", [*OVERRIDES, "training.steps=200", "training.learning_rate=1e38"])
    directory = RunDirectory(folder, config, resume=True)
    state = directory.restore(Trainer(config, make_mesh()).abstract_state)
    directory.close()
    for leaf in jax.tree.leaves((state.params, state.average, state.opt_state)):
        assert np.isfinite(leaf).all()


def test_resuming_a_finished_run_says_so(
    reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = read_log(reference)
    weights = from_pretrained(reference)
    usual_tables = {16: {"covariates": (1.0, 2.0)}}
    save_checkpoint(
        reference / "weights", weights.model, weights.config, weights.steps, usual_tables
    )
    # The weights that a run started from are not needed any more.
    assert main([*arguments(reference), "--resume", "--init-from", str(reference / "gone")]) == 0
    assert f"{STEPS} of {STEPS} steps done" in capsys.readouterr().out
    assert main([*arguments(reference), "--resume", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["step"], facts["steps"], facts["resume_command"]) == (STEPS, STEPS, None)
    assert read_log(reference) == before
    assert from_pretrained(reference).usual_tables == usual_tables


def test_a_run_that_was_killed_knows_the_seeds_behind_its_weights(
    tmp_path: Path, reference: Path
) -> None:
    command = [*arguments(tmp_path / "run", 2), "--seed", "1", "--init-from", str(reference)]
    save = RunDirectory.save

    def killed(directory: RunDirectory, step: int, state: Any) -> None:
        save(directory, step, state)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RunDirectory, "save", killed)
        assert main(command) == 130
    assert main([*command, "--resume"]) == 0
    weights = from_pretrained(tmp_path / "run")
    assert (weights.steps, weights.seeds) == (2, (0, 1))


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ([], "holds a run: add --resume or choose another --workdir"),
        (["--resume", "training.learning_rate=0.5"], "training.learning_rate: 0.005 -> 0.5"),
        (["--resume", "model.layers=3"], "model.layers: 2 -> 3"),
    ],
)
def test_an_existing_run_is_protected(
    reference: Path, extra: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*arguments(reference), *extra]) == 2
    assert message in capsys.readouterr().err
    assert len(read_log(reference)) == STEPS


def test_bad_input_is_named_and_leaves_no_work_directory(
    tmp_path: Path, reference: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "new"
    good = ["--config", "smoke", "--workdir", str(folder)]
    for bad, message in {
        ("--config", "smok"): "config 'smok': neither a file nor a preset",
        ("training.step=3",): "did you mean 'steps'",
        ("training.steps=many",): "training.steps = 'many': expected int",
        ("--steps", "0"): "training.steps = 0: must be 1 or more",
        ("--stop-after", "0"): "--stop-after 0: must be 1 or more",
        ("--distributed",): "--distributed: cannot join the other processes",
        ("--peak", "0"): "--peak 0.0: must be 1 or more",
        ("--evaluate-every", "5"): "--evaluate-every and --data: give both or neither",
        ("--evaluate-every", "5", "--data", str(tmp_path)): "holds no <case>/<number>.npz",
        ("--mesh", "4x"): "--mesh '4x': write the number of devices",
        ("--mesh", "64"): "needs 64 devices",
        ("--init-from", str(tmp_path)): "nor a folder with model.safetensors",
        ("--init-from", str(reference), "model.width=64"): "model.width: 32 -> 64",
        ("--init-from", str(reference)): "give another, such as --seed",
    }.items():
        assert main([*good, *bad]) == 2, bad
        assert message in capsys.readouterr().err
        assert not folder.exists(), bad


def test_an_error_that_is_not_ours_keeps_its_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ValueError("from a library")

    monkeypatch.setattr("dopfn_jax.training.loop.train", broken)
    with pytest.raises(ValueError, match="from a library"):
        main(["--config", "smoke", "--workdir", str(tmp_path / "new")])


@pytest.mark.slow
def test_twenty_four_kills_at_random_moments_change_nothing(tmp_path: Path) -> None:
    """A checkpoint after every step, so most kills fall into a save."""
    steps = 120
    assert main(arguments(tmp_path / "reference", steps)) == 0
    folder = tmp_path / "killed"
    command = [sys.executable, str(SCRIPT), *arguments(folder, steps), "--resume"]
    moments = random.Random(0)
    for kill in range(24):
        done = max((line["step"] for line in read_log(folder)), default=0)
        process = start(command, folder)
        if kill % 4 == 3:  # anywhere: imports, restoring, the first steps
            time.sleep(moments.uniform(0, 10))
        else:
            process.wait_for_step(min(done + moments.randint(1, 3), steps - 20))
            time.sleep(moments.uniform(0, 0.3))
        process.stop(signal.SIGKILL)
        assert process.popen.returncode == -signal.SIGKILL
    assert main([*arguments(folder, steps), "--resume"]) == 0
    require_same_run(folder, tmp_path / "reference", steps)


@pytest.mark.slow
def test_the_cpu_preset_soon_beats_the_context_mean(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--config", "cpu", "--workdir", str(tmp_path)]
    environment = {**os.environ, "JAX_DISABLE_MOST_OPTIMIZATIONS": "0"}
    subprocess.run([*command, "--stop-after", "300"], check=True, env=environment)

    checkpoint = from_pretrained(tmp_path)
    training = checkpoint.config.training
    task = sample_batch(
        jax.random.key(1), checkpoint.config.prior, training.validation, make_mesh()
    )
    score_of: Callable[..., Any] = nnx.jit(score)
    scored = score_of(checkpoint.model, task)
    mask = np.asarray(scored.weight, bool)
    mean = np.where(task.context_mask, task.context_y, 0).sum(1) / np.asarray(
        task.context_mask
    ).sum(1)
    deviation = np.std(np.asarray(task.context_y), axis=1)  # this shape fills every context row
    naive = ((np.asarray(task.query_y) - mean[:, None]) / deviation[:, None]) ** 2
    ratios = [
        np.square(scored.error)[i][mask[i]].mean() / naive[i][mask[i]].mean()
        for i in range(len(mask))
        if mask[i].any()
    ]
    assert np.median(ratios) < 0.8
