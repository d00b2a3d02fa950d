"""Playing episodes with a fixed policy: `evaluate` for the scripts, and a command for the models that they leave.

    python -m utils.evaluate runs/<run> --episodes 100
    python -m utils.evaluate runs/*/model.pt --sticky 0 --noops 30

A model is played as it was trained and evaluated, unless a flag says otherwise. The intervals hold 95 % and come from
resampling episodes: they speak of these weights, not of what another seed would have learned.
"""

import glob
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from gymnasium.vector import VectorEnv

from utils.results import Model, fail, human_normalised, iqm, load_model, summarise, warn


def evaluate(
    envs: VectorEnv, policy: Callable[[np.ndarray], np.ndarray], episodes: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Plays `episodes` episodes and returns their returns (float64) and lengths (int64), each of shape (episodes,).

    Every environment plays a share that is fixed beforehand; taking whichever episodes end first would favour short
    ones. Closes `envs`.

    Args:
        policy: observations (num_envs, ...) to actions (num_envs,).
    """
    share = np.array([len(part) for part in np.array_split(np.arange(episodes), envs.num_envs)])
    played = np.zeros_like(share)
    returns, lengths = [], []
    observation, _ = envs.reset(seed=seed)
    while (played < share).any():
        observation, _, terminated, truncated, infos = envs.step(policy(observation))
        for i in np.flatnonzero((terminated | truncated) & (played < share)):
            returns.append(infos["episode"]["r"][i])
            lengths.append(infos["episode"]["l"][i])
            played[i] += 1
    envs.close()
    return np.array(returns), np.array(lengths)


@dataclass
class Args:
    models: tyro.conf.Positional[tuple[Path, ...]]
    """folders of runs, or their model.pt, or patterns of them in quotes"""
    episodes: int = 100
    """episodes to play with each model"""
    epsilon: float | None = None
    """share of random actions; unless given, that of the run's own evaluation (SAC acts without noise and has none)"""
    sticky: float | None = None
    """Atari: probability that the previous action is repeated; unless given, as in training"""
    noops: int | None = None
    """Atari: up to so many no-op actions at an episode's start; unless given, as in training"""
    seed: int | None = None
    """of environments and random actions; unless given, that of the run's own evaluation"""
    video: bool = False
    """play one more episode and write it as MP4 to the folder `evaluation` beside the model"""


def environment_flags(model: Model, args: Args) -> dict[str, float]:
    """The keywords of the script's `make_envs` that say the protocol."""
    if hasattr(model.args, "action_repeat"):  # continuous control
        return {"action_repeat": model.args.action_repeat}
    return {
        "sticky_actions": model.args.sticky_actions if args.sticky is None else args.sticky,
        "noop_max": model.args.noop_max if args.noops is None else args.noops,
    }


def make_policy(model: Model, epsilon: float, seed: int) -> Callable[[np.ndarray], np.ndarray]:
    """The policy that the model's script evaluates: epsilon-greedy in Q, or the actor's mode for continuous actions."""
    rng = np.random.default_rng(seed)

    def greedy(observation: torch.Tensor) -> torch.Tensor:
        if "actor" in model.networks:
            return model.networks["actor"].greedy(model.networks["rsnorm"](observation))
        q = model.networks["q_network"](observation)  # (B, A), or (B, A, N) of a distribution's logits
        if q.ndim == 3 and q.shape[2] > 1:
            q = model.script.q_values(q, torch.linspace(model.args.v_min, model.args.v_max, q.shape[2]))
        return q.view(len(q), -1).argmax(1)

    @torch.no_grad()
    def policy(observation: np.ndarray) -> np.ndarray:
        dtype = torch.uint8 if observation.dtype == np.uint8 else torch.float32
        action = greedy(torch.as_tensor(observation, dtype=dtype)).numpy()
        explore = rng.random(len(action)) < epsilon
        if explore.any():
            action[explore] = rng.integers(model.action_space.n, size=int(explore.sum()))
        return action

    return policy


def play(model: Model, folder: Path, args: Args) -> tuple[np.ndarray, str]:
    """Returns (episodes,) of the model, and in words how it was played; the video goes to `folder`."""
    trained = model.args
    epsilon = 0.0 if "actor" in model.networks else trained.eval_epsilon if args.epsilon is None else args.epsilon
    seed = trained.seed + 1_000_000 if args.seed is None else args.seed
    flags = environment_flags(model, args)
    envs = model.script.make_envs(trained.env_id, min(args.episodes, max(8, os.cpu_count() or 1)), **flags)
    returns, lengths = evaluate(envs, make_policy(model, epsilon, seed), args.episodes, seed)
    said = f"{trained.env_id}, epsilon {epsilon:g}, seed {seed}"
    if len(model.observation_space.shape) == 3:
        said += f", sticky actions {flags['sticky_actions']:g}, at most {flags['noop_max']} no-ops at the start"
    said += f"; {lengths.mean():.0f} steps an episode"
    if args.video:
        envs = model.script.make_video_env(trained.env_id, str(folder / "evaluation"), **flags)
        value, _ = evaluate(envs, make_policy(model, epsilon, seed), 1, seed)
        said += f"; {folder / 'evaluation'} holds the video of an episode of return {value[0]:g}"
    return returns, said


def main(args: Args) -> dict[Path, np.ndarray]:
    """Plays each model, prints a table, and returns the returns of the episodes of each."""
    wrong = "--episodes takes a whole number from 1 on" if args.episodes < 1 else None
    for name, low, high in (("epsilon", 0, 1), ("sticky", 0, 1), ("noops", 0, np.inf), ("seed", 0, np.inf)):
        if getattr(args, name) is not None and not low <= getattr(args, name) <= high:
            wrong = f"--{name}: got {getattr(args, name)}, takes a number from {low} to {high:g}"
    if wrong or not args.models:
        fail(wrong or "no model given; takes folders of runs, or their model.pt")
    given = [f"--{name}" for name in ("epsilon", "sticky", "noops") if getattr(args, name) is not None]
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
            warn(f"{path}: {error}; left out")
            continue
        if "actor" in model.networks and given:
            warn(f"{path}: {' '.join(given)}: a policy for continuous actions has no such thing; ignored")
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
    main(tyro.cli(Args))
