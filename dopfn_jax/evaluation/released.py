"""The paper's released case studies: datasets with known potential outcomes, as .npz files."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from sklearn.model_selection import KFold
from tqdm import tqdm

from dopfn_jax.estimators import DoPFNRegressor


@dataclass(frozen=True)
class Dataset:
    """One dataset of a case study, split as the paper does: half context, half queries.

    Attributes:
        case, number: its folder and file name.
        x, t, y: the context: pre-treatment covariates (n, F), treatment (n,) and outcome (n,).
        query_x: (m, F) covariates of the query rows.
        query_t: (m,) treatment that is set.
        query_y: (m,) outcome of the same unit under it.
        effect: (m,) difference of the unit's two potential outcomes.
        cid0, cid1: (m,) exact E[y | do(t), x], or None where it is not known.
    """

    case: str
    number: int
    x: np.ndarray
    t: np.ndarray
    y: np.ndarray
    query_x: np.ndarray
    query_t: np.ndarray
    query_y: np.ndarray
    effect: np.ndarray
    cid0: np.ndarray | None
    cid1: np.ndarray | None


def load_datasets(folder: str | Path) -> Iterator[Dataset]:
    """All datasets below `folder`, laid out as <case>/<number>.npz.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = sorted(Path(folder).glob("*/*.npz"))
    if not paths:
        raise FileNotFoundError(
            f"{folder}: holds no <case>/<number>.npz; give the folder of the case studies"
        )
    for path in paths:
        data = np.load(path)
        rows = np.arange(len(data["y_obs"]))
        split = KFold(2, shuffle=True, random_state=np.random.RandomState(1)).split(rows)
        context, query = next(split)
        yield Dataset(
            case=path.parent.name,
            number=int(path.stem),
            x=data["x_obs"][context, 1:],
            t=data["x_obs"][context, 0],
            y=data["y_obs"][context],
            query_x=data["x_obs"][query, 1:],
            query_t=data["x_int"][query, 0],
            query_y=data["y_int"][query],
            effect=data["y1"][query] - data["y0"][query],
            cid0=data["cid0"][query] if "cid0" in data else None,
            cid1=data["cid1"][query] if "cid1" in data else None,
        )


def normalised_mse(error: np.ndarray, y: np.ndarray) -> float:
    """Mean squared error over the squared range of the queries' outcomes (Do-PFN, equation 10)."""
    return float(np.mean(np.square(error, dtype=np.float64)) / np.ptp(y) ** 2)


def evaluate(estimator: DoPFNRegressor, folder: str | Path) -> pd.DataFrame:
    """Errors of an estimator on every dataset, with those of the exact conditional means.

    A context with one treatment arm only answers nothing; it is left out for every method.

    Returns:
        Columns case, dataset, task ("cid" or "cate"), method ("dopfn" or "floor"), nmse.
    """
    records = []
    for data in tqdm(list(load_datasets(folder)), unit="dataset", mininterval=1):
        if len(np.unique(data.t)) < 2:
            continue
        fitted = estimator.fit(data.x, data.t, data.y)
        errors = {
            ("cid", "dopfn"): fitted.predict(data.query_x, data.query_t) - data.query_y,
            ("cate", "dopfn"): fitted.cate(data.query_x) - data.effect,
        }
        if data.cid0 is not None and data.cid1 is not None:
            exact = np.where(data.query_t > 0.5, data.cid1, data.cid0)
            errors["cid", "floor"] = exact - data.query_y
            errors["cate", "floor"] = data.cid1 - data.cid0 - data.effect
        records += [
            (data.case, data.number, task, method, normalised_mse(error, data.query_y))
            for (task, method), error in errors.items()
        ]
    return pd.DataFrame(records, columns=["case", "dataset", "task", "method", "nmse"])
