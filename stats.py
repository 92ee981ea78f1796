"""Table I with its tests of significance (section V), Table II and a plot, from run folders.

A row of Table I is the mean ± sd over runs that differ in their seed only. An ANOVA and t-tests say
which rows differ from full finetuning in fp32, and t-tests which cached rows from uncached ones.

    python stats.py runs --verbose --plot table1.png    # Table I, every p value; CCC against hours
    python stats.py runs --memory 11 48                 # and Table II: what fits in 11 and in 48 GB
"""

import argparse
import csv
import json
import sys
from pathlib import Path

import numpy as np
from scipy import stats

LEVEL = 0.05  # A difference is significant below this p value (section V).
FULL = {"method": "full", "precision": "fp32"}  # This row is the reference of all uncached ones.
# What is trained, and how: a cached row and its uncached twin agree in that.
TRAINED = str.split("method layers precision rank alpha lora_dropout")
# Runs that agree in all of ROW are seeds of one row. `cached` is true or false, and `cache` says at
# which cut and in which dtype.
ROW = TRAINED + str.split("""attributes padding eval_batch_size cached cache freeze_embedding
    processes chunk recompute""")
# All runs of a table agree in SAME, as neither scores nor hours could be compared otherwise.
# `labels` is a digest of the labels of a run's attributes: it agrees where the attributes do.
SAME = str.split("corpus splits scale encoder_sha256 labels epochs batch_size lr dropout")
# A run's result.json must have a number under each of these; true and false are 1 and 0.
NUMBERS = str.split("""seed layers rank alpha lora_dropout processes eval_batch_size
    trainable_parameters epochs batch_size lr dropout fill_seconds peak_memory_bytes
    device_memory_bytes cached freeze_embedding out_of_memory""")
# Okabe and Ito's colours can be told apart by everyone. Their faint yellow is left out.
COLORS = str.split("#0072B2 #D55E00 #009E73 #CC79A7 #56B4E9 #E69F00 #000000")


def compare(scores, reference):
    """Two-sided t-test of independent runs with pooled variance (section V).

    Takes two arrays over seeds. Returns the p value, NaN where all scores are equal, the
    difference of the means and the difference's 95 % interval.
    """
    difference = scores.mean() - reference.mean()
    # A shift of both changes no result. Where all scores are equal, it makes them zeros, and so the
    # p value NaN, where rounding would give some number.
    shift = reference[0]
    test = stats.ttest_ind(scores - shift, reference - shift)
    return test.pvalue, difference, test.confidence_interval(0.95)


def decide_mark(cached, difference, p, p_anova):
    """The mark of a row: † if it is significantly lower than its reference, ‡ if higher. If
    neither, a cached row has NS, as in the paper's table, and another has no mark.

    A t-test counts only where the ANOVA before it is significant, too.
    """
    if p < LEVEL and p_anova < LEVEL:  # NaN is below nothing.
        return "†" if difference < 0 else "‡"
    return "NS" if cached else ""


def find_uncached(row, rows, wanted):
    """The first uncached row that has the wanted settings and may be compared with `row`, or None.
    Of rows that differ in --freeze-embedding only, it is the one without, as in the paper.

    rows : of group_rows, in its order
    """
    wanted = wanted | {"scored": row["scored"], "cached": False, "several": True}
    return next((other for other in rows if wanted.items() <= other.items()), None)


def mark_attribute(rows, attribute):
    """Section V for one attribute, over the rows that have it and two seeds or more.

    Fills row["marks"], and returns a line {column: text} for each t-test.
    """
    rows = [row for row in rows if attribute in row and row["several"]]
    uncached = [row for row in rows if not row["cached"]]
    lines = []
    for full in uncached:
        if full is find_uncached(full, rows, FULL):
            full["marks"][attribute] = ""
            alike = [row for row in uncached if row["scored"] == full["scored"] and row is not full]
            lines += mark_family(full, alike, attribute)
    for row in rows:
        twin = find_uncached(row, rows, {key: row[key] for key in TRAINED})
        if row["cached"] and twin:
            # In the paper, these t-tests are not corrected (section V). Here neither a correction
            # nor an ANOVA changes a thing, as an ANOVA of two rows has the p value of their t-test.
            lines += mark_family(twin, [row], attribute)
    return lines


def mark_family(reference, rows, attribute):
    """An ANOVA over a reference and the rows that are compared with it, and a t-test of each.

    Yields a line {column: text} for each t-test, and fills row["marks"] meanwhile.
    """
    if not rows:
        return
    p_anova = stats.f_oneway(reference[attribute], *(row[attribute] for row in rows)).pvalue
    for row in rows:
        p, difference, interval = compare(row[attribute], reference[attribute])
        corrected = min(p * len(rows), 1.0)  # Bonferroni: so many t-tests. NaN stays NaN.
        row["marks"][attribute] = decide_mark(row["cached"], difference, corrected, p_anova)
        yield {
            "row": row["name"],
            "attribute": attribute,
            "against": reference["name"],
            "difference": format_ccc(difference),
            "95 % interval": " to ".join(map(format_ccc, interval)),
            "p": f"{p:.3g}",
            "corrected": f"{corrected:.3g}",
            "ANOVA's p": f"{p_anova:.3g}",
        }


def find_runs(top):
    """Folders of runs: `top` itself and up to two folders below. Links are followed."""
    paths = [path for depth in ("", "*/", "*/*/") for path in Path(top).glob(f"{depth}config.json")]
    # The folder of an encoder holds a config.json, too, but only that of a run names a seed.
    folders = {path.parent.resolve() for path in paths if b'"seed"' in path.read_bytes()}
    if not folders:
        raise ValueError(f"no runs in '{top}': a run is a folder that train.py wrote")
    return folders


def read_run(folder):
    """What the tables need of a run's result.json."""
    path = folder / "result.json"
    if not path.exists():
        raise ValueError(f"'{folder}' is unfinished: give its train.py line again, with --resume")
    try:
        result = json.loads(path.read_bytes())
        result["attributes"] = "+".join(result["attributes"])
        result["fill_seconds"] = result["fill_seconds"] or 0
        numbers = NUMBERS
        if not result["out_of_memory"]:
            result |= result["test"]
            numbers = [*NUMBERS, "train_seconds", *result["attributes"].split("+")]
        for key in numbers:
            # JSON has NaN, and numbers without end. Text is a TypeError.
            if not -1 <= result[key] < 2**64:
                raise ValueError(f"{key} is {result[key]!r:.40}")
        keys = [*ROW, *SAME, *numbers, "device"]
        return {key: result[key] for key in keys} | {"folder": str(folder)}
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"'{path}' is damaged or of an older version: {error!r}") from error


def refuse_mixture(runs):
    """Refuse runs that do not belong in one table. Different attributes may stand in one."""
    firsts = {}
    for run in runs:
        for key in SAME:
            # Labels can only be the same where the attributes are.
            place = (key, run["attributes"]) if key == "labels" else key
            first = firsts.setdefault(place, run)
            if run[key] != first[key]:
                raise ValueError(
                    f"the runs of a table must have the same {key}: "
                    f"{first[key]!r} in '{first['folder']}', {run[key]!r} in '{run['folder']}'"
                )


def make_row(runs):
    """A row: the settings that its runs share and, of what is scored or measured anew in each run,
    an array over those that finished. (fill_seconds is the first one's: they share a cache.)"""
    done = [run for run in runs if not run["out_of_memory"]]
    row = runs[0] | {"marks": {}, "several": len(done) > 1}
    for key in ["seed", "train_seconds", "peak_memory_bytes", *row["attributes"].split("+")]:
        row[key] = np.array([run[key] for run in done])
    if len(set(row["seed"])) < len(done):
        raise ValueError(f"a seed twice in {[run['folder'] for run in done]}")
    failed = [run["device_memory_bytes"] / 1e9 for run in runs if run["out_of_memory"]]
    row["failed_gb"] = max(failed, default=0)
    row["devices"] = ", ".join(sorted({str(run["device"]) for run in runs}))
    # Only rows that agree in this are compared. In paper padding, the score of an utterance depends
    # on what else is in its batch.
    batch = row["eval_batch_size"] if row["padding"] == "paper" else ""
    row["scored"] = f"{row['attributes']} {row['padding']} {batch}"
    layers = row["layers"] if row["method"] == "partial" else ""
    row["short"] = f"{row['method']}{layers} {row['precision']}"
    if row["cached"]:
        row["short"] += " cached"
    elif row["freeze_embedding"]:
        row["short"] += " frozen"
    return row


def group_rows(runs):
    """Rows that may be compared stand together, among them uncached ones first, then those without
    --freeze-embedding, then those of fewer trained parameters, then fp32: the paper's order."""
    groups = {}
    for run in runs:
        # As text, because a damaged file may have a list in place of a setting.
        groups.setdefault(str([run[key] for key in ROW]), []).append(run)
    rows = [make_row(group) for group in groups.values()]

    keys = str.split("scored cached freeze_embedding trainable_parameters")
    # False comes before True.
    rows.sort(key=lambda row: ([row[key] for key in keys], row["precision"] != "fp32"))
    for row in rows:
        # What tells rows of the same short name apart is added to it.
        alike = [other for other in rows if other["short"] == row["short"]]
        row["name"] = row["short"]
        for key in ROW:
            if any(other[key] != row[key] for other in alike):
                row["name"] += f" {key}={row[key]}"
    return rows


def format_ccc(value):
    """.623: the paper's three decimals, without a zero before them. With z, what rounds to zero has
    no sign."""
    return f"{value:z.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def format_mean(values, form="{:.4g}".format):
    """'mean±sd' with the sample's sd (n - 1), which one seed does not have."""
    if len(values) < 2:
        return "".join(map(form, values))  # of no value, an empty text
    return f"{form(values.mean())}±{form(values.std(ddof=1))}"


def format_saving(row, full, key):
    """How much less than full fp32: 66.7% less time is the paper's "67% speedup"."""
    return f"{100 - 100 * np.mean(row[key]) / np.mean(full[key]):z.1f}%"


def table_one(rows, attributes):
    """Table I: yields {column: text} for each row, with savings against full fp32. A row that is
    compared with no other has a dash for a mark. Full fp32 itself has none."""
    for row in rows:
        line = {"row": row["name"], "n": f"{len(row['seed'])}"}
        for attribute in attributes:
            mean = format_mean(row.get(attribute, []), format_ccc)
            line[attribute] = f"{mean} {row['marks'].get(attribute, '-')}"
        line["train h"] = format_mean(row["train_seconds"] / 3600) or "out of memory"
        line["params"] = f"{row['trainable_parameters'] / 1e6:.2f}M"
        full = find_uncached(row, rows, FULL)
        if full and row["several"]:
            line["faster"] = format_saving(row, full, "train_seconds")
            line["fewer"] = format_saving(row, full, "trainable_parameters")
        if row["cached"]:
            line["fill h"] = f"{row['fill_seconds'] / 3600:.4g}"
        line["device"] = row["devices"]
        yield line


def memory_table(rows, sizes):
    """Table II: yields {column: text} for each row, for cards of some sizes in GB (10^9 bytes). ✗:
    smaller than a row's peak, or no larger than a card on which it failed. ✓: any other, if a peak
    is known, and ? if none is. A peak is what was allocated, or on a CPU resident; a GPU needs some
    hundred MB beside it."""
    for row in rows:
        peak = max(row["peak_memory_bytes"], default=0) / 1e9
        line = {"row": row["name"], "peak GB": f"{peak:.2f}" if peak else ""}
        for size in sizes:
            fits = "✓" if peak else "?"
            # 1 %, as a card may report a little less memory than it is sold with.
            line[f"{size} GB"] = "✗" if size < peak or size <= 1.01 * row["failed_gb"] else fits
        yield line


def plot(rows, attributes, path):
    """CCC against training hours, a panel an attribute. Bars are one sd over seeds, if several."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ValueError("a plot needs matplotlib: pip install matplotlib") from None

    figure = Figure(figsize=(9, 2 + 4 * len(attributes)), layout="constrained")
    handles = {}
    colors = {}
    for number, attribute in enumerate(attributes, 1):
        panel = figure.add_subplot(len(attributes), 1, number)
        panel.set(xlabel="training time (h)", ylabel=f"{attribute} CCC")
        for row in rows:
            if len(row.get(attribute, [])):
                # Of "partial3 fp16 cached", 3 is the marker, and what follows has a colour. "full"
                # and "lora" have no number, and F and L for markers.
                method, kind = row["name"].split(" ", 1)
                layers = method[len("partial") :]
                colors.setdefault(kind, COLORS[len(colors) % len(COLORS)])
                handles[row["name"]] = panel.errorbar(
                    row["train_seconds"].mean() / 3600,
                    row[attribute].mean(),
                    row[attribute].std(ddof=1) if row["several"] else 0,
                    marker=f"${layers or method[0].upper()}$",
                    markersize=10,
                    color=colors[kind],
                    ls="",
                    elinewidth=1,
                )
    figure.legend(handles.values(), handles, loc="outside upper center", ncols=2)
    figure.savefig(path)


# ---- command line ----


def show(table, form):
    """Print a table, {column: text} a line. Where a line lacks a column or its text, a dash."""
    table = list(table)  # It may be a generator, and is read twice.
    header = {column: column for line in table for column in line}
    lines = [
        [line.get(column, "").strip() or "-" for column in header] for line in [header, *table]
    ]
    if form == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows(lines)
    else:
        widths = [max(map(len, column)) for column in zip(*lines)]
        for line in lines:
            print("  ".join(map(str.ljust, line, widths)).rstrip())
    print()


def main(argv=None):
    parser = argparse.ArgumentParser(description="Tables I and II, from run folders.")
    add = parser.add_argument
    add("runs", nargs="+", help="folders searched for runs, two folders deep")
    add("--format", choices=("text", "csv"), default="text", help="how tables print (text)")
    add("--plot", metavar="FILE.png", help="also plot CCC against training time (matplotlib)")
    add("--memory", nargs="+", type=int, metavar="GB", help="also Table II for these cards (V-E)")
    add("--verbose", action="store_true", help="also every p value, and its 95 %% interval (V)")
    args = parser.parse_args(argv)
    folders = {folder for top in args.runs for folder in find_runs(top)}
    runs = [read_run(folder) for folder in sorted(folders)]
    refuse_mixture(runs)
    rows = group_rows(runs)
    attributes = sorted({name for row in rows for name in row["attributes"].split("+")})
    tests = [line for attribute in attributes for line in mark_attribute(rows, attribute)]
    show(table_one(rows, attributes), args.format)
    if args.verbose:
        show(tests, args.format)
    if args.memory:
        show(memory_table(rows, args.memory), args.format)
    if args.plot:
        plot(rows, attributes, args.plot)
    if args.format == "text":
        print(
            f"p < {LEVEL}: † lower, ‡ higher than full fp32 (cached: than uncached); NS neither\n"
            "- not compared: this needs two seeds, and two of full fp32 (if cached: of the row "
            "uncached), with the same attributes, padding and, if paper, eval_batch_size"
        )


if __name__ == "__main__":
    from ccc import shell

    shell(main)
