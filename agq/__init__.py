"""Neuron segmentation of large electron-microscopy volumes with affinity-guided queries.

What scripts and notebooks use is here, imported when it is first named. The three sub-packages are
the top-level folders of the repository; `agq/` links to them.
"""

from agq.caches import name_writable_caches

TYPE_CHECKING = False
if TYPE_CHECKING:
    from agq.blockwise.predict.predictor import Prediction, Predictor
    from agq.blockwise.volumes.open import open_volume
    from agq.errors import InputError, RunStoppedError
    from agq.pipeline.api import Run, segment, stitch_fragments
    from agq.pipeline.config.schema import load_config

    __version__: str

__all__ = [
    "InputError",
    "Prediction",
    "Predictor",
    "Run",
    "RunStoppedError",
    "__version__",
    "load_config",
    "open_volume",
    "segment",
    "stitch_fragments",
]

_HOMES = {
    "InputError": "agq.errors",
    "Prediction": "agq.blockwise.predict.predictor",
    "Predictor": "agq.blockwise.predict.predictor",
    "Run": "agq.pipeline.api",
    "RunStoppedError": "agq.errors",
    "load_config": "agq.pipeline.config.schema",
    "open_volume": "agq.blockwise.volumes.open",
    "segment": "agq.pipeline.api",
    "stitch_fragments": "agq.pipeline.api",
}


name_writable_caches()


def __getattr__(name: str) -> object:
    if name == "__version__":
        from importlib.metadata import version

        value: object = version("agq-pipeline")
    elif name in _HOMES:
        from importlib import import_module

        value = getattr(import_module(_HOMES[name]), name)
    else:
        raise AttributeError(f"module 'agq' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
