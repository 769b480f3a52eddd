"""Starts the four scripts again and again, hits each at a random moment with one of the faults of a long training, and
resumes it.

    python benchmark/soak.py                         # 30 minutes; results/soak.csv
    python benchmark/soak.py --scripts tamiyo --minutes 5

Faults: kill -9, SIGTERM, Ctrl-C, a full disk (no file may grow any more), a killed worker (of environments)
or server (of battles). `battles` needs Node and the server, as in docs/sequence_ppo_selfplay.md; without them, name the
others. In the first round each script also runs for two minutes without a fault, before a SIGTERM.

Columns, of each visit; it is `ok` if
    steps_before, steps_after     of the checkpoint before and after the fault: whole, and not older
    exit_code, seconds_to_end     the process has ended, after kill -9, SIGTERM and Ctrl-C with -9, 143 and 130, after
                                  the others with 1
    left                          and no process that it started is there three seconds later
    resumed                       and the resumed run goes on to a later checkpoint
    said                          the last line with an error
memory_mb_first, memory_mb, open_files_first, open_files are those of the process behind its third checkpoint, and just
before the fault.
"""

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import records
import torch

HERE = Path(__file__).parent
ENDLESS = ["--total-timesteps", "1000000000", "--eval-episodes", "4"]
SCRIPTS = {  # label: script and flags
    "predictor": "ppo_lstm_predictor.py --num-envs 8 --vectorization async --checkpoint-every 2",
    "tamiyo": "ppo_lstm_tamiyo.py --num-envs 8 --checkpoint-every 1",
    "self-play": "sequence_ppo_selfplay.py --env-id kuhn_poker --checkpoint-every 5",
    "battles": "sequence_ppo_selfplay.py --env-id gen9randombattle --games-per-update 8 --checkpoint-every 1",
    "world model": "worldmodel_a2c.py --checkpoint-every 10",
}
SIGNALS = {"kill -9": (signal.SIGKILL, -9), "SIGTERM": (signal.SIGTERM, 143), "Ctrl-C": (signal.SIGINT, 130)}
FAULTS = [*SIGNALS, "full disk"]
MORE = {"predictor": ["killed worker"], "battles": ["killed server"]}
QUIET = "SIGTERM, after two minutes"


def descendants(mark: str) -> list[int]:
    """The living processes that have inherited a variable of the environment, in whatever session they are."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if mark.encode() in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
        except OSError:  # it has just ended, or is another user's
            continue
    return sorted(found)


def end(mark: str) -> None:
    for pid in descendants(mark):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.kill(pid, signal.SIGKILL)


def start(command: list[str], mark: str) -> tuple[subprocess.Popen, list[str]]:
    """The process, and what it says, line by line."""
    env = os.environ | dict([mark.split("=")]) | {"OMP_NUM_THREADS": "1"}
    how = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "env": env, "cwd": HERE.parent}
    process, lines = subprocess.Popen([sys.executable, *command], **how), []
    threading.Thread(target=lambda: lines.extend(process.stdout), daemon=True).start()
    return process, lines


def wait_for(condition: Callable[[], bool], seconds: float, process: subprocess.Popen | None = None) -> bool:
    """… or until the process ends."""
    until = time.monotonic() + seconds
    while not (done := condition()) and time.monotonic() < until and (process is None or process.poll() is None):
        time.sleep(0.1)
    return done


def steps_of(folder: Path) -> int:
    """Steps of the checkpoint of the only run there; 0 if there is none."""
    found = list(folder.glob("*/checkpoint.pt"))
    return torch.load(found[0], map_location="cpu", weights_only=True)["counters"]["global_step"] if found else 0


def usage(process: subprocess.Popen) -> tuple[int, int]:
    """Resident memory in MB, and open files."""
    status = dict(line.split(":", 1) for line in Path(f"/proc/{process.pid}/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) // 1024, len(os.listdir(f"/proc/{process.pid}/fd"))


def strike(fault: str, process: subprocess.Popen, mark: str) -> None:
    if fault == "full disk":
        for pid in descendants(mark):
            resource.prlimit(pid, resource.RLIMIT_FSIZE, (1, 1))
    elif fault in MORE["predictor"] + MORE["battles"]:
        os.kill(random.choice([pid for pid in descendants(mark) if pid != process.pid]), signal.SIGKILL)
    else:
        process.send_signal(SIGNALS[fault.split(",")[0]][0])


def visit(label: str, fault: str, folder: Path) -> dict:
    """One start, one fault, one resumption."""
    script, *flags = SCRIPTS[label].split()
    mark = f"SOAK={folder.name}"
    process, lines = start([script, *ENDLESS, *flags, "--runs-dir", str(folder)], mark)
    try:
        seen = []
        for _ in range(3):
            if not wait_for(lambda: steps_of(folder) > max(seen, default=0), 120, process):
                sys.exit(f"{label}: no checkpoint\n{''.join(lines)}")
            seen.append(steps_of(folder))
        memory_first, files_first = usage(process)
        wait_for(lambda: False, 120 if fault == QUIET else random.uniform(0, 10), process)
        memory, files = usage(process)
        before, struck = steps_of(folder), time.monotonic()
        strike(fault, process, mark)
        wait_for(lambda: process.poll() is not None, 120)
        seconds, code = time.monotonic() - struck, process.poll()
        wait_for(lambda: not descendants(mark), 3)
        left, after = len(descendants(mark)), steps_of(folder)
    finally:
        end(mark)
    errors = [line.strip() for line in lines if "rror" in line]
    (run,) = folder.glob("*/")
    process, lines = start([script, "--resume", str(run)], mark)
    resumed = wait_for(lambda: steps_of(folder) > after, 120, process)
    end(mark)
    process.wait()
    expected = SIGNALS.get(fault.split(",")[0], (0, 1))[1]
    row = {"script": label, "fault": fault, "ok": after >= before and code == expected and not left and resumed}
    row |= {"steps_before": before, "steps_after": after, "exit_code": code, "seconds_to_end": round(seconds, 1)}
    row |= {"left": left, "resumed": resumed, "memory_mb_first": memory_first, "memory_mb": memory}
    return row | {"open_files_first": files_first, "open_files": files, "said": (errors or [""])[-1][:120]}


def main() -> None:
    parser = records.parser(__doc__)
    parser.add_argument("--minutes", type=float, default=30, help="the last visit may end later")
    parser.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS))
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--out", type=Path, default=HERE / "results" / "soak.csv")
    args = parser.parse_args()
    records.refuse(parser, args, args.out)
    random.seed(args.seed)
    about, until, rows, number = records.circumstances(), time.monotonic() + 60 * args.minutes, [], 0
    while time.monotonic() < until:
        for label in args.scripts:
            faults = [*FAULTS, *MORE.get(label, [])]
            fault = QUIET if number == 0 else faults[(number - 1) % len(faults)]
            if time.monotonic() < until:
                with tempfile.TemporaryDirectory(prefix="soak-") as folder:
                    row = visit(label, fault, Path(folder))
                print(row, flush=True)
                rows.append(row | {"seed": args.seed} | about)
                records.write(args.out, rows)
        number += 1
    print(f"{sum(row['ok'] for row in rows)} of {len(rows)} visits ok")


if __name__ == "__main__":
    main()
