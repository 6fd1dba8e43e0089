import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from scripts.plot_run import draw, main, read_log

pytest.importorskip("matplotlib")
from matplotlib.figure import Figure


def write_log(folder: Path, steps: int, **scores: float) -> Path:
    folder.mkdir()
    lines = [
        {"step": k, "mean_loss": 1 / k, "learning_rate": 1e-3, "tasks_per_second": 5.0}
        for k in range(1, steps + 1)
    ]
    lines[-1] |= {"validation_loss": 0.25} | scores
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "metrics.jsonl").write_text(text + '{"step": 99, "lo')  # still being written
    return folder


def test_runs_become_one_figure_and_one_table(tmp_path: Path) -> None:
    runs = [str(write_log(tmp_path / name, steps)) for name, steps in (("a", 3), ("b", 5))]
    figure, table = tmp_path / "runs.svg", tmp_path / "runs.csv"
    assert main([*runs, "--output", str(figure), "--csv", str(table)]) == 0
    assert figure.stat().st_size > 1000
    log = pd.read_csv(table)
    assert log.groupby("run").step.max().to_dict() == dict(zip(runs, (3, 5), strict=True))
    assert log.validation_loss.notna().sum() == 2


def test_case_studies_get_panels_of_their_own(tmp_path: Path) -> None:
    plain = write_log(tmp_path / "plain", 3)
    scored = write_log(tmp_path / "scored", 3, **{"cid/backdoor": 0.1, "cate/backdoor": 0.2})
    panels = {}
    for runs in ([plain], [plain, scored]):
        figure = tmp_path / "runs.svg"
        assert main([*map(str, runs), "--output", str(figure)]) == 0
        panels[len(runs)] = figure.read_text().count('id="axes_')
    assert panels == {1: 4, 2: 6}


def test_many_runs_leave_room_for_the_panels(tmp_path: Path) -> None:
    names = [f"a_run_with_a_long_name_{number}" for number in range(40)]
    log = pd.concat([read_log(write_log(tmp_path / name, 2)) for name in names])
    heights = []

    def note(figure: Figure, *_: Any, **__: Any) -> None:
        figure.canvas.draw()
        heights.extend(axis.get_position().height for axis in figure.axes)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", note)
        draw(log, tmp_path / "runs.png")
    assert len(heights) == 4
    assert min(heights) > 0.3


def test_what_cannot_be_drawn_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    figure = str(tmp_path / "runs.png")
    assert main([str(tmp_path), "--output", figure]) == 2
    assert "metrics.jsonl: no such log" in capsys.readouterr().err
    (tmp_path / "metrics.jsonl").write_text("")
    assert main([str(tmp_path), "--output", figure]) == 2
    assert "has not logged a step yet" in capsys.readouterr().err
