"""Playing episodes with trained models.

    python -m utils.evaluate runs/<run> --episodes 100
    python -m utils.evaluate runs/*/model.pt --sticky 0 --noops 30

A model is played as it was trained and evaluated, unless a flag says otherwise. Episode k is seeded by the run's
evaluation seed plus k, so the first episodes are those of the run's own final evaluation. The intervals hold 95 % and
come from resampling episodes: they describe these weights, not what another seed would have learned.
"""

import glob
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np

from utils.analysis.results import Model, human_normalised, iqm, load_model, summarise, warn
from utils.command_line import Positional
from utils.envs import EVALUATION_SEED, atari_game, evaluate
from utils.flags import NonNegativeInt, PositiveInt, Probability, Seed, check_flags, fail
from utils.launch import run_command


@dataclass
class Args:
    models: Annotated[tuple[Path, ...], Positional]
    """folders of runs, or their model.pt, or patterns of them in quotes"""
    episodes: PositiveInt = 100
    """episodes to play with each model"""
    epsilon: Probability | None = None
    """fraction of random actions, instead of the run's own --eval-epsilon"""
    sticky: Probability | None = None
    """Atari: probability that the emulator repeats the previous action, instead of the training's"""
    noops: NonNegativeInt | None = None
    """Atari: maximum number of no-op actions at an episode's start, instead of the training's"""
    seed: Seed | None = None
    """seed of the first episode, instead of the run's own evaluation seed"""
    video: bool = False
    """also record the first episode as MP4, in the folder `evaluation` next to the model"""


def play(model: Model, folder: Path, args: Args) -> tuple[np.ndarray, str]:
    """Returns (episodes,) of the model, and in words how it was played; the video goes to `folder`."""
    wanted = {"eval_epsilon": args.epsilon, "sticky_actions": args.sticky, "noop_max": args.noops}
    given = {name: value for name, value in wanted.items() if value is not None}
    unknown = [name for name in given if not hasattr(model.args, name)]
    if unknown:
        warn(f"{folder}: its script has no {', '.join(unknown)}; ignored")
    trained = replace(model.args, **{name: value for name, value in given.items() if name not in unknown})
    seed = trained.seed + EVALUATION_SEED if args.seed is None else args.seed
    policy = model.script.make_policy(trained, model.networks)
    returns, lengths = evaluate(trained, policy, args.episodes, seed)
    said = f"{trained.env_id}, seed {seed}"
    if hasattr(trained, "eval_epsilon"):
        said += f", epsilon {trained.eval_epsilon:g}"
    if atari_game(trained.env_id):
        said += f", sticky actions {trained.sticky_actions:g}, at most {trained.noop_max} no-ops at the start"
    said += f"; {lengths.mean():.0f} steps an episode"
    if args.video:
        (value,), _ = evaluate(trained, policy, 1, seed, folder / "evaluation")
        said += f"; {folder / 'evaluation'} holds the video of the first episode, of return {value:g}"
    return returns, said


def main(args: Args) -> dict[Path, np.ndarray]:
    """Plays each model, prints a table, and returns the returns of the episodes of each."""
    check_flags(args)
    statistics = {"mean": lambda tasks: tasks[0].mean(-1), "median": lambda tasks: np.median(tasks[0], -1), "IQM": iqm}
    results, normalised = {}, {}
    print("| model | episodes | mean | median | IQM | human-normalised mean |")
    print("|---|--:|--:|--:|--:|--:|")
    notes = []
    for path in [Path(found) for model in args.models for found in sorted(glob.glob(str(model))) or [model]]:
        folder = path if path.is_dir() else path.parent
        try:
            model = load_model(path)
        except ValueError as error:
            warn(f"{path} {error}; left out")
            continue
        results[path], said = play(model, folder, args)
        notes.append(f"{folder.name}: {said}")
        cells = [summarise([results[path]], statistic) for statistic in statistics.values()]
        score = human_normalised(results[path], model.args.env_id)
        if score is not None:
            normalised.setdefault(model.args.env_id, []).append(score.mean())
            cells.append(summarise([score], statistics["mean"]))
        texts = [f"{value:.4g} [{low:.4g}, {high:.4g}]" for value, low, high in cells] + [""] * (4 - len(cells))
        print(f"| {folder.name} | {args.episodes} | " + " | ".join(texts) + " |", flush=True)
    if not results:
        fail("none of these can be played")
    print("\n" + "\n".join(notes))
    if sum(map(len, normalised.values())) > 1:
        value, low, high = summarise([np.array(scores) for scores in normalised.values()])
        runs = f"{sum(map(len, normalised.values()))} models of {len(normalised)} games"
        print(f"human-normalised IQM of {runs}, resampling models within games: {value:.4g} [{low:.4g}, {high:.4g}]")
    if any("VideoPinball" in env_id for env_id in normalised):
        print("VideoPinball: normalised with a random score of 16256.9 as in dqn_zoo; Dopamine's table has 0.0")
    return results


if __name__ == "__main__":
    run_command(main, Args)
