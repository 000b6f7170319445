"""The suite is one folder under two names: `bench` in the tree, `lowrank_fast.bench` when installed."""

from __future__ import annotations

import ast
import importlib
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "bench").glob("*.py"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_modules_of_the_suite_import_each_other_relatively(path):
    names = {other.stem for other in FILES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        absolute = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            absolute = [node.module]
        for name in absolute:
            assert not name.startswith(("bench", "lowrank_fast.bench")), f"{path.name} imports {name}"
            assert name not in names, f"{path.name} imports {name}, which is a module beside it"


def test_the_folder_imports_as_a_package_of_its_own(monkeypatch):
    before = set(sys.modules)
    monkeypatch.syspath_prepend(str(ROOT))
    try:
        suite = importlib.import_module("bench.cli")
        assert Path(suite.__file__).parent == ROOT / "bench"
        assert callable(suite.add_arguments)
        assert callable(suite.run)
    finally:
        for name in set(sys.modules) - before:
            if name.partition(".")[0] == "bench":
                del sys.modules[name]
