"""Several real processes on one host, over loopback, started as Slurm starts them."""

import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

from dopfn_jax.training.processes import any_process, succeeds_on_first

pytestmark = pytest.mark.distributed

REPOSITORY = Path(__file__).parents[2]
# What compiles quickly.
QUICK = [
    "prior.case_study=observed_confounder",
    "model.layers=1",
    "training.optimizer=adamw",
    "training.validation={ rows = 48, context = [16, 32], tasks = 8 }",
]


def command(folder: Path, steps: int, mesh: str) -> list[str]:
    run = [sys.executable, str(REPOSITORY / "scripts" / "train.py"), "--config", "smoke"]
    run += ["--workdir", str(folder), "--steps", str(steps), "--mesh", mesh, "--peak", "1e12"]
    return [*run, *QUICK, "training.log_every=1"]


def environment(**others: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
    return {**kept, "PYTHONPATH": str(REPOSITORY), **others}


def start(arguments: list[str], processes: int, devices: int) -> list[subprocess.Popen[str]]:
    """What `srun --ntasks=<processes>` does; JAX finds the others by these variables."""
    job = free_job()
    pipe = subprocess.PIPE
    return [
        subprocess.Popen(
            [*arguments, "--distributed"],
            env=environment(
                SLURM_JOB_ID=str(job),
                SLURM_STEP_NODELIST="localhost",
                SLURM_NTASKS=str(processes),
                SLURM_PROCID=str(process),
                SLURM_LOCALID=str(process),
                JAX_NUM_CPU_DEVICES=str(devices),
            ),
            stdout=pipe,
            stderr=pipe,
            text=True,
        )
        for process in range(processes)
    ]


def free_job() -> int:
    """A job number whose port, which JAX derives from it, is free."""
    while True:
        job = random.randrange(2**12)
        with socket.socket() as probe:
            if probe.connect_ex(("localhost", 2**16 - 2**12 + job)):
                return job


def finish(processes: list[subprocess.Popen[str]]) -> list[str]:
    """What each printed; all must have succeeded."""
    printed = [process.communicate(timeout=900) for process in processes]
    for process, (_, stderr) in zip(processes, printed, strict=True):
        assert process.returncode == 0, stderr
    return [stdout for stdout, _ in printed]


def read_log(folder: Path) -> list[dict[str, Any]]:
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def require_same_run(folder: Path, alone: Path, steps: int) -> None:
    have, want = read_log(folder), read_log(alone)
    assert [line["step"] for line in have] == list(range(1, steps + 1))
    for name in ("masked_tasks", "skipped"):
        assert [line[name] for line in have] == [line[name] for line in want]
    losses, expected = ([line["loss"] for line in log] for log in (have, want))
    np.testing.assert_allclose(losses[0], expected[0], rtol=1e-6)
    np.testing.assert_allclose(losses, expected, atol=1e-4)
    assert have[-1]["validation_loss"] == pytest.approx(want[-1]["validation_loss"], abs=1e-4)
    weights, others = (load_file(f / "weights" / "model.safetensors") for f in (folder, alone))
    assert weights.keys() == others.keys()
    for name in weights:
        np.testing.assert_allclose(weights[name], others[name], atol=1e-3)


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path: Path) -> None:
    steps = 6
    several = start(command(tmp_path / "several", steps, "2"), processes=2, devices=1)
    alone = subprocess.run(
        command(tmp_path / "alone", steps, "2"), env=environment(), capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    first, second = finish(several)
    assert f"{steps} of {steps} steps done" in first
    assert "steps done" not in second  # only the first one speaks
    require_same_run(tmp_path / "several", tmp_path / "alone", steps)


@pytest.mark.slow
def test_four_processes_stop_together_and_go_on(tmp_path: Path) -> None:
    """One of four gets the signal; a mesh with both axes, two devices a process."""
    steps = 40
    folder = tmp_path / "several"
    processes = start(command(folder, steps, "4x2"), processes=4, devices=2)
    while not any(line["step"] >= 3 for line in read_log(folder)):
        assert processes[2].poll() is None, processes[2].communicate()
        time.sleep(0.05)
    processes[2].send_signal(signal.SIGTERM)
    printed = finish(processes)
    assert "go on with: " in printed[0] and "--distributed" in printed[0]
    assert 3 <= read_log(folder)[-1]["step"] < steps

    finish(start([*command(folder, steps, "4x2"), "--resume"], processes=4, devices=2))
    alone = subprocess.run(
        command(tmp_path / "alone", steps, "4x2"), env=environment(), capture_output=True, text=True
    )
    assert alone.returncode == 0, alone.stderr
    require_same_run(folder, tmp_path / "alone", steps)


def test_one_process_agrees_with_itself() -> None:
    assert any_process(True) and not any_process(False)
    assert succeeds_on_first(lambda: None)

    def fail() -> None:
        raise OSError("full")

    with pytest.raises(OSError, match="full"):
        succeeds_on_first(fail)
