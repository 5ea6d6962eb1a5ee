"""Checkpoints: our safetensors files, and the published ``.pth.tar`` without unpickling code."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
import re
import tempfile
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from agq.caches import checkpoints_folder
from agq.errors import InputError
from agq.model.config import ModelConfig
from agq.model.network.agq import AGQ
from agq.model.recommended import Recommended
from agq.paths import expanded
from agq.reading import open_file, parse_json, require_size

FORMAT_VERSION = 1
_MOST_BYTES = 2**34
# Tensors may share memory, as tied weights do.
_SHARED = 4
_TYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int32, torch.int64)
# One metadata entry only: the order of several is not fixed, and equal checkpoints should be
# equal files.
METADATA_KEY = "agq"
_RECOMMENDED = "recommended"
_PIECE_BYTES = 2**24
BUNDLED = {"demo": "demo.safetensors", "em": "em.safetensors"}


@dataclass(frozen=True)
class LoadedCheckpoint:
    """A checked checkpoint.

    Attributes
    ----------
    config : ModelConfig
        Architecture and inference constants.
    state_dict : dict of str to Tensor
        float32 on the CPU (counters int64), exactly the keys and shapes of ``AGQ(config)``.
    provenance : dict
        How the weights came to be, as given to `save`; empty for published files.
    sha256 : str
        Hex digest of the file as it is without recommended settings: these can be written into a
        file (`recommend`) without changing what it is.
    file_sha256 : str
        Hex digest of the file.
    recommended : Recommended
        Settings for runs with it; the published rule for published files.
    """

    config: ModelConfig
    state_dict: dict[str, Tensor]
    provenance: dict[str, Any]
    sha256: str
    file_sha256: str
    recommended: Recommended


def resolve(name: str | os.PathLike[str]) -> Path:
    """Return the file of a checkpoint given as a path, or as the name of a bundled or fetched one.

    Raises
    ------
    InputError
        If there is no such file.
    """
    bundled = BUNDLED.get(os.fspath(name))
    path = Path(__file__).parent / "weights" / bundled if bundled else expanded(name)
    if path.is_file():
        return path
    # A name alone, and no file here: one that `agq checkpoint fetch` has kept.
    if path.name == os.fspath(name) and (fetched := checkpoints_folder() / path).is_file():
        return fetched
    if path.is_dir():
        raise InputError(f"checkpoint {name} is a folder: give the file itself")
    names = ", ".join(repr(n) for n in BUNDLED)
    raise InputError(
        f"checkpoint {name} does not exist: give a .safetensors or .pth.tar file, {names}, or"
        " a name of `agq checkpoint list` after `agq checkpoint fetch`"
    )


def save(
    path: str | os.PathLike[str],
    model: nn.Module | Mapping[str, Tensor],
    config: ModelConfig,
    provenance: Mapping[str, Any] | None = None,
    *,
    recommended: Recommended | None = None,
    half: bool = False,
) -> None:
    """Write a checkpoint: weights, configuration and provenance in one safetensors file.

    Equal input gives an equal file. The file appears under its name only when it is complete.

    Parameters
    ----------
    path : path-like
        File to write; replaced if it exists.
    model : nn.Module or mapping of str to Tensor
        The network or its state dict.
    provenance : mapping, optional
        JSON-serialisable facts on how the weights came to be.
    recommended : Recommended, optional
        Settings for runs with it.
    half : bool
        Store weight matrices and kernels as float16 (half the size); vectors such as the
        statistics of norms stay float32.

    Raises
    ------
    InputError
        If keys or shapes are not those of ``AGQ(config)``, or a value is not finite.
    """
    path = Path(path)
    state = dict(model.state_dict() if isinstance(model, nn.Module) else model)
    _check(state, config, str(path))
    tensors = {
        key: (v.half() if half and v.is_floating_point() and v.ndim > 1 else v)
        .detach().cpu().contiguous().clone()
        for key, v in state.items()
    }  # fmt: skip
    _check_finite(tensors, str(path))
    header = {
        "format_version": FORMAT_VERSION,
        "config": config.model_dump(mode="json"),
        "provenance": dict(provenance or {}),
    }
    if recommended is not None and (values := recommended.to_dict()):
        header[_RECOMMENDED] = values
    _replace(path, safetensors.torch.save(tensors, {METADATA_KEY: _text(header)}))


def recommend(path: str | os.PathLike[str], recommended: Recommended) -> None:
    """Write the settings for runs with a checkpoint into its file; the weights stay as they are.

    Raises
    ------
    InputError
        If the file cannot be read or written, or is not one of ours.
    """
    path = resolve(path)
    load(path)
    with open_file(path) as file:
        if file.read(9)[8:] != b"{":
            raise InputError(
                f"checkpoint {path} is not a safetensors file: agq checkpoint convert makes one"
            )
        start = _start(file, recommended)
        data = start + file.read()
    try:
        _replace(path, data)
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be written: {error.strerror}") from None


def _start(file: IO[bytes], recommended: Recommended | None = None) -> bytes:
    """Return what a safetensors file begins with, with these recommended settings or none.

    Afterwards the file stands where its tensors begin.
    """
    file.seek(0)
    described = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    metadata = described.setdefault("__metadata__", {})
    header = json.loads(metadata.get(METADATA_KEY, "{}"))
    header.pop(_RECOMMENDED, None)
    if recommended is not None and (values := recommended.to_dict()):
        header[_RECOMMENDED] = values
    metadata[METADATA_KEY] = _text(header)
    text = json.dumps(described, separators=(",", ":"), ensure_ascii=False).encode()
    # As the safetensors library writes it: tensors begin at a multiple of eight bytes.
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _digest(file: IO[bytes], start: bytes) -> str:
    digest = hashlib.sha256(start)
    while piece := file.read(_PIECE_BYTES):
        digest.update(piece)
    return digest.hexdigest()


def _text(header: Mapping[str, Any]) -> str:
    return json.dumps(header, sort_keys=True)


def _replace(path: Path, data: bytes) -> None:
    """Put a whole file in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
        temporary = Path(file.name)
        try:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def load(path: str | os.PathLike[str], config: ModelConfig | None = None) -> LoadedCheckpoint:
    """Read and check a checkpoint, ours or a published one; never runs code from the file.

    Parameters
    ----------
    path : path-like
        A safetensors file, or one written by ``torch.save`` holding a state dict or a dict with
        the entry ``state_dict``. ``module.`` prefixes of data-parallel training are removed.
        Told apart by content.
    config : ModelConfig, optional
        Use this configuration. By default: the one in the file, or, for a published file,
        inferred from the shapes of its tensors.

    Returns
    -------
    LoadedCheckpoint
        Keys, shapes and values are checked.

    Raises
    ------
    InputError
        If the file is absent, unreadable or corrupt, holds something else, or does not fit the
        configuration; then every missing, unexpected and mis-shaped key is named.
    """
    path = resolve(path)
    try:
        with open_file(path) as file:
            size = os.fstat(file.fileno()).st_size
            require_size(path, size, _MOST_BYTES)
            start = file.read(16)
            header: dict[str, Any] = {}
            if start[8:9] == b"{":
                state, header = _read_safetensors(path)
            else:
                state = _read_torch(path)
            _require_plain(state, size, str(path))
            if config is None:
                config = (
                    ModelConfig.from_values(header["config"], f"configuration in {path}")
                    if "config" in header
                    else infer_config(state, str(path))
                )
            _check(state, config, str(path))
            _check_finite(state, str(path))
            if start[8:9] == b"{":
                values = header.get(_RECOMMENDED, {})
                recommended = Recommended.from_values(values, f"recommended settings in {path}")
            else:
                recommended = Recommended.published(config)
            file.seek(0)
            whole = _digest(file, b"")
            digest = _digest(file, _start(file)) if _RECOMMENDED in header else whole
    except OSError as error:
        raise InputError(f"checkpoint {path} cannot be read: {error.strerror}") from None
    except InputError as error:
        if str(path) in str(error):
            raise
        raise InputError(f"checkpoint {path}: {error}") from None
    state = {k: v.float() if v.is_floating_point() else v for k, v in state.items()}
    provenance = dict(header.get("provenance", {}))
    return LoadedCheckpoint(config, state, provenance, digest, whole, recommended)


def _require_plain(state: Mapping[str, Tensor], size: int, source: str) -> None:
    """Check that tensors are numbers of a file: a view of one value can claim any size."""
    claimed = 0
    for key, value in state.items():
        if value.layout != torch.strided or value.device.type != "cpu" or value.dtype not in _TYPES:
            raise InputError(
                f"checkpoint {source}: {key[:100]} is {value.dtype}, {value.layout}, on "
                f"{value.device}, and cannot be the weights of a network"
            )
        claimed += value.numel() * value.element_size()
    # One tensor may have several names.
    if claimed > _SHARED * size:
        raise InputError(
            f"checkpoint {source}: its tensors claim {claimed} bytes, and the file has {size}"
        )


def infer_config(state: Mapping[str, Tensor], source: str = "state dict") -> ModelConfig:
    """Infer the configuration of a state dict from its shapes.

    Attention heads and norm groups leave no trace in shapes and take the published value, 8.

    Raises
    ------
    InputError
        If the tensors that define the architecture are missing.
    """

    def count(pattern: str) -> int:
        found = (re.match(pattern, key) for key in state)
        return len({match.group(1) for match in found if match})

    try:
        downs = [
            state[f"down_layers.{i}.1.0.weight"].shape
            for i in range(count(r"down_layers\.(\d+)\.1\.0\.weight$"))
        ]
        embed_dim = state["fusion_block.post_convs.0.0.weight"].shape[0]
        mlp_width = state["inst_decoder.kernel_interactors.0.mlp.c_fc.weight"].shape[0]
        return ModelConfig(
            filters=tuple(shape[0] for shape in downs),
            isotropy=tuple(shape[2] > 1 for shape in downs),
            embed_dim=embed_dim,
            iterations=count(r"inst_decoder\.predictors\.(\d+)\."),
            mlp_ratio=mlp_width // embed_dim,
            branch_layers=count(r"affinity_branch\.mask_convs\.(\d+)\."),
            learned_queries=state["inst_decoder.rpn.learned_masks_embed.weight"].shape[0],
        )
    except (KeyError, IndexError):
        raise InputError(
            f"{source} is not an AGQ checkpoint: it lacks the tensors that define the "
            f"architecture (its first keys: {', '.join(sorted(state)[:3])[:200] or 'none'})"
        ) from None
    except ValueError as error:
        reason = "; ".join(str(e["msg"]) for e in getattr(error, "errors", list)()) or error
        raise InputError(
            f"{source}: no usable configuration can be inferred from its shapes ({reason}): "
            "give the model configuration"
        ) from None


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
        header = parse_json(metadata.get(METADATA_KEY, "{}"))
    # What safetensors and torch raise depends on the byte that is wrong.
    except Exception as error:
        raise InputError(f"checkpoint {path} is corrupt: {_line(error)}") from None
    if not isinstance(header, dict) or not isinstance(header.get("provenance", {}), dict):
        raise InputError(f"checkpoint {path} is corrupt: its description is not an object")
    if header.get("format_version", 1) != FORMAT_VERSION:
        raise InputError(
            f"checkpoint {path} has a format this version does not know "
            f"(it reads format_version {FORMAT_VERSION}): update agq-pipeline"
        )
    return state, header


def _read_torch(path: Path) -> dict[str, Tensor]:
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                unpacked = sum(info.file_size for info in archive.infolist())
            # torch stores without compression.
            require_size(f"what {path} unpacks to", unpacked, path.stat().st_size)
        content = torch.load(path, map_location="cpu", weights_only=True)
    except InputError:
        raise
    except pickle.UnpicklingError as error:
        refused = re.search(r"GLOBAL ([\w.]+)", str(error))
        if refused:
            raise InputError(
                f"checkpoint {path} holds Python objects ({refused.group(1)}), which are not "
                "loaded for safety: save its state_dict alone with torch.save"
            ) from None
        raise InputError(f"checkpoint {path} is corrupt or no checkpoint") from None
    except Exception as error:
        # What torch raises on a damaged file depends on the byte that is wrong.
        raise InputError(f"checkpoint {path} is corrupt: {_line(error)}") from None
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not content:
        raise InputError(f"checkpoint {path} holds no state dict")
    others = [str(k) for k, v in content.items() if not isinstance(v, Tensor)]
    if others:
        raise InputError(
            f"checkpoint {path} holds no state dict: entries that are not tensors: "
            f"{', '.join(name[:100] for name in others[:5])}"
        )
    return {str(key).removeprefix("module."): value for key, value in content.items()}


def _check(state: Mapping[str, Tensor], config: ModelConfig, source: str) -> None:
    """Raise one error naming every key that is missing, unexpected or mis-shaped."""
    with torch.device("meta"):
        expected = {key: tuple(v.shape) for key, v in AGQ(config).state_dict().items()}
    problems = []
    if missing := [key for key in expected if key not in state]:
        problems.append(f"missing: {', '.join(missing)}")
    if unexpected := [key for key in state if key not in expected]:
        problems.append(f"unexpected: {', '.join(unexpected)}")
    if wrong := [
        f"{key} {tuple(state[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]:
        problems.append(f"wrong shape: {', '.join(wrong)}")
    if problems:
        raise InputError(
            f"checkpoint {source} does not fit the architecture: {'; '.join(problems)}"
        )


def _check_finite(state: Mapping[str, Tensor], source: str) -> None:
    if bad := [k for k, v in state.items() if v.is_floating_point() and not v.isfinite().all()]:
        raise InputError(f"checkpoint {source} has NaN or infinite values in {', '.join(bad)}")


def _line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
