"""Structural causal models as pure functions: those that the prior samples, and a user's own.

`SCM` is the named model that users write. `structure.SCM` is its array form, a batch of which the
prior samples; `SCM.from_prior` and `SCM.to_arrays` lead from one to the other.
"""

from dopfn_jax.scm.counterfactual import counterfactual
from dopfn_jax.scm.distributions import (
    bernoulli,
    empirical,
    gumbel,
    half_normal,
    laplace,
    normal,
    student_t,
    uniform,
)
from dopfn_jax.scm.fit import fit
from dopfn_jax.scm.forward import sample
from dopfn_jax.scm.graphs import d_separated, is_backdoor_set, is_frontdoor_set
from dopfn_jax.scm.interventions import do, observe
from dopfn_jax.scm.named import SCM, SCMError
from dopfn_jax.scm.nodes import Node, binary, linear, node, parameter
from dopfn_jax.scm.noise import sample_noise
from dopfn_jax.scm.posterior import Posterior
from dopfn_jax.scm.propagate import propagate
from dopfn_jax.scm.queries import Estimate, true_ate, true_cate, true_cid
from dopfn_jax.scm.regression import fit_mechanisms, interventional
from dopfn_jax.scm.structure import descendants

__all__ = [
    "SCM",
    "Estimate",
    "Node",
    "Posterior",
    "SCMError",
    "bernoulli",
    "binary",
    "counterfactual",
    "d_separated",
    "descendants",
    "do",
    "empirical",
    "fit",
    "fit_mechanisms",
    "gumbel",
    "half_normal",
    "interventional",
    "is_backdoor_set",
    "is_frontdoor_set",
    "laplace",
    "linear",
    "node",
    "normal",
    "observe",
    "parameter",
    "propagate",
    "sample",
    "sample_noise",
    "student_t",
    "true_ate",
    "true_cate",
    "true_cid",
    "uniform",
]
