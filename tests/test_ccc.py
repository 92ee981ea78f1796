"""The metric against closed forms, numpy and SciPy; the command on a file."""

import io
import sys

import pytest
import scipy.stats
import torch

from ccc import ccc, ccc_loss, main, shell

x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
y = 0.5 * x + torch.randn(50, 2, generator=torch.Generator().manual_seed(1)) + 0.3
flat = torch.full((50, 2), 0.25)
PAIRS = [(flat + 0.5, x), (x.mean(0) + 0 * x, x), (x, flat), (flat + 0.5, flat), (flat, flat)]


@pytest.mark.parametrize("c", [0, -3, 0.1, 1, 10])
def test_shift(c):
    """ccc(x, x + c) = 2v / (2v + c²), v the population variance of x; so ccc(x, x) = 1."""
    v = x.var(0, correction=0)
    torch.testing.assert_close(ccc(x, x + c), 2 * v / (2 * v + c**2), rtol=1e-6, atol=0)


def test_by_hand():
    """(1, 2, 3) against (2, 2, 5): covariance 1, variances 2/3 and 2, means 1 apart: 6/11."""
    value = ccc(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 2.0, 5.0]))
    assert value.item() == pytest.approx(6 / 11, abs=1e-6)


def test_against_scipy():
    """CCC = Pearson's r times Lin's bias correction 2 / (v + 1/v + u²), each attribute by itself;
    the loss is the mean of 1 - CCC."""
    expected = []
    for a, b in zip(x.T.numpy(), y.T.numpy(), strict=True):
        scale, shift = a.std() / b.std(), (a.mean() - b.mean()) / (a.std() * b.std()) ** 0.5
        expected.append(scipy.stats.pearsonr(a, b)[0] * 2 / (scale + 1 / scale + shift**2))
    assert ccc(x, y).tolist() == pytest.approx(expected, abs=1e-6)
    assert ccc_loss(x, y).item() == pytest.approx(1 - sum(expected) / 2, abs=1e-6)


@pytest.mark.parametrize(("pred", "target"), PAIRS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_is_finite(pred, target, dtype):
    """Constant predictions, constant labels or both give CCC 0 and finite gradients, not NaN."""
    pred, target = pred.to(dtype, copy=True).requires_grad_(), target.float()
    ccc_loss(pred, target).backward()
    torch.testing.assert_close(ccc(pred, target).detach(), torch.zeros(2), rtol=0, atol=1e-3)
    assert pred.grad.isfinite().all()


def test_far_from_zero():
    """On a scale far from 0, too, equal constants give CCC 0, and float32 is as exact as near 0."""
    constant = torch.full((32, 2), 703.7)
    assert torch.equal(ccc(constant, constant), torch.zeros(2))
    pred, target = (x + 65536).float(), (y + 65536).float()
    torch.testing.assert_close(
        ccc(pred, target).double(), ccc(pred.double(), target.double()), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    """Loss and gradient are bitwise the same inside autocast; those of half precision predictions
    are those of the same numbers in float32."""
    half, expected = x.to(dtype), None
    for autocast, pred in [(False, half.float()), (True, half.float()), (True, half)]:
        with torch.autocast("cpu", dtype, enabled=autocast):
            loss = ccc_loss(pred.requires_grad_(), y.float())
        loss.backward()
        expected = expected or (loss, pred.grad)
        assert torch.equal(loss, expected[0]) and torch.equal(pred.grad, expected[1].to(pred.dtype))


def test_shapes_that_differ():
    """Predictions and targets of two shapes are refused: broadcast, (N, 1) against (N,) would give
    a loss of everybody against everybody."""
    for pred, target in [((50, 1), (50,)), ((50, 2), (50, 1)), ((50, 2), (50,)), ((50,), (1,))]:
        for function in (ccc, ccc_loss):
            with pytest.raises(ValueError, match="predictions .* targets"):
                function(torch.zeros(pred), torch.zeros(target))


def test_loss_is_not_a_sum_over_micro_batches():
    """By hand: halves (0, 1 | 0, 1) against (0, 1 | 5, 6) lose 0 and 1 - 0.5 / 25.5, the whole
    batch 1 - 0.5 / 13."""
    pred, target = torch.tensor([[0.0], [1], [0], [1]]), torch.tensor([[0.0], [1], [5], [6]])
    halves = [ccc_loss(a, b) for a, b in zip(pred.split(2), target.split(2), strict=True)]
    assert ccc_loss(pred, target).item() == pytest.approx(1 - 0.5 / 13, abs=1e-6)
    assert (sum(halves) / 2).item() == pytest.approx((1 - 0.5 / 25.5) / 2, abs=1e-6)


def test_command(tmp_path, capsys):
    """ccc.py scores a predictions file with its own label columns, or with those of another file,
    which has more rows and another order."""
    own, other = tmp_path / "predictions.csv", tmp_path / "labels.csv"
    for path, target, order in [(own, y, slice(40)), (other, 1 - y, slice(None, None, -1))]:
        table = enumerate(torch.cat([x, target], 1).tolist())
        rows = [",".join([f"{i}.wav", *map(str, row)]) for i, row in table]
        path.write_text("\n".join(["FileName,Act,Val,EmoAct,EmoVal", *rows[order]]))
    for options, target in [([], y), (["--labels", str(other)], 1 - y)]:
        main([str(own), *options])
        act, val = ccc(x[:40], target[:40]).tolist()
        assert capsys.readouterr().out == f"n 40  Act {act:.4f}  Val {val:.4f}\n"


def test_spaces_and_stdout(tmp_path, capfd, monkeypatch):
    """Spaces around commas are no part of a name. What a terminal cannot show is escaped; there may
    be no stdout, or that of a notebook."""
    path = tmp_path / "p.csv"
    path.write_bytes(b"FileName , Act, EmoAct\na, 1, 1\nb, 2 , 2\n")
    main([str(path)])
    assert capfd.readouterr().out == "n 2  Act 1.0000\n"
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, "ascii", write_through=True))
    shell(lambda: print("\u2020"))
    assert shown.getvalue() == b"\\u2020\n"
    for other in (None, io.StringIO()):
        monkeypatch.setattr(sys, "stdout", other)
        shell(lambda: print("1"))


WRONG = {  # a predictions file, and what is said of it
    "NaN": ("FileName,Act,EmoAct a,nan,1 b,2,2", "NaN"),
    "infinity": ("FileName,Act,EmoAct a,1,1 b,2,inf", "NaN or infinity"),
    "no number": ("FileName,Act,EmoAct a,1,1 b,x,2", "'b' lacks a prediction or label"),
    "empty": ("FileName,Act,EmoAct a,1,1 b,,2", "'b' lacks a prediction or label"),
    "cut off": ("FileName,Act,EmoAct a,1,1 b,2", "line 3: 2 cells, not 3"),
    "decimal commas": (
        "FileName,Act,EmoAct a,1,5,1 b,2,5,2",
        "line 2: 4 cells, not 3, line 3: 4 cells, not 3",
    ),
    "a column twice and a cell too many": (
        "FileName,Act,Act,EmoAct a,1,1,1,1 b,2,3,4,5",
        "2 columns 'Act' in its first line",
    ),
    "a column twice": (
        "FileName,Act,Act,EmoAct a,1,1,1 b,2,3,4",
        "2 columns 'Act' in its first line",
    ),
    "no labels": ("FileName,Act,Val a,1,1 b,2,2", "--labels"),
    "no predictions": ("FileName,EmoAct,EmoVal a,1,1 b,2,2", "no column Act"),
    "no names": ("File,Act,EmoAct a,1,1 b,2,2", "0 columns 'FileName' in its first line"),
    "one row": ("FileName,Act,EmoAct a,1,1", "fewer than 2 rows"),
    "repeated": ("FileName,Act,EmoAct a,1,1 b,2,2 a,1,1", "line 4: a second row of 'a'"),
}


@pytest.mark.parametrize("case", WRONG)
def test_wrong_files(case, tmp_path, capsys):
    """What a CCC cannot be told from is one line that names the file, and exit status 2."""
    text, reason = WRONG[case]
    path = tmp_path / "p.csv"
    path.write_text(text.replace(" ", "\n"))
    with pytest.raises(SystemExit) as left:
        shell(lambda: main([str(path)]))
    error = capsys.readouterr().err
    assert left.value.code == 2 and error.count("\n") == 1
    assert error.startswith(f"error: '{path}'") and reason in error
