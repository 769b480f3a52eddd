"""The experiment of docs/ppo_lstm_tamiyo.md: does a controller with memory grow better networks?

    python benchmark/tamiyo.py train        # every controller and seed; goes on where it was cut off
    python benchmark/tamiyo.py evaluate     # everything on the same held-out hosts -> results/tamiyo_hosts.csv
    python benchmark/tamiyo.py table        # results/tamiyo_table.md, tamiyo.png, tamiyo_curves.png from what is there

Trainings are independent processes of one thread, `--jobs` of them at a time, in benchmark/runs/tamiyo/.
"""

import argparse
import csv
import dataclasses
import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import ppo_lstm_tamiyo as tamiyo  # noqa: E402

SEEDS, HOSTS, STEPS = range(1, 6), 200, 51_200
CONTROLLERS = {  # label: flags
    "LSTM": [],
    "MLP": ["--no-recurrent"],
    "MLP + history": ["--no-recurrent", "--env-kwargs", '{"history": 5}'],
    "LSTM, reset every 4": ["--reset-every", "4"],
    "LSTM, reset every 8": ["--reset-every", "8"],
}
POLICIES = {  # label: `--policy`
    "never grow": "never",
    "random": "random",
    "always at once": "always",
    "best schedule": "schedule",
    "plateau heuristic": "heuristic",
}
RUNS, RESULTS = HERE / "runs" / "tamiyo", HERE / "results"


def folder(label: str, seed: int) -> Path:
    return RUNS / f"{label.replace(' ', '_').replace(',', '')}__{seed}"


def run_of(label: str, seed: int) -> Path | None:
    """The newest run folder that has a checkpoint."""
    found = sorted(folder(label, seed).glob("*/checkpoint.pt"))
    return found[-1].parent if found else None


def steps_of(label: str, seed: int) -> int:
    run = run_of(label, seed)
    return tamiyo.load(run / "checkpoint.pt")["progress"]["global_step"] if run else 0


def train_one(label: str, seed: int) -> None:
    if steps_of(label, seed) >= STEPS:
        return
    flags = ["--seed", str(seed), "--runs-dir", str(folder(label, seed)), "--eval-episodes", "16", *CONTROLLERS[label]]
    if run := run_of(label, seed):
        flags = ["--resume", str(run)]
    command = [sys.executable, "ppo_lstm_tamiyo.py", "--total-timesteps", str(STEPS), *flags]
    result = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{label}, seed {seed}: {result.stderr[-2000:]}")
    print(f"{label}, seed {seed}: {json.loads(result.stdout.splitlines()[-1])['eval_return_mean']:.3f}", flush=True)


def agent_of(label: str, seed: int) -> tuple[tamiyo.Agent, tamiyo.Args]:
    state = tamiyo.load(run_of(label, seed) / "checkpoint.pt")
    args = dataclasses.replace(tamiyo.Args(**state["args"]), eval_episodes=HOSTS)
    envs = tamiyo.make_envs(args, 1)
    agent = tamiyo.Agent(envs.single_observation_space.shape[0], envs.single_action_space, args)
    agent.load_state_dict(state["agent"])
    return agent, args


def evaluations() -> dict[tuple[str, int], tuple]:
    """{(row of the table, seed): (agent, args, policy, reset_every, examine its culls?)}"""
    plain = tamiyo.Args(eval_episodes=HOSTS)
    todo = {(label, 0): (None, plain, policy, None, policy == "random") for label, policy in POLICIES.items()}
    for label in CONTROLLERS:
        for seed in SEEDS:
            if steps_of(label, seed) >= STEPS:
                agent, args = agent_of(label, seed)
                todo[label, seed] = agent, args, "learned", None, True
                if label == "LSTM":
                    todo["static, the modules of LSTM", seed] = agent, args, "static", None, False
                    for k in (1, 4, 8):
                        todo[f"LSTM, its state reset every {k}", seed] = agent, args, "learned", k, False
    return todo


def evaluate() -> None:
    """Keeps what is there already; the images that each host got right are in one file for each row."""
    torch.set_num_threads(1)
    for (label, seed), (agent, args, policy, reset_every, culls) in evaluations().items():
        path = RUNS / "evaluations" / f"{label.replace(' ', '_').replace(',', '')}__{seed}.npz"
        if path.exists():
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        played = tamiyo.evaluate(agent, args, policy, reset_every)
        better = tamiyo.cull_outcomes(args, played) if culls else np.zeros(0, bool)
        names = ("test_accuracy", "validation_accuracy", "parameter_ratio", "germinations", "fossilized", "culled")
        np.savez_compressed(
            path,
            label=label,
            seed=seed,
            returns=played.returns,
            correct=played.info["test_correct"].astype(np.float32),
            better=better,
            **{name: played.info[name] for name in names},
        )
        print(
            f"{label}, seed {seed}: {played.returns.mean():.3f} {played.info['test_accuracy'].mean():.4f}", flush=True
        )


def load_evaluations() -> dict[str, dict[int, dict]]:
    """{label: {seed: arrays}}"""
    rows = {}
    for path in sorted((RUNS / "evaluations").glob("*.npz")):
        with np.load(path) as file:
            entry = dict(file)
        rows.setdefault(str(entry["label"]), {})[int(entry["seed"])] = entry
    return rows


def resampled(rows: list[dict], value: str, rng: np.random.Generator, draws: int) -> np.ndarray:
    """Bootstrap means [draws]: resamples controllers; hosts and test images as `rng` says, the same for every row."""
    own = np.random.default_rng(len(rows))
    means = np.empty(draws)
    stack = np.stack([row["correct"] if value == "accuracy" else row["returns"][:, None] for row in rows])  # [C, E, I]
    for i in range(draws):
        hosts = np.bincount(rng.integers(stack.shape[1], size=stack.shape[1]), minlength=stack.shape[1])
        images = np.bincount(rng.integers(540, size=540), minlength=540) if value == "accuracy" else np.ones(1)
        chosen = own.integers(len(rows), size=len(rows))
        means[i] = (hosts @ stack[chosen].mean(0) @ images) / hosts.sum() / images.sum()
    return means


def table(draws: int = 2000) -> None:
    rows = load_evaluations()
    with open(RESULTS / "tamiyo_hosts.csv", "w", newline="") as file:
        writer = csv.writer(file)
        names = [
            "returns",
            "test_accuracy",
            "validation_accuracy",
            "parameter_ratio",
            "germinations",
            "fossilized",
            "culled",
        ]
        writer.writerow(["row", "seed", "host", *names])
        for label, seeds in rows.items():
            for seed, entry in seeds.items():
                columns = [entry[name] for name in names]
                writer.writerows([label, seed, e, *(f"{x[e]:.4g}" for x in columns)] for e in range(len(columns[0])))
    with open(RESULTS / "tamiyo_culls.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", "culls examined", "host better off"])
        for label, seeds in rows.items():
            for seed, entry in seeds.items():
                if len(entry["better"]):
                    writer.writerow([label, seed, len(entry["better"]), int(entry["better"].sum())])
    samples = {
        value: {
            label: resampled(list(seeds.values()), value, np.random.default_rng(0), draws)
            for label, seeds in rows.items()
        }
        for value in ("return", "accuracy")
    }
    lines = [
        "| policy | seeds | return | LSTM's return beyond it | test accuracy | LSTM's beyond it (points) | parameters added |",
        "|---|---|---|---|---|---|---|",
    ]
    mean_return = {label: np.mean([entry["returns"] for entry in seeds.values()]) for label, seeds in rows.items()}
    for label in sorted(rows, key=mean_return.get, reverse=True):
        entries = list(rows[label].values())
        cells = [label, str(len(entries)), f"{mean_return[label]:.3f}"]
        accuracy = 100 * np.mean([entry["correct"] for entry in entries])
        for value, scale, own in (("return", 1, None), ("accuracy", 100, f"{accuracy:.1f}%")):
            difference = scale * (samples[value]["LSTM"] - samples[value][label])
            low, high = np.percentile(difference, [2.5, 97.5])
            cells += [own] * bool(own)
            digits = 2 if value == "return" else 1
            cells.append(
                "" if label == "LSTM" else f"{difference.mean():+.{digits}f} ({low:+.{digits}f} to {high:+.{digits}f})"
            )
        cells.append(f"{np.mean([entry['parameter_ratio'] for entry in entries]):.0%}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Culls after which the host ended better off than with the seed (95% interval, over culls):", ""]
    for label, seeds in rows.items():
        better = np.concatenate([entry["better"] for entry in seeds.values()])
        if len(better) >= 50:
            p, n = better.mean(), len(better)
            center, half = (
                (p + 1.92 / n) / (1 + 3.84 / n),
                1.96 * np.sqrt(p * (1 - p) / n + 0.96 / n**2) / (1 + 3.84 / n),
            )
            lines.append(f"- {label}: {p:.2f} ({center - half:.2f} to {center + half:.2f}) of {n}")
    (RESULTS / "tamiyo_table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    curves()


def curves() -> None:
    """Returns of training episodes, mean and range over seeds."""
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for i, label in enumerate(CONTROLLERS):
        runs = [run_of(label, seed) for seed in SEEDS if steps_of(label, seed) >= STEPS]
        points = []
        for run in runs:
            events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
            points.append([(event.step, event.value) for event in events.Scalars("charts/episodic_return")])
        if points:
            steps = np.array(points[0])[:, 0]
            values = np.array([[value for _, value in curve] for curve in points])  # [seeds, updates]
            kernel = np.ones(5) / 5
            smooth = np.array([np.convolve(curve, kernel, "valid") for curve in values])
            axis.plot(steps[4:] / 25, smooth.mean(0), color=f"C{i}", label=f"{label}, {len(runs)} seeds")
            axis.fill_between(steps[4:] / 25, smooth.min(0), smooth.max(0), color=f"C{i}", alpha=0.15, linewidth=0)
    axis.axhline(0, color="black", linewidth=0.5)
    axis.set(xlabel="hosts trained", ylabel="return of training episodes (0: never grow)")
    axis.legend(fontsize="small")
    figure.savefig(RESULTS / "tamiyo_curves.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "evaluate", "table"])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--controllers", nargs="*", default=list(CONTROLLERS), choices=list(CONTROLLERS))
    args = parser.parse_args()
    if args.step == "train":
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: train_one(*job), [(label, seed) for seed in SEEDS for label in args.controllers]))
    elif args.step == "evaluate":
        evaluate()
    else:
        table()


if __name__ == "__main__":
    main()
