"""Which form of the arithmetic a device gets, and that it repeats itself to the last bit."""

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

CARD_VOXELS = 2**19
"""Voxels that a card works on at once: 0.4 GiB of logits of 201 channels."""


def on_card(tensor: Tensor) -> bool:
    """Tell whether a tensor is on a device with memory and a queue of its own."""
    return tensor.device.type != "cpu"


class Repeatable:
    """Full float32 products, and CUDA algorithms that give the same bits every time.

    torch has these switches for the whole process. The first thread that enters turns them and the
    last one that leaves turns them back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._inside = 0
        self._restore = contextlib.ExitStack()

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        """Hold the switches for the time of a ``with``."""
        with self._lock:
            if not self._inside:
                self._turn()
            self._inside += 1
        try:
            yield
        finally:
            with self._lock:
                self._inside -= 1
                if not self._inside:
                    self._restore.close()

    def _turn(self) -> None:
        matmul = torch.backends.cuda.matmul
        self._restore.callback(setattr, matmul, "allow_tf32", matmul.allow_tf32)
        matmul.allow_tf32 = False
        self._restore.enter_context(
            torch.backends.cudnn.flags(
                enabled=True, benchmark=False, deterministic=True, allow_tf32=False
            )
        )


repeatable = Repeatable()
