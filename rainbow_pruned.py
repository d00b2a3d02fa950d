# Documentation and results: docs/rainbow_pruned.md
"""Rainbow with a sparse network: the claim is that on Atari, a wide network with few weights beats a dense one.

The agent is Dopamine's compact Rainbow: n-step returns, prioritised replay, and C51's categorical distribution of the
return; `--double --dueling --noisy` make it the full one. `--method` chooses how the network becomes sparse: gradual
magnitude pruning during training (gmp), a fixed random mask (random), or a mask of constant size that moves: RigL grows
connections where the gradient is largest, SET at random. Everything that changes learning is in this file.

Obando-Ceron, Courville, Castro (2024), In value-based deep RL, a pruned network is a good network. arXiv:2402.12479
Hessel et al. (2018), Rainbow: combining improvements in deep reinforcement learning. arXiv:1710.02298
Bellemare, Dabney, Munos (2017), A distributional perspective on reinforcement learning (C51). arXiv:1707.06887

    python rainbow_pruned.py --env-id CartPole-v1            # a return of about 500 in a few minutes on a laptop
    python rainbow_pruned.py --sparsity 0.9 --width 4        # Breakout, 10 million steps, four times as wide (GPU)
    python rainbow_pruned.py --double --dueling --noisy --network nature --env-id ALE/Pong-v5
"""

import copy
import itertools
import math
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.diagnostics import EverActive, diagnose
from utils.envs import Policy, atari_game, is_minatar, open_envs, stack_size
from utils.flags import Above, NonNegativeInt, PositiveFloat, PositiveInt, Probability, RunFlags, Seed, Sparsity
from utils.graphs import cuda_graph
from utils.launch import launch
from utils.masks import active_count, apply_masks, keep_largest, layer_densities, mask_table, prunable, random_mask
from utils.priorities import Priorities
from utils.replay import Batch, Replay, to_device
from utils.runs import Run, choose_device


@dataclass
class Args(RunFlags):
    """Defaults for Atari; MINATAR and CLASSIC_CONTROL replace some of them for other environments. `RunFlags` adds
    flags that do not affect learning: device, logging, checkpoints, evaluation."""

    # Experiment
    env_id: str = "ALE/Breakout-v5"
    """an Atari game (ALE/Pong-v5), a MinAtar game (MinAtar/Breakout-v0), or any Gymnasium id with discrete actions and
    vectors as observations (CartPole-v1)"""
    seed: Seed = 1
    """seed of networks, masks, environments and exploration"""
    total_timesteps: Annotated[PositiveInt, Above("learning_starts")] = 10_000_000
    """total agent steps (4 Atari frames each)"""
    num_envs: PositiveInt = 1
    """environments stepped together; the number of updates per agent step stays the same"""

    # Network and optimisation (Dopamine's rainbow.gin)
    network: Literal["impala", "nature"] = "impala"
    """network for Atari: the 15-layer Impala ResNet, or the CNN of Mnih et al. (2015)"""
    learning_rate: PositiveFloat = 6.25e-5
    """learning rate of Adam"""
    adam_eps: PositiveFloat = 1.5e-4
    """epsilon of Adam"""
    batch_size: PositiveInt = 32
    """transitions per update"""
    target_network_frequency: PositiveInt = 8_000
    """agent steps between copies of the online network to the target network"""
    gamma: Probability = 0.99
    """discount factor"""
    n_step: PositiveInt = 3
    """n of the n-step return"""
    n_atoms: Annotated[PositiveInt, Above(1)] = 51
    """number of atoms of the distribution of the return, evenly spaced"""
    v_min: float = -10.0
    """position of the first atom"""
    v_max: Annotated[float, Above("v_min")] = 10.0
    """position of the last atom"""
    double: bool = False
    """double DQN: the online network selects the next action (van Hasselt et al. 2016)"""
    dueling: bool = False
    """split the head into a state value and advantages of the actions (Wang et al. 2016)"""

    # Replay
    buffer_size: PositiveInt = 1_000_000
    """rows of the replay: one for each transition, and one more for each episode"""
    learning_starts: NonNegativeInt = 20_000
    """agent steps before the first update, with random actions (noisy ones with --noisy)"""
    replay_ratio: PositiveFloat = 0.25
    """updates per agent step"""
    per_alpha: Probability = 0.5
    """priority exponent: a transition's priority is its loss to this power; 0 samples uniformly"""
    per_beta: Probability = 0.5
    """importance-sampling exponent, not annealed, as in Dopamine"""
    save_dataset: str | None = None
    """folder to log all experience to, in the layout of the DQN Replay Dataset, for offline RL"""

    # Exploration
    start_e: Probability = 1.0
    """initial epsilon of epsilon-greedy exploration, until learning_starts"""
    end_e: Probability = 0.01
    """final epsilon, reached exploration_steps later"""
    exploration_steps: PositiveInt = 250_000
    """agent steps over which epsilon decreases linearly"""
    noisy: bool = False
    """explore by noise on the weights of the head, instead of epsilon-greedy (Fortunato et al. 2018)"""
    noisy_sigma: PositiveFloat = 0.1
    """noisy: initial standard deviation, divided by the square root of a layer's inputs (0.5 in Hessel et al. 2018)"""
    eval_epsilon: Probability = 0.001
    """epsilon of evaluations"""

    # Atari protocol (Machado et al. 2018)
    clip_rewards: bool = True
    """clip rewards to [-1, 1] for learning; logged returns are never clipped"""
    sticky_actions: Probability = 0.25
    """Atari: probability that the emulator repeats the previous action"""
    noop_max: NonNegativeInt = 0
    """Atari: maximum number of no-op actions at the start of an episode (30 in Mnih et al. 2015)"""
    terminal_on_life_loss: bool = False
    """Atari: a lost life ends the return, as in Mnih et al. (2015)"""

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


# Defaults for MinAtar (explicit flags win): the optimiser and the target network's period of Obando-Ceron & Castro
# (2021), Revisiting Rainbow; the network and the exploration of Young & Tian (2019), MinAtar.
MINATAR = {
    "total_timesteps": 1_000_000,
    "learning_rate": 1e-4,
    "adam_eps": 3.125e-4,
    "buffer_size": 100_000,
    "learning_starts": 5_000,
    "target_network_frequency": 1_000,
    "v_min": 0.0,
    "v_max": 100.0,
    "end_e": 0.1,
    "exploration_steps": 100_000,
    "eval_episodes": 100,
    "clip_rewards": False,
}

# Defaults for vector observations (explicit flags win).
CLASSIC_CONTROL = {
    "eval_episodes": 20,
    "total_timesteps": 60_000,
    "learning_rate": 1e-3,
    "adam_eps": 1e-3,
    "batch_size": 64,
    "buffer_size": 60_000,
    "learning_starts": 1_000,
    "target_network_frequency": 100,
    "n_step": 10,  # long returns and frequent target updates: values must propagate quickly in a short run
    "v_min": 0.0,
    "v_max": 100.0,  # CartPole: a reward of 1 forever, discounted
    "exploration_steps": 5_000,
    "clip_rewards": False,
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


class NoisyLinear(nn.Module):
    """A linear layer with factorised Gaussian noise on its weights (Fortunato et al. 2018, sec. 3): a weight's noise
    is the product of one for its input and one for its output; fresh at each forward, off after `eval()`.
    """

    def __init__(self, inputs: int, outputs: int, sigma: float, bias: bool) -> None:
        super().__init__()
        bound = 1 / math.sqrt(inputs)
        self.weight_mu = nn.Parameter(torch.empty(outputs, inputs).uniform_(-bound, bound))
        self.weight_sigma = nn.Parameter(torch.full((outputs, inputs), sigma * bound))
        self.bias_mu = nn.Parameter(torch.empty(outputs).uniform_(-bound, bound)) if bias else None
        self.bias_sigma = nn.Parameter(torch.full((outputs,), sigma * bound)) if bias else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, inputs) -> (B, outputs)
        mean = F.linear(x, self.weight_mu, self.bias_mu)
        if not self.training:
            return mean
        noise_in, noise_out = (torch.randn(n, device=x.device) for n in reversed(self.weight_mu.shape))
        noise_in, noise_out = (noise.sign() * noise.abs().sqrt() for noise in (noise_in, noise_out))
        return mean + noise_out * F.linear(x * noise_in, self.weight_sigma, self.bias_sigma)


class Head(nn.Module):
    """The logits of each action's atoms, after a hidden layer. With dueling, they are those of the state value plus
    those of the action's advantage, less the mean advantage.
    """

    def __init__(
        self, features: int, hidden: int, n_actions: int, n_atoms: int, dueling: bool, linear: Callable
    ) -> None:
        super().__init__()
        self.n_atoms = n_atoms
        self.dense = linear(features, hidden)
        self.out = linear(hidden, n_actions * n_atoms)
        self.value = linear(hidden, n_atoms) if dueling else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, features) -> (B, A, N)
        x = F.relu(self.dense(x))
        logits = self.out(x).unflatten(1, (-1, self.n_atoms))
        if self.value is None:
            return logits
        return self.value(x)[:, None] + logits - logits.mean(1, keepdim=True)


def init_weights(module: nn.Module, fan_in: bool) -> None:
    """Dopamine's initialisation of a module's own layers: Xavier uniform; in residual blocks Flax's LeCun normal; in
    the Nature network uniform with variance 1 / (sqrt(3) fan-in). Noisy layers have their own.
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
    inputs = obs_space.shape[0]
    if len(obs_space.shape) == 1:
        torso, hidden = MLP(inputs, args.width, args.bias), 512 * args.width
    elif obs_space.shape[1:] == (10, 10):
        torso, hidden = MinAtarCNN(inputs, args.width, args.bias), 128 * args.width
    else:
        torso, hidden = {"impala": ImpalaCNN, "nature": NatureCNN}[args.network](inputs, args.width, args.bias), 512
    linear = partial(NoisyLinear, sigma=args.noisy_sigma) if args.noisy else nn.Linear
    linear = partial(linear, bias=args.bias)
    head = Head(torso.features, hidden, int(action_space.n), args.n_atoms, args.dueling, linear)
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


def q_values(logits: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """The means (B, A) of distributions over the atoms at `support` (N,), from their logits (B, A, N)."""
    return (logits.softmax(-1) * support).sum(-1)


def make_support(args: Args, device: torch.device) -> torch.Tensor:  # (N,)
    return torch.linspace(args.v_min, args.v_max, args.n_atoms, device=device)


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
    q_network: nn.Module, target_network: nn.Module, batch: Batch, support: torch.Tensor, double: bool
) -> tuple:
    """The cross-entropy (B,) of the distributions of Q(s, a) and their projected targets, and the mean of Q(s, a)."""
    rows = torch.arange(len(batch.action), device=batch.action.device)
    with torch.no_grad():
        next_logits = target_network(batch.next_observation)  # (B, A, N)
        selection_logits = q_network(batch.next_observation) if double else next_logits
        next_action = q_values(selection_logits, support).argmax(1)
        next_probability = next_logits[rows, next_action].softmax(1)  # (B, N)
        td_target = batch.reward[:, None] + batch.discount[:, None] * support  # the discount is 0 after a terminal
        target_probability = project(next_probability, td_target, support)
    logits = q_network(batch.observation)[rows, batch.action]  # (B, N)
    loss = -(target_probability * logits.log_softmax(1)).sum(1)
    return loss, q_values(logits.detach(), support).mean()


def importance_weights(probability: torch.Tensor, beta: float) -> torch.Tensor:
    """Weights (B,) that undo the bias of prioritised sampling, the largest 1 (Schaul et al. 2016, sec. 3.4)."""
    weight = probability**-beta
    return (weight / weight.max()).float()


def linear_schedule(start: float, end: float, progress: float) -> float:
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def epsilon_greedy(
    greedy: Callable[[], torch.Tensor], epsilon: float, num_envs: int, n_actions: int, rng: np.random.Generator
) -> np.ndarray:
    """Actions (num_envs,): those of `greedy`, or with probability epsilon random ones."""
    explore = rng.random(num_envs) < epsilon
    action = rng.integers(n_actions, size=num_envs)
    return action if explore.all() else np.where(explore, action, greedy().cpu().numpy())


def without_noise(network: nn.Module) -> nn.Module:
    """A copy whose noisy layers use their means."""
    return copy.deepcopy(network).eval()


class QValues(nn.Module):
    """A network whose outputs are Q(s, a): the means of its distributions."""

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
    greedy_network = make_greedy(args, {"q_network": without_noise(networks["q_network"])})
    device = next(greedy_network.parameters()).device

    @torch.inference_mode()
    def policy(obs: np.ndarray, rngs: list[np.random.Generator]) -> np.ndarray:  # (n, *obs shape) -> (n,)
        q = greedy_network(to_device(obs, device))  # (n, A)
        greedy = q.argmax(1).tolist()
        explore = [rng.random() < args.eval_epsilon for rng in rngs]
        return np.array([rng.integers(q.shape[1]) if e else a for a, e, rng in zip(greedy, explore, rngs)])

    return policy


def main(args: Args) -> np.ndarray:
    """Trains the agent; returns the returns (episodes,) of the final evaluation."""
    device = choose_device(args)
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)
    envs = open_envs(args, gym.spaces.Discrete)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    n_actions = int(action_space.n)
    if device.type == "cpu" and atari_game(args.env_id):
        print("note: Atari takes days on a CPU; for a task of minutes: python rainbow_pruned.py --env-id CartPole-v1")

    # ---- Agent -------------------------------------------------------------------------------------------------------
    networks = make_networks(args, obs_space, action_space)
    q_network = networks["q_network"].to(device)
    target_network = copy.deepcopy(q_network)
    support = make_support(args, device)
    adam = {"fused": True, "capturable": device.type == "cuda"}
    optimizer = torch.optim.Adam(q_network.parameters(), lr=args.learning_rate, eps=args.adam_eps, **adam)
    capacity = min(args.buffer_size, args.total_timesteps)
    stack = stack_size(args.env_id)
    replay = Replay(capacity, args.num_envs, obs_space, action_space, stack, args.n_step, args.gamma, device)
    priorities = Priorities(replay.length * args.num_envs, replay.device)
    max_priority = torch.ones((), dtype=torch.float64, device=replay.device)

    # ---- Sparsity ----------------------------------------------------------------------------------------------------
    weights, target_weights = prunable(q_network), prunable(target_network)
    densities = layer_densities(weights, 0.0 if args.method == "dense" else args.sparsity, args.distribution)
    masks = initial_masks(weights, densities, args.method, args.seed)
    apply_masks(weights, masks)
    apply_masks(target_weights, masks)
    print(mask_table(weights, densities))
    n_updates = int((args.total_timesteps - args.learning_starts) * args.replay_ratio)
    mask_start, mask_end, mask_interval = mask_schedule(args, masks, n_updates)

    ever_active = EverActive(masks)  # for the diagnostics
    state = {
        "q_network": q_network,
        "target_network": target_network,
        "optimizer": optimizer,
        "masks": masks,
        "ever_active": ever_active,
        "replay": replay,
        "envs": envs,
        "priorities": priorities,
        "max_priority": max_priority,
    }
    run = Run(args, __file__, state, rng)
    global_step, update = run.step, run.update  # 0, or those of the checkpoint that --resume names

    def learn(mask_progress: float | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """One update; `mask_progress` is the fraction of the mask schedule that is over, if a mask update is due.

        Returns the loss and the mean of Q(s, a).
        """
        index, probability = priorities.sample(args.batch_size)
        batch = replay.gather(index)
        td_losses, q_mean = td_loss(q_network, target_network, batch, support, args.double)
        loss = (importance_weights(probability, args.per_beta).to(device) * td_losses).mean()
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

        # Priorities
        priority = (td_losses.detach().to(replay.device) + 1e-10) ** args.per_alpha  # never quite 0
        priorities.update(index, priority)
        max_priority.clamp_(min=priority.max())
        return loss.detach(), q_mean

    # A CUDA graph replays kernels on fixed memory, and none of the Python above. So mask updates are called eagerly,
    # and all that changes between replays (observation, weights, masks, the replay's contents) changes in place
    priorities.refresh(*replay.end_episodes(), max_priority)  # the environments start new episodes, after a resume too
    obs = to_device(envs.reset(seed=args.seed + global_step)[0], device).clone()  # (num_envs, *obs shape)
    use_graphs = args.cuda_graph and device.type == replay.device.type == "cuda"
    greedy_action = torch.inference_mode()(lambda: q_values(q_network(obs), support).argmax(1))  # (num_envs,)
    fast_learn, fast_greedy = cuda_graph(learn, use_graphs), cuda_graph(greedy_action, use_graphs)

    # ---- Loop --------------------------------------------------------------------------------------------------------
    done = np.zeros(args.num_envs, dtype=bool)
    losses = None
    while global_step < args.total_timesteps and not run.stopping:
        progress = (global_step - args.learning_starts) / args.exploration_steps
        epsilon = 0.0 if args.noisy else linear_schedule(args.start_e, args.end_e, progress)
        action = epsilon_greedy(fast_greedy, epsilon, args.num_envs, n_actions, rng)
        # NEXT_STEP autoreset: the step after an episode's end only resets its environment, and is not an agent step
        global_step += int((~done).sum())

        # Updates come before the environments' step, so that a GPU computes while the environments play
        updates_due = int((global_step - args.learning_starts) * args.replay_ratio) if len(replay) else 0
        while update < updates_due and not run.stopping:
            if mask_update_due(update, mask_start, mask_end, mask_interval):
                losses = learn(mask_progress=(update - mask_start) / (mask_end - mask_start))
            else:
                losses = fast_learn()
            update += 1

        next_obs, reward, terminated, truncated, infos = envs.step(action)
        next_obs = to_device(next_obs, device)
        done = terminated | truncated
        terminal = terminated | infos["life_lost"] if args.terminal_on_life_loss else terminated
        if args.clip_rewards:
            reward = np.clip(reward, -1, 1)
        added, evicted = replay.add(obs, action, reward, terminal, done, next_obs)
        priorities.refresh(added, evicted, max_priority)  # new transitions get the maximum priority
        obs.copy_(next_obs)

        run.advance(global_step, update)
        run.log_episodes(infos, done)
        if run.due(args.target_network_frequency):
            target_network.load_state_dict(q_network.state_dict())
        if losses is not None and run.due(run.log_every):
            loss, q_mean = torch.stack(losses).tolist()
            scalars = {"losses/td_loss": loss, "losses/q_values": q_mean, "charts/epsilon": epsilon}
            if masks and args.method in ("rigl", "set"):
                progress = min((update - mask_start) / (mask_end - mask_start), 1.0)
                scalars["sparsity/drop_fraction"] = cosine_drop_fraction(progress, args.drop_fraction)
            run.log(scalars, weights, masks)
        if update and run.due(args.diagnostics_every):
            q_network.eval()  # without noise
            target_network.eval()
            run.log(
                diagnose(
                    q_network,
                    replay.sample,
                    masks,
                    ever_active,
                    loss=lambda q, batch: td_loss(q, target_network, batch, support, args.double)[0].mean(),
                    next_value=lambda batch: q_values(target_network(batch.next_observation), support).amax(1),
                )
            )
            q_network.train()
            target_network.train()
        if run.due(args.eval_every):
            run.evaluate(make_policy(args, networks))
        if run.due(args.checkpoint_every):
            run.try_checkpoint()

    envs.close()
    if run.stopping:
        run.stop()
    return run.finish(make_policy(args, networks), networks, {"q_network": masks}, {"q_network": densities})


def preset(args: Args) -> dict:
    """Values that replace defaults for these flags."""
    if is_minatar(args.env_id):
        return MINATAR
    return CLASSIC_CONTROL if atari_game(args.env_id) is None else {}


if __name__ == "__main__":
    launch(main, Args, preset)
