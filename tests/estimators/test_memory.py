"""Memory on the device does not grow with the number of query rows."""

import gc
from collections.abc import Callable

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dopfn_jax.estimators import DoPFNRegressor, inference
from dopfn_jax.estimators.inference import padded_rows
from tests.estimators.small import COVARIATES, ROWS


@given(rows=st.integers(0, 10**6), context_rows=st.sampled_from([16, 1024, 12_288, 2**17]))
def test_chunks_cover_the_rows_within_the_budget(fitted, rows: int, context_rows: int) -> None:
    chunks = list(fitted.network_.chunks(rows, context_rows))
    starts = [chunk.start for chunk in chunks]
    assert starts == [0, *(chunk.stop for chunk in chunks[:-1])]
    assert chunks[-1].stop == rows
    largest = padded_rows(max(chunk.stop - chunk.start for chunk in chunks))
    scores = fitted.network_.model.config.heads * fitted.network_.tokens * context_rows * largest
    assert largest <= inference.CHUNK_ROWS
    assert scores <= inference.CHUNK_FLOATS or largest == 16
    # A program for the full chunks, and one for the rest.
    assert len({padded_rows(chunk.stop - chunk.start) for chunk in chunks}) <= 2


@pytest.fixture
def peak(monkeypatch: pytest.MonkeyPatch) -> Callable[..., int]:
    """The most bytes of arrays on the device whenever a chunk is asked for, above those before."""
    sizes: list[int] = []
    answer = inference.jitted_predict

    def live() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    def watched(*arguments):
        sizes.append(live())
        return answer(*arguments)

    monkeypatch.setattr(inference, "jitted_predict", watched)

    def peak(model: DoPFNRegressor, rows: int, output: str) -> int:
        X = np.random.default_rng(0).normal(size=(rows, COVARIATES))
        gc.collect()
        sizes.clear()
        before = live()
        assert np.isfinite(model.predict(X, 1, output)).all()
        assert len(sizes) == len(model.views_) * -(-rows // inference.CHUNK_ROWS)
        return max(sizes) - before

    return peak


@pytest.fixture(scope="module")
def ensemble(checkpoint) -> DoPFNRegressor:
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(ROWS, COVARIATES)), generator.normal(size=ROWS)
    model = DoPFNRegressor(checkpoint, n_estimators=2, transforms=("none", "log_y"))
    return model.fit(x, np.arange(ROWS) % 2, y)


@pytest.mark.parametrize(("output", "numbers"), [("mean", 0), ("quantiles", 3)])
def test_many_chunks_take_no_more_than_some(
    ensemble, peak, monkeypatch, output: str, numbers: int
) -> None:
    monkeypatch.setattr(inference, "CHUNK_ROWS", 16)
    few, many = (peak(ensemble, rows, output) for rows in (64, 1024))
    # On a CPU the answers themselves, three float32 quantiles a row, stay where they were made.
    assert 0 < many <= few + 4 * numbers * 1024


@pytest.mark.slow
def test_a_million_rows_take_no_more_than_ten_thousand(ensemble, peak) -> None:
    few, many = (peak(ensemble, rows, "mean") for rows in (10**4, 10**6))
    assert 0 < many <= few


def test_members_whose_contexts_differ_in_length_cut_the_queries_alike(
    checkpoint, monkeypatch
) -> None:
    monkeypatch.setattr(inference, "CHUNK_FLOATS", 2**12)
    generator = np.random.default_rng(0)
    x, y = generator.normal(size=(81, COVARIATES)), generator.normal(size=81)
    t = generator.permutation(np.arange(81) % 2)
    model = DoPFNRegressor(checkpoint, n_estimators=16, max_context=33).fit(x, t, y)
    lengths = {context.mask.shape[-1] for context in model.contexts_}
    assert len(lengths) > 1, lengths
    assert np.isfinite(model.predict(x[:40], 1, "median")).all()
