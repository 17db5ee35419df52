"""All tests run on 8 fake CPU devices and share what XLA compiles."""

import gc
import os
import shutil
import tempfile
from importlib.metadata import version

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
if "TOKENFORMER_TESTS" not in os.environ:  # not yet set by the process that started this one
    os.environ["TOKENFORMER_TESTS"] = tempfile.mkdtemp(prefix="tokenformer_tests_")
    # Most of the time is compiling: without optimization it is a third as long.
    flags = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"
    flags += " --xla_cpu_parallel_codegen_split_count=1 --xla_force_host_platform_device_count=8"
    if version("jaxlib").startswith("0.10."):  # newer ones do not know it
        flags += " --xla_cpu_use_fusion_emitters=false"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["TOKENFORMER_TESTS"], "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


@pytest.fixture
def tpu_compiler(monkeypatch):
    """For tests that compile for a TPU: its compiler ends the process at a flag that only the CPU's one knows."""
    import jax  # not before the flags are set

    jax.devices()  # the CPU's has read them
    monkeypatch.setenv("XLA_FLAGS", "")


@pytest.fixture(scope="module")
def steps_are_shared():
    """For files whose runs are resumed, repeated or read."""
    from tests.helpers import shared_steps  # not before the flags are set

    with shared_steps():
        yield


def pytest_runtest_setup():
    gc.freeze()  # each run of `train` collects garbage, which takes the longer the more earlier tests left


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):  # the first process, not a worker
        shutil.rmtree(os.environ["TOKENFORMER_TESTS"], ignore_errors=True)
