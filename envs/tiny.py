"""Small environments with known solutions, drawn in numpy."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

CELL = 8
"""Pixels along one side of a grid cell."""
BACKGROUND, BALL, PADDLE, WALL = (16, 16, 32), (255, 208, 64), (64, 192, 255), (128, 128, 144)


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

    @property
    def state(self) -> np.ndarray:
        """Row and column of the ball, drift, column of the paddle: float32 [4]."""
        return np.array([self.row, self.column, self.drift, self.paddle], np.float32)

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


class TwoRooms(gym.Env):
    """A dot moves through two rooms with one door between them; it starts in one room, and the goal is in the other.

    Observation  uint8 [64, 64, 3]: walls and dot. The goal is not in it: `goal_image()`, or info["goal_obs"] at the reset
    Action       Box [-1, 1]^2, velocity (right, down): up to `speed` pixels a step along each axis
    Motion       walls stop the axis that runs into them, so that the dot slides along; nothing is random
    Reward       1 on arriving within RADIUS pixels of the goal, else 0
    End          terminates there; truncates on step `limit`
    Info         "position" and "goal", pixels (x, y); "is_success" after each step

    Wall and door are fixed, or with `random_wall` drawn at each reset; start and goal are uniform over the two rooms. Following
    `shortest_path()` reaches the goal in every episode, while heading straight for the goal gets stuck at the wall in most.
    Source of size and task: Sobal et al. 2025 (PLDM), two-rooms.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}
    side, border, thickness, dot, door = 64, 2, 4, 2.5, 5.0
    """Pixels: the picture, the outer wall, the wall between the rooms, the dot's radius, half of the door's free width."""
    RADIUS = 4.0

    def __init__(self, random_wall: bool = False, speed: float = 2.0, limit: int = 100, render_mode: str | None = None):
        depth = self.thickness + 2 * self.dot
        if not 0 < speed <= depth or limit < 1:
            raise ValueError(f"TwoRooms needs 0 < speed <= {depth:g}, the door's depth, and limit >= 1; got {speed} and {limit}.")
        self.random_wall, self.speed, self.limit, self.render_mode = random_wall, speed, limit, render_mode
        self.observation_space = spaces.Box(0, 255, (self.side, self.side, 3), np.uint8)
        self.action_space = spaces.Box(-1, 1, (2,), np.float32)
        self.min_position, self.max_position = self.border + self.dot, self.side - self.border - self.dot
        self._build(self.side / 2, 16.0)
        self.position = self.goal = np.zeros(2)
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        if self.random_wall:
            self._build(*self.np_random.uniform((24, 12), (40, 52)))
        places = self.np_random.uniform(self.min_position, self.max_position, (2, 2))
        west, east = self.wall_faces()
        share = (places[:, 0] - self.min_position) / (self.max_position - self.min_position)
        places[:, 0] = self.min_position + share[0] * (west - self.min_position), east + share[1] * (self.max_position - east)
        self.position, self.goal = places[:: self.np_random.choice((-1, 1))].copy()
        self.steps = 0
        return self.picture(self.position), {**self._info(), "goal_obs": self.goal_image()}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        velocity = self.speed * np.clip(np.asarray(action, np.float64), -1, 1)
        self.position = self._moved(self.position, velocity)
        self.steps += 1
        reached = self.distance() <= self.RADIUS
        truncated = self.steps >= self.limit and not reached
        return self.picture(self.position), float(reached), reached, truncated, {**self._info(), "is_success": reached}

    def render(self) -> np.ndarray | None:
        return self.picture(self.position) if self.render_mode == "rgb_array" else None

    def wall_faces(self) -> tuple[float, float]:
        """The x at which the wall stops the dot's middle: from the west, from the east."""
        half = self.thickness / 2 + self.dot
        return self.wall - half, self.wall + half

    def distance(self) -> float:
        """Pixels from the dot to the goal in a straight line."""
        return float(np.linalg.norm(self.goal - self.position))

    def goal_image(self) -> np.ndarray:
        """The observation at the goal."""
        return self.picture(self.goal)

    def picture(self, position: np.ndarray) -> np.ndarray:
        """The observation [64, 64, 3] with the dot at `position`, anti-aliased, so that fractions of a pixel show."""
        frame = self._rooms.copy()
        reach = int(self.dot) + 1
        columns, rows = (slice(max(int(x) - reach, 0), int(x) + reach + 1) for x in position)
        away = np.hypot(self._middle[columns] - position[0], self._middle[rows, None] - position[1])
        cover = np.clip(self.dot + 0.5 - away, 0, 1)[:, :, None]
        frame[rows, columns] = np.rint(frame[rows, columns] + cover * (np.array(BALL) - frame[rows, columns]))
        return frame

    def shortest_path(self) -> np.ndarray:
        """The corners [N, 2] of a shortest way from the dot to the goal, which is the last."""
        west, east = self.wall_faces()
        side = np.sign(self.goal[0] - self.position[0])
        corners = [self.goal]
        for x in (east, west) if side > 0 else (west, east):  # from the goal backwards: the door's two ends
            if (x - self.position[0]) * side > 0 and (self.goal[0] - x) * side > 0:
                away = corners[0] - self.position
                y = self.position[1] + away[1] * (x - self.position[0]) / away[0]
                corners.insert(0, np.array([x, np.clip(y, self.gap - self.door, self.gap + self.door)]))
        return np.stack(corners)

    def _build(self, wall: float, gap: float) -> None:
        """The rooms, with the wall's middle at x = `wall` and the door's at y = `gap`."""
        self.wall, self.gap = float(wall), float(gap)
        self._middle = np.arange(self.side) + 0.5  # of each pixel
        self._rooms = np.empty(self.observation_space.shape, np.uint8)
        self._rooms[:] = WALL
        inner = slice(self.border, self.side - self.border)
        self._rooms[inner, inner] = BACKGROUND
        closed = np.abs(self._middle - self.gap) > self.door + self.dot
        self._rooms[np.ix_(closed, np.abs(self._middle - self.wall) < self.thickness / 2)] = WALL

    def _moved(self, position: np.ndarray, velocity: np.ndarray) -> np.ndarray:
        x, y = position
        west, east = self.wall_faces()
        opening = self.gap - self.door, self.gap + self.door
        x_new = float(np.clip(x + velocity[0], self.min_position, self.max_position))
        if not opening[0] <= y <= opening[1]:
            x_new = min(x_new, west) if x <= west else max(x_new, east)
        low, high = opening if west < x_new < east else (self.min_position, self.max_position)
        return np.array([x_new, np.clip(y + velocity[1], low, high)])

    def _info(self) -> dict[str, Any]:
        return {"position": self.position.copy(), "goal": self.goal.copy()}
