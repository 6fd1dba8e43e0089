"""Datasets with known answers: one format for released, generated, simulated and real tables."""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from sklearn.model_selection import KFold

Graph = dict[str, tuple[str, ...]]


@dataclass(frozen=True, eq=False)
class Dataset:
    """A table to learn from, questions about it, and as much of the truth as is known.

    Attributes:
        suite, case, number: what it is called in tables of results.
        x, t, y: the context: pre-treatment covariates (n, F), treatment (n,) and outcome (n,).
        query_x: (m, F) covariates of the query rows.
        query_t: (m,) treatment that is set.
        query_y: (m,) outcome of the same unit under it.
        effect: (m,) difference of the unit's two potential outcomes.
        cid0, cid1: (m,) exact E[y | do(t), x].
        unit_t, unit_y: (m,) what was observed of the same units; no method may learn from them,
            but a counterfactual conditions on them.
        ate: the average effect, where that alone is known.
        graph: parents of "t", "y", "x0", "x1", ... among one another, hidden nodes marginalised.
        facts: what the ablations group by: rows, nodes, edges, noise and so on.
    """

    suite: str
    case: str
    number: int
    x: NDArray[np.floating]
    t: NDArray[np.floating]
    y: NDArray[np.floating]
    query_x: NDArray[np.floating]
    query_t: NDArray[np.floating]
    query_y: NDArray[np.floating] | None = None
    effect: NDArray[np.floating] | None = None
    cid0: NDArray[np.floating] | None = None
    cid1: NDArray[np.floating] | None = None
    unit_t: NDArray[np.floating] | None = None
    unit_y: NDArray[np.floating] | None = None
    ate: float | None = None
    graph: Graph | None = None
    facts: dict[str, float] = field(default_factory=dict)

    @property
    def key(self) -> tuple[str, str, int]:
        """What identifies it in tables of results."""
        return self.suite, self.case, self.number

    @property
    def fingerprint(self) -> str:
        """Changes with any number that a method sees or is scored on."""
        digest = hashlib.sha256()
        for name in ("x", "t", "y", "query_x", "query_t", "query_y", "effect", "cid0", "cid1"):
            digest.update(np.ascontiguousarray(getattr(self, name), np.float64).tobytes())
        return digest.hexdigest()[:12]

    @property
    def asks_interval(self) -> bool:
        """Whether intervals of the average effect are reported: where no unit's effect is known."""
        return self.effect is None

    @property
    def is_degenerate(self) -> bool:
        """Whether the context has one treatment arm only, so that no method can answer."""
        return len(np.unique(self.t)) < 2


def halves(rows: int) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """Context and query rows as the released code splits them."""
    split = KFold(2, shuffle=True, random_state=np.random.RandomState(1)).split(np.arange(rows))
    return next(split)


def load_dataset(path: str | Path, suite: str) -> Dataset:
    """Reads <case>/<number>.npz and splits it: half context, half queries.

    Arrays: x_obs and x_int (n, 1 + F), the treatment first; y_obs, y_int, y0, y1 (n,); cid0 and
    cid1 (n,) where known; meta, a JSON text with the graph and its scales.
    """
    path = Path(path)
    with np.load(path) as file:
        data = {name: file[name] for name in file.files}
    meta = json.loads(str(data["meta"])) if "meta" in data else {}
    context, query = halves(len(data["y_obs"]))
    return Dataset(
        suite=suite,
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
        unit_t=data["x_obs"][query, 0],
        unit_y=data["y_obs"][query],
        graph=_shown_graph(meta) if "edges" in meta else None,
        facts=_facts(data, meta),
    )


def load_datasets(
    folder: str | Path, suite: str = "released", most: int | None = None
) -> Iterator[Dataset]:
    """All datasets below `folder`, or the `most` first of each case.

    Raises:
        FileNotFoundError: there is none.
    """
    paths = sorted(Path(folder).glob("*/*.npz"))
    if not paths:
        raise FileNotFoundError(
            f"{folder}: holds no <case>/<number>.npz; give the folder of the case studies"
        )
    for path in paths:
        if most is None or int(path.stem) <= most:
            yield load_dataset(path, suite)


def marginalise(
    nodes: Sequence[str], edges: Sequence[tuple[str, str]], shown: Mapping[str, str]
) -> Graph:
    """The graph over the shown nodes: a parent reaches its child through hidden nodes only.

    Args:
        nodes: all nodes in topological order.
        edges: (parent, child).
        shown: {node: the name that it gets}.
    """
    parents = {node: {parent for parent, child in edges if child == node} for node in nodes}
    for node in nodes:
        while hidden := {parent for parent in parents[node] if parent not in shown}:
            parents[node] = (parents[node] - hidden).union(*(parents[name] for name in hidden))
    return {
        shown[node]: tuple(shown[parent] for parent in nodes if parent in parents[node])
        for node in nodes
        if node in shown
    }


def _shown_graph(meta: dict[str, Any]) -> Graph:
    columns = [name for name in meta["x_keys"] if name != meta["t_key"]]
    shown = {name: f"x{column}" for column, name in enumerate(columns)}
    shown |= {meta["t_key"]: "t", meta["y_key"]: "y"}
    edges = [(parent, child) for parent, child in meta["edges"]]
    order = _topological(meta["nodes"], edges)
    return marginalise(order, edges, shown)


def _topological(nodes: Sequence[str], edges: Sequence[tuple[str, str]]) -> list[str]:
    order: list[str] = []
    while len(order) < len(nodes):
        order += [
            node
            for node in nodes
            if node not in order
            and all(parent in order for parent, child in edges if child == node)
        ]
    return order


def _facts(data: dict[str, NDArray], meta: dict[str, Any]) -> dict[str, float]:
    spread = float(np.ptp(data["y_int"]))
    facts = {
        "rows": float(len(data["y_obs"])),
        "effect_size": abs(float(np.mean(data["y1"] - data["y0"]))) / spread if spread else 0.0,
    }
    if "cid_error" in data and "cid0" in data and spread:
        # Of the exact E[y | do(t), x] as it has been computed: over the range, as errors are.
        facts["truth_error"] = float(np.sqrt(np.mean(np.square(data["cid_error"])))) / spread
    if "edges" in meta:
        hidden = set(meta["nodes"]) - set(meta["x_keys"]) - {meta["t_key"], meta["y_key"]}
        facts |= {
            "nodes": float(len(meta["nodes"])),
            "edges": float(len(meta["edges"])),
            "hidden": float(len(hidden)),
            "confounded": float(_is_confounded(meta, hidden)),
            "noise": float(meta.get("noise_std", np.nan)),
        }
    return facts


def _is_confounded(meta: dict[str, Any], hidden: set[str]) -> bool:
    """Whether a hidden node causes treatment and outcome through hidden nodes alone."""

    def causes(node: str, target: str) -> bool:
        children = [child for parent, child in meta["edges"] if parent == node]
        return target in children or any(causes(c, target) for c in children if c in hidden)

    return any(causes(node, meta["t_key"]) and causes(node, meta["y_key"]) for node in hidden)
