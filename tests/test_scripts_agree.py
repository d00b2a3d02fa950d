"""What several scripts have under one name is the same in all, so that their `diff` shows the algorithm alone."""

import ast
import importlib
from typing import get_type_hints

import pytest
from conftest import ROOT

from utils.flags import RANGES

SCRIPTS = ("dqn_sparse", "rainbow_pruned", "cql_pruned", "sac_sparse")
DIFFERENT = {  # and why
    "check": "flags of its own",
    "main": "an algorithm of its own",
    "preset": "settings of its own",
    "td_loss": "a loss of its own",
    "make_network": "heads and layers as that loss needs them",
    "NatureCNN.__init__": "the same",
    "ImpalaCNN.__init__": "the same",
    "MLP.__init__": "the same",
    "Head.__init__": "Rainbow's layers may be noisy",
    "q_values": "CQL's network may give values instead of distributions",
}
DIFFERENT_IN_SAC = {
    "ResidualBlock.__init__": "SimBa's block, not that of a ResNet",
    "ResidualBlock.forward": "the same",
    "prune": "each critic's layer keeps its own number of weights",
    "rewire": "the same",
}


def functions(tree: ast.AST, prefix: str = "") -> dict[str, str]:
    """Functions and methods by name, without comments."""
    found = {}
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            found[prefix + node.name] = ast.unparse(node)
        elif isinstance(node, ast.ClassDef):
            found |= functions(node, f"{node.name}.")
    return found


SOURCES = {script: functions(ast.parse((ROOT / f"{script}.py").read_text())) for script in SCRIPTS}


def versions(name: str, scripts: tuple[str, ...] = SCRIPTS) -> dict[str, str]:
    return {script: SOURCES[script][name] for script in scripts if name in SOURCES[script]}


NAMES = sorted({name for source in SOURCES.values() for name in source if len(versions(name)) > 1})


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DIFFERENT])
def test_one_name_has_one_meaning(name):
    found = versions(name, SCRIPTS[:3] if name in DIFFERENT_IN_SAC else SCRIPTS)
    first = next(iter(found))
    for script, source in found.items():
        assert source == found[first], f"{name} of {script}.py is not that of {first}.py"


@pytest.mark.parametrize("name", [*DIFFERENT, *DIFFERENT_IN_SAC])
def test_no_exception_is_out_of_date(name):
    assert len(set(versions(name).values())) > 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_every_number_among_the_flags_has_a_range(script):
    types = get_type_hints(importlib.import_module(script).Args)
    numbers = {name for name, kind in types.items() if kind in (int, float, int | None, float | None)}
    ranged = " ".join(names for _, names in RANGES.values()).split()
    assert len(ranged) == len(set(ranged))
    depend_on_others = {"total_timesteps", "learning_starts", "prune_start", "v_max"}
    may_be_anything = {"v_min", "target_entropy"}
    assert numbers - set(ranged) <= depend_on_others | may_be_anything
