# Documentation and results: docs/stream_sparse.md
"""Streaming RL with a sparse network: no replay, no target network, no batch; each transition is used once.

Stream AC(lambda) and Stream Q(lambda) with ObGD. `--method random` gives the networks a fixed random mask, and they
hold only their active weights, as values and indices: with one sample at a time a network is memory traffic, so zeros
that are not stored save time. `--num-seeds N` trains N independent agents side by side, each with its own run folder.

Elsayed, Vasan, Mahmood (2024), Streaming deep reinforcement learning finally works. arXiv:2410.14606
Ma et al. (2025), Network sparsity unlocks the scaling potential of deep reinforcement learning. arXiv:2506.17204

    python stream_sparse.py --env-id CartPole-v1 --algorithm q --total-timesteps 100000
    python stream_sparse.py --env-id Walker2d-v5 --num-seeds 4                         # dense, 128 hidden units
    python stream_sparse.py --env-id Walker2d-v5 --num-seeds 4 --method random --sparsity 0.9 --width 4
"""

import math
import warnings
from dataclasses import dataclass, replace
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from utils.envs import Policy, max_episode_steps, open_envs
from utils.flags import CpuRunFlags, NonNegativeFloat, PositiveFloat, PositiveInt, Probability, Seed, Sparsity, fail
from utils.launch import launch
from utils.masks import active_count, layer_densities, mask_table, prunable, random_mask
from utils.runs import Run

aten = torch.ops.aten  # torch's own backward kernels


@dataclass
class Args(CpuRunFlags):
    """`CpuRunFlags` adds flags that do not affect learning: logging, checkpoints, evaluation."""

    # Experiment
    env_id: str = "Walker2d-v5"
    """any Gymnasium id with vectors as observations; its actions are discrete or, for ac, bounded and continuous"""
    seed: Seed = 1
    """seed of the first agent: networks, masks, environment and exploration"""
    num_seeds: PositiveInt = 1
    """independent agents, with seeds seed, seed + 1, ..., trained side by side"""
    total_timesteps: PositiveInt = 2_000_000
    """agent steps of each agent"""

    # Algorithm (Elsayed et al. 2024)
    algorithm: Literal["ac", "q"] = "ac"
    """Stream AC(lambda), or Stream Q(lambda) for discrete actions"""
    gamma: Probability = 0.99
    """discount factor"""
    lamda: Probability = 0.8
    """decay of the eligibility traces (lambda)"""
    learning_rate: PositiveFloat = 1.0
    """alpha of ObGD: upper bound of the step size"""
    kappa_policy: PositiveFloat = 3.0
    """ac: kappa of the actor's ObGD; larger values allow smaller steps only"""
    kappa_value: PositiveFloat = 2.0
    """kappa of ObGD for the critic or the Q-network"""
    entropy_coefficient: NonNegativeFloat = 0.01
    """ac: weight of the entropy bonus"""
    init_sparsity: Sparsity = 0.9
    """sparse initialisation: fraction of each unit's inputs that starts at zero, masked ones included"""

    # Exploration of Stream Q
    start_e: Probability = 1.0
    """q: initial epsilon"""
    end_e: Probability = 0.01
    """q: final epsilon"""
    exploration_fraction: Probability = 0.05
    """q: fraction of the run over which epsilon decreases linearly"""
    eval_epsilon: Probability = 0.001
    """q: epsilon of evaluations"""

    # Sparsity
    method: Literal["dense", "random"] = "dense"
    """dense networks, or a fixed random mask (static sparsity)"""
    sparsity: Sparsity = 0.9
    """random: fraction of the weights (all but biases) that is removed"""
    distribution: Literal["erk", "uniform"] = "erk"
    """how the sparsity is distributed over the layers: Erdos-Renyi-kernel, or the same in each"""
    width: PositiveInt = 1
    """hidden layers have 128 x width units"""

    @property
    def num_envs(self) -> int:
        return self.num_seeds  # an environment for each agent


# ---- Networks --------------------------------------------------------------------------------------------------------


class MLP(nn.Module):
    """Two hidden layers with LayerNorm without parameters, and LeakyReLU; the form in which networks are saved."""

    def __init__(self, inputs: int, hidden: int, outputs: int) -> None:
        super().__init__()
        self.hidden1 = nn.Linear(inputs, hidden)
        self.hidden2 = nn.Linear(hidden, hidden)
        self.head = nn.Linear(hidden, outputs)
        for layer in self.children():
            bound = 1 / math.sqrt(layer.in_features)
            nn.init.uniform_(layer.weight, -bound, bound)
            nn.init.zeros_(layer.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, inputs) -> (B, outputs)
        for layer in (self.hidden1, self.hidden2):
            x = layer(x)
            x = F.leaky_relu(F.layer_norm(x, x.shape[-1:]))
        return self.head(x)


class ObservationStatistics(nn.Module):
    """Mean and variance of the observations, saved with the networks."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(inputs, dtype=torch.float64))
        self.register_buffer("variance", torch.ones(inputs, dtype=torch.float64))


def make_networks(args: Args, obs_space: gym.spaces.Box, action_space: gym.Space) -> dict[str, nn.Module]:
    """The networks that model.pt holds, by name. A continuous actor's outputs are means, then deviations."""
    inputs, hidden = obs_space.shape[0] + 1, 128 * args.width  # one more for the time
    discrete = isinstance(action_space, gym.spaces.Discrete)
    outputs = int(action_space.n) if discrete else 2 * action_space.shape[0]
    if args.algorithm == "q":
        networks = {"q_network": MLP(inputs, hidden, outputs)}
    else:
        networks = {"actor": MLP(inputs, hidden, outputs), "critic": MLP(inputs, hidden, 1)}
        networks["actor"].discrete = discrete
    return networks | {"statistics": ObservationStatistics(inputs - 1)}


class DenseLayer:
    """One layer of N networks side by side: its weights (N, out, in) and their eligibility traces."""

    def __init__(self, weights: list[torch.Tensor]) -> None:
        self.shape = (len(weights), *weights[0].shape)
        self.values = torch.stack([weight.flatten() for weight in weights])  # (N, out x in)
        self.traces = torch.zeros_like(self.values)
        self.matrix, self.trace_matrix = self.values.view(self.shape), self.traces.view(self.shape)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, in) -> (N, out)
        return torch.bmm(x.unsqueeze(1), self.matrix.mT).squeeze(1)  # matrix @ x takes ten times as long for N > 1

    def trace(self, decay: float, grad: torch.Tensor, x: torch.Tensor) -> None:
        """z <- decay z + grad x^T"""
        self.trace_matrix.baddbmm_(grad.unsqueeze(2), x.unsqueeze(1), beta=decay)

    def backward(self, grad: torch.Tensor) -> torch.Tensor:  # (N, out) -> (N, in)
        return torch.bmm(grad.unsqueeze(1), self.matrix).squeeze(1)

    def dense(self, agent: int) -> torch.Tensor:
        return self.matrix[agent]


class SparseLayer:
    """One layer of N networks that stores active weights only: values and traces (N, active), with rows and columns.

    The N matrices are the blocks on the diagonal of one large matrix, so that one call computes all agents.
    """

    def __init__(self, weights: list[torch.Tensor], masks: list[torch.Tensor]) -> None:
        self.shape = n, n_out, n_in = len(weights), *weights[0].shape
        self.where = [mask.nonzero(as_tuple=True) for mask in masks]  # rows and columns, sorted by rows
        self.values = torch.stack([weight[index] for weight, index in zip(weights, self.where)])
        self.traces = torch.zeros_like(self.values)
        row = torch.cat([agent * n_out + row for agent, (row, _) in enumerate(self.where)])
        self.column = torch.cat([agent * n_in + column for agent, (_, column) in enumerate(self.where)])
        self.row_lengths = torch.bincount(row, minlength=n * n_out).numpy()
        row_starts = F.pad(torch.from_numpy(self.row_lengths.cumsum()), (1, 0))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse ")  # CSR is in beta state, and is not checked at each product
            indices, size = (row_starts.int(), self.column.int()), (n * n_out, n * n_in)
            self.matrix = torch.sparse_csr_tensor(*indices, self.values.view(-1), size)  # shares memory with `values`

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, in) -> (N, out)
        return torch.mv(self.matrix, x.view(-1)).view(self.shape[:2])

    def trace(self, decay: float, grad: torch.Tensor, x: torch.Tensor) -> None:
        """z <- decay z + grad x^T, only where weights are active"""
        self.row_grad = torch.from_numpy(grad.numpy().repeat(self.row_lengths))  # torch's repeat_interleave is slower
        self.traces.view(-1).mul_(decay).addcmul_(self.row_grad, x.view(-1).index_select(0, self.column))

    def backward(self, grad: torch.Tensor) -> torch.Tensor:  # (N, out) -> (N, in), after `trace` with the same grad
        terms = self.values.view(-1) * self.row_grad
        return torch.zeros(self.matrix.shape[1]).scatter_add_(0, self.column, terms).view(self.shape[::2])

    def dense(self, agent: int) -> torch.Tensor:
        weight = torch.zeros(self.shape[1:])
        weight[self.where[agent]] = self.values[agent]
        return weight


class Networks:
    """N networks like `MLP` side by side, with their traces; the gradient is written out, layer by layer."""

    def __init__(self, networks: list[MLP], masks: list[dict[str, torch.Tensor]]) -> None:
        self.layers = []
        for name in prunable(networks[0]):
            weights = [network.get_parameter(name) for network in networks]
            layer_masks = [mask.get(name) for mask in masks]
            is_dense = layer_masks[0] is None or bool(layer_masks[0].all())  # ERK leaves small layers dense
            self.layers.append(DenseLayer(weights) if is_dense else SparseLayer(weights, layer_masks))
        self.biases = torch.stack([torch.cat([layer.bias for layer in network.children()]) for network in networks])
        self.bias_traces = torch.zeros_like(self.biases)  # (N, hidden + hidden + outputs)
        self.bias = self.biases.split([layer.shape[1] for layer in self.layers], 1)  # views
        self.blocks = [(layer.values, layer.traces) for layer in self.layers] + [(self.biases, self.bias_traces)]

    def forward(self, x: torch.Tensor, keep: bool = False) -> torch.Tensor:  # (N, inputs) -> (N, outputs)
        kept = []
        for layer, bias in zip(self.layers[:-1], self.bias):
            before = layer.forward(x).add_(bias)
            normal, mean, scale = torch.native_layer_norm(before, layer.shape[1:2], None, None, 1e-5)
            kept.append((x, before, normal, mean, scale))  # mean and 1 / standard deviation of `before`, (N, 1)
            x = F.leaky_relu(normal, 0.01)
        if keep:
            self.kept, self.features = kept, x
        return self.layers[-1].forward(x).add_(self.bias[-1])

    def trace(self, decay: float, grad: torch.Tensor) -> None:
        """z <- decay z + the gradient of f at the last kept forward pass; `grad` (N, outputs) is df / d output."""
        bias_grads = [grad]
        self.layers[-1].trace(decay, grad, self.features)
        for i in (1, 0):
            x, before, normal, mean, scale = self.kept[i]
            grad = aten.leaky_relu_backward(self.layers[i + 1].backward(grad), normal, 0.01, False)
            # LayerNorm y = (x - mean x) / sd x, so dx = (dy - mean dy - y mean(y dy)) / sd x
            norm_inputs = (grad, before, grad.shape[1:], mean, scale, None, None)
            grad = aten.native_layer_norm_backward(*norm_inputs, [True, False, False])[0]
            self.layers[i].trace(decay, grad, x)
            bias_grads.append(grad)
        self.bias_traces.mul_(decay).add_(torch.cat(bias_grads[::-1], 1))

    def obgd(self, delta: np.ndarray, alpha: float, kappa: float) -> np.ndarray:
        """Overshooting-bounded gradient descent (Elsayed et al. 2024, alg. 3): w <- w + min(alpha, 1 / M) delta z.

        M = kappa max(|delta|, 1) ||z||_1, with one norm for all parameters of a network. Returns the step sizes (N,).
        """
        norm = sum(traces.abs().sum(1).numpy() for _, traces in self.blocks)
        step = alpha / np.maximum(alpha * kappa * np.maximum(np.abs(delta), 1) * norm, 1)
        change = as_tensor(step * delta)[:, None]
        for values, traces in self.blocks:
            values.addcmul_(traces, change)
        return step

    def reset_traces(self, agents: np.ndarray) -> None:  # (N,) bool
        if agents.any():
            agents = torch.from_numpy(agents)
            for _, traces in self.blocks:
                traces[agents] = 0

    def state(self, agent: int) -> dict[str, torch.Tensor]:
        """Parameters of one agent, sharing memory. Traces end with the episode, and a resumed run begins a new one."""
        return {str(i): values[agent] for i, (values, _) in enumerate(self.blocks)}

    def export(self, network: MLP, agent: int) -> None:
        """Copies the parameters of one agent to a network of its own."""
        for layer, bias, module in zip(self.layers, self.bias, network.children()):
            module.weight.copy_(layer.dense(agent))
            module.bias.copy_(bias[agent])


# ---- Sparsity --------------------------------------------------------------------------------------------------------


def random_masks(weights: dict, densities: dict[str, float], generator: torch.Generator) -> dict[str, torch.Tensor]:
    """Fixed random masks of zeros and ones, for each layer an exact number of ones; a dense network has none."""
    if min(densities.values()) == 1:
        return {}
    counts = {name: active_count(weight.numel(), densities[name]) for name, weight in weights.items()}
    return {name: random_mask(weight.detach(), counts[name], generator) for name, weight in weights.items()}


def sparse_init(weights: dict, masks: dict, sparsity: float, generator: torch.Generator) -> None:
    """Sparse initialisation (Elsayed et al. 2024): ceil(sparsity x inputs) random inputs of each unit start at zero.

    Masked inputs count among them. The other zeros are weights like all others, and are trained.
    """
    for name, weight in weights.items():
        order = torch.rand(weight.shape, generator=generator)
        if masks:
            order.masked_fill_(masks[name] == 0, -1)
        zeros = order.argsort(1)[:, : math.ceil(sparsity * weight.shape[1])]
        weight.scatter_(1, zeros, 0.0)
        if masks:
            weight.mul_(masks[name])


# ---- Normalisation and policy ----------------------------------------------------------------------------------------


class Welford:
    """Running mean and sample variance of N streams (Welford 1962): `mean`, `squares` (N, size) and `count` (N, 1)."""

    def __init__(self, n: int, size: int) -> None:
        self.mean, self.squares, self.count = np.zeros((n, size)), np.zeros((n, size)), np.zeros((n, 1))

    def add(self, x: np.ndarray, which: np.ndarray) -> None:  # (N, size); (N,) bool, the streams that get one
        which = which[:, None]
        self.count += which
        difference = (x - self.mean) * which
        self.mean += difference / np.maximum(self.count, 1)
        self.squares += difference * (x - self.mean)

    def variance(self) -> np.ndarray:  # 1 of a single value, whose squares are 0
        return self.squares / np.maximum(self.count - 1, 1) + (self.count < 2)

    def state(self, agent: int) -> dict[str, torch.Tensor]:
        return {name: torch.from_numpy(getattr(self, name))[agent] for name in ("mean", "squares", "count")}


def time_limit(env_id: str) -> float:
    """Steps after which an episode is truncated; without a limit infinity, and the time feature never changes."""
    return max_episode_steps(env_id) or math.inf


def as_tensor(x: np.ndarray) -> torch.Tensor:
    """In torch's default type, float32 unless a notebook or a test sets another."""
    return torch.as_tensor(x, dtype=torch.get_default_dtype())


def features(
    obs: np.ndarray, mean: np.ndarray, variance: np.ndarray, elapsed: np.ndarray, limit: float
) -> torch.Tensor:
    """The networks' input (n, obs + 1): the normalised observation, and the time, from -0.5 to 0.5 in an episode."""
    normal = (obs - mean) / np.sqrt(variance + 1e-8)
    return as_tensor(np.concatenate([normal, elapsed[:, None] / limit - 0.5], 1))


def policy_gradient(output: np.ndarray, action: np.ndarray, entropy_weight: np.ndarray) -> np.ndarray:
    """d (log pi(a | s) + weight x entropy) / d output, (N, outputs).

    Args:
        output: (N, 2A): means and deviations before the softplus; or (N, A) preferences, for actions (N,) int64.
        entropy_weight: (N,): entropy coefficient x sign(delta), since ObGD multiplies all by delta.
    """
    weight = entropy_weight[:, None]
    if action.ndim == 1:  # softmax
        log_p = log_softmax(output)
        p = np.exp(log_p)
        entropy = -(p * log_p).sum(1, keepdims=True)
        return np.eye(output.shape[1])[action] - p - weight * p * (log_p + entropy)
    mean, pre_deviation = halves(output)
    deviation = softplus(pre_deviation)
    z = (action - mean) / deviation
    grad_deviation = (z * z - 1 + weight) / deviation  # the entropy is that of log(deviation) + a constant
    sigmoid = 1 - np.exp(-deviation)  # the derivative of softplus
    return np.concatenate([z / deviation, grad_deviation * sigmoid], 1)


def entropies(output: np.ndarray, discrete: bool) -> np.ndarray:  # (N, outputs) -> (N,)
    if discrete:
        log_p = log_softmax(output)
        return -(np.exp(log_p) * log_p).sum(1)
    return (np.log(softplus(halves(output)[1])) + 0.5 * math.log(2 * math.pi * math.e)).sum(1)


def log_softmax(x: np.ndarray) -> np.ndarray:  # (N, A)
    x = x - x.max(1, keepdims=True)
    return x - np.log(np.exp(x).sum(1, keepdims=True))


def halves(output: np.ndarray) -> tuple[np.ndarray, np.ndarray]:  # (N, 2A) -> means and pre-deviations, both (N, A)
    size = output.shape[1] // 2
    return output[:, :size], output[:, size:]


def softplus(x: np.ndarray) -> np.ndarray:
    return np.logaddexp(x, 0)


def sample(output: np.ndarray, discrete: bool, rngs: list[np.random.Generator]) -> np.ndarray:
    """Actions (N,) int64 of a softmax, or (N, A) of a Gaussian; each agent draws from its own generator."""
    if discrete:
        cumulative = np.exp(log_softmax(output.astype(np.float64))).cumsum(1)
        u = np.array([[rng.random()] for rng in rngs])
        return (cumulative < u * cumulative[:, -1:]).sum(1)
    mean, pre_deviation = halves(output)
    noise = np.array([rng.standard_normal(mean.shape[1], dtype=np.float32) for rng in rngs])
    return mean + softplus(pre_deviation) * noise


def epsilon_greedy(q: np.ndarray, epsilons: np.ndarray, rngs: list[np.random.Generator]) -> np.ndarray:
    """Actions (N,) int64: argmax of q (N, A), or with probability epsilon (N,) a random one."""
    explore = [rng.random() < epsilon for rng, epsilon in zip(rngs, epsilons)]
    return np.array([r.integers(q.shape[1]) if e else a for a, e, r in zip(q.argmax(1), explore, rngs)])


class Greedy(nn.Module):
    """A network behind `features`: Q-values (n, A), preferences (n, A), or mean actions (n, A) in [-1, 1]."""

    def __init__(self, network: nn.Module, statistics: nn.Module, limit: float, continuous: bool) -> None:
        super().__init__()
        self.network, self.statistics, self.limit, self.continuous = network, statistics, limit, continuous

    def forward(self, obs: torch.Tensor, elapsed: torch.Tensor) -> torch.Tensor:
        time = (elapsed.double() - 1).clamp(min=0)[:, None] / self.limit - 0.5  # as in training: see `main`
        normal = (obs - self.statistics.mean) / (self.statistics.variance + 1e-8).sqrt()
        output = self.network(torch.cat([normal, time], 1).to(torch.get_default_dtype()))
        return output.chunk(2, 1)[0].clamp(-1, 1) if self.continuous else output


def make_greedy(args: Args, networks: dict[str, nn.Module]) -> nn.Module:
    """What `utils.export` writes: observations (n, obs) and steps since the episode's start (n,), see `Greedy`."""
    network = networks["q_network" if args.algorithm == "q" else "actor"]
    continuous = args.algorithm == "ac" and not network.discrete
    return Greedy(network, networks["statistics"], time_limit(args.env_id), continuous)


def make_policy(args: Args, networks: dict[str, nn.Module]) -> Policy:
    """The policy of evaluations and videos: the actor's mode, or epsilon-greedy with `eval_epsilon`.

    It counts an episode's steps for the time feature; a new generator in `rngs` means a new episode in that row.
    """
    network, elapsed, seen = make_greedy(args, networks), np.zeros(0), []

    @torch.inference_mode()
    def policy(obs: np.ndarray, rngs: list[np.random.Generator]) -> np.ndarray:  # (n, obs) -> (n,) or (n, A)
        nonlocal elapsed, seen
        same = [i < len(seen) and rng is seen[i] for i, rng in enumerate(rngs)]
        elapsed = np.array([elapsed[i] + 1 if s else 0 for i, s in enumerate(same)])
        seen = list(rngs)
        output = network(torch.from_numpy(obs), torch.from_numpy(elapsed)).numpy()
        if args.algorithm == "q":
            return epsilon_greedy(output, np.full(len(obs), args.eval_epsilon), rngs)
        return output if network.continuous else output.argmax(1)

    return policy


@torch.inference_mode()
def main(args: Args) -> np.ndarray:
    """Trains the agents; returns the returns (num_seeds, episodes) of their final evaluations."""
    if args.track and args.num_seeds > 1:
        fail(f"--track: expected one agent, since Weights & Biases logs one run for each process, got {args.num_seeds}")
    torch.set_num_threads(1)  # each operation takes microseconds: threads would cost more than they save
    n = args.num_seeds
    envs = open_envs(args, gym.spaces.Discrete if args.algorithm == "q" else (gym.spaces.Discrete, gym.spaces.Box))
    obs_space, action_space = envs.single_observation_space, envs.single_action_space
    if len(obs_space.shape) != 1:
        fail(f"--env-id: expected vectors as observations, got {obs_space} from {args.env_id}")
    discrete, limit = isinstance(action_space, gym.spaces.Discrete), time_limit(args.env_id)

    # ---- Agents and sparsity -----------------------------------------------------------------------------------------
    names = ["q_network"] if args.algorithm == "q" else ["actor", "critic"]
    sparsity = 0.0 if args.method == "dense" else args.sparsity
    modules, masks, densities = [], [], {}  # of each agent by name: as they are saved; while training see `nets`
    for seed in range(args.seed, args.seed + n):
        torch.manual_seed(seed)
        generator = torch.Generator().manual_seed(seed)
        modules.append(make_networks(args, obs_space, action_space))
        masks.append({})
        for name in names:
            weights = prunable(modules[-1][name])
            densities[name] = layer_densities(weights, sparsity, args.distribution)
            masks[-1][name] = random_masks(weights, densities[name], generator)
            sparse_init(weights, masks[-1][name], args.init_sparsity, generator)
    nets = {name: Networks([each[name] for each in modules], [each[name] for each in masks]) for name in names}
    for name in names:
        print(f"{name}:\n{mask_table(prunable(modules[0][name]), densities[name])}")
    value_net, actor = nets[names[-1]], nets.get("actor")

    # Agent i alone, with seed + i, does the same: nothing is shared but the calls
    rngs = [np.random.default_rng(args.seed + i) for i in range(n)]
    obs_statistics, return_statistics = Welford(n, obs_space.shape[0]), Welford(n, 1)
    discounted_return = np.zeros(n)  # of the rewards, for their scale
    runs = []
    for i in range(n):
        state = {name: net.state(i) for name, net in nets.items()} | {
            "obs_statistics": obs_statistics.state(i),
            "return_statistics": return_statistics.state(i),
            "discounted_return": torch.from_numpy(discounted_return)[i],
        }
        own_args = replace(args, seed=args.seed + i, num_seeds=1)  # resumed and evaluated on its own
        runs.append(Run(own_args, __file__, state, rngs[i], progress=i == 0))
    all_weights = [{f"{net}.{k}": w for net in names for k, w in prunable(each[net]).items()} for each in modules]
    all_masks = [{f"{net}.{k}": m for net in names for k, m in each[net].items()} for each in masks]
    steps = np.array([run.step for run in runs])  # of each agent: they differ, as a reset takes a turn

    def observe(obs: np.ndarray, playing: np.ndarray) -> torch.Tensor:
        """The observations (N, obs) normalised, after they have joined the statistics."""
        obs_statistics.add(obs, playing)
        return features(obs, obs_statistics.mean, obs_statistics.variance(), elapsed, limit)

    def policy_of(i: int) -> Policy:
        for name, net in nets.items():
            net.export(modules[i][name], i)
        modules[i]["statistics"].mean.copy_(torch.from_numpy(obs_statistics.mean[i]))
        modules[i]["statistics"].variance.copy_(torch.from_numpy(obs_statistics.variance()[i]))
        return make_policy(args, modules[i])

    # ---- Loop --------------------------------------------------------------------------------------------------------
    elapsed, done = np.zeros(n), np.zeros(n, dtype=bool)
    decay = args.gamma * args.lamda
    playing = steps < args.total_timesteps
    x = observe(envs.reset(seed=args.seed + int(steps[0]))[0], playing)  # (N, obs + 1)
    while playing.any() and not runs[0].stopping:
        # Action
        values = value_net.forward(x, keep=True).numpy()  # (N, 1) state values, or (N, A) action values
        if args.algorithm == "q":
            progress = np.minimum((steps + 1) / max(args.exploration_fraction * args.total_timesteps, 1), 1.0)
            epsilon = args.start_e + (args.end_e - args.start_e) * progress
            action = epsilon_greedy(values, epsilon, rngs)
            value = values[np.arange(n), action]
        else:
            policy = actor.forward(x, keep=True).numpy()  # (N, outputs)
            action = sample(policy, discrete, rngs)
            value = values[:, 0]

        # Transition. NEXT_STEP autoreset: the step after an episode's end only resets, and is not an agent step
        acting = playing & ~done
        clipped = action if discrete else np.minimum(np.maximum(action, -1), 1)
        next_obs, reward, terminated, truncated, infos = envs.step(clipped)
        done = (terminated | truncated) & playing
        ended = done | ~acting
        steps += acting
        next_x = observe(next_obs, playing)
        elapsed = np.where(ended, 0, elapsed + 1)  # after `observe`: the first step shows time 0 again, as published

        # Reward, scaled by the deviation of the discounted return
        discount = args.gamma * (1 - done)
        discounted_return[:] = np.where(acting, discount * discounted_return + reward, discounted_return)
        return_statistics.add(discounted_return[:, None], acting)
        scaled = reward / np.sqrt(return_statistics.variance()[:, 0] + 1e-8)

        # TD error. Both kinds of end stop the bootstrap, as published; a turn without transition teaches nothing
        next_value = value_net.forward(next_x).numpy().max(1)  # of one state value, or of the action values
        delta = (scaled + discount * next_value - value) * acting  # (N,)

        # Traces and updates
        if args.algorithm == "q":
            value_net.trace(decay, as_tensor(np.eye(values.shape[1])[action]))
            ended = ended | (action != values.argmax(1))  # Watkins: traces end where the greedy policy was left
        else:
            actor.trace(decay, as_tensor(policy_gradient(policy, action, args.entropy_coefficient * np.sign(delta))))
            policy_step = actor.obgd(delta, args.learning_rate, args.kappa_policy)
            actor.reset_traces(ended)
            value_net.trace(decay, torch.ones(n, 1))
        value_step = value_net.obgd(delta, args.learning_rate, args.kappa_value)
        value_net.reset_traces(ended)
        x = next_x

        # Logs of each agent's own run
        for i in np.flatnonzero(acting):
            run = runs[i]
            run.advance(int(steps[i]), int(steps[i]))
            if done[i]:
                run.log_episode(float(infos["episode"]["r"][i]), int(infos["episode"]["l"][i]))
            if run.due(run.log_every):
                scalars = {"losses/td_error": delta[i], "losses/values": value[i], "losses/value_step": value_step[i]}
                if args.algorithm == "q":
                    scalars["charts/epsilon"] = epsilon[i]
                else:
                    entropy = entropies(policy, discrete)
                    scalars |= {"losses/policy_step": policy_step[i], "losses/entropy": entropy[i]}
                run.log({tag: float(scalar) for tag, scalar in scalars.items()}, all_weights[i], all_masks[i])
            if run.due(args.eval_every):
                run.evaluate(policy_of(i))
            if run.due(args.checkpoint_every):
                run.try_checkpoint()
        playing = steps < args.total_timesteps

    envs.close()
    if runs[0].stopping:
        for run in runs:
            run.stop()
    if n > 1:
        for run in runs:
            run.try_checkpoint()  # a signal while the first ones play their evaluation must not cost the others
    return np.stack([run.finish(policy_of(i), modules[i], masks[i], densities) for i, run in enumerate(runs)])


def preset(args: Args) -> dict:
    """Values that replace defaults for these flags: none."""
    return {}


if __name__ == "__main__":
    launch(main, Args, preset)
