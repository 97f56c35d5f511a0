"""One torch thread in each worker of pytest-xdist: workers with many threads wait for each other at every core."""

import os

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for the programs that tests start
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
