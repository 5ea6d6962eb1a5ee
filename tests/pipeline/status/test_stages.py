"""The words for the stages of a run, the same from journal and ledger."""

import time

import pytest

from agq.pipeline.status.stages import run_state_of, stage_entries, stage_status

PARTS = ("relabel", "pyramid")


@pytest.mark.parametrize(
    ("told", "begun", "alive", "run", "words"),
    [
        ({}, "", True, "running", {}),
        ({"predict": "running"}, "predict", True, "running", {"predict": "running"}),
        ({"predict": "running"}, "predict", False, "stopped", {"predict": "stopped"}),
        ({"predict": "running"}, "predict", None, "running", {"predict": "running"}),
        ({"predict": "done"}, "predict", False, "done", {"predict": "done"}),
        ({"predict": "failed"}, "predict", False, "failed", {"predict": "failed"}),
        (
            {"predict": "done", "stitch": "running"}, "predict", True, "running",
            {"predict": "done", "stitch": "running", "relabel": "waiting", "pyramid": "waiting"},
        ),
        (
            {"predict": "done", "stitch": "running"}, "predict relabel", True, "running",
            {"predict": "done", "stitch": "running", "relabel": "running", "pyramid": "waiting"},
        ),
        (
            {"predict": "done", "stitch": "stopped"}, "predict relabel", False, "stopped",
            {"predict": "done", "stitch": "stopped", "relabel": "stopped", "pyramid": "waiting"},
        ),
        (
            {"predict": "done", "stitch": "running"}, "predict relabel", False, "stopped",
            {"predict": "done", "stitch": "stopped", "relabel": "stopped", "pyramid": "waiting"},
        ),
        (
            {"predict": "done", "stitch": "done"}, "predict relabel", False, "done",
            {"predict": "done", "stitch": "done", "relabel": "done", "pyramid": "done"},
        ),
    ],
)  # fmt: skip
def test_the_same_facts_give_the_same_words(tmp_path, told, begun, alive, run, words):
    record = {"stages": {name: {"state": state} for name, state in told.items()}}
    # The ledger's document has sums of all stages with a journal from the beginning.
    document = {"stages": {name: {"totals": {"bytes": 0}} for name in ("predict", *PARTS)}}
    for name, entry in record["stages"].items():
        document["stages"].setdefault(name, {}).update(entry)
    for said in (record, document):
        entries = stage_entries(said, begun.split())
        state = run_state_of(entries.values(), alive)
        assert state == run
        stages = [
            stage_status(name, entry, None, state, tmp_path, time.time())
            for name, entry in entries.items()
        ]
        assert {stage.name: stage.state for stage in stages} == words
        assert list(words) == [stage.name for stage in stages]
