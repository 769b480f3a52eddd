"""Which head forecasts best? Trains ppo_lstm_predictor.py on LunarLander with other heads in place of its own; PPO is
the same bit for bit in all of them, so the heads see the same data. One run:

    python benchmark/forecast_heads.py --head 'linear to knots' --learning-rate 2e-3 --seed 1 --total-timesteps 500000

Each run writes its skills into benchmark/results/forecast_heads.csv, in place of those of an equal run.
"""

import argparse
import math
import sys
from pathlib import Path

import records
import torch
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import ppo_lstm_predictor as script  # noqa: E402


class Linear(script.Predictor):
    """One linear layer to every step of the horizon."""

    def __init__(self, agent: script.Agent, horizon: int, frozen: bool):
        super().__init__(agent, horizon, frozen)
        self.head = nn.Linear(self.hidden.in_features, self.head.out_features)
        self.hidden = nn.Identity()
        for weight in self.head.parameters():
            nn.init.zeros_(weight)

    def forward(self, features: torch.Tensor, obs: torch.Tensor) -> torch.Tensor:
        changes = self.head(torch.cat((features, obs), -1)).unflatten(-1, (self.obs_size, -1)) @ self.basis
        return obs[:, None, : self.obs_size] + changes.transpose(-1, -2)


def with_basis(base: type, make_basis) -> type:
    """A head like `base` with other functions [K, H] of the steps ahead than straight lines between knots."""

    class Head(base):
        def __init__(self, agent: script.Agent, horizon: int, frozen: bool):
            super().__init__(agent, horizon, frozen)
            self.register_buffer("basis", make_basis(horizon), persistent=False)
            self.head = nn.Linear(self.head.in_features, self.obs_size * len(self.basis))
            for weight in self.head.parameters():
                nn.init.zeros_(weight)

    return Head


def cosines(horizon: int) -> torch.Tensor:
    k = torch.arange(horizon)
    return torch.stack([torch.cos(math.pi * j * (k + 0.5) / horizon) for j in range(min(24, horizon))])


HEADS = {
    "mlp to knots": script.Predictor,  # the script's own
    "mlp to cosines": with_basis(script.Predictor, cosines),
    "mlp to every step": with_basis(script.Predictor, torch.eye),
    "linear to knots": Linear,
    "linear to cosines": with_basis(Linear, cosines),
    "linear to every step": with_basis(Linear, torch.eye),
}

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("--head", choices=HEADS, default="mlp to knots")
parser.add_argument("--learning-rate", type=float, default=3e-3)
parser.add_argument("--samples", type=int, default=512)
parser.add_argument("--horizon", type=int, default=200)
parser.add_argument("--seed", type=int, default=1)
parser.add_argument("--total-timesteps", type=int, default=500_000)
options = parser.parse_args()
script.Predictor = HEADS[options.head]
args = script.Args(
    exp_name=f"forecast {options.head}",
    horizon=options.horizon,
    seed=options.seed,
    total_timesteps=options.total_timesteps,
    predictor_learning_rate=options.learning_rate,
    predictor_samples=options.samples,
    checkpoint_every=0,
    eval_episodes=50,
)
result = script.train(args)
row = {name: result[name] for name in result if "skill" in name} | {"sps": result["sps"]}
records.replace(records.RESULTS / "forecast_heads.csv", vars(options), [vars(options) | row | records.circumstances()])
print(row)
