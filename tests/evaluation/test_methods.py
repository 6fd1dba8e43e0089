import dataclasses
import json

import numpy as np
import pandas as pd
import pytest

from dopfn_jax.checkpoints import DEFAULT_CHECKPOINT, CheckpointError, save_checkpoint
from dopfn_jax.config import PriorConfig
from dopfn_jax.evaluation.datasets import Dataset, load_datasets
from dopfn_jax.evaluation.methods import (
    METHODS,
    Method,
    NotApplicable,
    checksum,
    find_method,
    is_dopfn,
)
from dopfn_jax.evaluation.metrics import score

# Names in the table of reference errors, where they differ by task.
_CATE_NAMES = {
    "rf": "s_rf",
    "histgb": "s_histgb",
    "linear": "s_linear",
    "causal_forest": "causalforest_dml",
}
_EXACT = ("mean", "zero", "diff_in_means", "linear", "t_linear", "floor")
_LIBRARIES = ("rf", "histgb", "t_rf", "t_histgb", "x_rf", "linear_dml", "causal_forest")


@pytest.fixture(scope="module")
def study():
    """x -> t, x -> y, t -> m -> y, m hidden: y = 2 t + x, effect 2; units with their own noise."""
    rng = np.random.default_rng(0)
    rows = 400
    x, noise = rng.normal(size=(2, rows))
    t = (x + rng.normal(size=rows) > 0).astype(float)
    query_t = rng.integers(0, 2, rows).astype(float)
    y0, y1 = x + 0.5 * noise, x + 0.5 * noise + 2
    y = np.where(t > 0.5, y1, y0)
    half = slice(rows // 2), slice(rows // 2, None)
    return Dataset(
        "toy", "toy", 1, x[half[0], None], t[half[0]], y[half[0]],
        query_x=x[half[1], None],
        query_t=query_t[half[1]],
        query_y=np.where(query_t > 0.5, y1, y0)[half[1]],
        effect=(y1 - y0)[half[1]],
        cid0=x[half[1]],
        cid1=x[half[1]] + 2,
        unit_t=t[half[1]],
        unit_y=y[half[1]],
        graph={"x0": (), "t": ("x0",), "y": ("x0", "t")},
    )  # fmt: skip


@pytest.mark.parametrize("name", ["linear", "t_linear", "standardisation", "ipw"])
def test_adjustment_removes_the_confounding(study, name):
    biased = score(study, METHODS["diff_in_means"].answer(study, 0))["ate_error"]
    adjusted = score(study, METHODS[name].answer(study, 0))["ate_error"]
    assert biased > 0.8
    assert adjusted < 0.5 * biased


def test_the_counterfactual_knows_the_units_noise(study):
    errors = {
        name: score(study, METHODS[name].answer(study, 0))["cid"]
        for name in ("scm", "scm_counterfactual", "mean", "floor")
    }
    assert errors["scm_counterfactual"] < 0.8 * errors["scm"]
    assert errors["floor"] < errors["scm"] < errors["mean"]


def test_dowhys_and_our_fitted_scm_agree(study):
    pytest.importorskip("dowhy")
    for kind in ("", "_counterfactual"):
        ours, theirs = (METHODS[f"{name}{kind}"].answer(study, 0).cid for name in ("scm", "dowhy"))
        assert np.corrcoef(ours, theirs)[0, 1] > 0.98


def test_what_a_method_needs_is_named(study, toy):
    (data,) = load_datasets(toy)
    no_graph = Dataset("a", "b", 1, data.x, data.t, data.y, data.query_x, data.query_t)
    with pytest.raises(NotApplicable, match="graph"):
        METHODS["scm"].answer(no_graph, 0)
    with pytest.raises(NotApplicable, match="exact"):
        METHODS["floor"].answer(no_graph, 0)
    with pytest.raises(ValueError, match="choose from dopfn"):
        find_method("random_forest")


def test_weights_for_one_graph_answer_its_case_study_alone(study, checkpoint, tmp_path):
    prior = PriorConfig(case_study="backdoor")
    config = dataclasses.replace(checkpoint.config, prior=prior)
    save_checkpoint(tmp_path, checkpoint.model, config, steps=0)
    answer = find_method(f"dopfn:{tmp_path}").answer
    with pytest.raises(NotApplicable, match="trained on backdoor alone"):
        answer(study, 0)
    assert len(answer(dataclasses.replace(study, case="backdoor"), 0).cid) == len(study.query_t)


def test_absence_is_reported_by_package():
    absent = Method(METHODS["mean"].answer, packages=("sklearn", "no_such_package"))
    assert absent.absent == "no_such_package"
    assert METHODS["mean"].absent == ""


def test_the_checksum_is_that_of_the_weights():
    assert len(checksum("dopfn")) == 64
    assert checksum("dopfn") == checksum(f"dopfn:{DEFAULT_CHECKPOINT}")
    assert checksum("rf") == ""


def test_the_checksum_of_a_training_run_is_that_of_its_weights(checkpoint, tmp_path):
    run = tmp_path / "run"
    save_checkpoint(run / "weights", checkpoint.model, checkpoint.config, steps=1)
    (run / "config.json").write_text(checkpoint.config.to_json())
    expected = json.loads((run / "weights" / "config.json").read_text())["sha256"]
    assert checksum(f"dopfn:{run}") == expected
    with pytest.raises(CheckpointError, match="neither shipped"):
        checksum(f"dopfn:{tmp_path / 'nowhere'}")
    assert checksum("dopfn") == checksum("dopfn,n_estimators=2")
    with pytest.raises(CheckpointError, match="neither shipped"):
        checksum("dopfn:nowhere")


def test_settings_of_the_estimator_are_read_from_the_name():
    name = "dopfn:runs/cpu,n_estimators=2,cache=false,transforms=none+quantile_y,device=cpu"
    assert find_method(name).answer.keywords == {
        "checkpoint": "runs/cpu",
        "settings": {
            "n_estimators": 2,
            "cache": False,
            "transforms": ("none", "quantile_y"),
            "device": "cpu",
        },
    }
    assert is_dopfn(name) and is_dopfn("dopfn,n_estimators=4") and not is_dopfn("dopfn_rf")
    for wrong in ("dopfn,members=4", "dopfn,n_estimators", "dopfn,random_state=1"):
        with pytest.raises(ValueError, match="is not <setting>=<value> of DoPFNRegressor"):
            find_method(wrong)


def test_settings_reach_the_estimator(study, checkpoint_folder):
    answers = [
        find_method(f"dopfn:{checkpoint_folder}{settings}").answer(study, 0)
        for settings in ("", ",n_estimators=2,transforms=none+quantile_y", ",n_estimators=1")
    ]
    assert not np.allclose(answers[0].cid, answers[1].cid)
    np.testing.assert_array_equal(answers[0].cid, answers[2].cid)
    assert answers[0].ate_interval is None


def test_an_interval_is_computed_where_only_an_average_is_known(study, checkpoint_folder):
    bare = dataclasses.replace(study, effect=None)
    method = find_method(f"dopfn:{checkpoint_folder},n_resamples=2")
    low, high = method.answer(bare, 0).ate_interval
    assert low < high


def test_simple_methods_reproduce_the_reference_errors(released):
    ratios = _ratios_of_medians(released, _EXACT, most=20)
    assert len(ratios) > 60
    assert ratios.between(0.99, 1.01).all(), ratios[~ratios.between(0.99, 1.01)]


@pytest.mark.slow
def test_libraries_reproduce_the_reference_errors(released):
    pytest.importorskip("econml")
    ratios = _ratios_of_medians(released, _LIBRARIES, most=20)
    assert len(ratios) > 90
    assert ratios.between(0.9, 1.1).all(), ratios[~ratios.between(0.9, 1.1)]


def _ratios_of_medians(folder, methods, most):
    """Our median error over the reference's, by case, task and method, on the same datasets."""
    table = pd.read_csv(folder.parent / "baselines_dev.csv")
    reference = table.set_index(["case", "dataset", "task", "method"]).nmse
    rows = []
    for data in load_datasets(folder, most=most):
        for name in methods:
            try:
                scores = score(data, METHODS[name].answer(data, 0))
            except Exception:  # where a library fails it did so for the reference too
                continue
            for task in ("cid", "cate"):
                known = _CATE_NAMES.get(name, name) if task == "cate" else name
                peer = reference.get((data.case, data.number, task, known))
                if task in scores and peer is not None and np.isfinite(peer):
                    rows.append((data.case, task, name, scores[task], peer))
    found = pd.DataFrame(rows, columns=["case", "task", "method", "ours", "peer"])
    medians = found.groupby(["case", "task", "method"]).median()
    medians = medians[medians.peer > 1e-9]  # the exact effect's error is rounding
    return medians.ours / medians.peer
