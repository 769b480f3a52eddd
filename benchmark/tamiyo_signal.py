"""What there is to see and to gain: for each blueprint, germinated in every host at epoch 0 and kept, what it gains
where it is sound and where it is not, and how well the observed contribution tells the two apart, epoch by epoch.

    python benchmark/tamiyo_signal.py       # results/tamiyo_signal.csv

`tells apart` is the share of pairs of a sound and an unsound seed whose contributions are in the right order (the area
under the ROC curve): 0.5 is chance. `gained by a look` is the mean over all hosts if the seed is kept only where its
contribution exceeds a threshold, the best one in hindsight for these hosts.
"""

import csv
import sys
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from environments.hosts import BLUEPRINTS, EPOCHS, FOSSILIZE, GERMINATE, Morphogenesis  # noqa: E402

HOSTS, SHOWN = 128, 9  # hosts, which no evaluation uses; epochs behind the germination


def best_look(gain: np.ndarray, contribution: np.ndarray) -> float:
    """Mean gain if only the seeds with the highest contributions are kept, as many as is best."""
    order = np.argsort(-contribution)
    return max(0, gain[order].cumsum().max()) / len(gain)


def main() -> None:
    torch.set_num_threads(1)
    env, rows = Morphogenesis(HOSTS), []
    for blueprint, name in enumerate(BLUEPRINTS):
        _, infos = env.reset(seed=20_000)
        unsound, contributions = env.unsound[:, blueprint].copy(), []
        for epoch in range(EPOCHS):
            action = np.full(HOSTS, GERMINATE + blueprint) if epoch == 0 else np.zeros(HOSTS, int)
            *_, infos = env.step(np.where(infos["action_mask"][:, FOSSILIZE], FOSSILIZE, action))
            contributions.append(env.contribution.copy())
        gain = 100 * (infos["final_info"]["test_accuracy"] - infos["final_info"]["bare_test_accuracy"])
        told = [roc_auc_score(~unsound, contribution) for contribution in contributions[:SHOWN]]
        rows.append([name, *(f"{gain[where].mean():.1f} ± {gain[where].std():.1f}" for where in (~unsound, unsound))])
        rows[-1] += [f"{share:.2f}" for share in told]
        looks = [best_look(gain, contribution) for contribution in contributions[:SHOWN]]
        rows[-1] += [f"{mean:.1f}" for mean in (gain.mean(), *looks, (gain * ~unsound).mean())]
        print(*rows[-1], flush=True)
    with open(HERE / "results" / "tamiyo_signal.csv", "w", newline="") as file:
        writer = csv.writer(file)
        names = ["blueprint", "points gained where sound", "where unsound"]
        names += [f"tells apart after epoch {epoch + 1}" for epoch in range(SHOWN)]
        names += ["gained if always kept"] + [f"gained by a look after epoch {epoch + 1}" for epoch in range(SHOWN)]
        writer.writerow([*names, "gained if kept where sound"])
        writer.writerows(rows)


if __name__ == "__main__":
    main()
