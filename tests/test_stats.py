"""stats.py against SciPy called directly, hand-worked numbers and the paper's own tables."""

import csv
import io
import json
import shlex

import numpy as np
import pytest
from scipy import stats as scipy_stats

import stats

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


def write_run(root, seed=0, activation=0.6, valence=0.5, hours=1.0, **changes):
    """A finished run's folder, as train.py leaves it."""
    lora, cached = changes.get("method") == "lora", changes.get("cached", False)
    result = {"method": "full", "layers": 12, "precision": "fp32", "padding": "paper"}
    result |= {"cached": False, "freeze_prefix": False, "chunk": None, "recompute": False}
    result |= {"rank": 8 if lora else None, "alpha": 16.0 if lora else None}
    result |= {"lora_dropout": 0.1 if lora else None, "seed": seed, "epochs": 5, "batch_size": 32}
    result |= {"lr": 1e-4, "dropout": 0.2, "encoder": "e" * 64, "corpus": "c" * 64}
    result |= {"test": {"activation": activation, "valence": valence, "n": 9}}
    result |= {"train_seconds": hours * 3600, "eval_seconds": 360.0, "device": "A40"}
    result |= {"trainable_parameters": 90_172_034, "peak_memory_bytes": int(8e9)}
    result |= {"cache": {"seconds": 1800.0} if cached else None, "out_of_memory": False} | changes
    folder = root / f"run{len(list(root.glob('run*')))}"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps({"method": result["method"], "seed": seed}))
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def write_row(root, activation, valence=(0.5, 0.01), hours=(1.0, 0.0), **changes):
    """Five seeds with exactly these means and sds."""
    for seed, z in enumerate(FIVE):
        scores = [mean + sd * z for mean, sd in (activation, valence, hours)]
        write_run(root, seed, *scores, **changes)


@pytest.fixture
def paper(tmp_path):
    for method, layers, precision, *scores, parameters in TABLE_ONE:
        row = {"method": method, "layers": layers, "precision": precision}
        write_row(tmp_path, *scores, **row, trainable_parameters=parameters)
    cached = {"method": "partial", "layers": 3, "cached": True, "device": "2080 Ti"}
    cached |= {"trainable_parameters": 21_265_154}  # means the paper leaves out as NS: the twins'
    write_row(tmp_path, (0.648, 0.01), (0.558, 0.003), (1.023, 0.002), **cached)
    write_row(tmp_path, (0.639, 0.01), (0.568, 0.01), (0.353, 0.002), precision="fp16", **cached)
    return tmp_path


def table(capsys, *args):
    stats.main([str(arg) for arg in args])
    return capsys.readouterr().out


def as_csv(capsys, *args):
    return {
        r["row"]: r for r in csv.DictReader(io.StringIO(table(capsys, *args, "--format", "csv")))
    }


def refusal(capsys, *args):
    with pytest.raises(SystemExit) as stop:
        stats.main([str(arg) for arg in args])
    error = capsys.readouterr().err
    assert (
        stop.value.code == 2 and len(error.strip().splitlines()) == 2 and "Traceback" not in error
    )
    return error


def test_the_papers_marks(paper, capsys):
    """Five runs a row with Table I's means and sds: † on valence of LoRA, n = 1, 2;
    of the cached rows with three layers, on valence in fp32 and on activation in fp16."""
    rows = as_csv(capsys, paper)
    uncached = {name: row for name, row in rows.items() if row["cached"] == "False"}
    lower = {name for name, row in uncached.items() if row["valence_test_mark"]}
    parts = {f"partial{n} {precision}" for n in (1, 2) for precision in ("fp32", "fp16")}
    assert len(uncached) == 9 and lower == {"lora fp32"} | parts
    assert {uncached[name]["valence_test_mark"] for name in lower} == {"†"}
    assert not any(row["activation_test_mark"] for row in uncached.values())
    cached = [rows[f"partial3 {precision} cached"] for precision in ("fp32", "fp16")]
    assert [row["activation_test_mark"] for row in cached] == ["NS", "†"]
    assert [row["valence_test_mark"] for row in cached] == ["†", "NS"]


def test_the_papers_savings(paper, capsys):
    """67 % and 88 % less time and 71 % fewer parameters, as the abstract and section V have it."""
    lines = {line[:21].strip(): line for line in table(capsys, paper).split("\n\n")[0].split("\n")}
    assert ".655±.010  " in lines["partial3 fp16"] and "67% (3.0x)" in lines["partial3 fp16"]
    assert "71% (3.4x)" in lines["partial3 fp16"] and "296K" in lines["lora fp32"]
    assert "88% (8.4x)" in lines["partial3 fp16 cached"]


def test_agrees_with_scipy(tmp_path, capsys):
    """On random scores every p value, with each option, is that of SciPy called directly."""
    draw = np.random.default_rng(0)
    scores = {n: draw.normal(0.6 + n / 99, 0.02 * n, 5) for n in (1, 2, 3)}  # 3: the baseline
    for n, values in scores.items():
        method = {"method": "full"} if n == 3 else {"method": "partial", "layers": n}
        for seed in draw.permutation(5):
            write_run(tmp_path, int(seed), values[seed], **method)
    rows = stats.group_rows(stats.read_runs([str(tmp_path)]))
    p = stats.mark_rows(rows, "activation")
    assert p == pytest.approx(scipy_stats.f_oneway(*scores.values()).pvalue)
    for paired, welch in ((False, False), (True, False), (False, True)):
        stats.mark_rows(rows, "activation", paired=paired, welch=welch)
        for n in (1, 2):
            if paired:
                expected = scipy_stats.ttest_rel(scores[n], scores[3])
            else:
                expected = scipy_stats.ttest_ind(scores[n], scores[3], equal_var=not welch)
            test, interval = rows[n - 1]["activation_test"], expected.confidence_interval()
            assert test["p"] == pytest.approx(expected.pvalue)
            assert test["corrected"] == pytest.approx(min(1, 2 * expected.pvalue))
            assert (test["low"], test["high"]) == pytest.approx(tuple(interval))


def test_a_hand_worked_case(tmp_path, capsys):
    """1 2 3 against 4 5 6 (hundredths): t = -3.674 on 4 degrees, p = .0213; t² is ANOVA's F."""
    for seed, value in enumerate((0.01, 0.02, 0.03)):
        write_run(tmp_path, seed, value, method="partial", layers=3)
        write_run(tmp_path, seed, value + 0.03)
    row = as_csv(capsys, tmp_path)["partial3 fp32"]
    assert float(row["activation_test_p"]) == pytest.approx(0.02131, abs=1e-5)
    assert float(row["activation_test_low"]) == pytest.approx(-0.03 - 2.7764 * 0.0081650, abs=1e-6)
    assert (
        float(row["activation_mean"]) == pytest.approx(0.02) and row["activation_test_mark"] == "†"
    )
    assert float(row["activation_sd"]) == pytest.approx(0.01)
    assert as_csv(capsys, tmp_path, "--alpha", 0.02)["partial3 fp32"]["activation_test_mark"] == ""


def test_no_t_test_marks_without_anova(tmp_path, capsys):
    """A t-test under .05 is no mark where the ANOVA over all uncached rows is not significant."""
    write_row(tmp_path, (0.600, 0.01))
    write_row(tmp_path, (0.580, 0.01), method="partial", layers=1)
    for n in (2, 3):
        write_row(tmp_path, (0.59, 0.05), method="partial", layers=n)
    row = as_csv(capsys, tmp_path)["partial1 fp32"]
    assert float(row["activation_test_corrected"]) < 0.05 and row["activation_test_mark"] == ""


def test_cached_rows_meet_their_own_twin(tmp_path, capsys):
    """A cached row is tested, uncorrected, against its uncached twin: NS, † or ‡, never full's; one
    of LoRA without a twin is not, and one with only a frozen twin against that."""
    write_row(tmp_path, (0.9, 0.01))
    write_row(tmp_path, (0.6, 0.01), method="partial", layers=4, freeze_prefix=True)
    write_row(tmp_path, (0.6, 0.01), method="partial", layers=4, cached=True)
    write_row(tmp_path, (0.6, 0.01), method="lora", layers=3, cached=True)
    for n, shift in ((1, 0.001), (2, -0.016), (3, 0.016)):
        write_row(tmp_path, (0.6, 0.01), method="partial", layers=n)
        write_row(tmp_path, (0.6 + shift, 0.01), method="partial", layers=n, cached=True)
        write_row(tmp_path, (0.1, 0.01), method="partial", layers=n, freeze_prefix=True)
    rows = as_csv(capsys, tmp_path)
    marks = [rows[f"partial{n} fp32 cached"]["activation_test_mark"] for n in (1, 2, 3)]
    assert marks == ["NS", "†", "‡"]
    assert rows["partial4 fp32 cached"]["activation_test_p"] == "1.0"
    assert rows["lora fp32 cached"]["activation_test_p"] == ""
    test = rows["partial2 fp32 cached"]
    assert test["activation_test_p"] == test["activation_test_corrected"]


@pytest.mark.parametrize(("hours", "after"), [(0.4, "1 run"), (0.8, "3 runs"), (1.2, "never")])
def test_when_a_cache_has_paid(tmp_path, capsys, hours, after):
    """Half an hour of filling: .6 h saved a run pays at once, .2 h after 3 runs, -.2 h never."""
    write_row(tmp_path, (0.6, 0.01), method="partial", layers=3)
    partial = {"method": "partial", "layers": 3, "cached": True}
    write_row(tmp_path, (0.6, 0.01), hours=(hours, 0), **partial)
    costs = table(capsys, tmp_path).split("\n\n")[1].splitlines()
    assert costs[2].endswith(f" {after}") and f" {hours + 0.5:.3f} " in costs[2]


def test_without_spread_nothing_is_nan(tmp_path, capsys):
    """Equal scores in every seed: p is 1 for equal rows, 0 for different ones, and no NaN."""
    for n, value in ((1, 0.1), (2, 0.3)):
        write_row(tmp_path, (value, 0), (0.2, 0), method="partial", layers=n)
    write_row(tmp_path, (0.3, 0), (0.2, 0))
    for option in ("--verbose", "--paired", "--welch"):
        assert "nan" not in table(capsys, tmp_path, "--verbose", option).lower()
    rows = as_csv(capsys, tmp_path)
    assert [rows[f"partial{n} fp32"]["activation_test_p"] for n in (1, 2)] == ["0.0", "1.0"]


def test_out_of_memory_runs(tmp_path, capsys):
    """They are in Table II and not in the means; a row of nothing else says so; no baseline, no
    †."""
    write_row(tmp_path, (0.6, 0.01), method="partial", layers=3)
    write_row(tmp_path, (0.1, 0.01), method="partial", layers=1)
    for seed in range(2):
        folder = write_run(tmp_path, seed, out_of_memory=True, peak_memory_bytes=int(10.4e9))
        result = json.loads((folder / "result.json").read_text())
        for key in ("test", "train_seconds", "eval_seconds"):
            del result[key]
        (folder / "result.json").write_text(json.dumps(result))
    out = table(capsys, tmp_path)
    assert "out of memory" in out.split("\n\n")[0] and "no baseline" in out and ".600±.010" in out
    assert "†" not in out
    fits = {line[:21].strip(): line.split()[-2:] for line in table(
        capsys, tmp_path, "--memory", 11, 48).splitlines()}  # fmt: skip
    assert fits["full fp32"] == ["✗", "?"] and fits["partial3 fp32"] == ["✓", "✓"]
    write_run(tmp_path, 0, peak_memory_bytes=int(30e9))  # the same run, on a larger card
    lines = table(capsys, tmp_path, "--memory", 11, 48).splitlines()
    assert [line.split()[-3:] for line in lines if "full" in line] == [["30.00", "✗", "✓"]]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"epochs": 6}, "same epochs"),
        ({"encoder": "f" * 64}, "same encoder"),
        ({"corpus": "d" * 64}, "same corpus"),
        ({"batch_size": 8}, "same batch_size"),
        ({"lr": 1e-3}, "same lr"),
        ({"seed": 1}, "two runs of full fp32, seed 1"),
        ({"padding": "exact"}, "more than one row could be the baseline"),
        ({"method": "partial"}, "one seed"),
        ({"test": None}, "not the result of a run"),
        ({"train_seconds": float("nan")}, "NaN"),
    ],
)
def test_refuses_what_does_not_compare(tmp_path, capsys, changes, reason):
    """One run that does not belong with the others is named with the reason; no table is
    printed."""
    write_row(tmp_path, (0.6, 0.01))
    write_run(tmp_path, **{"seed": 7} | changes)
    if reason.startswith("more"):
        write_run(tmp_path, **{"seed": 8} | changes)
    assert reason in refusal(capsys, tmp_path)


def test_refuses_what_is_not_a_finished_run(tmp_path, capsys):
    """No folder, no run, invalid JSON, a missing key, no result.json, unequal seeds for
    --paired."""
    assert "no such folder" in refusal(capsys, tmp_path / "none")
    assert "no runs" in refusal(capsys, tmp_path)
    write_row(tmp_path, (0.6, 0.01))
    odd = write_run(tmp_path, seed=5)
    for seed in range(5):
        write_run(tmp_path, seed, method="partial", layers=3)
    assert "--paired needs the same seeds" in refusal(capsys, tmp_path, "--paired")
    (odd / "result.json").write_text('{"method": ')
    assert "result.json: not valid JSON" in refusal(capsys, tmp_path)
    (odd / "result.json").write_text('{"method": "full"}')
    assert "'layers' is missing" in refusal(capsys, tmp_path)
    (odd / "result.json").unlink()
    assert f"{odd}; finish" in (error := refusal(capsys, tmp_path)) and "--resume" in error
    (odd / "config.json").write_text('{"model_type": "wav2vec2"}')  # an encoder, not a run
    assert "full fp32" in table(capsys, tmp_path)


def test_commands_of_the_whole_sweep(tmp_path, capsys):
    """15 rows x 5 seeds, caches first, every line parses; finished runs, and then caches, go."""
    runs, root = tmp_path / "my runs", "it's here"
    args = (runs, "--commands", "--data", root, "--cache-root", "c", "--train-args", "--lr 1e-3")
    lines = [shlex.split(line) for line in table(capsys, *args).splitlines()]
    assert [line[1] for line in lines] == ["cache.py"] * 3 + ["train.py"] * 75
    assert lines[2][2:] == ["--data", root, "--layer", "-3", "--out", "c/last-3"]
    assert len({line[line.index("--out") + 1] for line in lines}) == 78
    assert all(line[-3:] == ["--lr", "1e-3", "--resume"] for line in lines[3:])
    assert lines[-1][4:-3] == shlex.split(
        f"--out '{runs}/partial3-fp16-cached-seed4' --seed 4 --method partial --layers 3 "
        "--precision fp16 --cache c/last-3"
    )
    assert sum("--cache" in line for line in lines) == 30 and "--model" not in lines[0]
    for line in lines[-10:]:  # both rows of three cached layers
        folder = runs / line[line.index("--out") + 1]
        folder.mkdir(parents=True)
        (folder / "result.json").touch()
    left = [shlex.split(line) for line in table(capsys, *args).splitlines()]
    assert left == lines[:2] + lines[3:-10]
    more = table(capsys, *args, "--skip-bad").splitlines()
    assert all("--skip-bad" in line for line in more) and len(more) == len(left)
    assert "--data" in refusal(capsys, "--commands")


def test_formats(paper, capsys):
    """Text fits 100 columns, long names too; Markdown and LaTeX have equally many cells a line."""
    write_row(paper, (0.6, 0.01), method="lora", rank=4, alpha=32.0)
    text = table(capsys, paper, "--verbose")
    assert max(map(len, text.splitlines())) <= 100 and "  alpha=32.0" in text
    assert "Times are from different devices: 2080 Ti; A40." in text
    first = table(capsys, paper, "--format", "markdown").split("\n\n")[0].splitlines()
    assert len(first) == 14 and {line.count("|") for line in first} == {9}
    latex = table(capsys, paper, "--format", "latex").split("\n\n")[0].splitlines()
    assert latex[0] == r"\begin{tabular}{lrrrrrrr}" and latex[-1] == r"\end{tabular}"
    assert {line.count("&") for line in latex if line.endswith(r"\\")} == {7}
    assert not set("±†‡") & set("".join(latex)) and r".458$\pm$.010$^\dagger$" in "".join(latex)


def test_plot(paper, tmp_path, capsys):
    """A PNG, 900 pixels wide, also of rows with different numbers of seeds."""
    pytest.importorskip("matplotlib")
    write_run(paper, seed=9)
    table(capsys, paper, "--plot", tmp_path / "plot.png")
    png = (tmp_path / "plot.png").read_bytes()
    assert png[1:4] == b"PNG" and int.from_bytes(png[16:20]) == 900


def test_plot_without_matplotlib(paper, tmp_path, capsys, monkeypatch):
    """--plot without matplotlib is a refusal that says what to install."""
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert "pip install matplotlib" in refusal(capsys, paper, "--plot", tmp_path / "plot.png")
