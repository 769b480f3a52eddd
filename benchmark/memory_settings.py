"""What each of the settings that give ppo_lstm_predictor.py its memory is worth, on tasks and seeds that memory.py does
not show: RepeatPrevious with two decks of cards, and LunarLander with less gravity and without velocities.

    python benchmark/memory_settings.py           # 40 minutes on two idle cores; needs popgym
    python benchmark/memory_settings.py --table   # of the runs that are there

Each run appends a row to benchmark/results/memory_settings.csv; runs that are there are not run again.
"""

import argparse
import csv
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import torch

HERE = Path(__file__).parent
PATH = HERE / "results" / "memory_settings.csv"
sys.path.insert(0, str(HERE.parent))
import ppo_lstm_predictor as script  # noqa: E402

TASKS = {
    "RepeatPrevious": {
        "env_id": "popgym:popgym-RepeatPreviousEasy-v0",
        "env_kwargs": '{"num_decks": 2}',
        "total_timesteps": 100_000,
    },
    "LunarLander": {
        "env_id": "LunarLander-v3",
        "env_kwargs": '{"gravity": -8.5}',
        "visible": (0, 1, 4, 6, 7),
        "total_timesteps": 300_000,
    },
}
VARIANTS = {
    "as it is": {},
    "gamma 0.995": {"gamma": 0.995},
    "4 minibatches": {"num_minibatches": 4},
    "lambda 0.9": {"gae_lambda": 0.9},
    "8 epochs": {"update_epochs": 8},
    "no echo units": {},
    "no echo units, LSTM of 128": {"lstm_hidden": 128},
    "echo units only": {},
    "without previous action": {},
}


class Agent(script.Agent):
    """The script's, with the first weights or the inputs of a variant."""

    def __init__(self, obs_space, action_space, args):
        super().__init__(obs_space, action_space, args)
        bias, quick = self.lstm.bias_ih_l0.data.view(4, -1), self.width // 3
        cell = self.lstm.weight_hh_l0.data.view(4, self.width, -1)[2]
        if args.exp_name.startswith("no echo units"):
            bias[:] = bias[:, -1:].clone()
            cell[:quick] /= 1.5
        elif args.exp_name == "echo units only":
            bias[:] = bias[:, :1].clone()
            cell[quick:] *= 1.5
        self.sees_action = args.exp_name != "without previous action"

    def normalize_obs(self, obs):
        x = super().normalize_obs(obs)
        if self.sees_action:
            return x
        return torch.cat((x[..., : len(self.names)], 0 * x[..., len(self.names) :]), -1)


def run(task: str, variant: str, seed: int) -> None:
    script.Agent = Agent
    rest = {"predictor": False, "checkpoint_every": 0, "eval_episodes": 100, "exp_name": variant, "seed": seed}
    with tempfile.TemporaryDirectory() as folder:
        result = script.train(script.Args(**rest | TASKS[task] | VARIANTS[variant], runs_dir=folder))
    row = {"task": task, "variant": variant, "seed": seed}
    row |= {name: result[name] for name in ("train_return_mean", "eval_return_mean", "eval_return_sampled", "sps")}
    new = not PATH.exists()
    with open(PATH, "a", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader() if new else None
        writer.writerow(row)


def read() -> list[dict[str, str]]:
    return list(csv.DictReader(PATH.read_text().splitlines())) if PATH.exists() else []


def table() -> None:
    """Means over seeds: likeliest / sampled actions."""
    rows = read()
    print(f"| | {' | '.join(TASKS)} |\n|---|---|---|")
    for variant in VARIANTS:
        cells = []
        for task in TASKS:
            these = [row for row in rows if (row["task"], row["variant"]) == (task, variant)]
            digits, names = 2 if task == "RepeatPrevious" else 0, ("eval_return_mean", "eval_return_sampled")
            means = [fmean(float(row[name]) for row in these) for name in names if these]
            cells.append(" / ".join(f"{mean:.{digits}f}" for mean in means) + f" ({len(these)})")
        print(f"| {variant} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--run", nargs=3, metavar=("TASK", "VARIANT", "SEED"), help="this run, here and now")
    args = parser.parse_args()
    if args.run:
        return run(*args.run[:2], int(args.run[2]))
    done = {(row["task"], row["variant"], row["seed"]) for row in read()}
    jobs = [(task, variant, str(seed)) for seed in args.seeds for variant in VARIANTS for task in args.tasks]
    jobs = [] if args.table else [job for job in jobs if job not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: subprocess.run([sys.executable, __file__, "--run", *job], check=True), jobs))
    table()


if __name__ == "__main__":
    main()
