"""What memory is worth: ppo_lstm_predictor.py with and without it, and sb3-contrib's RecurrentPPO, after equally many
environment steps on eight tasks whose observations leave something out.

    python benchmark/memory.py                               # everything; two hours on two idle cores
    python benchmark/memory.py --tasks CartPole --seeds 1 2  # a part of it
    python benchmark/memory.py --smoke                       # a minute: tiny runs into a temporary folder
    python benchmark/memory.py --plot-only                   # picture and table of the runs that are there

Whatever stops it, the same command goes on: runs in memory.csv are not run again, unless with `--again`. sb3-contrib
and popgym come from requirements-rivals.txt, which the first run installs into benchmark/.venv-sb3 if this environment
lacks them. All runs use the CPU, one thread each. Results, in benchmark/results/:

    memory.csv         a row for each run. sps: environment steps a second while training (throughput.py compares
                       speeds: here sb3-contrib has `--one-call`). seconds: of the whole command. Returns of 100
                       episodes on fresh seeds with the final weights: eval_return_mean and _std with the likeliest
                       actions, _sampled, _memoryless (state zeroed before each step). train_return_mean: of the last
                       100 episodes of training.
    memory_curves.csv  mean return of the training episodes that end within a rollout
    memory.png, memory_table.md

RecurrentPPO has its defaults: MlpLstmPolicy, an LSTM of 256 for the actor and one for the critic, learning rate 3e-4,
rollouts of 128 steps, minibatches of 128, 10 epochs, gamma 0.99, lambda 0.95. Its 8 environments are the best of 1, 8
and 16 on other tasks and seeds (sb3_recurrent_ppo.py has the figures). Every run goes on to the end of its rollout.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from records import circumstances, interval, read, replace
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from throughput import sb3_python

HERE = Path(__file__).parent
POPGYM = ["RepeatFirst", "RepeatPrevious", "Autoencode", "CountRecall", "PositionOnlyCartPole"]
POPGYM += ["NoisyPositionOnlyPendulum"]
TASKS = {name: (f"--env-id popgym:popgym-{name}Easy-v0", 100_000) for name in POPGYM}  # (environment, steps)
TASKS["CartPole"] = ("--env-id CartPole-v1 --visible 0 2", 100_000)
TASKS["LunarLander"] = ("--env-id LunarLander-v3 --visible 0 1 4 6 7", 300_000)
OURS = "ppo_lstm_predictor.py --no-predictor --checkpoint-every 0"
SB3 = "benchmark/sb3_recurrent_ppo.py --defaults --one-call --num-envs 8"
LABELS = {  # label: (name in picture and table, command)
    "memory": ("PPO-LSTM", OURS),
    "no-memory": ("PPO-LSTM without memory", f"{OURS} --no-recurrent"),
    "sb3": ("sb3-contrib", SB3),
    "sb3-changed": ("sb3-contrib, lambda .8, previous action", f"{SB3} --gae-lambda 0.8 --previous-action"),
}
CHANGED = ["RepeatPrevious", "CartPole", "LunarLander"]  # where sb3-changed runs, unless --labels asks for it
PACKAGES = ("torch", "gymnasium", "sb3_contrib", "popgym")
COLUMNS = ["task", "label", "seed", "command", "global_step", "sps", "seconds", "eval_return_mean", "eval_return_std"]
COLUMNS += ["eval_return_sampled", "eval_return_memoryless", "train_return_mean", *PACKAGES, "commit", "machine"]
MEASURES = ["eval_return_mean", "eval_return_sampled"]


def interpreter() -> str:
    """This Python if it has the rivals' packages, else that of benchmark/.venv-sb3, brought up to date."""
    if find_spec("sb3_contrib") and find_spec("popgym"):
        return sys.executable
    python = str(sb3_python())
    subprocess.run([python, "-m", "pip", "install", "-q", "-r", HERE / "requirements-rivals.txt"], check=True)
    return python


# --- files
def job_of(row: dict) -> tuple[str, str, int]:
    return row["task"], row["label"], int(row["seed"])


def store(folder: Path, job: tuple, row: dict | None, curve: list[tuple]) -> None:
    """The results of a job; without a row, it is no longer done."""
    job = dict(zip(("task", "label", "seed"), job, strict=True))
    points = [job | {"global_step": step, "return": value} for step, value in curve]
    replace(folder / "memory_curves.csv", job, points, [*job, "global_step", "return"])
    replace(folder / "memory.csv", job, [job | row] if row else [], COLUMNS)


# --- runs
class Run:
    """A command in a process of its own, which writes into a folder of its own."""

    def __init__(self, job: tuple, command: str, python: str, folder: Path):
        folder.mkdir()
        self.job, self.folder, self.started = job, folder, time.perf_counter()
        self.about = {"command": f"python {command}"} | circumstances(PACKAGES, python)
        call = [python, *command.split(), *([] if "sb3" in command else ["--runs-dir", str(folder)])]
        env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        with open(folder / "out", "w") as out, open(folder / "err", "w") as err:
            self.process = subprocess.Popen(call, cwd=HERE.parent, env=env, stdout=out, stderr=err)

    def store(self, results: Path) -> str:
        """Stores what the ended process gave, if it went well, and says it."""
        if self.process.returncode:
            return f"failed\n{(self.folder / 'err').read_text()[-1500:]}"
        row = json.loads((self.folder / "out").read_text().splitlines()[-1]) | self.about
        row["seconds"] = time.perf_counter() - self.started
        curve = row.get("curve", [])
        if "run_dir" in row:
            events = EventAccumulator(row["run_dir"], size_guidance={"scalars": 0}).Reload()
            curve = [(event.step, event.value) for event in events.Scalars("charts/episodic_return")]
        store(results, self.job, row, curve)
        likeliest, sampled = (row[name] for name in MEASURES)
        return f"{likeliest:.3f} with likeliest, {sampled:.3f} with sampled actions, {row['seconds']:.0f} s"


def work(jobs: dict[tuple, str], results: Path, at_once: int) -> bool:
    """Runs the jobs; whether all went well."""
    todo, running, failed, python = list(jobs.items()), [], 0, interpreter() if jobs else ""
    with tempfile.TemporaryDirectory() as scratch:
        try:
            while todo or running:
                while todo and len(running) < at_once:
                    running.append(Run(*todo.pop(0), python, Path(scratch) / str(len(todo))))
                time.sleep(0.2)
                for run in [run for run in running if run.process.poll() is not None]:
                    running.remove(run)
                    failed += run.process.returncode != 0
                    print(*run.job, run.store(results), f"({len(todo) + len(running)} to go)", file=sys.stderr)
        finally:
            for run in running:
                run.process.kill()
                run.process.wait()
    return not failed


# --- picture and table
def windows(points: list[tuple], end: float, count: int) -> np.ndarray:
    """The mean of points (step, return) in each of `count` parts of `end` steps; NaN where there is none."""
    steps, returns = np.array(points).T
    place = np.ceil(count * steps / end).astype(int) - 1
    sizes = np.bincount(place, minlength=count)
    return np.bincount(place, returns, count) / np.where(sizes, sizes, np.nan)


def plot(results: Path) -> None:
    figure, curves = Figure(figsize=(14, 6.5), layout="constrained"), defaultdict(list)
    for row in read(results / "memory_curves.csv"):
        curves[job_of(row)].append((float(row["global_step"]), float(row["return"])))
    for axis, task in zip(figure.subplots(2, 4).flat, TASKS, strict=True):
        runs = [points for job, points in curves.items() if job[0] == task]
        end, count = max([points[-1][0] for points in runs], default=1), min([40, *map(len, runs)])
        grid = end / count * np.arange(1, count + 1)
        for i, (label, (name, _)) in enumerate(LABELS.items()):
            lines = [windows(points, end, count) for job, points in curves.items() if job[:2] == (task, label)]
            lines = np.ma.masked_invalid(lines or [np.full(count, np.nan)])
            axis.plot(grid, lines.T, f"C{i}", linewidth=0.7, alpha=0.4)
            axis.plot(grid, lines.mean(0), f"C{i}", linewidth=2, label=name)
        axis.set_title(task, fontsize="medium")
        axis.set_xlim(left=0)
    figure.supxlabel("environment steps")
    figure.supylabel("return of training episodes (thin: each seed)")
    figure.legend(*axis.get_legend_handles_labels(), loc="outside upper center", ncols=len(LABELS))
    figure.savefig(results / "memory.png", dpi=100)


def table(results: Path) -> None:
    rows, ours = read(results / "memory.csv"), next(iter(LABELS))
    columns = [*((label,) for label in LABELS), *((ours, label) for label in LABELS if label != ours)]
    lines = ["Return with likeliest / with sampled actions: mean over seeds ± half of its 95% interval (Student's t"]
    lines += ["over seeds; Welch's for differences). In brackets: seeds.", ""]
    lines += [f"| task | {' | '.join(' minus '.join(LABELS[x][0] for x in labels) for labels in columns)} |"]
    lines += ["|---" * (len(columns) + 1) + "|"]
    for task in TASKS:
        got = {label: [row for row in rows if (row["task"], row["label"]) == (task, label)] for label in LABELS}
        digits = 1 if any(abs(float(row[MEASURES[0]])) >= 10 for of_label in got.values() for row in of_label) else 3
        cells = []
        for labels in columns:
            halves, sign = [], "+" if len(labels) > 1 else ""
            for measure in MEASURES if all(got[label] for label in labels) else []:
                mean, half = interval(*([float(row[measure]) for row in got[label]] for label in labels))
                halves.append(f"{mean:{sign}.{digits}f}" + ("" if np.isnan(half) else f" ± {half:.{digits}f}"))
            cells.append(" / ".join(halves) + (f" ({len(got[labels[0]])})" if halves and not sign else ""))
        lines.append(f"| {task} | {' | '.join(cells)} |")
    about = [", ".join(sorted({f"{name} {row[name]}" for row in rows})) for name in (*PACKAGES, "commit", "machine")]
    (results / "memory_table.md").write_text("\n".join([*lines, "", f"Made with {'; '.join(about)}."]) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    some = {"nargs": "+", "metavar": "…"}
    parser.add_argument("--tasks", **some, choices=TASKS, default=list(TASKS), help=", ".join(TASKS))
    where = f"{', '.join(LABELS)}; all by default, sb3-changed only on {', '.join(CHANGED)}"
    parser.add_argument("--labels", **some, choices=LABELS, help=where)
    parser.add_argument("--seeds", **some, type=int, default=[1, 2, 3, 4, 5], help="1 to 5 by default")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, 2 by default")
    parser.add_argument("--results", type=Path, default=HERE / "results", help="folder of the results")
    parser.add_argument("--again", action="store_true", help="first remove what the chosen runs gave")
    parser.add_argument("--plot-only", action="store_true")
    parser.add_argument("--smoke", action="store_true", help="4,096 steps, 4 episodes, a seed, two tasks if all")
    args = parser.parse_args()
    if args.smoke:
        args.results, args.seeds = Path(tempfile.mkdtemp(prefix="memory-")), args.seeds[:1]
        args.tasks = ["RepeatPrevious", "CartPole"] if args.tasks == list(TASKS) else args.tasks
    args.results.mkdir(parents=True, exist_ok=True)
    jobs = {}
    for seed, task, label in [(s, x, y) for s in args.seeds for x in args.tasks for y in args.labels or LABELS]:
        if args.labels or label != "sb3-changed" or task in CHANGED:
            steps, episodes = (4096, 4) if args.smoke else (TASKS[task][1], 100)
            command = f"{LABELS[label][1]} {TASKS[task][0]} --total-timesteps {steps} --eval-episodes {episodes}"
            jobs[task, label, seed] = f"{command} --seed {seed}"
    for job in jobs if args.again and not args.plot_only else ():
        store(args.results, job, None, [])
    done = {job_of(row): row["command"] for row in read(args.results / "memory.csv")}
    other = [job for job in jobs if job in done and done[job] != f"python {jobs[job]}"]
    if other and not args.plot_only:
        sys.exit(f"done, but with another command than today's; --again would remove them: {other}")
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("stopped; the same command goes on"))
    well = args.plot_only or work({job: x for job, x in jobs.items() if job not in done}, args.results, args.jobs)
    plot(args.results)
    table(args.results)
    print(f"{args.results}: memory.csv, memory_curves.csv, memory.png, memory_table.md")
    sys.exit(not well)


if __name__ == "__main__":
    main()
