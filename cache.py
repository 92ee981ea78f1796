"""A disk cache of the frozen half's output (section IV-C), filled once, read by runs that freeze as
much or more. All above `parse_args` stands alone: copy it. Its command needs data.py and model.py:

    python cache.py --data MSP-Podcast --layers 3 --out cache/last-3             # fill
    python cache.py --data MSP-Podcast --layers 3 --out cache/last-3 --verify    # read all back

A folder holds shard-00000.pt …: hidden states before a transformer layer, packed without padding,
each utterance computed alone, in float32, so one cache serves both paddings; and index.json, which
`read_index` describes. With torchrun, process r > 0 writes index-r.json and shard-r-00000.pt ….
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
from tqdm import tqdm

SHARD_BYTES = 256 * 2**20  # about what an interruption loses: an hour of speech
DTYPES = {"float16": torch.float16, "float32": torch.float32}


@contextlib.contextmanager
def atomic(path, mode="wb"):
    """Open a file that appears at `path` whole or, where OSError is raised, not at all."""
    temporary = f"{path}.{os.getpid()}.tmp"
    try:
        with open(temporary, mode) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save makes the second of the first
        Path(temporary).unlink(missing_ok=True)
        raise OSError(f"cannot write {path}: {str(error).splitlines()[0]}; rest is kept") from error


@contextlib.contextmanager
def lock(folder, name=".lock"):
    """Make `folder` and hold it for this process, until it ends; OSError if another does."""
    os.makedirs(folder, exist_ok=True)
    with open(Path(folder, name), "w") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError) as error:
            raise OSError(f"{folder} is in use by another process; give another folder") from error
        except OSError as error:  # some network file systems have no locks
            print(f"{folder} cannot be locked ({error.strerror}): use it from one process only")
        yield


def leave_on_interrupt(advice):
    """Ctrl-C ends the process at once: an exception might be swallowed in a destructor."""
    leave = lambda *_: (os.write(2, f"\ninterrupted: {advice}\n".encode()), os._exit(130))
    signal.signal(signal.SIGINT, leave)


def read_index(folder, wanted):
    """{"fingerprint": what the cache was made from, "seconds": it took, "utterances":
    {name: [shard, offset, frames, checksum, audio state]}}: index files merged, missing shards left
    out. ValueError if one is damaged or its fingerprint is not as `wanted` says."""
    fingerprint, seconds, utterances = wanted, [], {}
    present = {path.name for path in Path(folder).glob("shard-*.pt")}
    for path in sorted(Path(folder).glob("index*.json")):
        try:
            index = json.loads(path.read_text())
            found, entries = index["fingerprint"], index["utterances"].items()
            fingerprint = found | fingerprint
            seconds.append(float(index["seconds"]))
            for name, (shard, offset, frames, check, (size, changed, crc)) in entries:
                if shard in present:
                    utterances[name] = [shard, offset, frames, check, [size, changed, crc]]
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(f"{path} is damaged; delete it, and cache.py fills again") from error
        if differing := [key for key in fingerprint if found.get(key) != fingerprint[key]]:
            what = "; ".join(f"{key} {found.get(key)}, not {fingerprint[key]}" for key in differing)
            raise ValueError(f"the cache {folder} was made with another {what}. Fill one elsewhere")
    if not seconds:
        raise FileNotFoundError(f"{folder} is no cache: no index.json; fill one with cache.py")
    return {"fingerprint": fingerprint, "seconds": max(seconds), "utterances": utterances}


def checksum(index, name, hidden):
    """CRC-32 of what a cache was made from, an utterance's name and its hidden states (T, D):
    checked at every read, it finds damage, swapped entries, wrong offsets and wrong claims."""
    start = json.dumps([index["fingerprint"], name], sort_keys=True).encode()
    return zlib.crc32(hidden.numpy(), zlib.crc32(start))


def audio_state(path):
    """[bytes, time of change in ns, CRC-32 of the contents] of an audio file."""
    stat = os.stat(path)
    return [stat.st_size, stat.st_mtime_ns, zlib.crc32(Path(path).read_bytes())]


class CachedDataset:
    """Item i: hidden states (T, D) in the cache's dtype, target (A,) float32. Utterances need name,
    path and labels. ValueError where one is lacking, damaged, or its audio file has changed."""

    def __init__(self, folder, utterances, index):
        entries = index["utterances"]
        if lacking := [u.name for u in utterances if u.name not in entries]:
            raise ValueError(f"{folder} lacks {len(lacking)} utterances: {lacking[0]}; fill again")
        for u in utterances:
            shard, *_, state = entries[u.name]
            stat = os.stat(u.path)  # read only if its size or time are not the same
            if [stat.st_size, stat.st_mtime_ns] != state[:2] and audio_state(u.path)[2] != state[2]:
                raise ValueError(f"{u.path} has changed; delete {folder}/{shard} and fill again")
        self.folder, self.utterances, self.index = folder, utterances, index
        self.opened = {}  # shards stay mapped, as mapping (.6 ms) takes longer than reading (.3 ms)
        self.lengths = [entries[u.name][2] for u in utterances]  # in frames
        self.targets = torch.tensor([u.labels for u in utterances], dtype=torch.float32)  # (N, A)

    def __len__(self):
        return len(self.utterances)

    def __getitem__(self, i):
        name = self.utterances[i].name
        shard, offset, frames, expected, _ = self.index["utterances"][name]
        try:
            if shard not in self.opened:
                file = torch.load(Path(self.folder, shard), mmap=True, weights_only=True)
                self.opened[shard] = file["hidden"].detach()
            hidden = self.opened[shard][offset : offset + frames].clone()
            if checksum(self.index, name, hidden) != expected:
                raise ValueError("wrong checksum")
        except Exception as error:  # whatever a damaged or hostile file makes of the reader
            reason = f"is damaged at utterance {name}; delete it, and cache.py fills it again"
            raise ValueError(f"{Path(self.folder, shard)} {reason}") from error
        return hidden, self.targets[i]


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
    mine = index["utterances"].items()  # each process lists its own shards
    mine = {name: e for name, e in mine if e[0].rpartition("-")[0] == f"shard{suffix}"}
    with atomic(Path(folder, f"index{suffix}.json"), "w") as file:
        file.write(json.dumps(index | {"utterances": mine}))  # json.dump is ten times slower


def fill(folder, index, utterances, encode, process=0):
    """Add utterances to a cache, whose `lock` the caller holds. A shard, then the index, is written
    whole, by a thread while the model goes on: whenever the process ends, the cache is valid.

    index : read_index's, or {"fingerprint": …, "seconds": 0.0, "utterances": {}}.
    utterances : what it lacks, with name and path.
    encode : a generator that makes of them their hidden states (T, D), each as if alone.
    process : number of this process among those that fill the folder now.
    """
    dtype, parts, size, start = DTYPES[index["fingerprint"]["dtype"]], [], 0, time.perf_counter()
    with ThreadPoolExecutor(1) as writer:
        written = writer.submit(str)  # nothing yet
        for utterance, hidden in zip(utterances, encode(utterances), strict=True):
            hidden = hidden.to(dtype, copy=True)
            if not hidden.sum(dtype=torch.float32).isfinite():  # faster than isfinite().all()
                raise ValueError(f"{utterance.path}: NaN, or beyond {dtype} (--dtype float32)")
            parts.append((utterance, hidden))
            size += hidden.nbytes
            if size >= SHARD_BYTES or utterance is utterances[-1]:
                written.result()  # one at a time, to bound the memory
                index["seconds"] += time.perf_counter() - start
                start = time.perf_counter()
                written = writer.submit(add_shard, folder, index, process, parts)
                parts, size = [], 0
        written.result()


def verify(folder, index, utterances):
    """Print what is lacking in a cache, damaged or changed since -> number of defects."""
    defects = 0
    for u in utterances:
        try:
            CachedDataset(folder, [u], index)[0]
        except ValueError as error:
            print(error)
            defects += 1
    return defects


def parse_args(argv):
    parser = argparse.ArgumentParser(description="Fill or verify a cache of the frozen half.")
    add = parser.add_argument
    add("--data", required=True, help="corpus folder in MSP-Podcast's layout (section III)")
    add("--out", required=True, help="cache folder; what it holds already is kept")
    add("--model", default="facebook/wav2vec2-base", help="hub id or folder (%(default)s)")
    add("--layers", type=int, default=3, help="to train the last n layers, or fewer (3)")
    add("--dtype", choices=DTYPES, default="float16", help="float16 is half the size (default)")
    names = ["Train", "Development", "Test1"]
    add("--splits", nargs="+", default=names, help="to cache (Train Development Test1)")
    add("--verify", action="store_true", help="read all back and compare it with its checksums")
    add("--skip-bad", action="store_true", help="go on without utterances that cannot be used")
    add("--workers", type=int, default=2, help="threads that read audio ahead of the model (2)")
    return parser.parse_args(argv)


def main(argv=None):
    import data  # the command's own needs, not the part to copy
    from model import build, describe

    args = parse_args(argv)
    frozen = {"method": "partial", "layers": args.layers, "freeze_prefix": True}
    model, audio, identity = build(args.model, frozen)
    utterances = data.load_corpus(args.data, args.splits, (), audio["sample_rate"], args.skip_bad)
    fingerprint = {"encoder": identity, "layer": model.cut, "dtype": args.dtype, **audio}
    index = {"fingerprint": fingerprint, "seconds": 0.0, "utterances": {}}
    if args.verify or any(Path(args.out).glob("index*.json")):
        index = read_index(args.out, fingerprint)
    held = index["utterances"].keys()
    if args.verify:
        if n := verify(args.out, index, utterances):
            raise ValueError(f"{args.out} has {n} defects; delete the shards named, and fill again")
        return print(f"{args.out}: all {len(utterances)} utterances are intact")
    CachedDataset(args.out, [u for u in utterances if u.name in held], index)  # checks
    frames = sum(model.frames(u.samples) for u in utterances if u.name not in held)
    needed = frames * model.encoder.config.hidden_size * DTYPES[args.dtype].itemsize
    print(f"{describe(model, audio)}; layer {model.cut}: {needed / 1e9:.3g} GB to fill")
    # torchrun's words, or a job array's; dealt by the corpus, as processes may start one by one
    process, processes = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    lacking = [u for u in utterances[process::processes] if u.name not in held]
    cuda = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    model.eval().to(device := cuda if torch.cuda.is_available() else "cpu")

    def encode(utterances):
        dataset = data.SpeechDataset(utterances, **audio)
        items = data.read_ahead(dataset.__getitem__, range(len(dataset)), args.workers)
        for wave, _ in tqdm(items, "cache", len(dataset), leave=False, disable=process > 0 or None):
            yield model.frozen(wave[None].to(device), [len(wave)])[0][0].cpu()

    with lock(args.out, f".lock-{process}" if process else ".lock"):
        if needed > (free := shutil.disk_usage(args.out).free):
            raise OSError(f"{args.out} needs {needed / 1e9:.3g} GB, of {free / 1e9:.3g} GB free")
        fill(args.out, index, lacking, encode, process)
    print(f"{args.out}: {len(lacking)} utterances added; filled in {index['seconds']:.0f} s")


if __name__ == "__main__":
    leave_on_interrupt("the same line adds what is missing")
    try:
        main()
    except (ValueError, OSError) as error:  # bad input: one line and exit status 2
        argparse.ArgumentParser().exit(2, f"error: {error}\n")
