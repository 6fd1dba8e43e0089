import math
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from flax import nnx

from dopfn_jax.checkpoints import DEFAULT_CHECKPOINT, checkpoint_names, save_checkpoint
from dopfn_jax.config import Config, ModelConfig, PriorConfig
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.model.transformer import DoPFN
from scripts.predict import main

EXAMPLES = Path(__file__).parents[2] / "examples" / "data"
COLUMNS = ["cate"] + [
    f"cid{arm}{summary}" for arm in (0, 1) for summary in ("", "_q05", "_q50", "_q95")
]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with an untrained model, made in one compilation."""
    config = Config(
        prior=PriorConfig(max_nodes=6),
        model=ModelConfig(width=16, layers=2, heads=2, features_per_token=0, buckets=16),
    )

    def build() -> DoPFN:
        model = DoPFN(config.model, rngs=nnx.Rngs(0))
        model.head.kernel[...] *= 100
        return model

    graphdef, _ = nnx.split(nnx.eval_shape(build))
    model = nnx.merge(graphdef, jax.jit(lambda: nnx.state(build()))())
    folder = tmp_path_factory.mktemp("weights")
    save_checkpoint(folder, model, config, steps=0)
    return folder


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
def run(folder: Path, checkpoint: Path, capsys: pytest.CaptureFixture[str]):
    """Runs the script on the table; returns exit code, standard output and error."""

    def run(*arguments: object, data: object = "trial.csv", weights: object = checkpoint):
        columns = ["--treatment", "drug", "--outcome", "weight"]
        words = [data, *columns, "--checkpoint", weights, *arguments]
        try:
            code = main([str(word) for word in words])
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def test_prints_the_effect_and_writes_a_row_for_each_row(run, checkpoint) -> None:
    code, printed, errors = run("--covariates", "age,sex", "dose, mg", "--alpha", "0.1")
    assert (code, errors) == (0, "")
    lines = [line for line in printed.splitlines() if line.startswith("ATE")]
    assert len(lines) == 1
    assert "90 % interval" in lines[0]

    table = pd.read_csv("trial.csv")
    X, t, y = table[["age", "sex", "dose, mg"]], table["drug"], table["weight"]
    model = DoPFNRegressor(checkpoint).fit(X, t, y)
    words = lines[0].replace("(", " ").replace(")", " ").split()
    numbers = [float(words[i]) for i in (1, 5, 7)]
    low, high = model.ate_interval(alpha=0.1)
    np.testing.assert_allclose(numbers, [model.ate(), low, high], atol=0.05 * (high - low))
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
        (["--treatment", "drugs"], "--treatment 'drugs': no such column"),
        (["--outcome", "drug"], "'drug' cannot be both the treatment and the outcome"),
        (["--treatment", "age", "--no-covariates"], "treatment 'age' must hold 0 and 1"),
        (["--outcome", "sex", "--no-covariates"], "outcome 'sex' must hold numbers"),
        (["--alpha", "2"], "--alpha 2.0: must lie between 0 and 1"),
        (["--alpha", "much"], "argument --alpha: invalid float value"),
        (["--output", "trial.csv"], "--output trial.csv: is the input itself"),
        (["--output", "nowhere/out.csv"], "there is no folder nowhere"),
        (["--checkpoint", "nowhere"], "checkpoint 'nowhere'"),
        (["--covariate", "age"], "unrecognized arguments"),
    ],
)
def test_mistakes_end_in_one_line(run, folder, arguments: list[str], message: str) -> None:
    before = (folder / "trial.csv").read_bytes()
    code, printed, errors = run(*arguments)
    assert code == 2
    assert printed == ""
    assert errors.startswith("predict.py: ")
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
        ("drug,weight,a,b,c,d,e\n0,2,1,1,1,1,1\n1,3,1,1,1,1,1\n", "X has 5 covariates, but"),
        ("drug,weight\n0,2\n1,3\n", "a single row with treatment 0"),
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
        main(["--help"])
    assert stop.value.code == 0
    assert "measured BEFORE the treatment" in capsys.readouterr().out


@pytest.mark.skipif(DEFAULT_CHECKPOINT not in checkpoint_names(), reason="no weights are shipped")
def test_example_without_covariates(folder, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--treatment", "Shopping Event?", "--outcome", "Profit", "--no-covariates"]
    assert main([str(EXAMPLES / "amazon_sales.csv"), *arguments]) == 0
    printed = capsys.readouterr().out
    assert "15 rows with Shopping Event? = 1, 350 with Shopping Event? = 0" in printed
    effect = next(line for line in printed.splitlines() if line.startswith("ATE"))
    assert float(effect.split()[1].replace(",", "")) > 0
