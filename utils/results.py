"""Reading what runs leave behind: flags, episodes, logged scalars, networks; and summing scores up.

What cannot be read is named on stderr in one line, and the rest is used.
"""

import csv
import glob
import importlib
import json
import math
import pickle
import re
import struct
import sys
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from torch import nn

from utils.statistics import Estimate, bootstrap, iqm, mean, probability_of_improvement

ROOT = Path(__file__).parent.parent


class LoggedRun(NamedTuple):
    """A run's folder; its flags, and "script" among them, from the folder's name (None if it has another); and its
    `episodes` (n, 3) float64: step, return and length of each that ended."""

    folder: Path
    args: dict
    episodes: np.ndarray

    @property
    def total_steps(self) -> int:
        """Agent steps of the whole run; of an offline run, updates."""
        return self.args.get("total_timesteps") or self.args["total_updates"]

    @property
    def finished(self) -> bool:
        return (self.folder / "model.pt").exists()

    def final_score(self) -> float:
        """Mean return of the episodes that ended in the last tenth of the run; nan if none did."""
        last = self.episodes[self.episodes[:, 0] > 0.9 * self.total_steps, 1]
        return last.mean() if len(last) else math.nan


def warn(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def fail(message: str) -> NoReturn:
    """Ends the program with one line on stderr and exit code 2, as utils/flags.py does."""
    print(f"error: {message}", file=sys.stderr)
    raise SystemExit(2)


def save_figure(figure: Figure, out: Path) -> None:
    """Writes `out`.png and `out`.pdf; ends the program with one line if it cannot."""
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("png", "pdf"):
            path = out.with_name(f"{out.name}.{suffix}")
            figure.savefig(path)
            print(f"wrote {path}")
    except (OSError, ValueError) as error:  # an empty name is a ValueError
        fail(f"--out: got {out}, takes a file that can be written, without its suffix: {error}")


def read_run(folder: Path) -> LoggedRun:
    """The run in `folder`. Rows of its episodes.csv that cannot be read, as a kill may leave the last, are passed over.

    Raises:
        ValueError: its files are missing or not those of a run, in words.
    """
    try:
        args = json.loads((folder / "args.json").read_text())
        episodes = (folder / "episodes.csv").read_text()
    except FileNotFoundError as error:
        raise ValueError(f"has no {Path(error.filename).name}") from None
    except json.JSONDecodeError:
        raise ValueError("has a torn args.json") from None
    if not isinstance(args, dict) or not (args.get("total_timesteps") or args.get("total_updates")):
        raise ValueError("has an args.json of another layout")
    rows = re.findall(r"^(\d+),(-?\d*\.?\d+(?:e[+-]\d+)?|-?inf|nan),(\d+)\n", episodes, re.M)
    parts = folder.name.split("__")
    args["script"] = parts[1] if len(parts) == 4 else None
    return LoggedRun(folder, args, np.array(rows, dtype=float).reshape(-1, 3))


def find_runs(patterns: Sequence[str]) -> list[LoggedRun]:
    """The runs in the folders that match, in the order of their names. Ends the program if there is none."""
    folders = sorted({Path(found) for pattern in patterns for found in glob.glob(pattern) if Path(found).is_dir()})
    runs = []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except ValueError as error:
            warn(f"{folder} {error}; left out")
    if not runs:
        fail(f"no runs in {' '.join(patterns)}" + ("; it matches no folder" if not folders else ""))
    return runs


def group_runs(runs: Sequence[LoggedRun], by: Sequence[str]) -> dict[tuple, list[LoggedRun]]:
    """The runs by the values of these flags, in the order of the values; a run without such a flag has None there."""
    groups: dict[tuple, list[LoggedRun]] = {}
    for run in runs:
        groups.setdefault(tuple(run.args.get(name) for name in by), []).append(run)
    return dict(sorted(groups.items(), key=lambda item: [(isinstance(v, str), v is not None and v) for v in item[0]]))


def records(path: Path):
    """The byte strings in a TFRecord file, up to a torn end; the checksums are passed over.

    This reads the scalars of 50 runs of 10 million steps in 6 s. tensorboard's EventAccumulator takes 7 times as long,
    and its RawEventFileLoader, which gives no more than these byte strings, 4 times.
    """
    content, place = path.read_bytes(), 0
    while place + 12 <= len(content):  # length (8), checksum (4), data, checksum (4)
        (length,) = struct.unpack_from("<Q", content, place)
        if place + length + 16 > len(content):
            return
        yield content[place + 12 : place + 12 + length]
        place += length + 16


def read_scalars(folder: Path) -> dict[str, np.ndarray]:
    """The TensorBoard scalars of a run: for each tag, rows (n, 2) of step and value, in the order of writing."""
    scalars: dict[str, list] = {}
    for path in sorted(folder.glob("events.out.tfevents.*")):
        for record in records(path):
            event = Event.FromString(record)
            if event.session_log.status == SessionLog.START:  # a resumed run, which repeats what came after
                for rows in scalars.values():
                    rows[:] = [row for row in rows if row[0] < event.step]
            for value in event.summary.value:
                if value.HasField("simple_value"):
                    scalars.setdefault(value.tag, []).append((event.step, value.simple_value))
    return {tag: np.array(rows, dtype=np.float64) for tag, rows in scalars.items()}


def training_seconds(folder: Path) -> float:
    """Time from the first to the last record of a run's logs, its final evaluation included; of all its processes."""
    seconds = 0.0
    for path in folder.glob("events.out.tfevents.*"):
        stored = list(records(path))
        if stored:  # there is no need to parse the others
            first, last = (Event.FromString(stored[place]).wall_time for place in (0, -1))
            seconds += last - first
    return seconds


class Model(NamedTuple):
    """A model.pt: the script that made it, its flags as `script.Args`, its networks on the CPU, its masks (True where
    a weight is kept; a network that is dense has none), and the spaces of its environment."""

    script: ModuleType
    args: object
    networks: dict[str, nn.Module]
    masks: dict[str, dict[str, torch.Tensor]]
    observation_space: object
    action_space: object


def load_model(path: Path) -> Model:
    """The model in the file `path`, or in the folder of a run; its networks are in evaluation mode.

    Raises:
        ValueError: it is no model of today's scripts, in words.
    """
    path = path / "model.pt" if path.is_dir() else path
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError("there is no model.pt; a run writes it at its end") from None
    except (RuntimeError, EOFError, OSError, ValueError, pickle.UnpicklingError, zipfile.BadZipFile):
        raise ValueError("the file is torn or no model") from None
    if not isinstance(content, dict) or not {"script", "args", "networks", "masks"} <= content.keys():
        raise ValueError("a file of another or an older layout: it lacks script, args, networks or masks")
    if "rng" in content:
        raise ValueError("this is a checkpoint; --resume it to its end")
    if not (ROOT / f"{content['script']}.py").exists():
        raise ValueError(f"it is of {content['script']}.py, which is not here")
    script = importlib.import_module(content["script"])
    known = {name: value for name, value in content["args"].items() if name in script.Args.__dataclass_fields__}
    try:
        args = script.Args(**known)
        envs = script.make_envs(args.env_id, 1)
        observations, actions = envs.single_observation_space, envs.single_action_space
        envs.close()
        if hasattr(script, "make_networks"):
            actor, critic = script.make_networks(args, *observations.shape, *actions.shape)
            networks = {"actor": actor, "critic": critic, "rsnorm": script.RSNorm(*observations.shape)}
        else:
            networks = {"q_network": script.make_network(args, observations, int(actions.n))}
        for name, network in networks.items():
            network.load_state_dict(content["networks"][name])
            network.eval()
    except (KeyError, RuntimeError, TypeError, ImportError, gym.error.Error) as error:
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        raise ValueError(f"of another or an older layout than today's {script.__name__}.py ({reason})") from None
    return Model(script, args, networks, content["masks"], observations, actions)


class Cost(NamedTuple):
    """Weights that are kept and that there are, without biases; and FLOPs of a forward pass."""

    kept: int
    total: int
    flops: int


def cost(model: Model) -> Cost:
    """What a model has and needs, all its networks together.

    FLOPs are those of one observation through each network: two, a multiplication and an addition, for each kept weight
    at each place where it is applied. Biases, activations and normalisations are not counted, nor is the part of
    a noisy layer that is off in evaluation. It is what hardware would need that skips every zero.
    """
    places: dict[nn.Module, int] = {}  # how often a convolution's weights are applied: its output's height x width
    kept = total = flops = 0
    for net, network in model.networks.items():
        convolutions = [module for module in network.modules() if isinstance(module, nn.Conv2d)]
        hooks = [
            module.register_forward_hook(lambda module, _, output: places.update({module: output[0, 0].numel()}))
            for module in convolutions
        ]
        if convolutions:
            with torch.no_grad():
                network(torch.zeros(1, *model.observation_space.shape))
        for hook in hooks:
            hook.remove()
        for name, weight in network.named_parameters():
            if weight.ndim >= 2:
                mask = model.masks.get(net, {}).get(name)
                count = weight.numel() if mask is None else int(mask.sum())
                kept, total = kept + count, total + weight.numel()
                module = network.get_submodule(name.rpartition(".")[0])
                flops += 0 if name.endswith("_sigma") else 2 * count * places.get(module, 1)
    return Cost(kept, total, flops)


def atari_scores() -> dict[str, tuple[float, float]]:
    """Scores of a random agent and a human for 57 games, as in google-deepmind/dqn_zoo.

    For VideoPinball tables differ: random is 16256.9 here and 0.0 in Dopamine, which makes the slope of the normalised
    score 12.5 times as steep here. Say which one you use.
    """
    with (Path(__file__).parent / "atari_scores.csv").open() as file:
        return {row["game"]: (float(row["random"]), float(row["human"])) for row in csv.DictReader(file)}


def human_normalised(score: np.ndarray | float, env_id: str) -> np.ndarray | float | None:
    """(score - random) / (human - random); None for what is no game, or one without a human score."""
    game = re.sub(r"^ALE/|-v5$|NoFrameskip-v\d$", "", env_id)
    random, human = atari_scores().get(game, (None, None))
    return None if human is None else (score - random) / (human - random)


def summarise(scores: Sequence[np.ndarray], statistic: Callable = iqm) -> Estimate:
    """The statistic (by default the interquartile mean) of one array (runs,) for each task, with its 95 % interval."""
    return bootstrap(statistic, scores)


def mean_curve(curves: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean over seeds of `curves` (seeds, points), nan where there is none, and the 95 % bootstrap interval of each."""
    estimates = [
        bootstrap(mean, [present], reps=1_000) if len(present) else Estimate(math.nan, math.nan, math.nan)
        for present in (column[~np.isnan(column)] for column in curves.T)
    ]
    return tuple(np.array(part, dtype=float) for part in zip(*estimates))


def improvement(scores: Sequence[np.ndarray], over: Sequence[np.ndarray]) -> Estimate:
    """Probability that a run of `scores` beats one of `over`, each one array (runs,) a task, with its 95 % interval."""
    return bootstrap(probability_of_improvement, scores, over)
