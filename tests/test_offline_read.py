"""The reader of logged experience: the rows that it keeps, its cache, and datasets that it refuses."""

import gzip
import json
import os
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from gymnasium.spaces import Box
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.offline.read import dataset_env_id, read_dataset
from utils.offline.replay import DatasetError
from utils.offline.write import DatasetWriter

FRAME = (2, 1)
IMAGES = Box(0, 255, (4, *FRAME), np.uint8)
VECTORS = Box(-np.inf, np.inf, (2,), np.float32)


@pytest.fixture(autouse=True)
def user_cache(tmp_path, monkeypatch):
    """Where a cache goes that cannot be in the dataset's folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
    return tmp_path / "user"


def save(folder, name, k, array):
    with gzip.open(folder / f"{name}_ckpt.{k}.gz", "wb", compresslevel=1) as file:
        np.save(file, array)


def load(folder, name, k):
    with gzip.open(folder / f"{name}_ckpt.{k}.gz") as file:
        return np.load(file)


def log_published(folder, lengths, capacity):
    """What google-research/batch_rl's logger leaves: a copy of its ring whenever the write position is the last slot.

    Three zero frames are written together with an episode's first, so the position may jump over that slot; the copy
    then does not exist. The last copy is made when the run ends, wherever the position is.

    Returns:
        All rows that were ever written, (frame, action, reward, terminal), and the row count of each copy.
    """
    ring = {
        "observation": np.full((capacity, *FRAME), 99, np.uint8),  # np.empty holds anything
        "action": np.full(capacity, 77, np.int32),
        "reward": np.full(capacity, 55, np.float32),
        "terminal": np.ones(capacity, np.uint8),
    }
    rows, counts, suffix = [], {}, 0

    def dump():
        for name, store in ring.items():
            save(folder, f"$store$_{name}", suffix, store)
        save(folder, "add_count", suffix, np.array(len(rows)))
        save(folder, "invalid_range", suffix, (len(rows) - 1 + np.arange(5)) % capacity)
        counts[suffix] = len(rows)

    for length in lengths:
        for t in range(length):
            step = len(rows) % 250 + 1, len(rows) % 5 + 1, len(rows) % 7 - 3.5, int(t == length - 1)
            new = [*[(0, 0, 0.0, 0)] * (3 if t == 0 else 0), step]
            for row in new:
                for store, value in zip(ring.values(), row):
                    store[len(rows) % capacity] = value
                rows.append(row)
            if len(rows) % capacity == capacity - 1:
                dump()
            if len(rows) % capacity < len(new) and len(rows) >= capacity:
                suffix += 1
    if len(rows) % capacity != capacity - 1:
        dump()
    return rows, counts


def columns(rows):
    """Rows of frames, in the form in which they were logged."""
    return list(
        zip(rows.observation[:, 0, 0].tolist(), *(x.tolist() for x in (rows.action, rows.reward, rows.terminal)))
    )


@settings(max_examples=60)
@given(st.lists(st.integers(1, 12), min_size=4, max_size=15), st.integers(12, 40), st.sampled_from([1.0, 0.5, 0.27]))
def test_fresh_rows_of_the_published_layout(tmp_path_factory, lengths, capacity, fraction):
    folder = tmp_path_factory.mktemp("published")
    logged, counts = log_published(folder, lengths, capacity)
    expected = []
    for count in counts.values():
        fresh = count % capacity or capacity  # since the write position was at slot 0
        expected.append(logged[count - fresh :][: max(1, round(fraction * fresh))])
    rows = read_dataset(str(folder), IMAGES, 4, fraction, None)
    assert columns(rows) == [row for block in expected for row in block]
    assert rows.first.tolist() == np.cumsum([0] + [len(block) for block in expected[:-1]]).tolist()
    assert not rows.truncation.any()


def test_a_published_chunk_by_hand(tmp_path):
    """Two episodes of 3 steps in a ring of 12: the second one's end would be in the last slot, which is stale."""
    log_published(tmp_path, [3, 3], 12)
    for path in tmp_path.glob("*_ckpt.1.gz"):
        path.unlink()
    assert load(tmp_path, "$store$_terminal", 0).tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0, 1]  # the last is stale
    assert load(tmp_path, "add_count", 0) == 11
    rows = read_dataset(str(tmp_path), IMAGES, 4, 1.0, None)
    assert rows.terminal.tolist() == [0, 0, 0, 0, 0, 1, 0, 0, 0, 0, 0]
    assert rows.observation[:, 0, 0].tolist() == [0, 0, 0, 1, 5, 6, 0, 0, 0, 7, 11]


def write_vectors(folder, rows=30, **options):
    """Episodes of 10 steps, every second one truncated; the first component of an observation counts the steps."""
    writer = DatasetWriter(str(folder), 1, VECTORS, 1, "CartPole-v1", **options)
    for t in range(rows):
        done, odd = np.array([t % 10 == 9]), t // 10 % 2 == 1
        writer.add(np.full((1, 2), t, np.float32), np.array([t % 2]), np.ones(1), done & (not odd), done & odd)
        if done:
            writer.end_episodes()  # no step in between that only resets
    writer.close()


def read(folder, fraction=1.0, seed=None, cache_dir=None):
    return read_dataset(str(folder), VECTORS, 1, fraction, seed, cache_dir)


def test_logged_vectors_and_their_truncations(tmp_path):
    write_vectors(tmp_path, rows=40, chunk_rows=25)
    rows = read(tmp_path)
    assert rows.observation.dtype == np.float32
    assert rows.observation[:, 0].tolist() == list(range(40))
    assert rows.action.tolist() == [0, 1] * 20
    assert np.flatnonzero(rows.terminal).tolist() == [9, 19, 29, 39]
    assert np.flatnonzero(rows.truncation).tolist() == [19, 39]
    assert rows.first.tolist() == [0, 25]


@pytest.mark.parametrize("seed", [0, 1])
def test_random_blocks_are_contiguous_and_repeatable(tmp_path, seed):
    write_vectors(tmp_path, rows=400, chunk_rows=100)
    rows = read(tmp_path, 0.2, seed)
    assert rows.first.tolist() == [0, 20, 40, 60]
    blocks = rows.observation[:, 0].reshape(4, 20)
    assert (np.diff(blocks) == 1).all()
    assert (blocks // 100 == np.arange(4)[:, None]).all()
    assert (blocks[:, 0] % 100 != 0).any()
    assert (read(tmp_path, 0.2, seed).observation == rows.observation).all()
    assert (read(tmp_path, 0.2, seed + 1).observation != rows.observation).any()


def test_the_cache_is_used_again_until_a_file_changes(tmp_path):
    write_vectors(tmp_path)
    cached = tmp_path / "cache" / "1" / "observation.npy"
    read(tmp_path)
    first = cached.stat()
    read(tmp_path)
    assert (cached.stat().st_ino, cached.stat().st_mtime_ns) == (first.st_ino, first.st_mtime_ns)

    save(tmp_path, "$store$_reward", 0, load(tmp_path, "$store$_reward", 0) + 1)
    assert set(read(tmp_path).reward) == {2}
    (tmp_path / "cache" / "1.part").mkdir()  # a preparation that was killed
    write_vectors(tmp_path, append=True)
    assert len(read(tmp_path).action) == 60


def test_the_cache_of_a_dataset_that_cannot_be_written(tmp_path, user_cache, capsys):
    write_vectors(tmp_path / "set")
    (tmp_path / "set" / "cache").touch()  # no folder can be made there, not even by a superuser
    for _ in range(2):
        assert len(read(tmp_path / "set").action) == 30
    assert capsys.readouterr().out.count("\n") == 1
    assert list(user_cache.rglob("observation.npy"))
    user_cache.rename(tmp_path / "elsewhere")
    user_cache.touch()
    with pytest.raises(DatasetError, match="cannot be written"):
        read(tmp_path / "set")


def test_a_finished_cache_needs_nothing_to_be_written(tmp_path, user_cache):
    write_vectors(tmp_path / "set")
    read(tmp_path / "set")
    (tmp_path / "set" / "cache" / "1.lock").unlink()
    (tmp_path / "set" / "cache" / "1.lock").mkdir()  # writing would begin with this file
    assert len(read(tmp_path / "set").action) == 30
    assert not user_cache.exists()


def test_several_datasets_share_a_cache_dir(tmp_path):
    for name, rows in (("a", 10), ("b", 20), ("a", 10)):
        write_vectors(tmp_path / name / "set", rows, append=True)
        read(tmp_path / name / "set", cache_dir=str(tmp_path / "caches"))
    found = [len(np.load(path)) for path in (tmp_path / "caches").rglob("observation.npy")]
    assert sorted(found) == [20, 20]
    assert not (tmp_path / "a" / "set" / "cache").exists()


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_bytes(b""), lambda path: truncate(path)])
def test_a_damaged_cache(tmp_path, damage):
    write_vectors(tmp_path)
    read(tmp_path)
    damage(tmp_path / "cache" / "1" / "action.npy")
    with pytest.raises(DatasetError, match="cache/1 is damaged"):
        read(tmp_path)


def test_a_full_disk_leaves_no_part_of_a_cache(tmp_path, user_cache, monkeypatch):
    def full(*args, **kwargs):
        raise OSError(28, "No space left on device")

    write_vectors(tmp_path)
    monkeypatch.setattr("numpy.save", full)  # of the last of the cache's arrays
    with pytest.raises(DatasetError, match="No space left"):
        read(tmp_path)
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["1.lock"]
    assert not user_cache.exists()  # it may be on the same disk, and is seldom a large one


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
        name, k = path.name.removesuffix(".gz").split("_ckpt.")
        save(path.parent, name, k, change(load(path.parent, name, k)))

    return action


def put(value):
    """Writes `value` in row 17."""
    return rewrite(lambda rows: np.concatenate([rows[:17], np.full_like(rows[:1], value), rows[18:]]))


@pytest.mark.parametrize(
    ("name", "break_it"),
    [
        ("$store$_observation", truncate),
        ("$store$_action", lambda path: path.write_bytes(b"not a gzip file")),
        ("$store$_action", lambda path: path.write_bytes(gzip.compress(b"not an npy file"))),
        ("$store$_action", lambda path: path.write_bytes(gzip.compress(b"\x93NUMPY\x09\x00"))),  # an unknown version
        ("$store$_action", lambda path: path.write_bytes(gzip.compress(gzip.decompress(path.read_bytes())[:-3]))),
        ("$store$_terminal", os.remove),
        ("$store$_truncation", os.remove),
        ("$store$_reward", rewrite(lambda rows: rows[:-1])),
        ("$store$_reward", rewrite(lambda rows: rows.astype(np.float64))),
        ("$store$_observation", rewrite(lambda rows: rows[:, :1])),
        ("$store$_observation", rewrite(lambda rows: np.asfortranarray(rows))),
        ("$store$_action", rewrite(lambda rows: rows[:, None])),
        ("$store$_observation", put(np.nan)),
        ("$store$_observation", put(np.inf)),
        ("$store$_reward", put(np.nan)),
        ("$store$_reward", put(-np.inf)),
        ("$store$_action", put(-1)),
        ("$store$_terminal", put(7)),
        ("$store$_truncation", put(2)),
        ("add_count", os.remove),
        ("add_count", rewrite(lambda count: np.array(0))),
        ("add_count", rewrite(lambda count: np.array(-5))),
    ],
)
def test_a_bad_file_is_named_in_one_line(tmp_path, name, break_it):
    write_vectors(tmp_path, rows=100, chunk_rows=50)
    read(tmp_path, fraction=0.5)
    path = tmp_path / f"{name}_ckpt.1.gz"
    break_it(path)
    with pytest.raises(DatasetError) as caught:
        read(tmp_path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)
    caches = [path.name for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    assert caches == ["0.5"]  # the good one stays, and nothing of another


def test_a_folder_without_a_dataset_stays_as_it_is(tmp_path):
    (tmp_path / "empty").mkdir()
    for name in ("empty", "nowhere"):
        with pytest.raises(DatasetError, match=name):
            read(tmp_path / name)
    assert [path.name for path in tmp_path.rglob("*")] == ["empty"]


def minari_episode(start, length, terminated, observation=np.float64):
    ends = np.arange(length) == length - 1
    return SimpleNamespace(
        observations=np.arange(start, start + 2 * length + 2).astype(observation).reshape(-1, 2),
        actions=np.arange(length) % 2,
        rewards=np.ones(length),
        terminations=ends & terminated,
        truncations=ends & (not terminated),
    )


def install_minari(monkeypatch, episodes):
    logged = SimpleNamespace(env_spec=SimpleNamespace(id="CartPole-v1"), iterate_episodes=lambda: iter(episodes))
    monkeypatch.setitem(sys.modules, "minari", SimpleNamespace(load_dataset=lambda name, download: logged))


def test_minari(monkeypatch):
    install_minari(
        monkeypatch, [minari_episode(0, 3, True), minari_episode(100, 2, False), minari_episode(200, 1, True)]
    )
    assert dataset_env_id("minari:some/set-v0") == "CartPole-v1"
    rows = read("minari:some/set-v0")
    # a time-out has one more row, with the observation from which it bootstraps
    assert rows.observation[:, 0].tolist() == [0, 2, 4, 100, 102, 104, 200]
    assert rows.action.tolist() == [0, 1, 0, 0, 1, 0, 0]
    assert rows.reward.tolist() == [1, 1, 1, 1, 1, 0, 1]
    assert rows.terminal.tolist() == [0, 0, 1, 0, 0, 1, 1]
    assert rows.truncation.tolist() == [0, 0, 0, 0, 0, 1, 0]
    with pytest.raises(DatasetError, match="minari:some/set-v0"):
        read_dataset("minari:some/set-v0", IMAGES, 4, 1.0, None)


def test_bad_minari_datasets(monkeypatch):
    negative = minari_episode(0, 3, True)
    negative.actions[1] = -1
    for episodes in ([], [negative]):
        install_minari(monkeypatch, episodes)
        with pytest.raises(DatasetError, match="minari:some/set-v0"):
            read("minari:some/set-v0")
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(DatasetError, match="pip install"):
        dataset_env_id("minari:some/set-v0")


def test_env_id_of_a_dataset(tmp_path):
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
