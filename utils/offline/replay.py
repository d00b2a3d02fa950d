"""Replay of a fixed dataset: its n-step transitions, drawn uniformly."""

from typing import NamedTuple

import numpy as np
import torch

from utils.flags import InputError
from utils.replay import Batch, storage_device

TRANSITION_BYTES = 8 + 8 + 4 + 4 + 8  # row, next row, reward, discount, action


class DatasetError(InputError):
    """A dataset that cannot be used. The message is one line that names the flag and the file."""

    def __str__(self) -> str:
        return f"--dataset: {super().__str__()}"


class Rows(NamedTuple):
    """R steps in the order in which they were played, memory-mapped if they come from files."""

    observation: np.ndarray  # (R, *shape of a frame, or of the vector)
    action: np.ndarray  # (R,) integers
    reward: np.ndarray  # (R,) float32
    terminal: np.ndarray  # (R,) 1 where an episode ends: a game over or a time-out
    truncation: np.ndarray  # (R,) 1 where that is known to be a time-out
    first: np.ndarray  # (blocks,) the row at which each block begins; blocks do not continue one another


class Transitions(NamedTuple):
    """All V transitions of a dataset; the names are those of `utils.replay.Batch`."""

    row: np.ndarray  # (V,) int64, of the newest frame of the observation
    next_row: np.ndarray  # (V,) int64, of the next observation, or of the game over
    reward: np.ndarray  # (V,) float32
    discount: np.ndarray  # (V,) float32


def find_transitions(rows: Rows, stack: int, n_step: int, gamma: float) -> Transitions:
    """The n-step transitions of a dataset, by Dopamine's rule: no episode ends among the stack's older frames.

    No observation is stored after the end of a truncated episode or of a block: windows that reach it are shorter, and
    bootstrap from the last observation that is stored.
    """
    done = rows.terminal.astype(bool)
    terminal = done & ~rows.truncation.astype(bool)
    no_next = done.copy()  # rows from which a value would be bootstrapped, but the next observation is not stored
    no_next[np.append(rows.first[1:], len(done)) - 1] = True
    no_next &= ~terminal

    begins = np.append(True, done[:-1])
    begins[rows.first] = True
    number = np.arange(len(done))
    older_rows = number - np.maximum.accumulate(np.where(begins, number, 0))  # of the same episode and block
    row = np.flatnonzero(older_rows >= stack - 1)

    next_row, reward, discount = row.copy(), np.zeros(len(row), np.float32), np.ones(len(row), np.float32)
    running, terminated = np.ones(len(row), dtype=bool), np.zeros(len(row), dtype=bool)
    for _ in range(n_step):
        running &= ~no_next[next_row]
        if not running.any():
            break
        reward += np.where(running, discount * rows.reward[next_row], 0)
        terminated |= running & terminal[next_row]
        running &= ~terminal[next_row]
        discount[running] *= gamma
        next_row += running
    discount[terminated] = 0
    valid = terminated | (next_row > row)
    return Transitions(row[valid], next_row[valid], reward[valid], discount[valid])


class OfflineReplay:
    """A fixed dataset of n-step transitions, on the training device if it fits there, else memory-mapped.

    Every transition is drawn with the same probability. `sample` never makes the host wait for a GPU. With the frames
    left to the disk's cache, the host gathers the next batch while the GPU still works on this one.
    """

    def __init__(self, rows: Rows, stack: int, n_step: int, gamma: float, device: torch.device) -> None:
        """
        Args:
            stack: frames in the first dimension of an observation, the newest last; 1 for vectors.

        Raises:
            DatasetError: there is no complete transition.
        """
        found = find_transitions(rows, stack, n_step, gamma)
        self.count = len(found.row)
        if not self.count:
            raise DatasetError(f"the {len(rows.action)} rows that are kept hold no transition")
        try:
            self.device = storage_device(rows.observation.nbytes + self.count * TRANSITION_BYTES, device)
        except MemoryError:  # mapped files may be larger than memory
            self.device = torch.device("cpu")
        self.out_device = device
        self.frames = torch.from_numpy(rows.observation)
        if self.device.type != "cpu":
            self.frames = torch.empty(self.frames.shape, dtype=self.frames.dtype, device=self.device)
            for frames, mapped in zip(self.frames.split(10_000), torch.from_numpy(rows.observation).split(10_000)):
                frames.copy_(mapped)
        self.row, self.next_row, self.reward, self.discount = (torch.as_tensor(x, device=self.device) for x in found)
        self.action = torch.as_tensor(rows.action[found.row].astype(np.int64), device=self.device)
        self.back = torch.arange(stack - 1, -1, -1, device=self.device)  # stack-1 .. 0

    def __len__(self) -> int:
        """Number of transitions that can be drawn."""
        return self.count

    def sample(self, batch_size: int) -> Batch:
        """Draws `batch_size` transitions, uniformly and with replacement, onto the training device."""
        return self.gather(torch.randint(self.count, (batch_size,), device=self.device))

    def gather(self, index: torch.Tensor) -> Batch:
        """The transitions number `index` (B,) of 0 .. len - 1."""
        batch = Batch(
            self._observation(self.row[index]),
            self.action[index],
            self.reward[index],
            self.discount[index],
            self._observation(self.next_row[index]),
        )
        if self.device == self.out_device:
            return batch
        return Batch(*(x.pin_memory().to(self.out_device, non_blocking=True) for x in batch))

    def _observation(self, row: torch.Tensor) -> torch.Tensor:
        """The observations (B, *observation shape) whose newest frames are in rows `row` (B,)."""
        rows = row[:, None] - self.back  # (B, stack)
        frames = self.frames.index_select(0, rows.flatten())
        frames = frames if frames.dtype == torch.uint8 else frames.float()  # as `utils.replay` stores them
        return frames if len(self.back) == 1 else frames.unflatten(0, rows.shape)
