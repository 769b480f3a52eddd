"""What there is to see and to gain: for each blueprint, germinated in every host at epoch 0 and kept, what it gains
where it is sound and where it is not, and how well the observed contribution tells the two apart, epoch by epoch.

    python benchmark/tamiyo_signal.py       # results/tamiyo_signal.csv

`tells apart` is the share of pairs of a sound and an unsound seed whose contributions are in the right order (the area
under the ROC curve): 0.5 is chance. `gained by a look` is the mean over all hosts if the seed is kept only where its
contribution is on one side of a threshold, the best one in hindsight for these hosts.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from tamiyo_schedule import unsound  # noqa: E402

import ppo_lstm_tamiyo as tamiyo  # noqa: E402
from environments.hosts import BLUEPRINTS, FOSSILIZE, GERMINATE, OBSERVATION, WAIT  # noqa: E402

ARGS, SEEDS, SHOWN = tamiyo.Args(cuda=False), list(range(20_000, 20_128)), 9  # hosts of no evaluation; epochs shown


def watch(blueprint: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Points gained on test and on validation images [N], and contributions as observed after each epoch [SHOWN, N]."""
    contributions = []

    def choose(t: int, obs: torch.Tensor, mask: torch.Tensor) -> np.ndarray:
        contributions.append(obs[:, list(OBSERVATION).index("contribution")].numpy())
        action = np.where(mask[:, FOSSILIZE].numpy(), FOSSILIZE, WAIT)
        return action if t else np.full(len(obs), GERMINATE + blueprint)

    info = tamiyo.play(ARGS, SEEDS, choose).info
    gains = [100 * (info[f"{part}_accuracy"] - info[f"bare_{part}_accuracy"]) for part in ("test", "validation")]
    return *gains, np.array(contributions[1 : SHOWN + 1])


def best_look(gain: np.ndarray, contribution: np.ndarray) -> float:
    """Mean gain if only the seeds with the highest contributions are kept, or the lowest, as many as is best."""
    gain = gain[np.argsort(contribution)]
    return max(0, gain.cumsum().max(), gain[::-1].cumsum().max()) / len(gain)


def main() -> None:
    torch.set_num_threads(1)
    harmful, rows = unsound(ARGS, SEEDS), []  # [N, blueprints]
    for blueprint, name in enumerate(BLUEPRINTS):
        gain, validation_gain, contributions = watch(blueprint)
        sound = ~harmful[:, blueprint]
        rows.append([name, *(f"{gain[where].mean():.1f} ± {gain[where].std():.1f}" for where in (sound, ~sound))])
        rows[-1].append(f"{(gain[~sound] > 0).mean():.2f}")
        rows[-1] += [f"{roc_auc_score(sound, contribution):.2f}" for contribution in contributions]
        looks = [best_look(gain, contribution) for contribution in contributions]
        knowing = (gain * sound).mean(), (gain * (validation_gain > 0)).mean()
        rows[-1] += [f"{mean:.1f}" for mean in (gain.mean(), *looks, *knowing)]
        print(*rows[-1], flush=True)
    with open(HERE / "results" / "tamiyo_signal.csv", "w", newline="") as file:
        writer = csv.writer(file)
        names = ["blueprint", "points gained where sound", "where unsound", "share of the unsound that gain"]
        names += [f"tells apart after epoch {epoch + 1}" for epoch in range(SHOWN)]
        names += ["gained if always kept"] + [f"gained by a look after epoch {epoch + 1}" for epoch in range(SHOWN)]
        writer.writerow([*names, "if kept where sound", "if kept where it gains on validation images"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
