"""Golden runs: every script with every method trains to the same weights as when these numbers were recorded.

They guard refactors, and each ends with exact masks. A change that is meant to alter learning records them anew, in a
commit that says so; test_docs.py then names the published results that rest on the old ones:

    PYTHONPATH=.:tests python tests/test_golden.py                # all, or only those named: drq_sparse ...
"""

import hashlib
import importlib
import json
import platform
import sys
import tempfile
from pathlib import Path
from typing import get_args, get_type_hints

import numpy as np
import pytest
import torch
from conftest import check_exact_masks, run_main

GOLDEN = Path(__file__).with_name("golden.json")
METHODS = ("dense", "random", "gmp", "rigl", "set")
# Random actions, so that rounding errors cannot change what is learned from; 100 updates of small networks.
ONLINE = {
    "env_id": "CartPole-v1",
    "total_timesteps": 600,
    "learning_starts": 200,
    "buffer_size": 400,
    "num_envs": 2,
    "target_network_frequency": 50,
    "eval_episodes": 1,
    "end_e": 1.0,
    "sparsity": 0.9,
}
FLAGS = {
    "dqn_sparse": ONLINE,
    "rainbow_pruned": ONLINE | {"n_step": 3, "double": True, "dueling": True, "n_atoms": 11},
    "iqn_pruned": ONLINE | {"n_quantiles": 4, "n_target_quantiles": 5, "n_policy_quantiles": 3, "double": True},
    "cql_pruned": {
        "env_id": "CartPole-v1",
        "network": "mlp",
        "total_updates": 100,
        "eval_every": 1_000,
        "eval_episodes": 1,
        "data_fraction": 1.0,
        "target_network_frequency": 20,
        "loss": "c51",
        "n_step": 3,
        "sparsity": 0.9,
    },
    "sac_sparse": {
        "env_id": "Pendulum-v1",
        "network": "mlp",
        "total_timesteps": 150,
        "learning_starts": 100,
        "batch_size": 32,
        "num_critics": 2,
        "eval_episodes": 1,
        "sparsity": 0.8,
    },
    "drq_sparse": {
        "env_id": "tests.dot:Dot-v0",
        "frame_size": 15,
        "hidden_dim": 32,
        "feature_dim": 16,
        "total_timesteps": 150,
        "learning_starts": 100,
        "replay_ratio": 1.0,
        "batch_size": 16,
        "eval_episodes": 1,
        "sparsity": 0.8,
    },
}
FLAGS["iqn_pruned munchausen"] = FLAGS["iqn_pruned"] | {"munchausen": True, "double": False}
FLAGS["sac_sparse simba"] = FLAGS["sac_sparse"] | {"network": "simba", "total_timesteps": 110}


def this_platform() -> dict[str, str]:
    return {
        "torch": torch.__version__.split("+")[0],
        "numpy": np.__version__.rsplit(".", 1)[0],
        "machine": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()} {cpu_model()}",
    }


def cpu_model() -> str:
    """Libraries choose their kernels by it, and kernels round each in their own way."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    wanted = [line.split(":")[1].strip() for line in lines if line.startswith(("model name", "cpu family", "model\t"))]
    return ", ".join(dict.fromkeys(wanted))


def finished(case: str, method: str, folder: Path) -> dict:
    """The model of a whole run."""
    flags = FLAGS[case] | ({"dataset": str(dataset(folder / "data"))} if case == "cql_pruned" else {})
    run, _ = run_main(importlib.import_module(case.split()[0]), folder / "runs", method=method, **flags)
    return torch.load(run / "model.pt", weights_only=True)


def fingerprint(networks: dict) -> dict:
    """Digest of all weights, and for each network their sum and sum of squares in float64."""
    digest, sums = hashlib.sha256(), {}
    for name, network in networks.items():
        flat = torch.cat([tensor.flatten().double() for tensor in network.values()])
        digest.update(flat.numpy().tobytes())
        sums[name] = [flat.sum().item(), flat.square().sum().item()]
    return {"digest": digest.hexdigest()[:16], "sums": sums}


def dataset(folder: Path) -> Path:
    """300 logged steps of random actions, the same at every call."""
    if not folder.exists():
        import dqn_sparse

        flags = ONLINE | {"total_timesteps": 300, "save_dataset": str(folder), "num_envs": 1}
        run_main(dqn_sparse, folder.parent / "log", method="dense", **flags)
    return folder


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", FLAGS)
def test_golden_run(case, method, tmp_path):
    golden = json.loads(GOLDEN.read_text())
    if method not in golden[case]:
        pytest.skip(f"{case} has no {method}")
    model = finished(case, method, tmp_path)
    check_exact_masks(model, method, FLAGS[case]["sparsity"])
    found, expected = fingerprint(model["networks"]), golden[case][method]
    for name, sums in expected["sums"].items():
        # elsewhere other kernels round otherwise, and a weight at the threshold of a mask may fall on its other side
        np.testing.assert_allclose(found["sums"][name], sums, rtol=1e-2, atol=0.5)
    if golden[case].get("platform", golden["platform"]) == this_platform():
        assert found["digest"] == expected["digest"]


def record(cases: list[str]) -> None:
    """Records these cases anew, each with the platform; or all of them."""
    golden = json.loads(GOLDEN.read_text()) if cases else {"platform": this_platform()}
    for case in cases or FLAGS:
        methods = get_args(get_type_hints(importlib.import_module(case.split()[0]).Args)["method"])
        golden[case] = {"platform": this_platform()} if cases else {}
        for method in methods:
            with tempfile.TemporaryDirectory() as folder:
                golden[case][method] = fingerprint(finished(case, method, Path(folder))["networks"])
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    record(sys.argv[1:])
