"""stats.py against SciPy called directly, hand-worked numbers and the paper's own tables."""

import csv
import json
import shlex

import numpy as np
import pytest
from scipy import stats as scipy

import stats
import train

# Table I, means ± sds: method, layers, precision, activation, valence, hours; parameters
TABLE_ONE = [
    ("lora", 12, "fp32", (0.623, 0.02), (0.506, 0.01), (2.476, 0.02), 296_450),
    ("partial", 1, "fp32", (0.622, 0.02), (0.458, 0.01), (2.443, 0.002), 12_205_442),
    ("partial", 1, "fp16", (0.625, 0.01), (0.462, 0.01), (0.965, 0.01), 12_205_442),
    ("partial", 2, "fp32", (0.638, 0.01), (0.508, 0.01), (2.477, 0.01), 19_293_314),
    ("partial", 2, "fp16", (0.645, 0.01), (0.507, 0.004), (0.982, 0.003), 19_293_314),
    ("partial", 3, "fp32", (0.648, 0.01), (0.565, 0.002), (2.519, 0.02), 26_381_186),
    ("partial", 3, "fp16", (0.655, 0.01), (0.568, 0.01), (0.991, 0.003), 26_381_186),
    ("full", 12, "fp32", (0.637, 0.01), (0.567, 0.02), (2.980, 0.01), 90_172_034),
    ("full", 12, "fp16", (0.641, 0.01), (0.566, 0.01), (1.145, 0.01), 90_172_034),
]
FIVE = np.array([-2, -1, 0, 1, 2]) / np.sqrt(2.5)  # mean 0, sd 1 over n - 1
THREE = {"method": "partial", "layers": 3}
ONE = {"attributes": ["activation"]}
CACHE = {"layer": 9, "dtype": "float16"}


def write_run(root, seed=0, activation=0.6, valence=0.5, hours=1.0, **changes):
    """A run's folder, as train.py leaves it."""
    words = f"--data . --out . --precision fp32 --method {changes.get('method', 'full')}"
    result = vars(train.parse_args(words.split())) | {"layers": 12, "processes": 1, "seed": seed}
    result |= {"encoder": "e", "corpus": "c", "cache": CACHE if changes.get("cached") else None}
    result["fill_seconds"] = 1800.0 if changes.get("cached") else None
    result |= {"test": {"activation": activation, "valence": valence, "dominance": 0.4, "n": 9}}
    result |= {"train_seconds": hours * 3600, "eval_seconds": 360.0, "out_of_memory": False}
    result |= {"trainable_parameters": 90_172_034, "peak_memory_bytes": int(8e9)}
    result |= {"device": "A40", "device_memory_bytes": int(48e9)} | changes
    folder = root / f"run{len(list(root.glob('run*')))}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(result | {"test": None}))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_row(root, activation, valence=(0.5, 0.01), hours=(1.0, 0.0), **changes):
    """Five seeds with exactly these means and sds."""
    for seed, z in enumerate(FIVE):
        scores = [mean + sd * z for mean, sd in (activation, valence, hours)]
        write_run(root, seed, *scores, **changes)


def out_of_memory(card, peak):
    """What a run records that failed on a card of so many GB with so many allocated."""
    memory = {"device_memory_bytes": int(card * 1e9), "peak_memory_bytes": int(peak * 1e9)}
    return memory | {"out_of_memory": True, "test": None, "train_seconds": None}


@pytest.fixture
def paper(tmp_path):
    for method, layers, precision, *scores, parameters in TABLE_ONE:
        row = {"method": method, "layers": layers, "precision": precision}
        write_row(tmp_path, *scores, **row, trainable_parameters=parameters)
    cached = THREE | {"cached": True, "device": "2080 Ti", "trainable_parameters": 21_265_154}
    # the means that the paper leaves out as NS: those of the row uncached
    write_row(tmp_path, (0.648, 0.01), (0.558, 0.003), (1.023, 0.002), **cached)
    write_row(tmp_path, (0.639, 0.01), (0.568, 0.01), (0.353, 0.002), precision="fp16", **cached)
    return tmp_path


def text(capsys, *args):
    stats.main([str(arg) for arg in args])
    return capsys.readouterr().out


def tables(capsys, *args):
    """What the command prints -> [{name of a row: {column: text}}], a dict a table."""
    parts = text(capsys, *args, "--format", "csv").strip("\n").split("\n\n")
    return [{row["row"]: row for row in csv.DictReader(part.splitlines())} for part in parts]


def refused(reason, *args):
    with pytest.raises(ValueError, match=reason):
        stats.main([str(arg) for arg in args])


def test_the_papers_marks_and_savings(paper, capsys):
    """Five runs a row with Table I's means and sds: † exactly where the paper has it; 67 % and 88 %
    less time and 71 % fewer parameters, as the abstract and section V have it."""
    table = tables(capsys, paper)[0]
    fp32, fp16 = "partial3 fp32 cached", "partial3 fp16 cached"
    lower = [f"partial{n} {precision}" for n in (1, 2) for precision in ("fp32", "fp16")]
    lower = {"activation": [fp16], "valence": ["lora fp32", *lower, fp32]}
    for task, ns in (("activation", fp32), ("valence", fp16)):
        assert [name for name, row in table.items() if "†" in row[task]] == lower[task]
        assert [name for name, row in table.items() if "NS" in row[task]] == [ns]
        assert len(table) == 11 and not any("‡" in row[task] for row in table.values())
    row = [table["partial3 fp16"][key] for key in ("activation", "faster", "params", "fewer")]
    assert row == [".655±.010", "67% (3.0x)", "26.38M", "71% (3.4x)"]
    assert table[fp16]["faster"] == "88% (8.4x)"


def test_agrees_with_scipy(tmp_path):
    """On random scores every p value and interval is that of SciPy called directly."""
    draw = np.random.default_rng(0)
    scores = {n: draw.normal(0.6 + n / 99, 0.02 * n, 5) for n in (1, 2, 3)}  # 3: the baseline
    for n in scores:
        for seed in draw.permutation(5):
            method = "full" if n == 3 else "partial"
            write_run(tmp_path, int(seed), scores[n][seed], method=method, layers=n)
    rows = stats.group_rows(stats.read_runs([tmp_path]))
    anova, *tests = stats.mark_rows(rows, "activation")
    assert float(anova["p"]) == pytest.approx(scipy.f_oneway(*scores.values()).pvalue, rel=5e-3)
    for n, test in zip((1, 2), tests, strict=True):
        expected = scipy.ttest_ind(scores[n], scores[3])
        low, high, p = *expected.confidence_interval(), expected.pvalue
        found = [float(x) for x in (*test["95 % interval"].split(" to "), test["corrected"])]
        assert found == pytest.approx([low, high, min(1, 2 * p)], rel=5e-3, abs=6e-4)
        assert float(test["p"]) == pytest.approx(p, rel=5e-3)


def test_a_hand_worked_case(tmp_path, capsys):
    """1 2 3 against 4 5 6 (hundredths): t = -3.674 on 4 degrees, p = .0213; t² is ANOVA's F."""
    for seed, value in enumerate((0.01, 0.02, 0.03)):
        write_run(tmp_path, seed, value, **THREE, **ONE)
        write_run(tmp_path, seed, value + 0.03, **ONE)
    results, _, tests = tables(capsys, tmp_path, "--verbose")
    values = " ".join(tests["partial3 fp32"].values())  # t of 2.5 % is 2.776
    assert values.endswith("full fp32 0.0213 0.0213 † -.030 -.053 to -.007")
    assert tests["all uncached"]["p"] == "0.0213"
    assert results["partial3 fp32"]["activation"] == ".020±.010 †"


def test_no_t_test_marks_without_anova(tmp_path, capsys):
    """A t-test under .05 is no mark where the ANOVA over all uncached rows is not significant."""
    for n, scores in enumerate([(0.58, 0.01), (0.59, 0.05), (0.59, 0.05)], start=1):
        write_row(tmp_path, scores, method="partial", layers=n, **ONE)
    write_row(tmp_path, (0.600, 0.01), **ONE)
    test = tables(capsys, tmp_path, "--verbose")[2]["partial1 fp32"]
    assert float(test["corrected"]) < 0.05 and test["mark"] == "-"


def test_cached_rows_meet_their_own_twin(tmp_path, capsys):
    """A cached row is tested, uncorrected, against its uncached twin: NS, † or ‡, never full's; one
    of LoRA without a twin is not, and one with only a frozen twin against that."""
    write_row(tmp_path, (0.9, 0.01), **ONE)
    write_row(tmp_path, (0.6, 0.01), method="lora", layers=3, cached=True, **ONE)
    for n, shift in enumerate((0.001, -0.016, 0.016, 0.5), start=1):
        row = ONE | {"method": "partial", "layers": n}
        write_row(tmp_path, (0.1, 0.01), **row, freeze_prefix=True)
        write_row(tmp_path, (0.6 + shift, 0.01), **row, cached=True)
        if n < 4:
            write_row(tmp_path, (0.6, 0.01), **row)
    tests = tables(capsys, tmp_path, "--verbose")[2]
    found = {name: row["mark"][0] for name, row in tests.items() if name[-7:] == " cached"}
    assert found == {f"partial{n} fp32 cached": mark for n, mark in enumerate("N†‡‡", start=1)}
    assert tests["partial4 fp32 cached"]["against"] == "partial4 fp32 frozen"
    assert tests["partial2 fp32 cached"]["p"] == tests["partial2 fp32 cached"]["corrected"]


@pytest.mark.parametrize(("hours", "after"), [(0.4, "1"), (0.8, "3"), (1.2, "never")])
def test_when_a_cache_has_paid(tmp_path, capsys, hours, after):
    """Half an hour of filling: .6 h saved a run pays at once, .2 h after 3 runs, -.2 h never."""
    write_row(tmp_path, (0.6, 0.01), **THREE)
    write_row(tmp_path, (0.6, 0.01), hours=(hours, 0), cached=True, **THREE)
    cost = [*tables(capsys, tmp_path)[1]["partial3 fp32 cached"].values()]
    saved = f"{100 - 100 * hours:.0f}% ({1 / hours:.1f}x)"
    assert cost[4:] == ["0.5", f"{hours + 0.5:.4g}", saved, after]


@pytest.mark.filterwarnings("ignore")  # SciPy's, of constant scores
def test_without_spread_nothing_is_nan(tmp_path, capsys):
    """Equal scores in every seed: p is 1 for equal rows, 0 for different ones, and no NaN."""
    for n, value in ((1, 0.3), (2, 0.11)):
        write_row(tmp_path, (0.2, 0), (value, 0), method="partial", layers=n)
    for seed in range(7):  # means of 7 round otherwise than of 5
        write_run(tmp_path, seed, 0.2, 0.11)
    tests = tables(capsys, tmp_path, "--verbose")[2]
    assert [float(tests[f"partial{n} fp32"]["p"]) for n in (1, 2)] == [pytest.approx(0), 1]
    assert "nan" not in text(capsys, tmp_path, "--verbose").lower()


def test_rows_that_are_not_pooled(tmp_path, capsys):
    """Caches of another layer or dtype and other numbers of processes are rows of their own, with
    what tells them apart in their names."""
    for change in ({}, {"layer": 8}, {"dtype": "float32"}):
        write_row(tmp_path, (0.6, 0.01), cached=True, cache=CACHE | change, **THREE)
    write_row(tmp_path, (0.6, 0.01))
    write_row(tmp_path, (0.5, 0.01), processes=4)
    full, cached = ("full fp32 processes={}", "partial3 fp32 cached cache_layer={} cache_dtype={}")
    pairs = [(9, "float16"), (8, "float16"), (9, "float32")]
    names = [full.format(1), full.format(4), *(cached.format(*pair) for pair in pairs)]
    assert sorted(tables(capsys, tmp_path)[0]) == sorted(names)


def test_attributes_and_links(tmp_path, capsys):
    """The columns are the runs' attributes, in their order. Linked run folders are read; neither a
    loop of links nor a folder given twice counts a run twice."""
    write_row(tmp_path / "elsewhere", (0.6, 0.01), attributes=["dominance", "activation"])
    runs = tmp_path / "runs"
    runs.mkdir()
    for folder in (tmp_path / "elsewhere").iterdir():
        (runs / f"link-{folder.name}").symlink_to(folder)
    (runs / "loop").symlink_to(runs)
    for folders in ([runs], [runs, tmp_path / "elsewhere", runs]):
        row = tables(capsys, *folders)[0]["full fp32"]
        assert list(row)[:4] == ["row", "n", "dominance", "activation"]
        assert list(row.values())[1:4] == ["5", ".400±.000", ".600±.010"]


def test_out_of_memory_runs(tmp_path, capsys):
    """They are not in the means; a row of nothing else says so; no baseline, no †."""
    write_row(tmp_path, (0.6, 0.01), **THREE)
    write_row(tmp_path, (0.1, 0.01), method="partial", layers=1)
    write_run(tmp_path, seed=9, **out_of_memory(11.55, 8.6), **THREE)
    write_run(tmp_path, **out_of_memory(11.55, 8.6))
    found = [(row["n"], row["activation"]) for row in tables(capsys, tmp_path)[0].values()]
    assert sorted(found) == [("-", "out of memory"), ("5", ".100±.010"), ("5", ".600±.010")]


def test_table_two(tmp_path, capsys):
    """A row fits from its peak on, not up to the card on which it failed; else it is not known."""
    small, large = out_of_memory(11.55, 8.6), out_of_memory(42.4, 39.2)  # sold as 11, as 40 GB
    at_11, at_44 = {"peak_memory_bytes": int(11e9)}, {"peak_memory_bytes": int(44e9)}
    cases = [[small], [large], [small, at_44], [small, at_11], [at_11], [at_44]]
    lines = ["- ✗??", "- ✗✗?", "44.00 ✗✗✓", "11.00 ✗✓✓", "11.00 ✓✓✓", "44.00 ✗✗✓"]
    for case, line in zip(cases, lines, strict=True):
        root = tmp_path / str(cases.index(case))
        for run in case:
            write_run(root, **run)
        row = tables(capsys, root, "--memory", 11, 40, 48)[0]["full fp32"]
        assert "{} {}{}{}".format(*[*row.values()][1:]) == line


ODD = [({key: 6}, f"same {key}") for key in stats.SAME if key != "attributes"]
ODD += [(ONE, "same attributes"), ({"seed": 1}, "same row and seed: .*run1 and .*run5")]
ODD += [({"test": {"n": 9}}, "run5/result.json: the key 'activation' is missing")]


@pytest.mark.parametrize(("changes", "reason"), ODD)
def test_refuses_what_does_not_compare(tmp_path, capsys, changes, reason):
    """One run that does not belong with the others is named with the reason; no table is shown."""
    write_row(tmp_path, (0.6, 0.01))
    write_run(tmp_path, **{"seed": 7} | changes)
    refused(reason, tmp_path)
    assert not capsys.readouterr().out


def test_refuses_what_is_not_a_finished_run(tmp_path, capsys):
    """No folder, no run, no result.json, a key missing; encoders are passed over."""
    refused("none: no such folder", tmp_path, tmp_path / "none")
    refused("no runs in", tmp_path)
    write_row(tmp_path, (0.6, 0.01), **THREE)
    write_row(tmp_path, (0.6, 0.01))
    odd = write_run(tmp_path, seed=5)
    (odd / "result.json").write_text((odd / "result.json").read_text().replace('"lr"', '"LR"'))
    refused("run10/result.json: the key 'lr' is missing", tmp_path)
    (odd / "result.json").unlink()
    refused("run10: unfinished; .* --resume", tmp_path)
    (odd / "config.json").write_text('{"model_type": "wav2vec2"}')  # an encoder, not a run
    assert "full fp32" in text(capsys, tmp_path)


def test_commands_of_the_whole_sweep(tmp_path, capsys):
    """15 rows x 5 seeds, caches first, each line for a shell; left out is what has a result, unless
    it is out of memory, and the cache that no line needs any more."""

    def sweep(*args):
        out = text(capsys, runs, "--commands", "--data", "it's here", "--cache-root", "c", *args)
        return [shlex.split(line) for line in out.splitlines()]

    runs, last = tmp_path / "my runs", "--seed 4 --method partial --layers 3 --precision fp16"
    lines = sweep("--train-args", "--lr 1e-3", "--skip-bad")
    assert [line[1] for line in lines] == ["cache.py"] * 3 + ["train.py"] * 75
    corpus = ["--data", "it's here", "--skip-bad"]
    assert lines[2] == ["python", "cache.py", *corpus, "--layers", "3", "--out", "c/last-3"]
    last = ["--out", f"{runs}/partial3-fp16-cached-seed4", *last.split(), "--cache", "c/last-3"]
    assert lines[-1] == ["python", "train.py", *corpus, *last, "--lr", "1e-3", "--resume"]
    for line in sweep("--processes", 2):
        assert line[:3] == ["torchrun", "--nproc-per-node", "2"] and line[3][-3:] == ".py"

    lines = sweep()
    rest = [line for line in lines if "full" not in line and "c/last-3" not in line]
    for line in lines[3:]:
        if line not in rest:
            write_run(runs).rename(line[line.index("--out") + 1])
    assert sweep() == rest and len(rest) == 57
    failed = runs / "full-fp32-seed3" / "result.json"
    failed.write_text(json.dumps(json.loads(failed.read_text()) | {"out_of_memory": True}))
    assert len(sweep()) == 58


def test_formats(paper, capsys):
    """A CCC prints as in the paper, and what rounds to zero without a sign. Text fits 100 columns;
    LaTeX has the cells of CSV, and nothing that LaTeX misreads."""
    values = (0.6234, -0.0123, -0.0004, 0.9999, 10.25)
    assert [*map(stats.ccc, values)] == [".623", "-.012", ".000", "1.000", "10.250"]
    saved = [stats.saved(value, 1000) for value in (1002, 1200, 3)]
    assert saved == ["0% (1.0x)", "-20% (0.8x)", "99.7% (333.3x)"]
    assert max(map(len, text(capsys, paper).splitlines())) <= 100
    rows = text(capsys, paper, "--format", "csv").splitlines()
    latex = text(capsys, paper, "--format", "latex").splitlines()
    assert [line.count("&") for line in latex] == [line.count(",") for line in rows]
    assert not set("±†‡") & set("".join(latex)) and "%" not in "".join(latex).replace(r"\%", "")
    assert latex[2].startswith(r"partial1 fp32 & 5 & .622$\pm$.020 & .458$\pm$.010 $^\dagger$ & ")


def test_plot(paper, tmp_path, capsys):
    """A PNG, 900 pixels wide, also of rows with different numbers of seeds."""
    pytest.importorskip("matplotlib")
    write_run(paper, seed=9)
    text(capsys, paper, "--plot", tmp_path / "plot.png")
    png = (tmp_path / "plot.png").read_bytes()
    assert png[1:4] == b"PNG" and int.from_bytes(png[16:20]) == 900


def test_one_seed(tmp_path, capsys):
    """A row with one finished seed is shown without mean, sd and test, and stops nothing else."""
    write_row(tmp_path, (0.6, 0.01))
    write_run(tmp_path, activation=0.4321, method="partial", layers=3)
    lines = text(capsys, tmp_path).splitlines()
    assert any("partial3 fp32" in line and "one seed: .432" in line for line in lines)
    assert any("full fp32" in line and ".600±.010" in line for line in lines)
