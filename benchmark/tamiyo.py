"""The experiment of docs/ppo_lstm_tamiyo.md: does a controller with memory grow better networks?

    python benchmark/tamiyo.py train        # every controller and seed; goes on where it was cut off
    python benchmark/tamiyo.py evaluate     # everything that is trained, and rules, on the same held-out hosts
    python benchmark/tamiyo.py table        # results/tamiyo_{setting}_*: table.md, hosts.csv, culls.csv, curves.csv

Each with `--setting plain` or `--setting memory` (environments/hosts.py). Trainings are independent processes of one
thread, `--jobs` of them at a time, in benchmark/runs/; what each policy made of the held-out hosts is kept beside the
table, in results/tamiyo_{setting}/. Rules are the best of benchmark/tamiyo_rules.py.
"""

import csv
import json
import multiprocessing
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import records
import torch
from matplotlib.figure import Figure
from scipy.stats import t as student
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import tamiyo_rules as rules  # noqa: E402

import ppo_lstm_tamiyo as tamiyo  # noqa: E402
from environments.hosts import (  # noqa: E402
    ACCURACY,
    CULL,
    EPOCHS,
    FOSSILIZE,
    GERMINATE,
    HELD_OUT,
    PRICE,
    SETTINGS,
    WAIT,
    Morphogenesis,
)

SEEDS, HOSTS, STEPS = range(1, 6), 200, {"plain": 64_000, "memory": 96_000}
CONTROLLERS = {  # label: flags; a host's history as keyword argument
    "LSTM": [],
    "MLP": ["--no-recurrent"],
    "MLP + history": ["--no-recurrent", "history"],
    "LSTM, reset every 4": ["--reset-every", "4"],
    "LSTM, reset every 8": ["--reset-every", "8"],
}
WIPED = {f"LSTM, its state reset every {k}": k for k in (1, 4, 8)}
STATIC, SAMPLED = "static, the modules of LSTM", "{}, sampled actions"
LSTM_ROWS = ("LSTM", STATIC, SAMPLED.format("LSTM"), *WIPED)
PLAN, TOLD = "best fixed plan", "told what is unsound"
REMEMBERS, LOOKS = "best rule that remembers", "best rule that does not"
BEST = {  # of benchmark/tamiyo_rules.py, on other hosts: a plan, then orders of blueprints and thresholds
    "plain": {PLAN: ((0, 0), (0, 3)), REMEMBERS: ((0, 3, 4, 2), -0.05), LOOKS: ((0, 0), 0.0), TOLD: (0, 4, 3, 2)},
    "memory": {PLAN: ((10, 1),), REMEMBERS: ((0, 3, 4), -0.015), LOOKS: ((0, 0), -0.015), TOLD: (3, 4, 0, 2)},
}
# of a host
FIGURES = ("test_accuracy", "validation_accuracy", "parameter_ratio", "germinations", "fossilized", "culled")
RUNS, RESULTS = HERE / "runs", HERE / "results"
setting, dataset, steps = "plain", "digits", STEPS["plain"]


def place(folder: Path, label: str, seed: int) -> Path:
    """Where a row of the table has its files; other settings than the table's are part of the name."""
    other = ([] if dataset == "digits" else [dataset]) + ([] if steps == STEPS[setting] else [str(steps)])
    return folder / "_".join(["tamiyo", setting, *other]) / f"{label.replace(' ', '_').replace(',', '')}__{seed}"


def run_of(label: str, seed: int) -> Path | None:
    """The newest run folder that has a checkpoint."""
    found = sorted(place(RUNS, label, seed).glob("*/checkpoint.pt"))
    return found[-1].parent if found else None


def steps_of(label: str, seed: int) -> int:
    run = run_of(label, seed)
    return tamiyo.load(run / "checkpoint.pt")["counters"]["global_step"] if run else 0


def env_kwargs(label: str) -> dict:
    history = {"history": 5} if "history" in CONTROLLERS.get(label, ()) else {}
    return {"setting": setting, "dataset": dataset} | history


def train_one(label: str, seed: int) -> None:
    if steps_of(label, seed) >= steps:
        return
    flags = ["--seed", str(seed), "--runs-dir", str(place(RUNS, label, seed)), "--eval-episodes", "16"]
    flags += [flag for flag in CONTROLLERS[label] if flag != "history"]
    flags += ["--env-kwargs", json.dumps(env_kwargs(label))]
    flags += ["--bptt-length", "0"] * (setting == "memory")  # what was tried may be long ago
    if run := run_of(label, seed):
        flags = ["--resume", str(run)]
    command = [sys.executable, "ppo_lstm_tamiyo.py", "--total-timesteps", str(steps), *flags]
    result = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{label}, seed {seed}: {result.stderr[-2000:]}")
    print(f"{label}, seed {seed}: {json.loads(result.stdout.splitlines()[-1])['eval_return_mean']:.3f}", flush=True)


def agent_of(label: str, seed: int) -> tamiyo.Agent:
    args = tamiyo.Args(**tamiyo.load(run_of(label, seed) / "checkpoint.pt")["args"])
    agent = tamiyo.Agent(*spaces(label), args)
    tamiyo.load(run_of(label, seed) / "checkpoint.pt", agent=agent)
    return agent


def spaces(label: str) -> tuple:
    envs = Morphogenesis(1, **env_kwargs(label))
    return envs.single_observation_space, envs.single_action_space


def static(label: str, seed: int, seeds: list[int]) -> dict[str, np.ndarray]:
    """Hosts that have, from the start, what the controller ends with."""
    modules = rules.played(agent_of(label, seed), seeds, env_kwargs(label), sampled=False)[0]["modules"]
    envs = Morphogenesis(len(seeds), **env_kwargs(label))
    envs.reset(seed=seeds, options={"modules": modules})
    done, returns, info = np.zeros(len(seeds), bool), np.zeros(len(seeds)), {}
    while not done.all():
        _, reward, ended, _, infos = envs.step(np.full(len(seeds), WAIT))
        returns, final = returns + np.where(done, 0, reward), infos.get("final_info", {})
        for name in (*FIGURES, *(x for x in final if x.endswith("_correct"))) if final else ():
            now = ended & ~done
            info.setdefault(name, final[name].copy())[now] = final[name][now]
        done |= ended
    return info | {"returns": returns}


def cull_outcomes(actions: np.ndarray, seeds: list[int], label: str, most: int = 150) -> np.ndarray:
    """For each cull among actions [T, E] (`most` of them at random): is the host better off for it [C] bool? The host
    is trained twice more up to the cull, with the same data in the same order. Then one loses the seed, the other keeps
    it, permanently as soon as that is allowed, and nothing else is done. Better is the higher accuracy on the test
    images, or the lower loss if that is the same; culls that make no difference are left out (detail 12)."""
    when, episode = np.random.default_rng(0).permutation(np.argwhere(actions == CULL))[:most].T
    if not len(when):
        return np.zeros(0, bool)
    epochs, ends = np.arange(len(actions))[:, None], []
    for first, later in ((CULL, WAIT), (WAIT, FOSSILIZE)):
        planned = np.where(epochs < when, actions[:, episode], np.where(epochs == when, first, later))
        info, _ = rules.played(rules.replay(planned), [seeds[e] for e in episode], env_kwargs(label), sampled=False)
        ends.append((info["test_accuracy"], info["test_loss"]))
    (culled, culled_loss), (kept, kept_loss) = ends
    better = (culled > kept) | ((culled == kept) & (culled_loss < kept_loss))
    return better[culled_loss != kept_loss]


def repeated(actions: np.ndarray) -> np.ndarray:
    """Of actions [T, E], how many germinate a blueprint of which the host has culled a seed before [E]."""
    counts = np.zeros(actions.shape[1])
    for episode, column in enumerate(actions.T):
        culled, live = set(), None
        for action in column.tolist():
            if GERMINATE <= action < FOSSILIZE:
                counts[episode] += action in culled
                live = action
            elif action == CULL:
                culled.add(live)
    return counts


def rule_of(label: str, seeds: list[int]) -> rules.Rule:
    best = BEST[setting]
    return {
        "never grow": rules.never,
        "random": lambda: rules.at_random(0),
        "always at once": rules.always,
        PLAN: lambda: rules.plan(best[PLAN]),
        REMEMBERS: lambda: rules.look(np.array([best[REMEMBERS][0]]), best[REMEMBERS][1], setting),
        LOOKS: lambda: rules.glance(*best[LOOKS], setting),
        TOLD: lambda: rules.told(seeds, best[TOLD], setting, dataset),
    }[label]()


POLICIES = ("never grow", "random", "always at once", PLAN, REMEMBERS, LOOKS, TOLD)


def evaluations(again: bool) -> list[tuple[str, int, str]]:
    """(row of the table, seed, controller) of all that is not evaluated yet or, if asked for, can be again."""
    todo = [(label, 0, "") for label in POLICIES]
    trained = [(label, seed) for seed in SEEDS for label in CONTROLLERS if steps_of(label, seed) >= steps]
    todo += [(row, seed, label) for label, seed in trained for row in (label, SAMPLED.format(label))]
    todo += [(row, seed, label) for label, seed in trained for row in (STATIC, *WIPED) if label == "LSTM"]
    return [job for job in todo if again or not evaluated(*job[:2])]


def evaluated(row: str, seed: int) -> bool:
    """… with the rule as it is now."""
    path = place(RESULTS, row, seed).with_suffix(".npz")
    return path.exists() and str(np.load(path)["rule"]) == repr(BEST[setting].get(row))


def evaluate_one(job: tuple[str, int, str]) -> None:
    """Writes what each host got right to a file, which is there whole or not at all."""
    row, seed, label = job
    torch.set_num_threads(1)
    seeds = [HELD_OUT + 1000 + i for i in range(HOSTS)]  # which no evaluation of the script has seen
    better, tried = np.zeros(0, bool), {}
    if row == STATIC:
        info = static(label, seed, seeds)
    else:
        agent = agent_of(label, seed) if label else rule_of(row, seeds)
        if row in WIPED:
            agent.reset_every = WIPED[row]
        info, actions = rules.played(agent, seeds, env_kwargs(label), sampled=row == SAMPLED.format(label))
        tried = {"repeated": repeated(actions)}
        if row in ("random", REMEMBERS, label):
            better = cull_outcomes(actions, seeds, label)
    figures = {name: info[name] for name in FIGURES} | {"returns": info["returns"], "better": better} | tried
    figures["correct"] = info["test_correct"].astype(np.float32)
    gain = ACCURACY * (info["validation_correct"] - info["bare_validation_correct"])  # [E, images]
    figures["worth"] = (gain - PRICE * info["parameter_ratio"][:, None]).astype(np.float32)  # its mean is the return
    if row == label:
        figures |= training(label, seed)
    path = place(RESULTS, row, seed)
    path.parent.mkdir(exist_ok=True)
    with open(path.with_suffix(".tmp"), "wb") as file:
        about = {"label": row, "seed": seed, "rule": repr(BEST[setting].get(row))} | records.circumstances()
        np.savez_compressed(file, **about, **figures)
    path.with_suffix(".tmp").replace(path.with_suffix(".npz"))
    accuracy = info["test_accuracy"].mean()
    print(f"{row}, seed {seed}: return {info['returns'].mean():.3f}, accuracy {accuracy:.4f}", flush=True)


def training(label: str, seed: int) -> dict[str, np.ndarray]:
    """Mean return of the episodes that end in each update, and seconds an update."""
    events = EventAccumulator(str(run_of(label, seed)), size_guidance={"scalars": 0}).Reload()
    curve = events.Scalars("charts/episodic_return")
    seconds = tamiyo.load(run_of(label, seed) / "checkpoint.pt")["counters"]["seconds"] / len(curve)
    return {"curve": np.array([[event.step, event.value] for event in curve]), "seconds": seconds}


def result(name: str) -> Path:
    folder = place(RESULTS, "", 0).parent
    return folder.with_name(f"{folder.name}_{name}")


def load_evaluations() -> dict[str, dict[int, dict]]:
    """{label: {seed: arrays}}"""
    rows = {}
    for path in sorted(place(RESULTS, "", 0).parent.glob("*.npz")):
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
    if not {PLAN, REMEMBERS} <= rows.keys():
        sys.exit("nothing to compare yet: evaluate first")
    chief = "LSTM" if "LSTM" in rows else REMEMBERS  # which is compared with all others
    write_csv(rows)
    returns = {label: np.stack([entry["worth"] for entry in seeds.values()]) for label, seeds in rows.items()}
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
        f"| policy | seeds | return | {chief} beyond it | sampled | {chief} beyond it, sampled | test accuracy, % | "
        f"{chief} beyond it | parameters added |",
        "|---" * 9 + "|",
    ]
    for label in sorted(rows.keys() - map(SAMPLED.format, CONTROLLERS), key=lambda label: -observed[label][0]):
        other = ["", ""] if label == chief else [compared(chief, label, i) for i in range(2)]
        added = np.mean([entry["parameter_ratio"] for entry in rows[label].values()])
        cells = [label, str(len(rows[label])), f"{observed[label][0]:.2f}", other[0]]
        sampled = SAMPLED.format(label) if label in CONTROLLERS else label
        cells += [f"{observed[sampled][0]:.2f}" if label in CONTROLLERS else ""]
        cells += ["" if label in LSTM_ROWS or chief != "LSTM" else compared(SAMPLED.format("LSTM"), sampled, 0)]
        cells += [f"{observed[label][1]:.1f}", other[1], f"{added:.0%}"]
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "Culls after which the host ended better off than with the seed, a share for each controller:", ""]
    for label, seeds in rows.items():
        better = [entry["better"] for entry in seeds.values() if len(entry["better"])]
        if sum(map(len, better)) >= 50:
            lines.append(f"- {label}: {precision(better)}")
    lines += ["", "Of what is germinated, how much is a blueprint of which the host has culled a seed before:", ""]
    for label, seeds in rows.items():
        counts = [(e["repeated"].sum(), e["germinations"].sum()) for e in seeds.values() if "repeated" in e]
        if counts and sum(n for _, n in counts):
            each = ", ".join(f"{again / n:.2f}" for again, n in counts)
            lines.append(f"- {label}: {each}")
    if trained := {label: rows[label] for label in CONTROLLERS if label in rows}:
        lines += ["", *curves(trained, observed[REMEMBERS][0])]
    if TOLD in rows:
        knowing = compared(TOLD, PLAN, 0)
        lines += ["", f"- told which blueprints are unsound, beyond the best fixed plan: {knowing}"]
    result("table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def curves(trained: dict[str, dict[int, dict]], rule: float) -> list[str]:
    """Plots the returns of training episodes, five updates' mean, its mean and range over seeds, and tells when it
    passes the best rule's, and when each seed's passes 70% of that."""
    lines, rows, passed, figure = [], [], {}, Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for i, (label, seeds) in enumerate(trained.items()):
        for seed, entry in seeds.items():
            rows += [[label, seed, int(step) // EPOCHS, f"{x:.4f}"] for step, x in entry["curve"]]
        length = min(len(entry["curve"]) for entry in seeds.values())
        values = np.stack([entry["curve"][:length] for entry in seeds.values()])  # [seeds, updates, 2]
        hosts = values[0, 4:, 0] / EPOCHS
        smooth = np.array([np.convolve(curve, np.ones(5) / 5, "valid") for curve in values[..., 1]])
        axis.plot(hosts, smooth.mean(0), color=f"C{i}", label=f"{label}, {len(values)} seeds")
        axis.fill_between(hosts, smooth.min(0), smooth.max(0), color=f"C{i}", alpha=0.15, linewidth=0)
        reached = np.flatnonzero(smooth.mean(0) >= rule)
        when = f"after {hosts[reached[0]]:.0f} hosts" if len(reached) else "never"
        passed[label] = [hosts[np.argmax(curve >= 0.7 * rule)] for curve in smooth if curve.max() >= 0.7 * rule]
        mean, half = records.interval(passed[label])
        cost = np.mean([entry["seconds"] for entry in seeds.values()])
        lines.append(
            f"- {label}: the mean return of training episodes passes the best rule's {when}, and 70% of it with "
            f"{len(passed[label])} of {len(values)} seeds, after {mean:.0f} ± {half:.0f} hosts; {cost:.1f} s an update"
        )
    if {"LSTM", "MLP"} <= passed.keys():
        mean, half = records.interval(passed["LSTM"], passed["MLP"])
        lines.append(f"- hosts until then, LSTM minus MLP: {mean:+.0f} ± {half:.0f}")
    axis.axhline(rule, color="black", linestyle="--", linewidth=1, label=REMEMBERS)
    axis.set(xlabel="hosts trained", ylabel="return of training episodes (0: nothing grown)")
    axis.legend(fontsize="small")
    figure.savefig(result("curves.png"), dpi=110)
    with open(result("curves.csv"), "w", newline="") as file:
        csv.writer(file).writerows([["controller", "seed", "hosts", "return"], *rows])
    return lines


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("step", choices=["train", "evaluate", "table"])
    parser.add_argument("--setting", default="plain", choices=list(SETTINGS))
    parser.add_argument("--jobs", type=int, default=2, help="trainings or evaluations at a time")
    parser.add_argument("--dataset", default="digits", choices=["digits", "cifar10"])
    parser.add_argument("--total-timesteps", type=int, default=None)
    parser.add_argument("--seeds", nargs="*", type=int, default=list(SEEDS), help="to train")
    parser.add_argument("--controllers", nargs="*", default=list(CONTROLLERS), choices=list(CONTROLLERS))
    args = parser.parse_args()
    global setting, dataset, steps
    setting, dataset = args.setting, args.dataset
    steps = args.total_timesteps or STEPS[setting]
    if args.step == "train":
        with ThreadPoolExecutor(args.jobs) as pool:
            jobs = [(label, seed) for seed in args.seeds for label in args.controllers]
            list(pool.map(lambda job: train_one(*job), jobs))
    elif args.step == "evaluate":
        with multiprocessing.get_context("fork").Pool(args.jobs) as pool:
            pool.map(evaluate_one, evaluations(args.again), chunksize=1)
    else:
        table()


if __name__ == "__main__":
    main()
