"""Elo ratings of a self-play run: its snapshots, its last policy and the random player, each against each.

    python benchmark/selfplay_elo.py runs/…/checkpoint.pt --games 50

Prints a line for each, the random player at 0.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import sequence_ppo_selfplay as selfplay  # noqa: E402


def elo(score: np.ndarray, games: np.ndarray) -> np.ndarray:
    """Ratings [P], mean 0, that make the observed points most likely: score[i, j] are i's points against j in
    games[i, j] games. The Bradley-Terry model by Hunter's 2004 iteration; a side without any points is given half."""
    score = np.where(games > 0, np.clip(score, 0.5, games - 0.5), 0)
    strength = np.ones(len(score))
    for _ in range(10_000):
        strength = score.sum(1) / (games / (strength[:, None] + strength)).sum(1)
        strength /= np.exp(np.log(strength).mean())
    return 400 * np.log10(strength)


def round_robin(games, players: list, num_games: int, generator: torch.Generator) -> np.ndarray:
    """Elo ratings [P] from `num_games` games of every pair, who change seats after every game; a draw is half a win."""
    score, count = np.zeros((2, len(players), len(players)))
    rows = [(i, j) for i in range(len(players)) for j in range(len(players)) if i < j for _ in range(num_games)]
    rows = [row if k % 2 == 0 else row[::-1] for k, row in enumerate(rows)]
    payoffs, _, _ = selfplay.play(games, [(players[i], players[j]) for i, j in rows], generator)
    for (i, j), payoff in zip(rows, payoffs, strict=True):
        score[i, j] += (np.sign(payoff[0]) + 1) / 2
        score[j, i] += (np.sign(payoff[1]) + 1) / 2
        count[[i, j], [j, i]] += 1
    return elo(score, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint")
    parser.add_argument("--games", type=int, default=50, help="games of each pair")
    flags = parser.parse_args()
    args = selfplay.Args(**selfplay.load(flags.checkpoint)["args"])
    games = selfplay.make_games(args, selfplay.EVAL_SEED)
    agent = selfplay.Agent(games, args)
    pool = selfplay.Pool(agent.policy)
    selfplay.load(flags.checkpoint, agent=agent, pool=pool)
    names = ["random", *(f"after {made:,} games" for made in pool.nets), "last"]
    players = ["random", *pool.nets.values(), agent.policy]
    ratings = round_robin(games, players, flags.games, torch.Generator().manual_seed(0))
    for name, rating in zip(names, ratings - ratings[0], strict=True):
        print(f"{rating:6.0f}  {name}")
    games.close()


if __name__ == "__main__":
    main()
