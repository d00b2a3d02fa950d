"""Logging experience for offline RL, in the layout of the DQN Replay Dataset (Agarwal et al. 2020)."""

import contextlib
import errno
import gzip
import io
import json
import os
import sys
from pathlib import Path

import numpy as np
from gymnasium.spaces import Box
from gymnasium.vector import VectorEnv, VectorWrapper

from utils.offline.read import chunks_in, layout_of, store_path


class Store:
    """An `.npy` array inside a `.gz`, growing by rows, that can be read at any time.

    A gzip file may have several members. The first holds the npy header, uncompressed and thus always of the same
    length: it is overwritten in place after the rows that it counts.
    """

    def __init__(self, path: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        """Makes an empty store of rows of this shape and dtype."""
        self.shape, self.dtype, self.rows = shape, dtype, 0
        self.file = path.open("xb")
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


class DatasetWriter:
    """Writes `$store$_<name>_ckpt.<k>.gz` and `add_count_ckpt.<k>.gz`, chunk after chunk, during a run.

    A row is one transition: the newest frame of the observation, action, reward, terminal. As in the published dataset,
    `stack` - 1 rows of zeros precede each episode, and a time-out is a terminal like any other; one more store,
    `truncation`, tells the time-outs apart. A chunk holds one environment's rows in order, so that several environments
    fill several chunks side by side. Every `flush_every` rows a chunk is brought up to date on the disk. A full disk
    ends the dataset with a warning, and not the run.
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
    ) -> None:
        """Makes the folder and claims it with `dataset.json`; the other files come with the first rows.

        Args:
            space: of one observation.
            stack: frames in its first dimension, the newest last; 1 for vectors.
            env_id: written to `dataset.json`, so that a reader knows where to evaluate.
            append: add chunks to those in the folder, as a resumed run does.

        Raises:
            OSError: the folder cannot be written, or is not empty and `append` is off.
        """
        self.folder, self.stack, self.chunk_rows, self.flush_every = Path(folder), stack, chunk_rows, flush_every
        self.folder.mkdir(parents=True, exist_ok=True)
        if not append and any(self.folder.iterdir()):
            raise FileExistsError(errno.ENOTEMPTY, "it is not empty", folder)
        if not (append and (self.folder / "dataset.json").exists()):
            with (self.folder / "dataset.json").open("x") as file:  # of two runs that start at once, one succeeds
                file.write(json.dumps({"env_id": env_id}) + "\n")
        self.layout = layout_of(space, stack)
        self.next_chunk = max(chunks_in(self.folder), default=-1) + 1
        self.chunks: dict[int, tuple[int, dict[str, Store]]] = {}  # each environment's, from its first rows on
        self.waiting = [[] for _ in range(num_envs)]  # rows not yet on the disk
        self.lost = False
        self.just_ended = np.zeros(num_envs, dtype=bool)
        self.begins = np.ones(num_envs, dtype=bool)

    def _new_chunk(self) -> tuple[int, dict[str, Store]]:
        k, self.next_chunk = self.next_chunk, self.next_chunk + 1
        stores = {n: Store(store_path(self.folder, n, k), *self.layout[n]) for n in self.layout}
        return k, stores

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
            observation: (num_envs, *observation shape).
        """
        for i in np.flatnonzero(~self.just_ended):
            frame = observation[i, -1] if self.stack > 1 else observation[i]
            if self.begins[i]:
                self.waiting[i] += [(np.zeros_like(frame), 0, 0.0, False, False)] * (self.stack - 1)
            end = terminated[i] or truncated[i]
            self.waiting[i].append((frame.copy(), action[i], reward[i], end, truncated[i]))
            self.begins[i] = False
            if len(self.waiting[i]) >= self.flush_every:
                self._flush(i)
        self.begins |= self.just_ended
        self.just_ended = terminated | truncated

    def end_episodes(self) -> None:
        """The environments are reset from outside: the rows that follow belong to new episodes."""
        self.just_ended[:] = False
        self.begins[:] = True

    def _flush(self, i: int) -> None:
        try:
            if not self.lost:
                self._write(i)
        except OSError as error:
            self.lost = True
            print(f"\nwarning: {self.folder} ends here, it cannot be written any more: {error}", file=sys.stderr)
        if self.lost:
            self.waiting[i].clear()

    def _write(self, i: int) -> None:
        while self.waiting[i]:
            if i not in self.chunks:
                self.chunks[i] = self._new_chunk()
            k, stores = self.chunks[i]
            room = self.chunk_rows - stores["action"].rows
            rows, self.waiting[i] = self.waiting[i][:room], self.waiting[i][room:]
            for store, values in zip(stores.values(), zip(*rows)):
                store.append(np.array(values))
            count = stores["action"].rows
            save_gz(self.folder / f"add_count_ckpt.{k}.gz", np.array(count))
            # Dopamine's invalid_range: the slots around the write position, for a stack and one-step returns
            save_gz(self.folder / f"invalid_range_ckpt.{k}.gz", (count - 1 + np.arange(self.stack + 1)) % count)
            if count == self.chunk_rows:
                self._close_chunk(i)

    def _close_chunk(self, i: int) -> None:
        for store in self.chunks.pop(i)[1].values():
            with contextlib.suppress(OSError):  # what a full disk did not take
                store.file.close()

    def close(self) -> None:
        """Writes what is waiting and closes the files."""
        for i in range(len(self.waiting)):
            self._flush(i)
        for i in list(self.chunks):
            self._close_chunk(i)


class LogDataset(VectorWrapper):
    """Vector environments (NEXT_STEP autoreset) whose transitions are logged by a `DatasetWriter` as they pass."""

    def __init__(
        self, envs: VectorEnv, folder: str, stack: int, env_id: str, clip_rewards: bool, append: bool = False
    ) -> None:
        """
        Args:
            clip_rewards: log rewards clipped to [-1, 1]; what `step` returns is never clipped.
            folder, stack, env_id, append: see `DatasetWriter`, which also raises the same errors.
        """
        super().__init__(envs)
        self.writer = DatasetWriter(folder, envs.num_envs, envs.single_observation_space, stack, env_id, append)
        self.clip_rewards = clip_rewards

    def reset(self, **kwargs) -> tuple[np.ndarray, dict]:
        self.observation, infos = self.env.reset(**kwargs)
        self.writer.end_episodes()
        return self.observation, infos

    def step(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, dict]:
        before = self.observation.copy()
        self.observation, reward, terminated, truncated, infos = self.env.step(actions)
        logged = np.clip(reward, -1, 1) if self.clip_rewards else reward
        self.writer.add(before, actions, logged, terminated, truncated)
        return self.observation, reward, terminated, truncated, infos

    def close(self, **kwargs) -> None:
        self.writer.close()
        self.env.close(**kwargs)


def save_gz(path: Path, array: np.ndarray) -> None:
    """Saves a small array as a gzip'd npy, replacing the file at once."""
    beside = path.with_name(path.name + ".part")
    with gzip.open(beside, "wb") as file:
        np.save(file, array)
    os.replace(beside, path)
