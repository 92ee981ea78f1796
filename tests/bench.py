"""Which row of Table I should I run on this machine, and what will it cost? Random weights of
wav2vec2-base, random audio with lengths like MSP-Podcast's, and the functions that training uses.

    python tests/bench.py                       # every row and target
    python tests/bench.py --quick               # fewer of them
    python tests/bench.py --device cuda --json figures.json
    python tests/bench.py --rows "full fp32,recommended mixed" --batch 8
    python tests/bench.py --memory              # peaks at batch 32; a CPU needs 34 GB, or swap

Figures are for a batch of 32, of lengths evenly spread over the distribution. CUDA runs it whole. A
CPU runs the `--batch` longest of the 32, or of a chunked row twice as many (at most 4) of its
middle chunk; the time of forward and backward is scaled up by what was left out, the optimizer's is
not.

mixed: fp16 on CUDA, bf16 on a CPU. s/step: median of forward, loss, backward and AdamW on a batch
in memory; rows take turns. faster: than full fp32. peak: weights, optimizer and activations, on a
CPU of what is run, Python with its libraries included. of limit: the step's arithmetic, padding
included, over the rate of a large matrix product in that precision just before (on CUDA PyTorch
runs convolutions in TF32 by default, so fp32 rows may pass 100 %); useful: the same of true frames
only. hours: 5 epochs over MSP-Podcast's Train. Every ratio is of one run. Linux only. Nothing is
left on disk.
"""

import argparse
import contextlib
import copy
import ctypes
import functools
import gc
import io
import json
import math
import os
import re
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import soundfile
import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from transformers import Wav2Vec2Config, Wav2Vec2Model

START, ROOT = time.perf_counter(), Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cache
import data
import model as models
import train
from ccc import ccc_loss

EPOCHS, BATCH = 5, 32
RATE, WIDTH = 16000, 768
SEGMENTS = {"Train": 84030, "Development": 19815, "Test1": 30647}  # MSP-Podcast 1.11
SPLITS = {**SEGMENTS, "Test2": 14815, "Test3": 2347}
AUDIO = {"sample_rate": RATE, "normalise": True}
FINGERPRINT = cache.cache_fingerprint("bench", 9, "float16", AUDIO)


def spread(n):
    """n lengths in samples, from short to long, evenly spread over an exponential distribution cut
    to 2.75 to 11 s, mean 5.65 s; random batches of 32 padded to their longest are then 54 % speech,
    as MSP-Podcast's."""
    quantiles, rate = (np.arange(n) + 0.5) / n, 0.2283
    seconds = 2.75 - np.log(1 - quantiles * (1 - math.exp(-8.25 * rate))) / rate
    return torch.from_numpy(seconds * RATE).long()


LENGTHS = spread(BATCH)

ROWS = {}  # name: (options of train.py, the paper's hours: cached on an RTX 2080 Ti, else on an A40)
for title, line, *paper in (
    ("lora", "--method lora", 2.476),
    ("partial 1", "--layers 1", 2.443, 0.965),
    ("partial 2", "--layers 2", 2.477, 0.982),
    ("partial 3", "", 2.519, 0.991),
    ("freeze-prefix 3", "--freeze-prefix", None, None),
    ("full", "--method full", 2.980, 1.145),
    ("recommended", "--cache x --padding exact --chunk 4", None, None),
    ("cached 3", "--cache x", 1.023, 0.353),
    ("cached 2", "--layers 2 --cache x", 0.689, 0.253),
    ("cached 1", "--layers 1 --cache x", 0.353, 0.155),
    ("lora 3 cached chunked", "--method lora --layers 3 --cache x --padding exact --chunk 4", None),
    ("full chunked", "--method full --padding exact --chunk 4", None),
    ("full chunked recomputed", "--method full --padding exact --chunk 4 --recompute", None),
):
    for precision, hours in zip(("fp32", "mixed"), paper, strict=False):
        ROWS[f"{title} {precision}"] = line, hours
QUICK = ["partial 3 fp32", "freeze-prefix 3 fp32", "full fp32", "recommended fp32"]
QUICK += ["recommended mixed", "cached 3 fp32"]
PEAKS = ["full fp32", "full chunked recomputed fp32"]
TABLE_2 = [*PEAKS, "full mixed", "partial 3 fp32", "partial 3 mixed", "lora fp32"]
RATIOS = {  # target: (slower row, faster row)
    "recommended_vs_full": ("full fp32", "recommended mixed"),
    "recommended_vs_full_in_fp32": ("full fp32", "recommended fp32"),
    "recommended_vs_paper_cached": ("cached 3 mixed", "recommended mixed"),
    "recommended_vs_paper_cached_in_fp32": ("cached 3 fp32", "recommended fp32"),
    "freeze_prefix_vs_paper_partial": ("partial 3 mixed", "freeze-prefix 3 mixed"),
    "freeze_prefix_vs_paper_partial_in_fp32": ("partial 3 fp32", "freeze-prefix 3 fp32"),
}
COMPARED = {name for pair in RATIOS.values() for name in pair}
TARGETS = {  # name: (at least or at most, what)
    "recommended_vs_full": (">=", 30),
    "recommended_vs_paper_cached": (">=", 2.5),
    "freeze_prefix_vs_paper_partial": (">=", 1.3),
    "loop_overhead": ("<=", 1.05),
    "loop_overhead_cached": ("<=", 1.05),
    "waiting_share": ("<=", 0.05),
    "waiting_share_cached": ("<=", 0.05),
    "fill_vs_prefix": (">=", 0.9),
    "fill_vs_one_at_a_time": (">=", 1),
    "bytes_a_frame": ("<=", 1540),
    "shuffled_vs_ordered": (">=", 0.8),
    "resident_memory_fill": ("<=", 1.1),
    "resident_memory_train": ("<=", 1.1),
    "recompute_memory": ("<=", 0.25),
    "resample_x_realtime": (">=", 100),
    "epoch_exponent": ("<=", 1.05),
    "startup_seconds": ("<=", 10),
    "startup_cached_seconds": ("<=", 10),
}


def progress(text):
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", file=sys.__stderr__, flush=True)


def timed(function, *args):
    """(seconds, result) of a call."""
    wait = torch.cuda.synchronize if torch.cuda.is_initialized() else lambda: None
    wait()
    start = time.perf_counter()
    result = function(*args)
    wait()
    return time.perf_counter() - start, result


class Memory:
    """As a context: bytes of this process at its `start` and at the `peak` until its end. Allocated
    by PyTorch on CUDA; on a CPU resident or swapped out, sampled every 20 ms."""

    def __init__(self, device):
        self.cuda, self.stop = device == "cuda", threading.Event()

    def now(self):
        if self.cuda:
            return torch.cuda.memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith(("VmRSS:", "VmSwap:")))

    def sample(self):
        while not self.cuda and not self.stop.wait(0.02):
            self.peak = max(self.peak, self.now())

    def __enter__(self):
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that using it counts
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        self.start = self.peak = self.now()
        self.thread = threading.Thread(target=self.sample, daemon=True)
        self.thread.start()
        return self

    def __exit__(self, *_):
        self.stop.set()
        self.thread.join()
        self.peak = torch.cuda.max_memory_allocated() if self.cuda else self.peak


def base_encoder():
    torch.manual_seed(0)
    return Wav2Vec2Model(Wav2Vec2Config(attn_implementation="sdpa"))


def arguments(name, device):
    """What train.py makes of a row's options."""
    precision = "fp32" if name.endswith("fp32") else "fp16" if device == "cuda" else "bf16"
    line = f"--data x --out x --device {device} --precision {precision} {ROWS[name][0]}"
    return train.parse_args(line.split())[1]


def build(encoder, args):
    model = models.EmotionModel(encoder, padding=args.padding)
    models.freeze(model, args.method, args.layers, args.freeze_prefix or args.cached)
    return model


class Job:
    """A model and an optimizer, and what a step of train.train_epoch does with a batch, without its
    checks."""

    def __init__(self, args, encoder):
        self.args, self.model = args, build(copy.deepcopy(encoder), args).to(args.device).train()
        self.optimizer = torch.optim.AdamW(models.trainable(self.model).values(), lr=1e-4)
        self.scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")

    def backward(self, inputs, lengths, targets):
        how = self.args.device, self.args.cached, self.args.chunk, self.args.recompute
        with train.autocast(self.args):
            predictions = train.predict(self.model, inputs, lengths, *how)
        self.scaler.scale(ccc_loss(predictions, targets)).backward()

    def update(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def step(self, *batch):
        self.backward(*batch)
        self.update()

    def epoch(self, loader):
        rest = self.optimizer, self.scaler, self.args, 1 / RATE, "epoch"
        return train.train_epoch(self.model, loader, *rest)


def frames(samples):
    return (samples - 80) // 320  # of wav2vec2's convolutions


def make_batch(lengths, cached, device):
    """Noise in place of waveforms or hidden states: what train.predict takes, and targets."""
    lengths = frames(lengths) if cached else lengths
    inputs = torch.randn(len(lengths), int(lengths.max()), *[WIDTH] * cached)
    inputs = inputs.half() if cached else inputs
    return inputs.to(device), lengths, torch.rand(len(lengths), 2).to(device)


def chunks(args):
    """Lengths in samples (chunks, utterances of each), from short to long: each chunk is padded to
    its last."""
    return LENGTHS.view(-1, args.chunk or BATCH)


def portion(args, n):
    """Lengths in samples of what is run in place of the batch of 32, and how much more that is."""
    if n >= BATCH:
        return LENGTHS, 1.0
    each = chunks(args)
    # about half as long in the middle, so twice as many make as many frames
    middle = each[len(each) // 2, -2 * n if args.chunk else -n :]
    padded = each[:, -1].sum() * each.shape[1]
    return middle, (padded / (middle[-1] * len(middle))).item()


@functools.cache
def flops(line):
    """(b, a): with these options an utterance of T frames takes a T + b T² floating point
    operations a step, recomputation not counted twice. Counted on shapes alone."""
    args = train.parse_args(["--data", "x", "--out", "x", *line.split()])[1]
    with torch.device("meta"):
        model = build(base_encoder(), args)
    # PyTorch's own rule leaves out that the convolution with a backward pass has groups
    both = lambda gradient, x, weight, *_, **__: 2 * conv_flop_count(x, weight, gradient)
    rule = {torch.ops.aten.convolution_backward: both}
    counts = {}
    for samples in (5 * RATE, 10 * RATE):
        inputs, lengths, _ = make_batch(torch.tensor([samples]), args.cached, "meta")
        with FlopCounterMode(display=False, custom_mapping=rule) as counter:
            train.predict(model, inputs, lengths, "meta", args.cached).sum().backward()
        counts[frames(samples)] = counter.get_total_flops() / frames(samples)
    return np.polyfit(list(counts), list(counts.values()), 1)


def arithmetic(line, lengths):
    """Floating point operations of a step on utterances of these lengths, alone or so padded."""
    (b, a), t = flops(line.partition("--padding")[0]), frames(lengths)
    return (a * t + b * t * t).sum().item()


def matmul_rate(precision, device):
    """Floating point operations a second of a large matrix product, the best of some."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=train.PRECISIONS[precision])
    return 2 * n**3 / min(timed(torch.mm, a, a)[0] for _ in range(4))


def measure_row(name, encoder, options, base):
    """One turn of a row: the matrix product rate just before, the median seconds of a step at batch
    32, and peak bytes."""
    args, spent, steps = arguments(name, options.device), 0.0, []
    lengths, scale = portion(args, options.batch)
    rate = matmul_rate(args.precision, args.device)
    with Memory(args.device) as memory:
        job, batch = Job(args, encoder), make_batch(lengths, args.cached, args.device)
        short = make_batch(torch.tensor([4000, 4800]), args.cached, args.device)
        for _ in range(1 if scale > 1 else 5):  # in fp16 until the scaler has settled
            job.step(*(short if scale > 1 else batch))
        while spent < 1:
            (backward, _), (update, _) = timed(job.backward, *batch), timed(job.update)
            steps.append(backward * scale + update)
            spent += backward + update
    return rate, statistics.median(steps), memory.peak - memory.start + base


def measure_rows(options, encoder, base):
    """([figures of a row], {target: ratio}). On CUDA rows take three turns, and those that do not
    fit in its memory are left out; on a CPU those that a target names take two, others, and all
    with --quick, one."""
    turns, results, ratios = {name: [] for name in options.rows}, [], {}
    for n in range(3 if options.device == "cuda" else 1 if options.quick else 2):
        for name, done in turns.items():
            if n == 0 or done and (name in COMPARED or options.device == "cuda"):
                try:
                    done.append(measure_row(name, encoder, options, base))
                    progress(f"turn {n + 1}: {name} {done[-1][1]:.3f} s")
                except RuntimeError as error:
                    if not cache.out_of_memory(error):
                        raise
                    progress(f"{name}: out of memory")
    turns = {name: done for name, done in turns.items() if done}
    for name, done in turns.items():
        seconds = statistics.median(seconds for _, seconds, _ in done)
        limit = statistics.median(rate * seconds for rate, seconds, _ in done)
        line, each = ROWS[name][0], chunks(arguments(name, options.device))
        whole, useful = (arithmetic(line, x) for x in (each[:, -1:].expand_as(each), LENGTHS))
        row = {"name": name, "turns": len(done), "seconds_per_step": seconds}
        row["speech_seconds_per_second"] = LENGTHS.sum().item() / RATE / seconds
        row |= {"peak_memory_bytes": max(peak for _, _, peak in done), "flops": whole}
        row |= {"share_of_limit": whole / limit, "useful_share_of_limit": useful / limit}
        row["hours_5_epochs"] = seconds * SEGMENTS["Train"] / BATCH * EPOCHS / 3600
        results.append(row | {"paper_hours": ROWS[name][1]})
    full = [row["seconds_per_step"] for row in results if row["name"] == "full fp32"]
    for row in results:
        row["factor_vs_full"] = full[0] / row["seconds_per_step"] if full else None
    for target, (slow, fast) in RATIOS.items():
        if slow in turns and fast in turns:
            pairs = zip(turns[slow], turns[fast], strict=False)  # a turn may lack memory
            ratios[target] = statistics.median(a[1] / b[1] for a, b in pairs)
    return results, ratios


def write_corpus(root, n, lengths):
    """A corpus of n utterances split as MSP-Podcast: names of their own for a few files of noise,
    one of each length."""
    (root / "Audios").mkdir(parents=True)
    (root / "Labels").mkdir()
    sources, rng = [], np.random.default_rng(0)
    for i, samples in enumerate(lengths.tolist()):
        sources.append(root / f"source-{i}.wav")
        soundfile.write(sources[-1], 0.1 * rng.standard_normal(samples), RATE, subtype="PCM_16")
    share = np.array([*SPLITS.values()]) / sum(SPLITS.values())
    splits = rng.choice([*SPLITS], n, p=share)
    with open(root / "Labels" / "labels_consensus.csv", "w") as file:
        file.write("FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set\n")
        for i, split in enumerate(splits):
            os.symlink(sources[i * 13 % len(sources)], root / "Audios" / f"{i:06}.wav")
            file.write(f"{i:06}.wav,N,4.{i % 10},3.{i % 7},4.0,{i // 100},Male,{split}\n")


def fill(folder, utterances, encode, width=WIDTH, size=8):
    """A CachedDataset of what `encode` makes of utterances."""
    os.makedirs(folder)
    items = data.SpeechDataset(utterances, **AUDIO)
    lengths = [frames(u.samples) for u in utterances]
    how = width, encode, data.collate, size
    index = cache.fill(folder, FINGERPRINT, items, lengths, *how)
    return cache.CachedDataset(folder, utterances, index)


def noise(width):
    """In place of a model's prefix, for `fill`."""
    hidden = torch.randn(8, 560, width)
    return lambda wave, samples: hidden[: len(wave)]


def watched(loader, waits, steps, job=None, bare=None):
    """The batches of a loader. Notes how long it lets the loop wait for one, and how long until the
    loop wants the next. With a job it then takes a bare step on the same batch in memory: what the
    machine does at the moment then counts for both."""
    start = time.perf_counter()
    for batch in loader:
        waits.append(time.perf_counter() - start)
        yield batch
        steps.append(time.perf_counter() - start)
        if job:
            device = job.args.device
            batch = batch[0].to(device), batch[1], batch[2].to(device)
            bare.append(timed(job.step, *batch)[0])
        start = time.perf_counter()


def measure_loop(job, dataset):
    """(train.train_epoch's step against a bare one: the median ratio; share of the time that it
    waits for data). Without the first step of an epoch, in which the loader's processes start and
    what they share with this one is copied as it changes."""
    loader = train.make_loader(dataset, None, job.args, 1)
    waits, steps, pairs, bare = [], [], [], []
    job.epoch(watched(loader, waits, steps))  # without pauses for the loader to work ahead in
    job.epoch(watched(loader, [], pairs, job, bare))
    ratios = [a / b for a, b in zip(pairs[1:], bare[1:], strict=True)]
    return statistics.median(ratios), sum(waits[1:]) / sum(steps[1:])


def measure_fill(encoder, utterances, folder, device):
    """Frames a second of cache.fill in batches of 8, of its model alone, and on CUDA of filling
    one utterance at a time."""
    model, spent = models.EmotionModel(encoder, padding="exact").to(device).eval(), []

    @torch.no_grad()
    def encode(wave, samples):  # as cache.py does
        seconds, (hidden, _) = timed(model.prefix, wave.to(device), samples.to(device), 9)
        spent.append(seconds)
        return hidden.cpu()

    encode(torch.randn(1, RATE), torch.tensor([RATE]))
    spent.clear()
    total = sum(frames(u.samples) for u in utterances)
    speeds = {"fill": total / timed(fill, folder / "fill-8", utterances, encode)[0]}
    speeds["prefix"] = total / sum(spent)
    if device == "cuda":
        alone = timed(fill, folder / "fill-1", utterances, encode, WIDTH, 1)
        speeds["alone"] = total / alone[0]
    return speeds


def measure_reading(dataset):
    """Bytes a second of a cache read in order and shuffled, its files not in memory."""
    orders = {"ordered": range(len(dataset)), "shuffled": torch.randperm(len(dataset)).tolist()}
    seconds = {name: [] for name in orders}
    for name, order in [*orders.items()] * 3:
        for path in Path(dataset.folder).glob("*.pt"):
            with open(path) as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        seconds[name].append(timed(list, map(dataset.__getitem__, order))[0])
    size = sum(dataset.lengths) * WIDTH * 2
    return {name: size / statistics.median(s) for name, s in seconds.items()}


def measure_startup(root, encoder):
    """Seconds of reading 150,000 label rows, of looking into the audio files, and of opening a
    cache of all."""
    write_corpus(root, 150_000, LENGTHS[:1])
    read, (utterances, problems) = timed(data.read_corpus, root)
    choose, utterances = timed(data.select, utterances, problems, SEGMENTS)
    inspect, _ = timed(data.check_audio, utterances)
    entry = ["shard-00000.pt", 0, 281, 0, cache.audio_state(utterances[0].path)]
    index = {"fingerprint": FINGERPRINT, "seconds": 0.0, "shards": {}}
    cache.write_index(root, index | {"utterances": {u.name: entry for u in utterances}})
    parts = {split: [u for u in utterances if u.split == split] for split in SEGMENTS}
    args, model = SimpleNamespace(cached=True, cache=root), SimpleNamespace(cut=9, encoder=encoder)
    opened, _ = timed(train.make_datasets, args, parts, model, AUDIO, "bench")
    return {"labels": read + choose, "inspect_audio": inspect, "open_cache": opened}


def measure_resampling(folder):
    """Seconds of sound a second of data.load_audio on a stereo file at 44.1 kHz."""
    path, seconds = str(folder / "44100.wav"), 11
    sound = np.random.default_rng(0).uniform(-0.1, 0.1, (seconds * 44100, 2))
    soundfile.write(path, sound, 44100, subtype="PCM_16")
    return seconds / statistics.median(timed(data.load_audio, path)[0] for _ in range(9))


def measure_epochs(folder, utterances, device):
    """{hours of speech: seconds of a training epoch of a tiny encoder from a cache}."""
    encoder, _ = models.load_encoder(folder / "tiny")
    job, seconds = Job(arguments("cached 1 fp32", device), encoder), {}
    width = encoder.config.hidden_size
    cached = fill(folder / "tiny-cache", utterances, noise(width), width)
    for n in (1, 1, 2, 4, 8) * 2:
        part = utterances[: n * len(utterances) // 8]
        items = cache.CachedDataset(cached.folder, part, cached.index)
        spent, _ = timed(job.epoch, train.make_loader(items, None, job.args, 1))
        hours = sum(u.samples for u in part) / RATE / 3600
        seconds[hours] = min(seconds.get(hours, math.inf), spent)
    return seconds


def measure_data(options, encoder, mixed, folder):
    """(targets, details) of loop, cache, audio path and sizes, on corpora in `folder`."""
    device, gpu, targets, details = options.device, options.device == "cuda", {}, {}
    write_corpus(folder / "corpus", 640, spread(640))
    utterances, _ = data.check_audio(data.read_corpus(folder / "corpus")[0])
    cached = fill(folder / "cache", utterances[:600], noise(WIDTH))
    size = sum(path.stat().st_size for path in cached.folder.iterdir())
    targets["bytes_a_frame"] = size / sum(cached.lengths)
    reading = details["cache_bytes_per_second"] = measure_reading(cached)
    targets["shuffled_vs_ordered"] = reading["shuffled"] / reading["ordered"]
    targets["resample_x_realtime"] = measure_resampling(folder)
    progress("cache filling")
    some = utterances[: 640 if gpu else 8 if options.quick else 16]
    speeds = details["fill_frames_per_second"] = measure_fill(encoder, some, folder, device)
    if options.quick:
        return targets, details
    targets["fill_vs_prefix"] = speeds["fill"] / speeds["prefix"]
    if gpu:
        targets["fill_vs_one_at_a_time"] = speeds["fill"] / speeds["alone"]
    # on a CPU few and short utterances: the loop's own cost is a larger part of a faster step
    held = utterances[:600] if gpu else sorted(utterances[:600], key=lambda u: u.samples)
    names = "recommended" if gpu else "cached 1", "freeze-prefix 3"
    for name, key, steps, batch in zip(names, ("_cached", ""), (24, 8), (4, 2), strict=True):
        progress(f"loop: {name}")
        args = arguments(f"{name} {'mixed' if mixed else 'fp32'}", device)
        args.batch_size = BATCH if gpu else batch
        some = held[: args.batch_size * (18 if gpu else steps)]
        items = cache.CachedDataset(cached.folder, some, cached.index)
        items = items if args.cached else data.SpeechDataset(some, **AUDIO)
        overhead, waiting = measure_loop(Job(args, encoder), items)
        targets |= {f"loop_overhead{key}": overhead, f"waiting_share{key}": waiting}
    progress("sizes, and start-up with 150,000 label rows")
    epochs = details["epoch_seconds_by_hours"] = measure_epochs(folder, utterances[:256], device)
    logs = np.log(list(epochs)), np.log(list(epochs.values()))
    targets["epoch_exponent"] = np.polyfit(*logs, 1)[0]
    startup = details["startup_seconds"] = measure_startup(folder / "many", encoder)
    targets["startup_seconds"] = startup["labels"] + startup["inspect_audio"]
    targets["startup_cached_seconds"] = startup["labels"] + startup["open_cache"]
    return targets, details


def child(*line):
    """(last line printed, peak resident bytes) of a Python command line in its own process."""
    line = [sys.executable, *map(str, line)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(line, cwd=ROOT, stdout=out, stderr=err)
        _, status, usage = os.wait4(process.pid, 0)
        out.seek(0)
        err.seek(0)
        if status:
            why = err.read().strip() or f"ended with status {status}; out of memory?"
            raise RuntimeError(f"{line[1]}: {why.splitlines()[-1]}")
        return (out.read().splitlines() or [""])[-1], usage.ru_maxrss * 1024


def measure_resident(folder):
    """{fill or train: peak resident bytes with 60 and with 600 utterances}, of commands with a
    tiny encoder, both sizes at once. Utterances of one length, so that no batch is larger by
    chance."""
    encoder = folder / "tiny"
    data.write_encoder(encoder, layers=1)

    def peaks(n):
        root, out = folder / f"corpus-{n}", folder / f"cache-{n}"
        write_corpus(root, n, LENGTHS[:1])
        common = ["--data", str(root), "--model", str(encoder), "--device", "cpu"]
        line = [*common, "--layer", "0", "--out", str(out)]
        # shards so small that there are several of 60 utterances, too
        code = f"import cache; cache.SHARD_BYTES = 2**20; cache.main({line})"
        filled = child("-c", code)[1]
        line = [*common, "--cache", out, "--layers", 1, "--out", folder / f"run-{n}"]
        return filled, child("train.py", *line, "--epochs", 1)[1]

    with ThreadPoolExecutor() as pool:
        small, large = pool.map(peaks, (60, 600))
    return {"fill": (small[0], large[0]), "train": (small[1], large[1])}


def row_child(name, device, caps):
    """Some steps of a row at batch 32, the longest 11 s: [peak bytes or None, and for each cap in
    GB whether that is enough, None for more than the card has]."""
    lengths, found, args = LENGTHS.clone(), [], arguments(name, device)
    lengths[-1] = 11 * RATE
    for cap in (None, *caps):
        if cap:
            share = cap * 1e9 / torch.cuda.get_device_properties(0).total_memory
            if share > 1:
                found.append(None)
                continue
            torch.cuda.set_per_process_memory_fraction(share)
        try:
            with Memory(device) as memory:
                job, batch = Job(args, base_encoder()), make_batch(lengths, args.cached, device)
                for _ in range(5 if args.precision == "fp16" else 2):  # the scaler's first skip
                    job.step(*batch)
            found.append(True if cap else memory.peak)
        except RuntimeError as error:
            if not cache.out_of_memory(error):
                raise
            found.append(False if cap else None)
        job = batch = None
        gc.collect()
        torch.cuda.empty_cache()
    return found


def measure_memory(device, caps):
    """{row: [peak bytes, and whether it fits in each cap]}, printed."""
    print("\nAt batch 32, each row in its own process; a cap on what PyTorch takes, not a card:")
    print(f"{'':32} peak GB" + "".join(f"{gb:>7g} GB" for gb in caps))
    table = {}
    for name in TABLE_2 if device == "cuda" else PEAKS:
        try:
            line = __file__, "--child", json.dumps([name, device, caps])
            peak, *fits = table[name] = json.loads(child(*line)[0])
        except RuntimeError as error:
            progress(error)
            peak, *fits = table[name] = [None] * (1 + len(caps))
        marks = "".join(f"{ {True: '✓', False: '✗', None: '?'}[fit]:>10}" for fit in fits)
        print(f"{name:32}{f'{peak / 1e9:.2f}' if peak else '-':>8}{marks}", flush=True)
    return table


def show_rows(rows, rates):
    print(f"\n{'':32} s/step  faster  speech-s/s  peak GB    limit  useful    hours  paper's")
    for r in rows:
        faster = f"{r['factor_vs_full']:.1f}" if r["factor_vs_full"] else "-"
        print(
            f"{r['name']:32}{r['seconds_per_step']:7.3f} {faster:>7} "
            f"{r['speech_seconds_per_second']:11.1f} {r['peak_memory_bytes'] / 1e9:8.2f} "
            f"{r['share_of_limit']:8.0%} {r['useful_share_of_limit']:7.0%} "
            f"{r['hours_5_epochs']:8.2f} {r['paper_hours'] or '-':>8}"
        )
    print("The paper's hours: cached rows on an RTX 2080 Ti, others on an A40.")
    print("Limit:", ", ".join(f"{p} {rate / 1e12:.3g} TFLOP/s" for p, rate in rates.items()))


def show_targets(targets, details):
    print()
    for name in {**TARGETS, **targets}:
        line = f"{name:42} {targets[name]:10.4g}" if name in targets else f"{name:42}   not run"
        if name in TARGETS and name in targets:
            sign, limit = TARGETS[name]
            met = targets[name] >= limit if sign == ">=" else targets[name] <= limit
            verdict = "met" if met else f"missed by {abs(targets[name] / limit - 1):.0%}"
            line += f"  target {sign} {limit:g}: {verdict}"
        print(line)
    total = sum(SEGMENTS.values()) * frames(spread(999)).double().mean().item()
    hours = total / details["fill_frames_per_second"]["fill"] / 3600
    print(
        f"\nA float16 cache of {', '.join(SEGMENTS)}: {total * 2 * WIDTH / 1e9:.0f} GB, "
        f"filled in {hours:.1f} hours on this machine."
    )


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--batch", type=int, help="utterances of the 32 that are run: 32 on CUDA; 1 on a CPU")
    add("--rows", help=f"comma-separated, of: {', '.join(ROWS)}")
    add("--quick", action="store_true", help="fewer rows and targets")
    add("--json", metavar="FILE", help="write all figures there")
    add("--memory", type=float, nargs="*", metavar="GB", help="peaks at 32; CUDA: caps (11 48)")
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    gpu = torch.cuda.is_available() and options.device != "cpu"
    if (options.device == "cuda" or options.memory) and not gpu:
        parser.error("--device cuda and caps for --memory need a CUDA device")
    options.device = "cuda" if gpu else "cpu"
    options.batch = options.batch or (BATCH if gpu else 1)
    if gpu and (options.memory is not None or not options.quick):
        options.memory = options.memory or [11.0, 48.0]
    options.rows = options.rows.split(",") if options.rows else QUICK if options.quick else [*ROWS]
    options.rows = [name.strip() for name in options.rows]
    unknown = [name for name in options.rows if name not in ROWS]
    if unknown or not 1 <= options.batch <= BATCH:
        parser.error(f"unknown rows {unknown}" if unknown else f"--batch 1 to {BATCH}")
    return options


def measure(options, folder):
    """All figures. Other processes come first: Linux counts what this one takes to those it starts,
    and they may need all of the GPU."""
    device, base, targets, details = options.device, Memory("cpu").now(), {}, {}
    if not options.quick:
        progress("resident memory")
        peaks = details["resident_bytes"] = measure_resident(folder)
        targets = {f"resident_memory_{kind}": p[1] / p[0] for kind, p in peaks.items()}
    if options.memory is not None:
        table = details["memory"] = measure_memory(device, options.memory)
        whole, chunked = (table[name][0] for name in PEAKS)
        if whole and chunked:
            targets["recompute_memory"] = chunked / whole
    cpu = re.search(r"model name\s*: (.*)|$", Path("/proc/cpuinfo").read_text())[1]
    machine = {"device": torch.cuda.get_device_name() if device == "cuda" else cpu or "CPU"}
    machine |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    fp32, half = "fp32", "fp16" if device == "cuda" else "bf16"
    rates = {precision: matmul_rate(precision, device) for precision in (fp32, half)}
    encoder = base_encoder()
    rows, ratios = measure_rows(options, encoder, 0 if device == "cuda" else base)
    show_rows(rows, rates)
    mixed = rates[half] > rates[fp32]
    if not mixed:
        print("Mixed precision multiplies more slowly here: take the fp32 rows (--precision fp32).")
    more, others = measure_data(options, encoder, mixed, folder)
    targets, details = targets | ratios | more, details | others
    show_targets(targets, details)
    machine["matmul_flops_per_second"] = rates
    return {"machine": machine, "rows": rows, "targets": targets, "details": details}


def main(argv=None):
    options = parse_args(argv)
    if options.child:
        return print(json.dumps(row_child(*json.loads(options.child))))
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        figures = measure(options, Path(folder))  # without tqdm's bars
    progress("done")
    if options.json:
        Path(options.json).write_text(json.dumps(figures | {"thresholds": TARGETS}, indent=1))


if __name__ == "__main__":
    main()
