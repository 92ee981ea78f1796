"""Which row of Table I should I run on this machine, and what will it cost? Random weights of
wav2vec2-base, noise with lengths like MSP-Podcast's, and the functions that training uses.

    python tests/bench.py --quick    # rows, cache and loop; without --quick more of each
    python tests/bench.py --rows "full fp32,recommended mixed" --batch 8    # these rows only
    python tests/bench.py --memory 11 48    # Table II: what fits; a CPU needs 34 GB, and no caps
    python tests/bench.py --peers           # beside Hugging Face's model and PEFT's LoRA
    python tests/bench.py --processes       # two processes beside one, on the CPU

Rows are for a batch of 32, its lengths evenly spread over their distribution. CUDA runs it whole, a
CPU the --batch longest of each chunk (which is padded to its longest), and the time is scaled up.
mixed: fp16 on CUDA, bf16 on a CPU. s/step: median of forward, loss, backward, AdamW. hours: of 5
epochs over MSP-Podcast's Train. peak GB: where all is run. of rate: arithmetic over the rate of a
large matrix product just before (convolutions in TF32 may pass 1); useful: without that on padding.
"""

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
import warnings
from concurrent.futures import BrokenExecutor, ProcessPoolExecutor
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification, Wav2Vec2Model

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cache
import data
import model as models
import train

BATCH, RATE, WIDTH = 32, 16000, 768
TRAIN, CACHED = 84030, 84030 + 19815 + 30647  # utterances of MSP-Podcast 1.11: Train, three splits
METHODS = {  # options of train.py, whose default precision is mixed
    "full": "--method full",
    "lora": "--method lora",
    **{f"partial {n}": f"--layers {n}" for n in (1, 2, 3)},
    "freeze-prefix 3": "--freeze-prefix",
    **{f"cached {n}": f"--cache x --layers {n}" for n in (1, 2, 3)},
    "recommended": "--cache x --padding exact --chunk 4",
    **{f"recommended chunk {n}": f"--cache x --padding exact --chunk {n}" for n in (8, 16, 32)},
    "full chunked": "--method full --padding exact --chunk 4",
    "full chunked recomputed": "--method full --padding exact --chunk 4 --recompute",
}
ROWS = {f"{method} fp32": f"{line} --precision fp32" for method, line in METHODS.items()}
ROWS |= {f"{method} mixed": line for method, line in METHODS.items()}
QUICK = ["full fp32", "partial 3 fp32", "cached 3 fp32", "recommended fp32", "recommended mixed"]
TABLE_2 = ["full fp32", "full chunked recomputed fp32", "full mixed"]
TABLE_2 += ["partial 3 fp32", "partial 3 mixed", "lora fp32"]


def spread(n):
    """n lengths in samples, short to long, spread like MSP-Podcast's: 2.75 to 11 s, mean 5.65 s."""
    seconds = 2.75 - np.log(1 - 0.848 * (np.arange(n) + 0.5) / n) / 0.2283
    return (seconds * RATE).astype(int)


def timed(function, *args):
    """(seconds, result) of a call, the GPU's work included."""
    start, result = time.perf_counter(), function(*args)
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def build(row, device=None):
    """What train.py makes of a row's options: (args, model)."""
    args = train.parse_args(f"--data x --out x {ROWS[row]}".split())
    with torch.device(device or args.device):
        encoder = Wav2Vec2Model(Wav2Vec2Config())
        model = models.EmotionModel(encoder, args.attributes, args.dropout, args.padding)
    adapters = args.rank, args.alpha, args.lora_dropout
    models.freeze(model, args.method, args.layers, args.freeze_prefix, *adapters)
    return args, model.train()


def make_batch(lengths, cached, device):
    """Lengths in samples (chunks, utterances of each) -> chunks of noise, waveforms or hidden
    states, as train.predict takes them, and targets (B, A)."""
    rows, width = ((lengths - 80) // 320, (WIDTH,)) if cached else (lengths, ())
    new = lambda each: torch.randn(len(each), each[-1], *width, device=device)
    return [(new(each), each) for each in rows.tolist()], torch.rand(lengths.size, 2, device=device)


def make_step(args, model):
    """(train.train_epoch's step without checks, optimizer, scaler)."""
    weights = models.trainable(model).values()
    optimizer = torch.optim.AdamW(weights, lr=args.lr, fused=True)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    mixed = args.precision != "fp32"

    def step(chunks, targets):
        with torch.autocast(args.device, train.PRECISIONS[args.precision], mixed):
            predictions = train.predict(model, chunks, args.device, args.cached, args.recompute)
        scaler.scale(train.ccc_loss(predictions, targets)).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

    step(*make_batch(spread(2)[None] // 9, args.cached, args.device))  # makes AdamW's state
    return step, optimizer, scaler


def matmul_rate(precision, device):
    """Floating point operations a second of a large matrix product, the best of some."""
    n = 8192 if device == "cuda" else 512
    a = torch.randn(n, n, device=device, dtype=train.PRECISIONS[precision])
    return 2 * n**3 / min(timed(torch.mm, a, a)[0] for _ in range(4))


def run_row(row, n, longest=None, cap=np.inf):
    """{column: figure} of a row, n utterances a chunk; None if memory, or `cap` GB, is short."""
    try:
        args, model = build(row)
        rate, steps = matmul_rate(args.precision, args.device), []
        whole = spread(BATCH).reshape(-1, args.chunk or BATCH)
        whole[-1, -1] = longest or whole[-1, -1]
        if args.device == "cuda":
            share = cap * 1e9 / torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, share))
            torch.cuda.reset_peak_memory_stats()
        batch = make_batch(whole[:, -n:], args.cached, args.device)
        step = make_step(args, model)[0]
        while sum(steps) < (10 if args.device == "cuda" else 2):
            steps.append(timed(step, *batch)[0])
    except (RuntimeError, MemoryError) as error:
        if not train.out_of_memory(error):
            raise
        return None
    seconds = np.median(steps) * whole.size / len(batch[1])
    line = {"row": row, "s/step": seconds, "hours": seconds * TRAIN / BATCH * 5 / 3600}
    line["peak GB"] = train.peak_memory(args.device) / 1e9 if n == BATCH else None
    model = build(row, "meta")[1]  # to count its arithmetic, recomputation not twice, from shapes
    model.padding = "paper"  # quicker to count
    # PyTorch's own rule leaves out that the convolution with a backward pass has groups
    both = lambda gradient, x, weight, *_, **__: 2 * conv_flop_count(x, weight, gradient)
    rule = {torch.ops.aten.convolution_backward: both}
    with FlopCounterMode(display=False, custom_mapping=rule) as counter:
        chunks, _ = make_batch(whole, args.cached, "meta")
        train.predict(model, chunks, "meta", args.cached).sum().backward()
    line["of rate"] = counter.get_total_flops() / seconds / rate
    return line | {"useful": line["of rate"] * whole.mean() / whole[:, -1].mean()}


def measure_rows(rows, n, named):
    """Rows one by one; unless they are named, without mixed precision where that is slower."""
    args, full = build("full mixed", "meta")[0], None
    if matmul_rate(args.precision, args.device) < matmul_rate("fp32", args.device):
        print("Mixed precision multiplies more slowly here: train with --precision fp32.")
        rows = [row for row in rows if named or row.endswith("fp32")]
    for row in rows:
        if line := run_row(row, n):
            full = line["s/step"] if row == "full fp32" else full
            yield line | {"faster": full and full / line["s/step"]}


def measure_memory(caps):
    """Peaks, the longest 11 s, each in a process of its own, with caps on what PyTorch takes."""
    spawn = torch.multiprocessing.get_context("spawn")
    for row in TABLE_2 if torch.cuda.is_available() else TABLE_2[:2]:
        line = {"peak GB at 32": row}
        for cap in (np.inf, *caps):
            line[f"of {cap:g} GB"] = None  # stays, too, where the system ends the process
            with ProcessPoolExecutor(1, spawn) as pool, contextlib.suppress(BrokenExecutor):
                found = pool.submit(run_row, row, BATCH, 11 * RATE, cap).result()
                line[f"of {cap:g} GB"] = found and found["peak GB"]
        yield line


def write_corpus(root, n):
    """The demo corpus, with n utterances in Train, their lengths like MSP-Podcast's."""
    data.write_demo(root, speakers=(("Train", 1, n), ("Development", 1, 8), ("Test1", 1, 8)))
    lengths = np.random.default_rng(0).permutation(spread(n + 16))
    for path, samples in zip(sorted(root.glob("Audios/*")), lengths, strict=True):
        soundfile.write(path, np.resize(soundfile.read(path)[0], samples), RATE)


def measure_cache(folder, utterances, n):
    """Filling with noise, and n utterances with a model; reading the first."""
    noise, (args, model), model_seconds = torch.randn(560, WIDTH), build("freeze-prefix 3 fp32"), []

    def encode(utterances):  # as cache.py does
        waves = data.SpeechDataset(utterances, RATE)
        for wave, _ in data.read_ahead(waves.__getitem__, range(len(waves)), 2):
            spent, (hidden, _) = timed(model.frozen, wave[None].to(args.device), [len(wave)])
            model_seconds.append(spent)
            yield hidden[0].cpu()

    def fill(out, utterances, encode):
        out.mkdir()
        index = {"fingerprint": {"layer": 9, "dtype": "float16"}, "seconds": 0.0, "utterances": {}}
        seconds, _ = timed(cache.fill, out, index, utterances, encode)
        return seconds, cache.CachedDataset(out, utterances, cache.read_index(out, {}))

    alone = lambda utterances: (noise[: (u.samples - 80) // 320] for u in utterances)
    seconds, cached = fill(folder / "noise", utterances, alone)
    frames, size = sum(cached.lengths), cached.index["bytes"]
    yield {"cache": "besides the model, ms/utterance", "figure": 1000 * seconds / len(cached)}
    yield {"cache": "bytes/frame", "figure": size / frames}
    yield {"cache": "three splits, GB", "figure": CACHED / len(cached) * size / 1e9}
    for name, order in (("in order", np.arange), ("shuffled", np.random.permutation)):
        cached.opened.clear()
        for path in cached.folder.glob("*.pt"):
            with open(path) as file:  # from the disk, not from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        seconds, _ = timed(list, map(cached.__getitem__, order(len(cached))))
        yield {"cache": f"reading {name}, frames/s", "figure": frames / seconds}
    list(encode(utterances[:1]))
    seconds, some = fill(folder / "model", utterances[:n], encode)
    yield {"cache": "filling, frames/s", "figure": sum(some.lengths) / seconds}
    yield {
        "cache": "its model alone, frames/s",
        "figure": sum(some.lengths) / sum(model_seconds[1:]),
    }
    yield {"cache": "three splits, hours", "figure": CACHED / n * seconds / 3600}


def measure_loop(folder, utterances, quick):
    """train.train_epoch's waiting for data; on a CPU of short utterances: fast steps."""
    cuda, waits, read_ahead = torch.cuda.is_available(), [], data.read_ahead
    utterances = sorted(utterances, key=lambda u: u.samples)[: 18 * BATCH if cuda else 16]

    def watched(*how):
        start = time.perf_counter()
        for loaded in read_ahead(*how):
            waits.append(time.perf_counter() - start)
            yield loaded
            start = time.perf_counter()

    cached = cache.CachedDataset(folder, utterances, cache.read_index(folder, {}))
    data.read_ahead = watched  # for good, as nothing else is measured afterwards
    if cuda:
        torch.cuda.set_sync_debug_mode("warn")
    for method in ["recommended"] if quick else ["recommended", "freeze-prefix 3"]:
        args, model = build(f"{method} {'mixed' if cuda else 'fp32'}")
        args.batch_size, (_, *how) = BATCH if cuda else 4, make_step(args, model)
        dataset = cached if args.cached else data.SpeechDataset(utterances, RATE)
        for args.workers in (0, 2) if quick else (0, 1, 2, 4):
            waits.clear()
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                seconds, _ = timed(train.train_epoch, model, dataset, *how, args, 1)
            line = {"loop": f"{method}, {args.workers} workers", "s/step": seconds / len(waits)}
            line["waiting"] = sum(waits[1:]) / (seconds - waits[0])
            syncs = sum("called a synchronizing" in str(w.message) for w in caught)
            yield line | {"syncs/step": syncs / len(waits)}


def measure_peers():
    """A step of 4 utterances in turns; theirs without what no row has: layer drop, SpecAugment."""
    config = Wav2Vec2Config(num_labels=2, layerdrop=0.0, apply_spec_augment=False)
    how = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
    for method in ("full", "lora"):
        peer, (args, ours) = Wav2Vec2ForSequenceClassification(config), build(f"{method} fp32")
        peer.freeze_feature_encoder()
        if method == "lora":
            try:
                from peft import LoraConfig, get_peft_model
            except ImportError as error:
                return print(f"PEFT: pip install peft ({error})")
            peer = get_peft_model(peer, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, **how))
        peer.frozen, peer.attributes = lambda wave, lengths: (wave, lengths), ours.attributes
        peer.trained = lambda wave, lengths, peer=peer: peer(wave).logits
        steps = [make_step(args, model.to(args.device))[0] for model in (peer, ours)]
        batch = make_batch(spread(4)[None], False, args.device)
        turns = [[timed(step, *batch)[0] for step in steps] for _ in range(3)]
        a, b, ratio = np.median([(a, b, a / b) for a, b in turns], axis=0)
        yield {"s/step of 4": type(peer).__name__, "theirs": a, "ours": b, "ratio": ratio}


def measure_processes(folder):
    """train.py with a small encoder on the CPU, in one process and in two, a thread each."""
    write_corpus(folder / "corpus", 4 * BATCH)
    data.write_encoder(folder / "encoder", layers=4, width=256, channels=64)
    common, cached = f"--data {folder}/corpus --model {folder}/encoder", f"--cache {folder}/cache"
    cache.main(f"{common} --out {folder}/cache".split())
    rows = {"partial 3": "--padding exact --chunk 4", "full": "--method full", "cached 3": cached}
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    for row, options in rows.items():
        line = {"s/step by processes": row}
        for n, how in ((1, ""), (2, "-m torch.distributed.run --standalone --nproc-per-node 2")):
            out = folder / f"{row[:4]}-{n}"
            command = f"{how} train.py {common} {options} --epochs 1 --precision fp32 --out {out}"
            subprocess.check_output([sys.executable, *command.split()], cwd=ROOT, env=env)
            line[n] = json.loads((out / "result.json").read_text())["train_seconds"] / 4
        yield line | {"faster": line[1] / line[2]}


def main(argv=None):
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--batch", type=int, help="utterances of each chunk that are run: all on CUDA; 1 on a CPU")
    add("--rows", help=f"these only; comma-separated, of: {', '.join(ROWS)}")
    add("--quick", action="store_true", help="fewer rows and figures")
    add("--json", metavar="FILE", help="write all figures there")
    add("--memory", type=float, nargs="*", metavar="GB", help="peaks; CUDA: caps (11 48)")
    add("--peers", action="store_true", help="Hugging Face's step and PEFT's beside ours")
    add("--processes", action="store_true", help="two processes beside one")
    options = parser.parse_args(argv)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for all that follows, other processes too
    cuda = train.parse_args(["--demo", "--device", options.device]).device == "cuda"
    rows = options.rows.split(",") if options.rows else QUICK if options.quick else list(ROWS)
    n = options.batch or (BATCH if cuda else 1)
    if not set(rows) <= set(ROWS) or (options.memory and not cuda):
        parser.error("unknown rows (see --help), or caps for --memory without CUDA")
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    print(f"{device}, torch {torch.__version__}")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if options.memory is not None:
            figures = {"memory": measure_memory(options.memory or ([11, 48] if cuda else []))}
        elif options.peers:
            figures = {"peers": measure_peers()}
        elif options.processes:
            figures = {"processes": measure_processes(folder)}
        else:
            figures = {"rows": measure_rows(rows, n, bool(options.rows))}
        if "rows" in figures and not options.rows:
            write_corpus(folder / "corpus", 640 if cuda else 160)
            utterances = data.load_corpus(folder / "corpus", data.SPLITS[:3])
            figures["cache"] = measure_cache(folder, utterances, 640 if cuda else 8)
            figures["loop"] = measure_loop(folder / "noise", utterances, options.quick)
        for what, rows in figures.items():
            figures[what] = []
            for row in rows:
                for first, *cells in [row.values()] if figures[what] else [row, row.values()]:
                    texts = (f"{x:.4g}" if isinstance(x, float) else x or "-" for x in cells)
                    print(f"{first:34}" + "".join(f"{text:>12}" for text in texts), flush=True)
                figures[what].append(row)
    if options.json:
        Path(options.json).write_text(json.dumps({"device": device, **figures}, indent=1))


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # bad input: one line and exit status 2
        argparse.ArgumentParser().exit(2, f"error: {error}\n")
