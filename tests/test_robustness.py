"""Bad input, kills, full disks and hostile files, through the command lines: one clear line,
nothing lost."""

import contextlib
import csv
import errno
import io
import json
import multiprocessing
import os
import pickle
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
import tqdm
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import cache
import ccc
import data
import model
import train

COMMANDS = {m.__name__: m.main for m in (cache, ccc, data, model, train)}
HEADER = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set\n"
LABELS = "corpus/Labels/labels_consensus.csv"
CLIP = "corpus/Audios/t0.wav"
SHARD = "cache/shard-00001.pt"
# the commands of this file; all paths are relative to the test's own folder
SMALL = "--data corpus --model encoder --device cpu --workers 0 --batch-size 4"
TRAIN = f"train {SMALL} --out new --layers 2 --precision fp32 --epochs 2 --lr 0.01"
RESUME = TRAIN.replace("--out new", "--out run") + " --resume"
CACHED = f"{TRAIN} --cache cache"
FILL = f"cache {SMALL} --layer 2 --out new"
REFILL = FILL.replace("--out new", "--out cache")
VERIFY = f"{REFILL} --verify"
PREDICT = f"model predict run {CLIP}"


def call(line):
    """A command line as `python <line>` would run it, in this process."""
    command, *arguments = line.split()
    COMMANDS[command](arguments)


def noise(seconds, rate=16000, channels=1):
    shape = (int(seconds * rate), channels) if channels > 1 else int(seconds * rate)
    return 0.1 * np.random.default_rng(0).normal(size=shape)


@pytest.fixture(scope="module", autouse=True)
def one_thread():
    """Children are forked from this process and killed: they must not share tqdm's lock with it,
    nor its threads."""
    torch.set_num_threads(1)
    tqdm.tqdm.monitor_interval = 0
    tqdm.tqdm.set_lock(threading.RLock())
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD_BYTES", 4000)  # several shards
        yield


@pytest.fixture(scope="module")
def original(tmp_path_factory, encoder):
    """Folder with corpus/ (Train t0..t8, Development d0..d3, Test1 e0..e3), encoder/, cache/ and a
    finished run/."""
    root, here = tmp_path_factory.mktemp("robust"), os.getcwd()
    shutil.copytree(encoder, root / "encoder")
    os.chdir(root)
    Path("corpus/Audios").mkdir(parents=True)
    Path("corpus/Labels").mkdir()
    rows, rng = [], np.random.default_rng(1)
    for split, letter, n in (("Train", "t", 9), ("Development", "d", 4), ("Test1", "e", 4)):
        for i in range(n):
            soundfile.write(f"corpus/Audios/{letter}{i}.wav", noise(rng.uniform(0.1, 0.3)), 16000)
            rows.append(
                f"{letter}{i}.wav,N,{1 + i / 2:.2f},{rng.uniform(1, 7):.2f},4,{i},Male,{split}\n"
            )
    Path(LABELS).write_text(HEADER + "".join(rows))
    call(REFILL)
    call(RESUME)
    os.chdir(here)
    return root


@pytest.fixture
def world(original, tmp_path, monkeypatch):
    """A copy of `original` to spoil, and to work in."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.copytree(original, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")


def contents():
    return {str(path): path.read_bytes() for path in Path().rglob("*") if path.is_file()}


def refused(line, capsys, *fragments, status=2):
    """The command exits with 2 and, bars of tqdm aside, two lines: its usage and what the error
    says. It changes no file and makes none but in new/. Returns what it printed."""
    before = contents()
    capsys.readouterr()
    with pytest.raises(SystemExit) as exit:
        call(line)
    out, err = capsys.readouterr()
    lines = [text.split("\r")[-1].strip() for text in err.strip().split("\n")]
    *bars, usage, error = [text for text in lines if text]
    assert exit.value.code == status and all("%|" in bar for bar in bars), err
    assert usage.startswith("usage: python ") and ": error: " in error
    for fragment in fragments:
        assert fragment in error
    after = contents()
    if "--resume" in line:  # it says where corpus and encoder are now
        before["run/config.json"] = after.get("run/config.json")
    assert after.items() >= before.items()
    assert {name for name in after if not name.endswith(".lock")} - before.keys() <= {
        name for name in after if name.startswith("new/")
    }
    return out


# --- what is spoiled: functions without arguments, called in the test's own folder


def write(path, content):
    return lambda: Path(path).write_bytes(content)


def replace(old, new, path=LABELS):
    def spoil():
        text = Path(path).read_bytes()
        assert old in text
        Path(path).write_bytes(text.replace(old, new, 1))

    return spoil


def clip(wave, rate=16000, cut=1.0, **options):
    """Replace the first audio file by the first part of another."""

    def spoil():
        file = io.BytesIO()
        soundfile.write(file, wave, rate, **{"format": "WAV", "subtype": "PCM_16"} | options)
        content = file.getvalue()
        Path(CLIP).write_bytes(content[: int(cut * len(content))])

    return spoil


def rename(old, new):
    return lambda: Path(old).rename(new)


def remove(*paths):
    return lambda: [shutil.rmtree(p) if os.path.isdir(p) else os.remove(p) for p in paths]


def flip(path, bit=None):
    """Flip one bit of a file, by default in its middle: the hidden states of a shard."""

    def spoil():
        content = bytearray(Path(path).read_bytes())
        position = len(content) * 4 if bit is None else bit
        content[position // 8] ^= 1 << position % 8
        Path(path).write_bytes(content)

    return spoil


def truncate(path):
    return lambda: os.truncate(path, os.path.getsize(path) // 2)


def config(**changes):
    def spoil():
        path = Path("encoder/config.json")
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return spoil


def weights(change):
    """Change the encoder's {name: tensor} in place."""

    def spoil():
        tensors = safetensors.torch.load_file("encoder/model.safetensors")
        change(tensors)
        safetensors.torch.save_file(tensors, "encoder/model.safetensors", {"format": "pt"})

    return spoil


class Hostile:
    def __reduce__(self):
        return open, ("executed", "w")


def hostile(path, save=torch.save, wrap=lambda evil: {"hidden": evil, "weights": evil}):
    """Put a file at `path` that, if unpickled, makes the file `executed`, which `refused` then
    finds."""

    def spoil():
        with open(path, "wb") as file:
            save(wrap(Hostile()), file)

    return spoil


def both(*spoils):
    return lambda: [spoil() for spoil in spoils]


ROW = b"t0.wav,N,1.00"
OTHER_DTYPE = {"hidden": torch.zeros(9, 8, dtype=torch.bfloat16)}  # NumPy has none
UTF16 = (HEADER + "t0.wav,N,3,3,4,1,Male,Train\n").encode("utf-16")
EVIL_CODE = {"auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}, "model_type": "evil"}
LAYER = "encoder.layers.3.attention.q_proj.weight"

# fmt: off
BAD = {  # name: what is spoiled, the command, what the error says
    # label files
    "no corpus": (None, "data nowhere", "nowhere is not a folder", "Labels/"),
    "corpus is a file": (None, "data " + LABELS, "is not a folder"),
    "no label folder": (remove("corpus/Labels"), TRAIN, "corpus has no label folder (labels"),
    "no label file": (remove(LABELS), TRAIN, "has no label file (labels_consensus.csv"),
    "renamed label file": (rename(LABELS, LABELS + ".old"), FILL, "it holds ['labels_consensus.cs"),
    "no audio folder": (remove("corpus/Audios"), TRAIN, "corpus has no audio folder (audios or"),
    "missing column": (replace(b"EmoVal", b"Valence"), TRAIN, "no column EmoVal", "'Valence'"),
    "semicolons": (lambda: [replace(b",", b";")() for _ in range(7)], TRAIN, "with commas"),
    "empty label file": (write(LABELS, b""), TRAIN, "no column FileName, EmoAct"),
    "header only": (write(LABELS, HEADER.encode()), TRAIN, "split Train has 0 usable utterances"),
    "UTF-16": (write(LABELS, UTF16), TRAIN, "not a label file in UTF-8"),
    "NUL bytes": (replace(ROW, b"t0\0.wav,N,1.00"), TRAIN, "1 missing audio", r"'t0\x00.wav'"),
    "binary": (write(LABELS, bytes(range(256))), TRAIN, "not a label file in UTF-8"),
    "open quote": (replace(b"Male", b'"Male'), TRAIN, "unexpected end of data"),
    "empty label": (replace(ROW, b"t0.wav,N,"), TRAIN, "not in 1 to 7 (first: line 2: 't0.wav'"),
    "NaN label": (replace(ROW, b"t0.wav,N,nan"), TRAIN, "1 label missing", "EmoAct 'nan'"),
    "label 7.5": (replace(ROW, b"t0.wav,N,7.5"), FILL, "1 label missing", "EmoAct '7.5'"),
    "text label": (replace(ROW, b"t0.wav,N,high"), TRAIN, "EmoAct 'high'", "--skip-bad"),
    "short row": (replace(b"t1.wav,N", b"t1.wav\nx,N"), TRAIN, "unknown split", "line 3: 't1.wav'"),
    "repeated name": (replace(b"t1.wav", b"t0.wav"), TRAIN, "1 repeated name", "line 3"),
    "climbing name": (replace(b"t0.wav", b"../t0.wav"), TRAIN, "1 name leaves the audio folder"),
    "absolute name": (replace(b"t0.wav", b"/etc/passwd"), FILL, "1 name leaves", "'/etc/passwd'"),
    "name over two lines": (replace(b"t0.wav", b'"t0\n.wav"'), TRAIN, "1 missing audio", r"'t0\n"),
    "unknown split": (replace(b"Train", b"train2"), TRAIN, "1 unknown split", "'train2'"),
    "missing split": (replace(b",Train", b""), TRAIN, "1 unknown split", "line 2: 't0.wav' ''"),
    "empty Development": (lambda: [replace(b"Development", b"Test2")() for _ in range(4)], TRAIN,
        "split Development has 0 usable utterances"),
    # audio
    "missing audio": (remove(CLIP), TRAIN, "1 missing audio", "line 2: 't0.wav'"),
    "link to nowhere": (both(remove(CLIP), lambda: os.symlink("x", CLIP)), TRAIN,
        "1 missing audio"),
    "folder as audio": (both(remove(CLIP), lambda: os.mkdir(CLIP)), TRAIN, "1 damaged or not"),
    "empty audio": (write(CLIP, b""), TRAIN, "1 empty file", "t0.wav"),
    "truncated WAV": (clip(noise(0.2), cut=0.5), TRAIN, "1 truncated (first: t0.wav)"),
    "truncated FLAC": (clip(noise(0.2), cut=0.5, format="FLAC"), FILL, "1 damaged or not audio"),
    "truncated MP3": (clip(noise(2), cut=0.5, format="MP3", subtype="MPEG_LAYER_III"), TRAIN,
        "1 truncated (first: t0.wav)"),
    "an hour to predict": (clip(noise(1).repeat(225), 1000), PREDICT, CLIP + ": longer than 60 s"),
    "half a header": (clip(noise(0.2), cut=0.004), TRAIN, "1 damaged or not audio"),
    "text as WAV": (write(CLIP, b"hello"), TRAIN, "1 damaged or not audio"),
    "zero samples": (clip(noise(0)), TRAIN, "1 shorter than 25 ms"),
    "24 ms": (clip(noise(0.024)), TRAIN, "1 shorter than 25 ms (first: t0.wav)"),
    "an hour": (clip(noise(1).repeat(225), 1000), FILL, "1 longer than 60 s"),
    "NaN in float WAV": (clip(np.append(noise(0.1), np.nan), subtype="FLOAT"), TRAIN,
        "1 NaN or infinite samples"),
    "several": (both(remove(CLIP), write("corpus/Audios/d1.wav", b"")), TRAIN,
        "2 utterances cannot"),
    # arguments
    "full from a cache": (None, f"{CACHED} --method full", "--method full trains all layers"),
    "no such layer": (None, f"{TRAIN} --layers 9", "--layers 9: this encoder has", "1 to 4"),
    "no layer": (None, f"{TRAIN} --layers 0", "--layers must be at least 1"),
    "frozen twice": (None, f"{TRAIN} --method lora --freeze-prefix", "lora and --cache freeze"),
    "rank of partial": (None, f"{TRAIN} --rank 4", "need --method lora"),
    "chunk of none": (None, f"{TRAIN} --chunk 0", "--chunk must be at least 1"),
    "batch of one": (None, f"{TRAIN} --batch-size 1", "--batch-size must be at least 2"),
    "lr 0": (None, f"{TRAIN} --lr 0", "--lr must be in (0, 1)"),
    "lr NaN": (None, f"{TRAIN} --lr nan", "--lr must be in (0, 1)"),
    "seed too large": (None, f"{TRAIN} --seed 99999999999", "--seed must be below"),
    "no CUDA": (None, f"{TRAIN} --device cuda", "PyTorch sees no CUDA device"),
    "unknown split named": (None, f"{TRAIN} --splits Train Dev Test1", "invalid choice: 'Dev'"),
    "one split twice": (None, f"{TRAIN} --splits Train Train Test1", "three different splits"),
    "nothing to cache": (None, f"{FILL} --splits Test2", "split Test2 has 0 usable utterances"),
    "layer past the end": (None, f"{FILL} --layer 4", "--layer 4: this encoder has layers 0 to 3"),
    "run exists": (None, RESUME[: -len(" --resume")], "run holds a run; --resume"),
    "resumed otherwise": (remove("run/result.json"), f"{RESUME} --seed 3",
        "run was started with seed 0; give the same"),
    "run is a file": (None, TRAIN.replace("new", LABELS), "File exists", LABELS),
    "unknown option": (None, f"{TRAIN} --epoch-s 3", "unrecognized arguments: --epoch-s"),
    "nothing to predict": (None, "model predict run encoder", "encoder: no audio files (.wav"),
    "no file to predict": (None, "model predict run no.wav", "no.wav"),
    "no folder for --csv": (None, f"{PREDICT} --csv no/x.csv", "--csv no/x.csv: its folder does"),
    "no command": (None, "model", "required"),
    "no run to predict with": (None, "model predict corpus x.wav", "best.pt: no such file; give"),
    "export over files": (None, "model export run corpus", "corpus exists and is not empty"),
    "no predictions": (None, "ccc no.csv", "No such file", "no.csv"),
    "foreign predictions": (None, "ccc " + LABELS, "no column Act, Val"),
    # encoders
    "no encoder": (None, f"{FILL} --model no/such/encoder", "cannot load no/such/encoder",
        "--model"),
    "no weights": (remove("encoder/model.safetensors"), TRAIN, "cannot load", "model.safetensors"),
    "no config": (remove("encoder/config.json"), TRAIN, "cannot load"),
    "config not JSON": (write("encoder/config.json", b"{"), FILL, "cannot load encoder", "JSON"),
    "a weight too few": (weights(lambda t: t.pop(LAYER)), TRAIN, "lacks 1 weights", LAYER),
    "a weight too small": (weights(lambda t: t.update({LAYER: t[LAYER][:5].clone()})), TRAIN,
        "encoder"),
    "other architecture": (config(model_type="hubert"), TRAIN,
        "only wav2vec2 of the base kind"),
    "corrupt weights": (write("encoder/model.safetensors", b"x" * 99), FILL, "cannot load encoder"),
    "truncated weights": (truncate("encoder/model.safetensors"), TRAIN, "cannot load", "encoder"),
    "NaN weights": (weights(lambda t: t[LAYER].fill_(torch.nan)), TRAIN,
        "epoch 1/2, step 1: the loss is nan", "t0.wav", "--lr"),
    # caches
    "no cache": (None, f"{TRAIN} --cache new/cache", "new/cache/index.json: no such file; fill"),
    "cache of another encoder": (weights(lambda t: t[LAYER].neg_()), CACHED,
        "made with another encoder"),
    "cache of another layer": (None, f"{REFILL} --layer 1", "made with another layer 2, not 1"),
    "cache too deep": (None, f"{CACHED} --layers 3", "starts at layer 2, but this", "--layer 1"),
    "cache of another dtype": (None, f"{REFILL} --dtype float32", "dtype float16, not float32"),
    "cache normalised otherwise": (replace(b'normalize": true', b'normalize": false',
        "encoder/preprocessor_config.json"), CACHED, "made with another normalise True, not False"),
    "cache at another rate": (replace(b"16000", b"8000", "encoder/preprocessor_config.json"),
        REFILL, "made with another sample_rate 16000, not 8000"),
    "cache of fewer utterances": (both(replace(b"d0.wav", b"d9.wav"),
        rename("corpus/Audios/d0.wav", "corpus/Audios/d9.wav")), CACHED,
        "the cache cache lacks 1 of 4 utterances, first d9.wav"),
    "audio changed": (clip(noise(0.15)), CACHED, "1 audio files changed since", "first t0.wav"),
    "audio changed, refill": (clip(noise(0.15)), REFILL, "1 audio files changed since the cache"),
    "truncated shard": (truncate(SHARD), CACHED, SHARD, "utterance", "delete it and run"),
    "flipped bit": (flip(SHARD), CACHED, SHARD, "utterance", "is damaged; delete it and run"),
    "missing shard": (remove(SHARD), CACHED, SHARD, "missing", "delete it and run"),
    "swapped shards": (lambda: shutil.copy("cache/shard-00000.pt", SHARD), CACHED, SHARD,
        "is damaged"),
    "edited index": (replace(b'"layer": 2', b'"layer": 1', "cache/index.json"), CACHED,
        "was changed"),
    "index not JSON": (write("cache/index.json", b"\0"), REFILL, "index.json is damaged", "delete"),
    "index of a list": (write("cache/index.json", b"[1]"), VERIFY, "index.json is damaged"),
    "verify a truncated shard": (truncate(SHARD), VERIFY, "cache has", "defects; delete"),
    "verify a flipped bit": (flip(SHARD), VERIFY, "cache has 2 defects; delete the shards named"),
    "verify a missing shard": (remove(SHARD), VERIFY, "cache has", "defects; delete"),
    "verify an edited index": (replace(b'"bytes": ', b'"bytes": 1', "cache/index.json"), VERIFY,
        "is damaged or was changed; delete cache"),
    "predict, short audio last": (both(clip(noise(0.01)), write("old.csv", b"kept")),
        f"model predict run corpus/Audios/t1.wav {CLIP} --csv old.csv", f"{CLIP}: shorter than"),
    # hostile files
    "hostile best.pt": (hostile("run/best.pt"), PREDICT, "run/best.pt is not a checkpoint"),
    "hostile plain pickle": (hostile("run/best.pt", pickle.dump), PREDICT, "run/best.pt is not a"),
    "hostile best.pt, export": (hostile("run/best.pt"), "model export run new",
        "run/best.pt is not"),
    "hostile last.pt": (both(remove("run/result.json"), hostile("run/last.pt")), RESUME,
        "run/last.pt is damaged (UnpicklingError); delete run"),
    "hostile best.pt, resumed": (both(remove("run/result.json"), hostile("run/best.pt")), RESUME,
        "run/best.pt is not a checkpoint"),
    "truncated last.pt": (both(remove("run/result.json"), truncate("run/last.pt")), RESUME,
        "run/last.pt is damaged"),
    "hostile shard": (hostile(SHARD), CACHED, SHARD, "UnpicklingError"),
    "hostile shard, verify": (hostile(SHARD, pickle.dump), VERIFY, "defects"),
    "verify another dtype": (lambda: torch.save(OTHER_DTYPE, SHARD), VERIFY, "defects; delete"),
    "hostile weights": (both(remove("encoder/model.safetensors"),
        hostile("encoder/pytorch_model.bin", wrap=lambda evil: {LAYER: evil})), FILL,
        "cannot load encoder"),
    "hostile code": (both(config(**EVIL_CODE), write("encoder/evil.py", b"open('executed', 'w')")),
        TRAIN, "cannot load"),
    "damaged config.json": (both(remove("run/result.json"), write("run/config.json", b"{")),
        RESUME, "run/config.json is damaged"),
    "damaged result.json": (write("run/result.json", b"[2]"), RESUME, "run/result.json is damaged"),
}
# fmt: on


@pytest.mark.parametrize("name", BAD)
def test_bad_input(name, world, capsys):
    """Every bad input is refused in one line that names it, with status 2; no file is lost, no code
    of it is run."""
    spoil, line, *fragments = BAD[name]
    if spoil:
        spoil()
    refused(line, capsys, *fragments)


def test_exit_status(world):
    """As real processes: 1 for a corpus with problems, 2 for one that cannot be read; a traceback
    with --debug only."""
    script = Path(train.__file__).parent / "data.py"

    def run(root):
        command = [sys.executable, script, root]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.returncode, done.stdout, done.stderr

    Path(CLIP).write_bytes(b"")
    status, out, err = run("corpus")
    assert (status, err) == (1, "") and "1 x empty file\n    Train t0.wav\n1 problems" in out
    status, out, err = run("nowhere")
    assert (status, out) == (2, "") and len(err.splitlines()) == 2
    with pytest.raises(NotADirectoryError):
        call("data nowhere --debug")


def test_unusual_works(world, capsys):
    """Silence, exactly 25 ms, other rates, channels, depths and formats, an old release's names, a
    byte-order mark, CRLF, a blank line, quotes: no problem; cached, trained on and predicted.
    Nothing is written elsewhere."""
    unusual = [
        (np.zeros(4000), 16000, {}),
        (noise(0.025), 16000, {}),
        (noise(0.2, 8000), 8000, {}),
        (noise(0.2, 44100, 2), 44100, {}),
        (noise(0.2), 16000, {"subtype": "PCM_24"}),
        (noise(0.2), 16000, {"subtype": "FLOAT"}),
        (noise(0.2), 16000, {"subtype": "PCM_U8"}),
        (noise(0.2), 16000, {"format": "FLAC"}),
        (noise(0.2), 16000, {"format": "WAVEX"}),
    ]
    for i, (wave, rate, options) in enumerate(unusual):
        soundfile.write(f"corpus/Audios/t{i}.wav", wave, rate, **{"format": "WAV"} | options)
    text = Path(LABELS).read_text().replace("Development", "Validation").replace("Test1", "Test")
    text = text.replace("t1.wav,N", '"t1.wav","N"').replace("t2.wav", "\n t2.wav ")
    Path(LABELS).unlink()
    Path("corpus/Labels").rename("corpus/label")
    Path("corpus/label/labels_concensus.csv").write_bytes(
        text.replace("\n", "\r\n").encode("utf-8-sig")
    )
    before = contents()
    call("data corpus")
    assert "no problems" in capsys.readouterr().out
    call(f"{FILL} --layer 1")
    call(f"{FILL} --layer 1 --verify")
    call(f"{TRAIN.replace('new', 'new/run')} --cache new")
    call("model predict new/run corpus/Audios --csv new/predictions.csv")
    call("model export new/run new/exported")
    after = contents()
    assert before.items() <= after.items()
    assert all(name.startswith("new/") for name in after.keys() - before.keys())
    with open("new/predictions.csv") as file:
        assert all(np.isfinite(float(row["Val"])) for row in csv.DictReader(file))


def spoil_corpus():
    """One of each problem in Train; returns what is wrong with how many."""
    Path("corpus/Audios/t0.wav").unlink()
    Path("corpus/Audios/t1.wav").write_bytes(b"")
    clip(noise(0.01))()
    Path(CLIP).rename("corpus/Audios/t2.wav")
    replace(b"t4.wav,N,3.00", b"t4.wav,N,0.99")()
    with open(LABELS, "a") as file:
        file.writelines(
            f"{name},N,3,3,4,1,Male,{split}\n"
            for name, split in (("t5.wav", "Train"), ("../x.wav", "Train"), ("t6.wav", "Trian"))
        )
    return [
        "missing audio",
        "empty file",
        "shorter than 25 ms",
        "label missing or not in 1 to 7",
        "repeated name",
        "name leaves the audio folder",
        "unknown split",
    ]


def test_all_problems_in_one_pass(world, capsys):
    """data.py lists all problems with counts; --skip-bad goes on without them and says how many and
    which."""
    kinds = spoil_corpus()
    with pytest.raises(SystemExit) as exit:
        call("data corpus")
    out = capsys.readouterr().out
    assert exit.value.code == 1 and out.endswith("7 problems\n")
    assert all(f"1 x {kind}\n    " in out for kind in kinds)
    refused(TRAIN, capsys, "7 utterances cannot be used", *(f"1 {kind}" for kind in kinds))
    runs = [f"{TRAIN.replace('new', f'new/{name}')} --skip-bad" for name in ("run", "cached")]
    for line in (f"{FILL} --skip-bad", runs[0], f"{runs[1]} --cache new"):
        call(line)
        assert "skipped 7 utterances: 1 " in capsys.readouterr().out
    results = [json.loads(Path("new", run, "result.json").read_text()) for run in ("run", "cached")]
    assert results[0]["corpus"] == results[1]["corpus"]


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_verify_names_them(damage, world, capsys):
    """--verify prints the damaged shard and its utterances, and no other. Deleted and filled again,
    all is intact."""
    index = json.loads(Path("cache/index.json").read_text())
    mine = [n for n, entry in index["utterances"].items() if f"cache/{entry[0]}" == SHARD]
    before = contents()
    globals()[damage](SHARD)()
    out = refused(VERIFY, capsys)
    assert "shard-00001.pt: truncated, changed or missing" in out
    assert set(re.findall(r"utterance (\w+\.wav)", out)) <= set(mine) and "shard-00000" not in out
    Path(SHARD).unlink(missing_ok=True)
    call(REFILL)
    call(VERIFY)
    assert contents()[SHARD] == before[SHARD]


def test_verify_changed_audio(world, capsys):
    """--verify names the shard that was made from another audio file. Deleted and filled again, all
    is intact."""
    clip(noise(0.15))()
    found = re.search(r"(.*): the audio file of t0.wav has changed", refused(VERIFY, capsys))
    Path("cache", found[1]).unlink()
    call(REFILL)
    call(VERIFY)


@pytest.mark.parametrize("line", [TRAIN, FILL, CACHED])
def test_worker_errors(line, world, capsys, monkeypatch):
    """An error inside a DataLoader's worker still is one line: audio that was lost since it was
    checked, a bad shard."""
    monkeypatch.setattr(data, "check_audio", lambda utterances, *_: (utterances, []))
    monkeypatch.setattr(data.Utterance.__new__, "__defaults__", (3000,))
    spoil = flip(SHARD) if line is CACHED else clip(noise(0.2), cut=0.004)
    spoil()
    fragment = "utterance" if line is CACHED else CLIP
    refused(line.replace("--workers 0", "--workers 1"), capsys, "ValueError: ", fragment)


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("GET was unable to find an engine to execute this computation"),  # cuDNN's
    ],
)
def test_out_of_memory(error, world, capsys, monkeypatch):
    """Running out of memory is recorded, and the line names smaller values; it does not count as
    finished."""

    def predict(*args):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(train, "predict", predict)
        refused(
            f"{TRAIN} --chunk 8", capsys, "out of memory", "--chunk 4 --recompute", "new/result"
        )
        patch.setattr(model.EmotionModel, "prefix", predict)
        refused(FILL.replace("new", "new/cache"), capsys, "--batch-size 2")
    result = json.loads(Path("new/result.json").read_text())
    assert result["out_of_memory"] is True and "test" not in result and result["chunk"] == 8
    call(f"{TRAIN} --chunk 8 --resume")
    assert json.loads(Path("new/result.json").read_text())["out_of_memory"] is False
    Path("new/result.json").unlink()
    monkeypatch.setattr(torch.optim.AdamW, "load_state_dict", predict)
    refused(f"{TRAIN} --chunk 8 --resume", capsys, "out of memory, recorded in new/result.json")


def test_resumed_on_another_cache(world, capsys):
    """A run is resumed on the same cache in another place, but not on one with other contents."""
    call(CACHED)
    Path("new/result.json").unlink()
    Path("cache").rename("moved")
    call(f"{CACHED} --resume --cache moved")
    Path("new/result.json").unlink()
    call(f"{REFILL} --dtype float32")
    refused(f"{CACHED} --resume", capsys, "new was started with fingerprint ", "float16")


@pytest.mark.parametrize("change", ["labels", "encoder"])
def test_resumed_on_something_else(change, world, capsys):
    """A run is resumed from another place, but not on another corpus or encoder."""
    Path("run/result.json").unlink()
    spoil = (
        replace(ROW, b"t0.wav,N,2.00") if change == "labels" else weights(lambda t: t[LAYER].neg_())
    )
    call(RESUME)
    Path("run/result.json").unlink()
    spoil()
    what = "corpus" if change == "labels" else "encoder"
    refused(RESUME, capsys, f"run was started with {what} ")


# --- full disks


def limited(line, size):
    """The command in a child that cannot write files larger than `size` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
    call(line)


def child(function, *args):
    process = multiprocessing.get_context("fork").Process(target=function, args=args)
    process.start()
    return process


def await_file(path, process):
    while not Path(path).exists():
        assert process.is_alive()
        time.sleep(0.01)


def test_too_little_space(world, capsys, monkeypatch):
    """Before a cache is filled, its size and the free space are compared."""
    usage = shutil.disk_usage(".")
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=15000))
    refused(FILL, capsys, "the cache needs ", " GB more, new has 1.5e-05 GB free; make room")


@pytest.mark.parametrize(("size", "file"), [(1000, "shard-00000.pt"), (2500, "index.json")])
def test_full_disk_cache(size, file, world, capfd, monkeypatch):
    """A disk that fills up leaves a line with the file's name and a valid cache, which the same
    command completes."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 500)
    process = child(limited, FILL, size)
    process.join()
    err = capfd.readouterr().err
    assert process.exitcode == 2 and f"error: cannot write new/{file}: [Errno {errno.EFBIG}]" in err
    assert "Traceback" not in err and not list(Path("new").glob("*.tmp"))
    if file == "index.json":
        assert 0 < len(cache.read_index("new")["utterances"]) < 17
    call(FILL)
    Path("new").rename("completed")
    call(FILL)
    assert same_cache("new", "completed")


def test_full_disk_run(world, original, capfd):
    """The same for a run, which --resume continues."""
    process = child(limited, TRAIN, 20000)
    process.join()
    err = capfd.readouterr().err
    assert process.exitcode == 2 and "error: cannot write new/best.pt: " in err
    call(f"{TRAIN} --resume")
    assert same_run("new", original / "run")


# --- kills


def same_cache(folder, other):
    """Whether two caches hold the same hidden states, of the same, in the same files, time
    aside."""
    one, two = cache.read_index(folder), cache.read_index(other)
    shards = [{p.name: p.read_bytes() for p in Path(f).glob("shard*")} for f in (folder, other)]
    states = [[e[:4] for e in index["utterances"].values()] for index in (one, two)]
    return (
        shards[0] == shards[1]
        and states[0] == states[1]
        and one["utterances"].keys() == two["utterances"].keys()
        and one["fingerprint"] == two["fingerprint"]
    )


def same_run(folder, other):
    """Whether two runs have bitwise the same weights, optimizer, scaler and generator states,
    history and predictions, times and memory aside."""
    runs = []
    for run in (Path(folder), Path(other)):
        last = torch.load(run / "last.pt", weights_only=True)
        best = torch.load(run / "best.pt", weights_only=True)
        history = [(line["loss"], line["dev"]) for line in last.pop("history")]
        result = json.loads((run / "result.json").read_text())
        lines = len((run / "metrics.jsonl").read_text().splitlines())
        content = io.BytesIO()
        torch.save([last, best["weights"], best["encoder"]], content)
        predictions = (run / "predictions-Test1.csv").read_text()
        result = [result[key] for key in ("best_epoch", "dev", "test", "corpus", "encoder")]
        runs.append((content.getvalue(), history, result, lines, predictions))
    return runs[0] == runs[1]


def finished(folder):
    """What must not be done again: the shards in the index with their times, or the epochs with
    their seconds."""
    if Path(folder, "index.json").exists():
        shards = cache.read_index(folder)["shards"]
        return [(shard, os.stat(Path(folder, shard)).st_mtime_ns) for shard in shards]
    if Path(folder, "last.pt").exists():
        history = torch.load(Path(folder, "last.pt"), weights_only=True)["history"]
        return [line["train_seconds"] for line in history]
    return []


def silent(line):
    os.setpgrp()
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    os.dup2(1, 2)
    call(line)


KILLED = {  # command, how many kills
    "fill": (FILL, 8),
    "fill, workers": (FILL.replace("--workers 0", "--workers 2"), 3),
    "train": (TRAIN, 5),
    "train, fp16": (TRAIN.replace("fp32", "fp16") + " --method lora", 5),
    "train, workers": (TRAIN.replace("--workers 0", "--workers 2"), 3),
    "train, cached": (CACHED, 5),
    "train, cached, fp16": (CACHED.replace("fp32", "fp16"), 5),
}


@pytest.mark.parametrize("name", KILLED)
def test_killed(name, world):
    """Killed at any moment, mostly by SIGKILL, the same command (of train.py: with --resume) ends
    as if undisturbed."""
    line, kills = KILLED[name]
    rng, same = random.Random(name), same_cache if line.startswith("cache") else same_run
    again = line if line.startswith("cache") else f"{line} --resume"
    start = time.perf_counter()
    process = child(silent, line)
    process.join()
    seconds = time.perf_counter() - start
    assert process.exitcode == 0
    Path("new").rename("undisturbed")
    killed = 0
    while killed < kills:  # one that came too late is not counted
        process = child(silent, line)
        process.join(seconds * rng.uniform(0.1, 1))
        process.terminate() if killed % 4 == 3 else process.kill()
        process.join()
        killed += process.exitcode != 0
        before = finished("new")
        call(again)
        assert finished("new")[: len(before)] == before and same("new", "undisturbed")
        with contextlib.suppress(ProcessLookupError):  # workers that have not noticed yet
            os.killpg(process.pid, signal.SIGKILL)
        shutil.rmtree("new")


@pytest.mark.parametrize("line", [TRAIN, FILL])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("moment", ["inspect_audio", "features"])
def test_interrupted(line, number, moment, world, capfd, monkeypatch):
    """SIGTERM and Ctrl-C, which reaches the workers too, leave with one line that says how to go
    on."""

    def wait(*args):
        Path("waiting").touch()
        time.sleep(60)

    def start(line):
        os.setpgrp()
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        call(line)

    monkeypatch.setattr(data if moment == "inspect_audio" else model.EmotionModel, moment, wait)
    process = child(start, line.replace("workers 0", "workers 2"))
    await_file("waiting", process)
    (os.kill if number == signal.SIGTERM else os.killpg)(process.pid, number)
    process.join()
    err = capfd.readouterr().err
    assert process.exitcode == 130 and "Traceback" not in err
    assert re.search("interrupted: .*the same command .*continues", err)


def hold(folder):
    """Lock a folder, and start a worker that outlives this process."""
    with cache.lock(folder):
        if os.fork() == 0:
            time.sleep(3)
            os._exit(0)
        Path("locked").touch()
        time.sleep(60)


@pytest.mark.parametrize("line", [TRAIN, FILL])
def test_two_processes(line, world, capsys):
    """The second process in a folder is refused; the lock of a killed one is no obstacle, even if a
    worker lives on."""
    process = child(hold, "new")
    await_file("locked", process)
    refused(line, capsys, "new is in use by another process; wait for it or give another folder")
    process.kill()
    process.join()
    call(line)


# --- fuzz

FUZZ = settings(
    derandomize=True,
    deadline=None,
    max_examples=100,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
CELLS = st.sampled_from(["t0.wav", "../t0.wav", "/", "Train", "Test3", "3", "8", "nan", "1e9", '"'])
TABLES = st.lists(st.lists(CELLS | st.text(max_size=4), max_size=9), max_size=6)


def damaged(content):
    """Bytes with a few places changed, inserted or cut out."""
    change = st.tuples(st.integers(0, len(content)), st.integers(0, 3), st.binary(max_size=3))

    def apply(changes):
        result = content
        for position, cut, new in changes:
            result = result[:position] + new + result[position + cut :]
        return result

    return st.lists(change, min_size=1, max_size=3).map(apply)


def check_labels(content):
    """What is read is true to its type, or refused in one line."""
    Path(LABELS).write_bytes(content)
    try:
        utterances, problems = data.read_corpus("corpus")
    except (ValueError, OSError) as error:
        assert LABELS in str(error) and len(str(error).splitlines()) == 1
        return
    for u in utterances:
        assert Path(u.path).parent == Path("corpus/Audios") and Path(u.path).is_file()
        assert u.split in data.SPLITS
        assert u.split == "Test3" or 0 <= u.activation <= 1 and 0 <= u.valence <= 1
    assert len({u.name for u in utterances}) == len(utterances)
    assert all(len(p.where.splitlines()) == 1 for p in problems)


def test_fuzz_labels(world):
    """The label reader, given damaged and invented tables."""

    @FUZZ
    @given(damaged(Path(LABELS).read_bytes()))
    def damage(content):
        check_labels(content)

    @FUZZ
    @given(TABLES)
    def invent(rows):
        check_labels((HEADER + "\n".join(map(",".join, rows))).encode("utf-8", "replace"))

    damage()
    invent()


def test_fuzz_index(world):
    """The index reader returns what was written or refuses in one line."""
    original = cache.read_index("cache")

    @FUZZ
    @given(damaged(Path("cache/index.json").read_bytes()) | st.binary(max_size=20))
    def damage(content):
        Path("cache/index.json").write_bytes(content)
        try:
            assert cache.read_index("cache") == original
        except ValueError as error:
            assert "index.json" in str(error) and len(str(error).splitlines()) == 1

    damage()


def test_fuzz_shard(world):
    """The shard reader returns what was written or names shard and utterance, whichever bit is
    flipped, whatever is cut out."""
    index, content = cache.read_index("cache"), Path(SHARD).read_bytes()
    names = [n for n, entry in index["utterances"].items() if f"cache/{entry[0]}" == SHARD]
    original = {name: cache.read_utterance("cache", index, name) for name in names}

    def check():
        for name in names:
            try:
                assert torch.equal(cache.read_utterance("cache", index, name), original[name])
            except ValueError as error:
                assert SHARD in str(error) and name in str(error)
                assert len(str(error).splitlines()) == 1

    flags = [8 * i for i, byte in enumerate(content) if byte == 0x89]  # the pickle's False

    @FUZZ
    @given(st.integers(0, 8 * len(content) - 1) | st.sampled_from(flags))
    def one_bit(bit):
        Path(SHARD).write_bytes(content)
        flip(SHARD, bit)()
        check()

    @FUZZ
    @given(damaged(content))
    def damage(changed):
        Path(SHARD).write_bytes(changed)
        check()

    one_bit()
    damage()
