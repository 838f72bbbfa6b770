"""Plots the samples of an endurance run (tests/e2e/endurance) as SVG: a curve for each figure, over the cycles.

    scripts/endurance.py TABLE SVG
"""
import sys

COLUMNS = 2


def main(table, target):
    import matplotlib
    matplotlib.use("svg")
    # The same figures give the same bytes.
    matplotlib.rcParams.update({"svg.hashsalt": "lcow", "font.size": 9})
    from matplotlib import pyplot
    with open(table, encoding="utf-8") as lines:
        names = next(lines).rstrip("\n").split("\t")
        samples = [[float(value) for value in line.split("\t")] for line in lines]
    cycles = [sample[0] for sample in samples]
    seconds = samples[-1][1]
    figures = names[2:]
    plane, axes = pyplot.subplots(-(-len(figures) // COLUMNS), COLUMNS, figsize=(8, 6), sharex=True)
    for n, place in enumerate(axes.flat):
        if n >= len(figures):
            place.axis("off")
            continue
        values = [sample[n + 2] for sample in samples]
        place.plot(cycles, values, linewidth=0.9)
        place.set_ylim(0, max(values + [1]) * 1.15)
        place.set_title(figures[n], fontsize=9)
        place.tick_params(labelbottom=True)
        place.set_xlabel("cycles")
    plane.suptitle(f"{cycles[-1]:.0f} cycles of create, run, write, commit and remove in {seconds / 60:.0f} min", fontsize=10)
    plane.tight_layout()
    plane.savefig(target, metadata={"Date": None})


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(sys.argv[1], sys.argv[2])
