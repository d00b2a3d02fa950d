"""Smaller networks that compute the same: unconnected units removed, constant ones folded into biases, CSR layers.

A unit (a neuron, a channel) can be removed if no layer reads it, or if its value is the same for every observation:
what it contributes then moves into the biases of the layers that read it. Units that are added or multiplied
elementwise (residual sums, IQN's embedding) are removed together or not at all. Nothing here knows an architecture:
`torch.export` writes down a network's operations, and each kind of operation has a rule for what happens to units.
Units that reach an operation without a rule stay, so the result is exact whatever the network does.
"""

import contextlib
import io
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

import torch
from torch import nn
from torch.fx import Node

from utils.flags import first_line

aten = torch.ops.aten
# Operations that move units or drop places, and compute nothing: their rule is to follow each unit to where it goes
MOVEMENTS = {
    *(aten.flatten.using_ints, aten.unflatten.int, aten.view.default, aten.reshape.default, aten.expand.default),
    *(aten.unsqueeze.default, aten.squeeze.dim, aten.permute.default, aten.transpose.int, aten.detach.default),
    *(aten.max_pool2d.default, aten.clone.default, aten.contiguous.default, aten.dropout.default),
}


class Units(NamedTuple):
    """The units along dimension `dim` of a tensor, and their values: nan where they depend on the observation.

    Flattening a channel gives one unit many places; elsewhere the units of a tensor differ.
    """

    dim: int
    index: torch.Tensor  # (n,) int64, among all units of the network
    value: torch.Tensor  # (n,) float64


@dataclass
class Layer:
    """A module that does nothing but one linear or conv2d call with weights of its own."""

    path: str
    node: Node
    weight: torch.Tensor  # (outputs, inputs, ...)
    bias: torch.Tensor  # (outputs,) float64, zeros if it has none
    has_bias: bool
    units: torch.Tensor  # (outputs,) indices of its outputs
    read: Units | None = None  # its inputs, if their units are known

    @property
    def is_conv(self) -> bool:
        return self.weight.ndim == 4

    @property
    def settings(self) -> list:
        """Stride, padding and dilation of a convolution."""
        given = list(self.node.args[3:6])
        return given + [[1, 1], [0, 0], [1, 1]][len(given) :]

    @property
    def input_is_nonzero(self) -> torch.Tensor:  # (inputs,) bool
        return self.weight.movedim(1, 0).flatten(1).any(1)


class Shape(NamedTuple):
    """A layer's outputs and inputs before and after."""

    path: str
    before: tuple[int, ...]
    after: tuple[int, ...]


@torch.no_grad()
def compact(network: nn.Module, example: tuple[torch.Tensor, ...]) -> list[Shape]:
    """Replaces the layers of `network`, in evaluation mode, by smaller ones of plain torch, in place.

    Parameters that no output depends on become None. The network gives the same outputs, up to rounding, on any input
    with the shapes of `example`, whose first dimension is the batch's.

    Raises:
        ValueError: `torch.export` cannot write the network down; it is as it was.
    """
    program = trace(network, example)
    graph = Graph(program)
    graph.simplify()
    drop_unused(network, program)
    return [replace_layer(network, layer, graph.live) for layer in graph.layers.values()]


def trace(network: nn.Module, example: tuple[torch.Tensor, ...]) -> torch.export.ExportedProgram:
    try:
        with quiet():
            program = torch.export.export(network, example)
    except Exception as error:  # of many kinds, whatever the network's code does
        raise ValueError(f"torch.export cannot trace it ({type(error).__name__}: {first_line(error)})") from None
    if any(getattr(getattr(node.target, "_schema", None), "is_mutable", False) for node in program.graph.nodes):
        raise ValueError("it changes tensors in place")
    return program


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Without the warnings, logs and listings of torch's exporters; what matters they raise."""
    level = logging.root.manager.disable
    logging.disable(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def drop_unused(network: nn.Module, program: torch.export.ExportedProgram) -> None:
    """Sets the parameters to None that no output depends on: noise, or a head that the greedy policy does not use."""
    names = program.graph_signature.inputs_to_parameters
    used = {names[node.name] for node in program.graph.nodes if node.name in names and node.users}
    used_ids = {id(network.get_parameter(path)) for path in used}  # a shared one has several names
    for path in set(names.values()) - used:
        if id(network.get_parameter(path)) not in used_ids:
            owner, _, name = path.rpartition(".")
            setattr(network.get_submodule(owner), name, None)


class Graph:
    """A network's operations, its layers, and which units belong together."""

    def __init__(self, program: torch.export.ExportedProgram) -> None:
        self.nodes = list(program.graph.nodes)
        names = program.graph_signature.inputs_to_parameters
        parameters = {node: names[node.name] for node in self.nodes if node.name in names}
        self.layers = find_layers(self.nodes, parameters, program.state_dict)
        count = sum(len(layer.bias) for layer in self.layers.values())
        self.group = torch.arange(count)  # units with the same number stay or go together
        self.pinned = torch.zeros(count, dtype=torch.bool)  # must stay, by group

    def simplify(self) -> None:
        """Zeroes weights and biases whose effect is nil or has moved into other biases, until there are none."""
        changed = True
        while changed:
            self.walk()
            self.live = self.find_live()
            changed = False
            for layer in self.layers.values():
                dead = ~self.live[layer.units]
                changed |= bool(layer.weight[dead].any() or layer.bias[dead].any())
                layer.weight[dead], layer.bias[dead] = 0, 0

    def walk(self) -> None:
        """Follows the units from operation to operation."""
        units: dict[Node, Units | None] = {}
        for node in self.nodes:
            known = [units[each] for each in node.all_input_nodes if units[each] is not None]
            if node in self.layers:
                units[node] = self.through_layer(self.layers[node], units[node.args[0]])
            elif not known:
                units[node] = None
            elif node.target in MOVEMENTS:
                units[node] = through_movement(node, known[0])
            elif node.target is aten.pad.default:
                units[node] = through_padding(node, known[0])
            elif torch.Tag.pointwise in getattr(node.target, "tags", ()):
                units[node] = self.through_pointwise(node, units)
            else:
                units[node] = None
            if units[node] is None and node not in self.layers:
                for each in known:
                    self.pinned[self.group[each.index]] = True

    def find_live(self) -> torch.Tensor:  # (units,) bool
        """Which units are read by a layer's weights, or pinned. One unit of each layer stays in any case."""
        live = self.pinned.clone()  # by group
        for layer in self.layers.values():
            if layer.read is not None:
                live[self.group[layer.read.index[layer.input_is_nonzero]]] = True
        for layer in self.layers.values():
            if not live[self.group[layer.units]].any():
                live[self.group[layer.units[0]]] = True
        return live[self.group]

    def through_layer(self, layer: Layer, read: Units | None) -> Units:
        """Folds constant inputs into the bias. An output without weights is constant."""
        dim = len(shape_of(layer.node)) - (3 if layer.is_conv else 1)
        if read is not None and read.dim != dim:
            self.pinned[self.group[read.index]] = True
            read = None
        layer.read = read
        if read is not None:
            # With padding by zeros a constant channel has other values at the borders, unless it is zero itself
            padded = layer.is_conv and any(layer.settings[1])
            fold = (read.value == 0) if padded else read.value.isfinite()
            layer.bias += torch.einsum("oi...,i->o", layer.weight[:, fold].double(), read.value[fold])
            layer.weight[:, fold] = 0
        has_inputs = layer.weight.flatten(1).any(1)
        return Units(dim, layer.units, layer.bias.masked_fill(has_inputs, torch.nan))

    def through_pointwise(self, node: Node, units: dict[Node, Units | None]) -> Units | None:
        """Units at the same place of several tensors belong together; of constants, the result is constant."""
        shape = shape_of(node)
        known = {each: units[each] for each in node.all_input_nodes if units[each] is not None}
        first = next(iter(known.values()))
        from_right = {found.dim - len(shape_of(each)) for each, found in known.items()}
        if len(from_right) > 1 or len({len(found.index) for found in known.values()} | {shape[min(from_right)]}) > 1:
            return None
        (dim,) = from_right
        for each in node.all_input_nodes:
            other = shape_of(each)
            if each not in known and len(other) >= -dim and other[dim] != 1:
                return None  # it has a value of its own for each unit
        for found in known.values():
            self.join(first.index, found.index)
        value = torch.full_like(first.value, torch.nan)
        if len(known) == len(node.all_input_nodes):
            args = [known[each].value.to(dtype_of(each)) if each in known else each for each in node.args]
            result = node.target(*args, **node.kwargs).double()
            value = torch.where(sum(found.value for found in known.values()).isnan(), value, result)
        if node.target is aten.mul.Tensor:
            value[torch.stack([found.value == 0 for found in known.values()]).any(0)] = 0
        return Units(len(shape) + dim, first.index, value)

    def join(self, first: torch.Tensor, second: torch.Tensor) -> None:
        for a, b in zip(first.tolist(), second.tolist()):
            a, b = int(self.group[a]), int(self.group[b])
            if a != b:
                self.pinned[a] |= self.pinned[b]
                self.group[self.group == b] = a


def find_layers(nodes: list[Node], parameters: dict[Node, str], state: dict[str, torch.Tensor]) -> dict[Node, Layer]:
    """The layers by their operation, with copies of their weights."""
    modules = [{path for path, _ in (node.meta.get("nn_module_stack") or {}).values()} for node in nodes]
    layers, count = {}, 0
    for node in nodes:
        if node.target not in (aten.linear.default, aten.conv2d.default) or len(node.args) > 6:  # 7: with groups
            continue
        own = [each for each in node.args[1:3] if each is not None]
        paths = {parameters[each].rpartition(".")[0] if each in parameters else "" for each in own}
        path = paths.pop()
        if paths or not path or any(len(each.users) > 1 for each in own) or sum(path in each for each in modules) != 1:
            continue
        weight = state[parameters[own[0]]].clone()
        bias = state[parameters[own[1]]].double() if len(own) > 1 else torch.zeros(len(weight)).double()
        layers[node] = Layer(path, node, weight, bias.clone(), len(own) > 1, torch.arange(count, count + len(weight)))
        count += len(weight)
    return layers


def shape_of(node: Node) -> tuple[int, ...]:
    return tuple(node.meta["val"].shape)


def dtype_of(node: Node) -> torch.dtype:
    return node.meta["val"].dtype


def through_movement(node: Node, units: Units) -> Units | None:
    """Runs the operation on a tensor that holds, at each place, the number of its unit, and finds it again."""
    source, *rest = node.args
    pooled = node.target is aten.max_pool2d.default and units.dim >= len(shape_of(source)) - 2
    if pooled or any(isinstance(each, Node) for each in rest):
        return None
    shape = [1] * len(shape_of(source))
    shape[units.dim] = len(units.index)
    numbers = torch.arange(len(units.index), dtype=torch.float64).view(shape).expand(shape_of(source))
    moved = node.target(numbers, *rest, **node.kwargs).long()
    for dim in sorted(range(moved.ndim), key=lambda dim: (dim != units.dim, -dim)):
        along = moved.movedim(dim, -1).flatten(0, -2) if moved.ndim > 1 else moved[None]
        if bool((along == along[0]).all()):
            return Units(dim, units.index[along[0]], units.value[along[0]])
    return None


def through_padding(node: Node, units: Units) -> Units | None:
    """Constant padding in other dimensions; a constant unit stays so only if that is its value."""
    source, amounts, mode, value = [*node.args, "constant", None][:4] if len(node.args) < 4 else node.args
    if mode != "constant" or units.dim >= len(shape_of(source)) - len(amounts) // 2:
        return None
    return units._replace(value=units.value.masked_fill(units.value != float(value or 0), torch.nan))


def replace_layer(network: nn.Module, layer: Layer, live: torch.Tensor) -> Shape:
    outputs = live[layer.units]
    inputs = torch.ones(layer.weight.shape[1], dtype=torch.bool) if layer.read is None else live[layer.read.index]
    weight = layer.weight[outputs][:, inputs]
    bias = layer.bias[outputs]
    has_bias = layer.has_bias or bool(bias.any())
    if layer.is_conv:
        stride, padding, dilation = layer.settings
        size = weight.shape[2:]
        new = nn.Conv2d(weight.shape[1], len(weight), size, stride, padding, dilation, bias=has_bias)
    else:
        new = nn.Linear(weight.shape[1], len(weight), bias=has_bias)
    new = new.to(weight)
    if layer.is_conv and layer.weight.is_contiguous(memory_format=torch.channels_last):
        new = new.to(memory_format=torch.channels_last)
    new.weight.copy_(weight)
    if has_bias:
        new.bias.copy_(bias)
    network.set_submodule(layer.path, new.requires_grad_(False).eval())
    return Shape(layer.path, tuple(layer.weight.shape[:2]), tuple(weight.shape[:2]))


@torch.jit.script_if_tracing
def csr_linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    if x.shape[0] == 1:
        return (torch.mv(weight, x[0]) + bias)[None]
    return torch.addmm(bias[:, None], weight, x.t()).t()  # F.linear takes CSR weights too, but is slow with them


class SparseLinear(nn.Module):
    """A linear layer whose weight is a CSR matrix: zeros are neither stored nor multiplied. For inference only."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse ")  # CSR is in beta state, and not checked at each product
            weight = linear.weight.detach().to_sparse_csr()
            rows, columns = weight.crow_indices().int(), weight.col_indices().int()
            self.register_buffer("weight", torch.sparse_csr_tensor(rows, columns, weight.values(), weight.shape))
        bias = torch.zeros(linear.out_features) if linear.bias is None else linear.bias.detach()
        self.register_buffer("bias", bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, inputs) -> (B, outputs)
        return csr_linear(x, self.weight, self.bias)

    def __deepcopy__(self, memo: dict) -> "SparseLinear":
        return self  # torch cannot copy a CSR tensor, and this one never changes


@torch.no_grad()
def use_csr(network: nn.Module, example: tuple[torch.Tensor, ...], always: bool) -> list[str]:
    """Replaces linear layers with zeros by `SparseLinear`, in place: those that are faster so with the inputs that
    `example` gives them, or all. Returns their names."""
    inputs: dict[str, torch.Tensor] = {}
    linear = {path: each for path, each in network.named_modules() if type(each) is nn.Linear and path}
    hooks = [
        each.register_forward_pre_hook(lambda _, args, path=path: inputs.update({path: args[0]}))
        for path, each in linear.items()
    ]
    network(*example)
    for hook in hooks:
        hook.remove()
    replaced = []
    for path, x in inputs.items():
        if x.ndim != 2 or linear[path].weight.all():
            continue
        sparse = SparseLinear(linear[path])
        dense_time, sparse_time = seconds([partial(linear[path], x), partial(sparse, x)], 0.1)
        if always or sparse_time < dense_time:
            network.set_submodule(path, sparse)
            replaced.append(path)
    return replaced


def seconds(
    functions: Sequence[Callable], at_least: float = 0.3, turns: int = 5, clock=time.perf_counter
) -> list[float]:
    """The time of the fastest call of each, called in turns, at least so many and until the first took `at_least`."""
    times: list[list[float]] = [[] for _ in functions]
    for function in functions:
        for _ in range(min(turns, 3) - 1):
            function()  # the first calls are slower
    while sum(times[0]) < at_least or len(times[0]) < turns:
        for function, measured in zip(functions, times):
            start = clock()
            function()
            measured.append(clock() - start)
    return [min(measured) for measured in times]
