"""Playing episodes with a fixed policy."""

from collections.abc import Callable

import numpy as np
from gymnasium.vector import VectorEnv


def evaluate(
    envs: VectorEnv, policy: Callable[[np.ndarray], np.ndarray], episodes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Plays `episodes` episodes and returns their returns (float64) and lengths (int64), each of shape (episodes,).

    Every environment plays a share that is fixed beforehand; taking whichever episodes end first would favour short
    ones. Closes `envs`.

    Args:
        policy: observations (num_envs, ...) to actions (num_envs,).
    """
    share = np.array([len(part) for part in np.array_split(np.arange(episodes), envs.num_envs)])
    played = np.zeros_like(share)
    returns, lengths = [], []
    observation, _ = envs.reset(seed=seed)
    while (played < share).any():
        observation, _, terminated, truncated, infos = envs.step(policy(observation))
        for i in np.flatnonzero((terminated | truncated) & (played < share)):
            returns.append(infos["episode"]["r"][i])
            lengths.append(infos["episode"]["l"][i])
            played[i] += 1
    envs.close()
    return np.array(returns), np.array(lengths)
