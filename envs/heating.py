"""A heated building: a small world whose state is partly hidden, partly noise, and measured in very different units."""

from __future__ import annotations

import math
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

DAY, STEP = 86_400.0, 900.0
"""Seconds of a day, and of one step."""


class Heating(gym.Env):
    """One room behind a heavy wall, a heater, the weather, and a price of electricity that jumps.

    Observation  float32 [6], `names`: time of day (s, 0 to 86,400, 900 more at each step), room and outdoor temperature (degrees
                 C), sun on the facade (W/m2), electric power drawn in the last quarter of an hour (W), tariff (a kWh, 0.1 to 0.4)
    Action       Box [0, 1] of one number: the heater's share of `heater` W until the next observation
    Hidden       the wall's temperature (half of the heat goes through it, and it takes days to warm), the weather's drift
                 and the clouds' cover
    Noise        of the thermometers 0.05 and 0.1 degrees C, of the power 40 W, of weather and clouds at each step; the tariff
                 jumps to another of `tariffs` with the chance `jumps`. All but the jumps are scaled by `noise`
    Reward       on arrival minus the cost of the energy, minus 0.05 times the square of the degrees by which the room is more
                 than 1 away from 21
    End          truncates on step `limit`, three days by default; nothing terminates

    Time of day, start temperatures, weather and tariff are drawn at the reset. With noise=0 and jumps=0 all that follows is
    determined; what is hidden stays hidden.
    """

    metadata = {"render_modes": []}
    names = ("time of day", "room", "outdoors", "sun", "power", "tariff")
    heater, household = 5000.0, 200.0
    """W at the most, and W that are always drawn."""
    room_capacity, wall_capacity = 3e6, 2.5e7
    """J/K."""
    room_to_wall, room_to_outdoors, wall_to_outdoors = 350.0, 60.0, 70.0
    """W/K."""
    window, facade = 2.0, 5.0
    """m2 through which the sun warms the room, and on which it warms the wall."""
    tariffs = (0.1, 0.2, 0.3, 0.4)
    comfort, tolerance, discomfort = 21.0, 1.0, 0.05

    def __init__(self, limit: int = 288, noise: float = 1.0, jumps: float = 1 / 24):
        if limit < 1 or not noise >= 0 or not 0 <= jumps <= 1:
            raise ValueError(f"Heating needs limit >= 1, noise >= 0 and jumps from 0 to 1; got {limit}, {noise} and {jumps}.")
        self.limit, self.noise, self.jumps = limit, noise, jumps
        low, high = [0, -60, -60, 0, 0, min(self.tariffs)], [DAY, 100, 60, 1000, 10_000, max(self.tariffs)]
        self.observation_space = spaces.Box(np.float32(low), np.float32(high), dtype=np.float32)
        self.action_space = spaces.Box(0, 1, (1,), np.float32)
        self.time = self.room = self.wall = self.drift = self.cover = self.tariff = 0.0
        self.steps = 0

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[np.ndarray, dict]:
        super().reset(seed=seed)
        random = self.np_random
        self.steps = 0
        self.time = STEP * int(random.integers(round(DAY / STEP)))
        self.drift, self.cover = 3.0 * random.standard_normal(), 1.5 * random.standard_normal()
        self.room = 19.5 + 1.5 * random.standard_normal()
        self.wall = self.outdoors + random.uniform(0.4, 0.95) * (self.room - self.outdoors)
        self.tariff = float(random.choice(self.tariffs))
        return self._observe(self.household), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict]:
        heat = self.heater * float(np.clip(np.asarray(action).reshape(()), 0, 1))
        power = max(0.0, heat + self.household + 40.0 * self._draw())
        cost = self.tariff * power * STEP / 3.6e6
        self._flow(heat)
        self.time = (self.time + STEP) % DAY
        self.drift = 0.99 * self.drift + 0.42 * self._draw()
        self.cover = 0.97 * self.cover + 0.36 * self._draw()
        if self.np_random.random() < self.jumps:
            self.tariff = float(self.np_random.choice([t for t in self.tariffs if t != self.tariff]))
        self.steps += 1
        excess = max(0.0, abs(self.room - self.comfort) - self.tolerance)
        return self._observe(power), -cost - self.discomfort * excess**2, False, self.steps >= self.limit, {}

    @property
    def outdoors(self) -> float:
        """The temperature outdoors, degrees C: coldest at three in the morning."""
        return 3.0 - 4.0 * math.cos(2 * math.pi * (self.time / DAY - 0.125)) + self.drift

    @property
    def sun(self) -> float:
        """W on a square metre of the facade, from eight to six."""
        height = math.sin(math.pi * (self.time - 8 * 3600) / (10 * 3600))
        return 600.0 * height / (1 + math.exp(-self.cover)) if 8 * 3600 < self.time < 18 * 3600 else 0.0

    def _flow(self, heat: float) -> None:
        """The heat that flows in one step, W to room and wall."""
        between = self.room_to_wall * (self.wall - self.room)
        into_room = heat + self.window * self.sun + self.room_to_outdoors * (self.outdoors - self.room) + between
        into_wall = self.facade * self.sun + self.wall_to_outdoors * (self.outdoors - self.wall) - between
        self.room += STEP * into_room / self.room_capacity
        self.wall += STEP * into_wall / self.wall_capacity

    def _draw(self) -> float:
        return self.noise * float(self.np_random.standard_normal())

    def _observe(self, power: float) -> np.ndarray:
        room, outdoors = self.room + 0.05 * self._draw(), self.outdoors + 0.1 * self._draw()
        seen = np.float32([self.time, room, outdoors, self.sun, power, self.tariff])
        return np.clip(seen, self.observation_space.low, self.observation_space.high)
