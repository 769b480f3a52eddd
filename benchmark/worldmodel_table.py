"""Tables of what `python benchmark/learning.py` measured of worldmodel_a2c.py: the tasks worldmodel, carracing,
planning and those that begin with planning_.

    python benchmark/worldmodel_table.py    # results/worldmodel_table.md

Intervals are 95%, Student's t over seeds; in brackets the differences from the first label, paired by seed. Training
returns are those of as many steps from a run's first episode on as all runs have: of a run in stages, its last stage.
"""

import argparse
from collections import defaultdict

import numpy as np
import records
from learning import TASKS


def said(values: list[float], sign: str = "") -> str:
    """Mean and half the width of its interval; only the mean if the seeds agree or there is one."""
    mean, half = records.interval(values)
    return f"{mean:{sign}.0f}" + (f" ± {half:.0f}" if half >= 0.5 else "")


def steps_to(points: list[tuple[float, float]], level: float) -> float:
    """The first step at which a fiftieth of the run's training episodes returned that much on average; NaN if never."""
    points, end = np.array(points), points[-1][0]
    for g in np.linspace(0, end, 51)[1:]:
        window = points[(points[:, 0] > g - end / 50) & (points[:, 0] <= g), 1]
        if len(window) and np.nanmean(window) >= level:
            return g
    return np.nan


def table(task: str) -> list[str]:
    curves, finals = defaultdict(lambda: defaultdict(list)), defaultdict(dict)
    for row in records.read(records.RESULTS / f"{task}_curves.csv"):
        point = float(row["global_step"]), float(row["episodic_return"] or "nan")
        curves[row["label"]][int(row["seed"])].append(point)
    for row in records.read(records.RESULTS / f"{task}_final.csv"):
        finals[row["label"]][int(row["seed"])] = row
    first = {(label, seed): points[0][0] for label, seeds in curves.items() for seed, points in seeds.items()}
    span = min(float(finals[label][seed]["global_step"]) - begins for (label, seed), begins in first.items())
    for (label, seed), begins in first.items():
        returns = [value for step, value in curves[label][seed] if step <= begins + span]
        finals[label][seed]["training"] = np.nanmean(returns)
    base = next(iter(finals))
    lines = [
        f"**{TASKS[task][1]}**",
        "",
        "| | seeds | likeliest actions | sampled | mean training return | steps to 475 |",
        "|---" * 6 + "|",
    ]
    for label, rows in finals.items():
        both = sorted(rows.keys() & finals[base].keys())
        reached = np.array([steps_to(points, 475) for points in curves[label].values()])
        cells = [label, len(rows)]
        for name in ("eval_return_mean", "eval_return_sampled", "training"):
            cells.append(said([float(row[name]) for row in rows.values()]))
            if label != base:
                apart = [float(rows[seed][name]) - float(finals[base][seed][name]) for seed in both]
                cells[-1] += f" ({said(apart, '+')})"
        some = reached[~np.isnan(reached)]
        cells.append(f"{np.median(some):,.0f} ({len(some)} of {len(reached)})" if len(some) else "")
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    return lines


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    tasks = [task for task in TASKS if task in ("worldmodel", "carracing") or task.startswith("planning")]
    done = [task for task in tasks if (records.RESULTS / f"{task}_final.csv").exists()]
    text = "\n\n".join("\n".join(table(task)) for task in done)
    (records.RESULTS / "worldmodel_table.md").write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    main()
