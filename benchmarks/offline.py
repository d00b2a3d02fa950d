"""What the data of cql_pruned.py costs: unpacking compared with `gzip -dc`, memory, and the fraction of an update spent
in sampling.

    python benchmarks/offline.py [--rows 50000] [--fraction 1.0] [--network nature] [--rounds 5]

Plays Pong at random for the data, and writes it as the published datasets are: one gzip'd npy for each store.
"""

import argparse
import gzip
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from gymnasium.spaces import Discrete

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from cql_pruned import Args, loss_terms, make_networks
from utils.envs import STACK, make_envs
from utils.flags import RunFlags
from utils.offline.read import read_dataset
from utils.offline.replay import OfflineReplay
from utils.runs import choose_device

ROOT = Path(__file__).resolve().parent.parent


def median_seconds(action: Callable[[], object], repeats: int) -> float:
    """How long one call takes, after a first one that is not counted."""
    action()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        action()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def write_pong(folder: Path, rows: int) -> None:
    envs = make_envs("ALE/Pong-v5", 1)
    stores = {
        "observation": np.zeros((rows, 84, 84), np.uint8),
        "action": np.random.default_rng(0).integers(envs.single_action_space.n, size=rows, dtype=np.int32),
        "reward": np.zeros(rows, np.float32),
        "terminal": np.zeros(rows, np.uint8),
    }
    observation, _ = envs.reset(seed=0)
    for t in range(rows):
        stores["observation"][t] = observation[0, -1]
        observation, reward, terminated, truncated, _ = envs.step(stores["action"][t : t + 1])
        stores["reward"][t], stores["terminal"][t] = reward[0], terminated[0] or truncated[0]
    envs.close()
    for name, store in stores.items():
        with gzip.open(folder / f"$store$_{name}_ckpt.0.gz", "wb") as file:
            np.save(file, store)
    with gzip.open(folder / "add_count_ckpt.0.gz", "wb") as file:
        np.save(file, np.array(rows - 1))


def peak_memory() -> int:
    """Bytes, the maximum of this process so far."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=50_000)
    parser.add_argument("--fraction", type=float, default=1.0)
    parser.add_argument("--network", choices=("nature", "impala"), default="nature")
    parser.add_argument("--rounds", type=int, default=5)
    flags = parser.parse_args()
    device = choose_device(RunFlags())
    space = make_envs("ALE/Pong-v5", 1).single_observation_space

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # in its own process, so that its memory is not counted here
        code = f"import pathlib, benchmarks.offline as b; b.write_pong(pathlib.Path({name!r}), {flags.rows})"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
        before = peak_memory()

        kept = round(flags.fraction * (flags.rows - 1)) * 84 * 84
        head = f"| head -c {kept + 128}" if flags.fraction < 1 else ""
        gunzip, prepare = [], []
        for _ in range(flags.rounds):  # alternately, so that a drift in the machine's speed affects both
            start = time.perf_counter()
            command = f"gzip -dc '{folder}/$store$_observation_ckpt.0.gz' {head} > '{folder}/out'"
            subprocess.run(command.replace("$", r"\$").replace("'", '"'), shell=True, check=True)
            gunzip.append(time.perf_counter() - start)
            shutil.rmtree(folder / "cache", ignore_errors=True)
            start = time.perf_counter()
            rows = read_dataset(name, space, STACK, flags.fraction, None)
            prepare.append(time.perf_counter() - start)
        ratio = statistics.median(a / b for a, b in zip(gunzip, prepare))
        speeds = [kept / 1e6 / statistics.median(times) for times in (prepare, gunzip)]
        print(f"preparation: {speeds[0]:.0f} MB/s; gzip -dc into a file: {speeds[1]:.0f} MB/s; ratio {ratio:.2f}")

        replay = OfflineReplay(rows, STACK, 1, 0.99, device)
        for start in range(0, len(replay), 32):  # every frame is read
            replay.gather(torch.arange(start, min(start + 32, len(replay)), device=replay.device))
        print(f"memory: {(peak_memory() - before) / kept:.2f} of the {kept / 1e6:.0f} MB that are kept")

        args = Args(network=flags.network)
        networks = [make_networks(args, space, Discrete(6))["q_network"].to(device) for _ in range(2)]
        optimizer = torch.optim.Adam(networks[0].parameters(), fused=True)

        def update(batch) -> None:
            loss_terms(*networks, batch, None, args)[0].backward()
            optimizer.step()
            optimizer.zero_grad()
            if device.type == "cuda":
                torch.cuda.synchronize()

        def sample() -> None:
            replay.sample(args.batch_size)
            if device.type == "cuda":
                torch.cuda.synchronize()

        batch = replay.sample(args.batch_size)
        pairs = [(median_seconds(sample, 20), median_seconds(lambda: update(batch), 5)) for _ in range(flags.rounds)]
        fraction = statistics.median(a / (a + b) for a, b in pairs)
        sampling, rest = [1e3 * statistics.median(times) for times in zip(*pairs)]
        print(f"sampling: {sampling:.2f} ms; the rest of an update: {rest:.1f} ms; fraction {fraction:.1%}")


if __name__ == "__main__":
    main()
