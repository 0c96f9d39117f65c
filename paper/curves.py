"""Curves of training runs side by side, from their logs: people would rather look than read
log.jsonl.

    python -m paper.curves out/c3 out/c4                 # -> curves.png
    python -m paper.curves out/* --out all.png

Stages 1 and 2 have drift, Stage 3 has KL; a dotted line marks where a stage begins. SFT and DPO
have a loss alone.
"""
import argparse
import json
import sys
from itertools import pairwise
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt  # noqa: E402  (after the choice of a backend that needs no screen)

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")       # Okabe and Ito
PANELS = {"loss": "loss (of the stage)", "drift": "drift, ||s − r||² a position",
          "kl": "KL, nats a token", "lr": "learning rate"}


def read(folder):
    """-> the lines of a run's log. Raises ValueError where there are none."""
    path = Path(folder) / "log.jsonl"
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        assert lines and all("tokens" in line and "stage" in line for line in lines)
    except (OSError, ValueError, AssertionError, TypeError):
        raise ValueError(f"{folder} is no folder of a run: {path} is missing, empty or no training log") from None
    return lines


def draw(runs, path):
    """runs {name: lines}. A panel for each quantity that some run has, over tokens."""
    panels = {key: label for key, label in PANELS.items() if any(key in line for lines in runs.values() for line in lines)}
    figure, axes = plt.subplots(len(panels), 1, figsize=(8.3, 2.2 * len(panels)), sharex=True, squeeze=False,
                                layout="constrained")
    for axis, (key, label) in zip(axes[:, 0], panels.items()):
        for i, (name, lines) in enumerate(runs.items()):
            there = [(line["tokens"], line[key]) for line in lines if key in line]
            if there:
                axis.plot(*zip(*there), color=COLOURS[i % len(COLOURS)], lw=1, label=name)
            for before, after in pairwise(lines):
                if before["stage"] != after["stage"]:
                    axis.axvline(before["tokens"], color="grey", ls=":", lw=0.8)
        values = [line[key] for lines in runs.values() for line in lines if key in line]
        if key != "lr" and min(values) > 0:
            axis.set_yscale("log")
        axis.set_ylabel(label, size=8)
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].legend(fontsize=8, ncols=3)
    axes[-1, 0].set_xlabel("tokens", size=8)
    figure.savefig(path, dpi=100, metadata={"Software": None})
    plt.close(figure)


def main(argv=None):
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("runs", nargs="+", help="folders with a log.jsonl")
    p.add_argument("--out", default="curves.png", help="the picture")
    a = p.parse_args(argv)
    try:
        draw({str(folder): read(folder) for folder in a.runs}, a.out)
    except (ValueError, OSError) as error:
        sys.exit(str(error))
    print(a.out)


if __name__ == "__main__":
    main()
