"""Offline CQL on logged Atari with a sparse network: fewer weights in a wider network make a better agent.

The agent learns from a dataset alone: Dopamine's DQN (`--loss huber`) or C51 (`--loss c51`) with conservative
Q-learning, which holds down the values of actions that the data do not show. `--method` says where the zeros come from:
gradual magnitude pruning during training (gmp), or a random mask fixed before it (random). Everything that changes
learning is in this file.

Obando-Ceron, Courville, Castro (2024), In value-based deep RL, a pruned network is a good network. arXiv:2402.12479
Kumar, Zhou, Tucker, Levine (2020), Conservative Q-learning for offline reinforcement learning. arXiv:2006.04779
Agarwal, Schuurmans, Norouzi (2020), An optimistic perspective on offline reinforcement learning. arXiv:1907.04543

    python dqn_sparse.py --env-id CartPole-v1 --save-dataset data/cartpole   # a small set of one's own, in minutes
    python cql_pruned.py --dataset data/cartpole                             # ... and the agent that learns from it
    python cql_pruned.py --dataset data/Pong/1/replay_logs --loss c51 --sparsity 0.95 --width 3
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.checkpoints import load_checkpoint, parse_args, restore, save_checkpoint, save_model
from utils.diagnostics import interference, report, target_variance
from utils.envs import STACK, atari_game, cannot_render, make_envs, make_video_env, open_envs
from utils.evaluate import evaluate
from utils.flags import fail, require, require_ranges
from utils.graphs import cuda_graph
from utils.masks import (
    apply_masks,
    erk_densities,
    keep_largest,
    kept_count,
    mask_table,
    prunable,
    random_mask,
    sparsity_scalars,
    uniform_densities,
)
from utils.offline import DatasetError, dataset_env_id, read_dataset
from utils.offline_replay import OfflineReplay
from utils.plot import offline_curve
from utils.replay import Batch
from utils.runs import Run, choose_device, in_words, median_seconds, read_episodes

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    """The defaults are those for Atari with `--loss huber`; C51 and CLASSIC_CONTROL, below, replace some for others."""

    # Experiment
    dataset: str = ""
    """what to learn from: a folder of the DQN Replay Dataset or of --save-dataset, or minari:<id>"""
    env_id: str | None = None
    """where to play the evaluations; not needed if the dataset says it"""
    seed: int = 1
    """seed of the networks, masks, batches and evaluations"""
    cuda: bool = True
    """use the GPU if there is one"""
    cuda_graph: bool = True
    """GPU: record an update as a CUDA graph and replay it"""
    tf32: bool = True
    """GPU: round the factors of matrix products and convolutions to 10 bits, as JAX does too"""
    runs_dir: str = "runs"
    """where the run's folder is made"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_project_name: str = "sparse-rl"
    """its project"""
    wandb_entity: str | None = None
    """its team"""
    checkpoint_every: int = 0
    """updates between checkpoints; 0 writes one only when the run is interrupted"""
    resume: str | None = None
    """a checkpoint.pt to go on from; flags that are not given keep the values they had"""
    eval_every: int = 62_500
    """updates between evaluations"""
    eval_episodes: int = 10
    """episodes played in each, and with the final network"""
    eval_epsilon: float = 0.001
    """share of random actions in them"""
    capture_video: bool = False
    """record the final episodes as MP4"""
    diagnostics_every: int = 0
    """updates between looks at dormant units, ranks, norms and interference; 0 is never"""

    # Data
    data_fraction: float = 0.05
    """share of each of the dataset's chunks that is used: its first part ..."""
    data_seed: int | None = None
    """... or, with a seed, a random block of it"""

    # Algorithm (Dopamine's offline jax_dr3.gin and jax_rainbow.gin)
    loss: Literal["huber", "c51", "bc"] = "huber"
    """DQN's TD error, or C51's cross-entropy; bc has none, and clones the behaviour by the regulariser alone"""
    alpha: float = 0.1
    """weight of the CQL regulariser; 0 is plain offline DQN or C51"""
    total_updates: int = 12_500_000
    """optimiser steps"""
    network: Literal["impala", "nature", "mlp"] = "impala"
    """the 15-layer Impala ResNet, the CNN of Mnih et al. (2015), or two hidden layers for vector observations"""
    learning_rate: float = 5e-5
    """of Adam"""
    adam_eps: float = 3.125e-4
    """epsilon of Adam"""
    batch_size: int = 32
    """transitions per update"""
    target_network_frequency: int = 2_000
    """updates between copies of the online network to the target network"""
    gamma: float = 0.99
    """discount"""
    n_step: int = 1
    """rewards summed before bootstrapping"""
    double: bool = False
    """let the online network choose the next action (van Hasselt et al. 2016)"""
    dueling: bool = False
    """split the head into the value of the state and advantages of the actions (Wang et al. 2016)"""
    n_atoms: int = 51
    """c51: atoms of the distribution of the return ..."""
    v_min: float = -10.0
    """... evenly spaced from here ..."""
    v_max: float = 10.0
    """... to here"""
    sticky_actions: float = 0.25
    """Atari: probability that the previous action is repeated (Machado et al. 2018)"""
    noop_max: int = 0
    """Atari: up to so many no-op actions at an episode's start (30 in Mnih et al. 2015)"""

    # Sparsity
    method: Literal["dense", "random", "gmp"] = "gmp"
    """no zeros; fixed random mask; gradual magnitude pruning"""
    sparsity: float = 0.95
    """share of the prunable weights that is zero at the end (prunable: all but biases)"""
    distribution: Literal["erk", "uniform"] = "erk"
    """how the zeros are shared out over the layers"""
    width: int = 1
    """multiplies the channels of the convolutions, and the hidden units of the MLP"""
    scale_dense: bool = False
    """let width multiply the 512 units after the convolutions too"""
    bias: bool = True
    """give the layers biases"""
    prune_start: float = 0.2
    """gmp: share of the updates before pruning begins ..."""
    prune_end: float = 0.8
    """... and when it is complete"""
    prune_interval: int = 1_000
    """gmp: updates from one pruning to the next"""


# What --loss c51 gets in place of the defaults above, where a flag does not say otherwise: CQL+C51.
C51 = {
    "learning_rate": 6.25e-5,
    "adam_eps": 1.5e-4,
    "target_network_frequency": 100,
    "n_step": 3,
    "double": True,
    "dueling": True,
}

# What vector observations get, with either loss.
CLASSIC_CONTROL = {
    "eval_every": 1_000,
    "eval_episodes": 20,
    "data_fraction": 1.0,
    "alpha": 1.0,
    "total_updates": 5_000,
    "network": "mlp",
    "learning_rate": 1e-3,
    "batch_size": 64,
    "target_network_frequency": 100,
    "v_min": 0.0,
    "v_max": 100.0,  # a reward of 1 for ever, discounted
}


class Head(nn.Module):
    """Q(s, a), or with C51 the logits of its atoms. With dueling, they are the state's value plus the action's
    advantage less the mean over actions."""

    def __init__(self, inputs: int, n_actions: int, n_atoms: int, dueling: bool, bias: bool) -> None:
        super().__init__()
        self.n_atoms = n_atoms
        self.action = nn.Linear(inputs, n_actions * n_atoms, bias=bias)
        self.value = nn.Linear(inputs, n_atoms, bias=bias) if dueling else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, inputs) -> (B, A, N)
        logits = self.action(x).unflatten(1, (-1, self.n_atoms))
        if self.value is None:
            return logits
        return self.value(x)[:, None] + logits - logits.mean(1, keepdim=True)


class NatureCNN(nn.Module):
    """Mnih et al. (2015), padded as in Dopamine: feature maps of 21, 11 and 11, so 7,744 x width features."""

    def __init__(self, channels: int, width: int, dense: int, bias: bool, head: Callable) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32 * width, 8, stride=4, padding=2, bias=bias)
        self.conv2 = nn.Conv2d(32 * width, 64 * width, 4, stride=2, bias=bias)
        self.conv3 = nn.Conv2d(64 * width, 64 * width, 3, padding=1, bias=bias)
        self.dense = nn.Linear(11 * 11 * 64 * width, dense, bias=bias)
        self.head = head(dense)
        self.apply(xavier_init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 4, 84, 84) uint8 -> (B, A, N)
        x = F.relu(self.conv1(x / 255.0))  # (B, 32w, 21, 21)
        x = F.relu(self.conv2(F.pad(x, (1, 2, 1, 2))))  # (B, 64w, 11, 11); "same" padding is lopsided here
        x = F.relu(self.conv3(x))  # (B, 64w, 11, 11)
        return self.head(F.relu(self.dense(x.flatten(1))))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        for conv in (self.conv1, self.conv2):  # LeCun normal, the default of Flax that Dopamine leaves in place here
            std = math.sqrt(1 / (9 * channels)) / 0.87962566  # the standard deviation of a normal cut at +-2
            nn.init.trunc_normal_(conv.weight, std=std, a=-2 * std, b=2 * std)
            if bias:
                nn.init.zeros_(conv.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ImpalaCNN(nn.Module):
    """The 15-layer ResNet of Espeholt et al. (2018): feature maps of 84, 42, 21 and 11, so 3,872 x width features."""

    def __init__(self, channels: int, width: int, dense: int, bias: bool, head: Callable) -> None:
        super().__init__()
        sizes = [channels, 16 * width, 32 * width, 32 * width]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=bias) for i, o in itertools.pairwise(sizes))
        self.dense = nn.Linear(11 * 11 * sizes[-1], dense, bias=bias)
        self.head = head(dense)
        self.apply(xavier_init)
        self.blocks = nn.ModuleList(nn.Sequential(*(ResidualBlock(c, bias) for _ in range(2))) for c in sizes[1:])

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 4, 84, 84) uint8 -> (B, A, N)
        x = x / 255.0
        for conv, blocks in zip(self.convs, self.blocks):
            x = conv(x)
            # 3x3 windows with "same" padding: one row below and right of an even size, all around an odd one
            x = F.max_pool2d(x, 3, stride=2, padding=x.shape[-1] % 2, ceil_mode=True)
            x = blocks(x)
        return self.head(F.relu(self.dense(F.relu(x).flatten(1))))


class MLP(nn.Module):
    """Two hidden layers of 512 x width, as for classic control in Dopamine."""

    def __init__(self, inputs: int, width: int, bias: bool, head: Callable) -> None:
        super().__init__()
        self.dense1 = nn.Linear(inputs, 512 * width, bias=bias)
        self.dense2 = nn.Linear(512 * width, 512 * width, bias=bias)
        self.head = head(512 * width)
        self.apply(xavier_init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, *observation shape) float32 -> (B, A, N)
        return self.head(F.relu(self.dense2(F.relu(self.dense1(x.flatten(1).float())))))


def xavier_init(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)


def make_network(args: Args, observation_space: gym.spaces.Box, n_actions: int) -> nn.Module:
    n_atoms = args.n_atoms if args.loss == "c51" else 1
    head = partial(Head, n_actions=n_actions, n_atoms=n_atoms, dueling=args.dueling, bias=args.bias)
    if args.network == "mlp":
        return MLP(math.prod(observation_space.shape), args.width, args.bias, head)
    network = {"impala": ImpalaCNN, "nature": NatureCNN}[args.network]
    dense = 512 * args.width if args.scale_dense else 512
    memory_format = torch.channels_last if args.network == "impala" else torch.contiguous_format  # what is faster
    return network(observation_space.shape[0], args.width, dense, args.bias, head).to(memory_format=memory_format)


def cubic_sparsity(update: int, start: int, end: int, final: float) -> float:
    """Gradual pruning schedule of Zhu & Gupta (2017): fast while weights are redundant, slow near the end."""
    progress = min(max((update - start) / (end - start), 0.0), 1.0)
    return final * (1 - (1 - progress) ** 3)


@torch.no_grad()
def prune(weights: dict, masks: dict, kept: dict[str, int]) -> None:
    """Gradual magnitude pruning: each layer keeps the largest of the weights it still has; nothing comes back."""
    for name, weight in weights.items():
        masks[name].copy_(keep_largest(weight.abs().masked_fill(masks[name] == 0, -math.inf), kept[name]))


def mask_update_due(update: int, start: int, end: int, interval: int) -> bool:
    """Every `interval` updates after `start`, and at `end`, so that the schedule always arrives."""
    return start < update <= end and ((update - start) % interval == 0 or update == end)


def q_values(output: torch.Tensor, support: torch.Tensor | None) -> torch.Tensor:
    """Q (B, A): the network's output (B, A, 1), or the means of its distributions (B, A, N) over atoms at `support`."""
    return output.squeeze(2) if support is None else (output.softmax(-1) * support).sum(-1)


def project(probability: torch.Tensor, place: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """C51's projection (Bellemare et al. 2017, eq. 7): an atom between two of the support's is shared out between them.

    Args:
        probability, place: (B, N), the mass of each atom and where it lies; beyond the support it counts as at its end.
        support: (N,), evenly spaced.

    Returns:
        The masses (B, N) on `support`.
    """
    distance = (place.clamp(support[0], support[-1])[:, None] - support[:, None]).abs()  # (B, N to, N from)
    delta_z = (support[-1] - support[0]) / (len(support) - 1)
    share = (1 - distance / delta_z).clamp(min=0)
    return (share * probability[:, None]).sum(-1)


def td_loss(q_network, target_network, batch: Batch, support: torch.Tensor | None, double: bool) -> tuple:
    """The mean Huber loss of the TD error, or with a support C51's mean cross-entropy; and Q(s, .) of shape (B, A)."""
    rows = torch.arange(len(batch.action), device=batch.action.device)
    with torch.no_grad():
        next_output = target_network(batch.next_observation)  # (B, A, N); N = 1 without a support
        chooser = q_network(batch.next_observation) if double else next_output
        next_output = next_output[rows, q_values(chooser, support).argmax(1)]  # (B, N)
        next_value = next_output if support is None else support
        td_target = batch.reward[:, None] + batch.discount[:, None] * next_value  # the discount is 0 after a terminal
    output = q_network(batch.observation)  # (B, A, N)
    prediction = output[rows, batch.action]  # (B, N)
    if support is None:
        loss = F.huber_loss(prediction, td_target)
    else:
        target_probability = project(next_output.softmax(1), td_target, support)
        loss = -(target_probability * prediction.log_softmax(1)).sum(1).mean()
    return loss, q_values(output, support)


def cql_regularizer(q: torch.Tensor, action: torch.Tensor) -> torch.Tensor:
    """CQL(H) (Kumar et al. 2020, eq. 4): the mean over the batch of the soft maximum of Q (B, A) minus the data's Q.

    It is the cross-entropy that clones the behaviour, with Q as logits.
    """
    return (q.logsumexp(1) - q.gather(1, action[:, None]).squeeze(1)).mean()


def loss_terms(q_network, target_network, batch: Batch, support, args: Args) -> tuple:
    """The loss, its parts, and the means of Q of the data's actions and of the greedy ones."""
    td, q = td_loss(q_network, target_network, batch, support, args.double)
    regularizer = cql_regularizer(q, batch.action)
    loss = regularizer if args.loss == "bc" else td + args.alpha * regularizer
    data_q, policy_q = q.detach().gather(1, batch.action[:, None]).mean(), q.detach().amax(1).mean()
    return loss, td.detach(), regularizer.detach(), data_q, policy_q


def epsilon_greedy(greedy: Callable[[], torch.Tensor], epsilon: float, envs: int, actions: int, rng) -> np.ndarray:
    """Actions (num_envs,): those that `greedy` gives, or with probability epsilon random ones."""
    explore = rng.random(envs) < epsilon
    action = rng.integers(actions, size=envs)
    return action if explore.all() else np.where(explore, action, greedy().cpu().numpy())


def env_id_of(args: Args) -> str:
    """The environment to play in; ends the program with one line if neither the flag nor the dataset says it."""
    require(args, "dataset", bool(args.dataset), "a folder, or minari:<id>")
    try:
        env_id = args.env_id or dataset_env_id(args.dataset)
    except DatasetError as error:
        fail(f"--dataset: {error}")
    require(args, "env_id", env_id is not None, f"the environment of {args.dataset}, which does not say it itself")
    return env_id


def check(args: Args) -> None:
    """Ends the program with one line if a flag has no meaning."""
    require_ranges(args)
    require(args, "v_max", args.v_max > args.v_min, f"a number above v-min, here {args.v_min}")
    require(args, "prune_start", 0 <= args.prune_start < args.prune_end, f"a number in [0, {args.prune_end})")


def main(args: Args) -> np.ndarray:
    """Trains, and returns the returns of the final evaluation's episodes."""
    args = replace(args, env_id=env_id_of(args))
    check(args)
    device = choose_device(args.cuda, args.tf32)
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)

    protocol = {"sticky_actions": args.sticky_actions, "noop_max": args.noop_max}
    envs = open_envs(args.env_id, 1, gym.spaces.Discrete, **protocol)
    space, actions = envs.single_observation_space, envs.single_action_space
    envs.close()
    images, n_actions = atari_game(args.env_id) is not None, int(actions.n)
    require(args, "network", images != (args.network == "mlp"), "impala or nature for Atari, mlp for vectors")
    problem = cannot_render(args.env_id) if args.capture_video else None
    if problem:
        fail(f"--capture-video: {problem}")

    # Networks
    q_network = make_network(args, space, n_actions).to(device)
    target_network = copy.deepcopy(q_network)
    c51 = args.loss == "c51"
    support = torch.linspace(args.v_min, args.v_max, args.n_atoms, device=device) if c51 else None  # (N,)
    adam = {"fused": True, "capturable": device.type == "cuda"}
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, eps=args.adam_eps, **adam)

    # Masks: ones and zeros in the weights' shapes, changed only in place
    weights, target_weights = prunable(q_network), prunable(target_network)
    shapes = {name: tuple(weight.shape) for name, weight in weights.items()}
    distribution = erk_densities if args.distribution == "erk" else uniform_densities
    densities = distribution(shapes, 0.0 if args.method == "dense" else args.sparsity)
    final_kept = {name: kept_count(weight.numel(), densities[name]) for name, weight in weights.items()}
    starts_dense = args.method in ("dense", "gmp")
    kept = {name: weight.numel() for name, weight in weights.items()} if starts_dense else dict(final_kept)
    generator = torch.Generator().manual_seed(args.seed)
    masks = {}
    if args.method != "dense":
        for name, weight in weights.items():
            masks[name] = torch.zeros_like(weight).copy_(random_mask(shapes[name], kept[name], generator))
    apply_masks(weights, masks)
    apply_masks(target_weights, masks)

    # Schedules count updates; a short run has its mask updates closer together, at least 50 of them
    n_updates = args.total_updates
    prune_start, prune_end = int(args.prune_start * n_updates), min(int(args.prune_end * n_updates), n_updates - 1)
    prune_interval = max(1, min(args.prune_interval, (prune_end - prune_start) // 50))

    stack = STACK if images else 1
    try:
        rows = read_dataset(args.dataset, space, stack, args.data_fraction, args.data_seed)
        replay = OfflineReplay(rows, stack, args.n_step, args.gamma, device)
    except DatasetError as error:
        fail(f"--dataset: {error}")
    print(f"dataset: {len(replay):,} transitions from {len(rows.first)} chunks, frames on {replay.device.type}")
    if int(replay.action.max()) >= n_actions:
        fail(f"--env-id: {args.env_id} has {n_actions} actions, the dataset has an action {int(replay.action.max())}")

    state = {  # all that a checkpoint restores, beside the masks and the random numbers
        "networks": {"q_network": q_network, "target_network": target_network},
        "optimizer": optimizer,
    }
    update, q_history = 0, []
    if args.resume:
        saved = load_checkpoint(args.resume, SCRIPT)
        update, q_history = saved["update"], saved["q_history"]
        require(args, "total_updates", args.total_updates >= update, f"{update} or more, --resume's")
        restore(saved, args, rng, state, masks, kept)
        kept = saved["kept"]
        if args.method == "gmp" and update > prune_end and kept != final_kept:
            fail(f"--resume: {args.resume} is at update {update}, after the end of the pruning with these flags")

    if images and device.type == "cpu":
        batch = replay.gather(torch.arange(args.batch_size) % len(replay))  # draws no random number
        per_update = median_seconds(lambda: loss_terms(q_network, target_network, batch, support, args)[0].backward())
        seconds = (n_updates - update) * per_update
        print(f"no GPU here: the updates will take about {in_words(seconds)}, at {per_update:.2f} s each")
        print("a small task that ends within minutes: the first two commands on top of cql_pruned.py")

    table = mask_table(shapes, final_kept)
    print(table)
    run = Run(args, SCRIPT, update, args.total_updates, unit="update")
    run.text("sparsity", table)

    def checkpoint() -> None:
        counters = {"kept": kept, "q_history": q_history, "update": update}
        save_checkpoint(run.folder, SCRIPT, args, rng, state, masks, **counters)

    @torch.no_grad()
    def look() -> dict[str, float]:
        """The diagnostics, on a sample of the dataset."""
        batch = replay.sample(256)
        next_value = q_values(target_network(batch.next_observation), support).amax(1)
        return report(q_network, batch.observation, masks=masks) | {
            "diagnostics/target_variance": target_variance(batch.reward, batch.discount, next_value),
            "diagnostics/gradient_cosine": interference(
                q_network, lambda q, *one: loss_terms(q, target_network, Batch(*one), support, args)[0], batch
            ),
        }

    @torch.inference_mode()
    def greedy_action(observation: np.ndarray) -> torch.Tensor:  # (num_envs, ...) -> (num_envs,)
        observation = torch.as_tensor(observation, dtype=replay.frames.dtype).to(device, non_blocking=True)
        return q_values(q_network(observation), support).argmax(1)

    def policy(observation: np.ndarray) -> np.ndarray:
        return epsilon_greedy(partial(greedy_action, observation), args.eval_epsilon, len(observation), n_actions, rng)

    def play(envs: gym.vector.VectorEnv) -> np.ndarray:
        returns, lengths = evaluate(envs, policy, args.eval_episodes, args.seed + 1_000_000)
        for episode_return, length in zip(returns, lengths):
            run.episode(episode_return, length, update)
        return returns

    make_eval_envs = partial(make_envs, args.env_id, min(args.eval_episodes, 8), **protocol)

    def learn(mask_due: bool = False) -> list:
        """One update, and a change of the mask if it is due; parts of the loss and means of Q."""
        batch = replay.sample(args.batch_size)
        loss, *terms = loss_terms(q_network, target_network, batch, support, args)
        optimizer.zero_grad()
        loss.backward()

        if mask_due:
            for name, weight in weights.items():
                sparsity = cubic_sparsity(update, prune_start, prune_end, 1 - densities[name])
                kept[name] = min(kept[name], kept_count(weight.numel(), 1 - sparsity))
            prune(weights, masks, kept)
        optimizer.step()
        apply_masks(weights, masks)  # after every step: Adam's moments would revive what was pruned
        if mask_due:
            apply_masks(target_weights, masks)
        return terms

    fast_learn = cuda_graph(learn, args.cuda_graph and device.type == replay.device.type == "cuda")

    # The loop
    log_every = max(100, args.total_updates // 1_000)
    while update < args.total_updates and not run.stopping:
        prune_due = args.method == "gmp" and mask_update_due(update, prune_start, prune_end, prune_interval)
        terms = learn(mask_due=True) if prune_due else fast_learn()
        update += 1

        if update % args.target_network_frequency == 0:
            target_network.load_state_dict(q_network.state_dict())

        run.progress(update)
        if update % log_every == 0:
            td, regularizer, data_q, policy_q = torch.stack(terms).tolist()
            q_history.append([update, data_q, policy_q])
            sparsity = sparsity_scalars(shapes, kept)
            losses = {"losses/td_loss": td, "losses/cql_regularizer": regularizer}
            losses |= {"losses/q_values": data_q, "losses/policy_q_values": policy_q}
            charts = {"charts/updates_per_second": run.steps_per_second(update)}
            run.scalars(losses | charts | sparsity, update)
            run.progress(update, loss=td, sparsity=sparsity["sparsity/global"])
        if args.diagnostics_every and update % args.diagnostics_every == 0:
            with torch.random.fork_rng():  # the run goes on with the random numbers that it would have had
                run.scalars(look(), update)
        if update % args.eval_every == 0 and update < args.total_updates:
            play(make_eval_envs())
        if args.checkpoint_every and update % args.checkpoint_every == 0:
            checkpoint()

    # The end
    if run.stopping:
        checkpoint()
        run.stop(update)
        return np.array([])
    save_model(run.folder, SCRIPT, args, {"q_network": q_network}, {"q_network": masks})

    if args.capture_video:
        returns = play(make_video_env(args.env_id, str(run.folder / "videos"), **protocol))
    else:
        returns = play(make_eval_envs())
    zeros = "" if args.method == "dense" else f" {args.sparsity:g}"
    title = f"{args.env_id}: {args.loss}, {args.method}{zeros}, width {args.width}, seed {args.seed}"
    offline_curve(read_episodes(run.folder / "episodes.csv"), q_history, title, run.folder / "curve.png")
    run.finish(returns)
    return returns


def preset(args: Args) -> dict:
    """What the flags that are not given have in place of their defaults."""
    vectors = atari_game(env_id_of(args)) is None
    return (C51 if args.loss == "c51" else {}) | (CLASSIC_CONTROL if vectors else {})


if __name__ == "__main__":
    main(parse_args(Args, preset))
