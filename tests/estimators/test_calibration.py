import jax
import numpy as np
import pandas as pd
import pytest

from dopfn_jax.calibration import calibration_report
from dopfn_jax.cells import TableError
from dopfn_jax.estimators import DoPFNRegressor
from tests.estimators.small import COVARIATES, ROWS, table


@pytest.fixture(scope="module")
def query() -> tuple[pd.DataFrame, np.ndarray]:
    return draw(ROWS)


def draw(rows: int) -> tuple[pd.DataFrame, np.ndarray]:
    generator = np.random.default_rng(1)
    x = pd.DataFrame(generator.normal(size=(rows, COVARIATES)), columns=table()[0].columns)
    return x, generator.integers(2, size=rows)


@pytest.mark.slow
def test_outcomes_drawn_from_the_predictions_are_calibrated(fitted) -> None:
    x, t = draw(600)
    y = fitted.sample(x, t, 1)[0]
    report = calibration_report(fitted, x, t, y)
    np.testing.assert_allclose(report.coverage, report.levels, atol=0.06)
    assert report.calibration_error < 0.03
    assert np.histogram(report.pit, 4, (0, 1))[0].min() > 110
    assert (np.diff(report.widths) > 0).all()


def test_scores_are_those_of_the_distributions(fitted, query) -> None:
    x, t = query
    y = np.linspace(0, 20, ROWS)
    report = calibration_report(fitted, x, t, y, levels=(0.5,))
    answer = fitted.predict_distribution(x, t)

    @jax.jit
    def scores(answer, y):
        return -answer.log_prob(y).mean(), answer.crps(y).mean()

    nll, crps = scores(answer, y.astype(np.float32))
    assert report.nll == pytest.approx(float(nll), rel=1e-4)
    assert report.crps == pytest.approx(float(crps), rel=1e-4)
    low, high = fitted.predict(x, t, "quantiles", [0.25, 0.75]).T
    assert report.coverage[0] == ((y >= low) & (y <= high)).mean()
    assert report.widths[0] == pytest.approx((high - low).mean(), rel=1e-4)


def test_wrong_centres_and_widths_show(fitted, query) -> None:
    x, t = query
    centre = fitted.predict(x, t, "median")
    narrow = calibration_report(fitted, x, t, centre)
    assert (narrow.coverage == 1).all()
    spread = np.random.default_rng(0).normal(size=ROWS) * 1000
    assert (calibration_report(fitted, x, t, centre + spread).coverage < 0.2).all()


def test_the_report_prints_and_becomes_plain(fitted, query) -> None:
    x, t = query
    report = calibration_report(fitted, x, t, fitted.predict(x, t))
    assert str(report).startswith("16 rows; CRPS ")
    assert report.to_dict()["picp"]["level"] == report.levels.tolist()


def test_refusals(checkpoint, fitted) -> None:
    X, t, y = table()
    with pytest.raises(ValueError, match=r"levels are \(1\.5,\)"):
        calibration_report(fitted, X, t, y, levels=(1.5,))
    with pytest.raises(TableError, match="y has 3 rows and X 16"):
        calibration_report(fitted, X, t, y[:3])
    binary = DoPFNRegressor(checkpoint).fit(X, t, y > 10)
    with pytest.raises(TableError, match="brier_score_loss"):
        calibration_report(binary, X, t, y > 10)
