"""What could be reached by hand, each searched on the same 64 hosts, which no evaluation uses:

- the best open-loop schedule: which modules to germinate, and when, if one may not look. Every single module at three
  times, then every module behind the three best of them;
- the best rule that looks once at each seed and culls it if what it contributes is below a threshold: several orders in
  which to try blueprints, and thresholds;
- the same orders, told which blueprints are unsound, which no controller can know.

    python benchmark/tamiyo_schedule.py     # results/tamiyo_schedule.csv, best first
"""

import csv
import math
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import ppo_lstm_tamiyo as tamiyo  # noqa: E402
from environments.hosts import BLUEPRINTS, CULL, EPOCHS, FOSSILIZE, GERMINATE, OBSERVATION, WAIT  # noqa: E402

ARGS, SEEDS = tamiyo.Args(cuda=False), list(range(10_000, 10_064))
AGE = 3  # epochs after its germination when a seed is looked at: the last time that it is seen TRAINING
LAST = 15  # epoch after which a new seed could not become permanent any more
ORDERS = ((0, 3, 4, 2), (0, 4, 3, 2), (0, 3, 4), (0, 4, 3))  # of blueprints to try
THRESHOLDS = (-0.2, -0.1, -0.05, -0.02, 0.0)  # contribution, as observed
LOOK = ((0, 4, 3, 2), -0.02)  # order and threshold: the best of this search
TOLD = (0, 4, 3, 2)  # the same


def unsound(args: tamiyo.Args, seeds: list[int]) -> np.ndarray:
    """[N, blueprints]: what is hidden from the controller."""
    envs = tamiyo.make_envs(args, len(seeds))
    envs.reset(seed=seeds)
    return envs.unsound.copy()


def rule(orders: np.ndarray, threshold: float = -math.inf) -> Callable:
    """Tries each host's blueprints [N, K] in turn (-1: none), as long as a slot is free, culls the seed whose
    contribution is below the threshold when it is AGE epochs old, and makes permanent what is left."""
    tried, every = np.zeros(len(orders), int), np.arange(len(orders))

    def choose(t: int, obs: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        now, mask = dict(zip(OBSERVATION, obs.numpy().T, strict=True)), mask.numpy()
        following = orders[every, np.minimum(tried, orders.shape[1] - 1)]
        grow = mask[:, GERMINATE] & (tried < orders.shape[1]) & (following >= 0) & (t <= LAST)
        tried[grow] += 1
        harmful = (np.rint(now["seed_age"] * EPOCHS) == AGE) & (now["contribution"] < threshold)
        action = np.where(grow, GERMINATE + following, WAIT)
        action = np.where(mask[:, CULL] & harmful, CULL, action)
        return np.where(mask[:, FOSSILIZE], FOSSILIZE, action)

    return choose


def look(seeds: list[int], order: tuple[int, ...] = LOOK[0], threshold: float = LOOK[1]) -> Callable:
    return rule(np.tile(order, (len(seeds), 1)), threshold)


def told(args: tamiyo.Args, seeds: list[int], order: tuple[int, ...] = TOLD) -> Callable:
    """Tries only what is sound."""
    sound = [[blueprint for blueprint in order if not known[blueprint]] for known in unsound(args, seeds)]
    return rule(np.array([blueprints + [-1] * (len(order) - len(blueprints)) for blueprints in sound]))


def schedule(plan: tuple) -> Callable:
    grown, rng = np.zeros(len(SEEDS), int), np.random.default_rng(0)

    def choose(t: int, obs: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        tamiyo.SCHEDULE = plan
        action = tamiyo.reference_action("schedule", obs.numpy(), mask.numpy(), grown, rng)
        grown[:] += (action >= GERMINATE) & (action < FOSSILIZE)
        return action

    return choose


def value(choose: Callable) -> np.ndarray:
    """Returns [N] on the hosts of the search."""
    return tamiyo.play(ARGS, SEEDS, choose).returns


def named(order: tuple[int, ...]) -> str:
    return ", ".join(BLUEPRINTS[blueprint] for blueprint in order)


def main() -> None:
    torch.set_num_threads(1)
    found = {}  # plan: returns
    for epoch in (0, 5, 10):
        for blueprint in range(len(BLUEPRINTS)):
            found[((epoch, blueprint),)] = value(schedule(((epoch, blueprint),)))
    for first in sorted(found, key=lambda plan: -found[plan].mean())[:3]:
        for blueprint in range(len(BLUEPRINTS)):
            found[*first, (0, blueprint)] = value(schedule((*first, (0, blueprint))))
    rows = [
        ("schedule", ", ".join(f"{BLUEPRINTS[b]} from epoch {epoch}" for epoch, b in plan), returns)
        for plan, returns in found.items()
    ]
    for order in ORDERS:
        rows.append(("told what is unsound", named(order), value(told(ARGS, SEEDS, order))))
        for threshold in THRESHOLDS:
            name = f"{named(order)}; culled below {threshold}"
            rows.append(("looks once", name, value(look(SEEDS, order, threshold))))
    with open(HERE / "results" / "tamiyo_schedule.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["kind", "plan", "return", "standard error"])
        for kind, name, returns in sorted(rows, key=lambda row: -row[2].mean()):
            writer.writerow([kind, name, f"{returns.mean():.4f}", f"{returns.std() / len(SEEDS) ** 0.5:.4f}"])


if __name__ == "__main__":
    main()
