"""Smaller and faster models out of trained ones, in files that need nothing of this repository.

    python -m utils.export runs/<run>
    python -m utils.export runs/<run> --batch-size 32 --onnx --out exported/cartpole

Units that are unconnected or constant are removed, which changes outputs by rounding only; linear layers that are
faster as CSR matrices become such. Writes policy.pt (TorchScript), model.safetensors, a model card (README.md), and
with --onnx policy.onnx. Prints sizes, times and scores before and after.
"""

import copy
import importlib.util
import inspect
import io
from dataclasses import asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import gymnasium as gym
import numpy as np
import torch
from gymnasium.wrappers import RescaleAction
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from utils.analysis.compact import Shape, SparseLinear, compact, drop_unused, quiet, seconds, trace, use_csr
from utils.analysis.results import Model, load_model, warn
from utils.command_line import Positional, fail, flag
from utils.envs import EVALUATION_SEED, atari_game, evaluate, make_env
from utils.files import write_atomically
from utils.flags import NonNegativeInt, PositiveInt, RunFlags, check_flags, first_line
from utils.launch import run_command

BATCH_SIZES = (1, 32, 256)
COMPARED = 2_048  # observations of the evaluation on which outputs are compared


@dataclass
class Args:
    run: Annotated[Path, Positional]
    """folder of a run, or its model.pt"""
    csr: Literal["auto", "always", "never"] = "auto"
    """store linear layers as CSR matrices: where that is faster on this machine, wherever there are zeros, or never"""
    batch_size: PositiveInt = 1
    """auto: number of observations in the batches for which layers should be fast"""
    onnx: bool = False
    """also write policy.onnx, with dense layers"""
    episodes: NonNegativeInt | None = None
    """episodes to score both models with; default: the run's own --eval-episodes; 0 plays none"""
    out: Path | None = None
    """folder to write to; default: `export` in the run's folder"""


class InBounds(nn.Module):
    """A network whose actions in [-1, 1] are scaled to the bounds of the environment."""

    def __init__(self, network: nn.Module, low: np.ndarray, high: np.ndarray) -> None:
        super().__init__()
        self.network = network
        self.register_buffer("low", torch.as_tensor(low))
        self.register_buffer("high", torch.as_tensor(high))

    def forward(self, *inputs: torch.Tensor) -> torch.Tensor:
        return self.low + (self.network(*inputs) + 1) / 2 * (self.high - self.low)


class Task:
    """A trained model, and what its policy takes and gives."""

    def __init__(self, model: Model) -> None:
        self.model = model
        self.space = model.observation_space
        self.is_uint8 = self.space.dtype == np.uint8
        self.bounds = action_bounds(model.args.env_id)  # None: one value for each discrete action
        greedy = model.script.make_greedy(model.args, model.networks)
        self.more = list(inspect.signature(greedy.forward).parameters)[1:]  # names of further inputs (n,)

    def build(self, networks: dict[str, nn.Module]) -> nn.Module:
        """The greedy policy with these networks inside, in evaluation mode."""
        greedy = self.model.script.make_greedy(self.model.args, networks).eval().requires_grad_(False)
        return InBounds(greedy, *self.bounds) if self.bounds else greedy

    def example(self, n: int) -> tuple[torch.Tensor, ...]:
        """Random inputs of batch size n."""
        if self.is_uint8:
            return self.inputs(torch.randint(0, 256, (n, *self.space.shape), dtype=torch.uint8))
        return self.inputs(torch.randn(n, *self.space.shape))

    def inputs(self, obs: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return obs, *(torch.randint(0, 100, (len(obs),)).float() for _ in self.more)


class Policy(NamedTuple):
    """The greedy policy as a module and as TorchScript, and the networks inside it for the script's `make_policy`."""

    module: nn.Module
    networks: dict[str, nn.Module]
    script: torch.jit.ScriptModule
    file: bytes


def action_bounds(env_id: str) -> tuple[np.ndarray, np.ndarray] | None:
    """The environment's own bounds of continuous actions, which `make_env` rescales to [-1, 1]."""
    env = None if atari_game(env_id) else make_env(env_id)
    if env is None or not isinstance(env.action_space, gym.spaces.Box):
        return None
    space = env.action_space
    while isinstance(env, gym.Wrapper):
        space = env.env.action_space if isinstance(env, RescaleAction) else space
        env = env.env
    return space.low, space.high


def check_same(module: nn.Module, other: nn.Module, task: Task) -> None:
    """Raises an AssertionError unless both give the same outputs, up to rounding, at several batch sizes."""
    for n in BATCH_SIZES:
        example = task.example(n)
        torch.testing.assert_close(module(*example), other(*example), rtol=1e-4, atol=1e-4)


def shrink(task: Task) -> tuple[nn.Module, dict[str, nn.Module], list[Shape]]:
    """The compact policy, the networks inside it, and the shapes of its layers. A network that cannot be traced, or
    that computes something else when it is compact, keeps all its units, and a note says so."""
    networks = copy.deepcopy(task.model.networks)
    small = task.build(networks)
    try:
        shapes = compact(small, task.example(2))
        check_same(small, task.build(task.model.networks), task)
        return small, networks, shapes
    except (ValueError, RuntimeError, AssertionError) as error:
        warn(f"the network keeps all its units: {first_line(error)}")
        networks = copy.deepcopy(task.model.networks)
        return task.build(networks), networks, []


def to_torchscript(module: nn.Module, networks: dict[str, nn.Module], task: Task) -> Policy:
    buffer = io.BytesIO()
    try:
        with quiet():
            torch.jit.save(torch.jit.trace(module, task.example(2), check_trace=False), buffer)
            buffer.seek(0)
            script = torch.jit.load(buffer)
        check_same(script, module, task)
    except (RuntimeError, AssertionError) as error:
        fail(f"the policy cannot be written as TorchScript: {first_line(error)}")
    return Policy(module, networks, script, buffer.getvalue())


def to_onnx(module: nn.Module, task: Task) -> bytes:
    batch = tuple({0: torch.export.Dim("batch")} for _ in task.example(2))
    try:
        with quiet():
            program = torch.onnx.export(
                module,
                task.example(2),
                dynamo=True,
                dynamic_shapes=(batch,) if isinstance(module, InBounds) else batch,
                input_names=["observation", *task.more],
                output_names=["action" if task.bounds else "values"],
                verbose=False,
            )
        return program.model_proto.SerializeToString()
    except Exception as error:  # of many kinds, whatever the network's code does
        fail(f"--onnx: the policy cannot be written as ONNX: {first_line(error)}")


def sizes(module: nn.Module) -> tuple[int, int]:
    """Weights and biases that are stored, and how many of them are not zero."""
    tensors = list(module.parameters())
    for each in module.modules():
        if isinstance(each, SparseLinear):
            tensors += [each.weight.values(), each.bias]
    return sum(each.numel() for each in tensors), sum(int(each.count_nonzero()) for each in tensors)


def mflops(module: nn.Module, task: Task) -> float:
    """Of one observation: two for each weight at each place where it is applied; zeros in a CSR matrix are not."""

    def product(*tensors, **_) -> int:
        matrix, vectors = tensors[-2:]
        applied = matrix.values() if matrix.layout is torch.sparse_csr else matrix
        return 2 * applied.numel() * (vectors.shape[1] if vectors.ndim > 1 else 1)

    product._get_raw = True  # tensors instead of shapes
    aten = torch.ops.aten
    counter = FlopCounterMode(display=False, custom_mapping={aten.mv: product, aten.mm: product, aten.addmm: product})
    with torch.no_grad(), counter:
        module(*task.example(1))
    return counter.get_total_flops() / 1e6


def score(task: Task, networks: dict[str, nn.Module], episodes: int, seen: list[np.ndarray]) -> np.ndarray:
    """The returns (episodes,) of the run's own evaluation; observations that it meets join `seen`."""
    policy = task.model.script.make_policy(task.model.args, networks)

    def watched(obs: np.ndarray, rngs: list[np.random.Generator]) -> np.ndarray:
        if sum(map(len, seen)) < COMPARED:
            seen.append(obs.copy())
        return policy(obs, rngs)

    return evaluate(task.model.args, watched, episodes, task.model.args.seed + EVALUATION_SEED)[0]


def agreement(task: Task, dense: Policy, exported: Policy, obs: torch.Tensor) -> str:
    """What rounding changes in the outputs for these observations, in words."""
    inputs = task.inputs(obs)
    with torch.inference_mode():
        a, b = dense.script(*inputs), exported.script(*inputs)
    said = f"on {len(obs):,} observations outputs differ by {float((a - b).abs().max()):.1e} at most"
    if task.bounds is None:
        flips = int((a.argmax(1) != b.argmax(1)).sum())
        said += f", and rounding flips the greedy action of {flips or 'none'}"
    return said


def measure(task: Task, policies: list[Policy]) -> list[tuple[str, ...]]:
    """Rows of a table: what is measured, and the figure of each policy."""
    numbers = [sizes(policy.module) for policy in policies]
    rows = [
        ("weights and biases", *(f"{stored:,}" for stored, _ in numbers)),
        ("of them not zero", *(f"{nonzero:,}" for _, nonzero in numbers)),
        ("bytes of policy.pt", *(f"{len(policy.file):,}" for policy in policies)),
        ("MFLOPs per observation", *(f"{mflops(policy.module, task):.3g}" for policy in policies)),
    ]
    with torch.inference_mode():
        for n in BATCH_SIZES:
            example = task.example(n)
            times = seconds([partial(policy.script, *example) for policy in policies])
            rows.append((f"microseconds per observation, batch {n}", *(f"{each / n * 1e6:.3g}" for each in times)))
    return rows


def table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    lines = [header, ("---", *["--:"] * (len(header) - 1)), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def interface(task: Task) -> str:
    """What goes into the policy and what comes out, in words."""
    shape = ", ".join(map(str, task.space.shape))
    said = (
        f"- Input: observations (n, {shape}) {'uint8' if task.is_uint8 else 'float32'}, as the environment gives them"
    )
    said += "; normalisation is part of the file."
    for name in task.more:
        said += f" Then `{name}` (n,) float32."
    if task.bounds:
        return f"{said}\n- Output: the greedy actions (n, {len(task.bounds[0])}), within the environment's bounds."
    return f"{said}\n- Output: a value for each action (n, actions); the greedy action is its `argmax(1)`."


def as_flag(name: str, value: object) -> str:
    if isinstance(value, bool):
        return flag(name) if value else flag(f"no_{name}")
    return f"{flag(name)} {value}"


def card(task: Task, figures: str, returns: np.ndarray | None, note: str) -> str:
    """A model card for the Hugging Face Hub."""
    args, script = task.model.args, task.model.script.__name__
    result = ""
    if returns is not None:
        result = f"""
model-index:
- name: {script}
  results:
  - task:
      type: reinforcement-learning
      name: reinforcement-learning
    dataset:
      name: {args.env_id}
      type: {args.env_id}
    metrics:
    - type: mean_reward
      value: {returns.mean():.2f} +/- {returns.std():.2f}
      name: mean_reward
      verified: false"""
    learning = {name: value for name, value in asdict(args).items() if name not in {f.name for f in fields(RunFlags)}}
    flags = "\n".join(as_flag(name, value) for name, value in learning.items() if value is not None)
    more = "".join(f"{name} = torch.zeros(1)\n" for name in task.more)
    return f"""---
license: mit
library_name: pytorch
pipeline_tag: reinforcement-learning
tags:
- deep-reinforcement-learning
- reinforcement-learning
- sparsity
- {args.env_id}{result}
---

# {script} on {args.env_id}

An agent trained with sparse-rl's `{script}.py --method {args.method}`, compacted by `python -m utils.export`.
MIT licence.

```python
import torch

policy = torch.jit.load("policy.pt")
obs = torch.zeros(1, {", ".join(map(str, task.space.shape))}{", dtype=torch.uint8" if task.is_uint8 else ""})
{more}print(policy({", ".join(["obs", *task.more])}))
```

{interface(task)}

`policy.pt` needs PyTorch and nothing else. `model.safetensors` holds the compact network's weights.

{figures}

{note}

## Training

```
{flags}
```
"""


def write(files: dict[str, bytes | str], out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            write_atomically(content, out / name)
    except OSError as error:
        fail(f"--out: cannot write to {out}: {error.strerror or error}")


def open_task(path: Path) -> Task:
    try:
        model = load_model(path)
    except ValueError as error:
        fail(f"{path} {error}")
    if not hasattr(model.script, "make_greedy"):
        fail(f"{path}: {model.script.__name__}.py has no make_greedy, see docs/your_own.md")
    return Task(model)


@torch.no_grad()
def main(args: Args) -> Path:
    """Writes the files and prints what is gained; returns their folder."""
    check_flags(args)
    missing = [name for name in ("onnx", "onnxscript") if importlib.util.find_spec(name) is None]
    if args.onnx and missing:
        fail(f"--onnx: needs {missing[0]}: pip install -r requirements-export.txt")
    torch.manual_seed(0)
    task = open_task(args.run)
    out = args.out or (args.run if args.run.is_dir() else args.run.parent) / "export"
    write({}, out)  # fails now rather than after the evaluation

    # Networks: as trained, and compact
    small, networks, shapes = shrink(task)
    files = {"policy.onnx": to_onnx(small, task)} if args.onnx else {}
    weights = {name: tensor.contiguous() for name, tensor in small.state_dict().items()}
    csr = [] if args.csr == "never" else use_csr(small, task.example(args.batch_size), args.csr == "always")
    exported = to_torchscript(small, networks, task)
    as_trained = task.build(copy.deepcopy(task.model.networks))
    if shapes:
        drop_unused(as_trained, trace(as_trained, task.example(2)))
    dense = to_torchscript(as_trained, task.model.networks, task)

    # Score
    episodes = task.model.args.eval_episodes if args.episodes is None else args.episodes
    seen: list[np.ndarray] = []
    returns = [score(task, policy.networks, episodes, seen) for policy in (dense, exported)] if episodes else []
    example = task.example(COMPARED // 8)[0]
    note = agreement(
        task, dense, exported, torch.as_tensor(np.concatenate(seen), dtype=example.dtype) if seen else example
    )
    note = f"{note[0].upper()}{note[1:]}."

    # Report and files
    rows = measure(task, [dense, exported])
    if episodes:
        rows.append((f"mean return of {episodes} episodes", *(f"{each.mean():.4g}" for each in returns)))
        differing = int((returns[0] != returns[1]).sum())
        note += f" Returns differ in {differing or 'none'} of {episodes} episodes."
    layers = [
        (
            shape.path,
            *(f"{after} x {before}" for after, before in (shape.before, shape.after)),
            "CSR" * (shape.path in csr),
        )
        for shape in shapes
    ]
    if layers:
        print(table(("layer", "outputs x inputs", "compact", ""), layers) + "\n")
    figures = table(("", "as trained", "exported"), rows)
    print(f"{figures}\n\n{note}")
    files["policy.pt"] = exported.file
    if importlib.util.find_spec("safetensors") is None:
        warn("no model.safetensors: needs safetensors: pip install -r requirements-export.txt")
    else:
        from safetensors.torch import save

        files["model.safetensors"] = save(weights)
    write(files | {"README.md": card(task, figures, returns[1] if episodes else None, note)}, out)
    print(f"wrote {', '.join(sorted([*files, 'README.md']))} to {out}")
    return out


if __name__ == "__main__":
    run_command(main, Args)
