"""Streams and events of a card, on a machine without one: they only say what was asked of them."""

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch


class FakeEvent:
    def __init__(self, cuda: "FakeCuda") -> None:
        self.cuda, self.number = cuda, 0

    def synchronize(self) -> None:
        assert self.number, "waits for what was never begun"
        self.cuda.log.append(f"host waits for {self.number}")


class FakeStream:
    def __init__(self, cuda: "FakeCuda", name: str) -> None:
        self.cuda, self.name = cuda, name

    def record_event(self, event: FakeEvent | None = None) -> FakeEvent:
        event = event or FakeEvent(self.cuda)
        self.cuda.events += 1
        event.number = self.cuda.events
        self.cuda.log.append(f"{self.name} reaches {event.number}")
        return event

    def wait_event(self, event: FakeEvent) -> None:
        assert event.number, "waits for what was never begun"
        self.cuda.log.append(f"{self.name} waits for {event.number}")


class FakeCuda:
    """Stands for `torch.cuda`; tensors stay where they are.

    Attributes
    ----------
    log
        What streams, and the host, were told, in order. Events have numbers.
    """

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.log: list[str] = []
        self.events = 0
        self._names = iter(("up", "down"))
        self._current = threading.local()
        self._computing = FakeStream(self, "computing")
        to = torch.Tensor.to

        def logged(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            if kwargs.get("non_blocking"):
                self.log.append(f"{self.current_stream().name} copies")
            return to(tensor, *args, **kwargs)

        def kept(tensor: torch.Tensor, stream: FakeStream) -> None:
            self.log.append(f"memory kept for {stream.name}")

        patch.setattr(torch.Tensor, "to", logged)
        patch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor)
        patch.setattr(torch.Tensor, "record_stream", kept)

    @property
    def waits(self) -> int:
        """How often the host has waited."""
        return sum(entry.startswith("host waits") for entry in self.log)

    def Stream(self, device: torch.device) -> FakeStream:  # noqa: N802
        return FakeStream(self, next(self._names))

    def Event(self, blocking: bool = False) -> FakeEvent:  # noqa: N802
        assert blocking
        return FakeEvent(self)

    def current_stream(self, device: torch.device | None = None) -> FakeStream:
        return getattr(self._current, "stream", self._computing)

    @contextlib.contextmanager
    def stream(self, stream: FakeStream) -> Iterator[None]:
        before, self._current.stream = self.current_stream(), stream
        try:
            yield
        finally:
            self._current.stream = before
