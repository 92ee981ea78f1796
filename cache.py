"""A disk cache of the frozen layers' outputs (section IV-C), filled once and read by every run that
freezes them.

Everything above `parse_args` stands alone: copy it. As a command (which imports data.py and
model.py):

    python cache.py --data MSP-Podcast --layer 9 --out cache/last-3    # for the last 3 of 12 layers
    python cache.py --data MSP-Podcast --layer 9 --out cache/last-3 --verify    # read all back

A folder holds index.json and shard-00000.pt …: hidden states before transformer layer `layer`,
packed without padding, each utterance computed as if alone, so one cache serves both paddings. An
interrupted fill is continued by the same command. index.json: fingerprint (what the contents depend
on), seconds (of filling), shards {file: {bytes, checksum}}, utterances {name: [shard, offset, frames,
checksum, audio]}, and a checksum of all that.
"""

import argparse
import contextlib
import fcntl
import hashlib
import json
import os
import shutil
import signal
import sys
import time
import zlib
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

SHARD_BYTES = 256 * 2**20  # what an interruption can lose: about an hour of speech
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@contextlib.contextmanager
def atomic(path, mode="wb"):
    """Open a file that appears at `path` complete or not at all: temporary name, fsync, rename,
    fsync of the folder. OSError naming it where that fails, as on a full disk."""
    temporary = f"{path}.tmp"
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        if isinstance(error, OSError | RuntimeError):  # the second: what torch.save makes of it
            reason = str(error).splitlines()[0]
            advice = "What was finished before is kept; make room and run the same again"
            raise OSError(f"cannot write {path}: {reason}. {advice}") from error
        raise
    folder = os.open(os.path.dirname(path) or ".", os.O_RDONLY)
    os.fsync(folder)
    os.close(folder)


@contextlib.contextmanager
def lock(folder):
    """Make `folder` and hold it for this process; OSError if another process does. The kernel lets
    go of the lock when its process ends, however it ends; its workers do not inherit it, as they
    would from `flock`."""
    os.makedirs(folder, exist_ok=True)
    with open(Path(folder, ".lock"), "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            reason = "is in use by another process; wait for it or give another folder"
            raise OSError(f"{folder} {reason}") from error
        yield


def out_of_memory(error):
    """Whether an exception says that memory is full: a CPU and CUDA's libraries each have their
    words for it."""
    words = "out of memory", "allocate memory", "ALLOC_FAILED", "unable to find an engine"
    return isinstance(error, MemoryError) or any(word in str(error) for word in words)


def index_checksum(index):
    rest = {key: value for key, value in index.items() if key != "checksum"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def write_index(folder, index):
    index["checksum"] = index_checksum(index)
    with atomic(Path(folder, "index.json"), "w") as file:
        file.write(json.dumps(index))  # json.dump is ten times slower


def read_index(folder):
    """The index of a cache folder. ValueError if it is not one that `fill` wrote, to the byte of
    its contents."""
    path = Path(folder, "index.json")
    try:
        index = json.loads(path.read_text())
        intact = index["checksum"] == index_checksum(index)
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file; fill the cache first (cache.py)") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise ValueError(f"{path} is damaged or was changed; delete {folder} and fill it again")
    return index


def compare(folder, index, fingerprint):
    """ValueError that says what differs, unless the cache was made from what `fingerprint` says."""
    found = index["fingerprint"]
    differing = [key for key in fingerprint if found.get(key) != fingerprint[key]]
    if differing:
        what = "; ".join(f"{key} {found.get(key)}, not {fingerprint[key]}" for key in differing)
        raise ValueError(f"the cache {folder} was made with another {what}. Fill one elsewhere")


def checksum(name, hidden):
    """CRC-32 of a name, of an utterance or a shard, and its frames (T, D): finds flipped bits and
    swapped entries."""
    return zlib.crc32(hidden.numpy(), zlib.crc32(name.encode()))


def audio_state(path):
    """[bytes, time of change in ns, CRC-32 of the contents] of an audio file."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, zlib.crc32(Path(path).read_bytes())]


def audio_changed(path, state):
    """Whether an audio file differs from its `audio_state`. Its contents are read only if size or
    time differ."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns] != state[:2] and audio_state(path)[2] != state[2]


def refuse_changed(folder, utterances, entries):
    """ValueError if an audio file has changed since the cache was filled from it."""
    changed = [u.name for u in utterances if audio_changed(u.path, entries[u.name][4])]
    if changed:
        raise ValueError(
            f"{len(changed)} audio files changed since the cache {folder} was filled, first "
            f"{changed[0]}; fill a cache in another folder"
        )


def read_shard(path):
    """Packed hidden states (frames, D), mapped from disk. Only tensors are unpickled. ValueError if
    damaged."""
    try:
        return torch.load(path, mmap=True, weights_only=True)["hidden"].detach()
    except Exception as error:  # whatever a damaged or hostile file makes of the reader
        reason = f"is damaged or missing ({type(error).__name__})"
        raise ValueError(f"{path} {reason}; delete it and run the same cache.py again") from error


def read_utterance(folder, index, name):
    """Hidden states (T, D) of one utterance. ValueError naming shard and utterance if they are not
    what was written.

    The shard is mapped anew each time (0.6 ms): mapped pages count as resident memory, which so
    stays flat.
    """
    shard, offset, frames, expected, _ = index["utterances"][name]
    try:
        hidden = read_shard(Path(folder, shard))[offset : offset + frames].clone()
        if checksum(name, hidden) != expected:
            path = Path(folder, shard)
            raise ValueError(f"{path} is damaged; delete it and run the same cache.py again")
    except Exception as error:  # as in read_shard
        raise ValueError(f"utterance {name}: {error}") from error
    return hidden


class CachedDataset(Dataset):
    """Item i: hidden states (T, D) in the cache's dtype, target (2,) float32, i. `utterances` need
    name, path, activation, valence; `index` is what read_index gives. ValueError where one is not
    in the cache or its audio file has changed since."""

    def __init__(self, folder, utterances, index):
        self.folder, self.utterances, self.index = folder, utterances, index
        entries = index["utterances"]
        lacking = [u.name for u in utterances if u.name not in entries]
        if lacking:
            raise ValueError(
                f"the cache {folder} lacks {len(lacking)} of {len(utterances)} utterances, first "
                f"{lacking[0]}; the same cache.py as before adds them"
            )
        refuse_changed(folder, utterances, entries)
        self.lengths = [entries[u.name][2] for u in utterances]

    def __len__(self):
        return len(self.utterances)

    def __getitem__(self, i):
        utterance = self.utterances[i]
        hidden = read_utterance(self.folder, self.index, utterance.name)
        return hidden, torch.tensor([utterance.activation, utterance.valence]), i


def plan(frames, batch_size, frames_a_shard):
    """Consecutive utterances to shards, each a list of batches of indices from short to long. A
    plan for the rest after any finished shard is the rest of the plan, so a continued fill writes
    what an undisturbed one does."""
    shards, total = [[]], 0
    for i, n in enumerate(frames):
        if shards[-1] and total + n > frames_a_shard:
            shards.append([])
            total = 0
        shards[-1].append(i)
        total += n
    batches = []
    for rows in filter(None, shards):
        rows.sort(key=lambda i: frames[i])
        batches.append([rows[k : k + batch_size] for k in range(0, len(rows), batch_size)])
    return batches


def is_file_of(path, size):
    return path.exists() and os.path.getsize(path) == size


def start_index(folder, fingerprint):
    """The index to continue: what the folder holds in intact files, or nothing."""
    if not Path(folder, "index.json").exists():
        return {"fingerprint": fingerprint, "seconds": 0.0, "shards": {}, "utterances": {}}
    index = read_index(folder)
    compare(folder, index, fingerprint)
    shards = index["shards"].items()
    index["shards"] = {s: e for s, e in shards if is_file_of(Path(folder, s), e["bytes"])}
    entries = index["utterances"].items()
    index["utterances"] = {name: e for name, e in entries if e[0] in index["shards"]}
    return index


def add_shard(folder, index, shard, parts):
    """Write {utterance: hidden states (T, D)} as one file, then the index that knows of it."""
    path, offset, packed = Path(folder, shard), 0, torch.cat(list(parts.values()))
    with atomic(path) as file:
        torch.save({"hidden": packed}, file)
    size = os.path.getsize(path)
    index["shards"][shard] = {"bytes": size, "checksum": checksum(shard, packed)}
    for utterance, hidden in parts.items():
        check, audio = checksum(utterance.name, hidden), audio_state(utterance.path)
        index["utterances"][utterance.name] = [shard, offset, len(hidden), check, audio]
        offset += len(hidden)
    write_index(folder, index)


def fill(folder, fingerprint, dataset, frames, width, encode, collate_fn, batch_size=8, workers=2):
    """Write what the cache does not hold yet; returns the index. The caller holds the folder's
    `lock`.

    dataset : items (waveform (S,), target, i); dataset.utterances have name and path.
    frames : [int], the length of each item's hidden states.
    encode : wave (B, S), samples (B,) -> hidden (B, T, D), as if each were alone.
    A shard and then the index are written whole, so whenever the process ends, the cache is valid
    and holds all finished shards.
    """
    dtype, index = DTYPES[fingerprint["dtype"]], start_index(folder, fingerprint)
    held = [u for u in dataset.utterances if u.name in index["utterances"]]
    refuse_changed(folder, held, index["utterances"])
    todo = [i for i, u in enumerate(dataset.utterances) if u.name not in index["utterances"]]
    total, bytes_a_frame = sum(frames[i] for i in todo), width * dtype.itemsize
    needed = total * bytes_a_frame + 700 * len(todo)  # the second: the index
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"the cache needs {needed / 1e9:.3g} GB more, {folder} has {free / 1e9:.3g} GB free; "
            "make room, or give --out on another disk, fewer --splits or --dtype float16"
        )
    shards = plan([frames[i] for i in todo], batch_size, SHARD_BYTES // bytes_a_frame)
    batches = [[todo[i] for i in batch] for shard in shards for batch in shard]
    loader = DataLoader(dataset, batch_sampler=batches, collate_fn=collate_fn, num_workers=workers)
    loader = iter(loader)  # one for all shards: its workers read ahead
    numbers = (n for n in range(10**5) if f"shard-{n:05}.pt" not in index["shards"])
    with tqdm(total=total, unit="frame", unit_scale=True, desc="cache") as bar:
        for shard in shards:
            start, parts = time.perf_counter(), {}
            for _ in shard:
                wave, samples, _, rows = next(loader)
                for hidden, i in zip(encode(wave, samples), rows.tolist(), strict=True):
                    part = hidden[: frames[i]].to(dtype, copy=True)
                    if not part.sum(dtype=torch.float32).isfinite():  # a tenth of isfinite().all()
                        name, reason = dataset.utterances[i].name, f"hidden states out of {dtype}"
                        raise ValueError(f"{name}: {reason}'s range; use --dtype float32")
                    parts[dataset.utterances[i]] = part
                    bar.update(frames[i])
            index["seconds"] += time.perf_counter() - start
            add_shard(folder, index, f"shard-{next(numbers):05}.pt", parts)
    return index


def verify(folder, utterances):
    """Every defect of a cache, as lines: shards against their checksum, each utterance, and its
    audio file."""
    index, defects = read_index(folder), []
    for shard, entry in index["shards"].items():
        path, intact = Path(folder, shard), False
        with contextlib.suppress(Exception):  # as in read_shard
            intact = checksum(shard, read_shard(path)) == entry["checksum"]
        if not intact or not is_file_of(path, entry["bytes"]):
            defects.append(f"{shard}: truncated, changed or missing")
    for name in index["utterances"]:
        try:
            read_utterance(folder, index, name)
        except ValueError as error:
            defects.append(str(error))
    for u in utterances:
        if u.name not in index["utterances"]:
            defects.append(f"{u.name}: not in the cache")
        elif audio_state(u.path)[2] != index["utterances"][u.name][4][2]:
            shard = index["utterances"][u.name][0]
            defects.append(f"{shard}: the audio file of {u.name} has changed")
    return defects


def cache_fingerprint(digest, layer, dtype, audio):
    """What a cache's contents depend on, besides the audio files."""
    rule = "each utterance as if alone"
    return {"encoder": digest, "layer": layer, "dtype": dtype, **audio, "padding": rule}


def parse_args(argv):
    parser = argparse.ArgumentParser(
        usage="python cache.py --data ROOT --out DIR [--layer 9] [options]",
        description="Fill or verify a cache of the frozen layers' outputs.",
    )
    add = parser.add_argument
    add("--data", required=True, help="corpus folder")
    add("--out", required=True, help="cache folder; what it holds already is kept")
    add("--model", default="facebook/wav2vec2-base", help="encoder: hub id or local folder")
    add("--layer", type=int, default=9, help="cache this layer's input; -3: the third last's")
    add("--dtype", choices=DTYPES, default="float16", help="float16 is half the size (default)")
    add("--splits", nargs="+", default=["Train", "Development", "Test1"], help="what to cache")
    add("--verify", action="store_true", help="read everything back; compare with its checksums")
    add("--skip-bad", action="store_true", help="go on without utterances that cannot be used")
    add("--batch-size", type=int, default=8, help="utterances a pass; for speed, changes no number")
    add("--workers", type=int, default=2, help="processes that decode audio")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto")
    add("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    if args.batch_size < 1 or args.workers < 0:
        parser.error("--batch-size must be at least 1, --workers at least 0")
    return parser, args


def run(args):
    import data  # the command's own needs, not the part to copy
    from model import EmotionModel, load_encoder, weights_hash

    device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    if args.device == "cuda" and device == "cpu":
        raise ValueError("--device cuda: PyTorch sees no CUDA device")
    utterances, problems = data.read_corpus(args.data)
    encoder, audio = load_encoder(args.model)
    if not args.verify:
        utterances = [u for u in utterances if u.split in args.splits]
        utterances, more = data.check_audio(utterances, audio["sample_rate"])
        problems += more
    utterances = data.select(utterances, problems, args.splits, args.skip_bad)
    depth = encoder.config.num_hidden_layers
    layer = args.layer + depth if args.layer < 0 else args.layer
    if not 0 <= layer < depth:
        raise ValueError(f"--layer {args.layer}: this encoder has layers 0 to {depth - 1}")
    fingerprint = cache_fingerprint(weights_hash(encoder), layer, args.dtype, audio)
    if args.verify:
        compare(args.out, read_index(args.out), fingerprint)
        defects = verify(args.out, utterances)
        if defects:
            print("\n".join(defects))
            raise ValueError(
                f"{args.out} has {len(defects)} defects; delete the shards named above, then the "
                "same command without --verify fills what is missing"
            )
        print(f"{args.out}: all {len(utterances)} utterances are intact")
        return
    model = EmotionModel(encoder, padding="exact").to(device).eval()

    @torch.no_grad()
    def encode(wave, samples):
        hidden, _ = model.prefix(wave.to(device), samples.to(device), layer)
        return hidden.cpu()

    dataset = data.SpeechDataset(utterances, **audio)
    frames = [model.frames(u.samples) for u in utterances]
    width, how = encoder.config.hidden_size, (data.collate, args.batch_size, args.workers)
    with lock(args.out):
        index = fill(args.out, fingerprint, dataset, frames, width, encode, *how)
    size = sum(shard["bytes"] for shard in index["shards"].values())
    print(
        f"{args.out}: layer {layer} of {len(index['utterances'])} utterances, {size / 1e9:.2f} GB, "
        f"filled in {index['seconds']:.0f} s"
    )


def main(argv=None):
    parser, args = parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run(args)
    except KeyboardInterrupt:
        print("interrupted: finished shards are kept; the same command continues", file=sys.stderr)
        sys.exit(130)
    except (RuntimeError, MemoryError) as error:
        if not out_of_memory(error):
            raise
        smaller = max(1, args.batch_size // 2)
        parser.error(f"out of memory; finished shards are kept: --batch-size {smaller}")
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        parser.error(str(error).strip().splitlines()[-1])  # of a worker's: the line that says what


if __name__ == "__main__":
    main()
