"""A tiny environment that renders: `tests.dot:Dot-v0`, for runs from pixels that need neither MuJoCo nor pygame."""

from typing import ClassVar

import gymnasium as gym
import numpy as np


class Dot(gym.Env):
    """A red dot on a line, to be moved to the green square in the middle. The reward is minus the distance, which is at
    most 1; the dot starts anywhere, and a step moves it by up to 0.4."""

    metadata: ClassVar = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(-1, 1, (1,), np.float32)
    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self, render_mode: str | None = None) -> None:
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.x = self.np_random.uniform(-1, 1)
        return np.float32([self.x]), {}

    def step(self, action):
        self.x = float(np.clip(self.x + 0.2 * action[0], -1, 1))
        return np.float32([self.x]), -abs(self.x), False, False, {}

    def render(self):
        frame = np.zeros((15, 15, 3), np.uint8)
        frame[9:12, 6:9, 1] = 255
        left = round(6 + 4 * self.x)
        frame[5:8, left : left + 3, 0] = 255
        return frame


if "Dot-v0" not in gym.registry:
    gym.register("Dot-v0", Dot, max_episode_steps=10)
