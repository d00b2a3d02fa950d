"""Logged experience, read back with nothing but gzip and numpy."""

import gzip

import numpy as np
import pytest
from gymnasium.spaces import Box
from gymnasium.vector import VectorWrapper

from utils.envs import make_envs
from utils.offline.write import DatasetWriter, LogDataset, Store

FRAME = (3, 2)
STORES = ("observation", "action", "reward", "terminal", "truncation")


def read(folder, name, chunk):
    with gzip.open(folder / f"{name}_ckpt.{chunk}.gz") as file:
        return np.load(file)


def read_chunk(folder, chunk):
    """The rows of a chunk, as many as add_count says, from the stores."""
    count = int(read(folder, "add_count", chunk))
    stores = {name: read(folder, f"$store$_{name}", chunk) for name in STORES}
    assert all(len(store) >= count for store in stores.values())
    return {name: store[:count] for name, store in stores.items()}


def chunks(folder):
    return sorted(int(path.name.split(".")[-2]) for path in folder.glob("add_count_*"))


def steps(num_envs, lengths, truncated_every, n):
    """n steps as a NEXT_STEP vector environment gives them, with frames that say which step they are of.

    Yields (arguments of `DatasetWriter.add`, which environments made a transition).
    """
    step, episode, ended = [0] * num_envs, [1] * num_envs, [False] * num_envs
    for t in range(n):
        observation = np.zeros((num_envs, 4, *FRAME), np.uint8)
        observation[:, -1] = (100 * np.arange(num_envs) + t % 99 + 1)[:, None, None]
        terminated, truncated = np.zeros(num_envs, bool), np.zeros(num_envs, bool)
        real = ~np.array(ended)
        for i in range(num_envs):
            if ended[i]:
                step[i], episode[i], ended[i] = 0, episode[i] + 1, False
                continue
            step[i] += 1
            ended[i] = step[i] == lengths[i]
            (truncated if episode[i] % truncated_every == 0 else terminated)[i] = ended[i]
        action, reward = np.arange(num_envs) + t % 5, np.full(num_envs, t / 8)
        yield (observation, action, reward, terminated, truncated), real


def expected_rows(num_envs, stream, stack=4):
    """Row by row, what the layout asks for: zeros before each episode, terminals at time-outs too."""
    rows = [[] for _ in range(num_envs)]
    begins = [True] * num_envs
    for (observation, action, reward, terminated, truncated), real in stream:
        for i in np.flatnonzero(real):
            if begins[i]:
                rows[i] += [(np.zeros(FRAME), 0, 0.0, 0, 0)] * (stack - 1)
            end = terminated[i] or truncated[i]
            rows[i].append((observation[i, -1], action[i], reward[i], int(end), int(truncated[i])))
            begins[i] = end
    return rows


def assert_rows(chunk, rows):
    assert len(chunk["action"]) == len(rows)
    for name, column in zip(STORES, zip(*rows)):
        np.testing.assert_array_equal(chunk[name], np.array(column), err_msg=name)


def writer(folder, num_envs=1, **options):
    return DatasetWriter(str(folder), num_envs, Box(0, 255, (4, *FRAME), np.uint8), 4, "ALE/Pong-v5", **options)


def test_the_layout_of_the_dqn_replay_dataset(tmp_path):
    stream = list(steps(1, [7], 2, 40))
    dataset = writer(tmp_path)
    for row, _ in stream:
        dataset.add(*row)
    dataset.close()
    names = {f"$store$_{name}_ckpt.0.gz" for name in STORES} | {"add_count_ckpt.0.gz", "invalid_range_ckpt.0.gz"}
    names |= {"dataset.json"}
    assert {path.name for path in tmp_path.iterdir()} == names
    kinds = {name: read(tmp_path, f"$store$_{name}", 0).dtype for name in STORES}
    assert kinds == {
        "observation": np.uint8,
        "action": np.int32,
        "reward": np.float32,
        "terminal": np.uint8,
        "truncation": np.uint8,
    }
    chunk, rows = read_chunk(tmp_path, 0), expected_rows(1, stream)[0]
    assert chunk["observation"].shape == (35 + 5 * 3, *FRAME)  # 35 of 40 steps are transitions, of 5 episodes
    assert chunk["terminal"].sum() == 5 and chunk["truncation"].sum() == 2
    assert not chunk["observation"][:3].any() and not chunk["terminal"][:3].any() and chunk["observation"][3].all()
    assert_rows(chunk, rows)
    # As in Dopamine for a full ring of 50 rows: the last, which has no successor, and the first three, without a past
    assert sorted(set(read(tmp_path, "invalid_range", 0).tolist())) == [0, 1, 2, 3, 49]


def test_environments_fill_chunks_of_their_own_and_chunks_roll_over(tmp_path):
    stream = list(steps(2, [5, 9], 3, 60))
    dataset = writer(tmp_path, 2, chunk_rows=16, flush_every=6)
    for row, _ in stream:
        dataset.add(*row)
    dataset.close()
    by_env = [[], []]
    for k in chunks(tmp_path):
        chunk = read_chunk(tmp_path, k)
        frames = chunk["observation"].reshape(len(chunk["action"]), -1).max(1)
        owners = set(frames[frames > 0] // 100)
        assert len(owners) == 1
        by_env[owners.pop()].append(chunk)
    for parts, rows in zip(by_env, expected_rows(2, stream)):
        full, rest = divmod(len(rows), 16)
        assert [len(part["action"]) for part in parts] == [16] * full + [rest] * (rest > 0)
        assert_rows({name: np.concatenate([part[name] for part in parts]) for name in STORES}, rows)


def test_vectors_have_no_rows_of_zeros(tmp_path):
    dataset = DatasetWriter(str(tmp_path), 1, Box(-1, 1, (3,), np.float32), 1, "Vectors-v0")
    observations = np.random.default_rng(0).standard_normal((6, 1, 3)).astype(np.float32)
    ends = [False, False, True, False, False, True]  # the row after an end only resets
    for observation, end in zip(observations, ends):
        dataset.add(observation, np.array([1]), np.array([0.5]), np.array([end]), np.array([False]))
    dataset.close()
    chunk = read_chunk(tmp_path, 0)
    np.testing.assert_array_equal(chunk["observation"], observations[[0, 1, 2, 4, 5], 0])
    assert chunk["terminal"].tolist() == [0, 0, 1, 0, 1]


def test_can_be_read_while_it_grows(tmp_path):
    stream = list(steps(1, [7], 2, 50))
    dataset = writer(tmp_path, flush_every=10)
    for t, (row, _) in enumerate(stream):
        dataset.add(*row)
        if t >= 20:
            rows = expected_rows(1, stream[: t + 1])[0]
            chunk = read_chunk(tmp_path, 0)
            count = len(chunk["action"])
            assert len(rows) - count < 10  # at most flush_every rows are not on the disk
            assert_rows(chunk, rows[:count])
    dataset.close()


@pytest.mark.parametrize("store", STORES)
@pytest.mark.parametrize("torn", [False, True])
def test_a_kill_in_the_middle_of_an_append_loses_only_the_latest_rows(tmp_path, monkeypatch, store, torn):
    """The data of one store is on the disk, whole or in part, its header and whatever comes after it is not."""
    stream = list(steps(1, [7], 2, 40))
    dataset = writer(tmp_path, flush_every=10)
    for row, _ in stream:
        dataset.add(*row)
    before = read_chunk(tmp_path, 0)

    class Killed(BaseException):
        pass

    def die(self):
        if store in self.file.name:
            if torn:
                self.file.truncate(self.file.seek(0, 2) - 7)
            raise Killed

    monkeypatch.setattr(Store, "_write_header", die)
    with pytest.raises(Killed):
        for row, _ in stream:
            dataset.add(*row)
    after = read_chunk(tmp_path, 0)
    assert len(before["action"]) == len(after["action"]) > 30
    for name in STORES:
        np.testing.assert_array_equal(before[name], after[name])

    monkeypatch.undo()
    again = writer(tmp_path, append=True)  # a resumed run writes new chunks, and leaves this one alone
    for row, _ in stream[:5]:
        again.add(*row)
    again.close()
    assert chunks(tmp_path) == [0, 1]
    assert_rows(read_chunk(tmp_path, 1), expected_rows(1, stream[:5])[0])
    for name in STORES:
        np.testing.assert_array_equal(read_chunk(tmp_path, 0)[name], before[name])


@pytest.mark.parametrize("store", STORES)
def test_a_full_disk_ends_the_set_and_not_the_run(tmp_path, monkeypatch, capsys, store):
    stream = list(steps(2, [7, 5], 2, 40))
    dataset = writer(tmp_path, num_envs=2, flush_every=10)
    for row, _ in stream:
        dataset.add(*row)
    before = [read_chunk(tmp_path, k) for k in (0, 1)]

    def full(self, rows):
        if store in self.file.name:
            raise OSError(28, "No space left on device")
        append(self, rows)

    append = Store.append
    monkeypatch.setattr(Store, "append", full)
    for row, _ in stream:
        dataset.add(*row)
    monkeypatch.undo()  # there is room again: the set would have a hole
    for row, _ in stream:
        dataset.add(*row)
    dataset.close()
    assert capsys.readouterr().err.count("No space left") == 1
    assert sum(map(len, dataset.waiting)) == 0
    for k in (0, 1):
        after = read_chunk(tmp_path, k)
        for name in STORES:
            np.testing.assert_array_equal(before[k][name], after[name])


def test_a_folder_with_something_in_it_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError):
        writer(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]
    writer(tmp_path, append=True).close()
    with pytest.raises(OSError):
        writer(tmp_path / "notes.txt")


def test_two_runs_cannot_share_a_folder(tmp_path):
    first = writer(tmp_path / "set")
    with pytest.raises(FileExistsError):
        writer(tmp_path / "set")
    first.close()
    writer(tmp_path / "set", append=True).close()  # a resumed run


@pytest.mark.parametrize("clip_rewards", [False, True])
def test_environments_are_logged_as_they_pass(tmp_path, clip_rewards):
    """Against what a plain environment with the same seed and actions gives."""
    logging, plain = make_envs("Acrobot-v1", 2), make_envs("Acrobot-v1", 2)
    logging = LogDataset(logging, str(tmp_path), 1, "Acrobot-v1", clip_rewards)
    rng, rows, ended = np.random.default_rng(0), [[], []], np.zeros(2, bool)
    (observation, _), (same, _) = plain.reset(seed=3), logging.reset(seed=3)
    np.testing.assert_array_equal(observation, same)
    for t in range(600):  # time-outs at 500
        if t == 550:  # a reset from outside: new episodes
            observation, ended = plain.reset(seed=4)[0], np.zeros(2, bool)
            logging.reset(seed=4)
        action = rng.integers(3, size=2)
        following, reward, terminated, truncated, _ = plain.step(action)
        passed = logging.step(action)
        np.testing.assert_array_equal(passed[0], following)
        np.testing.assert_array_equal(passed[1], reward)
        for i in np.flatnonzero(~ended):
            end = terminated[i] or truncated[i]
            rows[i].append((observation[i].copy(), action[i], reward[i], end, truncated[i]))
        observation, ended = following.copy(), terminated | truncated
    logging.close()
    for k in chunks(tmp_path):
        chunk = read_chunk(tmp_path, k)
        expected = next(own for own in rows if np.array_equal(own[0][0], chunk["observation"][0]))
        assert_rows(chunk, expected)


def test_logged_rewards_are_clipped_and_true_ones_pass(tmp_path):
    class Generous(VectorWrapper):
        def step(self, actions):
            observation, reward, *rest = self.env.step(actions)
            return observation, 5 * reward, *rest

    envs = LogDataset(Generous(make_envs("CartPole-v1", 1)), str(tmp_path), 1, "CartPole-v1", clip_rewards=True)
    envs.reset(seed=1)
    assert [envs.step(np.array([0]))[1][0] for _ in range(3)] == [5, 5, 5]
    envs.close()
    assert read_chunk(tmp_path, 0)["reward"].tolist() == [1, 1, 1]
