"""Finetune wav2vec 2.0 to predict activation and valence: one run is one row and one seed of the
paper's Table I.

    python train.py --demo                                     # everything once, on synthetic speech
    python train.py --data MSP-Podcast --out runs/partial3     # last 3 layers, mixed precision
    python train.py --data MSP-Podcast --out runs/cached3 --cache cache/last-3    # from a cache
    python train.py --data MSP-Podcast --out runs/full --method full --precision fp32    # baseline
    python train.py --data MSP-Podcast --out runs/exact --padding exact --chunk 4 --recompute

A run folder holds config.json, metrics.jsonl (a line an epoch), last.pt (to resume), best.pt (the
best epoch by Development), predictions-Test1.csv and result.json. The same command with --resume
continues after the last epoch.
"""

import argparse
import csv
import hashlib
import itertools
import json
import math
import os
import platform
import resource
import signal
import sys
import time
from pathlib import Path

import numpy
import torch
import transformers
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader
from tqdm import tqdm

import cache
import data
import model as models
from ccc import ccc, ccc_loss

PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
LORA_DEFAULTS = {"rank": 8, "alpha": 16.0, "lora_dropout": 0.1}  # section IV-B
# may differ to resume; corpus, encoder and cache are compared by their contents
NOT_THE_RUN = {"data", "model", "out", "cache", "device", "workers", "skip_bad"}
NOT_THE_RUN |= {"resume", "demo", "debug"}


def predict(model, inputs, lengths, device, cached=False, chunk=None, recompute=False):
    """Predictions (B, 2) of one batch: inputs (B, S) or, cached, (B, T, D), and lengths (B,), both
    on the CPU.

    The batch goes through the model `chunk` utterances at a time, from short to long, each chunk
    padded to its own longest only. The CCC is not a sum over utterances, so a batch must not be
    split for the loss: all predictions come back together, for one loss and one backward. In
    "exact" padding they are those of the whole batch. With `recompute` a chunk's activations are
    dropped and computed again in the backward pass, dropout included: peak memory is that of one
    chunk. What `model.frozen` computes is not computed twice.
    """
    frames = lengths if cached else model.frames(lengths)
    order = frames.argsort(stable=True)  # by frames: a cached run draws the same dropout for a row
    inputs = inputs.to(device, non_blocking=True)
    predictions = []
    for rows in order.split(chunk or len(order)):
        x, n = inputs[rows, : int(lengths[rows].max())].float(), lengths[rows].to(device)
        if not cached:
            x, n = model.frozen(x, n)
        if recompute and torch.is_grad_enabled():
            predictions.append(checkpoint(model.trained, x, n, use_reentrant=False))
        else:
            predictions.append(model.trained(x, n))
    return torch.cat(predictions)[order.argsort()]


def make_loader(dataset, lengths, args, epoch=None):
    """Batches of one epoch: shuffled by seed and epoch for training; without `epoch`, for
    evaluation, in corpus order or, where padding changes nothing, from short to long."""
    order = list(range(len(dataset)))
    if epoch is not None:
        generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
        order = torch.randperm(len(dataset), generator=generator).tolist()
    elif args.padding == "exact":
        order.sort(key=lengths.__getitem__)
    batches = [order[k : k + args.batch_size] for k in range(0, len(order), args.batch_size)]
    if epoch is not None and len(batches[-1]) == 1 < len(batches):
        batches.pop()  # the CCC of one utterance says nothing
    return DataLoader(
        dataset,
        batch_sampler=batches,
        collate_fn=data.collate,
        num_workers=args.workers,
        pin_memory=args.device == "cuda",
        generator=torch.Generator(),  # else it would draw from the global one, which dropout uses
    )


def autocast(args):
    return torch.autocast(args.device, PRECISIONS[args.precision], enabled=args.precision != "fp32")


def train_epoch(model, loader, optimizer, scaler, args, seconds, title):
    """One pass over Train -> (mean loss of its steps, seconds of speech). `seconds`: of one sample
    or, from a cache, one frame."""
    model.train()
    losses, spoken = [], 0.0
    with tqdm(unit="speech-s", unit_scale=True, desc=title, leave=False) as bar:
        for inputs, lengths, targets, rows in loader:
            with autocast(args):
                predictions = predict(
                    model, inputs, lengths, args.device, args.cached, args.chunk, args.recompute
                )
            loss = ccc_loss(predictions, targets.to(args.device))  # float32, over the whole batch
            if not loss.isfinite():
                names = " ".join(loader.dataset.utterances[i].name for i in rows)
                raise ValueError(
                    f"{title}, step {len(losses) + 1}: the loss is {loss.item()}; try a smaller "
                    f"--lr or --precision fp32, or look at the utterances of this batch: {names}"
                )
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()  # here: the next forward pass needs no room for gradients
            losses.append(loss.item())
            spoken += lengths.sum().item() * seconds
            bar.update(spoken - bar.n)
            bar.set_postfix(loss=f"{losses[-1]:.3f}")
    return sum(losses) / len(losses), spoken


@torch.no_grad()
def evaluate(model, loader, args):
    """Predictions (N, 2) float32 of a split, in corpus order, and {attribute: CCC} over all of it."""
    model.eval()
    utterances = loader.dataset.utterances
    predictions = torch.empty(len(utterances), 2)
    for inputs, lengths, _, rows in loader:
        with autocast(args):
            batch = predict(model, inputs, lengths, args.device, args.cached, args.chunk)
        predictions[rows] = batch.float().cpu()
    if not predictions.isfinite().all():
        raise ValueError("the model predicts NaN or infinity; try --precision fp32 or a lower --lr")
    targets = torch.tensor([[u.activation, u.valence] for u in utterances])
    activation, valence = ccc(predictions, targets).tolist()
    return predictions, {"activation": activation, "valence": valence}


def peak_memory_bytes(device):
    """Peak of this process so far: allocated on the GPU, or resident on a CPU."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    unit = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss, in bytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def save(path, content):
    with cache.atomic(path) as file:
        torch.save(content, file)


def write_json(path, content):
    with cache.atomic(path, "w") as file:
        json.dump(content, file, indent=1)


def read_json(path):
    try:
        return dict(json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}); give another --out") from error


def write_predictions(path, utterances, predictions):
    """FileName, Act, Val, EmoAct, EmoVal, all on the scale 1 to 7."""
    with cache.atomic(path, "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["FileName", "Act", "Val", "EmoAct", "EmoVal"])
        for u, unit in zip(utterances, predictions.tolist(), strict=True):
            values = (*unit, u.activation, u.valence)
            writer.writerow([u.name, *(f"{1 + 6 * x:.6f}" for x in values)])


def read_splits(args):
    """{split: [Utterance]} of Train, Development and the test split. What cannot be trained on is
    refused here, before anything is computed. A cached run reads no audio, so it inspects none,
    but for --skip-bad: it must skip what filling has skipped."""
    utterances, problems = data.read_corpus(args.data)
    utterances = [u for u in utterances if u.split in args.splits]
    if not args.cached or args.skip_bad:
        utterances, more = data.check_audio(utterances)
        problems += more
    utterances = data.select(utterances, problems, args.splits, args.skip_bad)
    return {split: [u for u in utterances if u.split == split] for split in args.splits}


def make_datasets(args, splits, model, audio, encoder):
    """({split: (dataset, lengths in samples or, from a cache, in frames)}, seconds of speech in one
    such unit). With a cache, `model.cut` moves to its layer."""
    seconds = 1 / audio["sample_rate"]
    if not args.cached:
        datasets = {s: data.SpeechDataset(part, **audio) for s, part in splits.items()}
        return {s: (d, [u.samples for u in d.utterances]) for s, d in datasets.items()}, seconds
    index = cache.read_index(args.cache)
    layer, dtype = index["fingerprint"]["layer"], index["fingerprint"]["dtype"]
    cache.compare(args.cache, index, cache.cache_fingerprint(encoder, layer, dtype, audio))
    if layer > model.cut:
        raise ValueError(
            f"{args.cache} starts at layer {layer}, but this run trains from layer {model.cut} on; "
            f"fill a cache with --layer {model.cut}, or train fewer --layers"
        )
    model.cut = layer  # layers between the cache and the first trained one run frozen
    datasets = {s: cache.CachedDataset(args.cache, part, index) for s, part in splits.items()}
    seconds *= math.prod(model.encoder.config.conv_stride)
    return {s: (d, d.lengths) for s, d in datasets.items()}, seconds


def describe(args, model, splits, encoder, index):
    """The part of result.json that is known before training."""
    utterances = [u for part in splits.values() for u in part]
    rows = sorted((u.name, u.activation, u.valence, u.split) for u in utterances)
    keys = ("method", "precision", "padding", "freeze_prefix", "chunk", "recompute", "seed")
    keys += ("epochs", "batch_size", "lr", "dropout", "rank", "alpha", "lora_dropout", "model")
    device = f"CPU, {torch.get_num_threads()} threads"
    return {
        **{key: getattr(args, key) for key in keys},
        "layers": args.layers or len(model.encoder.encoder.layers),
        "cached": args.cached,
        "cache": index
        and {
            **{key: index["fingerprint"][key] for key in ("layer", "dtype")},
            "seconds": index["seconds"],
            "bytes": sum(shard["bytes"] for shard in index["shards"].values()),
        },
        "trainable_parameters": sum(p.numel() for p in models.trainable(model).values()),
        "total_parameters": sum(p.numel() for p in model.parameters()),
        "encoder": encoder,
        "corpus": hashlib.sha256(json.dumps(rows).encode()).hexdigest(),
        "device": torch.cuda.get_device_name() if args.device == "cuda" else device,
        "versions": {m.__name__: m.__version__ for m in (torch, transformers, numpy)}
        | {"python": platform.python_version()},
    }


def check_config(args, inputs):
    """Refuse to mix runs: --resume continues a run only with the arguments it was started with, and
    then with the `inputs`: hashes of corpus and encoder, and what the cache was made from."""
    path = Path(args.out, "config.json")
    if not path.exists():
        return
    if not args.resume:
        raise ValueError(f"{args.out} holds a run; --resume continues it, or give another --out")
    before, now = read_json(path), vars(args) | inputs
    differing = [key for key in now if key not in NOT_THE_RUN and before.get(key) != now[key]]
    if differing:
        what = ", ".join(f"{key} {before.get(key)}" for key in differing)
        raise ValueError(f"{args.out} was started with {what}; give the same, or another --out")


def save_epoch(args, history, model, optimizer, scaler):
    """metrics.jsonl, and then last.pt, which repeats it and holds all else that the next epoch
    depends on."""
    generators = {"cpu": torch.get_rng_state()}
    if args.device == "cuda":
        generators["cuda"] = torch.cuda.get_rng_state()
    state = {"history": history, "weights": models.trainable(model), "generators": generators}
    state |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    with cache.atomic(Path(args.out, "metrics.jsonl"), "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in history)
    save(Path(args.out, "last.pt"), state)


def load_epoch(args, model, optimizer, scaler):
    """Put everything back as it was after the last finished epoch; returns the history."""
    path = Path(args.out, "last.pt")
    if not path.exists():
        return []
    models.read_checkpoint(Path(args.out, "best.pt"), "weights")  # needed at the end: refuse now
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        models.load_trainable(model, saved["weights"])
        optimizer.load_state_dict(saved["optimizer"])
        scaler.load_state_dict(saved["scaler"])
        torch.set_rng_state(saved["generators"]["cpu"])
        if args.device == "cuda" and "cuda" in saved["generators"]:  # not if started on a CPU
            torch.cuda.set_rng_state(saved["generators"]["cuda"])
        return saved["history"]
    except Exception as error:  # whatever a foreign or damaged file makes of the reader
        if cache.out_of_memory(error):
            raise
        raise ValueError(
            f"{path} is damaged ({type(error).__name__}); delete {args.out} to start anew"
        ) from error


def score(epoch):
    """What the best epoch is chosen by: mean of both CCCs on all of Development (our choice)."""
    return sum(epoch["dev"].values()) / len(epoch["dev"])


def run(args):
    """One row and seed of Table I, from corpus to result.json (section IV-D)."""
    finished = Path(args.out, "result.json")
    if args.resume and finished.exists() and not read_json(finished).get("out_of_memory"):
        return print(f"{args.out} is finished")
    check_config(args, {})
    splits = read_splits(args)
    torch.manual_seed(args.seed)
    keys = ("model", "padding", "dropout", "method", "layers", *LORA_DEFAULTS)
    settings = {key: getattr(args, key) for key in keys}
    settings["freeze_prefix"] = args.freeze_prefix or args.cached
    model, audio, encoder = models.build(settings)
    datasets, seconds = make_datasets(args, splits, model, audio, encoder)
    index = datasets[args.splits[0]][0].index if args.cached else None
    result = describe(args, model, splits, encoder, index)
    inputs = {key: result[key] for key in ("corpus", "encoder")}
    inputs["fingerprint"] = index and index["fingerprint"]
    check_config(args, inputs)
    config = {**vars(args), **inputs, "versions": result["versions"]}
    write_json(Path(args.out, "config.json"), config)
    trained, total = result["trainable_parameters"], result["total_parameters"]
    print(f"{trained:,} of {total:,} parameters are trained")
    try:
        fit(args, model.to(args.device), settings, datasets, seconds, result)
    except (RuntimeError, MemoryError) as error:
        if not cache.out_of_memory(error):
            raise
        result |= {"out_of_memory": True, "peak_memory_bytes": peak_memory_bytes(args.device)}
        write_json(Path(args.out, "result.json"), result)
        smaller = max(1, (args.chunk or 8) // 2)
        raise ValueError(
            f"out of memory, recorded in {args.out}/result.json. The batch's CCC in less memory: "
            f"--chunk {smaller} --recompute, with another --out; in less still: --cache or lora"
        ) from error


def fit(args, model, settings, datasets, seconds, result):
    """Train, keep the best epoch, score the test split once with it."""
    train_split, dev_split, test_split = args.splits
    # AdamW's default weight decay .01, no clipping: our choice, the paper names neither
    optimizer = torch.optim.AdamW(models.trainable(model).values(), lr=args.lr)
    half = args.precision == "fp16"  # bf16 has the range of float32 and needs no scaler
    scaler = torch.amp.GradScaler(args.device, enabled=half)
    history = load_epoch(args, model, optimizer, scaler)
    for epoch in range(len(history) + 1, args.epochs + 1):
        start, title = time.perf_counter(), f"epoch {epoch}/{args.epochs}"
        loader = make_loader(*datasets[train_split], args, epoch)
        loss, spoken = train_epoch(model, loader, optimizer, scaler, args, seconds, title)
        middle = time.perf_counter()
        _, dev = evaluate(model, make_loader(*datasets[dev_split], args), args)
        end = time.perf_counter()
        line = {"epoch": epoch, "loss": loss, "dev": dev, "train_seconds": middle - start}
        line |= {"eval_seconds": end - middle, "peak_memory_bytes": peak_memory_bytes(args.device)}
        history.append(line)
        if max(history, key=score) is line:
            best = {"settings": settings, "encoder": result["encoder"]}
            save(Path(args.out, "best.pt"), best | {"weights": models.trainable(model)})
        save_epoch(args, history, model, optimizer, scaler)
        print(
            f"{title}  loss {loss:.4f}  Development activation {dev['activation']:.4f} "
            f"valence {dev['valence']:.4f}  {middle - start:.1f} s, "
            f"{spoken / (middle - start):.0f} speech-seconds per second"
        )

    best = max(history, key=score)
    models.load_trainable(model, *models.read_checkpoint(Path(args.out, "best.pt"), "weights"))
    start = time.perf_counter()
    predictions, test = evaluate(model, make_loader(*datasets[test_split], args), args)
    utterances = datasets[test_split][0].utterances
    write_predictions(Path(args.out, f"predictions-{test_split}.csv"), utterances, predictions)
    result |= {
        "best_epoch": best["epoch"],
        "dev": best["dev"],
        "test": {**test, "n": len(utterances)},
        "train_seconds": sum(line["train_seconds"] for line in history),
        "eval_seconds": sum(line["eval_seconds"] for line in history) + time.perf_counter() - start,
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in history),
        "out_of_memory": False,
    }
    write_json(Path(args.out, "result.json"), result)
    print(
        f"{test_split} with epoch {best['epoch']}: activation {test['activation']:.4f} "
        f"valence {test['valence']:.4f}  ({len(utterances)} utterances; {args.out}/result.json)"
    )


def demo(folder):
    """The paper's recommendation, its last 3 layers from a cache, on a synthetic corpus and a tiny
    random encoder, through the same commands as a real run."""
    names = "corpus", "encoder", "cache", "run"
    corpus, encoder, cached, out = (str(Path(folder, name)) for name in names)
    times = [time.perf_counter()]
    if not Path(encoder, "preprocessor_config.json").exists():  # written last
        data.write_demo(corpus)
        data.write_encoder(encoder)
    times.append(time.perf_counter())
    cache.main(["--data", corpus, "--model", encoder, "--layer", "1", "--out", cached])
    times.append(time.perf_counter())
    arguments = ["--data", corpus, "--model", encoder, "--cache", cached, "--out", out]
    main([*arguments, "--epochs", "10", "--lr", "2e-3", "--resume"])
    times.append(time.perf_counter())
    test = json.loads(Path(out, "result.json").read_text())["test"]
    written, filled, trained = (after - before for before, after in itertools.pairwise(times))
    print(
        f"demo: Test1 CCC activation {test['activation']:.3f}, valence {test['valence']:.3f} on "
        f"unseen speakers (corpus {written:.0f} s, cache {filled:.0f} s, training {trained:.0f} s). "
        "Next: python train.py --data MSP-Podcast --out runs/partial3-fp16-seed0"
    )


def parse_args(argv):
    parser = argparse.ArgumentParser(
        usage="python train.py --data ROOT --out RUN [options] | --demo (--help for all)",
        description="One run: one row and one seed of Table I.",
    )
    add = parser.add_argument_group("what to run").add_argument
    add("--demo", action="store_true", help="everything once, on synthetic speech (--out: demo)")
    add("--data", help="corpus folder in MSP-Podcast's layout (section III)")
    add("--model", default="facebook/wav2vec2-base", help="encoder: hub id or local folder (IV-A)")
    add("--out", help="run folder, new or to --resume")
    add("--seed", type=int, default=0, help="the paper runs five (section V); ours are 0 to 4")
    add("--resume", action="store_true", help="continue after the last finished epoch, if any")
    names, shown = [s for s in data.SPLITS if s != data.UNLABELLED], ("TRAIN", "DEV", "TEST")
    add("--splits", nargs=3, default=names[:3], choices=names, metavar=shown, help="(section III)")
    add("--skip-bad", action="store_true", help="go on without utterances that cannot be used")
    add = parser.add_argument_group("method (section IV-B)").add_argument
    add("--method", choices=("full", "partial", "lora"), default="partial", help="default: partial")
    add("--layers", type=int, help="train the last n transformer layers (partial: 3; lora: all)")
    add("--rank", type=int, help="lora: 8")
    add("--alpha", type=float, help="lora: 16")
    add("--lora-dropout", type=float, help="lora: .1")
    add("--dropout", type=float, default=0.2, help="before the heads: .2 (section IV-A)")
    add = parser.add_argument_group("efficiency").add_argument
    add("--precision", choices=PRECISIONS, help="fp16, the paper's, on CUDA; bf16 on a CPU")
    add("--cache", help="train from this cache of cache.py (section IV-C)")
    add("--freeze-prefix", action="store_true", help="partial: freeze what a cache freezes")
    add("--padding", choices=("paper", "exact"), default="paper", help="exact: as if alone (IV-B)")
    add("--chunk", type=int, help="utterances a pass through the model; the loss is the batch's")
    add("--recompute", action="store_true", help="compute activations twice, keep none (II-D)")
    add = parser.add_argument_group("training (section IV-D)").add_argument
    add("--epochs", type=int, default=5, help="5")
    add("--batch-size", type=int, default=32, help="32; the CCC is taken over it")
    add("--lr", type=float, default=1e-4, help="fixed: 1e-4")
    add = parser.add_argument_group("machine").add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--workers", type=int, default=2, help="processes that load data (2)")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    resolve(parser, args)
    return parser, args


def resolve(parser, args):
    """Fill in the defaults that depend on other arguments; refuse combinations that make no
    sense."""
    cuda = torch.cuda.is_available()
    if args.device == "cuda" and not cuda:
        parser.error("--device cuda: PyTorch sees no CUDA device")
    args.device = "cuda" if cuda and args.device != "cpu" else "cpu"
    args.precision = args.precision or ("fp16" if args.device == "cuda" else "bf16")
    args.cached = args.cache is not None
    args.out = args.out or ("demo" if args.demo else None)
    if not args.demo and not (args.data and args.out):
        parser.error("--data and --out are required (or --demo)")
    if len(set(args.splits)) < 3:
        parser.error("--splits: three different splits")
    if args.method == "full" and (args.layers or args.freeze_prefix or args.cached):
        parser.error("--method full trains all layers: no --layers, --freeze-prefix or --cache")
    if args.freeze_prefix and (args.method == "lora" or args.cached):
        parser.error("--freeze-prefix: lora and --cache freeze the prefix anyway")
    if args.method != "lora" and any(getattr(args, key) is not None for key in LORA_DEFAULTS):
        parser.error("--rank, --alpha and --lora-dropout need --method lora")
    if args.method == "lora":
        for key, default in LORA_DEFAULTS.items():
            setattr(args, key, default if getattr(args, key) is None else getattr(args, key))
    elif args.method == "partial":
        args.layers = 3 if args.layers is None else args.layers
    least = {"epochs": 1, "batch_size": 2, "chunk": 1, "layers": 1, "rank": 1}
    least |= {"workers": 0, "seed": 0}
    for key, bound in least.items():
        if getattr(args, key) is not None and getattr(args, key) < bound:
            parser.error(f"--{key.replace('_', '-')} must be at least {bound}")
    if args.seed >= 2**32:
        parser.error("--seed must be below 2**32")
    if not 0 < args.lr < 1 or not 0 <= args.dropout < 1 or not 0 <= (args.lora_dropout or 0) < 1:
        parser.error("--lr must be in (0, 1), --dropout and --lora-dropout in [0, 1)")
    if Path(args.model).is_dir():
        args.model = os.path.abspath(args.model)  # best.pt names it, wherever predict is run


def main(argv=None):
    parser, args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        if args.demo:
            return demo(args.out)
        with cache.lock(args.out):
            run(args)
    except KeyboardInterrupt:
        print(f"interrupted: the same command with --resume continues {args.out}", file=sys.stderr)
        sys.exit(130)
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        parser.error(str(error).strip().splitlines()[-1])  # of a worker's: the line that says what


if __name__ == "__main__":
    main()
