"""Which head forecasts best? Trains ppo_lstm_predictor.py on LunarLander with other heads in place of its own; PPO is the
same bit for bit in all of them, so the heads see the same data. One run:

    python benchmark/forecast_heads.py --head knots --learning-rate 1e-3 --seed 1 --total-timesteps 500000

Each run appends its skills to benchmark/results/forecast_heads.csv.
"""

import argparse
import csv
import math
import sys
from pathlib import Path

import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import ppo_lstm_predictor as script  # noqa: E402


class BasisPredictor(script.Predictor):
    """The change from now, as a linear combination of fixed functions of the steps ahead, `basis` [K, H]."""

    def __init__(self, feature_size: int, obs_size: int, horizon: int):
        super().__init__(feature_size, obs_size, horizon)
        self.register_buffer("basis", self.make_basis(horizon))
        self.head = nn.Linear(feature_size + obs_size, len(self.basis) * obs_size)
        nn.init.zeros_(self.head.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, features, obs):
        weights = self.head(torch.cat((features, obs), -1)).unflatten(-1, (self.obs_size, -1))  # [B, D, K]
        return obs.unsqueeze(-2) + (weights @ self.basis).transpose(-1, -2)


class Cosine(BasisPredictor):
    @staticmethod
    def make_basis(horizon: int) -> torch.Tensor:
        k = torch.arange(horizon)
        return torch.stack([torch.cos(math.pi * j * (k + 0.5) / horizon) for j in range(min(24, horizon))])


class Knots(BasisPredictor):
    """Values at steps 1, 2, 3, 4, 6, 8, 12, … ahead, linearly interpolated."""

    @staticmethod
    def make_basis(horizon: int) -> torch.Tensor:
        knots = sorted({min(horizon, round(2 ** (i / 2))) for i in range(2 * math.ceil(math.log2(horizon)) + 1)})
        k = torch.arange(1, horizon + 1).float()
        rows = []
        for i, knot in enumerate(knots):
            rise = (k - knots[i - 1]) / (knot - knots[i - 1]) if i else torch.ones_like(k)
            fall = (knots[i + 1] - k) / (knots[i + 1] - knot) if i + 1 < len(knots) else torch.ones_like(k)
            rows.append(torch.where(k <= knot, rise, fall).clamp(0, 1))
        return torch.stack(rows)


class MLP(script.Predictor):
    def __init__(self, feature_size: int, obs_size: int, horizon: int):
        super().__init__(feature_size, obs_size, horizon)
        last = nn.Linear(256, horizon * obs_size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.Linear(feature_size + obs_size, 256), nn.ReLU(), last)


class KnotsMLP(Knots):
    def __init__(self, feature_size: int, obs_size: int, horizon: int):
        super().__init__(feature_size, obs_size, horizon)
        last = nn.Linear(256, len(self.basis) * obs_size)
        nn.init.zeros_(last.weight)
        nn.init.zeros_(last.bias)
        self.head = nn.Sequential(nn.Linear(feature_size + obs_size, 256), nn.ReLU(), last)


HEADS = {"own": script.Predictor, "cosine": Cosine, "knots": Knots, "mlp": MLP, "knots_mlp": KnotsMLP}

parser = argparse.ArgumentParser()
parser.add_argument("--head", choices=HEADS, default="own")
parser.add_argument("--learning-rate", type=float, default=1e-3)
parser.add_argument("--samples", type=int)
parser.add_argument("--horizon", type=int, default=200)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--total-timesteps", type=int, default=500_000)
options = parser.parse_args()
script.Predictor = HEADS[options.head]
args = script.Args(
    exp_name=f"heads_{options.head}",
    horizon=options.horizon,
    seed=options.seed,
    total_timesteps=options.total_timesteps,
    predictor_learning_rate=options.learning_rate,
    predictor_samples=options.samples,
    checkpoint_every=0,
    eval_episodes=50,
)
result = script.train(args)
row = vars(options) | {name: result[name] for name in result if "skill" in name} | {"sps": result["sps"]}
path = HERE / "results" / "forecast_heads.csv"
new = not path.exists()
with open(path, "a", newline="") as file:
    writer = csv.DictWriter(file, row)
    if new:
        writer.writeheader()
    writer.writerow(row)
print(row)
