"""Reading finished runs: flags, episodes, networks; and summarising scores.

What cannot be read is named on stderr in one line, and the rest is used.
"""

import csv
import glob
import importlib
import importlib.util
import json
import math
import pickle
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import fields
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from matplotlib.figure import Figure
from torch import nn

from utils.analysis.statistics import Estimate, bootstrap, iqm, mean, probability_of_improvement
from utils.envs import make_envs, protocol
from utils.flags import RunFlags, fail, first_line
from utils.records import read_episodes, read_evaluations

ROOT = Path(__file__).parents[2]
# Flags in which runs of one kind may differ: those that change nothing of what is learned, and what tells runs apart
RUNNING_FLAGS = {field.name for field in fields(RunFlags)} | {
    "env_id",
    "seed",
    "save_dataset",
    "mask_seed",
    "eval_epsilon",
}


class LoggedRun(NamedTuple):
    """A run's folder; its flags, with the script's name as "script"; and its episodes, see `utils.records`."""

    folder: Path
    args: dict
    episodes: np.ndarray
    evaluations: np.ndarray

    @property
    def offline(self) -> bool:
        """Whether it learned from a dataset: its steps are updates, and it has evaluations only."""
        return "total_updates" in self.args

    @property
    def total_steps(self) -> int:
        """Agent steps of the whole run; of an offline run, updates."""
        return self.args["total_updates"] if self.offline else self.args["total_timesteps"]

    @property
    def finished(self) -> bool:
        return (self.folder / "model.pt").exists()

    def returns(self, evaluations: bool = False) -> np.ndarray:
        """Rows (n, 2) of step and return: of training episodes, or of evaluations (always of an offline run)."""
        return self.evaluations[:, [0, 2]] if evaluations or self.offline else self.episodes[:, :2]

    def final_score(self, evaluations: bool = False) -> float:
        """Mean return of the episodes that ended in the last tenth of the run; nan if none did."""
        returns = self.returns(evaluations)
        last = returns[returns[:, 0] > 0.9 * self.total_steps, 1]
        return last.mean() if len(last) else math.nan


def warn(message: str) -> None:
    print(f"note: {message}", file=sys.stderr)


def save_figure(figure: Figure, out: Path) -> None:
    """Writes `out`.png and `out`.pdf, whether or not `out` has one of these suffixes; ends the program with one line if
    it cannot."""
    if out.is_dir():
        fail(f"--out: {out} is a folder; name a file in it")
    stem = out.stem if out.suffix in (".png", ".pdf") else out.name
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("png", "pdf"):
            path = out.with_name(f"{stem}.{suffix}")
            figure.savefig(path)
            print(f"wrote {path}")
    except (OSError, ValueError) as error:  # an empty name is a ValueError
        fail(f"--out: got {out}, expected a file that can be written: {error}")


def read_run(folder: Path) -> LoggedRun:
    """The run in `folder`.

    Raises:
        ValueError: its files are missing or not those of a run, in words.
    """
    try:
        args = json.loads((folder / "args.json").read_text())
    except FileNotFoundError:
        raise ValueError("has no args.json") from None
    except (OSError, ValueError):
        raise ValueError("has a damaged args.json") from None
    total = isinstance(args, dict) and (args.get("total_timesteps") or args.get("total_updates"))
    if not isinstance(total, int) or not isinstance(args.get("env_id"), str) or not isinstance(args.get("seed"), int):
        raise ValueError("has an args.json without env_id, seed and total_timesteps or total_updates")
    args = {name: tuple(value) if isinstance(value, list) else value for name, value in args.items()}
    parts = folder.name.split("__")
    args["script"] = "__".join(parts[1:-2]) if len(parts) >= 4 else None
    return LoggedRun(folder, args, read_episodes(folder), read_evaluations(folder))


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


def flag_names(by: str, runs: Sequence[LoggedRun]) -> list[str]:
    """The flags in `--by`, as they are in args.json. Ends the program if no run has one of them."""
    names = [name.strip().replace("-", "_") for name in by.split(",") if name.strip()]
    for name in names:
        if all(name not in run.args for run in runs):
            fail(f"--by: expected names of flags, such as width,method,seed, got {name}")
    return names


def group_runs(runs: Sequence[LoggedRun], by: Sequence[str]) -> dict[tuple, list[LoggedRun]]:
    """The runs by the values of these flags, in the order of the values; a run without such a flag has None there."""
    groups: dict[tuple, list[LoggedRun]] = {}
    for run in runs:
        groups.setdefault(tuple(run.args.get(name) for name in by), []).append(run)
    return dict(sorted(groups.items(), key=lambda item: [sortable(value) for value in item[0]]))


def warn_of_mixed_flags(which: str, runs: Sequence[LoggedRun], ignored: set[str]) -> None:
    """Notes the flags, other than those `ignored`, in which runs differ that are taken together."""
    first = runs[0].args
    differing = {name for run in runs for name in run.args | first if run.args.get(name) != first.get(name)}
    if differing - ignored:
        warn(f"{which}: runs that differ in {', '.join(sorted(differing - ignored))} are taken together")


def sortable(value: object) -> tuple:
    """A key that puts None first, then numbers, then everything else as text."""
    number = isinstance(value, int | float)
    return (value is not None, not number, value if number else 0, "" if number else str(value))


class Model(NamedTuple):
    """A model.pt: the script that made it, its flags as `script.Args`, its networks on the CPU and in evaluation mode,
    and their masks (True where a weight is active; a dense network has none), both by name."""

    script: ModuleType
    args: RunFlags
    networks: dict[str, nn.Module]
    masks: dict[str, dict[str, torch.Tensor]]
    observation_space: gym.Space


def load_model(path: Path) -> Model:
    """The model in the file `path`, or in the folder of a run.

    Its script is imported from the repository's root, or, if it is not there (a fork elsewhere, a script that was
    renamed), from the copy in the run's folder: load only runs whose code you would run.

    Raises:
        ValueError: it is not a model of a script that is here, in words.
    """
    path = path / "model.pt" if path.is_dir() else path
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise ValueError("has no model.pt; a run writes it at its end") from None
    except Exception as error:  # torch's unpickler has many
        if not isinstance(error, RuntimeError | EOFError | OSError | ValueError | LookupError | pickle.UnpicklingError):
            raise
        raise ValueError("is not a model, or damaged") from None
    if not isinstance(content, dict) or not {"script", "args", "networks", "masks"} <= content.keys():
        raise ValueError("is not a model.pt, or one of another version")
    script = import_script(content["script"], path.parent)
    try:
        known = {field.name for field in fields(script.Args)}
        args = script.Args(**{name: value for name, value in content["args"].items() if name in known})
        envs = make_envs(args.env_id, 1, **protocol(args))
        observation_space, action_space = envs.single_observation_space, envs.single_action_space
        envs.close()
        networks = script.make_networks(args, observation_space, action_space)
        for name, network in networks.items():
            network.load_state_dict(content["networks"][name])
            network.eval()
    except (AttributeError, KeyError, RuntimeError, TypeError, ImportError, gym.error.Error) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise ValueError(f"does not fit this version of {content['script']}.py ({reason})") from None
    return Model(script, args, networks, content["masks"], observation_space)


def import_script(name: str, folder: Path) -> ModuleType:
    """The script of this name in the repository's root, or else in `folder`."""
    if not re.fullmatch(r"\w[\w-]*", str(name)):
        raise ValueError(f"names {name!r} as its script")
    for place in (ROOT, folder):
        path = place / f"{name}.py"
        if path.exists():
            return import_file(path)
    raise ValueError(f"was made by {name}.py, which is not here")


def import_file(path: Path) -> ModuleType:
    """The script in a file, wherever it is, imported by the name of the file."""
    name = path.stem
    if name not in sys.modules or Path(sys.modules[name].__file__ or "").resolve() != path.resolve():
        spec = importlib.util.spec_from_file_location(name, path)
        sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
        spec.loader.exec_module(sys.modules[name])
    return sys.modules[name]


class Cost(NamedTuple):
    """Active weights and all weights, without biases; and FLOPs of a forward pass."""

    active: int
    total: int
    flops: int


def cost(model: Model) -> Cost:
    """Weights and FLOPs of all of a model's networks together.

    FLOPs are those of one observation through each network: two, a multiplication and an addition, for each active
    weight at each place where it is applied. Biases, activations and normalisations are not counted, nor is the part of
    a noisy layer that is off in evaluation. Hardware that skips every zero would need this many.
    """
    places: dict[nn.Module, int] = {}  # how often a convolution's weights are applied: its output's height x width
    active = total = flops = 0
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
                count = weight.numel() if mask is None else int(mask.count_nonzero())
                active, total = active + count, total + weight.numel()
                module = network.get_submodule(name.rpartition(".")[0])
                flops += 0 if name.endswith("_sigma") else 2 * count * places.get(module, 1)
    return Cost(active, total, flops)


def atari_scores() -> dict[str, tuple[float, float]]:
    """Scores of a random agent and a human for 57 games, as in google-deepmind/dqn_zoo.

    For VideoPinball tables differ: random is 16256.9 here and 0.0 in Dopamine, which makes the slope of the normalised
    score 12.5 times as steep here. Say which one you use.
    """
    with (Path(__file__).parent / "atari_scores.csv").open() as file:
        return {row["game"]: (float(row["random"]), float(row["human"])) for row in csv.DictReader(file)}


def human_normalised(score: np.ndarray | float, env_id: str) -> np.ndarray | float | None:
    """(score - random) / (human - random); None for other environments, and games without a human score."""
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
