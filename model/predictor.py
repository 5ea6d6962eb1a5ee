"""Raw blocks in, instance labels and affinities out."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from agq.errors import InputError
from agq.model import checkpoint as checkpoints
from agq.model.cpu.lean import LeanNetwork
from agq.model.decode.flips import flipped_affinities
from agq.model.decode.inference import (
    DenseMaps,
    MaskHead,
    affinity_logits,
    assign_voxels,
    connected_labels,
    decode,
    dense_maps,
    quantised,
)
from agq.model.decode.split import split_at_membranes
from agq.model.decode.supervoxels import memberships, supervoxels
from agq.model.devices import repeatable
from agq.model.network.agq import AGQ
from agq.model.network.queries import Seeds, foreground, seeds_in
from agq.model.settings import PredictorSettings
from agq.model.transfers import Download, Transfers, Upload

AUTOCAST = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class BlockPrediction:
    """What the network says about one block of shape (z, y, x).

    Attributes
    ----------
    labels : np.ndarray
        uint16 (z, y, x): 0 background; 1..n_labels, each one 6-connected piece, in raster order
        of their first voxels. uint32 in the rare block with more than 65535 pieces.
    affinities : np.ndarray
        uint8 (3, z, y, x), rint(a * 255); channel c at a voxel is the affinity to its previous
        voxel on axis c of (z, y, x).
    components : int
        Seed regions found: connected components of the foreground above the size limit.
    dropped : int
        Of these, how many exceed the limit on queries and were not used.
    memberships : np.ndarray, optional
        int64 (1 + n_labels, queries): for supervoxels, how much of each mask is in every one
        (`agq.model.decode.supervoxels.memberships`).
    mask_weight : float
        Weight of the agreement of memberships, against the affinities, inside the block.
    """

    labels: np.ndarray
    affinities: np.ndarray
    components: int
    dropped: int
    n_labels: int
    memberships: np.ndarray | None = None
    mask_weight: float = 0.0


@dataclass(frozen=True)
class BlockMasks:
    """The network's answer before labels are made connected and consecutive.

    Attributes
    ----------
    affinity_logits : np.ndarray
        float32 (3, z1, y1, x1), at the resolution of P1.
    channels : np.ndarray
        int16 (z, y, x): the winning channel, 0 background, then one per query.
    mass : np.ndarray
        float32 (1 + queries,): softmax mass of each channel in voxels.
    components, dropped : int
        As in `BlockPrediction`.
    """

    affinity_logits: np.ndarray
    channels: np.ndarray
    mass: np.ndarray
    components: int
    dropped: int


@dataclass(frozen=True)
class _Mapped:
    """A normalised block and its dense maps on the device, and what the host wants of them."""

    image: torch.Tensor
    maps: DenseMaps
    download: Download


@dataclass(frozen=True)
class _Decoded:
    """What the network says of one normalised block, on the device, before voxels are labelled."""

    image: torch.Tensor
    maps: DenseMaps
    seeds: Seeds
    head: MaskHead

    @property
    def size(self) -> tuple[int, int, int]:
        z, y, x = self.image.shape
        return z, y, x


@dataclass(frozen=True)
class Begun:
    """A block that a device has answered, or will soon, and whose pieces are still to be found.

    Of what is on the device it keeps the last prediction and its mask features, for supervoxels.
    """

    download: Download
    components: int
    dropped: int
    masks: tuple[MaskHead, torch.Tensor] | None


class AGQPredictor:
    """A checkpoint on a device, ready to segment blocks.

    `predict` does all at once. `prepare`, `begin` and `finish` are its three parts: of several
    threads each may prepare and finish blocks while another one, always the same, begins others.
    On a card that keeps the card at work; on a CPU `begin` does all but the preparation.

    A block's result depends on its voxels, the checkpoint and these settings alone. Blocks of a
    batch go through the network one after the other: one block is enough work for a device,
    and convolution algorithms, chosen by shape, would otherwise differ with the batch size.

    Parameters
    ----------
    checkpoint : path-like
        Checkpoint file, or ``"demo"`` for the bundled one.
    **settings
        The other fields of `agq.model.settings.PredictorSettings`.

    Raises
    ------
    InputError
        If the checkpoint cannot be used, the device does not exist or does not support the
        precision, or a setting is invalid.
    """

    def __init__(self, checkpoint: str | os.PathLike[str], **settings: Any) -> None:
        values = {"checkpoint": os.fspath(checkpoint), **settings}
        self.settings = PredictorSettings.from_values(values, "predictor settings")
        self.device = resolve_device(self.settings.device)
        if self.settings.threads is not None:
            torch.set_num_threads(self.settings.threads)
        loaded = checkpoints.load(checkpoint)
        self.config = self.settings.network(loaded.config)
        self.sha256 = loaded.sha256
        self.provenance = loaded.provenance
        with torch.device("meta"):
            network = AGQ(self.config)
        network.load_state_dict(loaded.state_dict, assign=True)
        network.eval().requires_grad_(False).to(self.device)
        self.network = network.freeze(AUTOCAST.get(self.settings.precision, torch.float32))
        # The reference arithmetic on the CPU has a path of its own, with the same results.
        lean = self.device.type == "cpu" and self.settings.precision == "fp32"
        self.lean = LeanNetwork(self.network) if lean else None
        self.transfers = Transfers(self.device)

    @property
    def batch_size(self) -> int:
        """Blocks that a caller should hand over at once."""
        return self.settings.batch_size

    @property
    def input_shape(self) -> tuple[int, int, int]:
        """Block shape (z, y, x) the network was trained at; results are best at this size."""
        return self.config.input_shape

    def predict(self, blocks: Sequence[np.ndarray]) -> list[BlockPrediction]:
        """Segment blocks.

        Parameters
        ----------
        blocks : sequence of np.ndarray
            Raw blocks (z, y, x), of any and of different shapes: uint8 (0 to 255), uint16 (0 to
            65535), or float32 already in [0, 1].

        Returns
        -------
        list of BlockPrediction
            One per block, in order.

        Raises
        ------
        InputError
            If a block is not 3-D, is empty, has another dtype, or has NaN, infinite or
            out-of-range values; the message names the block's place in the sequence. If the
            network overflows at the chosen precision.
        """
        images = self._images(blocks)
        return [self.finish(one) for one in self.begin(list(map(self.transfers.upload, images)))]

    def prepare(self, block: np.ndarray) -> Upload:
        """Normalise a raw block and send it to the device; it is refused as by `predict`."""
        return self.transfers.upload(normalised(block, "the block"))

    def begin(self, prepared: Sequence[Upload]) -> list[Begun | BlockPrediction]:
        """Run the network on prepared blocks.

        Returns
        -------
        list of Begun or BlockPrediction
            One per block, for `finish`. On a card its answers may still be on their way.

        Raises
        ------
        InputError
            If the network overflows at the chosen precision.
        """
        if not self.transfers.overlap:
            return [self._finish(self._begin(self._map(upload))) for upload in prepared]
        begun: list[Begun | BlockPrediction] = []
        last: _Mapped | None = None
        for upload in prepared:
            # While the host looks for seeds in one block, the card has the next one to convolve.
            mapped = self._map(upload)
            if last is not None:
                begun.append(self._begin(last))
            last = mapped
        return begun if last is None else [*begun, self._begin(last)]

    def finish(self, begun: Begun | BlockPrediction) -> BlockPrediction:
        """Do for a begun block what the host does: find its pieces."""
        return begun if isinstance(begun, BlockPrediction) else self._finish(begun)

    def masks(self, block: np.ndarray) -> BlockMasks:
        """Run the network on one block and return its masks, as `predict` sees them."""
        (image,) = self._images([block])
        with self._computing():
            decoded = self._decode(self._map(self.transfers.upload(image)))
            answers = decoded.maps.affinity_logits, *self._assign(decoded)
            logits, channels, mass = (answer.cpu().numpy() for answer in answers)
        seeds = decoded.seeds
        return BlockMasks(logits, channels, mass, seeds.components, seeds.dropped)

    def _map(self, upload: Upload) -> _Mapped:
        with self._computing():
            x = self.transfers.arrived(upload)
            if self.lean is not None:
                maps = self.lean.dense_maps(x)
            else:
                with self._autocast():
                    maps = dense_maps(self.network, x)
            inside = foreground(torch.sigmoid(maps.affinity_logits))
            return _Mapped(x, maps, self.transfers.download([inside, maps.total()]))

    def _decode(self, mapped: _Mapped) -> _Decoded:
        inside, total = mapped.download.arrays()
        self._check_finite(bool(np.isfinite(total)))
        seeds = seeds_in(inside, self.config, self._send)
        head = decode(self.network, mapped.maps, seeds)
        return _Decoded(mapped.image, mapped.maps, seeds, head)

    def _send(self, array: np.ndarray) -> torch.Tensor:
        return self.transfers.arrived(self.transfers.upload(array))

    def _begin(self, mapped: _Mapped) -> Begun:
        with self._computing():
            decoded = self._decode(mapped)
            answers = [self._affinities(decoded)]
            masks = None
            if self.config.pieces == "masks":
                answers.append(self._assign(decoded)[0])
            else:
                masks = decoded.head, decoded.maps.mask_features
            download = self.transfers.download(answers)
        return Begun(download, decoded.seeds.components, decoded.seeds.dropped, masks)

    def _finish(self, begun: Begun) -> BlockPrediction:
        affinities, *answers = begun.download.arrays()
        members = None
        if begun.masks is None:
            (channels,) = answers
            if self.config.min_affinity > 0:
                channels = split_at_membranes(
                    channels, affinities, self.config.min_affinity, self.config.spacing
                )
            labels, n = connected_labels(channels)
        else:
            labels, n = supervoxels(affinities)
            with self._computing():
                members = memberships(*begun.masks, labels, n)
        return BlockPrediction(
            labels,
            affinities,
            begun.components,
            begun.dropped,
            n,
            memberships=members,
            mask_weight=0.0 if members is None else self.config.mask_weight,
        )

    def _images(self, blocks: Sequence[np.ndarray]) -> list[np.ndarray]:
        # All blocks are checked before the first is computed.
        return [normalised(block, f"block {i} of the batch") for i, block in enumerate(blocks)]

    def _assign(self, decoded: _Decoded) -> tuple[torch.Tensor, torch.Tensor]:
        features = decoded.maps.mask_features
        return assign_voxels(decoded.head, features, decoded.size, self.config.min_mass)

    def _affinities(self, decoded: _Decoded) -> torch.Tensor:
        logits, flips = decoded.maps.affinity_logits, self.config.flips
        averaged = flipped_affinities(logits, self._affinity_logits, decoded.image, flips)
        return quantised(averaged)

    def _affinity_logits(self, image: torch.Tensor) -> torch.Tensor:
        if self.lean is not None:
            logits = self.lean.affinity_logits(image)
        else:
            with self._autocast():
                logits = affinity_logits(self.network, image)
        self._check_finite(bool(torch.isfinite(logits.sum())))
        return logits

    def _check_finite(self, finite: bool) -> None:
        if not finite:
            raise InputError(
                f"the network's features overflow at precision {self.settings.precision} on this "
                "block: use bf16 or fp32"
            )

    def _autocast(self) -> contextlib.AbstractContextManager[object]:
        if self.settings.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=AUTOCAST[self.settings.precision])

    @contextlib.contextmanager
    def _computing(self) -> Iterator[None]:
        exact = repeatable() if self.device.type == "cuda" else contextlib.nullcontext()
        with torch.inference_mode(), exact:
            yield


def resolve_device(name: str) -> torch.device:
    """Return the device of a name, or raise InputError if this machine lacks it."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in {"cpu", "cuda", "mps"}:
        raise InputError(f"device {name!r}: give auto, cpu, cuda, cuda:N or mps")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise InputError(f"device {name!r} does not exist: torch sees {count} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise InputError("device 'mps' does not exist on this machine: give auto or cpu")
    return device


def normalised(block: np.ndarray, name: str) -> np.ndarray:
    """Return a raw block as float32 in [-1, 1], as the network takes it.

    Raises
    ------
    InputError
        If the block cannot be used; ``name`` says in the message which it is.
    """
    if block.ndim != 3 or 0 in block.shape:
        raise InputError(f"{name} has shape {block.shape}: give (z, y, x), not empty")
    if block.dtype == np.uint8 or block.dtype == np.uint16:
        scaled = block.astype(np.float32) / np.float32(np.iinfo(block.dtype).max)
    elif block.dtype == np.float32:
        scaled = block.copy()
        if not np.isfinite(scaled).all():
            raise InputError(f"{name} has NaN or infinite voxels")
        if scaled.min() < 0 or scaled.max() > 1:
            raise InputError(
                f"{name} is float32 with values from {scaled.min():g} to {scaled.max():g}: "
                "scale it to [0, 1]"
            )
    else:
        raise InputError(f"{name} has dtype {block.dtype}: give uint8, uint16 or float32")
    scaled -= np.float32(0.5)
    scaled /= np.float32(0.5)
    return np.ascontiguousarray(scaled)
