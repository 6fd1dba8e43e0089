"""Structural causal models: graphs, mechanisms, noise, propagation and interventions, as pure functions."""

from dopfn_jax.scm.noise import sample_noise
from dopfn_jax.scm.propagate import propagate
from dopfn_jax.scm.structure import SCM, descendants

__all__ = ["SCM", "descendants", "propagate", "sample_noise"]
