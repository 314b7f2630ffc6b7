"""Every test runs on eight fake CPU devices, under strict promotion, with most XLA optimisations off, in one of two tiers.

The default run has every row of every table with a test that costs little, a numeric one for every function, method,
model, library and kind of mesh. `-m thorough` has what proves more about the same rows: its mark names the test of the
default run that stands for it, and tests/test_tiers.py looks whether it does. A part of the thorough tier, chosen by the
commit, rides along in the default run: `--share` and the header say which.
"""

import atexit
import os
import shutil
import tempfile
from importlib.metadata import version

# Before jax is imported: the number of devices is read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Compiling is most of what the tests do, and takes half as long without LLVM's expensive passes; XLA's own are those of
# every user. JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest has all of them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")
# What one process has compiled, no other of the run compiles again: not a worker, not a process that a test starts. A
# folder that is named outside is kept, and the next run takes half the time.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp(prefix="jlora-compiled-")
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], ignore_errors=True)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
# XLA of JAX 0.10 takes tuning flags of its own for features that the CPU lacks, and says so whenever it reads a program.
if version("jax").startswith("0.10."):
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from collections.abc import Iterator

import jax
import pytest

from tests import memory, tiers

pytest.register_assert_rewrite("tests.conformance")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--share",
        default=os.environ.get("JLORA_SHARE"),
        help="which part of the thorough tier rides along in the default run: '7/20' is the eighth twentieth, '4' the "
        "quarter that the commit chooses, 'none' none; '20' unless this, or JLORA_SHARE, says otherwise",
    )


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "loose_promotion: runs third-party code that mixes dtypes or ranks, so promotion is not strict"
    )
    config.addinivalue_line(
        "markers", "once: says nothing about the version of JAX, or takes long; .ci/run runs it on the newest alone"
    )
    config.addinivalue_line(
        "markers",
        "thorough(stand_in): too dear for the default run, where the test of that name stands for the same rows",
    )
    config.addinivalue_line("markers", "tpu: compiles for TPUs that are not there, for minutes; only where -m names it")
    config.addinivalue_line(
        "markers", "endless: runs for half an hour, and only where -m names it; with -o faulthandler_timeout=0"
    )
    config.pluginmanager.register(memory)
    config.stash[tiers.SHARE] = tiers.Share.parse(config.getoption("--share"))


def pytest_report_header(config: pytest.Config) -> str:
    return f"thorough tier: {config.stash[tiers.SHARE]} rides along (--share)"


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leaves out the tests of other tiers. An `-m` in addopts would be replaced by one on the command line."""
    config.stash[tiers.COLLECTED] = list(items)
    left_out = [item for item in items if not tiers.is_run(item, config)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if tiers.is_run(item, config)]


@pytest.fixture(autouse=True)
def strict_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
    """No implicit dtype promotion, no implicit broadcast over a missing axis."""
    if request.node.get_closest_marker("loose_promotion"):
        yield
        return
    with jax.numpy_dtype_promotion("strict"), jax.numpy_rank_promotion("raise"):
        yield


@pytest.fixture
def optimized() -> Iterator[None]:
    """Programs are compiled as a user's are, for a test that compares bits; it finds none of others and leaves none."""
    before = jax.config.read("jax_disable_most_optimizations")
    jax.clear_caches()
    jax.config.update("jax_disable_most_optimizations", False)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
    jax.clear_caches()
