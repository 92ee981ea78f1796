"""Bad input, kills, full disks, hostile files, by command lines: one clear line, nothing lost."""

import json
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from random import Random
from threading import RLock
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
import tqdm
from conftest import read_cache, state

import cache
import ccc
import data
import model
import train

COMMANDS = {m.__name__: m for m in (cache, ccc, data, model, train)}
HEADER = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set\n"
LABELS, CLIP = "corpus/Labels/labels_consensus.csv", "corpus/Audios/u00.wav"
SHARD, INDEX, RESULT = "cache/shard-00001.pt", "cache/index.json", "finished/result.json"
CONFIG, SOUND = "encoder/config.json", "encoder/preprocessor_config.json"
WEIGHTS, PICKLED = "encoder/model.safetensors", "encoder/pytorch_model.bin"
LAYER = "encoder.layers.3.attention.q_proj.weight"
NOISE = 0.1 * np.random.default_rng(0).normal(size=61 * 16000)  # 61 s
# the commands of this file; all paths are relative to the test's own folder
FILL = "cache --data corpus --model encoder --workers 1 --layers 2 --out new"
TRAIN = f"train{FILL[5:]} --device cpu --batch-size 4 --precision fp32 --epochs 2 --seed 3"
CACHED, RESUME = f"{TRAIN} --cache cache", f"{TRAIN} --out run --resume"
REFILL, VERIFY = f"{FILL} --out cache", f"{FILL} --out cache --verify"
AGAIN, FINISHED = f"{TRAIN} --resume", f"{RESUME} --out finished"
PREDICT = f"model predict run --model encoder {CLIP}"
LATE = " --out late"  # the one folder that a refused command may begin


def call(line):
    """A command line as `python <line>` would run it, in this process."""
    command, *arguments = line.split()
    COMMANDS[command].main(arguments)


@pytest.fixture(scope="module")
def original(tmp_path_factory, encoder):
    """Folder with corpus/ (u00 to u08 Train, to u12 Development, to u16 Test1), encoder/, cache/
    and two runs: finished/, with seed 1, and run/, which lacks predictions-Test1.csv."""
    root, rng, rows = tmp_path_factory.mktemp("robust"), np.random.default_rng(1), [HEADER]
    shutil.copytree(encoder, root / "encoder")
    tqdm.tqdm.monitor_interval = 0  # children are forked from here and killed: no other thread,
    tqdm.tqdm.set_lock(RLock())  # and no lock in common
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cache, "SHARD_BYTES", 4000)  # several shards
        patch.chdir(root)
        Path(CLIP).parent.mkdir(parents=True)
        Path(LABELS).parent.mkdir()
        for i in range(17):
            soundfile.write(f"corpus/Audios/u{i:02}.wav", NOISE[: rng.integers(1600, 4800)], 16000)
            split = "Train" if i < 9 else "Development" if i < 13 else "Test1"
            rows.append(f"u{i:02}.wav,N,{1.5 + i % 9 / 2:.2f},{1 + 5 * i % 7},4,{i},Male,{split}\n")
        Path(LABELS).write_text("".join(rows))
        for line in (REFILL, RESUME, f"{FINISHED} --seed 1"):
            call(line)
        Path("run/predictions-Test1.csv").unlink()
        yield root


@pytest.fixture
def world(original, tmp_path, monkeypatch):
    """A copy of `original` to spoil, and to work in."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    shutil.copytree(original, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")


def contents():
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in Path().rglob("*")}


@pytest.fixture
def refused(world, capsys):
    """refused(line, fragment) -> what the command printed before it was refused in one line that
    holds the fragment. It makes and changes nothing outside the folder late."""

    def check(line, fragment):
        before = contents()
        capsys.readouterr()
        with pytest.raises((ValueError, OSError, SystemExit)) as caught:
            call(line)
        out, err = capsys.readouterr()
        message = err.splitlines()[-1] if caught.type is SystemExit else str(caught.value)
        assert fragment in message and len(message.splitlines()) == 1
        assert getattr(caught.value, "code", 2) == 2
        changed = {path for path, _ in before.items() ^ contents().items()}
        assert all(path.startswith("late") for path in changed), changed
        return out

    return check


def write(path, content=b""):
    Path(path).write_bytes(content)


def replace(old, new, path=LABELS, times=1):
    assert old in Path(path).read_bytes()
    write(path, Path(path).read_bytes().replace(old, new, times))


def clip(wave):
    """Replace the first audio file."""
    soundfile.write(CLIP, wave, 16000)


def weights(change=torch.neg):
    tensors = safetensors.torch.load_file(WEIGHTS)
    tensors[LAYER] = change(tensors[LAYER])
    safetensors.torch.save_file(tensors, WEIGHTS, {"format": "pt"})


class Hostile:
    def __reduce__(self):  # if unpickled, it makes a file, which `refused` then finds
        return open, ("executed", "w")


EVIL = dict.fromkeys(("config", "epoch", "hidden"), Hostile())
CODE = b'"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}'
TYPE, OPEN = b'"model_type": "wav2vec2"', b"open('executed', 'w')"

BAD = [  # what is spoiled, the command, what the error says
    (lambda: replace(b",4,0", b",,0"), f"{TRAIN} --attributes dominance", "line 2: 'u00.wav' ['']"),
    (lambda: write(LABELS, HEADER.encode("utf-16")), TRAIN, "not a label file in UTF-8"),
    (lambda: replace(b"u00.wav", b'"u\n0"'), TRAIN, r"1 missing audio (first: line 3: 'u\n0'"),
    (lambda: (replace(b"16000", b"8000", SOUND), clip(NOISE[:640])), FILL, "1 shorter than 50 ms"),
    (None, f"{TRAIN} --out run", "run holds a run; --resume continues it"),
    (lambda: os.remove("run/config.json"), f"{RESUME} --seed 5", "last.pt is of a run with seed 3"),
    (lambda: os.remove("run/last.pt"), RESUME, "run/last.pt: no file, damaged, or not"),
    (lambda: replace(b"1.50", b"2.0"), RESUME, "run/last.pt is of a run with corpus "),
    (weights, RESUME, "run/last.pt is of a run with encoder "),
    (None, f"model predict no --csv {CLIP} {CLIP}", "give a name that ends in .csv"),
    (None, "model predict run --model encoder cache", "cache: no audio files"),
    (lambda: clip(NOISE[:160]), f"{PREDICT} --csv {LABELS}", f"{CLIP}: shorter than 25 ms"),
    (lambda: write("x.csv", b"FileName,Act\na,1\na,2\nb,3\n"), "ccc x.csv", "a name in two"),
    (lambda: replace(b'"wav2vec2"', b'"data2vec-audio"', CONFIG), TRAIN, "data2vec-audio is not"),
    (lambda: weights(lambda x: x / 0), FILL, f"encoder: NaN or infinity in {LAYER}"),
    (lambda: replace(b"16000", b"null", SOUND), TRAIN, "preprocessor_config.json lacks sampling"),
    (lambda: (replace(TYPE, CODE, CONFIG), write("encoder/evil.py", OPEN)), TRAIN, "cannot load "),
    (lambda: (os.remove(WEIGHTS), torch.save(EVIL, PICKLED)), FILL, "cannot load "),
    (lambda: torch.save(EVIL, "run/best.pt"), PREDICT, "run/best.pt: no file, damaged, or not"),
    (lambda: torch.save(EVIL, SHARD), CACHED + LATE, f"{SHARD} is damaged at utterance u"),
    (lambda: shutil.copy("cache/shard-00000.pt", SHARD), CACHED + LATE, f"{SHARD} is damaged at"),
    (lambda: replace(b'r": 2', b'r": 1', INDEX), CACHED + LATE, " is damaged at utterance u"),
    (None, f"{TRAIN} --cache new", "new is no cache: no index.json"),
    (weights, CACHED, "the cache cache was made with another encoder"),
    (lambda: os.remove(SHARD), CACHED, " utterances: u"),
    (lambda: clip(NOISE[:2400]), CACHED, f"{CLIP} has changed; delete cache/shard-00000.pt"),
    (lambda: weights(lambda x: x.sign() * 3e38), TRAIN + LATE, "the loss is nan; try a smaller"),
]


@pytest.mark.parametrize(("spoil", "line", "fragment"), BAD, ids=range(len(BAD)))
def test_bad_input(spoil, line, fragment, refused):
    """Every bad input is refused in one line that says what is wrong, with status 2; no file is
    lost or made, no code of it is run."""
    if spoil:
        spoil()
    refused(line, fragment)


def test_unusual_works(world):
    """Silence, exactly 25 ms, other rates and formats, stereo: cached, trained on, predicted, and
    nothing but the command's own folder is written."""
    stereo = np.stack([NOISE[:3200], NOISE[:3200]], 1)
    unusual = [(NOISE[:400], 16000, "WAV", "PCM_24"), (0 * NOISE[:3200], 16000, "WAV", "PCM_U8")]
    unusual += [(stereo, 11025, "FLAC", "PCM_16"), (NOISE[:3200], 48000, "WAVEX", "FLOAT")]
    for i, (wave, rate, form, subtype) in enumerate(unusual):
        soundfile.write(f"corpus/Audios/u0{i}.wav", wave, rate, format=form, subtype=subtype)
    before = contents()
    for line in ("data corpus", FILL, f"{VERIFY} --out new", f"{TRAIN} --cache new"):
        call(line)
    call("model predict new corpus/Audios --csv new/all.csv")
    assert len(re.findall(r"\nu\d\d.wav(,-?\d+\.\d+){4}", Path("new/all.csv").read_text())) == 17
    assert {k: v for k, v in contents().items() if not k.startswith("new")} == before


def test_skip_bad(refused, capsys):
    """--skip-bad goes on without bad utterances and says how many, in filling, verifying and
    training, from a cache or not. Filling does not care for labels."""
    clip(NOISE[:160])
    os.remove("corpus/Audios/u01.wav")
    replace(b"3.00", b"0.99")
    refused(TRAIN, "3 utterances cannot be used: 1 missing audio, 1 label missing or not in")
    lines = FILL, f"{VERIFY} --out new", f"{TRAIN} --out x --cache new", f"{TRAIN} --out y"
    for line, n in zip(lines, (2, 2, 3, 3), strict=True):
        call(f"{line} --skip-bad")
        assert f"skipped: {n} utterances cannot be used: 1 " in capsys.readouterr().out


@pytest.mark.parametrize("spoil", [partial(torch.save, EVIL), write, os.remove])
def test_verify_names_them(spoil, refused):
    """--verify names all utterances that are damaged or lacking, and no more. Deleted and filled
    again, their shard is equal in every byte."""
    entries, content = json.loads(Path(INDEX).read_text())["utterances"], Path(SHARD).read_bytes()
    spoil(SHARD)
    out = refused(VERIFY, "defects; delete the shards named")
    assert re.findall(r"u\d\d.wav", out) == [n for n in entries if entries[n][0] in SHARD]
    Path(SHARD).unlink(missing_ok=True)
    for line in (REFILL, VERIFY):
        call(line)
    assert Path(SHARD).read_bytes() == content


@pytest.mark.parametrize("words", ["CUDA out of memory", "GET was unable to find an engine to"])
def test_out_of_memory(words, refused, monkeypatch):
    """Running out of memory, in PyTorch's or cuDNN's words, is recorded and a line that names
    smaller values; the run does not count as finished, and a finished one's result is kept."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "predict", Mock(side_effect=RuntimeError(words)))
        refused(f"{TRAIN} --chunk 8{LATE}", "is needed with --out ELSEWHERE --chunk 4 --recompute")
        patch.setattr(train, "resume", Mock(side_effect=RuntimeError(words)))
        refused(f"{FINISHED} --seed 1", "out of memory")
    assert json.loads(Path("late/result.json").read_text())["out_of_memory"] is True
    call(f"{TRAIN} --chunk 8 --resume{LATE}")
    assert json.loads(Path("late/result.json").read_text())["out_of_memory"] is False


def test_resumed_elsewhere(refused, capsys):
    """A finished run is left as it is. A run is resumed on the same corpus, encoder and cache in
    another place, but not on a cache with other contents."""
    before = contents()
    call(f"{FINISHED} --seed 1")
    assert "finished is finished" in capsys.readouterr().out
    assert contents().keys() == before.keys() and contents()[RESULT] == before[RESULT]
    for line in (RESUME, CACHED):
        call(line)
    os.remove("new/predictions-Test1.csv")
    os.rename("cache", "moved")
    for line in (f"{AGAIN} --cache moved", f"{REFILL} --dtype float32"):
        call(line)
    refused(f"{CACHED} --resume", "cache layer 2, float16, not layer 2, float32")


def test_full_disk(refused, monkeypatch):
    """A disk that is too small is found before filling; one that fills up leaves a line with the
    file's name, nothing half written, and what the same command completes."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", Mock(return_value=Mock(free=999)))
        refused(FILL + LATE, " GB free")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for line, size, file in ((FILL, 1000, "shard-00000.pt"), (AGAIN, 20000, "last.pt")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            refused(f"{line} --out late-{size}", f"cannot write late-{size}/{file}: ")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(Path().glob("late*/*.tmp"))
        call(f"{line} --out late-{size}")


@pytest.mark.parametrize("line", [FILL, f"{AGAIN} --precision fp16", f"{AGAIN} --cache cache"])
def test_killed(line, world, monkeypatch):
    """Killed before any one of its files appears (as best.pt after last.pt), or at any moment, the
    same command ends bitwise as if undisturbed, optimizer and scaler included."""
    done, stop, rename, start = [], None, os.replace, time.perf_counter()

    def held():
        if Path("new/last.pt").exists():
            return state("new")
        return {name: x.tolist() for name, x in read_cache("new", "corpus").items()}

    def replace_file(*paths):
        if len(done) == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(rename(*paths))

    monkeypatch.setattr(os, "replace", replace_file)
    call(line)
    undisturbed, seconds = held(), time.perf_counter() - start
    moments = np.random.default_rng(0).uniform(0.1, 0.9, 5)
    for stop in [*range(len(done)), *moments]:
        shutil.rmtree("new")
        done.clear()
        process = multiprocessing.get_context("fork").Process(target=call, args=[line])
        process.start()
        process.join(stop * seconds if stop in moments else None)
        process.kill()
        process.join()
        stop = None
        call(line)
        assert held() == undisturbed


def test_real_processes(world):
    """Ctrl-C ends with status 130 and a line that says how to go on; until then a second process in
    the folder is refused. A closed pipe and bad input are a line each, with status 2."""
    with open(LABELS, "a") as file:
        for i in range(9):  # something to do for cache.py
            soundfile.write(f"corpus/Audios/x{i}.wav", NOISE[:480000], 16000)
            file.write(f"x{i}.wav,N,3,3,4,1,Male,Test2\n")
    lines = [f"{AGAIN} --epochs 999", f"{FILL} --splits Test2 --out x", PREDICT, "ccc no.csv"]
    started, pipe = [], subprocess.PIPE
    for command, *arguments in map(str.split, lines):
        arguments = [sys.executable, COMMANDS[command].__file__, *arguments]
        started.append(subprocess.Popen(arguments, stdout=pipe, stderr=pipe, text=True))
    started[2].stdout.close()
    for process, line, file in zip(started, lines, ("new/last.pt", "x/.lock"), strict=False):
        while process.poll() is None and not Path(file).exists():
            time.sleep(0.01)
        with pytest.raises(OSError, match="is in use by another process; give another folder"):
            call(line)
        process.send_signal(signal.SIGINT)
    errors = [process.communicate(timeout=60)[1] for process in started]
    assert [process.returncode for process in started] == [130, 130, 2, 2]
    assert errors[0].endswith("\ninterrupted: continue it with --resume\n")
    assert errors[1].endswith("\ninterrupted: the same line adds what is missing\n")
    assert "Traceback" not in "".join(errors) and errors[2].endswith("Broken pipe\n")
    assert errors[3] == "error: [Errno 2] No such file or directory: 'no.csv'\n"


def test_predict_names(world):
    """Files have the names given, and those of the one folder given names in it, UTF-8 or not. What
    is no audio is passed over."""
    for path in ("a/x.wav", "b/x.wav", os.fsdecode(b"c/\xff.wav")):
        os.mkdir(path[0])
        shutil.copy(CLIP, path)
    write("c/notes.txt", b"")
    Path("c/linked.wav").symlink_to("../a/x.wav")
    call(f"{PREDICT} a b/x.wav --csv ab.csv")
    call("model predict run --model encoder c --csv c.csv")
    lines = [Path(name).read_bytes().splitlines()[1:] for name in ("ab.csv", "c.csv")]
    names = [[line.partition(b",")[0] for line in part] for part in lines]
    assert names == [[CLIP.encode(), b"a/x.wav", b"b/x.wav"], [b"linked.wav", b"\xff.wav"]]


@pytest.mark.parametrize("path", [LABELS, INDEX, SHARD])
def test_damage(path, world):
    """A file with a damaged place is read as what was written or, of labels, as what could have
    been, or refused in one line that names its folder."""
    content, written, rng = Path(path).read_bytes(), read_cache("cache", "corpus"), Random(0)
    for _ in range(150):
        start, cut = rng.randrange(len(content)), rng.randrange(9)
        new = rng.choice([b"8", b"../", b'"', b"\n", b",", b"null", b"", rng.randbytes(3)])
        write(path, content[:start] + new + content[start + cut :])
        try:
            utterances, problems = data.read_corpus("corpus")
            assert all(Path(u.path).parent == Path(CLIP).parent for u in utterances)
            assert all(0 <= x <= 1 for u in utterances if u.split != "Test3" for x in u.labels)
            assert all(len(problem.where.splitlines()) == 1 for problem in problems)
            found = read_cache("cache", "corpus")
            assert all(torch.equal(hidden, written[name]) for name, hidden in found.items())
        except (ValueError, OSError) as error:
            assert path.split("/")[0] in str(error) and len(str(error).splitlines()) == 1
