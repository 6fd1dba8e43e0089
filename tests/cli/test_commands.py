import importlib
import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from dopfn_jax.checkpoints import checkpoint_names
from dopfn_jax.cli import main


def test_help_names_every_command(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out
    for command in ("predict", "export", "info"):
        assert command in printed
        with pytest.raises(SystemExit):
            main([command, "--help"])
        assert "Example" in capsys.readouterr().out


def test_help_does_not_wait_for_jax() -> None:
    code = (
        "import sys; from dopfn_jax.cli import main\n"
        "try: main(['predict', '--help'])\n"
        "except SystemExit: pass\n"
        "assert not {'jax', 'pandas', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_mistakes_end_in_one_line(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for arguments, message in {
        ("paint",): "invalid choice: 'paint'",
        (): "required: COMMAND",
        ("info", "nowhere"): "dopfn-jax info: checkpoint 'nowhere': neither shipped",
        ("export", "x", "--output", "nowhere/x"): "there is no folder nowhere",
    }.items():
        try:
            code = main(arguments)
        except SystemExit as error:
            code = error.code
        errors = capsys.readouterr().err
        assert code == 2
        assert message in errors
        assert errors.count("\n") == 1


def test_info(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", str(checkpoint), "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["most_covariates"] == 4
    # Keys and values of 2 layers of width 16, 1,024 rows, in float32.
    assert facts["megabytes_of_a_context_of_1000_rows"] == 2 * 2 * 16 * 1024 * 4 / 1e6
    assert main(["info", str(checkpoint)]) == 0
    assert "most covariates: 4" in capsys.readouterr().out


@pytest.mark.skipif(
    not any(importlib.metadata.distributions(name="dopfn-jax")), reason="runs from a bare checkout"
)
def test_info_about_the_installation(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["checkpoints"] == checkpoint_names()


def test_export(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("flatbuffers")
    from dopfn_jax.export import load

    output = tmp_path / "tiny.zip"
    arguments = ["export", str(checkpoint), "--output", str(output)]
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
