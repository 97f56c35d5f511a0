"""One torch thread in each worker of pytest-xdist: workers with many threads wait for each other at every core.

Makes `toy` importable by all tests: pytest does not put their folder on the path, where it would hide our packages.
"""

import importlib.util
import os
import sys
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for the programs that tests start
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

spec = importlib.util.spec_from_file_location("toy", Path(__file__).with_name("toy.py"))
assert spec is not None
assert spec.loader is not None
module = importlib.util.module_from_spec(spec)
sys.modules["toy"] = module
spec.loader.exec_module(module)
