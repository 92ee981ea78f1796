"""Finetune a speech encoder to predict emotion: one run is one row and one seed of Table I.

    python train.py --demo                                     # all, once, on synthetic speech
    python train.py --data MSP-Podcast --out runs/partial3     # last 3 layers, mixed precision
    python train.py --data MSP-Podcast --out runs/cached3 --cache cache/last-3    # from a cache
    python train.py --data MSP-Podcast --out runs/full --method full --precision fp32    # baseline
    torchrun --nproc-per-node 4 train.py --data MSP-Podcast --out runs/partial3    # on four GPUs

A run folder: config.json, metrics.jsonl, last.pt (all that the next epoch depends on), best.pt (the
best epoch by Development), predictions-Test1.csv, result.json. In comments: B batch (b of it, a
chunk), S samples, T frames, D width, A attributes.
"""

import argparse
import contextlib
import csv
import hashlib
import json
import os
import sys
import time
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
import transformers
from torch.utils.checkpoint import checkpoint
from tqdm import tqdm

import cache
import data
import model as models
from ccc import ccc, ccc_loss

RANK = int(os.environ.get("RANK", "0"))  # of this process among PROCESSES: torchrun's words
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def run(args):
    """One row and seed of Table I, from corpus to result.json (section IV-D)."""
    torch.manual_seed(args.seed)
    model, audio, identity = models.build(args.model, vars(args))
    # a cached run reads no audio, so it inspects none, unless it must skip what filling has skipped
    how = args.attributes, audio["sample_rate"], args.skip_bad, args.skip_bad or not args.cached
    utterances = data.load_corpus(args.data, args.splits, *how)
    index = cache.read_index(args.cache, {"encoder": identity} | audio) if args.cached else None
    datasets = make_datasets(args, model, audio, utterances, index)
    config = describe_run(args, model, utterances, identity, index)
    print(models.describe(model, audio))
    with cache.lock(args.out) if RANK == 0 else contextlib.nullcontext():
        try:
            fit(args, model.to(args.device), datasets, config)
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            if not Path(args.out, "result.json").exists():  # which may be of a finished run
                memory = {"out_of_memory": True, "peak_memory_bytes": peak_memory(args.device)}
                write_json(args, "result.json", config | memory)
            less = f"--out ELSEWHERE --chunk {max(1, (args.chunk or 8) // 2)} --recompute"
            raise ValueError(f"out of memory; less is needed with {less}") from error


def fit(args, model, datasets, config):
    """Train, keep the best epoch, score the test split once with it."""
    train, dev, test = (datasets[split] for split in args.splits)
    parameters = models.trainable(model)
    # AdamW's default weight decay .01, no clipping: our choice, the paper names neither
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.lr, fused=True)
    # bf16 has the range of float32 and needs no scaler
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    history, best = resume(args, config, model, optimizer, scaler)
    if Path(args.out, f"predictions-{args.splits[2]}.csv").exists():  # written last
        return print(f"{args.out} is finished")
    write_json(args, "config.json", config)  # not before, as another run's may be there
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        loss = train_epoch(model, train, optimizer, scaler, args, epoch)
        middle = time.perf_counter()
        _, scores = evaluate(model, dev, args)
        line = {"epoch": epoch, "loss": loss, "dev": scores, "train_seconds": middle - start}
        line["eval_seconds"] = time.perf_counter() - middle
        history.append(line | {"peak_memory_bytes": peak_memory(args.device)})
        # the highest mean CCC over all of Development (our choice), the first of equals
        if not best or sum(scores.values()) > sum(best["dev"].values()):
            weights = {name: p.detach().to("cpu", copy=True) for name, p in parameters.items()}
            best = {"epoch": epoch, "dev": scores, "weights": weights}
        save_epoch(args, config, history, best, model, optimizer, scaler)
        print(f"epoch {epoch}/{args.epochs} loss {loss:.4f} {show(scores)} {middle - start:.1f} s")
    model.load_state_dict(best["weights"], strict=False)
    predictions, scores = evaluate(model, test, args)
    result = {"best_epoch": best["epoch"], "dev": best["dev"], "test": scores | {"n": len(test)}}
    result |= {key: sum(line[key] for line in history) for key in ("train_seconds", "eval_seconds")}
    result["peak_memory_bytes"] = max(line["peak_memory_bytes"] for line in history)
    write_json(args, "result.json", config | result | {"out_of_memory": False})
    if RANK == 0:
        write_predictions(args, test.utterances, predictions)
    print(f"{args.splits[2]} with epoch {best['epoch']}: {show(scores)}  ({args.out}/result.json)")


def train_epoch(model, dataset, optimizer, scaler, args, epoch):
    """One pass over the training split -> mean loss of its steps."""
    model.train()
    # dropout's seed: a resumed epoch draws what it would have drawn, without stored generators
    torch.manual_seed((1000 * args.seed + epoch) * 1000 + RANK)
    batches, losses = make_batches(dataset, model, args, epoch), []
    loaded = data.read_ahead(partial(load_batch, dataset, args), batches, args.workers)
    bar = tqdm(loaded, f"epoch {epoch}", len(batches), leave=False, disable=RANK > 0 or None)
    for rows, mine, chunks in bar:
        with torch.autocast(args.device, PRECISIONS[args.precision], args.precision != "fp32"):
            predictions = predict(model, chunks, args.device, args.cached, args.recompute)
        predictions = gather(predictions, mine, len(rows))
        targets = dataset.targets[rows].to(args.device, non_blocking=True)
        loss = ccc_loss(predictions, targets)  # in float32, over the whole batch
        scaled = scaler.scale(loss)
        if loss.requires_grad:  # not where all of the batch is other processes'
            scaled.backward()
        sum_gradients(optimizer)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())  # last, as it waits for the GPU
        bar.set_postfix(loss=f"{losses[-1]:.3f}")
        if not loss.isfinite():
            names = " ".join(dataset.utterances[i].name for i in rows)
            where = f"epoch {epoch}, step {len(losses)}: the loss is {losses[-1]}"
            raise ValueError(f"{where}; try a smaller --lr or --precision fp32, or look at {names}")
    return sum(losses) / len(losses)


def predict(model, chunks, device, cached=False, recompute=False):
    """Predictions (B, A) float32 of a batch in chunks, each of them inputs (b, S) or, cached,
    hidden states (b, T, D), and their lengths, b ints, on the CPU.

    The CCC of a batch is no sum over its utterances (see ccc.ccc_loss), so a batch is not split for
    the loss: its chunks, each padded to its own longest only, go through the model one by one, and
    their predictions, in "exact" padding those of the whole batch, come back together. `recompute`
    drops what `trained` computes and does it again, dropout alike, in the backward pass: peak
    memory is one chunk's.
    """
    predictions = [torch.zeros(0, len(model.attributes), device=device)]  # B may be 0
    for inputs, lengths in chunks:
        inputs = inputs.to(device, non_blocking=True).float()
        hidden, frames = (inputs, lengths) if cached else model.frozen(inputs, lengths)
        if recompute and torch.is_grad_enabled():
            part = checkpoint(model.trained, hidden, frames, use_reentrant=False)
        else:
            part = model.trained(hidden, frames)
        predictions.append(part.float())
    return torch.cat(predictions)


@torch.no_grad()
def evaluate(model, dataset, args):
    """Predictions (N, A) float32 of a split, in corpus order, and {attribute: CCC} over all of it.
    Processes take whole batches in turn, so predictions are those of one process to the bit."""
    model.eval()
    batches = make_batches(dataset, model, args)[RANK::PROCESSES]
    predictions = torch.zeros(len(dataset), len(args.attributes), device=args.device)
    loaded = data.read_ahead(partial(load_batch, dataset, args), batches, args.workers)
    for rows, _, chunks in loaded:
        with torch.autocast(args.device, PRECISIONS[args.precision], args.precision != "fp32"):
            predictions[rows] = predict(model, chunks, args.device, args.cached)
    add_up(predictions)
    predictions = predictions.cpu()
    if not predictions.isfinite().all():
        raise ValueError("the model predicts NaN or infinity; try --precision fp32 or a lower --lr")
    scores = ccc(predictions, dataset.targets).tolist()
    return predictions, dict(zip(args.attributes, scores, strict=True))


def make_batches(dataset, model, args, epoch=None):
    """[(rows, chunks)]: the dataset's indices of each batch, from short to long, and what of them
    this process predicts (see `deal`). Training shuffles by seed and epoch. Evaluation, without
    `epoch`, keeps corpus order or, where padding changes nothing, goes from short to long. Lengths
    are in frames: a cached run, which knows no samples, draws the same dropout for an utterance."""
    frames = dataset.lengths if args.cached else [model.frames(n) for n in dataset.lengths]
    order, size, share = list(range(len(dataset))), args.batch_size, (0, 1)
    if epoch is not None:
        generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
        order, share = torch.randperm(len(order), generator=generator).tolist(), (RANK, PROCESSES)
        if len(order) % size == 1 and len(order) > 1:
            order.pop()  # the CCC of one utterance says nothing
    elif args.padding == "exact":
        order.sort(key=frames.__getitem__)
    batches = [order[k : k + size] for k in range(0, len(order), size)]
    batches = [sorted(rows, key=frames.__getitem__) for rows in batches]
    return [(rows, deal(len(rows), args.chunk or size, *share)) for rows in batches]


def deal(n, chunk, rank=0, processes=1):
    """What a process predicts of a batch of n, sorted from short to long: [(positions, all those
    of their chunk)]. Chunks are dealt there and back (0 1 2 2 1 0), so that nobody waits long for
    the longest; where there are fewer chunks than processes, utterances are."""
    turns = [*range(processes), *reversed(range(processes))]
    chunks = [range(k, min(k + chunk, n)) for k in range(0, n, chunk)]
    if len(chunks) >= processes:
        return [(c, c) for i, c in enumerate(chunks) if turns[i % len(turns)] == rank]
    shares = [([p for p in c if turns[p % len(turns)] == rank], c) for c in chunks]
    return [(positions, c) for positions, c in shares if positions]


def load_batch(dataset, args, batch):
    """An item of make_batches -> rows, this process's positions in them, chunks for `predict`."""
    (rows, chunks), loaded = batch, []
    for positions, chunk in chunks:
        inputs, lengths, _ = data.collate([dataset[rows[p]] for p in positions])
        # in paper padding to the longest of the chunk, even if another process predicts that
        extra = max(dataset.lengths[rows[p]] for p in chunk) - inputs.shape[1]
        if args.padding == "paper" and extra > 0:
            inputs = torch.nn.functional.pad(inputs, [0, 0] * (inputs.dim() - 2) + [0, extra])
        if args.device == "cuda":
            inputs = inputs.pin_memory()  # so that copying it need not wait
        loaded.append((inputs, lengths))
    return rows, [p for positions, _ in chunks for p in positions], loaded


def add_up(*tensors):
    """Sum each over processes, in place. ConnectionError where another process has ended."""
    try:
        for work in [dist.all_reduce(t, async_op=True) for t in tensors if PROCESSES > 1]:
            work.wait()
    except RuntimeError as error:
        raise ConnectionError("another process has ended; see its line, above or below") from error


def gather(predictions, mine, n):
    """This process's predictions (b, A), at positions `mine` of a batch of n -> all processes'
    (n, A). Others' are constants here: each process has the loss of the whole batch, and of its
    gradient the part that goes through its own predictions; the parts sum up to the whole."""
    if PROCESSES == 1:
        return predictions
    everyone = predictions.new_zeros(n, predictions.shape[1])
    everyone[mine] = predictions.detach()
    add_up(everyone)
    everyone[mine] = predictions
    return everyone


def sum_gradients(optimizer):
    """Sum every gradient over processes; before scaler.step, so that all find its infinities."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for p in parameters:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad
    add_up(*(p.grad for p in parameters))


def make_datasets(args, model, audio, utterances, index):
    """{split: dataset}. With a cache, `model.cut` moves to its end: layers between run frozen."""
    parts = {split: [u for u in utterances if u.split == split] for split in args.splits}
    if not args.cached:
        return {split: data.SpeechDataset(part, **audio) for split, part in parts.items()}
    if (layer := index["fingerprint"]["layer"]) > model.cut:
        n = model.encoder.config.num_hidden_layers - model.cut
        raise ValueError(f"{args.cache} is for fewer layers than {n}; fill one with --layers {n}")
    model.cut = layer
    return {split: cache.CachedDataset(args.cache, part, index) for split, part in parts.items()}


def save_epoch(args, config, history, best, model, optimizer, scaler):
    """last.pt, all that the next epoch depends on; then what is made from it."""
    if RANK > 0:
        return
    last = {"config": config, "history": history, "best": best, "weights": models.trainable(model)}
    last |= {"optimizer": optimizer.state_dict(), "scaler": scaler.state_dict()}
    for name, content in (("last.pt", last), ("best.pt", {"config": config, **best})):
        with cache.atomic(Path(args.out, name)) as file:
            torch.save(content, file)
    with cache.atomic(Path(args.out, "metrics.jsonl"), "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in history)


def resume(args, config, model, optimizer, scaler):
    """With --resume, put all back as it was after the last finished epoch -> history and best.
    ValueError if what --out holds is damaged or another run's."""
    last = Path(args.out, "last.pt")
    if not (last.exists() or Path(args.out, "best.pt").exists()):
        return [], None
    if not args.resume:
        raise ValueError(f"{args.out} holds a run; --resume continues it, or give another --out")
    keys = "config", "history", "best", "weights", "optimizer", "scaler"
    found, history, best, weights, *states = models.read_checkpoint(last, *keys)
    # corpus, encoder and cache are compared by their contents, not by where they are
    elsewhere = {"model", "data", "out", "workers", "resume", "skip_bad", "demo", "fill_seconds"}
    elsewhere |= {"versions", "device", "device_memory_bytes"}
    differing = [key for key in config.keys() - elsewhere if found.get(key) != config[key]]
    if differing:
        what = ", ".join(f"{key} {found.get(key)}, not {config[key]}" for key in sorted(differing))
        raise ValueError(f"{last} is of a run with {what}; give the same, or another --out")
    model.load_state_dict(weights, strict=False)
    optimizer.load_state_dict(states[0])
    scaler.load_state_dict(states[1])
    save_epoch(args, config, history, best, model, optimizer, scaler)  # it may have ended half done
    return history, best


def describe_run(args, model, utterances, identity, index):
    """What makes this run, and where it runs: config.json."""
    config = vars(args) | {"layers": args.layers or model.encoder.config.num_hidden_layers}
    rows = sorted([u.name, u.split, *u.labels] for u in utterances)
    config["corpus"] = hashlib.sha256(json.dumps(rows).encode()).hexdigest()
    config |= {"encoder": identity, "processes": PROCESSES}
    config["cache"] = "layer {layer}, {dtype}".format(**index["fingerprint"]) if index else None
    config["fill_seconds"] = index["seconds"] if index else None
    config["trainable_parameters"] = sum(p.numel() for p in models.trainable(model).values())
    config["total_parameters"] = sum(p.numel() for p in model.parameters())
    config["versions"] = {m.__name__: str(m.__version__) for m in (torch, transformers)}
    if args.device == "cuda":
        device, memory = torch.cuda.get_device_name(), torch.cuda.mem_get_info()[1]
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return config | {"device": device, "device_memory_bytes": memory}


def show(scores):
    return " ".join(f"{attribute} {score:z.4f}" for attribute, score in scores.items())


def write_json(args, name, content):
    if RANK == 0 or content.get("out_of_memory"):  # memory may be full in another process only
        with cache.atomic(Path(args.out, name), "w") as file:
            json.dump(content, file, indent=1)


def write_predictions(args, utterances, predictions):
    """FileName, predictions (Act, Val) and labels (EmoAct, EmoVal), all on the scale 1 to 7."""
    columns = [data.ATTRIBUTES[attribute] for attribute in args.attributes]
    with cache.atomic(Path(args.out, f"predictions-{args.splits[2]}.csv"), "w") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["FileName", *columns, *("Emo" + column for column in columns)])
        for u, units in zip(utterances, predictions.tolist(), strict=True):
            writer.writerow([u.name, *(f"{1 + 6 * x:.6f}" for x in (*units, *u.labels))])


def peak_memory(device):
    """Bytes at the peak of this process: allocated on the GPU or, on a CPU, resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status").read_text().split()  # (ru_maxrss starts at the parent's)
    return 1024 * int(status[status.index("VmHWM:") + 1])


def out_of_memory(error):
    """Whether an exception says, in a library's words, that memory is full."""
    words = "out of memory", "allocate memory", "ALLOC_FAILED", "unable to find an engine"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def demo(folder):
    """The paper's recommendation on synthetic speech, by the commands of a real run."""
    corpus, cached, out = (str(Path(folder, name)) for name in ("corpus", "cache", "run"))
    common = ["--data", corpus, "--model", f"{corpus}/encoder", "--layers", "3"]
    if not Path(corpus, "encoder", "preprocessor_config.json").exists():  # written last
        data.main(["--demo", corpus])
    cache.main([*common, "--out", cached])
    training = ["--cache", cached, "--out", out, "--epochs", "10", "--lr", "2e-3", "--resume"]
    run(parse_args([*common, *training]))


def parse_args(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--demo", action="store_true", help="synthetic speech, in demo/ or --out; ignores the rest")
    add("--data", help="corpus folder in MSP-Podcast's layout (section III)")
    add("--model", default="facebook/wav2vec2-base", help="hub id or folder (%(default)s, IV-A)")
    add("--out", help="run folder, new or to --resume")
    add("--seed", type=int, default=0, help="the paper runs five (section V); ours are 0 to 4")
    add("--resume", action="store_true", help="continue after the last finished epoch, if any")
    names, shown = data.SPLITS[:-1], "to train on, choose the epoch by, test on (section III)"
    add("--splits", nargs=3, default=names[:3], choices=names, metavar="NAME", help=shown)
    add("--attributes", nargs="+", default=data.PAPER, choices=data.ATTRIBUTES, help="to predict")
    add("--skip-bad", action="store_true", help="go on without utterances that cannot be used")
    add = parser.add_argument_group("method (section IV-B)").add_argument
    names = "full", "partial", "lora"
    add("--method", choices=names, default="partial", help="all layers, last, adapters (partial)")
    add("--layers", type=int, help="the last n transformer layers (partial: 3; lora: all)")
    add("--rank", type=int, default=8, help="lora: rows of A (8)")
    add("--alpha", type=float, default=16, help="lora: its output is scaled by alpha / rank (16)")
    add("--lora-dropout", type=float, default=0.1, help="lora: dropout of its input (.1)")
    add("--dropout", type=float, default=0.2, help="before the head (.2, IV-A)")
    add = parser.add_argument_group("efficiency").add_argument
    add("--precision", choices=PRECISIONS, help="fp16 on CUDA, as in the paper; bf16 on a CPU")
    add("--cache", help="train from this cache of cache.py (IV-C)")
    add("--freeze-prefix", action="store_true", help="partial: freeze all that a cache freezes")
    add("--padding", choices=("paper", "exact"), default="paper", help="(paper); exact: as alone")
    add("--chunk", type=int, help="utterances a pass, for less padding; one loss over all")
    add("--recompute", action="store_true", help="compute activations twice, keep few (II-D)")
    add = parser.add_argument_group("training (section IV-D) and machine").add_argument
    add("--epochs", type=int, default=5, help="passes over the training split (5)")
    add("--batch-size", type=int, default=32, help="utterances in the loss, of all processes (32)")
    add("--lr", type=float, default=1e-4, help="AdamW's learning rate, fixed (1e-4)")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add("--workers", type=int, default=2, help="threads that load data ahead of the model (2)")
    args = parser.parse_args(argv)
    resolve(parser.error, args)
    return args


def resolve(error, args):
    """Fill in what depends on other arguments; `error` on combinations that make no sense."""
    if args.device == "cuda" and not torch.cuda.is_available():
        error("--device cuda: PyTorch sees no CUDA device")
    if args.device == "auto":
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    args.precision = args.precision or ("fp16" if args.device == "cuda" else "bf16")
    args.cached = args.cache is not None
    args.out = args.out or ("demo" if args.demo else None)
    if not args.demo and not (args.data and args.out):
        error("--data and --out are required (or --demo)")
    if len(set(args.splits)) < 3 or len(set(args.attributes)) < len(args.attributes):
        error("--splits: three different splits; --attributes: each once")
    if args.method == "full" and (args.layers or args.freeze_prefix or args.cached):
        error("--method full trains all layers: no --layers, --freeze-prefix or --cache")
    if args.freeze_prefix and (args.method == "lora" or args.cached):
        error("--freeze-prefix: lora and --cache freeze the prefix anyway")
    args.freeze_prefix = args.freeze_prefix or args.cached
    if args.method != "lora" and (args.rank, args.alpha, args.lora_dropout) != (8, 16, 0.1):
        error("--rank, --alpha and --lora-dropout need --method lora")
    for key in ("epochs", "batch_size", "lr", "chunk", "layers", "rank"):
        if (value := getattr(args, key)) is not None and value <= 0:
            error(f"--{key.replace('_', '-')} must be above 0")
    if args.batch_size == 1:
        error("--batch-size must be above 1: the CCC of one utterance says nothing")
    args.layers = args.layers or (3 if args.method == "partial" else None)
    if Path(args.model).is_dir():
        args.model = os.path.abspath(args.model)  # best.pt names it, wherever predict is run


def main(argv=None):
    args = parse_args(argv)
    if args.device == "cuda":
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if PROCESSES > 1:
        dist.init_process_group("nccl" if args.device == "cuda" else "gloo")
    with contextlib.redirect_stdout(sys.stdout if RANK == 0 else None):
        demo(args.out) if args.demo else run(args)
    if PROCESSES > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    cache.leave_on_interrupt("continue it with --resume")
    try:
        main()
    except (ValueError, OSError) as error:  # bad input: one line and exit status 2
        argparse.ArgumentParser().exit(2, f"error: {error}\n")
