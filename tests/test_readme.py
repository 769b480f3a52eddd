"""What the README shows of Python is run as it stands, its recipe for another recurrent cell is carried out, its
numbers are those of benchmark/results/, and it and docs/ name no flag, benchmark or file that is not there."""

import csv
import importlib
import os
import re
import shlex
import sys
from collections import defaultdict
from statistics import fmean, median

import numpy as np
import pytest
import torch
import tyro
from helpers import ROOT, run_from_shell

sys.path.insert(0, str(ROOT / "benchmark"))
import learning

README = (ROOT / "README.md").read_text()
RESULTS = ROOT / "benchmark" / "results"
PAGES = [ROOT / "README.md", ROOT / "benchmark" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROSE = "\n".join(path.read_text() for path in PAGES).replace("\\\n", " ")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


@pytest.mark.slow
def test_use_it_from_python(script, script_path, tmp_path, monkeypatch):
    """Each block, after those before it. The exported policy is the agent, over 1,000 steps with resets."""
    onnxruntime = pytest.importorskip("onnxruntime")
    if script_path.name != "ppo_lstm_predictor.py":
        pytest.skip("the README imports the original")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "ppo_lstm_predictor", script)
    names = {}
    for block in blocks("python"):
        exec(block, names)
    assert names["result"]["global_step"] >= 20_000 and names["total"] > 0 and os.path.exists("policy.onnx")

    agent, session, rng = names["agent"], onnxruntime.InferenceSession("policy.onnx"), np.random.default_rng(0)
    state, exported = agent.initial_state(1), agent.initial_state(1).numpy()
    for _ in range(1000):
        if rng.random() < 0.02:  # a new episode
            state, exported = agent.initial_state(1), agent.initial_state(1).numpy()
        obs = rng.normal(size=(1, len(agent.obs_stats.mean))).astype(np.float32)
        with torch.no_grad():
            params, _, state = agent.step(torch.from_numpy(obs), state)
        exported_params, exported = session.run(None, {"obs": obs, "state": exported})
        np.testing.assert_allclose(exported_params, params, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(exported, state, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ppo_lstm_predictor", "ppo_lstm_tamiyo", "sequence_ppo_selfplay", "worldmodel_a2c"])
def test_commands_are_taken(name):
    """… by the script, up to paths that stand for others, and environments that other packages bring."""
    script = importlib.import_module(name)
    commands = re.findall(rf"^(?:python|torchrun) .*?{name}\.py *(.*)$", PROSE, re.M)
    assert len(commands) > 4
    for command in commands:
        args = tyro.cli(script.Args, default=script.Args(), args=shlex.split(command, comments=True))
        if "…" not in command and not re.search("runs/|flycraft|gen9|cifar10", command):
            script.check(args)


def test_benchmarks_and_files_are_there():
    for script, task in re.findall(r"\b(?:benchmark/|`)(\w+\.py)(?: (\w+))?", PROSE):
        assert (ROOT / "benchmark" / script).exists() or (ROOT / script).exists(), script
        assert script != "learning.py" or not task or task in learning.TASKS, task
    for path in PAGES:
        for link in re.findall(r"\]\(([^):#]+)", path.read_text()):
            assert link == "https" or (path.parent / link).exists(), (path.name, link)
    tables = (path.read_text() for path in (ROOT / "benchmark" / "README.md", ROOT / "docs" / "claims.md"))
    for line in re.findall(r"^\|.*", "".join(tables), re.M):
        for name in re.findall(r"`([\w…*]+(?:\.csv|/))`", line.strip("| ").rpartition("|")[2]):
            assert list(RESULTS.glob(name.replace("…", "*"))) or "not run yet" in line, name


def gru_of(source: str) -> str:
    """The script with the README's `diff` carried out: the removed lines of each part become the added ones."""
    (diff,) = blocks("diff")
    assert sum(line.startswith("+") for line in diff.splitlines()) <= 15
    for part in diff.split("\n\n"):
        old, new = ("".join(line[1:] + "\n" for line in part.splitlines() if line[0] == sign) for sign in "-+")
        assert source.count(old) == 1, old
        source = source.replace(old, new)
    return source


@pytest.mark.slow
def test_a_gru_in_a_few_lines_passes_the_tests_of_exactness(script_path, tmp_path):
    copy = tmp_path / "gru.py"
    copy.write_text(gru_of(script_path.read_text()))
    assert "nn.GRU(" in copy.read_text()
    done = run_from_shell("-m", "pytest", "-q", "-n0", ROOT / "tests" / "test_exact.py", "--script", copy)
    assert done.returncode == 0, done.stdout[-3000:]


def column(table: str, name: str, **where: str) -> list[float]:
    """The numbers of a column of results/`table`.csv, of the rows that have these values."""
    rows = csv.DictReader((RESULTS / f"{table}.csv").read_text().splitlines())
    return [float(row[name]) for row in rows if all(row[key] == value for key, value in where.items())]


def said(*sentences: str) -> None:
    text = " ".join(README.split())
    for sentence in sentences:
        assert sentence in text, sentence


def test_numbers_of_memory():
    exact = {}  # task: numbers of each cell
    for line in (RESULTS / "memory_table.md").read_text().splitlines():
        task, *cells = [cell.strip() for cell in line.strip("|").split("|")]
        exact[task] = [re.findall(r"-?\d+\.\d+", cell) + re.findall(r"\((\d+)\)", cell) for cell in cells[:3]]
    rows = re.findall(r"^\| (\w+) \(\d+k\) \| (.*) \| (.*) \| (.*) \|$", README, re.MULTILINE)
    assert len(rows) == 8
    for task, *cells in rows:
        for cell, expected in zip(cells, exact[task], strict=True):
            values, seeds = re.findall(r"-?\d+\.?\d*", cell.partition(" [")[0]), re.findall(r"\[(\d+)\]", cell)
            assert (seeds or ["5"])[0] == expected[4]
            for value, number in zip(values, expected[:4], strict=True):
                digits = len(value.partition(".")[2])
                assert abs(float(value) - float(number)) <= 0.51 * 10**-digits, (task, value, number)


def test_numbers_of_the_predictor():
    assert column("cartpole_final", "eval_return_mean", label="PPO-LSTM") == [500] * 5
    without = column("cartpole_final", "eval_return_mean", label="without memory (--no-recurrent)")
    first, second, third = column("lander_final", "eval_return_mean")
    said(
        "With memory all end at 500.0 over 100 evaluation episodes, "
        f"without it at {min(without):.0f} to {max(without):.0f}",
        f"seed 1 returned {first:.0f}",
        f"seeds 2 and 3 {second:.0f} and {third:.0f}",
    )
    success = column("flycraft_final", "eval_success_rate", label="easy goals")
    said("in {:.0%}, {:.0%} and {:.0%} of 200 flights".format(*success))
    speeds, ratio = defaultdict(list), {}
    for table in ("throughput", "predictor_cost"):
        for row in csv.DictReader((RESULTS / f"{table}.csv").read_text().splitlines()):
            speeds[row["subject"]].append(float(row["sps"]))
    for rival in ("sb3-contrib", "loop", "floor"):
        ratio[rival] = [mine / theirs for mine, theirs in zip(speeds["script"], speeds[rival], strict=True)]
    for rival, name in (("sb3-contrib", "layers as wide"), ("loop", "otherwise this script")):
        low, high = min(ratio[rival]), max(ratio[rival])
        said(f"{name} | {median(ratio[rival]):.1f} ({low:.1f} to {high:.1f}) |")
    said(f"backward a minibatch | {median(ratio['floor']):.2f} |")
    pairs = zip(speeds["predictor H=200"], speeds["predictor off"], strict=True)
    said(f"costs {100 * (1 - fmean(a / b for a, b in pairs)):.0f}% of the throughput at horizon 200")


def test_numbers_of_self_play():
    said("ends at {:.3f}, {:.3f} and {:.3f} with three seeds".format(*column("leduc_final", "exploitability")))
    wins = {}
    for opponent in ("random", "max_power", "heuristic"):
        for actions in ("sampled", "likeliest"):
            where = {"label": "LSTM", "opponent": opponent, "actions": actions}
            rate, low, high = (100 * column("showdown_final", x, **where)[0] for x in ("win_rate", "low", "high"))
            note = "95% interval " * (opponent == "random")
            wins[opponent, actions] = f"{rate:.1f}% ({note}{low:.1f}–{high:.1f})"
    (battles,) = set(column("showdown_final", "battles_trained_on", label="LSTM"))
    said(
        f"After {battles:,.0f} battles it wins {wins['random', 'sampled']} of 1,000 battles",
        f"{wins['max_power', 'sampled']} against the one that always takes",
        f"and {wins['heuristic', 'sampled']} against its heuristic player, "
        f"{wins['heuristic', 'likeliest']} with the likeliest",
    )


def test_numbers_of_tamiyo():
    rows = (RESULTS / "tamiyo_plain_table.md").read_text()
    table = dict(re.findall(r"^\| ([^|]*) \| \d+ \| ([\d.-]+) \|", rows, re.MULTILINE))
    said(
        f"it returns {table['LSTM']}, a controller without memory {table['MLP']} too, the best rule by hand "
        f"{table['best rule that remembers']}, the best fixed plan {table['best fixed plan']}"
    )


def test_numbers_of_the_world_model():
    assert column("worldmodel_final", "eval_return_mean", label="planning") == [500] * 5
    for task, seeds, words in (
        ("planning", 8, "training episodes return {:.0f} with them and {:.0f} without (eight other seeds, {:.0f} ±"),
        ("planning_pendulum", 6, "Pendulum {:,.0f} and {:,.0f} (six seeds, {:.0f} ±"),
    ):
        mean = {}
        for label in ("planning", "no planning"):
            curves = defaultdict(list)
            for row in csv.DictReader((RESULTS / f"{task}_curves.csv").read_text().splitlines()):
                if row["label"] == label and row["episodic_return"] not in ("", "nan"):
                    curves[row["seed"]].append(float(row["episodic_return"]))
            assert len(curves) == seeds
            mean[label] = fmean(map(fmean, curves.values()))
        numbers = mean["planning"], mean["no planning"], mean["planning"] - mean["no planning"]
        said(words.format(*numbers).replace(" -", " −"))
    sampled, likeliest = (
        column("carracing_final", f"eval_return_{x}", label="no planning") for x in ("sampled", "mean")
    )
    said("{:.0f}, {:.0f} and {:.0f} over 20 whole".format(*sampled))
    said("likeliest actions, {:.0f}, {:.0f} and {:.0f},".format(*likeliest))
