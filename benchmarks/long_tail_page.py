"""The page and the picture of long_tail.py."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import Any

from miniature import spread

METRICS = ("AP", "APr", "APc", "APf")
COLOURS = {  # Okabe and Ito's, as in docs/plot_gradients.py; dashed: linear classifiers
    "cross-entropy": ("#000000", "--"),
    "eql": ("#cc79a7", "--"),
    "seesaw-p0-linear": ("#0072b2", "--"),
    "seesaw-linear": ("#d55e00", "--"),
    "cross-entropy-normalized": ("#000000", "-"),
    "seesaw-p0": ("#0072b2", "-"),
    "seesaw": ("#d55e00", "-"),
    "seesaw-q2": ("#e69f00", "-"),
}
GAINS = (("seesaw", "seesaw-p0", "normalised"), ("seesaw-linear", "seesaw-p0-linear", "linear"))
LIMIT_TITLES = {"300": "300 detections an image", "none": "no limit"}


def values(results: dict[str, Any], depth: str, name: str, limit: str, metric: str) -> list[float]:
    """A metric of every seed, in percent."""
    return [100 * run[limit][metric] for run in results["runs"][depth][name]]


def differences(
    results: dict[str, Any], depth: str, pair: tuple[str, str], limit: str, metric: str = "APr"
) -> list[float]:
    """What one method is above another, seed by seed."""
    ours, theirs = (values(results, depth, name, limit, metric) for name in pair)
    return [a - b for a, b in zip(ours, theirs, strict=True)]


def signed(numbers: list[float]) -> str:
    spread_of = f" ± {stdev(numbers):.1f}" if len(numbers) > 1 else ""
    return f"{mean(numbers):+.1f}{spread_of}".replace("-", "−")


def draw(results: dict[str, Any], path: Path) -> None:
    """AP of rare classes by method under each limit, and what the factor S adds; lines are means, dots are seeds."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    depths = list(results["runs"])
    places = range(len(depths))
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.4), dpi=100, layout="constrained")
    for axis, (limit, title) in zip(axes, LIMIT_TITLES.items(), strict=False):
        for name, (colour, style) in COLOURS.items():
            seeds = [values(results, depth, name, limit, "APr") for depth in depths]
            axis.plot(places, [mean(s) for s in seeds], style, color=colour, linewidth=2, label=results["titles"][name])
            for place, numbers in zip(places, seeds, strict=True):
                axis.plot([place] * len(numbers), numbers, "o", color=colour, markersize=3.5, alpha=0.7)
        axis.set_title(f"({'ab'[limit == 'none']}) AP of rare classes, {title}", loc="left", fontsize=11)
        axis.set_ylabel("APr, percent")
    top = max(axis.get_ylim()[1] for axis in axes[:2])
    for axis in axes[:2]:
        axis.set_ylim(-0.5, top)
    for ours, theirs, layer in GAINS:
        for limit, colour in (("300", "#d55e00"), ("none", "#666666")):
            seeds = [differences(results, depth, (ours, theirs), limit) for depth in depths]
            label = f"{layer}, {'limit 300' if limit == '300' else 'no limit'}"
            style = "-" if layer == "normalised" else "--"
            axes[2].plot(places, [mean(s) for s in seeds], style, color=colour, linewidth=2, label=label)
            for place, numbers in zip(places, seeds, strict=True):
                axes[2].plot([place] * len(numbers), numbers, "o", color=colour, markersize=3.5, alpha=0.7)
    axes[2].axhline(0, color="#444444", linewidth=0.7)
    axes[2].set_title("(c) what S adds: p = 0.8 minus p = 0", loc="left", fontsize=11)
    axes[2].set_ylabel("gain in APr, points")
    for axis in axes:
        axis.set_xticks(places, depths)
        axis.set_xlabel("depth of the tail, largest : smallest class")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    axes[2].legend(frameon=False, title="classifier, detections", loc="center right", bbox_to_anchor=(1, 0.36))
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, frameon=False, fontsize=10)
    figure.suptitle("Classification on fixed features with LVIS's counts (not detection)", fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    plt.close(figure)


def summary(results: dict[str, Any]) -> str:
    """Three sentences on what is seen."""
    shallow, middle, *_, deep = results["runs"]

    def gain(depth: str, limit: str, pair: tuple[str, str, str] = GAINS[0]) -> str:
        return signed(differences(results, depth, pair[:2], limit))

    rare = {name: f"{mean(values(results, deep, name, '300', 'APr')):.1f}" for name in COLOURS}
    return (
        f"With LVIS's own counts and its limit of 300 detections, APr is {rare['cross-entropy']} by cross-entropy, "
        f"{rare['eql']} by EQL, {rare['seesaw-p0']} by Seesaw's classifier with p = 0 and {rare['seesaw']} with p = "
        f"0.8. The factor S, which is the last step, adds {gain(deep, '300')} points there and {gain(middle, '300')} "
        f"at {middle}, but only {gain(shallow, '300')} at {shallow}, and without a limit on detections nothing at "
        f"{shallow} ({gain(shallow, 'none')}). On a linear classifier S adds nothing uncut "
        f"({gain(deep, '300', GAINS[1])}) and {gain(shallow, '300', GAINS[1])} at {shallow}."
    )


def table(results: dict[str, Any], depth: str) -> list[str]:
    columns = [(limit, metric) for limit in LIMIT_TITLES for metric in METRICS]
    heads = [f"{metric}, {'300' if limit == '300' else 'no limit'}" for limit, metric in columns]
    lines = ["| | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(columns)]
    for name, title in results["titles"].items():
        cells = [spread(values(results, depth, name, limit, metric)) for limit, metric in columns]
        lines.append(f"| {title} | " + " | ".join(cells) + " |")
    return lines


def gain_table(results: dict[str, Any]) -> list[str]:
    """What S adds, by depth, limit and classifier."""
    columns = [(pair, limit) for pair in GAINS for limit in LIMIT_TITLES]
    heads = [f"{pair[2]}, {LIMIT_TITLES[limit]}" for pair, limit in columns]
    lines = ["| APr, p = 0.8 minus p = 0 | " + " | ".join(heads) + " |", "|---|" + "---:|" * len(columns)]
    for depth in results["runs"]:
        cells = [signed(differences(results, depth, pair[:2], limit)) for pair, limit in columns]
        lines.append(f"| {depth} | " + " | ".join(cells) + " |")
    return lines


def rate_table(results: dict[str, Any]) -> list[str]:
    """What each rate gave with the tuning seed."""
    rates = list(next(iter(results["tried"].values())))
    lines = ["| rate | " + " | ".join(rates) + " |", "|---|" + "---:|" * len(rates)]
    for name, found in results["tried"].items():
        chosen = f"{results['budget']['rates'][name]:g}"
        cells = [f"{100 * found[rate]['AP']:.1f} ({100 * found[rate]['APr']:.1f})" for rate in rates]
        cells = [f"**{cell}**" if rate == chosen else cell for rate, cell in zip(rates, cells, strict=True)]
        lines.append(f"| {results['titles'][name]} | " + " | ".join(cells) + " |")
    return lines


def equal_rates(results: dict[str, Any]) -> list[str]:
    """Both of a pair at each rate, with the tuning seed."""
    ours, theirs, _ = GAINS[0]
    tried = results["tried"]
    lines = ["| rate | " + " | ".join(tried[ours]) + " |", "|---|" + "---:|" * len(tried[ours])]
    for metric in METRICS[1:]:
        cells = [
            f"{100 * tried[theirs][rate][metric]:.1f}, {100 * tried[ours][rate][metric]:.1f}" for rate in tried[ours]
        ]
        lines.append(f"| {metric}, p = 0 and p = 0.8 | " + " | ".join(cells) + " |")
    return lines


def page(results: dict[str, Any], tried: str) -> str:
    groups, budget, test = results["classes"], results["budget"], results["test"]
    lines = [
        "# The factor S and the depth of the tail",
        "",
        "<!-- made by benchmarks/long_tail.py; the last section by hand, in long_tail-tried.md -->",
        "",
        "![AP of rare classes against the depth of the tail by method, and what the factor S adds]"
        "(../images/long_tail.png)",
        "",
        summary(results),
        "",
        "**This is classification on fixed features, not detection**: clusters of points, no images, no boxes, no "
        f"backbone. {sum(groups.values()):,} classes ({groups['r']} rare, {groups['c']} common, {groups['f']} "
        f"frequent) have the counts of LVIS v1 train, from 1 object to {results['largest']:,}; every rare and common "
        "class lies beside a frequent one. The tail is made shallower by cutting the head: of no class more than 50, "
        "600 or 2,000 objects are kept, and rare classes keep theirs. "
        f"Percent, mean ± standard deviation over {budget['seeds']} seeds.",
        "",
        *gain_table(results),
        "",
    ]
    for depth in results["runs"]:
        title = "Uncut" if depth == "uncut" else depth
        lines += [f"## {title}: {results['objects'][depth]:,} objects", "", *table(results, depth), ""]
    lines += [
        "## How it is done",
        "",
        "- **Classifiers** are those of the recipes: linear for cross-entropy and EQL, normalised with temperature 20 "
        "and an objectness branch for Seesaw, and the crossings of the two. The losses are those of `tailseg.losses`.",
        f"- **Budget**, the same for all: {budget['steps']} steps of SGD with momentum 0.9, weight decay 1e-4, warm-up "
        f"and the two drops of the 1x schedule. A step sees {budget['rows']:,} RoIs: one object of every class, "
        "weighted by the class's number of objects, and background with three times the weight of all objects. That is "
        "the random sampler's gradient on average, without its noise. Seesaw's counts are those of the data.",
        "- **The rate** is each method's best by AP with 300 detections on the uncut tail, with a seed that is not "
        "among those above (AP, APr in brackets, percent):",
        "",
        *rate_table(results),
        "",
        "- **At equal rates** p = 0 and p = 0.8 compare so (uncut, 300 detections, the same single seed):",
        "",
        *equal_rates(results),
        "",
        f"- **Test**: {test['images']:,} images of {test['objects']} objects and {test['background']} background "
        "candidates, at least 8 objects of a class and beyond that as frequent as in training; one test set a seed, "
        "for all depths. Every candidate is a detection of every class, the best 300 of an image are kept (LVIS's "
        "limit for its 1,203 classes), and AP is LVIS's: detections of classes that are neither present nor known to "
        "be absent do not count. Known to be absent are four look-alikes and four other classes an image.",
        "",
        tried.rstrip(),
        "",
        f"Made by `python benchmarks/long_tail.py --seeds {budget['seeds']}` on {results['machine']['processor']}, "
        f"{results['machine']['threads']} thread: {results['seconds']['processor'] / 60:.0f} processor minutes.",
        "",
    ]
    return "\n".join(lines)
