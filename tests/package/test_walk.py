"""The page of the way through the code and the picture of the rooms are what a script writes."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dare_hf import compat

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(
    compat.minor(compat.NEWEST) != compat.VERSION, reason="the page is of the newest transformers"
)
def test_the_page_and_the_picture_are_what_the_script_writes():
    """In a process of its own: what other tests have called before would be missing."""
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    script = [sys.executable, str(ROOT / "scripts" / "walk.py"), "--check"]
    done = subprocess.run(script, env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
