# Documentation and results: docs/sac_sparse.md
"""SAC with sparse SimBa networks: the claim is that with fixed random masks, larger networks keep getting better.

The agent is SAC (or DDPG) with the actor and critic of SimBa. `--method` chooses how the networks become sparse: a
fixed random mask (random), gradual magnitude pruning during training (gmp), or a mask of constant size that moves: RigL
grows connections where the gradient is largest, SET at random. Everything that changes learning is in this file;
`utils/` keeps the books.

Ma et al. (2025), Network sparsity unlocks the scaling potential of deep reinforcement learning. arXiv:2506.17204
Lee et al. (2025), SimBa: simplicity bias for scaling up parameters in deep reinforcement learning. arXiv:2410.09754
Haarnoja et al. (2018), Soft actor-critic algorithms and applications. arXiv:1812.05905

    python sac_sparse.py --env-id Pendulum-v1                       # a return of about -150 in two minutes on a laptop
    python sac_sparse.py --sparsity 0.9 --width 5                   # Humanoid Run, five times as wide (GPU)
    python sac_sparse.py --network mlp --env-id HalfCheetah-v5 --critic-sparsity 0.9 --actor-sparsity 0
"""

import copy
import itertools
import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.diagnostics import EverActive, diagnose
from utils.envs import Policy, in_dm_control_suite, max_episode_steps, open_envs
from utils.flags import (
    Above,
    Count,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    RunFlags,
    Seed,
    Sparsity,
)
from utils.graphs import cuda_graph
from utils.launch import launch
from utils.masks import active_count, apply_masks, keep_largest, layer_densities, mask_table, prunable, random_mask
from utils.replay import Batch, Replay, to_device
from utils.runs import Run, choose_device


@dataclass
class Args(RunFlags):
    """Defaults of SimBa; CLEANRL and PENDULUM replace some of them for the MLP and for Pendulum. `RunFlags` adds flags
    that do not affect learning: device, logging, checkpoints, evaluation."""

    # Experiment
    env_id: str = "dm_control/humanoid-run-v0"
    """a task of the DeepMind Control suite (dm_control/dog-walk-v0), or any Gymnasium id with vectors as observations
    and bounded continuous actions (HalfCheetah-v5, Pendulum-v1)"""
    seed: Seed = 1
    """seed of networks, masks, environments and exploration"""
    total_timesteps: Annotated[PositiveInt, Above("learning_starts")] = 500_000
    """total agent steps"""
    num_envs: PositiveInt = 1
    """environments stepped together; the number of updates per agent step stays the same"""
    action_repeat: PositiveInt | None = None
    """environment steps per agent step; default: 2 in the DeepMind Control suite, else 1"""

    # Algorithm and networks (SimBa)
    algorithm: Literal["sac", "ddpg"] = "sac"
    """stochastic actor with a learned temperature, or deterministic actor with constant exploration noise"""
    network: Literal["simba", "mlp"] = "simba"
    """SimBa's normalised residual blocks, or the two hidden layers of CleanRL's sac_continuous_action.py"""
    rsnorm: bool = True
    """normalise observations by their running mean and variance"""
    num_critics: Count | None = None
    """ensemble size (the minimum is used); default: 1 where episodes never terminate, else 2"""
    gamma: Probability | None = None
    """discount factor; default: 1 - 5 / (agent steps per episode), clipped to [0.95, 0.995]"""
    tau: Probability = 0.005
    """Polyak coefficient of the target critic"""
    init_alpha: PositiveFloat = 0.01
    """SAC: initial temperature"""
    target_entropy: float = -0.5
    """SAC: target entropy per action dimension, for actions scaled to [-1, 1]"""
    exploration_noise: NonNegativeFloat = 0.1
    """DDPG: standard deviation of the noise on actions"""

    # Optimisation and replay (SimBa)
    policy_lr: PositiveFloat = 1e-4
    """learning rate of the actor"""
    q_lr: PositiveFloat = 1e-4
    """learning rate of the critics and the temperature"""
    weight_decay: NonNegativeFloat = 1e-2
    """weight decay of AdamW, on every parameter of the actor and the critics"""
    batch_size: PositiveInt = 256
    """transitions per update"""
    buffer_size: PositiveInt = 1_000_000
    """rows of the replay: one for each transition, and one more for each episode"""
    learning_starts: PositiveInt = 5_000
    """agent steps before the first update, with random actions"""
    replay_ratio: PositiveFloat = 2.0
    """updates per agent step (update-to-data ratio)"""

    # Sparsity
    method: Literal["dense", "random", "gmp", "rigl", "set"] = "random"
    """dense network, fixed random mask (static sparsity), gradual magnitude pruning, RigL, or SET"""
    sparsity: Sparsity = 0.8
    """fraction of prunable weights (all but biases and normalisation) that is zero at the end of training"""
    actor_sparsity: Sparsity | None = None
    """sparsity of the actor, if different from --sparsity"""
    critic_sparsity: Sparsity | None = None
    """sparsity of the critics, if different from --sparsity"""
    mask_seed: Seed | None = None
    """seed of the masks, if different from --seed"""
    distribution: Literal["erk", "uniform"] = "erk"
    """how the sparsity is distributed over the layers: Erdos-Renyi-kernel, or the same in each"""
    width: PositiveInt = 1
    """multiplies the hidden units: SimBa 128 in the actor and 512 in the critic, MLP 256"""
    depth: Count = 1
    """multiplies the layers: SimBa 1 block in the actor and 2 in the critic, MLP 2 hidden layers"""
    prune_start: Probability = 0.2
    """gmp: fraction of the updates after which pruning starts"""
    prune_end: Annotated[Probability, Above("prune_start")] = 0.8
    """gmp: fraction of the updates after which the final sparsity is reached"""
    prune_interval: PositiveInt = 1_000
    """gmp: updates between mask updates; short runs shrink it to have at least 50 of them"""
    rewire_end: Probability = 0.8
    """rigl, set: fraction of the updates after which the mask is frozen"""
    rewire_interval: PositiveInt = 1_000
    """rigl, set: updates between mask updates; short runs shrink it to have at least 50 of them"""
    drop_fraction: Probability = 0.5
    """rigl, set: initial fraction of a layer's connections that a mask update replaces; cosine-annealed to 0"""


# Defaults for --network mlp (explicit flags win): those of CleanRL's sac_continuous_action.py.
CLEANRL = {
    "policy_lr": 3e-4,
    "q_lr": 1e-3,
    "weight_decay": 0.0,
    "rsnorm": False,
    "replay_ratio": 1.0,
    "num_critics": 2,
    "gamma": 0.99,
    "init_alpha": 1.0,
    "target_entropy": -1.0,
}

# Defaults for Pendulum (explicit flags win), a task for a CPU.
PENDULUM = {
    "eval_episodes": 20,
    "total_timesteps": 12_000,
    "network": "mlp",
    "learning_starts": 1_000,
}

# Hidden units, and residual blocks or hidden layers, of the actor and of the critic at --width 1 --depth 1.
SIZES = {"simba": ((128, 1), (512, 2)), "mlp": ((256, 2), (256, 2))}
# SimBa uses two critics where an episode can terminate, and one elsewhere.
NEVER_TERMINATES = ("HalfCheetah-", "HumanoidStandup-", "Pendulum-", "Pusher-", "Reacher-", "Swimmer-")


# ---- Networks --------------------------------------------------------------------------------------------------------

TRUNCATED_NORMAL_STD = 0.87962566103423978  # standard deviation of a unit normal truncated at +-2


class ResidualBlock(nn.Module):
    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden, eps=1e-6)
        self.expand = nn.Linear(hidden, 4 * hidden)
        self.project = nn.Linear(4 * hidden, hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.project(F.relu(self.expand(self.norm(x))))


def simba(inputs: int, hidden: int, blocks: int) -> nn.Sequential:
    """SimBa's encoder (Lee et al. 2025): (B, inputs) -> (B, hidden)."""
    residual = [ResidualBlock(hidden) for _ in range(blocks)]
    return nn.Sequential(nn.Linear(inputs, hidden), *residual, nn.LayerNorm(hidden, eps=1e-6))


def mlp(inputs: int, hidden: int, layers: int) -> nn.Sequential:
    """Hidden layers with ReLU: (B, inputs) -> (B, hidden)."""
    pairs = itertools.pairwise([inputs] + [hidden] * layers)
    return nn.Sequential(*(layer for i, o in pairs for layer in (nn.Linear(i, o), nn.ReLU())))


def init_simba(module: nn.Module) -> None:
    """SimBa's initialisation of a module's own layers: orthogonal; in residual blocks Flax's He normal."""
    for layer in module.children():
        if isinstance(layer, nn.Linear):
            if isinstance(module, ResidualBlock):
                std = math.sqrt(2 / layer.in_features) / TRUNCATED_NORMAL_STD
                nn.init.trunc_normal_(layer.weight, std=std, a=-2 * std, b=2 * std)
            else:
                nn.init.orthogonal_(layer.weight)
            nn.init.zeros_(layer.bias)


class Actor(nn.Module):
    """SAC: a Gaussian whose mean and standard deviation depend on the state, squashed by tanh."""

    def __init__(self, encoder: nn.Module, hidden: int, actions: int, min_log_std: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean = nn.Linear(hidden, actions)
        self.log_std = nn.Linear(hidden, actions)
        self.min_log_std = min_log_std

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # (B, D) -> (B, A), (B,)
        """Samples an action; returns it and its log-probability."""
        features = self.encoder(obs)
        mean, log_std = self.mean(features), torch.tanh(self.log_std(features))  # (B, A)
        log_std = self.min_log_std + (2 - self.min_log_std) / 2 * (1 + log_std)  # from min_log_std to 2
        noise = torch.randn_like(mean)
        x = mean + log_std.exp() * noise
        log_normal = -(noise.square() + math.log(2 * math.pi)) / 2 - log_std
        log_det_jacobian = 2 * (math.log(2) - x - F.softplus(-2 * x))  # log(1 - tanh(x)^2), without cancellation
        return torch.tanh(x), (log_normal - log_det_jacobian).sum(1)

    def mode(self, obs: torch.Tensor) -> torch.Tensor:  # (B, D) -> (B, A)
        return torch.tanh(self.mean(self.encoder(obs)))


class DeterministicActor(nn.Module):
    """DDPG: constant noise, which SimBa's DDPG adds in the losses too. At temperature 0, all else is as in SAC."""

    def __init__(self, encoder: nn.Module, hidden: int, actions: int, noise: float) -> None:
        super().__init__()
        self.encoder = encoder
        self.mean = nn.Linear(hidden, actions)
        self.noise = noise

    def forward(self, obs: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:  # (B, D) -> (B, A), (B,)
        action = self.mode(obs)
        noisy = (action + self.noise * torch.randn_like(action)).clamp(-1, 1)
        return noisy, torch.zeros_like(action[:, 0])

    def mode(self, obs: torch.Tensor) -> torch.Tensor:  # (B, D) -> (B, A)
        return torch.tanh(self.mean(self.encoder(obs)))


class Critic(nn.Module):
    """Q(s, a)."""

    def __init__(self, encoder: nn.Module, hidden: int) -> None:
        super().__init__()
        self.encoder = encoder
        self.head = nn.Linear(hidden, 1)

    def forward(self, obs_action: torch.Tensor) -> torch.Tensor:  # (B, D + A) -> (B,)
        return self.head(self.encoder(obs_action)).squeeze(1)


class Critics(nn.Module):
    """An ensemble of n critics."""

    def __init__(self, critics: list[Critic]) -> None:
        super().__init__()
        self.critics = nn.ModuleList(critics)

    def forward(self, obs: torch.Tensor, action: torch.Tensor) -> torch.Tensor:  # (B, D), (B, A) -> (n, B)
        obs_action = torch.cat([obs, action], 1)
        return torch.stack([critic(obs_action) for critic in self.critics])


class RSNorm(nn.Module):
    """Running observation normalisation (Chan et al. 1979); the statistics are float64."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(features, dtype=torch.float64))
        self.register_buffer("var", torch.ones(features, dtype=torch.float64))
        self.register_buffer("count", torch.tensor(1e-4, dtype=torch.float64))

    def update(self, x: torch.Tensor) -> None:  # (B, D)
        """Takes in observations; in place, like everything that a captured CUDA graph reads."""
        x, total = x.double(), self.count + len(x)
        delta = x.mean(0) - self.mean
        squares = self.var * self.count + x.var(0, correction=0) * len(x) + delta**2 * self.count * len(x) / total
        self.mean += delta * len(x) / total
        self.var.copy_(squares / total)
        self.count.copy_(total)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, D) -> (B, D)
        return ((x - self.mean) / (self.var + 1e-8).sqrt()).float()


def make_networks(args: Args, obs_space: gym.spaces.Box, action_space: gym.spaces.Box) -> dict[str, nn.Module]:
    """The networks that model.pt holds, by name."""
    (inputs,), (actions,) = obs_space.shape, action_space.shape
    encoder, min_log_std = (simba, -10) if args.network == "simba" else (mlp, -5)
    sizes = [(units * args.width, layers * args.depth) for units, layers in SIZES[args.network]]
    (actor_hidden, actor_layers), (critic_hidden, critic_layers) = sizes
    actor_encoder = encoder(inputs, actor_hidden, actor_layers)
    if args.algorithm == "sac":
        actor = Actor(actor_encoder, actor_hidden, actions, min_log_std)
    else:
        actor = DeterministicActor(actor_encoder, actor_hidden, actions, args.exploration_noise)
    critic_encoders = [encoder(inputs + actions, critic_hidden, critic_layers) for _ in range(args.num_critics)]
    critics = Critics([Critic(each, critic_hidden) for each in critic_encoders])
    if args.network == "simba":
        actor.apply(init_simba)
        critics.apply(init_simba)
    return {"actor": actor, "critic": critics, "rsnorm": RSNorm(inputs)}


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


def actor_loss(actor: nn.Module, critic: nn.Module, obs: torch.Tensor, alpha: torch.Tensor) -> tuple:
    """Mean of alpha * log pi(a|s) - Q(s, a) over actions a of the actor, and their mean entropy."""
    action, log_pi = actor(obs)
    q = critic(obs, action).amin(0)  # (B,)
    return (alpha * log_pi - q).mean(), -log_pi.detach().mean()


def temperature_loss(log_alpha: torch.Tensor, entropy: torch.Tensor, target_entropy: float) -> torch.Tensor:
    """Its gradient raises the temperature alpha while the entropy is below its target."""
    return log_alpha.exp() * (entropy - target_entropy)


def critic_loss(actor, critic, target_critic, batch: Batch, alpha: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean squared TD error of each critic (n,), and its mean of Q(s, a) (n,)."""
    with torch.no_grad():
        next_action, next_log_pi = actor(batch.next_observation)
        next_q = target_critic(batch.next_observation, next_action).amin(0)  # (B,)
        # the discount is 0 after a terminal, but not after a time limit
        td_target = batch.reward + batch.discount * (next_q - alpha * next_log_pi)
    q = critic(batch.observation, batch.action)  # (n, B)
    return (q - td_target).square().mean(1), q.detach().mean(1)


def discount_for(episode_steps: float | None) -> float:
    """SimBa's rule (and TD-MPC2's): a horizon of a fifth of an episode, within bounds."""
    horizon = episode_steps / 5 if episode_steps else 100
    return min(max((horizon - 1) / horizon, 0.95), 0.995)


class Greedy(nn.Module):
    """The actor's mode, for observations as the environment gives them."""

    def __init__(self, actor: nn.Module, normalise: nn.Module) -> None:
        super().__init__()
        self.actor, self.normalise = actor, normalise

    def forward(self, obs: torch.Tensor) -> torch.Tensor:  # (B, D) -> (B, A)
        return self.actor.mode(self.normalise(obs))


def make_greedy(args: Args, networks: dict[str, nn.Module]) -> nn.Module:
    """What `utils.export` writes: observations (n, D) -> actions in [-1, 1] (n, A)."""
    return Greedy(networks["actor"], networks["rsnorm"] if args.rsnorm else nn.Identity())


def make_policy(args: Args, networks: dict[str, nn.Module]) -> Policy:
    """The policy of evaluations and videos: the actor's mode."""
    greedy = make_greedy(args, networks)
    device = next(networks["actor"].parameters()).device

    @torch.inference_mode()
    def policy(obs: np.ndarray, rngs: list[np.random.Generator]) -> np.ndarray:  # (n, D) -> (n, A)
        return greedy(to_device(obs, device)).cpu().numpy()

    return policy


def main(args: Args) -> np.ndarray:
    """Trains the agent; returns the returns (episodes,) of the final evaluation."""
    device = choose_device(args)
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)

    # Flags that were not given and depend on the environment
    dm_control = in_dm_control_suite(args.env_id)
    args = replace(args, action_repeat=args.action_repeat or (2 if dm_control else 1))
    envs = open_envs(args, gym.spaces.Box)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    episode_steps = max_episode_steps(args.env_id)
    gamma = discount_for(episode_steps and episode_steps / args.action_repeat) if args.gamma is None else args.gamma
    num_critics = args.num_critics or (1 if dm_control or args.env_id.startswith(NEVER_TERMINATES) else 2)
    args = replace(args, gamma=gamma, num_critics=num_critics)
    print(f"critics: {num_critics}, discount factor: {gamma:g}, action repeat: {args.action_repeat}")
    if device.type == "cpu" and args.network == "simba":
        print("SimBa needs a GPU; for a task of two minutes on a CPU: python sac_sparse.py --env-id Pendulum-v1")

    # ---- Agent -------------------------------------------------------------------------------------------------------
    networks = {name: network.to(device) for name, network in make_networks(args, obs_space, action_space).items()}
    actor, critic, rsnorm = networks["actor"], networks["critic"], networks["rsnorm"]
    target_critic = copy.deepcopy(critic)
    normalise = rsnorm if args.rsnorm else nn.Identity()
    # DDPG is the same agent at temperature 0
    log_alpha = torch.tensor(math.log(args.init_alpha) if args.algorithm == "sac" else -math.inf, device=device)
    log_alpha.requires_grad_()
    target_entropy = args.target_entropy * math.prod(action_space.shape)
    adam = {"fused": True, "capturable": device.type == "cuda"}
    optimizers = {
        "actor": torch.optim.AdamW(actor.parameters(), args.policy_lr, weight_decay=args.weight_decay, **adam),
        "critic": torch.optim.AdamW(critic.parameters(), args.q_lr, weight_decay=args.weight_decay, **adam),
        "temperature": torch.optim.Adam([log_alpha], args.q_lr, **adam),
    }
    capacity = min(args.buffer_size, args.total_timesteps)
    replay = Replay(capacity, args.num_envs, obs_space, action_space, stack=1, n_step=1, gamma=gamma, device=device)

    # ---- Sparsity ----------------------------------------------------------------------------------------------------
    sparsity = {"actor": args.actor_sparsity, "critic": args.critic_sparsity}
    mask_seed = args.seed if args.mask_seed is None else args.mask_seed
    weights, densities, masks = {}, {}, {}
    for net in sparsity:
        target_sparsity = args.sparsity if sparsity[net] is None else sparsity[net]
        if args.method == "dense":
            target_sparsity = 0.0
        weights[net] = prunable(networks[net])
        densities[net] = layer_densities(weights[net], target_sparsity, args.distribution)
        # Both networks start from the same seed, so that the sparsity of one does not change the mask of the other
        masks[net] = initial_masks(weights[net], densities[net], args.method, mask_seed)
        apply_masks(weights[net], masks[net])
    target_weights = prunable(target_critic)
    apply_masks(target_weights, masks["critic"])
    all_weights = {f"{net}.{name}": weight for net in weights for name, weight in weights[net].items()}
    all_masks = {f"{net}.{name}": mask for net in masks for name, mask in masks[net].items()}
    print(mask_table(all_weights, {f"{net}.{name}": d for net in densities for name, d in densities[net].items()}))
    n_updates = int((args.total_timesteps - args.learning_starts) * args.replay_ratio)
    mask_start, mask_end, mask_interval = mask_schedule(args, all_masks, n_updates)

    ever_active = {net: EverActive(masks[net]) for net in masks}  # for the diagnostics
    state = {
        "networks": networks,
        "target_critic": target_critic,
        "log_alpha": log_alpha,
        "optimizers": optimizers,
        "masks": masks,
        "ever_active": ever_active,
        "replay": replay,
    }
    run = Run(args, __file__, state, rng)
    global_step, update = run.step, run.update  # 0, or those of the checkpoint that --resume names

    def sample(batch_size: int) -> Batch:
        """A batch with observations normalised by the current statistics: the replay holds raw ones."""
        batch = replay.sample(batch_size)
        obs, next_obs = normalise(batch.observation), normalise(batch.next_observation)
        return batch._replace(observation=obs, next_observation=next_obs)

    def step_weights(net: str, mask_progress: float | None) -> None:
        """One gradient step of the actor or the critics, and the mask update if one is due."""
        if mask_progress is None or not masks[net]:
            optimizers[net].step()
        elif args.method == "gmp":
            prune(weights[net], masks[net], densities[net], mask_progress)
            optimizers[net].step()
        else:  # RigL and SET: the change of topology replaces the gradient step
            drop_fraction = cosine_drop_fraction(mask_progress, args.drop_fraction)
            rewire(weights[net], masks[net], optimizers[net], drop_fraction, args.method)
        # After every step, as gradients and Adam's moments would revive pruned weights
        apply_masks(weights[net], masks[net])
        if mask_progress is not None:
            ever_active[net].update(masks[net])

    def learn(mask_progress: float | None = None) -> tuple[torch.Tensor, ...]:
        """One update of all networks, and the mask updates if they are due, at this fraction of their schedule.

        Returns the losses of the actor, the temperature and each critic, and each critic's mean of Q(s, a).
        """
        batch = sample(args.batch_size)

        # Actor: before the critics, as in SimBa; CleanRL has the critics first
        alpha = log_alpha.detach().exp()
        policy_loss, entropy = actor_loss(actor, critic, batch.observation, alpha)
        optimizers["actor"].zero_grad()
        # Masks multiply the stored weights, not the forward pass, so pruned weights get gradients: RigL grows by them
        policy_loss.backward(inputs=list(actor.parameters()))
        step_weights("actor", mask_progress)

        # Temperature
        alpha_loss = temperature_loss(log_alpha, entropy, target_entropy)
        if args.algorithm == "sac":
            optimizers["temperature"].zero_grad()
            alpha_loss.backward()
            optimizers["temperature"].step()

        # Critics
        q_losses, q_values = critic_loss(actor, critic, target_critic, batch, log_alpha.detach().exp())
        optimizers["critic"].zero_grad()
        q_losses.sum().backward()
        step_weights("critic", mask_progress)

        # Target network: it has the critics' mask, and an average of zeros is zero
        if mask_progress is not None:
            apply_masks(target_weights, masks["critic"])
        with torch.no_grad():
            for target, online in zip(target_critic.parameters(), critic.parameters()):
                target.lerp_(online, args.tau)
        return policy_loss.detach(), alpha_loss.detach(), q_losses.detach(), q_values

    # A CUDA graph replays kernels on fixed memory, and none of the Python above. So mask updates are called eagerly,
    # and all that changes between replays (observation, weights, masks, the replay's contents) changes in place
    replay.end_episodes()  # the environments start new episodes, after a resume too
    obs = to_device(envs.reset(seed=args.seed + global_step)[0], device).clone()  # (num_envs, D)
    use_graphs = args.cuda_graph and device.type == replay.device.type == "cuda"
    explore = torch.inference_mode()(lambda: actor(normalise(obs))[0])  # (num_envs, A)
    fast_learn, fast_explore = cuda_graph(learn, use_graphs), cuda_graph(explore, use_graphs)

    # ---- Loop --------------------------------------------------------------------------------------------------------
    done = np.zeros(args.num_envs, dtype=bool)
    losses = None
    while global_step < args.total_timesteps and not run.stopping:
        if args.rsnorm and not done.all():
            rsnorm.update(obs[np.flatnonzero(~done)])
        if global_step < args.learning_starts:
            action = rng.uniform(-1, 1, (args.num_envs, *action_space.shape)).astype(np.float32)
        else:
            action = fast_explore().cpu().numpy()
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
        replay.add(obs, action, reward, terminated, done, next_obs)
        obs.copy_(next_obs)

        run.advance(global_step, update)
        run.log_episodes(infos, done)
        if losses is not None and run.due(run.log_every):
            policy_loss, alpha_loss, q_losses, q_values = (loss.tolist() for loss in losses)
            scalars = {"losses/qf_loss": sum(q_losses) / num_critics, "losses/actor_loss": policy_loss}
            scalars |= {f"losses/qf{i + 1}_loss": value for i, value in enumerate(q_losses)}
            scalars |= {f"losses/qf{i + 1}_values": value for i, value in enumerate(q_values)}
            if args.algorithm == "sac":
                scalars |= {"losses/alpha": log_alpha.exp().item(), "losses/alpha_loss": alpha_loss}
            if all_masks and args.method in ("rigl", "set"):
                progress = min((update - mask_start) / (mask_end - mask_start), 1.0)
                scalars["sparsity/drop_fraction"] = cosine_drop_fraction(progress, args.drop_fraction)
            run.log(scalars, all_weights, all_masks)
        if update and run.due(args.diagnostics_every):
            alpha = log_alpha.detach().exp()
            run.log(
                diagnose(
                    actor,
                    sample,
                    masks["actor"],
                    ever_active["actor"],
                    loss=lambda a, batch, alpha=alpha: actor_loss(a, critic, batch.observation, alpha)[0],
                    prefix="diagnostics/actor",
                )
                | diagnose(
                    critic,
                    sample,
                    masks["critic"],
                    ever_active["critic"],
                    loss=lambda q, batch, alpha=alpha: critic_loss(actor, q, target_critic, batch, alpha)[0].sum(),
                    inputs=("observation", "action"),
                    prefix="diagnostics/critic",
                )
            )
        if run.due(args.eval_every):
            run.evaluate(make_policy(args, networks))
        if run.due(args.checkpoint_every):
            run.try_checkpoint()

    envs.close()
    if run.stopping:
        run.stop()
    return run.finish(make_policy(args, networks), networks, masks, densities)


def preset(args: Args) -> dict:
    """Values that replace defaults for these flags."""
    small = PENDULUM if args.env_id.startswith("Pendulum-") else {}
    return (CLEANRL if args.network == "mlp" else {}) | small


if __name__ == "__main__":
    launch(main, Args, preset)
