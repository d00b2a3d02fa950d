"""What several scripts have under one name is the same in all, so that their `diff` shows the algorithms alone."""

import ast
import re

import pytest
from conftest import ROOT

SCRIPTS = ("dqn_sparse", "rainbow_pruned", "iqn_pruned", "cql_pruned", "sac_sparse", "drq_sparse")
DIFFERENT = {  # and why
    "main": "an algorithm of its own",
    "preset": "settings of its own",
    "td_loss": "a loss of its own",
    "make_networks": "heads as that loss needs them",
    "make_policy": "the policy of these networks",
    "make_greedy": "the same, as a module",
    "make_support": "without C51 there is none",
    "q_values": "without C51 the outputs are the values",
    "init_weights": "noisy layers, and Dopamine's initialisation of each agent",
    "Head.__init__": "outputs as the loss needs them",
    "Head.forward": "the same",
    "ResidualBlock.__init__": "SAC's block is SimBa's",
    "ResidualBlock.forward": "the same",
    "Actor.__init__": "DrQ-v2's actor is deterministic, on the features of a shared encoder",
    "Actor.forward": "the same",
    "actor_loss": "without entropy",
    "critic_loss": "the same",
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


TEXTS = {script: (ROOT / f"{script}.py").read_text() for script in SCRIPTS}
SOURCES = {script: functions(ast.parse(text)) for script, text in TEXTS.items()}


def versions(name: str) -> dict[str, str]:
    return {script: source[name] for script, source in SOURCES.items() if name in source}


NAMES = sorted({name for source in SOURCES.values() for name in source if len(versions(name)) > 1})


@pytest.mark.parametrize("name", [name for name in NAMES if name not in DIFFERENT])
def test_one_name_has_one_text(name):
    assert len(set(versions(name).values())) == 1


@pytest.mark.parametrize("name", DIFFERENT)
def test_no_exception_is_out_of_date(name):
    assert len(set(versions(name).values())) > 1


def test_the_sparsity_block_is_literally_the_same():
    """Comments, blank lines and all."""
    blocks = {re.search(r"^# ---- Sparsity -+$(.*?)^# ---- ", text, re.M | re.S)[1] for text in TEXTS.values()}
    assert len(blocks) == 1


@pytest.mark.parametrize("script", SCRIPTS)
def test_sections_come_in_one_order(script):
    rulers = re.findall(r"^ *# ---- (.*?) -+$", TEXTS[script], re.M)
    assert rulers == ["Networks", "Sparsity", "Losses and policy", "Agent", "Sparsity", "Loop"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_a_script_imports_neither_another_one_nor_the_analysis(script):
    nodes = list(ast.walk(ast.parse(TEXTS[script])))
    imported = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    imported |= {node.module for node in nodes if isinstance(node, ast.ImportFrom)}
    assert not imported & set(SCRIPTS) and not any("analysis" in name for name in imported)
