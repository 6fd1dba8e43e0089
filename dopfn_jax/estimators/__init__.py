"""The scikit-learn-like face: tables in (NumPy, pandas, JAX arrays), effects out (NumPy).

`DoPFNRegressor` is the one class to use. Its parts, lowest first: `inference` (padding, chunks,
compilations), `transforms` (of covariates and outcome), `views` (what each member of an ensemble
sees), `fitting` (settings, fit, queries), `effects` (the effect vocabulary), `diagnostics`
(overlap, placebo, summary), `batch` (many tables at once), `archive` (save and load), `regressor`
(predictions; the public class).
"""

from dopfn_jax.estimators.regressor import DoPFNRegressor

__all__ = ["DoPFNRegressor"]
