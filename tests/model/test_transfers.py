"""Copies beside computing: what waits for what."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

from agq.blockwise.predict.predictor import StagedPredictor
from agq.model import predictor as predictors
from agq.model.devices import Repeatable
from agq.model.predictor import AGQPredictor
from agq.model.transfers import Transfers
from tests.helpers.fake_cuda import FakeCuda
from tests.helpers.networks import block, write_checkpoint

CPU = torch.device("cpu")


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    return FakeCuda(monkeypatch)


def test_what_waits_for_what(cuda: FakeCuda) -> None:
    transfers = Transfers(CPU, cuda)
    upload = transfers.upload(np.arange(3))
    assert cuda.log == ["up copies", "up reaches 1"]
    tensor = transfers.arrived(upload)
    assert cuda.log[2:] == ["computing waits for 1", "memory kept for computing"]
    cuda.log.clear()
    download = transfers.download([tensor, tensor + 1])
    assert cuda.log == [
        "computing reaches 2",
        "down waits for 2",
        *["down copies"] * 2,
        *["memory kept for down"] * 2,
        "down reaches 3",
    ]
    assert [array.tolist() for array in download.arrays()] == [[0, 1, 2], [1, 2, 3]]
    assert cuda.log[-1] == "host waits for 3"


def test_a_cpu_copies_nothing() -> None:
    transfers, array = Transfers(CPU), np.arange(3)
    upload = transfers.upload(array)
    assert not transfers.overlap
    assert np.shares_memory(array, transfers.arrived(upload).numpy())
    (back,) = transfers.download([upload.tensor]).arrays()
    assert np.shares_memory(array, back)


@pytest.mark.parametrize("pieces", ["masks", "supervoxels"])
def test_blocks_of_a_card_overlap_and_are_the_same(
    tmp_path: Path, cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch, pieces: str
) -> None:
    """A card gets the convolutions of the next block before the host waits for the last one."""
    weights = write_checkpoint(tmp_path / "small.safetensors")
    blocks = [block(seed=seed) for seed in range(2)]
    want = AGQPredictor(weights, device="cpu", pieces=pieces).predict(blocks)
    predictor = AGQPredictor(weights, device="cpu", pieces=pieces)
    predictor.transfers = Transfers(CPU, cuda)
    assert isinstance(predictor, StagedPredictor)
    seeds_in = predictors.seeds_in

    def seeds(*args: object) -> object:
        cuda.log.append("seeds")
        return seeds_in(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(predictors, "seeds_in", seeds)
    begun = predictor.begin([predictor.prepare(one) for one in blocks])
    letters = {"computing reaches": "c", "host waits": "w", "seeds": "s"}
    steps = [letters.get(" ".join(entry.split()[:2]), "") for entry in cuda.log]
    # The card comes to what the host wants of both blocks, before the host waits for the first.
    assert "".join(steps) == "ccwscwsc"
    with ThreadPoolExecutor(2) as threads:
        got = list(threads.map(predictor.finish, begun))
    assert cuda.waits == 4
    for one, other in zip(got, want, strict=True):
        assert np.array_equal(one.labels, other.labels)
        assert np.array_equal(one.affinities, other.affinities)
        assert (one.n_labels, one.components) == (other.n_labels, other.components)
        if pieces == "supervoxels":
            assert np.array_equal(one.memberships, other.memberships)


def test_switches_stay_until_the_last_thread_leaves() -> None:
    cudnn, matmul = torch.backends.cudnn, torch.backends.cuda.matmul

    def switches() -> tuple[bool, bool, bool, bool]:
        return cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32, matmul.allow_tf32

    matmul.allow_tf32, before = True, matmul.allow_tf32
    try:
        outside = switches()
        assert outside != (True, False, False, False)
        repeatable = Repeatable()
        for _ in range(2):
            first, second = repeatable(), repeatable()
            first.__enter__()
            second.__enter__()
            first.__exit__(None, None, None)
            assert switches() == (True, False, False, False)
            second.__exit__(None, None, None)
            assert switches() == outside
    finally:
        matmul.allow_tf32 = before
