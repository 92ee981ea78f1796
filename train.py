"""Finetune a speech encoder to predict emotion: one run is one row and one seed of Table I.

    python train.py --demo                                     # every step, on synthetic speech
    python train.py --data MSP-Podcast --out runs/partial3     # last 3 layers, mixed precision
    python train.py --data MSP-Podcast --out runs/cached3 --cache cache/last-3    # from a cache
    python train.py --data MSP-Podcast --out runs/full --method full --precision fp32    # baseline
    torchrun --nproc-per-node 4 train.py --data MSP-Podcast --out runs/partial3    # on four GPUs

A run folder: config.json (what makes the run), metrics.jsonl (a line an epoch), last.pt (all that
the next epoch depends on), best.pt (the best epoch by Development), predictions-Test1.csv and, last
of all, result.json. The first lines of model.py say what `prefix`, `suffix` and the cut between
them are, and those of model.EmotionModel what "paper" and "exact" padding are.

In comments: B batch, b a process's share of it, c a chunk of that, S samples, T frames, D width, A
attributes, N utterances of a split.
"""

import argparse
import contextlib
import hashlib
import json
import math
import os
import resource
import sys
import time
from datetime import timedelta
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist

# This has to be imported before there is a process group. AdamW imports it later otherwise, and
# default arguments of its functions then keep the group alive when it is destroyed: its threads at
# times abort the process at its end.
import torch.distributed.nn
import transformers
from torch.utils.checkpoint import checkpoint

import cache
import data
import model as models
from ccc import ccc, ccc_loss, shell

# torchrun starts this script in several processes, and tells each by environment variables its
# number, from 0 on, and how many there are. (The option --rank is another thing: the rank of LoRA.)
RANK = int(os.environ.get("RANK", "0"))
PROCESSES = int(os.environ.get("WORLD_SIZE", "1"))
PRECISIONS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def fit(args, model, datasets, config):
    """Train, keep the best epoch, and score the test split once with it (section IV-D).

    datasets : {split: dataset}, as make_datasets returns, in the order of --splits
    config : {key: value}, what config.json is to say of the run (see describe_run)
    """
    train, dev, test = datasets.values()
    parameters = models.trainable(model)
    # AdamW's default weight decay .01 and no clipping: our choice, as the paper names neither.
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.lr, fused=True)
    # float16 ends at 65,504 and at 6e-8. The scaler keeps gradients between: it multiplies the
    # loss, divides before the step, and leaves out a step with an infinity. bfloat16 needs none.
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    history, best = start_run(args, config, model, optimizer, scaler)
    for epoch in range(len(history) + 1, args.epochs + 1):
        start = time.perf_counter()
        loss = train_epoch(model, train, optimizer, scaler, args, epoch)
        middle = time.perf_counter()
        _, scores = evaluate(model, dev, args)
        line = {
            "epoch": epoch,
            # AdamW has taken so many: the scaler leaves out some. (Fused, it counts from 0 on.)
            "steps": int(next(iter(optimizer.state.values()))["step"]),
            "loss": loss,
            "dev": scores,
            "train_seconds": middle - start,
            "eval_seconds": time.perf_counter() - middle,
            "peak_memory_bytes": max(exchange(peak_memory(args.device))),
        }
        history.append(line)
        # The highest mean CCC over all of Development (our choice), the first of equals.
        is_best = best is None or sum(scores.values()) > sum(best["dev"].values())
        if is_best:
            best = {
                "epoch": epoch,
                "dev": scores,
                "weights": {key: p.detach().to("cpu", copy=True) for key, p in parameters.items()},
                "settings": identify(config),
            }
        last = {
            "history": history,
            "best": best,
            "weights": parameters,
            "optimizer": optimizer.state_dict(),
            "scaler": scaler.state_dict(),
        }
        save_epoch(args, last)
        report_epoch(line, is_best, args)
    score_test(args, model, test, config, history, best)


def score_test(args, model, dataset, config, history, best):
    """Score the test split with the best epoch's weights, and write predictions and result.json,
    the last of all files, because it says that the run is finished."""
    model.load_state_dict(best["weights"], strict=False)
    predictions, scores = evaluate(model, dataset, args)
    result = {
        "best_epoch": best["epoch"],
        "dev": best["dev"],
        "train_seconds": sum(line["train_seconds"] for line in history),
        "eval_seconds": sum(line["eval_seconds"] for line in history),
        "peak_memory_bytes": max(line["peak_memory_bytes"] for line in history),
        "out_of_memory": False,
        "test": scores | {"n": len(dataset)},
    }
    if RANK == 0:
        path = args.out / f"predictions-{args.splits[2]}.csv"
        with cache.atomic(path, "w", "utf-8") as file:
            write = data.predictions_writer(file, args.attributes, args.scale)
            for u, units in zip(dataset.utterances, predictions.tolist(), strict=True):
                write(u, units)
        write_json(args, "result.json", config | result)
    print(
        f"{args.splits[2]} with epoch {best['epoch']}: {format_scores(scores)}"
        f"  ({args.out}/result.json)"
    )


def train_epoch(model, dataset, optimizer, scaler, args, epoch):
    """One pass over the training split -> mean loss of its steps."""
    model.train()
    # Every epoch seeds its dropout. So a resumed one draws what it would have drawn, and no
    # generator's state has to be saved. Processes have different utterances, and so other seeds.
    torch.manual_seed((1000 * args.seed + epoch) * 1000 + RANK)
    losses = []
    wanted = batches(dataset, args, epoch)
    load = partial(load_chunks, dataset, args, RANK, PROCESSES)
    # Batches come in order, loaded ahead by threads. The text is the name of the bar.
    for batch, chunks in data.read_ahead(load, wanted, args.workers, f"epoch {epoch}"):
        with autocast(args):
            predictions = predict_batch(model, chunks, args)  # (b, A)
        predictions = gather(predictions, len(batch))  # (B, A), of all processes
        targets = dataset.targets[batch].to(args.device, non_blocking=True)
        loss = ccc_loss(predictions, targets)  # in float32, over the whole batch
        scaler.scale(loss).backward()
        # Processes add up their parts of the gradients before scaler.step. So all find the same
        # infinities, and leave out the same steps. In one process nothing happens.
        add_up(*(p.grad for p in model.parameters() if p.grad is not None))
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        losses.append(loss.item())  # It waits for the GPU, so it comes after all that is queued.
        names = [dataset.utterances[i].name for i in batch]
        check_finite(loss, f"epoch {epoch}, step {len(losses)}: the loss of {names}")
    return sum(losses) / len(losses)


def check_finite(numbers, what):
    """ValueError where a tensor, a loss or predictions, holds NaN or infinity."""
    if not numbers.isfinite().all():
        raise ValueError(f"{what} is NaN or infinite; try a smaller --lr, or --precision fp32")


def predict_batch(model, chunks, args):
    """Predictions (b, A) float32 of this process's share of a batch, in chunks of c utterances.

    chunks : [(inputs, lengths)]. Inputs are waveforms (c, S), lengths their samples; or, from a
    cache, hidden states (c, T, D), lengths their frames.

    The CCC of a batch is no sum over its utterances (see ccc.ccc_loss), so a batch is not split for
    the loss. Only the model runs chunk by chunk, and the predictions come back together. The
    activations of all chunks are kept for the one backward pass. With `args.recompute`, those in
    `suffix` are forgotten, and computed again in that pass, with the same dropout: of them, only
    one chunk's are in memory at a time (section II-D).
    """
    predictions = []
    for inputs, lengths in chunks:
        inputs = inputs.to(args.device, non_blocking=True)
        hidden, frames = (inputs, lengths) if args.cached else model.prefix(inputs, lengths)
        if args.recompute:
            part = checkpoint(model.suffix, hidden, frames, use_reentrant=False)
        else:
            part = model.suffix(hidden, frames)
        predictions.append(part)
    return torch.cat(predictions)


@torch.no_grad()
def evaluate(model, dataset, args):
    """Predictions (N, A) float32 of a split, in corpus order, and {attribute: CCC} over all of it.

    Processes take whole batches in turn, so that each batch, and with it its padding, is what it
    would be in one process.
    """
    model.eval()
    predictions = torch.zeros_like(dataset.targets, device=args.device)
    wanted = batches(dataset, args)[RANK::PROCESSES]
    load = partial(load_chunks, dataset, args, 0, 1)  # Whole batches: as process 0 of 1.
    for batch, chunks in data.read_ahead(load, wanted, args.workers, "evaluation"):
        with autocast(args):
            predictions[batch] = predict_batch(model, chunks, args)
    add_up(predictions)
    predictions = predictions.cpu()
    check_finite(predictions, "a prediction in evaluation")
    scores = ccc(predictions, dataset.targets).tolist()
    return predictions, dict(zip(args.attributes, scores, strict=True))


def batches(dataset, args, epoch=None):
    """[indices of each batch]. An epoch's batches are random, and the same in all processes. Those
    of evaluation, without `epoch`, are in corpus order or, in "exact" padding, from short to long.
    Inside a batch, the shortest comes first.

    Utterances are sorted by their frames, then by index, and not by their samples, of which a cache
    says nothing. So a cached run sorts as an uncached one does. That matters, because an utterance
    gets its dropout by its place in the batch.
    """

    def by_frames(i):
        return dataset.frames[i], i  # make_datasets adds `frames`; `lengths` may be in samples.

    if epoch is None:
        indices = list(range(len(dataset)))
        if args.padding == "exact":
            indices.sort(key=by_frames)  # No prediction changes, and less of a batch is padding.
        size = args.eval_batch_size
        least = 1
    else:
        generator = torch.Generator().manual_seed(1000 * args.seed + epoch)
        indices = torch.randperm(len(dataset), generator=generator).tolist()
        size = args.batch_size
        # A last batch is dropped if a process would have no utterance of it, or the CCC only one.
        least = max(2, PROCESSES)
    parts = [indices[k : k + size] for k in range(0, len(indices), size)]
    return [sorted(part, key=by_frames) for part in parts if len(part) >= least]


def load_chunks(dataset, args, process, processes, batch):
    """A process's share of a batch of indices, in chunks -> the batch as it came, for its targets,
    and [(inputs, lengths)].

    Zeros follow waveforms (c, S), as in IV-B, or hidden states (c, T, D) from a cache, as in IV-C.
    In "paper" padding every chunk is padded to the longest of the whole batch, so that chunks and
    processes change no prediction, dropout off. In "exact" padding zeros change none, and a chunk
    is padded to its own longest. (With dropout, each chunk draws its own, and so does a process.)
    """
    share = batch[process::processes]
    size = args.chunk or len(share)
    chunks = []
    for k in range(0, len(share), size):
        inputs, lengths, _ = data.collate([dataset[i] for i in share[k : k + size]])
        if args.padding == "paper":
            lacking = max(dataset.lengths[i] for i in batch) - inputs.shape[1]
            zeros = inputs.new_zeros(len(inputs), lacking, *inputs.shape[2:])
            inputs = torch.cat([inputs, zeros], dim=1)
        if args.device == "cuda":
            inputs = inputs.pin_memory()  # So copying it to the GPU need not wait.
        chunks.append((inputs, lengths))
    return batch, chunks


def autocast(args):
    """Half precision where it is asked for; in fp32 nothing is cast."""
    return torch.autocast(args.device, PRECISIONS[args.precision], args.precision != "fp32")


# ---- several processes ----


def gather(predictions, n):
    """This process's predictions (b, A) -> those of the whole batch of n, (n, A), in its order.

    Each process computes the loss of the whole batch. In it, other processes' predictions are
    constants, and only its own have a gradient. So it has a part of the whole gradient, and
    train_epoch adds the parts up.
    """
    everyone = predictions.new_zeros(n, predictions.shape[1])
    everyone[RANK::PROCESSES] = predictions.detach()
    add_up(everyone)
    # That sum carries no gradient, so this process's own predictions are put back, with theirs.
    everyone[RANK::PROCESSES] = predictions
    return everyone


def add_up(*tensors):
    """Add each up over processes, in place."""
    for tensor in tensors:
        together(dist.all_reduce, tensor)


def exchange(value):
    """[value of every process]. All wait here for the slowest."""
    values = [value] * PROCESSES
    together(dist.all_gather_object, values, value)
    return values


def together(operation, *arguments):
    """Call an operation of torch.distributed, if there are several processes. An error while it
    waits for the others becomes one line: most likely, one has ended."""
    if PROCESSES > 1:
        try:
            operation(*arguments)
        except RuntimeError as error:
            raise ConnectionError(
                "another process has ended; see its line, above or below"
            ) from error


# ---- the run folder ----
#
# what --out holds                   without --resume     with --resume
# nothing, or no run                 a new run, unless it would write over a file (check_place)
# this run, unfinished               refused              continued
# this run, finished                 refused              left as it is; if --epochs grew, continued
# this run, out of memory            a new run, unless there is an epoch: then as unfinished
# another run, or a longer one       refused, if there is an epoch of it (compare_run)

# What may differ between a run and its continuation: places, the machine and what follows from it,
# the number of epochs, and --skip-bad, as the utterances that are left are compared.
MAY_DIFFER = str.split("""data model out device device_memory_bytes versions precision_reason
    workers skip_bad epochs fill_seconds""")


def run(args):
    """One row and seed of Table I, from corpus to result.json.

    An earlier run in --out is compared with this one twice: before the cache is filled, in all but
    the cache, and afterwards in that, too. If it is finished, the cache is not touched.
    """
    check_place(args)
    torch.manual_seed(args.seed)
    # `audio` is which waveforms the encoder takes: their rate, and whether to normalise them.
    encoder, audio = models.load_encoder(args.model)
    model = models.build(encoder, audio, vars(args)).to(args.device)
    found = data.read_corpus(args.data, args.attributes, args.scale, args.splits)
    utterances = data.usable(found, args.skip_bad, args.splits)
    config = describe_run(args, model, utterances)
    if not args.cached:
        found = data.check_audio(utterances, model.sample_rate)
        utterances = data.usable(found, args.skip_bad)
        # This word in config.json is about the recordings.
        config["audio"] = digest_rows([u.name, os.path.getsize(u.path)] for u in utterances)
    with cache.lock(args.out) if RANK == 0 else contextlib.nullcontext():
        exchange("locked")  # All wait here until process 0 has the lock.
        if compare_run(args, config, [*MAY_DIFFER, "cache", "cache_contents"]):
            print(f"'{args.out}' is finished")
            return
        datasets = make_datasets(args, model, utterances, config)
        # Now it is known what is in the cache. Of this comparison only its errors matter.
        compare_run(args, config, MAY_DIFFER)
        steps = len(batches(datasets[args.splits[0]], args, epoch=1))
        sizes = ", ".join(f"{split} {len(dataset):,}" for split, dataset in datasets.items())
        print(
            f"{encoder.config.model_type}, {config['total_parameters']:,} parameters,"
            f" {config['trainable_parameters']:,} of them trained, cut {model.cut};"
            f" {args.precision} ({args.precision_reason}) on {config['device']};"
            f" utterances: {sizes}; {steps:,} steps an epoch"
        )
        # In Table II, "out of memory" is a result as well. So what is tried next has a new --out.
        advice = f"a new --out with --chunk {max(1, (args.chunk or 8) // 2)} --recompute needs less"
        try:
            with models.explain_memory(advice):
                fit(args, model, datasets, config)
        except MemoryError:
            failure = {"out_of_memory": True, "peak_memory_bytes": peak_memory(args.device)}
            # Several processes may come here at once. One of their files remains.
            write_json(args, "result.json", config | failure)
            raise


def describe_run(args, model, utterances):
    """What config.json says: all that makes this run, and where it runs. `utterances` are those
    whose labels can be used. What is of the audio or the cache is None, until it is known."""
    if args.device == "cuda":
        device = torch.cuda.get_device_name()
        memory = torch.cuda.mem_get_info()[1]
    else:
        device = f"CPU, {torch.get_num_threads()} threads"
        memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    # Three options are replaced: `layers` is a number also where None meant all, `device` is the
    # processor's name, and `cache`, no longer a path, will be "cut 10, float16" or None.
    config = vars(args) | {
        "layers": args.layers or len(model.encoder.encoder.layers),
        "corpus": digest_rows([u.name, u.split] for u in utterances),
        "labels": digest_rows([u.name, *u.labels] for u in utterances),
        "encoder_sha256": model.encoder_sha256,
        "processes": PROCESSES,
        "trainable_parameters": models.count_parameters(models.trainable(model).values()),
        "total_parameters": models.count_parameters(model.parameters()),
        "device": device,
        "device_memory_bytes": memory,
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
    }
    # `run` and `make_datasets` fill these in.
    config |= dict.fromkeys(["audio", "cache", "cache_contents", "fill_seconds"])
    del config["resume"]  # So a resumed run's file is that of an undisturbed one.
    return config


def identify(config):
    """Of config.json, what a run and its continuation have in common: it tells runs apart, and with
    the encoder it is enough to rebuild the model. last.pt and best.pt hold it."""
    return {key: value for key, value in config.items() if key not in MAY_DIFFER}


def digest_rows(rows):
    """A digest of lists in their order. With utterances in another order, batches would differ."""
    return hashlib.sha256(json.dumps(list(rows)).encode()).hexdigest()


def make_datasets(args, model, utterances, config):
    """{split: dataset}, from audio or from a cache. A cache is first filled with what it lacks, and
    `config` is told what it then holds. With --skip-bad, utterances whose audio cannot be used are
    not filled, and left out.

    The model's cut becomes the cache's, as `suffix` has to begin where the stored hidden states
    end. `batches` sorts by `frames`, whatever a dataset's `lengths` count. ValueError for a split
    that is too small.
    """
    if args.cached:
        cache.fill_missing(args.cache, model, utterances, args)
        exchange("filled")  # All processes wait here until the cache is filled.
        if args.device == "cuda":
            torch.cuda.reset_peak_memory_stats()  # The peak is to be that of training.
        entries, fingerprint, seconds = cache.read_entries(args.cache)
        utterances = [u for u in utterances if u.name in entries]
        config |= {
            # An empty cache has no dtype. It is refused below, as its splits are empty.
            "cache": f"cut {model.cut}, {fingerprint.get('dtype')}",
            "cache_contents": digest_rows([u.name, entries[u.name].checksum] for u in utterances),
            "fill_seconds": seconds,
        }
    # A CCC needs two utterances, and each process a share of every batch of training.
    data.require(utterances, args.splits, max(2, PROCESSES))
    datasets = {}
    for split in args.splits:
        part = [u for u in utterances if u.split == split]
        if args.cached:
            dataset = cache.CachedDataset(entries, part)
            dataset.frames = dataset.lengths
        else:
            dataset = data.SpeechDataset(part, model.sample_rate)
            dataset.frames = [model.count_frames(n) for n in dataset.lengths]
        datasets[split] = dataset
    return datasets


def check_place(args):
    """ValueError where this run would write over files in --out that no run has written."""
    path = args.out / "config.json"
    # A run writes it first. An encoder has a config.json, too, but without a seed.
    if path.exists() and b'"seed"' in path.read_bytes():
        return
    names = ["config.json", "metrics.jsonl", "result.json", f"predictions-{args.splits[2]}.csv"]
    foreign = [name for name in names if (args.out / name).exists()]
    if foreign:
        raise ValueError(
            f"'{args.out}' holds no run, and {foreign} would be lost: give a new --out"
        )


def compare_run(args, config, ignored):
    """Compare what --out holds with this run, in all but the ignored keys of config.json -> whether
    it is this run, finished.

    ValueError if --out holds epochs that may not be continued. Without --resume, none may. With it,
    not those of another run, nor of a longer one. Any .pt file counts as an epoch, as a new run
    might write over it. A result whose epochs were deleted does not count.
    """
    if not any(args.out.glob("*.pt")):
        return False
    if not args.resume:
        raise ValueError(f"'{args.out}' holds a run; --resume continues it, or give another --out")
    path = args.out / "result.json"  # It has all that config.json has.
    if not path.exists():
        path = args.out / "config.json"
    with models.blame(path):
        saved = json.loads(path.read_text())
        keys = [key for key in config if key not in ignored and saved.get(key) != config[key]]
        if saved["epochs"] > args.epochs:
            keys.append("epochs")
        others = "; ".join(f"{key} {saved.get(key)}, not {config[key]}" for key in keys[:3])
    if keys:
        raise ValueError(f"'{args.out}' is of a run with {others}; give the same, or another --out")
    # Only a result.json has this key. A config.json lacks it, and is of a run that goes on.
    return saved["epochs"] == args.epochs and saved.get("out_of_memory") is False


def start_run(args, config, model, optimizer, scaler):
    """Put all back as last.pt has it after the last finished epoch, if any -> history and best,
    which are [] and None of a new run.

    Then, once all processes agree, begin in the run folder: remove an earlier result.json, and
    write config.json. Of a resumed run, best.pt and metrics.jsonl are written anew from last.pt.
    ValueError where processes do not agree, or last.pt is not of this run.
    """
    history = []
    best = None
    if any(args.out.glob("*.pt")):
        with models.blame(args.out / "last.pt") as path:
            last = torch.load(path, map_location="cpu", weights_only=True)
            best = last["best"]
            if best["settings"] != identify(config):
                raise ValueError("it is of another run, or of an older version")
            models.load_trained(model, last["weights"])
            optimizer.load_state_dict(last["optimizer"])
            scaler.load_state_dict(last["scaler"])
            history = [dict(line) for line in last["history"]]  # An error, if a line is no dict.
    # Here all wait until each process has read what it needs of the run folder. And on separate
    # disks they may have read different files.
    mine = [identify(config), args.epochs, len(history)]
    if exchange(mine) != [mine] * PROCESSES:
        raise ValueError("processes differ in arguments, corpus, cache, or the epoch to resume at")
    if RANK == 0:
        (args.out / "result.json").unlink(missing_ok=True)  # of fewer epochs, or out of memory
        write_json(args, "config.json", config)
    if history:
        # The run may have been killed after it wrote last.pt, and before what is made from it.
        save_epoch(args, last)
    return history, best


def save_epoch(args, last):
    """Write last.pt, all that the next epoch depends on, and then what is made from it: best.pt and
    metrics.jsonl."""
    if RANK > 0:
        return
    for name, content in (("last.pt", last), ("best.pt", last["best"])):
        with cache.atomic(args.out / name) as file:
            torch.save(content, file)
    with cache.atomic(args.out / "metrics.jsonl", "w") as file:
        file.writelines(json.dumps(line) + "\n" for line in last["history"])


def write_json(args, name, content):
    with cache.atomic(args.out / name, "w") as file:
        json.dump(content, file, indent=1, default=str)  # --out is a Path.


def report_epoch(line, is_best, args):
    """Print what metrics.jsonl says of an epoch, and how long the remaining ones will take."""
    seconds = line["train_seconds"] + line["eval_seconds"]
    left = timedelta(seconds=round((args.epochs - line["epoch"]) * seconds))
    print(
        f"epoch {line['epoch']}/{args.epochs}, {line['steps']} steps: loss {line['loss']:.4f},"
        f" {args.splits[1]} {format_scores(line['dev'])}{' (best)' * is_best},"
        f" {seconds:.1f} s, {left} left"
    )


def format_scores(scores):
    return " ".join(f"{attribute} {score:z.4f}" for attribute, score in scores.items())


def peak_memory(device):
    """Bytes at the peak of this process: allocated on the GPU or, on a CPU, resident."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    status = Path("/proc/self/status")
    if status.exists():  # On Linux, ru_maxrss starts at the parent's.
        words = status.read_text().split()
        return 1024 * int(words[words.index("VmHWM:") + 1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in bytes on macOS


# ---- command line ----


def demo(folder):
    """Arguments that train the last 3 layers of a tiny encoder from a cache, on synthetic speech.
    Corpus and encoder are made first, if they are not there. ValueError in several processes."""
    if PROCESSES > 1:
        raise ValueError("--demo runs in one process")
    corpus = f"{folder}/corpus"
    if not os.path.exists(corpus):
        data.make_demo(corpus)
    line = """--data={0}/corpus --model={0}/corpus/encoder --cache={0}/cache --out={0}/run --resume
        --layers 3 --padding exact --chunk 4 --precision fp32 --epochs 10 --lr 2e-3"""
    return parse_args([word.format(folder) for word in line.split()])


def add_number(parser, name, default, text, least=1, below=math.inf):
    """Add an option for a number from `least` to below `below`. It is of the default's type or,
    without a default, an int."""

    def number(cell):
        value = type(default or 0)(cell)
        if not least <= value < below:  # NaN is refused, too.
            raise argparse.ArgumentTypeError(f"must be at least {least}, and below {below}")
        return value

    parser.add_argument(name, type=number, default=default, help=text)


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Train one row and one seed of Table I.")
    add = parser.add_argument
    flag = partial(add, action="store_true")
    number = partial(add_number, parser)
    flag("--demo", help="synthetic speech, in demo/ or --out; ignores the rest")
    add("--data", help="corpus folder in MSP-Podcast's layout (section III of the paper)")
    add("--model", default="facebook/wav2vec2-base", help="hub id or folder (%(default)s, IV-A)")
    add("--out", help="run folder, new or to --resume")
    number("--seed", 0, "the paper runs five (%(default)s, section V)", 0, 10**9)
    flag("--resume", help="continue after the last finished epoch, if any")
    names = data.SPLITS[:-1]  # The labels of the last, Test3, are withheld.
    text = "to train on, choose the epoch by, test on (%(default)s, III)"
    add("--splits", nargs=3, default=names[:3], choices=names, metavar="NAME", help=text)
    text = "to predict (%(default)s, III)"
    add("--attributes", nargs="+", default=data.PAPER, choices=data.ATTRIBUTES, help=text)
    text = "ends of the labels' scale (%(default)s, III)"
    add("--scale", nargs=2, type=float, default=data.SCALE, help=text)
    flag("--skip-bad", help="go on without utterances that cannot be used")
    text = "what is trained (%(default)s, IV-B)"
    add("--method", default="partial", choices=models.METHODS, help=text)
    number("--layers", None, "the last n transformer layers (partial: 3; lora: all; IV-B)")
    number("--rank", 8, "lora: rank of the update (%(default)s, IV-B)")
    number("--alpha", 16.0, "lora: its output is scaled by alpha / rank (%(default)s, IV-B)", 1e-9)
    number("--lora-dropout", 0.1, "lora: dropout of its input (%(default)s, IV-B)", 0, 1)
    number("--dropout", 0.2, "before the head (%(default)s, IV-A)", 0, 1)
    text = "fp16 on CUDA (IV-B); on a CPU bf16 if it has instructions for it, else fp32"
    add("--precision", choices=PRECISIONS, help=text)
    add("--cache", help="train from this cache, and fill first what it lacks (IV-C)")
    flag("--freeze-embedding", help="partial: freeze all that a cache freezes (IV-C)")
    text = "paper: the mean is over padding, too (IV-B); exact: as if alone (%(default)s)"
    add("--padding", default="paper", choices=models.PADDINGS, help=text)
    text = "utterances a forward pass; saves padding if exact, and memory with --recompute"
    number("--chunk", None, text)
    flag("--recompute", help="with --chunk: keep one chunk's activations, compute twice (II-D)")
    number("--epochs", 5, "passes over the training split (%(default)s, IV-D)")
    number("--batch-size", 32, "utterances in the loss, of all processes (%(default)s, IV-D)")
    number("--eval-batch-size", None, "in paper padding it changes scores (--batch-size)")
    number("--lr", 1e-4, "AdamW's learning rate, fixed (%(default)s, IV-D)", 1e-9)
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    number("--workers", 2, "threads that load data ahead of the model (%(default)s)")
    args = parser.parse_args(argv)
    if args.demo:
        return demo(args.out or "demo")
    check_options(parser.error, args)
    return resolve(args)


def check_options(error, args):
    """Call `error`, which ends the program with a line, where options make no sense together."""
    if not (args.data and args.out):
        error("--data and --out are required (or --demo)")
    if args.freeze_embedding and (args.method == "lora" or args.cache):
        error("--freeze-embedding: lora and --cache freeze the embedding anyway")
    if args.method != "lora" and (args.rank, args.alpha, args.lora_dropout) != (8, 16, 0.1):
        error("--rank, --alpha and --lora-dropout need --method lora")
    names = args.splits + args.attributes
    if len(set(names)) < len(names):
        error("--splits: three different splits; --attributes: each once")
    if args.batch_size < max(2, PROCESSES):
        error("--batch-size: the CCC needs two utterances, and each process one")


def resolve(args):
    """Fill in what depends on other arguments or on the machine."""
    args.device = models.choose_device(args.device)
    args.precision_reason = "as asked"
    if args.precision is None:
        args.precision, args.precision_reason = choose_precision(args.device)
    args.out = Path(args.out)
    args.cached = args.cache is not None
    args.freeze_embedding |= args.cached
    args.eval_batch_size = args.eval_batch_size or args.batch_size
    if args.method == "partial":
        args.layers = args.layers or 3
    if os.path.isdir(args.model):
        args.model = os.path.abspath(args.model)  # So predict finds it from any folder.
    return args


def choose_precision(device):
    """Mixed precision where it is faster, and the reason: fp16 on a GPU, and bf16
    on a CPU that has instructions for it. Without them, bf16 takes 22 times as long as fp32."""
    if device == "cuda":
        return "fp16", "mixed, as in the paper"
    able = {}
    if hasattr(torch.cpu, "get_capabilities"):  # An older PyTorch does not tell.
        able = torch.cpu.get_capabilities()
    if able.get("avx512_bf16") or able.get("amx_bf16"):
        return "bf16", "its instructions found"
    return "fp32", "no bf16 instructions found"


def main(argv=None):
    cache.process_numbers()  # RANK without WORLD_SIZE, or the reverse, is an error
    args = parse_args(argv)
    if PROCESSES > 1:
        # Filling a cache may take one process much longer than another.
        backend = "nccl" if args.device == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=24))
    # Only process 0 prints: where there is no stdout, print does nothing.
    with contextlib.redirect_stdout(sys.stdout if RANK == 0 else None):
        run(args)
    if PROCESSES > 1:
        dist.destroy_process_group()


if __name__ == "__main__":
    shell(main)  # An error becomes one line and an exit status.
