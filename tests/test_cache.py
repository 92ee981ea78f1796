"""A cached run against the uncached one with the same parts frozen; what is on disk; fills that
continue, side by side or at once; the refusal of foreign caches."""

import fcntl
import itertools
import pickle
import shutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import numpy as np
import pytest
import soundfile
import torch
from conftest import (
    DEPTH,
    NEEDS_GPU,
    WIDTH,
    read_cache,
    read_shard,
    relative,
    step,
    tree,
    write_shard,
)

import cache
import data
import model as models

FLOAT32 = ("--layers", 3, "--dtype", "float32")
HALF, SINGLE = {"dtype": "float16"}, {"dtype": "float32"}  # fingerprints


def after_a_step(made):
    """Predictions, loss and gradients of the first training step, dropout on, and predictions after
    it."""
    model = made.model.train()
    first = step(model, made.batch, cached=made.args.cached)
    torch.optim.AdamW(models.trainable(model).values(), lr=1e-3).step()
    second = step(model, made.batch, cached=made.args.cached)
    return first | {"predictions after": second["predictions"]}


@pytest.mark.parametrize("method", ["partial", "lora"])
@pytest.mark.parametrize(("layers", "filled"), [(1, 1), (2, 2), (3, 3), (1, 3), (2, 3)])
def test_cached_is_uncached(layers, filled, method, prepare, cached):
    """In exact padding, dropout on, a training step from a float32 cache, even one of more layers,
    is that of the uncached run with the embedding frozen: predictions, gradients, and predictions
    after the optimizer's step. A cache keeps its own cut."""
    row = ["--method", method, "--layers", layers]
    uncached = prepare(*row, *(["--freeze-embedding"] if method == "partial" else []))
    from_cache = prepare(*row, "--cache", cached(filled))
    cuts = uncached.model.cut, from_cache.model.cut
    assert cuts == (DEPTH - layers + 1, DEPTH - filled + 1)
    assert relative(after_a_step(from_cache), after_a_step(uncached)) < 1e-5


def test_float16_cache(prepare, cached):
    """A float16 cache moves predictions by less than 1e-3 and gradients by less than 1e-2 of the
    largest (measured on tiny random encoders: up to 1e-4 and 1.2e-3)."""
    rows = (prepare("--layers", 3, "--cache", cached(3, dtype)) for dtype in ("float16", "float32"))
    half, single = (step(made.model.eval(), made.batch, cached=True) for made in rows)
    assert 0 < relative(half.pop("predictions"), single.pop("predictions")) < 1e-3
    assert relative(half, single) < 1e-2


@torch.no_grad()
@pytest.mark.parametrize(("dtype", "bytes_a_value"), [("float16", 2), ("float32", 4)])
def test_what_is_stored(dtype, bytes_a_value, corpus, encoder, cached):
    """An utterance is stored as Hugging Face's hidden states before the layer, of its normalised
    waveform alone, in 2 D bytes a frame (float16; 4 D in float32), with the CRC-32 of its file;
    beside them a shard holds a few kilobytes."""
    (path,) = Path(cached(3, dtype)).glob("shard-*")
    hf = models.load_encoder(encoder)[0].eval()
    extractor = models.transformers.AutoFeatureExtractor.from_pretrained(encoder)
    stored = read_cache(path.parent)
    entries, _, seconds = cache.read_entries(path.parent)
    total = 0
    for u in data.usable(data.read_corpus(corpus)):
        wave = soundfile.read(u.path, dtype="float32")[0]
        inputs = extractor(wave, sampling_rate=16000, return_tensors="pt").input_values
        expected = hf(inputs, output_hidden_states=True).hidden_states[1][0]
        hidden = stored[u.name]
        assert hidden.shape == expected.shape and hidden.shape[1] == WIDTH
        assert hidden.nbytes == len(expected) * WIDTH * bytes_a_value
        assert relative(hidden.float(), expected) < (1e-3 if dtype == "float16" else 1e-5)
        assert entries[u.name].audio_crc == zlib.crc32(Path(u.path).read_bytes())
        total += hidden.nbytes
    assert len(stored) == 28 and seconds > 0 and total <= path.stat().st_size < total + 8192


@NEEDS_GPU
def test_a_gpu_fills_the_same(cached, corpus, encoder, tmp_path, gpu):
    """A GPU, where PyTorch runs convolutions in TF32, stores what the CPU does to 1e-2."""
    gpu(cache.main, ["--data", corpus, "--model", encoder, "--out", tmp_path, *FLOAT32])
    assert relative(read_cache(tmp_path), read_cache(cached(3))) < 1e-2


# ---- fill and read ----


def made_on_the_fly(buffer, **odd):
    """Items that reuse one buffer, as a loop of one's own may, then others of odd kinds."""
    for name, value in (("a", 1), ("b", 2), ("c", 3)):
        buffer.fill_(value)
        yield name, buffer[:value], value
    for name, hidden in odd.items():
        yield name, hidden, None


def test_any_iterable_is_filled(tmp_path, monkeypatch):
    """A cache of one's own tensors: items made on the fly in one buffer, non-contiguous or with a
    gradient, with NumPy's names, are stored as they were when they came, in shards that end when
    full; nothing makes nothing."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 96)
    odd = {
        "turned": torch.arange(12.0).reshape(4, 3).T,
        "trained": torch.ones(2, 4, requires_grad=True) * 5,
    }
    cache.fill(tmp_path / "none", SINGLE, iter([]))
    items = made_on_the_fly(torch.empty(3, 4), **odd)
    cache.fill(tmp_path, SINGLE, ((np.str_(name), *rest) for name, *rest in items), process=7)
    assert list(tmp_path.glob("none/*")) == []
    found = read_cache(tmp_path)
    expected = {name: torch.full((n, 4), float(n)) for n, name in enumerate("abc", start=1)} | odd
    assert found.keys() == expected.keys()
    for name, hidden in expected.items():
        assert torch.equal(found[name], hidden)
    names = [read_shard(p)[0].keys() for p in sorted(tmp_path.glob("shard-7-0000?.safetensors"))]
    assert names == [{"a", "b", "c"}, {"turned", "trained"}]


@pytest.mark.parametrize("value", [70_000.0, -torch.inf, torch.nan])
def test_what_is_not_finite_is_not_stored(value, tmp_path):
    """What float16 cannot hold, NaN, no frame at all and a batch of one are refused by name;
    float32 holds more."""
    odd = torch.ones(3, 4)
    odd[1, 2] = value
    for wrong in (odd, odd[:0], odd[None, :1]):
        with pytest.raises(ValueError, match="'odd'.*float16"):
            cache.fill(tmp_path, HALF, [("odd", wrong, None)])
    assert not list(tmp_path.iterdir())
    if value == 70_000:
        cache.fill(tmp_path, SINGLE, [("odd", odd, None)])
        assert torch.equal(read_cache(tmp_path)["odd"], odd)


def test_a_pickled_dataset_carries_no_shards(cached):
    """To a DataLoader's process goes where the states are, not the states, and it reads the same;
    an utterance that is lacking is named."""
    entries, _, _ = cache.read_entries(cached(3))
    utterances = [SimpleNamespace(name=name, labels=(0.5,)) for name in entries]
    dataset = cache.CachedDataset(entries, utterances)
    pickled = pickle.dumps(dataset)
    for hidden, target in (dataset[i] for i in range(28)):
        assert target == 0.5 and len(hidden) in dataset.lengths
    assert len(pickle.dumps(dataset)) == len(pickled) < 10_000
    assert torch.equal(pickle.loads(pickled)[5][0], dataset[5][0])
    with pytest.raises(KeyError, match="other"):
        cache.CachedDataset(entries, [*utterances, SimpleNamespace(name="other", labels=())])


CLAIMS = {
    "fingerprint": lambda states, about: about["fingerprint"].update(cut=1),
    "names": lambda states, about: states.update(a=states["b"], b=states["a"].clone()),
    "frames": lambda states, about: states.update(a=states["a"].view(2, 2)),
    "hidden": lambda states, about: states["a"][0].add_(1e-6),
}


@pytest.mark.parametrize("claim", CLAIMS)
def test_the_checksum_covers_what_is_claimed(claim, tmp_path):
    """A shard that claims another fingerprint, name or length than was written, or holds another
    value, is found when the utterance is read."""
    items = [("a", torch.ones(1, 4), 1), ("b", torch.ones(2, 4), 2)]
    cache.fill(tmp_path, {"dtype": "float32", "cut": 2}, items)
    (path,) = tmp_path.iterdir()
    shard = read_shard(path)
    CLAIMS[claim](*shard)
    write_shard(path, *shard)
    with pytest.raises(ValueError, match="shard-0-00000.safetensors' is damaged at '[ab]'"):
        read_cache(tmp_path)


# ---- the command, and train.py --cache ----


def test_training_fills_what_lacks(launch, fill, corpus, tmp_path, capsys):
    """One line of train.py fills a cache and trains from it, as one that cache.py filled. Once
    full, the cache is only read: no file in it is made or touched, and no audio is needed."""
    root = tmp_path / "corpus"
    shutil.copytree(corpus, root)
    line = ["--data", root, "--padding", "exact", "--cache", tmp_path / "new"]
    launch(tmp_path / "first", *line)
    assert f"'{tmp_path / 'new'}' lacks 28 utterances" in capsys.readouterr().out
    (tmp_path / "new" / "notes.txt").write_text("do not matter beside a shard")
    fill(tmp_path / "filled", "--layers", 3, "--dtype", "float16")
    capsys.readouterr()
    assert relative(read_cache(tmp_path / "new"), read_cache(tmp_path / "filled")) == 0
    (tmp_path / "new" / ".lock-0").unlink()
    before = tree(tmp_path / "new")
    (root / "Audios").rename(root / "away")
    launch(tmp_path / "second", *line)
    assert " GB" not in capsys.readouterr().out and tree(tmp_path / "new") == before
    first, second = (tmp_path / run / "predictions-Test1.csv" for run in ("first", "second"))
    assert first.read_text() == second.read_text()
    seconds = cache.read_entries(tmp_path / "new")[2]
    assert f'"fill_seconds": {seconds!r}' in (tmp_path / "second" / "result.json").read_text()


def test_free_space_and_memory(fill, cached, tmp_path, monkeypatch):
    """A disk that is a byte too small for the hidden states is refused before the fill. Full memory
    is a line."""
    size = sum(hidden.nbytes for hidden in read_cache(cached(3, "float16")).values())
    usage = SimpleNamespace(free=size - 1)
    monkeypatch.setattr(cache.shutil, "disk_usage", lambda folder: usage)
    with pytest.raises(OSError, match="less free space"):
        fill(tmp_path, "--layers", 3)
    usage.free = size
    with monkeypatch.context() as patch:
        patch.setattr(
            models.EmotionModel, "prefix", Mock(side_effect=RuntimeError("out of memory"))
        )
        with pytest.raises(MemoryError, match="leave out the longest recordings"):
            fill(tmp_path, "--layers", 3)
    fill(tmp_path, "--layers", 3)


def test_seconds_of_a_fill(tmp_path, monkeypatch):
    """A fill took as long as its slowest process, in which each shard counts its own time."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 1)
    monkeypatch.setattr(cache.time, "perf_counter", itertools.count().__next__)
    for process, names in enumerate(("abc", "de")):
        cache.fill(tmp_path, SINGLE, [(name, torch.ones(2, 4), None) for name in names], process)
    assert cache.read_entries(tmp_path)[2] == 3


def test_twice_in_a_folder(tmp_path, monkeypatch):
    """Of an utterance that two processes, or two runs, have stored, the first shard's counts, so
    that what a later one adds changes nothing."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 1)
    for number, process in enumerate((1, 0, 0, 2)):
        cache.fill(tmp_path, SINGLE, [("a", torch.full((2, 4), float(number)), None)], process)
    assert read_cache(tmp_path)["a"].unique().tolist() == [1]


def test_unlocked_and_full_disks(tmp_path, monkeypatch, capsys):
    """A file system without locks is used with a note. What torch.save says of a full disk becomes
    an OSError that names the file."""
    monkeypatch.setattr(cache.fcntl, "lockf", Mock(side_effect=OSError(37, "No locks available")))
    with cache.lock(tmp_path / "a"):
        assert "cannot be locked (No locks available)" in capsys.readouterr().err
    with (
        pytest.raises(OSError, match="cannot write '.*a/x': is the disk full"),
        cache.atomic(tmp_path / "a" / "x"),
    ):
        raise RuntimeError("unexpected pos 64 vs 0")
    assert [path.name for path in (tmp_path / "a").iterdir()] == [".lock"]


def test_a_fill_continues(fill, cached, tmp_path, capsys):
    """The same command with more splits adds what is missing and leaves what is there to the byte,
    whatever cut or dtype it would give a new folder; what a killed fill of its own number left half
    written is written over, that of another number stays."""
    fill(tmp_path, *FLOAT32, "--splits", "Train")
    before = (tmp_path / "shard-0-00000.safetensors").read_bytes()
    for number in (0, 1):
        (tmp_path / f".shard-{number}-00001.safetensors.{number}.tmp").write_text("half")
    fill(tmp_path, "--layers", 2)
    assert (tmp_path / "shard-0-00000.safetensors").read_bytes() == before
    names = {
        ".lock-0",
        "shard-0-00000.safetensors",
        "shard-0-00001.safetensors",
        ".shard-1-00001.safetensors.1.tmp",
    }
    assert {path.name for path in tmp_path.iterdir()} == names
    assert relative(read_cache(tmp_path), read_cache(cached(3))) == 0
    capsys.readouterr()
    cache.main(["--out", str(tmp_path), "--verify"])
    assert "all 28 utterances are intact, 0 of them in --data" in capsys.readouterr().out


def test_processes_fill_side_by_side(fill, cached, corpus, tmp_path, monkeypatch):
    """Three processes in turn fill shares by place in the corpus, whatever is there already, and
    make the cache that one makes. A lost shard is filled again, and none is written over."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 20_000)
    names = [u.name for u in data.read_corpus(corpus)[0]]
    monkeypatch.setenv("WORLD_SIZE", "3")
    for rank in (0, 1, 2):
        monkeypatch.setenv("RANK", str(rank))
        fill(tmp_path, *FLOAT32)
        share = {name for i, name in enumerate(names) if i % 3 <= rank}
        assert read_cache(tmp_path).keys() == share
    whole = read_cache(cached(3))
    assert relative(read_cache(tmp_path), whole) == 0
    monkeypatch.delenv("RANK")
    monkeypatch.delenv("WORLD_SIZE")
    (tmp_path / "shard-0-00000.safetensors").unlink()
    kept = tree(tmp_path)
    fill(tmp_path, *FLOAT32)
    assert kept.items() <= tree(tmp_path).items()
    assert (tmp_path / "shard-0-00000.safetensors").exists()
    assert relative(read_cache(tmp_path), whole) == 0


@pytest.mark.parametrize(("rank", "size"), [("0", None), (None, "2"), ("2", "2"), ("-1", "2")])
def test_half_an_environment_is_refused(rank, size, fill, launch, tmp_path, monkeypatch):
    """RANK without WORLD_SIZE, the reverse, or beyond it: refused, before anything is written."""
    for name, value in (("RANK", rank), ("WORLD_SIZE", size)):
        if value:
            monkeypatch.setenv(name, value)
    for command in (fill, launch):
        with pytest.raises(ValueError, match="set both, or neither"):
            command(tmp_path / "new")
    assert not (tmp_path / "new").exists()


HOLD = """import fcntl, sys
file = open(sys.argv[1], "a")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()"""


@pytest.mark.parametrize("splits", [["Train"], data.SPLITS[:3]])
def test_two_fills_at_once(splits, fill, cached, tmp_path, monkeypatch, capsys):
    """A fill that finds another at work says so once and waits; what that has written until then,
    a part or all, is not filled again nor lost, and its half-written file is left alone."""
    folder = tmp_path / "cache"
    folder.mkdir()
    fill(tmp_path / "other", *FLOAT32, "--splits", *splits)
    line = [sys.executable, "-c", HOLD, folder / ".lock-0"]
    holder = subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    lockf = fcntl.lockf

    def wait(file, operation):
        if operation == fcntl.LOCK_EX:  # It would wait here. Now the other one goes on, and ends.
            assert (folder / ".shard-0-00000.safetensors.0.tmp").exists()
            (tmp_path / "other" / "shard-0-00000.safetensors").rename(
                folder / "shard-0-00000.safetensors"
            )
            holder.communicate()
        lockf(file, operation)

    monkeypatch.setattr(fcntl, "lockf", wait)
    assert holder.stdout.readline() == b"held\n"
    (folder / ".shard-0-00000.safetensors.0.tmp").write_text("half")
    before = (tmp_path / "other" / "shard-0-00000.safetensors").read_bytes()
    fill(folder, *FLOAT32)
    assert capsys.readouterr().err.count("waiting for another process") == 1
    assert (folder / "shard-0-00000.safetensors").read_bytes() == before
    names = [read_shard(path)[0] for path in sorted(folder.glob("shard-*"))]
    assert [len(part) for part in names] == ([12, 16] if splits == ["Train"] else [28])
    assert relative(read_cache(folder), read_cache(cached(3))) == 0


def test_replaced_audio_and_damage(fill, cached, corpus, tmp_path, monkeypatch, capsys):
    """Where a recording is replaced at the moment of its reading, its states and its CRC-32 are of
    the same bytes. --verify names each damaged utterance and, with --data, each recording that is
    another or lost, but none whose CRC-32 nobody noted."""
    shutil.copytree(corpus, tmp_path / "corpus")
    replaced, other, damaged, lost, unknown, *_ = sorted(tmp_path.glob("corpus/Audios/*"))
    load_audio = data.load_audio

    def replace(source, *args):
        if getattr(source, "name", source) == str(replaced):
            replaced.write_bytes(other.read_bytes())
        return load_audio(source, *args)

    monkeypatch.setattr(data, "load_audio", replace)
    fill(tmp_path / "cache", *FLOAT32, "--data", tmp_path / "corpus")
    entry, expected = (
        cache.read_entries(f)[0][replaced.name] for f in (tmp_path / "cache", cached(3))
    )
    assert entry[1:] == expected[1:]  # all but the shard's path
    assert relative(read_cache(tmp_path / "cache"), read_cache(cached(3))) == 0
    assert replaced.read_bytes() == other.read_bytes()
    (path,) = tmp_path.glob("cache/shard-*")
    states, about = read_shard(path)
    states[damaged.name][0] += 1
    about["crcs"][unknown.name][1] = None
    write_shard(path, states, about)
    capsys.readouterr()
    line = ["--out", str(tmp_path / "cache"), "--verify"]
    with pytest.raises(ValueError, match="1 of 28 utterances are not as filled"):
        cache.main(line)
    once = capsys.readouterr().out
    lost.unlink()
    with pytest.raises(ValueError, match="3 of 28 utterances are not as filled"):
        cache.main([*line, "--data", str(tmp_path / "corpus")])
    lines = capsys.readouterr().out.splitlines(keepends=True)
    assert f"damaged at '{damaged.name}'" in once and once in lines
    assert any(f"{replaced.name}' has changed" in line for line in lines)
    assert any("No such file" in line and lost.name in line for line in lines)


OTHER = {"encoder_sha256": "0" * 64, "dtype": "float16", "sample_rate": 8000, "normalise": False}
OTHER |= {"prefix_version": 0, "cut": 4}


@pytest.mark.parametrize("key", OTHER)
def test_a_foreign_cache_is_refused(key, fill, launch, cached, tmp_path):
    """A cache made with another value of any part of the fingerprint is refused, naming it; so is
    one that starts after the first trained layer, and a folder with shards of two caches. Nothing
    is written, and no run is begun."""
    folder = tmp_path / "cache"
    shutil.copytree(cached(3), folder)
    (path,) = folder.glob("shard-*")
    states, about = read_shard(path)
    assert about["fingerprint"].keys() == OTHER.keys()
    about["fingerprint"][key] = OTHER[key]
    write_shard(path, states, about)
    before = tree(folder)
    reason = f"was made with {key} "
    with pytest.raises(ValueError, match=reason):
        fill(folder, *FLOAT32)
    if key != "dtype":  # one may train from either
        with pytest.raises(ValueError, match=reason):
            launch(tmp_path / "run", "--cache", folder)
        assert {path.name for path in (tmp_path / "run").iterdir()} == {".lock"}
    assert tree(folder) == before
    shutil.copy(next(Path(cached(3)).glob("shard-*")), folder / "shard-1-00000.safetensors")
    with pytest.raises(ValueError, match="shard-0-00000.safetensors' is of another cache"):
        fill(folder, *FLOAT32)


def test_no_folder_is_misused(fill, launch, corpus, tmp_path):
    """A folder with other files is no cache and gets none; a lock that is a link to a file leaves
    that as it is."""
    shutil.copytree(corpus, tmp_path / "corpus")
    before = tree(tmp_path / "corpus")
    with pytest.raises(ValueError, match="is no cache, as it holds '(Audios|Labels)'"):
        fill(tmp_path / "corpus")
    with pytest.raises(ValueError, match="is no cache"):
        launch(tmp_path / "run", "--cache", tmp_path / "corpus")
    assert tree(tmp_path / "corpus") == before
    (tmp_path / "precious").write_text("labels")
    for folder, name in (("cache", ".lock-0"), ("run", ".lock")):
        (tmp_path / folder).mkdir(exist_ok=True)
        (tmp_path / folder / name).unlink(missing_ok=True)
        (tmp_path / folder / name).symlink_to(tmp_path / "precious")
    launch(tmp_path / "run", "--cache", tmp_path / "cache")
    assert (tmp_path / "precious").read_text() == "labels"
    assert len(read_cache(tmp_path / "cache")) == 28
