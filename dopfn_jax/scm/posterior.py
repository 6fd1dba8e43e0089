"""A posterior over SCMs: draws of everything unknown, and what they say under interventions."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jax.typing import ArrayLike

from dopfn_jax.scm.counterfactual import counterfactual
from dopfn_jax.scm.forward import sample
from dopfn_jax.scm.interventions import Intervention, observe
from dopfn_jax.scm.interventions import do as intervene
from dopfn_jax.scm.named import SCM

if TYPE_CHECKING:
    import arviz

# Draws answered at once: bounds memory at DRAWS x R x K numbers.
_DRAWS_AT_ONCE = 256


@dataclass(frozen=True, eq=False)
class Posterior:
    """Draws of an SCM's unknowns given data; `fit` makes it.

    Axes: C chains, S draws per chain, R rows.

    Attributes:
        scm: the observed SCM that was fitted.
        draws: {node: (C, S) for a parameter, (C, S, R) for a node without data; where `do` has put
            a function on it, its natural value}. One chain of one draw for `method="map"`.
        statistics: {name: (C, S)} of the sampler, such as "diverging"; empty for `method="map"`.
    """

    scm: SCM
    draws: dict[str, jax.Array]
    statistics: dict[str, jax.Array] = field(default_factory=dict)

    def scms(self) -> SCM:
        """The draws as one SCM pytree with leading axes (C, S) on every leaf, for `jax.vmap`."""
        return jax.vmap(jax.vmap(self._set))(self.draws)

    def mean(self) -> dict[str, jax.Array]:
        """Posterior means {node: () or (R,)}."""
        return {name: draws.mean(axis=(0, 1)) for name, draws in self.draws.items()}

    def predictive(
        self,
        key: jax.Array,
        do: Mapping[str, Intervention] | None = None,
        outputs: str | Iterable[str] | None = None,
        rows: Mapping[str, ArrayLike] | None = None,
        redraw: str | Iterable[str] = (),
    ) -> dict[str, jax.Array]:
        """Posterior predictive values under an intervention, with draws kept.

        Nodes that the intervention cannot change keep their data; a function intervention applies
        to the data. Their descendants are drawn anew with fresh noise. What the same units would
        have been with their own noise is `counterfactual`.

        Args:
            key: a PRNG key.
            do: {node: number, (R,) array, or function of the natural value}.
            outputs: nodes to return, all by default.
            rows: {node: (R,) data} of other units to predict for, in place of the data fitted.
            redraw: observed nodes whose data are to be forgotten and drawn anew: without any
                intervention, the replicates of a posterior predictive check.

        Returns:
            {node: (C, S, R), or (C, S) for parameters}.

        Raises:
            SCMError: an unknown node, or data on nodes that are to be drawn.
        """
        redraw = set(self.scm.require(redraw))
        interventions = dict(do or {})

        def one(draw: Mapping[str, jax.Array], draw_key: jax.Array) -> dict[str, jax.Array]:
            scm = self._set(draw, keep_rows=rows is None)
            if rows is not None:
                scm = observe(_without_rows(scm), rows)
            size = scm.rows  # do and redraw may leave no data to tell it
            data = {n: value for n, value in scm.observations.items() if n not in redraw}
            scm = intervene(scm.replace(observations=data), interventions)
            return sample(scm, draw_key, size, outputs)

        return self._over_draws(one, key)

    def counterfactual(
        self,
        do: Mapping[str, Intervention],
        outputs: str | Iterable[str] | None = None,
        rows: Mapping[str, ArrayLike] | None = None,
    ) -> dict[str, jax.Array]:
        """What the observed units would have been under an intervention, for every draw.

        Args:
            do: {node: number, (R,) array, or function of the natural value}.
            outputs: nodes to return; by default all that are observed or follow from these.
            rows: {node: (R,) data} of other units, in place of the data fitted.

        Returns:
            {node: (C, S, R), or (C, S) for parameters}.

        Raises:
            SCMError: as for `dopfn_jax.scm.counterfactual`.
        """

        def one(draw: Mapping[str, jax.Array], _: jax.Array) -> dict[str, jax.Array]:
            scm = self._set(draw, keep_rows=rows is None)
            if rows is not None:
                scm = _without_rows(scm)
            return counterfactual(scm, rows or {}, do, outputs)

        return self._over_draws(one, jax.random.key(0))

    def to_inference_data(self, **groups: Any) -> "arviz.InferenceData":
        """The posterior for ArviZ, with the observed data and the sampler's statistics.

        Args:
            groups: further groups of `arviz.from_dict`, such as
                posterior_predictive=posterior.predictive(key, redraw="y").

        Raises:
            ImportError: ArviZ is missing.
        """
        try:
            import arviz
        except ImportError as error:
            raise ImportError(
                "to_inference_data needs ArviZ: pip install 'dopfn-jax[bayes]'."
            ) from error
        as_numpy = partial(jax.tree.map, np.asarray)
        return arviz.from_dict(
            posterior=as_numpy(self.draws),
            sample_stats=as_numpy(self.statistics) or None,
            observed_data=as_numpy(self.scm.observations),
            **as_numpy(groups),
        )

    def _set(self, draw: Mapping[str, jax.Array], keep_rows: bool = True) -> SCM:
        """The SCM with one draw: parameters set for good, rows without data as if observed."""
        parameters = {name: v for name, v in draw.items() if not self.scm.nodes[name].per_row}
        latent = {name: v for name, v in draw.items() if name not in parameters}
        # Draws already reflect the data, so setting them must not release any.
        scm = intervene(self.scm, parameters).replace(observations=self.scm.observations)
        if not keep_rows:
            return scm
        return scm.replace(observations={**scm.observations, **latent})

    def _over_draws(
        self, function: Callable[[Any, jax.Array], dict[str, jax.Array]], key: jax.Array
    ) -> dict[str, jax.Array]:
        chains, size = next(iter(self.draws.values())).shape[:2]
        flat = {name: v.reshape(chains * size, *v.shape[2:]) for name, v in self.draws.items()}
        keys = jax.random.split(key, chains * size)
        # Validates on the host before anything is traced.
        jax.eval_shape(function, {name: v[0] for name, v in flat.items()}, keys[0])
        out = jax.jit(
            lambda arguments: jax.lax.map(
                lambda pair: function(*pair), arguments, batch_size=min(_DRAWS_AT_ONCE, len(keys))
            )
        )((flat, keys))
        return {name: v.reshape(chains, size, *v.shape[1:]) for name, v in out.items()}


def _without_rows(scm: SCM) -> SCM:
    return scm.replace(observations={n: v for n, v in scm.observations.items() if not v.ndim})
