"""The methods that are compared, by name: each maps a dataset to its answers.

Libraries run at their defaults unless a name says otherwise. A method whose package is not
installed is reported as absent, never replaced.
"""

import functools
import importlib.util
import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dopfn_jax.checkpoints import (
    DEFAULT_CHECKPOINT,
    Checkpoint,
    from_pretrained,
    weights_checksum,
)
from dopfn_jax.estimators import DoPFNRegressor
from dopfn_jax.evaluation.datasets import Dataset, Graph
from dopfn_jax.evaluation.metrics import Answer

# Draws per row of the interventional means of a fitted graph.
_GRAPH_DRAWS = 30


class NotApplicable(ValueError):
    """The method has no answer for such a dataset; the message says why."""


@dataclass(frozen=True)
class Method:
    """A way to answer.

    Attributes:
        answer: from a dataset and a seed.
        packages: what must be installed besides this package's own requirements.
        sees_truth: it uses what a practitioner would not have: the true graph, the unit's own
            outcome, or the exact answer. Not a competitor.
    """

    answer: Callable[[Dataset, int], Answer]
    packages: tuple[str, ...] = ()
    sees_truth: bool = False

    @property
    def absent(self) -> str:
        """The first package that is missing; empty if the method can run."""
        missing = [name for name in self.packages if importlib.util.find_spec(name) is None]
        return missing[0] if missing else ""


def find_method(name: str) -> Method:
    """A method by name.

    `dopfn[:<checkpoint>][,<setting>=<value>...]` takes a shipped name or a folder, and settings of
    `DoPFNRegressor`, as in "dopfn:runs/cpu,n_estimators=4,transforms=none+quantile_y".

    Raises:
        ValueError: no such method or setting.
    """
    if is_dopfn(name):
        checkpoint, settings = _read_name(name)
        return Method(functools.partial(_dopfn, checkpoint=checkpoint, settings=settings))
    if name not in METHODS:
        raise ValueError(
            f"method {name!r}: choose from dopfn, dopfn:<checkpoint>, {', '.join(METHODS)}"
        )
    return METHODS[name]


def is_dopfn(name: str) -> bool:
    """Whether a method is this package's model, whatever its weights and settings."""
    return re.match(r"dopfn([:,]|$)", name) is not None


def sees_truth(name: str) -> bool:
    """`Method.sees_truth` of a method by name."""
    return not is_dopfn(name) and find_method(name).sees_truth


def checksum(name: str) -> str:
    """SHA-256 of the weights behind a method, empty for one without."""
    if not is_dopfn(name):
        return ""
    path, _ = _read_name(name)
    return weights_checksum(path)


def _read_name(name: str) -> tuple[str, dict[str, Any]]:
    """The checkpoint and the settings of `DoPFNRegressor` in a method's name."""
    first, *settings = name.split(",")
    read = {}
    known = DoPFNRegressor().get_params()
    for setting in settings:
        key, _, value = setting.partition("=")
        if key in ("checkpoint", "random_state") or key not in known or not value:
            raise ValueError(
                f"method {name!r}: {setting!r} is not <setting>=<value> of DoPFNRegressor, such as "
                "n_estimators=4"
            )
        is_tuple = isinstance(known[key], tuple)
        read[key] = tuple(value.split("+")) if is_tuple else _plain(value)
    return first.partition(":")[2] or DEFAULT_CHECKPOINT, read


def _plain(value: str) -> Any:
    """A number, truth value or null as JSON writes it; else the text."""
    try:
        return json.loads(value)
    except json.JSONDecodeError:
        return value


@functools.lru_cache(maxsize=8)
def _load(checkpoint: str) -> Checkpoint:
    return from_pretrained(checkpoint)


def _dopfn(data: Dataset, seed: int, checkpoint: str, settings: dict[str, Any]) -> Answer:
    weights = _load(checkpoint)
    if weights.config.prior.case_study not in ("", data.case):
        raise NotApplicable(f"trained on {weights.config.prior.case_study} alone")
    model = DoPFNRegressor(weights, random_state=seed, **settings)
    model.fit(data.x, data.t, data.y)
    low, high = (model.predict(data.query_x, arm) for arm in (0, 1))
    known = data.query_y is not None
    return _from_arms(
        data,
        low,
        high,
        distribution=model.predict_distribution(data.query_x, data.query_t) if known else None,
        # It costs dozens of passes.
        ate_interval=_interval(model, data) if data.asks_interval else None,
    )


def _interval(model: DoPFNRegressor, data: Dataset) -> tuple[float, float]:
    """Of the average over the query rows, which may be the treated ones of the context."""
    if np.array_equal(data.query_x, data.x[data.t == 1], equal_nan=True):
        return model.att_interval()
    return model.ate_interval(data.query_x)


def _from_arms(data: Dataset, low: NDArray, high: NDArray, **others: Any) -> Answer:
    """The answers of a method that predicts E[y | do(t), x] under both arms."""
    return Answer(
        cid=np.where(data.query_t > 0.5, high, low),
        cate=high - low,
        observational=None if data.unit_t is None else np.where(data.unit_t > 0.5, high, low),
        **others,
    )


def _regressor(name: str, seed: int) -> Any:
    from sklearn.ensemble import HistGradientBoostingRegressor, RandomForestRegressor
    from sklearn.linear_model import LinearRegression

    if name == "rf":
        return RandomForestRegressor(random_state=seed)
    if name == "histgb":
        return HistGradientBoostingRegressor(random_state=seed)
    return LinearRegression()


def _with_treatment(t: NDArray | float, x: NDArray) -> NDArray:
    return np.column_stack([np.broadcast_to(t, len(x)), x])


def _s_learner(data: Dataset, seed: int, model: Callable[[int], Any]) -> Answer:
    """One regression of y on (t, x); its CID is plain supervised prediction."""
    fitted = model(seed).fit(_with_treatment(data.t, data.x), data.y)
    low, high = (fitted.predict(_with_treatment(arm, data.query_x)) for arm in (0.0, 1.0))
    return _from_arms(data, low, high)


def _t_learner(data: Dataset, seed: int, model: Callable[[int], Any]) -> Answer:
    """A regression of y on x in each arm."""
    if not data.x.shape[1]:
        raise NotApplicable("no covariates to regress on")
    low, high = (
        model(seed).fit(data.x[data.t == arm], data.y[data.t == arm]).predict(data.query_x)
        for arm in (0, 1)
    )
    return _from_arms(data, low, high)


def _x_learner(data: Dataset, seed: int) -> Answer:
    from econml.metalearners import XLearner

    # The propensity is EconML's default, a logistic regression.
    learner = XLearner(models=_regressor("rf", seed))
    return _effects(learner.fit(data.y, data.t, X=data.x), data)


def _linear_dml(data: Dataset, seed: int, tuned: bool = False) -> Answer:
    from econml.dml import LinearDML

    # EconML picks the nuisance models of a list by cross-validation.
    models = {name: ["linear", "poly", "forest", "gbf"] for name in ("model_y", "model_t")}
    learner = LinearDML(discrete_treatment=True, random_state=seed, **(models if tuned else {}))
    return _effects(learner.fit(data.y, data.t, X=data.x), data)


def _causal_forest(data: Dataset, seed: int, tuned: bool = False) -> Answer:
    from econml.dml import CausalForestDML

    learner = CausalForestDML(discrete_treatment=True, random_state=seed)
    if tuned:
        learner.tune(data.y, data.t, X=data.x)
    return _effects(learner.fit(data.y, data.t, X=data.x), data)


def _effects(learner: Any, data: Dataset) -> Answer:
    return Answer(cate=np.asarray(learner.effect(data.query_x)).ravel())


def _mean(data: Dataset, seed: int) -> Answer:
    constant = np.full(len(data.query_x), data.y.mean())
    return Answer(cid=constant, observational=constant)


def _zero(data: Dataset, seed: int) -> Answer:
    return Answer(cate=np.zeros(len(data.query_x)))


def _difference_in_means(data: Dataset, seed: int) -> Answer:
    low, high = (np.full(len(data.query_x), data.y[data.t == arm].mean()) for arm in (0, 1))
    return _from_arms(data, low, high)


def _floor(data: Dataset, seed: int) -> Answer:
    if data.cid0 is None or data.cid1 is None:
        raise NotApplicable("the exact conditional means are not known")
    return Answer(
        cid=np.where(data.query_t > 0.5, data.cid1, data.cid0), cate=data.cid1 - data.cid0
    )


def _adjust(data: Dataset, seed: int, weighting: bool) -> Answer:
    """Standardisation by a linear outcome model, or stabilised IPW by a logistic one.

    Covariates and their squares, as in Hernan and Robins, Causal Inference: What If, chapters 12
    and 13; the outcome model also has products of treatment and covariates.
    """
    from sklearn.linear_model import LinearRegression, LogisticRegression
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(np.vstack([data.x, data.query_x]))
    rows = len(data.query_x)

    def features(x: NDArray) -> NDArray:
        x = scaler.transform(x)
        return np.column_stack([x, x**2])

    if weighting:
        if data.ate is not None:
            raise NotApplicable("weights are for the effect on all rows, the truth is another")
        model = LogisticRegression(C=np.inf, max_iter=5000).fit(features(data.x), data.t)
        share = model.predict_proba(features(data.x))[:, 1]
        weight = np.where(data.t > 0.5, data.t.mean() / share, (1 - data.t.mean()) / (1 - share))
        low, high = (
            np.average(data.y[data.t == arm], weights=weight[data.t == arm]) for arm in (0, 1)
        )
        return Answer(cate=np.full(rows, high - low))

    def design(t: NDArray | float, x: NDArray) -> NDArray:
        t = np.broadcast_to(t, len(x))[:, None]
        return np.column_stack([t, features(x), t * scaler.transform(x)])

    fitted = LinearRegression().fit(design(data.t, data.x), data.y)
    return Answer(
        cate=fitted.predict(design(1.0, data.query_x)) - fitted.predict(design(0.0, data.query_x))
    )


def _columns(x: NDArray, t: NDArray | None, y: NDArray | None) -> dict[str, NDArray]:
    columns = {f"x{k}": x[:, k] for k in range(x.shape[1])}
    columns |= {} if t is None else {"t": t}
    columns |= {} if y is None else {"y": y}
    return {name: np.asarray(column, np.float64) for name, column in columns.items()}


def _known_graph(data: Dataset) -> Graph:
    if data.graph is None:
        raise NotApplicable("the graph is not known")
    return data.graph


def _units(data: Dataset) -> dict[str, NDArray]:
    if data.unit_t is None or data.unit_y is None:
        raise NotApplicable("the units' own treatment and outcome are not known")
    return _columns(data.query_x, data.unit_t, data.unit_y)


def _fitted_scm(data: Dataset, seed: int, counterfactual: bool) -> Answer:
    """This package's SCM over the true graph, random forests as mechanisms."""
    import jax

    from dopfn_jax.scm import counterfactual as answer_counterfactual
    from dopfn_jax.scm.regression import fit_mechanisms, interventional

    graph, units = _known_graph(data), _units(data)
    linear = {"t": "linear"}  # its mechanism is replaced by every question
    forests = {name: _regressor("rf", seed) for name, parents in graph.items() if parents}
    scm = fit_mechanisms(
        graph, _columns(data.x, data.t, data.y), forests | linear if graph["t"] else forests
    )

    def outcome(arm: float) -> NDArray:
        if counterfactual:
            return np.asarray(answer_counterfactual(scm, units, {"t": arm}, "y")["y"])
        fixed = scm.descendants("t") | {"t"}
        rows = {name: column for name, column in units.items() if name not in fixed}
        if not rows:  # nothing is known of the units
            rows = {"t": np.full(len(data.query_x), arm)}
            return np.asarray(
                interventional(scm, rows, {}, jax.random.key(seed), _GRAPH_DRAWS, "y")["y"]
            )
        return np.asarray(
            interventional(scm, rows, {"t": arm}, jax.random.key(seed), _GRAPH_DRAWS, "y")["y"]
        )

    return _from_arms(data, outcome(0.0), outcome(1.0))


def _dowhy(data: Dataset, seed: int, counterfactual: bool) -> Answer:
    """DoWhy's graphical causal model over the true graph, random forests as mechanisms."""
    graph, units = _known_graph(data), pd.DataFrame(_units(data))
    import networkx
    from dowhy import gcm

    gcm.util.general.set_random_seed(seed)
    gcm.config.disable_progress_bars()
    gcm.config.set_default_n_jobs(1)
    model = gcm.InvertibleStructuralCausalModel(
        networkx.DiGraph([(parent, child) for child in graph for parent in graph[child]])
    )
    model.graph.add_nodes_from(graph)
    for name, parents in graph.items():
        mechanism: Any = gcm.EmpiricalDistribution()
        if parents:
            mechanism = gcm.AdditiveNoiseModel(
                gcm.ml.SklearnRegressionModel(_regressor("rf", seed))
            )
        model.set_causal_mechanism(name, mechanism)
    gcm.fit(model, pd.DataFrame(_columns(data.x, data.t, data.y)))

    def outcome(arm: float) -> NDArray:
        setting = {"t": lambda t: np.full(np.shape(t), arm)}
        if counterfactual:
            return gcm.counterfactual_samples(model, setting, observed_data=units)["y"].to_numpy()
        repeated = pd.concat([units] * _GRAPH_DRAWS, ignore_index=True)
        drawn = gcm.interventional_samples(model, setting, observed_data=repeated)["y"]
        return drawn.to_numpy().reshape(_GRAPH_DRAWS, -1).mean(axis=0)

    return _from_arms(data, outcome(0.0), outcome(1.0))


def _tabpfn(seed: int) -> Any:
    from tabpfn import TabPFNRegressor

    return TabPFNRegressor(random_state=seed)


def _tabicl(seed: int) -> Any:
    from tabicl import TabICLRegressor

    return TabICLRegressor(random_state=seed)


def _causalpfn(data: Dataset, seed: int) -> Answer:
    from causalpfn import CATEEstimator

    estimator = CATEEstimator(device="cpu")
    estimator.fit(
        np.asarray(data.x, np.float32),
        np.asarray(data.t, np.float32),
        np.asarray(data.y, np.float32),
    )
    return Answer(cate=np.asarray(estimator.estimate_cate(np.asarray(data.query_x, np.float32))))


def _learner(kind: Callable[..., Answer], name: str) -> Callable[[Dataset, int], Answer]:
    return functools.partial(kind, model=functools.partial(_regressor, name))


_ECONML, _DOWHY = ("econml",), ("dowhy",)
METHODS: dict[str, Method] = {
    "mean": Method(_mean),
    "zero": Method(_zero),
    "diff_in_means": Method(_difference_in_means),
    "linear": Method(_learner(_s_learner, "linear")),
    "rf": Method(_learner(_s_learner, "rf")),
    "histgb": Method(_learner(_s_learner, "histgb")),
    "t_linear": Method(_learner(_t_learner, "linear")),
    "t_rf": Method(_learner(_t_learner, "rf")),
    "t_histgb": Method(_learner(_t_learner, "histgb")),
    "x_rf": Method(_x_learner, _ECONML),
    "linear_dml": Method(_linear_dml, _ECONML),
    "linear_dml_tuned": Method(functools.partial(_linear_dml, tuned=True), _ECONML),
    "causal_forest": Method(_causal_forest, _ECONML),
    "causal_forest_tuned": Method(functools.partial(_causal_forest, tuned=True), _ECONML),
    "standardisation": Method(functools.partial(_adjust, weighting=False)),
    "ipw": Method(functools.partial(_adjust, weighting=True)),
    "tabpfn": Method(functools.partial(_s_learner, model=_tabpfn), ("tabpfn",)),
    "tabicl": Method(functools.partial(_s_learner, model=_tabicl), ("tabicl",)),
    "causalpfn": Method(_causalpfn, ("causalpfn",)),
    "scm": Method(functools.partial(_fitted_scm, counterfactual=False), sees_truth=True),
    "scm_counterfactual": Method(
        functools.partial(_fitted_scm, counterfactual=True), sees_truth=True
    ),
    "dowhy": Method(functools.partial(_dowhy, counterfactual=False), _DOWHY, sees_truth=True),
    "dowhy_counterfactual": Method(
        functools.partial(_dowhy, counterfactual=True), _DOWHY, sees_truth=True
    ),
    "floor": Method(_floor, sees_truth=True),
}
