"""Copies of blocks to a device and of answers from it, beside what the device computes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Upload:
    """A tensor that is on its way to a device; `Transfers.arrived` gives it out."""

    tensor: Tensor
    done: Any = None


@dataclass(frozen=True)
class Download:
    """Tensors that are on their way to the host."""

    tensors: list[Tensor]
    done: Any = None

    def arrays(self) -> list[np.ndarray]:
        """Wait for the copies and return them."""
        if self.done is not None:
            self.done.synchronize()
        return [tensor.numpy() for tensor in self.tensors]


class Transfers:
    """Copies between the host and one device.

    A CUDA device has a stream for each direction, and copies go through pinned memory: neither the
    host nor what is computed waits for them, until their tensors are asked for. Other devices copy
    at once. Several threads may copy at a time.

    Parameters
    ----------
    device : torch.device
        The device.
    cuda : module, optional
        Streams and events, as `torch.cuda` has them; default: those of a CUDA device, else none.

    Attributes
    ----------
    overlap : bool
        Whether copies go on beside other work.
    """

    def __init__(self, device: torch.device, cuda: ModuleType | Any = None) -> None:
        self.device = device
        self._cuda = torch.cuda if cuda is None and device.type == "cuda" else cuda
        self.overlap = self._cuda is not None
        if self.overlap:
            self._up, self._down = self._cuda.Stream(device), self._cuda.Stream(device)

    def upload(self, array: np.ndarray) -> Upload:
        """Begin to copy an array to the device."""
        tensor = torch.from_numpy(array)
        if not self.overlap:
            return Upload(tensor.to(self.device))
        with self._cuda.stream(self._up):
            copy = tensor.pin_memory().to(self.device, non_blocking=True)
            return Upload(copy, self._up.record_event())

    def arrived(self, upload: Upload) -> Tensor:
        """Return the tensor; what the device is told from here on waits for the copy."""
        if self.overlap:
            computing = self._cuda.current_stream(self.device)
            computing.wait_event(upload.done)
            # Its memory belongs to the other stream, which must not give it away too early.
            upload.tensor.record_stream(computing)
        return upload.tensor

    def download(self, tensors: Sequence[Tensor]) -> Download:
        """Begin to copy tensors to the host, once the device has computed them."""
        if not self.overlap:
            return Download([tensor.cpu() for tensor in tensors])
        self._down.wait_event(self._cuda.current_stream(self.device).record_event())
        with self._cuda.stream(self._down):
            # A copy that the host does not wait for gets pinned memory.
            copies = [tensor.to("cpu", non_blocking=True) for tensor in tensors]
            for tensor in tensors:
                tensor.record_stream(self._down)
            # The host sleeps while it waits: its cores have other blocks to do.
            return Download(copies, self._down.record_event(self._cuda.Event(blocking=True)))
