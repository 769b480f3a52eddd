"""Learning curves: runs each command of a task over its seeds, writes curves and evaluations to CSV and plots them.

    python benchmark/learning.py cartpole        # 3 minutes
    python benchmark/learning.py bptt            # 3 minutes
    python benchmark/learning.py lander          # 8 minutes
    python benchmark/learning.py lander_hidden   # 10 minutes; installs sb3-contrib into benchmark/.venv-sb3 first
    python benchmark/learning.py flycraft        # 10 minutes; needs requirements-envs.txt

Results: {task}_curves.csv, {task}_final.csv and {task}.png in benchmark/results/. `--plot-only` draws them again.
"""

import argparse
import csv
import json
import subprocess
import sys
import tempfile
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from throughput import sb3_python

HERE = Path(__file__).parent
CARTPOLE = "ppo_lstm_predictor.py --env-id CartPole-v1 --visible 0 2 --total-timesteps 100000 --eval-episodes 100"
LANDER = "ppo_lstm_predictor.py --horizon 200 --total-timesteps 1000000 --eval-episodes 100 --checkpoint-every 0"
HIDDEN = "--env-id LunarLander-v3 --visible 0 1 4 6 7 --total-timesteps 300000 --eval-episodes 100"
FLYCRAFT = "ppo_lstm_predictor.py --env-id environments.flycraft:FlyCraftEasy-v0 --vectorization async"
TASKS = {  # task: (seeds, title, {label: command})
    "cartpole": (
        range(1, 6),
        "CartPole-v1 without velocities",
        {"PPO-LSTM": CARTPOLE, "without memory (--no-recurrent)": f"{CARTPOLE} --no-recurrent"},
    ),
    "bptt": (
        range(1, 4),
        "CartPole-v1 without velocities: truncated backpropagation",
        {
            "whole rollouts": f"{CARTPOLE} --no-predictor",
            "8 steps": f"{CARTPOLE} --no-predictor --bptt-length 8",
            "8 steps, refreshed states": f"{CARTPOLE} --no-predictor --bptt-length 8 --refresh-states",
        },
    ),
    "lander": (range(1, 4), "LunarLander-v3", {"PPO-LSTM with predictor, horizon 200": LANDER}),
    "lander_hidden": (
        range(1, 4),
        "LunarLander-v3 without velocities",
        {
            "PPO-LSTM": f"ppo_lstm_predictor.py {HIDDEN} --no-predictor",
            "without memory (--no-recurrent)": f"ppo_lstm_predictor.py {HIDDEN} --no-predictor --no-recurrent",
            "sb3-contrib RecurrentPPO": f"benchmark/sb3_recurrent_ppo.py {HIDDEN} --normalize",
        },
    ),
    "flycraft": (range(1, 2), "FlyCraftEasy-v0", {"PPO-LSTM": f"{FLYCRAFT} --total-timesteps 300000"}),
}


def run(label: str, command: str, seed: int) -> tuple[list[dict], dict]:
    """The learning curve and the closing summary of one run."""
    python = sb3_python() if "sb3" in command else sys.executable
    with tempfile.TemporaryDirectory() as runs_dir:
        extra = [] if "sb3" in command else ["--runs-dir", runs_dir]
        call = [python, *command.split(), "--seed", str(seed), *extra]
        done = subprocess.run(call, cwd=HERE.parent, capture_output=True, text=True)
        if done.returncode:
            sys.exit(done.stderr)
        final = json.loads(done.stdout.splitlines()[-1])
        if "run_dir" in final:
            events = EventAccumulator(final.pop("run_dir"), size_guidance={"scalars": 0}).Reload()
            final["curve"] = [(event.step, event.value) for event in events.Scalars("charts/episodic_return")]
    curve = [
        {"label": label, "seed": seed, "global_step": step, "episodic_return": value}
        for step, value in final.pop("curve")
        if value is not None
    ]
    print(f"{label}, seed {seed}: {final['eval_return_mean']:.1f}", file=sys.stderr)
    return curve, {"label": label, "seed": seed, "command": f"python {command} --seed {seed}"} | final


def write(path: Path, rows: list[dict]) -> None:
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(name for row in rows for name in row)), restval="")
        writer.writeheader()
        writer.writerows(rows)


def plot(task: str, title: str) -> None:
    """Each seed's curve, averaged over windows of a fiftieth of the run, and the seeds' mean."""
    curves = defaultdict(lambda: defaultdict(list))
    with open(HERE / "results" / f"{task}_curves.csv") as file:
        for row in csv.DictReader(file):
            curves[row["label"]][row["seed"]].append((float(row["global_step"]), float(row["episodic_return"])))
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for i, (label, seeds) in enumerate(curves.items()):
        end = max(points[-1][0] for points in seeds.values())
        grid = np.linspace(0, end, 51)[1:]
        means = []
        for points in map(np.array, seeds.values()):
            window = [points[(points[:, 0] > g - end / 50) & (points[:, 0] <= g), 1] for g in grid]
            means.append([w.mean() if len(w) else np.nan for w in window])
            axis.plot(grid, means[-1], color=f"C{i}", alpha=0.3, linewidth=1)
        mean = np.ma.masked_invalid(means).mean(0)
        axis.plot(grid, mean, color=f"C{i}", linewidth=2, label=f"{label}, {len(seeds)} seed{'s' * (len(seeds) > 1)}")
    axis.set(xlabel="environment steps", ylabel="return of training episodes", title=title)
    axis.legend()
    figure.savefig(HERE / "results" / f"{task}.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--plot-only", action="store_true")
    args = parser.parse_args()
    seeds, title, commands = TASKS[args.task]
    if not args.plot_only:
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [pool.submit(run, label, command, seed) for label, command in commands.items() for seed in seeds]
            curves, finals = zip(*(job.result() for job in jobs), strict=True)
        write(HERE / "results" / f"{args.task}_curves.csv", [row for curve in curves for row in curve])
        write(HERE / "results" / f"{args.task}_final.csv", list(finals))
    plot(args.task, title)


if __name__ == "__main__":
    main()
