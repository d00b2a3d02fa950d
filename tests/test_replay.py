"""The replay against a naive list of episodes."""

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.replay import Replay

CPU = torch.device("cpu")
GAMMA = 0.9


def space(*shape):
    return Box(-np.inf, np.inf, shape, np.float32)


def play(num_envs, lengths, kinds, steps):
    """Rows as a NEXT_STEP vector environment gives them; an observation is its own serial number.

    lengths, kinds: per environment, the length of each episode and how it ends (cycled).
    Yields (observation, action, reward, terminal, end, next observation, is_transition), each of shape (num_envs,).
    """
    serial = [1000.0 * i for i in range(num_envs)]
    episode, step, ended = [0] * num_envs, [0] * num_envs, [False] * num_envs
    for t in range(steps):
        observation = np.array(serial)
        row = []
        for i in range(num_envs):
            serial[i] += 1
            if ended[i]:
                episode[i], step[i], ended[i] = episode[i] + 1, 0, False
                row.append((0, 0.0, False, False, False))
                continue
            step[i] += 1
            over = step[i] == lengths[i][episode[i] % len(lengths[i])]
            kind = kinds[i][episode[i] % len(kinds[i])]
            ended[i] = over and kind in ("terminated", "truncated")
            if over and kind == "life":  # a terminal without an end: the episode goes on
                episode[i], step[i] = episode[i] + 1, 0
            terminal = over and kind in ("terminated", "life")
            row.append((t % 3, float(t + i), terminal, ended[i], True))
        action, reward, terminal, end, real = map(np.array, zip(*row, strict=True))
        yield observation, action, reward, terminal, end, np.array(serial), real


class NaiveReplay:
    """Keeps whole episodes as Python lists, and builds every transition by walking through them."""

    def __init__(self, num_envs, stack, n_step):
        self.num_envs, self.stack, self.n_step = num_envs, stack, n_step
        self.rows = []

    def transitions(self, rows):
        """(start row, env) -> (stack, action, n-step return, discount, next stack), starts in the last `rows` rows."""
        found = {}
        for i in range(self.num_envs):
            first = 0  # the row of the episode's first observation
            for t, (obs, action, _, _, _, _, real) in enumerate(self.rows):
                if not real[i]:
                    first = t + 1
                    continue
                ret, discount, m = 0.0, 1.0, 0
                while m < self.n_step and t + m < len(self.rows):
                    _, _, reward, terminal, end, next_obs, _ = self.rows[t + m]
                    ret, discount, m = ret + discount * reward[i], discount * GAMMA, m + 1
                    if terminal[i] or end[i]:
                        break
                if t < len(self.rows) - rows or t > len(self.rows) - self.n_step:
                    continue
                found[t, i] = (
                    self.frames(i, first, t, obs[i]),
                    action[i],
                    ret,
                    0.0 if terminal[i] else discount,
                    self.frames(i, first, t + m, next_obs[i]),
                )
        return found

    def frames(self, i, first, t, newest):
        earlier = [self.rows[k][0][i] if k >= first else 0.0 for k in range(t - self.stack + 1, t)]
        return [*earlier, newest]


cases = st.integers(1, 3).flatmap(
    lambda num_envs: st.tuples(
        st.just(num_envs),
        st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=num_envs, max_size=num_envs),
        st.lists(
            st.lists(st.sampled_from(["terminated", "truncated", "life"]), min_size=1, max_size=4),
            min_size=num_envs,
            max_size=num_envs,
        ),
    )
)


def fill(replay, rows, stack, naive=None):
    """Feeds rows to the replay; the observation is the stack that the environment would have shown."""
    history = None
    for obs, action, reward, terminal, end, next_obs, real in rows:
        n = len(obs)
        if history is None:
            history = np.zeros((n, stack))
            history[:, -1] = obs
        observation = torch.tensor(history, dtype=torch.float32)[..., None]
        for i in range(n):
            history[i] = [*history[i, 1:], next_obs[i]] if real[i] else [*[0.0] * (stack - 1), next_obs[i]]
        next_observation = torch.tensor(history, dtype=torch.float32)[..., None]
        replay.add(observation, action, reward, terminal, end, next_observation)
        if naive is not None:
            naive.rows.append((obs, action, reward, terminal, end, next_obs, real))


def drawable(replay):
    """Every transition in the replay's queue, as {(slot, env): batch row}, and the number of entries."""
    place = (replay.queue_first + torch.arange(replay.queue_count)) % len(replay.starts)
    return replay.starts[place]


@settings(max_examples=150, deadline=None)
@given(cases, st.integers(1, 60), st.integers(1, 4), st.sampled_from([1, 4]), st.integers(6, 40))
def test_holds_exactly_the_transitions_of_a_naive_buffer(case, steps, n_step, stack, rows):
    num_envs, lengths, kinds = case
    replay = Replay(rows * num_envs, num_envs, space(stack, 1), Discrete(3), stack, n_step, GAMMA, CPU)
    naive = NaiveReplay(num_envs, stack, n_step)
    fill(replay, play(num_envs, lengths, kinds, steps), stack, naive)

    expected = naive.transitions(rows)
    starts = drawable(replay)
    assert len(replay) == len(starts) == len(expected)  # each once, so that drawing is uniform
    slots = {(t % replay.length) * num_envs + i: key for key in expected for t, i in [key]}
    assert sorted(starts.tolist()) == sorted(slots)

    batch = replay.gather(starts)
    for j, slot in enumerate(starts.tolist()):
        obs, action, ret, discount, next_obs = expected[slots[slot]]
        assert batch.observation[j].flatten().tolist() == obs
        assert batch.action[j] == action
        assert batch.reward[j].item() == pytest.approx(ret, rel=1e-5)
        assert batch.discount[j].item() == pytest.approx(discount, rel=1e-5)
        if discount:  # what follows a terminal is never used
            assert batch.next_observation[j].flatten().tolist() == next_obs
