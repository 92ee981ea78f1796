"""stats.py against SciPy called directly, hand-worked numbers and the paper's own tables."""

import csv
import json
import sys

import numpy as np
import pytest
from scipy import stats as scipy

import stats

# Table I: name; means and sds of activation, valence and hours; parameters; marks (-: none).
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
FIVE = np.array([-2, -1, 0, 1, 2]) / np.sqrt(2.5)  # mean 0, sd 1 over n - 1
THREE = {"method": "partial", "layers": 3}
LORA = {"method": "lora", "precision": "fp16"}
EXACT = {"padding": "exact"}
FAILED = {"out_of_memory": True, "test": None, "train_seconds": None}
FAILED |= {"device_memory_bytes": 11.55e9, "peak_memory_bytes": 8.6e9}  # sold as 11 GB
RESULT = {  # result.json, as train.py leaves it
    "method": "full", "layers": 12, "precision": "fp32", "padding": "paper", "chunk": None,
    "recompute": False, "processes": 1, "rank": 8, "alpha": 16, "lora_dropout": 0.1, "seed": 0,
    "eval_batch_size": 32, "attributes": ["activation", "valence"], "freeze_embedding": False,
    "epochs": 5, "batch_size": 32, "lr": 1e-4, "dropout": 0.2, "corpus": "c", "audio": "a",
    "splits": ["Train", "Development", "Test1"], "scale": [1.0, 7.0], "encoder_sha256": "e",
    "device": "A40", "device_memory_bytes": 48e9, "peak_memory_bytes": 8e9, "eval_seconds": 360.0,
    "trainable_parameters": 90_172_034, "out_of_memory": False, "cache_contents": None,
}  # fmt: skip


def write_run(root, activation=0.6, valence=0.5, hours=1.0, cached=False, **changes):
    """A run's folder. The digest of labels depends on the attributes, as train.py's does."""
    folder = root / f"run{len(list(root.glob('run*')))}"
    result = RESULT | {"test": {"activation": activation, "valence": valence, "n": 9}}
    result |= {"cached": cached, "cache": "cut 10, float16" if cached else None}
    result |= {"fill_seconds": 1800.0 if cached else None, "train_seconds": hours * 3600}
    result |= {"cache_contents": str(folder), "audio": str(folder)} | changes
    result = {"labels": " ".join(result["attributes"])} | result
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"seed": 0}))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_row(root, activation, valence=(0.5, 0.01), hours=(1.0, 0.0), **changes):
    """Five seeds with exactly these means and sds."""
    for seed, z in enumerate(FIVE):
        scores = [mean + sd * z for mean, sd in (activation, valence, hours)]
        write_run(root, *scores, seed=seed, **changes)


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
    """What the command prints -> [[{column: text}]], a list a table."""
    parts = text(capsys, *args, "--format", "csv").strip("\n").split("\n\n")
    return [list(csv.DictReader(part.splitlines())) for part in parts]


def marks(table, attribute="activation"):
    """{name of a row: its mark, "" or a dash}."""
    return {row["row"]: row[attribute].partition(" ")[2] for row in table}


def test_the_papers_marks_and_savings(paper, capsys):
    """Five runs a row with Table I's means and sds: † exactly where the paper has it; 67 % and 88 %
    less time and 71 % fewer parameters, as the abstract and section V have it."""
    table = tables(capsys, paper)[0]
    found = zip(marks(table).items(), marks(table, "valence").values(), strict=True)
    expected = {name: marks.replace("-", "").split(" ") for name, *_, marks in TABLE_ONE}
    assert {name: [first, second] for (name, first), second in found} == expected
    assert [row["row"] for row in table] == [name for name, *_ in TABLE_ONE]
    table = {row["row"]: " ".join(row.values()) for row in table}
    line = "partial3 fp16 5 .655±.010 .568±.010 0.991±0.003 26.38M 66.7% 70.7% A40 -"
    assert table["partial3 fp16"] == line
    assert table["partial3 fp16 cached"].endswith(" 0.353±0.002 21.27M 88.2% 76.4% A40 0.5")


# Means and sds of full and of partial rows; in the second case a t-test finds what ANOVA does not.
GROUPS = [[(0.6, 0.03), (0.58, 0.04), (0.5, 0.02)], [(0.6, 0.01), (0.59, 0.05), (0.58, 0.01)]]


@pytest.mark.parametrize("groups", GROUPS)
def test_agrees_with_scipy(groups, tmp_path):
    """p values and intervals are those of SciPy called directly. What a t-test finds, corrected, is
    marked only where the ANOVA over the uncached rows of the same padding and attributes is
    significant, too; rows of others, cached ones and those of one seed change nothing."""
    write_row(tmp_path, groups[0])
    for n, scores in enumerate(groups[1:], start=1):
        write_row(tmp_path, scores, method="partial", layers=n, trainable_parameters=n)
    write_row(tmp_path, (0.1, 0.01), cached=True, **THREE)
    write_row(tmp_path, (0.9, 0.01), **EXACT)
    write_row(tmp_path, (0.3, 0.01), method="lora", attributes=["activation"])
    write_run(tmp_path, 0.2, method="lora", precision="fp16")
    rows = stats.group_rows([stats.read_run(folder) for folder in stats.find_runs(tmp_path)])
    tests = stats.mark_attribute(rows, "activation")
    found = {row["name"]: row["marks"].get("activation") for row in rows}
    full, *partial = [mean + sd * FIVE for mean, sd in groups]
    p_anova = scipy.f_oneway(full, *partial).pvalue
    for values, test in zip(partial, tests, strict=True):
        expected = scipy.ttest_ind(values, full)
        corrected = min(1, len(partial) * expected.pvalue)
        interval = " to ".join(map(stats.format_ccc, expected.confidence_interval()))
        numbers = [f"{p:.3g}" for p in (expected.pvalue, corrected, p_anova)]
        assert [*test.values()][4:] == [interval, *numbers]
        assert found[test["row"]] == ("†" if max(corrected, p_anova) < 0.05 else "")
    assert corrected < 0.05


def test_a_hand_worked_case(tmp_path, capsys):
    """1 2 3 against 4 5 6 (hundredths): t = -3.674 on 4 degrees, p = .0213; t² is ANOVA's F. An
    attribute that does not vary has no mark, and its p value is NaN."""
    for seed, value in enumerate((0.01, 0.02, 0.03)):
        write_run(tmp_path, value, 0.4, seed=seed, **THREE)
        write_run(tmp_path, value + 0.03, 0.4, seed=seed)
    results, tests = tables(capsys, tmp_path, "--verbose")
    lines = [" ".join([*test.values()][2:]) for test in tests]  # t of 2.5 % is 2.776
    assert lines[0] == "full fp32 -.030 -.053 to -.007 0.0213 0.0213 0.0213"
    assert lines[1] == "full fp32 .000 .000 to .000 nan nan nan"
    assert (results[0]["activation"], results[0]["valence"]) == (".020±.010 †", ".400±.000")
    p, difference, _ = stats.compare(np.full(3, 0.7), np.full(5, 0.7))
    assert np.isnan(p) and abs(difference) < 1e-9
    values = (0.6234, -0.0123, -0.0004, 0.9999, 10.25)
    assert [*map(stats.format_ccc, values)] == [".623", "-.012", ".000", "1.000", "10.250"]


def test_cached_rows_meet_their_own_twin(tmp_path, capsys):
    """A cached row is tested alone, and so uncorrected, against its uncached twin: NS, † or ‡, not
    full's; without one there is a dash; the twin that freezes its embedding is the last, even where
    that one was computed in the same way and trains fewer parameters."""
    write_row(tmp_path, (0.9, 0.01))
    write_row(tmp_path, (0.6, 0.01), method="lora", cached=True)
    for n, shift in enumerate((0.001, -0.016, 0.016, 0.5), start=1):
        row = {"method": "partial", "layers": n, "processes": 4}
        write_row(tmp_path, (0.1, 0.01), **row, freeze_embedding=True, trainable_parameters=1)
        write_row(tmp_path, (0.6 + shift, 0.01), **row, cached=True)
        if n < 4:
            write_row(tmp_path, (0.6, 0.01), **row | {"processes": 1})
    results, tests = tables(capsys, tmp_path, "--verbose")
    found = [mark for name, mark in sorted(marks(results).items()) if " cached" in name]
    assert found == ["-", "NS", "†", "‡", "‡"]  # LoRA's, then of 1 to 4 layers
    lines = {row["row"]: [*row.values()][2:] for row in tests if row["attribute"] == "activation"}
    assert lines["partial4 fp32 cached"][0] == "partial4 fp32 frozen"
    p = scipy.ttest_ind(0.584 + 0.01 * FIVE, 0.6 + 0.01 * FIVE).pvalue
    assert lines["partial2 fp32 cached"][-3:] == [f"{p:.3g}"] * 3  # ANOVA's is the same
    row = {"method": "partial", "layers": 2, "processes": 4, "cached": True, "cache": "cut 9"}
    write_row(tmp_path, (0.584, 0.01), **row)  # a second cached row of one twin corrects nothing
    tests = tables(capsys, tmp_path, "--verbose")[1]
    assert [test["corrected"] for test in tests].count(f"{p:.3g}") == 3  # and of 3 layers


APART = [EXACT, {"eval_batch_size": 8}, {"attributes": ["activation"]}, {"rank": 4}]
APART += [{"alpha": 8}, {"lora_dropout": 0.0}, {"layers": 3}, {"precision": "fp32"}]


@pytest.mark.parametrize("change", APART)
def test_what_a_row_is_not_compared_with(change, tmp_path, capsys):
    """Rows of other padding, evaluation batches (in paper padding) or attributes are not compared,
    nor is a cached row with an uncached one trained otherwise: a dash, and a line says so."""
    write_row(tmp_path, (0.6, 0.01), **LORA)
    write_row(tmp_path, (0.1, 0.01), cached=True, **LORA | change)
    if change in APART[:3]:
        write_row(tmp_path, (0.9, 0.01), **change)  # full fp32, like the cached row alone
    found = marks(tables(capsys, tmp_path)[0])
    assert {mark for name, mark in found.items() if name[:4] == "lora"} == {"-"}
    assert "\n- not compared: this needs two seeds" in text(capsys, tmp_path)
    write_row(tmp_path, (0.6, 0.01), **LORA | change)
    found = marks(tables(capsys, tmp_path)[0])
    assert [mark for name, mark in found.items() if " cached" in name] == ["†"]


@pytest.mark.parametrize("change", [{"processes": 4}, {"chunk": 4}, {"recompute": True}])
def test_what_it_may_be_compared_with(change, tmp_path, capsys):
    """In exact padding, evaluation batches do not matter, nor in any how a row was computed. Of
    several full fp32, all rows, the others of them too, are compared with the first."""
    write_row(tmp_path, (0.5, 0.01), **THREE)  # paper padding, with nothing to compare with
    write_row(tmp_path, (0.6, 0.01), hours=(3, 0), **EXACT)
    write_row(tmp_path, (0.6, 0.01), hours=(2, 0), **EXACT | change)
    for more in {}, change:
        row = THREE | EXACT | {"eval_batch_size": 8} | more
        write_row(tmp_path, (0.5, 0.01), **row)
    results, tests = tables(capsys, tmp_path, "--verbose")
    lines = [row["activation"][-2:] + row["faster"] for row in results if "partial" in row["row"]]
    assert sorted(lines) == [" -" + "-", " †50.0%", " †50.0%"]
    full = [row["row"] for row in results if "full" in row["row"]]
    assert {test["against"] for test in tests} == {full[0]}
    assert {test["row"] for test in tests if "full" in test["row"]} == {full[1]}
    assert len(tests) == 2 * 3


def test_depth_by_attribute(tmp_path, capsys):
    """Rows of one attribute and of both stand in one table: each is compared with full fp32 of the
    same attributes, corrected by the number of such rows; what it does not predict is a dash."""
    both = ["activation", "valence"]
    for attributes in both[:1], both[1:], both:
        row = {"attributes": attributes}
        write_row(tmp_path, (0.6, 0.01), **row)
        for n in range(1, 3 + len(attributes)):
            write_row(tmp_path, (0.585, 0.01), method="partial", layers=n, **row)
    results, tests = tables(capsys, tmp_path, "--verbose")
    assert [row["valence"] for row in results[:3]] == ["-"] * 3 and len(tests) == 3 + 3 + 4 + 4
    p = scipy.ttest_ind(FIVE, FIVE - 1.5).pvalue
    for test in tests:
        attributes = test["against"].removeprefix("full fp32 attributes=")
        assert test["row"].endswith(attributes) or "4" in test["row"]
        factor = 4 if "+" in attributes else 3
        assert test["attribute"] == "valence" or test["corrected"] == f"{factor * p:.3g}"


ROW = {"method": "lora", "layers": 3, "precision": "fp16", "padding": "exact", "cached": True}
ROW |= {"cache": "cut 9", "freeze_embedding": True, "chunk": 4, "recompute": True, "processes": 4}
ROW |= {"rank": 4, "alpha": 8, "lora_dropout": 0.0, "eval_batch_size": 8, "attributes": ["valence"]}


@pytest.mark.parametrize("key", ROW)
def test_rows_that_are_not_pooled(key, tmp_path, capsys):
    """Runs that differ in this are two rows, and their names tell which is which."""
    write_run(tmp_path)
    write_run(tmp_path, **{"cache": None, key: ROW[key]})
    names = {row["row"] for row in tables(capsys, tmp_path)[0]}
    assert len(names) == 2
    told = {"method": "lora", "precision": "fp16", "cached": "cached", "freeze_embedding": "frozen"}
    assert told.get(key, f"{key}={str(ROW[key]).strip(chr(39) + '[]')}") in " ".join(names)


def test_rows_without_a_mean(tmp_path, capsys):
    """One finished seed is shown without sd and mark; a run out of memory is in no mean, and a row
    of nothing else says so. Neither a folder given twice nor a loop of links counts a run twice.
    All devices of a row are named."""
    write_row(tmp_path, (0.6, 0.01), **THREE)
    write_run(tmp_path, seed=9, device="2080 Ti", **FAILED, **THREE)
    write_run(tmp_path, **FAILED)
    write_run(tmp_path, 0.4321, method="lora")
    (tmp_path / "loop").symlink_to(tmp_path)
    rows = tables(capsys, tmp_path, tmp_path / "run0", tmp_path)[0]
    columns = ("row", "n", "activation", "train h", "device")
    assert "faster" not in rows[0]
    assert [[row[column] for column in columns] for row in rows] == [
        ["partial3 fp32", "5", ".600±.010 -", "1±0", "2080 Ti, A40"],
        ["full fp32", "0", "-", "out of memory", "A40"],
        ["lora fp32", "1", ".432 -", "1", "A40"],
    ]


AT_11, AT_44 = {"peak_memory_bytes": 11e9}, {"peak_memory_bytes": 44e9}
FITS = [([FAILED], "- ✗??"), ([FAILED, AT_11], "11.00 ✗✓✓"), ([FAILED, AT_44], "44.00 ✗✗✓")]
FITS += [([AT_11], "11.00 ✓✓✓"), ([AT_11, AT_44 | {"seed": 1}], "44.00 ✗✗✓")]
FITS += [([FAILED, FAILED | {"device_memory_bytes": 39.8e9, "seed": 1}], "- ✗✗?")]


@pytest.mark.parametrize(("runs", "line"), FITS)
def test_table_two(runs, line, tmp_path, capsys):
    """A row fits from its largest peak on, not up to the card on which it failed; else unknown."""
    for run in runs:
        write_run(tmp_path, **run)
    [row] = tables(capsys, tmp_path, "--memory", 11, 40, 48)[1]
    assert "{} {}{}{}".format(*[*row.values()][1:]) == line


SAME = "epochs batch_size lr dropout splits scale encoder_sha256 corpus labels"
ODD = [({key: 0.5}, f"same {key}: .*run0.*, 0.5 in '.*run5'") for key in SAME.split()]
ODD += [({"seed": 1}, "a seed twice in .*run1.*run5")]


@pytest.mark.parametrize(("changes", "reason"), ODD)
def test_refuses_what_does_not_compare(tmp_path, capsys, changes, reason):
    """One run that does not belong with the others is named with the reason; no table is shown."""
    write_row(tmp_path, (0.6, 0.01))
    write_run(tmp_path, **{"seed": 7} | changes)
    with pytest.raises(ValueError, match=reason):
        stats.main([str(tmp_path)])
    assert not capsys.readouterr().out


def test_refuses_what_is_not_a_finished_run(tmp_path):
    """No folder, nothing but an encoder in it, and a run without result.json are refused, beside a
    good run, too."""
    (write_run(tmp_path) / "result.json").unlink()
    (write_run(tmp_path / "x") / "config.json").write_text('{"model_type": "wav2vec2"}')
    good = write_run(tmp_path / "y")
    cases = [("gone", "no runs in"), ("x", "no runs in"), ("run0", "unfinished: .* --resume")]
    for folder, reason in cases:
        with pytest.raises(ValueError, match=f"{folder}.*{reason}|{reason}.*{folder}"):
            stats.main([str(good), str(tmp_path / folder)])


def damages():
    """Texts in place of a result.json."""
    good = RESULT | {"cached": False, "cache": None, "labels": "l", "train_seconds": 9.0}
    good |= {"test": {"activation": 0.5, "valence": 0.5}, "fill_seconds": None}
    for key in [*stats.ROW, *stats.SAME, "seed", "train_seconds", "test", "device"]:
        yield {name: value for name, value in good.items() if name != key}
    for key in [*stats.NUMBERS, "train_seconds"]:
        yield from (good | {key: value} for value in ("3", [1], float("nan"), 10**30, -9))
    for value in ([], None, 3, {"activation": "x", "valence": 0}, {"activation": 9e99}, "text"):
        yield good | {"test": value}
    yield from (good | {"attributes": value} for value in ("activation", [], [1], None, 5))
    yield from ([], None, 3, "text")


def test_damaged_results(tmp_path):
    """Whatever is wrong inside result.json is one short line that names the file."""
    write_run(tmp_path)
    path = write_run(tmp_path, seed=1) / "result.json"
    texts = [json.dumps(damaged).encode() for damaged in damages()]
    for content in [*texts, b"", b"{", b"[" * 100_000, b"\xff", b"9" * 5000]:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"run1/result.json' is damaged or of an") as caught:
            stats.main([str(tmp_path)])
        assert "\n" not in str(caught.value) and len(str(caught.value)) < 400, content[:80]


@pytest.mark.parametrize("key", [*stats.ROW, "device"])
def test_odd_settings(key, tmp_path, capsys):
    """A run with a list or a dict in place of a setting is refused, or is a row of its own."""
    for odd in {}, []:
        root = tmp_path / type(odd).__name__
        write_run(root)
        write_run(root, seed=1, **{key: odd})
        try:
            assert len(tables(capsys, root)[0]) == (1 if key == "device" else 2)
        except ValueError as error:
            assert "damaged" in str(error)


@pytest.mark.filterwarnings("error")
def test_text_and_plot(paper, tmp_path, capsys, monkeypatch):
    """Text is aligned. A plot is a PNG, 900 pixels wide, also of rows of other attributes and
    numbers of seeds, single ones shown, too; without matplotlib, a line says what to install."""
    write_run(paper, **FAILED, method="lora", precision="fp16")
    lines = text(capsys, paper).splitlines()
    columns = {line.index("A40") for line in lines[1:12]}
    assert columns == {lines[0].index("device")} and "nan" not in " ".join(lines)
    assert lines[-2][:8] == "p < 0.05"
    pytest.importorskip("matplotlib")
    write_run(paper, seed=9)
    write_row(paper, (0.5, 0.1), attributes=["activation"], **THREE)
    text(capsys, paper, "--plot", tmp_path / "plot.png")
    png = (tmp_path / "plot.png").read_bytes()
    assert png[1:4] == b"PNG" and int.from_bytes(png[16:20]) == 900
    for score in (0.1, 0.9):
        folder = write_run(tmp_path / f"single {score}", score)
        text(capsys, folder, "--plot", folder / "plot.png")
    singles = [path.read_bytes() for path in tmp_path.glob("single*/run0/plot.png")]
    assert len(set(singles)) == 2
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="pip install matplotlib"):
        stats.main([str(folder), "--plot", str(tmp_path / "plot.png")])
