"""Agent steps per second, time and memory of an update, and how far it is from what the machine could do.

    python benchmarks/throughput.py                                            # every script, width 1, dense and sparse
    python benchmarks/throughput.py --tasks dqn-impala --widths 1 2 3 4 --out docs/throughput
    python benchmarks/throughput.py --tasks stream --widths 8 --sparsities 0.9 0.95 0.99 --cpu-time
    python benchmarks/throughput.py --tasks dqn --peer path/to/dqn_atari.py --peer-flags "--learning-starts 1000 ..."

Contenders take turns, so that a machine whose speed drifts slows all of them; ratios are within a turn. The machine's
limit is the time of the update's FLOPs at the rate of a large float32 matrix product, plus that of the weights' way
through memory (forward and backward passes, Adam, masks) at the bandwidth of a large copy, both measured here. The time
per update that it is compared with holds everything: acting and environment steps too, but not the rendering of
observations, whose time per update is named apart.

    python benchmarks/throughput.py --tasks drq --rounds 1 --seconds 60        # an update takes seconds on a CPU
"""

import argparse
import copy
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import matplotlib
import numpy as np
import torch
from gymnasium.spaces import Box, Discrete
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

matplotlib.use("Agg")
import matplotlib.pyplot as plt

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cql_pruned
import dqn_sparse
import drq_sparse
import iqn_pruned
import rainbow_pruned
import sac_sparse
import stream_sparse
from utils.flags import RunFlags
from utils.masks import apply_masks, prunable
from utils.replay import Batch
from utils.runs import choose_device

ROOT = Path(__file__).resolve().parent.parent
ATARI = "--env-id ALE/Breakout-v5 --learning-starts 1000 --total-timesteps 1000000"
CHEETAH = "--env-id HalfCheetah-v5 --learning-starts 1000 --total-timesteps 1000000"
WALKER = "--env-id Walker2d-v5 --total-timesteps 1000000"
HOPPER = "--env-id dm_control/hopper-hop-v0 --learning-starts 20 --buffer-size 10000"
CQL = "--env-id ALE/Breakout-v5 --dataset {data}"
TASKS = {  # script, network, flags, agent steps per update
    "dqn": (dqn_sparse, "nature", ATARI, 4),
    "dqn-impala": (dqn_sparse, "impala", ATARI, 4),
    "rainbow": (rainbow_pruned, "nature", ATARI, 4),
    "rainbow-impala": (rainbow_pruned, "impala", ATARI, 4),
    "iqn": (iqn_pruned, "nature", ATARI, 4),
    "iqn-impala": (iqn_pruned, "impala", ATARI, 4),
    "sac-mlp": (sac_sparse, "mlp", CHEETAH, 1),
    "sac-simba": (sac_sparse, "simba", CHEETAH, 0.5),
    "drq": (drq_sparse, None, HOPPER, 2),
    "cql": (cql_pruned, "nature", CQL, 1),
    "stream": (stream_sparse, None, WALKER, 1),  # without a limit: its matrices are sparse, and fit into caches
    "stream-8": (stream_sparse, None, f"{WALKER} --num-seeds 8", 1),
}


def loss_of(task: str, width: int, device: torch.device) -> tuple[Callable[[], None], dict[nn.Module, int]]:
    """The losses and gradients of one update; and the networks that it trains, each with how often all of its weights,
    its target's or its gradient are read or written on the way: forward, target's forward, backward, gradient.
    """
    script, network, *_ = TASKS[task]
    args = script.Args(width=width, **({"network": network} if network else {}))
    if script is drq_sparse:
        networks = script.make_networks(args, Box(0, 255, (9, 84, 84), np.uint8), Box(-1, 1, (4,)))
        encoder, actor, critic = (networks[net].to(device) for net in ("encoder", "actor", "critic"))
        target, zeros = copy.deepcopy(critic), torch.zeros(args.batch_size, device=device)
        frames, action = torch.zeros(args.batch_size, 9, 84, 84, device=device), zeros[:, None].repeat(1, 4)

        def loss() -> None:
            with torch.no_grad():
                next_features = encoder(frames)
            batch = Batch(encoder(frames), action, zeros, zeros, next_features)
            script.critic_loss(actor, critic, target, batch, zeros[0], args.noise_clip)[0].sum().backward()
            policy_loss = script.actor_loss(actor, critic, batch.observation.detach(), zeros[0], args.noise_clip)
            policy_loss.backward(inputs=list(actor.parameters()))

        return loss, {encoder: 2 + 1 + 1, actor: 2 + 1 + 1, critic: 4 + 2 + 3}  # as for SAC below

    if script is sac_sparse:
        args.num_critics = 2 if network == "mlp" else 1
        networks = script.make_networks(args, Box(-1, 1, (17,)), Box(-1, 1, (6,)))
        actor, critic = networks["actor"].to(device), networks["critic"].to(device)
        target, zeros = copy.deepcopy(critic), torch.zeros(args.batch_size, device=device)
        observation, action = zeros[:, None].repeat(1, 17), zeros[:, None].repeat(1, 6)
        batch = Batch(observation, action, zeros, zeros, observation)

        def loss() -> None:
            policy_loss, _ = script.actor_loss(actor, critic, observation, zeros[0])
            policy_loss.backward(inputs=list(actor.parameters()))
            script.critic_loss(actor, critic, target, batch, zeros[0])[0].sum().backward()

        # The actor acts in both losses; the critic is read twice more in the actor's. Polyak averaging reads the critic
        # and its target and writes the target.
        return loss, {actor: 2 + 1 + 1, critic: 4 + 2 + 3}

    space = Box(0, 255, (4, 84, 84), np.uint8)
    network = script.make_networks(args, space, Discrete(4))["q_network"].to(device)
    target, zeros = copy.deepcopy(network), torch.zeros(args.batch_size, device=device)
    blank = torch.zeros(args.batch_size, *space.shape, dtype=torch.uint8, device=device)
    batch = Batch(blank, zeros.long(), zeros, zeros, blank)
    if script is cql_pruned:
        return lambda: script.loss_terms(network, target, batch, None, args)[0].backward(), {network: 4}
    if script is rainbow_pruned:
        support = script.make_support(args, device)
        return lambda: script.td_loss(network, target, batch, support, args.double)[0].mean().backward(), {network: 4}
    if script is iqn_pruned:  # the target's weights are read twice
        return lambda: script.td_loss(network, target, batch, args)[0].backward(), {network: 5}
    return lambda: script.td_loss(network, target, batch, args.double)[0].backward(), {network: 4}


def update_cost(task: str, width: int, masked: bool, device: torch.device) -> tuple[int, int]:
    """FLOPs of an update, and bytes of weights that it moves."""
    loss, networks = loss_of(task, width, device)
    with FlopCounterMode(display=False) as counter:
        loss()
    step = 4 + 3  # Adam reads weight, gradient and two moments, and writes weight and moments
    step += 2 + 1 if masked else 0  # a mask's application reads weight and mask, and writes the weight
    weights = {network: sum(weight.numel() for weight in network.parameters()) for network in networks}
    return counter.get_total_flops(), 4 * sum(weights[network] * (networks[network] + step) for network in networks)


def mask_fraction(task: str, width: int, device: torch.device) -> float:
    """Time of applying the masks over that of the rest of an update; the medians of 30 (of 3 if it takes
    seconds), one after the other."""
    loss, networks = loss_of(task, width, device)
    weights = {f"{i}.{name}": weight for i, net in enumerate(networks) for name, weight in prunable(net).items()}
    masks = {name: (torch.rand_like(weight) < 0.1).to(weight.dtype) for name, weight in weights.items()}
    optimizer = torch.optim.Adam([p for net in networks for p in net.parameters()], 1e-4, fused=True)

    def update() -> None:
        optimizer.zero_grad()
        loss()
        optimizer.step()

    rounds = 6 if task == "drq" and device.type == "cpu" else 33
    times = [(seconds(update, device), seconds(lambda: apply_masks(weights, masks), device)) for _ in range(rounds)][3:]
    updates, applications = zip(*times)
    return statistics.median(applications) / statistics.median(updates)


def seconds(action: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    action()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def best_seconds(action: Callable[[], object], device: torch.device) -> float:
    return min(seconds(action, device) for _ in range(15))


def machine(device: torch.device) -> tuple[float, float]:
    """FLOP/s of a large matrix product, and bytes/s of a large copy, both ways counted."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    x, y = torch.empty(2**26, device=device), torch.ones(2**26, device=device)
    return 2 * size**3 / best_seconds(lambda: a @ b, device), 2 * 4 * 2**26 / best_seconds(lambda: x.copy_(y), device)


def time_script(script: str, flags: str, skip: int, seconds: float, multiple: int, offline: bool) -> dict:
    command = [sys.executable, str(ROOT / "benchmarks/time_steps.py"), "--skip", str(skip), "--seconds", str(seconds)]
    command += ["--multiple", str(multiple), *(["--offline"] if offline else []), script, *shlex.split(flags)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{script} {flags} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def write_data(folder: str) -> None:
    flags = "--network nature --total-timesteps 3040 --learning-starts 3000 --eval-episodes 1 --method dense"
    command = [sys.executable, str(ROOT / "dqn_sparse.py"), *shlex.split(flags), "--save-dataset", f"{folder}/data"]
    subprocess.run([*command, "--runs-dir", folder], check=True, capture_output=True)


def draw(rows: list[dict], path: Path) -> None:
    plt.style.use(ROOT / "utils" / "style.mplstyle")
    figure, axes = plt.subplots(figsize=(6, 4))
    for task, method in dict.fromkeys((row["task"], row["method"]) for row in rows if row["width"]):
        line = [row for row in rows if (row["task"], row["method"]) == (task, method)]
        axes.plot(
            [row["width"] for row in line], [row["ms_per_update"] for row in line], "o-", label=f"{task} {method}"
        )
    limits = {(row["task"], row["width"]): row["limit_ms"] for row in rows if row["limit_ms"]}
    for task in dict.fromkeys(task for task, _ in limits):
        widths = sorted(width for name, width in limits if name == task)
        axes.plot(widths, [limits[task, width] for width in widths], "k:", label=f"{task}, the machine's limit")
    axes.set(xlabel="width", ylabel="ms per update", yscale="log")
    axes.legend()
    figure.savefig(path)


def spread(values: list[float], form: str) -> str:
    """Smallest, median and largest; nothing of no values."""
    return ", ".join(format(f(values), form) for f in (min, statistics.median, max)) if values else ""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="+", choices=TASKS, default=list(TASKS))
    parser.add_argument("--widths", nargs="+", type=int, default=[1])
    parser.add_argument(
        "--methods", nargs="+", default=["dense", "random"], help="dense, or sparse with each of --sparsities"
    )
    parser.add_argument("--sparsities", nargs="+", type=float, default=[0.9])
    parser.add_argument("--flags", default="", help="more flags for our scripts, in one string")
    parser.add_argument("--peer", help="another training script, with as many agent steps per update")
    parser.add_argument("--peer-flags", default="", help="its flags, in one string; 1000 steps before it learns")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--cpu-time", action="store_true", help="CPU time of all threads, where others use the machine")
    parser.add_argument(
        "--out", help="write the rows to OUT.json, and a figure of the time against the width to OUT.png"
    )
    args = parser.parse_args()

    device = choose_device(RunFlags())
    flops_rate, bandwidth = machine(device)
    print(
        f"matrix product {flops_rate / 1e9:,.0f} GFLOP/s, copy {bandwidth / 1e9:.1f} GB/s, torch {torch.__version__}\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        if "cql" in args.tasks:
            write_data(folder)
        contenders = {}
        for task in args.tasks:
            script, network, flags, steps_per_update = TASKS[task]
            flags = f"{flags.format(data=folder + '/data')} --runs-dir {folder} {args.flags}"
            flags += f" --network {network}" if network else ""
            path = str(ROOT / f"{script.__name__}.py")
            for width in args.widths:
                for method in args.methods:
                    for sparsity in args.sparsities[:1] if method == "dense" else args.sparsities:
                        ours = f"{flags} --width {width} --method {method} --sparsity {sparsity}"
                        name = method if method == "dense" or sparsity == 0.9 else f"{method} {sparsity:g}"
                        contenders[task, width, name] = (path, ours, steps_per_update)
            if args.peer:
                contenders[task, None, "peer"] = (args.peer, args.peer_flags, steps_per_update)

        found = {key: [] for key in contenders}
        for _ in range(args.rounds):
            for key, (path, flags, steps_per_update) in contenders.items():
                offline = key[0] == "cql"
                skip = {"cql": 50, "drq": 20 + 3 * 2}.get(key[0], 1000 + int(50 * steps_per_update))
                multiple = max(1, int(steps_per_update))
                found[key].append(time_script(path, flags, skip, args.seconds, multiple, offline))

    rows, clock = [], "cpu_ms_per_step" if args.cpu_time else "ms_per_step"
    print(
        "| task | width | method | agent steps/s (min, median, max) | ms per update | rendering, ms per update ", end=""
    )
    print(
        "| over the machine's limit | masks | memory, GB | start, s | time over ours, dense (min, median, max) |\n",
        end="",
    )
    print("|---|--:|---|" + "--:|" * 8)
    for (task, width, method), results in found.items():
        steps_per_update = contenders[task, width, method][2]
        ms = [result[clock] for result in results]
        row = {
            "task": task,
            "width": width,
            "method": method,
            "ms_per_update": steps_per_update * statistics.median(ms),
        }
        row["steps_per_second"] = sorted(1e3 / value for value in ms)
        row["rendering_ms"] = steps_per_update * statistics.median(r["rendering_ms_per_step"] for r in results)
        row["limit_ms"] = row["mask_fraction"] = None
        if width and TASKS[task][0] is not stream_sparse:
            flops, nbytes = update_cost(task, width, method != "dense", device)
            row["limit_ms"] = 1e3 * (flops / flops_rate + nbytes / bandwidth)
            row["mask_fraction"] = mask_fraction(task, width, device) if method != "dense" else None
        memory = "peak_gpu_memory_gb" if device.type == "cuda" else "memory_gb"
        row["memory_gb"] = max(result[memory] for result in results)
        row["startup_s"] = statistics.median(result["startup_s"] for result in results)
        dense = found.get((task, width or args.widths[0], "dense"), [])
        row["over_dense"] = sorted(value / base[clock] for value, base in zip(ms, dense))
        rows.append(row)
        speed, over = spread(row["steps_per_second"], ",.0f"), spread(row["over_dense"], ".3f")
        rendering = row["rendering_ms"]
        limit = f"{(row['ms_per_update'] - rendering) / row['limit_ms']:.2f}" if row["limit_ms"] else ""
        print(f"| {task} | {width or ''} | {method} | {speed} | {row['ms_per_update']:.2f} ", end="")
        print(f"| {f'{rendering:.1f}' if rendering else ''} | {limit} ", end="")
        masks = f"{row['mask_fraction']:.1%}" if row["mask_fraction"] else ""
        print(f"| {masks} | {row['memory_gb']:.2f} | {row['startup_s']:.1f} | {over} |")
    if args.out:
        hardware = {"device": str(device), "flops_per_second": flops_rate, "bytes_per_second": bandwidth}
        Path(f"{args.out}.json").write_text(json.dumps({"machine": hardware, "rows": rows}, indent=1) + "\n")
        draw(rows, Path(f"{args.out}.png"))


if __name__ == "__main__":
    main()
