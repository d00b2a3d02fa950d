"""The one reader of a run's csv files. Lines that cannot be read, as a kill may leave the last one, are skipped."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np


def read_lines(path: Path, columns: int) -> Iterator[list[str]]:
    """The complete lines of a csv file, without its header; none if there is no such file."""
    if path.exists():
        for line in path.read_text(errors="replace").split("\n")[1:-1]:
            cells = line.split(",")
            if len(cells) == columns:
                yield cells


def read_numbers(path: Path, columns: int) -> np.ndarray:
    """The rows (n, columns) float64 of a csv file of numbers."""
    rows = []
    for cells in read_lines(path, columns):
        try:
            rows.append([float(cell) for cell in cells])
        except ValueError:
            continue
    return np.array(rows, dtype=np.float64).reshape(-1, columns)


def read_episodes(folder: Path) -> np.ndarray:
    """Training episodes of a run: rows (n, 3) of the step at which they ended, return and length."""
    return read_numbers(folder / "episodes.csv", 3)


def read_evaluations(folder: Path) -> np.ndarray:
    """Evaluation episodes of a run: rows (n, 4) of step, number of the episode, return and length."""
    return read_numbers(folder / "evaluations.csv", 4)


def read_scalars(folder: Path) -> dict[str, np.ndarray]:
    """Logged scalars of a run: for each tag, rows (n, 2) of step and value."""
    scalars: dict[str, list] = {}
    for step, _, tag, value in read_lines(folder / "scalars.csv", 4):
        try:
            scalars.setdefault(tag, []).append((float(step), float(value)))
        except ValueError:
            continue
    return {tag: np.array(rows, dtype=np.float64).reshape(-1, 2) for tag, rows in scalars.items()}


def last_row(path: Path) -> list[str] | None:
    """The cells of the last complete row of a csv file, read from its end; None if there is none."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - 4096))
            lines = file.read().decode(errors="replace").split("\n")[:-1]
    except OSError:
        return None
    return lines[-1].split(",") if lines and lines[-1][:1].isdigit() else None


def training_seconds(folder: Path) -> float:
    """Wall-clock seconds of training up to the last logged scalar, over all resumes; nan if nothing was logged."""
    seconds = [cells[1] for cells in read_lines(folder / "scalars.csv", 4)]
    try:
        return float(seconds[-1])
    except (IndexError, ValueError):
        return float("nan")
