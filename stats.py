"""Tables I and II of the paper, its tests of significance and a plot, from folders of runs.
Section V: mean ± sd over seeds, ANOVA, t-tests against full fp32; cached rows against uncached.

    python stats.py runs --verbose --plot tradeoff.png    # Table I, every p value; CCC against time
    python stats.py runs --memory 11 48 --format latex    # Table II: what fits in 11 and in 48 GB
    python stats.py runs --commands --data ROOT --cache-root caches    # every run still to do
"""

import argparse
import csv
import json
import math
import shlex
import sys
from pathlib import Path

import numpy as np
from scipy import stats

# Runs that agree in all of ROW are seeds of one row; the rows of one table agree in all of SAME.
ROW = ["method", "layers", "precision", "padding", "cached", "cache", "freeze_prefix", "chunk"]
ROW += ["recompute", "processes", "rank", "alpha", "lora_dropout"]
SAME = ["epochs", "batch_size", "lr", "dropout", "attributes", "splits", "encoder", "corpus"]
LEVEL = 0.05  # of significance (section V)
LATEX = {"±": r"$\pm$", "†": r"$^\dagger$", "‡": r"$^\ddagger$", "%": r"\%", "_": r"\_"}
LATEX = str.maketrans(LATEX | {"✓": r"$\surd$", "✗": r"$\times$"})


def find_runs(tops):
    """Folders of runs in `tops` and up to two folders below, each once. Links are followed."""
    found = set()
    for top in tops:
        if not Path(top).is_dir():
            raise ValueError(f"{top}: no such folder")
        for below in ("config.json", "*/config.json", "*/*/config.json"):
            for path in Path(top).glob(below):
                # Hugging Face folders hold a config.json, too; a run's names its method and seed
                if {"method", "seed"} <= json.loads(path.read_text()).keys():
                    found.add(path.parent.resolve())
    return sorted(found)


def read_runs(tops):
    """Every result.json under `tops`, and beside its keys what the tables need in hours and GB."""
    runs = []
    for folder in find_runs(tops):
        path = folder / "result.json"
        if not path.exists():
            raise ValueError(f"{folder}: unfinished; give its train.py line again, with --resume")
        run = json.loads(path.read_text()) | {"folder": folder}
        try:
            run["peak_gb"] = run["peak_memory_bytes"] / 1e9
            run["card_gb"] = run["device_memory_bytes"] / 1e9
            if not run["out_of_memory"]:
                run |= {task: run["test"][task] for task in run["attributes"]}
                for key in ("train", "eval", "fill"):
                    run[f"{key}_hours"] = (run[f"{key}_seconds"] or 0) / 3600
            for key in (*ROW, *SAME, "seed", "device", "trainable_parameters"):
                run[key]  # if missing, then refused here
        except KeyError as error:
            raise ValueError(f"{path}: the key {error} is missing; run it anew") from error
        runs.append(run)
    for key in SAME:
        values = {str(run[key]): run["folder"] for run in runs}
        if len(values) > 1:
            which = ", ".join(f"{value} in {folder}" for value, folder in values.items())
            raise ValueError(f"the runs of a table must have the same {key}: {which}")
    return runs


def short_name(row):
    layers = row["layers"] if row["method"] == "partial" else ""
    kind = " cached" if row["cached"] else " frozen" if row["freeze_prefix"] else ""
    return f"{row['method']}{layers} {row['precision']}{kind}"


def group_rows(runs):
    """A dict a row, in the paper's order: ROW's keys, arrays over the finished seeds, a name."""
    groups, rows = {}, []
    for run in sorted(runs, key=lambda run: run["seed"]):
        groups.setdefault(tuple(run[key] for key in ROW), []).append(run)
    for group in groups.values():
        done = [run for run in group if not run["out_of_memory"]]
        if len(done) > len({run["seed"] for run in done}):
            raise ValueError(f"a seed twice in {', '.join(str(run['folder']) for run in done)}")
        row = {key: group[0][key] for key in (*ROW, "trainable_parameters")}
        row |= {"seeds": [run["seed"] for run in done], "marks": {}}
        for key in (*group[0]["attributes"], "train_hours", "eval_hours", "fill_hours", "peak_gb"):
            row[key] = np.array([run[key] for run in done])
        row["devices"] = ", ".join(sorted({run["device"] for run in done}))
        row["failed_gb"] = [max(r["card_gb"], r["peak_gb"]) for r in group if r["out_of_memory"]]
        rows.append(row)
    rows.sort(key=lambda r: (r["cached"], r["trainable_parameters"], r["precision"] != "fp32"))
    for row in rows:  # what tells rows of the same short name apart is added to it
        alike = [other for other in rows if short_name(other) == short_name(row)]
        differ = [key for key in ROW if len({other[key] for other in alike}) > 1]
        row["name"] = " ".join([short_name(row), *(f"{key}={row[key]}" for key in differ)])
    return rows


def find_other(row, rows, twin):
    """What a row is compared with, or None: full fp32 (section V) or its `twin`, the same uncached
    or else with --freeze-prefix. Of several, the most alike."""
    same = ("method", "layers", "precision", "rank", "alpha", "lora_dropout", "padding")
    found = [r for r in rows if short_name(r) == "full fp32"]
    if twin:
        found = [r for r in rows if not r["cached"] and all(r[key] == row[key] for key in same)]
    found = [r for r in found if not r["freeze_prefix"]] or found
    rest = ("padding", "processes", "chunk", "recompute")
    return min(found, key=lambda r: [r[key] != row[key] for key in rest], default=None)


def mark_rows(rows, task):
    """Section V for one task: fills row["marks"]; returns the tests, {column: text} each."""
    pairs = [(row, find_other(row, rows, row["cached"])) for row in rows]
    pairs = [(row, other) for row, other in pairs if other and other is not row]
    factor, tests = sum(not row["cached"] for row, _ in pairs), []
    if factor:
        groups = [row[task] for row in rows if not row["cached"]]
        p_anova = np.nan_to_num(stats.f_oneway(*groups).pvalue, nan=1.0)
        tests = [{"row": "all uncached", "task": task, "against": "ANOVA", "p": f"{p_anova:.3g}"}]
    for row, other in pairs:
        a, b = row[task] - other[task][0], other[task] - other[task][0]  # zeros, if none varies
        difference, test = a.mean() - b.mean(), stats.ttest_ind(a, b)
        low, high = np.nan_to_num(test.confidence_interval(0.95), nan=difference)
        p = np.nan_to_num(test.pvalue, nan=1.0)  # NaN: no spread and no difference
        corrected = p if row["cached"] else min(1, p * factor)  # Bonferroni
        mark = "NS" if row["cached"] else ""
        if corrected < LEVEL and (row["cached"] or p_anova < LEVEL):
            mark = "†" if difference < 0 else "‡"
        row["marks"][task] = mark
        test = {"row": row["name"], "task": task, "against": other["name"], "p": f"{p:.3g}"}
        test |= {"corrected": f"{corrected:.3g}", "mark": mark, "difference": ccc(difference)}
        tests.append(test | {"95 % interval": f"{ccc(low)} to {ccc(high)}"})
    return tests


def ccc(value):
    """.623, as the paper prints a CCC; z: what rounds to zero has no sign."""
    return f"{value:z.3f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.3f}"


def saved(value, reference):
    """How much less than the reference: the paper's percent ("67% speedup") and the factor."""
    digits = 1 if value < 0.005 * reference else 0  # LoRA does not train 100% fewer parameters
    return f"{100 * (1 - value / reference):z.{digits}f}% ({reference / value:.1f}x)"


def result_tables(rows, tasks):
    """Table I, and what it leaves out: evaluation, memory, and when a cache has paid."""
    results, costs = [], []
    for row in rows:
        train, fill = row["train_hours"].mean(), row["fill_hours"].mean()
        line = {"row": row["name"], "n": str(len(row["seeds"]))}
        for task in tasks:
            mean, sd = ccc(row[task].mean()), ccc(row[task].std(ddof=1))
            line[task] = f"{mean}±{sd} {row['marks'].get(task, '')}"
        line["train h"] = f"{train:.4g}±{row['train_hours'].std(ddof=1):.1g}"
        line["params"] = f"{row['trainable_parameters'] / 1e6:.2f}M"
        if full := find_other(row, rows, twin=False):
            line["faster"] = saved(train, full["train_hours"].mean())
            line["fewer"] = saved(row["trainable_parameters"], full["trainable_parameters"])
        results.append(line)
        line = {"row": row["name"], "eval h": f"{row['eval_hours'].mean():.4g}"}
        line |= {"peak GB": f"{row['peak_gb'].max():.2f}", "device": row["devices"]}
        if row["cached"]:
            line |= {"fill h": f"{fill:.4g}", "fill+train h": f"{fill + train:.4g}"}
        if row["cached"] and (twin := find_other(row, rows, twin=True)):
            gain = twin["train_hours"].mean() - train
            line["than uncached"] = saved(train, twin["train_hours"].mean())
            line["runs to pay"] = str(math.ceil(fill / gain)) if gain > 0 else "never"
        costs.append(line)
    return results, costs


def memory_table(rows, sizes):
    """Table II: a row fits where its largest peak does, and not where a run of it failed."""
    table = []
    for row in rows:
        peak, failed = max(row["peak_gb"], default=0), max(row["failed_gb"], default=0)
        table.append({"row": row["name"], "peak GB": f"{peak:.2f}" if peak else ""})
        for x in sizes:
            table[-1][f"{x:g} GB"] = "✗" if x < peak or x <= failed else "✓" if peak else "?"
    return table


def show(table, form):
    """Print a table: {column: text} a row; where a row lacks a column or its text, a dash."""
    columns = list(dict.fromkeys(column for row in table for column in row))
    lines = [columns, *([row.get(c, "").strip() or "-" for c in columns] for row in table)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        if form == "csv":
            csv.writer(sys.stdout, lineterminator="\n").writerow(line)
        elif form == "latex":
            print(" & ".join(line).translate(LATEX), r"\\")
        else:
            print("  ".join(map(str.ljust, line, widths)).rstrip())
    print()


def plot(rows, tasks, path):
    """CCC against training time, a panel an attribute; bars are one sd over seeds."""
    from matplotlib.figure import Figure  # optional: pip install matplotlib

    figure, colors = Figure(figsize=(9, 4.5 * len(tasks)), layout="constrained"), {}
    for task, axes in zip(tasks, figure.subplots(len(tasks), squeeze=False).flat, strict=True):
        axes.set(xlabel="training time (h)", ylabel=f"{task} CCC")
        for row in rows:
            kind = short_name(row).split(" ", 1)[1]  # fp32, fp32 cached, ...
            label = None if kind in colors else kind
            color = colors.setdefault(kind, f"C{len(colors)}")
            marker = {"full": "$F$", "lora": "$L$"}.get(row["method"], f"${row['layers']}$")
            x, y = row["train_hours"], row[task]
            point = x.mean(), y.mean(), y.std(ddof=1), x.std(ddof=1)
            axes.errorbar(*point, marker=marker, ms=10, lw=0.7, color=color, label=label)
    figure.legend(title="1 2 3: last layers\nF: full   L: LoRA", loc="outside right upper")
    figure.savefig(path, dpi=100)


def commands(args):
    """The cache.py and train.py lines of Table I without a result yet, quoted for a shell."""
    python = f"torchrun --nproc-per-node {args.processes}" if args.processes > 1 else "python"
    corpus = ["--data", args.data] + (["--model", args.model] if args.model else [])
    corpus += ["--skip-bad"] if args.skip_bad else []
    partial = [("partial", n, p) for n in (1, 2, 3) for p in ("fp32", args.mixed)]
    table = [("lora", 0, "fp32"), *partial, ("full", 0, "fp32"), ("full", 0, args.mixed)]
    table = [(*row, False) for row in table] + [(*row, True) for row in partial if args.cache_root]
    fills, lines = {}, []
    for method, layers, precision, cached in table:
        name = f"{method}{layers or ''}-{precision}" + ("-cached" if cached else "")
        last = ["--layers", str(layers)] if layers else []
        store = str(Path(args.cache_root or "", f"last-{layers}"))
        fill = [*corpus, *last, "--out", store]
        for seed in range(args.seeds):
            out = Path(args.runs[0], f"{name}-seed{seed}")
            words = [*corpus, "--out", str(out), "--seed", str(seed), "--method", method, *last]
            words += ["--precision", precision] + (["--cache", store] if cached else [])
            words += [*shlex.split(args.train_args), "--resume"]
            done = out / "result.json"
            if not done.exists() or json.loads(done.read_text())["out_of_memory"]:
                lines.append(f"{python} train.py {shlex.join(words)}")
                if cached:
                    fills[store] = f"{python} cache.py {shlex.join(fill)}"
    return [*fills.values(), *lines]


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("runs", nargs="*", default=["runs"], help="folders searched for runs (default: runs)")
    add("--format", choices=("text", "latex", "csv"), default="text", help="default: text")
    add("--plot", metavar="FILE.png", help="also plot CCC against training time (Table I)")
    add("--verbose", action="store_true", help="every p value and its 95 %% interval (section V)")
    add("--memory", nargs="+", type=float, metavar="GB", help="Table II for these cards (V-E)")
    add = parser.add_argument_group("the runs of Table I that are still to do").add_argument
    add("--commands", action="store_true", help="print their lines; RUNS is where they will be")
    add("--data", metavar="ROOT", help="corpus (section III)")
    add("--model", help="encoder (default: train.py's; section IV-A)")
    add("--skip-bad", action="store_true", help="go on without utterances that cannot be used")
    add("--cache-root", metavar="DIR", help="cached rows, too, with caches in DIR (section IV-C)")
    add("--seeds", type=int, default=5, help="runs a row (default: 5, section V)")
    add("--mixed", choices=("fp16", "bf16"), default="fp16", help="mixed precision (fp16)")
    add("--processes", type=int, default=1, help="GPUs a run, with torchrun (default: 1)")
    add(
        "--train-args",
        default="",
        metavar='"..."',
        help="more for each train.py line; give others other RUNS",
    )
    args = parser.parse_args(argv)
    if args.commands and (not args.data or len(args.runs) > 1):
        parser.error("--commands needs --data ROOT and one folder for the runs")
    return args


def main(argv=None):
    args = parse_args(argv)
    if args.commands:
        return print(*commands(args) or ["# nothing to do: all runs are finished"], sep="\n")
    runs = read_runs(args.runs)
    if not runs:
        raise ValueError(f"no runs in {' '.join(args.runs)}: a run is a folder with config.json")
    rows, tasks = group_rows(runs), runs[0]["attributes"]
    if args.memory:
        return show(memory_table(rows, args.memory), args.format)
    done = [row for row in rows if len(row["seeds"]) > 1]
    tests = [test for task in tasks for test in mark_rows(done, task)]
    results, costs = result_tables(done, tasks)
    for row in [row for row in rows if len(row["seeds"]) < 2]:  # no mean ± sd
        reason = f"one seed: {ccc(row[tasks[0]][0])}" if row["seeds"] else "out of memory"
        results.append({"row": row["name"], tasks[0]: reason})
    if args.plot:
        plot(done, tasks, args.plot)
    for table in (results, costs, tests) if args.verbose else (results, costs):
        show(table, args.format)
    if args.format == "text":
        print(f"† lower, ‡ higher (p < {LEVEL}), NS neither, than full fp32 or row uncached.")


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError, ImportError) as error:  # bad input: one line and exit status 2
        argparse.ArgumentParser().exit(2, f"error: {error}\n")
