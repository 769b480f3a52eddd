"""Pokémon Showdown: trains with the defaults, with and without memory, with poke-env's heuristic player among the
opponents, and from an imitation of it (selfplay_imitation.py), where the reference policy then starts, too. Then it
plays 1,000 battles of the final weights, and of the imitation, against each of poke-env's players, and of the first
two against each other, with sampled and with the likeliest actions.

    python benchmark/selfplay_showdown.py                   # two and a half hours on two idle cores
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
RUNS = HERE / "runs" / "showdown"
IMITATION = RUNS / "imitation" / "checkpoint.pt"
LABELS = {
    "LSTM": [],
    "without memory": ["--no-recurrent"],
    "heuristic among the opponents": ["--opponents", "self:0.6,past:0.2,heuristic:0.2"],
    "from imitation": ["--init-from", str(IMITATION), "--ref-kl-coef", "0.1"],
    "imitation": [],  # itself
}
OPPONENTS = ("heuristic", "max_power", "random")
ACTIONS = {"sampled": [], "likeliest": ["--eval-likeliest"]}
SCORES = {"win_rate": "win_rate", "low": "win_rate_low", "high": "win_rate_high"}  # and their 95% interval


def script(*args: str) -> dict:
    command = [sys.executable, str(HERE.parent / "sequence_ppo_selfplay.py"), *args]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1])


def train(label: str) -> Path:
    """The checkpoint of a finished run: of one that is there, one that goes on, or a new one."""
    folder = RUNS / label.replace(" ", "-")
    if "imitation" in label and not IMITATION.exists():
        imitate = [sys.executable, str(HERE / "selfplay_imitation.py"), str(IMITATION.parent), "--again"]
        subprocess.run(imitate, check=True)
    if label == "imitation":
        return IMITATION
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
    """Win rates while training."""
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    for axis, opponent in zip(figure.subplots(1, 3, sharey=True), OPPONENTS, strict=True):
        tag = f"selfplay/win_rate_vs_{opponent}"
        for label in LABELS:
            rows = [row for row in records.read(CURVES) if row["label"] == label and row[tag]]
            games, rate = ([float(row[name]) for row in rows] for name in ("selfplay/games", tag))
            if rows:
                axis.plot(games, rate, label=label)
        axis.set(title=f"against {opponent}", xlabel="battles trained on", ylim=(0, 1))
    figure.axes[0].set_ylabel("win rate, 40 battles")
    figure.axes[0].legend(fontsize="small", loc="lower right")
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
    there = {row["label"] for row in records.read(FINAL)}
    if gone := [x for x in args.labels if x in there and not (args.again or (RUNS / x.replace(" ", "-")).exists())]:
        parser.error(f"--again replaces results of runs that are not here: {', '.join(gone)}")
    for label in args.labels:
        paths[label] = train(label)
        run_dir = paths[label].parent
        if label != "imitation":
            records.replace(CURVES, {"label": label}, curves(label, run_dir))
            plot()
        records.write(FINAL, [x for x in records.read(FINAL) if x["label"] != label or x["run"] == run_dir.name])
        for opponent in OPPONENTS:
            for actions in ACTIONS:
                evaluate(label, paths[label], opponent, opponent, actions)
    if {"LSTM", "without memory"} <= paths.keys():
        for actions in ACTIONS:
            evaluate("LSTM", paths["LSTM"], "without memory", str(paths["without memory"]), actions)


if __name__ == "__main__":
    main()
