"""Concordance correlation coefficient (CCC), the metric and the loss of dimensional emotion
recognition (section IV-D).

`ccc` and `ccc_loss` stand alone: copy them. As a command, score a predictions file:

    python ccc.py runs/seed0/predictions-Test1.csv
    python ccc.py predictions.csv --labels MSP-Podcast/Labels/labels_consensus.csv
"""

import argparse
import csv

import torch


def ccc(pred, target, eps=1e-8):
    """Lin's CCC along dimension 0: 2 cov / (var(pred) + var(target) + (mean(pred) -
    mean(target))²).

    pred, target : float tensors (N, ...) in the same unit. Returns (...), at least float32: half
    precision is cast up first, so autocast around it changes nothing.
    Our choice: population moments (1/n, Lin 1989) throughout, as a mix with 1/(n - 1) makes
    ccc(x, x) differ from 1, and `eps` in the denominator, so that constant predictions give 0 with
    finite gradients instead of NaN.
    """
    dtype = torch.promote_types(pred.dtype, torch.float32)
    pred, target = pred.to(dtype), target.to(dtype)
    pred_mean, target_mean = pred.mean(0), target.mean(0)
    pred_centred, target_centred = pred - pred_mean, target - target_mean
    covariance = (pred_centred * target_centred).mean(0)
    variances = pred_centred.square().mean(0) + target_centred.square().mean(0)
    return 2 * covariance / (variances + (pred_mean - target_mean).square() + eps)


def ccc_loss(pred, target):
    """Mean over attributes of 1 - CCC: pred, target (B, A) -> scalar. The loss of a batch, not a
    sum over it: computed on parts of the batch and averaged it is another loss."""
    return (1 - ccc(pred, target)).mean()


def read_columns(path, *columns):
    """{FileName: [float of each column]} of a CSV file. Rows whose cells are empty are left out."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            missing = {"FileName", *columns} - set(reader.fieldnames or ())
            if missing:
                raise ValueError(f"no column {', '.join(sorted(missing))}")
            rows = {row["FileName"]: [row[column] for column in columns] for row in reader}
            return {
                name: [float(cell) for cell in cells] for name, cells in rows.items() if all(cells)
            }
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{path}: {error}") from error


def score(path, labels=None):
    """(number of utterances, activation CCC, valence CCC) of a predictions file with columns
    FileName, Act, Val.

    The labels are columns EmoAct, EmoVal on the same scale, of `labels` or else of the same file.
    """
    pred = read_columns(path, "Act", "Val")
    target = read_columns(labels or path, "EmoAct", "EmoVal")
    names = [name for name in pred if name in target]
    if len(names) < len(pred) or len(names) < 2:
        raise ValueError(
            f"{path}: labels found for {len(names)} of {len(pred)} predictions; give --labels FILE"
        )
    pred = torch.tensor([pred[name] for name in names], dtype=torch.float64)
    target = torch.tensor([target[name] for name in names], dtype=torch.float64)
    if not (pred.isfinite() & target.isfinite()).all():
        raise ValueError(f"{path}: NaN or infinity among the predictions or their labels")
    return len(names), *ccc(pred, target).tolist()


def main(argv=None):
    parser = argparse.ArgumentParser(
        usage="python ccc.py PREDICTIONS.csv [--labels FILE]",
        description="CCC of a predictions file.",
    )
    parser.add_argument(
        "predictions", help="CSV with FileName, Act, Val and, without --labels, EmoAct, EmoVal"
    )
    parser.add_argument(
        "--labels", help="CSV with FileName, EmoAct, EmoVal, for example labels_consensus.csv"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    try:
        n, activation, valence = score(args.predictions, args.labels)
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        parser.error(str(error))
    print(f"n {n}  activation {activation:.4f}  valence {valence:.4f}")


if __name__ == "__main__":
    main()
