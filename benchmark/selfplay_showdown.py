"""Pokémon Showdown: trains with the defaults, with and without memory, then plays 1,000 battles of the final weights
against each of poke-env's players, and one against the other, with sampled and with the likeliest actions.

    python benchmark/selfplay_showdown.py                   # an hour and a half on two idle cores
    python benchmark/selfplay_showdown.py --labels LSTM     # a part of it

Whatever stops it, the same command goes on: runs are kept in benchmark/runs/showdown, and battles of theirs that are in
showdown_final.csv are not played again. Without these runs it takes `--again` to train others in their place. The
server's dice cannot be seeded: no two runs are alike. Writes showdown_curves.csv, showdown_final.csv and showdown.png
to benchmark/results/.
"""

import json
import signal
import subprocess
import sys
from pathlib import Path

import records
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

HERE = Path(__file__).parent
CURVES, FINAL = (HERE / "results" / f"showdown_{name}.csv" for name in ("curves", "final"))
LABELS = {"LSTM": [], "without memory": ["--no-recurrent"]}
OPPONENTS = ("random", "max_power", "heuristic")
ACTIONS = {"sampled": [], "likeliest": ["--eval-likeliest"]}
SCORES = {"win_rate": "win_rate", "low": "win_rate_low", "high": "win_rate_high"}  # and their 95% interval


def script(*args: str) -> dict:
    command = [sys.executable, str(HERE.parent / "sequence_ppo_selfplay.py"), *args]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def train(label: str) -> Path:
    """The checkpoint of a finished run: of one that is there, one that goes on, or a new one."""
    folder = HERE / "runs" / "showdown" / label.replace(" ", "-")
    for path in folder.glob("*/checkpoint.pt"):
        saved = torch.load(path, weights_only=True)
        if saved["counters"]["global_step"] < saved["args"]["total_timesteps"]:
            script("--resume", str(path.parent))
        return path
    run = script("--env-id", "gen9randombattle", "--runs-dir", str(folder), *LABELS[label])
    return Path(run["run_dir"]) / "checkpoint.pt"


def curves(label: str, run_dir: Path) -> list[dict]:
    """What evaluations and training logged, a row for each update."""
    events = EventAccumulator(str(run_dir), size_guidance={"scalars": 0}).Reload()
    names, rows = ("selfplay/games", "selfplay/win_rate", "losses/", "charts/"), {}
    for tag in events.Tags()["scalars"]:
        for event in events.Scalars(tag) if tag.startswith(names) else ():
            rows.setdefault(event.step, {"label": label, "global_step": event.step})[tag] = event.value
    return [rows[step] for step in sorted(rows)]


def plot() -> None:
    figure = Figure(figsize=(7, 4), layout="constrained")
    axis = figure.subplots()
    for i, opponent in enumerate(OPPONENTS):
        tags = [f"selfplay/win_rate{end}_vs_{opponent}" for end in ("", "_low", "_high")]
        for label, style in zip(LABELS, ("-", "--"), strict=True):
            rows = [row for row in records.read(CURVES) if row["label"] == label and row[tags[0]]]
            games, rate, low, high = ([float(row[tag]) for row in rows] for tag in ("selfplay/games", *tags))
            axis.plot(games, rate, style, color=f"C{i}", label=f"{label}, against {opponent}")
            if style == "-":
                axis.fill_between(games, low, high, color=f"C{i}", alpha=0.15)
    axis.set(xlabel="battles trained on", ylabel="win rate, 40 battles each, 95% interval", ylim=(0, 1))
    axis.set_title("gen9randombattle")
    axis.legend(fontsize="small")
    figure.savefig(HERE / "results" / "showdown.png", dpi=110)


def evaluate(label: str, path: Path, opponent: str, against: str, actions: str) -> None:
    """A row of showdown_final.csv, if it is not there."""
    games = torch.load(path, weights_only=True)["counters"]["games"]
    row = {"label": label, "run": path.parent.name, "battles_trained_on": games}
    row |= {"opponent": opponent, "actions": actions}
    if any({name: str(x) for name, x in row.items()}.items() <= old.items() for old in records.read(FINAL)):
        return
    flags = ("--eval-episodes", "1000", "--num-envs", "50", *ACTIONS[actions])
    result = script("--evaluate", str(path), "--against", against, *flags)
    name = opponent if opponent in OPPONENTS else "opponent"
    row |= {"battles": 1000} | {column: result[f"{key}_vs_{name}"] for column, key in SCORES.items()}
    print(row, flush=True)
    records.write(FINAL, [*records.read(FINAL), row | records.circumstances()])


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--labels", nargs="+", choices=LABELS, default=list(LABELS))
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # an exception, which ends the script that runs, too
    paths = {}
    args = parser.parse_args()
    if not all((HERE / "runs" / "showdown" / label.replace(" ", "-")).exists() for label in args.labels):
        records.refuse(parser, args, CURVES, FINAL)  # results of runs that are not here
    for label in args.labels:
        paths[label] = train(label)
        run_dir = paths[label].parent
        records.replace(CURVES, {"label": label}, curves(label, run_dir))
        plot()
        records.write(FINAL, [x for x in records.read(FINAL) if x["label"] != label or x["run"] == run_dir.name])
        for opponent in OPPONENTS:
            for actions in ACTIONS:
                evaluate(label, paths[label], opponent, opponent, actions)
    if len(paths) == len(LABELS):
        for actions in ACTIONS:
            evaluate("LSTM", paths["LSTM"], "without memory", str(paths["without memory"]), actions)


if __name__ == "__main__":
    main()
