"""sequence_ppo_selfplay.py on Kuhn poker with a pause: players see their card once, can only pass for 24 decisions, and
then bet from memory. To learn that the card is worth keeping, gradients have to cross these: whole games, or
`--bptt-length` 50, but not 20 or 10.

    python benchmark/selfplay_pause.py --bptt-length 20    # the script's flags and its output

`python benchmark/learning.py pause` compares lengths.
"""

import sys
from functools import cached_property
from itertools import product
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent.parent))
import sequence_ppo_selfplay as selfplay
from environments.games import Turn
from environments.openspiel import Level, OpenSpielGames

PAUSE = 24  # decisions of each player, of which the first shows the card
PASS, SEAT = 0, np.eye(2)
CARD = slice(2, 5)  # its entries in OpenSpiel's observation of Kuhn poker


class KuhnWithPause(OpenSpielGames):
    """In the pause both act at once; what they see is their first observation, then the same without the card."""

    def __init__(self, num_games: int, seed: int):
        super().__init__("kuhn_poker", num_games, seed)
        self.passed = np.zeros(num_games, int)  # decisions of the pause that are over, in each slot
        self.dealt = {}  # slot: both players' first observations [2, D]
        self.resting = []

    def start(self, slots) -> None:
        super().start(slots)
        for slot in slots:
            self.passed[slot] = 0
            self.dealt[slot] = [self.observation(self.states[slot], player) for player in (0, 1)]

    def observe(self) -> Turn:
        everyone = self.running
        self.resting = [slot for slot in everyone if self.passed[slot] < PAUSE]
        self.running = [slot for slot in everyone if self.passed[slot] == PAUSE]
        betting = super().observe()
        seat = np.array([2 * slot + player for slot in self.resting for player in (0, 1)], np.int64)
        obs = np.array([self.dealt[slot] for slot in self.resting], np.float32).reshape(-1, self.obs_size)  # [2R, D]
        obs = np.where(self.passed[seat // 2, None] > 0, hidden(obs), obs)
        mask = np.tile([True, False], (len(seat), 1))
        unseen = obs.reshape(-1, 2, self.obs_size)[:, ::-1, :-2].reshape(-1, self.unseen_size)  # the other player's
        resting = Turn(seat, obs, mask, np.zeros(len(seat), np.float32), [], unseen)
        betting = betting._replace(obs=hidden(betting.obs), unseen=hidden(betting.unseen))
        kinds = zip(resting, betting, strict=True)
        return Turn(*(x + y if isinstance(x, list) else np.concatenate((x, y)) for x, y in kinds))

    def act(self, seat: np.ndarray, action: np.ndarray) -> None:
        betting = self.passed[seat // 2] == PAUSE
        super().act(seat[betting], action[betting])
        self.passed[self.resting] += 1
        self.running += self.resting

    @cached_property
    def levels(self) -> list[Level]:
        """Kuhn poker's information states, behind those of the pause: one for each player and card in each decision."""
        dealt = list(product(range(2), range(3)))
        shown = np.array([[*SEAT[player], *np.eye(3)[card], 0.5, 0.5, *SEAT[player]] for player, card in dealt], "f4")
        none, each, mask, pause = np.full(6, -1), np.arange(6), np.tile([True, False], (6, 1)), []
        for passed in range(PAUSE):
            names = [f"player {player} has {card} and has passed {passed} times" for player, card in dealt]
            obs, parent, action = (hidden(shown), each, PASS + 0 * each) if passed else (shown, none, none)
            pause.append(Level(names, obs, mask, parent, action))
        first, second = OpenSpielGames("kuhn_poker", 1, 0).levels
        parent = 3 * first.obs[:, -1].astype(int) + first.obs[:, CARD].argmax(1)
        first = first._replace(obs=hidden(first.obs), parent=parent, action=PASS + 0 * parent)
        return [*pause, first, second._replace(obs=hidden(second.obs))]


def hidden(obs: np.ndarray) -> np.ndarray:
    """Observations [M, D] without the card."""
    obs = obs.copy()
    obs[:, CARD] = 0
    return obs


if __name__ == "__main__":
    selfplay.make_games = lambda args, seed, *_: KuhnWithPause(args.num_envs, seed)
    sys.argv[1:1] = ["--env-id", "kuhn_poker"]
    selfplay.main()
