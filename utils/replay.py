"""Uniform replay of n-step transitions that stores every frame once, on the training device."""

import math
from typing import Literal, NamedTuple

import numpy as np
import psutil
import torch
from gymnasium.spaces import Box, Discrete


class Batch(NamedTuple):
    """B transitions; the target of Q(observation, action) is `reward + discount * bootstrap(next_observation)`."""

    observation: torch.Tensor  # (B, *observation shape)
    action: torch.Tensor  # (B,) int64, or (B, *action shape) float32
    reward: torch.Tensor  # (B,) float32, sum of gamma^k r_k over the m <= n steps up to `next_observation`
    discount: torch.Tensor  # (B,) float32, gamma^m, or 0 if a terminal was reached
    next_observation: torch.Tensor  # (B, *observation shape)


class Replay:
    """A ring of rows; a row holds one step of all environments: the frame seen, the action, and the n-step return.

    A return is added up once, when its window has been played; the stack of an observation is gathered at sampling time
    from the rows before it. Neither crosses the edge of an episode: a frame older than the episode's first is all
    zeros, or equal to that first one. The row that follows an episode's end belongs to the step that resets the
    environment (Gymnasium's NEXT_STEP autoreset): its frame is the episode's last observation, from which a truncated
    episode bootstraps, and no transition starts there.

    Every transition that starts in the last `capacity // num_envs` rows and whose n-step window has been played is
    drawn with the same probability. If the frames are on the training device, `sample` and `add` never make the host
    wait for a GPU, and `sample` can be captured in a CUDA graph: it reads nothing from the host but tensors that are
    changed in place.
    """

    def __init__(
        self,
        capacity: int,
        num_envs: int,
        space: Box,
        action_space: Discrete | Box,
        stack: int,
        n_step: int,
        gamma: float,
        device: torch.device,
        padding: Literal["zero", "reset"] = "zero",
    ) -> None:
        """
        Args:
            capacity: rows over all environments: transitions, and the last observation of each episode.
            space: of one observation; kept as uint8 if it is, else as float32.
            action_space: of one environment; actions are kept as int64 if it is discrete, else as float32.
            stack: frames in the first dimension of an observation, the newest last; 1 for vectors.
            padding: what frames older than the episode's first are, as in Gymnasium's FrameStackObservation: "zero", or
                with "reset" that first frame.

        Raises:
            MemoryError: the frames fit neither on `device` nor in this machine's memory; says how much they need.
        """
        self.rows = max(capacity // num_envs, n_step + 1)
        self.num_envs, self.stack, self.n_step, self.padding = num_envs, stack, n_step, padding
        self.length = self.rows + stack  # so that the oldest row's stack and the newest row's successor are there
        self.frame_channels = space.shape[0] // stack
        frame_shape = (self.frame_channels, *space.shape[1:])
        dtype = torch.uint8 if space.dtype == np.uint8 else torch.float32

        rows_of_envs = (self.length, num_envs)
        nbytes = self.length * num_envs * (math.prod(frame_shape) * dtype.itemsize + ROW_BYTES)
        self.out_device, self.device = device, storage_device(nbytes, device)
        self.frames = torch.empty(*rows_of_envs, *frame_shape, dtype=dtype, device=self.device)
        action_dtype = torch.int64 if isinstance(action_space, Discrete) else torch.float32
        self.action = torch.zeros(*rows_of_envs, *action_space.shape, dtype=action_dtype, device=self.device)
        self.reward = torch.zeros(rows_of_envs, device=self.device)
        self.discount = torch.zeros(rows_of_envs, device=self.device)
        self.ahead = torch.zeros(rows_of_envs, dtype=torch.int32, device=self.device)  # m * num_envs
        self.age = torch.zeros(rows_of_envs, dtype=torch.uint8, device=self.device)  # older frames in the stack

        # The transitions that may be drawn, oldest first: a queue of row * num_envs + env, `count` from `first` on.
        self.starts = torch.zeros(self.rows * num_envs, dtype=torch.int64, device=self.device)
        self.first = torch.zeros((), dtype=torch.int64, device=self.device)
        self.count = torch.zeros((), dtype=torch.int64, device=self.device)

        # The host's own copy of what decides the queue, so that it never has to ask the device.
        self.added = 0  # rows written so far
        self.queue_first = self.queue_count = 0
        self.is_start = np.zeros(rows_of_envs, dtype=bool)
        self.just_ended = np.zeros(num_envs, dtype=bool)
        self.now_age = np.zeros(num_envs, dtype=np.uint8)
        self.window = np.zeros((3, n_step, num_envs), dtype=np.float32)  # reward, terminal, end of the last n rows
        self.discounts = np.float32(gamma ** np.arange(n_step + 1))  # gamma^0 .. gamma^n

        self.back = torch.arange(stack - 1, -1, -1, device=self.device)  # stack-1 .. 0

    def __len__(self) -> int:
        """Number of transitions that can be drawn."""
        return self.queue_count

    def add(
        self,
        observation: torch.Tensor,
        action: np.ndarray,
        reward: np.ndarray,
        terminal: np.ndarray,
        end: np.ndarray,
        next_observation: torch.Tensor,
    ) -> tuple[np.ndarray, np.ndarray]:
        """Stores one step of all environments.

        Args:
            observation, next_observation: (num_envs, *observation shape), on any device.
            action: (num_envs,), or (num_envs, *action shape).
            reward: (num_envs,).
            terminal: (num_envs,) bool, the value ends here (a game over; with the old protocol, a lost life too).
            end: (num_envs,) bool, the environment will be reset: terminated or truncated.

        Returns:
            The transitions that can be drawn from now on, and those that cannot any more: int64, row * num_envs + env.
        """
        row, following = self.added % self.length, (self.added + 1) % self.length
        self.frames[row] = observation[:, -self.frame_channels :]
        self.frames[following] = next_observation[:, -self.frame_channels :]
        self._write(self.action, row, action)
        self.is_start[row] = ~self.just_ended
        self.now_age = np.where(self.just_ended, 0, np.minimum(self.now_age + 1, self.stack - 1)).astype(np.uint8)
        self._write(self.age, following, self.now_age)
        self.just_ended = np.array(end)
        return self._advance(reward, terminal, end)

    def _advance(self, reward: np.ndarray, terminal: np.ndarray, end: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Ends a row: the one whose n-step window is now complete gets its return and enters the queue, and the one
        that is now too old leaves it.
        """
        self.added += 1
        self.window = np.concatenate((self.window[:, 1:], np.float32([[reward], [terminal], [end]])), axis=1)
        reward, terminal, end = self.window  # (n, num_envs) each
        stop = np.maximum(terminal, end)
        played = stop.cumsum(axis=0) == stop  # (n, num_envs): no stop before this step
        steps = played.sum(axis=0)  # m
        row = (self.added - self.n_step) % self.length  # a negative one is written again before it is ever drawn
        self._write(self.reward, row, (reward * self.discounts[:-1, None] * played).sum(axis=0))
        self._write(self.discount, row, self.discounts[steps] * (1 - (terminal * played).max(axis=0)))
        self._write(self.ahead, row, steps * self.num_envs)

        entered, dropped = self._starts_in(self.added - self.n_step), self._starts_in(self.added - self.rows - 1)
        place = (self.queue_first + self.queue_count + np.arange(len(entered))) % len(self.starts)
        self._write(self.starts, place, entered)
        self.queue_first = (self.queue_first + len(dropped)) % len(self.starts)
        self.queue_count += len(entered) - len(dropped)
        self.first.fill_(self.queue_first)
        self.count.fill_(self.queue_count)
        return entered, dropped

    def _starts_in(self, row: int) -> np.ndarray:
        """The transitions (int64) that start in the `row`-th row ever added; none if there is no such row."""
        place = row % self.length
        return place * self.num_envs + (self.is_start[place] & (row >= 0)).nonzero()[0]

    def sample(self, batch_size: int) -> Batch:
        """Draws `batch_size` transitions, uniformly and with replacement, onto the training device."""
        # float64: float32 has 2^24 values, too few to be even over a million transitions
        draw = (torch.rand(batch_size, dtype=torch.float64, device=self.device) * self.count).long()
        return self.gather(self.starts[(self.first + draw) % len(self.starts)])

    def gather(self, start: torch.Tensor) -> Batch:
        """The transitions that start at `start` (B,), each row * num_envs + env."""
        following = (start + self.ahead.take(start)) % (self.length * self.num_envs)
        batch = Batch(
            self._observation(start),
            self.action.flatten(0, 1).index_select(0, start),
            self.reward.take(start),
            self.discount.take(start),
            self._observation(following),
        )
        if self.device == self.out_device:
            return batch
        return Batch(*(x.pin_memory().to(self.out_device, non_blocking=True) for x in batch))

    def _observation(self, place: torch.Tensor) -> torch.Tensor:
        """The observations (B, *observation shape) whose newest frames are at `place` (B,): row * num_envs + env."""
        frames = self.frames.flatten(0, 1)
        if self.stack == 1:
            return frames.index_select(0, place)
        age = self.age.take(place)[:, None]  # (B, 1)
        back = self.back.minimum(age) if self.padding == "reset" else self.back
        frames = frames[(place[:, None] - self.num_envs * back) % len(frames)]  # (B, stack, channels, ...)
        if self.padding == "zero":
            before_episode = self.back > age  # (B, stack)
            frames.masked_fill_(before_episode.view(*before_episode.shape, *[1] * (frames.ndim - 2)), 0)
        return frames.flatten(1, 2)

    def _write(self, ring: torch.Tensor, where: int | np.ndarray, values: np.ndarray) -> None:
        """ring[where] = values, without making the host wait."""
        if self.device.type == "cpu":
            ring.numpy()[where] = values  # a tenth of the time that indexing a tensor takes
        else:
            where = where if isinstance(where, int) else torch.as_tensor(where).to(self.device, non_blocking=True)
            ring[where] = torch.as_tensor(values).to(self.device, non_blocking=True)

    def end_episodes(self) -> tuple[np.ndarray, np.ndarray]:
        """Ends the running episodes as truncated: the environments are about to be reset from outside.

        Returns:
            As `add`.
        """
        self.just_ended[:] = False
        self.now_age[:] = 0
        if not self.added:
            return self._starts_in(-1), self._starts_in(-1)  # none
        # the last observation keeps a row of its own, as after any end
        self.window[2, -1] = True
        self.is_start[self.added % self.length] = False
        self.age[(self.added + 1) % self.length] = 0
        zeros = np.zeros(self.num_envs)
        return self._advance(zeros, zeros, zeros)

    def state_dict(self) -> dict:
        """For a checkpoint: the rows written so far (on a CPU, sharing the replay's memory) and the host's numbers."""
        rows = min(self.added + 1, self.length)
        rings = {name: leading_rows(getattr(self, name), rows) for name in RINGS}
        queue = leading_rows(self.starts, min(self.queue_first + self.queue_count, len(self.starts)))
        host = {name: torch.from_numpy(getattr(self, name)) for name in HOST}
        counters = {name: getattr(self, name) for name in COUNTERS}
        return rings | host | counters | {"starts": queue, "discounts": torch.from_numpy(self.discounts)}

    def load_state_dict(self, state: dict) -> None:
        """Restores what `state_dict` gave. A ring that had not wrapped around yet fits into a longer one; one that had
        keeps its length, as the replay of a run that is made longer does.

        Raises:
            ValueError: it comes from a larger replay, or another kind of environment, n or discount.
        """
        length = len(state["is_start"])
        full = state["added"] >= min(length - self.stack, self.rows)
        if state["frames"].shape[1:] != self.frames.shape[1:] or (full and length > self.length):
            raise ValueError("its replay has another size")
        if not np.array_equal(state["discounts"], self.discounts):  # they are in every stored return
            raise ValueError("its replay has other returns")
        if full and length < self.length:
            self.length, self.rows = length, length - self.stack
            for name in (*RINGS, "is_start"):
                setattr(self, name, getattr(self, name)[:length])
            self.starts = self.starts[: self.rows * self.num_envs]
        for name in (*RINGS, "starts"):
            getattr(self, name)[: len(state[name])] = state[name].to(self.device)
        for name in HOST:
            saved = state[name].numpy()[: self.length]
            getattr(self, name)[: len(saved)] = saved
        for name in COUNTERS:
            setattr(self, name, state[name])
        self.first.fill_(self.queue_first)
        self.count.fill_(self.queue_count)


ROW_BYTES = 8 + 4 + 4 + 4 + 1 + 8 + 1  # action, reward, discount, ahead, age, place in the queue, host's is_start
RINGS = ("frames", "action", "reward", "discount", "ahead", "age")
HOST = ("is_start", "just_ended", "now_age", "window")
COUNTERS = ("added", "queue_first", "queue_count")


def leading_rows(tensor: torch.Tensor, rows: int) -> torch.Tensor:
    """The first rows on the CPU, in a storage of just that size: saving a slice would save the whole tensor."""
    return tensor[:rows].cpu() if tensor.is_cuda else torch.from_numpy(tensor[:rows].numpy())


def storage_device(nbytes: int, device: torch.device) -> torch.device:
    """`device` if `nbytes` fit there with a fifth of its free memory to spare, else the CPU.

    Raises:
        MemoryError: they fit in neither.
    """
    if device.type == "cuda":
        if nbytes < 0.8 * torch.cuda.mem_get_info(device)[0]:
            return device
        size = f"{nbytes / 1e9:.1f} GB"
        print(f"note: the replay ({size}) does not fit on the GPU: it is kept in host memory, without CUDA graphs")
    available = psutil.virtual_memory().available
    if nbytes > available:
        raise MemoryError(f"needs {nbytes / 1e9:.1f} GB of memory, and {available / 1e9:.1f} GB are free")
    return torch.device("cpu")


def capacity_that_fits(capacity: int, num_envs: int, space: Box, stack: int, device: torch.device) -> int:
    """`capacity`, or as many rows as fit into 80 % of the free memory of `device` or of this machine; then says so.

    Args:
        num_envs, space, stack: as for `Replay`.
    """
    row_bytes = math.prod(space.shape) // stack * (1 if space.dtype == np.uint8 else 4) + ROW_BYTES
    available = psutil.virtual_memory().available
    if device.type == "cuda":
        available = max(available, torch.cuda.mem_get_info(device)[0])
    fits = int(0.8 * available / row_bytes) - (stack + 1) * num_envs  # see `Replay.length`
    if capacity > fits:
        needs, takes = capacity * row_bytes / 1e9, fits * row_bytes / 1e9
        print(f"note: the replay has {fits:,} rows ({takes:.1f} GB): {capacity:,} need {needs:.1f} GB of memory")
    return min(capacity, fits)


def to_device(observation: np.ndarray, device: torch.device) -> torch.Tensor:
    """An observation as a tensor on `device`: uint8 stays uint8, all else becomes float32."""
    dtype = torch.uint8 if observation.dtype == np.uint8 else torch.float32
    return torch.as_tensor(observation, dtype=dtype).to(device, non_blocking=True)
