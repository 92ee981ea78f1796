"""Which row of Table I should I run on this machine, and what will it cost? Random weights of
wav2vec2-base, its own dropouts, lengths like MSP-Podcast's, and train.train_epoch itself.

    python tests/bench.py --quick    # few rows, the cache, the loop; without --quick, all rows
    python tests/bench.py --rows "full fp32,recommended mixed" --batch 32    # these rows only
    python tests/bench.py --memory 11 48    # Table II: what fits; a CPU needs 34 GB, and no caps

Rows are for 32 lengths, spread evenly over their distribution. CUDA runs them whole. A CPU runs
every k-th utterance of each chunk, the longest included: --batch of them (4), padded as the chunk
is. All but the optimizer's time is scaled up. s/step: median after the first, without waiting for
data. hours: 5 epochs over Train of MSP-Podcast. peak GB: where all is run. of rate: arithmetic over
the rate of a large matrix product just after (TF32 may pass 1); useful: without that on padding.
"""

import argparse
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import timeit
import warnings
from collections import UserList
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from unittest import mock

import numpy as np
import soundfile
import torch
from torch.profiler import profile
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count
from transformers import Wav2Vec2Config, Wav2Vec2ForSequenceClassification, Wav2Vec2Model, logging

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
import cache
import data
import model as models
import train

BATCH, RATE = 32, 16000
# what differs from transformers' defaults in wav2vec2-base's own config.json, as far as known
BASE = {"activation_dropout": 0.0, "feat_proj_dropout": 0.1}
TRAIN, CACHED = 84030, 84030 + 19815 + 30647  # utterances of MSP-Podcast 1.11: Train, three splits
METHODS = {  # options of train.py, whose default precision is mixed
    "full": "--method full",
    "lora": "--method lora",
    **{f"partial {n}": f"--layers {n}" for n in (1, 2, 3)},
    "freeze-embedding 3": "--freeze-embedding",
    **{f"cached {n}": f"--cache x --layers {n}" for n in (1, 2, 3)},
    "recommended": "--cache x --padding exact --chunk 4",
    **{f"recommended chunk {n}": f"--cache x --padding exact --chunk {n}" for n in (8, 16, 32)},
    "full chunked": "--method full --padding exact --chunk 4",
    "full chunked recomputed": "--method full --padding exact --chunk 4 --recompute",
}
ROWS = {f"{method} fp32": f"{line} --precision fp32" for method, line in METHODS.items()}
ROWS |= {f"{method} mixed": line for method, line in METHODS.items()}
QUICK = ["full fp32", "full mixed", "partial 3 fp32", "partial 3 mixed"]
QUICK += ["cached 3 fp32", "cached 3 mixed", "recommended fp32", "recommended mixed"]
TABLE_2 = ["full fp32", "full chunked recomputed fp32", "full mixed"]
TABLE_2 += ["partial 3 fp32", "partial 3 mixed", "lora fp32"]
# parts of a step by names of operators, the first that matches; all else is "other"
GROUPS = {"attention": "bmm|softmax|attention", "products": "mm$|addmm|conv"}
GROUPS |= {"random": "bernoulli|dropout", "optimizer": "adamw", "other": ""}
PEERS = ["full fp32", "peer full fp32", "lora fp32", "peer lora fp32"]


def spread(n):
    """n lengths in samples, short to long, spread like MSP-Podcast's: 2.75 to 11 s, mean 5.65 s."""
    seconds = 2.75 - np.log(1 - 0.848 * (np.arange(n) + 0.5) / n) / 0.2283
    return (seconds * RATE).astype(int)


def make_peer(method):
    """Hugging Face's model, with PEFT's LoRA, as train_epoch takes it; without what no row has."""
    config = Wav2Vec2Config(num_labels=2, layerdrop=0.0, apply_spec_augment=False, **BASE)
    peer = Wav2Vec2ForSequenceClassification(config)
    peer.freeze_feature_encoder()
    if method == "lora":
        from peft import LoraConfig, get_peft_model

        where = {"target_modules": ["q_proj", "v_proj"], "modules_to_save": ["classifier"]}
        peer = get_peft_model(peer, LoraConfig(r=8, lora_alpha=16, lora_dropout=0.1, **where))
    peer.attributes = data.PAPER
    peer.prefix, peer.suffix = lambda *batch: batch, lambda wave, _: peer(wave).logits.float()
    return peer


def build(row, device=None):
    """What train.py makes of a row's options: (args, model)."""
    args = train.parse_args(f"--data x --out x {ROWS[row.removeprefix('peer ')]}".split())
    with torch.device(device or args.device):
        if row.startswith("peer"):
            return args, make_peer(args.method)
        model = models.EmotionModel(Wav2Vec2Model(Wav2Vec2Config(**BASE)), padding=args.padding)
        models.freeze(model, args.method, args.layers, args.freeze_embedding)
    return args, model


def run_epochs(args, model, dataset, n=1):
    """train.train_epoch n times -> arrays: seconds each step waited for data, and then took."""
    optimizer = torch.optim.AdamW(models.trainable(model).values(), lr=args.lr, fused=True)
    scaler = torch.amp.GradScaler(args.device, enabled=args.precision == "fp16")
    steps, read_ahead = [], data.read_ahead

    def watched(*how):
        start = timeit.default_timer()
        for loaded in read_ahead(*how):
            middle = timeit.default_timer()
            yield loaded  # the next is asked for when the step has ended, on a GPU, too
            end = timeit.default_timer()
            steps.append((middle - start, end - middle))
            start = end

    with mock.patch.object(data, "read_ahead", watched):
        for epoch in range(n):
            train.train_epoch(model, dataset, optimizer, scaler, args, epoch)
    return np.array(steps).T


def profile_step(args, model, dataset):
    """Seconds of a step's operators, by GROUPS."""
    seconds = dict.fromkeys(GROUPS, 0.0)
    with profile() as profiler:
        run_epochs(args, model, dataset)
    clock = "self_device_time_total" if args.device == "cuda" else "self_cpu_time_total"
    for event in profiler.key_averages():
        if event.device_type != torch.autograd.DeviceType.CPU:
            continue  # A GPU's kernel: its operator has the time, too.
        group = next(name for name, words in GROUPS.items() if re.search(words, event.key))
        seconds[group] += getattr(event, clock) / 1e6
    return seconds


def run_row(row, n, cap):
    """Figures of a row, n utterances a chunk; with a cap of GB, for Table II, the longest 11 s."""
    args, model = build(row)
    cuda = args.device == "cuda"
    width = [model.encoder.config.hidden_size] if args.cached else []
    chunks = spread(BATCH).reshape(-1, args.chunk or BATCH)
    chunks[-1, -1] = 11 * RATE if cap else chunks[-1, -1]
    if cap and cuda:
        share = cap * 1e9 / torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, share))
    chunks = (chunks - 80) // 320 if args.cached else chunks  # in frames
    kept = chunks[:, ::-1][:, :: max(1, chunks.shape[1] // n)][:, ::-1]
    args.batch_size, args.chunk = kept.size, kept.shape[1]
    noise = UserList((torch.randn(length, *width), torch.rand(2)) for length in kept.flat)
    noise.lengths = noise.frames = kept.ravel().tolist()
    noise.targets = torch.rand(kept.size, 2)
    noise.utterances = [data.Utterance(str(i), "") for i in range(kept.size)]
    _, works = run_epochs(args, model, noise, 11 if cuda else 4)  # of one step each
    parts = profile_step(args, model, noise)
    scale = chunks.size / kept.size
    seconds = (np.median(works[1:]) - parts["optimizer"]) * scale + parts["optimizer"]
    line = {"row": row, "s/step": seconds, "hours": seconds * TRAIN / BATCH * 5 / 3600}
    line["peak GB"] = train.peak_memory(args.device) / 1e9 if scale == 1 else None
    side = 8192 if cuda else 1024
    a = torch.randn(side, side, device=args.device, dtype=train.PRECISIONS[args.precision])
    rate = 2 * side**3 / min(timeit.repeat(lambda: (a @ a)[0, 0].item(), number=1, repeat=10))
    model = build(row, "meta")[1].train()  # to count its arithmetic, recomputation not twice
    # PyTorch's own rule leaves out that the convolution with a backward pass has groups
    both = lambda gradient, x, weight, *_, **__: 2 * conv_flop_count(x, weight, gradient)
    rule = {torch.ops.aten.convolution_backward: both}
    batch = [(torch.empty(len(c), c[-1], *width, device="meta"), c) for c in chunks.tolist()]
    none = mock.patch.object(torch, "autocast", lambda *_, **__: nullcontext())  # nor has meta one
    with FlopCounterMode(display=False, custom_mapping=rule) as counter, none:
        args.device, args.recompute = "meta", False
        train.predict_batch(model, batch, args).sum().backward()
    share = counter.get_total_flops() / seconds / rate
    line |= {"of rate": share, "useful": share * chunks.mean() / chunks[:, -1].mean()}
    parts = {name: x * (1 if name == "optimizer" else scale) for name, x in parts.items()}
    return line | {name: x / sum(parts.values()) for name, x in parts.items()}


def measure_rows(rows, n, caps):
    """Rows, each in a process of its own, so that the peak of memory is its own, too."""
    for row, cap in itertools.product(rows, caps):
        try:
            with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
                line = pool.submit(run_row, row, n, cap).result()
        except (RuntimeError, MemoryError) as error:  # out of memory, or ended by the system
            line = {"row": row, "failed": str(error)}
        yield line | {"cap GB": f"{cap:g}"} if cap else line


def prepare(folder, n, base):
    """A corpus with n utterances in Train, a small encoder, or `base`, and their cache."""
    data.write_demo(folder, speakers=[("Train", 1, n), ("Development", 1, 2), ("Test1", 1, 2)])
    lengths = np.random.default_rng(0).permutation(spread(n + 4))
    for path, samples in zip(sorted(folder.glob("Audios/*")), lengths, strict=True):
        soundfile.write(path, np.resize(soundfile.read(path)[0], samples), RATE)
    data.write_encoder(folder / "encoder", width=256, channels=64)
    if base:
        Wav2Vec2Model(Wav2Vec2Config(**BASE)).save_pretrained(folder / "encoder")
    cache.main(f"--data {folder} --model {folder}/encoder --out {folder}/cache".split())


def measure_data(folder, cuda, quick):
    """A cache of the last 3 layers, read from the disk and shuffled; then train_epoch's loop."""
    prepare(folder, 640 if cuda else 16, base=True)
    size = 0
    for path in folder.glob("cache/*.safetensors"):
        size += path.stat().st_size
        with open(path) as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    labelled = data.usable(data.read_corpus(folder))
    utterances = data.usable(data.check_audio(labelled))
    entries, _, seconds = cache.read_entries(folder / "cache")
    cached = cache.CachedDataset(entries, utterances)
    start = timeit.default_timer()
    frames = sum(len(cached[i][0]) for i in np.random.permutation(len(cached)))
    reading, share = timeit.default_timer() - start, CACHED / len(cached)
    line = {"cache": "three splits of MSP-Podcast", "GB": share * size / 1e9}
    line |= {"hours": share * seconds / 3600, "bytes/frame": size / frames}
    yield line | {"filled/s": frames / seconds, "read/s": frames / reading}
    if cuda:
        torch.cuda.set_sync_debug_mode("warn")
    for method in ["recommended"] if quick else ["recommended", "freeze-embedding 3"]:
        args, model = build(f"{method} {'mixed' if cuda else 'fp32'}")
        dataset = cached if args.cached else data.SpeechDataset(utterances)
        dataset.frames = dataset.lengths
        args.batch_size = BATCH if cuda else 4
        for args.workers in [2] if quick else [1, 2, 4]:
            with warnings.catch_warnings(record=True, action="always") as caught:
                waits, works = run_epochs(args, model, dataset)
            line = {"loop": method, "threads": args.workers, "s/step": np.median(works)}
            line["waiting"] = waits[1:].sum() / (waits + works)[1:].sum()
            syncs = sum("called a synchronizing" in str(w.message) for w in caught)
            yield line | {"syncs/step": syncs / len(works) if cuda else None}


def measure_processes(folder):
    """train.py with a small encoder on the CPU, in one process and in two, a thread each."""
    prepare(folder, 4 * BATCH, base=False)
    env = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    rows = "--padding exact --chunk 4", "--method full", "--cache cache"
    for row, n in itertools.product(rows, (1, 2)):
        out = folder / f"{n}{row.replace(' ', '')}"
        line = f"torch.distributed.run --standalone --nproc-per-node {n} {ROOT}/train.py {row}"
        line += f" --data . --model encoder --precision fp32 --epochs 1 --out {out}"
        subprocess.check_output([sys.executable, "-m", *line.split()], cwd=folder, env=env)
        seconds = json.loads((out / "result.json").read_text())["train_seconds"] / 4
        yield {"row": row, "processes": n, "s/step": seconds}


def prepare_scale(folder, n):
    """A corpus of n utterances, its labels made up, its audio linked to four files; an encoder."""
    data.write_demo(folder, speakers=[])  # the layout only
    for i, samples in enumerate(spread(4)):
        soundfile.write(folder / f"{i}.wav", np.random.uniform(-0.1, 0.1, samples), RATE)
    rows = ["FileName,EmoAct,EmoVal,SpkrID,Split_Set"]
    for i in range(n):
        name, split = f"{i:06}.wav", data.SPLITS[max(0, i % 5 - 2)]  # three fifths are Train
        (folder / "Audios" / name).symlink_to(folder / f"{i % 4}.wav")
        rows.append(f"{name},{1 + i // 5 % 7},{1 + i // 7 % 7},{i % 999},{split}")
    (folder / "Labels/labels_consensus.csv").write_text("\n".join(rows))
    data.write_encoder(folder / "encoder", width=8, channels=8)


def run_step(step, folder):
    """One step at scale: seconds and peak memory. "start" is all of train.py until the first batch
    from a full cache is there, "epoch" the order of an epoch's batches and of its evaluation."""
    line = f"--data {folder} --model {folder}/encoder --cache {folder}/cache --out {folder}/run"
    args = train.parse_args([*line.split(), "--precision", "fp32"])
    start = timeit.default_timer()

    def fit(args, _, datasets, *__):
        nonlocal start
        if step == "epoch":
            start = timeit.default_timer()
        order = train.batches(datasets["Train"], args, 1)
        train.batches(datasets["Development"], args)
        if step == "start":
            train.load_chunks(datasets["Train"], args, 0, 1, order[0])

    if step == "check":
        data.main([str(folder)])
    elif step == "fill":
        model = models.build(*models.load_encoder(args.model), vars(args))
        utterances = data.usable(data.read_corpus(folder))
        fingerprint, missing = cache.agree_with(args.cache, model, utterances, None)
        start = timeit.default_timer()
        cache.fill(args.cache, fingerprint, ((u.name, torch.ones(282, 8), 0) for u in missing))
    elif step == "entries":
        cache.read_entries(args.cache)
    else:
        with mock.patch.object(train, "fit", fit):
            train.run(args)
    seconds = timeit.default_timer() - start
    return {"step": step, "s": seconds, "peak GB": train.peak_memory("cpu") / 1e9}


def measure_scale(folder, n):
    """Steps with a corpus of n utterances, each in a process of its own."""
    prepare_scale(folder, n)
    for step in ("check", "fill", "entries", "start", "epoch"):
        with ProcessPoolExecutor(1, torch.multiprocessing.get_context("spawn")) as pool:
            yield {"utterances": n} | pool.submit(run_step, step, folder).result()


def main(argv=None):
    shape = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=shape)
    add = parser.add_argument
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--batch", type=int, help="utterances of each chunk that are run: all on CUDA; 4 on a CPU")
    add("--rows", type=lambda x: x.split(","), help=f"these only, of: {', '.join(ROWS)}")
    add("--quick", action="store_true", help="fewer rows and figures")
    add("--json", metavar="FILE", help="write the figures there, too, a JSON object a line")
    add("--memory", type=float, nargs="*", metavar="GB", help="peaks; CUDA: caps (11 48)")
    add("--peers", action="store_true", help="Hugging Face's step and PEFT's beside ours")
    add("--scale", type=int, metavar="N", help="steps of a corpus of N utterances, without a model")
    add("--processes", action="store_true", help="two processes beside one")
    options = parser.parse_args(argv)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # for all that follows, other processes too
    cuda = train.parse_args(["--demo", "--device", options.device]).device == "cuda"
    named = PEERS if options.peers else TABLE_2 if options.memory is not None else None
    rows = options.rows or named or (QUICK if options.quick else list(ROWS))
    if not set(rows) <= {*ROWS, *PEERS} or (options.memory and not cuda) or options.batch in (0, 1):
        parser.error("unknown rows (see --help), caps without CUDA, or a --batch below 2")
    device = torch.cuda.get_device_name() if cuda else f"CPU, {torch.get_num_threads()} threads"
    logging.disable_progress_bar()
    os.environ["KINETO_LOG_LEVEL"] = "99"  # the profiler's own lines, in the processes that follow
    n = options.batch or (BATCH if cuda or options.memory is not None else 4)
    caps = [None] if options.memory is None else [np.inf, *options.memory]
    with tempfile.TemporaryDirectory() as name, open(options.json or os.devnull, "w") as file:
        folder = Path(name)
        work = measure_rows(rows, n, caps)  # begins when it is asked for a line
        if options.scale:
            work = measure_scale(folder, options.scale)
        elif options.processes:
            work = measure_processes(folder)
        parts = [[{"device": device, "torch": torch.__version__}], work]
        if not (options.scale or options.processes or options.rows or named):
            parts += [measure_data(folder, cuda, options.quick)]
        for line in itertools.chain(*parts):
            line = {k: float(f"{x:.4g}") if isinstance(x, float) else x for k, x in line.items()}
            first, *more = (f"{k} {x}" for k, x in line.items() if x is not None)
            print(f"{first:36}", *(f"{text:16}" for text in more), flush=True)
            print(json.dumps(line), file=file, flush=True)


if __name__ == "__main__":
    main()
