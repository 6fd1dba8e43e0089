import argparse
import importlib
import importlib.metadata
import io
import json
import os
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dopfn_jax.checkpoints import checkpoint_names
from dopfn_jax.cli import info, main, train
from dopfn_jax.cli.stages import say
from dopfn_jax.config import preset_names
from dopfn_jax.evaluation import runner
from dopfn_jax.evaluation.methods import METHODS
from dopfn_jax.evaluation.suites import SUITES

COMMANDS = ("predict", "train", "evaluate", "export", "info")


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    return capsys.readouterr().out


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for command in COMMANDS:
        assert command in printed
        assert "Example" in help_of(command, capsys)


def test_help_knows_every_preset_suite_and_method(capsys: pytest.CaptureFixture[str]) -> None:
    train, evaluate = (help_of(name, capsys) for name in ("train", "evaluate"))
    assert not [name for name in preset_names() if not re.search(rf"\b{name}\b", train)]
    known = (*SUITES, *METHODS)
    assert not [name for name in known if not re.search(rf"\b{name}\b", evaluate)]


def test_help_does_not_wait_for_jax() -> None:
    code = (
        "import sys; from dopfn_jax.cli import main\n"
        f"for command in {COMMANDS}:\n"
        "    try: main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "assert not {'jax', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_mistakes_end_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, message in {
        ("paint",): "invalid choice: 'paint'",
        (): "required: COMMAND",
        ("info", "nowhere"): "dopfn-jax info: checkpoint 'nowhere': neither shipped",
        ("export", "x", "--output", "nowhere/x"): "there is no folder nowhere",
        ("train", "--config", "smok", "--workdir", "x"): "dopfn-jax train: config 'smok': neither",
        ("train", "--config", "smoke"): "the following arguments are required: --workdir",
        ("evaluate", "--suites", "all", "--output", "x"): "dopfn-jax evaluate: suite 'all': choose",
    }.items():
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
        errors = capsys.readouterr().err
        assert code == 2
        assert message in errors
        assert errors.count("\n") == 1


def test_only_what_we_explain_loses_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ValueError("from deep inside")

    monkeypatch.setattr(info, "describe", broken)
    with pytest.raises(ValueError, match="from deep inside"):
        main(["info", "x"])


def test_stages_are_said_to_terminals_only(monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = io.StringIO()
    monkeypatch.setattr(sys, "stderr", terminal)
    say("compiling")
    assert not terminal.getvalue()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    say("compiling")
    assert terminal.getvalue() == "compiling ...\n"


def test_a_stop_is_no_failure(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def stop(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(runner, "run", stop)
    assert main(["evaluate", "--quick", "--output", str(tmp_path)]) == 130
    errors = capsys.readouterr().err
    assert f"stopped: the same command goes on from {tmp_path}/results.jsonl" in errors


@pytest.mark.parametrize("called", ["/any/scripts/train.py", "/any/bin/dopfn-jax"])
def test_the_command_that_goes_on_means_the_same_run(
    called: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[argparse.Namespace] = []
    monkeypatch.setattr(sys, "argv", [called])
    monkeypatch.setattr(train, "run", asked.append)
    # Overrides stand anywhere, and have to be quoted.
    words = ["train", "--config", "smoke", "model.layers=3", "--workdir"]
    words += ["a run", "--stop-after", "3", "training.validation={ rows = 64, tasks = 32 }"]
    assert main([*words, "--evaluate-every", "9", "--data", "some where", "--distributed"]) == 0
    printed = shlex.split(train.resume_command(asked[0]))
    program = ["-m", "dopfn_jax.cli", "train"]
    if called.endswith("train.py"):
        program = [os.path.relpath(called)]
    assert printed[1 : 1 + len(program)] == program
    assert main(["train", *printed[1 + len(program) :]]) == 0
    assert vars(asked[1]) == {**vars(asked[0]), "stop_after": None, "resume": True}
    assert asked[1].overrides == [words[3], words[-1]]


def test_info(checkpoint_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(checkpoint_folder), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["most_covariates"] == 5
    # Keys and values of 2 layers of width 16, 1,024 rows, in float32.
    assert facts["megabytes_of_a_context_of_1000_rows"] == 2 * 2 * 16 * 1024 * 4 / 1e6
    assert main(["info", str(checkpoint_folder)]) == 0
    assert "most covariates: 5" in capsys.readouterr().out


@pytest.mark.skipif(
    not any(importlib.metadata.distributions(name="dopfn-jax")), reason="runs from a bare checkout"
)
def test_info_about_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["checkpoints"] == checkpoint_names()


def test_export(
    checkpoint_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("flatbuffers")
    from dopfn_jax.export import load

    output = tmp_path / "tiny.zip"
    arguments = ["export", str(checkpoint_folder), "--output", str(output)]
    assert main([*arguments, "--platforms", "cpu", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == output.stat().st_size
    assert load(output).platforms == ("cpu",)
    assert main([*arguments, "--platforms", "abacus"]) == 2
    assert "choose from cpu, cuda, tpu" in capsys.readouterr().err


def test_the_entry_point_is_this_function() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    module, _, name = project["scripts"]["dopfn-jax"].partition(":")
    assert getattr(importlib.import_module(module), name) is main
