"""All tests run on 8 fake CPU devices and share what XLA compiles."""

import os
import shutil
import tempfile

os.environ["JAX_PLATFORMS"] = "cpu"
if "TOKENFORMER_TESTS" not in os.environ:  # not yet set by the process that started this one
    os.environ["TOKENFORMER_TESTS"] = tempfile.mkdtemp(prefix="tokenformer_tests_")
    # Most of the time is compiling: a lower level makes it a quarter shorter.
    flags = "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
    os.environ["XLA_FLAGS"] = f"{flags} {os.environ.get('XLA_FLAGS', '')}"
    os.environ["JAX_COMPILATION_CACHE_DIR"] = os.path.join(os.environ["TOKENFORMER_TESTS"], "compiled")
    os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"


def pytest_sessionfinish(session):
    if not hasattr(session.config, "workerinput"):  # the first process, not a worker
        shutil.rmtree(os.environ["TOKENFORMER_TESTS"], ignore_errors=True)
