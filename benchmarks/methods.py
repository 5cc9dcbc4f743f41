"""Gold score against KL of several methods' runs, one plot: does what was learnt help, and how far from the start is it?

    python benchmarks/methods.py --output benchmarks/methods.png DPO=runs/dpo0,runs/dpo1 PPO=runs/ppo0,runs/ppo1

Each run is one of scripts/run_loop.sh on the quickstart's task, evaluated: summary.json has the numbers. A line is a run, a
point one of its rounds, with the gold score's 95 % interval over prompts. Also prints the last round of each run.
"""

import argparse
import json
import sys
from pathlib import Path

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from report.plot import BLUE, GREEN, GREY, ORANGE, RED, save, style

COLORS = (BLUE, ORANGE, GREEN, RED, GREY)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("methods", nargs="+", metavar="NAME=RUN[,RUN ...]")
    parser.add_argument("--output", type=Path, required=True, help="a .png")
    args = parser.parse_args()
    figure = Figure(figsize=(8, 5.2), dpi=130, facecolor="white", layout="constrained")
    axis = figure.subplots()
    style(axis, "Gold score against KL", "held-out prompts; a line for each seed, a point for each evaluation")
    for color, method in zip(COLORS, args.methods, strict=False):
        name, _, runs = method.partition("=")
        for number, run in enumerate(runs.split(",")):
            rounds = json.loads(Path(run, "summary.json").read_text())["rounds"]
            kl, gold = ([summary[key] for summary in rounds] for key in ("kl", "gold_mean"))
            low, high = zip(*(summary["gold_mean_ci"] for summary in rounds), strict=True)
            axis.vlines(kl, low, high, color=color, linewidth=1.2, alpha=0.5)
            axis.plot(kl, gold, color=color, marker="o", markersize=5, linewidth=1.6, label=None if number else name)
            print(f"{name} {run}: gold {gold[0]:.3f} -> {gold[-1]:.3f} [{low[-1]:.3f}, {high[-1]:.3f}], KL {kl[-1]:.2f}")
    axis.set_xlabel("KL to the initial policy, nats per response")
    axis.legend(frameon=False)
    save(figure, args.output)


if __name__ == "__main__":
    main()
