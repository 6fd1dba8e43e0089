"""The graph of a named SCM: drawings, networkx, and Pearl's graphical criteria."""

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import jax
import numpy as np

from dopfn_jax.scm.distributions import Bernoulli, Empirical, HalfNormal, Noise, Uniform, normal
from dopfn_jax.scm.mechanisms import MECHANISM_NAMES
from dopfn_jax.scm.named import SCM, SCMError
from dopfn_jax.scm.nodes import Argument, Binary, Constant, Linear, Node, linear, node
from dopfn_jax.scm.noise import NOISE_FAMILIES

if TYPE_CHECKING:
    import graphviz
    import networkx


def to_text(scm: SCM) -> str:
    """One line per node in topological order: its equation, and whether it is set or observed."""
    width = max((len(name) for name in scm.names), default=0)
    lines = []
    for name, child in scm.nodes.items():
        marks = [
            mark
            for mark, holds in (
                ("do", child.intervened),
                ("observed", name in scm.observations),
                ("parameter", not child.per_row and not child.intervened),
            )
            if holds
        ]
        suffix = f"  [{', '.join(marks)}]" if marks else ""
        lines.append(f"{name:<{width}} = {_equation(child)}{suffix}")
    return "\n".join(lines)


def _equation(child: Node) -> str:
    noise = _describe_noise(child)
    text = " + ".join(filter(None, [_describe_mechanism(child), noise])) or "0"
    if child.takes_noise:
        inner = child.mechanism.mechanism if isinstance(child.mechanism, Binary) else None
        arguments = ", ".join((*child.parents, noise))
        if isinstance(inner, Linear):
            arguments = " + ".join(filter(None, [_describe_linear(inner), noise]))
        text = f"{'binary' if isinstance(child.mechanism, Binary) else 'f'}({arguments})"
    for _ in child.transforms:
        text = f"do({text})"
    return text


def _describe_mechanism(child: Node) -> str:
    mechanism = child.mechanism
    if mechanism is None:
        return ""
    if isinstance(mechanism, Constant):
        return _number(mechanism.value)
    if isinstance(mechanism, Linear):
        return _describe_linear(mechanism)
    return f"f({', '.join(child.parents)})"


def _describe_linear(mechanism: Linear) -> str:
    def coefficient(value: Any) -> str:
        if isinstance(value, Argument):
            return mechanism.parents[value.position]
        return _number(value)

    terms = [
        f"{coefficient(weight)} {parent}".removeprefix("1 ")
        for weight, parent in zip(mechanism.weights, mechanism.parents, strict=False)
    ]
    bias = coefficient(mechanism.bias)
    if bias != "0":
        terms.insert(0, bias)
    total = " + ".join(terms).replace("+ -", "- ")
    nonlinearity = _named(mechanism.nonlinearity, MECHANISM_NAMES)
    return total if nonlinearity == "identity" or not terms else f"{nonlinearity}({total})"


def _describe_noise(child: Node) -> str:
    noise = child.noise
    if noise is None:
        return ""
    if isinstance(noise, Noise):
        family = _named(noise.family, NOISE_FAMILIES).replace("gaussian", "normal")
        return f"{family}({_number(noise.loc)}, {noise.scale_parent or _number(noise.scale)})"
    if isinstance(noise, Empirical):
        return "empirical(residuals)"
    name = {HalfNormal: "half_normal", Uniform: "uniform", Bernoulli: "bernoulli"}
    numbers = ", ".join(map(_number, jax.tree.leaves(noise)))
    return f"{name.get(type(noise), type(noise).__name__)}({numbers})"


def _number(value: Any) -> str:
    if not isinstance(value, (np.ndarray, np.generic)) and not hasattr(value, "shape"):
        return str(value)
    if np.ndim(value):
        return f"({np.shape(value)[0]} values)"
    try:
        return f"{float(value):.3g}"
    except TypeError:  # traced
        return "?"


def _named(index: Any, names: tuple[str, ...]) -> str:
    try:
        return names[int(index)]
    except TypeError:  # traced or batched
        return "g"


def to_graphviz(scm: SCM) -> "graphviz.Digraph":
    """A drawing; its `source` is DOT text, and Jupyter shows it where Graphviz is installed.

    Observed nodes are grey, parameters dashed, nodes that `do` has set are double. A function
    intervention is drawn as its natural value, which keeps the incoming edges, and the new one.

    Raises:
        ImportError: the Python package `graphviz` is missing.
    """
    try:
        import graphviz
    except ImportError as error:
        raise ImportError(_remedy("graphviz")) from error

    drawing = graphviz.Digraph()
    for name, child in scm.nodes.items():
        style = ["filled"] if name in scm.observations else []
        if not child.per_row:
            style.append("dashed")
        drawing.node(
            name,
            style=",".join(style),
            shape="box" if not child.is_random and not child.intervened else "ellipse",
            peripheries="2" if child.intervened else "1",
        )
    for name in scm.names:
        if _has_natural_value(scm, name):
            drawing.node(natural_name(name), style="dotted")
    drawing.edges(split_edges(scm))
    return drawing


def natural_name(name: str) -> str:
    """The name under which graphs show the natural value of a node that a function sets."""
    return f"{name} (natural)"


def _has_natural_value(scm: SCM, name: str) -> bool:
    return bool(scm.nodes[name].transforms and scm.nodes[name].inputs)


def split_edges(scm: SCM) -> list[tuple[str, str]]:
    """Edges in which a function intervention splits its node into natural and new value."""
    edges = []
    for parent, child in scm.edges:
        edges.append((parent, natural_name(child) if _has_natural_value(scm, child) else child))
    return edges + [
        (natural_name(name), name) for name in scm.names if _has_natural_value(scm, name)
    ]


def to_networkx(scm: SCM, parameters: bool = True) -> "networkx.DiGraph":
    """The graph; every node carries its `Node` as attribute `node`.

    Args:
        scm: the model.
        parameters: also include nodes with one value for all rows.

    Raises:
        ImportError: networkx is missing.
    """
    graph = _networkx().DiGraph()
    for name, child in scm.nodes.items():
        if parameters or child.per_row:
            graph.add_node(name, node=child)
    graph.add_edges_from((p, c) for p, c in scm.edges if p in graph and c in graph)
    return graph


def from_networkx(graph: "networkx.DiGraph", nodes: Mapping[str, Any] | None = None) -> SCM:
    """An SCM over a graph.

    Args:
        graph: a DAG over strings.
        nodes: {name: Node}, as for `SCM`; their parents must be those of the graph. Others take the
            attribute `node` that `to_networkx` writes, else they are the sum of their parents times
            the edges' attribute `weight` (default 1) plus standard normal noise.

    Raises:
        SCMError: nodes that are not in the graph, parents that differ from its edges, or a cycle.
        ImportError: networkx is missing.
    """
    _networkx()
    nodes = dict(nodes or {})
    for name in nodes:
        if name not in graph:
            raise SCMError(f"from_networkx: node {name!r} is not in the graph.")

    def default(name: str) -> Any:
        attributes = graph.nodes[name]
        if "node" in attributes:
            return attributes["node"]
        weights = {p: graph.edges[p, name].get("weight", 1.0) for p in graph.predecessors(name)}
        return node(linear(weights), normal()) if weights else normal()

    scm = SCM({name: nodes[name] if name in nodes else default(name) for name in graph})
    for name in scm.names:
        if set(scm.parents(name)) != set(graph.predecessors(name)):
            raise SCMError(
                f"from_networkx: node {name!r} uses parents {scm.parents(name)!r}, but the graph "
                f"has {tuple(graph.predecessors(name))!r}."
            )
    return scm


def d_separated(
    scm: SCM,
    x: str | Iterable[str],
    y: str | Iterable[str],
    given: str | Iterable[str] = (),
) -> bool:
    """Whether `given` blocks every path between `x` and `y` (Pearl, Causality, 1.2.3).

    Parameters count as known.

    Raises:
        SCMError: an unknown node, or sets that overlap.
        ImportError: networkx is missing.
    """
    x, y, given = (set(scm.require(names)) for names in (x, y, given))
    _require_disjoint(x, y, given)
    return _separated(_row_graph(scm), x, y, given)


def is_backdoor_set(
    scm: SCM, treatment: str, outcome: str, adjustment: str | Iterable[str] = ()
) -> bool:
    """Whether adjusting for `adjustment` identifies the effect (Pearl, Causality, 3.3.1).

    It must hold no descendant of the treatment and block every path into it.

    Raises:
        SCMError: an unknown node, or sets that overlap.
        ImportError: networkx is missing.
    """
    scm.require((treatment, outcome))
    adjustment = set(scm.require(adjustment))
    _require_disjoint({treatment}, {outcome}, adjustment)
    if adjustment & scm.descendants(treatment):
        return False
    graph = _row_graph(scm)
    graph.remove_edges_from(list(graph.out_edges(treatment)))
    return _separated(graph, {treatment}, {outcome}, adjustment)


def is_frontdoor_set(
    scm: SCM, treatment: str, outcome: str, mediators: str | Iterable[str]
) -> bool:
    """Whether `mediators` meet the front-door criterion (Pearl, Causality, 3.3.2).

    They must intercept every directed path from treatment to outcome, have no open back-door path
    from the treatment, and the treatment must block every back-door path from them to the outcome.

    Raises:
        SCMError: an unknown node, or sets that overlap.
        ImportError: networkx is missing.
    """
    scm.require((treatment, outcome))
    mediators = set(scm.require(mediators))
    _require_disjoint({treatment}, {outcome}, mediators)
    graph = _row_graph(scm)
    if treatment not in graph or outcome not in graph:
        raise SCMError(f"{treatment!r} and {outcome!r} must vary over rows: one is a parameter.")
    cut = graph.copy()
    cut.remove_nodes_from(mediators)
    if _networkx().has_path(cut, treatment, outcome):
        return False
    if not mediators:
        return True
    from_treatment = graph.copy()
    from_treatment.remove_edges_from(list(graph.out_edges(treatment)))
    if not _separated(from_treatment, {treatment}, mediators, set()):
        return False
    from_mediators = graph.copy()
    from_mediators.remove_edges_from(list(graph.out_edges(mediators)))
    return _separated(from_mediators, mediators, {outcome}, {treatment})


def _row_graph(scm: SCM) -> "networkx.DiGraph":
    graph = _networkx().DiGraph()
    graph.add_nodes_from(name for name, child in scm.nodes.items() if child.per_row)
    graph.add_edges_from(
        (p, c) for p, c in split_edges(scm) if p not in scm.parameters and c not in scm.parameters
    )
    return graph


def _separated(graph: "networkx.DiGraph", x: set[str], y: set[str], given: set[str]) -> bool:
    # A node that is not in the graph is a parameter, which counts as known.
    x, y, given = (names & set(graph) for names in (x, y, given))
    return not x or not y or bool(_networkx().is_d_separator(graph, x, y, given))


def _require_disjoint(x: set[str], y: set[str], given: set[str]) -> None:
    overlap = (x & y) | (x & given) | (y & given)
    if overlap:
        raise SCMError(f"{sorted(overlap)[0]!r} appears in more than one of the sets.")


def _networkx() -> Any:
    try:
        import networkx
    except ImportError as error:
        raise ImportError(_remedy("networkx")) from error
    return networkx


def _remedy(package: str) -> str:
    return f"this needs the package {package}: pip install 'dopfn-jax[graphs]'."
