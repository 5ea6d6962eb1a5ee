"""Plots of scores, as png files."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from agq.pipeline.evaluate.block_scores import BlockReport
from agq.pipeline.evaluate.scores import EvaluationReport
from agq.pipeline.evaluate.sweep import Criterion, Point, Search

_SHORT = {"as_is": "as is", "background_filled": "0 filled", "background_ignored": "0 ignored"}


def plot_report(path: Path, report: EvaluationReport, blocks: BlockReport | None = None) -> None:
    """Draw split and merge entropy of each treatment of background, and of single blocks."""
    figure = Figure(figsize=(9 if blocks else 4.5, 3.6), layout="constrained")
    axes = figure.subplots(1, 2 if blocks else 1, squeeze=False)[0]
    scores = {name: s for name, s in report.scores().items() if s is not None}
    names = [f"{_SHORT[name]}\nRand {s.adapted_rand_error:.3f}" for name, s in scores.items()]
    split = [s.voi_split for s in scores.values()]
    axes[0].bar(names, split, label="split")
    axes[0].bar(names, [s.voi_merge for s in scores.values()], bottom=split, label="merge")
    axes[0].set_ylabel("variation of information (bits)")
    axes[0].legend()
    if blocks is not None:
        filled = [block.filled for block in blocks.blocks]
        axes[1].scatter([s.voi_split for s in filled], [s.voi_merge for s in filled], s=8)
        axes[1].set_xlabel("VOI split of a block, 0 filled")
        axes[1].set_ylabel("VOI merge")
    _save(figure, path)


def plot_curves(path: Path, curves: Sequence[Point], marked: Sequence[Point]) -> None:
    """Draw split against merge entropy over the thresholds of each method, and marked points."""
    figure = Figure(figsize=(5, 4), layout="constrained")
    axes = figure.subplots()
    for method in dict.fromkeys(point.method for point in curves):
        scores = [p.scores["background_filled"] for p in curves if p.method == method]
        line = [(s.voi_split, s.voi_merge) for s in scores if s is not None]
        axes.plot(*zip(*line, strict=True), marker=".", label=method)
    for point in marked:
        filled = point.scores["background_filled"]
        if filled is not None:
            name = f"{point.method}: {filled.voi_sum:.3f}"
            axes.plot(filled.voi_split, filled.voi_merge, "*", markersize=12, label=name)
    axes.set_xlabel("VOI split (bits), 0 filled")
    axes.set_ylabel("VOI merge (bits)")
    axes.legend()
    _save(figure, path)


def plot_search(path: Path, search: Search, criterion: Criterion) -> None:
    """Draw the scores of all pairs of thresholds, and split against merge entropy."""
    values = {(p.setting["across"], p.setting["within"]): p.value(criterion) for p in search.points}
    grid = [[values[a, w] for a in search.across] for w in search.within]
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    image = left.imshow(grid, origin="lower", aspect="auto", cmap="viridis_r")
    figure.colorbar(image, label=f"{criterion.replace('_', ' ')}, 0 filled: lower is better")
    left.set_xticks(range(len(search.across)), [f"{v:g}" for v in search.across])
    left.set_yticks(range(len(search.within)), [f"{v:g}" for v in search.within])
    left.set(xlabel="across", ylabel="within")
    best = search.best
    column = search.across.index(best.setting["across"])
    row = search.within.index(best.setting["within"])
    left.plot(column, row, "*", color="red", markersize=14)
    points = sorted(search.points, key=lambda point: point.setting["within"])
    for across in search.across:
        scores = [p.scores["background_filled"] for p in points if p.setting["across"] == across]
        line = [(s.voi_split, s.voi_merge) for s in scores if s is not None]
        right.plot(*zip(*line, strict=True), marker=".", label=f"across {across:g}")
    if filled := best.scores["background_filled"]:
        name = f"within {best.setting['within']:g}: {filled.voi_sum:.3f}"
        right.plot(filled.voi_split, filled.voi_merge, "*r", markersize=12, label=name)
    right.set(xlabel="VOI split (bits), 0 filled", ylabel="VOI merge (bits)")
    right.legend(fontsize=8)
    _save(figure, path)


def _save(figure: Figure, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
