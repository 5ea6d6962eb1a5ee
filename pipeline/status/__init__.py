"""How far a run is, from journal or ledger."""
