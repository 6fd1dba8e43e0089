import json
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from dopfn_jax.checkpoints import DEFAULT_CHECKPOINT, checkpoint_names, save_checkpoint
from dopfn_jax.cli import main
from dopfn_jax.diagnostics import table_statistics
from dopfn_jax.estimators import DoPFNRegressor

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
COLUMNS = ["cate"] + [
    f"cid{arm}{summary}" for arm in (0, 1) for summary in ("", "_q05", "_q50", "_q95")
]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with a table in it."""
    monkeypatch.chdir(tmp_path)
    generator = np.random.default_rng(0)
    table = pd.DataFrame(
        {
            "drug": generator.permutation(np.arange(16) % 2),
            "weight": generator.normal(70, 10, 16),
            "age": generator.integers(20, 80, 16),
            "sex": generator.choice(["f", "m"], 16),
            "dose, mg": np.where(np.arange(16) == 3, np.nan, generator.normal(size=16)),
            "day": pd.date_range("2021-01-01", periods=16).astype(str),
        }
    )
    table.to_csv("trial.csv", index=False)
    return tmp_path


@pytest.fixture
def run(folder: Path, checkpoint_folder: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the command on the table; returns exit code, standard output and error."""

    def run(*arguments: object, data: object = "trial.csv", weights: object = checkpoint_folder):
        columns = ["--treatment", "drug", "--outcome", "weight"]
        words = ["predict", data, *columns, "--checkpoint", weights, *arguments]
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def test_a_saved_index_is_no_covariate(run) -> None:
    table = pd.read_csv("trial.csv").drop(columns="day")
    table.to_csv("indexed.csv")
    code, printed, _ = run(data="indexed.csv")
    assert code == 0 and printed.startswith("indexed.csv: 16 rows, 3 covariates (age, sex, dose, ")
    assert "warning: a column without a name ('Unnamed: 0') is left out" in printed
    code, printed, _ = run("--covariates", "Unnamed: 0", data="indexed.csv")
    assert code == 0 and "is left out" not in printed
    assert printed.startswith("indexed.csv: 16 rows, 1 covariates (Unnamed: 0)\n")


def test_columns_to_leave_out(run) -> None:
    code, printed, _ = run("--exclude", "day,age", "dose, mg")
    assert code == 0 and printed.startswith("trial.csv: 16 rows, 1 covariates (sex)\n")
    assert (code, printed) == run("--covariates", "sex")[:2]


def test_other_separators(run) -> None:
    table = pd.read_csv("trial.csv").drop(columns="dose, mg")
    expected = run("--exclude", "day", "dose, mg")[1]
    for separator in (";", "\t"):
        table.to_csv("other.csv", index=False, sep=separator)
        code, printed, _ = run("--exclude", "day", "--separator", separator, data="other.csv")
        assert code == 0
        assert printed.replace("other", "trial") == expected
        code, _, errors = run("--exclude", "day", data="other.csv")
        assert code == 2 and f"add --separator {'$' * (separator != ';')}'" in errors


def test_decimal_commas(run) -> None:
    table = pd.read_csv("trial.csv").drop(columns="dose, mg")
    expected = run("--exclude", "day", "dose, mg")[1]
    table.to_csv("other.csv", index=False, sep=";", decimal=",")
    code, _, errors = run("--exclude", "day", data="other.csv")
    assert code == 2 and "other.csv: has a single column, 'drug;weight;age;sex;day': add" in errors
    dialect = ("--separator", ";", "--decimal", ",")
    code, printed, _ = run("--exclude", "day", *dialect, data="other.csv")
    assert code == 0
    assert printed.replace("other", "trial") == expected


def test_only_its_own_files_are_written_over(run, folder) -> None:
    effects = folder / "trial_effects.csv"
    assert run("--covariates", "age")[0] == 0
    first = effects.read_bytes()
    assert run("--covariates", "sex")[0] == 0 and effects.read_bytes() != first
    effects.write_text("notes on effects")
    code, _, errors = run("--covariates", "age")
    assert code == 2 and "trial_effects.csv: holds something else" in errors
    assert effects.read_text() == "notes on effects"
    assert run("--covariates", "age", "--output", effects)[0] == 0


def test_prints_the_effect_and_writes_a_row_for_each_row(run, checkpoint) -> None:
    code, printed, errors = run("--covariates", "age,sex", "dose, mg", "--alpha", "0.1")
    assert (code, errors) == (0, "")
    table = pd.read_csv("trial.csv")
    X, t, y = table[["age", "sex", "dose, mg"]], table["drug"], table["weight"]
    model = DoPFNRegressor(checkpoint).fit(X, t, y)
    low, high = model.ate_interval(alpha=0.1)
    labels = {"ate": "ATE", "att": "ATT", "aipw_ate": "ATE if nothing hidden confounds"}
    for name, label in labels.items():
        (line,) = (line for line in printed.splitlines() if line.startswith(f"{label}: "))
        assert "90 % interval" in line
        words = line.removeprefix(label).replace("(", " ").replace(")", " ").split()
        numbers = [float(words[i]) for i in (1, 5, 7)]
        expected = [getattr(model, name)(), *getattr(model, f"{name}_interval")(alpha=0.1)]
        np.testing.assert_allclose(numbers, expected, atol=0.05 * (high - low))
    difference = next(line for line in printed.splitlines() if line.startswith("difference"))
    expected = y[t == 1].mean() - y[t == 0].mean()
    assert abs(float(difference.split()[-1]) - expected) < 0.05 * (high - low)
    assert "8 rows with drug = 1, 8 with drug = 0" in printed

    effects = pd.read_csv("trial_effects.csv", index_col="row")
    assert list(effects.columns) == COLUMNS
    assert len(effects) == 16
    np.testing.assert_allclose(effects["cate"], model.cate(X), rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(effects["cid1"], model.predict(X, 1), rtol=1e-5)
    np.testing.assert_allclose(effects["cid1"] - effects["cid0"], effects["cate"], atol=1e-3)
    for arm in (0, 1):
        assert (np.diff(effects.filter(regex=f"cid{arm}_q"), axis=1) > 0).all()


def test_what_is_unlike_the_prior_is_said_once(run, checkpoint, folder) -> None:
    names = table_statistics(np.zeros((4, 1)), [0, 1, 0, 1], [1, 2, 3, 4])
    ranges = {**dict.fromkeys(names, (-1e9, 1e9)), "covariates": (5.0, 9.0)}
    weights = folder / "weights"
    save_checkpoint(weights, checkpoint.model, checkpoint.config, 0, usual_tables={16: ranges})
    code, printed, errors = run("--covariates", "age", weights=weights)
    assert (code, errors) == (0, "")
    assert printed.count(f"warning: unlike the prior of {weights}") == 1


def test_json_holds_the_summary(run) -> None:
    code, printed, errors = run("--covariates", "age,sex", "--json")
    assert (code, errors) == (0, "")
    facts = json.loads(printed)
    assert facts["rows"] == 16
    assert facts["ate_interval"][0] < facts["ate"] < facts["ate_interval"][1]
    effects = pd.read_csv(facts["effects_file"])
    assert facts["ate"] == pytest.approx(effects["cate"].mean(), rel=1e-4)
    assert facts["plot"] is None


@pytest.mark.parametrize(
    "arguments", [["--covariates", "age,sex"], ["--no-covariates"], ["--outcome", "cured"]]
)
def test_figures(run, folder, arguments: list[str]) -> None:
    pytest.importorskip("matplotlib")
    table = pd.read_csv("trial.csv").drop(columns="day")
    table.assign(cured=(table["weight"] > 70).astype(int)).to_csv("trial.csv", index=False)
    code, _, errors = run(*arguments, "--plot", "effects.png")
    assert (code, errors) == (0, "")
    assert (folder / "effects.png").read_bytes().startswith(b"\x89PNG")


def test_figures_of_outcomes_far_from_zero_and_of_names_with_dollars(run, folder) -> None:
    pytest.importorskip("matplotlib")
    table = pd.read_csv("trial.csv")[["drug", "weight", "age"]]
    table["weight"] += 1e7
    table.rename(columns={"weight": "$ and $\\x", "age": "age, $ to $\\y"}).to_csv(
        "far.csv", index=False
    )
    code, printed, errors = run("--outcome", "$ and $\\x", "--plot", "far.png", data="far.csv")
    assert (code, errors) == (0, "")
    assert printed.startswith("far.csv: 16 rows")
    assert (folder / "far.png").read_bytes().startswith(b"\x89PNG")


def test_a_binary_outcome_gives_probabilities(run) -> None:
    table = pd.read_csv("trial.csv")
    table.assign(cured=(table["weight"] > 70).astype(int)).to_csv("trial.csv", index=False)
    assert run("--outcome", "cured", "--covariates", "age")[0] == 0
    effects = pd.read_csv("trial_effects.csv", index_col="row")
    assert list(effects.columns) == ["cate", "cid0", "cid1"]
    assert effects[["cid0", "cid1"]].stack().between(0, 1).all()


def test_a_separator_at_the_end_of_every_row_shifts_nothing(run, folder) -> None:
    lines = (folder / "trial.csv").read_text().splitlines()
    ended = [lines[0], *(f"{line}," for line in lines[1:])]
    (folder / "ended.csv").write_text("\n".join(ended))
    asked = ["--covariates", "age", "--json"]
    expected, found = (json.loads(run(*asked, data=name)[1]) for name in ("trial.csv", "ended.csv"))
    assert {**found, "effects_file": expected["effects_file"]} == expected


def test_outcomes_far_from_zero_keep_their_digits(run, folder) -> None:
    table = pd.read_csv("trial.csv")
    table["weight"] = 1.6e9 + np.arange(16) * 10
    table.to_csv("far.csv", index=False)
    assert run("--covariates", "age", data="far.csv")[0] == 0
    effects = pd.read_csv("far_effects.csv")
    np.testing.assert_allclose(effects["cid1"] - effects["cid0"], effects["cate"], atol=1e-3)
    assert effects["cid1_q05"].nunique() > 1


def test_without_covariates_all_rows_have_the_same_effect(run, folder) -> None:
    code, printed, _ = run("--no-covariates", "--output", folder / "out.csv")
    assert code == 0
    assert "0 covariates" in printed
    effects = pd.read_csv("out.csv")
    assert math.isclose(effects["cate"].min(), effects["cate"].max(), rel_tol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "column 'day' holds dates or times ('2021-01-01')"),
        (["--covariates", "age,size"], "--covariates 'size': no such column; the columns are"),
        (["--covariates", "drug"], "--covariates 'drug': is the treatment or the outcome already"),
        (["--covariates", "age", "--no-covariates"], "not allowed with argument"),
        (["--exclude", "size"], "--exclude 'size': no such column; the columns are"),
        (["--exclude", "weight"], "--exclude 'weight': is the treatment or the outcome already"),
        (["--separator", "::"], "--separator '::': must be a single character"),
        (["--decimal", "point"], "--decimal 'point': must be a single character"),
        (["--decimal", ","], "--decimal ',': is the separator too"),
        (["--treatment", "drugs"], "--treatment 'drugs': no such column"),
        (["--outcome", "drug"], "'drug' cannot be both the treatment and the outcome"),
        (["--treatment", "age", "--no-covariates"], "treatment 'age' must hold 0 and 1"),
        (["--outcome", "sex", "--no-covariates"], "outcome 'sex' must hold numbers"),
        (["--alpha", "2"], "--alpha 2.0: must lie between 0 and 1"),
        (["--alpha", "much"], "argument --alpha: invalid float value"),
        (["--output", "trial.csv"], "--output trial.csv: is the input itself"),
        (["--output", "nowhere/out.csv"], "there is no folder nowhere"),
        (["--output", "."], "--output .: is a folder"),
        (["--checkpoint", "nowhere"], "checkpoint 'nowhere'"),
        (["--covariate", "age"], "unrecognized arguments"),
        (["--plot", "trial.csv"], "--plot trial.csv: is the input itself"),
        (["--plot", "effects.xyz"], "--plot effects.xyz: the name must end in one of"),
        (["--plot-covariate", "age"], "--plot-covariate: needs --plot"),
        (
            ["--covariates", "age", "--plot", "x.png", "--plot-covariate", "sex"],
            "--plot-covariate 'sex': no such column",
        ),
        (["--n-estimators", "0"], "n_estimators is 0, but must be 1 or more"),
    ],
)
def test_mistakes_end_in_one_line(run, folder, arguments: list[str], message: str) -> None:
    before = (folder / "trial.csv").read_bytes()
    code, printed, errors = run(*arguments)
    assert code == 2
    assert printed == ""
    assert errors.startswith("dopfn-jax")
    assert message in errors
    assert errors.count("\n") == 1
    assert [path.name for path in folder.iterdir()] == ["trial.csv"]
    assert (folder / "trial.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        ("", "No columns to parse from file"),
        ("drug,weight\n", "the table is empty"),
        ("drug,weight\n0,1\n1,2\n1,2,3\n", "Error tokenizing data"),
        ("drug,weight\n1,2\n1,3\n", "treatment 'drug' is 1 in all 2 rows"),
        ("drug,weight\n0,2\n1,2\n", "outcome 'weight' is 2 in all 2 rows"),
        ("drug,weight\n0,2\n1,\n", "outcome 'weight' is missing in 1 rows"),
        ("drug,weight,x\n0,2,inf\n1,3,1\n", "column 'x' holds inf in row 0"),
        ("drug,weight,a,b,c,d,e,f\n0,2,1,1,1,1,1,1\n1,3,1,1,1,1,1,1\n", "X has 6 covariates, but"),
        ("drug,weight\n0,2\n1,3\n", "a single row with treatment 0"),
        ("age,drug,weight\n0,1,2,9\n1,0,3,9\n", "rows have more cells than the line of names"),
        ("drug,weight,age,weight\n0,2,1,2\n1,3,1,3\n", "more than one column 'weight'"),
    ],
)
def test_unusable_tables_end_in_one_line(run, folder, content: str | None, message: str) -> None:
    if content is not None:
        (folder / "other.csv").write_text(content)
    code, _, errors = run(data="other.csv")
    assert code == 2
    assert message in errors
    assert errors.count("\n") == 1
    assert not (folder / "other_effects.csv").exists()


def test_help_teaches_what_to_pass(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["predict", "--help"])
    assert stop.value.code == 0
    assert "measured BEFORE the treatment" in capsys.readouterr().out


@pytest.mark.skipif(DEFAULT_CHECKPOINT not in checkpoint_names(), reason="no weights are shipped")
@pytest.mark.slow
def test_example_without_covariates(folder, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--treatment", "Shopping Event?", "--outcome", "Profit", "--no-covariates"]
    assert main(["predict", str(EXAMPLES / "amazon_sales.csv"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "15 rows with Shopping Event? = 1, 350 with Shopping Event? = 0" in printed
    effect = next(line for line in printed.splitlines() if line.startswith("ATE"))
    assert float(effect.split()[1].replace(",", "")) > 0
