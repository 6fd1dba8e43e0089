import json
import os
import runpy
import shutil
import signal
import threading

import numpy as np
import pandas as pd
import pytest

SCRIPT = runpy.run_path("scripts/compare_recipes.py")
TINY = [
    "model.width=16",
    "model.layers=1",
    "model.heads=2",
    "prior.max_nodes=4",
    "training.shapes=[{ rows = 16, context = [6, 8], tasks = 2 }]",
    "training.validation={ rows = 16, context = [8, 8], tasks = 4 }",
]


def test_recipes_are_valid_changes_of_the_preset() -> None:
    from dopfn_jax.config import Config

    base = Config.load("cpu")
    seen = [Config.load("cpu", overrides) for _, overrides in SCRIPT["RECIPES"].values()]
    assert seen[0] == base
    assert len({config.to_json() for config in seen}) == len(SCRIPT["RECIPES"])
    # Judged on the same held-out tasks.
    assert all(c.prior == base.prior for c in seen)
    assert all(c.training.validation == base.training.validation for c in seen)


def test_ratio_of_errors_that_are_known() -> None:
    random = np.random.default_rng(0)
    base = random.lognormal(size=(2, 40))
    table = pd.DataFrame(
        [
            {"case": case, "dataset": i, "method": method, "cid": factor * base[case, i]}
            for case, factors in enumerate([(1.0, 0.5), (1.0, 2.0)])
            for i in range(40)
            for method, factor in zip(("base", "other"), factors, strict=True)
        ]
    )
    ratio = SCRIPT["_mean_ratio"]
    # Halved on one case study, doubled on the other; the same data sets, so no spread.
    assert ratio(table, "cid", "other", "base") == pytest.approx((1.0, 1.0, 1.0))
    one = table[table.case == 0]
    assert ratio(one, "cid", "other", "base") == pytest.approx((0.5, 0.5, 0.5))
    low, high = ratio(one.assign(cid=random.lognormal(size=80)), "cid", "other", "base")[1:]
    assert low < 1 < high


def test_mistakes_are_named(capsys) -> None:
    for arguments, message in (
        (["--minutes", "0"], "--minutes 0: must be above 0"),
        (["--data", "nowhere"], "--data nowhere: holds no case_studies_dev"),
        (["--recipes", "magic"], "invalid choice: 'magic'"),
    ):
        with pytest.raises(SystemExit):
            SCRIPT["main"](arguments)
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_recipes_get_equal_cpu_time_and_are_trained_once(tmp_path, capsys) -> None:
    minutes = 0.02
    for name in ("base", "half_rate"):
        SCRIPT["train_recipe"](name, minutes, tmp_path / name, TINY)
    # One that was stopped before it was done has no result.
    stopped = tmp_path / "base" / "result.json"
    stopped.unlink()
    shutil.rmtree(tmp_path / "base" / "run")
    threading.Timer(5.0, os.kill, (os.getpid(), signal.SIGTERM)).start()
    plan = tmp_path / "base" / "plan.json"
    planned = plan.read_text()
    plan.write_text(json.dumps(json.loads(planned) | {"steps": 100_000}))
    with pytest.raises(SystemExit):
        SCRIPT["train_recipe"]("base", minutes, tmp_path / "base", TINY)
    assert not stopped.exists()
    shutil.rmtree(tmp_path / "base" / "run")
    plan.write_text(planned)
    SCRIPT["train_recipe"]("base", minutes, tmp_path / "base", TINY)
    for changed in (["--minutes", "1"], ["model.width=32"]):
        assert SCRIPT["main"](["--recipes", "base", "--output", str(tmp_path), *changed]) == 2
        assert "choose another --output" in capsys.readouterr().err
    plans = [json.loads((tmp_path / n / "plan.json").read_text()) for n in ("base", "half_rate")]
    for plan in plans:
        assert plan["steps"] * plan["cpu_seconds_per_step"] == pytest.approx(1.2, rel=0.1)
    arguments = ["--recipes", "base", "half_rate", "--output", str(tmp_path)]
    arguments += ["--minutes", str(minutes), *TINY]
    # With their results there, neither is trained again.
    assert SCRIPT["main"]([*arguments, "--report", str(tmp_path / "report")]) == 0
    assert "Muon at half the rate" in capsys.readouterr().out
    table = pd.read_csv(tmp_path / "report" / "recipes.csv")
    assert list(table.recipe) == ["base", "half_rate"]
    assert np.isfinite(table.validation_loss).all() and (table.steps > 1).all()
