"""benchmark/selfplay_elo.py: ratings of hand-made tables and games."""

import sys
from pathlib import Path

import numpy as np
import torch
from toy_games import ToyGames

sys.path.insert(0, str(Path(__file__).parents[1] / "benchmark"))
import selfplay_elo


def test_elo_of_a_hand_made_table():
    ratings = selfplay_elo.elo(np.array([[0, 75], [25, 0]]), np.array([[0, 100], [100, 0]]))
    assert abs(ratings[0] - ratings[1] - 400 * np.log10(3)) < 1e-6 and abs(ratings.sum()) < 1e-9
    strength = np.array([1, 10, 100, 0.1])  # ratings 0, 400, 800, -400
    games = 1000 * (1 - np.eye(4))
    ratings = selfplay_elo.elo(games * strength[:, None] / (strength[:, None] + strength), games)
    np.testing.assert_allclose(ratings - ratings[0], [0, 400, 800, -400], atol=1e-3)
    assert np.isfinite(selfplay_elo.elo(np.array([[0, 10], [0, 0]]), np.array([[0, 10], [10, 0]]))).all()


def test_a_round_robin_credits_the_winner():
    """Player 0 wins and loses in turn, and seats change in turn: the first of the two wins all but the draws."""
    games, rng = ToyGames(3, [(1, 1)]), torch.Generator().manual_seed(0)
    ratings = selfplay_elo.round_robin(games, ["random", "always_last"], 9, rng)
    assert abs(ratings[0] - ratings[1] - 400 * np.log10(7.5 / 1.5)) < 1e-6  # 6 wins and 3 draws of 9
