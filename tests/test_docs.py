"""The documentation says what the code does."""

import dataclasses
import hashlib
import importlib
import json
import re
import shutil
import sys
from pathlib import Path

import pytest
from conftest import run_python

from benchmarks import evidence
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
        ("cql_pruned", ["C51", "MINATAR", "CLASSIC_CONTROL"]),
        ("drq_sparse", ["EASY", "WALKER", "HUMANOID", "QUADRUPED_RUN", "PENDULUM"]),
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


PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def presets_of(module) -> dict[str, dict]:
    return {name: value for name, value in vars(module).items() if name.isupper() and isinstance(value, dict)}


def basis(name: str) -> str:
    """Digest of what a script's results rest on: its golden runs, and the defaults of its flags and presets. After the
    script may come the one preset that counts: dqn_sparse.MINATAR."""
    script, _, preset = name.partition(".")
    module = importlib.import_module(script)
    golden = json.loads((ROOT / "tests" / "golden.json").read_text())
    digests = {
        case: {method: run["digest"] for method, run in methods.items() if "digest" in run}
        for case, methods in golden.items()
        if case.split()[0] == script
    }
    presets = {preset: getattr(module, preset)} if preset else presets_of(module)
    flags = {field.name: field.default for field in dataclasses.fields(module.Args) if field.name not in RUNNING}
    content = json.dumps([digests, flags, presets], sort_keys=True, default=str)
    return hashlib.sha256(content.encode()).hexdigest()[:8]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_results_are_of_this_code_or_say_that_they_are_not(page):
    """Above each result that training gave is a comment, `<!-- measured with dqn_sparse 1a2b3c4d -->`, with the `basis`
    of every script that it rests on (this file, run as a program, prints them). When a script learns differently or its
    defaults change, measure again; or write below the comment that the result is of an earlier version."""
    text = page.read_text()
    marks = list(re.finditer(r"<!-- measured with (.*?) -->\n(.*?)(?=\n<!-- measured|\n#|\Z)", text, re.S))
    results = re.search(r"\n## Results\n(.*?)(\n## |\Z)", text, re.S)
    assert marks or not results or "\n|" not in results[1], f"{page.name}: its results do not say what they rest on"
    for mark in marks:
        for script, recorded in (part.split() for part in mark[1].split(", ")):
            line = text[: mark.start()].count("\n") + 1
            assert recorded == basis(script) or "an earlier version" in " ".join(mark[2].split()), (
                f"{page.name}, line {line}: these results are of another {script}, which has {basis(script)} now"
            )


@pytest.mark.parametrize("data", sorted((ROOT / "results").glob("*.csv")), ids=lambda path: path.name)
def test_tables_of_the_evidence_are_those_of_the_data(data):
    page = (ROOT / "docs" / "evidence.md").read_text()
    for cells in evidence.read(data).values():
        assert evidence.table(cells) in page
        assert evidence.diagnostics_table(cells) in page


@pytest.mark.parametrize("task", evidence.LEARNING_RATES)
def test_table_of_learning_rates_is_that_of_the_data(task):
    table = evidence.learning_rates_table(evidence.read_learning_rates(task))
    assert table in (ROOT / "docs" / "evidence.md").read_text()


def test_figures_of_the_evidence_are_those_that_are_drawn(tmp_path, monkeypatch):
    shutil.copytree(ROOT / "results", tmp_path / "results")
    (tmp_path / "docs").mkdir()
    monkeypatch.setattr(evidence, "ROOT", tmp_path)
    monkeypatch.setattr(sys, "argv", ["evidence.py", "draw"])
    evidence.main()
    page = (ROOT / "docs" / "evidence.md").read_text()
    assert {path.name for path in (tmp_path / "docs").iterdir()} == set(re.findall(r"\((evidence_\w+\.png)\)", page))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_within_the_repository_lead_somewhere(page):
    for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_the_readme_says_how_much_a_fork_brings_along():
    """The lines of utils that a run of dqn_sparse.py loads, to the nearest hundred."""
    code = "import sys, dqn_sparse, utils.curves as c\nfor name in sys.modules: name[:6] == 'utils.' and print(name)"
    loaded = run_python("-c", code).stdout.split()
    lines = sum(len((ROOT / f"{name.replace('.', '/')}.py").read_text().splitlines()) for name in loaded)
    assert f"needs the {round(lines, -2):,} lines in `utils/`" in " ".join((ROOT / "README.md").read_text().split())


if __name__ == "__main__":
    for script in sorted(path.stem for path in ROOT.glob("*_*.py")):
        presets = presets_of(importlib.import_module(script))
        for name in [script, *(f"{script}.{preset}" for preset in presets)]:
            print(name, basis(name))
