"""Pokémon Showdown: trains once with the defaults, then plays 500 battles of the final weights, and of the run's best
ones (`best.pt`), against each of poke-env's players.

    python benchmark/selfplay_showdown.py                       # half an hour
    python benchmark/selfplay_showdown.py --run-dir runs/…      # of a run that is there

Writes showdown_curves.csv, showdown_final.csv and showdown.png to benchmark/results/.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch
from learning import write
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
OPPONENTS = ("random", "max_power", "heuristic")


def script(*args: str) -> dict:
    command = [sys.executable, str(HERE.parent / "sequence_ppo_selfplay.py"), *args]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def curves(run_dir: str) -> list[dict]:
    """What evaluations and training logged, a row for each update."""
    events = EventAccumulator(run_dir, size_guidance={"scalars": 0}).Reload()
    names = ("selfplay/games", "selfplay/win_rate", "losses/", "charts/")
    rows = {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag) if tag.startswith(names) else ():
            rows.setdefault(event.step, {"global_step": event.step})[tag] = event.value
    return [rows[step] for step in sorted(rows)]


def plot(rows: list[dict]) -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for name in OPPONENTS:
        tag = f"selfplay/win_rate_vs_{name}"
        points = [row for row in rows if tag in row]
        games = [row["selfplay/games"] for row in points]
        axis.plot(games, [row[tag] for row in points], label=f"against {name}")
        low, high = ([row[f"selfplay/win_rate_{end}_vs_{name}"] for row in points] for end in ("low", "high"))
        axis.fill_between(games, low, high, alpha=0.2)
    axis.set(xlabel="battles trained on", ylabel="win rate, 40 battles each, 95% interval", ylim=(0, 1))
    axis.set_title("gen9randombattle")
    axis.legend()
    figure.savefig(HERE / "results" / "showdown.png", dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir")
    run_dir = parser.parse_args().run_dir or script("--env-id", "gen9randombattle", "--server", "start")["run_dir"]
    rows = curves(run_dir)
    write(HERE / "results" / "showdown_curves.csv", rows)
    plot(rows)
    finals = []
    for name in ("checkpoint.pt", "best.pt"):
        games = torch.load(f"{run_dir}/{name}", weights_only=True)["counters"]["games"]
        for opponent in OPPONENTS:
            flags = ("--against", opponent, "--eval-episodes", "500", "--num-envs", "25")
            result = script("--evaluate", f"{run_dir}/{name}", *flags)
            row = {"weights": name, "battles_trained_on": games, "opponent": opponent, "battles": 500}
            columns = {"win_rate": "win_rate", "low": "win_rate_low", "high": "win_rate_high"}
            finals.append(row | {column: result[f"{key}_vs_{opponent}"] for column, key in columns.items()})
            print(finals[-1], flush=True)
            write(HERE / "results" / "showdown_final.csv", finals)


if __name__ == "__main__":
    main()
