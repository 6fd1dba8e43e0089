"""The comparison of ensembles: its summary, and what it refuses."""

import numpy as np
import pandas as pd

from scripts.compare_ensembles import METRICS, SETTINGS, main, summarise


def test_ratios_are_taken_dataset_by_dataset() -> None:
    errors = pd.DataFrame(
        {
            "case": "small",
            "number": number,
            "setting": name,
            # Half the error on all but one dataset, whatever its level.
            **dict.fromkeys(METRICS, 10.0**number * (1 if name == "one" or number == 0 else 0.5)),
            "seconds": 1.0 if name == "one" else 3.0,
        }
        for name in SETTINGS
        for number in range(10)
    )
    table = summarise(errors)
    assert list(table.index) == list(SETTINGS)[1:]
    np.testing.assert_allclose(table["time"].astype(float), 3.0)
    for metric in METRICS:
        assert (table[metric] == "0.500 (0.500 to 0.500)").all()
        assert (table[f"{metric} better"] == "90%").all()


def test_a_folder_without_the_case_studies_is_refused(tmp_path, capsys) -> None:
    assert main(["--data", str(tmp_path)]) == 2
    assert "case_studies_dev" in capsys.readouterr().err
