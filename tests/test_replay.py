"""The replay against a naive list of episodes."""

import io

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

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

    def __init__(self, num_envs, stack, n_step, padding="zero"):
        self.num_envs, self.stack, self.n_step, self.padding = num_envs, stack, n_step, padding
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
        padding = 0.0 if self.padding == "zero" else newest if first >= t else self.rows[first][0][i]
        earlier = [self.rows[k][0][i] if k >= first else padding for k in range(t - self.stack + 1, t)]
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
    if not replay.added:
        replay.frames.fill_(np.nan)  # what is not written must not show
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


@settings(max_examples=150)
@given(
    cases,
    st.integers(1, 60),
    st.integers(1, 4),
    st.sampled_from([1, 4]),
    st.integers(6, 40),
    st.sampled_from(["zero", "reset"]),
)
def test_holds_exactly_the_transitions_of_a_naive_buffer(case, steps, n_step, stack, rows, padding):
    num_envs, lengths, kinds = case
    replay = Replay(rows * num_envs, num_envs, space(stack, 1), Discrete(3), stack, n_step, GAMMA, CPU, padding)
    naive = NaiveReplay(num_envs, stack, n_step, padding)
    fill(replay, play(num_envs, lengths, kinds, steps), stack, naive)

    assert_same_transitions(replay, naive.transitions(rows))


def test_many_environments_and_long_windows():
    """A next observation may lie further ahead than a byte can count."""
    num_envs, n_step, rows = 100, 4, 12
    replay = Replay(rows * num_envs, num_envs, space(1, 1), Discrete(3), 1, n_step, GAMMA, CPU)
    naive = NaiveReplay(num_envs, 1, n_step)
    fill(replay, play(num_envs, [[7]] * num_envs, [["terminated"]] * num_envs, 20), 1, naive)
    assert_same_transitions(replay, naive.transitions(rows))


def assert_same_transitions(replay, expected):
    """The replay's queue holds exactly these transitions of a naive buffer, each once, so that drawing is uniform."""
    starts = drawable(replay)
    assert len(replay) == len(starts) == len(expected)
    slots = {(t % replay.length) * replay.num_envs + i: (t, i) for t, i in expected}
    assert sorted(starts.tolist()) == sorted(slots)

    batch = replay.gather(starts)
    for j, slot in enumerate(starts.tolist()):
        obs, action, ret, discount, next_obs = expected[slots[slot]]
        assert batch.observation[j].flatten().tolist() == obs
        assert batch.action[j] == action
        assert batch.reward[j].item() == pytest.approx(ret, rel=1e-5)
        assert batch.discount[j].item() == pytest.approx(discount, rel=1e-5)
        assert batch.next_observation[j].isfinite().all()
        if discount:  # what follows a terminal is multiplied by zero
            assert batch.next_observation[j].flatten().tolist() == next_obs


def cut(replay, naive):
    """The environments are reset from outside: whatever was running is truncated, and the next row starts afresh."""
    replay.end_episodes()
    if naive.rows:
        obs, action, reward, terminal, _, next_obs, real = naive.rows[-1]
        everywhere = np.ones_like(real)
        naive.rows[-1] = (obs, action, reward, terminal, everywhere, next_obs, real)
        naive.rows.append((next_obs, action * 0, reward * 0, ~everywhere, ~everywhere, next_obs, ~everywhere))


@settings(max_examples=100)
@given(cases, st.lists(st.integers(0, 25), min_size=2, max_size=4), st.integers(1, 4), st.integers(6, 40))
def test_cut_ends_the_running_episodes_as_truncated(case, parts, n_step, rows):
    num_envs, lengths, kinds = case
    replay = Replay(rows * num_envs, num_envs, space(4, 1), Discrete(3), 4, n_step, GAMMA, CPU)
    naive = NaiveReplay(num_envs, 4, n_step)
    for steps in parts:
        fill(replay, play(num_envs, lengths, kinds, steps), 4, naive)
        cut(replay, naive)
    fill(replay, play(num_envs, lengths, kinds, 3), 4, naive)
    assert_same_transitions(replay, naive.transitions(rows))


def through_a_file(replay):
    file = io.BytesIO()
    torch.save(replay.state_dict(), file)
    size = file.tell()
    file.seek(0)
    return torch.load(file, weights_only=True), size


@settings(max_examples=100)
@given(cases, st.integers(1, 60), st.integers(1, 40), st.integers(1, 3), st.integers(6, 40), st.integers(0, 20))
def test_goes_on_from_its_state_as_if_nothing_had_happened(case, steps, more, n_step, rows, longer):
    """And a ring that is not yet full goes on in a longer one; a full one keeps its length there."""
    num_envs, lengths, kinds = case
    stream = list(play(num_envs, lengths, kinds, steps + more))
    replay = Replay(rows * num_envs, num_envs, space(4, 1), Discrete(3), 4, n_step, GAMMA, CPU)
    naive = NaiveReplay(num_envs, 4, n_step)
    fill(replay, stream[:steps], 4, naive)
    state, _ = through_a_file(replay)

    new_rows = rows + (longer if steps < rows else 0)
    loaded = Replay((rows + longer) * num_envs, num_envs, space(4, 1), Discrete(3), 4, n_step, GAMMA, CPU)
    loaded.load_state_dict(state)
    assert_same_transitions(loaded, naive.transitions(rows))
    again, _ = through_a_file(loaded)
    for name in state if new_rows == rows else ():
        np.testing.assert_array_equal(again[name], state[name], err_msg=name)
    cut(loaded, naive)
    fill(loaded, play(num_envs, lengths, kinds, more), 4, naive)
    assert_same_transitions(loaded, naive.transitions(new_rows))


@pytest.mark.parametrize("other", ["shorter", "more environments", "other frames", "other n", "other discount"])
def test_refuses_the_state_of_another_replay(other):
    full = Replay(20, 2, space(4, 1), Discrete(3), 4, 1, GAMMA, CPU)
    fill(full, play(2, [[5], [7]], [["terminated"], ["truncated"]], 30), 4)
    rows, num_envs = 8 if other == "shorter" else 10, 3 if other == "more environments" else 2
    frame, n_step = space(4, 2 if other == "other frames" else 1), 3 if other == "other n" else 1
    gamma = 0.8 if other == "other discount" else GAMMA
    replay = Replay(rows * num_envs, num_envs, frame, Discrete(3), 4, n_step, gamma, CPU)
    with pytest.raises(ValueError):
        replay.load_state_dict(full.state_dict())


def test_saving_a_barely_filled_replay_writes_little():
    replay = Replay(1_000_000, 1, space(4, 1), Discrete(3), 4, 1, GAMMA, CPU)
    fill(replay, play(1, [[5]], [["terminated"]], 20), 4)
    _, size = through_a_file(replay)
    assert size < 2_000_000  # a byte or two a row; the frames alone are 4


def test_draws_are_uniform():
    replay = Replay(120, 3, space(1, 1), Discrete(3), 1, 2, GAMMA, CPU)
    kinds = [["terminated"], ["truncated", "life"], ["life", "terminated"]]
    fill(replay, play(3, [[1, 4], [7, 2, 3], [5]], kinds, 200), 1)
    transitions = replay.gather(drawable(replay)).observation.flatten()
    assert 60 < len(transitions) == len(transitions.unique()) < 120  # the rows that reset are not among them

    torch.manual_seed(0)
    draws = 200 * len(transitions)
    drawn, counts = replay.sample(draws).observation.flatten().unique(return_counts=True)
    assert torch.equal(drawn, transitions.sort().values)
    assert chisquare(counts.numpy()).pvalue > 0.001
