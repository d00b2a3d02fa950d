"""Prioritised sampling against a plain list of priorities."""

from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box, Discrete
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from utils.priorities import FAN_OUT, Priorities
from utils.replay import Replay

CPU = torch.device("cpu")
SIZES = (1, 5, FAN_OUT, FAN_OUT + 1, 3 * FAN_OUT + 17, FAN_OUT**2 + 1)  # one, two and three levels, whole and not


def filled(values):
    priorities = Priorities(len(values), CPU)
    priorities.update(torch.arange(len(values)), torch.as_tensor(values, dtype=torch.float64))
    return priorities


def assert_drawn_in_proportion(priorities, expected, draws=30_000):
    """Pearson's test, slots of little expectation thrown together; and never a slot without priority."""
    torch.manual_seed(0)
    slots, probability = priorities.sample(draws)
    share = np.asarray(expected, dtype=np.float64) / np.sum(expected)
    assert probability.numpy() == pytest.approx(share[slots], rel=1e-12)
    counts = np.bincount(slots, minlength=len(share))
    assert counts[share == 0].sum() == 0
    often = share * draws >= 10
    observed, wanted = list(counts[often]), list(share[often] * draws)
    if share[~often].sum() > 0:
        observed, wanted = [*observed, counts[~often].sum()], [*wanted, share[~often].sum() * draws]
    if len(observed) > 1:
        assert chisquare(observed, wanted).pvalue > 1e-4


@pytest.mark.parametrize("size", SIZES)
def test_draws_in_proportion_before_and_after_updates(size):
    rng = np.random.default_rng(size)
    values = rng.exponential(size=size) ** 2 * (rng.random(size) < 0.8)  # a fifth has none
    values[rng.integers(size)] = 3.0
    priorities = filled(values)
    assert_drawn_in_proportion(priorities, values)
    for _ in range(20):
        slots = rng.choice(size, size=min(size, 32), replace=False)
        values[slots] = rng.exponential(size=len(slots)) * (rng.random(len(slots)) < 0.7)
        values[slots[0]] = 1.0
        priorities.update(torch.from_numpy(slots), torch.from_numpy(values[slots]))
    assert priorities.values.tolist() == values.tolist()
    assert_drawn_in_proportion(priorities, values)


def test_the_only_slot_with_priority_is_always_drawn():
    for size in SIZES:
        for slot in {0, size // 2, size - 1}:
            priorities = Priorities(size, CPU)
            priorities.update(torch.tensor([slot]), torch.tensor([1e-5]))
            slots, probability = priorities.sample(1_000)
            assert (slots == slot).all() and (probability == 1).all()


@pytest.mark.parametrize("u", [0.0, np.nextafter(1, 0)])
@pytest.mark.parametrize("size", SIZES[1:])
def test_the_ends_of_the_unit_interval_draw_no_slot_without_priority(u, size, monkeypatch):
    values = np.zeros(size)
    values[size // 3 : size // 2] = np.random.default_rng(0).random(size // 2 - size // 3)
    priorities = filled(values)
    monkeypatch.setattr(torch, "rand", lambda *shape, **options: torch.full(shape, u, **options))
    slots, _ = priorities.sample(1)
    assert slots.item() == (size // 3 if u == 0 else size // 2 - 1)


def test_a_million_slots_keep_double_precision():
    """Ten slots of 1e-9 among a million of 1: float32 sums would lose them, and an added error would show."""
    size = 1_000_003
    values = np.ones(size)
    values[::100_001] = 1e-9
    priorities = filled(values)
    for _ in range(100):
        slots = torch.randint(size, (32,))
        priorities.update(slots, torch.full((32,), 1e6))
        priorities.update(slots, torch.as_tensor(values)[slots])
    slots, probability = priorities.sample(1_000)
    assert probability.numpy() == pytest.approx(values[slots] / values.sum(), rel=1e-12)
    for parents, children in pairwise(priorities.levels):
        sums = parents.view(-1)[: len(children)].numpy()
        assert sums == pytest.approx(np.array([np.sum(row) for row in children.numpy()]), rel=1e-14)


@settings(max_examples=50)
@given(
    st.integers(1, 400),
    st.lists(st.lists(st.tuples(st.integers(0, 399), st.floats(0, 10)), min_size=1, max_size=40), max_size=10),
)
def test_of_a_slot_that_is_given_twice_the_largest_counts(size, updates):
    priorities, expected = Priorities(size, CPU), np.zeros(size)
    for update in updates:
        latest = {}
        for slot, value in update:
            latest[slot % size] = max(value, latest.get(slot % size, 0.0))
        for slot, value in latest.items():
            expected[slot] = value
        slots, values = zip(*update)
        priorities.update(torch.tensor(slots) % size, torch.tensor(values, dtype=torch.float64))
    assert priorities.values.tolist() == expected.tolist()
    assert priorities.levels[0].sum().item() == pytest.approx(expected.sum(), rel=1e-12)


def test_a_checkpoint_restores_the_tree_and_fits_into_a_longer_one():
    values = np.random.default_rng(0).random(300)
    state = filled(values).state_dict()
    for size in (300, 20_000):
        priorities = Priorities(size, CPU)
        priorities.update(torch.tensor([0, size - 1]), torch.tensor([5.0, 5.0]))  # to be forgotten
        priorities.load_state_dict(state)
        assert_drawn_in_proportion(priorities, np.pad(values, (0, size - 300)))


@settings(max_examples=60)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(6, 25), st.lists(st.integers(0, 9), min_size=1, max_size=90))
def test_the_replay_tells_which_transitions_enter_and_which_are_dropped(num_envs, n_step, rows, script):
    """Capacity no power of two, wrap-around, ends and cuts: drawable is what the replay itself can draw."""
    space = Box(-np.inf, np.inf, (1,), np.float32)
    replay = Replay(rows * num_envs, num_envs, space, Discrete(2), 1, n_step, 0.99, CPU)
    priorities = Priorities(replay.length * num_envs, CPU)
    zeros, observation = np.zeros(num_envs), torch.zeros(num_envs, 1)
    for code in script:
        if code == 9:
            changed = replay.end_episodes()
        else:
            end = np.array([(code + i) % 4 == 0 for i in range(num_envs)])
            changed = replay.add(observation, zeros.astype(int), zeros, end, end, observation)
        priorities.refresh(*changed, torch.tensor(2.0))
        place = (replay.queue_first + torch.arange(len(replay))) % len(replay.starts)
        assert sorted(replay.starts[place].tolist()) == priorities.values.nonzero().flatten().tolist()
    if len(replay):
        slots, probability = priorities.sample(50)
        assert set(Counter(slots.tolist())) <= set(replay.starts[place].tolist())
        assert probability.numpy() == pytest.approx(1 / len(replay))
