# Documentation and results: docs/cql_pruned.md
"""Offline CQL with a sparse network: the claim is that on logged Atari, a wide network with few weights learns best.

The agent learns from a dataset alone: Dopamine's DQN (`--loss huber`) or C51 (`--loss c51`) with conservative
Q-learning, which lowers the values of actions that the data do not contain. `--method` chooses how the network becomes
sparse: gradual magnitude pruning during training (gmp), a fixed random mask (random), or a mask of constant size that
moves: RigL grows connections where the gradient is largest, SET at random. Everything that changes learning is in this
file; `utils/` keeps the books.

Obando-Ceron, Courville, Castro (2024), In value-based deep RL, a pruned network is a good network. arXiv:2402.12479
Kumar, Zhou, Tucker, Levine (2020), Conservative Q-learning for offline reinforcement learning. arXiv:2006.04779
Agarwal, Schuurmans, Norouzi (2020), An optimistic perspective on offline reinforcement learning. arXiv:1907.04543

    python dqn_sparse.py --env-id CartPole-v1 --save-dataset data/cartpole   # a small dataset, in two minutes
    python cql_pruned.py --dataset data/cartpole                             # the agent that learns from it
    python cql_pruned.py --dataset data/Pong/1/replay_logs --loss c51 --sparsity 0.95 --width 3
"""

import copy
import itertools
import math
from collections import OrderedDict
from dataclasses import dataclass, replace
from functools import partial
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.diagnostics import EverActive, diagnose
from utils.envs import Policy, atari_game, is_minatar, open_envs, stack_size
from utils.flags import (
    Above,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveFraction,
    PositiveInt,
    Probability,
    RunFlags,
    Seed,
    Sparsity,
    expect,
)
from utils.graphs import cuda_graph
from utils.launch import launch
from utils.masks import active_count, apply_masks, keep_largest, layer_densities, mask_table, prunable, random_mask
from utils.offline.read import dataset_env_id, read_dataset
from utils.offline.replay import OfflineReplay
from utils.replay import Batch, to_device
from utils.runs import Run, choose_device


@dataclass
class Args(RunFlags):
    """Defaults for Atari and `--loss huber`; C51, MINATAR and CLASSIC_CONTROL replace some of them. `RunFlags` adds
    flags that do not affect learning: device, logging, checkpoints, evaluation. Steps are updates here."""

    # Experiment
    dataset: str = ""
    """dataset to learn from: a folder of the DQN Replay Dataset or of --save-dataset, or minari:<id>"""
    env_id: str | None = None
    """environment of the evaluations; only needed if the dataset does not name it"""
    seed: Seed = 1
    """seed of networks, masks, batches and evaluations"""
    total_updates: PositiveInt = 12_500_000
    """total gradient steps"""
    eval_every: NonNegativeInt = 62_500
    """updates between evaluations during training; 0 evaluates the final network only"""

    # Data
    data_fraction: PositiveFraction = 0.05
    """fraction of each of the dataset's chunks that is used: its first part, or with --data-seed a random block"""
    data_seed: Seed | None = None
    """seed of the random blocks of --data-fraction"""

    # Network and optimisation (Dopamine's offline jax_dr3.gin and jax_rainbow.gin)
    loss: Literal["huber", "c51", "bc"] = "huber"
    """Huber loss of DQN's TD error, C51's cross-entropy, or the CQL regulariser alone (behaviour cloning)"""
    cql_alpha: NonNegativeFloat = 0.1
    """weight of the CQL regulariser; 0 is plain offline DQN or C51"""
    network: Literal["impala", "nature"] = "impala"
    """network for Atari: the 15-layer Impala ResNet, or the CNN of Mnih et al. (2015)"""
    learning_rate: PositiveFloat = 5e-5
    """learning rate of Adam"""
    adam_eps: PositiveFloat = 3.125e-4
    """epsilon of Adam"""
    batch_size: PositiveInt = 32
    """transitions per update"""
    target_network_frequency: PositiveInt = 2_000
    """updates between copies of the online network to the target network"""
    gamma: Probability = 0.99
    """discount factor"""
    n_step: PositiveInt = 1
    """n of the n-step return"""
    n_atoms: Annotated[PositiveInt, Above(1)] = 51
    """c51: number of atoms of the distribution of the return, evenly spaced"""
    v_min: float = -10.0
    """c51: position of the first atom"""
    v_max: Annotated[float, Above("v_min")] = 10.0
    """c51: position of the last atom"""
    double: bool = False
    """double DQN: the online network selects the next action (van Hasselt et al. 2016)"""
    dueling: bool = False
    """split the head into a state value and advantages of the actions (Wang et al. 2016)"""

    # Evaluation protocol (Machado et al. 2018)
    eval_epsilon: Probability = 0.001
    """epsilon of evaluations"""
    sticky_actions: Probability = 0.25
    """Atari: probability that the emulator repeats the previous action"""
    noop_max: NonNegativeInt = 0
    """Atari: maximum number of no-op actions at the start of an episode (30 in Mnih et al. 2015)"""

    # Sparsity
    method: Literal["dense", "random", "gmp", "rigl", "set"] = "gmp"
    """dense network, fixed random mask (static sparsity), gradual magnitude pruning, RigL, or SET"""
    sparsity: Sparsity = 0.95
    """fraction of prunable weights (all but biases) that is zero at the end of training"""
    distribution: Literal["erk", "uniform"] = "erk"
    """how the sparsity is distributed over the layers: Erdos-Renyi-kernel, or the same in each"""
    width: PositiveInt = 1
    """multiplies the channels of the convolutions; for vectors and MinAtar, the hidden units too"""
    bias: bool = True
    """give the layers biases"""
    prune_start: Probability = 0.2
    """gmp: fraction of the updates after which pruning starts"""
    prune_end: Annotated[Probability, Above("prune_start")] = 0.8
    """gmp: fraction of the updates after which the final sparsity is reached"""
    prune_interval: PositiveInt = 1_000
    """gmp: updates between mask updates; short runs shrink it to have at least 50 of them"""
    rewire_end: Probability = 0.8
    """rigl, set: fraction of the updates after which the mask is frozen"""
    rewire_interval: PositiveInt = 5_000
    """rigl, set: updates between mask updates; short runs shrink it to have at least 50 of them"""
    drop_fraction: Probability = 0.3
    """rigl, set: initial fraction of a layer's connections that a mask update replaces; cosine-annealed to 0"""


# Defaults for --loss c51 (explicit flags win): CQL+C51 of Obando-Ceron et al. (2024).
C51 = {
    "learning_rate": 6.25e-5,
    "adam_eps": 1.5e-4,
    "target_network_frequency": 100,
    "n_step": 3,
    "double": True,
    "dueling": True,
}

# Defaults for MinAtar, with any loss.
MINATAR = {
    "eval_every": 25_000,
    "eval_episodes": 100,
    "data_fraction": 1.0,
    "total_updates": 250_000,
    "learning_rate": 2.5e-4,
    "adam_eps": 3.125e-4,
    "target_network_frequency": 250,
    "v_min": 0.0,
    "v_max": 100.0,
}

# Defaults for vector observations, with any loss.
CLASSIC_CONTROL = {
    "eval_every": 1_000,
    "eval_episodes": 20,
    "data_fraction": 1.0,
    "cql_alpha": 1.0,
    "total_updates": 5_000,
    "learning_rate": 1e-3,
    "batch_size": 64,
    "target_network_frequency": 100,
    "v_min": 0.0,
    "v_max": 100.0,  # CartPole: a reward of 1 forever, discounted
}


# ---- Networks --------------------------------------------------------------------------------------------------------

TRUNCATED_NORMAL_STD = 0.87962566103423978  # standard deviation of a unit normal truncated at +-2


class NatureCNN(nn.Module):
    """Mnih et al. (2015), padded as in Dopamine: feature maps of 21, 11 and 11, so 7,744 x width features."""

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32 * width, 8, stride=4, padding=2, bias=bias)
        self.conv2 = nn.Conv2d(32 * width, 64 * width, 4, stride=2, bias=bias)
        self.conv3 = nn.Conv2d(64 * width, 64 * width, 3, padding=1, bias=bias)
        self.features = 11 * 11 * 64 * width

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 4, 84, 84) uint8 -> (B, features)
        x = F.relu(self.conv1(x / 255.0))  # (B, 32w, 21, 21)
        x = F.relu(self.conv2(F.pad(x, (1, 2, 1, 2))))  # (B, 64w, 11, 11); TensorFlow's "SAME" is asymmetric here
        return F.relu(self.conv3(x)).flatten(1)  # (B, 64w x 11 x 11)


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, bias: bool) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.conv2(F.relu(self.conv1(F.relu(x))))


class ImpalaCNN(nn.Module):
    """The 15-layer ResNet of Espeholt et al. (2018): feature maps of 84, 42, 21 and 11, so 3,872 x width features."""

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        sizes = [channels, 16 * width, 32 * width, 32 * width]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=bias) for i, o in itertools.pairwise(sizes))
        self.blocks = nn.ModuleList(nn.Sequential(*(ResidualBlock(c, bias) for _ in range(2))) for c in sizes[1:])
        self.features = 11 * 11 * sizes[-1]

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, 4, 84, 84) uint8 -> (B, features)
        x = x / 255.0
        for conv, blocks in zip(self.convs, self.blocks):
            x = conv(x)
            # TensorFlow's "SAME" for 3x3 windows with stride 2: pads even sizes at the end, odd ones on both sides
            x = F.max_pool2d(x, 3, stride=2, padding=x.shape[-1] % 2, ceil_mode=True)
            x = blocks(x)
        return F.relu(x).flatten(1)


class MinAtarCNN(nn.Module):
    """Young & Tian (2019), for the 10 x 10 images of MinAtar: 1,024 x width features."""

    def __init__(self, channels: int, width: int, bias: bool) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, 16 * width, 3, bias=bias)
        self.features = 8 * 8 * 16 * width

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, channels, 10, 10) of zeros and ones -> (B, features)
        return F.relu(self.conv(x.float())).flatten(1)


class MLP(nn.Module):
    """One hidden layer, and the head has another: as for classic control in Dopamine."""

    def __init__(self, inputs: int, width: int, bias: bool) -> None:
        super().__init__()
        self.dense = nn.Linear(inputs, 512 * width, bias=bias)
        self.features = 512 * width

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, inputs) float32 -> (B, features)
        return F.relu(self.dense(x))


class Head(nn.Module):
    """Q(s, a) of all actions, or with C51 the logits of their atoms, after a hidden layer. With dueling, they are those
    of the state value plus those of the action's advantage, less the mean advantage.
    """

    def __init__(self, features: int, hidden: int, n_actions: int, n_atoms: int, dueling: bool, bias: bool) -> None:
        super().__init__()
        self.n_atoms = n_atoms
        self.dense = nn.Linear(features, hidden, bias=bias)
        self.out = nn.Linear(hidden, n_actions * n_atoms, bias=bias)
        self.value = nn.Linear(hidden, n_atoms, bias=bias) if dueling else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, features) -> (B, A, N); N = 1 without C51
        x = F.relu(self.dense(x))
        logits = self.out(x).unflatten(1, (-1, self.n_atoms))
        if self.value is None:
            return logits
        return self.value(x)[:, None] + logits - logits.mean(1, keepdim=True)


def init_weights(module: nn.Module, fan_in: bool) -> None:
    """Dopamine's initialisation of a module's own layers: Xavier uniform; in residual blocks Flax's LeCun normal; in
    the Nature network uniform with variance 1 / (sqrt(3) fan-in).
    """
    for layer in module.children():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if isinstance(module, ResidualBlock):
                std = math.sqrt(1 / layer.weight[0].numel()) / TRUNCATED_NORMAL_STD
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            elif fan_in:
                bound = math.sqrt(math.sqrt(3) / layer.weight[0].numel())
                nn.init.uniform_(layer.weight, -bound, bound)
            else:
                nn.init.xavier_uniform_(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)


def make_networks(args: Args, obs_space: gym.spaces.Box, action_space: gym.spaces.Discrete) -> dict[str, nn.Module]:
    """The networks that model.pt holds, by name."""
    inputs, n_atoms = obs_space.shape[0], args.n_atoms if args.loss == "c51" else 1
    if len(obs_space.shape) == 1:
        torso, hidden = MLP(inputs, args.width, args.bias), 512 * args.width
    elif obs_space.shape[1:] == (10, 10):
        torso, hidden = MinAtarCNN(inputs, args.width, args.bias), 128 * args.width
    else:
        torso, hidden = {"impala": ImpalaCNN, "nature": NatureCNN}[args.network](inputs, args.width, args.bias), 512
    head = Head(torso.features, hidden, int(action_space.n), n_atoms, args.dueling, args.bias)
    q_network = nn.Sequential(OrderedDict(torso=torso, head=head))
    q_network.apply(partial(init_weights, fan_in=isinstance(torso, NatureCNN)))
    if isinstance(torso, ImpalaCNN):
        q_network = q_network.to(memory_format=torch.channels_last)  # faster for this network alone
    return {"q_network": q_network}


# ---- Sparsity --------------------------------------------------------------------------------------------------------


def initial_masks(weights: dict, densities: dict[str, float], method: str, seed: int) -> dict[str, torch.Tensor]:
    """Masks of zeros and ones: for gmp all ones, to be pruned later; a dense network has none."""
    if method == "dense" or min(densities.values()) == 1:
        return {}
    if method == "gmp":
        return {name: torch.ones_like(weight) for name, weight in weights.items()}
    generator = torch.Generator().manual_seed(seed)
    counts = {name: active_count(weight.numel(), densities[name]) for name, weight in weights.items()}
    return {name: random_mask(weight.detach(), counts[name], generator) for name, weight in weights.items()}


def mask_schedule(args: Args, masks: dict, n_updates: int) -> tuple[int, int, int]:
    """(start, end, interval): masks change every `interval` updates after update `start`, the last time at `end`."""
    if not masks or args.method == "random":
        return 0, 0, 1  # never
    start, end, interval = 0.0, args.rewire_end, args.rewire_interval
    if args.method == "gmp":
        start, end, interval = args.prune_start, args.prune_end, args.prune_interval
    first = max(0, min(int(start * n_updates), n_updates - 2))
    last = max(first + 1, min(int(end * n_updates), n_updates - 1))
    interval = max(1, min(interval, (last - first) // 50))
    print(f"mask updates: every {interval:,} updates from update {first:,} to {last:,}")
    return first, last, interval


def mask_update_due(update: int, start: int, end: int, interval: int) -> bool:
    """Every `interval` updates after `start`, and at `end`, so that the schedule always completes."""
    return start < update <= end and ((update - start) % interval == 0 or update == end)


def cubic_density(progress: float, final: float) -> float:
    """Gradual pruning schedule of Zhu & Gupta (2017): fast while weights are redundant, slow near the end."""
    return final + (1 - final) * (1 - progress) ** 3


def cosine_drop_fraction(progress: float, initial: float) -> float:
    """RigL's annealing of the fraction of connections that a mask update replaces (Evci et al. 2020, sec. 3)."""
    return initial / 2 * (1 + math.cos(math.pi * progress))


@torch.no_grad()
def prune(weights: dict, masks: dict, densities: dict[str, float], progress: float) -> None:
    """Gradual magnitude pruning: each layer keeps the largest of its active weights; pruned weights stay zero."""
    for name, mask in masks.items():
        density = cubic_density(progress, densities[name])
        n_active = min(active_count(mask.numel(), density), int(mask.count_nonzero()))
        score = weights[name].abs().masked_fill(mask == 0, -math.inf)
        mask.copy_(keep_largest(score, n_active))  # in place: a captured CUDA graph reads this very tensor


@torch.no_grad()
def rewire(weights: dict, masks: dict, optimizer: torch.optim.Optimizer, drop_fraction: float, method: str) -> None:
    """RigL (Evci et al. 2020): drop the smallest weights, grow where the dense gradient is largest; SET, at random."""
    for name, mask in masks.items():
        weight, active = weights[name], mask > 0
        n_active = int(active.sum())
        n_drop = int(drop_fraction * n_active)
        survivors = keep_largest(weight.abs().masked_fill(~active, -math.inf), n_active - n_drop)
        grow_score = weight.grad.abs() if method == "rigl" else torch.rand_like(weight)
        grown = keep_largest(grow_score.masked_fill(survivors, -math.inf), n_drop)
        # What was just dropped may grow back, and keeps its value and Adam moments; newly active weights start from 0
        newly_active = grown & ~active
        weight.masked_fill_(newly_active, 0.0)
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[weight][moment].masked_fill_(newly_active, 0.0)
        mask.copy_(survivors | grown)


# ---- Losses and policy -----------------------------------------------------------------------------------------------


def q_values(output: torch.Tensor, support: torch.Tensor | None) -> torch.Tensor:
    """Q (B, A): the network's output (B, A, 1), or the means of its distributions (B, A, N) over atoms at `support`."""
    return output.squeeze(2) if support is None else (output.softmax(-1) * support).sum(-1)


def make_support(args: Args, device: torch.device) -> torch.Tensor | None:  # (N,)
    return torch.linspace(args.v_min, args.v_max, args.n_atoms, device=device) if args.loss == "c51" else None


def project(probability: torch.Tensor, atoms: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """C51's projection (Bellemare et al. 2017, eq. 7): each atom's mass is split between its neighbours in `support`.

    Args:
        probability, atoms: (B, N), the mass of each atom and its position; beyond the support it is moved to its end.
        support: (N,), evenly spaced.

    Returns:
        The masses (B, N) on `support`.
    """
    distance = (atoms.clamp(support[0], support[-1])[:, None] - support[:, None]).abs()  # (B, N to, N from)
    delta_z = (support[-1] - support[0]) / (len(support) - 1)
    fraction = (1 - distance / delta_z).clamp(min=0)
    return (fraction * probability[:, None]).sum(-1)


def td_loss(
    q_network: nn.Module, target_network: nn.Module, batch: Batch, support: torch.Tensor | None, double: bool
) -> tuple:
    """The mean Huber loss of the TD error, or with a support C51's mean cross-entropy; and Q(s, .) (B, A)."""
    rows = torch.arange(len(batch.action), device=batch.action.device)
    with torch.no_grad():
        next_output = target_network(batch.next_observation)  # (B, A, N); N = 1 without a support
        selection_output = q_network(batch.next_observation) if double else next_output
        next_output = next_output[rows, q_values(selection_output, support).argmax(1)]  # (B, N)
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

    It is the cross-entropy of behaviour cloning, with Q as logits.
    """
    return (q.logsumexp(1) - q.gather(1, action[:, None]).squeeze(1)).mean()


def loss_terms(
    q_network: nn.Module, target_network: nn.Module, batch: Batch, support: torch.Tensor | None, args: Args
) -> tuple:
    """The loss; for the log its parts, and the means of Q of the data's actions and of the greedy ones."""
    td, q = td_loss(q_network, target_network, batch, support, args.double)
    regularizer = cql_regularizer(q, batch.action)
    loss = regularizer if args.loss == "bc" else td + args.cql_alpha * regularizer
    data_q, policy_q = q.detach().gather(1, batch.action[:, None]).mean(), q.detach().amax(1).mean()
    return loss, td.detach(), regularizer.detach(), data_q, policy_q


class QValues(nn.Module):
    """A network whose outputs are Q(s, a): with C51, the means of its distributions."""

    def __init__(self, network: nn.Module, support: torch.Tensor | None) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("support", support)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, *obs shape) -> (B, A)
        return q_values(self.network(x), self.support)


def make_greedy(args: Args, networks: dict[str, nn.Module]) -> nn.Module:
    """The network that acts greedily, for `utils.export`: observations (n, *obs shape) -> Q (n, A)."""
    q_network = networks["q_network"]
    return QValues(q_network, make_support(args, next(q_network.parameters()).device))


def make_policy(args: Args, networks: dict[str, nn.Module]) -> Policy:
    """The policy of evaluations and videos: epsilon-greedy with `eval_epsilon`."""
    greedy_network = make_greedy(args, networks)
    device = next(greedy_network.parameters()).device

    @torch.inference_mode()
    def policy(obs: np.ndarray, rngs: list[np.random.Generator]) -> np.ndarray:  # (n, *obs shape) -> (n,)
        q = greedy_network(to_device(obs, device))  # (n, A)
        greedy = q.argmax(1).tolist()
        explore = [rng.random() < args.eval_epsilon for rng in rngs]
        return np.array([rng.integers(q.shape[1]) if e else a for a, e, rng in zip(greedy, explore, rngs)])

    return policy


def env_id_of(args: Args) -> str:
    """The environment of the evaluations."""
    expect(args, "dataset", bool(args.dataset), "a folder, or minari:<id>")
    env_id = args.env_id or dataset_env_id(args.dataset)
    expect(args, "env_id", env_id is not None, f"the environment of {args.dataset}, which does not name it")
    return env_id


def main(args: Args) -> np.ndarray:
    """Trains the agent; returns the returns (episodes,) of the final evaluation."""
    args = replace(args, env_id=env_id_of(args))
    device = choose_device(args)
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    envs = open_envs(args, gym.spaces.Discrete)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    envs.close()
    if device.type == "cpu" and atari_game(args.env_id):
        print("note: Atari takes days on a CPU; for a task of minutes, see the first two commands in cql_pruned.py")

    # ---- Agent -------------------------------------------------------------------------------------------------------
    networks = make_networks(args, obs_space, action_space)
    q_network = networks["q_network"].to(device)
    target_network = copy.deepcopy(q_network)
    support = make_support(args, device)
    adam = {"fused": True, "capturable": device.type == "cuda"}
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, eps=args.adam_eps, **adam)
    stack = stack_size(args.env_id)
    rows = read_dataset(args.dataset, obs_space, stack, args.data_fraction, args.data_seed)
    replay = OfflineReplay(rows, stack, args.n_step, args.gamma, device)
    print(f"dataset: {len(replay):,} transitions in {len(rows.first)} chunk(s), frames on {replay.device.type}")
    largest = int(replay.action.max())
    expect(args, "env_id", largest < action_space.n, f"an environment with more than {largest} actions, as in the data")

    # ---- Sparsity ----------------------------------------------------------------------------------------------------
    weights, target_weights = prunable(q_network), prunable(target_network)
    densities = layer_densities(weights, 0.0 if args.method == "dense" else args.sparsity, args.distribution)
    masks = initial_masks(weights, densities, args.method, args.seed)
    apply_masks(weights, masks)
    apply_masks(target_weights, masks)
    print(mask_table(weights, densities))
    mask_start, mask_end, mask_interval = mask_schedule(args, masks, args.total_updates)

    ever_active = EverActive(masks)  # for the diagnostics
    state = {
        "q_network": q_network,
        "target_network": target_network,
        "optimizer": optimizer,
        "masks": masks,
        "ever_active": ever_active,
    }
    run = Run(args, __file__, state, rng, total=args.total_updates, unit="update")
    update = run.update  # 0, or that of the checkpoint that --resume names

    def learn(mask_progress: float | None = None) -> list[torch.Tensor]:
        """One update; `mask_progress` is the fraction of the mask schedule that is over, if a mask update is due.

        Returns parts of the loss and means of Q, see `loss_terms`.
        """
        batch = replay.sample(args.batch_size)
        loss, *terms = loss_terms(q_network, target_network, batch, support, args)
        optimizer.zero_grad()
        # Masks multiply the stored weights, not the forward pass, so pruned weights get gradients: RigL grows by them
        loss.backward()

        # Masks
        if mask_progress is None:
            optimizer.step()
        elif args.method == "gmp":
            prune(weights, masks, densities, mask_progress)
            optimizer.step()
        else:  # RigL and SET: the change of topology replaces the gradient step
            rewire(weights, masks, optimizer, cosine_drop_fraction(mask_progress, args.drop_fraction), args.method)
        apply_masks(weights, masks)  # after every step, as gradients and Adam's moments would revive pruned weights
        if mask_progress is not None:
            apply_masks(target_weights, masks)
            ever_active.update(masks)
        return terms

    # A CUDA graph replays kernels on fixed memory, and none of the Python above. So mask updates are called eagerly,
    # and all that changes between replays (weights and masks) changes in place
    fast_learn = cuda_graph(learn, args.cuda_graph and device.type == replay.device.type == "cuda")

    # ---- Loop --------------------------------------------------------------------------------------------------------
    while update < args.total_updates and not run.stopping:
        if mask_update_due(update, mask_start, mask_end, mask_interval):
            terms = learn(mask_progress=(update - mask_start) / (mask_end - mask_start))
        else:
            terms = fast_learn()
        update += 1

        run.advance(update, update)
        if run.due(args.target_network_frequency):
            target_network.load_state_dict(q_network.state_dict())
        if run.due(run.log_every):
            names = ("td_loss", "cql_regularizer", "q_values", "policy_q_values")
            scalars = {f"losses/{name}": value for name, value in zip(names, torch.stack(terms).tolist())}
            if masks and args.method in ("rigl", "set"):
                progress = min((update - mask_start) / (mask_end - mask_start), 1.0)
                scalars["sparsity/drop_fraction"] = cosine_drop_fraction(progress, args.drop_fraction)
            run.log(scalars, weights, masks)
        if run.due(args.diagnostics_every):
            run.log(
                diagnose(
                    q_network,
                    replay.sample,
                    masks,
                    ever_active,
                    loss=lambda q, batch: loss_terms(q, target_network, batch, support, args)[0],
                    next_value=lambda batch: q_values(target_network(batch.next_observation), support).amax(1),
                )
            )
        if run.due(args.eval_every):
            run.evaluate(make_policy(args, networks))
        if run.due(args.checkpoint_every):
            run.try_checkpoint()

    if run.stopping:
        run.stop()
    return run.finish(make_policy(args, networks), networks, {"q_network": masks}, {"q_network": densities})


def preset(args: Args) -> dict:
    """Values that replace defaults for these flags."""
    loss = C51 if args.loss == "c51" else {}
    env_id = env_id_of(args) if args.dataset else ""
    if is_minatar(env_id):
        return loss | MINATAR
    return loss | (CLASSIC_CONTROL if env_id and not atari_game(env_id) else {})


if __name__ == "__main__":
    launch(main, Args, preset)
