"""Draw the outcomes of `benchmarks/scheduling.py`: time to target over that of synchronous FedAvg.

    python benchmarks/scheduling_figure.py outcomes/scheduling.jsonl docs/figures/scheduling.svg

One panel for each setting and kind of data; a dot is a geometric mean, a line its 95 % interval.
"""

import argparse
import json
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure
from scheduling import ARMS, HORIZON, TARGET, ratio

BASE = "sync FedAvg"


def draw(rows: list[dict[str, object]]) -> Figure:
    """The panels, settings beside each other, one row for each kind of data."""
    found = {(r["setting"], r["data"], r["seed"], r["arm"]): r for r in rows}
    settings = [s for s in HORIZON if any(key[0] == s for key in found)]
    arms = [arm for arm in ARMS if arm != BASE and any(key[3] == arm for key in found)]
    figure = Figure(figsize=(2.6 * len(settings) + 1.6, 5.6), layout="constrained")
    panels = figure.subplots(len(TARGET), len(settings), sharex=True, sharey=True, squeeze=False)
    for row, data in zip(panels, TARGET, strict=True):
        for panel, setting in zip(row, settings, strict=True):
            seeds = sorted({key[2] for key in found if key[:2] == (setting, data)})
            for place, arm in enumerate(arms):
                mean, low, high, pairs = ratio(found, setting, data, seeds, arm, BASE)
                color = "#b03060" if arm.startswith("credit") else "#444444"
                if pairs > 1:
                    panel.plot([low, high], [place, place], color=color, linewidth=1)
                if pairs:
                    panel.plot([mean], [place], "o", color=color, markersize=4)
            panel.axvline(1, color="#999999", linewidth=0.8)
            panel.set_xscale("log")
            panel.set_xlim(0.03, 6)
            panel.set_title(f"{setting}, {data}", fontsize=9)
            panel.set_yticks(range(len(arms)), arms, fontsize=8)
            panel.tick_params(axis="x", labelsize=8)
    panels[0][0].invert_yaxis()  # all share it
    figure.supxlabel("time to target over that of synchronous FedAvg", fontsize=9)
    return figure


def main() -> None:
    """Draw the figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("results", type=Path)
    parser.add_argument("figure", type=Path)
    args = parser.parse_args()
    mpl.rcParams["svg.hashsalt"] = "scheduling"
    mpl.rcParams["svg.fonttype"] = "none"
    rows = [json.loads(line) for line in args.results.read_text().splitlines()]
    args.figure.parent.mkdir(parents=True, exist_ok=True)
    draw(rows).savefig(args.figure, format="svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
