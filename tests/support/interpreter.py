"""Tests of Triton's kernels in its interpreter, which needs no GPU."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

_SWITCH = "TRITON_INTERPRET"
INTERPRETS = os.environ.get(_SWITCH) == "1"
interpreted = pytest.mark.skipif(not INTERPRETS, reason="in a process of its own: test_the_kernels_in_the_interpreter")


def run_interpreted(file: str) -> None:
    """Run a test module's other tests in a process of its own: Triton looks at the environment when it is imported."""
    pytest.importorskip("triton", reason="Triton is not installed (`make test-all` does)")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", file, "-p", "no:xdist", "-p", "no:cacheprovider", "-k", "not interpreter"],
        env=os.environ | {_SWITCH: "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout
    assert "skipped" not in run.stdout
