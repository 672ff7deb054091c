"""The pictures of docs/int8.md, drawn from the lab's own weights: `python -m benchmark.studies.pictures`.

Writes int8-weights.png, int8-inputs.png, int8-headline.png and int8-neighbour.png. All show one matrix product: the
one whose input has the largest entry, where rounding has most to lose.
"""

import argparse
from pathlib import Path

import numpy as np

from lab04 import ROOT, console, labs, options
from lab04.compare.charts import pyplot, save
from lab04.quantise import preparation
from lab04.read import classifier, texts

HEADLINE = "Cybersecurity breach exposes NHS patient records"
GREY, BEFORE, AFTER = "#777777", labs.ORANGE, labs.BLUE
NEIGHBOURS = 300  # training headlines among which the neighbour of a picture is looked for
SHOWN = 28  # weights or values of a close-up
NEIGHBOUR_STEPS = 4  # the same for the values of a headline beside its neighbour
NEAR = 10  # steps: the close-up of weights shows those that are smaller, or the steps would be too narrow to see


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmark.studies.pictures", description=console.first_line(__doc__)
    )
    options.add_model_options(parser)
    parser.add_argument("--output", type=Path, default=ROOT / "docs", help="folder of the pictures (default: docs)")
    arguments = parser.parse_args()

    product = Product(classifier.load(arguments.model, arguments.labels))
    arguments.output.mkdir(parents=True, exist_ok=True)
    for name, draw in (
        ("weights", draw_weights),
        ("inputs", draw_inputs),
        ("headline", draw_headline),
        ("neighbour", draw_neighbour),
    ):
        path = arguments.output / f"int8-{name}.png"
        save(draw(pyplot(), product), path)
        print(f"Wrote {path}")


class Product:
    """One matrix product of the network: its weights, and what its input looks like over typical headlines.

    weight [out, in]; moment [in, in] second moments of the input; largest [in] largest entry of each input column;
    headline [tokens, in] its input for HEADLINE, neighbour that of the one of NEIGHBOURS training headlines that makes
    its steps coarsest in a batch of two. All float32, before any preparation.
    """

    def __init__(self, fp32: classifier.Classifier):
        batches = preparation.typical_inputs(fp32)
        moments: dict = {}
        largest: dict = {}
        headline: dict = {}

        def look(module, inputs):
            rows = inputs[0].flatten(0, -2)
            moments[module] = moments.get(module, 0) + rows.T @ rows
            largest[module] = rows.abs().amax(0).maximum(largest.get(module, rows.new_zeros(())))

        preparation.observe(fp32.model, batches, look)
        module = max(largest, key=lambda module: float(largest[module].max()))
        preparation.observe(
            fp32.model, [fp32.encode([HEADLINE])], lambda one, inputs: headline.update({one: inputs[0].flatten(0, -2)})
        )
        self.name = next(name for name, one in fp32.model.named_modules() if one is module)
        self.weight, self.moment = module.weight.data, moments[module]
        self.largest, self.headline = largest[module].numpy(), headline[module].numpy()
        rows: list[np.ndarray] = []
        some = texts.training_headlines()[:NEIGHBOURS]
        preparation.observe(
            fp32.model,
            [fp32.encode([text]) for text in some],
            lambda one, inputs: rows.append(inputs[0].flatten(0, -2).numpy()) if one is module else None,
        )
        furthest = max(
            range(len(rows)), key=lambda place: to_bytes(self.scaled(np.concatenate([self.headline, rows[place]])))[1]
        )
        self.neighbour, self.neighbour_text = rows[furthest], some[furthest]

    def scaled(self, values: np.ndarray) -> np.ndarray:
        """Values [tokens, in] after `preparation.scale_inputs`."""
        return values / np.sqrt(np.maximum(self.largest, 1))


def to_bytes(values: np.ndarray) -> tuple[np.ndarray, float, int]:
    """Values as whole numbers 0..255 with their scale and zero point, as both runtimes do with every input.

    value = scale * (number - zero point), to half a scale; 0 is exact.
    """
    low, high = min(float(values.min()), 0.0), max(float(values.max()), 0.0)
    scale = (high - low) / 255
    zero_point = round(-low / scale)
    return np.clip(np.rint(values / scale) + zero_point, 0, 255).astype(int), scale, zero_point


def draw_weights(plt, product: Product):
    """Some weights of one row: FP32, rounded to the nearest step, and rounded so that errors cancel."""
    matrix = product.weight.numpy()
    row = int(np.abs(matrix).max(axis=1).argmin())  # any would do; in the one of the smallest scale few weights are 0
    weights = matrix[row]
    scale = np.abs(weights).max() / preparation.STEPS
    cancelling = preparation.round_matrix(product.weight, product.moment).numpy()[row]
    near = np.flatnonzero(np.abs(weights) < NEAR * scale)[:SHOWN]
    shown, place = weights[near], np.arange(len(near))

    figure, axes = plt.subplots(figsize=(10, 5), layout="constrained")
    for step in range(-NEAR, NEAR + 1):
        axes.axhline(step, color="#E4E4E4", linewidth=0.8, zorder=0)
    axes.scatter(place, shown / scale, s=60, facecolors="none", edgecolors="black", label="FP32 weight", zorder=3)
    axes.scatter(place - 0.18, np.rint(shown / scale), s=26, marker="s", color=BEFORE, label="nearest step", zorder=2)
    axes.scatter(
        place + 0.18,
        cancelling[near] / scale,
        s=34,
        marker="^",
        color=AFTER,
        label="the lab's step: errors of the row cancel",
        zorder=2,
    )
    axes.set_yticks(range(-NEAR, NEAR + 1, 2))
    axes.set_ylabel(f"steps of {scale:.5f} (the row's scale)")
    axes.set_xlabel(
        f"{len(near)} of the {len(weights)} weights of one row of {product.name}, some of those below {NEAR} steps"
    )
    axes.set_xticks([])
    axes.set_title("A row of weights before and after rounding: each is stored as a whole number of steps", loc="left")
    axes.set_xlim(-0.8, len(near) - 0.2)
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def draw_inputs(plt, product: Product):
    """The largest entry of every input column before and after scaling, and the step one INT8 scale then has."""
    before = product.largest
    scales = np.sqrt(np.maximum(before, 1))
    after = before / scales
    figure, panels = plt.subplots(1, 2, figsize=(10, 4.6), layout="constrained", sharey=True)
    for axes, columns, colour, title, divided in (
        (panels[0], before, BEFORE, "Before", np.ones_like(scales)),
        (panels[1], after, AFTER, "After scaling", scales),
    ):
        codes, step, zero_point = to_bytes(product.headline / divided)
        lost = (codes == zero_point).mean()
        axes.bar(np.arange(len(columns)), columns, width=3, color=colour)
        axes.set_xlabel(f"input column of {product.name}", fontsize=9)
        axes.set_title(
            f"{title}: largest {columns.max():.1f}, median {np.median(columns):.1f}\n"
            f"One headline: a step is {step:.3f},\n{lost:.0%} of the values become 0",
            loc="left",
            fontsize=11,
        )
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("largest entry over typical headlines")
    return figure


def draw_headline(plt, product: Product):
    """One headline's input as numbers 0..255: the scale is the width of a step, the zero point the number of 0."""
    values = product.scaled(product.headline)
    codes, scale, zero_point = to_bytes(values)
    figure, (above, below) = plt.subplots(2, 1, figsize=(10, 6.4), layout="constrained")
    above.hist(values.ravel(), bins=128, color=AFTER)
    above.set_yscale("log")
    above.set_ylabel("values")
    above.set_title(
        f"“{HEADLINE}”\nits {values.size:,} inputs of one product, and the whole numbers they are stored as",
        loc="left",
        fontsize=12,
    )
    above.set_xlabel("FP32 value")
    numbers = above.secondary_xaxis(
        -0.28, functions=(lambda value: value / scale + zero_point, lambda number: (number - zero_point) * scale)
    )
    numbers.set_xticks(sorted({0, 64, 128, 192, 255, zero_point}))
    numbers.set_xlabel(f"whole number = value / {scale:.4f} (scale) + {zero_point} (zero point)")
    above.axvline(0, color="black", linewidth=0.8, linestyle=":")

    first = values[0, :SHOWN]
    back = scale * (codes[0, :SHOWN] - zero_point)
    place = np.arange(SHOWN)
    below.bar(place - 0.2, first, 0.4, color=GREY, label="FP32")
    below.bar(place + 0.2, back, 0.4, color=AFTER, label="scale × (number − zero point)")
    for x, value, number in zip(place, np.maximum(np.maximum(first, back), 0), codes[0, :SHOWN], strict=True):
        below.annotate(
            str(number), (x, value), (0, 2), textcoords="offset points", ha="center", fontsize=7, color="#333333"
        )
    below.axhline(0, color="black", linewidth=0.6)
    below.set_xticks([])
    below.set_title(
        f"The first {SHOWN} values of its first token [CLS], and their whole numbers", loc="left", fontsize=11
    )
    below.set_ylabel("value")
    below.legend(frameon=False, ncols=2, fontsize=9, loc="best")
    for axes in (above, below):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_neighbour(plt, product: Product):
    """The same few values of one headline on the steps it has alone, and on those it has beside a neighbour."""
    values, other = product.scaled(product.headline), product.scaled(product.neighbour)
    near = NEIGHBOUR_STEPS * to_bytes(values)[1]
    shown = values[0][np.abs(values[0]) < near][:SHOWN]
    figure, panels = plt.subplots(2, 1, figsize=(10, 6.4), layout="constrained", sharex=True, sharey=True)
    beside = f"Beside “{product.neighbour_text}”"
    for axes, batch, title in zip(panels, (values, np.concatenate([values, other])), ("Alone", beside), strict=True):
        _, scale, _ = to_bytes(batch)
        back = scale * np.rint(shown / scale)
        reach = int(np.abs(shown).max() / scale) + 1
        for step in range(-reach, reach + 1):
            axes.axhline(step * scale, color="#E4E4E4", linewidth=0.8, zorder=0)
        place = np.arange(len(shown))
        axes.vlines(place, shown, back, color=GREY, linewidth=1)
        axes.scatter(place, shown, s=40, facecolors="none", edgecolors="black", label="FP32 value", zorder=3)
        axes.scatter(place, back, s=26, marker="s", color=AFTER, label="the step it is stored as", zorder=2)
        axes.set_title(
            f"{title}: values from {batch.min():.2f} to {batch.max():.2f}, a step is {scale:.4f}",
            loc="left",
            fontsize=11,
        )
        axes.set_xticks([])
        axes.spines[["top", "right"]].set_visible(False)
    figure.suptitle(f"“{HEADLINE}”: {len(shown)} of its inputs of one product", x=0.01, ha="left")
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    console.run(main, "requirements/bench.txt")
