import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from dopfn_jax.cells import TableError
from dopfn_jax.checkpoints import save_checkpoint
from dopfn_jax.estimators import DoPFNRegressor
from tests.estimators.small import assert_same, table


def questions() -> list[tuple]:
    """Tables of several sizes, one without covariates and one with a 0/1 outcome."""
    found = []
    for rows, columns, queries in [(16, 3, 5), (12, 2, 9), (30, 3, 4), (14, 1, 3)]:
        X, t, y = table(rows)
        X = X.iloc[:, :columns]
        found.append((X, t, y, X[:queries], t[:queries]))
    X, t, y = table()
    return [*found, (None, t, y, None, [0, 1]), (X, t, y > 10, X[:6], 1)]


def test_a_batch_answers_like_its_tables_one_by_one(checkpoint) -> None:
    model = DoPFNRegressor(checkpoint)
    for output, tables, tolerance in (
        ("mean", questions(), 1e-5),
        # Where outcomes are unlikely, rounding of a probability is a longer way in outcomes.
        ("quantiles", questions()[:2], 1e-4),
    ):
        answers = model.predict_batch(tables, output)
        assert [len(answer) for answer in answers] == [5, 9, 4, 3, 2, 6][: len(tables)]
        for answer, (X, t, y, query, query_t) in zip(answers, tables, strict=True):
            alone = DoPFNRegressor(checkpoint).fit(X, t, y).predict(query, query_t, output)
            assert answer.shape == alone.shape
            assert_same(answer, alone, tolerance)
    assert model.predict_batch([]) == []


def test_the_table_at_fault_is_named(checkpoint) -> None:
    X, t, y = table()
    model = DoPFNRegressor(checkpoint, max_context=20)
    with pytest.raises(TableError, match=r"table 1: treatment t is 1 in all 16 rows"):
        model.predict_batch([(X, t, y, X, 1), (X, np.ones(16), y, X, 1)])
    with pytest.raises(TableError, match=r"table 0: has 24 rows, more than max_context = 20"):
        model.predict_batch([(*table(24), X, 1)])
    with pytest.raises(ValueError, match="output_type is 'sd'"):
        model.predict_batch([], "sd")
    with pytest.raises(ValueError, match="output_type is 'distribution', which predict_batch"):
        model.predict_batch([], "distribution")


MESH_PROGRAM = """
import sys
import numpy as np
from dopfn_jax import DoPFNRegressor
from dopfn_jax.estimators import batch
from dopfn_jax.sharding import make_mesh
from tests.estimators.test_batch import questions

answer, devices = batch._answer_each, []

def watched(*arguments):
    devices.append(len(arguments[-1].sharding.device_set))
    return answer(*arguments)

batch._answer_each = watched
mesh = make_mesh((4, 1))
model = DoPFNRegressor(sys.argv[1])
# Those of one size, one of them without covariates.
tables = [table for table in questions()[:-1] if len(table[1]) <= 16]
answers = [model.predict_batch(tables, mesh=where) for where in (None, mesh)]
assert devices == [1, 4]
for alone, spread in zip(*answers, strict=True):
    # Effects near zero are differences of outcomes, whose rounding they keep.
    np.testing.assert_allclose(spread, alone, rtol=1e-5, atol=1e-5)
"""


@pytest.mark.distributed
def test_a_mesh_changes_nothing(checkpoint, tmp_path) -> None:
    save_checkpoint(tmp_path / "weights", checkpoint.model, checkpoint.config, 0)
    command = [sys.executable, "-c", MESH_PROGRAM, tmp_path / "weights"]
    root = Path(__file__).parents[2]
    result = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert result.returncode == 0, result.stderr
