"""SAC with sparse SimBa networks: fixed random zeros let the agent grow where dense networks stop improving.

The agent is SAC (or DDPG) with the actor and critic of SimBa. `--method` says where the zeros come from: a random mask
fixed before training (random), gradual magnitude pruning during it (gmp), or a mask that moves while its size stays:
RigL regrows connections where the gradient is largest, SET at random. Everything that changes learning is in this file.

Ma et al. (2025), Network sparsity unlocks the scaling potential of deep reinforcement learning. arXiv:2506.17204
Lee et al. (2025), SimBa: simplicity bias for scaling up parameters in deep reinforcement learning. arXiv:2410.09754
Haarnoja et al. (2018), Soft actor-critic algorithms and applications. arXiv:1812.05905

    python sac_sparse.py --env-id Pendulum-v1                       # a minute or two on a laptop
    python sac_sparse.py --sparsity 0.9 --width 5                   # Humanoid Run, five times as wide
    python sac_sparse.py --network mlp --env-id HalfCheetah-v5 --critic-sparsity 0.9 --actor-sparsity 0
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.checkpoints import load_checkpoint, parse_args, restore, save_checkpoint, save_model
from utils.diagnostics import ever_active, interference, report
from utils.envs import cannot_render, make_envs, make_video_env, open_envs
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
from utils.plot import learning_curve
from utils.replay import Batch, Replay
from utils.runs import Run, choose_device, in_words, median_seconds, read_episodes

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    """The defaults are SimBa's; CLEANRL and PENDULUM, below, replace some for the MLP and for Pendulum."""

    # Experiment
    env_id: str = "dm_control/humanoid-run-v0"
    """any Gymnasium id with vector observations and bounded continuous actions (HalfCheetah-v5, Pendulum-v1), or a task
    of the DeepMind Control suite (dm_control/dog-walk-v0)"""
    seed: int = 1
    """seed of the networks, masks, environments and exploration"""
    cuda: bool = True
    """use the GPU if there is one"""
    cuda_graph: bool = True
    """GPU: record an update, and an action, as a CUDA graph and replay it"""
    tf32: bool = True
    """GPU: round the factors of matrix products to 10 bits, as JAX does too"""
    runs_dir: str = "runs"
    """where the run's folder is made"""
    track: bool = False
    """also log to Weights & Biases"""
    wandb_project_name: str = "sparse-rl"
    """its project"""
    wandb_entity: str | None = None
    """its team"""
    checkpoint_every: int = 0
    """agent steps between checkpoints; 0 writes one only when the run is interrupted"""
    resume: str | None = None
    """a checkpoint.pt to go on from; flags that are not given keep the values they had"""
    eval_episodes: int = 10
    """episodes played with the final network, without noise"""
    capture_video: bool = False
    """record these episodes as MP4"""
    diagnostics_every: int = 0
    """agent steps between looks at dormant units, ranks, norms and interference; 0 is never"""

    # Algorithm (SimBa's)
    total_timesteps: int = 500_000
    """agent steps"""
    algorithm: Literal["sac", "ddpg"] = "sac"
    """a stochastic actor with a learned temperature, or a deterministic one with constant noise"""
    network: Literal["simba", "mlp"] = "simba"
    """normalised residual blocks, or the two hidden layers of CleanRL's sac_continuous_action.py with its settings"""
    policy_lr: float = 1e-4
    """learning rate of the actor"""
    q_lr: float = 1e-4
    """learning rate of the critics and the temperature"""
    weight_decay: float = 1e-2
    """of AdamW, on every parameter of the actor and the critics"""
    rsnorm: bool = True
    """normalise observations by their running mean and variance"""
    action_repeat: int | None = None
    """environment steps per agent step; if not given 2 for DeepMind Control, else 1"""
    num_envs: int = 1
    """environments stepped together; the number of updates per agent step stays the same"""
    buffer_size: int = 1_000_000
    """transitions in the replay"""
    learning_starts: int = 5_000
    """agent steps before the first update, with random actions"""
    utd: float = 2.0
    """updates per agent step"""
    batch_size: int = 256
    """transitions per update"""
    num_critics: int | None = None
    """critics whose smallest value counts; if not given 1 where episodes never terminate, else 2"""
    gamma: float | None = None
    """discount; if not given it follows from the length of an episode"""
    tau: float = 0.005
    """share of the critic that moves into the target critic at every update"""
    init_alpha: float = 0.01
    """SAC: first value of the temperature"""
    target_entropy: float = -0.5
    """SAC: entropy that the temperature aims at, times the number of action dimensions"""
    exploration_noise: float = 0.1
    """DDPG: standard deviation of the noise on actions"""

    # Sparsity
    method: Literal["dense", "random", "gmp", "rigl", "set"] = "random"
    """no zeros; fixed random mask; gradual magnitude pruning; RigL; SET"""
    sparsity: float = 0.8
    """share of the prunable weights that is zero at the end (prunable: all but biases and normalisation) ..."""
    actor_sparsity: float | None = None
    """... in the actor, if it shall differ"""
    critic_sparsity: float | None = None
    """... in the critics, if it shall differ"""
    mask_seed: int | None = None
    """seed of the masks, if it shall differ from --seed"""
    distribution: Literal["erk", "uniform"] = "erk"
    """how the zeros are shared out over the layers"""
    width: int = 1
    """multiplies the hidden units: SimBa 128 in the actor and 512 in the critic, MLP 256"""
    depth: int = 1
    """multiplies the layers: SimBa 1 block in the actor and 2 in the critic, MLP 2 hidden layers"""
    prune_start: float = 0.2
    """gmp: share of the updates before pruning begins ..."""
    prune_end: float = 0.8
    """... and when it is complete"""
    prune_interval: int = 1_000
    """gmp: updates from one pruning to the next"""
    rewire_end: float = 0.8
    """rigl, set: share of the updates after which the mask stays"""
    rewire_interval: int = 1_000
    """rigl, set: updates from one rewiring to the next"""
    drop_fraction: float = 0.5
    """rigl, set: share of a layer's connections that the first rewiring drops; annealed to 0 by a cosine"""


# What these get in place of the defaults above, where a flag does not say otherwise: a small task ...
PENDULUM = {
    "eval_episodes": 20,
    "total_timesteps": 8_000,
    "network": "mlp",
    "learning_starts": 1_000,
}
# ... and the MLP (CleanRL's sac_continuous_action.py).
CLEANRL = {
    "policy_lr": 3e-4,
    "q_lr": 1e-3,
    "weight_decay": 0.0,
    "rsnorm": False,
    "utd": 1.0,
    "num_critics": 2,
    "gamma": 0.99,
    "init_alpha": 1.0,
    "target_entropy": -1.0,
}

# Hidden units, and residual blocks or hidden layers, of the actor and of the critic at --width 1 --depth 1.
SIZES = {"simba": ((128, 1), (512, 2)), "mlp": ((256, 2), (256, 2))}
# SimBa takes the smaller of two critics where an episode can terminate, and one critic elsewhere.
NEVER_TERMINATES = ("dm_control/", "HalfCheetah-", "HumanoidStandup-", "Pendulum-", "Pusher-", "Reacher-", "Swimmer-")
DM_CONTROL_STEPS = 1_000  # an episode of the suite, before actions are repeated


class Linear(nn.Module):
    """`n` linear layers side by side, so that all critics are one matrix product: (n, B, inputs) -> (n, B, outputs).

    The biases lie end to end in one dimension: what has more is prunable.
    """

    def __init__(self, n: int, inputs: int, outputs: int, init: Callable) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(n, inputs, outputs))
        self.bias = nn.Parameter(torch.zeros(n * outputs))
        init(self)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias.view(len(x), 1, -1), x, self.weight)


class LayerNorm(nn.Module):
    """`n` layer normalisations side by side, with the epsilon of Flax."""

    def __init__(self, n: int, features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(n * features))
        self.bias = nn.Parameter(torch.zeros(n * features))

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (n, B, features)
        normal = F.layer_norm(x, x.shape[-1:], eps=1e-6)
        return torch.addcmul(self.bias.view(len(x), 1, -1), normal, self.weight.view(len(x), 1, -1))


def orthogonal_init(layer: Linear) -> None:
    for matrix in layer.weight:
        nn.init.orthogonal_(matrix)


def he_init(layer: Linear) -> None:
    """Flax's he_normal: a normal that is cut at two standard deviations, with variance 2 / inputs."""
    std = math.sqrt(2 / layer.weight.shape[1]) / 0.87962566
    nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)


def torch_init(layer: Linear) -> None:
    """What nn.Linear does."""
    bound = 1 / math.sqrt(layer.weight.shape[1])
    nn.init.uniform_(layer.weight, -bound, bound)
    nn.init.uniform_(layer.bias, -bound, bound)


class ResidualBlock(nn.Module):
    def __init__(self, n: int, hidden: int) -> None:
        super().__init__()
        self.norm = LayerNorm(n, hidden)
        self.expand = Linear(n, hidden, 4 * hidden, he_init)
        self.project = Linear(n, 4 * hidden, hidden, he_init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(F.relu(self.expand(self.norm(x))))


def simba(n: int, inputs: int, hidden: int, blocks: int) -> nn.Sequential:
    """SimBa's encoder (Lee et al. 2025), `n` side by side: (n, B, inputs) -> (n, B, hidden)."""
    residual = [ResidualBlock(n, hidden) for _ in range(blocks)]
    return nn.Sequential(Linear(n, inputs, hidden, orthogonal_init), *residual, LayerNorm(n, hidden))


def mlp(n: int, inputs: int, hidden: int, layers: int) -> nn.Sequential:
    """Hidden layers with ReLU, `n` side by side: (n, B, inputs) -> (n, B, hidden)."""
    pairs = itertools.pairwise([inputs] + [hidden] * layers)
    return nn.Sequential(*(layer for i, o in pairs for layer in (Linear(n, i, o, torch_init), nn.ReLU(inplace=True))))


class Actor(nn.Module):
    """SAC: a Gaussian whose mean and standard deviation depend on the state, squashed by tanh."""

    def __init__(self, encoder: nn.Module, hidden: int, actions: int, init: Callable, min_log_std: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean = Linear(1, hidden, actions, init)
        self.log_std = Linear(1, hidden, actions, init)
        self.min_log_std = min_log_std

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # (B, D) -> (B, A), (B,)
        """A random action and the logarithm of its density."""
        # Two products with so few columns would take twice as long as one; only the masks must know the heads apart
        weight = torch.cat([self.mean.weight, self.log_std.weight], 2)  # (1, hidden, 2A)
        bias = torch.cat([self.mean.bias, self.log_std.bias]).view(1, 1, -1)
        mean, raw = torch.baddbmm(bias, self.encoder(observation[None]), weight)[0].chunk(2, 1)  # (B, A)
        log_std = self.min_log_std + (2 - self.min_log_std) / 2 * (1 + torch.tanh(raw))  # up to 2
        noise = torch.randn_like(mean)
        x = mean + log_std.exp() * noise
        log_normal = -(noise.square() + math.log(2 * math.pi)) / 2 - log_std
        log_slope = 2 * (math.log(2) - x - F.softplus(-2 * x))  # log(1 - tanh(x)^2), without its cancellation
        return torch.tanh(x), (log_normal - log_slope).sum(1)

    def greedy(self, observation: torch.Tensor) -> torch.Tensor:  # (B, D) -> (B, A)
        return torch.tanh(self.mean(self.encoder(observation[None]))[0])


class DeterministicActor(nn.Module):
    """DDPG: constant noise, which SimBa's DDPG adds in the losses too. At temperature 0, all else is as in SAC."""

    def __init__(self, encoder: nn.Module, hidden: int, actions: int, init: Callable, noise: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean = Linear(1, hidden, actions, init)
        self.noise = noise

    def forward(self, observation: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # (B, D) -> (B, A), (B,)
        action = self.greedy(observation)
        noisy = (action + self.noise * torch.randn_like(action)).clamp(-1, 1)
        return noisy, torch.zeros_like(action[:, 0])

    greedy = Actor.greedy


class Critic(nn.Module):
    """`n` values of each pair of observation and action."""

    def __init__(self, encoder: nn.Module, n: int, hidden: int, init: Callable) -> None:
        super().__init__()
        self.n = n
        self.encoder = encoder
        self.head = Linear(n, hidden, 1, init)

    def forward(self, observation: torch.Tensor, action: torch.Tensor) -> torch.Tensor:  # (B, D), (B, A) -> (n, B)
        features = self.encoder(torch.cat([observation, action], 1).expand(self.n, -1, -1))  # (n, B, hidden)
        # as a sum: batched products with a single column are slow on a CPU
        return (features * self.head.weight.mT).sum(2) + self.head.bias[:, None]


class RSNorm(nn.Module):
    """Observations less their running mean, over their running standard deviation (Chan et al. 1979); in float64."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("var", torch.ones(features, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, x: torch.Tensor) -> None:  # (B, D)
        """Takes in observations; in place, like all that a recorded CUDA graph reads."""
        x, total = x.double(), self.count + len(x)
        delta = x.mean(0) - self.mean
        squares = self.var * self.count + x.var(0, correction=0) * len(x) + delta**2 * self.count * len(x) / total
        self.mean += delta * len(x) / total
        self.var.copy_(squares / total)
        self.count.copy_(total)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, D) -> (B, D)
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).float()


def make_networks(args: Args, observations: int, actions: int) -> tuple[nn.Module, nn.Module]:
    """Actor and critic for vectors of these lengths."""
    encoder, init, min_log_std = (simba, orthogonal_init, -10) if args.network == "simba" else (mlp, torch_init, -5)
    sizes = [(units * args.width, layers * args.depth) for units, layers in SIZES[args.network]]
    (actor_hidden, actor_layers), (critic_hidden, critic_layers) = sizes
    actor_encoder = encoder(1, observations, actor_hidden, actor_layers)
    critic_encoder = encoder(args.num_critics, observations + actions, critic_hidden, critic_layers)
    if args.algorithm == "sac":
        actor = Actor(actor_encoder, actor_hidden, actions, init, min_log_std)
    else:
        actor = DeterministicActor(actor_encoder, actor_hidden, actions, init, args.exploration_noise)
    return actor, Critic(critic_encoder, args.num_critics, critic_hidden, init)


def cubic_sparsity(update: int, start: int, end: int, final: float) -> float:
    """Gradual pruning schedule of Zhu & Gupta (2017): fast while weights are redundant, slow near the end."""
    progress = min(max((update - start) / (end - start), 0.0), 1.0)
    return final * (1 - (1 - progress) ** 3)


def cosine_drop_fraction(update: int, end: int, initial: float) -> float:
    """RigL's annealing of the share of connections that are rewired (Evci et al. 2020, sec. 3)."""
    return initial / 2 * (1 + math.cos(math.pi * min(update / end, 1.0)))


def largest_each(score: torch.Tensor, count: int) -> torch.Tensor:
    """`keep_largest` in the matrix of every critic: (n, inputs, outputs), `count` of each."""
    return torch.stack([keep_largest(matrix, count) for matrix in score])


@torch.no_grad()
def prune(weights: dict, masks: dict, kept: dict[str, int]) -> None:
    """Gradual magnitude pruning: each layer keeps the largest of the weights it still has; nothing comes back."""
    for name, weight in weights.items():
        masks[name].copy_(largest_each(weight.abs().masked_fill(masks[name] == 0, -math.inf), kept[name]))


@torch.no_grad()
def rewire(weights: dict, masks: dict, kept: dict[str, int], optimizer, drop_fraction: float, method: str) -> None:
    """RigL (Evci et al. 2020): drop the smallest weights, grow where the dense gradient is largest; SET, at random."""
    for name, weight in weights.items():
        mask, n_active = masks[name] > 0, kept[name]  # the count never changes
        n_drop = int(drop_fraction * n_active)
        staying = largest_each(weight.abs().masked_fill(~mask, -math.inf), n_active - n_drop)
        score = weight.grad.abs() if method == "rigl" else torch.rand_like(weight)
        grown = largest_each(score.masked_fill(staying, -math.inf), n_drop)  # what was just dropped may grow back ...
        new = grown & ~mask  # ... and then keeps its value and its Adam moments; only these start from nothing
        weight.masked_fill_(new, 0.0)
        for moment in ("exp_avg", "exp_avg_sq"):
            optimizer.state[weight][moment].masked_fill_(new, 0.0)
        masks[name].copy_(staying | grown)  # in place: a recorded CUDA graph holds on to this tensor


def mask_update_due(update: int, start: int, end: int, interval: int) -> bool:
    """Every `interval` updates after `start`, and at `end`, so that the schedule always arrives."""
    return start < update <= end and ((update - start) % interval == 0 or update == end)


def actor_loss(actor: nn.Module, critic: nn.Module, observation: torch.Tensor, alpha: torch.Tensor) -> tuple:
    """Mean of alpha * log pi(a|s) - Q(s, a) over actions a of the actor, and their mean entropy."""
    action, log_pi = actor(observation)
    q = critic(observation, action).amin(0)  # (B,)
    return (alpha * log_pi - q).mean(), -log_pi.detach().mean()


def temperature_loss(log_alpha: torch.Tensor, entropy: torch.Tensor, target_entropy: float) -> torch.Tensor:
    """Its gradient raises the temperature alpha while the entropy is below its target."""
    return log_alpha.exp() * (entropy - target_entropy)


def critic_loss(actor, critic, target_critic, batch: Batch, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared TD error of each critic (n,), and its mean of Q(s, a) (n,)."""
    with torch.no_grad():
        next_action, next_log_pi = actor(batch.next_observation)
        next_q = target_critic(batch.next_observation, next_action).amin(0)  # (B,)
        # the discount is 0 after a terminal; a time limit is none
        td_target = batch.reward + batch.discount * (next_q - alpha * next_log_pi)
    q = critic(batch.observation, batch.action)  # (n, B)
    return (q - td_target).square().mean(1), q.detach().mean(1)


def discount_for(episode_steps: float | None) -> float:
    """SimBa's rule (and TD-MPC2's): look ahead a fifth of an episode, within bounds."""
    horizon = episode_steps / 5 if episode_steps else 100
    return min(max((horizon - 1) / horizon, 0.95), 0.995)


def check(args: Args) -> None:
    """Ends the program with one line if a flag has no meaning."""
    require_ranges(args)
    require(args, "learning_starts", args.learning_starts >= args.num_envs, f"at least num-envs, here {args.num_envs}")
    least = math.ceil(args.learning_starts + 10 / args.utd)
    require(args, "total_timesteps", args.total_timesteps >= least, f"at least {least} here, for 10 updates")
    require(args, "prune_start", 0 <= args.prune_start < args.prune_end, f"a number in [0, {args.prune_end})")


def main(args: Args) -> np.ndarray:
    """Trains, and returns the returns of the final evaluation's episodes."""
    check(args)
    device = choose_device(args.cuda, args.tf32)
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)

    # What follows from the environment, unless a flag says it
    dm_control = args.env_id.startswith("dm_control/")
    repeat = args.action_repeat or (2 if dm_control else 1)
    envs = open_envs(args.env_id, args.num_envs, gym.spaces.Box, action_repeat=repeat)
    space, actions = envs.single_observation_space, envs.single_action_space
    episode_steps = DM_CONTROL_STEPS if dm_control else gym.spec(args.env_id).max_episode_steps
    gamma = discount_for(episode_steps and episode_steps / repeat) if args.gamma is None else args.gamma
    num_critics = args.num_critics or (1 if args.env_id.startswith(NEVER_TERMINATES) else 2)
    args = replace(args, action_repeat=repeat, gamma=gamma, num_critics=num_critics)

    problem = cannot_render(args.env_id) if args.capture_video else None
    if problem:
        fail(f"--capture-video: {problem}")

    # Networks
    actor, critic = (network.to(device) for network in make_networks(args, *space.shape, *actions.shape))
    target_critic, rsnorm = copy.deepcopy(critic), RSNorm(*space.shape).to(device)
    networks = {"actor": actor, "critic": critic, "target_critic": target_critic, "rsnorm": rsnorm}
    normalise = rsnorm if args.rsnorm else nn.Identity()
    parameters = {name: list(network.parameters()) for name, network in networks.items()}
    # DDPG is the same agent at temperature 0
    log_alpha = torch.tensor(math.log(args.init_alpha) if args.algorithm == "sac" else -math.inf, device=device)
    log_alpha.requires_grad_()
    target_entropy = args.target_entropy * math.prod(actions.shape)
    adam = {"fused": True, "capturable": device.type == "cuda"}
    temperature = {"params": [log_alpha], "lr": args.q_lr, "weight_decay": 0.0}  # steps with the actor
    actor_groups = [{"params": parameters["actor"]}, temperature]
    optimizers = {
        "actor": torch.optim.AdamW(actor_groups, args.policy_lr, weight_decay=args.weight_decay, **adam),
        "critic": torch.optim.AdamW(parameters["critic"], args.q_lr, weight_decay=args.weight_decay, **adam),
    }

    # Masks: ones and zeros in the weights' shapes, changed only in place
    goal = {
        "actor": args.sparsity if args.actor_sparsity is None else args.actor_sparsity,
        "critic": args.sparsity if args.critic_sparsity is None else args.critic_sparsity,
    }
    distribution = erk_densities if args.distribution == "erk" else uniform_densities
    weights, densities, masks, kept, final_kept = {}, {}, {}, {}, {}
    for net in goal:
        weights[net] = prunable(networks[net])  # (n, inputs, outputs); all counts are of one critic's matrix
        shapes = {name: tuple(weight.shape[1:]) for name, weight in weights[net].items()}
        densities[net] = distribution(shapes, 0.0 if args.method == "dense" else goal[net])
        final_kept[net] = {name: kept_count(math.prod(shapes[name]), densities[net][name]) for name in shapes}
        starts_dense = args.method in ("dense", "gmp")
        kept[net] = {name: math.prod(shapes[name]) for name in shapes} if starts_dense else dict(final_kept[net])
        generator = torch.Generator().manual_seed(args.seed if args.mask_seed is None else args.mask_seed)
        masks[net] = {}
        if args.method != "dense" and goal[net] > 0:
            for name, weight in weights[net].items():
                each = [random_mask(shapes[name], kept[net][name], generator) for _ in weight]
                masks[net][name] = torch.zeros_like(weight).copy_(torch.stack(each))
        apply_masks(weights[net], masks[net])
    target_weights = prunable(target_critic)
    apply_masks(target_weights, masks["critic"])
    # For the diagnostics: which weights have ever lived
    ever = {net: {name: mask > 0 for name, mask in masks[net].items()} for net in masks}

    # Schedules count updates; a short run has its mask updates closer together, at least 50 of them
    n_updates = int((args.total_timesteps - args.learning_starts) * args.utd)
    prune_start, prune_end = int(args.prune_start * n_updates), min(int(args.prune_end * n_updates), n_updates - 1)
    prune_interval = max(1, min(args.prune_interval, (prune_end - prune_start) // 50))
    rewire_end = min(int(args.rewire_end * n_updates), n_updates - 1)
    rewire_interval = max(1, min(args.rewire_interval, rewire_end // 50))

    capacity = min(args.buffer_size, args.total_timesteps)
    try:
        replay = Replay(capacity, args.num_envs, space, actions, stack=1, n_step=1, gamma=args.gamma, device=device)
    except MemoryError as error:
        fail(f"--buffer-size: got {args.buffer_size}, takes what fits into memory; this {error}")

    state = {  # all that a checkpoint restores, beside the masks and the random numbers
        "networks": networks,
        "log_alpha": log_alpha,
        "optimizers": optimizers,
        "replay": replay,
        "ever": ever,
    }
    global_step, update = 0, 0
    if args.resume:
        saved = load_checkpoint(args.resume, SCRIPT)
        global_step, update = saved["global_step"], saved["update"]
        require(args, "total_timesteps", args.total_timesteps >= global_step, f"{global_step} or more, --resume's")
        restore(saved, args, rng, state, masks, kept)
        kept = saved["kept"]
        if args.method == "gmp" and update > prune_end and kept != final_kept:
            fail(f"--resume: {args.resume} is at update {update}, after the end of the pruning with these flags")

    if args.network == "simba" and device.type == "cpu":
        blank, zeros = torch.zeros(args.batch_size, *space.shape), torch.zeros(args.batch_size)
        batch = Batch(blank, torch.zeros(args.batch_size, *actions.shape), zeros, zeros, blank)
        alpha = log_alpha.detach().exp()
        with torch.random.fork_rng():
            per_update = median_seconds(
                lambda: critic_loss(actor, critic, target_critic, batch, alpha)[0].sum().backward()
            )
            per_update += median_seconds(lambda: actor_loss(actor, critic, blank, alpha)[0].backward())
        seconds = (n_updates - update) * per_update
        print(f"no GPU here: this will take about {in_words(seconds)}, at {per_update:.2f} s an update")
        print("a small task that ends within minutes: python sac_sparse.py --env-id Pendulum-v1")

    # Of all critics together
    layers = {f"{net}.{name}": tuple(weight.shape) for net in weights for name, weight in weights[net].items()}

    def counts(kept: dict) -> dict[str, int]:
        return {f"{net}.{name}": len(w) * kept[net][name] for net in weights for name, w in weights[net].items()}

    table = mask_table(layers, counts(final_kept))
    print(table)
    run = Run(args, SCRIPT, global_step)
    run.text("sparsity", table)

    def checkpoint() -> None:
        counters = {"kept": kept, "global_step": global_step, "update": update}
        save_checkpoint(run.folder, SCRIPT, args, rng, state, masks, **counters)

    @torch.no_grad()
    def look() -> dict[str, float]:
        """The diagnostics of both networks, on a sample of the replay."""
        batch, alpha = replay.sample(256), log_alpha.detach().exp()
        observation, next_observation = normalise(batch.observation), normalise(batch.next_observation)
        batch = batch._replace(observation=observation, next_observation=next_observation)
        scalars = report(actor, batch.observation, masks=masks["actor"], prefix="diagnostics/actor")
        scalars |= report(critic, batch.observation, batch.action, masks=masks["critic"], prefix="diagnostics/critic")
        scalars |= {f"diagnostics/{net}/ever_active": ever_active(ever[net], masks[net]) for net in masks}
        return scalars | {
            "diagnostics/actor/gradient_cosine": interference(
                actor, lambda a, observation: actor_loss(a, critic, observation, alpha)[0], [batch.observation]
            ),
            "diagnostics/critic/gradient_cosine": interference(
                critic, lambda q, *one: critic_loss(actor, q, target_critic, Batch(*one), alpha)[0].sum(), batch
            ),
        }

    def to_device(observation: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(observation, dtype=torch.float32).to(device, non_blocking=True)

    replay.cut()  # the environments begin a new episode, after a resume too
    raw, _ = envs.reset(seed=args.seed + global_step)
    observation = to_device(raw).clone()  # (num_envs, D), changed only in place

    @torch.inference_mode()
    def explore() -> torch.Tensor:  # (num_envs, A)
        return actor(normalise(observation))[0]

    def step_weights(net: str, mask_due: bool) -> None:
        """One step of the actor's or the critics' weights, and a change of their masks if it is due."""
        changes = args.method if mask_due and masks[net] else None
        if changes == "gmp":
            for name, weight in weights[net].items():
                sparsity = cubic_sparsity(update, prune_start, prune_end, 1 - densities[net][name])
                kept[net][name] = min(kept[net][name], kept_count(weight[0].numel(), 1 - sparsity))
            prune(weights[net], masks[net], kept[net])
        if changes in ("rigl", "set"):
            drop_fraction = cosine_drop_fraction(update, rewire_end, args.drop_fraction)
            rewire(weights[net], masks[net], kept[net], optimizers[net], drop_fraction, args.method)
        else:  # a change of topology replaces the weight update
            optimizers[net].step()
        apply_masks(weights[net], masks[net])  # after every step: Adam's moments would revive what was pruned

    def learn(mask_due: bool = False) -> tuple:
        """One update, and a change of the masks if it is due; the latest losses and mean of Q(s, a)."""
        batch = replay.sample(args.batch_size)  # raw observations: the statistics of today normalise them
        observation, next_observation = normalise(batch.observation), normalise(batch.next_observation)
        batch = batch._replace(observation=observation, next_observation=next_observation)

        policy_loss, entropy = actor_loss(actor, critic, batch.observation, log_alpha.detach().exp())
        alpha_loss = temperature_loss(log_alpha, entropy, target_entropy)
        optimizers["actor"].zero_grad()
        (policy_loss + alpha_loss).backward(inputs=[*parameters["actor"], log_alpha])  # the critic gets no gradient
        step_weights("actor", mask_due)

        q_losses, q_values = critic_loss(actor, critic, target_critic, batch, log_alpha.detach().exp())
        optimizers["critic"].zero_grad()
        q_losses.sum().backward()
        step_weights("critic", mask_due)

        if mask_due:
            apply_masks(target_weights, masks["critic"])
        with torch.no_grad():  # zeros stay zeros: both networks have the same
            torch._foreach_lerp_(parameters["target_critic"], parameters["critic"], args.tau)
        return policy_loss.detach(), alpha_loss.detach(), q_losses.detach(), q_values

    graphs = args.cuda_graph and device.type == replay.device.type == "cuda"
    fast_learn, fast_explore = cuda_graph(learn, graphs), cuda_graph(explore, graphs)

    def due(every: int) -> bool:
        """Has the latest step reached a multiple of `every`? Several environments may step over it."""
        return every > 0 and global_step // every > last_step // every

    # The loop
    log_every = max(100, args.total_timesteps // 1_000)
    resetting = np.zeros(args.num_envs, dtype=bool)
    losses = None
    while global_step < args.total_timesteps and not run.stopping:
        if args.rsnorm and not resetting.all():
            rsnorm.update(to_device(raw[~resetting]))
        if global_step < args.learning_starts:
            action = rng.uniform(-1, 1, (args.num_envs, *actions.shape)).astype(np.float32)
        else:
            action = fast_explore().cpu().numpy()
        if not np.isfinite(action).all():
            run.close()
            fail(f"--policy-lr, --q-lr: the networks have diverged: an action at step {global_step + 1} is not finite")

        # The step after an end only resets its environment: it is no agent step
        last_step, global_step = global_step, global_step + int((~resetting).sum())

        # Before the step that they are due at: a GPU works on them while the environments play
        while update < int((global_step - args.learning_starts) * args.utd):
            prune_due = args.method == "gmp" and mask_update_due(update, prune_start, prune_end, prune_interval)
            rewire_due = args.method in ("rigl", "set") and mask_update_due(update, 0, rewire_end, rewire_interval)
            losses = learn(mask_due=True) if prune_due or rewire_due else fast_learn()
            update += 1

        next_raw, reward, terminated, truncated, infos = envs.step(action)
        if not (np.isfinite(next_raw).all() and np.isfinite(reward).all()):
            global_step = last_step
            checkpoint()
            run.close()
            where = f"at step {global_step + 1}; {run.folder}/checkpoint.pt holds the step before"
            fail(f"--env-id: {args.env_id} gave an observation or a reward that is not finite {where}")
        end, next_observation = terminated | truncated, to_device(next_raw)
        replay.add(observation, action, reward, terminated, end, next_observation)
        raw, resetting = next_raw, end
        observation.copy_(next_observation)
        for i in np.flatnonzero(end):
            run.episode(infos["episode"]["r"][i], infos["episode"]["l"][i], global_step)

        run.progress(global_step)
        if losses is not None and due(log_every):
            policy_loss, alpha_loss, q_losses, q_values = (loss.tolist() for loss in losses)
            scalars = {"losses/actor_loss": policy_loss, "losses/qf_loss": sum(q_losses) / num_critics}
            scalars |= {f"losses/qf{i + 1}_loss": value for i, value in enumerate(q_losses)}
            scalars |= {f"losses/qf{i + 1}_values": value for i, value in enumerate(q_values)}
            if args.algorithm == "sac":
                scalars |= {"losses/alpha": log_alpha.exp().item(), "losses/alpha_loss": alpha_loss}
            scalars |= sparsity_scalars(layers, counts(kept))
            if args.method in ("rigl", "set"):
                scalars["sparsity/drop_fraction"] = cosine_drop_fraction(update, rewire_end, args.drop_fraction)
            scalars["charts/SPS"] = run.steps_per_second(global_step)
            run.scalars(scalars, global_step)
            run.progress(global_step, loss=scalars["losses/qf_loss"], sparsity=scalars["sparsity/global"])
        if update and due(args.diagnostics_every):
            with torch.random.fork_rng():  # the run goes on with the random numbers that it would have had
                run.scalars(look(), global_step)
        if due(args.checkpoint_every):
            checkpoint()

    # The end
    envs.close()
    if run.stopping:
        checkpoint()
        run.stop(global_step)
        return np.array([])
    trained = {name: networks[name] for name in ("actor", "critic", "rsnorm")}
    save_model(run.folder, SCRIPT, args, trained, masks)
    zeros = "" if args.method == "dense" else f" {goal['actor']:g} and {goal['critic']:g}"
    title = f"{args.env_id}: {args.method}{zeros}, width {args.width}, seed {args.seed}"
    learning_curve(read_episodes(run.folder / "episodes.csv"), title, run.folder / "curve.png")

    @torch.inference_mode()
    def policy(observation: np.ndarray) -> np.ndarray:
        return actor.greedy(normalise(to_device(observation))).cpu().numpy()

    if args.capture_video:
        envs = make_video_env(args.env_id, str(run.folder / "videos"), action_repeat=repeat)
    else:
        envs = make_envs(args.env_id, min(args.eval_episodes, 8), action_repeat=repeat)
    run.bar.close()
    print(f"playing {args.eval_episodes} episodes with the final network")
    returns, _ = evaluate(envs, policy, args.eval_episodes, args.seed + 1_000_000)
    run.finish(returns)
    return returns


def preset(args: Args) -> dict:
    """What the flags that are not given have in place of their defaults."""
    small = PENDULUM if args.env_id.startswith("Pendulum-") else {}
    return (CLEANRL if args.network == "mlp" else {}) | small


if __name__ == "__main__":
    main(parse_args(Args, preset))
