import contextlib
import dataclasses
import json
import resource
from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from dopfn_jax.checkpoints import CheckpointError
from dopfn_jax.config import Config, TrainingConfig
from dopfn_jax.training.run_directory import MetricsLog, RunDirectory, RunDirectoryError

CONFIG = Config()


def save_once(folder: Path) -> None:
    """A run that has a checkpoint."""
    with contextlib.closing(RunDirectory(folder, CONFIG, resume=False)) as directory:
        directory.save(1, {"step": jnp.int32(1)})


def test_one_run_at_a_time(tmp_path: Path) -> None:
    first = RunDirectory(tmp_path, CONFIG, resume=False)
    with pytest.raises(RunDirectoryError, match="another run is using it"):
        RunDirectory(tmp_path, CONFIG, resume=True)
    first.close()
    RunDirectory(tmp_path, CONFIG, resume=True).close()


def test_a_run_is_not_overwritten_and_a_refusal_leaves_no_lock(tmp_path: Path) -> None:
    save_once(tmp_path)
    for _ in range(2):
        with pytest.raises(RunDirectoryError, match="--resume or choose another --workdir"):
            RunDirectory(tmp_path, CONFIG, resume=False)


def test_a_run_that_never_saved_may_start_anew_and_otherwise(tmp_path: Path) -> None:
    RunDirectory(tmp_path, CONFIG, resume=False).close()
    other = dataclasses.replace(CONFIG, training=TrainingConfig(seed=3))
    RunDirectory(tmp_path, other, resume=False).close()
    assert Config.from_dict(json.loads((tmp_path / "config.json").read_text())) == other


def test_nothing_of_another_kind_is_overwritten(tmp_path: Path) -> None:
    """Weights, a run that has lost its checkpoints, and one that has lost its configuration."""
    weights, bare, headless = (tmp_path / name for name in ("weights", "bare", "headless"))
    weights.mkdir()
    (weights / "model.safetensors").write_bytes(b"")
    (bare / "weights").mkdir(parents=True)
    save_once(headless)
    (headless / "config.json").unlink()
    for folder, message in (
        (weights, "holds weights, not a run"),
        (bare, "a run without its checkpoints"),
        (headless, r"checkpoints without their config\.json"),
    ):
        for resume in (False, True):
            with pytest.raises(RunDirectoryError, match=message):
                RunDirectory(folder, CONFIG, resume=resume)
        assert not (folder / "config.json").exists()


def test_another_configuration_is_refused_by_field(tmp_path: Path) -> None:
    save_once(tmp_path)
    other = dataclasses.replace(
        CONFIG,
        prior=dataclasses.replace(CONFIG.prior, max_nodes=7),
        training=TrainingConfig(seed=3),
    )
    with pytest.raises(RunDirectoryError) as error:
        RunDirectory(tmp_path, other, resume=True)
    assert "prior.max_nodes: 10 -> 7" in str(error.value)
    assert "training.seed: 0 -> 3" in str(error.value)
    assert "model" not in str(error.value)


def test_a_field_that_did_not_exist_yet_has_its_default(tmp_path: Path) -> None:
    save_once(tmp_path)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["training"]["ema_decay"]
    path.write_text(json.dumps(values))
    RunDirectory(tmp_path, CONFIG, resume=True).close()


def test_a_damaged_config_is_named(tmp_path: Path) -> None:
    save_once(tmp_path)
    (tmp_path / "config.json").write_text('{"prior"')
    with pytest.raises(RunDirectoryError, match=r"config\.json cannot be read"):
        RunDirectory(tmp_path, CONFIG, resume=True)


def test_a_file_in_the_way(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("")
    with pytest.raises(RunDirectoryError, match="a file is in the way"):
        RunDirectory(tmp_path / "run", CONFIG, resume=False)


def test_the_last_complete_checkpoint_comes_back_bit_by_bit(tmp_path: Path) -> None:
    state = {"w": jnp.arange(6, dtype=jnp.float32) / 7, "count": jnp.int32(3)}
    directory = RunDirectory(tmp_path, CONFIG, resume=False)
    assert directory.latest_step() is None
    directory.save(4, state)
    directory.save(5, {name: value + 1 for name, value in state.items()})
    directory.close()
    # What a process leaves behind that was killed while it saved.
    (tmp_path / "checkpoints" / "6.orbax-checkpoint-tmp").mkdir()
    (tmp_path / ".weights-abc").mkdir()

    directory = RunDirectory(tmp_path, CONFIG, resume=True)
    assert directory.latest_step() == 5
    restored = directory.restore(state)
    for name, value in state.items():
        assert restored[name].dtype == value.dtype
        np.testing.assert_array_equal(restored[name], value + 1)
    assert not (tmp_path / ".weights-abc").exists()
    directory.close()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_intact(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, CONFIG, resume=False)
    directory.save(1, {"w": jnp.ones(3)})
    directory.save(2, {"w": jnp.zeros(3)})
    directory.close()
    damaged = tmp_path / "checkpoints" / "2"
    for path in damaged.rglob("*"):
        if path.is_file():
            path.write_bytes(b"")

    directory = RunDirectory(tmp_path, CONFIG, resume=True)
    with pytest.raises(CheckpointError, match=r"checkpoints/2 cannot be restored .* delete that"):
        directory.restore({"w": jnp.ones(3)})
    directory.close()
    for path in sorted(damaged.rglob("*"), reverse=True):
        path.rmdir() if path.is_dir() else path.unlink()
    damaged.rmdir()
    directory = RunDirectory(tmp_path, CONFIG, resume=True)
    np.testing.assert_array_equal(directory.restore({"w": jnp.ones(3)})["w"], np.ones(3))
    directory.close()


def test_a_checkpoint_that_cannot_be_written_is_an_error_with_its_name(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path, CONFIG, resume=False)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("in the way")
    with pytest.raises(CheckpointError, match=r"checkpoints/1 cannot be written"):
        directory.save(1, {"w": jnp.ones(3)})
    directory.close()


@contextlib.contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file grows beyond `room` bytes: the kernel refuses, as it does on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_named_and_the_checkpoint_before_is_intact(tmp_path: Path) -> None:
    state = {"w": jnp.asarray(np.random.default_rng(0).normal(size=100_000))}
    directory = RunDirectory(tmp_path, CONFIG, resume=False)
    directory.save(1, state)
    with full_disk(50_000), pytest.raises(CheckpointError, match=r"checkpoints/2 .*make room"):
        directory.save(2, state)
    directory.close()

    directory = RunDirectory(tmp_path, CONFIG, resume=True)
    assert directory.latest_step() == 1
    np.testing.assert_array_equal(directory.restore(state)["w"], state["w"])
    directory.save(2, state)
    assert directory.latest_step() == 2
    directory.close()


def test_a_log_on_a_full_disk_is_an_error_and_does_not_hang(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": 0.5})
    with (
        full_disk(100),
        pytest.raises(RunDirectoryError, match="metrics cannot be written"),
    ):
        for step in range(2, 100):
            log.write({"step": step, "loss": 0.5})


def test_a_folder_that_cannot_be_written_is_named() -> None:
    with pytest.raises(RunDirectoryError, match="--workdir /proc/run cannot be written"):
        RunDirectory("/proc/run", CONFIG, resume=False)


def read(folder: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_resuming_drops_later_lines_and_half_a_line(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    for step in (1, 2, 3):
        log.write({"step": step, "loss": 0.5})
    log.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "lo')

    log = MetricsLog(tmp_path, 2)
    log.write({"step": 3, "loss": 0.25})
    log.close()
    assert read(tmp_path) == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": 0.5},
        {"step": 3, "loss": 0.25},
    ]


def test_the_log_stays_valid_json_when_a_loss_is_not_finite(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, 0)
    log.write({"step": 1, "loss": float("nan"), "mean_loss": float("inf")})
    log.close()
    assert read(tmp_path) == [{"step": 1, "loss": None, "mean_loss": None}]
    assert list((tmp_path / "events").iterdir())
