"""Neuron segmentation of large electron-microscopy volumes with affinity-guided queries.

The three sub-packages are the top-level folders of the repository; `agq/` links to them.
"""

__all__ = ["__version__"]


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        return version("agq-pipeline")
    raise AttributeError(f"module 'agq' has no attribute {name!r}")
