"""The documentation says what the code does."""

import dataclasses
import importlib
import re
from pathlib import Path

import pytest
from conftest import run_script

from utils.flags import RunFlags

ROOT = Path(__file__).parent.parent
RUNNING = {field.name for field in dataclasses.fields(RunFlags)} - {"eval_every", "eval_episodes"}
RUNNING |= {"env_id", "seed", "dataset", "save_dataset"}


def shown(value):
    if isinstance(value, bool):
        return str(value).lower()
    return f"{value:,}" if isinstance(value, int) and value >= 1000 else str(value)


@pytest.mark.parametrize(
    ("script", "presets"),
    [
        ("dqn_sparse", ["MINATAR", "CLASSIC_CONTROL"]),
        ("sac_sparse", ["CLEANRL", "PENDULUM"]),
        ("rainbow_pruned", ["MINATAR", "CLASSIC_CONTROL"]),
        ("iqn_pruned", ["MINATAR", "CLASSIC_CONTROL"]),
        ("cql_pruned", ["C51", "CLASSIC_CONTROL"]),
        ("drq_sparse", ["EASY", "HUMANOID", "QUADRUPED_RUN", "PENDULUM"]),
        ("stream_sparse", []),
    ],
)
def test_hyperparameter_table_is_that_of_the_script(script, presets):
    """Its columns are the flag, the default, one for each preset, and the source."""
    module = importlib.import_module(script)
    presets = [getattr(module, preset) for preset in presets]
    expected = {
        f"--{field.name.replace('_', '-')}": [
            shown(field.default),
            *(shown(preset[field.name]) if field.name in preset else "" for preset in presets),
        ]
        for field in dataclasses.fields(module.Args)
        if field.name not in RUNNING
    }
    page = (ROOT / "docs" / f"{script}.md").read_text()
    rows = re.findall(r"^\| `(--[\w-]+)` \|(.*)\|.*\|$", page, re.M)
    assert {flag: [value.strip() for value in values.split("|")] for flag, values in rows} == expected


@pytest.mark.parametrize("page", [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))], ids=lambda p: p.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_says_how_much_a_fork_brings_along():
    """The lines of utils that a run of dqn_sparse.py loads, to the nearest hundred."""
    code = "import sys, dqn_sparse, utils.curves as c\nfor name in sys.modules: name[:6] == 'utils.' and print(name)"
    loaded = run_script("-c", code).stdout.split()
    lines = sum(len((ROOT / f"{name.replace('.', '/')}.py").read_text().splitlines()) for name in loaded)
    assert f"needs the {round(lines, -2):,} lines in `utils/`" in " ".join((ROOT / "README.md").read_text().split())
