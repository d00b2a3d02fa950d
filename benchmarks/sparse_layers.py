"""What zeros in the weights save on a CPU: single layers in inference and training, and a whole update of SAC.

    python benchmarks/sparse_layers.py inference
    python benchmarks/sparse_layers.py training
    python benchmarks/sparse_layers.py sac --widths 4 5 --sparsities 0.95 0.99

Dense means a dense tensor with zeros, as the masks leave them. CSR stores the other weights alone: for inference the
layer of utils.export; for training `TrainedSparseLinear` below, an experiment that no script uses. Tables give
milliseconds of CPU time (the fastest of calls in turns), and the dense time over the CSR time. With OMP_NUM_THREADS=1
CPU time is the time of a machine that does nothing else.
"""

import argparse
import copy
import sys
import time
import warnings
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import sac_sparse  # noqa: E402
from utils.analysis.compact import SparseLinear, seconds  # noqa: E402
from utils.masks import apply_masks, layer_densities, prunable  # noqa: E402
from utils.replay import Batch  # noqa: E402

OBSERVATIONS, ACTIONS = 67, 21  # of Humanoid Run


def sparse_linear(inputs: int, outputs: int, sparsity: float) -> nn.Linear:
    layer = nn.Linear(inputs, outputs)
    with torch.no_grad():
        layer.weight[torch.rand(outputs, inputs) < sparsity] = 0
    return layer


def csr(rows: torch.Tensor, columns: torch.Tensor, values: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """A CSR matrix of entries that are sorted by row."""
    start = F.pad(torch.bincount(rows, minlength=size[0]).cumsum(0), (1, 0))
    return torch.sparse_csr_tensor(start.int(), columns.int(), values, size, check_invariants=False)


class SparseProduct(torch.autograd.Function):
    """x W^T for a CSR matrix W, with gradients to x and to the values of W alone."""

    @staticmethod
    def forward(ctx, x, values, layer):
        ctx.save_for_backward(x)
        ctx.layer = layer
        return (layer.matrix(values) @ x.t()).t()

    @staticmethod
    def backward(ctx, grad):
        (x,), layer = ctx.saved_tensors, ctx.layer
        grad_x = grad_values = None
        if ctx.needs_input_grad[0]:
            grad_x = (layer.transposed_matrix() @ grad.t()).t()
        if ctx.needs_input_grad[1]:
            grad_values = torch.sparse.sampled_addmm(layer.zeros, grad.t(), x).values()
        return grad_x, grad_values, None


class TrainedSparseLinear(nn.Module):
    """A linear layer that has active weights only: as `values`, on a fixed pattern."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.size = tuple(linear.weight.shape)
        rows, columns = self.rows, self.columns = linear.weight.detach().nonzero().T
        self.by_column = (columns * self.size[0] + rows).argsort()
        self.values = nn.Parameter(linear.weight.detach()[rows, columns])
        self.bias = nn.Parameter(linear.bias.detach().clone())
        self.pattern = csr(rows, columns, self.values.detach(), self.size)
        other = csr(columns[self.by_column], rows[self.by_column], self.values.detach(), self.size[::-1])
        self.start, self.index = other.crow_indices(), other.col_indices()
        self.zeros = csr(rows, columns, torch.zeros_like(self.values), self.size)

    def matrix(self, values: torch.Tensor) -> torch.Tensor:
        start, index = self.pattern.crow_indices(), self.pattern.col_indices()
        return torch.sparse_csr_tensor(start, index, values, self.size, check_invariants=False)

    def transposed_matrix(self) -> torch.Tensor:
        values = self.values.detach()[self.by_column]
        return torch.sparse_csr_tensor(self.start, self.index, values, self.size[::-1], check_invariants=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return SparseProduct.apply(x, self.values, self) + self.bias

    def __deepcopy__(self, memo: dict) -> "TrainedSparseLinear":
        weight = torch.zeros(self.size)
        weight[self.rows, self.columns] = self.values.detach()
        linear = nn.Linear(*self.size[::-1])
        linear.weight.data, linear.bias.data = weight, self.bias.detach()
        return TrainedSparseLinear(linear)


def measure(functions: list, at_least: float, turns: int = 5) -> list[float]:
    return seconds(functions, at_least, turns, time.process_time)


def row(name: str, dense: float, sparse: float) -> None:
    print(f"| {name} | {dense * 1e3:.3g} | {sparse * 1e3:.3g} | {dense / sparse:.2g} |", flush=True)


@torch.inference_mode()
def inference(args: argparse.Namespace) -> None:
    print("| linear layer, sparsity, batch | dense | CSR | dense / CSR |\n|---|--:|--:|--:|")
    for size in args.sizes:
        for sparsity in args.sparsities:
            layer = sparse_linear(size, size, sparsity)
            sparse = SparseLinear(layer)
            for batch in args.batches:
                x = torch.randn(batch, size)
                times = measure([lambda: layer(x), lambda: sparse(x)], args.seconds)  # noqa: B023  called at once
                row(f"{size} x {size}, {sparsity:g}, {batch}", *times)
    print("\n| convolution 3 x 3 at 11 x 11 places, sparsity, batch | dense | unfold and CSR | dense / CSR |")
    print("|---|--:|--:|--:|")
    for channels in (64, 256):
        for sparsity in args.sparsities:
            conv = nn.Conv2d(channels, channels, 3, padding=1)
            flat = sparse_linear(9 * channels, channels, sparsity)
            conv.weight.copy_(flat.weight.view_as(conv.weight))
            sparse = SparseLinear(flat)
            for batch in args.batches[:2]:
                x = torch.randn(batch, channels, 11, 11)

                def unfolded() -> torch.Tensor:
                    patches = F.unfold(x, 3, padding=1).transpose(0, 1).flatten(1)  # noqa: B023
                    return torch.mm(sparse.weight, patches)  # noqa: B023

                times = measure([lambda: conv(x), unfolded], args.seconds)  # noqa: B023
                row(f"{channels} channels, {sparsity:g}, {batch}", *times)


def training(args: argparse.Namespace) -> None:
    print(
        "| forward, backward, mask of a linear layer, sparsity, batch | dense | CSR | dense / CSR |\n|---|--:|--:|--:|"
    )
    for size in args.sizes:
        for sparsity in args.sparsities:
            layer = sparse_linear(size, size, sparsity)
            sparse, mask = TrainedSparseLinear(layer), (layer.weight != 0).float()
            for batch in [batch for batch in args.batches if batch > 1]:
                x = torch.randn(batch, size, requires_grad=True)

                def step(network: nn.Module, masked: bool) -> None:
                    network.zero_grad()
                    network(x).sum().backward()  # noqa: B023
                    if masked:
                        with torch.no_grad():
                            layer.weight.mul_(mask)  # noqa: B023

                times = measure([lambda: step(layer, True), lambda: step(sparse, False)], args.seconds)  # noqa: B023
                row(f"{size} x {size}, {sparsity:g}, {batch}", *times)


class Update:
    """An update of `sac_sparse.py` with a fixed random mask, its networks dense or CSR, on a batch of noise."""

    def __init__(self, networks: dict[str, nn.Module], masks: dict[str, dict]) -> None:
        self.actor, self.critic, self.masks = networks["actor"], networks["critic"], masks
        self.target = copy.deepcopy(self.critic)
        self.weights = {net: prunable(networks[net]) for net in masks}
        self.optimizers = [torch.optim.AdamW(net.parameters(), 1e-4, fused=True) for net in (self.actor, self.critic)]
        n, noise = 256, torch.randn
        obs, action = noise(n, OBSERVATIONS), noise(n, ACTIONS).tanh()
        self.batch = Batch(obs, action, noise(n), torch.full((n,), 0.99), noise(n, OBSERVATIONS))

    def __call__(self) -> None:
        alpha = torch.tensor(0.01)
        loss, _ = sac_sparse.actor_loss(self.actor, self.critic, self.batch.observation, alpha)
        self.optimizers[0].zero_grad()
        loss.backward(inputs=list(self.actor.parameters()))
        self.optimizers[0].step()
        losses, _ = sac_sparse.critic_loss(self.actor, self.critic, self.target, self.batch, alpha)
        self.optimizers[1].zero_grad()
        losses.sum().backward()
        self.optimizers[1].step()
        for net, masks in self.masks.items():
            apply_masks(self.weights[net], masks)
        with torch.no_grad():
            for target, online in zip(self.target.parameters(), self.critic.parameters()):
                target.lerp_(online, 0.005)


def sac(args: argparse.Namespace) -> None:
    from gymnasium.spaces import Box

    print("| SimBa, width, sparsity | dense | CSR | dense / CSR |\n|---|--:|--:|--:|")
    spaces = Box(-1, 1, (OBSERVATIONS,)), Box(-1, 1, (ACTIONS,))
    for width in args.widths:
        for sparsity in args.sparsities:
            flags = sac_sparse.Args(width=width, num_critics=args.critics, gamma=0.99)
            networks = {name: net for name, net in sac_sparse.make_networks(flags, *spaces).items() if name != "rsnorm"}
            masks = {}
            for name, network in networks.items():
                weights = prunable(network)
                densities = layer_densities(weights, sparsity, "erk")
                masks[name] = sac_sparse.initial_masks(weights, densities, "random", 1)
                apply_masks(weights, masks[name])
            sparse = copy.deepcopy(networks)
            for network in sparse.values():
                for path, layer in list(network.named_modules()):
                    if isinstance(layer, nn.Linear) and (layer.weight == 0).float().mean() > 0.8:
                        network.set_submodule(path, TrainedSparseLinear(layer))
            row(f"{width}, {sparsity:g}", *measure([Update(networks, masks), Update(sparse, {})], 0, turns=3))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("inference", "training", "sac"))
    parser.add_argument("--sizes", type=int, nargs="+", default=[512, 1024, 2048])
    parser.add_argument("--sparsities", type=float, nargs="+", default=[0.8, 0.9, 0.95, 0.99])
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 32, 256])
    parser.add_argument("--widths", type=int, nargs="+", default=[4, 5], help="of SimBa")
    parser.add_argument("--critics", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=0.2, help="spent on each figure, at least")
    args = parser.parse_args()
    torch.manual_seed(0)
    warnings.filterwarnings("ignore", "Sparse ")  # CSR is in beta state
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}\n")
    {"inference": inference, "training": training, "sac": sac}[args.part](args)


if __name__ == "__main__":
    main()
