"""The YAML file that describes a run."""
