"""Learning curves: runs each command of a task over its seeds, writes curves and evaluations to CSV and plots them.

    python benchmark/learning.py cartpole        # 5 minutes
    python benchmark/learning.py bptt            # 3 minutes
    python benchmark/learning.py lander          # 10 minutes
    python benchmark/learning.py flycraft        # 75 minutes; needs requirements-envs.txt
    python benchmark/learning.py kuhn            # 9 minutes
    python benchmark/learning.py leduc           # 9 minutes
    python benchmark/learning.py leduc_long      # 36 minutes
    python benchmark/learning.py liars_dice      # 28 minutes
    python benchmark/learning.py leduc_ablation  # 45 minutes
    python benchmark/learning.py clipping        # 10 minutes
    python benchmark/learning.py phantom_go      # 40 minutes
    python benchmark/learning.py pause           # 20 minutes
    python benchmark/learning.py worldmodel      # two hours
    python benchmark/learning.py planning        # 25 minutes; planning_settings, planning_pendulum likewise
    python benchmark/learning.py carracing       # four hours

Results: {task}_curves.csv and {task}_final.csv (with versions, commit and machine) in benchmark/results/, written after
each run, and {task}.png at the end. What is there is not run again: a benchmark that was stopped goes on where it was.
With `--again` it is, and results of labels and seeds that the task no longer has are dropped; without it, such results,
and those of other commands than today's, are an error.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import records
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
CARTPOLE = "ppo_lstm_predictor.py --env-id CartPole-v1 --visible 0 2 --total-timesteps 100000 --eval-episodes 100"
LANDER = "ppo_lstm_predictor.py --horizon 200 --eval-episodes 100 --checkpoint-every 0"
FLYCRAFT = "ppo_lstm_predictor.py --horizon 200 --eval-episodes 200 --checkpoint-every 0"
SELFPLAY = "sequence_ppo_selfplay.py --eval-episodes 1000 --checkpoint-every 25"
LONG = "--total-timesteps 48000000 --ent-coef-final 0.003"
NORMALISED = "--ent-coef 0.05 --ent-coef-final 0.02 --barrier-coef 0.05 --barrier-coef-final 0.008 --ref-kl-coef 0.4"
GO = 'sequence_ppo_selfplay.py --env-id phantom_go --env-kwargs {"board_size":5} --num-envs 128 --games-per-update 128'
GO += " --total-timesteps 300000 --hidden-size 128 --checkpoint-every 10 --update-epochs 2 --num-minibatches 2"
GO += " --gae-lambda 0.95 --eval-episodes 1000"
PAUSE = "benchmark/selfplay_pause.py --total-timesteps 5000000 --num-envs 256 --games-per-update 256"
PAUSE += " --checkpoint-every 50"
WORLDMODEL = "worldmodel_a2c.py --eval-episodes 100 --checkpoint-every 0"
A2C = "--update-epochs 1 --num-minibatches 1 --num-steps 8 --no-planning"
PENDULUM = "worldmodel_a2c.py --env-id Pendulum-v1 --checkpoint-every 0 --total-timesteps 30720 --no-anneal-lr"
PENDULUM += " --planning-samples 8"
EARLY = "worldmodel_a2c.py --checkpoint-every 0 --total-timesteps 10240 --no-anneal-lr"
RACING = "worldmodel_a2c.py --env-id environments.car_racing:CarRacing64-v0 --num-envs 8 --num-steps 64 --no-quantize"
RACING += " --planning-horizon 3 --planning-hold 1 --planning-samples 16 --memory-coef 0.1 --ent-coef 0.003"
RACING += " --total-timesteps 75000 --checkpoint-every 0"
RETURN = "charts/episodic_return"
EXPLOITABILITY, AVERAGE = "selfplay/exploitability", "selfplay/exploitability_average"
TASKS = {  # task: (seeds, title, {label: command}), and what is plotted if not the return of training episodes
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
        },
    ),
    "lander": (range(1, 4), "LunarLander-v3", {"PPO-LSTM with predictor, horizon 200": LANDER}),
    "flycraft": (
        range(1, 4),
        "FlyCraft",
        {
            "easy goals": f"{FLYCRAFT} --env-id environments.flycraft:FlyCraftEasy-v0 --total-timesteps 300000",
            "all goals": f"{FLYCRAFT} --env-id environments.flycraft:FlyCraft-v0 --total-timesteps 1000000",
        },
    ),
    "kuhn": (
        range(1, 4),
        "Kuhn poker",
        {"self-play": f"{SELFPLAY} --env-id kuhn_poker"},
        [EXPLOITABILITY, AVERAGE],
    ),
    "leduc": (range(31, 34), "Leduc poker", {"self-play": SELFPLAY}, [EXPLOITABILITY, AVERAGE]),
    "leduc_long": (
        range(41, 43),
        "Leduc poker, 48 million decisions",
        {"self-play": f"{SELFPLAY} {LONG}"},
        [EXPLOITABILITY, AVERAGE],
    ),
    "liars_dice": (
        range(1, 4),
        "Liar's dice",
        {"self-play": f"{SELFPLAY} --env-id liars_dice"},
        [EXPLOITABILITY, AVERAGE],
    ),
    "leduc_ablation": (
        range(31, 34),
        "Leduc poker without parts of the recipe",
        {
            "no barrier": f"{SELFPLAY} --barrier-coef 0 --barrier-coef-final 0",
            "as many games to the end": f"{SELFPLAY} --games-growth 1",
            "advantages normalised": f"{SELFPLAY} --norm-adv {NORMALISED}",
            "no reference": f"{SELFPLAY} --ref-kl-coef 0",
            "rates held": f"{SELFPLAY} --no-anneal-lr",
            "no memory": f"{SELFPLAY} --no-recurrent",
        },
        [EXPLOITABILITY, AVERAGE],
    ),
    "clipping": (
        range(31, 32),
        "Leduc poker: clipping the gradient's norm",
        {f"at {norm}": f"{SELFPLAY} --max-grad-norm {norm}" for norm in (1, 5, 10, 1000)},
        [EXPLOITABILITY],
    ),
    "phantom_go": (
        range(1, 4),
        "Phantom Go, 5x5: truncated backpropagation",
        {
            "whole games": f"{GO}",
            **{f"{n} decisions": f"{GO} --bptt-length {n}" for n in (50, 20, 10)},
            "no memory (--no-recurrent)": f"{GO} --no-recurrent",
        },
        ["selfplay/payoff_vs_random"],
    ),
    "pause": (
        range(11, 14),
        "Kuhn poker with a pause of 24 decisions: truncated backpropagation",
        {
            "whole games": PAUSE,
            **{f"{n} decisions": f"{PAUSE} --bptt-length {n}" for n in (20, 10)},
            "no memory (--no-recurrent)": f"{PAUSE} --no-recurrent",
        },
        [EXPLOITABILITY],
    ),
    "worldmodel": (
        range(1, 6),
        "CartPole-v1 with a world model",
        {
            "planning": WORLDMODEL,
            "no planning": f"{WORLDMODEL} --no-planning",
            "A2C (one epoch, one minibatch of 8 steps)": f"{WORLDMODEL} {A2C}",
        },
    ),
    "planning": (
        range(31, 39),
        "CartPole-v1, the first 10,000 steps",
        {
            "planning": EARLY,
            "no planning": f"{EARLY} --no-planning",
            "no steps of the model alone": f"{EARLY} --model-steps 0",
            "no distillation": f"{EARLY} --distill-coef 0",
            "true dynamics": f"benchmark/{EARLY.replace('a2c', 'oracle', 1)}",
        },
    ),
    "planning_settings": (
        range(31, 39),
        "CartPole-v1, the first 10,000 steps: other settings",
        {
            "planning": EARLY,
            "plans made, but not followed": f"{EARLY} --planning-beta 0",
            "candidates held for 1 step": f"{EARLY} --planning-hold 1",
            "3 steps ahead": f"{EARLY} --planning-horizon 3",
            "16 steps ahead": f"{EARLY} --planning-horizon 16",
            "looking back 32 steps": f"{EARLY} --context 32",
            "rollouts of 128 steps": f"{EARLY} --num-steps 128",
            "rollouts of 128 steps, no planning": f"{EARLY} --num-steps 128 --no-planning",
        },
    ),
    "planning_pendulum": (
        range(21, 27),
        "Pendulum-v1, the first 30,000 steps",
        {"planning": PENDULUM, "no planning": f"{PENDULUM} --no-planning"},
    ),
    "carracing": (
        range(1, 4),
        "CarRacing, 75,000 decisions of four frames",
        {
            "no planning": f"{RACING} --no-planning",
            "in stages, no planning": f"benchmark/{RACING.replace('a2c', 'stages', 1)} --no-planning",
            "planning": RACING,
        },
    ),
}


def finish(call: list[str], folder: str) -> tuple[str, dict[str, float]]:
    """A command's standard output, the seconds it took and its peak memory in MB."""
    with open(f"{folder}/out", "w+") as out, open(f"{folder}/err", "w+") as err:
        started = time.perf_counter()
        process = subprocess.Popen(call, cwd=HERE.parent, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0), err.seek(0)
        if status:
            sys.exit(err.read())
        return out.read(), {"seconds": time.perf_counter() - started, "peak_mb": usage.ru_maxrss / 1024}


def run(label: str, command: str, seed: int, tags: list[str], keep: str | None) -> tuple[list[dict], dict]:
    """The learning curve and the closing summary of one run. A curve ends where the summary's steps end: of a run in
    stages it is the last stage's."""
    with tempfile.TemporaryDirectory() as runs_dir:
        call = [sys.executable, *command.split(), "--seed", str(seed), "--runs-dir", keep or runs_dir]
        output, cost = finish(call, runs_dir)
        final = json.loads(output.splitlines()[-1])
        events = EventAccumulator(final.pop("run_dir"), size_guidance={"scalars": 0}).Reload()
        curves = {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in tags}
        before = final["global_step"] - events.Scalars("charts/SPS")[-1].step
    rows = defaultdict(dict)
    for tag, points in curves.items():
        for step, value in points:
            rows[step] |= {"label": label, "seed": seed, "global_step": before + step, tag.split("/")[1]: value}
    print(f"{label}, seed {seed}: {final.get('exploitability', final['eval_return_mean']):.3f}", file=sys.stderr)
    return list(rows.values()), {"label": label, "seed": seed, "command": f"python {command}"} | final | cost


def plot(task: str, title: str, tags: list[str]) -> None:
    """Each seed's curve and the seeds' mean. Returns are averaged over windows of a fiftieth (a tenth) of the run; what
    evaluations measured is plotted as it is, each seed at its own evaluations."""
    columns = [tag.split("/")[1] for tag in tags]
    curves = defaultdict(lambda: defaultdict(list))
    with open(HERE / "results" / f"{task}_curves.csv") as file:
        for row in csv.DictReader(file):
            point = [float(row[name] or "nan") for name in ("global_step", *columns)]
            curves[row["label"]][row["seed"]].append(point)
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for i, (label, seeds) in enumerate(curves.items()):
        label = f"{label}, {len(seeds)} seed{'s' * (len(seeds) > 1)}"
        for column, (name, style) in enumerate(zip(columns, ("-", "--"), strict=False), start=1):
            lines = [smooth(np.array(points)[:, [0, column]], tags == [RETURN]) for points in seeds.values()]
            for line in lines:
                axis.plot(*line, color=f"C{i}", linestyle=style, alpha=0.3, linewidth=1)
            shortest = min(line.shape[1] for line in lines)
            mean = np.ma.masked_invalid([line[:, :shortest] for line in lines]).mean(0)
            note = label if len(columns) == 1 else f"{label}: {name}"
            axis.plot(*mean, color=f"C{i}", linestyle=style, linewidth=2, label=note)
    what = "return of training episodes" if tags == [RETURN] else columns[0].replace("_", " ")
    axis.set(xlabel="environment steps" if tags == [RETURN] else "decisions", ylabel=what, title=title)
    if "exploitability" in what:
        axis.set_yscale("log")
    axis.legend(fontsize="small")
    figure.savefig(HERE / "results" / f"{task}.png", dpi=110)


def smooth(points: np.ndarray, average: bool) -> np.ndarray:
    """[2, P] of points [P, 2], if asked for averaged over fifty windows, or ten of a short run."""
    if not average:
        return points.T
    end, windows = points[-1, 0], 50 if len(points) > 40 else 10
    grid = np.linspace(0, end, windows + 1)[1:]
    chosen = [points[(points[:, 0] > g - end / windows) & (points[:, 0] <= g), 1] for g in grid]
    return np.array([grid, [np.nanmean(values) if np.isfinite(values).any() else np.nan for values in chosen]])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("task", choices=TASKS)
    parser.add_argument("--labels", nargs="+", help="only some lines of the picture; the others' results stay")
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--runs-dir", help="where to keep the runs and their checkpoints")
    parser.add_argument("--again", action="store_true", help="also runs whose results are there")
    args = parser.parse_args()
    seeds, title, commands, *tags = TASKS[args.task]
    tags = tags[0] if tags else [RETURN]
    if unknown := set(args.labels or ()) - commands.keys():
        parser.error(f"no such label: {', '.join(unknown)}; there are {', '.join(commands)}")
    today = {(label, seed): f"python {command}" for label, command in commands.items() for seed in seeds}
    chosen = {(label, seed) for label, seed in today if label in (args.labels or commands)}
    paths = [HERE / "results" / f"{args.task}_{name}.csv" for name in ("curves", "final")]
    results, order, lock = [], list(commands), threading.Lock()
    for path in paths:
        rows = [row | {"seed": int(row["seed"])} for row in records.read(path)]
        kept = [row for row in rows if (row["label"], row["seed"]) in today.keys() - chosen]
        results.append(kept if args.again else rows)
    done = {(row["label"], row["seed"]): row["command"].partition(" --seed ")[0] for row in results[1]}
    if old := [x for x in done if x not in today or (x in chosen and done[x] != today[x])]:
        parser.error(f"done with another command than today's; --again replaces it: {old}")

    about = records.circumstances()

    def job(label: str, command: str, seed: int) -> None:
        curve, final = run(label, command, seed, tags, args.runs_dir)
        with lock:
            for path, rows, more in zip(paths, results, (curve, [final | about]), strict=True):
                rows[:] = [row for row in rows if (row["label"], row["seed"]) != (label, seed)] + more
                records.write(path, sorted(rows, key=lambda row: (order.index(row["label"]), row["seed"])))

    left = sorted(chosen - done.keys(), key=lambda job: job[::-1])
    with ThreadPoolExecutor(args.jobs) as pool:
        try:
            for each in [pool.submit(job, label, commands[label], seed) for label, seed in left]:
                each.result()
        except BaseException:  # Ctrl-C, or a run that failed: no more are begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    plot(args.task, title, tags)


if __name__ == "__main__":
    main()
