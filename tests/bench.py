"""Which row of Table I should I run on this machine, and what will it cost? Random weights of
wav2vec2-base, random audio with lengths like MSP-Podcast's, and the functions that training uses.

    python tests/bench.py                       # every row and target
    python tests/bench.py --quick               # fewer of them
    python tests/bench.py --device cuda --json figures.json
    python tests/bench.py --rows "full fp32,recommended" --batch 8
    python tests/bench.py --memory              # peaks at batch 32: on a CPU of 34 GB, or with swap

Figures are for a batch of 32, of lengths evenly spread over the distribution. CUDA runs it whole. A
CPU runs `--batch` of the 32, padded to the longest of all, or of a chunked row its middle chunk of
4; the time of forward and backward is scaled up by what was left out, the optimizer's is not.

mixed: fp16 on CUDA, bf16 on a CPU. s/step: median of forward, loss, backward and AdamW on a batch
in memory; rows take turns. faster: than full fp32. peak: weights, optimizer and activations, on a
CPU of what is run, Python with its libraries included. of limit: the step's arithmetic, padding included, over the rate of a
large matrix product in that precision; useful: the same of true frames only. hours: 5 epochs over
MSP-Podcast's Train. Every ratio is of one run. Linux only. Nothing is left on disk.
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
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2Config, Wav2Vec2Model

START, ROOT = time.perf_counter(), Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cache
import data
import model as models
import train
from ccc import ccc_loss

EPOCHS, BATCH, CHUNK = 5, 32, 4
RATE, FRAMES_A_SECOND, WIDTH = 16000, 49.9, 768
SEGMENTS = {"Train": 84030, "Development": 19815, "Test1": 30647}  # MSP-Podcast 1.11
AUDIO = {"sample_rate": RATE, "normalise": True}


def quantiles(u):
    """Seconds at the quantiles u of an exponential distribution cut to 2.75 to 11 s, mean 5.65 s;
    random batches of 32 padded to their longest are then 54 % speech, as MSP-Podcast's."""
    rate = 0.2283
    return 2.75 - np.log(1 - u * (1 - math.exp(-8.25 * rate))) / rate


LENGTHS = torch.from_numpy(quantiles((np.arange(BATCH) + 0.5) / BATCH) * RATE).long()  # sorted


class Row(NamedTuple):
    method: str = "partial"
    layers: int | None = 3
    mixed: bool = False
    cached: bool = False
    freeze_prefix: bool = False
    exact: bool = False  # exact padding, in chunks; otherwise the paper's, in whole batches
    recompute: bool = False
    hours: float | None = None  # the paper's: uncached on an A40, cached on an RTX 2080 Ti


ROWS = {"lora fp32": Row("lora", None, hours=2.476)}
for title, row, *hours in (
    ("partial 1", Row(layers=1), 2.443, 0.965),
    ("partial 2", Row(layers=2), 2.477, 0.982),
    ("partial 3", Row(), 2.519, 0.991),
    ("freeze-prefix 3", Row(freeze_prefix=True)),
    ("full", Row("full", None), 2.980, 1.145),
    ("recommended", Row(cached=True, exact=True)),  # partial 3, cached, exact, chunked
    ("cached 3", Row(cached=True), 1.023, 0.353),
    ("cached 2", Row(layers=2, cached=True), 0.689, 0.253),
    ("cached 1", Row(layers=1, cached=True), 0.353, 0.155),
):
    for mixed in (False, True):
        paper = hours[mixed] if hours else None
        ROWS[f"{title} {'mixed' if mixed else 'fp32'}"] = row._replace(mixed=mixed, hours=paper)
ROWS["lora 3 cached exact chunk mixed"] = Row("lora", mixed=True, cached=True, exact=True)
ROWS["full exact chunk fp32"] = Row("full", None, exact=True)
ROWS["full exact chunk recompute fp32"] = Row("full", None, exact=True, recompute=True)
QUICK = ["partial 3 fp32", "freeze-prefix 3 fp32", "full fp32", "recommended fp32"]
QUICK += ["recommended mixed", "cached 3 fp32"]
PEAKS = "full fp32", "full exact chunk recompute fp32"
TABLE_2 = ("full fp32", "full mixed", "partial 3 fp32", "partial 3 mixed", "lora fp32", *PEAKS[1:])
RATIOS = {  # target: (slower row, faster row), in mixed precision as it is meant, and in fp32
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
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", file=sys.stderr, flush=True)


def timed(device, function, *args):
    """(seconds, result) of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(*args)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def quiet():
    """tqdm writes to memory instead of the terminal."""
    return contextlib.redirect_stderr(io.StringIO())


class Memory:
    """Bytes of this process, `now` and at the `peak` since its start: allocated by PyTorch on CUDA;
    on a CPU resident or swapped out, sampled every 20 ms. As a context."""

    def __init__(self, device):
        self.cuda, self.stop = device == "cuda", threading.Event()

    def now(self):
        if self.cuda:
            return torch.cuda.memory_allocated()
        lines = Path("/proc/self/status").read_text().splitlines()
        return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith(("VmRSS:", "VmSwap:")))

    def sample(self):
        while not self.stop.wait(0.02):
            self.peak = max(self.peak, self.now())

    def __enter__(self):
        gc.collect()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:
            ctypes.CDLL(None).malloc_trim(0)  # what was freed goes back, so that using it counts
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


class Job:
    """A row with train.py's arguments, its own model and optimizer."""

    def __init__(self, row, encoder, device, batch_size=BATCH):
        half = "fp16" if device == "cuda" else "bf16"
        self.args = args = SimpleNamespace(
            device=device, precision=half if row.mixed else "fp32", cached=row.cached, seed=0,
            padding="exact" if row.exact else "paper", chunk=CHUNK if row.exact else None,
            recompute=row.recompute, workers=2, batch_size=batch_size,
        )  # fmt: skip
        self.model = models.EmotionModel(copy.deepcopy(encoder), padding=args.padding)
        models.freeze(self.model, row.method, row.layers, row.freeze_prefix or row.cached)
        self.model.to(device).train()
        self.optimizer = torch.optim.AdamW(models.trainable(self.model).values(), lr=1e-4)
        self.scaler = torch.amp.GradScaler(device, enabled=args.precision == "fp16")

    def backward(self, inputs, lengths, targets):
        """The first half of a step of train.train_epoch, without its checks."""
        a = self.args
        with train.autocast(a):
            predictions = train.predict(
                self.model, inputs, lengths, a.device, a.cached, a.chunk, a.recompute
            )
        self.scaler.scale(ccc_loss(predictions, targets)).backward()

    def update(self):
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def step(self, *batch):
        self.backward(*batch)
        self.update()


def make_batch(lengths, cached, device):
    """Noise in place of waveforms or hidden states: what train.predict takes, and targets."""
    if cached:
        lengths = (lengths - 80) // 320  # wav2vec2's convolutions
    inputs = torch.randn(len(lengths), int(lengths.max()), *[WIDTH] * cached)
    inputs = inputs.half() if cached else inputs
    return inputs.to(device), lengths, torch.rand(len(lengths), 2).to(device)


def portion(row, n):
    """Lengths in samples of what is run in place of the batch of 32, and how much more that is."""
    if n >= BATCH:
        return LENGTHS, 1.0
    if not row.exact:
        return LENGTHS[-1:].repeat(n), BATCH / n
    chunks = LENGTHS.view(-1, CHUNK)  # the last of each is what it is padded to
    middle = chunks[len(chunks) // 2]
    return middle, (chunks[:, -1].sum() / middle[-1]).item()


@functools.cache
def flops(row, lengths, chunk):
    """Floating point operations of a step, recomputation not counted twice. Of shapes alone."""
    with torch.device("meta"):
        model = models.EmotionModel(base_encoder())
    models.freeze(model, row.method, row.layers, row.freeze_prefix or row.cached)
    inputs, lengths, _ = make_batch(torch.tensor(lengths), row.cached, "meta")
    with FlopCounterMode(display=False) as counter:
        train.predict(model, inputs, lengths, "meta", row.cached, chunk).sum().backward()
    return counter.get_total_flops()


def matmul_rate(precision, device):
    """Floating point operations a second of a large matrix product, the best of some."""
    n = 8192 if device == "cuda" else 1024
    a = torch.randn(n, n, device=device, dtype=train.PRECISIONS[precision])
    return 2 * n**3 / min(timed(device, torch.mm, a, a)[0] for _ in range(6))


def measure_row(row, encoder, options, base):
    """One turn of a row: the matrix product rate just before, the median seconds of a step at batch
    32, and peak bytes."""
    device, spent, steps = options.device, 0.0, []
    lengths, scale = portion(row, options.batch)
    with Memory(device) as memory:
        job, batch = Job(row, encoder, device), make_batch(lengths, row.cached, device)
        rate = matmul_rate(job.args.precision, device)
        short = make_batch(torch.tensor([4000, 4800]), row.cached, device)
        for _ in range(5 if device == "cuda" else 1):  # in fp16 until the scaler has settled
            job.step(*(batch if device == "cuda" else short))
        while spent < 1:
            backward, _ = timed(device, job.backward, *batch)
            update, _ = timed(device, job.update)
            steps.append(backward * scale + update)
            spent += backward + update
    peak = memory.peak - memory.start + (0 if device == "cuda" else base)
    return rate, statistics.median(steps), peak


def measure_rows(options, encoder, base):
    """([figures of a row], {target: ratio}, {fp32 or mixed: matrix product rate}). On a CPU rows of
    a target take three turns, others one."""
    turns, results, rates = {name: [] for name in options.rows}, [], {}
    for n in range(5 if options.device == "cuda" else 3):
        for name, done in turns.items():
            if n == 0 or name in COMPARED or options.device == "cuda":
                done.append(measure_row(ROWS[name], encoder, options, base))
                progress(f"turn {n + 1}: {name} {done[-1][1]:.3f} s")
    full = statistics.median(s for _, s, _ in turns.get("full fp32", [(0, math.nan, 0)]))
    for name, done in turns.items():
        row, precision = ROWS[name], "mixed" if ROWS[name].mixed else "fp32"
        seconds = statistics.median(seconds for _, seconds, _ in done)
        rates[precision] = max(rates.get(precision, 0), *(rate for rate, _, _ in done))
        limit = statistics.median(rate * seconds for rate, seconds, _ in done)
        lengths, scale = portion(row, options.batch)
        kind = row._replace(mixed=False, recompute=False, hours=None)
        arithmetic = scale * flops(kind, tuple(lengths.tolist()), CHUNK if row.exact else None)
        useful = 16 * sum(flops(kind, (n,), None) for n in LENGTHS[8::16].tolist())
        results.append({
            "name": name, "turns": len(done), "seconds_per_step": seconds,
            "factor_vs_full": full / seconds,
            "speech_seconds_per_second": LENGTHS.sum().item() / RATE / seconds,
            "peak_memory_bytes": max(peak for _, _, peak in done), "flops": arithmetic,
            "share_of_limit": arithmetic / limit, "useful_share_of_limit": useful / limit,
            "hours_5_epochs": seconds * SEGMENTS["Train"] / BATCH * EPOCHS / 3600,
            "paper_hours": row.hours,
        })  # fmt: skip
    ratios = {
        target: statistics.median(
            a[1] / b[1] for a, b in zip(turns[slow], turns[fast], strict=True)
        )
        for target, (slow, fast) in RATIOS.items()
        if slow in turns and fast in turns
    }
    return results, ratios, rates


def write_corpus(root, n, lengths=LENGTHS):
    """A corpus of n utterances in Train and n // 8 in Development and Test1: names of their own for
    a few files of noise, one of each length."""
    (root / "Audios").mkdir(parents=True)
    (root / "Labels").mkdir()
    sources, rng = [], np.random.default_rng(0)
    for i, samples in enumerate(lengths.tolist()):
        sources.append(root / f"source-{i}.wav")
        soundfile.write(sources[-1], 0.1 * rng.standard_normal(samples), RATE, subtype="PCM_16")
    splits = ["Train"] * n + ["Development"] * (n // 8) + ["Test1"] * (n // 8)
    with open(root / "Labels" / "labels_consensus.csv", "w") as file:
        file.write("FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set\n")
        for i, split in enumerate(splits):
            os.symlink(sources[i * 13 % len(sources)], root / "Audios" / f"{i:06}.wav")
            file.write(f"{i:06}.wav,N,4.{i % 10},3.{i % 7},4.0,{i // 100},Male,{split}\n")


def fill_noise(folder, utterances, width=WIDTH):
    """A CachedDataset filled with noise in place of a model's output."""
    noise = torch.randn(8, 560, width)
    frames = [(u.samples - 80) // 320 for u in utterances]
    fingerprint = cache.cache_fingerprint("bench", 9, "float16", AUDIO)
    os.makedirs(folder)
    with quiet():
        index = cache.fill(
            folder, fingerprint, data.SpeechDataset(utterances, **AUDIO), frames, width,
            lambda wave, samples: noise[: len(wave)], data.collate,
        )  # fmt: skip
    return cache.CachedDataset(folder, utterances, index)


class Stopwatch:
    """A loader that notes how long it lets the loop wait for a batch, and how long until the loop
    wants the next. With a job it then takes a bare step on the same batch in memory: what the
    machine does at the moment then counts for both."""

    def __init__(self, loader, job=None):
        self.loader, self.dataset, self.job = loader, loader.dataset, job
        self.waits, self.steps, self.bare = [], [], []

    def __iter__(self):
        start = time.perf_counter()
        for batch in self.loader:
            self.waits.append(time.perf_counter() - start)
            yield batch
            self.steps.append(time.perf_counter() - start)
            if self.job:
                device = self.job.args.device
                batch = batch[0].to(device), batch[1], batch[2].to(device)
                self.bare.append(timed(device, self.job.step, *batch)[0])
            start = time.perf_counter()


def measure_loop(job, dataset, lengths):
    """train.train_epoch against bare steps: the median ratio. The first step of an epoch is apart:
    the loader's processes start then, and what they share with this one is copied as it changes."""
    loader, ratios, starts = train.make_loader(dataset, lengths, job.args, 1), [], []
    rest = job.optimizer, job.scaler, job.args, 1 / RATE, "loop"
    for watch in (Stopwatch(loader), Stopwatch(loader, job), Stopwatch(loader, job)):
        with quiet():
            train.train_epoch(job.model, watch, *rest)
        if not watch.bare:  # a loader that has no pause to work ahead in
            waiting = sum(watch.waits[1:]) / sum(watch.steps[1:])
            continue
        ratios += [a / b for a, b in zip(watch.steps[1:], watch.bare[1:], strict=True)]
        starts.append(watch.steps[0] - watch.bare[0])
    return {
        "pairs": len(ratios), "overhead": statistics.median(ratios), "waiting_share": waiting,
        "bare_seconds_per_step": statistics.median(watch.bare),
        "epoch_start_seconds": statistics.mean(starts),
    }  # fmt: skip


def measure_fill(encoder, utterances, folder, device):
    """Frames a second of cache.fill in batches of 8, of its model alone, and on CUDA of filling
    one utterance at a time."""
    model = models.EmotionModel(encoder, padding="exact").to(device).eval()
    dataset = data.SpeechDataset(utterances, **AUDIO)
    frames, spent = [model.frames(u.samples) for u in utterances], []
    fingerprint = cache.cache_fingerprint("bench", 9, "float16", AUDIO)

    @torch.no_grad()
    def encode(wave, samples):  # as cache.py does
        seconds, (hidden, _) = timed(device, model.prefix, wave.to(device), samples.to(device), 9)
        spent.append(seconds)
        return hidden.cpu()

    def fill(size):
        with tempfile.TemporaryDirectory(dir=folder) as out, quiet():
            cache.fill(out, fingerprint, dataset, frames, WIDTH, encode, data.collate, size)

    total = sum(frames)
    encode(torch.randn(1, RATE), torch.tensor([RATE]))
    spent.clear()
    speeds = {"fill": total / timed(device, fill, 8)[0], "prefix": total / sum(spent)}
    return speeds | ({"alone": total / timed(device, fill, 1)[0]} if device == "cuda" else {})


def measure_reading(dataset, rounds=3):
    """Bytes a second of a cache read in order and shuffled, its files not in memory."""
    orders = {"ordered": range(len(dataset)), "shuffled": torch.randperm(len(dataset)).tolist()}
    seconds = {name: [] for name in orders}
    for _ in range(rounds):
        for name, order in orders.items():
            for path in Path(dataset.folder).glob("*.pt"):
                with open(path) as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            seconds[name].append(timed("cpu", lambda order=order: [dataset[i] for i in order])[0])
    size = sum(dataset.lengths) * WIDTH * 2
    return {name: size / statistics.median(s) for name, s in seconds.items()}


def measure_startup(root, encoder):
    """Seconds of reading 150,000 label rows, of looking into the audio files, and of opening a
    cache of all."""
    write_corpus(root, 120_000, LENGTHS[:1])
    splits = ("Train", "Development", "Test1")
    read, (utterances, problems) = timed("cpu", data.read_corpus, root)
    choose, utterances = timed("cpu", data.select, utterances, problems, splits)
    inspect, _ = timed("cpu", data.check_audio, utterances)
    entry = ["shard-00000.pt", 0, 281, 0, cache.audio_state(utterances[0].path)]
    index = {"fingerprint": cache.cache_fingerprint("bench", 9, "float16", AUDIO), "seconds": 0.0}
    index |= {"shards": {}, "utterances": {u.name: entry for u in utterances}}
    cache.write_index(root, index)
    parts = {split: [u for u in utterances if u.split == split] for split in splits}
    args, model = SimpleNamespace(cached=True, cache=root), SimpleNamespace(cut=9, encoder=encoder)
    opened, _ = timed("cpu", train.make_datasets, args, parts, model, AUDIO, "bench")
    return {"labels": read + choose, "inspect_audio": inspect, "open_cache": opened}


def measure_resampling(folder):
    """Seconds of sound a second of data.load_audio on a stereo file at 44.1 kHz."""
    path, seconds = str(folder / "44100.wav"), 11
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (seconds * 44100, 2))
    soundfile.write(path, noise, 44100, subtype="PCM_16")
    return seconds / statistics.median(timed("cpu", data.load_audio, path)[0] for _ in range(9))


def command(log, *line):
    """Peak resident bytes of a Python command line in a process of its own."""
    with open(log, "w") as file:
        process = subprocess.Popen(
            [sys.executable, *map(str, line)], cwd=ROOT, stdout=file, stderr=file
        )
        _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise RuntimeError(f"{line[0]}: {Path(log).read_text().strip().splitlines()[-1]}")
    return usage.ru_maxrss * 1024


def measure_resident(folder):
    """{fill or train: peak resident bytes with 100 and with 1,000 utterances}, of commands with a
    tiny encoder. Utterances of one length, so that no batch is larger by chance."""
    peaks, encoder = {"fill": [], "train": []}, folder / "tiny"
    with quiet():
        data.write_encoder(encoder, layers=1)
    for n in (100, 1000):
        root, out = folder / f"corpus-{n}", folder / f"cache-{n}"
        write_corpus(root, n, LENGTHS[:1])
        common = ["--data", str(root), "--model", str(encoder), "--device", "cpu"]
        line = [*common, "--layer", "0", "--out", str(out)]
        # shards so small that there are several of 100 utterances, too
        code = f"import cache; cache.SHARD_BYTES = 2**20; cache.main({line})"
        peaks["fill"].append(command(folder / "log", "-c", code))
        line = [*common, "--cache", out, "--layers", 1, "--out", folder / f"run-{n}"]
        peaks["train"].append(command(folder / "log", "train.py", *line, "--epochs", 1))
    return peaks


def measure_epochs(folder, utterances, device):
    """{hours of speech: seconds of a training epoch of a tiny encoder from a cache}."""
    with quiet():
        encoder, _ = models.load_encoder(folder / "tiny")
    job, seconds = Job(Row(layers=1, cached=True), encoder, device), {}
    cached = fill_noise(folder / "tiny-cache", utterances, encoder.config.hidden_size)
    for n in (1, 1, 2, 4, 8) * 3:
        part = utterances[: n * len(utterances) // 8]
        items = cache.CachedDataset(cached.folder, part, cached.index)
        loader = train.make_loader(items, items.lengths, job.args, 1)
        rest = job.optimizer, job.scaler, job.args, 1 / RATE, "epoch"
        with quiet():
            spent, _ = timed(device, train.train_epoch, job.model, loader, *rest)
        hours = sum(u.samples for u in part) / RATE / 3600
        seconds[hours] = min(seconds.get(hours, math.inf), spent)
    return seconds


def measure_data(options, encoder, mixed, folder):
    """(targets, details) of loop, cache, audio path and sizes, on corpora in `folder`."""
    device, gpu, targets, details = options.device, options.device == "cuda", {}, {}
    write_corpus(folder / "corpus", 1280)
    utterances, _ = data.check_audio(data.read_corpus(folder / "corpus")[0])
    cached = fill_noise(folder / "cache", utterances[:600])
    size = sum(path.stat().st_size for path in Path(cached.folder).iterdir())
    targets["bytes_a_frame"] = size / sum(cached.lengths)
    reading = details["cache_bytes_per_second"] = measure_reading(cached)
    targets["shuffled_vs_ordered"] = reading["shuffled"] / reading["ordered"]
    targets["resample_x_realtime"] = measure_resampling(folder)
    progress("cache filling")
    some = utterances[: 640 if gpu else 8 if options.quick else 24]
    fill = details["fill_frames_per_second"] = measure_fill(encoder, some, folder, device)
    if options.quick:
        return targets, details
    targets["fill_vs_prefix"] = fill["fill"] / fill["prefix"]
    if gpu:
        targets["fill_vs_one_at_a_time"] = fill["fill"] / fill["alone"]
    # on a CPU a cached step of one layer: the loop's own cost is a larger part of a faster step
    for key, row, steps, batch in (
        ("_cached", Row("partial", 3 if gpu else 1, mixed, cached=True, exact=True), 12, 4),
        ("", Row("partial", 3, mixed, freeze_prefix=True), 4, 2),
    ):
        progress(f"loop{key}")
        batch, steps = (BATCH, 18) if gpu else (batch, steps)
        items = data.SpeechDataset(utterances[: steps * batch], **AUDIO)
        if row.cached:
            items = cache.CachedDataset(cached.folder, items.utterances, cached.index)
        lengths = [u.samples for u in items.utterances]
        loop = measure_loop(Job(row, encoder, device, batch), items, lengths)
        details[f"loop{key}"] = loop
        targets[f"loop_overhead{key}"] = loop["overhead"]
        targets[f"waiting_share{key}"] = loop["waiting_share"]
    progress("sizes, and start-up with 150,000 label rows")
    epochs = details["epoch_seconds_by_hours"] = measure_epochs(folder, utterances[:512], device)
    logs = np.log(list(epochs)), np.log(list(epochs.values()))
    targets["epoch_exponent"] = np.polyfit(*logs, 1)[0]
    startup = details["startup_seconds"] = measure_startup(folder / "many", encoder)
    targets["startup_seconds"] = startup["labels"]
    targets["startup_cached_seconds"] = startup["labels"] + startup["open_cache"]
    return targets, details


def row_child(name, device, caps):
    """Two steps of a row at batch 32, the longest 11 s: peak bytes without caps; with caps in GB,
    from large to small, {cap: whether it fits}."""
    lengths, fits = LENGTHS.clone(), {}
    lengths[-1] = 11 * RATE
    for cap in sorted(caps, reverse=True) or [None]:
        if cap:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / total))
        try:
            with Memory(device) as memory:
                job = Job(ROWS[name], base_encoder(), device)
                batch = make_batch(lengths, ROWS[name].cached, device)
                job.step(*batch)
                job.step(*batch)
            fits[cap] = True
        except torch.OutOfMemoryError:
            break  # a smaller cap does not fit either
        finally:
            job = batch = None
            gc.collect()
            torch.cuda.empty_cache()
    return [fits.get(cap, False) for cap in caps] or memory.peak


def child(*arguments):
    """The result of row_child in a process of its own."""
    command = [sys.executable, __file__, "--child", json.dumps(arguments)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{arguments[0]}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def table_2(sizes):
    """{row: [fits]}, printed. A cap on what PyTorch allocates is not a card."""
    print("\nTable II at batch 32, each row in its own process; a cap, not a card:")
    print(f"{'':32}" + "".join(f"{gb:>7g} GB" for gb in sizes))
    table = {}
    for name in TABLE_2:
        table[name] = child(name, "cuda", sizes)
        print(f"{name:32}" + "".join(f"{'✓' if fits else '✗':>10}" for fits in table[name]))
    return table


def show_rows(results, rates):
    print(f"\n{'':32} s/step  faster  speech-s/s  peak GB    limit  useful    hours  paper's")
    for r in results:
        print(f"{r['name']:32}{r['seconds_per_step']:7.3f} {r['factor_vs_full']:7.1f} "
              f"{r['speech_seconds_per_second']:11.1f} {r['peak_memory_bytes'] / 1e9:8.2f} "
              f"{r['share_of_limit']:8.0%} {r['useful_share_of_limit']:7.0%} "
              f"{r['hours_5_epochs']:8.2f} {r['paper_hours'] or '-':>8}")  # fmt: skip
    print("The paper's hours: cached rows on an RTX 2080 Ti, others on an A40.")
    print("Limit:", ", ".join(f"{p} {rate / 1e12:.3g} TFLOP/s" for p, rate in rates.items()))
    if rates.get("fp32", 0) > rates.get("mixed", math.inf):
        print("Mixed precision multiplies more slowly here: take the fp32 rows (--precision fp32).")


def show_targets(targets, details):
    print()
    for name, value in targets.items():
        line = f"{name:42} {value:10.4g}"
        if name in TARGETS:
            sign, limit = TARGETS[name]
            met = value >= limit if sign == ">=" else value <= limit
            verdict = "met" if met else f"missed by {abs(value / limit - 1):.0%}"
            line += f"  target {sign} {limit:g}: {verdict}"
        print(line)
    missing = [name for name in TARGETS if name not in targets]
    if missing:
        print("not measured in this run:", ", ".join(missing))
    frames = sum(SEGMENTS.values()) * quantiles(np.linspace(0, 1, 999)).mean() * FRAMES_A_SECOND
    hours = frames / details["fill_frames_per_second"]["fill"] / 3600
    print(f"\nA float16 cache of {', '.join(SEGMENTS)}: {frames * 2 * WIDTH / 1e9:.0f} GB, "
          f"filled in {hours:.1f} hours on this machine.")  # fmt: skip


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
    add("--memory", type=float, nargs="*", metavar="GB",
        help="peaks of full at batch 32; on CUDA Table II for these caps, too (11 48)")  # fmt: skip
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    gpu = torch.cuda.is_available() and options.device != "cpu"
    if (options.device == "cuda" or options.memory) and not gpu:
        parser.error("--device cuda and caps for --memory need a CUDA device")
    options.device = "cuda" if gpu else "cpu"
    options.batch = options.batch or (BATCH if gpu else 1)
    if gpu and not options.quick:
        options.memory = options.memory or [11.0, 48.0]
    options.rows = options.rows.split(",") if options.rows else QUICK if options.quick else [*ROWS]
    options.rows = [name.strip() for name in options.rows]
    unknown = [name for name in options.rows if name not in ROWS]
    if unknown or not 1 <= options.batch <= BATCH:
        parser.error(f"unknown rows {unknown}" if unknown else f"--batch 1 to {BATCH}")
    return options


def main(argv=None):
    options = parse_args(argv)
    if options.child:
        return print(json.dumps(row_child(*json.loads(options.child))))
    device, base = options.device, Memory("cpu").now()
    cpu = platform.processor() or platform.machine()
    machine = {"device": torch.cuda.get_device_name() if device == "cuda" else cpu}
    machine |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    targets, details, table = {}, {}, {}
    with tempfile.TemporaryDirectory() as folder:
        if not options.quick:  # before this process grows: Linux counts that to those it starts
            progress("resident memory")
            peaks = details["resident_bytes"] = measure_resident(Path(folder))
            targets = {f"resident_memory_{kind}": p[1] / p[0] for kind, p in peaks.items()}
        encoder = base_encoder()
        results, ratios, rates = measure_rows(options, encoder, base)
        show_rows(results, rates)
        mixed = rates.get("mixed", 0) > rates.get("fp32", 0)
        more = measure_data(options, encoder, mixed, Path(folder))
    targets, details = ratios | more[0] | targets, details | more[1]
    if options.memory is not None:
        peaks = details["peak_bytes_at_32"] = {name: child(name, device, []) for name in PEAKS}
        targets["recompute_memory"] = peaks[PEAKS[1]] / peaks[PEAKS[0]]
    show_targets(targets, details)
    if options.memory:
        table = table_2(options.memory)
    progress("done")
    if options.json:
        figures = {"machine": machine | {"matmul_flops_per_second": rates}, "rows": results}
        figures |= {"targets": targets, "thresholds": TARGETS, "details": details}
        Path(options.json).write_text(json.dumps(figures | {"table_2": table}, indent=1))


if __name__ == "__main__":
    main()
