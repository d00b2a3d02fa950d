"""Logged experience, read back with nothing but gzip and numpy."""

import gzip
import io
import itertools
import os
import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from conftest import ROOT
from gymnasium.spaces import Box
from gymnasium.vector import SyncVectorEnv
from gymnasium.wrappers.vector import TransformReward
from hypothesis import given, settings
from hypothesis import strategies as st

from utils.envs import make_envs
from utils.offline.read import read_dataset
from utils.offline.replay import DatasetError
from utils.offline.write import DatasetWriter, LogDataset

FRAME = (3, 2)
SPACES = {1: Box(0, 255, FRAME, np.uint8), 4: Box(0, 255, (4, *FRAME), np.uint8)}
STORES = {
    "observation": np.uint8,
    "action": np.int32,
    "reward": np.float32,
    "terminal": np.uint8,
    "truncation": np.uint8,
}


def read(folder, name, chunk):
    with gzip.open(folder / f"{name}_ckpt.{chunk}.gz") as file:
        return np.load(file)


def read_chunks(folder):
    """The rows of each chunk, as many as its add_count says: (frame's first pixel, action, reward, ends)."""
    chunks = []
    for k in sorted(int(path.name.split(".")[-2]) for path in folder.glob("add_count_*")):
        count = int(read(folder, "add_count", k))
        frames, *columns = (read(folder, f"$store$_{name}", k)[:count] for name in STORES)
        assert (frames == frames[:, :1, :1]).all()
        chunks.append(list(zip(frames[:, 0, 0].tolist(), *(column.tolist() for column in columns))))
        assert len(chunks[-1]) == count
    return chunks


def play(episodes):
    """For each step of a NEXT_STEP environment (first, done, truncated); None for the step that only resets."""
    for length, truncated in episodes:
        yield from [(t == 0, t == length - 1, t == length - 1 and truncated) for t in range(length)]
        yield None


class Player:
    """Plays episodes of given (length, truncated), over and over, and notes in `segments` what should be logged.

    Environment i has frames 1 + 80 i and up. Where a reset from outside cuts an episode short, its rows continue in
    another segment.
    """

    def __init__(self, num_envs, stack, episodes=((7, False), (3, True))):
        self.num_envs, self.stack, self.time = num_envs, stack, 0
        self.episodes = [itertools.cycle((*episodes[i:], *episodes[:i])) for i in range(num_envs)]
        self.segments = [[[]] for _ in range(num_envs)]
        self.observation = np.full((num_envs, *SPACES[stack].shape), 255, np.uint8)  # one buffer for all steps
        self.reset()

    def reset(self):
        self.steps = [play(episodes) for episodes in self.episodes]
        for segments in self.segments:
            if segments[-1] and not segments[-1][-1][3]:
                segments.append([])

    def step(self):
        """The arguments of `DatasetWriter.add`."""
        self.time += 1
        frame = 1 + 80 * np.arange(self.num_envs) + self.time % 79
        newest = self.observation[:, -1] if self.stack > 1 else self.observation
        newest[:] = frame[:, None, None]
        action, reward = np.arange(self.num_envs) + self.time % 5, np.full(self.num_envs, self.time / 8)
        done, truncated = np.zeros((2, self.num_envs), bool)
        for i, (segments, steps) in enumerate(zip(self.segments, self.steps)):
            step = next(steps)
            if step:
                first, done[i], truncated[i] = step
                zeros = [(0, 0, 0.0, 0, 0)] * (self.stack - 1) * first
                row = int(frame[i]), int(action[i]), float(reward[i]), int(done[i]), int(truncated[i])
                segments[-1] += [*zeros, row]
        return self.observation, action, reward, done & ~truncated, truncated


def writer(folder, num_envs=1, stack=4, **options):
    return DatasetWriter(str(folder), num_envs, SPACES[stack], stack, "ALE/Pong-v5", **options)


def test_the_layout_of_the_dqn_replay_dataset(tmp_path):
    dataset, player = writer(tmp_path), Player(1, 4)
    for _ in range(40):
        dataset.add(*player.step())
    dataset.close()
    names = {f"$store$_{name}_ckpt.0.gz" for name in STORES} | {"add_count_ckpt.0.gz", "invalid_range_ckpt.0.gz"}
    assert {path.name for path in tmp_path.iterdir()} == names | {"dataset.json", "dataset.lock"}
    rows = 34 + 7 * 3  # 6 of 40 steps only reset; zeros precede each of 7 episodes
    for name, dtype in STORES.items():
        store = read(tmp_path, f"$store$_{name}", 0)
        assert store.dtype == dtype and store.shape == ((rows, *FRAME) if name == "observation" else (rows,))
    assert read_chunks(tmp_path) == player.segments[0]
    # As in Dopamine for a full ring: the last row, which has no successor, and the first three, without a past
    assert sorted(set(read(tmp_path, "invalid_range", 0).tolist())) == [0, 1, 2, 3, rows - 1]


@settings(max_examples=40)
@given(
    st.integers(1, 3),
    st.sampled_from([1, 4]),
    st.lists(st.tuples(st.integers(1, 9), st.booleans()), min_size=3, max_size=5),
    st.sets(st.integers(0, 59), max_size=4),
    st.integers(5, 40),
    st.integers(1, 12),
)
def test_every_step_is_logged(tmp_path_factory, num_envs, stack, episodes, resets, chunk_rows, flush_every):
    """Each environment fills chunks of its own; no chunk holds an episode that was cut short, but at its end."""
    folder, player = tmp_path_factory.mktemp("set"), Player(num_envs, stack, episodes)
    dataset = writer(folder, num_envs, stack, chunk_rows=chunk_rows, flush_every=flush_every)
    for t in range(60):
        if t in resets:
            player.reset()
            dataset.end_episodes()
        dataset.add(*player.step())
    dataset.close()
    found = [[] for _ in range(num_envs)]
    for chunk in read_chunks(folder):
        found[max(row[0] for row in chunk) // 81].append(chunk)
    for chunks, segments in zip(found, player.segments):
        assert chunks == [rows[i : i + chunk_rows] for rows in segments for i in range(0, len(rows), chunk_rows)]


@pytest.mark.parametrize("limit", [{"flush_every": 10}, {"flush_every": 1_000, "flush_seconds": 0}])
def test_can_be_read_while_it_grows(tmp_path, limit):
    dataset, player = writer(tmp_path, **limit), Player(1, 4)
    for _ in range(50):
        dataset.add(*player.step())
        (rows,), chunks = player.segments[0], read_chunks(tmp_path)
        on_disk = chunks[0] if chunks else []
        assert on_disk == rows[: len(on_disk)]
        assert len(rows) - len(on_disk) < (10 if limit["flush_every"] == 10 else 1)
    dataset.close()


class Killed(BaseException):
    pass


class Disk:
    """Makes `open` write to a disk that has `room` bytes left; the write that does not fit is cut short.

    A write in place, of a few bytes, takes no room but the one that is counted for it, and is not cut: it lies within a
    block of the file system, and a kill does not divide a system call.
    """

    def __init__(self, room, error):
        self.room, self.error, self.open = room, error, open

    def __enter__(self):
        disk = self

        class File(io.FileIO):
            def write(self, data):
                data = bytes(data)
                in_place = self.tell() < os.fstat(self.fileno()).st_size
                fits = len(data) * (disk.room > 0) if in_place else min(len(data), disk.room)
                disk.room -= min(fits, 1) if in_place else fits
                super().write(data[:fits])
                if fits == len(data) or disk.error is None:
                    return len(data)
                if disk.error is Killed:
                    disk.error = None  # nothing happens after a kill
                    raise Killed
                raise disk.error

        def limited(path, mode="r", *args, **kwargs):
            writes = mode in ("wb", "xb")
            return io.BufferedWriter(File(path, mode[0])) if writes else self.open(path, mode, *args, **kwargs)

        self.patch = pytest.MonkeyPatch()
        self.patch.setattr("builtins.open", limited)
        return self

    def __exit__(self, *exception):
        self.patch.undo()


def blocks(folder, num_envs):
    """Each environment's rows as (frame, action), as the reader finds them."""
    found = [[] for _ in range(num_envs)]
    try:
        rows = read_dataset(str(folder), SPACES[4], 4, 1.0, None)
    except DatasetError as error:
        assert "holds no" in str(error)
        return found
    for block in np.split(np.arange(len(rows.action)), rows.first[1:]):
        frames = rows.observation[block, 0, 0].tolist()
        found[max(frames) // 81] += zip(frames, rows.action[block].tolist())
    return found


@settings(max_examples=100)
@given(st.integers(0, 22_000), st.booleans())
def test_a_kill_or_a_full_disk_at_any_byte_loses_only_the_latest_rows(tmp_path_factory, room, kill):
    folder, player = tmp_path_factory.mktemp("set"), Player(2, 4)
    dataset = writer(folder, 2, chunk_rows=16, flush_every=6)
    logged, error = [0, 0], Killed if kill else OSError(28, "No space left on device")
    with Disk(room, error) as disk:
        try:
            for _ in range(60):
                dataset.add(*player.step())
                if not dataset.disk_full:
                    logged = [len(segments[0]) for segments in player.segments]
            dataset.close()
        except Killed:
            logged = [len(segments[0]) for segments in player.segments]
            dataset.lock.release()
        full, disk.room = dataset.disk_full, 1 << 30
        if not kill:  # there is room again, but the dataset would have a hole
            for _ in range(20):
                dataset.add(*player.step())
    found = blocks(folder, 2)
    for rows, (segment,), count in zip(found, player.segments, logged):
        assert rows == [row[:2] for row in segment[: len(rows)]]
        assert len(rows) > count - 6 - 2 * 4 or not (full or kill)
    again, player = writer(folder, 2, append=True), Player(2, 4)
    for _ in range(5):
        again.add(*player.step())
    again.close()
    for before, after, (segment,) in zip(found, blocks(folder, 2), player.segments):
        assert after == before + [row[:2] for row in segment]


@pytest.mark.parametrize("room", [0, 100, 300, 1_000])
def test_a_full_disk_ends_the_dataset_with_one_warning(tmp_path, capsys, room):
    dataset, player = writer(tmp_path, flush_every=6), Player(1, 4)
    with Disk(room, OSError(28, "No space left on device")):
        for _ in range(60):
            dataset.add(*player.step())
        dataset.close()
    assert capsys.readouterr().err.count("\n") == 1
    assert not list(tmp_path.glob("*.part"))


def test_folders_that_are_refused(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    monkeypatch.chdir(tmp_path / "empty")
    for folder in (tmp_path, tmp_path / "notes.txt", ""):
        with pytest.raises(OSError):
            writer(folder)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["empty", "notes.txt"]


def test_a_folder_belongs_to_one_run_at_a_time(tmp_path):
    first, player = writer(tmp_path / "set"), Player(1, 4)
    for append in (False, True):
        with pytest.raises(OSError):
            writer(tmp_path / "set", append=append)
    first.close()
    first = writer(tmp_path / "set")  # nothing was logged
    first.add(*player.step())
    first.close()
    with pytest.raises(OSError):
        writer(tmp_path / "set")
    with pytest.raises(OSError):
        DatasetWriter(str(tmp_path / "set"), 1, SPACES[4], 4, "ALE/Breakout-v5", append=True)
    writer(tmp_path / "set", append=True).close()


@pytest.mark.parametrize("clip_rewards", [False, True])
def test_environments_are_logged_as_they_pass(tmp_path, clip_rewards):
    """Against what the same environments give without the log, for the same seed and actions."""

    def make():  # with one buffer for all observations
        envs = SyncVectorEnv([lambda: gym.make("Acrobot-v1")] * 2, copy=False)
        return TransformReward(envs, lambda reward: 5 * reward)

    plain, logging = make(), LogDataset(make(), str(tmp_path), 1, "Acrobot-v1", clip_rewards)
    rng, rows, done = np.random.default_rng(0), [[], []], np.zeros(2, bool)
    for t in range(600):  # time-outs at 500
        if t in (0, 550):
            (observation, _), (same, _) = plain.reset(seed=t), logging.reset(seed=t)
            np.testing.assert_array_equal(observation, same)
            observation = observation.copy()
            done[:] = False
        action = rng.integers(3, size=2)
        following, reward, terminated, truncated, _ = plain.step(action)
        for expected, passed in zip((following, reward, terminated, truncated), logging.step(action)):
            np.testing.assert_array_equal(passed, expected)
        logged_reward = np.maximum(reward, -1) if clip_rewards else reward
        for i in np.flatnonzero(~done):
            end = terminated[i] or truncated[i]
            rows[i].append((*observation[i], action[i], logged_reward[i], end, truncated[i]))
        observation, done = following.copy(), terminated | truncated
    logging.close()
    found = [[], []]
    for k in range(len(list(tmp_path.glob("add_count*")))):
        stores = [read(tmp_path, f"$store$_{name}", k) for name in STORES]
        chunk = np.column_stack(stores).tolist()
        found[0 if chunk[0] in np.array(rows[0]).tolist() else 1] += chunk
    assert found == [np.array(own).tolist() for own in rows]


def test_only_discrete_actions_are_logged(tmp_path):
    with pytest.raises(TypeError):
        LogDataset(make_envs("Pendulum-v1", 1), str(tmp_path), 1, "Pendulum-v1", False)


def test_an_error_in_the_run_loses_no_rows(tmp_path):
    code = f"""
from utils.envs import make_envs
from utils.offline.write import LogDataset
envs = LogDataset(make_envs("CartPole-v1", 1), {str(tmp_path)!r}, 1, "CartPole-v1", False)
envs.reset(seed=1)
for _ in range(5):
    envs.step(envs.action_space.sample())
raise RuntimeError
"""
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True).returncode == 1
    assert read(tmp_path, "add_count", 0) == 5
