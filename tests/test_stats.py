"""stats.py against SciPy called directly, hand-worked numbers and the paper's own tables."""

import csv
import json
import shlex

import numpy as np
import pytest
from scipy import stats as scipy

import stats
import train

# Table I: name; means and sds of activation, valence and hours; parameters; marks (NS: neither).
TABLE_ONE = [  # Means that the paper leaves out for NS are here those of the row uncached.
    ("lora fp32", (0.623, 0.02), (0.506, 0.01), (2.476, 0.02), 296_450, "- †"),
    ("partial1 fp32", (0.622, 0.02), (0.458, 0.01), (2.443, 0.002), 12_205_442, "- †"),
    ("partial1 fp16", (0.625, 0.01), (0.462, 0.01), (0.965, 0.01), 12_205_442, "- †"),
    ("partial2 fp32", (0.638, 0.01), (0.508, 0.01), (2.477, 0.01), 19_293_314, "- †"),
    ("partial2 fp16", (0.645, 0.01), (0.507, 0.004), (0.982, 0.003), 19_293_314, "- †"),
    ("partial3 fp32", (0.648, 0.01), (0.565, 0.002), (2.519, 0.02), 26_381_186, "- -"),
    ("partial3 fp16", (0.655, 0.01), (0.568, 0.01), (0.991, 0.003), 26_381_186, "- -"),
    ("full fp32", (0.637, 0.01), (0.567, 0.02), (2.980, 0.01), 90_172_034, "- -"),
    ("full fp16", (0.641, 0.01), (0.566, 0.01), (1.145, 0.01), 90_172_034, "- -"),
    ("partial3 fp32 cached", (0.648, 0.01), (0.558, 0.003), (1.023, 0.002), 21_265_154, "NS †"),
    ("partial3 fp16 cached", (0.639, 0.01), (0.568, 0.01), (0.353, 0.002), 21_265_154, "† NS"),
]
# Means and sds of full and of partial rows; in the second case a t-test finds what ANOVA does not.
GROUPS = [[(0.6, 0.03), (0.58, 0.04), (0.5, 0.02)], [(0.6, 0.01), (0.59, 0.05), (0.58, 0.01)]]
FIVE = np.array([-2, -1, 0, 1, 2]) / np.sqrt(2.5)  # mean 0, sd 1 over n - 1
THREE, ONE = {"method": "partial", "layers": 3}, {"attributes": ["activation"]}
CACHE = "layer 9, float16"
FAILED = {"out_of_memory": True, "test": None, "train_seconds": None}
FAILED |= {"device_memory_bytes": 11.55e9, "peak_memory_bytes": 8.6e9}  # sold as 11 GB


def write_run(root, seed=0, activation=0.6, valence=0.5, hours=1.0, cached=False, **changes):
    """A run's folder, as train.py leaves it."""
    result = vars(train.parse_args(["--demo", "--method", "full", "--precision", "fp32"]))
    result |= {"layers": 12, "processes": 1, "seed": seed, "encoder": "e", "corpus": "c"}
    result |= {"cached": cached, "cache": CACHE if cached else None, "device": "A40"}
    result |= {"test": {"activation": activation, "valence": valence, "dominance": 0.4, "n": 9}}
    result |= {"fill_seconds": 1800.0 if cached else None, "train_seconds": hours * 3600}
    result |= {"eval_seconds": 360.0, "out_of_memory": False, "trainable_parameters": 90_172_034}
    result |= {"device_memory_bytes": 48e9, "peak_memory_bytes": 8e9} | changes
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


@pytest.fixture
def paper(tmp_path):
    for name, *scores, parameters, _ in TABLE_ONE:
        method, precision, *cached = name.split()
        row = {"method": method[:7], "layers": int(method[7:] or 12), "precision": precision}
        write_row(tmp_path, *scores, **row, cached=bool(cached), trainable_parameters=parameters)
    return tmp_path


def text(capsys, *args):
    stats.main([str(arg) for arg in args])
    return capsys.readouterr().out


def tables(capsys, *args):
    """What the command prints -> [{name of a row: {column: text}}], a dict a table."""
    parts = text(capsys, *args, "--format", "csv").strip("\n").split("\n\n")
    return [{row["row"]: row for row in csv.DictReader(part.splitlines())} for part in parts]


def test_the_papers_marks_and_savings(paper, capsys):
    """Five runs a row with Table I's means and sds: † exactly where the paper has it; 67 % and 88 %
    less time and 71 % fewer parameters, as the abstract and section V have it."""
    table, tasks = tables(capsys, paper)[0], ("activation", "valence")
    marks = {name: [row[task][9:].strip() or "-" for task in tasks] for name, row in table.items()}
    assert marks == {name: marks.split() for name, *_, marks in TABLE_ONE}
    row = [table["partial3 fp16"][key] for key in ("activation", "faster", "params", "fewer")]
    assert row == [".655±.010", "67% (3.0x)", "26.38M", "71% (3.4x)"]
    assert table["partial3 fp16 cached"]["faster"] == "88% (8.4x)"


@pytest.mark.parametrize("groups", GROUPS)
def test_agrees_with_scipy(groups, tmp_path):
    """p values and intervals are those of SciPy called directly. What a t-test finds, corrected, is
    marked only where the ANOVA over all uncached rows is significant, too."""
    write_row(tmp_path, groups[0])
    for n, scores in enumerate(groups[1:], start=1):
        write_row(tmp_path, scores, method="partial", layers=n, trainable_parameters=n)
    write_row(tmp_path, (0.1, 0.01), method="lora", cached=True)  # in none of these tests
    anova, *tests = stats.mark_rows(stats.group_rows(stats.read_runs([tmp_path])), "activation")
    full, *partial = [mean + sd * FIVE for mean, sd in groups]
    p_anova = scipy.f_oneway(full, *partial).pvalue
    assert anova["p"] == f"{p_anova:.3g}"
    for values, test in zip(partial, tests, strict=True):
        expected = scipy.ttest_ind(values, full)
        corrected = min(1, len(partial) * expected.pvalue)
        assert (test["p"], test["corrected"]) == (f"{expected.pvalue:.3g}", f"{corrected:.3g}")
        assert test["95 % interval"] == " to ".join(map(stats.ccc, expected.confidence_interval()))
        assert test["mark"] == ("†" if max(corrected, p_anova) < 0.05 else "")
    assert corrected < 0.05


def test_a_hand_worked_case(tmp_path, capsys):
    """1 2 3 against 4 5 6 (hundredths): t = -3.674 on 4 degrees, p = .0213; t² is ANOVA's F. An
    attribute that is constant, asked for before that, has no mark, and nothing is NaN."""
    for seed, value in enumerate((0.01, 0.02, 0.03)):
        write_run(tmp_path, seed, value, attributes=["dominance", "activation"], **THREE)
        write_run(tmp_path, seed, value + 0.03, attributes=["dominance", "activation"])
    results, _, tests = tables(capsys, tmp_path, "--verbose")
    values = " ".join(tests["partial3 fp32"].values())  # t of 2.5 % is 2.776
    assert values.endswith("full fp32 0.0213 0.0213 † -.030 -.053 to -.007")
    assert tests["all uncached"]["p"] == "0.0213"
    assert [*results["partial3 fp32"].values()][2:4] == [".400±.000", ".020±.010 †"]
    assert "nan " not in text(capsys, tmp_path, "--verbose")


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


def test_rows_that_are_not_pooled(tmp_path, capsys):
    """Caches of another layer or dtype and other numbers of processes are rows of their own, with
    what tells them apart in their names."""
    for cache in (CACHE, "layer 8, float16", "layer 9, float32"):
        write_run(tmp_path, cached=True, cache=cache, **THREE)
    write_run(tmp_path, cached=True, processes=4, **THREE)
    names = sorted(tables(capsys, tmp_path)[0])
    assert len(names) == 4 and names[0].endswith("cache=layer 8, float16 processes=1")
    assert names[2] == "partial3 fp32 cached cache=layer 9, float16 processes=4"


def test_rows_without_a_mean(tmp_path, capsys):
    """One finished seed is shown without mean and sd; a run out of memory is in no mean, and a row
    of nothing else says so. Neither a folder given twice nor a loop of links counts a run twice."""
    write_row(tmp_path, (0.6, 0.01), **THREE)
    write_run(tmp_path, seed=9, **FAILED, **THREE)
    write_run(tmp_path, **FAILED)
    write_run(tmp_path, activation=0.4321, method="lora")
    (tmp_path / "loop").symlink_to(tmp_path)
    found = [row["activation"].strip() for row in tables(capsys, tmp_path, tmp_path)[0].values()]
    assert found == [".600±.010", "out of memory", "one seed: .432"]


AT_11, AT_44 = {"peak_memory_bytes": 11e9}, {"peak_memory_bytes": 44e9}
FITS = [([FAILED], "- ✗??"), ([FAILED, AT_11], "11.00 ✗✓✓"), ([FAILED, AT_44], "44.00 ✗✗✓")]
FITS += [([AT_11], "11.00 ✓✓✓"), ([AT_44], "44.00 ✗✗✓")]


@pytest.mark.parametrize(("runs", "line"), FITS)
def test_table_two(runs, line, tmp_path, capsys):
    """A row fits from its peak on, not up to the card on which it failed; else it is not known."""
    for run in runs:
        write_run(tmp_path, **run)
    row = tables(capsys, tmp_path, "--memory", 11, 40, 48)[0]["full fp32"]
    assert "{} {}{}{}".format(*[*row.values()][1:]) == line


SAME = ["epochs", "batch_size", "lr", "dropout", "attributes", "splits", "encoder", "corpus"]
ODD = [({key: ["valence"]}, f"same {key}") for key in SAME]
ODD += [({"seed": 1}, "a seed twice in .*run1, .*run5"), ({"test": {}}, "run5.* 'activation'")]


@pytest.mark.parametrize(("changes", "reason"), ODD)
def test_refuses_what_does_not_compare(tmp_path, capsys, changes, reason):
    """One run that does not belong with the others is named with the reason; no table is shown."""
    write_row(tmp_path, (0.6, 0.01))
    write_run(tmp_path, **{"seed": 7} | changes)
    with pytest.raises(ValueError, match=reason):
        stats.main([str(tmp_path)])
    assert not capsys.readouterr().out


def test_refuses_what_is_not_a_finished_run(tmp_path):
    """No folder, nothing but an encoder in it, and a run without result.json are refused."""
    (write_run(tmp_path) / "result.json").unlink()
    (write_run(tmp_path / "x") / "config.json").write_text('{"model_type": "wav2vec2"}')
    cases = [("gone", "no such folder"), ("x", "no runs in"), ("run0", "unfinished; .* --resume")]
    for folder, reason in cases:
        with pytest.raises(ValueError, match=reason):
            stats.main([str(tmp_path / folder)])


def test_commands_of_the_whole_sweep(tmp_path, capsys):
    """15 rows x 5 seeds, caches first, each line for a shell; left out is what has a result, unless
    it is out of memory, and the cache that no line needs any more."""

    def sweep(*args):
        out = text(capsys, runs, "--commands", "--data", "it's here", "--cache-root", "c", *args)
        return [shlex.split(line) for line in out.splitlines()]

    runs, last = tmp_path / "my runs", "--seed 4 --method partial --layers 3 --precision fp16"
    lines = sweep("--train-args", "--lr 1e-3", "--skip-bad", "--processes", 2)
    assert [line[3] for line in lines] == ["cache.py"] * 3 + ["train.py"] * 75
    launch, corpus = ["torchrun", "--nproc-per-node", "2"], ["--data", "it's here", "--skip-bad"]
    assert lines[2] == [*launch, "cache.py", *corpus, "--layers", "3", "--out", "c/last-3"]
    last = ["--out", f"{runs}/partial3-fp16-cached-seed4", *last.split(), "--cache", "c/last-3"]
    assert lines[-1] == [*launch, "train.py", *corpus, *last, "--lr", "1e-3", "--resume"]
    lines = sweep()
    rest = [line for line in lines if "full" not in line and "c/last-3" not in line]
    for line in [line for line in lines[3:] if line not in rest]:
        write_run(runs).rename(line[line.index("--out") + 1])
    write_run(runs, **FAILED).rename(runs / "lora-fp32-seed3")
    assert sweep() == rest and len(rest) == 57 and rest[0][:2] == ["python", "cache.py"]


def test_formats(paper, capsys):
    """A CCC prints as in the paper, and what rounds to zero without a sign. Text fits 100 columns;
    in LaTeX, what it would misread is a command."""
    values = (0.6234, -0.0123, -0.0004, 0.9999, 10.25)
    assert [*map(stats.ccc, values)] == [".623", "-.012", ".000", "1.000", "10.250"]
    assert max(map(len, text(capsys, paper).splitlines())) <= 100
    row = text(capsys, paper, "--format", "latex").splitlines()[1]
    assert row.endswith(r"$^\dagger$ & 2.476$\pm$0.02 & 0.30M & 17\% (1.2x) & 99.7\% (304.2x) \\")


def test_plot(paper, tmp_path, capsys):
    """A PNG, 900 pixels wide, also of rows with different numbers of seeds."""
    pytest.importorskip("matplotlib")
    write_run(paper, seed=9)
    text(capsys, paper, "--plot", tmp_path / "plot.png")
    png = (tmp_path / "plot.png").read_bytes()
    assert png[1:4] == b"PNG" and int.from_bytes(png[16:20]) == 900
