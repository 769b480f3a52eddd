"""Epochs of hosts per second: batched, one by one, as plain torch modules; episodes per minute of a training run.

python benchmark/tamiyo_hosts.py        # results/tamiyo_hosts_speed.csv; one thread, ways in turn, medians of 3 rounds
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import records
import torch
import torch.nn.functional as F
from torch import nn

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))
from environments import hosts  # noqa: E402
from environments.hosts import FOSSILIZE, GERMINATE, Morphogenesis  # noqa: E402


def batched(num_envs: int, grow: bool, epochs: int = 20) -> float:
    """Host epochs per second. With `grow`, every host germinates each blueprint in turn as soon as it can."""
    env = Morphogenesis(num_envs)
    _, infos = env.reset(seed=0)
    started = time.perf_counter()
    for _ in range(epochs):
        mask = infos["action_mask"]
        action = np.where(mask[:, GERMINATE], GERMINATE + np.arange(num_envs) % 5, 0) * grow
        *_, infos = env.step(np.where(mask[:, FOSSILIZE], FOSSILIZE, action))
    return num_envs * epochs / (time.perf_counter() - started)


def plain(epochs: int = 20) -> float:
    """A bare host of width 4 and its twin, as anyone would write them: nn.Conv2d, torch.optim.SGD."""

    def network() -> nn.Sequential:
        layers = nn.Conv2d(1, 4, 3, 2, 1), nn.ReLU(), nn.Conv2d(4, 4, 3, 1, 1), nn.ReLU(), nn.AvgPool2d(2)
        return nn.Sequential(*layers, nn.Flatten(), nn.Linear(16, 10))

    networks = network(), network()
    optimizers = [torch.optim.SGD(net.parameters(), 0.01, momentum=0.9) for net in networks]
    images, labels = torch.randn(897, 1, 8, 8), torch.randint(10, (897,))
    validation, validation_labels = torch.randn(360, 1, 8, 8), torch.randint(10, (360,))
    started = time.perf_counter()
    for _ in range(epochs):
        for _ in range(hosts.MINIBATCHES):
            index = torch.randint(897, (hosts.BATCH_SIZE,))
            for net, optimizer in zip(networks, optimizers, strict=True):
                optimizer.zero_grad()
                F.cross_entropy(net(images[index]), labels[index]).backward()
                optimizer.step()
        with torch.no_grad():
            F.cross_entropy(networks[0](validation), validation_labels)
    return epochs / (time.perf_counter() - started)


def training(*flags: str, num_envs: int = 64) -> float:
    """Meta-episodes per minute of the script, evaluation excluded."""
    with tempfile.TemporaryDirectory() as runs_dir:
        few = ["--total-timesteps", str(3 * 25 * num_envs), "--num-envs", str(num_envs), "--eval-episodes", "1"]
        command = [
            sys.executable,
            "ppo_lstm_tamiyo.py",
            *few,
            "--checkpoint-every",
            "0",
            "--runs-dir",
            runs_dir,
            *flags,
        ]
        out = subprocess.run(command, cwd=HERE.parent, capture_output=True, text=True, check=True).stdout
    return json.loads(out.splitlines()[-1])["sps"] / 25 * 60


def main() -> None:
    parser, path = records.parser(__doc__), records.RESULTS / "tamiyo_hosts_speed.csv"
    records.refuse(parser, parser.parse_args(), path)
    torch.set_num_threads(1)
    ways = {"plain torch modules, bare": plain}
    for num_envs in (1, 4, 16, 64, 128):
        for grow in (False, True):
            name = f"batched, {num_envs} hosts, {'with modules' if grow else 'bare'}"
            ways[name] = lambda n=num_envs, g=grow: batched(n, g)
    ways["episodes per minute of training, LSTM"] = training
    ways["episodes per minute of training, MLP"] = lambda: training("--no-recurrent")
    figures = {name: [] for name in ways}
    for _ in range(3):
        for name, way in ways.items():
            figures[name].append(way())
    rows, about, columns = [], records.circumstances(), ["way", "median", *(f"round {i + 1}" for i in range(3))]
    for name, values in figures.items():
        row = [name, *(f"{x:.1f}" for x in [statistics.median(values), *values])]
        rows.append(dict(zip(columns, row, strict=True)) | about)
        print(*row[:2])
    records.write(path, rows)


if __name__ == "__main__":
    main()
