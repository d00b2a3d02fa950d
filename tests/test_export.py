"""`python -m utils.export`: what it writes, used without the repository; and what it refuses."""

import importlib
import importlib.util
import re
import shutil
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT, run_main
from test_every_script import FLAGS, train

from utils import export
from utils.analysis.results import load_model
from utils.records import read_evaluations

pytestmark = pytest.mark.filterwarnings("ignore:.torch.jit")
STREAM = {"env_id": "CartPole-v1", "algorithm": "q", "method": "random", "total_timesteps": 100}
RUNS = [
    ("dqn_sparse", {"method": "gmp", "sparsity": 0.95, "eval_epsilon": 0.0, "total_timesteps": 200}),
    ("rainbow_pruned", {"method": "rigl", "bias": False, "dueling": True, "total_timesteps": 200}),
    ("iqn_pruned", {"method": "set", "total_timesteps": 200}),
    ("cql_pruned", {"method": "rigl", "loss": "c51", "sparsity": 0.97, "total_updates": 50}),
    ("sac_sparse", {"method": "rigl", "rsnorm": True}),
    ("drq_sparse", {"method": "gmp", "sparsity": 0.95}),
    ("stream_sparse", STREAM),
]


@pytest.fixture(autouse=True)
def no_timing(monkeypatch):
    monkeypatch.setattr(export, "seconds", lambda functions: [len([function()]) for function in functions])


def trained(script: str, flags: dict, tmp_path):
    if script in FLAGS:
        return train(script, tmp_path / "runs", **flags)
    return run_main(importlib.import_module(script), tmp_path / "runs", **flags)[0]


def written(run, **flags):
    return export.main(export.Args(run, **{"episodes": 1} | flags))


def alone(folder, code: str) -> str:
    """What Python prints without the repository in its path."""
    ended = subprocess.run([sys.executable, "-I", "-c", code], cwd=folder, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    return ended.stdout


@pytest.mark.parametrize(("script", "flags"), RUNS, ids=[script for script, _ in RUNS])
def test_a_trained_policy_of_every_script(script, flags, tmp_path, capsys):
    """The files agree with the script's own policy, and the score is that of the run."""
    run = trained(script, flags, tmp_path)
    onnx = script in ("sac_sparse", "stream_sparse") and importlib.util.find_spec("onnxruntime") is not None
    out = written(run, csr="always", onnx=onnx)
    said = capsys.readouterr()
    assert "keeps all its units" not in said.err and (script == "stream_sparse" or "CSR" in said.out)
    score = re.search(r"\| mean return of 1 episodes \| (\S+) \| (\S+) \|", said.out)
    assert score[1] == score[2] == f"{read_evaluations(run)[-1, 2]:.4g}"

    model = load_model(run)
    policy = torch.jit.load(out / "policy.pt")
    size = (8, *model.observation_space.shape)
    obs = np.random.default_rng(0).normal(size=size).astype(np.float32)
    if script == "drq_sparse":
        obs = np.random.default_rng(0).integers(0, 256, size).astype(np.uint8)
    if script == "iqn_pruned":  # its own policy draws its fractions at random
        action = model.script.make_greedy(model.args, model.networks)(torch.from_numpy(obs)).argmax(1).numpy()
    else:
        model.args.eval_epsilon = 0.0
        rngs = [np.random.default_rng(0) for _ in obs]
        action = model.script.make_policy(model.args, model.networks)(obs, rngs)
    output = policy(torch.from_numpy(obs), *[torch.zeros(8)] * (script == "stream_sparse"))
    if script in ("sac_sparse", "drq_sparse"):
        np.testing.assert_allclose(output, 2 * action, rtol=1e-4, atol=1e-4)  # the bounds are -2 and 2
    else:
        assert output.argmax(1).tolist() == action.tolist()
    (example,) = re.findall(r"```python\n(.*?)```", (out / "README.md").read_text(), re.S)
    exec(example.replace("policy.pt", str(out / "policy.pt")), {})
    if onnx:
        onnx_agrees(out, policy)


def onnx_agrees(out, policy) -> None:
    import onnxruntime

    session = onnxruntime.InferenceSession(out / "policy.onnx")
    names = [each.name for each in session.get_inputs()]
    assert names == ["observation", "elapsed"][: len(names)]
    for n in (1, 5):
        inputs = [torch.randn(n, session.get_inputs()[0].shape[1]), torch.arange(n).float()][: len(names)]
        (output,) = session.run(None, {name: each.numpy() for name, each in zip(names, inputs)})
        np.testing.assert_allclose(output, policy(*inputs), rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return trained(
        "dqn_sparse", {"method": "random", "sparsity": 0.98, "total_timesteps": 200}, tmp_path_factory.mktemp("export")
    )


def test_the_examples_run_without_the_repository(run):
    """That of the page, and that of the model card."""
    out = written(run, csr="always")
    page, card = (ROOT / "docs" / "sparsity_that_pays.md").read_text(), (out / "README.md").read_text()
    front = card.split("---\n")[1]
    assert "license: mit\n" in front and "type: mean_reward" in front and "name: CartPole-v1" in front
    assert "--sparsity 0.98" in card and "--bias\n" in card
    examples = [re.findall(r"```python\n(.*?torch\.jit\.load.*?)```", text, re.S)[0] for text in (page, card)]
    total, values = alone(out, "\n".join(examples)).splitlines()
    assert float(total) >= 8 and values.startswith("tensor([[")  # the pole does not fall sooner


def test_the_weights_are_those_of_the_compact_network(run):
    from safetensors.torch import load_file

    weights = load_file(written(run, csr="always") / "model.safetensors")
    original = load_model(run).networks["q_network"].state_dict()
    assert weights.keys() == original.keys()
    assert weights["head.out.weight"].shape[0] == 2 and weights["torso.dense.weight"].shape[1] == 4
    assert sum(map(torch.numel, weights.values())) < sum(map(torch.numel, original.values()))
    assert set(weights["head.dense.weight"].flatten().tolist()) <= set(original["head.dense.weight"].flatten().tolist())


def test_sizes_and_flops_by_hand(run):
    task = export.open_task(run)
    network = task.build(task.model.networks)
    layers = [network.torso.dense, network.head.dense, network.head.out]
    dense = sum(each.weight.numel() for each in layers)
    assert export.sizes(network) == (
        dense + 512 + 512 + 2,
        sum(int(each.count_nonzero()) for each in network.parameters()),
    )
    assert export.mflops(network, task) == pytest.approx(2 * dense / 1e6)
    export.use_csr(network, task.example(1), always=True)
    assert export.mflops(network, task) == pytest.approx(
        2
        * sum(
            int(each.weight.values().numel() if each.weight.is_sparse_csr else each.weight.numel())
            for each in [network.torso.dense, network.head.dense, network.head.out]
        )
        / 1e6
    )


def fork(run, tmp_path, *changes: tuple[str, str]):
    """The run of a script that is not in the repository and differs from dqn_sparse.py."""
    folder = tmp_path / "fork"
    shutil.copytree(run, folder)
    text = (ROOT / "dqn_sparse.py").read_text()
    for old, new in changes:
        assert old in text
        text = text.replace(old, new)
    name = f"fork_{tmp_path.name}"
    (folder / f"{name}.py").write_text(text)
    content = torch.load(folder / "model.pt", weights_only=True)
    torch.save(content | {"script": name}, folder / "model.pt")
    return folder


@pytest.mark.parametrize(
    "forward",
    [
        "return F.relu(self.dense(x)) if x.sum() > 1e9 else F.relu(self.dense(x))",  # torch.export refuses it
        "return F.relu(self.dense(x)).view(-1, 512)",  # the number of units is in the code
    ],
)
def test_a_network_that_is_not_understood_keeps_its_units(run, forward, tmp_path, capsys):
    out = written(fork(run, tmp_path, ("return F.relu(self.dense(x))\n\n\nclass Head", f"{forward}\n\n\nclass Head")))
    said = capsys.readouterr()
    assert said.err.count("\n") == 1 and "keeps all its units" in said.err
    assert torch.jit.load(out / "policy.pt")(torch.zeros(3, 4)).shape == (3, 2)


def refused(capsys, run, **flags) -> str:
    with pytest.raises(SystemExit) as ended:
        written(run, **flags)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: ") and said.count("\n") == 1
    return said


def test_bad_input_is_one_line(run, tmp_path, capsys, monkeypatch):
    assert "no model.pt" in refused(capsys, tmp_path / "none")
    assert "make_greedy" in refused(capsys, fork(run, tmp_path, ("make_greedy", "other_name")))
    (tmp_path / "file").write_text("")
    assert "--out" in refused(capsys, run, out=tmp_path / "file")
    assert "--batch-size" in refused(capsys, run, batch_size=0)
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name in ("onnx", "safetensors") else find_spec(name)
    )
    assert "onnx" in refused(capsys, run, onnx=True)
    out = written(run, out=tmp_path / "out", episodes=0)
    assert sorted(path.name for path in out.iterdir()) == ["README.md", "policy.pt"]
    assert "pip install" in capsys.readouterr().err


def test_rounding_that_flips_an_action_is_named(run):
    task = export.open_task(run)
    dense = export.to_torchscript(task.build(task.model.networks), task.model.networks, task)
    with torch.no_grad():
        other = task.build(load_model(run).networks)
        other.head.out.bias += torch.tensor([100.0, 0.0])
    moved = export.to_torchscript(other, task.model.networks, task)
    obs = torch.randn(64, 4)
    flips = int((dense.script(obs).argmax(1) == 1).sum())
    assert f"flips the greedy action of {flips or 'none'}" in export.agreement(task, dense, moved, obs)
