"""What happens inside a network: dormant units, rank and norm of features, interference, use of the weights.

Plain functions of tensors and modules, for a notebook or a script. None changes what it measures.
"""

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import nn
from torch.func import functional_call, grad, vmap
from torch.overrides import TorchFunctionMode

from utils.checkpoints import load_state
from utils.replay import Batch

TAUS = (0.0, 0.025, 0.1)  # the thresholds of Sokar et al. (2023)


class _Relus(TorchFunctionMode):
    """Keeps the output of each ReLU by the name of the layer that ran last.

    `direct`: the layers whose output goes into a ReLU unchanged, with no sum or pooling between. Only there does a unit
    without an incoming weight show nothing but its bias.
    """

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.output = "input", None
        self.encoded: list[torch.Tensor] = []
        self.found: dict[str, torch.Tensor] = {}
        self.direct: set[str] = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        is_direct = bool(args) and args[0] is self.output
        output = function(*args, **(kwargs or {}))
        if function in (F.relu, F.relu_, torch.relu, torch.relu_, torch.Tensor.relu, torch.Tensor.relu_):
            self.found[self.layer] = output.clone()  # what follows may change it in place
            self.direct |= {self.layer} if is_direct else set()
        return output


@torch.no_grad()
def _record(network: nn.Module, *inputs: torch.Tensor) -> _Relus:
    relus, hooks = _Relus(), []

    def remember(name: str, module: nn.Module, output: torch.Tensor) -> None:
        relus.layer, relus.output = name, output

    for name, module in network.named_modules():
        if any(parameter.ndim >= 2 for parameter in module.parameters(recurse=False)):
            hooks.append(module.register_forward_hook(lambda m, __, output, name=name: remember(name, m, output)))
        if name.rpartition(".")[2] == "encoder":
            hooks.append(module.register_forward_hook(lambda _, __, output: relus.encoded.append(output)))
    try:
        with relus:
            network(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return relus


def relu_activations(network: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    """The output of every ReLU in `network(*inputs)`, by the name of the layer before it.

    A layer is a module with a parameter of two or more dimensions. In a ResNet the ReLU before a block is under the
    name of the layer that last added to its input. A ReLU on the network's input is called "input".

    Returns:
        Tensors (B, units) or (B, channels, height, width), in the order of the forward pass.
    """
    return _record(network, *inputs).found


def unit_scores(activation: torch.Tensor) -> torch.Tensor:
    """Mean |activation| of each unit over its layer's mean (Sokar et al. 2023, eq. 1): scores that average 1.

    Args:
        activation: after the ReLU, (B, units), or (B, channels, height, width), where a unit is a channel.

    Returns:
        (units,). As in Dopamine, 1e-9 is added to the layer's mean.
    """
    means = activation.abs().flatten(2).mean((0, 2)) if activation.ndim > 2 else activation.abs().mean(0)
    return means / (means.mean() + 1e-9)


def has_inputs(mask: torch.Tensor) -> torch.Tensor:
    """Which units (units,) of a layer have an incoming weight.

    Args:
        mask: of an nn.Linear or nn.Conv2d.
    """
    return mask.flatten(1).any(1)


def dormant_ratios(activation: torch.Tensor, connected: torch.Tensor | None = None) -> dict[str, float]:
    """Fraction of units whose score is at most tau, for tau 0, 0.025 and 0.1, as "dormant_<tau>"; and "unconnected".

    Args:
        activation: as in `unit_scores`.
        connected: (units,) from `has_inputs`. The other units only ever show their bias: they count in neither the
            layer's mean nor the ratios, and their fraction of all units is "unconnected".
    """
    units = activation.shape[1]
    connected = torch.ones(units, dtype=torch.bool) if connected is None else connected.to(activation.device)
    scores = unit_scores(activation[:, connected]) if connected.any() else torch.zeros(0)
    ratios = {f"dormant_{tau:g}": (scores <= tau).float().mean().item() for tau in TAUS} if len(scores) else {}
    return ratios | {"unconnected": 1 - connected.float().mean().item()}


def srank(features: torch.Tensor, delta: float = 0.01) -> int:
    """Effective rank (Kumar et al. 2021): the least k whose k largest singular values make up 1 - delta of their sum.

    Args:
        features: (B, units). The rank is at most the smaller of the two: choose B larger than the ranks to compare.
    """
    values = torch.linalg.svdvals(features.double())
    share = values.cumsum(0) / values.sum()
    return 0 if values.sum() == 0 else int((share < 1 - delta - 1e-12).sum()) + 1


def stable_rank(features: torch.Tensor) -> float:
    """Squared Frobenius norm over the squared largest singular value of `features` (B, units); 0 of a zero matrix."""
    values = torch.linalg.svdvals(features.double())
    return (values.square().sum() / values[0].square()).item() if values[0] > 0 else 0.0


def feature_norm(features: torch.Tensor) -> float:
    """Mean L2 norm of the rows of `features` (B, units)."""
    return features.norm(dim=1).mean().item()


def weight_norm(network: nn.Module) -> float:
    """L2 norm of all parameters together; biases and normalisations included."""
    return torch.stack([parameter.detach().norm() for parameter in network.parameters()]).norm().item()


def gradient_cosines(
    network: nn.Module, loss: Callable, batch: Sequence[torch.Tensor], chunk: int = 16
) -> torch.Tensor:
    """Cosines of the angles between the gradients of single samples (Lyle et al. 2023): far from 0 off the diagonal is
    interference.

    Memory is bounded by 2 x `chunk` gradients of the whole network; they are recomputed for each pair of chunks.

    Args:
        loss: `loss(forward, *sample)` to a scalar, where `forward` is called like the network, and `sample` is one row
            of each part of `batch`.
        batch: tensors (B, ...).
        chunk: samples whose gradients are held at once.

    Returns:
        (B, B), symmetric, 1 on the diagonal; 0 where a gradient is 0. Each sample has random numbers of its own where
        the loss draws any; put noisy layers into evaluation mode.
    """
    parameters = {name: parameter.detach() for name, parameter in network.named_parameters()}
    buffers = dict(network.named_buffers())

    def sample_loss(parameters, *sample):
        forward = lambda *inputs: functional_call(network, (parameters, buffers), inputs)  # noqa: E731
        return loss(forward, *(part[None] for part in sample))

    def gradients(first: int) -> list[torch.Tensor]:  # (samples of the chunk, size) of each parameter
        part = [tensor[first : first + chunk] for tensor in batch]
        found = vmap(grad(sample_loss), in_dims=(None, *[0] * len(part)), randomness="different")(parameters, *part)
        return [gradient.flatten(1) for gradient in found.values()]

    firsts = range(0, len(batch[0]), chunk)
    products = torch.zeros(len(batch[0]), len(batch[0]))
    for i in firsts:
        rows = gradients(i)
        for j in range(i, len(batch[0]), chunk):
            columns = rows if i == j else gradients(j)
            block = sum(row @ column.T for row, column in zip(rows, columns)).cpu()
            products[i : i + chunk, j : j + chunk] = block
            products[j : j + chunk, i : i + chunk] = block.T
    norm = products.diagonal().sqrt().clamp(min=1e-20)  # a gradient of 0 has cosines of 0
    return products / norm[:, None] / norm


def interference(network: nn.Module, loss: Callable, batch: Sequence[torch.Tensor], samples: int = 16) -> float:
    """Mean cosine between the gradients of two samples, over all pairs of the first `samples` of `batch`: one number
    for `gradient_cosines`, which has the arguments. It holds that many gradients of the network."""
    cosines = gradient_cosines(network, loss, [part[:samples] for part in batch], chunk=samples)
    return ((cosines.sum() - cosines.trace()) / (cosines.numel() - len(cosines))).item()


class EverActive:
    """Which weights have been active in any mask so far, for the exploration rate of Liu et al. (2021), Do we actually
    need dense over-parameterization? ("ITOP").
    """

    def __init__(self, masks: dict[str, torch.Tensor]) -> None:
        self.ever = {name: mask > 0 for name, mask in masks.items()}

    def update(self, masks: dict[str, torch.Tensor]) -> None:
        """Takes in masks that have changed."""
        for name, mask in masks.items():
            self.ever[name] |= mask > 0

    def fraction(self) -> float:
        """The fraction of weights that have ever been active; 1 without masks."""
        total = sum(mask.numel() for mask in self.ever.values())
        return sum(int(mask.count_nonzero()) for mask in self.ever.values()) / total if total else 1.0

    def state_dict(self) -> dict[str, torch.Tensor]:
        return self.ever

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        load_state(self.ever, state)


def target_variance(reward: torch.Tensor, discount: torch.Tensor, next_value: torch.Tensor) -> float:
    """Variance over a batch of the targets reward + discount x next_value, each (B,). The papers do not say theirs."""
    return (reward + discount * next_value).var(correction=0).item()


def report(
    network: nn.Module, *inputs: torch.Tensor, masks: dict[str, torch.Tensor], prefix: str = "diagnostics"
) -> dict[str, float]:
    """Scalars to log of a network: each layer's dormancy, rank and norm of the last features, weight norm.

    The last features are the outputs of modules named `encoder`, where the network has any (figures are means over
    them), else the output of the last ReLU.

    Args:
        inputs: tensors (B, ...), a sample of the replay that is larger than a mini-batch; 256 in the papers' code.
        masks: those of the network's weights by their names; may be empty. Units without an incoming weight are counted
            apart, but not in a layer whose output reaches its ReLU by way of a sum or a pooling.
        prefix: of the tags.
    """
    relus = _record(network, *inputs)
    scalars = {}
    for layer, activation in relus.found.items():
        # a noisy layer has two: a unit has an input if either leaves it one
        own = [has_inputs(mask) for name, mask in masks.items() if name.rpartition(".")[0] == layer]
        connected = torch.stack(own).any(0) if own and layer in relus.direct else None
        for name, value in dormant_ratios(activation, connected).items():
            scalars[f"{prefix}/{layer}/{name}"] = value
    features = relus.encoded or [list(relus.found.values())[-1].flatten(1)]  # (B, units) each
    for name, function in (("srank", srank), ("stable_rank", stable_rank), ("feature_norm", feature_norm)):
        scalars[f"{prefix}/{name}"] = sum(map(function, features)) / len(features)
    return scalars | {f"{prefix}/weight_norm": weight_norm(network)}


@torch.no_grad()
def diagnose(
    network: nn.Module,
    sample: Callable[[int], Batch],
    masks: dict[str, torch.Tensor],
    ever_active: EverActive,
    loss: Callable[[Callable, Batch], torch.Tensor],
    next_value: Callable[[Batch], torch.Tensor] | None = None,
    inputs: Sequence[str] = ("observation",),
    prefix: str = "diagnostics",
) -> dict[str, float]:
    """All scalars of a network on 256 transitions of the replay; leaves torch's random numbers as they were.

    Args:
        sample: draws a batch of a given size.
        loss: `loss(network, batch)` to a scalar.
        next_value: the values (B,) from which the batch's targets bootstrap; logs the targets' variance.
        inputs: fields of the batch that the network takes.
    """
    with torch.random.fork_rng():
        batch = sample(256)
        scalars = report(network, *(getattr(batch, name) for name in inputs), masks=masks, prefix=prefix)
        scalars[f"{prefix}/ever_active"] = ever_active.fraction()
        if next_value is not None:
            variance = target_variance(batch.reward, batch.discount, next_value(batch))
            scalars[f"{prefix}/target_variance"] = variance
        scalars[f"{prefix}/gradient_cosine"] = interference(network, lambda q, *one: loss(q, Batch(*one)), batch)
    return scalars
