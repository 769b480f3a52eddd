"""What each of the settings that give ppo_lstm_predictor.py its memory is worth, on tasks and seeds that memory.py does
not show: RepeatPrevious with two decks of cards, and LunarLander with less gravity and without velocities.

    python benchmark/memory_settings.py           # 40 minutes on two idle cores; needs popgym
    python benchmark/memory_settings.py --table   # of the runs that are there

Each run writes a row into benchmark/results/memory_settings.csv; runs that are there are not run again.
"""

import argparse
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import fmean

import records
import torch

HERE = Path(__file__).parent
PATH = records.RESULTS / "memory_settings.csv"
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
    "no delay line": {},
    "no hidden layer in the heads": {},
    "neither": {},
    "without previous action": {},
    "LSTM of 192": {"lstm_hidden": 192},
    "learning rate 1e-3": {"learning_rate": 1e-3},
    "gamma 0.995": {"gamma": 0.995},
    "lambda 0.9": {"gae_lambda": 0.9},
    "4 minibatches": {"num_minibatches": 4},
    "8 epochs": {"update_epochs": 8},
}


class Agent(script.Agent):
    """The script's, with the first weights, heads or inputs of a variant."""

    def __init__(self, obs_space, action_space, args):
        super().__init__(obs_space, action_space, args)
        self.sees_action = args.exp_name != "without previous action"
        if args.exp_name in ("no delay line", "neither"):
            w_input, w_state, bias, _ = (weight.data.unflatten(0, (4, -1)) for weight in self.lstm.all_weights[0])
            for gate in (*w_input, *w_state):
                torch.nn.init.orthogonal_(gate)
            bias[:] = torch.tensor([[0.0], [1.0], [0.0], [0.0]])
        self.direct = args.exp_name in ("no hidden layer in the heads", "neither")
        if self.direct:
            for name, gain in (("actor", 0.01), ("critic", 1.0)):
                head = torch.nn.Linear(64 + args.lstm_hidden, getattr(self, name).out_features)
                torch.nn.init.orthogonal_(head.weight, gain)
                torch.nn.init.zeros_(head.bias)
                setattr(self, name, head)

    def heads(self, encoded, features, action_mask):  # both tasks have a discrete action and no mask
        if not self.direct:
            return super().heads(encoded, features, action_mask)
        x = torch.cat((encoded, features), -1)
        return self.actor(x), self.critic(x).squeeze(-1)

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
    job = {"task": task, "variant": variant, "seed": seed}
    figures = {name: result[name] for name in ("train_return_mean", "eval_return_mean", "eval_return_sampled", "sps")}
    records.replace(PATH, job, [job | figures | records.circumstances()])


def table() -> None:
    """Means over seeds: likeliest / sampled actions."""
    rows = records.read(PATH)
    print(f"| | {' | '.join(TASKS)} |\n|---|---|---|")
    for variant in VARIANTS:
        cells = []
        for task in TASKS:
            these = [row for row in rows if (row["task"], row["variant"]) == (task, variant)]
            digits, names = 2 if task == "RepeatPrevious" else 0, ("eval_return_mean", "eval_return_sampled")
            means = [fmean(float(row[name]) for row in these) for name in names if these]
            cells.append(" / ".join(f"{mean:.{digits}f}" for mean in means) + f" ({len(these)})" * bool(these))
        print(f"| {variant} | {' | '.join(cells)} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[11, 12, 13])
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--run", nargs=3, metavar=("TASK", "VARIANT", "SEED"), help="this run, here and now")
    args = parser.parse_args()
    if args.run:
        return run(*args.run[:2], int(args.run[2]))
    done = {(row["task"], row["variant"], row["seed"]) for row in records.read(PATH)}
    jobs = [(task, variant, str(seed)) for seed in args.seeds for variant in args.variants for task in args.tasks]
    jobs = [] if args.table else [job for job in jobs if job not in done]
    with ThreadPoolExecutor(args.jobs) as pool:
        list(pool.map(lambda job: subprocess.run([sys.executable, __file__, "--run", *job], check=True), jobs))
    table()


if __name__ == "__main__":
    main()
