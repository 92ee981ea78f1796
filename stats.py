"""Tables I and II of the paper, its tests of significance and a plot, from folders of runs.

Section V: mean ± sd over seeds; a one-way ANOVA over the uncached rows; where it is significant,
t-tests against full fp32 finetuning, Bonferroni-corrected; cached rows against the same row
uncached.

    python stats.py runs                                  # Table I, with marks and costs
    python stats.py runs --verbose --plot tradeoff.png    # every p value; CCC against training time
    python stats.py runs --format latex > table1.tex      # or markdown, or csv
    python stats.py runs --memory 11 48                   # Table II: what fits in 11 and in 48 GB
    python stats.py runs --commands --data ROOT --cache-root caches    # every run still to do

Stands alone: needs numpy and scipy (matplotlib for --plot) and reads run folders only.
"""

import argparse
import csv
import json
import math
import shlex
import sys
import textwrap
from itertools import pairwise
from pathlib import Path

import numpy as np
from scipy import stats

TASKS = ("activation", "valence")
# Runs that agree in all of ROW are seeds of one row; the rows of one table agree in all of SAME.
ROW = ["method", "layers", "precision", "padding", "cached", "freeze_prefix", "chunk", "recompute"]
ROW += ["rank", "alpha", "lora_dropout"]
SAME = ["epochs", "batch_size", "lr", "dropout", "encoder", "corpus"]
ORDER = "lora partial full fp32 fp16 bf16".find  # the paper's order of rows
GB = 1e9  # bytes; an "11 GB" card has somewhat more, which the CUDA context takes
OOM_MARGIN = 1.25  # our choice: a run that failed had filled at least 1 / 1.25 of its card
NAME, WIDTH = 21, 100  # columns of the first cell and of a line of the text tables
LATEX = {"±": r"$\pm$", "†": r"$^\dagger$", "‡": r"$^\ddagger$", "%": r"\%", "_": r"\_"}
LATEX = str.maketrans(LATEX | {"✓": r"$\surd$", "✗": r"$\times$"})


def read_json(path):
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not valid JSON ({error})") from error
    return content if isinstance(content, dict) else {}


def read_run(folder):
    """result.json as a flat dict: ROW's and SAME's keys, test CCCs, hours, parameters, peak GB."""
    path = folder / "result.json"
    result = read_json(path)
    try:
        run = {key: result[key] for key in (*ROW, *SAME, "seed", "device")}
        run |= {"folder": folder, "failed": bool(result.get("out_of_memory"))}
        run["peak_gb"] = (result.get("peak_memory_bytes") or 0) / GB  # 0: not measured
        if not run["failed"]:
            run |= {task: float(result["test"][task]) for task in TASKS}
            run |= {f"{key}_hours": result[f"{key}_seconds"] / 3600 for key in ("train", "eval")}
            run["build_hours"] = result["cache"]["seconds"] / 3600 if run["cached"] else 0.0
            run["parameters"] = int(result["trainable_parameters"])
            numbers = [run[key] for key in (*TASKS, "train_hours", "eval_hours", "build_hours")]
            if not all(map(math.isfinite, numbers)) or run["train_hours"] * run["parameters"] <= 0:
                raise ValueError(
                    "a test CCC or a time is NaN or infinite, or training took no time"
                )
    except KeyError as error:
        raise ValueError(f"{path}: the key {error} is missing") from error
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: not the result of a run ({error})") from error
    if run["cached"]:
        run["freeze_prefix"] = False  # a cache freezes the prefix, with or without the flag
    if run["method"] != "lora":
        run |= dict.fromkeys(("rank", "alpha", "lora_dropout"))
    return run


def read_runs(folders):
    """Every run under the folders; unfinished runs, and runs that do not compare, are refused."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise ValueError(f"{folder}: no such folder")
    configs = {path.resolve(): path for top in folders for path in Path(top).rglob("config.json")}
    # Hugging Face folders hold a config.json too; a run's names its method and its seed
    configs = [path for path in configs.values() if {"method", "seed"} <= read_json(path).keys()]
    found = sorted(path.parent for path in configs)
    if not found:
        raise ValueError(f"no runs under {' '.join(folders)}: a run is a folder with config.json")
    unfinished = [str(folder) for folder in found if not (folder / "result.json").exists()]
    if unfinished:
        names = ", ".join(unfinished[:3]) + ", ..." * (len(unfinished) > 3)
        raise ValueError(
            f"{len(unfinished)} of {len(found)} runs have no result.json: {names}; finish each "
            "with the same train.py line and --resume, or move its folder away"
        )
    runs = [read_run(folder) for folder in found]
    for key in SAME:
        values = {str(run[key]): run["folder"] for run in runs}
        if len(values) > 1:
            which = ", ".join(f"{value[:12]} in {folder}" for value, folder in values.items())
            raise ValueError(f"the runs of a table must have the same {key}: {which}")
    return runs


def short_name(row):
    layers = row["layers"] if row["method"] == "partial" else ""
    kind = " cached" if row["cached"] else " frozen" if row["freeze_prefix"] else ""
    return f"{row['method']}{layers} {row['precision']}{kind}"


def group_rows(runs):
    """A dict a row, in the paper's order: ROW's keys, arrays over the finished seeds, a name."""
    groups = {}
    for run in sorted(runs, key=lambda run: run["seed"]):
        groups.setdefault(tuple(run[key] for key in ROW), []).append(run)
    rows = []
    for key, group in groups.items():
        row = dict(zip(ROW, key, strict=True))
        done = [run for run in group if not run["failed"]]
        for one, two in pairwise(done):
            if one["seed"] == two["seed"]:
                which = f"{one['folder']} and {two['folder']}"
                raise ValueError(f"two runs of {short_name(row)}, seed {one['seed']}: {which}")
        row["seeds"] = [run["seed"] for run in done]
        row["failed_gb"] = [run["peak_gb"] for run in group if run["failed"]]
        row["device"] = ", ".join(sorted({str(run["device"]) for run in done}))
        for name in (*TASKS, "train_hours", "eval_hours", "build_hours", "peak_gb", "parameters"):
            row[name] = np.array([run[name] for run in done])
        rows.append(row)
    rows.sort(key=lambda r: (r["cached"], ORDER(r["method"]), r["layers"], ORDER(r["precision"])))
    for row in rows:  # what tells rows of the same short name apart is added to it
        alike = [other for other in rows if short_name(other) == short_name(row)]
        differ = [key for key in ROW if len({other[key] for other in alike}) > 1]
        row["name"] = " ".join([short_name(row), *(f"{key}={row[key]}" for key in differ)])
    return rows


def find_baseline(rows):
    """The uncached full fp32 row (section V), or None."""
    found = [row for row in rows if short_name(row) == "full fp32"]
    if len(found) > 1:
        names = "; ".join(row["name"] for row in found)
        raise ValueError(f"more than one row could be the baseline: {names}; give one of them")
    return found[0] if found else None


def find_twin(row, rows):
    """A cached row's uncached equal, which trains more (see model.freeze); without it, the one with
    --freeze-prefix, which trains the same. Of several, the one of the same chunk and recompute."""
    same = ("method", "layers", "precision", "padding", "rank", "alpha", "lora_dropout")
    found = [r for r in rows if not r["cached"] and all(r[key] == row[key] for key in same)]
    found = [r for r in found if not r["freeze_prefix"]] or found
    if len(found) > 1:
        found = [r for r in found if all(r[key] == row[key] for key in ("chunk", "recompute"))]
    return found[0] if found else None


def compare(a, b, paired=False, welch=False):
    """Two-sided t-test of mean(a) - mean(b): the difference, its 95 % interval, p (uncorrected).

    Without any spread p is never NaN: 1 where the difference is zero, 0 where it is not.
    """
    low = high = difference = float(np.mean(a) - np.mean(b))
    p = float(abs(difference) < 1e-12)
    if (np.ptp(a - b) if paired else np.ptp(a) + np.ptp(b)) > 1e-12:
        test = stats.ttest_rel(a, b) if paired else stats.ttest_ind(a, b, equal_var=not welch)
        (low, high), p = map(float, test.confidence_interval(0.95)), float(test.pvalue)
    return {"difference": difference, "low": low, "high": high, "p": p}


def anova(groups):
    """p of a one-way ANOVA; as in compare, never NaN where no group has any spread."""
    if sum(np.ptp(group) for group in groups) < 1e-12:
        return float(np.ptp([np.mean(group) for group in groups]) < 1e-12)
    return float(stats.f_oneway(*groups).pvalue)


def mark_rows(rows, task, alpha=0.05, paired=False, welch=False):
    """Section V for one task: adds row[task + "_test"] to what is compared, returns ANOVA's p."""
    baseline = find_baseline(rows)
    uncached = [row for row in rows if not row["cached"]]
    p_anova = anova([row[task] for row in uncached]) if baseline and len(uncached) > 1 else None
    for row in rows:
        other = find_twin(row, rows) if row["cached"] else baseline
        if other is None or other is row:
            continue
        if paired and row["seeds"] != other["seeds"]:
            which = f"{row['name']} has {row['seeds']}, {other['name']} has {other['seeds']}"
            raise ValueError(f"--paired needs the same seeds in compared rows: {which}")
        test = compare(row[task], other[task], paired, welch)
        test["corrected"] = min(1.0, test["p"] * (1 if row["cached"] else len(uncached) - 1))
        significant = test["corrected"] < alpha and (row["cached"] or p_anova < alpha)
        mark = "NS" if row["cached"] else ""
        test["mark"] = ("†" if test["difference"] < 0 else "‡") if significant else mark
        row[f"{task}_test"] = test
    return p_anova


def saving(values, reference):
    """How much less than the reference: the paper's percent ("67% speedup") and the factor."""
    ratio = float(np.mean(values) / np.mean(reference))
    return {"percent": 100 * (1 - ratio), "factor": 1 / ratio}


def add_savings(rows):
    """Against the baseline: row["faster"], row["fewer"]; a cached row's also against its twin."""
    baseline = find_baseline(rows)
    for row in rows:
        hours = row["train_hours"]
        if baseline and row is not baseline:
            row["faster"] = saving(hours, baseline["train_hours"])
            row["fewer"] = saving(row["parameters"], baseline["parameters"])
        if row["cached"]:
            row["hours_with_build"] = float(np.mean(hours + row["build_hours"]))
        if row["cached"] and (twin := find_twin(row, rows)):
            row["than_uncached"] = saving(hours, twin["train_hours"])
            gain = np.mean(twin["train_hours"]) - np.mean(hours)
            paid = math.ceil(np.mean(row["build_hours"]) / gain) if gain > 0 else "never"
            row["pays_after_runs"] = paid


def ccc(value):
    """.623, as the paper prints a CCC."""
    return f"{value:.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def spread(values, form=ccc):
    return f"{form(np.mean(values))}±{form(np.std(values, ddof=1))}"


def percent(saved):
    """67% (3.0x); a dash where there is nothing to compare with."""
    if not saved:
        return "-"
    digits = 0 if saved["percent"] < 99.5 else 1
    return f"{saved['percent']:.{digits}f}% ({saved['factor']:.{1 - digits}f}x)"


def time_unit(rows):
    """(name, how many an hour, format): real runs take hours, small trials minutes or seconds."""
    longest = max((np.mean(row["train_hours"]) for row in rows), default=1)
    if longest >= 0.1:
        return "h", 1, "{:.3f}".format
    return ("min", 60, "{:.2f}".format) if longest >= 1 / 60 else ("s", 3600, "{:.1f}".format)


def result_table(rows, lost):
    """Table I: the header and a line a row; `lost` are the rows that ran out of memory."""
    unit, scale, form = time_unit(rows)
    table = [("row", "n", *TASKS, f"train {unit}", "faster", "params", "fewer")]
    for row in rows:
        cells = [row["name"], str(len(row["seeds"]))]
        for task in TASKS:
            mark = row[f"{task}_test"]["mark"] if f"{task}_test" in row else ""
            cells.append(spread(row[task]) + mark.replace("NS", " NS"))
        cells += [spread(row["train_hours"] * scale, form), percent(row.get("faster"))]
        count = row["parameters"][0]
        cells.append(f"{count / 1e6:.1f}M" if count >= 1e6 else f"{count / 1e3:.0f}K")
        table.append((*cells, percent(row.get("fewer"))))
    return table + [(row["name"], "-", "out of memory", *"-----") for row in lost]


def gigabytes(peaks):
    return f"{max(peaks):.2f}" if max(peaks, default=0) else "-"


def cost_table(rows):
    """What Table I leaves out: evaluation, memory, and when a cache has paid for its filling."""
    unit, scale, form = time_unit(rows)
    head = ("row", f"eval {unit}", "peak GB", f"fill cache {unit}", f"fill+train {unit}")
    table = [(*head, "than uncached", "pays after")]
    for row in rows:
        cells = [row["name"], form(np.mean(row["eval_hours"]) * scale), gigabytes(row["peak_gb"])]
        if row["cached"]:
            cells.append(form(np.mean(row["build_hours"]) * scale))
            cells += [form(row["hours_with_build"] * scale), percent(row.get("than_uncached"))]
            after = row.get("pays_after_runs", "-")
            cells.append(f"{after} run{'s' * (after != 1)}" if isinstance(after, int) else after)
        table.append((*cells, *"-" * (7 - len(cells))))
    return table


def test_table(rows):
    """Every p value, for --verbose."""
    table = [("row", "task", "difference", "95 % interval", "p", "corrected", "mark")]
    for row in rows:
        for task in [task for task in TASKS if f"{task}_test" in row]:
            test = row[f"{task}_test"]
            cells = (row["name"], task, ccc(test["difference"]))
            cells += (f"{ccc(test['low'])} to {ccc(test['high'])}", f"{test['p']:.2g}")
            table.append((*cells, f"{test['corrected']:.2g}", test["mark"] or "-"))
    return table


def memory_table(rows, sizes):
    """Table II: a row fits where its largest peak does, and does not where a run of it failed."""
    table = [("row", "peak GB", *(f"{size:g} GB" for size in sizes))]
    for row in rows:
        peak, failed = max(row["peak_gb"], default=0), max(row["failed_gb"], default=0) * OOM_MARGIN
        fits = ["✗" if size < peak or size <= failed else "✓" if peak else "?" for size in sizes]
        table.append((row["name"], gigabytes(row["peak_gb"]), *fits))
    return table


def notes(rows, lost, p_anova, args):
    """The lines under Table I, without which its marks cannot be read."""
    baseline, lines = find_baseline(rows), []
    count = sum(not row["cached"] for row in rows)
    if not baseline:
        lines.append("No finished full fp32 row, so no baseline: uncached rows have no marks.")
    elif count > 1:
        values = ", ".join(f"{task} p = {p_anova[task]:.2g}" for task in TASKS)
        kind = "paired by seed" if args.paired else "Welch" if args.welch else "equal variances"
        lines.append(
            f"† lower, ‡ higher than {baseline['name']}, p < {args.alpha:g}: ANOVA over {count} "
            f"uncached rows ({values}), then t-tests ({kind}), Bonferroni x {count - 1}."
        )
    if any(row["cached"] for row in rows):
        lines.append(
            "Cached rows: uncorrected t-test against the same row uncached; NS: not significant."
        )
        lines.append("Pays after: runs until the training time saved exceeds the cache's filling.")
    alone = [row["name"] for row in rows if row["cached"] and not find_twin(row, rows)]
    if alone:
        lines.append(f"Not tested, as the same row is not here uncached: {', '.join(alone)}.")
    devices = sorted({row["device"] for row in rows})
    if len(devices) > 1:
        lines.append(f"Times are from different devices: {'; '.join(devices)}.")
    failed = [f"{row['name']} ({len(row['failed_gb'])})" for row in rows + lost if row["failed_gb"]]
    if failed:
        lines.append(f"Runs out of memory, not in the means: {', '.join(failed)}.")
    return lines


def show(table, form):
    """Prints a table of strings, header first, as text (long names wrapped), Markdown, LaTeX or
    CSV."""
    if form == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows(table)
    elif form == "markdown":
        rule = ["---"] * len(table[0])
        print(*(f"| {' | '.join(row)} |" for row in (table[0], rule, *table[1:])), sep="\n")
    elif form == "latex":
        lines = [" & ".join(row).translate(LATEX) + r" \\" for row in table]
        print(rf"\begin{{tabular}}{{l{'r' * (len(table[0]) - 1)}}}", lines[0], r"\hline", sep="\n")
        print(*lines[1:], r"\end{tabular}", sep="\n")
    else:
        widths = [max(map(len, column)) for column in list(zip(*table, strict=True))[1:]]
        gap = "  " if NAME + sum(widths) + 2 * len(widths) <= WIDTH else " "
        for name, *cells in table:
            first, *rest = textwrap.wrap(name, NAME)
            cells = [cell.ljust(width) for cell, width in zip(cells, widths, strict=True)]
            print(gap.join([first.ljust(NAME), *cells]).rstrip())
            print(*(f"  {line}\n" for line in rest), sep="", end="")


def comment(line, form):
    """A line under a table: wrapped as text, behind a % in LaTeX, to stderr beside CSV."""
    line = f"% {line}" if form == "latex" else f"{line}\n" if form == "markdown" else line
    line = textwrap.fill(line, WIDTH) if form == "text" else line
    print(line, file=sys.stderr if form == "csv" else sys.stdout)


def write_csv(rows):
    """Plain numbers, a line a row: arrays as _mean and _sd, dicts as a column a key."""
    lines = []
    for row in rows:
        line = {"row": row["name"], "seeds": len(row["seeds"]), "failed": len(row["failed_gb"])}
        for key, value in row.items():
            if isinstance(value, np.ndarray) and value.size > 1:
                line |= {f"{key}_mean": value.mean(), f"{key}_sd": value.std(ddof=1)}
            elif isinstance(value, dict):
                line |= {f"{key}_{part}": each for part, each in value.items()}
            elif key in (*ROW, "device", "hours_with_build", "pays_after_runs"):
                line[key] = value
        lines.append(line)
    columns = dict.fromkeys(key for line in lines for key in line)
    writer = csv.DictWriter(sys.stdout, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(lines)


def plot(rows, path):
    """CCC against training time, a panel a task; bars are one sd."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import LogLocator, NullFormatter
    except ImportError as error:
        raise ValueError("--plot needs matplotlib: pip install matplotlib") from error
    unit, scale, _ = time_unit(rows)
    figure = Figure(figsize=(9, 9), dpi=100, layout="constrained")
    figure.suptitle("Number: last layers trained. F: full. L: LoRA. Bars: one sd.", fontsize=10)
    kinds = [short_name(row).split(" ", 1)[1] for row in rows]  # fp32, fp32 cached, ...
    colors = {kind: f"C{i}" for i, kind in enumerate(dict.fromkeys(kinds))}
    hours = [row["train_hours"] * scale for row in rows]
    for task, axes in zip(TASKS, figure.subplots(2, 1), strict=True):
        for row, kind, x in zip(rows, kinds, hours, strict=True):
            number = {"full": "F", "lora": "L"}.get(row["method"], row["layers"])
            style = {"marker": f"${number}$", "ms": 10, "lw": 0.7, "color": colors[kind]}
            sds = {"xerr": x.std(ddof=1), "yerr": row[task].std(ddof=1)}
            axes.errorbar(x.mean(), row[task].mean(), **sds, **style)
        for kind, color in colors.items():
            axes.plot([], label=kind, color=color)
        axes.legend(fontsize=9)
        if max(map(np.max, hours)) > 5 * min(map(np.min, hours)):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set(major_formatter="{x:g}", minor_formatter=NullFormatter())
        axes.margins(0.1)
        axes.set(ylabel=f"{task} CCC", xlabel=f"training time ({unit})")
        axes.grid(alpha=0.3)
    FigureCanvasAgg(figure).print_png(path)


def commands(args):
    """The cache.py and train.py lines of Table I that are still to do, quoted for a shell."""
    corpus = ["--data", args.data] + (["--model", args.model] if args.model else [])
    corpus += ["--skip-bad"] * args.skip_bad
    both = ("fp32", args.mixed)
    table = [("lora", 0, "fp32", False)]
    table += [("partial", n, precision, False) for n in (1, 2, 3) for precision in both]
    table += [("full", 0, precision, False) for precision in both]
    if args.cache_root:
        table += [("partial", n, precision, True) for n in (1, 2, 3) for precision in both]
    fills, lines = {}, []
    for method, layers, precision, cached in table:
        row = {"method": method, "layers": layers, "precision": precision, "cached": cached}
        name = short_name(row | {"freeze_prefix": False}).replace(" ", "-")
        for seed in range(args.seeds):
            out = Path(args.runs[0], f"{name}-seed{seed}")
            if (out / "result.json").exists():
                continue
            line = ["python", "train.py", *corpus, "--out", str(out), "--seed", str(seed)]
            line += ["--method", method, *(["--layers", str(layers)] if layers else [])]
            line += ["--precision", precision]
            if cached:
                store = str(Path(args.cache_root, f"last-{layers}"))
                fill = ["python", "cache.py", *corpus, "--layer", str(-layers), "--out", store]
                fills[layers], line = fill, [*line, "--cache", store]
            lines.append([*line, *shlex.split(args.train_args), "--resume"])
    return [shlex.join(line) for line in (*fills.values(), *lines)]


def run(args):
    if args.commands:
        if not args.data or len(args.runs) > 1:
            raise ValueError("--commands needs --data ROOT and one folder for the runs")
        lines = commands(args)
        print("\n".join(lines) if lines else "# nothing to do: every run of Table I is finished")
        return
    if not 0 < args.alpha < 1:
        raise ValueError("--alpha is a probability between 0 and 1")
    rows = group_rows(read_runs(args.runs))
    if args.memory:
        show(memory_table(rows, args.memory), args.format)
        comment("Peak: what a run allocated; CUDA takes some more. ?: not known.", args.format)
        return
    for row in rows:
        if len(row["seeds"]) == 1 and not row["failed_gb"]:
            raise ValueError(f"{row['name']} has one seed; mean ± sd and tests need two or more")
    lost = [row for row in rows if len(row["seeds"]) < 2]
    rows = [row for row in rows if len(row["seeds"]) > 1]
    settings = (args.alpha, args.paired, args.welch)
    p_anova = {task: mark_rows(rows, task, *settings) for task in TASKS}
    add_savings(rows)
    if args.plot and rows:
        plot(rows, args.plot)
    if args.format == "csv":
        write_csv(rows + lost)
    else:
        tables = [result_table(rows, lost), cost_table(rows), test_table(rows)]
        for table in tables if args.verbose else tables[:2]:
            show(table, args.format)
            print()
    for line in notes(rows, lost, p_anova, args):
        comment(line, args.format)


def parse_args(argv=None):
    parser = argparse.ArgumentParser(
        usage="python stats.py RUNS... [options]",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = parser.add_argument
    add("runs", nargs="*", default=["runs"], help="folders searched for runs (default: runs)")
    add("--format", choices=("text", "markdown", "latex", "csv"), default="text")
    add("--plot", metavar="FILE.png", help="CCC against training time, needs matplotlib")
    add("--verbose", action="store_true", help="every p value, with the 95 %% interval")
    add("--memory", nargs="+", type=float, metavar="GB", help="Table II for these cards instead")
    add("--debug", action="store_true", help="show the traceback of an error")
    tests = parser.add_argument_group("tests of significance (section V)")
    tests.add_argument("--alpha", type=float, default=0.05, help="level (default: 0.05)")
    either = tests.add_mutually_exclusive_group()
    either.add_argument("--paired", action="store_true", help="t-tests paired by seed")
    either.add_argument("--welch", action="store_true", help="t-tests without equal variances")
    sweep = parser.add_argument_group("--commands")
    add = sweep.add_argument
    add("--commands", action="store_true", help="print a line for each run of Table I to be done")
    add("--data", metavar="ROOT", help="corpus, as train.py takes it")
    add("--model", help="encoder (default: train.py's)")
    add("--skip-bad", action="store_true", help="for each line, as train.py takes it")
    add("--cache-root", metavar="DIR", help="also the cached rows, with their caches in DIR")
    add("--seeds", type=int, default=5, help="seeds a row (default: 5)")
    add("--mixed", choices=("fp16", "bf16"), default="fp16", help="mixed precision (default: fp16)")
    add("--train-args", default="", metavar='"..."', help="more arguments for each train.py line")
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse_args(argv)
    try:
        run(args)
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        parser.error(str(error))


if __name__ == "__main__":
    main()
