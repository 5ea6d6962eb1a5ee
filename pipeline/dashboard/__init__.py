"""The web page of runs and the report of one: block map, speed, workers, failures, scores."""
