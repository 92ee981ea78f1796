"""The metric against closed forms, numpy and SciPy; the command on a file."""

import csv

import pytest
import scipy.stats
import torch

import ccc as module
from ccc import ccc, ccc_loss

x = torch.randn(50, 2, generator=torch.Generator().manual_seed(0)).double()
y = 0.5 * x + torch.randn(50, 2, generator=torch.Generator().manual_seed(1)) + 0.3


@pytest.mark.parametrize("c", [0, -3, 0.1, 1, 10])
def test_shift(c):
    """ccc(x, x + c) = 2v / (2v + c²), v the population variance of x; so ccc(x, x) = 1."""
    v = x.var(0, correction=0)
    torch.testing.assert_close(ccc(x, x + c), 2 * v / (2 * v + c**2), rtol=1e-6, atol=0)


def test_by_hand():
    """(1, 2, 3) against (2, 2, 5): covariance 1, variances 2/3 and 2, means one apart: 2 / (11/3) =
    6/11."""
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


@pytest.mark.parametrize("prediction", ["constant", "the labels' mean"])
@pytest.mark.parametrize("labels", ["varying", "constant"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_constant_is_finite(prediction, labels, dtype):
    """Constant predictions, constant labels or both give CCC 0 and finite gradients, not NaN."""
    target = x.float() if labels == "varying" else torch.full((50, 2), 0.25)
    pred = torch.full((50, 2), 0.7) if prediction == "constant" else target.mean(0).expand(50, 2)
    pred = pred.to(dtype).clone().requires_grad_()
    ccc_loss(pred, target).backward()
    torch.testing.assert_close(ccc(pred, target).detach(), torch.zeros(2), rtol=0, atol=1e-3)
    assert pred.grad.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_autocast_changes_nothing(dtype):
    """Loss and gradient are bitwise the same inside autocast; those of half precision predictions
    are those of the same numbers in float32."""
    half, results = x.to(dtype), []
    for autocast, pred in [(False, half.float()), (True, half.float()), (True, half.clone())]:
        with torch.autocast("cpu", dtype, enabled=autocast):
            loss = ccc_loss(pred.requires_grad_(), y.float())
        loss.backward()
        results.append((loss.detach(), pred.grad))
    assert all(torch.equal(loss, results[0][0]) for loss, _ in results)
    assert torch.equal(results[1][1], results[0][1])
    assert torch.equal(results[2][1], results[0][1].to(dtype))


def test_loss_is_not_a_sum_over_micro_batches():
    """By hand: halves (0, 1 | 0, 1) against (0, 1 | 5, 6) lose 0 and 1 - 0.5 / 25.5, the whole
    batch 1 - 0.5 / 13."""
    pred, target = torch.tensor([[0.0], [1], [0], [1]]), torch.tensor([[0.0], [1], [5], [6]])
    halves = [ccc_loss(a, b) for a, b in zip(pred.split(2), target.split(2), strict=True)]
    assert ccc_loss(pred, target).item() == pytest.approx(1 - 0.5 / 13, abs=1e-6)
    assert (sum(halves) / 2).item() == pytest.approx((1 - 0.5 / 25.5) / 2, abs=1e-6)


@pytest.mark.parametrize("separate", [False, True])
def test_command(separate, tmp_path, capsys):
    """ccc.py scores a predictions file with its own label columns, or with another file's in
    another order."""
    predictions = [["FileName", "Act", "Val", "EmoAct", "EmoVal"][: 3 if separate else 5]]
    labels = [["FileName", "EmoAct", "EmoVal"], ["more.wav", 1, 2]]
    for i, (pred, target) in enumerate(zip(x.tolist(), y.tolist(), strict=True)):
        predictions.append([f"{i}.wav", *pred, *([] if separate else target)])
        labels.insert(1, [f"{i}.wav", *target])
    for name, rows in [("predictions.csv", predictions), ("labels.csv", labels)]:
        with open(tmp_path / name, "w", newline="") as file:
            csv.writer(file).writerows(rows)
    options = ["--labels", str(tmp_path / "labels.csv")] if separate else []
    module.main([str(tmp_path / "predictions.csv"), *options])
    activation, valence = ccc(x, y).tolist()
    expected = f"n 50  Act {activation:.4f}  Val {valence:.4f}\n"
    assert capsys.readouterr().out == expected
