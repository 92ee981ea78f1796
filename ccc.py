"""The concordance correlation coefficient (CCC), metric and loss of the paper (section IV-D).

`ccc` and `ccc_loss` stand alone: copy them. As a command, score a predictions file:

    python ccc.py runs/partial3/predictions-Test1.csv
    python ccc.py predictions.csv --labels MSP-Podcast/Labels/labels_consensus.csv

In comments: B batch, N utterances, A attributes.
"""

import argparse
import sys

import torch


def ccc(pred, target):
    """Lin's CCC along dimension 0: 2 covariance / (variances + (difference of the means)²).

    pred, target : float tensors (N, ...) of one shape and in the same unit. Returns (...), in
    float32 or better, because half precision is cast up first. So autocast changes nothing.

    ValueError where the shapes differ. PyTorch would broadcast (N, 1) against (N,) to (N, N), and
    compare every prediction with every label.

    Two choices of ours, where the paper is silent. Variances and covariance are means over all N,
    as Lin (1989) defines them. (torch.var divides by N - 1: beside a covariance that divides by N,
    ccc(x, x) would not be 1.) And 1e-8 is added to the denominator, which is 0 if predictions and
    labels are the same constant: the CCC is then 0 with finite gradients, and not NaN. Do not
    give labels in tiny units: of x spread evenly over 0 to .001, ccc(x, x) is .94.
    """
    if pred.shape != target.shape:
        raise ValueError(f"predictions {tuple(pred.shape)}, but targets {tuple(target.shape)}")
    dtype = torch.promote_types(pred.dtype, torch.float32)
    # Moving both by the same amount changes no result. With the first label moved to zero, nothing
    # is lost to rounding where labels lie far from zero, and equal constants are exact zeros.
    origin = target[:1].to(dtype)
    pred = pred.to(dtype) - origin
    target = target.to(dtype) - origin
    shift = pred.mean(0) - target.mean(0)
    pred = pred - pred.mean(0)
    target = target - target.mean(0)
    covariance = (pred * target).mean(0)
    variances = pred.square().mean(0) + target.square().mean(0)
    return 2 * covariance / (variances + shift.square() + 1e-8)


def ccc_loss(pred, target):
    """Mean over attributes of 1 - CCC: pred, target (B, A) -> scalar.

    The CCC needs the means of the whole batch, so the loss of a batch is not the mean of its parts'
    losses, and a batch must not be split for it. An example: predictions 0 1 0 1 for labels 0 1 5 6
    have a loss of .96. The first half alone has 0 and the second .98, which is .49 on average.
    """
    return (1 - ccc(pred, target)).mean()


# ---- command line ----


def print_scores(path, labels=None):
    """Print the number of utterances and each CCC of a predictions file: FileName and any of Act,
    Val, Dom. Labels (EmoAct, EmoVal, EmoDom, on the same scale) are in that file, or in `labels`.
    """
    import data  # Only the command needs it, and no part of what is copied.

    pred = data.read_table(path)
    target = data.read_table(labels) if labels else pred
    columns = [c for c in ("Act", "Val", "Dom") if all(c in row for row in pred.values())]
    pairs = []
    for name, row in pred.items():
        try:
            pairs.append([(float(row[c]), float(target[name][f"Emo{c}"])) for c in columns])
        except (KeyError, ValueError) as error:
            raise ValueError(
                f"'{path}': {name!r} lacks a prediction or label ({error});"
                " if labels are in another file, give --labels"
            ) from error
    pairs = torch.tensor(pairs, dtype=torch.float64)  # (N, A, 2)
    if len(pairs) < 2 or not (columns and pairs.isfinite().all()):
        raise ValueError(
            f"'{path}': fewer than 2 rows, no column Act, Val or Dom, or NaN or infinity in them"
        )
    scores = ccc(pairs[..., 0], pairs[..., 1])
    cells = [f"n {len(pred)}"]
    for column, score in zip(columns, scores, strict=True):
        cells.append(f"{column} {score:z.4f}")  # With z, no score is printed as -0.0000.
    print("  ".join(cells))


def main(argv=None):
    parser = argparse.ArgumentParser(description="CCC of a predictions file.")
    parser.add_argument("predictions", help="CSV file: FileName and any of Act, Val, Dom")
    parser.add_argument("--labels", help="CSV file: EmoAct, EmoVal, EmoDom, if not in the first")
    args = parser.parse_args(argv)
    print_scores(args.predictions, args.labels)


def shell(command):
    """Run the main of any of the six scripts: bad input becomes one line and exit status 2,
    Ctrl-C a line and 130. It has nothing to do with the CCC. It stands here because this file needs
    no other one, so that each of them can import it.

    Ctrl-C may come while another error is being printed, so the try for it is the outer one. For
    the traceback of an error: python -c "import train; train.main()" and the options.
    """
    if hasattr(sys.stdout, "reconfigure"):  # A notebook's has none.
        # stats.py prints †, which not every terminal can show. And a log file or a pipe is to get
        # each line at once, as a terminal does.
        sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        try:
            command()
        except (ValueError, OSError, MemoryError) as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run the same line again (train.py: with --resume)", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    shell(main)
