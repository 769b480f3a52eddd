"""benchmark/soak.py: what it says of a small training that does as it should, and of four that do not."""

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))
import soak

TRAINING = """
import pathlib, resource, signal, subprocess, sys, time
fault, resumed = sys.argv[1], sys.argv[-2] == "--resume"
run = pathlib.Path(sys.argv[-1]) if resumed else pathlib.Path(sys.argv[-1]) / "run"
run.mkdir(exist_ok=True)
saved = run / "checkpoint.pt"
stop = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, _: stop.append(number))
if fault == "leaves a child" and not resumed:
    subprocess.Popen(["sleep", "100"], start_new_session=True)
for step in range(int(saved.read_text()) + 1 if resumed else 1, 10**6):
    if not (fault == "does not go on" and resumed):
        try:
            (run / "new").write_text(str(step))
        except OSError as error:
            sys.exit(f"error: {error.strerror}")
        (run / "new").rename(saved)
    elif step > 30:
        break
    if stop:
        saved.write_text("1" if fault == "loses steps" else str(step + 1))
        sys.exit(1 if fault == "ends with another code" else 128 + stop[0])
    time.sleep(0.02)
"""


def visit(tmp_path, monkeypatch, does: str, fault: str) -> dict:
    script, folder = tmp_path / "training.py", tmp_path / f"runs-{os.getpid()}"
    script.write_text(TRAINING)
    folder.mkdir()
    start = soak.start
    monkeypatch.setattr(soak, "start", lambda command, mark: start([command[0], does, *command[1:]], mark))
    monkeypatch.setattr(soak, "steps_of", lambda folder: max(map(steps, folder.glob("*/checkpoint.pt")), default=0))
    monkeypatch.setattr(soak.random, "uniform", lambda low, high: low)
    monkeypatch.setitem(soak.SCRIPTS, "toy", str(script))
    return soak.visit("toy", fault, folder)


def steps(checkpoint: Path) -> int:
    return int(checkpoint.read_text() or 0)


@pytest.mark.parametrize("fault", soak.FAULTS)
def test_a_training_that_does_as_it_should_is_ok(tmp_path, monkeypatch, fault):
    row = visit(tmp_path, monkeypatch, "as it should", fault)
    assert row["ok"] and row["resumed"] and row["steps_after"] >= row["steps_before"] > 0
    assert row["said"] == ("error: File too large" if fault == "full disk" else "")


@pytest.mark.parametrize("does", ["leaves a child", "does not go on", "loses steps", "ends with another code"])
def test_what_goes_wrong_is_seen(tmp_path, monkeypatch, does):
    row = visit(tmp_path, monkeypatch, does, "SIGTERM")
    assert not row["ok"] and row["left"] == (does == "leaves a child")
    assert row["resumed"] == (does != "does not go on")
    assert not soak.descendants(f"SOAK=runs-{os.getpid()}")
    assert (row["steps_after"] == 1) == (does == "loses steps")
