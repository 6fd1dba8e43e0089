import dataclasses

import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

from dopfn_jax.evaluation.datasets import load_datasets
from dopfn_jax.evaluation.metrics import (
    Answer,
    compare_methods,
    median_interval,
    normalised_mse,
    rank_methods,
    score,
)
from dopfn_jax.model.bar_distribution import BarDistribution


def test_normalised_mse_divides_by_the_squared_range():
    assert normalised_mse(np.array([1.0, -1.0]), np.array([0.0, 10.0])) == pytest.approx(0.01)


def test_scores_of_an_answer_that_overstates_the_effect(toy):
    (data,) = load_datasets(toy)
    exact = np.where(data.query_t > 0.5, data.cid1, data.cid0)
    cate = np.full(len(data.query_x), 3.0)
    scores = score(data, Answer(cid=exact + 0.5 * data.query_t, cate=cate))
    spread = np.ptp(data.query_y)
    assert scores["bias_0"] == pytest.approx(0, abs=1e-7)
    assert scores["bias_1"] == pytest.approx(0.5 / spread, rel=1e-5)
    assert scores["cid"] == pytest.approx(0.25 * data.query_t.mean() / spread**2, rel=1e-5)
    assert scores["pehe"] == pytest.approx(1.0, rel=1e-5)
    assert scores["ate_error"] == pytest.approx(1.0, rel=1e-5)
    assert scores["cate"] == pytest.approx(1 / spread**2, rel=1e-5)
    assert "cate_own_range" not in scores  # the effect is constant


def test_only_an_average_is_needed_for_the_error_of_an_average(toy):
    (data,) = load_datasets(toy)
    bare = dataclasses.replace(data, effect=None, cid0=None, cid1=None, query_y=None, ate=2.5)
    scores = score(bare, Answer(cate=np.full(len(data.query_x), 3.0), ate_interval=(2.0, 4.0)))
    assert scores["ate_error"] == pytest.approx(0.5)
    assert (scores["ate_low"], scores["ate_high"]) == (2.0, 4.0)
    assert "pehe" not in scores and "cate" not in scores


def test_a_uniform_distribution_is_scored_as_its_formulas_say(toy):
    (data,) = load_datasets(toy)
    width = 40.0
    edges = jnp.linspace(-width / 2, width / 2, 201)
    rows = len(data.query_x)
    logits = jnp.zeros((rows, 200))
    scores = score(data, Answer(distribution=BarDistribution(logits, edges)))
    spread = np.ptp(data.query_y)
    # The half-normal tails hold a hundredth of the mass.
    assert scores["nll"] == pytest.approx(np.log(width / spread), abs=1e-3)
    assert scores["entropy"] == pytest.approx(np.log(width / spread), abs=2e-2)
    # CRPS of a uniform variable at y: y^2 / width + width / 12.
    expected = np.mean(np.square(data.query_y, dtype=float)) / width + width / 12
    assert scores["crps"] == pytest.approx(expected / spread, rel=1e-2)
    inside = np.mean(np.abs(data.query_y) <= 0.05 * width)
    assert scores["picp_0.1"] == pytest.approx(inside, abs=0.06)
    assert scores["picp_0.95"] == 1.0


def test_the_interval_of_a_median_shrinks_with_the_datasets():
    rng = np.random.default_rng(0)
    widths = []
    for size in (20, 320):
        low, high = median_interval(rng.normal(size=size))
        assert low < 0.3 and high > -0.3
        widths.append(high - low)
    assert widths[0] / widths[1] == pytest.approx(4, rel=0.6)


def test_the_interval_of_a_median_holds_it_as_often_as_it_says():
    rng = np.random.default_rng(3)
    for level in (0.5, 0.95):
        bounds = [median_interval(rng.normal(size=40), level, 400) for _ in range(400)]
        share = np.mean([low <= 0 <= high for low, high in bounds])
        assert share == pytest.approx(level, abs=0.06)


def test_pairing_sees_a_difference_that_separate_intervals_hide():
    """Datasets differ a hundredfold in difficulty; one method is always 20 % worse."""
    easy = np.exp(np.random.default_rng(1).normal(scale=2, size=60))
    table = compare_methods(pd.DataFrame({"ours": easy, "worse": 1.2 * easy}), "ours")
    assert table.loc["ours", "high"] > table.loc["worse", "low"]
    assert table.loc["worse", "ratio"] == pytest.approx(1.2)
    assert table.loc["worse", "ratio_low"] == pytest.approx(1.2)


def test_a_method_is_compared_where_it_has_an_answer():
    errors = pd.DataFrame({"ours": [1.0, 1.0, 9.0, 9.0], "other": [2.0, 2.0, np.nan, np.nan]})
    row = compare_methods(errors, "ours").loc["other"]
    assert row["ratio"] == pytest.approx(2.0)
    assert row["datasets"] == 2


def test_datasets_without_an_answer_widen_no_interval():
    answers = np.random.default_rng(4).lognormal(size=12)
    alone = compare_methods(pd.DataFrame({"few": answers}), "few").loc["few"]
    beside = np.concatenate([answers, np.full(88, np.nan)])
    table = pd.DataFrame({"all": np.ones(100), "few": beside})
    row = compare_methods(table, "all").loc["few"]
    assert list(row[["low", "high"]]) == list(alone[["low", "high"]])
    assert list(row[["ratio_low", "ratio_high"]]) == list(alone[["low", "high"]])
    assert compare_methods(table.assign(few=np.nan), "all").loc["few"].drop("datasets").isna().all()


def test_ranks_find_the_better_method():
    pytest.importorskip("autorank")
    noise = np.random.default_rng(2).normal(scale=0.1, size=(40, 3))
    noise[:, 1:] += 1.0
    errors = pd.DataFrame(noise, columns=["best", "a", "b"])
    result = rank_methods(errors)
    ranks = result.rankdf["meanrank"]
    assert ranks["best"] == 1.0
    assert abs(ranks["a"] - ranks["b"]) < result.cd < ranks["a"] - ranks["best"]


def test_too_few_datasets_for_ranks_are_refused():
    with pytest.raises(ValueError, match="at least"):
        rank_methods(pd.DataFrame(np.ones((2, 3))))
