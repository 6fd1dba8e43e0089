import numpy as np
import pytest

from dopfn_jax.evaluation.simulators import SIMULATORS, simulate


@pytest.mark.parametrize("name", SIMULATORS)
def test_rows_are_consistent_and_reproducible(name):
    data, again = simulate(name, 3), simulate(name, 3)
    assert data.fingerprint == again.fingerprint != simulate(name, 4).fingerprint
    assert set(data.t) == {0.0, 1.0}
    own = data.unit_t == data.query_t
    np.testing.assert_allclose(data.unit_y[own], data.query_y[own])


def test_effects_are_those_of_the_publications():
    x = (data := simulate("nie_wager_a", 1)).query_x
    np.testing.assert_allclose(data.effect, (x[:, 0] + x[:, 1]) / 2)
    np.testing.assert_allclose(simulate("nie_wager_c", 1).effect, 1.0)
    x = (data := simulate("doubleml_heterogeneous", 1)).query_x
    np.testing.assert_allclose(data.effect, np.exp(2 * x[:, 0]) + 3 * np.sin(4 * x[:, 0]))
    assert x.shape[1] == 30
    # Of probabilities, with the hidden z: a unit's own outcomes differ by -1, 0 or 1.
    low, high = (1 / (1 + np.exp(-3 * (np.arange(2) + end))) for end in (-4, 0))
    effect = simulate("hidden_confounder", 1).effect
    np.testing.assert_allclose(np.unique(effect), np.sort(high - low))


def test_confounding_is_where_it_should_be():
    def naive(name):
        data = simulate(name, 1)
        difference = data.y[data.t == 1].mean() - data.y[data.t == 0].mean()
        return difference - data.effect.mean()

    assert abs(naive("nie_wager_b")) < 0.3  # a randomised trial
    assert naive("nie_wager_c") < -1
    assert naive("hidden_confounder") > 0.05
