"""Small worlds with known answers, drawn in numpy."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

CELL = 8
"""Pixels along one side of a grid cell."""
BACKGROUND, BALL, PADDLE = (16, 16, 32), (255, 208, 64), (64, 192, 255)


def paint(frame: np.ndarray, row: int, column: int, colour: tuple[int, int, int]) -> None:
    """Fill one cell of an HWC frame."""
    frame[row * CELL : (row + 1) * CELL, column * CELL : (column + 1) * CELL] = colour


class Catch(gym.Env):
    """A ball falls through a grid of 8 x 8 cells; catch it with the paddle on the last row.

    Observation  uint8 [64, 64, 3], 8 x 8 pixels a cell
    Action       Discrete(3): 0 left, 1 stay, 2 right; the paddle moves one cell, walls stop it
    Motion       the ball falls one row a step and drifts -1, 0 or +1 columns, turning back at the walls
    Reward       on arrival in the last row +1 if paddle and ball share a cell, else -1; 0 before
    End          terminates there, so every episode has 7 steps; nothing is ever truncated

    The start column and the drift come from the seed, the paddle starts in column 3. Every ball can be caught: the best
    return is +1, random play scores about -0.7. One frame does not show the drift, two do.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 8}
    grid = 8

    def __init__(self, render_mode: str | None = None):
        self.render_mode = render_mode
        self.observation_space = spaces.Box(0, 255, (self.grid * CELL, self.grid * CELL, 3), np.uint8)
        self.action_space = spaces.Discrete(3)
        self.row = self.column = self.drift = 0
        self.paddle = 3

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.row, self.paddle = 0, 3
        self.column = int(self.np_random.integers(self.grid))
        self.drift = int(self.np_random.integers(-1, 2))
        return self._draw(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.paddle = min(max(self.paddle + int(action) - 1, 0), self.grid - 1)
        if not 0 <= self.column + self.drift < self.grid:
            self.drift = -self.drift
        self.column += self.drift
        self.row += 1
        landed = self.row == self.grid - 1
        reward = (1.0 if self.column == self.paddle else -1.0) if landed else 0.0
        return self._draw(), reward, landed, False, {}

    def render(self) -> np.ndarray | None:
        return self._draw() if self.render_mode == "rgb_array" else None

    def _draw(self) -> np.ndarray:
        frame = np.empty(self.observation_space.shape, np.uint8)
        frame[:] = BACKGROUND
        paint(frame, self.grid - 1, self.paddle, PADDLE)
        paint(frame, self.row, self.column, BALL)
        return frame


class Chain(gym.Env):
    """A row of `length` cells, walked left or right: every state, reward and flag is known by hand. Nothing is random.

    Observation  float32 [length], one-hot position; every episode starts in cell 0
    Action       Discrete(2): 0 left, 1 right; cell 0 holds on the left
    Reward       by the cell arrived in: +1 in the last one, else (cell - (length - 1)) / 10
    End          terminates in the last cell; truncates on step `limit` anywhere else

    With the default length 5 and limit 20 (terminal wins when both fall on one step):

    | cell arrived in | 0 | 1 | 2 | 3 | 4 |
    |---|---|---|---|---|---|
    | from, by left | 0, 1 | 2 | 3 | - | - |
    | from, by right | - | 0 | 1 | 2 | 3 |
    | reward | -0.4 | -0.3 | -0.2 | -0.1 | +1 |
    | terminated | no | no | no | no | yes |

    The best return is -0.3 - 0.2 - 0.1 + 1 = 0.4 in 4 steps; always left gives 20 x -0.4 = -8 and a truncation.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 4}

    def __init__(self, length: int = 5, limit: int = 20, render_mode: str | None = None):
        if length < 2 or limit < 1:
            raise ValueError(f"Chain needs length >= 2 and limit >= 1; got length {length}, limit {limit}.")
        self.length, self.limit, self.render_mode = length, limit, render_mode
        self.observation_space = spaces.Box(0, 1, (length,), np.float32)
        self.action_space = spaces.Discrete(2)
        self.position = self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        self.position = self.steps = 0
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict]:
        self.position = min(max(self.position + (1 if action == 1 else -1), 0), self.length - 1)
        self.steps += 1
        terminated = self.position == self.length - 1
        reward = 1.0 if terminated else (self.position - (self.length - 1)) / 10
        return self._observe(), reward, terminated, self.steps >= self.limit and not terminated, {}

    def render(self) -> np.ndarray | None:
        if self.render_mode != "rgb_array":
            return None
        frame = np.empty((CELL, self.length * CELL, 3), np.uint8)
        frame[:] = BACKGROUND
        paint(frame, 0, self.length - 1, PADDLE)
        paint(frame, 0, self.position, BALL)
        return frame

    def _observe(self) -> np.ndarray:
        return np.eye(self.length, dtype=np.float32)[self.position]
