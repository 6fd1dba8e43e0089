import dataclasses
import io
import sys
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError

from dopfn_jax.cells import TableError
from dopfn_jax.checkpoints import (
    DEFAULT_CHECKPOINT,
    CheckpointError,
    checkpoint_names,
    save_checkpoint,
)
from dopfn_jax.estimators import DoPFNRegressor, inference
from dopfn_jax.estimators.inference import padded_queries, padded_rows, power_of_two
from dopfn_jax.model.bar_distribution import BarDistribution
from dopfn_jax.predict import cate, encode
from tests.estimators.small import COVARIATES, ROWS, assert_same, table


class TestAnswers:
    def test_agree_with_the_functional_interface(self, checkpoint, fitted) -> None:
        X, t, y = table()
        x, t, y = (np.asarray(part, np.float32) for part in (X, t, y))
        context = jax.jit(encode)(checkpoint.model, x, t, y)
        expected = jax.jit(cate)(checkpoint.model, context, x[:5])
        assert_same(fitted.cate(X[:5]), expected)
        assert np.std(expected) > 0.01

    def test_shapes_and_types(self, fitted) -> None:
        X, t, _ = table()
        for output_type in ("mean", "median", "mode"):
            answer = fitted.predict(X[:5], t[:5], output_type)
            assert answer.shape == (5,)
            assert answer.dtype == np.float64
        assert fitted.predict(X[:5], 1, "quantiles", [0.1, 0.9]).shape == (5, 2)
        assert fitted.predict(X[:5], 1, "distribution").batch_shape == (5,)
        assert fitted.cate(X[:5]).shape == (5,)
        assert isinstance(fitted.ate(X[:5]), float)

    def test_summaries_are_those_of_the_distribution(self, fitted) -> None:
        X, t, _ = table()
        levels = np.array([0.05, 0.5, 0.95], np.float32)

        @jax.jit
        def summarise(answer: BarDistribution) -> tuple[jax.Array, ...]:
            return answer.mean, answer.median, answer.mode, answer.quantile(levels)

        names = ("mean", "median", "mode", "quantiles")
        summaries = zip(names, summarise(fitted.predict_distribution(X, t)), strict=True)
        for output_type, expected in summaries:
            assert_same(fitted.predict(X, t, output_type), expected)

    def test_effects_are_differences_of_means(self, fitted) -> None:
        X, _, _ = table()
        effects = fitted.predict(X, np.ones(ROWS)) - fitted.predict(X, 0)
        assert_same(fitted.cate(X), effects)
        np.testing.assert_array_equal(fitted.cate(), fitted.cate(X))
        assert fitted.ate() == pytest.approx(effects.mean(), rel=1e-4)
        assert fitted.ate(X[:3]) == pytest.approx(effects[:3].mean(), rel=1e-4)

    def test_chunks_change_nothing(self, fitted, monkeypatch) -> None:
        X = pd.concat([table()[0]] * 3, ignore_index=True)[:40]

        def answers() -> tuple:
            logits = fitted.predict_distribution(X, 1).logits
            return fitted.predict(X, 1), fitted.cate(X), logits, *fitted.cate_interval(X)

        whole = answers()
        monkeypatch.setattr(inference, "CHUNK_ROWS", 16)
        assert len(list(fitted.network_.chunks(40, 16))) == 3
        for parts, expected in zip(answers(), whole, strict=True):
            assert_same(parts, expected)

    def test_order_of_rows_and_columns_does_not_matter(self, checkpoint, fitted) -> None:
        X, t, y = table()
        rows = np.random.default_rng(1).permutation(ROWS)
        shuffled = X.iloc[rows][["score", "age", "dose"]]
        other = DoPFNRegressor(checkpoint).fit(shuffled, t[rows], y[rows])
        assert_same(other.cate(X), fitted.cate(X))
        assert other.feature_names_in_.tolist() == ["score", "age", "dose"]

    @pytest.mark.parametrize(
        ("scale", "shift"), [(40.0, -7.0), (1e-30, 0.0), (1e30, 1e30), (0.01, 1.6e9)]
    )
    def test_answers_follow_the_units_of_the_outcome(
        self, checkpoint, fitted, scale: float, shift: float
    ) -> None:
        X, t, y = table()
        other = DoPFNRegressor(checkpoint).fit(X, t, scale * y + shift)
        # Float64 itself holds 1.6e9 + 0.01 y no better than 1e-5 of the spread of y.
        assert_same((other.predict(X, t) - shift) / scale, fitted.predict(X, t), 5e-5)
        assert_same(other.cate() / scale, fitted.cate(), 5e-5)
        assert_same(other.ate() / scale, fitted.ate(), 5e-5)

    def test_answers_do_not_depend_on_the_units_of_covariates(self, checkpoint, fitted) -> None:
        X, t, y = table()
        X = X * [1e-30, 1e30, 1.0] + [0.0, 0.0, 1.6e9]
        assert_same(DoPFNRegressor(checkpoint).fit(X, t, y).cate(X), fitted.cate())

    def test_every_row_is_answered_on_its_own(self, fitted) -> None:
        X, _, _ = table()
        alone = np.concatenate([fitted.cate(X[i : i + 1]) for i in range(3)])
        assert_same(alone, fitted.cate(X)[:3])

    def test_no_query_rows_give_empty_answers(self, fitted) -> None:
        nothing = table()[0][:0]
        assert fitted.predict(nothing, 1).shape == fitted.cate(nothing).shape == (0,)
        assert fitted.predict_distribution(nothing, []).batch_shape == (0,)

    def test_missing_cells(self, checkpoint, fitted) -> None:
        X, t, y = table()
        X.iloc[::4, 0] = np.nan
        X["never"] = np.nan
        effects = DoPFNRegressor(checkpoint).fit(X, t, y).cate(X)
        assert np.isfinite(effects).all()
        assert np.abs(effects - fitted.cate()).max() > 1e-3

    def test_a_table_without_covariates(self, checkpoint) -> None:
        _, t, y = table()
        for X in (None, np.empty((ROWS, 0)), pd.DataFrame(index=range(ROWS))):
            model = DoPFNRegressor(checkpoint).fit(X, t, y)
            answers = model.predict(None, [0, 1, 1])
            assert answers[1] == answers[2] != answers[0]
            assert model.ate() == pytest.approx(answers[1] - answers[0], rel=1e-4)
            assert model.predict(None, 1) == pytest.approx(answers[1:2])

    def test_booleans_and_text(self, checkpoint) -> None:
        X, t, y = table()
        coded = X.assign(dose=(X["dose"] > 0).astype(float), score=t)
        text = X.assign(dose=np.where(X["dose"] > 0, "yes", "no"), score=t == 1)
        expected = DoPFNRegressor(checkpoint).fit(coded, t, y).cate(coded)
        model = DoPFNRegressor(checkpoint).fit(text, t == 1, pd.Series(y, name="kg"))
        assert_same(model.cate(text), expected, 1e-6)

    def test_few_compilations_serve_many_table_sizes(self, checkpoint, fitted) -> None:
        fitted.predict(table()[0][:8], 1)
        compiled = inference.jitted_encode._cache_size(), inference.jitted_predict._cache_size()
        for rows, columns in [(9, 1), (12, 2), (16, 3)]:
            X, t, y = table(rows)
            X = X.iloc[:, :columns]
            DoPFNRegressor(checkpoint).fit(X, t, y).predict(X[: rows // 2], 1)
        assert compiled == (
            inference.jitted_encode._cache_size(),
            inference.jitted_predict._cache_size(),
        )


class TestConventions:
    def test_clone_and_parameters(self, checkpoint, fitted) -> None:
        model = DoPFNRegressor("name", n_resamples=8)
        assert clone(model).get_params() == {
            "checkpoint": "name",
            "n_estimators": 1,
            "transforms": ("none",),
            "n_resamples": 8,
            "max_context": 10_000,
            "cache": True,
            "device": None,
            "random_state": 0,
            "verbose": False,
        }
        assert model.set_params(random_state=3).random_state == 3
        assert repr(model) == "DoPFNRegressor(checkpoint='name', n_resamples=8, random_state=3)"
        copy = clone(fitted)
        assert not hasattr(copy, "contexts_")
        np.testing.assert_array_equal(copy.fit(*table()).cate(), fitted.cate())

    def test_fitted_attributes(self, checkpoint) -> None:
        X, t, y = table()
        model = DoPFNRegressor(checkpoint).fit(X, t, y)
        assert model.n_features_in_ == COVARIATES
        assert model.feature_names_in_.tolist() == list(X.columns)
        model.fit(X.to_numpy()[:, :2], t, y)
        assert model.n_features_in_ == 2
        assert not hasattr(model, "feature_names_in_")

    @pytest.mark.parametrize("method", ["cate", "ate", "ate_interval", "aipw_ate"])
    def test_unfitted(self, method: str) -> None:
        with pytest.raises(NotFittedError, match="DoPFNRegressor instance is not fitted yet"):
            getattr(DoPFNRegressor(), method)()


class TestRefused:
    def test_a_failed_fit_keeps_the_last_one(self, checkpoint) -> None:
        X, t, y = table()
        model = DoPFNRegressor(checkpoint).fit(X, t, y)
        effects = model.cate()
        with pytest.raises(TableError, match="constant outcome"):
            model.fit(X, t, np.ones(ROWS))
        np.testing.assert_array_equal(model.cate(), effects)

    def test_a_fit_that_broke_off_answers_nothing(self, checkpoint, monkeypatch) -> None:
        X, t, y = table()
        model = DoPFNRegressor(checkpoint).fit(X, t, y)

        def fail(*_: object) -> None:
            raise MemoryError

        with monkeypatch.context() as patch:
            patch.setattr(inference.Network, "encode", fail)
            with pytest.raises(MemoryError):
                model.fit(X, t, -y)
        for ask in (model.cate, model.ate_interval, model.summary):
            with pytest.raises(NotFittedError, match="is not fitted yet"):
                ask()
        assert model.fit(X, t, y).cate().shape == (ROWS,)

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"X": np.zeros((ROWS, 6))}, "6 covariates, but checkpoint 'tiny' .* at most 5"),
            ({"t": np.ones(ROWS)}, "treatment t is 1 in all 16 rows"),
            ({"t": np.arange(ROWS)}, "treatment t must hold 0 and 1"),
            ({"y": np.full(ROWS, np.nan)}, "outcome y is missing in 16 rows"),
            ({"X": np.full((ROWS, 1), np.inf)}, "column 0 holds inf"),
            ({"X": pd.DataFrame({"day": ["2021-01-01"] * ROWS})}, "column 'day' holds dates"),
            ({"X": np.zeros((3, 1))}, "the same number of rows, but X has 3"),
        ],
    )
    def test_tables(self, checkpoint, change: dict, message: str) -> None:
        X, t, y = table()
        with pytest.raises(TableError, match=message):
            DoPFNRegressor(checkpoint).fit(**{"X": X, "t": t, "y": y, **change})

    def test_too_many_rows(self, checkpoint) -> None:
        with pytest.raises(TableError, match=r"16 rows, more than max_context = 10: .*random sub"):
            DoPFNRegressor(checkpoint, max_context=10).fit(*table())

    def test_settings(self, checkpoint) -> None:
        with pytest.raises(ValueError, match="n_resamples is 1, but must be 2 or more"):
            DoPFNRegressor(checkpoint, n_resamples=1).fit(*table())
        for seed in ("today", -1, 0.5):
            with pytest.raises(ValueError, match=f"random_state is {seed!r}, but must be an int"):
                DoPFNRegressor(checkpoint, random_state=seed).fit(*table())

    def test_missing_checkpoint(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="nowhere"):
            DoPFNRegressor(tmp_path / "nowhere").fit(*table())

    def test_queries(self, fitted) -> None:
        X, _, _ = table()
        for query, t, message in [
            (X.drop(columns="age"), 1, "X lacks 'age'"),
            (X.assign(y=1), 1, "has 'y' in addition"),
            (None, [1], "X is None, but the table was fitted with covariates"),
            (X, [0, 1], "X has 16 rows, but t has 2"),
            (X, 2, "treatment t must hold 0 and 1"),
            (X, np.nan, "treatment t is missing"),
        ]:
            with pytest.raises(TableError, match=message):
                fitted.predict(query, t)
        with pytest.raises(TableError, match="X has no rows to average over"):
            fitted.ate(X[:0])
        with pytest.raises(ValueError, match="output_type is 'sd', but must be one of 'mean'"):
            fitted.predict(X, 1, "sd")
        with pytest.raises(ValueError, match=r"quantiles are .* between 0 and 1"):
            fitted.predict(X, 1, "quantiles", [0.5, 1.0])

    def test_an_outcome_that_float32_cannot_hold(self, checkpoint) -> None:
        X, t, y = table()
        model = DoPFNRegressor(checkpoint).fit(X, t, 1.6e9 + 0.01 * y)
        with pytest.raises(TableError, match=r"float32 cannot hold .* mean 1\.6e\+09"):
            model.predict_distribution(X, 1)


@pytest.mark.skipif(DEFAULT_CHECKPOINT not in checkpoint_names(), reason="no weights are shipped")
def test_shipped_weights_are_read_once() -> None:
    first, second = (DoPFNRegressor()._load_checkpoint() for _ in range(2))
    assert first is second


def test_a_folder_is_read_again(checkpoint, tmp_path) -> None:
    """Training may have gone on in the meantime."""
    model = DoPFNRegressor(tmp_path / "weights")
    for steps in (1, 2):
        save_checkpoint(tmp_path / "weights", checkpoint.model, checkpoint.config, steps)
        assert model._load_checkpoint().steps == steps


def test_bars_are_for_terminals_and_long_waits(fitted, monkeypatch) -> None:
    verbose = dataclasses.replace(fitted.network_, verbose=True)
    assert verbose.progress(range(2), "queries").disable
    terminal = io.StringIO()
    terminal.isatty = lambda: True  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", terminal)
    assert not verbose.progress(range(2), "queries").disable
    assert verbose.progress(range(2), "queries").delay == 2
    for network, pieces in ((verbose, 1), (fitted.network_, 2)):
        assert network.progress(range(pieces), "queries") == range(pieces)


def test_row_sizes() -> None:
    sizes = [padded_rows(rows) for rows in range(1, 5000)]
    assert sorted(set(sizes[:128])) == [16, 24, 32, 48, 64, 96, 128]
    few = [padded_queries(rows) for rows in (0, 1, 8, 9, 10, 11, 13, 16, 17, 100)]
    assert few == [8, 8, 8, 10, 10, 12, 14, 16, 24, 128]
    assert all(rows <= size for rows, size in enumerate(sizes, start=1))
    assert len(set(sizes)) < 20
    assert [power_of_two(limit, 2, 12) for limit in (0.1, 3.9, 4.0, 7.0, 1e9)] == [2, 2, 4, 4, 8]


@pytest.mark.skipif(DEFAULT_CHECKPOINT not in checkpoint_names(), reason="no weights are shipped")
def test_quitting_smoking_adds_weight() -> None:
    """NHEFS: Hernán and Robins report 3.5 kg (2.6 to 4.5); the difference in means is 2.5 kg."""
    data = pd.read_csv(Path(__file__).parents[2] / "examples" / "data" / "nhefs.csv")
    X, t, y = data.drop(columns=["qsmk", "wt82_71"]), data["qsmk"], data["wt82_71"]
    model = DoPFNRegressor().fit(X, t, y)
    assert 1.5 < model.ate() < 5.5  # weights that have seen little shrink it, as the README says
    assert 2.6 < model.aipw_ate() < 4.5
