"""The concordance correlation coefficient (CCC), metric and loss of the paper (section IV-D).

`ccc` and `ccc_loss` stand alone: copy them. As a command, score a predictions file:

    python ccc.py runs/partial3/predictions-Test1.csv
    python ccc.py predictions.csv --labels MSP-Podcast/Labels/labels_consensus.csv

In comments: B batch, N utterances, A attributes.
"""

import argparse
import csv

import torch


def ccc(pred, target, eps=1e-8):
    """Lin's CCC along dimension 0: 2 covariance / (variances + (difference of the means)²).

    pred, target : float tensors (N, ...) of one shape and in the same unit. Returns (...), at least
    float32: half precision is cast up first, so autocast around it changes nothing. ValueError for
    two shapes, as broadcasting (N, 1) against (N,) would compare everybody with everybody.
    Our choice: population moments (1/n, Lin 1989), as mixing in 1/(n - 1) makes ccc(x, x) not 1;
    `eps`: where both are one constant, 0 and finite gradients, not NaN.
    """
    if pred.shape != target.shape:
        raise ValueError(f"predictions {tuple(pred.shape)}, but targets {tuple(target.shape)}")
    dtype = torch.promote_types(pred.dtype, torch.float32)
    pred = pred.to(dtype)
    target = target.to(dtype)
    shift = pred.mean(0) - target.mean(0)
    pred = pred - pred.mean(0)
    target = target - target.mean(0)
    covariance = (pred * target).mean(0)
    variances = pred.square().mean(0) + target.square().mean(0)
    return 2 * covariance / (variances + shift.square() + eps)


def ccc_loss(pred, target):
    """Mean over attributes of 1 - CCC: pred, target (B, A) -> scalar.

    It needs the means of the whole batch, so a batch must not be split for it: predictions 0 1 0 1
    for labels 0 1 5 6 have a loss of .96, their two halves 0 and .98, .49 on average.
    """
    return (1 - ccc(pred, target)).mean()


# ---- command line ----


def read_csv(path):
    """{FileName: row} of a CSV file."""
    with open(path, newline="", encoding="utf-8-sig", errors="surrogateescape") as file:
        rows = list(csv.DictReader(file))
    table = {row.get("FileName"): row for row in rows}
    if len(table) < max(len(rows), 2) or None in table:
        raise ValueError(f"'{path}': fewer than 2 rows, no column FileName, or a name in two rows")
    return table


def score_file(path, labels=None):
    """(number of utterances, {column: CCC}) of a predictions file: FileName and any of Act, Val,
    Dom. Its labels are EmoAct, EmoVal, EmoDom on the same scale, there or in the file `labels`."""
    pred = read_csv(path)
    target = read_csv(labels or path)
    columns = [c for c in ("Act", "Val", "Dom") if c in next(iter(pred.values()))]
    pairs = []
    for name, row in pred.items():
        try:
            pairs.append([(float(row[c]), float(target[name][f"Emo{c}"])) for c in columns])
        except (KeyError, TypeError, ValueError) as error:
            text = f"'{path}': {name!r} lacks a prediction or label ({error}); --labels FILE?"
            raise ValueError(text) from error
    pairs = torch.tensor(pairs, dtype=torch.float64)  # (N, A, 2)
    if not (columns and pairs.isfinite().all()):
        raise ValueError(f"'{path}': no column Act, Val or Dom, or NaN or infinity in them")
    return len(pred), dict(zip(columns, ccc(*pairs.unbind(2)).tolist(), strict=True))


def main(argv=None):
    parser = argparse.ArgumentParser(description="CCC of a predictions file.")
    parser.add_argument("predictions", help="CSV file: FileName and any of Act, Val, Dom")
    parser.add_argument("--labels", help="CSV file: EmoAct, EmoVal, EmoDom, if that has none")
    args = parser.parse_args(argv)
    n, scores = score_file(args.predictions, args.labels)
    print(f"n {n}", *(f"{column} {score:z.4f}" for column, score in scores.items()), sep="  ")


def shell(main):
    """Run a script's main: bad input is one line and exit status 2, Ctrl-C a word and 130. It is
    the outermost try, because an interrupt may strike while another error becomes its line."""
    leave = argparse.ArgumentParser().exit
    try:
        try:
            main()
        except (ValueError, OSError, MemoryError, csv.Error) as error:
            leave(2, f"error: {error}\n")
    except KeyboardInterrupt:
        leave(130, "interrupted; the same line goes on (train.py: with --resume)\n")


if __name__ == "__main__":
    shell(main)
