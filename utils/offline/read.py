"""Reading logged experience: the DQN Replay Dataset (Agarwal et al. 2020), datasets in its layout, Minari's datasets.

A dataset in that layout is a folder of chunks `k`. Each has gzip'd npy stores `$store$_<name>_ckpt.<k>.gz`, one row per
step of one environment: single frame, action, reward, terminal; and `add_count_ckpt.<k>.gz`, the rows ever written to
the ring buffer that the chunk is a copy of. What follows from how these copies were made (google-research/batch_rl):

- The row at the write position, most often the last one, is stale: it is left from the round before.
- Chunks do not continue one another, and any number may be missing.
- Rows of zeros precede each episode, and are not steps: they complete the stacks of its first frames.
- A terminal is a game over or a time-out. Datasets of `utils/offline/write.py` have one more store, `truncation`, that
  tells them apart.
"""

import errno
import gzip
import hashlib
import json
import os
import re
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from filelock import FileLock
from gymnasium.spaces import Box
from tqdm import tqdm

from utils.flags import first_line
from utils.offline.replay import DatasetError, Rows

PIECE = 1 << 22  # bytes that are decompressed at a time, a multiple of every dtype's size


def layout_of(space: Box, stack: int) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """Each store of a dataset, with the shape and the dtype of its rows.

    Args:
        space: of one observation.
        stack: frames in its first dimension, the newest last; 1 for vectors.
    """
    return {
        "observation": (space.shape[1:] if stack > 1 else space.shape, space.dtype),
        "action": ((), np.dtype(np.int32)),
        "reward": ((), np.dtype(np.float32)),
        "terminal": ((), np.dtype(np.uint8)),
        "truncation": ((), np.dtype(np.uint8)),
    }


def store_path(folder: Path, name: str, k: int) -> Path:
    return folder / f"$store$_{name}_ckpt.{k}.gz"


def chunks_in(folder: Path) -> list[int]:
    """The numbers of the chunks in `folder`, in order."""
    names = "\n".join(path.name for path in folder.iterdir())
    return sorted({int(k) for k in re.findall(r"^\$store\$_\w+_ckpt\.(\d+)\.gz$", names, re.M)})


def dataset_env_id(source: str) -> str | None:
    """The environment that a dataset names: in Minari's metadata, `dataset.json`, or the path of the published ones."""
    if source.startswith("minari:"):
        spec = load_minari(source).env_spec
        return spec.id if spec else None
    if not Path(source).is_dir():
        raise DatasetError(f"{source} is not a folder")
    note = Path(source) / "dataset.json"
    if note.exists():
        try:
            env_id = json.loads(note.read_text())["env_id"]
        except (ValueError, KeyError, TypeError):
            env_id = None
        if not isinstance(env_id, str):
            raise DatasetError(f"{note} is damaged: it names no env_id")
        return env_id
    game = re.search(r"/(\w+)/\d+/replay_logs$", str(Path(source).resolve()))
    return f"ALE/{game[1]}-v5" if game else None


def read_dataset(
    source: str, space: Box, stack: int, fraction: float, seed: int | None, cache_dir: str | None = None
) -> Rows:
    """The first part of every chunk, or a random block of it. Files are unpacked to a cache that later runs find.

    A cache consists of plain npy files, as large as what is kept. It is made in one pass over the chunks that holds a
    few MB in memory, is renamed into place when complete, and is made again when a file of the dataset has changed.

    Args:
        source: a folder, or `minari:<id>`.
        space: of one observation.
        stack: frames in its first dimension; 1 for vectors and single images.
        fraction: fraction of each chunk's rows, in (0, 1].
        seed: seed of the positions of the random blocks; None takes the first rows.
        cache_dir: folder for the caches of any number of datasets. None is `<source>/cache`, or if that cannot be
            written, the user's cache directory.

    Raises:
        DatasetError: the dataset is missing, damaged, of another kind of environment, or holds invalid values.
    """
    layout = layout_of(space, stack)
    if source.startswith("minari:"):
        return read_minari(source, *layout["observation"], fraction, seed)
    folder = Path(source)
    if not folder.is_dir():
        raise DatasetError(f"{folder} is not a folder")
    if not chunks_in(folder):
        raise DatasetError(f"{folder} holds no $store$_observation_ckpt.0.gz or the like")
    name = f"{fraction:g}" if seed is None else f"{fraction:g}-seed{seed}"
    caches = [root / name for root in cache_roots(folder, cache_dir)]
    files = [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in sorted(folder.glob("*.gz"))]
    made_from = json.dumps([files, [(shape, dtype.str) for shape, dtype in layout.values()]])
    for cache in caches:
        if is_made_from(cache, made_from):
            return open_cache(cache)
    for cache in caches:
        try:
            cache.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(cache.parent / f"{name}.lock"):  # several runs may start at once
                if not is_made_from(cache, made_from):
                    prepare(folder, cache, layout, fraction, seed, made_from)
        except OSError as error:
            if cache == caches[-1] or error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DatasetError(f"the cache {cache} cannot be written: {error.strerror}") from error
            print(f"note: {cache.parent} cannot be written ({error.strerror}), the cache is in {caches[-1].parent}")
        else:
            return open_cache(cache)


def cache_roots(folder: Path, cache_dir: str | None) -> list[Path]:
    """Where the caches of a dataset may be, the preferred place first."""
    path = folder.resolve()
    name = f"{path.name}-{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if cache_dir:
        return [Path(cache_dir).expanduser() / name]
    user = os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache")
    return [folder / "cache", Path(user) / "sparse-rl" / name]


def is_made_from(cache: Path, made_from: str) -> bool:
    """Whether a cache is complete and up to date."""
    note = cache / "made_from.json"
    return note.exists() and note.read_text() == made_from


def open_cache(cache: Path) -> Rows:
    try:
        # Copy-on-write: torch wants memory that it may write to, though nobody does
        return Rows(*(np.load(cache / f"{field}.npy", mmap_mode="c") for field in Rows._fields))
    except (OSError, ValueError, EOFError):
        raise DatasetError(f"{cache} is damaged; delete it, and it is made again") from None


def prepare(folder: Path, cache: Path, layout: dict, fraction: float, seed: int | None, made_from: str) -> None:
    """Writes the kept rows of every store to one npy file in `cache`, and `made_from` beside them."""
    chunks = chunks_in(folder)
    given = [n for n in layout if n != "truncation" or any(folder.glob("$store$_truncation_ckpt.*.gz"))]
    rng = np.random.default_rng(seed)
    blocks = []  # (chunk, first row, rows)
    for k in chunks:
        whole = whole_rows(folder, k, {name: layout[name] for name in given})
        if whole:
            blocks.append((k, *block(whole, fraction, rng if seed is not None else None)))
    total = sum(rows for _, _, rows in blocks)
    if not total:
        raise DatasetError(f"{folder} holds no complete step")

    beside = cache.with_name(cache.name + ".part")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        with tqdm(total=total, unit="rows", desc=f"unpacking to {cache}", delay=5) as bar:
            unpack(folder, beside, layout, given, blocks, bar)
        (beside / "made_from.json").write_text(made_from)
        shutil.rmtree(cache, ignore_errors=True)
        beside.rename(cache)
    finally:
        shutil.rmtree(beside, ignore_errors=True)  # a full disk gets its space back


def unpack(folder: Path, out_folder: Path, layout: dict, given: list[str], blocks: list, bar: tqdm) -> None:
    """Writes rows of every store, those in `blocks` of (chunk, first row, rows), to one npy file each."""
    for name, (shape, dtype) in layout.items():
        with (out_folder / f"{name}.npy").open("wb") as out:
            header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
            np.lib.format.write_array_header_1_0(out, header | {"shape": (bar.total, *shape)})
            for k, start, rows in blocks:
                path = store_path(folder, name, k)
                for piece in read_rows(path, start, rows) if name in given else [bytes(rows)]:
                    check_values(name, np.frombuffer(piece, dtype), str(path))
                    out.write(piece)
                if name == "observation":  # the other stores are small
                    bar.update(rows)
    np.save(out_folder / "first.npy", np.cumsum([0] + [rows for _, _, rows in blocks[:-1]]))


FINITE = "finite numbers", np.isfinite
FLAGS = "0 and 1", lambda values: values <= 1
VALID = {
    "observation": FINITE,
    "action": ("integers of at least 0", lambda values: values >= 0),
    "reward": FINITE,
    "terminal": FLAGS,
    "truncation": FLAGS,
}


def check_values(name: str, values: np.ndarray, source: str) -> None:
    """Raises a DatasetError that names the `source` if a store has values without a meaning."""
    if name == "observation" and values.dtype.kind in "ub":
        return  # pixels: many, and all valid
    expected, is_valid = VALID[name]
    valid = is_valid(values)
    if not valid.all():
        raise DatasetError(f"{source} holds {values[~valid][0]}, expected {expected}")


def block(rows: int, fraction: float, rng: np.random.Generator | None) -> tuple[int, int]:
    """First row and number of rows of the part that is kept: from the beginning, or from anywhere with `rng`."""
    kept = max(1, round(fraction * rows))
    return int(rng.integers(rows - kept + 1)) if rng else 0, kept


def whole_rows(folder: Path, k: int, layout: dict) -> int:
    """How many rows of chunk `k`, from its first on, are complete and belong to its last round.

    Raises:
        DatasetError: a store is missing, damaged, or of another shape or type.
    """
    lengths = []
    for name, (shape, dtype) in layout.items():
        path = store_path(folder, name, k)
        with open_store(path) as (_, (rows, *found_shape), found_dtype):
            lengths.append(rows)
        if (tuple(found_shape), found_dtype) != (shape, dtype):
            found = f"rows of shape {tuple(found_shape)} and type {found_dtype}"
            raise DatasetError(f"{path} holds {found}; this environment takes {shape} and {dtype}")
        if rows == 0:
            return 0  # a log that was killed before the chunk's first rows, perhaps before it had all of its stores
    with naming(folder / f"add_count_ckpt.{k}.gz") as path, gzip.open(path) as file:
        count = int(np.load(file, allow_pickle=False).item())
        if count < 1:
            raise ValueError(f"it counts {count} rows")
    if len(set(lengths)) == 1:
        return count % lengths[0] or lengths[0]
    return count  # a log that was killed between two stores


@contextmanager
def naming(path: Path) -> Iterator[Path]:
    """Turns whatever goes wrong while `path` is read into a DatasetError that names it."""
    try:
        yield path
    except FileNotFoundError:
        raise DatasetError(f"{path} is missing") from None
    except (EOFError, zlib.error, gzip.BadGzipFile, ValueError) as error:
        raise DatasetError(f"{path} is truncated or damaged: {error}") from None
    except OSError as error:
        raise DatasetError(f"{path} cannot be read: {error.strerror}") from None


@contextmanager
def open_store(path: Path) -> Iterator[tuple[gzip.GzipFile, tuple[int, ...], np.dtype]]:
    """A store at its first row, the shape of all its rows together, and their type."""
    with naming(path), gzip.open(path) as file:
        version = np.lib.format.read_magic(file)
        read = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
        if version not in read:
            raise ValueError(f"npy version {version}")
        shape, fortran_order, dtype = read[version](file)
        if not shape or (fortran_order and len(shape) > 1):
            raise ValueError(f"no rows in an array of shape {shape}")
        yield file, shape, dtype


def read_rows(path: Path, start: int, rows: int) -> Iterator[bytes]:
    """Rows `start` to `start + rows` of a store, in pieces of a few MB."""
    with open_store(path) as (file, (_, *shape), dtype):
        row = int(np.prod(shape, dtype=int)) * dtype.itemsize
        skip, left = start * row, rows * row
        while left:
            piece = file.read(min(PIECE, skip or left))
            if len(piece) < min(PIECE, skip or left):
                raise EOFError("it ends before its last row")
            if skip:
                skip -= len(piece)
            else:
                left -= len(piece)
                yield piece


def load_minari(source: str):
    """A Minari dataset, downloaded if this machine does not have it."""
    try:
        import minari
    except ImportError:
        raise DatasetError(f'{source} needs Minari; pip install "minari[hdf5,hf]"') from None
    try:
        return minari.load_dataset(source.removeprefix("minari:"), download=True)
    except Exception as error:  # network, unknown id, missing extras, other formats: its own errors are many
        raise DatasetError(f"{source} cannot be loaded: {first_line(error)}") from error


def read_minari(source: str, shape: tuple[int, ...], dtype: np.dtype, fraction: float, seed: int | None) -> Rows:
    """A Minari dataset in memory. Time-outs have one more row, with the observation from which they bootstrap."""
    parts = []
    for episode in load_minari(source).iterate_episodes():
        observation, action = np.asarray(episode.observations), np.asarray(episode.actions)
        if observation.shape[1:] != shape or action.ndim != 1 or action.dtype.kind not in "iu":
            found = f"observations {observation.shape[1:]} and actions {action.shape[1:]} of type {action.dtype}"
            raise DatasetError(f"{source} holds {found}; this environment takes {shape} and integers")
        terminated = bool(episode.terminations[-1])
        rows = len(action) + (not terminated)
        last = np.arange(rows) == rows - 1
        reward = np.append(episode.rewards, 0.0)[:rows].astype(np.float32)
        truncation = last & (not terminated)
        parts.append((observation[:rows].astype(dtype), np.append(action, 0)[:rows], reward, last, truncation))
    if not parts:
        raise DatasetError(f"{source} holds no episode")
    columns = [np.concatenate(column) for column in zip(*parts)]
    for name, column in zip(VALID, columns):
        check_values(name, column, f"{source}, {name}:")
    start, rows = block(len(columns[0]), fraction, None if seed is None else np.random.default_rng(seed))
    return Rows(*(column[start : start + rows] for column in columns), first=np.zeros(1, dtype=np.int64))
