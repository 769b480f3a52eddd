"""Four claims about the forecasting head of ppo_lstm_predictor.py, each put to a test.

    python benchmark/forecast_claims.py joint           # it improves the representation (needs popgym)
    python benchmark/forecast_claims.py drift           # its errors show that the dynamics changed
    python benchmark/forecast_claims.py warning         # its forecasts warn of a crash
    python benchmark/forecast_claims.py transfer        # what it learns carries over to another gravity
    python benchmark/forecast_claims.py drift --table   # of the jobs that are there
    python benchmark/forecast_claims.py drift --smoke   # under a minute: tiny runs into a temporary folder

Minutes on two cores: drift 13; estimated from short runs: joint 55, warning 10 (after drift), transfer 45.
A job writes its rows to benchmark/results/forecast_{claim}.csv when it ends; the same command does what is missing, and
prints a table: means over seeds ± half of the 95% interval (Student's t), in brackets the differences from the claim's
base, paired by seed. Rows with other settings than today's count for nothing. Columns: task, label, seed, the measures
below, settings that are not default, versions, commit, machine. Runs whose weights several jobs need stay in
benchmark/runs/forecast_claims until the script or their settings change. All on the CPU, one thread each.

joint     No head (base) against joint training with three horizons. A frozen head is no arm: encoder, LSTM and policy
          are the same bit for bit (test 11), so `none` stands for it, in the returns as in the probe.
            area          mean return of training episodes over the whole run, each rollout weighted by its steps
            likeliest, sampled   returns of 100 episodes at the end
            velocity_r2   of a ridge regression from the LSTM's features to the velocities that the policy does not see,
                          fitted on half of the episodes, tested on the others. All arms and seeds read the same ones,
                          and no arm's own, as these would measure where its policy goes: they are of another seed's
                          policy without a head, 30% of its actions random, so that it sees more than success.
            untrained_r2  the same with the first weights: the delay line alone gives velocities
drift     The default run (LunarLander, horizon 50) in changed environments, with sampled actions, as in training. An
          episode's scores: log of the mean squared error of forecasts 1 (base) and 10 steps ahead, and of the forecast
          that the last change goes on; minus the return; length. What counts is the distance from the score's mean over
          500 unchanged episodes, above or below, as nobody knows beforehand which a change will do. 200 episodes of
          each change; the change `none` is a control.
            auroc         of that distance, changed against 500 other unchanged episodes
            auroc_upward  of the score itself: below 0.5 if the change makes it smaller
            delay         changed episodes until the mean score of the last 5 is further away than 99% of such means in
                          the first 500; at most 200; mean over 200 random orders
            false_alarms  share of such means that are so far away in the 500 others: 0.01, if all is well
            return        mean over the changed episodes
warning   Will the episode crash (terminated, reward -100) within 10, 25, 50 steps? Two policies that may: the run of
          `drift` with 30% random actions, which its forecasts do not expect, and one that ended after 150,000 steps,
          which its forecasts have learnt. Logistic regressions on numbers and their squares (left and right are alike),
          fitted on half of 400 episodes, tested on the others: on the forecast so far ahead (base); on what is known
          now (observation, action before, last change); on both; on what the head sees (observation, action before,
          features of the LSTM). And minus the critic's value, as it is.
            auroc         over all steps of the tested episodes
            crashes       share of the episodes
transfer  150,000 steps with gravity -10 after 300,000 with -5, and the other way round, against a start from nothing
          (base), with a frozen head and with joint training (of both runs). A start from a run without a head is no
          arm: its returns are those of a start from a frozen one, bit for bit.
            area          as above
            steps_to_100  until the mean of the last 5 rollouts' training returns is 100; all, if it never is
            skill_k10, skill_k50     of the forecasts at the end
            start_return, start_k10  of the first run in the new gravity: return with the likeliest actions, and skill
"""

import argparse
import io
import json
import multiprocessing
import os
import signal
import sys
import tempfile
import time
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from itertools import product
from pathlib import Path
from unittest.mock import patch

os.environ["OMP_NUM_THREADS"] = "1"  # before NumPy and torch are imported
import numpy as np
import records
import torch
from gymnasium.envs.box2d import lunar_lander
from scipy.stats import rankdata
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import ppo_lstm_predictor as script  # noqa: E402

RANDOM = 0.3  # share of random actions, where there are any
AHEAD = (10, 25, 50)  # steps in which a crash is to be foreseen
WINDOW = 5  # episodes of drift's running mean, and rollouts of transfer's
TASKS = {
    "CartPole": {"env_id": "CartPole-v1", "visible": (0, 2), "total_timesteps": 100_000},
    "LunarLander": {"visible": (0, 1, 4, 6, 7), "total_timesteps": 300_000},
    "Pendulum": {"env_id": "popgym:popgym-NoisyPositionOnlyPendulumEasy-v0", "total_timesteps": 100_000},
}
HEADS = {"none": {"predictor": False}}
HEADS |= {f"joint {horizon}": {"freeze_extractor": False, "horizon": horizon} for horizon in (5, 50, 200)}
CHANGES = {"none": ({}, 1)}  # change: (keyword arguments of the environment, factor of the main engine's power)
CHANGES |= {f"gravity {g}": ({"gravity": g}, 1) for g in (-9, -8, -6, -11.5)}
CHANGES |= {f"wind {power}": ({"enable_wind": True, "wind_power": power}, 1) for power in (5, 10, 15)}
CHANGES |= {f"main engine x {factor}": ({}, factor) for factor in (0.9, 0.75)}
DETECTORS = ["error 1", "error 10", "last change 1", "last change 10", "minus return", "length"]
SHORT = {"total_timesteps": 150_000}
STARTS = {"scratch": SHORT | {"eval_episodes": 20}}
STARTS["init"] = STARTS["scratch"] | {"init_from": "other gravity"}
JOBS = {  # claim: {(task, label): settings}
    "joint": {(task, label): x | y for task, x in TASKS.items() for label, y in HEADS.items()},
    "drift": {("LunarLander", "default"): {}},
    "warning": {("LunarLander", "default"): {}, ("LunarLander", "early"): SHORT},
    "transfer": {
        (f"gravity {g}, {how}", label): x | {"env_kwargs": f'{{"gravity": {g}}}', "freeze_extractor": how == "frozen"}
        for g in (-10, -5)
        for how in ("frozen", "joint")
        for label, x in STARTS.items()
    },
}
MEASURES = {  # claim: (base, measures)
    "joint": ("none", ["area", "likeliest", "sampled", "velocity_r2", "untrained_r2"]),
    "drift": ("error 1", ["auroc", "auroc_upward", "delay", "false_alarms", "return"]),
    "warning": ("forecast", ["auroc", "crashes"]),
    "transfer": ("scratch", ["area", "steps_to_100", "skill_k10", "skill_k50", "start_return", "start_k10"]),
}


# --- runs
def trained(args: script.Args) -> Path:
    """The folder of a finished run with these arguments and today's script; it is trained if there is none."""
    code = Path(script.__file__)
    for path in Path(args.runs_dir).glob(f"*__{args.exp_name}__{args.seed}__*/checkpoint.pt"):
        saved, same_code = script.load(path), (path.parent / code.name).read_text() == code.read_text()
        if same_code and saved["args"] == asdict(args) and saved["counters"]["global_step"] >= args.total_timesteps:
            return path.parent
    with redirect_stderr(io.StringIO()):
        return Path(script.train(args)["run_dir"])


def networks(args: script.Args, run: Path | None = None) -> tuple[script.Agent, script.Predictor]:
    """Those of a run or, without one, those that it starts from."""
    *_, parts = script.setup(script.check(args), args)
    if run:
        script.load(run / "checkpoint.pt", **parts)
    return parts["agent"], parts["predictor"]


def scalars(run: Path) -> dict[str, np.ndarray]:
    """Steps and values of each tag, [2, P]."""
    events = EventAccumulator(str(run), size_guidance={"scalars": 0}).Reload()
    return {tag: np.array([(x.step, x.value) for x in events.Scalars(tag)]).T for tag in events.Tags()["scalars"]}


def area(steps: np.ndarray, returns: np.ndarray) -> float:
    return np.average(returns, weights=np.diff(steps, prepend=0))


def settings_of(args: script.Args) -> str:
    default = asdict(script.Args(runs_dir=args.runs_dir))
    return json.dumps({name: x for name, x in asdict(args).items() if x != default[name]})


# --- episodes
def mix_in_random_actions(agent: script.Agent) -> None:
    heads = agent.heads

    def mixed(*inputs) -> tuple[Tensor, Tensor]:
        params, value = heads(*inputs)
        return ((1 - RANDOM) * params.softmax(-1) + RANDOM / params.shape[-1]).log(), value

    agent.heads = mixed


def first_episodes(agent: script.Agent, args: script.Args, batch: int) -> tuple[script.Rollout, Tensor]:
    """Steps [T, N] of `eval_episodes` environments with sampled actions, and a mask of their first episodes' steps.
    Batches differ in their seeds."""
    seed = 1000 * (1000 * args.seed + batch)
    _, rollout = script.evaluate(agent, replace(args, num_envs=args.eval_episodes, seed=seed))
    return rollout, rollout.start.cumsum(0) == 1


def environments(mask: Tensor) -> np.ndarray:
    """Of the mask's steps [M]. Regressions are fitted on the even ones and tested on the odd ones."""
    return mask.nonzero()[:, 1].numpy()


@torch.no_grad()
def look_ahead(agent, predictor, rollout: script.Rollout, mask: Tensor, ahead: tuple[int, ...]) -> tuple[Tensor, ...]:
    """At the mask's M steps, the last change [M, D], and K steps ahead what is forecast, what came, and what would come
    if the last change went on, [M, K, D], all normalised, and a mask [M, K] of what the episode still holds."""
    obs, k = agent.normalize_obs(rollout.obs)[..., : predictor.obs_size], torch.tensor(ahead)
    change = ((obs - obs.roll(1, 0)) * ~rollout.start[..., None])[mask]
    some = mask.flatten().nonzero()[:, 0].split(4096)
    parts = [[x[:, k - 1] for x in script.forecasts(agent, predictor, [rollout], index)] for index in some]
    forecast, target, known = map(torch.cat, zip(*parts, strict=True))
    return change, forecast, target, obs[mask][:, None] + change[:, None] * k[:, None], known


def auroc(positive: np.ndarray, negative: np.ndarray) -> float:
    ranks = rankdata(np.append(positive, negative))[: len(positive)]
    return (ranks.mean() - (len(positive) + 1) / 2) / len(negative)


# --- claims: the function of its name gives the rows of a job
def joint(task: str, label: str, args: script.Args) -> list[dict]:
    with tempfile.TemporaryDirectory() as folder:
        run = trained(replace(args, runs_dir=folder))
        (agent, _), (start, _), curves = networks(args, run), networks(args), scalars(run)
    row = {"task": task, "label": label, "area": area(*curves["charts/episodic_return"])}
    row |= {"likeliest": curves["eval/episodic_return"][1, -1], "sampled": curves["eval/return_sampled"][1, -1]}
    if args.visible:
        pilot, _ = networks(reference(args), trained(reference(args)))
        mix_in_random_actions(pilot)
        episodes, start.obs_stats = first_episodes(pilot, reference(args), batch=0), agent.obs_stats
        row |= {"velocity_r2": probe(agent, *episodes), "untrained_r2": probe(start, *episodes)}
    return [row]


def reference(args: script.Args) -> script.Args:
    """The run whose policy plays the episodes on which a task's arms are probed."""
    new = {"exp_name": "reference", "seed": 20, "predictor": False, "freeze_extractor": True, "horizon": 50}
    return replace(args, **new)


@torch.no_grad()
def probe(agent: script.Agent, rollout: script.Rollout, mask: Tensor) -> float:
    state, features = agent.initial_state(mask.shape[1]), []
    for obs in rollout.obs:  # what follows a first episode is not in the mask
        *_, state = agent.step(obs, state)
        features.append(state[:, 0])
    hidden = [i for i in range(len(agent.names)) if i not in agent.seen.tolist()]
    x, y = torch.stack(features)[mask].numpy(), rollout.obs[mask][:, hidden].numpy()
    fit = environments(mask) % 2 == 0
    return make_pipeline(StandardScaler(), Ridge()).fit(x[fit], y[fit]).score(x[~fit], y[~fit])


def drift(task: str, label: str, args: script.Args) -> list[dict]:
    agent, predictor = networks(args, trained(args))
    rows, half = [], 5 * args.eval_episodes
    for i, (change, (env_kwargs, factor)) in enumerate(CHANGES.items()):
        changed, number = replace(args, env_kwargs=json.dumps(env_kwargs)), 2 if i else 12
        with patch.object(lunar_lander, "MAIN_ENGINE_POWER", factor * lunar_lander.MAIN_ENGINE_POWER):
            batches = [detectors(agent, predictor, *first_episodes(agent, changed, 20 * i + j)) for j in range(number)]
        scores = np.concatenate(batches, 1)
        if i == 0:
            first, second, scores = np.split(scores, [half, 2 * half], 1)
        for name, *of_detector in zip(DETECTORS, first, second, scores, strict=True):
            row = {"task": change, "label": name, "return": -scores[DETECTORS.index("minus return")].mean()}
            rows.append(row | alarms(*of_detector))
    return rows


def detectors(agent, predictor, rollout: script.Rollout, mask: Tensor) -> np.ndarray:
    """Each detector's score of each episode, [detectors, N]."""
    _, forecast, target, goes_on, known = look_ahead(agent, predictor, rollout, mask, (1, 10))
    n, counts, scores = environments(mask), known.numpy(), []
    for guess in (forecast, goes_on):
        errors = ((guess - target).square().mean(-1) * known).numpy()  # [M, 2]
        scores += [np.log(np.bincount(n, errors[:, k]) / np.bincount(n, counts[:, k])) for k in (0, 1)]
    return np.array([*scores, -(rollout.reward * mask).sum(0).numpy(), mask.sum(0).numpy()])


def alarms(first: np.ndarray, second: np.ndarray, changed: np.ndarray) -> dict[str, float]:
    """From a detector's scores in unchanged episodes, which set the limit, in others, and in changed ones."""
    rng, mean, std = np.random.default_rng(0), first.mean(), first.std()
    first, second, changed = ((x - mean) / std for x in (first, second, changed))

    def running(x: np.ndarray) -> np.ndarray:
        return np.abs(np.convolve(x, np.full(WINDOW, 1 / WINDOW), "valid"))

    limit = np.quantile(running(rng.choice(first, 20_000)), 0.99)
    orders = [np.append(rng.choice(second, WINDOW - 1), rng.permutation(changed)) for _ in range(200)]
    over = np.array([running(order) > limit for order in orders])  # [orders, changed episodes]
    return {
        "auroc": auroc(np.abs(changed), np.abs(second)),
        "auroc_upward": auroc(changed, second),
        "delay": np.where(over.any(1), over.argmax(1) + 1, over.shape[1]).mean(),
        "false_alarms": (running(rng.choice(second, 20_000)) > limit).mean(),
    }


def warning(task: str, label: str, args: script.Args) -> list[dict]:
    agent, predictor = networks(args, trained(args))
    if label == "default":
        mix_in_random_actions(agent)
    batches = [crash_inputs(agent, predictor, *first_episodes(agent, args, 500 + i)) for i in range(4)]
    forecast, now, seen, value, left, n = map(np.concatenate, zip(*batches, strict=True))
    fit, crashes, rows = n % 2 == 0, (left == 1).sum() / (4 * args.eval_episodes), []
    for i, k in enumerate(AHEAD):
        soon, inputs = left <= k, {"forecast": forecast[:, i], "now": now, "what the head sees": seen}
        inputs["forecast and now"] = np.append(forecast[:, i], now, 1)
        scores = {"minus value": -value}
        for name, x in inputs.items():
            x = np.append(x, x**2, 1)
            model = make_pipeline(StandardScaler(), LogisticRegression(max_iter=1000)).fit(x[fit], soon[fit])
            scores[name] = model.decision_function(x)
        for name, score in scores.items():
            row = {"task": f"{label}, {k} steps", "label": name, "crashes": crashes}
            rows.append(row | {"auroc": auroc(score[~fit & soon], score[~fit & ~soon])})
    return rows


@torch.no_grad()
def crash_inputs(agent, predictor, rollout: script.Rollout, mask: Tensor) -> list[np.ndarray]:
    """At the mask's M steps: the forecasts [M, K, D], what is known now, what the head sees, the value, the steps left
    until a crash (infinite if there is none), and the environment."""
    change, forecast, *_ = look_ahead(agent, predictor, rollout, mask, AHEAD)
    obs, features = agent.normalize_obs(rollout.obs[mask]), agent.step(rollout.obs[mask], rollout.state[mask])[-1][:, 0]
    crashed = (mask & rollout.terminated & (rollout.reward == -100)).any(0)
    left = (mask.sum(0) - torch.arange(len(mask))[:, None]).float().where(crashed, torch.inf)
    now, seen = torch.cat((obs, change), -1), torch.cat((obs, features), -1)
    return [x.numpy() for x in (forecast, now, seen, rollout.value[mask], left[mask])] + [environments(mask)]


def transfer(task: str, label: str, args: script.Args) -> list[dict]:
    row = {"task": task, "label": label}
    with tempfile.TemporaryDirectory() as folder:
        args = replace(args, runs_dir=folder)
        if args.init_from:
            other = {"gravity": -5 if "-10" in args.env_kwargs else -10}
            first = replace(args, init_from=None, env_kwargs=json.dumps(other), exp_name="first")
            run = trained(replace(first, total_timesteps=2 * args.total_timesteps))
            args.init_from = f"{run}/checkpoint.pt"
            with redirect_stderr(io.StringIO()):
                start = script.train(replace(args, evaluate=args.init_from))
            row |= {"start_return": start["eval_return_mean"], "start_k10": start["predictor_skill_k10"]}
        curves = scalars(trained(args))
    steps, returns = curves["charts/episodic_return"]
    good = [step for i, step in enumerate(steps) if i + 1 >= WINDOW and returns[i + 1 - WINDOW : i + 1].mean() >= 100]
    row |= {"area": area(steps, returns), "steps_to_100": [*good, steps[-1]][0]}
    return [row | {f"skill_k{k}": curves[f"predictor/skill_k{k}"][1, -1] for k in (10, 50)}]


# --- jobs and table
def rows_of(claim: str, job: tuple) -> tuple[tuple, list[dict]]:
    return job, globals()[claim](*job)


def work(claim: str, jobs: list[tuple], at_once: int, path: Path) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: sys.exit("stopped; the same command goes on"))
    about, started = records.circumstances(), time.perf_counter()
    columns = ["task", "label", "seed", *MEASURES[claim][1], "settings", *about]
    deaf = {"initializer": signal.signal, "initargs": (signal.SIGINT, signal.SIG_IGN)}
    with multiprocessing.get_context("spawn").Pool(at_once, **deaf) as pool:  # which ends its processes at its end
        shared = {task: reference(args) for task, _, args in jobs if claim == "joint" and args.visible}
        pool.map(trained, shared.values())
        for i, (job, rows) in enumerate(pool.imap_unordered(partial(rows_of, claim), jobs), start=1):
            task, label, args = job
            rows = [row | about | {"seed": args.seed, "settings": settings_of(args)} for row in rows]
            records.replace(path, {"task": task, "label": label, "seed": args.seed}, rows, columns)
            minutes = (time.perf_counter() - started) / 60
            print(f"{i} of {len(jobs)}, {minutes:.1f} minutes: {task}, {label}, seed {args.seed}", file=sys.stderr)


def table(claim: str, rows: list[dict]) -> None:
    (base, measures), values = MEASURES[claim], {}  # {(task, label): {seed: {measure: number}}}
    print(f"| task | label | seeds | {' | '.join(measures)} |\n{'|---' * (3 + len(measures))}|")
    for row in rows:
        numbers = {name: float(row[name]) for name in measures if row[name]}
        values.setdefault((row["task"], row["label"]), {})[row["seed"]] = numbers
    for (task, label), seeds in values.items():
        cells, others = [task, label, str(len(seeds))], values.get((task, base), {})
        for name in measures:
            got = {seed: numbers[name] for seed, numbers in seeds.items() if name in numbers}
            gains = [x - others[seed][name] for seed, x in got.items() if name in others.get(seed, {})]
            cells.append(said([*got.values()]) + (f" ({said(gains, '+')})" if any(gains) else ""))
        print(f"| {' | '.join(cells)} |")


def said(values: list[float], sign: str = "") -> str:
    if not values:
        return ""
    mean, half = records.interval(values)
    digits = 3 if abs(mean) < 2 else 1
    return f"{mean:{sign}.{digits}f}" + (f" ± {half:.{digits}f}" if len(values) > 1 else "")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("claim", choices=JOBS)
    parser.add_argument("--seeds", nargs="+", type=int, help="21 to 25; for drift and warning 21 to 23")
    parser.add_argument("--jobs", type=int, default=2, help="at a time, 2 by default")
    parser.add_argument("--table", action="store_true", help="run nothing")
    parser.add_argument("--smoke", action="store_true", help="4,096 steps, batches of 4 episodes, one seed, one task")
    options = parser.parse_args()
    claim, results, runs, size = options.claim, HERE / "results", HERE / "runs" / "forecast_claims", {}
    settings, seeds = JOBS[claim], options.seeds or range(21, 26 if claim in ("joint", "transfer") else 24)
    if options.jobs < 1:
        parser.error("--jobs must be above 0")
    if options.smoke:
        results, seeds = Path(tempfile.mkdtemp(prefix="forecast-")), seeds[:1]
        runs, size = results / "runs", {"total_timesteps": 4096, "eval_episodes": 4}
        settings = {job: x for job, x in settings.items() if job[0] == next(iter(settings))[0]}
    elif claim == "joint" and not options.table and not find_spec("popgym"):
        parser.error("popgym is missing: pip install -r benchmark/requirements-rivals.txt")
    rest = {"runs_dir": str(runs), "checkpoint_every": 0, "eval_episodes": 100, "cuda": False}
    jobs = {}  # {settings: (task, label, arguments)}
    for seed, ((task, label), x) in product(seeds, settings.items()):
        args = script.Args(exp_name=label, seed=seed, **rest | x | size)
        jobs[settings_of(args)] = task, label, args
    path = results / f"forecast_{claim}.csv"
    done = {row["settings"] for row in records.read(path)}
    todo = [job for key, job in jobs.items() if key not in done]
    if todo and not options.table:
        work(claim, todo, options.jobs, path)
    table(claim, [row for row in records.read(path) if row["settings"] in jobs])


if __name__ == "__main__":
    main()
