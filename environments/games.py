"""What the backends of two-player games return: `openspiel.OpenSpielGames` and `showdown.ShowdownGames`.

Both play many games at once, each in a slot: `start(slots)` begins games, `observe()` tells who has to act and which
games ended, `act(seat, action)` answers. Games of different slots need not keep step with each other."""

from typing import NamedTuple

import numpy as np


class Ended(NamedTuple):
    """A game that ended, in `slot`."""

    slot: int
    payoff: np.ndarray | None  # [2] of players 0 and 1; None: the game was lost to a fault, and its data with it
    reward: np.ndarray  # [2] since each player's last own decision, the payoff included


class Turn(NamedTuple):
    """M seats that have to act. Seat 2 * slot + player sees only what its player sees."""

    seat: np.ndarray  # [M] int64
    obs: np.ndarray  # [M, D] float32
    action_mask: np.ndarray  # [M, A] bool
    reward: np.ndarray  # [M] float32, since the seat's previous decision in this game
    ended: list[Ended]  # games that ended since the last turn
    unseen: np.ndarray | None = None  # [M, E] what the seat does not see, for a critic that exists in training only
