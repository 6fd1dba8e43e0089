"""Several processes that train one model: what they have to agree about."""

import enum
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P


def is_first_process() -> bool:
    """Whether this process writes logs and weights; with one process, it does."""
    return jax.process_index() == 0


def succeeds_on_first(action: Callable[[], None]) -> bool:
    """Runs `action` on the first process; all of them learn whether it succeeded.

    Raises:
        Exception: on the first process, what `action` raised.
    """
    error: Exception | None = None
    if is_first_process():
        try:
            action()
        except Exception as raised:
            error = raised
    succeeded = error is None
    if jax.process_count() > 1:
        succeeded = bool(multihost_utils.broadcast_one_to_all(np.int32(succeeded)))
    if error is not None:
        raise error
    return succeeded


def any_process(value: bool) -> bool:
    """Whether it is true on any process; waits for all of them."""
    return bool(np.any(multihost_utils.process_allgather(np.array(value))))


class Wish(enum.IntEnum):
    """What a process wants to happen after a step."""

    GO_ON = 0
    SAVE = 1
    STOP = 2  # and save


class Agreement:
    """Makes all processes do the same after the same step: the most that one of them wishes for.

    A signal may reach one process alone, and clocks differ. With several processes the answer is
    that of the step before, so that nobody waits for the step that is being computed.
    """

    def __init__(self, mesh: Mesh):
        self._alone = jax.process_count() == 1
        self._split = NamedSharding(mesh, P(mesh.axis_names))
        self._largest = partial(jax.jit, out_shardings=NamedSharding(mesh, P()))(jnp.max)
        self._local = len(mesh.local_devices)
        self._last: jax.Array | None = None

    def of(self, wish: Wish) -> Wish:
        """What all processes do now."""
        if self._alone:
            return wish
        wishes = jax.make_array_from_process_local_data(
            self._split, np.full(self._local, wish, np.int32)
        )
        before, self._last = self._last, self._largest(wishes)
        agreed = Wish.GO_ON if before is None else Wish(int(before))
        if agreed is not Wish.GO_ON:
            self._last = None  # it was wished for again while it was not granted yet
        return agreed
