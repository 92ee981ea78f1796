"""A disk cache of the frozen half's output (section IV-C): filled once, read by every run that
freezes as much.

Everything above `parse_args` stands alone: copy it. As a command, with data.py and model.py:

    python cache.py --data MSP-Podcast --layers 3 --out cache/last-3             # fill
    python cache.py --data MSP-Podcast --layers 3 --out cache/last-3 --verify    # read all back
    torchrun --nproc-per-node 4 cache.py --data MSP-Podcast --layers 3 --out cache/last-3

A folder holds shard-00000.pt …: hidden states before a transformer layer, packed without padding,
each utterance computed alone, in float32, so one cache serves both paddings; and index.json: what
they were made from, in how many seconds, and of each utterance its shard, offset, frames, checksum
and audio file's state. The same command continues an interrupted fill. Process r > 0 of several
writes files of its own (index-r.json, shard-r-00000.pt …) and talks to none; readers merge indices.
"""

import argparse
import contextlib
import fcntl
import json
import os
import shutil
import signal
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.utils.data import Dataset
from tqdm import tqdm

SHARD_BYTES = 256 * 2**20  # about what an interruption loses: an hour of speech
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@contextlib.contextmanager
def atomic(path, mode="wb"):
    """Open a file that appears at `path` whole or not at all: written beside it, synced, renamed.
    OSError naming it where that fails, as on a full disk; what was there before is kept."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes the second of the first
        Path(temporary).unlink(missing_ok=True)
        advice = "what was finished before is kept; make room and run the same again"
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}; {advice}") from error


@contextlib.contextmanager
def lock(folder, name=".lock"):
    """Make `folder` and hold it for this process; OSError if another does. The kernel lets go of
    the lock when its process ends, however it ends."""
    os.makedirs(folder, exist_ok=True)
    with open(Path(folder, name), "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise OSError(f"{folder} is in use by another process; give another folder") from error
        except OSError as error:  # some network file systems have no locks
            print(f"{folder} cannot be locked ({error.strerror}): use it from one process only")
        yield


def leave_on_signals(advice):
    """Ctrl-C and SIGTERM end the process at once, with a line. An exception could be swallowed in
    a destructor; and as every file is whole at any moment, there is nothing to save."""

    def leave(*_):
        os.write(2, f"\ninterrupted: {advice}\n".encode())
        os._exit(130)

    signal.signal(signal.SIGINT, leave)
    signal.signal(signal.SIGTERM, leave)


def read_index(folder, wanted):
    """{"fingerprint", "seconds", "bytes", "utterances": {name: [shard, offset, frames, checksum,
    audio state]}} of a folder: its index files merged, without shards that are missing.
    FileNotFoundError where there is none, ValueError if one is damaged or not as `wanted` says."""
    merged, present = {}, {path.name for path in Path(folder).glob("shard-*.pt")}
    for path in sorted(Path(folder).glob("index*.json")):
        try:
            index = json.loads(path.read_text())
            entries, seconds = index["utterances"].items(), float(index["seconds"])
            held = {}
            for name, (shard, offset, frames, check, (size, changed, crc)) in entries:
                if shard in present:
                    held[name] = [shard, offset, frames, check, [size, changed, crc]]
            found, merged = index["fingerprint"], merged or index | {"utterances": {}}
            wanted = found | wanted
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged; delete it, and cache.py fills again") from error
        if differing := [key for key in wanted if found.get(key) != wanted[key]]:
            what = "; ".join(f"{key} {found.get(key)}, not {wanted[key]}" for key in differing)
            raise ValueError(f"the cache {folder} was made with another {what}. Fill one elsewhere")
        merged["utterances"] |= held
        merged["seconds"] = max(merged["seconds"], seconds)  # processes fill side by side
    if not merged:
        raise FileNotFoundError(f"{folder} is no cache: no index.json; fill one with cache.py")
    return merged | {"bytes": sum(Path(folder, name).stat().st_size for name in present)}


def checksum(index, name, hidden):
    """CRC-32 of what a cache was made from, an utterance's name and its hidden states (T, D).
    Checked at every read, it finds damage, swapped entries, wrong offsets and wrong claims."""
    start = json.dumps([index["fingerprint"], name], sort_keys=True)
    return zlib.crc32(hidden.numpy(), zlib.crc32(start.encode()))


def read_utterance(folder, index, name, opened):
    """Hidden states (T, D) of one utterance in the cache's dtype. ValueError naming shard and
    utterance if they are not what was written. opened : {shard: (frames, D), mapped from disk},
    kept from read to read, as mapping takes longer (.6 ms) than reading (.3 ms)."""
    shard, offset, frames, expected, _ = index["utterances"][name]
    try:
        if shard not in opened:
            file = torch.load(Path(folder, shard), mmap=True, weights_only=True)
            opened[shard] = file["hidden"].detach()
        hidden = opened[shard][offset : offset + frames].clone()
        if checksum(index, name, hidden) != expected:
            raise ValueError("wrong checksum")
    except Exception as error:  # whatever a damaged or hostile file makes of the reader
        reason = f"is damaged ({type(error).__name__}) at utterance {name}"
        advice = "delete that file, and the same cache.py fills it again"
        raise ValueError(f"{Path(folder, shard)} {reason}; {advice}") from error
    return hidden


def audio_state(path):
    """[bytes, time of change in ns, CRC-32 of the contents] of an audio file."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, zlib.crc32(Path(path).read_bytes())]


def audio_changed(path, state):
    """Whether an audio file is another than its state says. Read only if its size or time are."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns] != state[:2] and audio_state(path)[2] != state[2]


class CachedDataset(Dataset):
    """Item i: hidden states (T, D) in the cache's dtype, target (A,) float32. `utterances` need
    name, path and labels; `index` is read_index's. ValueError where an utterance is not in the
    cache or its audio file has changed since."""

    def __init__(self, folder, utterances, index):
        entries = index["utterances"]
        if lacking := [u.name for u in utterances if u.name not in entries]:
            what = f"{len(lacking)} utterances, first {lacking[0]}"
            raise ValueError(f"the cache {folder} lacks {what}; the same cache.py adds them")
        for u in utterances:
            if audio_changed(u.path, entries[u.name][4]):
                advice = f"delete {entries[u.name][0]} there, and the same cache.py fills it again"
                raise ValueError(f"{u.path} has changed since {folder} was filled; {advice}")
        self.folder, self.utterances, self.index, self.opened = folder, utterances, index, {}
        self.lengths = [entries[u.name][2] for u in utterances]  # in frames
        self.targets = torch.tensor([u.labels for u in utterances], dtype=torch.float32)  # (N, A)

    def __len__(self):
        return len(self.utterances)

    def __getitem__(self, i):
        name = self.utterances[i].name
        return read_utterance(self.folder, self.index, name, self.opened), self.targets[i]


def add_shard(folder, index, process, parts):
    """Write [(utterance, hidden states (T, D))] as one file, then the index that knows of it."""
    suffix, number, offset = f"-{process}" if process else "", 0, 0
    used = {shard for shard, *_ in index["utterances"].values()}
    while (shard := f"shard{suffix}-{number:05}.pt") in used:
        number += 1
    with atomic(Path(folder, shard)) as file:
        torch.save({"hidden": torch.cat([hidden for _, hidden in parts])}, file)
    for utterance, hidden in parts:
        check, state = checksum(index, utterance.name, hidden), audio_state(utterance.path)
        index["utterances"][utterance.name] = [shard, offset, len(hidden), check, state]
        offset += len(hidden)
    with atomic(Path(folder, f"index{suffix}.json"), "w") as file:
        mine = index["utterances"].items()  # each process lists its own shards
        mine = {name: e for name, e in mine if e[0].rpartition("-")[0] == f"shard{suffix}"}
        file.write(json.dumps(index | {"utterances": mine}))  # json.dump is ten times slower


def fill(folder, index, utterances, encode, process=0):
    """Add utterances to a cache.

    index : read_index's, or {"fingerprint": …, "seconds": 0.0, "utterances": {}}.
    utterances : what it lacks, with name and path.
    encode : a generator that makes of them their hidden states (T, D), each as if alone.
    process : number of this process among those that fill the folder now.
    A shard, and then the index, is written whole, by a thread while the model goes on: whenever the
    process ends, the cache is valid and lacks at most the last shards. The caller holds the `lock`.
    """
    dtype, parts, size, start = DTYPES[index["fingerprint"]["dtype"]], [], 0, time.perf_counter()
    with ThreadPoolExecutor(1) as writer:
        written = []
        for utterance, hidden in zip(utterances, encode(utterances), strict=True):
            hidden = hidden.to(dtype, copy=True)
            if not hidden.sum(dtype=torch.float32).isfinite():  # a tenth of isfinite().all()
                reason = f"NaN, or hidden states beyond the range of {dtype} (--dtype float32)"
                raise ValueError(f"{utterance.path}: {reason}")
            parts.append((utterance, hidden))
            size += hidden.nbytes
            if size >= SHARD_BYTES or utterance is utterances[-1]:
                for future in written:
                    future.result()  # one at a time, to bound the memory
                now = time.perf_counter()
                index["seconds"], start = index["seconds"] + now - start, now
                written = [writer.submit(add_shard, folder, index, process, parts)]
                parts, size = [], 0
        for future in written:
            future.result()


def verify(folder, index, utterances):
    """Every defect of a cache, as lines: what cannot be read, is lacking or was changed."""
    defects, opened, entries = [], {}, index["utterances"]
    for name in entries:
        try:
            read_utterance(folder, index, name, opened)
        except ValueError as error:
            defects.append(str(error))
    defects += [f"{u.name}: not in the cache" for u in utterances if u.name not in entries]
    for u in utterances:
        if u.name in entries and audio_state(u.path)[2] != entries[u.name][4][2]:
            defects.append(f"{Path(folder, entries[u.name][0])}: {u.path} has changed since")
    return defects


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Fill or verify a cache of the frozen half.")
    add = parser.add_argument
    add("--data", required=True, help="corpus folder in MSP-Podcast's layout (section III)")
    add("--out", required=True, help="cache folder; what it holds already is kept")
    add("--model", default="facebook/wav2vec2-base", help="hub id or folder (%(default)s)")
    add("--layers", type=int, default=3, help="to train the last n layers, or fewer (3)")
    add("--dtype", choices=DTYPES, default="float16", help="float16 is half the size (default)")
    splits = ["Train", "Development", "Test1"]
    add("--splits", nargs="+", default=splits, help="to cache (Train Development Test1)")
    add("--verify", action="store_true", help="read all back and compare it with its checksums")
    add("--skip-bad", action="store_true", help="go on without utterances that cannot be used")
    add("--workers", type=int, default=2, help="threads that read audio ahead of the model (2)")
    return parser.parse_args(argv)


def main(argv=None):
    import data  # the command's own needs, not the part to copy
    from model import EmotionModel, describe, identity, load_encoder

    args = parse_args(argv)
    encoder, audio = load_encoder(args.model)
    model, depth = EmotionModel(encoder).eval(), encoder.config.num_hidden_layers
    if not 1 <= args.layers <= depth:
        raise ValueError(f"--layers {args.layers}: this encoder has 1 to {depth}")
    model.cut = depth - args.layers
    how = {"attributes": (), "sample_rate": audio["sample_rate"], "skip_bad": args.skip_bad}
    utterances = data.load_corpus(args.data, args.splits, **how)
    fingerprint = {"encoder": identity(encoder), "layer": model.cut, "dtype": args.dtype, **audio}
    index = {"fingerprint": fingerprint, "seconds": 0.0, "utterances": {}}
    if args.verify or any(Path(args.out).glob("index*.json")):
        index = read_index(args.out, fingerprint)
    if not args.verify:
        print(f"{describe(encoder, audio)}; layer {model.cut}")
        fill_folder(args, model, audio, index, utterances)
    elif defects := verify(args.out, index, utterances):
        print("\n".join(defects))
        advice = "delete the shards named above and run the same without --verify"
        raise ValueError(f"{args.out} has {len(defects)} defects; {advice}")
    else:
        print(f"{args.out}: all {len(utterances)} utterances are intact")


def fill_folder(args, model, audio, index, utterances):
    """`fill` with the audio of a corpus, this process's part of it. OSError where the disk is too
    small. RANK and WORLD_SIZE are torchrun's, or a job array's."""
    import data

    cuda = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    device = cuda if torch.cuda.is_available() else "cpu"
    process, n = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    held = [u for u in utterances if u.name in index["utterances"]]
    CachedDataset(args.out, held, index)  # refuses changed audio files
    lacking = [u for u in utterances if u.name not in index["utterances"]]
    frames, width = sum(model.frames(u.samples) for u in lacking), model.encoder.config.hidden_size
    needed = frames * width * DTYPES[args.dtype].itemsize
    # the nearest folder that exists: --out itself, or above
    disk = next(path for path in Path(args.out, "x").absolute().parents if path.exists())
    if needed > (free := shutil.disk_usage(disk).free):
        raise OSError(
            f"the cache needs {needed / 1e9:.3g} GB more, {disk} has {free / 1e9:.3g} GB free; "
            "make room, or give --out on another disk, fewer --splits or --dtype float16"
        )
    # dealt by the corpus, not by what is lacking: processes need not start at the same moment
    mine = {u.name for u in utterances[process::n]} - index["utterances"].keys()
    model.to(device)

    def encode(utterances):
        dataset = data.SpeechDataset(utterances, **audio)
        items = data.read_ahead(dataset.__getitem__, range(len(dataset)), args.workers)
        for wave, _ in tqdm(items, "cache", len(dataset), leave=False, disable=process > 0 or None):
            yield model.frozen(wave[None].to(device), [len(wave)])[0][0].cpu()

    with lock(args.out, f".lock-{process}" if process else ".lock"):
        fill(args.out, index, [u for u in lacking if u.name in mine], encode, process)
    size = sum(path.stat().st_size for path in Path(args.out).glob("shard-*.pt")) / 1e9
    seconds = index["seconds"]
    print(f"{args.out}: {len(mine)} utterances added; {size:.3g} GB, filled in {seconds:.0f} s")


if __name__ == "__main__":
    leave_on_signals("finished shards are kept; the same command continues")
    try:
        main()
    except (ValueError, OSError) as error:  # bad input: one line and exit status 2
        argparse.ArgumentParser().exit(2, f"error: {error}\n")
