"""benchmark/records.py, and what every benchmark does: says what it does, and keeps the results that are there."""

import csv
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))
import records

BENCHMARK = Path(records.__file__).parent

OTHERS = {"records.py"} | ({"sb3_recurrent_ppo.py"} if not find_spec("sb3_contrib") else set())
COMMANDS = sorted(path.name for path in BENCHMARK.glob("*.py") if path.name not in OTHERS)
IN_ONE_GO = {  # benchmark: arguments
    "scale.py": [],
    "selfplay_throughput.py": ["openspiel"],
    "selfplay_update.py": [],
    "soak.py": [],
    "tamiyo_hosts.py": [],
    "tamiyo_rules.py": [],
    "throughput.py": [],
    "worldmodel_speed.py": [],
}


def run(monkeypatch, name: str, *arguments: str) -> int:
    """Its exit code."""
    monkeypatch.setattr(sys, "argv", [name, *arguments])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(BENCHMARK / name), run_name="__main__")
    return ended.value.code or 0


@pytest.mark.parametrize("name", COMMANDS)
def test_every_benchmark_has_help(monkeypatch, capsys, name):
    assert run(monkeypatch, name, "--help") == 0
    assert "usage:" in capsys.readouterr().out


@pytest.mark.parametrize("name", IN_ONE_GO)
def test_results_are_not_replaced_unasked(monkeypatch, capsys, tmp_path, name):
    monkeypatch.setattr(records, "RESULTS", tmp_path)
    monkeypatch.setattr(Path, "exists", lambda path: path.suffix == ".csv")
    assert run(monkeypatch, name, *IN_ONE_GO[name]) == 2
    assert "error: --again replaces the results that are there: " in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_job_s_rows_replace_its_own_and_no_others(tmp_path):
    path = tmp_path / "results.csv"
    for seed, value in ((1, "a"), (2, "b"), (1, 'c, "d"')):
        records.replace(path, {"task": "x", "seed": seed}, [{"task": "x", "seed": seed, "value": value}] * 2)
    records.replace(path, {"task": "x", "seed": 3}, [{"task": "x", "seed": 3, "more": 0.5}])
    rows = [tuple(row.values()) for row in csv.DictReader(path.read_text().splitlines())]
    assert rows == [("x", "2", "b", "")] * 2 + [("x", "1", 'c, "d"', "")] * 2 + [("x", "3", "", "0.5")]
    assert [tuple(row.values()) for row in records.read(path)] == rows and list(tmp_path.iterdir()) == [path]


def test_jobs_that_end_at_once_all_keep_their_rows(tmp_path):
    path = tmp_path / "results.csv"
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(lambda i: records.replace(path, {"job": i}, [{"job": i}]), range(40)))
    assert sorted(int(row["job"]) for row in records.read(path)) == list(range(40))


def test_what_is_recorded_beside_results():
    about = records.circumstances()
    assert list(about) == ["torch", "gymnasium", "commit", "machine"] and about["machine"].endswith(" cores")
    assert about["gymnasium"] == version("gymnasium")


def test_intervals():
    """Student's t over three values, and Welch's for two samples, by the textbook's numbers (scipy.stats)."""
    from scipy.stats import ttest_1samp, ttest_ind

    a, b = [1.0, 2.0, 4.0], [0.5, 0.1, 0.2, 0.9]
    for mean, half, found in (
        (*records.interval(a), ttest_1samp(a, 0)),
        (*records.interval(a, b), ttest_ind(a, b, equal_var=False)),
    ):
        low, high = found.confidence_interval(0.95)
        assert (mean - half, mean + half) == pytest.approx((low, high))
