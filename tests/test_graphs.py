"""What a CUDA graph would do, on a CPU: the operations of one call are recorded with their tensors, and replayed."""

import contextlib
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import CARTPOLE, load, run_main, same
from pretend_gpu import CPU, GPU, pretend_gpu
from torch.utils._python_dispatch import TorchDispatchMode

import cql_pruned
import dqn_sparse
import drq_sparse
import iqn_pruned
import rainbow_pruned
import sac_sparse
from utils import graphs

SYNCS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim", "is_nonzero")


class Recording(TorchDispatchMode):
    """Records the operations that run inside it. `replay` runs them again on the very same tensors.

    Whatever makes the host wait for a GPU cannot be recorded, as in a CUDA graph: numbers read from a tensor, results
    whose shape depends on values, an index by a bool mask.
    """

    def __init__(self) -> None:
        super().__init__()
        self.operations = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function.overloadpacket.__name__
        indices = [i for i in args[1] if i is not None] if name in ("index", "index_put_", "index_put") else []
        if name in SYNCS or any(i.dtype == torch.bool for i in indices):
            raise RuntimeError(f"{name} makes the host wait")
        result = function(*args, **kwargs)
        first = result[0] if isinstance(result, tuple | list) and result else result
        is_view = function.is_view and first.untyped_storage().data_ptr() == args[0].untyped_storage().data_ptr()
        if not is_view:  # a view needs no replay
            self.operations.append((function, args, kwargs, result))
        return result

    @torch.inference_mode()
    def replay(self) -> None:
        for function, args, kwargs, recorded in self.operations:
            result = function(*args, **kwargs)
            new, old = (list(x) if isinstance(x, tuple | list) else [x] for x in (result, recorded))
            for n, o in zip(new, old):
                if isinstance(n, torch.Tensor) and n is not o and n.data_ptr() != o.data_ptr():
                    o.copy_(n)  # at the address that the later operations read


def recorded(function, enabled):
    """`cuda_graph` as it is on a GPU, with Recording for a graph."""
    assert enabled
    recording, calls, result = Recording(), 0, None

    def replayed():
        nonlocal calls, result
        calls += 1
        if calls <= graphs.EAGER_CALLS:
            return function()
        if calls == graphs.EAGER_CALLS + 1:
            with recording:  # on a CPU this call really runs: it is the first replay
                result = function()
            return result
        recording.replay()
        return result

    return replayed


def trained(script, runs_dir: Path, flags: dict) -> dict:
    return load(run_main(script, runs_dir, **flags)[0] / "model.pt")


# 200 or more updates, so that several lie between two changes of a mask
DQN = CARTPOLE | {"replay_ratio": 1.0, "total_timesteps": 320}
SAC = {
    "env_id": "Pendulum-v1",
    "network": "mlp",
    "total_timesteps": 300,
    "learning_starts": 200,
    "batch_size": 16,
    "eval_episodes": 1,
    "replay_ratio": 2.0,
    "device": "cpu",
}
DRQ = {
    "env_id": "tests.dot:Dot-v0",
    "frame_size": 15,
    "hidden_dim": 16,
    "total_timesteps": 300,
    "learning_starts": 100,
    "exploration_steps": 200,
    "batch_size": 4,
    "eval_episodes": 1,
    "device": "cpu",
}
IQN = CARTPOLE | {"n_quantiles": 8, "n_target_quantiles": 8, "n_policy_quantiles": 8}
ATARI = {"env_id": "ALE/Pong-v5", "network": "nature", "method": "random", "total_timesteps": 200, "batch_size": 4}
RUNS = {
    "dqn gmp": (dqn_sparse, DQN | {"method": "gmp", "n_step": 3, "num_envs": 2}),
    "dqn rigl": (dqn_sparse, DQN | {"method": "rigl", "double": True}),
    "dqn Atari": (dqn_sparse, CARTPOLE | ATARI),
    "rainbow gmp": (rainbow_pruned, DQN | {"method": "gmp"}),
    "rainbow noisy": (rainbow_pruned, CARTPOLE | {"method": "random", "noisy": True, "dueling": True}),
    "iqn rigl": (iqn_pruned, IQN | {"method": "rigl"}),
    "m-iqn gmp": (iqn_pruned, IQN | {"method": "gmp", "munchausen": True}),
    "sac gmp": (sac_sparse, SAC | {"method": "gmp", "num_envs": 2}),
    "sac rigl": (sac_sparse, SAC | {"method": "rigl"}),
    "ddpg simba": (
        sac_sparse,
        SAC | {"algorithm": "ddpg", "network": "simba", "method": "random", "replay_ratio": 0.5},
    ),
    "drq gmp": (drq_sparse, DRQ | {"method": "gmp"}),
}


@pytest.fixture(autouse=True)
def no_evaluation(monkeypatch):
    """No graph is replayed there, and Pong is long."""
    monkeypatch.setattr("utils.runs.evaluate", lambda *args, **keywords: (np.zeros(1), np.zeros(1, dtype=int)))


def trained_on_gpu(script, runs_dir: Path, flags: dict, monkeypatch, memory: int = 10**12) -> dict:
    """As `trained`, on the pretended GPU, where an operation that mixes devices raises.

    Args:
        memory: free bytes of that GPU.
    """
    monkeypatch.setattr(script, "choose_device", lambda args: GPU)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (memory, memory))
    with pretend_gpu():
        return trained(script, runs_dir, flags)


@pytest.fixture
def logged(train, tmp_path) -> dict:
    """Flags of cql_pruned."""
    train(save_dataset=str(tmp_path / "data"))
    return {"dataset": str(tmp_path / "data"), "total_updates": 200, "eval_every": 50, "loss": "c51", "method": "gmp"}


@pytest.mark.parametrize("run", RUNS)
def test_replays_train_the_same_weights(run, tmp_path, monkeypatch):
    script, flags = RUNS[run]
    eager = trained(script, tmp_path / "eager", flags)
    monkeypatch.setattr(script, "cuda_graph", recorded)
    replayed = trained_on_gpu(script, tmp_path / "replayed", flags, monkeypatch)
    assert same(eager["networks"], replayed["networks"]) and same(eager["masks"], replayed["masks"])


def test_replays_train_the_same_weights_offline(logged, tmp_path, monkeypatch):
    eager = trained(cql_pruned, tmp_path / "eager", logged)
    monkeypatch.setattr(cql_pruned, "cuda_graph", recorded)
    replayed = trained_on_gpu(cql_pruned, tmp_path / "replayed", logged, monkeypatch)
    assert same(eager["networks"], replayed["networks"]) and same(eager["masks"], replayed["masks"])


@pytest.mark.parametrize("run", ["rainbow gmp", "drq gmp"])
def test_a_gpu_too_small_for_the_replay(run, tmp_path, monkeypatch, capsys):
    """The replay stays in host memory, and training and diagnostics go on without graphs."""
    script, flags = RUNS[run]
    flags = flags | {"total_timesteps": flags["learning_starts"] + 60, "diagnostics_every": 50}
    expected = trained(script, tmp_path / "cpu", flags)
    found = trained_on_gpu(script, tmp_path / "gpu", flags, monkeypatch, memory=0)
    assert "host memory" in capsys.readouterr().out
    assert same(expected["networks"], found["networks"]) and same(expected["masks"], found["masks"])


def test_a_gpu_too_small_for_the_dataset(logged, tmp_path, monkeypatch, capsys):
    flags = logged | {"total_updates": 100, "diagnostics_every": 50}
    expected = trained(cql_pruned, tmp_path / "cpu", flags)
    found = trained_on_gpu(cql_pruned, tmp_path / "gpu", flags, monkeypatch, memory=0)
    assert "host memory" in capsys.readouterr().out
    assert same(expected["networks"], found["networks"]) and same(expected["masks"], found["masks"])


def test_the_pretended_gpu_refuses_to_mix_devices():
    with pretend_gpu():
        here, there = torch.ones(2, requires_grad=True), torch.ones(2, device=GPU)
        assert (there * torch.tensor(3.0)).device == there.sum().device == here.to(GPU).device == GPU
        assert (here * 2).device == there.cpu().device == CPU
        for mixing in (lambda: here + there, lambda: here * there.sum(), lambda: torch.stack((here, there))):
            with pytest.raises(RuntimeError, match="same device"):
                mixing()
        with pytest.raises(TypeError, match="numpy"):
            there.numpy()


def test_a_capture_that_fails_is_a_note_and_training_continues(tmp_path, monkeypatch, capsys):
    """On a machine without CUDA every capture fails; streams and generators are replaced, as there are none."""

    class NoStream:
        def wait_stream(self, other) -> None: ...

    class StuckGenerator:  # until its state is replaced by a clone, which expects no end of a capture
        stuck = True

        def clone_state(self) -> str:
            return "clone"

        def graphsafe_set_state(self, state: str) -> None:
            self.stuck = state != "clone"

    generator = StuckGenerator()

    def refuse(*args, **kwargs):
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: None)
    monkeypatch.setattr(torch.cuda, "graph", refuse)
    monkeypatch.setattr(torch.cuda, "Stream", NoStream)
    monkeypatch.setattr(torch.cuda, "current_stream", NoStream)
    monkeypatch.setattr(torch.cuda, "stream", lambda stream: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "default_generators", (generator,))
    monkeypatch.setattr(graphs, "capture_failed", False)
    expected = trained(dqn_sparse, tmp_path / "eager", DQN)
    monkeypatch.setattr(dqn_sparse, "cuda_graph", lambda function, enabled: graphs.cuda_graph(function, True))
    capsys.readouterr()
    found = trained(dqn_sparse, tmp_path / "refused", DQN)
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1 and "not permitted" in notes[0]
    assert not generator.stuck
    assert same(expected["networks"], found["networks"]) and same(expected["masks"], found["masks"])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_random_numbers_go_on_after_a_capture_that_fails(monkeypatch, capsys):
    monkeypatch.setattr(graphs, "capture_failed", False)
    captured = graphs.cuda_graph(lambda: torch.rand(4, device="cuda"), enabled=True)
    waiting = graphs.cuda_graph(lambda: torch.rand(4, device="cuda").sum().item(), enabled=True)
    for _ in range(graphs.EAGER_CALLS + 2):
        captured()
    sums = {waiting() for _ in range(graphs.EAGER_CALLS + 2)}
    assert "note: training continues" in capsys.readouterr().err
    assert len(sums) == graphs.EAGER_CALLS + 2
    assert not torch.equal(captured().clone(), captured())


def test_without_a_gpu_the_function_is_itself():
    def function():
        return 1

    assert graphs.cuda_graph(function, enabled=False) is function


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("run", RUNS)
def test_on_a_gpu_graphs_train_the_same_weights(run, tmp_path):
    script, flags = RUNS[run]
    # The first updates: later on, one rounding error may flip an action, and with it everything
    learning_starts = flags["learning_starts"]
    flags = flags | {"device": "cuda", "tf32": False, "total_timesteps": learning_starts + 20, "target_entropy": -1.0}
    flags = {name: value for name, value in flags.items() if hasattr(script.Args, name)}
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        eager, replayed = (
            trained(script, tmp_path / str(on), flags | {"cuda_graph": on})["networks"] for on in (False, True)
        )
    finally:
        torch.use_deterministic_algorithms(False)
    for name, network in eager.items():
        for key, weight in network.items():
            torch.testing.assert_close(replayed[name][key], weight, rtol=1e-3, atol=1e-4)
