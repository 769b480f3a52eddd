"""Tables of what `python benchmark/learning.py worldmodel` and `worldmodel_variants` measured.

    python benchmark/worldmodel_table.py    # results/worldmodel_table.md

Intervals are 95%, Student's t over seeds; differences are paired by seed. Of two seeds, both values are given.
"""

import csv
from collections import defaultdict
from pathlib import Path

import numpy as np
from scipy.stats import t

RESULTS = Path(__file__).parent / "results"
BASE = "product EMA, planning"


def interval(values: list[float], digits: int, sign: str = "") -> str:
    """Mean and interval, or both values of two; only the mean if the seeds agree."""
    mean, count = np.mean(values), len(values)
    half = t.ppf(0.975, count - 1) * np.std(values, ddof=1) / count**0.5 if count > 1 else 0.0
    if half < 0.5 * 10**-digits:
        return f"{mean:{sign}.{digits}f}"
    if count == 2:
        return f"{mean:{sign}.{digits}f} ({values[0]:{sign}.{digits}f}, {values[1]:{sign}.{digits}f})"
    return f"{mean:{sign}.{digits}f} ({mean - half:{sign}.{digits}f} to {mean + half:{sign}.{digits}f})"


def main() -> None:
    finals, curves = defaultdict(dict), defaultdict(lambda: defaultdict(list))
    for task in [task for task in ("worldmodel", "worldmodel_variants") if (RESULTS / f"{task}_final.csv").exists()]:
        with open(RESULTS / f"{task}_final.csv") as file:
            for row in csv.DictReader(file):
                finals[row["label"]][int(row["seed"])] = row
        with open(RESULTS / f"{task}_curves.csv") as file:
            for row in csv.DictReader(file):
                curves[row["label"]][int(row["seed"])].append(float(row["episodic_return"] or "nan"))

    def column(label: str, name: str) -> list[float]:
        return [float(row[name]) for _, row in sorted(finals[label].items()) if row.get(name)]

    def area(label: str) -> np.ndarray:
        """Mean return of training episodes over the run, a figure for each seed."""
        return np.array([np.nanmean(points) for _, points in sorted(curves[label].items())])

    lines = [
        "| | seeds | return | seeds at 500 | mean training return | product EMA, planning, is beyond it by |",
        "|---" * 6 + "|",
    ]
    for label in finals:
        returns = column(label, "eval_return_mean")
        beyond = "" if label == BASE else interval(area(BASE)[: len(returns)] - area(label), 0, "+")
        at_500 = f"{sum(value == 500 for value in returns)} of {len(returns)}"
        cells = [label, len(returns), interval(returns, 1), at_500, interval(area(label), 0), beyond]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    lines += ["", "| evaluated as | policy alone | planner alone | both | without its past |", "|---" * 5 + "|"]
    for label in finals:
        names = [f"eval_return_{name}" for name in ("policy", "planner", "both", "memoryless")]
        cells = [interval(column(label, name), 0) if column(label, name) else "" for name in names]
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    lines += [
        "",
        "| quantiser | RMSE | share of codes used | perplexity | skill 1 step ahead | 5 | 20 |",
        "|---" * 7 + "|",
    ]
    for label in finals:
        if "planning off" not in label:
            names = ["vision_rmse", "vision_usage", "vision_perplexity", *(f"model_skill_k{k}" for k in (1, 5, 20))]
            lines.append(f"| {label} | " + " | ".join(interval(column(label, name), 2) for name in names) + " |")
    (RESULTS / "worldmodel_table.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


if __name__ == "__main__":
    main()
