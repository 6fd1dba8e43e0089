import json

import pytest

from dopfn_jax.checkpoints import DEFAULT_CHECKPOINT, checkpoint_names
from dopfn_jax.cli.evaluate import (
    QUICK_ABLATION_METHODS,
    QUICK_DATASETS,
    QUICK_METHODS,
    _methods,
)
from dopfn_jax.evaluation.runner import read_table
from scripts.evaluate import main


def evaluate(tmp_path, *arguments):
    return main(["--output", str(tmp_path / "out"), *arguments])


def test_scores_simple_methods_and_goes_on_where_it_stopped(tmp_path, capsys):
    command = ["--suites", "simulated", "--datasets", "1", "--methods", "linear", "zero"]
    assert evaluate(tmp_path, *command) == 0
    shown = capsys.readouterr().out
    assert "median PEHE" in shown and "nie_wager_a" in shown
    results = tmp_path / "out" / "results.jsonl"
    before = results.read_text()
    assert len(read_table(results)) == 12
    assert evaluate(tmp_path, *command, "--json") == 0
    assert results.read_text() == before
    medians = json.loads(capsys.readouterr().out)["medians"]["simulated"]["pehe"]
    assert len(medians) == 6
    assert medians["nie_wager_a"]["linear"] > 0


@pytest.mark.slow
def test_the_exact_answer_beats_every_method_on_generated_data(tmp_path):
    command = ["--suites", "generated", "--datasets", "1", "--methods", "linear", "floor"]
    assert evaluate(tmp_path, *command) == 0
    table = read_table(tmp_path / "out" / "results.jsonl")
    wide = table.pivot(index="case", columns="method", values="cate").dropna()
    assert len(wide) >= 8
    assert (wide.floor <= wide.linear + 1e-9).all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--suites", "released"], "--data"),
        (["--suites", "everything"], "choose from"),
        (["--suites", "simulated", "--methods", "magic"], "choose from"),
        (["--suites", "simulated", "--methods", "dopfn:nowhere"], "neither shipped"),
    ],
)
def test_mistakes_are_explained(tmp_path, capsys, arguments, message):
    assert evaluate(tmp_path, *arguments) == 2
    assert message in capsys.readouterr().err


def test_absent_packages_are_said_to_be_absent(tmp_path, capsys):
    if __import__("importlib").util.find_spec("causalpfn"):
        pytest.skip("it is installed")
    command = ["--suites", "simulated", "--datasets", "1", "--methods", "zero", "causalpfn"]
    assert evaluate(tmp_path, *command) == 0
    assert "causalpfn: absent" in capsys.readouterr().out
    records = (tmp_path / "out" / "results.jsonl").read_text().splitlines()
    assert {json.loads(record)["method"] for record in records} == {"zero"}


def test_the_quick_version_covers_every_suite_that_needs_no_files():
    from dopfn_jax.evaluation.methods import find_method
    from dopfn_jax.evaluation.suites import NEED_DATA, SUITES

    assert set(QUICK_DATASETS) == set(SUITES) - set(NEED_DATA)
    for name in (*QUICK_METHODS, *QUICK_ABLATION_METHODS):
        find_method(name)


@pytest.mark.parametrize("quick", [True, False])
def test_case_studies_are_answered_by_all_shipped_weights(quick):
    others = [f"dopfn:{name}" for name in checkpoint_names() if name != DEFAULT_CHECKPOINT]
    assert others
    assert set(others) < set(_methods(quick, "generated"))
    assert not set(others) & set(_methods(quick, "real"))


def test_a_report_of_two_simple_methods(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    command = ["--suites", "simulated", "--datasets", "1", "--methods", "linear", "zero"]
    assert evaluate(tmp_path, *command, "--report", str(tmp_path / "docs")) == 0
    page = (tmp_path / "docs" / "results.md").read_text()
    assert f"python scripts/evaluate.py {' '.join(command[:2])}" in page
    assert str(tmp_path) not in page
    # What else has written to the same results is on the page too, each once.
    other = ["--suites", "simulated", "--datasets", "1", "--methods", "mean"]
    for arguments in (other, other, [*command, "--report", str(tmp_path / "docs")]):
        assert evaluate(tmp_path, *arguments) == 0
    lines = (tmp_path / "docs" / "results.md").read_text().partition("```bash\n")[2].splitlines()
    assert [line.rpartition(" --")[0] for line in lines[:2]] == [
        "python scripts/evaluate.py --suites simulated --methods mean",
        "python scripts/evaluate.py --suites simulated --methods linear zero --datasets 1",
    ]
    assert "| simulated: Simulators of the literature | 6 | 1 | 1: linear, zero |" in page
