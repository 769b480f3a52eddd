"""How fast sequence_ppo_selfplay.py plays and trains.

    python benchmark/selfplay_throughput.py openspiel    # 3 minutes: decisions/s by game and games at once
    python benchmark/selfplay_throughput.py showdown     # 12 minutes: battles/s by battles at once, and where time goes

Writes benchmark/results/selfplay_{openspiel,showdown}.csv. Run it on an idle machine.
"""

import asyncio
import logging
import resource
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import records
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import sequence_ppo_selfplay as selfplay  # noqa: E402


def training(args: selfplay.Args) -> dict[str, float]:
    """Decisions/s and games/s of a short training run, evaluations and start aside."""
    with tempfile.TemporaryDirectory() as runs_dir:
        args = selfplay.replace(args, runs_dir=runs_dir, eval_episodes=2, checkpoint_every=0)
        result = selfplay.train(args)
    games = result["games"]
    return {"games": games, "decisions_per_s": result["sps"], "games_per_s": games / result["seconds"]}


def openspiel() -> list[dict]:
    rows = []
    for env_id in ("kuhn_poker", "leduc_poker", "liars_dice", "phantom_ttt"):
        for num_games in (16, 128, 1024, 4096):
            args = selfplay.Args(env_id=env_id, num_envs=num_games, games_per_update=num_games)
            games, rng, count, started = selfplay.make_games(args, 0), np.random.default_rng(0), 0, time.perf_counter()
            while time.perf_counter() - started < 2:  # random players
                games.start(range(num_games))
                ended = 0
                while ended < num_games:
                    turn = games.observe()
                    ended += len(turn.ended)
                    count += len(turn.seat)
                    games.act(turn.seat, (rng.random(turn.action_mask.shape) * turn.action_mask).argmax(1))
            alone = count / (time.perf_counter() - started)
            rate = training(selfplay.replace(args, total_timesteps=max(20_000, 30 * num_games)))
            rows.append({"env_id": env_id, "games_at_once": num_games, "random_decisions_per_s": alone} | rate)
            print(rows[-1], flush=True)
    return rows


def random_battles(num_envs: int, num_battles: int) -> float:
    """Battles/s of poke-env's random player against itself."""
    from poke_env import AccountConfiguration, ServerConfiguration
    from poke_env.player import RandomPlayer

    from environments.showdown import Server

    server = Server()
    config = ServerConfiguration(server.url, "")
    players = [
        RandomPlayer(
            AccountConfiguration(f"random{i}x{num_envs}", None),
            battle_format="gen9randombattle",
            server_configuration=config,
            max_concurrent_battles=num_envs,
            log_level=logging.CRITICAL,
        )
        for i in range(2)
    ]
    asyncio.run(players[0].battle_against(players[1], n_battles=num_envs))  # warm-up
    started = time.perf_counter()
    asyncio.run(players[0].battle_against(players[1], n_battles=num_battles))
    rate = num_battles / (time.perf_counter() - started)
    server.close()
    return rate


class Clock:
    """CPU seconds of the calling thread in a function."""

    def __init__(self, owner, name: str):
        self.owner, self.name, self.real, self.cpu = owner, name, getattr(owner, name), 0.0

        def timed(*args, **kwargs):
            cpu = time.thread_time()
            try:
                return self.real(*args, **kwargs)
            finally:
                self.cpu += time.thread_time() - cpu

        setattr(owner, name, timed)

    def undo(self) -> None:
        setattr(self.owner, self.name, self.real)


def showdown_training(num_envs: int, num_battles: int) -> dict[str, float]:
    """Battles/s of training, and CPU seconds a battle: server, poke-env's thread, observations, networks, update. The
    evaluation after training (2 battles against each opponent) is in the CPU seconds."""
    from environments import showdown

    clocks = {
        "observations": Clock(showdown, "observe"),
        "networks": Clock(selfplay.Net, "step"),
        "update": Clock(selfplay, "sequence_loss"),
    }
    clocks["update_backward"] = Clock(torch.Tensor, "backward")
    server, process, main = resource.getrusage(resource.RUSAGE_CHILDREN), time.process_time(), time.thread_time()
    args = selfplay.Args(env_id="gen9randombattle", num_envs=num_envs)
    rate = training(selfplay.replace(args, games_per_update=num_battles // 2, total_timesteps=115 * num_battles))
    for clock in clocks.values():
        clock.undo()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = {name: clock.cpu for name, clock in clocks.items()}
    cpu["server"] = after.ru_utime + after.ru_stime - server.ru_utime - server.ru_stime
    cpu["poke_env_thread"] = time.process_time() - process - (time.thread_time() - main)
    cpu["main_thread_other"] = time.thread_time() - main - sum(clock.cpu for clock in clocks.values())
    battles = rate["games"] + 6  # 2 against each of 3 opponents
    return rate | {f"cpu_{name}_per_battle": seconds / battles for name, seconds in cpu.items()}


def showdown() -> list[dict]:
    rows = []
    for num_envs, num_battles in ((1, 40), (10, 200), (25, 400), (50, 400)):
        row = {"battles_at_once": num_envs, "random_battles_per_s": random_battles(num_envs, num_battles)}
        row |= showdown_training(num_envs, num_battles)
        row["ratio"] = row["games_per_s"] / row["random_battles_per_s"]
        rows.append(row)
        print(row, flush=True)
    return rows


if __name__ == "__main__":
    parser = records.parser(__doc__)
    parser.add_argument("task", choices=("openspiel", "showdown"))
    args = parser.parse_args()
    path = records.RESULTS / f"selfplay_{args.task}.csv"
    records.refuse(parser, args, path)
    rows, about = {"openspiel": openspiel, "showdown": showdown}[args.task](), records.circumstances()
    records.write(path, [row | about for row in rows])
