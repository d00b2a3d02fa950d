"""Logging experience for offline RL, in the layout of the DQN Replay Dataset (Agarwal et al. 2020)."""

import contextlib
import errno
import gzip
import io
import json
import os
import sys
import time
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock, Timeout
from gymnasium.spaces import Box, Discrete
from gymnasium.vector import VectorEnv, VectorWrapper
from tqdm import tqdm

from utils.offline.read import chunks_in, dataset_env_id, layout_of, store_path

LOCK, NOTE = "dataset.lock", "dataset.json"


class LogDataset(VectorWrapper):
    """Vector environments (NEXT_STEP autoreset) whose transitions are logged by a `DatasetWriter` as they pass.

    Whatever ends the program, short of a kill, the rows still in memory are written.
    """

    def __init__(
        self, envs: VectorEnv, folder: str, stack: int, env_id: str, clip_rewards: bool, append: bool = False
    ) -> None:
        """
        Args:
            clip_rewards: log rewards clipped to [-1, 1]; what `step` returns is never clipped.
            folder, stack, env_id, append: see `DatasetWriter`, which also raises the same errors.

        Raises:
            TypeError: the actions are not discrete; the layout has no place for others.
        """
        super().__init__(envs)
        if not isinstance(envs.single_action_space, Discrete):
            raise TypeError(f"expected discrete actions, got {envs.single_action_space}")
        self.writer = DatasetWriter(folder, envs.num_envs, envs.single_observation_space, stack, env_id, append)
        self.clip_rewards = clip_rewards
        self.close_writer = weakref.finalize(self, self.writer.close)  # called at exit, if not before

    def reset(self, **kwargs) -> tuple[np.ndarray, dict]:
        observation, infos = self.env.reset(**kwargs)
        self.writer.end_episodes()
        self.observation = observation.copy()
        return observation, infos

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        observation, reward, terminated, truncated, infos = self.env.step(actions)
        logged_reward = np.clip(reward, -1, 1) if self.clip_rewards else reward
        self.writer.add(self.observation, actions, logged_reward, terminated, truncated)
        self.observation = observation.copy()
        return observation, reward, terminated, truncated, infos

    def close(self, **kwargs) -> None:
        self.close_writer()
        self.env.close(**kwargs)


class DatasetWriter:
    """Writes `$store$_<name>_ckpt.<k>.gz` and `add_count_ckpt.<k>.gz`, chunk after chunk, during a run.

    A row is one transition: the newest frame of the observation, action, reward, terminal. As in the published dataset,
    `stack` - 1 rows of zeros precede each episode, and a time-out is a terminal like any other; one more store,
    `truncation`, tells the time-outs apart. A chunk holds one environment's rows in order, so that several environments
    fill several chunks side by side. The dataset can be read at any time: every `flush_every` rows or `flush_seconds`,
    it is brought up to date on the disk, and a kill loses only the rows since then. A full disk ends the dataset with a
    warning, and not the run.
    """

    def __init__(
        self,
        folder: str,
        num_envs: int,
        space: Box,
        stack: int,
        env_id: str,
        append: bool = False,
        chunk_rows: int = 1_000_000,
        flush_every: int = 1_000,
        flush_seconds: float = 10.0,
    ) -> None:
        """Makes the folder and locks it until `close` or the end of the process.

        Args:
            space: of one observation.
            stack: frames in its first dimension, the newest last; 1 for vectors and single images.
            env_id: written to `dataset.json`, so that a reader knows where to evaluate.
            append: add chunks to those in the folder, as a resumed run does.

        Raises:
            OSError: the folder cannot be written, or another run is writing to it. Without `append`: it is not empty.
                With `append`: it is a dataset of another environment.
            DatasetError: its `dataset.json` is damaged.
        """
        if not folder:
            raise FileNotFoundError(errno.ENOENT, "expected the name of a folder, got an empty one")
        self.folder, self.stack, self.chunk_rows = Path(folder), stack, chunk_rows
        self.flush_every, self.flush_seconds, self.flushed = flush_every, flush_seconds, time.monotonic()
        self.folder.mkdir(parents=True, exist_ok=True)
        found = {path.name for path in self.folder.iterdir()}
        logged_nothing = LOCK in found and found <= {LOCK, NOTE}  # a run that failed at its start
        if found and not append and not logged_nothing:
            raise FileExistsError(errno.ENOTEMPTY, "it is not empty", folder)
        if append and NOTE in found and dataset_env_id(folder) != env_id:
            raise FileExistsError(errno.EEXIST, f"it is a dataset of {dataset_env_id(folder)}", folder)
        self.lock = FileLock(self.folder / LOCK)
        try:
            self.lock.acquire(blocking=False)
        except Timeout:
            raise BlockingIOError(errno.EBUSY, "another run is writing to it", folder) from None
        if not append or NOTE not in found:
            (self.folder / NOTE).write_text(json.dumps({"env_id": env_id}) + "\n")
        self.layout = layout_of(space, stack)
        self.next_chunk = max(chunks_in(self.folder), default=-1) + 1
        self.chunks: dict[int, tuple[int, dict[str, Store]]] = {}  # each environment's, from its first rows on
        self.waiting = [[] for _ in range(num_envs)]  # rows not yet on the disk
        self.disk_full = False
        self.just_ended = np.zeros(num_envs, dtype=bool)
        self.begins = np.ones(num_envs, dtype=bool)

    def add(
        self,
        observation: np.ndarray,
        action: np.ndarray,
        reward: np.ndarray,
        terminated: np.ndarray,
        truncated: np.ndarray,
    ) -> None:
        """Logs one step of all environments; the step after an episode's end, which only resets, is skipped.

        Args:
            observation: (num_envs, *observation shape), that the actions were chosen for.
        """
        if self.disk_full:
            return
        for i in np.flatnonzero(~self.just_ended):
            frame = observation[i, -1] if self.stack > 1 else observation[i]
            if self.begins[i]:
                self.waiting[i] += [(np.zeros_like(frame), 0, 0.0, False, False)] * (self.stack - 1)
            done = terminated[i] or truncated[i]
            self.waiting[i].append((frame.copy(), action[i], reward[i], done, truncated[i]))
        self.begins = self.just_ended
        self.just_ended = terminated | truncated
        longest = max(len(rows) for rows in self.waiting)
        if longest >= self.flush_every or time.monotonic() - self.flushed >= self.flush_seconds:
            self.flush()

    def end_episodes(self) -> None:
        """The environments have been reset from outside: the rows that follow belong to new episodes."""
        self.flush()
        for i in np.flatnonzero(~self.begins & ~self.just_ended):
            if i in self.chunks:  # only the end of its chunk can tell that the episode does not continue
                self._close_chunk(i)
        self.just_ended = np.zeros_like(self.just_ended)
        self.begins = np.ones_like(self.begins)

    def flush(self) -> None:
        """Brings the files up to date. If the disk is full, the dataset ends here, with a warning."""
        self.flushed = time.monotonic()
        try:
            for i in range(len(self.waiting)):
                self._write(i)
        except OSError as error:
            self.disk_full = True
            for rows in self.waiting:
                rows.clear()
            tqdm.write(f"warning: {self.folder} ends here, it can no longer be written: {error}", file=sys.stderr)

    def _write(self, i: int) -> None:
        while self.waiting[i]:
            if i not in self.chunks:
                self.chunks[i] = self._new_chunk(min(self.chunk_rows, len(self.waiting[i])))
            k, stores = self.chunks[i]
            room = self.chunk_rows - stores["action"].rows
            rows, self.waiting[i] = self.waiting[i][:room], self.waiting[i][room:]
            for store, values in zip(stores.values(), zip(*rows)):
                store.append(np.array(values))
            count = stores["action"].rows
            self._save_count(k, count)
            if count == self.chunk_rows:
                self._close_chunk(i)

    def _new_chunk(self, first_rows: int) -> tuple[int, dict[str, "Store"]]:
        """A chunk's number and its empty stores.

        Its count comes first: the chunk is not read as long as one of its stores is empty.
        """
        k = self.next_chunk
        self.next_chunk += 1
        self._save_count(k, first_rows)
        return k, {n: Store(store_path(self.folder, n, k), *self.layout[n]) for n in self.layout}

    def _save_count(self, k: int, count: int) -> None:
        save_gz(self.folder / f"add_count_ckpt.{k}.gz", np.array(count))
        # Dopamine's invalid_range: the slots around the write position, for a stack and one-step returns
        save_gz(self.folder / f"invalid_range_ckpt.{k}.gz", (count - 1 + np.arange(self.stack + 1)) % count)

    def _close_chunk(self, i: int) -> None:
        for store in self.chunks.pop(i)[1].values():
            with contextlib.suppress(OSError):  # what a full disk did not take
                store.file.close()

    def close(self) -> None:
        """Writes what is waiting, closes the files and unlocks the folder."""
        self.flush()
        for i in list(self.chunks):
            self._close_chunk(i)
        self.lock.release()


class Store:
    """An `.npy` array inside a `.gz`, growing by rows, that can be read at any time.

    A gzip file may have several members. The first holds the npy header, uncompressed and thus always of the same
    length: it is overwritten in place after the rows that it counts.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Makes an empty store of rows of this shape and dtype."""
        self.shape, self.dtype, self.rows = shape, dtype, 0
        with complete(path) as part:
            self.file = open(part, "wb")  # noqa: SIM115, it stays open
            self._write_header()

    def _write_header(self) -> None:
        header = io.BytesIO()
        description = {"descr": np.lib.format.dtype_to_descr(self.dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(header, description | {"shape": (self.rows, *self.shape)})
        self.file.seek(0)
        self.file.write(gzip.compress(header.getvalue(), compresslevel=0, mtime=0))
        self.file.flush()

    def append(self, rows: np.ndarray) -> None:
        """Adds rows (n, *shape)."""
        self.file.seek(0, os.SEEK_END)
        self.file.write(gzip.compress(np.ascontiguousarray(rows, self.dtype).tobytes(), compresslevel=1))
        self.file.flush()
        self.rows += len(rows)
        self._write_header()


def save_gz(path: Path, array: np.ndarray) -> None:
    """Saves a small array as a gzip'd npy, replacing the file at once."""
    with complete(path) as part, gzip.open(part, "wb") as file:
        np.save(file, array)


@contextlib.contextmanager
def complete(path: Path) -> Iterator[Path]:
    """Where to write a file that is to have its name only when it is complete."""
    part = path.with_name(path.name + ".part")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)
