"""The web page of a run: block map, speed, workers and failures, from the journal or the ledger."""
