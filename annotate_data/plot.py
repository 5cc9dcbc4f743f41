"""Two plots of annotated responses: the distribution of rewards, and reward against length."""

from pathlib import Path

from baton.jsonl import read

POINTS = 50_000  # about as many responses are drawn, evenly spread over the file


def plot_path(output: Path) -> Path:
    """The path of an output's plots."""
    return output.with_name(output.name + ".png")


def draw(output: Path) -> None:
    """Write the plots of an annotated file beside it."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    count = sum(len(record["rewards"]) for _, record in read(output))
    step = 1 + count // POINTS
    rewards, lengths, best = [], [], []
    for _, record in read(output):
        best.append(max(record["rewards"]))
        rewards += record["rewards"]
        lengths += map(len, record["responses"])
    rewards, lengths = rewards[::step], lengths[::step]
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    left.hist(rewards, bins=60, density=True, alpha=0.6, label="all responses")
    left.hist(best, bins=60, density=True, alpha=0.6, label="best of each prompt")
    left.set(xlabel="reward", ylabel="density")
    left.legend()
    right.scatter(lengths, rewards, s=3, alpha=0.3, linewidths=0)
    right.set(xlabel="length of the response (characters)", ylabel="reward")
    figure.savefig(plot_path(output), dpi=120)
    plt.close(figure)
