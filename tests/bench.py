"""Which row of Table I should I run on this machine, and what will it cost? Random weights of
wav2vec2-base, random audio with lengths like MSP-Podcast's, the functions that training uses.

    python tests/bench.py                              # all rows and targets
    python tests/bench.py --quick                      # fewer rows and targets: about a minute
    python tests/bench.py --device cuda --json out.json     # batch 32, and Table II as memory caps
    python tests/bench.py --batch 8 --rows "full fp32,recommended"

mixed: fp16 on CUDA, bf16 on a CPU. s/step: median time of forward, loss, backward and AdamW on a
batch in memory; rows take turns on the same batch, its lengths evenly spread over the distribution.
faster: than full fp32. at 32: the same at batch 32, scaled with the frames that a row computes
there, padding included. peak: what a step takes beyond what was there, plus the row's weights,
optimizer and inputs, and on a CPU Python with its libraries. of limit: the step's arithmetic,
padding included, over the rate of a large matrix product in that precision; useful: that of true
frames only. hours: 5 epochs of MSP-Podcast's Train, and Development after each, from "at 32".
Every ratio is of one run. Nothing is left on disk.
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
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import soundfile
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import Wav2Vec2Config, Wav2Vec2Model

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import cache
import data
import model as models
import train
from ccc import ccc_loss

START, SLOW = time.perf_counter(), 1.0
RATE, FRAMES_A_SECOND, WIDTH = 16000, 49.9, 768
SEGMENTS = {"Train": 84030, "Development": 19815, "Test1": 30647}  # MSP-Podcast 1.11
EPOCHS, MEAN_SECONDS, SPREAD = 5, 5.65, 0.2283  # of the lengths: see `quantiles`
AUDIO = {"sample_rate": RATE, "normalise": True}
TINY = {"hidden_size": 256, "num_hidden_layers": 1, "num_attention_heads": 2, "conv_dim": (32,) * 7}
TINY |= {"intermediate_size": 256, "num_conv_pos_embeddings": 16, "attention_dropout": 0.0}
TINY |= {"num_conv_pos_embedding_groups": 4, "hidden_dropout": 0.0, "activation_dropout": 0.0}


class Row(NamedTuple):
    method: str = "partial"
    layers: int | None = 3
    mixed: bool = False
    cached: bool = False
    freeze_prefix: bool = False
    exact: bool = False  # exact padding, in chunks; otherwise the paper's padding, whole batches
    recompute: bool = False
    hours: float | None = None  # the paper's: uncached on an A40, cached on an RTX 2080 Ti


ROWS = {"lora fp32": Row("lora", None, hours=2.476)}
for method, layers, cached, hours in (
    ("partial", 1, False, (2.443, 0.965)),
    ("partial", 2, False, (2.477, 0.982)),
    ("partial", 3, False, (2.519, 0.991)),
    ("full", None, False, (2.980, 1.145)),
    ("partial", 1, True, (0.353, 0.155)),
    ("partial", 2, True, (0.689, 0.253)),
    ("partial", 3, True, (1.023, 0.353)),
):
    for mixed in (False, True):
        title = "full" if layers is None else f"{'cached' if cached else method} {layers}"
        row = Row(method, layers, mixed, cached, hours=hours[mixed])
        ROWS[f"{title} {'mixed' if mixed else 'fp32'}"] = row
ROWS |= {
    "freeze-prefix 3 fp32": Row(freeze_prefix=True),
    "freeze-prefix 3 mixed": Row(freeze_prefix=True, mixed=True),
    "full exact chunk fp32": Row("full", None, exact=True),
    "full exact chunk recompute fp32": Row("full", None, exact=True, recompute=True),
    "lora 3 cached exact chunk mixed": Row("lora", mixed=True, cached=True, exact=True),
    "recommended": Row(mixed=True, cached=True, exact=True),  # partial 3 cached mixed exact chunk
    "recommended fp32": Row(cached=True, exact=True),
}
QUICK = ("full fp32", "partial 3 fp32", "cached 3 fp32", "cached 3 mixed", "freeze-prefix 3 fp32")
QUICK += ("recommended", "recommended fp32")
TABLE_2 = ("full fp32", "full mixed", "partial 3 fp32", "partial 3 mixed", "lora fp32")
TABLE_2 += ("full exact chunk recompute fp32", "recommended")
FACTORS = "factor_vs_full", "factor_vs_full_at_32"
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


def quantiles(u):
    """Seconds at the quantiles u of an exponential distribution cut to 2.75 to 11 s, mean 5.65 s;
    random batches of 32 padded to their longest are then 54 % speech, as MSP-Podcast's."""
    return 2.75 - np.log(1 - u * (1 - math.exp(-8.25 * SPREAD))) / SPREAD


def spread(n):
    """n lengths in samples (n,), evenly spread over the distribution, in random order."""
    samples = (quantiles((np.arange(n) + 0.5) / n) * RATE).astype(int)
    return torch.from_numpy(np.random.default_rng(n).permutation(samples))


def padded(lengths, chunk=None):
    """The sum of lengths (B,) as train.predict pads them: each chunk to its longest."""
    parts = lengths.sort().values.split(chunk or len(lengths))
    return sum(int(part[-1]) * len(part) for part in parts)


def timed(device, function, *args):
    """(seconds, result) of a call."""
    if device == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = function(*args)
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def base_encoder(**changes):
    torch.manual_seed(0)
    return Wav2Vec2Model(Wav2Vec2Config(attn_implementation="sdpa", **changes))


def make_batch(samples, device):
    """{cached or not: inputs on the device, lengths (B,) on the CPU, targets on the device}."""
    targets = torch.rand(len(samples), 2).to(device)
    waves = torch.nn.utils.rnn.pad_sequence([torch.randn(n) for n in samples], batch_first=True)
    frames = (samples - 80) // 320  # of wav2vec2's convolutions
    hidden = torch.randn(len(frames), int(frames.max()), WIDTH).half()
    return {False: (waves.to(device), samples, targets), True: (hidden.to(device), frames, targets)}


class Job:
    """A row with train.py's arguments, on an encoder that all rows share. Rows that train the same
    parameters share model and optimizer too, in `shared`."""

    def __init__(self, row, encoder, options, batch_size, shared):
        self.row, device = row, options.device
        half = "fp16" if device == "cuda" else "bf16"
        self.args = SimpleNamespace(
            device=device, precision=half if row.mixed else "fp32", cached=row.cached, seed=0,
            chunk=max(1, options.chunk * batch_size // 32) if row.exact else None, workers=2,
            recompute=row.recompute, padding="exact" if row.exact else "paper",
            batch_size=batch_size,
        )  # fmt: skip
        self.frozen = row.method, row.layers, row.freeze_prefix or row.cached
        if self.frozen not in shared:
            model = models.EmotionModel(copy.deepcopy(encoder) if row.method == "lora" else encoder)
            models.freeze(model, *self.frozen)
            model.to(device)
            optimizer = torch.optim.AdamW(models.trainable(model).values(), lr=1e-4)
            shared[self.frozen] = model, optimizer
        self.model, self.optimizer = shared[self.frozen]
        self.scaler = torch.amp.GradScaler(device, enabled=self.args.precision == "fp16")

    def turn(self):
        """Make the shared encoder this row's."""
        self.model.padding = self.args.padding
        if self.row.method != "lora":
            models.freeze(self.model, *self.frozen)
        self.optimizer.zero_grad(set_to_none=True)
        self.model.train()

    def predict(self, inputs, lengths):
        args = self.args
        with train.autocast(args):
            return train.predict(
                self.model, inputs, lengths, args.device, args.cached, args.chunk, args.recompute
            )

    def step(self, inputs, lengths, targets):
        """What train.train_epoch does with a batch, without its checks and its progress bar."""
        loss = ccc_loss(self.predict(inputs, lengths), targets)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad()

    def evaluate(self, inputs, lengths, targets):
        self.model.eval()
        with torch.no_grad():
            self.predict(inputs, lengths)

    def bytes(self, inputs):
        """Weights, optimizer state and inputs: what a step finds there."""
        state = [v for s in self.optimizer.state.values() for v in s.values()]
        return sum(t.nbytes for t in (*self.model.parameters(), *state, inputs))


def resident(peak=False):
    """Resident bytes of this process: now, or the most since `forget_peak`. Linux only."""
    name = "VmHWM:" if peak else "VmRSS:"
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def forget_peak():
    ctypes.CDLL(None).malloc_trim(0)  # gives free memory back, so that using it again counts
    Path("/proc/self/clear_refs").write_text("5")


def step_and_peak(job, batch, base):
    """(seconds, peak bytes as in a process of its own or None where that is not known)."""
    gc.collect()
    if job.args.device == "cuda":
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        seconds, _ = timed("cuda", job.step, *batch)
        return seconds, torch.cuda.max_memory_allocated() - before + job.bytes(batch[0])
    try:
        forget_peak()
        before = resident()
    except (OSError, AttributeError):
        return timed("cpu", job.step, *batch)  # and None
    seconds, _ = timed("cpu", job.step, *batch)
    return seconds, resident(peak=True) - before + job.bytes(batch[0]) + base


@functools.cache
def meta_model(*frozen):
    with torch.device("meta"):  # shapes only
        model = models.EmotionModel(base_encoder())
        models.freeze(model, *frozen)
    return model


def flops(row, lengths, chunk):
    """Floating point operations of a step, without what recomputation repeats. Counted on shapes
    alone, with the paper's padding in each chunk."""
    model = meta_model(row.method, row.layers, row.freeze_prefix or row.cached)
    shape = (len(lengths), int(lengths.max()), *([WIDTH] if row.cached else []))
    with FlopCounterMode(display=False) as counter:
        inputs = torch.empty(shape, device="meta")
        train.predict(model, inputs, lengths, "meta", row.cached, chunk).sum().backward()
    return counter.get_total_flops()


def matmul_rate(precision, device):
    """Floating point operations a second of a large matrix product, the best of some."""
    n = 8192 if device == "cuda" else 1536
    a = torch.randn(n, n, device=device, dtype=train.PRECISIONS[precision])
    return 2 * n**3 / min(timed(device, torch.mm, a, a)[0] for _ in range(6))


def progress(text):
    print(f"[{time.perf_counter() - START:5.0f} s] {text}", file=sys.stderr, flush=True)


def measure_rows(options, encoder, base):
    """([result of a row], {precision: matrix product rate})."""
    device, shared, seconds, peaks, evals = options.device, {}, {}, {}, {}
    jobs = {n: Job(ROWS[n], encoder, options, options.batch, shared) for n in options.rows}
    rates = dict.fromkeys(["fp32", "fp16" if device == "cuda" else "bf16"], 0.0)
    samples = spread(options.batch)
    batch = make_batch(samples, device)
    warm = batch if device == "cuda" else make_batch(samples.min()[None], device)
    for turn in range(-1, options.rounds):
        rates = {p: max(rates[p], matmul_rate(p, device)) for p in rates}
        for name, job in jobs.items():
            mine, spent = batch[job.args.cached], []
            job.turn()
            if turn < 0:  # warming up; in fp16 until the scaler has settled
                for _ in range(5 if device == "cuda" else 1):
                    job.step(*warm[job.args.cached])
                continue
            if turn == 0:
                first, peaks[name] = step_and_peak(job, mine, base)
                spent.append(first)
            while sum(spent) < SLOW:  # a fast row takes many steps, a slow one takes one
                spent.append(timed(device, job.step, *mine)[0])
            seconds[name] = seconds.get(name, []) + spent
            if turn == 0:
                evals[name], _ = timed(device, job.evaluate, *mine)
            progress(f"round {turn + 1} of {options.rounds}: {name} {min(spent):.3f} s")
    results = []
    for name, job in jobs.items():
        row, args = job.row, job.args
        lengths, median = batch[row.cached][1], statistics.median(seconds[name])
        scale = epoch_samples(options.chunk if row.exact else None) / padded(samples, args.chunk)
        limit = rates[args.precision] * median
        steps = {split: n / 32 * scale for split, n in SEGMENTS.items()}
        hours = (steps["Train"] * median + steps["Development"] * evals[name]) * EPOCHS / 3600
        results.append({
            "name": name, "precision": args.precision, "chunk": args.chunk,
            "steps": len(seconds[name]),
            "seconds_per_step": median, "seconds_per_step_at_32": median * scale,
            "seconds_per_evaluation": evals[name], "peak_memory_bytes": peaks[name],
            "speech_seconds_per_second": samples.sum().item() / RATE / median,
            "flops": flops(row, lengths, args.chunk),
            "share_of_limit": flops(row, lengths, args.chunk) / limit,
            "useful_share_of_limit": flops(row, lengths, 1) / limit,
            "hours_5_epochs": hours, "paper_hours": row.hours,
        })  # fmt: skip
    full = next((r for r in results if r["name"] == "full fp32"), None)
    for result in results if full else []:
        for key, at in zip(FACTORS, ("", "_at_32"), strict=True):
            result[key] = full[f"seconds_per_step{at}"] / result[f"seconds_per_step{at}"]
    return results, rates


@functools.cache
def epoch_samples(chunk):
    """Mean samples that a random batch of 32 comes to with its padding."""
    draws = np.random.default_rng(0).random((500, 32))
    return statistics.mean(padded(b, chunk) for b in torch.from_numpy(quantiles(draws) * RATE))


def row_targets(results):
    """Ratios of steps, in mixed precision as the targets are meant, and in fp32 beside them."""
    seconds = {r["name"]: r["seconds_per_step"] for r in results}
    at_32 = {r["name"]: r["seconds_per_step_at_32"] for r in results}
    ratios = {}
    for target, slow, fast in (
        ("recommended_vs_full", "full fp32", "recommended"),
        ("recommended_vs_full_in_fp32", "full fp32", "recommended fp32"),
        ("recommended_vs_paper_cached", "cached 3 mixed", "recommended"),
        ("recommended_vs_paper_cached_in_fp32", "cached 3 fp32", "recommended fp32"),
        ("freeze_prefix_vs_paper_partial", "partial 3 mixed", "freeze-prefix 3 mixed"),
        ("freeze_prefix_vs_paper_partial_in_fp32", "partial 3 fp32", "freeze-prefix 3 fp32"),
    ):
        if slow in seconds and fast in seconds:
            ratios[target] = seconds[slow] / seconds[fast]
            ratios[f"{target}_at_32"] = at_32[slow] / at_32[fast]
    return ratios


def write_corpus(folder, n):
    """n utterances of noise as 16-bit WAV."""
    rng, utterances = np.random.default_rng(0), []
    for i, samples in enumerate(spread(n).tolist()):
        path = str(Path(folder, f"{i:06}.wav"))
        soundfile.write(path, 0.1 * rng.standard_normal(samples), RATE, subtype="PCM_16")
        label = rng.random(2).tolist()
        utterances.append(data.Utterance(f"{i:06}.wav", path, "Train", "1", *label, samples))
    return utterances


def repeated(utterances, n):
    """n utterances of the same few files under names of their own."""
    return [utterances[i % len(utterances)]._replace(name=f"{i:06}") for i in range(n)]


def fill_noise(folder, utterances, width):
    """cache.fill with noise in place of a model."""
    noise = torch.randn(8, 560, width)
    dataset = data.SpeechDataset(utterances, **AUDIO)
    frames = [(u.samples - 80) // 320 for u in utterances]
    os.makedirs(folder, exist_ok=True)
    fingerprint = cache.cache_fingerprint("bench", 9, "float16", AUDIO)
    with quiet():
        encode = lambda wave, samples: noise[: len(wave)]
        return cache.fill(folder, fingerprint, dataset, frames, width, encode, data.collate)


def cached_dataset(folder, utterances):
    return cache.CachedDataset(folder, utterances, cache.read_index(folder))


def quiet():
    """tqdm writes to memory instead of the terminal."""
    return contextlib.redirect_stderr(io.StringIO())


class Stopwatch:
    """A loader that notes how long it let the loop wait: for the first batch, for the others."""

    def __init__(self, loader):
        self.loader, self.dataset, self.first, self.waited = loader, loader.dataset, 0.0, 0.0

    def __iter__(self):
        start, batches = time.perf_counter(), iter(self.loader)
        batch = next(batches, None)
        self.first = time.perf_counter() - start
        while batch is not None:
            yield batch
            start = time.perf_counter()
            batch = next(batches, None)
            self.waited += time.perf_counter() - start


def measure_loop(job, dataset, lengths, rounds=3):
    """train.train_epoch against the bare steps on its batches in memory, taking turns. The wait for
    the first batch, when the loader's processes start, is once an epoch and reported apart."""
    device, loader = job.args.device, train.make_loader(dataset, lengths, job.args, 1)
    batches = [(x.to(device), n, t.to(device)) for x, n, t, _ in loader]
    bare, loop, waits, firsts = [], [], [], []
    job.turn()
    epoch = (job.model, job.optimizer, job.scaler, job.args, 1 / RATE, "loop")
    job.step(*batches[0])
    for _ in range(rounds):
        bare.append(timed(device, lambda: [job.step(*batch) for batch in batches])[0])
        watch = Stopwatch(loader)
        with quiet():
            spent, _ = timed(device, train.train_epoch, epoch[0], watch, *epoch[1:])
        loop.append(spent - watch.first)
        waits.append(watch.waited / loop[-1])
        firsts.append(watch.first)
    median, steps = statistics.median, len(batches)
    return {
        "steps": steps, "bare_seconds_per_step": median(bare) / steps,
        "loop_seconds_per_step": median(loop) / steps, "overhead": median(loop) / median(bare),
        "waiting_share": median(waits), "first_batch_seconds": median(firsts),
    }  # fmt: skip


def measure_fill(encoder, utterances, folder, device, rounds=2):
    """Frames a second of cache.fill, batched and one at a time, and of the bare model.prefix."""
    model = models.EmotionModel(encoder, padding="exact").to(device).eval()
    dataset = data.SpeechDataset(utterances, **AUDIO)
    frames = [model.frames(u.samples) for u in utterances]
    plan = cache.plan(frames, 8, cache.SHARD_BYTES // (2 * WIDTH))
    batches = [data.collate([dataset[i] for i in batch])[:2] for part in plan for batch in part]
    batches = [(wave.to(device), samples.to(device)) for wave, samples in batches]
    fingerprint = cache.cache_fingerprint("bench", 9, "float16", AUDIO)

    @torch.no_grad()
    def encode(wave, samples):  # as cache.py does
        wave = wave.to(device, non_blocking=True)
        return model.prefix(wave, samples.to(device), 9)[0].float().cpu()

    @torch.no_grad()
    def bare():
        for batch in batches:
            model.prefix(*batch, 9)

    def fill(size):
        with tempfile.TemporaryDirectory(dir=folder) as out, quiet():
            cache.fill(out, fingerprint, dataset, frames, WIDTH, encode, data.collate, size)

    ways = {"prefix": (bare,), "fill": (fill, 8)}
    if device == "cuda":
        ways["alone"] = (fill, 1)
    seconds = {name: [] for name in ways}
    with torch.no_grad():
        model.prefix(*batches[0], 9)
    for _ in range(rounds):
        for name, call in ways.items():
            seconds[name].append(timed(device, *call)[0])
    return {name: sum(frames) / statistics.median(s) for name, s in seconds.items()}


def measure_reading(folder, utterances, rounds=3):
    """Bytes a second of a cache read in order and shuffled, its files not in memory where the
    system lets us drop them."""
    dataset = cached_dataset(folder, utterances)
    orders = {"ordered": range(len(dataset)), "shuffled": torch.randperm(len(dataset)).tolist()}
    seconds = {name: [] for name in orders}
    for _ in range(rounds):
        for name, order in orders.items():
            for path in Path(folder).glob("*.pt") if hasattr(os, "posix_fadvise") else []:
                with open(path) as file:
                    os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            seconds[name].append(timed("cpu", lambda order=order: [dataset[i] for i in order])[0])
    size = sum(dataset.lengths) * WIDTH * 2
    return {name: size / statistics.median(s) for name, s in seconds.items()}


def tiny_job(device):
    options = SimpleNamespace(device=device, chunk=4)
    job = Job(Row("partial", 1, cached=True), base_encoder(**TINY).to(device), options, 32, {})
    job.turn()
    return job


def tiny_epoch(job, folder, utterances):
    """Seconds of a cached training epoch."""
    dataset = cached_dataset(folder, utterances)
    loader = train.make_loader(dataset, dataset.lengths, job.args, 1)
    with quiet():
        rest = job.optimizer, job.scaler, job.args, 1, "tiny"
        return timed(job.args.device, train.train_epoch, job.model, loader, *rest)[0]


def measure_sizes(folder, utterances, device):
    """{hours of speech: seconds of a cached epoch of a tiny encoder} at 1, 2, 4 and 8 times."""
    cached = str(Path(folder, "sizes"))
    utterances = repeated(utterances, 8 * 64)
    fill_noise(cached, utterances, TINY["hidden_size"])
    job, seconds = tiny_job(device), {}
    tiny_epoch(job, cached, utterances[:64])
    for n in (64, 128, 256, 512):
        hours = sum(u.samples for u in utterances[:n]) / RATE / 3600
        seconds[hours] = min(tiny_epoch(job, cached, utterances[:n]) for _ in range(2))
    return seconds


def measure_startup(folder, source, encoder, n=150_000):
    """Seconds of reading n label rows, inspecting the audio, and opening a cache of all."""
    root = Path(folder, "many")
    (root / "Audios").mkdir(parents=True)
    (root / "Labels").mkdir()
    splits, names = ("Train", "Development", "Test1"), [f"{i:06}.wav" for i in range(n)]
    with open(root / "Labels" / "labels_consensus.csv", "w") as file:
        file.write("FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set\n")
        for i, name in enumerate(names):
            os.symlink(source, root / "Audios" / name)
            file.write(f"{name},N,4.{i % 10},3.{i % 7},4.0,{i // 100},Male,{splits[i % 3]}\n")
    read, (utterances, problems) = timed("cpu", data.read_corpus, root)
    choose, utterances = timed("cpu", data.select, utterances, problems, splits)
    inspect, _ = timed("cpu", data.check_audio, utterances)
    cached, state = str(root / "cache"), cache.audio_state(source)
    os.mkdir(cached)
    index = {"fingerprint": cache.cache_fingerprint("bench", 9, "float16", AUDIO), "seconds": 0.0}
    index |= {"shards": {}, "utterances": {m: ["shard-00000.pt", 0, 281, 0, state] for m in names}}
    cache.write_index(cached, index)
    parts = {split: [u for u in utterances if u.split == split] for split in splits}
    args = SimpleNamespace(cached=True, cache=cached)
    model = SimpleNamespace(cut=9, encoder=encoder)
    opened, _ = timed("cpu", train.make_datasets, args, parts, model, AUDIO, "bench")
    return {"labels": read + choose, "inspect_audio": inspect, "open_cache": opened}


def measure_resampling(folder):
    """Seconds of sound a second of data.load_audio on a stereo file at 44.1 kHz."""
    path, seconds = str(Path(folder, "44100.wav")), 11
    noise = np.random.default_rng(0).uniform(-0.1, 0.1, (seconds * 44100, 2))
    soundfile.write(path, noise, 44100, subtype="PCM_16")
    return seconds / statistics.median(timed("cpu", data.load_audio, path)[0] for _ in range(9))


def resident_child(kind, folder, n):
    """Peak resident bytes of filling a cache with n utterances, or of a training epoch from it:
    those of the process and of its largest worker."""
    cached = str(Path(folder, f"resident-{n}"))
    files = [data.Utterance(p.name, str(p), "Train", "1", 0.5, 0.5, soundfile.info(p).frames)
             for p in sorted(Path(folder).glob("0*.wav"))]  # fmt: skip
    if kind == "fill":
        cache.SHARD_BYTES = 2**21  # so that the smaller cache has more than one shard, too
        fill_noise(cached, repeated(files, n), TINY["hidden_size"])
    else:
        tiny_epoch(tiny_job("cpu"), cached, repeated(files, n))
    who = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    unit = 1 if sys.platform == "darwin" else 1024
    return sum(resource.getrusage(w).ru_maxrss for w in who) * unit


def measure_resident(folder, n=100):
    """{fill or train: peak resident bytes with n and with 10 n utterances}."""
    with ThreadPoolExecutor(2) as pool:
        return {
            kind: list(pool.map(lambda m, k=kind: child("resident", k, folder, m), (n, 10 * n)))
            for kind in ("fill", "train")
        }


def row_child(name, device, chunk, caps):
    """Two steps of a row at batch 32, the longest 11 s: peak bytes without caps; with caps in GB,
    from large to small, {cap: whether it fits}."""
    options = SimpleNamespace(device=device, chunk=chunk)
    samples = spread(32)
    samples[samples.argmax()] = 11 * RATE
    fits = {}
    for cap in sorted(caps, reverse=True) or [None]:
        if cap is not None:
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.empty_cache()
            torch.cuda.set_per_process_memory_fraction(min(1.0, cap * 2**30 / total))
        try:
            batch = make_batch(samples, device)[ROWS[name].cached]
            job = Job(ROWS[name], base_encoder().to(device), options, 32, {})
            job.turn()
            job.step(*batch)
            job.step(*batch)
            fits[cap] = True
        except torch.OutOfMemoryError:
            fits[cap] = False
            break  # a smaller cap does not fit either
        finally:
            job = batch = None
            gc.collect()
    return {cap: fits.get(cap, False) for cap in caps} if caps else train.peak_memory_bytes(device)


CHILDREN = {"resident": resident_child, "row": row_child}


def child(name, *arguments):
    """The result of one of these functions in a process of its own."""
    # through a shell that forks: Linux counts a parent's resident peak to the process it starts
    shell = ["sh", "-c", '"$0" "$@"; exit $?']
    command = [*shell, sys.executable, __file__, "--child", json.dumps([name, *arguments])]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr.strip().splitlines()[-1]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_data(options, encoder, faster, folder):
    """(targets, details) of loop, cache, audio path and sizes, on a corpus in `folder`."""
    device, gpu, targets, details = options.device, options.device == "cuda", {}, {}
    steps = 40 if gpu else 4
    utterances = write_corpus(folder, max(steps * options.batch, 16))
    cached = str(Path(folder, "cached"))
    many = repeated(utterances, max(len(utterances), 100 if options.quick else 600))
    index = fill_noise(cached, many, WIDTH)
    total = sum(entry[2] for entry in index["utterances"].values())
    size = sum(path.stat().st_size for path in Path(cached).iterdir())
    targets["bytes_a_frame"] = size / total
    reading = details["cache_bytes_per_second"] = measure_reading(cached, many)
    targets["shuffled_vs_ordered"] = reading["shuffled"] / reading["ordered"]
    targets["resample_x_realtime"] = measure_resampling(folder)
    progress("loop")
    dataset = cached_dataset(cached, many[: len(utterances)])
    loops = {"_cached": (Row(mixed=faster, cached=True, exact=True), dataset, dataset.lengths)}
    if not options.quick:
        lengths = [u.samples for u in utterances]
        sound = data.SpeechDataset(utterances, **AUDIO)
        loops[""] = Row(mixed=faster, freeze_prefix=True), sound, lengths
    for key, (row, items, lengths) in loops.items():
        loop = measure_loop(Job(row, encoder, options, options.batch, {}), items, lengths)
        details[f"loop{key}"] = loop
        targets[f"loop_overhead{key}"] = loop["overhead"]
        targets[f"waiting_share{key}"] = loop["waiting_share"]
    progress("cache filling")
    some = utterances[: 320 if gpu else 4 if options.quick else 10]
    fill = details["fill_frames_per_second"] = measure_fill(encoder, some, folder, device)
    targets["fill_vs_prefix"] = fill["fill"] / fill["prefix"]
    if gpu:
        targets["fill_vs_one_at_a_time"] = fill["fill"] / fill["alone"]
    if options.quick:
        return targets, details
    progress("sizes, start-up, resident memory")
    epochs = details["epoch_seconds_by_hours"] = measure_sizes(folder, utterances, device)
    hours, seconds = np.log(list(epochs)), np.log(list(epochs.values()))
    targets["epoch_exponent"] = np.polyfit(hours, seconds, 1)[0]
    startup = details["startup_seconds"] = measure_startup(folder, utterances[0].path, encoder)
    targets["startup_seconds"] = startup["labels"]
    targets["startup_cached_seconds"] = startup["labels"] + startup["open_cache"]
    details["resident_bytes"] = measure_resident(folder)
    for kind, (small, large) in details["resident_bytes"].items():
        targets[f"resident_memory_{kind}"] = large / small
    return targets, details


def show_rows(results, rates, batch):
    print(f"\n{'':32} s/step  faster  at 32 speech-s/s  peak GB    limit  useful    hours  paper's")
    for r in results:
        peak = r["peak_memory_bytes"] and f"{r['peak_memory_bytes'] / 1e9:.2f}"
        factors = [f"{r[key]:.1f}" if key in r else "-" for key in FACTORS]
        print(f"{r['name']:32}{r['seconds_per_step']:7.3f} {factors[0]:>7} {factors[1]:>6} "
              f"{r['speech_seconds_per_second']:10.1f} {peak or '-':>8} {r['share_of_limit']:8.0%} "
              f"{r['useful_share_of_limit']:7.0%} {r['hours_5_epochs']:8.2f} "
              f"{r['paper_hours'] or '-':>8}")  # fmt: skip
    print(f"Batch {batch}. The paper's hours: cached rows on an RTX 2080 Ti, others on an A40.")
    print("Limit:", ", ".join(f"{p} {rate / 1e12:.3g} TFLOP/s" for p, rate in rates.items()))
    if rates["fp32"] > min(rates.values()):
        print("Mixed precision multiplies more slowly here: take the fp32 rows (--precision fp32).")


def show_targets(targets):
    print()
    for name, value in targets.items():
        sign, limit = TARGETS.get(name, (None, None))
        verdict = "" if sign is None else f"target {sign} {limit:g}: "
        if sign:
            met = value >= limit if sign == ">=" else value <= limit
            verdict += "met" if met else f"missed by {abs(value / limit - 1):.0%}"
        print(f"{name:42} {value:10.4g}  {verdict}".rstrip())
    missing = [name for name in TARGETS if name not in targets]
    if missing:
        print("not measured in this run:", ", ".join(missing))


def show_cost(details):
    """Size of a cache of MSP-Podcast and the time of filling it."""
    frames = sum(SEGMENTS.values()) * MEAN_SECONDS * FRAMES_A_SECOND
    hours = frames / details["fill_frames_per_second"]["fill"] / 3600
    print(f"\nA float16 cache of {', '.join(SEGMENTS)}: {frames * 2 * WIDTH / 1e9:.0f} GB, "
          f"filled in {hours:.1f} hours on this machine.")  # fmt: skip


def table_2(options):
    """{row: {GB: fits}}, printed. A cap on what PyTorch allocates is not a card."""
    print("\nTable II at batch 32, each row in its own process; a cap, not a card:")
    print(f"{'':32}" + "".join(f"{gb:>7g} GB" for gb in options.memory))
    table = {}
    for name in TABLE_2:
        table[name] = child("row", name, "cuda", options.chunk, options.memory)
        print(
            f"{name:32}" + "".join(f"{'✓' if fits else '✗':>10}" for fits in table[name].values())
        )
    return table


def parse_args(argv):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--batch", type=int, help="32 on CUDA; 2 on a CPU")
    add("--chunk", type=int, default=4, help="train.py's at batch 32 (4), scaled with --batch")
    add("--rows", help=f"comma-separated, of: {', '.join(ROWS)}")
    add("--rounds", type=int, help="turns of each row: 5 on CUDA, 2 on a CPU")
    add("--json", metavar="FILE", help="write all figures there")
    add("--quick", action="store_true", help="fewer rows, turns and targets")
    add("--rows-only", action="store_true", help="steps only: no loop, cache and other targets")
    add("--memory", type=float, nargs="+", metavar="GB", help="CUDA: caps for Table II (11 48)")
    add("--memory-check", action="store_true", help="on a CPU, too: peaks of full at batch 32")
    add("--child", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    gpu = torch.cuda.is_available() and options.device != "cpu"
    if options.device == "cuda" and not gpu or options.memory and not gpu:
        parser.error("--device cuda and --memory need a CUDA device")
    options.device = "cuda" if gpu else "cpu"
    options.batch = options.batch or (32 if gpu else 2)
    options.rounds = options.rounds or (5 if gpu and not options.quick else 2)
    options.memory = options.memory or ([11.0, 48.0] if gpu and not options.quick else [])
    options.rows = options.rows.split(",") if options.rows else QUICK if options.quick else [*ROWS]
    options.rows = [name.strip() for name in options.rows]
    unknown = [name for name in options.rows if name not in ROWS]
    if unknown or options.batch < 2 or options.chunk < 1:
        parser.error(f"unknown rows {unknown}" if unknown else "--batch from 2, --chunk from 1")
    return options


def main(argv=None):
    options = parse_args(argv)
    if options.child:
        name, *arguments = json.loads(options.child)
        return print(json.dumps(CHILDREN[name](*arguments)))
    device = options.device
    base = resident() if Path("/proc/self/status").exists() else 0
    encoder = base_encoder().to(device)
    cpu = platform.processor() or platform.machine()
    machine = {"device": torch.cuda.get_device_name() if device == "cuda" else cpu}
    machine |= {"threads": torch.get_num_threads(), "torch": torch.__version__}
    print(", ".join(f"{key} {value}" for key, value in machine.items()))
    results, rates = measure_rows(options, encoder, base)
    gc.collect()
    show_rows(results, rates, options.batch)
    targets, details, table = row_targets(results), {}, {}
    if not options.rows_only:
        faster = device == "cuda" or rates["bf16"] > rates["fp32"]
        with tempfile.TemporaryDirectory() as folder:
            more, details = measure_data(options, encoder, faster, folder)
        targets |= more
    if options.memory_check or device == "cuda" and not options.quick:
        names = "full fp32", "full exact chunk recompute fp32"
        peaks = [child("row", name, device, 4, []) for name in names]
        details["peak_bytes_at_32"] = dict(zip(names, peaks, strict=True))
        targets["recompute_memory"] = peaks[1] / peaks[0]
    show_targets(targets)
    if details:
        show_cost(details)
    if options.memory:
        table = table_2(options)
    if options.json:
        machine |= {"matmul_flops_per_second": rates, "batch": options.batch}
        figures = {"machine": machine, "rows": results, "targets": targets, "thresholds": TARGETS}
        figures |= {"details": details, "table_2": table}
        Path(options.json).write_text(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
