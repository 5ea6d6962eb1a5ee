"""Records of runs, damaged in every way: each is told in one line, and hides no other."""

import copy
import json
import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from agq.blockwise.blocks.grid import BlockGrid
from agq.blockwise.ledger.database import Ledger, connect
from agq.blockwise.ledger.settings import LedgerSettings
from agq.blockwise.predict.spec import PredictSpec, Session
from agq.errors import InputError
from agq.pipeline.config.recorded import read_target
from agq.pipeline.dashboard.runs import Runs
from agq.pipeline.folder import RunFolder
from agq.pipeline.records import check_document, plain
from agq.pipeline.slurm import jobs
from agq.pipeline.status.listing import ledger_lines
from agq.pipeline.status.monitor import load_status
from agq.pipeline.status.text import render
from agq.pipeline.view.marks import run_marks
from agq.terminal import console

GRID = BlockGrid((4, 20, 20), (30, 6, 6), (2, 10, 10))
PIECE = {"label": 1, "voxels": 9, "at": [0, 0, 0]}
WORST = {"label": 5, "bits": 0.5, "parts": 2, "largest": [PIECE]}
ODD: dict[str, Any] = {
    "id a list": {"id": ["a"]},
    "id none": {"id": None},
    "id with markup": {"id": "<b>/../x"},
    "id endless": {"id": "a" * 10_000},
    "created a text": {"created": "yesterday"},
    "created NaN": {"created": float("nan")},
    "created infinite": {"created": float("inf")},
    "created before all": {"created": -1},
    "created large": {"created": 2**70},
    "name a number": {"name": 5},
    "name a megabyte": {"name": "x" * 2**20},
    "stages a list": {"stages": ["predict"]},
    "stages a text": {"stages": "predict"},
    "stage a number": {"stages": {"predict": 5}},
    "state a list": {"stages": {"predict": {"state": ["done"]}}},
    "total a text": {"stages": {"predict": {"state": "done", "blocks_total": "8"}}},
    "total infinite": {"stages": {"predict": {"state": "done", "blocks_total": float("inf")}}},
    "start a list": {"stages": {"predict": {"state": "running", "started": []}}},
    "report a text": {"stages": {"predict": {"state": "done", "report": "good"}}},
    "failed a mapping": {"stages": {"predict": {"state": "done", "report": {"failed": {}}}}},
    "config a list": {"config": []},
    "config none": {"config": None},
    "identity a text": {"identity": "me"},
    "commands a mapping": {"commands": {}},
    "command a text": {"commands": ["agq run"]},
    "place without host": {"place": {"path": "/"}},
    "place a text": {"place": "/somewhere"},
    "NaN somewhere": {"config": {"a": [{"b": float("nan")}]}},
    "large somewhere": {"identity": {"a": -(2**64)}},
    "version": {"format": 2},
}
RAW = {
    "no JSON": b"{",
    "nothing": b"",
    "no UTF-8": b'{"format": 1, "id": "\xff\xfe"}',
    "a list": b"[1]",
    "deep": b"[" * 100_000,
    "deep inside": b'{"format": 1, "config": ' + b'{"a":' * 500 + b"1" + b"}" * 501,
    "infinite": b'{"format": 1, "created": 1e999}',
    "many digits": b'{"format": 1, "created": ' + b"9" * 5000 + b"}",
}


@pytest.fixture
def good(tmp_path: Path) -> RunFolder:
    """A run among others."""
    run = RunFolder(tmp_path / "runs" / "good")
    volume = {"path": str(tmp_path / "none.zarr")}
    identity = {"grid": GRID.to_dict(), "raw": {"unit": "nm"}, "mask": None, "model": {}}
    with run.lock():
        config = {"run_dir": str(run.path), "input": {"raw": volume}, "stitch": {"across": 0.7}}
        run.create(config, identity | {"affinities": False})
    run.update_stage("predict", state="done", started=1.0, finished=9.0, blocks_total=8)
    run.update_stage("predict", report={"done": 8, "skipped": 0, "failed": []})
    run.update_stage("stitch", state="done", report={"largest": [{"id": 5, "voxels": 7}]})
    scores = {"as_is": {"meaning": "as is", "voi_split": 0.1}}
    report = {"scores": scores, "worst_mergers": [WORST], "worst_splits": []}
    run.update_stage("evaluate", state="done", report=report)
    return run


def beside(run: RunFolder, name: str, record: bytes) -> RunFolder:
    folder = run.path.parent / name
    folder.mkdir(exist_ok=True)
    (folder / "run.json").write_bytes(record)
    return RunFolder(folder)


def test_each_odd_record_is_listed_with_its_reason_and_hides_no_other(good: RunFolder) -> None:
    whole = json.loads(good.record_path.read_text())
    whole["place"]["path"] = "/none"
    for name, change in ODD.items():
        beside(good, name, json.dumps(whole | {"id": name.replace(" ", "")} | change).encode())
    for name, data in RAW.items():
        beside(good, name, data)
    listed = Runs([], good.path.parent).listing()
    json.dumps(listed, allow_nan=False)
    lines = {Path(line["run_dir"]).name: line for line in listed}
    assert len({line["key"] for line in listed}) == len(listed) == len(ODD) + len(RAW) + 1
    assert lines["good"]["state"] == "done"
    assert lines["good"]["done"] == 8
    for name in (*ODD, *RAW):
        assert lines[name]["state"] == "damaged", name
        assert lines[name]["problem"].startswith(str(good.path.parent / name)), name
        assert "\n" not in lines[name]["problem"]
        assert len(lines[name]["problem"]) < 1000
        with pytest.raises(InputError, match=r"run\.json"):
            load_status(good.path.parent / name)
    assert "stages.predict.blocks_total" in lines["total a text"]["problem"]


def test_folders_with_the_id_of_another_run_are_listed_beside_it(good: RunFolder) -> None:
    """Whoever may write into the folder above could else hide a run."""
    record = json.loads(good.record_path.read_text())
    for name in ("evil", "a <b>"):
        place = {"path": str(good.path.parent / name), "host": "x", "inodes": []}
        beside(good, name, json.dumps({**record, "place": place, "name": name}).encode())
    runs = Runs([], good.path.parent)
    lines = {line["name"]: line for line in runs.listing()}
    assert set(lines) == {"good", "evil", "a <b>"}
    assert len({line["key"] for line in lines.values()}) == 3
    for name, line in lines.items():
        assert runs.view(line["key"]).path.name == name
        assert re.fullmatch("[0-9A-Za-z_-]+", line["key"])


def test_what_we_write_can_be_read_again(good: RunFolder) -> None:
    good.update_stage("evaluate", report={"voi": float("nan"), "bits": float("inf")}, n=2**70)
    good.update_stage("predict", error="no file b\udcff")
    stages = good.record()["stages"]
    assert stages["evaluate"]["report"] == {"voi": None, "bits": None}
    assert stages["predict"]["error"] == "no file b\\udcff"


def test_a_record_without_a_whole_identity_goes_on_with_one_line(good: RunFolder) -> None:
    assert good.grid().to_dict() == GRID.to_dict()
    whole = good.identity()
    for change in (
        {"grid": 1},
        {"grid": {}},
        {"grid": GRID.to_dict() | {"write_shape": [0, 0, 0]}},
    ):
        good.update(identity=whole | change)
        with pytest.raises(InputError, match=r"run\.json is damaged: .*grid"):
            good.grid()
    for name in whole:
        good.update(identity={key: value for key, value in whole.items() if key != name})
        with pytest.raises(InputError, match=f"run\\.json is damaged: identity: {name}"):
            good.identity()


@pytest.fixture
def ledger(mongo_uri: str) -> Iterator[Ledger]:
    found = connect(LedgerSettings(uri=mongo_uri, database=f"records{time.time_ns()}"))
    assert found is not None
    yield found
    found.close()


def test_odd_documents_hide_no_run(
    good: RunFolder, ledger: Ledger, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    now = time.time()
    sums = {"bytes": 5, "done": 3, "updated": now}
    stages = {"predict": {"state": "running", "blocks_total": 8, "totals": sums}}
    ledger.runs.insert_one(
        {"_id": "fine", "name": "fine", "run_dir": "/none/fine", "created": 5, "stages": stages}
    )
    wanted = ("name", "created", "stages", "config", "commands")
    odd = [{k: v for k, v in c.items() if k in wanted} for c in ODD.values()]
    odd += [
        {"run_dir": 7},
        {"updated": "now"},
        {"stages": {"predict": {"totals": {"done": "3"}}}},
        {"stages": {"predict": {"totals": None}}},
    ]
    odd = [{"created": now, **change} for change in odd if change]
    unable = ({"created": 2**70},)
    ledger.runs.insert_many(
        [{"_id": f"odd{i}", **c} for i, c in enumerate(odd) if c not in unable]
        + [{"_id": "odd-later", "created": now + 1e9}, {"_id": "a/b", "created": now}]
    )
    found = ledger_lines(ledger, limit=100)
    assert "fine" in [run["id"] for run in found if not run["problem"]]
    damaged = [run for run in found if run["problem"]]
    assert len(damaged) > 15
    assert all(run["problem"].startswith("damaged: ") for run in damaged)
    json.dumps(found, allow_nan=False)
    # A time of another kind, or in the future, puts no document in front of those of runs.
    ours = [run["id"] for run in found].index("fine") + 1
    assert ledger_lines(ledger, limit=ours)[-1]["id"] == "fine"
    assert "odd-later" in [run["id"] for run in found[ours:]]
    lines = Runs([], good.path.parent, ledger).listing()
    json.dumps(lines, allow_nan=False)
    names = [line["name"] for line in lines if line["state"] != "damaged"]
    assert {"good", "fine"} <= set(names)
    assert sum(line["state"] == "damaged" for line in lines) > 15  # fewer fields are asked for
    assert load_status(Path("/none/fine"), ledger).stages[0].done == 3


def mutated(value: Any, rng: random.Random) -> Any:
    """Return plain data of which one part is something else."""
    if isinstance(value, dict) and value and (rng.random() < 0.8 or "created" in value):
        name = rng.choice(sorted(value))
        if rng.random() < 0.1:
            return {key: item for key, item in value.items() if key != name}
        return value | {name: mutated(value[name], rng)}
    if isinstance(value, list) and value and rng.random() < 0.8:
        place = rng.randrange(len(value))
        return [*value[:place], mutated(value[place], rng), *value[place + 1 :]]
    odd: list[Any] = [None, True, -1, 0, 2**63, 2**70, 1e300, float("nan"), "", "x", "\udcff\x1b["]
    odd += [[], {}, [[]], {"a": None}, "y" * 5000, [None] * 3, {"": []}, [1, 2, 3], 0.5]
    return rng.choice(odd)


def test_mutated_records_end_in_one_line(good: RunFolder, tmp_path: Path) -> None:
    """Whatever a record says, whoever reads it gets an answer or an `InputError`."""
    rng = random.Random(14)
    whole = json.loads(good.record_path.read_text())
    out = console()
    out.file = (tmp_path / "printed").open("w", errors="replace")
    damaged = 0
    for _ in range(400):
        record = copy.deepcopy(whole)
        for _ in range(rng.choice((1, 1, 2, 4))):
            record = mutated(record, rng)
        good.record_path.write_text(json.dumps(record))
        readers = (
            lambda: out.print(render(load_status(good.path))),
            lambda: json.dumps(Runs([good.path]).listing(), allow_nan=False),
            lambda: read_target(good.path),
            lambda: run_marks(good, "nm"),
            good.identity,
            good.grid,
            lambda: good.has_own_id(good.record()),
        )
        for reader in readers:
            try:
                reader()
            except InputError:
                damaged += 1
    out.file.close()
    assert damaged > 400


def test_mutated_documents_are_read_or_refused() -> None:
    rng = random.Random(15)
    sums = {"bytes": 5, "done": 3, "updated": 1.0, "session": {"blocks": 1, "voxels": 2}}
    document = {"_id": "a", "run_dir": "/x", "name": "a", "created": 1.0, "updated": 2.0}
    document |= {"stages": {"predict": {"state": "done", "totals": sums}}, "host": "h"}
    refused = 0
    for _ in range(3000):
        try:
            json.dumps(check_document(document | mutated(document, rng)), allow_nan=False)
        except InputError:
            refused += 1
    assert 500 < refused < 3000
    with pytest.raises(ValueError, match="no finite number"):
        plain({"a": [float("-inf")]})


@pytest.mark.parametrize("data", [b"", b"[]", b"{}", b'{"id": 1}', b"[" * 10_000, b'"\xff"'])
def test_other_records_of_a_run_are_refused_in_one_line(tmp_path: Path, data: bytes) -> None:
    for name, load in (
        ("session.json", Session.load),
        ("predict.json", PredictSpec.load),
        ("slurm/jobs.json", jobs.load),
        ("slurm/config.json", jobs.load_config),
    ):
        file = tmp_path / name
        file.parent.mkdir(exist_ok=True)
        file.write_bytes(data)
        with pytest.raises(InputError, match=name.replace(".", r"\.")) as error:
            load(tmp_path)
        assert "\n" not in str(error.value)
        file.unlink()
