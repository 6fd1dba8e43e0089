# ---
# jupyter:
#   jupytext:
#     notebook_metadata_filter: -jupytext
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # What if? Do, observe, fit and counterfactuals with a known graph
#
# The model of PyMC's example *Counterfactual generation using pymc do-operator*: a linear outcome
#
# $$y \sim \mathrm{Normal}(\beta_{y0} + \beta_{ay} a + \beta_{by} b + \beta_{cy} c,\ \sigma_y)$$
#
# We set its parameters with `do` to simulate data, condition on these with `observe`, infer the
# parameters with `fit`, and ask what $y$ would be under two interventions on $b$. Then the same
# question is put to Do-PFN, which is not told the graph.
#
# This file is the source; the notebook is made from it:
# `pip install 'dopfn-jax[examples]'`, then
# `jupytext --to notebook --execute examples/do_operator.py`.

# %%
import arviz
import jax
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd

from dopfn_jax.scm import (
    SCM,
    do,
    fit,
    half_normal,
    linear,
    node,
    normal,
    observe,
    parameter,
    sample,
)

plt.rcParams["figure.dpi"] = 72

KEY = jax.random.key(2)
TRUE = {"beta_y0": 0.0, "beta_ay": 1.5, "beta_by": 0.7, "beta_cy": 0.3, "sigma_y": 0.2}

# %% [markdown]
# ## The model
#
# Unknown parameters are nodes with a prior and one value for all rows. `y_mu` is deterministic.

# %%
model = SCM(
    {
        "beta_y0": parameter(normal()),
        "beta_ay": parameter(normal()),
        "beta_by": parameter(normal()),
        "beta_cy": parameter(normal()),
        "sigma_y": parameter(half_normal()),
        "a": normal(),
        "b": normal(),
        "c": normal(),
        "y_mu": linear({"a": "beta_ay", "b": "beta_by", "c": "beta_cy"}, bias="beta_y0"),
        "y": node(linear({"y_mu": 1.0}), normal(scale="sigma_y")),
    }
)
print(model)


# %% [markdown]
# `model.to_graphviz()` draws the graph where Graphviz is installed; here we draw it with networkx,
# by depth. Nodes that `do` has set are red, observed ones grey.


# %%
def draw(scm: SCM, title: str, ax: plt.Axes) -> None:
    import networkx

    depth: dict[str, int] = {}
    for name in scm.names:
        depth[name] = max((depth[parent] + 1 for parent in scm.parents(name)), default=0)
    layers = [[name for name in scm.names if depth[name] == d] for d in set(depth.values())]
    place = {n: (depth[n], len(layer) / 2 - i) for layer in layers for i, n in enumerate(layer)}
    colours = {name: "lightgrey" if name in scm.observations else "white" for name in scm.names}
    colours |= {name: "tomato" for name, child in scm.nodes.items() if child.intervened}
    networkx.draw(
        scm.to_networkx(),
        place,
        ax,
        labels={name: name for name in scm.names},
        node_color=[colours[name] for name in scm.names],
        edgecolors="black",
        node_size=900,
        font_size=7,
    )
    ax.set_title(title)


generative = do(model, TRUE)
fig, axes = plt.subplots(1, 2, figsize=(9, 5))
draw(model, "the model", axes[0])
draw(generative, "do(parameters)", axes[1])

# %% [markdown]
# ## Simulate data: `do` on the parameters

# %%
rows = sample(generative, KEY, 100, outputs=("a", "b", "c", "y"))
df = pd.DataFrame({name: np.asarray(rows[name]) for name in ("a", "b", "c", "y")})
df.head()

# %% [markdown]
# ## Infer the parameters: `observe` and `fit`

# %%
observed = observe(model, df)
posterior = fit(observed, {}, jax.random.key(1), chains=4, draws=1000)

fig, axes = plt.subplots(1, 5, figsize=(13, 2.4))
for ax, (name, value) in zip(axes, TRUE.items(), strict=True):
    ax.hist(np.asarray(posterior.draws[name]).ravel(), bins=40, color="steelblue")
    ax.axvline(value, color="black")
    ax.set(title=name, yticks=[])

# %%
arviz.summary(posterior.to_inference_data())[
    ["mean", "sd", "hdi_3%", "hdi_97%", "ess_bulk", "r_hat"]
]

# %% [markdown]
# ## Scenario 1: what if $b$ were 0 everywhere?
#
# $a$ and $c$ stay as observed. Each of the 4,000 draws gives 100 values of `y_mu`; we keep their
# mean.

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 5))
draw(observed, "observed", axes[0])
draw(do(observed, {"b": 0.0}), "scenario 1: do(b = 0)", axes[1])

scenario_1 = posterior.predictive(KEY, do={"b": 0.0}, outputs=("b", "y_mu"))
df["b_scenario_1"] = np.zeros(len(df))
df["y_scenario_1"] = np.asarray(scenario_1["y_mu"]).mean(axis=(0, 1))

# %% [markdown]
# ## Scenario 2: what if $b$ were five times as large?
#
# A function maps the natural value of $b$, here the observed one, to the new one.

# %%
fig, ax = plt.subplots(figsize=(4.5, 5))
draw(do(observed, {"b": lambda b: 5 * b}), "scenario 2: do(b = 5 b)", ax)

scenario_2 = posterior.predictive(KEY, do={"b": lambda b: 5 * b}, outputs=("b", "y_mu"))
df["b_scenario_2"] = 5 * df["b"]
df["y_scenario_2"] = np.asarray(scenario_2["y_mu"]).mean(axis=(0, 1))
df.head()

# %% [markdown]
# The coefficient of $b$ is the effect that scenario 1 takes away and scenario 2 magnifies. Against
# the truth, known here because the data are simulated:

# %%
fig, axes = plt.subplots(1, 2, figsize=(9, 3.5), sharey=True)
for ax, scenario, new_b in ((axes[0], "1", 0.0), (axes[1], "2", lambda b: 5 * b)):
    data = {name: df[name].to_numpy() for name in ("a", "b", "c")}
    truth = sample(do(observe(generative, data), {"b": new_b}), KEY, outputs="y_mu")["y_mu"]
    ax.plot(df["b"], df["y"], ".", color="lightgrey", label="observed y")
    ax.plot(df["b"], truth, "k.", ms=3, label="true mean of y")
    ax.plot(df["b"], df[f"y_scenario_{scenario}"], "o", mfc="none", label="posterior mean")
    error = np.abs(df[f"y_scenario_{scenario}"] - truth).max()
    ax.set(title=f"scenario {scenario}, largest error {error:.2f}", xlabel="b as observed")
_ = axes[0].legend(fontsize=7)

# %% [markdown]
# ## For the very same units: counterfactuals
#
# The scenarios ask about the mean of $y$. What each *observed* unit would have had, with its own
# noise, is a counterfactual: abduction, action, prediction, in every draw of the posterior.

# %%
what_if = np.asarray(posterior.counterfactual({"b": 0.0}, outputs="y")["y"])
pd.DataFrame(
    {
        "y": df["y"],
        "y had b been 0": what_if.mean(axis=(0, 1)),
        "± (sd)": what_if.std(axis=(0, 1)),
        "truth": df["y"] - TRUE["beta_by"] * df["b"],
    }
).head()

# %% [markdown]
# ## The same question without the graph
#
# Do-PFN reads a table with a binary treatment and no graph. So $b$ becomes 1 where it is positive,
# in the simulating model too, and the question becomes the effect of that treatment.

# %%
from dopfn_jax.scm import binary, true_cate

in_two = SCM(
    {
        "a": normal(),
        "b": node(binary(), normal()),
        "c": normal(),
        "y": node(linear({"a": 1.5, "b": 0.7, "c": 0.3}), normal(scale=0.2)),
    }
)
table = sample(in_two, KEY, 500)
x = np.stack([table["a"], table["c"]], axis=1)
question = {"a": np.asarray(table["a"][:100]), "c": np.asarray(table["c"][:100])}
truth = true_cate(in_two, question, "b", "y", jax.random.key(3))
print(f"true CATE {float(truth.value.mean()):.3f}, the same in every row")

# %% tags=["needs-weights"]
from dopfn_jax import DoPFNRegressor

estimator = DoPFNRegressor().fit(x, np.asarray(table["b"]), np.asarray(table["y"]))
cate = np.asarray(estimator.cate(x[:100]))
error = np.sqrt(np.mean((cate - np.asarray(truth.value)) ** 2))
print(f"Do-PFN: mean CATE {cate.mean():.3f}, root mean squared error {error:.3f}")
