"""How far a run is, and the learning rate that follows from it."""

import math

from agq.model.training.config import OptimizerConfig


def progress(step: int, steps: int, minutes: float, budget: float | None) -> float:
    """Return the share of the schedule that is over, in [0, 1].

    Parameters
    ----------
    step, steps : int
        Steps done and planned.
    minutes : float
        Training time so far, earlier parts of a resumed run included.
    budget : float or None
        Minutes planned; None where only steps count.
    """
    by_time = minutes / budget if budget else 0.0
    return min(1.0, max(step / steps, by_time))


def learning_rate(step: int, done: float, config: OptimizerConfig) -> float:
    """Return the rate of a step: linear warm-up by steps, times a half cosine of the progress.

    Parameters
    ----------
    step : int
        Steps done before this one.
    done : float
        `progress` before this step.
    config : OptimizerConfig
        Base rate and warm-up.
    """
    warmup = min(1.0, (step + 1) / config.warmup_steps) if config.warmup_steps else 1.0
    return config.learning_rate * warmup * 0.5 * (1.0 + math.cos(math.pi * done))
