"""The best open-loop schedule: which modules to germinate, and when, if one may not look. Every single module at three
times, then every module behind the three best of them; 64 hosts that no evaluation uses, the same for all schedules.

    python benchmark/tamiyo_schedule.py     # results/tamiyo_schedule.csv, best first: the script's SCHEDULE
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
import ppo_lstm_tamiyo as tamiyo  # noqa: E402
from environments.hosts import BLUEPRINTS, FOSSILIZE, GERMINATE  # noqa: E402

HOSTS = 64


def value(schedule: tuple) -> np.ndarray:
    """Returns [HOSTS]."""
    tamiyo.SCHEDULE = schedule

    grown, rng = np.zeros(HOSTS, int), np.random.default_rng(0)

    def choose(t: int, obs: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        action = tamiyo.reference_action("schedule", obs.numpy(), mask.numpy(), grown, rng)
        grown[:] += (action >= GERMINATE) & (action < FOSSILIZE)
        return action

    return tamiyo.play(tamiyo.Args(cuda=False), list(range(10_000, 10_000 + HOSTS)), choose).returns


def main() -> None:
    torch.set_num_threads(1)
    found = {(): value(())}
    for epoch in (0, 5, 10):
        for blueprint in range(len(BLUEPRINTS)):
            found[((epoch, blueprint),)] = value(((epoch, blueprint),))
    singles = sorted(found, key=lambda schedule: -found[schedule].mean())
    for first in [schedule for schedule in singles if schedule][:3]:
        for blueprint in range(len(BLUEPRINTS)):
            found[*first, (0, blueprint)] = value((*first, (0, blueprint)))
    with open(HERE / "results" / "tamiyo_schedule.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["schedule", "return", "standard error"])
        for schedule in sorted(found, key=lambda schedule: -found[schedule].mean()):
            name = (
                ", ".join(f"{BLUEPRINTS[blueprint]} from epoch {epoch}" for epoch, blueprint in schedule) or "nothing"
            )
            returns = found[schedule]
            writer.writerow([name, f"{returns.mean():.4f}", f"{returns.std() / HOSTS**0.5:.4f}"])


if __name__ == "__main__":
    main()
