import functools
import json
import os

import numpy as np
import pytest

from dopfn_jax.evaluation import real
from dopfn_jax.evaluation.datasets import load_dataset
from dopfn_jax.evaluation.methods import METHODS, Method
from dopfn_jax.evaluation.metrics import Answer
from dopfn_jax.evaluation.runner import answers_of, latest, read_records, read_table, run
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
    assert status["one_arm", "mean"] == "not applicable"


def _one_arm(source):
    data = source.load()
    data.t[:] = 1
    return data


def test_a_dataset_that_cannot_be_read_is_skipped_and_tried_again(toys, toy, tmp_path):
    path, results = tmp_path / "generated" / "toy" / "02.npz", tmp_path / "results.jsonl"
    path.parent.mkdir(parents=True)
    path.write_bytes(b"not an archive")
    broken = Source("generated", "toy", 2, functools.partial(load_dataset, path, "generated"))
    run([broken, *toys], ["mean"], results)
    status = read_table(results).set_index("dataset")
    assert status.status.to_dict() == {1: "ok", 2: "skipped"}
    assert status.reason[2]
    path.write_bytes((toy / "toy" / "01.npz").read_bytes())
    run([broken, *toys], ["mean"], results)
    assert read_table(results).status.tolist() == ["ok", "ok"]
    assert len(results.read_text().splitlines()) == 3


def test_an_answer_that_is_not_finite_is_a_failure(toys, tmp_path, monkeypatch):
    nowhere = Method(lambda data, seed: Answer(cate=np.full(len(data.query_x), np.nan)))
    monkeypatch.setitem(METHODS, "nowhere", nowhere)
    run(toys, ["nowhere", "mean"], tmp_path / "results.jsonl")
    table = read_table(tmp_path / "results.jsonl").set_index("method")
    assert table.status.to_dict() == {"nowhere": "failed", "mean": "ok"}
    assert "cate is not finite in 20 rows" in table.reason["nowhere"]


def test_methods_can_differ_by_suite(toys, tmp_path):
    simulated = sources("simulated", 1, tmp_path, None)[:1]
    chosen = {"generated": ["mean", "floor"], "simulated": ["zero"]}
    run([*toys, *simulated], chosen, tmp_path / "results.jsonl")
    table = read_table(tmp_path / "results.jsonl")
    assert set(zip(table.suite, table.method, strict=True)) == {
        ("generated", "mean"),
        ("generated", "floor"),
        ("simulated", "zero"),
    }


def test_the_latest_weights_count(toys, tmp_path):
    path = tmp_path / "results.jsonl"
    run(toys, ["mean"], path)
    (record,) = read_records(path)
    with path.open("a") as file:
        for sha256 in ("old", "new"):
            file.write(json.dumps(record | {"method": "dopfn", "sha256": sha256}) + "\n")
    table = read_table(path)
    assert latest(table).sha256.tolist() == ["", "new"]
    assert latest(table, {"dopfn": (0, "old")}).sha256.tolist() == ["", "old"]
    assert list(latest(table.iloc[:0]).columns) == list(table.columns)
    assert latest(table, {"mean": (1, "")}).sha256.tolist() == ["new"]
    assert answers_of(["mean", "t_linear"], 3) == {"mean": (3, ""), "t_linear": (3, "")}


@pytest.mark.slow
def test_a_dying_process_takes_only_its_dataset_along(toys, tmp_path):
    fatal = [Source("generated", "fatal", k, functools.partial(os._exit, 1)) for k in (1, 2)]
    path = tmp_path / "results.jsonl"
    run([*toys, *fatal], ["mean"], path, processes=1)
    table = read_table(path).set_index(["case", "dataset"])
    assert table.status["toy", 1] == "ok"
    assert (table.reason["fatal"] == "its process died").all()


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


def test_files_of_the_users_come_before_the_examples(tmp_path):
    def studies(data):
        return {source.case for source in sources("real", 1, tmp_path, data)}

    shipped = {"ihdp_a", "ihdp_b", "lalonde", "nhefs", "amazon_sales"}
    assert studies(None) == shipped
    (tmp_path / "law_school.csv").touch()
    (tmp_path / "nhefs.csv").touch()
    assert studies(tmp_path) == shipped | {"law_school"}
    assert real.find_file(tmp_path, "nhefs.csv") == tmp_path / "nhefs.csv"


def test_every_line_is_json(toys, tmp_path):
    path = tmp_path / "results.jsonl"
    run(toys, ["mean", "zero"], path)
    assert all(json.loads(line)["dataset"] == 1 for line in path.read_text().splitlines())
