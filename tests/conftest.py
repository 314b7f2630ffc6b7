"""Every test runs on eight fake CPU devices, under strict promotion, in programs that are compiled in haste."""

import os

# Before jax is imported: the number of devices is read once.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
# Compiling is most of what the tests do, and takes half as long without LLVM's expensive passes; XLA's own are those of
# every user. JAX_DISABLE_MOST_OPTIMIZATIONS=0 pytest has all of them.
os.environ.setdefault("JAX_DISABLE_MOST_OPTIMIZATIONS", "1")

from collections.abc import Iterator

import jax
import pytest

pytest.register_assert_rewrite("tests.conformance")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line(
        "markers", "loose_promotion: runs third-party code that mixes dtypes or ranks, so promotion is not strict"
    )
    config.addinivalue_line(
        "markers", "once: says nothing about the version of JAX, or takes long; .ci/run runs it on the newest alone"
    )
    config.addinivalue_line("markers", "thorough: runs for half an hour, and only where -m names it")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Not by `-m` in addopts, which another -m on the command line replaces."""
    if "thorough" in config.option.markexpr:
        return
    long = [item for item in items if item.get_closest_marker("thorough")]
    if long:
        config.hook.pytest_deselected(items=long)
        items[:] = [item for item in items if item not in long]


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
