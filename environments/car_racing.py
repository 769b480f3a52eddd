"""Gymnasium's CarRacing as it is learnt from: each action is held for some frames, and only the last of them is drawn.

    environments.car_racing:CarRacing64-v0

Drawing takes 98% of CarRacing's time, so that four frames an action cost a quarter, and of road and grass only what is
in the picture is drawn. Observations are 64 x 64 pixels, colour or, with `gray`, one channel. An action is (steering,
pedals) in [-1, 1]: pedals above 0 are gas, below it brake. An episode ends after 1,000 frames; rewards are the sums of
CarRacing's own.

A car that is off the road rarely comes back, and there is nothing to learn from it: an episode is cut (truncated) after
`patience` frames without a new piece of road; 0 = never. Where the seed is HELD_OUT or above, as in the evaluations of
our scripts, episodes are whole, so that scores are CarRacing's.
"""

import gymnasium as gym
import numpy as np
from gymnasium.envs.box2d import car_racing
from gymnasium.spaces import Box
from pygame import gfxdraw

MAX_FRAMES = 1000
HELD_OUT = 1_000_000_000  # seeds from here on are for evaluation
SIZE = 64
WINDOW = np.array([car_racing.WINDOW_W, car_racing.WINDOW_H])
PATCHES = np.stack(np.meshgrid(range(-20, 20, 2), range(-20, 20, 2), indexing="ij"), -1).reshape(-1, 1, 2)
GRASS = car_racing.GRASS_DIM * (PATCHES + np.array([(1, 0), (0, 0), (0, 1), (1, 1)]))  # [400, 4, 2] corners
FIELD = car_racing.PLAYFIELD * np.array([[(1, 1), (1, -1), (-1, -1), (-1, 1)]])  # [1, 4, 2]


class CarRacing(car_racing.CarRacing):
    def __init__(self, action_repeat: int = 4, gray: bool = False, patience: int = 100, render_mode: str | None = None):
        self.skipping = self.whole = False
        super().__init__(render_mode=render_mode, continuous=True)
        self.action_repeat, self.gray, self.patience, self.frames = action_repeat, gray, patience, 0
        self.metadata = {**self.metadata, "render_fps": car_racing.FPS // action_repeat}
        self.action_space = Box(-1, 1, (2,))
        self.observation_space = Box(0, 255, (SIZE, SIZE, 1 if gray else 3), np.uint8)

    def _render(self, mode: str):
        return self.state if self.skipping and mode == "state_pixels" else super()._render(mode)

    def _render_road(self, zoom: float, translation: tuple, angle: float):
        """As the original, which turns each corner of each polygon in Python: most of them are far away."""
        polygons = np.concatenate((FIELD, GRASS, [polygon for polygon, _ in self.road_poly]))
        colors = [self.bg_color, *[self.grass_color] * len(GRASS), *(color for _, color in self.road_poly)]
        cos, sin = np.cos(angle), np.sin(angle)
        corners = polygons @ np.array([(cos, sin), (-sin, cos)]) * zoom + translation  # [P, 4, 2] pixels
        seen = ((corners.max(1) >= -1) & (corners.min(1) <= WINDOW + 1)).all(1)
        for k in np.flatnonzero(seen):
            for draw in (gfxdraw.aapolygon, gfxdraw.filled_polygon):
                draw(self.surf, corners[k].tolist(), [int(x) for x in colors[k]])

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        pixels, info = super().reset(seed=seed, options=options)  # calls `step`, of this class, without an action
        self.frames, self.last = 0, 0  # so far; when the last new piece of road was reached
        self.whole = self.whole if seed is None else seed >= HELD_OUT
        return self.shrink(pixels), info

    def step(self, action: np.ndarray | None):
        if action is None:
            return super().step(None)
        steering, pedals = map(float, action)
        held, total = np.array([steering, max(pedals, 0), max(-pedals, 0)]), 0.0
        for frame in range(self.action_repeat):
            self.skipping = frame < self.action_repeat - 1
            pixels, reward, terminated, _, info = super().step(held)
            total, self.frames = total + reward, self.frames + 1
            self.last = self.frames if reward > 0 else self.last
            hopeless = 0 < self.patience <= self.frames - self.last and not self.whole
            truncated = self.frames >= MAX_FRAMES or hopeless
            if terminated or truncated:
                break
        if self.skipping:
            self.skipping = False
            pixels = self._render("state_pixels")
        return self.shrink(pixels), float(total), terminated, truncated, info

    def shrink(self, pixels: np.ndarray) -> np.ndarray:
        """[96, 96, 3] -> [64, 64, C], each pixel the mean of what it covers."""
        rows = pixels.reshape(32, 3, 96, 3).astype(np.float32)  # of three, two new ones: 2/3 a + 1/3 b, 1/3 b + 2/3 c
        rows = np.stack((2 * rows[:, 0] + rows[:, 1], rows[:, 1] + 2 * rows[:, 2]), 1).reshape(SIZE, 32, 3, 3)
        small = np.stack((2 * rows[:, :, 0] + rows[:, :, 1], rows[:, :, 1] + 2 * rows[:, :, 2]), 2)
        small = small.reshape(SIZE, SIZE, 3) / 9
        if self.gray:
            small = small @ np.array([[0.299], [0.587], [0.114]], np.float32)
        return (small + 0.5).astype(np.uint8)


gym.register("CarRacing64-v0", "environments.car_racing:CarRacing", reward_threshold=900)
