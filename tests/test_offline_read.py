"""The reader of logged experience against a walk through the episodes that were logged."""

import gzip
import json
import os
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from utils.offline.read import dataset_env_id, read_dataset
from utils.offline.replay import DatasetError, OfflineReplay, find_transitions
from utils.offline.write import DatasetWriter

CPU = torch.device("cpu")
GAMMA = 0.9
FRAME = (2, 1)
IMAGES = Box(0, 255, (4, *FRAME), np.uint8)
VECTORS = Box(-np.inf, np.inf, (2,), np.float32)


def save(folder, name, k, array):
    with gzip.open(folder / f"{name}_ckpt.{k}.gz", "wb", compresslevel=1) as file:
        np.save(file, array)


def load(folder, name, k):
    with gzip.open(folder / f"{name}_ckpt.{k}.gz") as file:
        return np.load(file)


def step_of(serial):
    """Frame, action and reward of the step with this number, all different and none of them zero."""
    return np.full(FRAME, serial % 250 + 1, np.uint8), serial % 5 + 1, np.float32(serial % 7 - 3.5)


def log_published(folder, lengths, capacity):
    """What google-research/batch_rl's logger leaves: a copy of its ring whenever the write position is the last slot.

    Three zero frames are written together with an episode's first, so the position may jump over that slot; the copy
    then does not exist. The last copy is made when the run ends, wherever the position is.
    """
    ring = {
        "observation": np.full((capacity, *FRAME), 99, np.uint8),  # np.empty holds anything
        "action": np.full(capacity, 77, np.int32),
        "reward": np.full(capacity, 55, np.float32),
        "terminal": np.ones(capacity, np.uint8),
    }
    serial = count = suffix = 0

    def dump():
        for name, store in ring.items():
            save(folder, f"$store$_{name}", suffix, store)
        save(folder, "add_count", suffix, np.array(count))
        save(folder, "invalid_range", suffix, (count - 1 + np.arange(5)) % capacity)

    for length in lengths:
        for t in range(length):
            frame, action, reward = step_of(serial)
            rows = [(frame, action, reward, t == length - 1)]
            if t == 0:
                rows = [(np.zeros(FRAME), 0, 0, 0)] * 3 + rows
            for row in rows:
                for store, value in zip(ring.values(), row):
                    store[count % capacity] = value
                count += 1
            if count % capacity == capacity - 1:
                dump()
            if count % capacity < len(rows) and count >= capacity:
                suffix += 1
            serial += 1
    if count % capacity != capacity - 1:
        dump()


def log_ours(folder, lengths, capacity, truncated):
    """The same episodes through DatasetWriter, as one NEXT_STEP environment gives them."""
    writer = DatasetWriter(str(folder), 1, IMAGES, 4, "ALE/Pong-v5", chunk_rows=capacity, flush_every=7)
    serial = 0
    for length, cut in zip(lengths, truncated):
        for t in range(length):
            frame, action, reward = step_of(serial)
            observation = np.broadcast_to(frame, (1, 4, *FRAME))
            last = np.array([t == length - 1])
            writer.add(observation, np.array([action]), np.array([reward]), last & (not cut), last & cut)
            serial += 1
        no = np.zeros(1, bool)
        writer.add(np.zeros((1, 4, *FRAME), np.uint8), np.zeros(1, int), np.zeros(1), no, no)  # the reset
    writer.close()


def walk(lengths, truncated, n_step, kept):
    """Every transition as (stack, action, return, discount, next stack), by walking through the episodes.

    Args:
        truncated: whether each episode's end is known to be a time-out.
        kept: ranges of rows that are whole and read, counted over the whole log.
    """
    expected, serial, row = [], 0, 0
    for length, cut in zip(lengths, truncated):
        frames = [0, 0, 0] + [int(step_of(serial + t)[0].flat[0]) for t in range(length)]
        rows = range(row, row + len(frames))
        for a, b in kept:
            for t in range(length):
                if not (a <= rows[t] and rows[t + 3] < b):
                    continue  # a part of the stack is not there
                value, discount, m = 0.0, 1.0, 0
                while m < n_step:
                    last = t + m == length - 1
                    if last and not cut:
                        value, discount, m = value + discount * step_of(serial + t + m)[2], 0.0, m + 1
                        break
                    if last or rows[t + m + 3] + 1 >= b:
                        break  # the next observation is not there
                    value, discount, m = value + discount * step_of(serial + t + m)[2], discount * GAMMA, m + 1
                if m:
                    following = frames[t + m : t + m + 4] if discount else None
                    action = step_of(serial + t)[1]
                    expected.append((frames[t : t + 4], action, round(value, 4), round(discount, 4), following))
        serial, row = serial + length, row + len(frames)
    return expected


def held(replay):
    """Every transition in the replay in the form that `walk` gives."""
    batch = replay.gather(torch.arange(len(replay)))
    return [
        (
            observation[:, 0, 0].tolist(),
            int(action),
            round(float(reward), 4),
            round(float(discount), 4),
            following[:, 0, 0].tolist() if discount else None,  # what follows a game over is never used
        )
        for observation, action, reward, discount, following in zip(*batch)
    ]


def read(folder, space=IMAGES, n_step=1, fraction=1.0, seed=None):
    stack = 4 if space is IMAGES else 1
    return OfflineReplay(read_dataset(str(folder), space, stack, fraction, seed), stack, n_step, GAMMA, CPU)


episodes = st.lists(st.integers(1, 12), min_size=4, max_size=15)


def ordered(transitions):
    return sorted(transitions, key=str)


@settings(max_examples=60, deadline=None)
@given(episodes, st.integers(12, 40), st.integers(1, 4), st.sampled_from([1.0, 0.5, 0.27]))
def test_published_layout(tmp_path_factory, lengths, capacity, n_step, fraction):
    folder = tmp_path_factory.mktemp("published")
    log_published(folder, lengths, capacity)
    rows = sum(lengths) + 3 * len(lengths)
    kept = []
    for path in folder.glob("add_count*"):
        count = int(load(folder, "add_count", path.name.split(".")[-2]))
        fresh = count % capacity or capacity
        kept.append((count - fresh, count - fresh + max(1, round(fraction * fresh))))
    assert max(b for _, b in kept) <= rows
    expected = walk(lengths, [False] * len(lengths), n_step, kept)
    if not expected:
        with pytest.raises(DatasetError):
            read(folder, n_step=n_step, fraction=fraction)
        return
    assert ordered(held(read(folder, n_step=n_step, fraction=fraction))) == ordered(expected)


def test_a_published_chunk_by_hand(tmp_path):
    """Two episodes of 3 steps in a ring of 12: the second one's end would be in the last slot, which is stale."""
    log_published(tmp_path, [3, 3], 12)
    for path in tmp_path.glob("*_ckpt.1.gz"):
        path.unlink()
    assert load(tmp_path, "$store$_terminal", 0).tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]  # the 1 is stale
    assert load(tmp_path, "add_count", 0) == 11
    assert held(read(tmp_path, n_step=2)) == [
        ([0, 0, 0, 1], 1, round(-3.5 - 0.9 * 2.5, 4), 0.81, [0, 1, 2, 3]),
        ([0, 0, 1, 2], 2, round(-2.5 - 0.9 * 1.5, 4), 0.0, None),
        ([0, 1, 2, 3], 3, -1.5, 0.0, None),
        ([0, 0, 0, 4], 4, -0.5, 0.9, [0, 0, 4, 5]),  # and no more: what follows row 10 is not there
    ]


@settings(max_examples=60, deadline=None)
@given(episodes, st.lists(st.booleans(), min_size=15, max_size=15), st.integers(8, 60), st.integers(1, 4))
def test_sets_with_truncations(tmp_path_factory, lengths, truncated, capacity, n_step):
    folder = tmp_path_factory.mktemp("ours")
    log_ours(folder, lengths, capacity, truncated)
    rows = sum(lengths) + 3 * len(lengths)
    kept = [(a, min(a + capacity, rows)) for a in range(0, rows, capacity)]
    expected = walk(lengths, truncated, n_step, kept)
    assert held(read(folder, n_step=n_step)) == expected


def write_vectors(folder, rows=30, num_envs=1, **options):
    """Episodes of 10 steps, every second one cut off; an observation is (step, environment)."""
    writer = DatasetWriter(str(folder), num_envs, VECTORS, 1, "CartPole-v1", **options)
    for t in range(rows):
        observation = np.stack([np.full(num_envs, t), np.arange(num_envs)], 1).astype(np.float32)
        end, odd = np.full(num_envs, t % 10 == 9), t // 10 % 2 == 1
        writer.add(observation, np.full(num_envs, t % 2), np.ones(num_envs), end & (not odd), end & odd)
        if end.any():
            writer.end_episodes()  # no rows in between
    writer.close()


def test_vectors_of_several_environments(tmp_path):
    write_vectors(tmp_path, num_envs=2)
    batch = (replay := read(tmp_path, VECTORS, n_step=3)).gather(torch.arange(len(replay)))
    assert batch.observation.dtype == torch.float32
    assert batch.action.dtype == torch.int64
    per_env = [t for t in range(30) if t != 19]  # the last observation of a time-out starts nothing
    assert batch.observation[:, 0].tolist() == per_env * 2
    assert batch.observation[:, 1].tolist() == [0.0] * len(per_env) + [1.0] * len(per_env)
    expected = {6: GAMMA**3, 7: 0.0, 8: 0.0, 9: 0.0, 10: GAMMA**3, 16: GAMMA**3, 17: GAMMA**2, 18: GAMMA}
    found = dict(zip(batch.observation[:, 0].tolist(), batch.discount.tolist()))
    assert {t: found[t] for t in expected} == pytest.approx(expected)
    assert dict(zip(batch.observation[:, 0].tolist(), batch.next_observation[:, 0].tolist()))[18] == 19


@pytest.mark.parametrize("seed", [0, 1])
def test_random_blocks_are_contiguous_and_come_again(tmp_path, seed):
    write_vectors(tmp_path, rows=400, chunk_rows=100)
    rows = read_dataset(str(tmp_path), VECTORS, 1, 0.2, seed)
    assert rows.first.tolist() == [0, 20, 40, 60]
    blocks = rows.observation[:, 0].reshape(4, 20)
    assert (np.diff(blocks) == 1).all()
    assert (blocks // 100 == np.arange(4)[:, None]).all()
    assert (blocks[:, 0] % 100 != 0).any()
    assert (read_dataset(str(tmp_path), VECTORS, 1, 0.2, seed).observation == rows.observation).all()
    assert (read_dataset(str(tmp_path), VECTORS, 1, 0.2, seed + 1).observation != rows.observation).any()


def test_draws_all_transitions_alike(tmp_path):
    write_vectors(tmp_path)
    torch.manual_seed(0)
    batch = (replay := read(tmp_path, VECTORS)).sample(20_000)
    counts = torch.bincount(batch.observation[:, 0].long(), minlength=30)
    assert (counts == 0).nonzero().flatten().tolist() == [19]
    assert chisquare(counts[counts > 0]).pvalue > 1e-3
    assert len(replay) == 29


def test_the_cache_is_used_again_until_a_file_changes(tmp_path):
    write_vectors(tmp_path)
    cached = tmp_path / "cache" / "1" / "observation.npy"
    read(tmp_path, VECTORS)
    first = cached.stat()
    read(tmp_path, VECTORS)
    assert cached.stat().st_ino == first.st_ino
    assert cached.stat().st_mtime_ns == first.st_mtime_ns

    reward = load(tmp_path, "$store$_reward", 0)
    save(tmp_path, "$store$_reward", 0, reward + 1)
    assert read(tmp_path, VECTORS).reward.unique().tolist() == [2]
    (tmp_path / "cache" / "1.part").mkdir()  # a preparation that was killed
    write_vectors(tmp_path, append=True)
    assert len(read(tmp_path, VECTORS)) == 58


@pytest.mark.parametrize(
    ("store", "value"),
    [("reward", np.nan), ("reward", np.inf), ("observation", np.nan), ("action", -1), ("terminal", 7)],
)
def test_values_without_a_meaning_are_refused(tmp_path, store, value):
    write_vectors(tmp_path)
    rows = load(tmp_path, f"$store$_{store}", 0).copy()
    rows[17] = value
    save(tmp_path, f"$store$_{store}", 0, rows)
    with pytest.raises(DatasetError, match=f"{store}.*17"):
        read(tmp_path, VECTORS)


@pytest.mark.parametrize("count", [0, -5])
def test_a_count_without_a_meaning_is_refused(tmp_path, count):
    write_vectors(tmp_path)
    save(tmp_path, "add_count", 0, np.array(count))
    with pytest.raises(DatasetError, match="add_count"):
        read(tmp_path, VECTORS)


def test_a_read_only_dataset_has_its_cache_elsewhere(tmp_path, monkeypatch):
    write_vectors(tmp_path / "set")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    monkeypatch.setattr("os.access", lambda path, mode: False)  # permissions do not bind a superuser
    assert len(read(tmp_path / "set", VECTORS)) == 29
    assert list((tmp_path / "temporary").rglob("observation.npy"))
    assert not list((tmp_path / "set").rglob("observation.npy"))


def test_a_folder_that_is_not_a_dataset_gets_no_cache(tmp_path):
    with pytest.raises(DatasetError):
        read(tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_cache_that_is_read_by_all_and_written_by_one(tmp_path, monkeypatch):
    def read_only(path):
        raise PermissionError(13, "Permission denied")

    write_vectors(tmp_path)
    monkeypatch.setattr("utils.offline.read.FileLock", read_only)
    with pytest.raises(DatasetError, match="cache/1 cannot be written: Permission denied"):
        read(tmp_path, VECTORS)
    monkeypatch.undo()
    read(tmp_path, VECTORS)
    monkeypatch.setattr("utils.offline.read.FileLock", read_only)
    assert len(read(tmp_path, VECTORS)) == 29


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b""), lambda path: truncate(path)])
def test_a_damaged_cache(tmp_path, damage):
    write_vectors(tmp_path)
    read(tmp_path, VECTORS)
    damage(tmp_path / "cache" / "1" / "action.npy")
    with pytest.raises(DatasetError, match="cache/1 is damaged; delete it"):
        read(tmp_path, VECTORS)


def test_preparing_holds_little_in_memory(tmp_path):
    big = np.zeros((4_000, 84, 84), np.uint8)  # 28 MB
    big[:, 40] = np.arange(4_000)[:, None] % 251
    save(tmp_path, "$store$_observation", 0, big)
    for name, dtype in (("action", np.int32), ("reward", np.float32), ("terminal", np.uint8)):
        save(tmp_path, f"$store$_{name}", 0, np.zeros(len(big), dtype))
    save(tmp_path, "add_count", 0, np.array(len(big)))
    tracemalloc.start()
    rows = read_dataset(str(tmp_path), Box(0, 255, (4, 84, 84), np.uint8), 4, 0.9, None)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 0.6 * big.nbytes
    assert (rows.observation == big[:3_600]).all()


def truncate(path):
    path.write_bytes(path.read_bytes()[:-300])


def rewrite(change):
    def action(path):
        name, k = path.name.split("_ckpt.")
        save(path.parent, name, k.removesuffix(".gz"), change(load(path.parent, name, k.removesuffix(".gz"))))

    return action


@pytest.mark.parametrize(
    ("name", "break_it", "says"),
    [
        ("$store$_observation", truncate, "truncated or damaged"),
        ("$store$_action", lambda path: path.write_bytes(b"not a gzip file"), "truncated or damaged"),
        ("$store$_action", lambda path: path.write_bytes(gzip.compress(b"not an npy file")), "truncated or damaged"),
        ("$store$_terminal", os.remove, "is missing"),
        ("$store$_truncation", os.remove, "is missing"),
        ("add_count", os.remove, "is missing"),
        ("$store$_reward", rewrite(lambda rows: rows[:-1]), "has 49 rows, others of its chunk 50"),
        (
            "$store$_reward",
            rewrite(lambda rows: rows.astype(np.float64)),
            "float64; this environment takes () and float32",
        ),
        ("$store$_observation", rewrite(lambda rows: rows[:, :1]), "shape (1,)"),
        ("$store$_observation", rewrite(lambda rows: np.asfortranarray(rows)), "truncated or damaged"),
        ("$store$_action", rewrite(lambda rows: rows[:, None]), "shape (1,)"),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, name, break_it, says):
    write_vectors(tmp_path, rows=100, chunk_rows=50)
    path = tmp_path / f"{name}_ckpt.1.gz"
    break_it(path)
    with pytest.raises(DatasetError) as caught:
        read(tmp_path, VECTORS)
    assert str(path) in str(caught.value)
    assert says in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]  # nothing that fills the disk


@pytest.mark.parametrize("make", [lambda folder: None, lambda folder: folder.mkdir()])
def test_a_folder_without_a_set(tmp_path, make):
    make(tmp_path / "nothing")
    with pytest.raises(DatasetError, match="nothing"):
        read(tmp_path / "nothing")


def test_a_log_that_was_killed_between_two_stores(tmp_path):
    write_vectors(tmp_path, rows=40, flush_every=20)
    for name in ("action", "reward"):  # these had not got the second 20 rows
        save(tmp_path, f"$store$_{name}", 0, load(tmp_path, f"$store$_{name}", 0)[:20])
    save(tmp_path, "add_count", 0, np.array(20))
    for name in ("observation", "action", "reward", "terminal", "truncation"):  # and a chunk without any rows
        save(tmp_path, f"$store$_{name}", 1, load(tmp_path, f"$store$_{name}", 0)[:0])
    save(tmp_path, "add_count", 1, np.array(1))
    replay = read(tmp_path, VECTORS)
    assert replay.row.tolist() == list(range(19))  # row 19 is a time-out's last observation


def test_a_preparation_that_fails_keeps_the_earlier_cache(tmp_path):
    write_vectors(tmp_path)
    read(tmp_path, VECTORS)
    path = tmp_path / "$store$_observation_ckpt.0.gz"
    whole = path.read_bytes()
    truncate(path)
    with pytest.raises(DatasetError):
        read(tmp_path, VECTORS)
    assert (tmp_path / "cache" / "1" / "observation.npy").exists()
    path.write_bytes(whole)
    assert len(read(tmp_path, VECTORS)) == 29


def test_minari(monkeypatch):
    def episode(start, length, terminated):
        observations = np.arange(start, start + 2 * length + 2, dtype=np.float64).reshape(-1, 2)
        ends = np.arange(length) == length - 1
        return SimpleNamespace(
            observations=observations,
            actions=np.arange(length) % 2,
            rewards=np.ones(length),
            terminations=ends & terminated,
            truncations=ends & (not terminated),
        )

    logged = SimpleNamespace(
        env_spec=SimpleNamespace(id="CartPole-v1"),
        iterate_episodes=lambda: iter([episode(0, 3, True), episode(100, 2, False), episode(200, 1, True)]),
    )
    monkeypatch.setitem(sys.modules, "minari", SimpleNamespace(load_dataset=lambda name, download: logged))
    assert dataset_env_id("minari:some/set-v0") == "CartPole-v1"
    rows = read_dataset("minari:some/set-v0", VECTORS, 1, 1.0, None)
    found = find_transitions(rows, 1, 2, GAMMA)
    assert rows.observation[found.row, 0].tolist() == [0, 2, 4, 100, 102, 200]
    assert found.discount.tolist() == pytest.approx([GAMMA**2, 0, 0, GAMMA**2, GAMMA, 0])
    assert found.reward.tolist() == pytest.approx([1 + GAMMA, 1 + GAMMA, 1, 1 + GAMMA, 1, 1])
    assert rows.observation[found.next_row[3], 0] == 104  # the observation behind the time-out
    with pytest.raises(DatasetError, match=r"minari:some/set-v0 holds observations \(2,\)"):
        read_dataset("minari:some/set-v0", IMAGES, 4, 1.0, None)


def test_minari_without_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(DatasetError, match="pip install"):
        dataset_env_id("minari:some/set-v0")


def test_env_id_of_a_set(tmp_path):
    published = tmp_path / "MsPacman" / "3" / "replay_logs"
    published.mkdir(parents=True)
    assert dataset_env_id(str(published)) == "ALE/MsPacman-v5"
    assert dataset_env_id(str(tmp_path)) is None
    DatasetWriter(str(tmp_path / "own"), 1, VECTORS, 1, "CartPole-v1").close()
    assert dataset_env_id(str(tmp_path / "own")) == "CartPole-v1"
    for note in (["CartPole-v1"], {"env_id": 3}, {}):
        (tmp_path / "own" / "dataset.json").write_text(json.dumps(note))
        with pytest.raises(DatasetError, match=r"dataset\.json"):
            dataset_env_id(str(tmp_path / "own"))
    with pytest.raises(DatasetError, match="nowhere"):
        dataset_env_id("nowhere")
