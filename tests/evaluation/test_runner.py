import functools
import json

import numpy as np
import pytest

from dopfn_jax.evaluation.datasets import load_dataset
from dopfn_jax.evaluation.runner import read_records, read_table, run
from dopfn_jax.evaluation.suites import Source, sources


@pytest.fixture
def toys(toy):
    load = functools.partial(load_dataset, toy / "toy" / "01.npz", "generated")
    return [Source("generated", "toy", 1, load)]


def test_what_is_there_is_not_run_again_and_gives_the_same_numbers(toys, tmp_path):
    first, second = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    run(toys, ["mean"], first)
    run(toys, ["mean", "linear"], first)
    run(toys, ["linear", "mean"], second)
    assert [record["method"] for record in read_records(first)] == ["mean", "linear"]
    columns = ["method", "cid", "data", "seed"]
    tables = [
        read_table(path).sort_values("method", ignore_index=True)[columns]
        for path in (first, second)
    ]
    assert tables[0].equals(tables[1])


def test_another_seed_runs_again(toys, tmp_path):
    for seed in (0, 1):
        run(toys, ["mean"], tmp_path / "results.jsonl", seed=seed)
    assert read_table(tmp_path / "results.jsonl").seed.tolist() == [0, 1]


def test_records_carry_versions_seed_and_the_data_they_are_about(toys, tmp_path):
    run(toys, ["mean"], tmp_path / "results.jsonl")
    (record,) = read_records(tmp_path / "results.jsonl")
    assert record["versions"]["numpy"] == np.__version__
    assert record["data"] == toys[0].load().fingerprint
    assert record["sha256"] == ""


def test_a_line_that_was_cut_short_is_run_again(toys, tmp_path):
    path = tmp_path / "results.jsonl"
    run(toys, ["mean"], path)
    whole = path.read_text()
    path.write_text(whole[: len(whole) // 2])
    run(toys, ["mean"], path)
    assert len(read_table(path)) == 1


def test_absent_packages_and_failures_are_reported_and_do_not_stop_the_others(toys, tmp_path):
    path = tmp_path / "results.jsonl"
    absent = run(toys, ["tabpfn", "floor", "mean"], path)
    assert absent in ({"tabpfn": "tabpfn"}, {})
    broken = [Source("generated", "one_arm", 1, functools.partial(_one_arm, toys[0]))]
    run(broken, ["mean"], path)
    status = read_table(path).set_index(["case", "method"]).status
    assert status["toy", "mean"] == status["toy", "floor"] == "ok"
    assert status["one_arm", "mean"] == "skipped"


def _one_arm(source):
    data = source.load()
    data.t[:] = 1
    return data


@pytest.mark.slow
def test_worker_processes_give_the_same_answers(toys, tmp_path):
    run(toys, ["linear"], tmp_path / "here.jsonl")
    run(toys, ["linear"], tmp_path / "there.jsonl", processes=1)
    here, there = (read_table(tmp_path / f"{name}.jsonl") for name in ("here", "there"))
    assert here.drop(columns="seconds").equals(there.drop(columns="seconds"))


def test_contexts_of_the_rows_suite_are_nested(tmp_path):
    wanted = [s for s in sources("rows", 1, tmp_path, None) if s.case.startswith("observed_conf")]
    few, more = (source.load() for source in wanted[2:4])
    assert (len(few.t), len(more.t)) == (20, 50)
    np.testing.assert_array_equal(more.x[:20], few.x)
    np.testing.assert_array_equal(more.query_x, few.query_x)


def test_suites_say_what_they_need(tmp_path):
    with pytest.raises(ValueError, match="--data"):
        sources("released", 1, tmp_path, None)
    with pytest.raises(FileNotFoundError, match="npz"):
        sources("released", 1, tmp_path, tmp_path)
    with pytest.raises(ValueError, match="choose from generated"):
        sources("acic", 1, tmp_path, None)
    assert {source.case for source in sources("real", 1, tmp_path, None)} == {
        "ihdp_a",
        "ihdp_b",
        "lalonde",
    }


def test_every_line_is_json(toys, tmp_path):
    path = tmp_path / "results.jsonl"
    run(toys, ["mean", "zero"], path)
    assert all(json.loads(line)["dataset"] == 1 for line in path.read_text().splitlines())
