# Documentation and results: docs/drq_sparse.md
"""DrQ-v2 with sparse networks: continuous control from pixels, with fixed random masks.

`--method` chooses how the networks become sparse: a fixed random mask (random), gradual magnitude pruning during
training (gmp), or a mask of constant size that moves: RigL grows connections where the gradient is largest, SET at
random. Everything that changes learning is in this file; `utils/` keeps the books.

Ma et al. (2025), Network sparsity unlocks the scaling potential of deep reinforcement learning. arXiv:2506.17204
Yarats et al. (2021), Mastering visual continuous control: improved data-augmented reinforcement learning (DrQ-v2).
arXiv:2107.09645

    python drq_sparse.py --env-id Pendulum-v1                       # from frames of 24 x 24, on a laptop
    python drq_sparse.py --sparsity 0.8 --width 2                   # Quadruped Run, twice as wide (GPU)
    python drq_sparse.py --env-id dm_control/hopper-hop-v0 --method rigl --encoder-sparsity 0
"""

import copy
import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.diagnostics import EverActive, diagnose
from utils.envs import Policy, in_dm_control_suite, open_envs
from utils.flags import (
    Above,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Probability,
    Range,
    RunFlags,
    Seed,
    Sparsity,
)
from utils.graphs import cuda_graph
from utils.launch import launch
from utils.masks import active_count, apply_masks, keep_largest, layer_densities, mask_table, prunable, random_mask
from utils.replay import Batch, Replay, capacity_that_fits, to_device
from utils.runs import Run, choose_device


@dataclass
class Args(RunFlags):
    """Defaults of DrQ-v2 for its medium tasks; EASY, HUMANOID, QUADRUPED_RUN and PENDULUM replace some of them.
    `RunFlags` adds flags that do not affect learning: device, logging, checkpoints, evaluation."""

    # Experiment
    env_id: str = "dm_control/quadruped-run-v0"
    """a task of the DeepMind Control suite (dm_control/hopper-hop-v0), or any Gymnasium id that renders and has bounded
    continuous actions (Pendulum-v1)"""
    seed: Seed = 1
    """seed of networks, masks, environments and exploration"""
    total_timesteps: Annotated[PositiveInt, Above("learning_starts")] = 1_550_000
    """total agent steps"""
    num_envs: PositiveInt = 1
    """environments stepped together; the number of updates per agent step stays the same"""
    action_repeat: PositiveInt | None = None
    """environment steps per agent step; default: 2 in the DeepMind Control suite, else 1"""

    # Observations
    frame_size: Annotated[int, Range("an integer of at least 15", lambda x: x >= 15)] = 84
    """height and width of the rendered frames, in pixels"""
    frame_stack: PositiveInt = 3
    """frames in one observation"""
    camera: NonNegativeInt | None = None
    """DeepMind Control: camera of the frames; default: 2 (close by) for the quadruped, else 0"""
    random_shift: NonNegativeInt = 4
    """augmentation: maximum random shift of a sampled observation, in pixels; 0 disables it"""

    # Exploration
    start_std: NonNegativeFloat = 1.0
    """initial standard deviation of the noise on actions"""
    end_std: NonNegativeFloat = 0.1
    """final standard deviation, reached after exploration_steps"""
    exploration_steps: PositiveInt = 500_000
    """agent steps over which the standard deviation decreases linearly"""
    noise_clip: NonNegativeFloat = 0.3
    """bound of the noise on actions in the losses; the noise of exploration is not bounded"""

    # Networks, optimisation and replay
    feature_dim: PositiveInt = 50
    """output units of the trunks, the layers between the encoder and the hidden layers"""
    hidden_dim: PositiveInt = 1_024
    """units of the two hidden layers of the actor and of each critic"""
    learning_rate: PositiveFloat = 1e-4
    """learning rate of Adam, for the encoder, the actor and the critics"""
    gamma: Probability = 0.99
    """discount factor"""
    n_step: PositiveInt = 3
    """n of the n-step return"""
    tau: Probability = 0.01
    """Polyak coefficient of the target critics"""
    batch_size: PositiveInt = 256
    """transitions per update"""
    buffer_size: PositiveInt = 1_000_000
    """rows of the replay: one for each transition, and one more for each episode; fewer if memory is short"""
    learning_starts: PositiveInt = 2_000
    """agent steps before the first update, with random actions"""
    replay_ratio: PositiveFloat = 0.5
    """updates per agent step (update-to-data ratio)"""

    # Sparsity
    method: Literal["dense", "random", "gmp", "rigl", "set"] = "random"
    """dense network, fixed random mask (static sparsity), gradual magnitude pruning, RigL, or SET"""
    sparsity: Sparsity = 0.8
    """fraction of prunable weights (all but biases and normalisation) that is zero at the end of training"""
    encoder_sparsity: Sparsity | None = None
    """sparsity of the encoder, if different from --sparsity"""
    actor_sparsity: Sparsity | None = None
    """sparsity of the actor, if different from --sparsity"""
    critic_sparsity: Sparsity | None = None
    """sparsity of the critics, if different from --sparsity"""
    mask_seed: Seed | None = None
    """seed of the masks, if different from --seed"""
    distribution: Literal["erk", "uniform"] = "erk"
    """how the sparsity is distributed over the layers: Erdos-Renyi-kernel, or the same in each"""
    width: PositiveInt = 1
    """multiplies the encoder's channels (32), feature_dim and hidden_dim"""
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


# Defaults for the tasks that DrQ-v2 calls easy (explicit flags win).
EASY = {"total_timesteps": 550_000, "exploration_steps": 100_000}
WALKER = {"n_step": 1, "batch_size": 512}  # walker-stand, walker-walk and walker-run
EASY_TASKS = (
    "ball_in_cup-catch",
    "cartpole-balance",
    "cartpole-balance_sparse",
    "cartpole-swingup",
    "finger-spin",
    "hopper-stand",
    "pendulum-swingup",
    "walker-stand",
    "walker-walk",
)

# Defaults for the humanoid, whose tasks DrQ-v2 calls hard.
HUMANOID = {
    "total_timesteps": 15_050_000,
    "exploration_steps": 2_000_000,
    "learning_rate": 8e-5,
    "feature_dim": 100,
}

# Quadruped Run has a smaller replay in DrQ-v2's code.
QUADRUPED_RUN = {"buffer_size": 100_000}

# Defaults for Pendulum (explicit flags win), a task for a CPU.
PENDULUM = {
    "eval_episodes": 20,
    "total_timesteps": 10_000,
    "frame_size": 24,
    "exploration_steps": 5_000,
    "hidden_dim": 256,
    "learning_rate": 3e-4,
    "batch_size": 64,
    "learning_starts": 1_000,
    "replay_ratio": 1.0,
}


# ---- Networks --------------------------------------------------------------------------------------------------------


class Encoder(nn.Module):
    """Four convolutions, of which the first halves the image: 84 x 84 pixels become 35 x 35."""

    def __init__(self, channels: int, frame_size: int, width: int) -> None:
        super().__init__()
        hidden = 32 * width
        self.conv1 = nn.Conv2d(channels, hidden, 3, stride=2)
        self.conv2 = nn.Conv2d(hidden, hidden, 3)
        self.conv3 = nn.Conv2d(hidden, hidden, 3)
        self.conv4 = nn.Conv2d(hidden, hidden, 3)
        self.features = hidden * ((frame_size - 1) // 2 - 6) ** 2

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, H) in [0, 255] -> (B, features)
        x = x / 255.0 - 0.5
        for conv in (self.conv1, self.conv2, self.conv3, self.conv4):
            x = F.relu(conv(x))
        return x.flatten(1)


def make_trunk(features: int, feature_dim: int) -> nn.Sequential:
    """The encoder's many features become few: (B, features) -> (B, feature_dim)."""
    return nn.Sequential(nn.Linear(features, feature_dim), nn.LayerNorm(feature_dim), nn.Tanh())


def make_head(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    """Two hidden layers: (B, inputs) -> (B, outputs)."""
    hidden_layers = nn.Linear(inputs, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()
    return nn.Sequential(*hidden_layers, nn.Linear(hidden, outputs))


class Actor(nn.Module):
    def __init__(self, features: int, feature_dim: int, hidden: int, actions: int) -> None:
        super().__init__()
        self.trunk = make_trunk(features, feature_dim)
        self.head = make_head(feature_dim, hidden, actions)

    def forward(self, features: torch.Tensor) -> torch.Tensor:  # (B, features) -> (B, A)
        return torch.tanh(self.head(self.trunk(features)))


class TwinCritic(nn.Module):
    """Two critics with one trunk."""

    def __init__(self, features: int, feature_dim: int, hidden: int, actions: int) -> None:
        super().__init__()
        self.trunk = make_trunk(features, feature_dim)
        self.heads = nn.ModuleList(make_head(feature_dim + actions, hidden, 1) for _ in range(2))

    def forward(self, features: torch.Tensor, action: torch.Tensor) -> torch.Tensor:  # (B, features), (B, A) -> (2, B)
        x = torch.cat([self.trunk(features), action], 1)
        return torch.stack([head(x).squeeze(1) for head in self.heads])


def init_orthogonal(layer: nn.Module) -> None:
    """DrQ-v2's initialisation: orthogonal, with the gain of ReLU in convolutions."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.orthogonal_(layer.weight, math.sqrt(2) if isinstance(layer, nn.Conv2d) else 1.0)
        nn.init.zeros_(layer.bias)


def make_networks(args: Args, obs_space: gym.spaces.Box, action_space: gym.spaces.Box) -> dict[str, nn.Module]:
    """The networks that model.pt holds, by name."""
    (actions,) = action_space.shape
    encoder = Encoder(obs_space.shape[0], obs_space.shape[1], args.width)
    sizes = encoder.features, args.feature_dim * args.width, args.hidden_dim * args.width, actions
    networks = {"encoder": encoder, "actor": Actor(*sizes), "critic": TwinCritic(*sizes)}
    networks = {name: network.apply(init_orthogonal) for name, network in networks.items()}
    encoder.to(memory_format=torch.channels_last)  # twice as fast on a CPU
    return networks


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


def random_shift(obs: torch.Tensor, pad: int) -> torch.Tensor:
    """DrQ-v2's augmentation: each observation moves by up to `pad` pixels in both directions; edges are repeated.

    Args:
        obs: (B, C, H, H); returns float32 of that shape.
    """
    if pad == 0:
        return obs
    batch, size = len(obs), obs.shape[-1]
    padded = F.pad(obs.float(), (pad, pad, pad, pad), mode="replicate")
    shift = torch.randint(0, 2 * pad + 1, (batch, 2, 1), device=obs.device)  # a whole number of pixels
    pixel = torch.arange(size, device=obs.device) + shift  # (B, 2, H): the columns and the rows to show
    x, y = ((2 * pixel + 1) / (size + 2 * pad) - 1).unbind(1)  # from -1 to 1 between the edges, as grid_sample has it
    grid = torch.stack([x[:, None, :].expand(-1, size, -1), y[:, :, None].expand(-1, -1, size)], 3)  # (B, H, H, 2)
    return F.grid_sample(padded, grid, mode="bilinear", align_corners=False)


def add_noise(action: torch.Tensor, std: torch.Tensor, clip: float = math.inf) -> torch.Tensor:
    """Gaussian noise, itself clipped; the noisy action is clipped to [-1, 1] but its gradient is not."""
    noisy = action + (std * torch.randn_like(action)).clamp(-clip, clip)
    return noisy + (noisy.clamp(-1 + 1e-6, 1 - 1e-6) - noisy).detach()


def actor_loss(actor: nn.Module, critic: nn.Module, features: torch.Tensor, std: torch.Tensor, clip: float):
    """Mean of -Q(s, a) over noisy actions a of the actor."""
    action = add_noise(actor(features), std, clip)
    return -critic(features, action).amin(0).mean()


def critic_loss(actor, critic, target_critic, batch: Batch, std: torch.Tensor, clip: float) -> tuple:
    """Mean squared TD error of each critic (2,), and its mean of Q(s, a) (2,); `batch` holds features."""
    with torch.no_grad():
        next_action = add_noise(actor(batch.next_observation), std, clip)
        next_q = target_critic(batch.next_observation, next_action).amin(0)  # (B,)
        td_target = batch.reward + batch.discount * next_q  # the discount is 0 after a terminal, not after a time limit
    q = critic(batch.observation, batch.action)  # (2, B)
    return (q - td_target).square().mean(1), q.detach().mean(1)


def linear_schedule(start: float, end: float, progress: float) -> float:
    return start + (end - start) * min(max(progress, 0.0), 1.0)


def make_greedy(args: Args, networks: dict[str, nn.Module]) -> nn.Module:
    """What `utils.export` writes: observations (n, C, H, H) -> actions in [-1, 1] (n, A)."""
    return nn.Sequential(networks["encoder"], networks["actor"])


def make_policy(args: Args, networks: dict[str, nn.Module]) -> Policy:
    """The policy of evaluations and videos: the actor's action, without noise."""
    greedy = make_greedy(args, networks)
    device = next(greedy.parameters()).device

    @torch.inference_mode()
    def policy(obs: np.ndarray, rngs: list[np.random.Generator]) -> np.ndarray:  # (n, C, H, H) -> (n, A)
        return greedy(to_device(obs, device)).cpu().numpy()

    return policy


def main(args: Args) -> np.ndarray:
    """Trains the agent; returns the returns (episodes,) of the final evaluation."""
    device = choose_device(args)
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)

    # Flags that were not given and depend on the environment
    dm_control = in_dm_control_suite(args.env_id)
    action_repeat = args.action_repeat or (2 if dm_control else 1)
    camera = (2 if "quadruped" in args.env_id else 0) if args.camera is None else args.camera
    args = replace(args, action_repeat=action_repeat, camera=camera)
    envs = open_envs(args, gym.spaces.Box)
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if device.type == "cpu" and args.frame_size >= 64:
        print("large frames need a GPU; for a task on a CPU: python drq_sparse.py --env-id Pendulum-v1")

    # ---- Agent -------------------------------------------------------------------------------------------------------
    networks = {name: network.to(device) for name, network in make_networks(args, obs_space, action_space).items()}
    encoder, actor, critic = networks["encoder"], networks["actor"], networks["critic"]
    target_critic = copy.deepcopy(critic)
    adam = {"fused": True, "capturable": device.type == "cuda"}
    optimizers = {net: torch.optim.Adam(networks[net].parameters(), args.learning_rate, **adam) for net in networks}
    wanted = min(args.buffer_size, args.total_timesteps)
    capacity = capacity_that_fits(wanted, args.num_envs, obs_space, args.frame_stack, device)
    if capacity < wanted:
        args = replace(args, buffer_size=capacity)  # so that a resumed run asks for a replay of the same size
    stack = args.frame_stack
    padding = "reset"  # an episode's first frame fills its first stack, as in the environments
    replay = Replay(capacity, args.num_envs, obs_space, action_space, stack, args.n_step, args.gamma, device, padding)
    std = torch.tensor(args.start_std, device=device)  # of exploration; a tensor, since it changes between replays

    # ---- Sparsity ----------------------------------------------------------------------------------------------------
    sparsity = {"encoder": args.encoder_sparsity, "actor": args.actor_sparsity, "critic": args.critic_sparsity}
    mask_seed = args.seed if args.mask_seed is None else args.mask_seed
    weights, densities, masks = {}, {}, {}
    for net in sparsity:
        target_sparsity = args.sparsity if sparsity[net] is None else sparsity[net]
        if args.method == "dense":
            target_sparsity = 0.0
        weights[net] = prunable(networks[net])
        densities[net] = layer_densities(weights[net], target_sparsity, args.distribution)
        # All networks start from the same seed, so that the sparsity of one does not change the masks of others
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
        "optimizers": optimizers,
        "masks": masks,
        "ever_active": ever_active,
        "replay": replay,
    }
    run = Run(args, __file__, state, rng)
    global_step, update = run.step, run.update  # 0, or those of the checkpoint that --resume names

    def encode(batch: Batch, encoder: nn.Module = encoder) -> Batch:
        """The batch with the encoder's features in place of its observations."""
        with torch.no_grad():
            next_features = encoder(batch.next_observation)
        return batch._replace(observation=encoder(batch.observation), next_observation=next_features)

    def encoded_critic_loss(critic: nn.Module, batch: Batch) -> torch.Tensor:
        """The critics' summed loss on encoded transitions, for the diagnostics."""
        return critic_loss(actor, critic, target_critic, batch, std, args.noise_clip)[0].sum()

    def step_weights(net: str, mask_progress: float | None) -> None:
        """One gradient step of a network, and the mask update if one is due."""
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

        Returns the losses of the actor and of each critic, and each critic's mean of Q(s, a).
        """
        batch = replay.sample(args.batch_size)
        obs, next_obs = (random_shift(x, args.random_shift) for x in (batch.observation, batch.next_observation))
        batch = encode(batch._replace(observation=obs, next_observation=next_obs))

        # Critics and encoder
        q_losses, q_values = critic_loss(actor, critic, target_critic, batch, std, args.noise_clip)
        optimizers["encoder"].zero_grad()
        optimizers["critic"].zero_grad()
        # Masks multiply the stored weights, not the forward pass, so pruned weights get gradients: RigL grows by them
        q_losses.sum().backward()
        step_weights("encoder", mask_progress)
        step_weights("critic", mask_progress)

        # Actor: with the new critics, and with the features from before the encoder's step, which it does not train
        policy_loss = actor_loss(actor, critic, batch.observation.detach(), std, args.noise_clip)
        optimizers["actor"].zero_grad()
        policy_loss.backward(inputs=list(actor.parameters()))
        step_weights("actor", mask_progress)

        # Target network: it has the critics' mask, and an average of zeros is zero
        if mask_progress is not None:
            apply_masks(target_weights, masks["critic"])
        with torch.no_grad():
            for target, online in zip(target_critic.parameters(), critic.parameters()):
                target.lerp_(online, args.tau)
        return policy_loss.detach(), q_losses.detach(), q_values

    # A CUDA graph replays kernels on fixed memory, and none of the Python above. So mask updates are called eagerly,
    # and all that changes between replays (observation, weights, masks, the replay's contents) changes in place
    replay.end_episodes()  # the environments start new episodes, after a resume too
    obs = to_device(envs.reset(seed=args.seed + global_step)[0], device).clone()  # (num_envs, *obs shape)
    use_graphs = args.cuda_graph and device.type == replay.device.type == "cuda"
    explore = torch.inference_mode()(lambda: add_noise(actor(encoder(obs)), std))  # (num_envs, A)
    fast_learn, fast_explore = cuda_graph(learn, use_graphs), cuda_graph(explore, use_graphs)

    # ---- Loop --------------------------------------------------------------------------------------------------------
    done = np.zeros(args.num_envs, dtype=bool)
    losses = None
    while global_step < args.total_timesteps and not run.stopping:
        progress = global_step / args.exploration_steps
        std.fill_(linear_schedule(args.start_std, args.end_std, progress))
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
            policy_loss, q_losses, q_values = (loss.tolist() for loss in losses)
            scalars = {"losses/qf_loss": sum(q_losses) / 2, "losses/actor_loss": policy_loss}
            scalars |= {f"losses/qf{i + 1}_loss": value for i, value in enumerate(q_losses)}
            scalars |= {f"losses/qf{i + 1}_values": value for i, value in enumerate(q_values)}
            scalars["charts/exploration_std"] = std.item()
            if all_masks and args.method in ("rigl", "set"):
                progress = min((update - mask_start) / (mask_end - mask_start), 1.0)
                scalars["sparsity/drop_fraction"] = cosine_drop_fraction(progress, args.drop_fraction)
            run.log(scalars, all_weights, all_masks)
        if update and run.due(args.diagnostics_every):
            run.log(
                diagnose(
                    encoder,
                    replay.sample,
                    masks["encoder"],
                    ever_active["encoder"],
                    loss=lambda e, batch: encoded_critic_loss(critic, encode(batch, e)),
                    prefix="diagnostics/encoder",
                )
                | diagnose(
                    actor,
                    lambda batch_size: encode(replay.sample(batch_size)),
                    masks["actor"],
                    ever_active["actor"],
                    loss=lambda a, batch: actor_loss(a, critic, batch.observation, std, args.noise_clip),
                    prefix="diagnostics/actor",
                )
                | diagnose(
                    critic,
                    lambda batch_size: encode(replay.sample(batch_size)),
                    masks["critic"],
                    ever_active["critic"],
                    loss=encoded_critic_loss,
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
    if args.env_id.startswith("Pendulum-"):
        return PENDULUM
    task = args.env_id.removeprefix("dm_control/").removesuffix("-v0")
    if task.startswith("walker-"):
        return WALKER | (EASY if task in EASY_TASKS else {})
    if task in EASY_TASKS:
        return EASY
    if task.startswith("humanoid-"):
        return HUMANOID
    return QUADRUPED_RUN if task == "quadruped-run" else {}


if __name__ == "__main__":
    launch(main, Args, preset)
