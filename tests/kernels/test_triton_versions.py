"""Every shipped launch is built by the oldest and the newest Triton that ia3rt is meant for, too.

They are looked for in folders of their own, which IA3RT_TRITONS names, separated as in PATH:

    pip install --no-deps --target /tmp/triton-3.6 triton==3.6.0 && pip install --no-deps --target /tmp/triton-3.9 …
    IA3RT_TRITONS=/tmp/triton-3.6:/tmp/triton-3.9 python -m pytest -m slow tests/kernels/test_triton_versions.py

test_sass.py holds registers and instructions to what they have to be, with the Triton that is installed.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ia3rt.bench.compiled.build import all_cases

FOLDERS = [folder for folder in os.environ.get("IA3RT_TRITONS", "").split(os.pathsep) if folder]

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not FOLDERS, reason="IA3RT_TRITONS names no other Triton"),
]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: Path(folder).name)
def test_all_launches_are_built(folder) -> None:
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [folder, env.get("PYTHONPATH")]))
    where = subprocess.run(
        [sys.executable, "-c", "import triton; print(triton.__file__)"], env=env, capture_output=True, text=True
    )
    assert Path(where.stdout).is_relative_to(folder), where
    command = [sys.executable, "-m", "ia3rt.bench.compiled", "sm_90"]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr
    kernels = json.loads(done.stdout)
    assert kernels.keys() >= all_cases().keys()
    assert not [name for name, facts in kernels.items() if facts["wrong_dots"]]
