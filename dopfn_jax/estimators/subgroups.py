"""Subgroups that effects are averaged over: by a covariate, or by labels of the caller's.

Axes: M rows, F covariates.
"""

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from dopfn_jax.cells import Data, TableError
from dopfn_jax.tables import Schema

# Labels of subgroups: a column of the table, or one label per row (a mask, for example).
By = str | int | Data

# More subgroups than this are a number that has not been binned.
_MOST_GROUPS = 50


def group_rows(by: By, x: NDArray[np.float32], schema: Schema) -> dict[object, NDArray[np.intp]]:
    """Indices of the rows of each subgroup, in the order of the labels.

    Raises:
        TableError: an unknown column, labels of another length, too many subgroups, or no rows.
    """
    if isinstance(by, str | int):
        known = [column.name for column in schema.columns]
        # Names of data frames are kept as text.
        name = str(by) if schema.named else by
        if name not in known:
            raise TableError(f"by is {by!r}, but the covariates are {known}; or pass labels.")
        position = known.index(name)
        labels = pd.Series(schema.decode(x, position)).infer_objects()
        categories = schema.columns[position].categories
        if categories is not None:  # which have an order of their own
            labels = labels.astype(pd.CategoricalDtype(list(categories)))
    else:
        if isinstance(by, pd.DataFrame) and by.shape[1] == 1:
            by = by.iloc[:, 0]
        if np.ndim(by) != 1:
            raise TableError(f"by has shape {np.shape(by)}, but must hold one label per row.")
        # Arrays of text and NaN would hold the text "nan".
        ready = isinstance(by, pd.Series | pd.Categorical | list | tuple)
        labels = pd.Series(by if ready else np.asarray(by))
    if len(labels) != len(x):
        raise TableError(f"by has {len(labels)} labels, but there are {len(x)} rows.")
    if not len(x):
        raise TableError("X has no rows to average over.")
    codes, distinct = pd.factorize(labels, sort=True, use_na_sentinel=False)
    if len(distinct) > _MOST_GROUPS:
        raise TableError(
            f"by has {len(distinct)} different values, more than {_MOST_GROUPS} subgroups: bin "
            "them, for example with pandas.cut(values, 5)."
        )
    return {label: np.flatnonzero(codes == code) for code, label in enumerate(distinct)}


def index_of(groups: dict[object, NDArray[np.intp]], by: By) -> pd.Index:
    """The labels, with the name of what they came from."""
    name = by if isinstance(by, str | int) else getattr(by, "name", None)
    return pd.Index(list(groups), name=name)
