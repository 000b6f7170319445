"""What is built and installed, with a compiler and without one; and that the documents tell the truth.

The slow tests build wheels from a copy of the sources in a temporary folder.
"""

from __future__ import annotations

import importlib.util
import re
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import pytest

import lowrank_fast

from .support.process import REPOSITORY

SOURCES = (
    "setup.py",
    "pyproject.toml",
    "README.md",
    "LICENSE",
    "MANIFEST.in",
    "lowrank_fast",
    "triton_kernels",
    "bench",
)


@pytest.fixture
def setup_script(monkeypatch):
    """`setup.py` as a module, not run."""
    spec = importlib.util.spec_from_file_location("lowrank_fast_setup", REPOSITORY / "setup.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, spec.name, module)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path):
    """A copy of the sources without anything built, and without csrc."""
    for name in SOURCES:
        source = REPOSITORY / name
        if source.is_dir():
            shutil.copytree(
                source, tmp_path / "tree" / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results")
            )
        elif source.exists():
            (tmp_path / "tree").mkdir(exist_ok=True)
            shutil.copy(source, tmp_path / "tree" / name)
    return tmp_path / "tree"


def build_wheel(tree: Path, monkeypatch: pytest.MonkeyPatch, **environment: str) -> tuple[Path | None, str]:
    """`pip wheel` without build isolation: the wheel, or None where the build failed, and all that was printed."""
    for name in ("LOWRANK_FAST_BUILD", "LOWRANK_FAST_BUILD_CUDA", "CXX"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    target = tree.parent / "wheels"
    command = [sys.executable, "-m", "pip", "wheel", "-v", "--no-deps", "--no-build-isolation", "-w", str(target), "."]
    done = subprocess.run(command, cwd=tree, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=600)
    wheels = list(target.glob("*.whl"))
    assert (done.returncode == 0) == (len(wheels) == 1), done.stdout
    return (wheels[0] if wheels else None), done.stdout


def contents(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


# ------------------------------------------------------------------------------------------------ what setup.py decides


def test_without_torch_auto_says_how_to_build_the_kernels(setup_script, monkeypatch):
    monkeypatch.setenv("LOWRANK_FAST_BUILD", "auto")
    monkeypatch.setenv("LOWRANK_FAST_BUILD_CUDA", "0")  # its torch, where there is one, is another question
    monkeypatch.setattr(setup_script, "find_spec", lambda name: None)
    report: list[str] = []
    assert setup_script.chosen_parts(report) == {}
    assert "`pip install --no-build-isolation .` builds the kernels" in report[0]


@pytest.mark.parametrize(("name", "value"), [("find_spec", lambda name: None), ("shutil", None)])
def test_with_1_what_is_missing_is_an_error(setup_script, monkeypatch, name, value):
    monkeypatch.setenv("LOWRANK_FAST_BUILD", "1")
    monkeypatch.setenv("CXX", "/nonexistent/c++")
    if value is not None:
        monkeypatch.setattr(setup_script, name, value)
    with pytest.raises(SystemExit, match="LOWRANK_FAST_BUILD=1, but the C\\+\\+ CPU kernels cannot be built: "):
        setup_script.chosen_parts([])


def test_with_0_nothing_is_built(setup_script, monkeypatch):
    monkeypatch.setenv("LOWRANK_FAST_BUILD", "0")
    monkeypatch.setenv("LOWRANK_FAST_BUILD_CUDA", "0")
    report: list[str] = []
    assert setup_script.chosen_parts(report) == {}
    assert report == [
        "C++ CPU kernels left out: LOWRANK_FAST_BUILD=0",
        "CUDA kernels left out: LOWRANK_FAST_BUILD_CUDA=0",
    ]


def test_another_value_is_an_error(setup_script, monkeypatch):
    monkeypatch.setenv("LOWRANK_FAST_BUILD", "yes")
    with pytest.raises(SystemExit, match="LOWRANK_FAST_BUILD must be auto, 0 or 1; got 'yes'"):
        setup_script.chosen_parts([])


def test_a_torch_that_does_not_import_leaves_the_kernels_out(setup_script, monkeypatch):
    def fail():
        raise ImportError("libtorch_cpu.so: cannot open shared object file")

    broken = setup_script.Part("C++ CPU kernels", "LOWRANK_FAST_BUILD", lambda: None, fail)
    monkeypatch.setattr(setup_script, "PARTS", (broken,))
    monkeypatch.setenv("LOWRANK_FAST_BUILD", "auto")
    report: list[str] = []
    assert setup_script.chosen_parts(report) == {}
    assert report == ["C++ CPU kernels left out: ImportError: libtorch_cpu.so: cannot open shared object file"]


def test_triton_kernels_and_bench_are_installed_inside_the_package(setup_script):
    packages = setup_script.packages()
    assert "lowrank_fast.bench" in packages
    assert all(name.split(".")[0] == "lowrank_fast" for name in packages)
    for name in packages:
        parts = name.split(".")
        folder = Path(*parts[1:]) if parts[1:2] in (["bench"], ["triton_kernels"]) else Path(*parts)
        assert list((REPOSITORY / folder).glob("*.py")), name


# ------------------------------------------------------------------------------------------------ wheels


@pytest.mark.slow
def test_the_pure_wheel_installs_imports_and_verifies_in_a_clean_environment(tree, tmp_path, monkeypatch):
    wheel, printed = build_wheel(tree, monkeypatch, LOWRANK_FAST_BUILD="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "lowrank_fast: C++ CPU kernels left out: LOWRANK_FAST_BUILD=0" in printed
    files = contents(wheel)
    assert not [name for name in files if name.endswith(".so")]
    assert {"lowrank_fast/py.typed", "lowrank_fast/cli.py", "lowrank_fast/bench/cli.py"} <= files
    assert not [name for name in files if name.split("/")[0] in ("bench", "triton_kernels", "tests", "csrc")]

    python = clean_environment(tmp_path / "venv")
    done = subprocess.run(
        [python, "-m", "pip", "install", "--no-deps", "--no-index", wheel], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    where = "import lowrank_fast, lowrank_fast.bench as b; print(lowrank_fast.__file__, b.__file__)"
    found = subprocess.run([python, "-c", where], capture_output=True, text=True, cwd=tmp_path, check=True)
    assert found.stdout.count(str(tmp_path / "venv")) == 2
    command = python.parent / "lowrank-fast"
    done = subprocess.run([command, "verify", "--quick"], capture_output=True, text=True, cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " 0 failed in " in done.stdout
    assert "not verified: cpu (the C++ extension is not built" in done.stdout


def clean_environment(folder: Path) -> Path:
    """A virtual environment that sees this one's installed packages, but not its editable `lowrank_fast`.

    Path files are read only in an environment's own folder, so the finder of an editable install stays out.
    """
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    own = subprocess.run(
        [python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"],
        capture_output=True,
        text=True,
        check=True,
    )
    Path(own.stdout.strip(), "shared.pth").write_text(sysconfig.get_path("purelib") + "\n")
    return python


@pytest.mark.slow
def test_a_failing_compile_leaves_a_pure_package_and_says_so_last(tree, monkeypatch):
    (tree / "csrc" / "cpu").mkdir(parents=True)
    (tree / "csrc" / "bindings.cpp").write_text("#error this does not compile\n")
    wheel, printed = build_wheel(tree, monkeypatch, LOWRANK_FAST_BUILD="auto")
    assert not [name for name in contents(wheel) if name.endswith(".so")]
    lines = [line.strip() for line in printed.splitlines()]
    ours = [line for line in lines if line.startswith("lowrank_fast: ") and "CUDA kernels" not in line]
    assert ours[0].startswith("lowrank_fast: C++ CPU kernels LEFT OUT, their build FAILED")
    assert ours[1] == "lowrank_fast: the package works without them; LOWRANK_FAST_BUILD=1 turns this into an error"
    assert printed.index("this does not compile") < printed.index("LEFT OUT")


@pytest.mark.slow
def test_a_failing_compile_is_an_error_when_the_kernels_were_asked_for(tree, monkeypatch):
    (tree / "csrc" / "cpu").mkdir(parents=True)
    (tree / "csrc" / "bindings.cpp").write_text("#error this does not compile\n")
    wheel, printed = build_wheel(tree, monkeypatch, LOWRANK_FAST_BUILD="1")
    assert wheel is None
    assert "this does not compile" in printed


@pytest.mark.slow
def test_without_a_compiler_the_wheel_is_pure(tree, monkeypatch):
    shutil.copytree(REPOSITORY / "csrc", tree / "csrc")
    wheel, printed = build_wheel(tree, monkeypatch, CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "C++ CPU kernels left out: no C++ compiler 'no-such-compiler' was found" in printed


# ------------------------------------------------------------------------------------------------ documents


def test_the_readme_example_runs():
    blocks = re.findall(r"^```python\n(.*?)^```", (REPOSITORY / "README.md").read_text(encoding="utf-8"), re.M | re.S)
    assert blocks
    names: dict[str, object] = {}
    for block in blocks:
        exec(compile(block, "README.md", "exec"), names)


def test_the_readme_table_lists_every_environment_variable_that_the_code_reads():
    pattern = re.compile(r"\bLOWRANK_FAST_[A-Z_]+\b")
    folders = ("lowrank_fast", "bench", "triton_kernels", "csrc", "tests")
    files = [
        path
        for folder in folders
        for path in (REPOSITORY / folder).rglob("*")
        if path.suffix in (".py", ".cpp", ".h", ".sh")
    ]
    read = set(pattern.findall((REPOSITORY / "setup.py").read_text(encoding="utf-8")))
    for path in files:
        read |= set(pattern.findall(path.read_text(encoding="utf-8")))
    table = [
        line
        for line in (REPOSITORY / "README.md").read_text(encoding="utf-8").splitlines()
        if line.startswith("| `LOW")
    ]
    documented = {pattern.search(line).group() for line in table}
    assert documented == read


def test_the_changelog_has_an_entry_for_this_version():
    text = (REPOSITORY / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(rf"^## \[{re.escape(lowrank_fast.__version__)}\]", text, re.M)


def test_documents_name_only_files_and_targets_that_exist():
    for name in ("README.md", "CONTRIBUTING.md"):
        text = (REPOSITORY / name).read_text(encoding="utf-8")
        for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
            assert (REPOSITORY / path).exists(), f"{name}: {path}"
        makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
        for target in re.findall(r"`make ([a-z-]+)", text):
            assert re.search(rf"^{target}:", makefile, re.M), f"{name}: make {target}"
