"""Python in a fresh process: for what is read once at import."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def run_python(code: str, *arguments: str, **environment: str | None) -> subprocess.CompletedProcess[str]:
    """Run `code` from the root of the repository, with these environment variables; None removes one."""
    variables = {**os.environ, "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    for name, value in environment.items():
        variables.pop(name, None)
        if value is not None:
            variables[name] = value
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=variables, cwd=REPOSITORY, capture_output=True, text=True, timeout=900)
