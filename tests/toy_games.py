"""A backend of `environments/games.py` whose games are known in advance, step by step."""

import numpy as np

from environments.games import Ended, Turn


class ToyGames:
    """Game number g (in the order of their start) lets player 0 act `lengths[g][0]` times and player 1 `lengths[g][1]`
    times, in an irregular order; both may have to act at once. An observation is (game, player, own step, noise), the
    reward before own step k is k / 100, the payoff +-(1 + game), a draw for every third game. Games in `lost` end
    without a payoff after half of their steps."""

    scripted, options = ("always_last",), ()
    obs_size, unseen_size, num_actions, max_payoff = 4, 2, 3, 1.0

    def __init__(self, num_games: int, lengths: list[tuple[int, int]], lost=(), seed=0):
        self.num_games, self.lengths, self.lost = num_games, lengths, lost
        self.rng = np.random.default_rng(seed)
        self.number = np.full(num_games, -1)
        self.begun = 0
        self.steps: dict[int, int] = {}  # seat -> own steps so far
        self.waiting: set[int] = set()  # seats that were asked and have not acted
        self.log: list[tuple] = []  # (game, player, own step, action, allowed, obs, reward)

    def start(self, slots):
        for slot in slots:
            assert self.number[slot] < 0
            self.number[slot], self.begun = self.begun, self.begun + 1
            self.steps[2 * slot] = self.steps[2 * slot + 1] = 0

    def wanted(self, slot: int, player: int) -> int:
        length = self.lengths[self.number[slot] % len(self.lengths)][player]
        return length // 2 if self.number[slot] in self.lost else length

    def observe(self) -> Turn:
        seats, ended = [], []
        for slot in np.flatnonzero(self.number >= 0):
            left = [p for p in (0, 1) if self.steps[2 * slot + p] < self.wanted(slot, p)]
            if not left:
                game = self.number[slot]
                payoff = np.array([1, -1], np.float32) * (0 if game % 3 == 0 else 1 + game) * (-1) ** game
                ended.append(Ended(slot, None if game in self.lost else payoff, payoff + 0.25))
                self.number[slot] = -1
            elif self.rng.random() < 0.7:
                chosen = left if self.rng.random() < 0.3 else [left[self.rng.integers(len(left))]]
                seats += [2 * slot + player for player in chosen]
        self.waiting = set(seats)
        self.rng.shuffle(seats)
        obs = np.array([self.observation(seat) for seat in seats], np.float32).reshape(-1, 4)
        self.mask = self.rng.random((len(seats), 3)) < 0.5
        self.mask[np.arange(len(seats)), self.rng.integers(0, 3, len(seats))] = True
        self.last_obs, self.reward = obs, np.array([self.steps[seat] / 100 for seat in seats], np.float32)
        unseen = np.concatenate((obs[:, :1], 1 - obs[:, 1:2]), 1)  # what they cannot see: (game, the other player)
        return Turn(np.array(seats, np.int64), obs, self.mask, self.reward, ended, unseen)

    def observation(self, seat: int) -> list[float]:
        return [self.number[seat // 2], seat % 2, self.steps[seat], self.rng.normal()]

    def act(self, seat, action):
        assert set(seat.tolist()) == self.waiting
        for i, (s, a) in enumerate(zip(seat.tolist(), action.tolist(), strict=True)):
            assert self.mask[i, a]
            entry = (self.number[s // 2], s % 2, self.steps[s], a, self.mask[i], self.last_obs[i], self.reward[i])
            self.log.append(entry)
            self.steps[s] += 1

    def choose(self, name: str, seat: int) -> int:
        assert name == "always_last" and seat in self.waiting
        return int(np.flatnonzero(self.mask[list(self.last_seats()).index(seat)])[-1])

    def last_seats(self):
        return [int(2 * np.flatnonzero(self.number == obs[0])[0] + obs[1]) for obs in self.last_obs]

    def close(self):
        pass
