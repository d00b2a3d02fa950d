"""Rainbow on Atari with a sparse network: fewer weights in a wider network make a better agent.

The agent is Dopamine's compact Rainbow: n-step returns, prioritised replay, and C51's categorical distribution of the
return. `--double --dueling --noisy` make it the full one. `--method` says where the zeros come from: gradual magnitude
pruning during training (gmp), or a random mask fixed before it (random). Everything that changes learning is in this
file.

Obando-Ceron, Courville, Castro (2024), In value-based deep RL, a pruned network is a good network. arXiv:2402.12479
Hessel et al. (2018), Rainbow: combining improvements in deep reinforcement learning. arXiv:1710.02298
Bellemare, Dabney, Munos (2017), A distributional perspective on reinforcement learning (C51). arXiv:1707.06887

    python rainbow_pruned.py --env-id CartPole-v1            # a few minutes on a laptop
    python rainbow_pruned.py --sparsity 0.9 --width 4        # Breakout, 10 million steps, four times as wide
    python rainbow_pruned.py --double --dueling --noisy --network nature --env-id ALE/Pong-v5
"""

import copy
import itertools
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.checkpoints import load_checkpoint, parse_args, restore, save_checkpoint, save_model
from utils.dataset import DatasetWriter
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
from utils.plot import learning_curve
from utils.priorities import Priorities
from utils.replay import Batch, Replay
from utils.runs import Run, choose_device, in_words, median_seconds, read_episodes

SCRIPT = Path(__file__).stem


@dataclass
class Args:
    """The defaults are those for Atari; CLASSIC_CONTROL, below, replaces some for other environments."""

    # Experiment
    env_id: str = "ALE/Breakout-v5"
    """an Atari game (ALE/Pong-v5), or any Gymnasium id with vector observations and discrete actions (CartPole-v1)"""
    seed: int = 1
    """seed of the networks, masks, environments and exploration"""
    cuda: bool = True
    """use the GPU if there is one"""
    cuda_graph: bool = True
    """GPU: record an update, and an action, as a CUDA graph and replay it"""
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
    """agent steps between checkpoints; 0 writes one only when the run is interrupted"""
    resume: str | None = None
    """a checkpoint.pt to go on from; flags that are not given keep the values they had"""
    save_dataset: str | None = None
    """a folder to log all experience to, in the layout of the DQN Replay Dataset, for offline RL"""
    eval_episodes: int = 10
    """episodes played with the final network"""
    eval_epsilon: float = 0.001
    """share of random actions in them"""
    capture_video: bool = False
    """record these episodes as MP4"""
    diagnostics_every: int = 0
    """agent steps between looks at dormant units, ranks, norms and interference; 0 is never"""

    # Algorithm (Dopamine's rainbow.gin)
    total_timesteps: int = 10_000_000
    """agent steps; one is 4 Atari frames"""
    network: Literal["impala", "nature", "mlp"] = "impala"
    """the 15-layer Impala ResNet, the CNN of Mnih et al. (2015), or two hidden layers for vector observations"""
    learning_rate: float = 6.25e-5
    """of Adam"""
    adam_eps: float = 1.5e-4
    """epsilon of Adam"""
    num_envs: int = 1
    """environments stepped together; the number of updates per agent step stays the same"""
    buffer_size: int = 1_000_000
    """transitions in the replay"""
    learning_starts: int = 20_000
    """agent steps before the first update, with random actions"""
    replay_ratio: float = 0.25
    """updates per agent step"""
    batch_size: int = 32
    """transitions per update"""
    target_network_frequency: int = 8_000
    """agent steps between copies of the online network to the target network"""
    gamma: float = 0.99
    """discount"""
    n_step: int = 3
    """rewards summed before bootstrapping"""
    n_atoms: int = 51
    """atoms of the distribution of the return ..."""
    v_min: float = -10.0
    """... evenly spaced from here ..."""
    v_max: float = 10.0
    """... to here"""
    alpha: float = 0.5
    """a transition's priority is its loss to this power; 0 draws uniformly"""
    beta: float = 0.5
    """a transition's loss is weighted by its probability to this power, inverted"""
    double: bool = False
    """let the online network choose the next action (van Hasselt et al. 2016)"""
    dueling: bool = False
    """split the head into the value of the state and advantages of the actions (Wang et al. 2016)"""
    noisy: bool = False
    """explore by noise on the weights of the linear layers, without epsilon (Fortunato et al. 2018)"""
    noisy_sigma: float = 0.1
    """noisy: initial standard deviation, divided by the square root of a layer's inputs (0.5 in Hessel et al. 2018)"""
    start_e: float = 1.0
    """epsilon of epsilon-greedy exploration up to learning_starts ..."""
    end_e: float = 0.01
    """... and from exploration_steps later on"""
    exploration_steps: int = 250_000
    """agent steps over which epsilon falls linearly"""
    clip_rewards: bool = True
    """clip rewards to [-1, 1] for learning; logged returns are never clipped"""
    sticky_actions: float = 0.25
    """Atari: probability that the previous action is repeated (Machado et al. 2018)"""
    noop_max: int = 0
    """Atari: up to so many no-op actions at an episode's start (30 in Mnih et al. 2015)"""
    terminal_on_life_loss: bool = False
    """Atari: a lost life ends the value, as in Mnih et al. (2015)"""

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


# What vector observations get in place of the defaults above, where a flag does not say otherwise.
CLASSIC_CONTROL = {
    "eval_episodes": 20,
    "total_timesteps": 30_000,
    "network": "mlp",
    "learning_rate": 1e-3,
    "batch_size": 64,
    "buffer_size": 30_000,
    "learning_starts": 1_000,
    "target_network_frequency": 100,
    "n_step": 10,  # and so often a new target: in a short run, values must travel fast
    "v_min": 0.0,
    "v_max": 100.0,  # CartPole: a reward of 1 for ever, discounted
    "end_e": 0.05,
    "exploration_steps": 5_000,
    "clip_rewards": False,
}


class NoisyLinear(nn.Module):
    """A linear layer whose weights have Gaussian noise (Fortunato et al. 2018, sec. 3): fresh at each forward, off
    after `eval()`. It is factorised: the noise of a weight is the product of one for its input and one for its output.
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
    """The logits of each action's atoms. With dueling, they are the state's value plus the action's advantage less the
    mean over actions."""

    def __init__(self, inputs: int, n_actions: int, n_atoms: int, dueling: bool, linear: Callable) -> None:
        super().__init__()
        self.n_atoms = n_atoms
        self.action = linear(inputs, n_actions * n_atoms)
        self.value = linear(inputs, n_atoms) if dueling else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, inputs) -> (B, A, N)
        logits = self.action(x).unflatten(1, (-1, self.n_atoms))
        if self.value is None:
            return logits
        return self.value(x)[:, None] + logits - logits.mean(1, keepdim=True)


class NatureCNN(nn.Module):
    """Mnih et al. (2015), padded as in Dopamine: feature maps of 21, 11 and 11, so 7,744 x width features."""

    def __init__(self, channels: int, width: int, dense: int, bias: bool, linear: Callable, head: Callable) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 32 * width, 8, stride=4, padding=2, bias=bias)
        self.conv2 = nn.Conv2d(32 * width, 64 * width, 4, stride=2, bias=bias)
        self.conv3 = nn.Conv2d(64 * width, 64 * width, 3, padding=1, bias=bias)
        self.dense = linear(11 * 11 * 64 * width, dense)
        self.head = head(dense)
        self.apply(fan_in_init)

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

    def __init__(self, channels: int, width: int, dense: int, bias: bool, linear: Callable, head: Callable) -> None:
        super().__init__()
        sizes = [channels, 16 * width, 32 * width, 32 * width]
        self.convs = nn.ModuleList(nn.Conv2d(i, o, 3, padding=1, bias=bias) for i, o in itertools.pairwise(sizes))
        self.dense = linear(11 * 11 * sizes[-1], dense)
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

    def __init__(self, inputs: int, width: int, linear: Callable, head: Callable) -> None:
        super().__init__()
        self.dense1 = linear(inputs, 512 * width)
        self.dense2 = linear(512 * width, 512 * width)
        self.head = head(512 * width)
        self.apply(xavier_init)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, *observation shape) -> (B, A, N)
        return self.head(F.relu(self.dense2(F.relu(self.dense1(x.flatten(1).float())))))


def xavier_init(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.xavier_uniform_(layer.weight)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)


def fan_in_init(layer: nn.Module) -> None:
    if isinstance(layer, nn.Conv2d | nn.Linear):  # a variance of 1 / (sqrt(3) fan-in), as in Dopamine's Rainbow
        bound = math.sqrt(math.sqrt(3) / layer.weight[0].numel())
        nn.init.uniform_(layer.weight, -bound, bound)
    if getattr(layer, "bias", None) is not None:
        nn.init.zeros_(layer.bias)


def make_network(args: Args, observation_space: gym.spaces.Box, n_actions: int) -> nn.Module:
    linear = partial(NoisyLinear, sigma=args.noisy_sigma) if args.noisy else nn.Linear
    linear = partial(linear, bias=args.bias)
    head = partial(Head, n_actions=n_actions, n_atoms=args.n_atoms, dueling=args.dueling, linear=linear)
    if args.network == "mlp":
        return MLP(math.prod(observation_space.shape), args.width, linear, head)
    network = {"impala": ImpalaCNN, "nature": NatureCNN}[args.network]
    dense = 512 * args.width if args.scale_dense else 512
    memory_format = torch.channels_last if args.network == "impala" else torch.contiguous_format  # what is faster
    network = network(observation_space.shape[0], args.width, dense, args.bias, linear, head)
    return network.to(memory_format=memory_format)


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


def q_values(logits: torch.Tensor, support: torch.Tensor) -> torch.Tensor:
    """The means (B, A) of distributions over the atoms at `support` (N,), from their logits (B, A, N)."""
    return (logits.softmax(-1) * support).sum(-1)


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


def td_loss(q_network, target_network, batch: Batch, support: torch.Tensor, double: bool) -> tuple:
    """The cross-entropy (B,) of the distributions of Q(s, a) and their projected targets, and the mean of Q(s, a)."""
    rows = torch.arange(len(batch.action), device=batch.action.device)
    with torch.no_grad():
        next_logits = target_network(batch.next_observation)  # (B, A, N)
        chooser = q_network(batch.next_observation) if double else next_logits
        next_probability = next_logits[rows, q_values(chooser, support).argmax(1)].softmax(1)  # (B, N)
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


def epsilon_greedy(greedy: Callable[[], torch.Tensor], epsilon: float, envs: int, actions: int, rng) -> np.ndarray:
    """Actions (num_envs,): those that `greedy` gives, or with probability epsilon random ones."""
    explore = rng.random(envs) < epsilon
    action = rng.integers(actions, size=envs)
    return action if explore.all() else np.where(explore, action, greedy().cpu().numpy())


def check(args: Args) -> None:
    """Ends the program with one line if a flag has no meaning."""
    require_ranges(args)
    least = args.n_step * args.num_envs
    require(args, "learning_starts", args.learning_starts >= least, f"at least n-step x num-envs, here {least}")
    least = math.ceil(args.learning_starts + 10 / args.replay_ratio)
    require(args, "total_timesteps", args.total_timesteps >= least, f"at least {least} here, for 10 updates")
    require(args, "v_max", args.v_max > args.v_min, f"a number above v-min, here {args.v_min}")
    require(args, "prune_start", 0 <= args.prune_start < args.prune_end, f"a number in [0, {args.prune_end})")


def main(args: Args) -> np.ndarray:
    """Trains, and returns the returns of the final evaluation's episodes."""
    check(args)
    device = choose_device(args.cuda, args.tf32)
    rng = np.random.default_rng(args.seed)
    torch.manual_seed(args.seed)

    protocol = {"sticky_actions": args.sticky_actions, "noop_max": args.noop_max}
    envs = open_envs(args.env_id, args.num_envs, gym.spaces.Discrete, **protocol)
    space, actions = envs.single_observation_space, envs.single_action_space
    images, n_actions = atari_game(args.env_id) is not None, int(actions.n)
    require(args, "network", images != (args.network == "mlp"), "impala or nature for Atari, mlp for vectors")
    problem = cannot_render(args.env_id) if args.capture_video else None
    if problem:
        fail(f"--capture-video: {problem}")

    # Networks
    q_network = make_network(args, space, n_actions).to(device)
    target_network = copy.deepcopy(q_network)
    support = torch.linspace(args.v_min, args.v_max, args.n_atoms, device=device)  # (N,)
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
    n_updates = int((args.total_timesteps - args.learning_starts) * args.replay_ratio)
    prune_start, prune_end = int(args.prune_start * n_updates), min(int(args.prune_end * n_updates), n_updates - 1)
    prune_interval = max(1, min(args.prune_interval, (prune_end - prune_start) // 50))

    stack, capacity = STACK if images else 1, min(args.buffer_size, args.total_timesteps)
    try:
        replay = Replay(capacity, args.num_envs, space, actions, stack, args.n_step, args.gamma, device)
    except MemoryError as error:
        fail(f"--buffer-size: got {args.buffer_size}, takes what fits into memory; this {error}")
    priorities = Priorities(replay.length * args.num_envs, replay.device)
    max_priority = torch.ones((), dtype=torch.float64, device=replay.device)

    state = {  # all that a checkpoint restores, beside the masks and the random numbers
        "networks": {"q_network": q_network, "target_network": target_network},
        "optimizer": optimizer,
        "replay": replay,
        "priorities": priorities,
        "max_priority": max_priority,
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

    if images and device.type == "cpu":
        blank, zeros = torch.zeros(args.batch_size, *space.shape, dtype=torch.uint8), torch.zeros(args.batch_size)
        batch = Batch(blank, zeros.long(), zeros, zeros, blank)
        with torch.random.fork_rng():  # noisy layers draw
            per_update = median_seconds(
                lambda: td_loss(q_network, target_network, batch, support, args.double)[0].mean().backward()
            )
            per_step = median_seconds(lambda: q_network(blank[:1]))
        seconds = (n_updates - update) * per_update + (args.total_timesteps - global_step) * per_step
        print(f"no GPU here: this will take about {in_words(seconds)}, at {per_update:.2f} s an update")
        print("a small task that ends within minutes: python rainbow_pruned.py --env-id CartPole-v1")

    dataset = None
    if args.save_dataset:
        try:
            append = bool(args.resume) and saved["args"]["save_dataset"] == args.save_dataset
            dataset = DatasetWriter(args.save_dataset, args.num_envs, space, stack, args.env_id, append)
        except OSError as error:
            fail(f"--save-dataset: cannot begin a dataset in {args.save_dataset}: {error.strerror}")
    table = mask_table(shapes, final_kept)
    print(table)
    run = Run(args, SCRIPT, global_step)
    run.text("sparsity", table)

    def checkpoint() -> None:
        counters = {"kept": kept, "global_step": global_step, "update": update}
        save_checkpoint(run.folder, SCRIPT, args, rng, state, masks, **counters)

    @torch.no_grad()
    def look() -> dict[str, float]:
        """The diagnostics, on a sample of the replay."""
        batch = replay.sample(256)
        online, target = (copy.deepcopy(network).eval() for network in (q_network, target_network))  # no noise
        next_value = q_values(target(batch.next_observation), support).amax(1)
        return report(online, batch.observation, masks=masks) | {
            "diagnostics/target_variance": target_variance(batch.reward, batch.discount, next_value),
            "diagnostics/gradient_cosine": interference(
                online, lambda q, *one: td_loss(q, target, Batch(*one), support, args.double)[0].sum(), batch
            ),
        }

    def to_device(observation: np.ndarray) -> torch.Tensor:
        return torch.as_tensor(observation, dtype=replay.frames.dtype).to(device, non_blocking=True)

    priorities.turn_over(*replay.cut(), max_priority)  # the environments begin a new episode, after a resume too
    raw, infos = envs.reset(seed=args.seed + global_step)
    observation = to_device(raw).clone()  # (num_envs, ...), changed only in place

    @torch.inference_mode()
    def greedy_action(observation: torch.Tensor) -> torch.Tensor:  # (num_envs, ...) -> (num_envs,)
        return q_values(q_network(observation), support).argmax(1)

    def learn(mask_due: bool = False) -> tuple:
        """One update, and a change of the mask if it is due; the latest loss and mean of Q(s, a)."""
        start, probability = priorities.sample(args.batch_size)
        batch = replay.gather(start)
        td_losses, q_mean = td_loss(q_network, target_network, batch, support, args.double)
        loss = (importance_weights(probability, args.beta).to(device) * td_losses).mean()
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

        priority = (td_losses.detach().to(replay.device) + 1e-10) ** args.alpha  # never quite 0
        priorities.update(start, priority)
        max_priority.clamp_(min=priority.max())
        return loss.detach(), q_mean

    graphs = args.cuda_graph and device.type == replay.device.type == "cuda"
    fast_learn = cuda_graph(learn, graphs)
    fast_greedy = cuda_graph(partial(greedy_action, observation), graphs)

    def due(every: int) -> bool:
        """Has the latest step reached a multiple of `every`? Several environments may step over it."""
        return every > 0 and global_step // every > last_step // every

    # The loop
    log_every = max(100, args.total_timesteps // 1_000)
    lives = infos.get("lives")
    resetting = np.zeros(args.num_envs, dtype=bool)
    losses = None
    while global_step < args.total_timesteps and not run.stopping:
        progress = (global_step - args.learning_starts) / args.exploration_steps
        epsilon = 0.0 if args.noisy else linear_schedule(args.start_e, args.end_e, progress)
        action = epsilon_greedy(fast_greedy, epsilon, args.num_envs, n_actions, rng)

        # The step after an end only resets its environment: it is no agent step
        last_step, global_step = global_step, global_step + int((~resetting).sum())

        # Before the step that they are due at: a GPU works on them while the environments play
        while update < int((global_step - args.learning_starts) * args.replay_ratio):
            prune_due = args.method == "gmp" and mask_update_due(update, prune_start, prune_end, prune_interval)
            losses = learn(mask_due=True) if prune_due else fast_learn()
            update += 1

        next_raw, reward, terminated, truncated, infos = envs.step(action)
        next_observation = to_device(next_raw)
        terminal, end = terminated, terminated | truncated
        if args.terminal_on_life_loss and images:
            terminal, lives = terminated | (infos["lives"] < lives), infos["lives"]
        if args.clip_rewards:
            reward = np.clip(reward, -1, 1)
        changed = replay.add(observation, action, reward, terminal, end, next_observation)
        priorities.turn_over(*changed, max_priority)  # what was never replayed comes first
        if dataset:
            dataset.add(raw, action, reward, terminated, truncated)
        raw, resetting = next_raw, end
        observation.copy_(next_observation)
        for i in np.flatnonzero(end):
            run.episode(infos["episode"]["r"][i], infos["episode"]["l"][i], global_step)

        if due(args.target_network_frequency):
            target_network.load_state_dict(q_network.state_dict())

        run.progress(global_step)
        if losses is not None and due(log_every):
            td, q = torch.stack(losses).tolist()
            sparsity = sparsity_scalars(shapes, kept)
            charts = {"charts/SPS": run.steps_per_second(global_step), "charts/epsilon": epsilon}
            run.scalars({"losses/td_loss": td, "losses/q_values": q} | charts | sparsity, global_step)
            run.progress(global_step, loss=td, sparsity=sparsity["sparsity/global"])
        if update and due(args.diagnostics_every):
            with torch.random.fork_rng():  # the run goes on with the random numbers that it would have had
                run.scalars(look(), global_step)
        if due(args.checkpoint_every):
            checkpoint()

    # The end
    envs.close()
    if dataset:
        dataset.close()
    if run.stopping:
        checkpoint()
        run.stop(global_step)
        return np.array([])
    save_model(run.folder, SCRIPT, args, {"q_network": q_network}, {"q_network": masks})
    zeros = "" if args.method == "dense" else f" {args.sparsity:g}"
    title = f"{args.env_id}: {args.method}{zeros}, width {args.width}, seed {args.seed}"
    learning_curve(read_episodes(run.folder / "episodes.csv"), title, run.folder / "curve.png")

    q_network.eval()  # no noise

    def policy(observation: np.ndarray) -> np.ndarray:
        greedy = partial(greedy_action, to_device(observation))
        return epsilon_greedy(greedy, args.eval_epsilon, len(observation), n_actions, rng)

    if args.capture_video:
        envs = make_video_env(args.env_id, str(run.folder / "videos"), **protocol)
    else:
        envs = make_envs(args.env_id, min(args.eval_episodes, 8), **protocol)
    run.bar.close()
    print(f"playing {args.eval_episodes} episodes with the final network")
    returns, _ = evaluate(envs, policy, args.eval_episodes, args.seed + 1_000_000)
    run.finish(returns)
    return returns


def preset(args: Args) -> dict:
    """What the flags that are not given have in place of their defaults."""
    return CLASSIC_CONTROL if atari_game(args.env_id) is None else {}


if __name__ == "__main__":
    main(parse_args(Args, preset))
