"""How tests compile."""

from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def compiling_quickly() -> Iterator[None]:
    """Unoptimised programs: they mean the same and compile in a third of the time."""
    import jax

    before = jax.config.read("jax_disable_most_optimizations")
    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", before)
