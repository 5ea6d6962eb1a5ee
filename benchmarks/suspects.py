"""How good the list of suspects is: errors of AC3 z 0-39 that an oracle mends in its order.

    EM_DATA=/path/to/folder python benchmarks/suspects.py

Segments AC3 if `--run` holds no run yet. The truth only judges: probabilities are those of the
release, fitted on AC4. The same candidates are also taken by the voxels of their smaller side, and
at random (mean of ten orders). Bars: of the first 100 at least 60 are errors, and mending them
gains three times as much variation of information as the first 100 by size, and ten times as much
as at random.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from agq.blockwise.storage.files import write_atomic
from agq.pipeline.cli.score.score import truth_of
from agq.pipeline.evaluate.baseline.compare import fragment_counts
from agq.pipeline.folder import RunFolder
from agq.pipeline.suspects.coefficients import DEFAULT
from agq.pipeline.suspects.find import LEAST_VOXELS, all_owners, finder
from agq.pipeline.suspects.model import Model
from agq.pipeline.suspects.oracle import Oracle, Truth, forest, ranked

ORDERS = 10
FIRST = 100


def main() -> None:
    """Print the figures and draw the curves."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--run", type=Path, default=Path("runs/ac3"))
    parser.add_argument("--config", default="configs/ac3.yaml")
    parser.add_argument("--model", type=Path, help="coefficients; default: those of the release")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--picture", type=Path, default=Path("docs/suspects.png"))
    options = parser.parse_args()
    run = RunFolder(options.run)
    if not run.exists():
        command = ["agq", "run", options.config, "--set", f"run_dir={options.run}"]
        subprocess.run([sys.executable, "-m", *command], check=True)
    model = Model.load(options.model) if options.model else DEFAULT
    with finder(run, LEAST_VOXELS) as found:
        tables = [*found.cuts(model.value, keep_trees=True), *found.pairs()]
    owners = all_owners(run)
    truth = Truth.of(found.fragments, owners, fragment_counts(run, truth_of(run, None)))
    wrong = [truth.worth(table) > 0 for table in tables]
    oracle = Oracle(truth, forest(found, owners))
    rows = sum(len(table.rows) for table in tables)
    random = np.random.default_rng(0)
    orders = {
        "suspects": [model.value(table) for table in tables],
        "by size": [table.rows["sides"][:, 0].astype(float) for table in tables],
        **{f"random {k}": [random.random(len(t.rows)) for t in tables] for k in range(ORDERS)},
    }
    curves, errors = {}, {}
    for name, values in orders.items():
        order = ranked(tables, values)[: options.steps]
        judged = [bool(wrong[table][row]) for table, row in order]
        fixes = [
            (tables[t].kind, *(int(tables[t].rows[r][end]) for end in ("u", "v"))) if bad else None
            for (t, r), bad in zip(order, judged, strict=True)
        ]
        curves[name] = np.array(oracle.curve(fixes))
        errors[name] = sum(judged[:FIRST])
    at_random = [name for name in orders if name.startswith("random")]
    curves["at random"] = np.mean([curves.pop(name) for name in at_random], axis=0)
    errors["at random"] = float(np.mean([errors.pop(name) for name in at_random]))
    gain = {
        name: float(curve[0] - curve[min(FIRST, len(curve) - 1)]) for name, curve in curves.items()
    }
    print(f"{run.path.name}: {rows} candidates, {sum(int(w.sum()) for w in wrong)} of them errors")
    print(f"VOI before: {curves['suspects'][0]:.3f}")
    for name in curves:
        print(f"first {FIRST} {name}: {errors[name]:g} errors, VOI -{gain[name]:.4f}")
    for name in ("by size", "at random"):
        ratio = f"{gain['suspects'] / gain[name]:.1f} times as much as" if gain[name] else "no VOI"
        print(f"the first {FIRST} suspects: {ratio} {name}")
    report = {"errors": errors, "gain": gain, "curves": {n: c.tolist() for n, c in curves.items()}}
    write_atomic(run.path / "suspects" / "oracle.json", json.dumps(report).encode())
    figure = Figure(figsize=(6, 3.6), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    for name, curve in curves.items():
        axes.plot(curve, label=name)
    axes.set(xlabel="suspects looked at, true errors mended", ylabel="VOI left, bits")
    axes.legend(frameon=False)
    figure.savefig(options.picture)


if __name__ == "__main__":
    main()
