"""Whether a command goes on with the run of its folder.

It does with the same settings and with inputs that hold the same, wherever they lie.
"""

import time
from typing import Any

from agq.blockwise.predict.predictor import factory_code
from agq.blockwise.storage.addresses import put_away
from agq.blockwise.volumes.content import Content, difference, read_content, require_content
from agq.errors import InputError
from agq.pipeline.config.schema import DEFAULT_FACTORY
from agq.pipeline.folder import DECIDING, identity_hash, versions
from agq.pipeline.run.prepare import Prepared


def require_same(prepared: Prepared) -> None:
    """Refuse to go on with a run that was begun with other settings or inputs.

    Raises
    ------
    InputError
        Naming every setting, or the input, that differs, and what can be done.
    """
    run = prepared.run
    record = run.record()
    run.require_identity(prepared.identity, _compared(prepared, record))
    # The identity has the checkpoint of the built-in factory, whatever that file recommends.
    own = prepared.config.model.factory != DEFAULT_FACTORY
    for name, old in record.get("files", {}).items() if own else ():
        new = prepared.files.get(name, old)
        if new != old:
            option = prepared.predictor_options[name]
            raise InputError(
                f"model.options: {name} {option} has changed since the run began: its SHA-256 is "
                f"{new[:12]}..., not {old[:12]}...; put the former file back, choose another "
                "run_dir, or start over with --overwrite"
            )
    contents = _contents(record)
    if prepared.raw is not None and "raw" in contents:
        require_content(prepared.raw, contents["raw"], "input.raw")


def start(prepared: Prepared, config: dict[str, Any]) -> None:
    """Start the run in its folder, or go on with it; record what its inputs hold.

    Parameters
    ----------
    prepared
        The checked run.
    config
        The resolved configuration without secrets.

    Raises
    ------
    InputError
        As `require_same`.
    """
    run = prepared.run
    begun = run.exists()
    record = {}
    if begun:
        require_same(prepared)
        record = run.record()
    run.create(
        config,
        prepared.identity,
        _compared(prepared, record),
        prepared.origins,
        prepared.recommended,
    )
    # With what the record does not say, for later commands and other machines.
    put_away(run.record_path, prepared.config.model_dump(mode="json"))
    contents = _contents(record)
    for name, volume in (("raw", prepared.raw), ("mask", prepared.mask)):
        # A changed mask is recorded when its blocks are chosen (`record_mask`).
        if volume is not None and name not in contents and not mask_changed(prepared):
            contents[name] = read_content(volume)
    _save_contents(prepared, contents)
    run.update(files=record.get("files", {}) | prepared.files)


def mask_changed(prepared: Prepared) -> bool:
    """Whether blocks were chosen by another mask, or by none, or are to be chosen by none now."""
    record = prepared.run.record()
    old, new = record["identity"].get("mask"), prepared.identity["mask"]
    if prepared.raw is None:
        return False
    if not old or not new:
        return bool(old) != bool(new)
    content = _contents(record).get("mask")
    if content is None or prepared.mask is None:
        return _placed(old) != _placed(new)
    return _placed(old, content) != _placed(new, content) or bool(
        difference(prepared.mask, content)
    )


def record_mask(prepared: Prepared) -> None:
    """Record the mask by which all blocks are chosen now."""
    record = prepared.run.record()
    contents = _contents(record)
    contents.pop("mask", None)
    if prepared.mask is not None:
        contents["mask"] = read_content(prepared.mask)
    identity = {**record["identity"], "mask": prepared.identity["mask"]}
    prepared.run.update(identity=identity, identity_hash=identity_hash(identity))
    _save_contents(prepared, contents)


def recorded_contents(prepared: Prepared) -> dict[str, Content]:
    """Return what the inputs held when the run began, by name."""
    return _contents(prepared.run.record())


def changed_truth(prepared: Prepared) -> str | None:
    """Record what the truth holds; say in what it differs from that of the scores before."""
    truth = prepared.opened_truth()
    if truth is None:
        return None
    contents = recorded_contents(prepared)
    old = contents.get("truth")
    found = None if old is None else difference(truth, old)
    if old is None or found is not None:
        _save_contents(prepared, contents | {"truth": read_content(truth)})
    return found


def new_makers(prepared: Prepared, device: str | None) -> list[str]:
    """Record the software and device that compute blocks from now on.

    Parameters
    ----------
    prepared
        The open run.
    device
        Kind of device, where it is known.

    Returns
    -------
    list of str
        What differs from what computed blocks before, such as ``torch 2.5.1 -> 2.6.0``.
    """
    makers = {name: v for name, v in versions(DECIDING).items() if name != "python"}
    if device is not None:
        makers["device"] = device
    code = factory_code(prepared.config.model.factory)
    if "checkpoint_sha256" not in prepared.identity["model"] and code is not None:
        makers["code of model.factory"] = code[:12]
    record = prepared.run.record()
    made_with = record.get("made_with", [])
    before = made_with[-1] if made_with else _makers_of_commands(record)
    changed = [
        f"{name} {before[name]} -> {new}"
        for name, new in makers.items()
        if before.get(name, new) != new
    ]
    if changed or not made_with:
        made_with.append({"time": time.time(), **before})
    made_with[-1] |= makers
    prepared.run.update(made_with=made_with)
    return changed


def _makers_of_commands(record: dict[str, Any]) -> dict[str, str]:
    """Return the versions that the last command of an earlier release has recorded."""
    for command in record["commands"][-2::-1]:
        known: dict[str, str] = command.get("versions", {})
        return {name: known[name] for name in DECIDING if name in known}
    return {}


def _compared(prepared: Prepared, record: dict[str, Any]) -> set[str]:
    """Return the entries of the identity for which something else is compared."""
    entries = {f"{name}.{field}" for name in _contents(record) for field in ("format", "metadata")}
    entries |= {
        f"model.options.{name}" for name in record.get("files", {}) if name in prepared.files
    }
    old = record.get("identity", {}).get("model", {}).get("device")
    if "auto" in (old, prepared.identity["model"].get("device")):
        # A warning says so if the kind of device that it became changes.
        entries.add("model.device")
    return entries


def _placed(described: dict[str, Any], content: Content | None = None) -> dict[str, Any]:
    """Return of a described mask what decides which voxels it shows."""
    ignored = {"path", "dataset", "hides"} | ({"format", "metadata"} if content else set())
    return {name: value for name, value in described.items() if name not in ignored}


def _contents(record: dict[str, Any]) -> dict[str, Content]:
    return {name: Content.model_validate(v) for name, v in record.get("contents", {}).items()}


def _save_contents(prepared: Prepared, contents: dict[str, Content]) -> None:
    values = {name: content.model_dump(mode="json") for name, content in contents.items()}
    prepared.run.update(contents=values)
