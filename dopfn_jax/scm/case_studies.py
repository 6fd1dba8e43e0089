"""The fixed graphs of the paper's case studies (Do-PFN, Appendix C.1 and Table 1)."""

from dataclasses import dataclass


@dataclass(frozen=True)
class CaseStudy:
    """A named causal graph; its treatment is node "t", its outcome node "y".

    Attributes:
        nodes: in topological order.
        edges: (parent, child).
        shown: the covariates that are shown; all others are hidden.
    """

    nodes: tuple[str, ...]
    edges: tuple[tuple[str, str], ...]
    shown: tuple[str, ...]


# The paper's equations, its figure and its released data disagree on the back-door and front-door
# graphs. The released graph stands under both names for comparability; `frontdoor_pearl` is the
# textbook one.
_RELEASED_DOOR = CaseStudy(
    nodes=("x1", "t", "m", "y"),
    edges=(("x1", "t"), ("x1", "y"), ("t", "m"), ("m", "y")),
    shown=("x1",),
)

CASE_STUDIES = {
    "observed_confounder": CaseStudy(
        nodes=("x1", "t", "y"), edges=(("x1", "t"), ("x1", "y"), ("t", "y")), shown=("x1",)
    ),
    "observed_mediator": CaseStudy(
        nodes=("t", "x1", "y"), edges=(("t", "x1"), ("x1", "y"), ("t", "y")), shown=("x1",)
    ),
    "confounder_mediator": CaseStudy(
        nodes=("x2", "t", "x1", "y"),
        edges=(("x2", "t"), ("x2", "y"), ("t", "x1"), ("x1", "y"), ("t", "y")),
        shown=("x1", "x2"),
    ),
    "unobserved_confounder": CaseStudy(
        nodes=("x1", "x2", "t", "y"),
        edges=(("x1", "t"), ("x1", "y"), ("x2", "t"), ("x2", "y"), ("t", "y")),
        shown=("x1",),
    ),
    "backdoor": _RELEASED_DOOR,
    "frontdoor": _RELEASED_DOOR,
    "frontdoor_pearl": CaseStudy(
        nodes=("u", "t", "m", "y"),
        edges=(("u", "t"), ("u", "y"), ("t", "m"), ("m", "y")),
        shown=("m",),
    ),
    "common_effect": CaseStudy(
        nodes=("t", "x1", "y"), edges=(("t", "y"), ("x1", "y")), shown=("x1",)
    ),
}
