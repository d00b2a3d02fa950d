"""The transitions of logged experience against a walk through the episodes that were logged."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from utils.offline.replay import DatasetError, OfflineReplay, Rows

GAMMA = 0.9


def test_observations_are_bytes_or_float32():
    for dtype, expected in ((np.uint8, torch.uint8), (np.float32, torch.float32), (np.float64, torch.float32)):
        rows = rows_of([9], [False], [(0, 9)], 1)
        rows = rows._replace(observation=rows.observation.astype(dtype))
        assert OfflineReplay(rows, 1, 1, GAMMA, torch.device("cpu")).sample(3).observation.dtype == expected


def step_of(serial):
    """Frame, action and reward of the step with this number; no frame is zero."""
    return serial % 250 + 1, serial % 5 + 1, serial % 7 - 3.5


def rows_of(lengths, truncated, kept, stack):
    """What a reader makes of logged episodes: `stack` - 1 rows of zeros and a row for each step, cut into blocks.

    Args:
        kept: ranges of rows, counted over the whole log, one for each block.
    """
    rows, serial = [], 0
    for length, cut in zip(lengths, truncated):
        rows += [(0, 0, 0.0, False, False)] * (stack - 1)
        for t in range(length):
            rows.append((*step_of(serial + t), t == length - 1, t == length - 1 and cut))
        serial += length
    blocks = [rows[a:b] for a, b in kept]
    columns = zip(*[row for block in blocks for row in block])
    frame, action, reward, terminal, truncation = map(np.array, columns)
    first = np.cumsum([0] + [len(block) for block in blocks[:-1]])
    frames = np.broadcast_to(frame.astype(np.uint8)[:, None, None], (len(frame), 2, 1)).copy()
    return Rows(
        frames, action.astype(np.int32), reward.astype(np.float32), *map(np.uint8, (terminal, truncation)), first
    )


def walk(lengths, truncated, kept, stack, n_step):
    """Every transition as (stack, action, return, discount, next stack), by walking through the episodes."""
    expected, serial, row = [], 0, 0
    for length, cut in zip(lengths, truncated):
        frames = [0] * (stack - 1) + [step_of(serial + t)[0] for t in range(length)]
        for a, b in kept:
            for t in range(length):
                if not (a <= row + t and row + t + stack - 1 < b):
                    continue  # a part of the stack is not there
                value, discount, m = 0.0, 1.0, 0
                while m < n_step:
                    last = t + m == length - 1
                    if last and not cut:
                        value, discount, m = value + discount * step_of(serial + t + m)[2], 0.0, m + 1
                        break
                    if last or row + t + m + stack >= b:
                        break  # the next observation is not there
                    value, discount, m = value + discount * step_of(serial + t + m)[2], discount * GAMMA, m + 1
                if m:
                    following = frames[t + m : t + m + stack] if discount else None
                    action = step_of(serial + t)[1]
                    expected.append((frames[t : t + stack], action, round(value, 4), round(discount, 4), following))
        serial, row = serial + length, row + len(frames)
    return expected


def replay_of(rows, stack, n_step):
    return OfflineReplay(rows, stack, n_step, GAMMA, torch.device("cpu"))


def held(replay):
    """Every transition in the replay in the form that `walk` gives."""
    batch = replay.gather(torch.arange(len(replay)))
    pixels = [x.reshape(len(replay), -1, 2)[..., 0] for x in (batch.observation, batch.next_observation)]
    return [
        (
            observation.tolist(),
            int(action),
            round(float(reward), 4),
            round(float(discount), 4),
            following.tolist() if discount else None,  # what follows a game over is never used
        )
        for observation, action, reward, discount, following in zip(pixels[0], *batch[1:4], pixels[1])
    ]


@settings(max_examples=300)
@given(
    st.lists(st.tuples(st.integers(1, 12), st.booleans()), min_size=2, max_size=12),
    st.sets(st.integers(1, 150), max_size=5),
    st.integers(0, 6),
    st.sampled_from([1, 4]),
    st.integers(1, 4),
)
def test_transitions_are_those_of_a_walk_through_the_episodes(episodes, edges, gap, stack, n_step):
    """Blocks begin at the edges, anywhere in an episode, and lack the last `gap` rows before the next one."""
    lengths, truncated = zip(*episodes)
    total = sum(lengths) + (stack - 1) * len(lengths)
    edges = [0, *sorted(edge for edge in edges if edge < total), total]
    kept = [(a, max(a + 1, b - gap)) for a, b in itertools.pairwise(edges)]
    rows = rows_of(lengths, truncated, kept, stack)
    expected = walk(lengths, truncated, kept, stack, n_step)
    if expected:
        found = held(replay_of(rows, stack, n_step))
        assert sorted(found, key=str) == sorted(expected, key=str)
    else:
        with pytest.raises(DatasetError):
            replay_of(rows, stack, n_step)


def test_two_episodes_by_hand():
    """A game over after three steps; then three more steps, of which the last has no successor in the block."""
    assert held(replay_of(rows_of([3, 9], [False, False], [(0, 12)], 4), 4, 2)) == [
        ([0, 0, 0, 1], 1, round(-3.5 - 0.9 * 2.5, 4), 0.81, [0, 1, 2, 3]),
        ([0, 0, 1, 2], 2, round(-2.5 - 0.9 * 1.5, 4), 0.0, None),
        ([0, 1, 2, 3], 3, -1.5, 0.0, None),
        ([0, 0, 0, 4], 4, round(-0.5 + 0.9 * 0.5, 4), 0.81, [0, 4, 5, 6]),
        ([0, 0, 4, 5], 5, 0.5, 0.9, [0, 4, 5, 6]),
    ]


def test_batches_are_typed_for_training():
    batch = replay_of(rows_of([9], [False], [(0, 12)], 4), 4, 3).sample(5)
    assert batch.observation.shape == batch.next_observation.shape == (5, 4, 2, 1)
    dtypes = [x.dtype for x in batch]
    assert dtypes == [torch.uint8, torch.int64, torch.float32, torch.float32, torch.uint8]


def test_draws_all_transitions_alike():
    replay = replay_of(rows_of([10, 10, 10], [False, True, False], [(0, 30)], 1), 1, 1)
    torch.manual_seed(0)
    counts = torch.bincount(replay.sample(20_000).observation[:, 0, 0].long(), minlength=31)[1:]
    assert (counts == 0).nonzero().flatten().tolist() == [19]  # the last observation of a time-out starts nothing
    assert len(replay) == 29
    assert chisquare(counts[counts > 0]).pvalue > 1e-3
