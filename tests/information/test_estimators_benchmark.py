import json

import pytest


@pytest.mark.slow
@pytest.mark.long
def test_estimators_table_has_every_option(run_benchmark, tmp_path):
    status, _, stderr = run_benchmark("estimators.py", "--smoke", "--out", str(tmp_path / "out.json"))
    assert status == 0, stderr
    report = json.loads((tmp_path / "out.json").read_text())
    worlds = {row["world"] for row in report["results"]}
    assert len(worlds) == 4
    assert len(report["results"]) == len(worlds) * 18
    assert all(row["variance x evaluations"] > 0 for row in report["results"])
    assert {row["times uniform's"] for row in report["results"] if row["probes"] == "uniform"} == {1.0}


def test_odd_num_samples_is_refused(run_benchmark):
    status, _, stderr = run_benchmark("estimators.py", "--num-samples", "9")
    assert (status, stderr.splitlines()[-1].partition(";")[0]) == (2, "error: num_samples: 9 is invalid")
