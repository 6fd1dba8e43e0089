import csv
import runpy

import numpy as np
import pytest

MAIN = runpy.run_path("scripts/inspect_prior.py")["main"]
QUICK = ["--config", "smoke", "--tables", "12", "--rows", "40"]


@pytest.fixture
def table(tmp_path):
    random = np.random.default_rng(0)
    path = tmp_path / "mine.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["drug", "age", "sex", "weight"])
        for i in range(60):
            age = random.normal(50, 9)
            writer.writerow([i % 2, age, "fm"[i % 3 % 2], round(70 + age + 5 * (i % 2))])
    return path


@pytest.mark.slow
def test_a_table_is_laid_beside_the_prior(table, tmp_path, capsys):
    output = tmp_path / "out"
    arguments = ["--csv", str(table), "--treatment", "drug", "--outcome", "weight"]
    assert MAIN([*QUICK, "--rows", "500", *arguments, "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert "tables of 60 rows" in printed  # as many as this table has
    assert "paper's prior: " in printed and "wide prior" not in printed
    line = next(line for line in printed.splitlines() if "discrete_columns" in line)
    # Sex is one of two columns; the paper's prior has no discrete one.
    assert "yours    0.500" in line and line.endswith("unlike this prior")
    with (output / "statistics.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["prior"] == "mine.csv" and float(rows[-1]["covariates"]) == 2
    assert len(rows) > 8
    assert (output / "statistics.png").stat().st_size > 10_000


def test_mistakes_are_named(table, capsys):
    arguments = [*QUICK, "--csv", str(table), "--treatment", "pill", "--outcome", "weight"]
    assert MAIN(arguments) == 2
    assert "--treatment 'pill': no such column; the columns are 'drug'" in capsys.readouterr().err
    arguments = [*arguments[:-3], "drug", *arguments[-2:]]
    other = table.with_name("other.csv")
    other.write_text(table.read_text().replace(",", ";"))
    assert MAIN([str(other) if word == str(table) else word for word in arguments]) == 2
    assert "add --separator ';'" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        MAIN([*QUICK, "--csv", str(table)])
    assert "name also its --treatment" in capsys.readouterr().err


def test_a_record_goes_into_the_folder_of_the_weights_and_nowhere_else(tmp_path, capsys):
    for folder in ("do_pfn_cpu", tmp_path):
        assert MAIN(["--record", str(folder)]) == 2
        assert f"--record {folder}: holds no config.json" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())
    with pytest.raises(SystemExit):
        MAIN(["--record", str(tmp_path), "--rows", "90", "wide.hidden_share=0.0"])
    assert "takes no --rows, wide.hidden_share=0.0" in capsys.readouterr().err
