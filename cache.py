"""A disk cache of what the frozen stages compute (section IV-C). Filled for the last 3 layers, it
serves runs of the last 3, 2 and 1. For the last 1, the two frozen layers between what is stored and
what is trained are computed at each step.

The paper has three steps. The first, storing the hidden states of each utterance, is `encode`,
which computes them, and `fill`. The second, making batches, is CachedDataset, which reads them, and
train.load_chunks, which pads them. The third, training, is the rest of train.py.

A folder holds shards, and each shard describes itself. It is a file in Hugging Face's format
safetensors. Each of its tensors is named after its utterance, and has no padding. Its metadata say
what they were made from, and hold a checksum of each. There is no index that could disagree with
them, and nothing is unpickled. All above the line `# ---- command line ----` needs no other file of
this project: copy it.

    python cache.py --data MSP-Podcast --layers 3 --out cache/last-3    # or train.py --cache
    python cache.py --out cache/last-3 --verify                         # read all of it back

In comments: S samples, T frames, D width, A attributes.
"""

import argparse
import contextlib
import fcntl
import functools
import io
import itertools
import json
import os
import shutil
import sys
import time
import zlib
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import save
from tqdm import tqdm

SHARD_BYTES = 128 * 2**20  # About half an hour of speech. An interruption loses at most one shard.
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def encode(model, recordings):
    """Yield items for `fill` from recordings, each (name, wave (S,), CRC-32 of its file).

    Each utterance is computed alone and unpadded, in float32, whatever it is stored in. So one
    cache serves runs of any precision and padding. In training mode, too, nothing here is random,
    as the model keeps its frozen stages in eval mode.
    """
    device = model.head.weight.device
    for name, wave, audio_crc in recordings:
        hidden, _ = model.prefix(wave[None].to(device), [len(wave)])  # (1, T, D)
        yield name, hidden[0], audio_crc


def fill(folder, fingerprint, items, process=0):
    """Write hidden states into shards of a folder: safetensors files, one tensor an utterance.

    fingerprint : {"dtype": "float16" or "float32", and whatever else the states were made from},
        of JSON's types, and the same for all of a folder
    items : any iterable of (name, hidden (T, D) float, CRC-32 of its recording or None)
    process : number of this process among those that fill the folder now

    A shard is written whole or not at all, so the folder is a valid cache at any moment. ValueError
    for hidden states that are no (T, D), have no frame, or are not finite in that dtype. The
    greatest float16 is 65,504.
    """
    os.makedirs(folder, exist_ok=True)
    items = iter(items)  # Each shard takes the next of them.
    for number in itertools.count():
        path = Path(folder, f"shard-{process}-{number:05}.safetensors")
        if path.exists():
            continue  # Nothing is written over.
        began = time.perf_counter()
        shard = {}
        crcs = {}
        size = 0
        for name, hidden, audio_crc in items:
            shard[name] = as_stored(name, hidden, DTYPES[fingerprint["dtype"]])
            crcs[name] = [checksum(fingerprint, name, shard[name]), audio_crc]
            size += shard[name].nbytes
            if size >= SHARD_BYTES:
                break
        if not shard:
            return
        seconds = time.perf_counter() - began  # also those in which `items` were computed
        about = {"fingerprint": fingerprint, "crcs": crcs, "seconds": seconds}
        with atomic(path) as file:
            file.write(save(shard, {"about": json.dumps(about)}))


def as_stored(name, hidden, dtype):
    """Hidden states as a shard takes them. ValueError if they cannot be used."""
    # A copy, because the caller may reuse its tensor for the next utterance.
    hidden = hidden.detach().to("cpu", dtype, copy=True).contiguous()
    total = hidden.sum(dtype=torch.float32)  # Not finite if an element is not: a fast test.
    if hidden.ndim != 2 or not (len(hidden) and total.isfinite()):
        reason = f"not (T, D), empty, NaN, or too great for {dtype} (--dtype float32)"
        raise ValueError(f"'{name}': {reason}")
    return hidden


def checksum(fingerprint, name, hidden):
    """CRC-32 of what a cache was made from, and of an utterance's name, number of frames and hidden
    states. It finds damage, and hidden states that are another utterance's or another encoder's."""
    claim = json.dumps([fingerprint, name, len(hidden)], sort_keys=True)
    return zlib.crc32(hidden.numpy(), zlib.crc32(claim.encode()))


class Entry(NamedTuple):
    """Where the hidden states of an utterance are, and what is known of them."""

    path: Path  # of the shard
    name: str
    fingerprint: dict  # of the shard
    frames: int
    checksum: int
    audio_crc: int | None  # CRC-32 of the recording's file as it was read, if there was one

    def read(self):
        """Hidden states (T, D), in the cache's dtype. ValueError where they are damaged."""
        hidden = open_shard(self.path).get_tensor(self.name).clone()
        if checksum(self.fingerprint, self.name, hidden) != self.checksum:
            raise ValueError(
                f"'{self.path}' is damaged at '{self.name}': delete it, and fill again"
            )
        return hidden


@functools.cache
def open_shard(path):
    """A shard, whose hidden states are mapped, not read. It stays so until read_entries is called
    again, because opening one takes longer than reading an utterance from it."""
    return safe_open(path, "pt")


def read_entries(folder):
    """What a folder holds -> {name: Entry}, the fingerprint of its shards ({} without one), and
    the seconds that filling took. ValueError if a shard cannot be read, or is of another cache."""
    open_shard.cache_clear()  # What is in the folder may have changed.
    entries = {}
    fingerprint = {}
    # {process: seconds}. Processes fill side by side, so the slowest one's time is that of all.
    seconds = Counter()
    # Runs that filled a folder side by side may have stored an utterance twice. Shards are read
    # from the last name to the first, so that the first one's counts. What a run of one process
    # has filled then stays what it is, whatever others add.
    for path in sorted(Path(folder).glob("shard-*.safetensors"), reverse=True):
        try:
            shard = open_shard(path)
            about = json.loads(shard.metadata()["about"])
            own = about["fingerprint"]
            if own["dtype"] not in DTYPES:
                raise ValueError("unknown dtype")
            for name, crcs in about["crcs"].items():
                frames = shard.get_slice(name).get_shape()[0]  # The states are not read yet.
                entries[name] = Entry(path, name, own, frames, *crcs)
            seconds[path.name.split("-")[1]] += about["seconds"]
            fingerprint = fingerprint or own
        except Exception as error:  # whatever reading a damaged or hostile file raises
            raise ValueError(
                f"'{path}' cannot be read ({error!r}): if it is damaged, delete it, and fill again"
            ) from error
        if own != fingerprint:
            raise ValueError(
                f"'{path}' is of another cache than the shards after it: delete it, or them"
            )
    return entries, fingerprint, max(seconds.values(), default=0.0)


class CachedDataset:
    """Item i: hidden states (T, D) in the cache's dtype, target (A,) float32.

    entries : of read_entries
    utterances : objects with name, and labels, A floats on 0 to 1

    Pickled, for a DataLoader with processes, it carries the entries and not the shards.
    `lengths` are in frames. KeyError where an utterance is not in the cache, ValueError where it
    turns out to be damaged as it is read.
    """

    def __init__(self, entries, utterances):
        self.utterances = utterances
        self.entries = [entries[u.name] for u in utterances]
        self.lengths = [entry.frames for entry in self.entries]
        self.targets = torch.tensor([u.labels for u in utterances], dtype=torch.float32)  # (N, A)

    def __len__(self):
        return len(self.utterances)

    def __getitem__(self, i):
        return self.entries[i].read(), self.targets[i]


@contextlib.contextmanager
def atomic(path, mode="wb", encoding=None):
    """Open a file that appears at `path`, a Path, whole or not at all. OSError if it cannot be
    written."""
    # The file is hidden until then. Of several processes, each has one of its own.
    temporary = f"{path.parent}/.{path.name}.{os.environ.get('RANK', '0')}.tmp"
    try:
        with open(temporary, mode, encoding=encoding) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch.save turns an OSError into a RuntimeError.
        Path(temporary).unlink(missing_ok=True)
        reason = getattr(error, "strerror", None) or "is the disk full?"
        raise OSError(f"cannot write '{path}': {reason}; what was there is kept") from error


@contextlib.contextmanager
def lock(folder, name=".lock"):
    """Make a folder, and hold a lock of it. Where another process holds that, say so and wait.
    Where there are no locks, say so and go on."""
    os.makedirs(folder, exist_ok=True)
    with open(Path(folder, name), "a") as file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another process, which writes into '{folder}'", file=sys.stderr)
            fcntl.lockf(file, fcntl.LOCK_EX)
        except OSError as error:  # Some network file systems have no locks.
            note = f"'{folder}' cannot be locked ({error.strerror}): use it from one process only"
            print(note, file=sys.stderr)
        yield


# ---- command line ----


def fill_missing(folder, model, utterances, args, dtype=None):
    """Fill this process's share of those of `utterances` that a cache lacks, on the model's device.
    The model is left with the cache's cut. ValueError where the folder is no cache, or none to
    train the model from.

    args : skip_bad and workers, of cache.py or train.py
    dtype : of a new cache, a key of DTYPES (None: float16)

    The folder is looked at twice. First without a lock: taking one writes a file, and a complete
    cache may be read-only. Then with the lock held, as another run may have filled it.
    """
    # Only commands need these, and no part of what is copied.
    import data
    import model as models

    def load(utterance):
        """(name, wave, CRC-32): the file is read once, so the CRC is of the very bytes decoded."""
        file = io.BytesIO(Path(utterance.path).read_bytes())
        file.name = utterance.path  # what an error names
        wave = data.load_audio(file, model.sample_rate)
        return utterance.name, torch.from_numpy(wave), zlib.crc32(file.getbuffer())

    process, processes = process_numbers()
    # A share is by position in the corpus. By position in what is missing, shares would shift as
    # other processes fill, and an utterance could be in none.
    _, missing = agree_with(folder, model, utterances[process::processes], dtype)
    found = data.check_audio(missing, model.sample_rate)  # It sets their `samples`, too.
    wanted = data.usable(found, args.skip_bad)
    if not wanted:
        return
    # There is a lock for each process number, because shards are named by it: two runs that fill at
    # once would write the same names.
    with lock(folder, f".lock-{process}"):
        fingerprint, missing = agree_with(folder, model, wanted, dtype)
        frames = sum(model.count_frames(u.samples) for u in missing)
        size = frames * model.encoder.config.hidden_size * DTYPES[fingerprint["dtype"]].itemsize
        print(f"'{folder}' lacks {len(missing):,} utterances, {size / 1e9:.3g} GB")
        if size > shutil.disk_usage(folder).free:
            raise OSError(f"'{folder}' is on a disk with less free space: give another folder")
        recordings = data.read_ahead(load, missing, args.workers, "fill")
        with models.explain_memory("leave out the longest recordings"):
            fill(folder, fingerprint, encode(model, recordings), process)


def agree_with(folder, model, utterances, dtype):
    """If the folder's cut lies before the model's, move the model's there. Then compare all else.
    Returns the fingerprint of what would be filled into the folder now, and those of `utterances`
    that it lacks.

    A folder with shards keeps its cut and dtype. A new one gets the model's cut, and `dtype` or, if
    that is None, float16. ValueError where the shards differ from the model or from `dtype`, and
    where a folder without shards holds other files.
    """
    # Hidden files, locks among them, do not matter. Another process may write the first shard just
    # now, so it is after looking for files that the shards are read.
    seen = [path.name for path in Path(folder).glob("[!.]*")]
    entries, stored, _ = read_entries(folder)
    if seen and not stored:
        raise ValueError(f"'{folder}' is no cache, as it holds '{seen[0]}': give another folder")
    # The folder's cut may lie before the model's: the stages between run frozen. It may not lie
    # after it: stages that are to be trained would be in the cache. A cache of cut 0 would hold the
    # CNN's features, and is never made.
    if stored.get("cut") in range(1, model.cut):
        model.cut = stored["cut"]
    fingerprint = {
        "encoder_sha256": model.encoder_sha256,
        "cut": model.cut,
        "dtype": dtype or stored.get("dtype", "float16"),
        "sample_rate": model.sample_rate,
        "normalise": model.normalise,
        "prefix_version": model.PREFIX_VERSION,
    }
    for key in fingerprint | stored:
        if stored and stored.get(key) != fingerprint.get(key):
            made = f"{key} {stored.get(key)}, not {fingerprint.get(key)}"
            raise ValueError(f"'{folder}' was made with {made}: give another folder")
    return fingerprint, [u for u in utterances if u.name not in entries]


def process_numbers():
    """Number of this process, and how many there are. torchrun sets RANK and WORLD_SIZE; in the
    script of a job array, set both yourself."""
    process = int(os.environ.get("RANK", "0"))
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    half = ("RANK" in os.environ) != ("WORLD_SIZE" in os.environ)
    if half or not 0 <= process < processes:
        raise ValueError(
            f"RANK {process} of WORLD_SIZE {processes}: set both, or neither; RANK counts from 0"
        )
    return process, processes


def verify(folder, root):
    """Print every utterance that is damaged or, if it is in the corpus `root`, whose recording has
    changed or gone since. ValueError if there are any."""
    import data

    entries, _, _ = read_entries(folder)
    if not entries:
        raise ValueError(f"'{folder}' holds no cache: give another folder by --out")
    paths = {}
    if root:
        utterances, _ = data.read_corpus(root, attributes=())  # Labels are of no interest here.
        paths = {u.name: Path(u.path) for u in utterances if u.name in entries}
    defects = 0
    for name, entry in data.progress(entries.items(), "verify"):
        try:
            entry.read()
            # Where another program called `fill`, there may be no CRC of the recording.
            known = name in paths and entry.audio_crc is not None
            if known and zlib.crc32(paths[name].read_bytes()) != entry.audio_crc:
                raise ValueError(f"'{paths[name]}' has changed: delete '{entry.path}'")
        except (ValueError, OSError) as error:
            tqdm.write(str(error))
            defects += 1
    if defects:
        raise ValueError(f"'{folder}': {defects} of {len(entries)} utterances are not as filled")
    print(
        f"'{folder}': all {len(entries):,} utterances are intact, {len(paths):,} of them in --data"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(description="Fill or verify a cache of the frozen stages.")
    add = parser.add_argument
    add("--out", required=True, help="cache folder; what it holds already is kept")
    add("--data", help="corpus folder in MSP-Podcast's layout (section III)")
    add("--model", default="facebook/wav2vec2-base", help="hub id or folder (%(default)s)")
    add("--layers", type=int, default=3, help="to train the last n layers, or fewer (3)")
    add("--dtype", choices=DTYPES, help="float16, half the size (default), or float32")
    add("--splits", nargs="+", default=["Train", "Development", "Test1"], help="(%(default)s)")
    add("--skip-bad", action="store_true", help="go on without utterances that cannot be used")
    add("--verify", action="store_true", help="read all back; with --data, the recordings too")
    args = parser.parse_args(argv)
    if args.verify:
        return verify(args.out, args.data)
    if not args.data:
        parser.error("--data is required, except with --verify")

    import data
    import model as models

    args.workers = 2  # Threads that read audio ahead of the model: train.py has an option for it.
    encoder, audio = models.load_encoder(args.model)
    model = models.EmotionModel(encoder, **audio).to(models.choose_device("auto"))
    model.encoder_sha256 = models.digest(encoder)
    models.freeze(model, "partial", args.layers, freeze_embedding=True)
    # Labels are of no interest here.
    found = data.read_corpus(args.data, attributes=(), splits=args.splits)
    utterances = data.usable(found, args.skip_bad, args.splits)
    fill_missing(args.out, model, utterances, args, args.dtype)
    entries, _, seconds = read_entries(args.out)
    print(f"'{args.out}': {len(entries):,} utterances, filled in {seconds:.0f} s")


if __name__ == "__main__":
    from ccc import shell

    shell(main)
