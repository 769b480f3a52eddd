"""What the benchmarks share: results in CSV files, each row with versions, commit and machine, and their statistics."""

import argparse
import csv
import fcntl
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy.stats import t

HERE = Path(__file__).parent
RESULTS = HERE / "results"


def circumstances(packages: tuple[str, ...] = ("torch", "gymnasium"), python: str = sys.executable) -> dict[str, str]:
    """Versions of the packages, commit (with `-changed`, if a Python file differs from it) and machine."""

    def output(*call: str) -> str:
        return subprocess.run(call, cwd=HERE.parent, capture_output=True, text=True).stdout.strip()

    code = f"from importlib.metadata import version; print(*map(version, {list(packages)}))"
    changed = "-changed" if output("git", "diff", "--name-only", "HEAD", "--", "*.py") else ""
    commit = output("git", "rev-parse", "--short", "HEAD") + changed
    cpuinfo = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    cpu = (re.findall(r"model name\s*:\s*(.+)", cpuinfo) or [platform.processor() or platform.machine()])[0]
    about = {"commit": commit, "machine": f"{cpu}, {os.cpu_count()} cores"}
    return dict(zip(packages, output(python, "-c", code).split(), strict=True)) | about


# --- command line
def parser(doc: str) -> argparse.ArgumentParser:
    """That of a benchmark whose results are made in one go."""
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--again", action="store_true", help="replace the results that are there")
    return made


def refuse(made: argparse.ArgumentParser, args: argparse.Namespace, *paths: Path) -> None:
    """Ends with an error if results are there and not to be replaced."""
    if there := [path.name for path in paths if path.exists() and not args.again]:
        made.error(f"--again replaces the results that are there: {', '.join(there)}")


# --- files
def read(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines())) if path.exists() else []


def write(path: Path, rows: list[dict], columns: list[str] | None = None) -> None:
    """The file is there whole or as it was; with all columns of the rows, unless they are named."""
    columns = columns or list(dict.fromkeys(name for row in rows for name in row))
    with open(path.with_suffix(".tmp"), "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)
    os.replace(path.with_suffix(".tmp"), path)


def replace(path: Path, job: dict, rows: list[dict], columns: list[str] | None = None) -> None:
    """Rows for those that a job, which these columns name, has in the file. Other processes may do so at once."""
    job = {name: str(value) for name, value in job.items()}.items()
    folder = os.open(path.parent, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    write(path, [row for row in read(path) if not job <= row.items()] + rows, columns)
    os.close(folder)  # which ends the lock


# --- statistics
def interval(*samples: list[float]) -> tuple[float, float]:
    """Mean of a sample, or the first one's minus the second one's, and half of its 95% interval: Student's t, with
    Welch's degrees of freedom for two; NaN if there is but one value."""
    sizes, means = np.array([len(x) for x in samples]), [np.mean(x) for x in samples]
    if min(sizes) < 2:
        return means[0] - sum(means[1:]), np.nan
    parts = np.array([np.var(x, ddof=1) for x in samples]) / sizes
    freedom = parts.sum() ** 2 / (parts**2 / (sizes - 1)).sum() if parts.any() else 1.0
    return means[0] - sum(means[1:]), t.ppf(0.975, freedom) * parts.sum() ** 0.5
