"""Bayesian inference of an SCM's unknowns with NumPyro."""

from collections.abc import Callable, Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from dopfn_jax.scm.distributions import Empirical, HalfNormal, Noise, Uniform, is_discrete
from dopfn_jax.scm.interventions import observe
from dopfn_jax.scm.named import SCM, SCMError
from dopfn_jax.scm.noise import NOISE_FAMILIES, STUDENT_T_DEGREES
from dopfn_jax.scm.posterior import Posterior

_MAP_STEPS = 500


def fit(
    scm: SCM,
    data: Mapping[str, ArrayLike],
    key: jax.Array,
    method: Literal["nuts", "map"] = "nuts",
    *,
    chains: int = 4,
    draws: int = 1000,
    warmup: int = 1000,
    progress: bool = False,
) -> Posterior:
    """The posterior over everything unknown: parameters, and nodes without data.

    Inference runs over the noise of the unknowns (a non-centred parametrisation); each observed
    node adds its log density given its parents.

    Args:
        scm: the model; what it observes already counts as data.
        data: {node: (R,) values}, or a data frame; {} where `scm` holds the data.
        key: a PRNG key.
        method: "nuts" draws by the No-U-Turn sampler, "map" finds a mode of the posterior
            density of the noise of the unknowns, the one near a random start by `key`.
        chains: number of chains C, run together. NUTS only, as are
        draws: draws per chain that are kept, S, and
        warmup: draws per chain that adapt the sampler.
        progress: show a progress bar.

    Raises:
        SCMError: no data, none that tells about anything unknown, data that `observe` refuses, an
            observed node that depends on unknowns and whose density is not known, or an unknown
            that is discrete.
        ImportError: NumPyro is missing.
        ValueError: an unknown method.
    """
    if method not in ("nuts", "map"):
        raise ValueError(f"method = {method!r}: choose 'nuts' or 'map'.")
    numpyro = _numpyro()
    scm = observe(scm, data)
    unknown, informative = _plan(scm)
    relevant = informative.union(unknown)
    relevant |= scm.ancestors(relevant)
    needed = [name for name in scm.names if name in relevant]
    priors = {name: to_numpyro(scm.nodes[name].noise) for name in unknown}

    def model() -> None:
        values: dict[str, jax.Array] = {}
        for name in needed:
            node = scm.nodes[name]
            if name in scm.observations:
                natural = jnp.asarray(scm.observations[name])
                values[name] = node.transform(natural)
                if name in informative:
                    density = node.log_density(values, natural)
                    numpyro.factor(f"{name} (log density)", density.sum())
                continue
            shape = (scm.rows,) if node.per_row else ()
            noise = None
            if name in priors:
                prior = priors[name].expand(shape).to_event(len(shape))
                noise = numpyro.sample(f"{name} (noise)", prior)
            natural = node.natural(values, noise)
            values[name] = node.transform(natural)
            if name in priors:
                # Of rows as data would be; a parameter is set for good.
                found = natural if node.per_row else values[name]
                numpyro.deterministic(name, jnp.broadcast_to(found, shape))

    if method == "map":
        return Posterior(scm, _mode(model, unknown, key))
    sampler = numpyro.infer.MCMC(
        numpyro.infer.NUTS(model),
        num_warmup=warmup,
        num_samples=draws,
        num_chains=chains,
        chain_method="vectorized",
        progress_bar=progress,
    )
    fields = ("diverging", "energy", "num_steps", "accept_prob", "potential_energy")
    sampler.run(key, extra_fields=fields)
    samples = sampler.get_samples(group_by_chain=True)
    statistics = dict(sampler.get_extra_fields(group_by_chain=True))
    for ours, theirs in (("n_steps", "num_steps"), ("acceptance_rate", "accept_prob")):
        statistics[ours] = statistics.pop(theirs)
    statistics["lp"] = -statistics.pop("potential_energy")
    return Posterior(scm, {name: samples[name] for name in unknown}, statistics)


def _plan(scm: SCM) -> tuple[list[str], set[str]]:
    """The unknown nodes to infer, and the observed nodes whose density depends on them."""
    if not scm.observations:
        raise SCMError("fit: no data. Give {node: values} for at least one node.")
    informative: set[str] = set()
    unknown: set[str] = set()
    for name in scm.observations:
        above = _direct_unknowns(scm, name)
        if not above:
            continue
        informative.add(name)
        unknown |= above
        node = scm.nodes[name]
        if not node.is_invertible or is_discrete(node.noise) or isinstance(node.noise, Empirical):
            raise SCMError(
                f"fit: the density of {name!r} given its parents is not known. Give it additive "
                "noise with a density, or node(..., inverse=...), or leave out its data."
            )
    if not informative:
        raise SCMError(
            "fit: the data tell about nothing that is unknown. Make coefficients or scales nodes "
            "with a prior, parameter(normal()), and observe what depends on them. A `do` releases "
            "the data below it: set what is known before `observe`."
        )
    # Parameters without data keep their prior, so that every draw sets all of them.
    unknown |= set(scm.unknown_parameters)
    for name in unknown:
        node = scm.nodes[name]
        if node.is_discrete or is_discrete(node.noise) or isinstance(node.noise, Empirical):
            raise SCMError(
                f"fit: {name!r} is unknown and discrete, which NUTS and MAP cannot infer. Observe "
                "it, or set it by do."
            )
        if node.per_row and scm.rows is None:
            raise SCMError(f"fit: {name!r} has no data and the number of rows is not known.")
    return [name for name in scm.names if name in unknown], informative


def _direct_unknowns(scm: SCM, name: str) -> set[str]:
    """Random nodes without data that reach `name` through nodes without data."""
    found: set[str] = set()
    stack = list(scm.nodes[name].inputs)
    while stack:
        other = stack.pop()
        if other in found or other in scm.observations:
            continue
        found.add(other)
        stack.extend(scm.nodes[other].inputs)
    return {other for other in found if scm.nodes[other].is_random}


def _mode(model: Callable[[], None], unknown: list[str], key: jax.Array) -> dict[str, jax.Array]:
    """Values of the unknowns at a mode, (1, 1, ...) each, by L-BFGS."""
    import optax

    numpyro = _numpyro()
    seeded = numpyro.handlers.seed(model, 0)
    sites = numpyro.handlers.trace(seeded).get_trace()
    supports = {name: sites[f"{name} (noise)"]["fn"].support for name in unknown}

    def noise(free: dict[str, jax.Array]) -> dict[str, jax.Array]:
        to_support = numpyro.distributions.biject_to
        return {f"{name} (noise)": to_support(supports[name])(free[name]) for name in unknown}

    def loss(free: dict[str, jax.Array]) -> jax.Array:
        return -numpyro.infer.util.log_density(seeded, (), {}, noise(free))[0]

    solver = optax.lbfgs()

    def step(state: Any) -> Any:
        free, memory, iteration, _ = state
        value, slope = optax.value_and_grad_from_state(loss)(free, state=memory)
        change, memory = solver.update(slope, memory, free, value=value, grad=slope, value_fn=loss)
        size = optax.tree.norm(slope)
        return optax.apply_updates(free, change), memory, iteration + 1, size

    def unfinished(state: Any) -> jax.Array:
        return (state[2] < _MAP_STEPS) & (state[3] > 1e-3)

    @jax.jit
    def minimum(start: dict[str, jax.Array]) -> tuple[dict[str, jax.Array], jax.Array]:
        size = jnp.full_like(optax.tree.norm(start), jnp.inf)
        state = (start, solver.init(start), jnp.int32(0), size)
        free = jax.lax.while_loop(unfinished, step, state)[0]
        return free, loss(free)

    # Not at zero, where the density is level in unknowns that are multiplied with one another.
    start = {
        name: 0.1 * jax.random.normal(name_key, sites[f"{name} (noise)"]["value"].shape)
        for name, name_key in zip(unknown, jax.random.split(key, len(unknown)), strict=True)
    }
    free, value = minimum(start)
    if not np.isfinite(value):
        raise SCMError(f"fit: the search for the mode ended at log density {-float(value)}.")
    at_mode = numpyro.handlers.substitute(seeded, noise(free))
    trace = numpyro.handlers.trace(at_mode).get_trace()
    return {name: jnp.asarray(trace[name]["value"])[None, None] for name in unknown}


def to_numpyro(noise: Any) -> Any:
    """The NumPyro distribution of a node's noise.

    Raises:
        SCMError: a traced or batched family.
        ImportError: NumPyro is missing.
    """
    dist = _numpyro().distributions
    if isinstance(noise, HalfNormal):
        return dist.HalfNormal(noise.scale)
    if isinstance(noise, Uniform):
        return dist.Uniform(noise.low, noise.high)
    if not isinstance(noise, Noise):
        return noise
    family = NOISE_FAMILIES[int(noise.family)]
    loc, scale = noise.loc, noise.scale
    if family == "gaussian":
        return dist.Normal(loc, scale)
    if family == "laplace":
        return dist.Laplace(loc, scale / np.sqrt(2.0))
    if family == "student_t":
        nu = STUDENT_T_DEGREES
        return dist.StudentT(nu, loc, scale / np.sqrt(nu / (nu - 2.0)))
    if family == "gumbel":
        stretch = scale * np.sqrt(6.0) / np.pi
        return dist.Gumbel(loc - np.euler_gamma * stretch, stretch)
    raise SCMError(f"noise family {family!r}: `fit` has no NumPyro distribution for it; add one")


def _numpyro() -> Any:
    try:
        import numpyro
        import numpyro.infer
    except ImportError as error:
        raise ImportError("fit needs NumPyro: pip install 'dopfn-jax[bayes]'.") from error
    return numpyro
