"""A small table, and how close answers must be."""

import numpy as np
import pandas as pd

ROWS, COVARIATES = 16, 3


def table(rows: int = ROWS) -> tuple[pd.DataFrame, np.ndarray, np.ndarray]:
    generator = np.random.default_rng(0)
    X = pd.DataFrame(generator.normal(size=(rows, COVARIATES)), columns=["age", "dose", "score"])
    t = generator.permutation(np.arange(rows) % 2)
    y = 3 * X["age"].to_numpy() + t * X["dose"].to_numpy() + generator.normal(size=rows) + 10
    return X, t, y


def assert_same(actual, expected, tolerance: float = 1e-5) -> None:
    """Equal up to a tolerance relative to the largest expected value."""
    np.testing.assert_allclose(actual, expected, atol=tolerance * np.abs(expected).max())
