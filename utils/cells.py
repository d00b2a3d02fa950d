"""The cells of a grid of runs: the flags and the folder of each, and how far it has come, read from the disk alone."""

import contextlib
import fcntl
import io
import itertools
import json
import re
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import IO, Literal, NamedTuple, get_origin, get_type_hints

from utils.files import write_atomically
from utils.flags import RunFlags, fail, parse_args
from utils.records import last_row

STOPPED = {0, 129, 130, 143, -1, -2, -15}  # exit codes of stopped runs; negative: before their signal handlers were set
State = Literal["done", "running", "failed", "stopped", "waiting"]
Axes = dict[str, list[list[str]]]  # for each flag its settings, as words of the command line: [["--width", "1"], ...]


class Cell(NamedTuple):
    """One run of a grid (or several, of a script that trains several seeds in one process)."""

    folder: Path  # holds the run's folder, log.txt, exit_code, and the lock
    flags: tuple[str, ...]  # of the script
    args: dict  # all flags of the script as these set them

    @property
    def total(self) -> int:
        return self.args.get("total_timesteps") or self.args["total_updates"]


def find_axes(words: list[str], script: ModuleType) -> Axes:
    """The flags of a grid's command line with all their settings, in the order given.

    `--width 1 2 --bias --no-bias` has two axes of two settings. All values of a flag that is a tuple are one setting.
    """
    groups: list[list[str]] = []  # each a flag and its values
    for word in words:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            groups.append([flag, value] if equals else [flag])
        elif groups:
            groups[-1].append(word)
        else:
            fail(f"expected a flag of {script.__name__}.py, got {word}")
    hints = get_type_hints(script.Args)
    axes: Axes = {}
    for flag, *values in groups:
        name = flag[2:].replace("-", "_")
        field = name if name in hints else name.removeprefix("no_")
        if field not in hints:
            fail(f"{flag}: {script.__name__}.py has no such flag")
        if field in ("runs_dir", "resume"):
            fail(f"{flag}: the sweep sets it itself")
        together = not values or get_origin(hints[field]) is tuple
        axes.setdefault(field, []).extend([[flag, *values]] if together else [[flag, value] for value in values])
    for settings in axes.values():
        for setting in settings:
            if settings.count(setting) > 1:
                fail(f"{' '.join(setting)}: given twice")
    return axes


def make_cells(axes: Axes, script: ModuleType, out: Path) -> list[Cell]:
    """All combinations of the axes' settings, checked by the script's own `Args`; seeds vary slowest, so that the first
    part of a grid already compares all the rest. A bad flag ends the program with one line.
    """
    order = sorted(axes, key=lambda field: field != "seed")  # a stable sort
    varied = [field for field in axes if len(axes[field]) > 1]
    cells = []
    for combination in itertools.product(*(axes[field] for field in order)):
        setting = dict(zip(order, combination))
        flags = [word for field in axes for word in setting[field]]
        with contextlib.redirect_stdout(io.StringIO()):  # what the preset changes
            args = parse_args(script.Args, script.preset, flags)
        parts = ["=".join([setting[field][0][2:], *setting[field][1:]]) for field in varied]
        name = re.sub(r"[^\w.,=+-]", "-", ",".join(parts)) or "run"
        cell = Cell(out / name, tuple(flags), vars(args))
        if "checkpoint_every" not in axes:
            cell = cell._replace(flags=(*flags, "--checkpoint-every", str(max(cell.total // 20, 1))))
        cells.append(cell)
    if len({cell.folder for cell in cells}) < len(cells):
        fail("two cells of the grid would have the same folder: values differ in special characters alone")
    return cells


# ---- State on the disk -----------------------------------------------------------------------------------------------


def run_folders(cell: Cell) -> list[Path]:
    return sorted(path.parent for path in cell.folder.glob("*/args.json"))


def unfinished(cell: Cell) -> list[Path] | None:
    """The folders of runs to resume; none if all are finished; None if the cell must be started from the beginning."""
    folders = run_folders(cell)
    rest = [folder for folder in folders if not (folder / "model.pt").exists()]
    return rest if folders and all((folder / "checkpoint.pt").exists() for folder in rest) else None


def write_flags(cell: Cell) -> None:
    """Records what `check_folder` compares. A run's own args.json will not do: scripts replace None in it by what the
    environment implies."""
    write_atomically(json.dumps(learning_flags(cell), indent=2) + "\n", cell.folder / "flags.json")


def check_folder(cell: Cell) -> None:
    """Ends the program if the cell's folder holds a run with flags that would have learned something else."""
    path = cell.folder / "flags.json"
    if not (path.exists() and run_folders(cell)):
        return
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        fail(f"--out: {path} is damaged")
    wanted = json.loads(json.dumps(learning_flags(cell)))  # tuples become lists
    for name in wanted.keys() | found.keys():
        if wanted.get(name) != found.get(name):
            what = f"{name} {found.get(name)}, and this sweep wants {wanted.get(name)}"
            fail(f"--out: {cell.folder} was made with {what}; choose another folder")


def learning_flags(cell: Cell) -> dict:
    """All but those that only say how to run the script."""
    ignored = {field.name for field in fields(RunFlags)}
    return {name: value for name, value in cell.args.items() if name not in ignored}


def lock(cell: Cell) -> IO | None:
    """The cell's lock, or None if a run of another process holds it. It is held until every process that inherited the
    file has closed it, so a run that outlives whoever started it keeps it."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    file = (cell.folder / "lock").open("w")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    return file


def state(cell: Cell) -> State:
    if not cell.folder.exists():
        return "waiting"
    held = lock(cell)
    if held is None:
        return "running"
    held.close()
    rest = unfinished(cell)
    if rest == []:
        return "done"
    code = exit_code(cell)
    if code is not None and code not in STOPPED:
        return "failed"
    return "waiting" if rest is None else "stopped"


def exit_code(cell: Cell) -> int | None:
    """The exit code of the cell's last run, or None if none has ended; negative: killed by that signal."""
    try:
        return int((cell.folder / "exit_code").read_text())
    except (OSError, ValueError):
        return None


def why_failed(cell: Cell, code: int) -> str:
    """One line: the last one of the run's log that says something."""
    if code == -9:
        return "killed by signal 9, as when memory runs out"
    try:
        text = (cell.folder / "log.txt").read_text(errors="replace")
    except OSError:
        text = ""
    lines = [line.strip() for line in re.split(r"[\r\n]+", text) if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    return f"exit code {code}: {(errors or lines or ['its log is empty'])[-1]}"


class Progress(NamedTuple):
    step: int
    per_second: float  # over the whole run
    latest_return: float
    seconds_left: float


def progress(cell: Cell) -> Progress:
    """How far the first unfinished run is, or the last one if none is left; nan for what is not known yet."""
    nan = float("nan")
    folders = run_folders(cell)
    unfinished_folders = (folder for folder in folders if not (folder / "model.pt").exists())
    folder = next(unfinished_folders, [cell.folder, *folders][-1])
    step, seconds = (last_row(folder / "scalars.csv") or [0, nan])[:2]
    episode_step, latest = (last_row(folder / "episodes.csv") or [0, nan])[:2]
    step, seconds, latest = float(step), float(seconds), float(latest)
    speed = step / seconds if seconds else nan
    return Progress(int(max(step, float(episode_step))), speed, latest, (cell.total - step) / speed if speed else nan)


def checkpoint_bytes(cells: list[Cell]) -> int:
    """Size of the largest checkpoint in the grid; 0 before the first."""
    return max((path.stat().st_size for cell in cells for path in cell.folder.glob("*/checkpoint.pt")), default=0)


def set_aside(cell: Cell) -> None:
    """Moves the runs of a cell that starts again out of the sight of `utils.compare` and `utils.plot`."""
    for folder in run_folders(cell):
        (cell.folder / ".abandoned").mkdir(exist_ok=True)
        folder.rename(cell.folder / ".abandoned" / folder.name)
