"""The experiment of docs/ppo_lstm_tamiyo.md: does a controller with memory grow better networks?

    python benchmark/tamiyo.py train        # every controller and seed; goes on where it was cut off
    python benchmark/tamiyo.py evaluate     # everything that is trained, on the same held-out hosts
    python benchmark/tamiyo.py table        # results/tamiyo_*: table.md, hosts.csv, culls.csv, curves.csv, curves.png

Trainings are independent processes of one thread, `--jobs` of them at a time, in benchmark/runs/. The first two
controllers with twice the training, or on CIFAR-10 instead of digits:

    python benchmark/tamiyo.py train --total-timesteps 128000 --controllers LSTM MLP    # then evaluate, table …
    python benchmark/tamiyo.py train --dataset cifar10 --controllers LSTM MLP           # … with the same flags
"""

import argparse
import csv
import dataclasses
import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from matplotlib.figure import Figure
from scipy.stats import t as student
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from tamiyo_schedule import look, told  # noqa: E402

import ppo_lstm_tamiyo as tamiyo  # noqa: E402

SEEDS, HOSTS, STEPS = range(1, 6), 200, 64_000
CONTROLLERS = {  # label: flags
    "LSTM": [],
    "MLP": ["--no-recurrent"],
    "LSTM, reset every 4": ["--reset-every", "4"],
    "MLP + history": ["--no-recurrent", "--env-kwargs", '{"history": 5}'],
    "LSTM, reset every 8": ["--reset-every", "8"],
}
STATIC = "static, the modules of LSTM"  # its return is not comparable: it is never paid for growing
SAMPLED = "{}, sampled actions"
TOLD = "told which blueprints are unsound"
LSTM_ROWS = ("LSTM", STATIC, SAMPLED.format("LSTM"), *(f"LSTM, its state reset every {k}" for k in (1, 4, 8)))
POLICIES = {  # label: `--policy`, or a rule of tamiyo_schedule.py
    "never grow": "never",
    "random": "random",
    "always at once": "always",
    "best schedule": "schedule",
    "plateau heuristic": "heuristic",
    "best rule that looks once": "look",
    TOLD: "told",
}
FIGURES = (
    "test_accuracy",
    "validation_accuracy",
    "parameter_ratio",
    "germinations",
    "fossilized",
    "culled",
)  # of a host
RUNS, RESULTS = HERE / "runs", HERE / "results"
dataset, steps = "digits", STEPS


def place(label: str, seed: int) -> Path:
    """Where a row of the table keeps its files; other settings, other files."""
    return RUNS / f"tamiyo_{dataset}_{steps}_{HOSTS}" / f"{label.replace(' ', '_').replace(',', '')}__{seed}"


def run_of(label: str, seed: int) -> Path | None:
    """The newest run folder that has a checkpoint."""
    found = sorted(place(label, seed).glob("*/checkpoint.pt"))
    return found[-1].parent if found else None


def steps_of(label: str, seed: int) -> int:
    run = run_of(label, seed)
    return tamiyo.load(run / "checkpoint.pt")["progress"]["global_step"] if run else 0


def train_one(label: str, seed: int) -> None:
    if steps_of(label, seed) >= steps:
        return
    flags = ["--seed", str(seed), "--runs-dir", str(place(label, seed)), "--eval-episodes", "16"]
    flags += ["--dataset", dataset, *CONTROLLERS[label]]
    if run := run_of(label, seed):
        flags = ["--resume", str(run)]
    command = [sys.executable, "ppo_lstm_tamiyo.py", "--total-timesteps", str(steps), *flags]
    result = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{label}, seed {seed}: {result.stderr[-2000:]}")
    print(f"{label}, seed {seed}: {json.loads(result.stdout.splitlines()[-1])['eval_return_mean']:.3f}", flush=True)


def agent_of(label: str, seed: int) -> tuple[tamiyo.Agent, tamiyo.Args]:
    state = tamiyo.load(run_of(label, seed) / "checkpoint.pt")
    args = dataclasses.replace(tamiyo.Args(**state["args"]), eval_episodes=HOSTS, cuda=False)
    envs = tamiyo.make_envs(args, 1)
    agent = tamiyo.Agent(envs.single_observation_space.shape[0], envs.single_action_space, args)
    agent.load_state_dict(state["agent"])
    return agent, args


def evaluations() -> list[tuple]:
    """(row of the table, seed, controller, policy, reset_every, examine its culls?)"""
    todo = [(label, 0, None, policy, None, policy in ("random", "look")) for label, policy in POLICIES.items()]
    for label, seed in [(label, seed) for label in CONTROLLERS for seed in SEEDS if steps_of(label, seed) >= steps]:
        todo.append((label, seed, label, "learned", None, True))
        todo.append((SAMPLED.format(label), seed, label, "sampled", None, False))
        if label == "LSTM":
            todo.append((STATIC, seed, label, "static", None, False))
            todo += [(f"LSTM, its state reset every {k}", seed, label, "learned", k, False) for k in (1, 4, 8)]
    return [job for job in todo if not (place(*job[:2]) / "evaluation.npz").exists()]


def evaluate_one(job: tuple) -> None:
    """Writes what each host got right to a file, which is there whole or not at all."""
    label, seed, controller, policy, reset_every, culls = job
    torch.set_num_threads(1)
    plain = tamiyo.Args(eval_episodes=HOSTS, cuda=False, dataset=dataset)
    agent, args = agent_of(controller, seed) if controller else (None, plain)
    if policy in ("look", "told"):
        seeds = [tamiyo.HELD_OUT + i for i in range(HOSTS)]
        played = tamiyo.play(args, seeds, look(seeds) if policy == "look" else told(args, seeds))
    elif policy == "sampled":
        played = tamiyo.evaluate(agent, dataclasses.replace(args, eval_deterministic=False))
    else:
        played = tamiyo.evaluate(agent, args, policy, reset_every)
    better = tamiyo.cull_outcomes(args, played) if culls else np.zeros(0, bool)
    figures = {name: played.info[name] for name in FIGURES} | {"returns": played.returns, "better": better}
    figures["correct"] = played.info["test_correct"].astype(np.float32)
    path = place(label, seed)
    path.mkdir(parents=True, exist_ok=True)
    np.savez_compressed(path / "unfinished.npz", label=label, seed=seed, **figures)
    (path / "unfinished.npz").replace(path / "evaluation.npz")
    accuracy = played.info["test_accuracy"].mean()
    print(f"{label}, seed {seed}: return {played.returns.mean():.3f}, accuracy {accuracy:.4f}", flush=True)


def result(name: str) -> Path:
    """Path of a result; other settings than the table's are part of its name."""
    setting = ([] if dataset == "digits" else [dataset]) + ([] if steps == STEPS else [str(steps)])
    return RESULTS / "_".join(["tamiyo", *setting, name])


def load_evaluations() -> dict[str, dict[int, dict]]:
    """{label: {seed: arrays}}"""
    rows = {}
    for path in sorted(place("", 0).parent.glob("*/evaluation.npz")):
        with np.load(path) as file:
            entry = dict(file)
        rows.setdefault(str(entry["label"]), {})[int(entry["seed"])] = entry
    return rows


def resampled(stack: np.ndarray, draws: int, number: int) -> np.ndarray:
    """Bootstrap means [draws] of [controllers, hosts, images]. Hosts and images are resampled the same way in every row
    of the table, which pairs them; controllers in the same way if `number` is the same. One controller fewer is drawn
    than there are: their mean then varies as it should (Rao and Wu 1988)."""
    shared, own, means = np.random.default_rng(0), np.random.default_rng([1, number]), np.empty(draws)
    controllers, hosts, images = stack.shape
    for i in range(draws):
        host_weights = np.bincount(shared.integers(hosts, size=hosts), minlength=hosts) / hosts
        image_weights = np.bincount(shared.integers(images, size=images), minlength=images) / images
        chosen = own.integers(controllers, size=max(1, controllers - 1))
        means[i] = host_weights @ stack[chosen].mean(0) @ image_weights
    return means


def beyond(difference: float, drawn: np.ndarray, by_seed: list[np.ndarray], digits: int) -> str:
    """A difference and its 95% interval: the standard deviation of its bootstrap times Student's t. Satterthwaite's
    degrees of freedom: a part of the variance is that of few seeds. `by_seed`: the means of each row's seeds."""
    several = [means for means in by_seed if len(means) > 1]
    own = sum((means.var(ddof=1) / len(means)) ** 2 / (len(means) - 1) for means in several)
    freedom = max(drawn.var() ** 2 / own, min(map(len, several)) - 1) if own else np.inf
    half = drawn.std() * student.ppf(0.975, freedom)
    return f"{difference:+.{digits}f} ({difference - half:+.{digits}f} to {difference + half:+.{digits}f})"


def precision(better: list[np.ndarray]) -> str:
    """Share of culls after which the host was better off: the controllers' mean, its 95% interval (Student's t) and all
    of them; for one controller, Wilson's interval over culls."""
    shares, n = np.array([x.mean() for x in better]), sum(map(len, better))
    if len(shares) > 1:
        half = student.ppf(0.975, len(shares) - 1) * shares.std(ddof=1) / len(shares) ** 0.5
        each = ", ".join(f"{share:.2f}" for share in shares)
        return f"{shares.mean():.2f} ± {half:.2f} ({each}; {n} culls)"
    half = 1.96 * np.sqrt(shares[0] * (1 - shares[0]) / n + 0.96 / n**2) / (1 + 3.84 / n)
    return f"{shares[0]:.2f}, {(shares[0] + 1.92 / n) / (1 + 3.84 / n):.2f} ± {half:.2f} ({n} culls)"


def write_csv(rows: dict[str, dict[int, dict]]) -> None:
    names = ("returns", *FIGURES)
    with open(result("hosts.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", "host", *names])
        for label, seeds in rows.items():
            for seed, entry in seeds.items():
                columns = [entry[name] for name in names]
                writer.writerows([label, seed, e, *(f"{x[e]:.4g}" for x in columns)] for e in range(len(columns[0])))
    with open(result("culls.csv"), "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["row", "seed", "culls examined", "host better off"])
        for label, seeds in rows.items():
            examined = [(seed, entry["better"]) for seed, entry in seeds.items() if len(entry["better"])]
            writer.writerows([label, seed, len(better), int(better.sum())] for seed, better in examined)


def table(draws: int = 2000) -> None:
    rows = load_evaluations()
    if not {"LSTM", "plateau heuristic"} <= rows.keys():
        sys.exit("nothing to compare yet: train and evaluate first")
    write_csv(rows)
    returns = {
        label: np.stack([entry["returns"][:, None] for entry in seeds.values()]) for label, seeds in rows.items()
    }
    correct = {label: np.stack([100 * entry["correct"] for entry in seeds.values()]) for label, seeds in rows.items()}
    observed = {label: (returns[label].mean(), correct[label].mean()) for label in rows}
    drawn = {}
    for number, label in enumerate(rows):
        number = 1000 if label in LSTM_ROWS else number  # the same controllers
        drawn[label] = resampled(returns[label], draws, number), resampled(correct[label], draws, number)

    def compared(one: str, other: str, i: int) -> str:
        by_seed = [(returns, correct)[i][label].mean((1, 2)) for label in (one, other)]
        if {one, other} <= set(LSTM_ROWS):  # the same controllers
            by_seed = [by_seed[0] - by_seed[1]]
        return beyond(observed[one][i] - observed[other][i], drawn[one][i] - drawn[other][i], by_seed, (2, 1)[i])

    lines = [
        "| policy | seeds | return | LSTM beyond it | sampled | LSTM beyond it, sampled | test accuracy, % | "
        "LSTM beyond it | parameters added |",
        "|---" * 9 + "|",
    ]
    for label in sorted(rows.keys() - map(SAMPLED.format, CONTROLLERS), key=lambda label: -observed[label][0]):
        other = [compared("LSTM", label, i) for i in range(2)]
        other = ["", ""] if label == "LSTM" else ["", other[1]] if label == STATIC else other
        added = np.mean([entry["parameter_ratio"] for entry in rows[label].values()])
        cells = [label, str(len(rows[label])), f"{observed[label][0]:.2f}", other[0]]
        sampled = SAMPLED.format(label) if label in CONTROLLERS else label
        cells += [f"{observed[sampled][0]:.2f}" if label in CONTROLLERS else ""]
        cells += ["" if label in LSTM_ROWS else compared(SAMPLED.format("LSTM"), sampled, 0)]
        cells += [f"{observed[label][1]:.1f}", other[1], f"{added:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Culls after which the host ended better off than with the seed, a share for each controller:", ""]
    for label, seeds in rows.items():
        better = [entry["better"] for entry in seeds.values()]
        if sum(map(len, better)) >= 50:
            lines.append(f"- {label}: {precision(better)}")
    lines += ["", *curves(observed["plateau heuristic"][0])]
    if TOLD in rows:
        knowing = compared(TOLD, "best schedule", 0)
        lines += ["", f"- told which blueprints are unsound, beyond the best schedule: {knowing}"]
    result("table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def curves(heuristic: float) -> list[str]:
    """Plots the returns of training episodes, mean and range over seeds, and tells when they pass the heuristic's."""
    lines, rows, figure = [], [], Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for i, label in enumerate(CONTROLLERS):
        values = []  # [seeds, updates]
        for seed in SEEDS:
            if steps_of(label, seed) >= steps:
                events = EventAccumulator(str(run_of(label, seed)), size_guidance={"scalars": 0}).Reload()
                curve = events.Scalars("charts/episodic_return")
                values.append([event.value for event in curve])
                rows += [[label, seed, event.step // 25, f"{event.value:.4f}"] for event in curve]
        if values:
            hosts = np.array([event.step for event in curve])[4:] / 25
            smooth = np.array([np.convolve(curve, np.ones(5) / 5, "valid") for curve in values])
            axis.plot(hosts, smooth.mean(0), color=f"C{i}", label=f"{label}, {len(values)} seeds")
            axis.fill_between(hosts, smooth.min(0), smooth.max(0), color=f"C{i}", alpha=0.15, linewidth=0)
            reached = np.flatnonzero(smooth.mean(0) >= heuristic)
            when = f"after {hosts[reached[0]]:.0f} hosts" if len(reached) else "never"
            lines.append(f"- {label}: the mean return of training episodes passes the heuristic's {when}")
    axis.axhline(heuristic, color="black", linestyle="--", linewidth=1, label="plateau heuristic")
    axis.set(xlabel="hosts trained", ylabel="return of training episodes (0: nothing grown)")
    axis.legend(fontsize="small")
    figure.savefig(result("curves.png"), dpi=110)
    with open(result("curves.csv"), "w", newline="") as file:
        csv.writer(file).writerows([["controller", "seed", "hosts", "return"], *rows])
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("step", choices=["train", "evaluate", "table"])
    parser.add_argument("--jobs", type=int, default=2, help="trainings or evaluations at a time")
    parser.add_argument("--dataset", default="digits", choices=["digits", "cifar10"])
    parser.add_argument("--total-timesteps", type=int, default=STEPS)
    parser.add_argument("--controllers", nargs="*", default=list(CONTROLLERS), choices=list(CONTROLLERS))
    args = parser.parse_args()
    global dataset, steps
    dataset, steps = args.dataset, args.total_timesteps
    if args.step == "train":
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda job: train_one(*job), [(label, seed) for seed in SEEDS for label in args.controllers]))
    elif args.step == "evaluate":
        with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
            pool.map(evaluate_one, evaluations(), chunksize=1)
    else:
        table()


if __name__ == "__main__":
    main()
