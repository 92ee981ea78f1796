"""Bad input, kills, full disks, hostile files, by command lines: one clear line, nothing lost."""

import copy
import json
import os
import re
import resource
import runpy
import shutil
import signal
import sys
import time
from functools import partial
from pathlib import Path
from random import Random
from unittest.mock import Mock

import numpy as np
import pytest
import safetensors.torch
import soundfile
import torch
from conftest import FORK, fork, read_cache, read_shard, state, write_shard

import cache
import ccc
import data
import model
import stats
import train

COMMANDS = {m.__name__: m for m in (cache, ccc, data, model, stats, train)}
HEADER = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set\n"
LABELS, CLIP = "corpus/Labels/labels_consensus.csv", "corpus/Audios/u00.wav"
SHARD, RESULT = "cache/shard-0-00001.safetensors", "finished/result.json"
CONFIG, SOUND = "encoder/config.json", "encoder/preprocessor_config.json"
WEIGHTS, PICKLED = "encoder/model.safetensors", "encoder/pytorch_model.bin"
LAYER = "encoder.layers.3.attention.q_proj.weight"
NOISE = 0.1 * np.random.default_rng(0).normal(size=61 * 16000)  # 61 s
# the commands of this file; all paths are relative to the test's own folder
FILL = "cache --data corpus --model encoder --layers 2 --out new"
TRAIN = f"train{FILL[5:]} --device cpu --batch-size 4 --precision fp32 --epochs 2 --seed 3"
CACHED, RESUME = f"{TRAIN} --cache cache", f"{TRAIN} --out run --resume"
REFILL, VERIFY = f"{FILL} --out cache", "cache --out cache --verify"
AGAIN, FINISHED = f"{TRAIN} --resume", f"{RESUME} --out finished --seed 1"
PREDICT = f"model predict run --model encoder {CLIP}"
LATE = " --out late"  # the one folder that a refused command may begin


def call(line):
    """A command line as `python <line>` would run it, in this process."""
    command, *arguments = line.split()
    COMMANDS[command].main(arguments)


@pytest.fixture(scope="module")
def original(tmp_path_factory, encoder):
    """Folder with corpus/ (u00 to u08 Train, to u12 Development, to u16 Test1), encoder/, cache/
    and two runs: finished/, with seed 1, and run/, which lacks its result.json."""
    root, rng, rows = tmp_path_factory.mktemp("robust"), np.random.default_rng(1), [HEADER]
    shutil.copytree(encoder, root / "encoder")
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
        for line in (REFILL, RESUME, FINISHED):
            call(line)
        Path("run/result.json").unlink()
        yield root


@pytest.fixture
def world(original, tmp_path, monkeypatch):
    """A copy of `original` to spoil, and to work in."""
    shutil.copytree(original, tmp_path / "world")
    monkeypatch.chdir(tmp_path / "world")


def contents():
    return {str(p): p.read_bytes() if p.is_file() else b"" for p in Path().rglob("*")}


@pytest.fixture
def refused(world, capsys):
    """refused(line, fragment) -> what the command printed before it was refused in one line that
    holds the fragment. It makes and changes nothing outside the folder late, but empty locks."""

    def check(line, fragment):
        before = contents()
        capsys.readouterr()
        with pytest.raises((ValueError, OSError, MemoryError, SystemExit)) as caught:
            call(line)
        out, err = capsys.readouterr()
        message = err.splitlines()[-1] if caught.type is SystemExit else str(caught.value)
        assert fragment in message and len(message.splitlines()) == 1
        assert getattr(caught.value, "code", 2) in (2, 1 if "predict" in line else 2)
        changed = {path for path, _ in before.items() ^ contents().items()}
        kept = [path for path in changed if not path.startswith("late") and ".lock" not in path]
        assert set(kept) <= {"new"}, changed
        return out + err

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


def swap(name, seed):
    """Make a file of the run one of the run of another seed."""
    saved = torch.load(f"run/{name}.pt", weights_only=True)
    saved.get("best", saved)["settings"]["seed"] = seed
    torch.save(saved, f"run/{name}.pt")


def lose_audio():
    """Give every audio file another name."""
    for path in Path(CLIP).parent.iterdir():
        path.rename(path.with_suffix(".flac"))


class Hostile:
    def __reduce__(self):  # if unpickled, it makes a file, which `refused` then finds
        return open, ("executed", "w")


EVIL = dict.fromkeys(("config", "epoch", "hidden", "settings", "fingerprint"), Hostile())
CODE = b'"model_type": "evil", "auto_map": {"AutoConfig": "evil.C", "AutoModel": "evil.M"}'
SPLIT = "model predict run --model encoder --data corpus"
TYPE, OPEN = b'"model_type": "wav2vec2"', b"open('executed', 'w')"

BAD = [  # what is spoiled, the command, what the error says
    (lambda: replace(b",4,0", b",,0"), f"{TRAIN} --attributes dominance", "'u00.wav'"),
    (lambda: write(LABELS, HEADER.encode("utf-16")), TRAIN, LABELS),
    (lambda: replace(b"u00.wav", b'"u\n0"'), TRAIN, r"'u\n0'"),
    (lambda: (replace(b"16000", b"8000", SOUND), clip(NOISE[:640])), FILL, "shorter than 50 ms"),
    (lambda: os.remove(CLIP), f"{TRAIN} --cache late", "'u00.wav'"),
    (lose_audio, f"{TRAIN} --cache late --skip-bad{LATE}", "'Train' has 0 usable utterances"),
    (lambda: os.remove("run/last.pt"), RESUME, "run/last.pt"),
    (lambda: swap("last", 5), RESUME, "it is of another run"),
    (lambda: swap("best", 5), PREDICT, "it is of another run than config.json"),
    (lambda: os.remove("run/config.json"), RESUME, "'run' holds no run, and ['metrics.jsonl'"),
    (None, f"{PREDICT} --csv {LABELS}", "is there already"),
    (None, PREDICT.replace(CLIP, f"/dev/fd/{os.pipe()[0]}"), "a pipe; save it as a file"),
    (None, "model predict run --model encoder cache", "cache"),
    (lambda: write("x.csv", b"FileName,Act\na,1\na,2\nb,3\n"), "ccc x.csv", "a second row of"),
    (
        lambda: (replace(TYPE, CODE, CONFIG), write("encoder/evil.py", OPEN)),
        TRAIN,
        "cannot be used",
    ),
    (lambda: (os.remove(WEIGHTS), torch.save(EVIL, PICKLED)), FILL, "'encoder' cannot be used"),
    (lambda: torch.save(EVIL, "run/best.pt"), PREDICT, "'run/best.pt' cannot be used"),
    (lambda: torch.save(EVIL, SHARD), CACHED + LATE, f"'{SHARD}' cannot be read"),
    (weights, CACHED + LATE, "'cache' was made with encoder_sha256 "),
    (
        lambda: replace(b"16000", b"8000", SOUND),
        CACHED + LATE,
        "was made with sample_rate 16000, not ",
    ),
    (None, f"{TRAIN} --cache corpus{LATE}", "'corpus' is no cache"),
    (None, f"{TRAIN} --cache cache --layers 3{LATE}", "'cache' was made with cut 3, not 2"),
    (
        lambda: weights(lambda x: x.sign() * 3e38),
        TRAIN + LATE,
        "the loss of ['u02.wav', 'u06.wav', 'u03.wav', 'u07.wav'] is NaN",
    ),
    (None, f"{TRAIN} --model ./gone", "'./gone (no folder here"),
    (None, f"{TRAIN} --out encoder", "'encoder' holds no run, and ['config.json']"),
    (None, f"{FILL} --splits train", "split 'train' has 0 usable utterances"),
    (None, f"{SPLIT} --split Tset2", "split 'Tset2' has 0"),
    (
        lambda: os.rename("corpus/Audios", "late"),
        SPLIT,
        "No such file or directory: 'corpus/Audios'",
    ),
    (None, "cache --out gone --verify", "'gone' holds no cache"),
    (None, "cache --out gone", "--data is required"),
    (None, f"{TRAIN} --seed 100000000000000000000", "--seed"),
    (None, f"{TRAIN} --workers 0", "--workers"),
    (None, f"{TRAIN} --lr nan", "--lr"),
    (None, f"{TRAIN} --dropout nan", "--dropout"),
    (None, f"{TRAIN} --method lora --lora-dropout 1", "--lora-dropout: must be at least 0"),
    (None, f"{TRAIN} --method lora --freeze-embedding", "--freeze-embedding: lora"),
    (None, f"{TRAIN} --cache late --freeze-embedding", "--freeze-embedding: lora and --cache"),
    (None, f"{TRAIN} --chunk 0", "--chunk: must be at least 1"),
    (None, f"{TRAIN} --splits Train Train Test1", "three different splits"),
    (None, f"{TRAIN} --device cuda", "has no GPU"),
    (None, f"{TRAIN} --scale 7 1", "scale"),
    (None, f"{TRAIN} --batch-size 1", "--batch-size"),
    (None, f"{TRAIN} --rank 4", "--method lora"),
    (None, f"{TRAIN} --method full --cache cache --layers 4", "full trains all: it takes"),
    (None, "data --demo corpus", "corpus"),
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
    nothing but the command's own folders is written."""
    stereo = np.stack([NOISE[:3200], NOISE[:3200]], 1)
    unusual = [(NOISE[:400], 16000, "WAV", "PCM_24"), (0 * NOISE[:3200], 16000, "WAV", "PCM_U8")]
    unusual += [(stereo, 11025, "FLAC", "PCM_16"), (NOISE[:3200], 48000, "WAVEX", "FLOAT")]
    for i, (wave, rate, form, subtype) in enumerate(unusual):
        soundfile.write(f"corpus/Audios/u0{i}.wav", wave, rate, format=form, subtype=subtype)
    before = contents()
    for line in (
        "data corpus",
        f"{TRAIN} --cache new/c",
        "cache --out new/c --verify --data corpus",
    ):
        call(line)
    call("model predict new corpus/Audios --csv new/all.csv")
    assert len(re.findall(r"\nu\d\d.wav(,-?\d+\.\d+){2}", Path("new/all.csv").read_text())) == 17
    assert {k: v for k, v in contents().items() if not k.startswith("new")} == before


def test_skip_bad(refused, capsys):
    """--skip-bad goes on without bad utterances and says how many, in filling and training, from a
    cache or not, and all of them train on the same. Filling cares for splits, not for labels."""
    clip(NOISE[:160])
    replace(b"Test1", b"Dev")
    os.remove("corpus/Audios/u01.wav")
    replace(b"3.00", b"0.99")
    refused(TRAIN + LATE, "u03.wav")
    for line in (FILL, f"{TRAIN} --out x --cache new", f"{TRAIN} --out y"):
        call(f"{line} --skip-bad")
        out, err = capsys.readouterr()
        # What only lacks what is left out is full: the second line fills nothing.
        assert "skipped: 1 shorter" in err and "1 missing audio" in err
        assert ("lacks" in out) == (line == FILL)
    ran = [json.loads(Path(out, "result.json").read_text()) for out in "xy"]
    assert ran[0]["corpus"] == ran[1]["corpus"] and ran[0]["labels"] == ran[1]["labels"]
    assert len(read_cache("new")) == 14


@pytest.mark.parametrize("words", ["CUDA out of memory", "GET was unable to find an engine to"])
def test_out_of_memory(words, refused, monkeypatch):
    """Running out of memory, in PyTorch's or cuDNN's words, is recorded and a line that names
    smaller values; the run does not count as finished, and may be tried again."""
    with monkeypatch.context() as patch:
        patch.setattr(train, "predict_batch", Mock(side_effect=RuntimeError(words)))
        refused(f"{TRAIN} --chunk 8{LATE}", "--chunk 4 --recompute needs less")
    assert {path.name for path in Path("late").iterdir()} == {".lock", "config.json", "result.json"}
    assert json.loads(Path("late/result.json").read_text())["out_of_memory"] is True
    call(f"{TRAIN} --chunk 8 --resume{LATE}")
    assert json.loads(Path("late/result.json").read_text())["out_of_memory"] is False


def test_resumed_elsewhere(refused, capsys):
    """A run is resumed on the same corpus, encoder and cache in another place, but not on a cache
    with other contents."""
    for line in (RESUME, CACHED):
        call(line)
    os.remove("new/result.json")
    os.rename("cache", "moved")
    for line in (f"{AGAIN} --cache moved", f"{REFILL} --dtype float32"):
        call(line)
    os.remove("new/result.json")
    refused(f"{CACHED} --resume", "cache cut 3, float16, not cut 3, float32")


def test_full_disk(refused, monkeypatch):
    """A disk that is too small is found before filling; one that fills up leaves a line with the
    file's name, nothing half written, and what the same command completes."""
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", Mock(return_value=Mock(free=999)))
        refused(FILL + LATE, "less free space")
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    for line, size, file in ((FILL, 1000, "shard-0-00000.safetensors"), (AGAIN, 20000, "last.pt")):
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            refused(f"{line} --out late-{size}", f"cannot write 'late-{size}/{file}'")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert not list(Path().glob("late*/*.tmp"))
        call(f"{line} --out late-{size}")


@pytest.mark.parametrize("line", [FILL, f"{AGAIN} --precision fp16", f"{AGAIN} --cache new/c"])
def test_killed(line, world, monkeypatch):
    """Killed before any one of its files appears (as best.pt after last.pt), the same command ends
    bitwise as if undisturbed, optimizer and scaler included."""
    monkeypatch.setattr(cache, "SHARD_BYTES", 4000)
    done, rename = [], os.replace
    stop = None

    def held():
        if Path("new/last.pt").exists():
            return state("new")
        return {name: x.tolist() for name, x in read_cache("new").items()}

    def replace_file(*paths):
        if len(done) == stop:
            os.kill(os.getpid(), signal.SIGKILL)
        done.append(rename(*paths))

    monkeypatch.setattr(os, "replace", replace_file)
    call(line)
    undisturbed = held()
    for stop in range(len(done)):
        shutil.rmtree("new")
        done.clear()
        process = fork(call, line)
        process.join()
        assert process.exitcode == -signal.SIGKILL
        stop, was = None, stop
        call(line)
        assert held() == undisturbed, was


def run_until_saving(line, waiting):
    """A command that sets `waiting` where it would write its first tensors, and then waits."""

    def wait(*_):
        waiting.set()
        time.sleep(99)

    signal.signal(signal.SIGINT, signal.default_int_handler)  # A background job may ignore it.
    torch.save = cache.save = wait
    with open("stderr", "w") as sys.stderr:
        ccc.shell(partial(call, line))


def interrupt(text, **_):
    raise InterruptedError(text)


def test_interrupted(world, monkeypatch):
    """Ctrl-C ends a fill and a run within seconds, with status 130 and a line, no traceback, and
    the lock is free again. Until then a second process says that it waits, and writes nothing."""
    for line in (f"{FILL} --out x", TRAIN):
        waiting = FORK.Event()
        process = fork(run_until_saving, line, waiting)
        assert waiting.wait(60)
        with monkeypatch.context() as patch, pytest.raises(InterruptedError, match="^waiting for"):
            patch.setattr(cache, "print", interrupt, raising=False)
            call(line)
        os.kill(process.pid, signal.SIGINT)
        process.join(60)
        err = Path("stderr").read_text()
        assert process.exitcode == 130 and "Traceback" not in err
        assert err.splitlines()[-1].startswith("interrupted")
    call(TRAIN)


def test_interrupt_inside_a_handler(capsys):
    """An interrupt that strikes while another error becomes its line is still an interrupt."""

    class Striking(ValueError):
        def __str__(self):
            raise KeyboardInterrupt

    with pytest.raises(SystemExit) as caught:
        ccc.shell(Mock(side_effect=Striking()))
    assert caught.value.code == 130 and capsys.readouterr().err.startswith("interrupted")


def test_bottoms(world, monkeypatch, capsys):
    """Each file as a script: bad input is a line on stderr, and status 2."""
    lines = ["ccc no.csv", "data no", "stats no", "model export no no"]
    for line in (*lines, FILL + " --data no", TRAIN + " --data no"):
        command, *arguments = line.split()
        monkeypatch.setattr(sys, "argv", [command, *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(COMMANDS[command].__file__, run_name="__main__")
        err = capsys.readouterr().err
        assert caught.value.code == 2 and len(err.splitlines()) == 1, err
        assert err.startswith("error: ") and "no" in err


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


@pytest.mark.parametrize("path", [LABELS, SHARD])
def test_damage(path, world):
    """A file with a damaged place is read as what was written or, of labels, as what could have
    been, or refused in one line that names its folder."""
    content, written, rng = Path(path).read_bytes(), read_cache("cache"), Random(0)
    for _ in range(150):
        start, cut = rng.randrange(len(content)), rng.randrange(9)
        new = rng.choice([b"8", b"../", b'"', b"\n", b",", b"null", b"", rng.randbytes(3)])
        write(path, content[:start] + new + content[start + cut :])
        try:
            utterances, problems = data.read_corpus("corpus")
            assert all(Path(u.path).parent == Path(CLIP).parent for u in utterances)
            assert all(0 <= x <= 1 for u in utterances if u.split != "Test3" for x in u.labels)
            assert all(len(place.splitlines()) == 1 for part in problems.values() for place in part)
            found = read_cache("cache")
            assert all(torch.equal(hidden, written[name]) for name, hidden in found.items())
        except (ValueError, OSError) as error:
            assert path.split("/")[0] in str(error) and len(str(error).splitlines()) == 1


ODD = [None, [], {}, "x", -1, 10**20, float("nan"), 1e308, [[1]], {"x": 1}]


def mutants(value, rng):
    """A JSON-like value with its whole, or one of its keys, replaced or left out."""
    yield from (odd for odd in ODD if type(odd) is not type(value))
    if isinstance(value, dict):
        for key in list(value)[:40]:
            less = {k: v for k, v in value.items() if k != key}
            yield less
            yield less | {key: rng.choice(ODD)}


FUZZED = [  # a file, and a command that reads it
    (CONFIG, "model params --model encoder"),
    (SOUND, FILL),
    ("run/config.json", RESUME),
    (RESULT, FINISHED),
    (RESULT, "stats finished"),
    ("finished/best.pt", f"model predict finished --model encoder {CLIP}"),
    ("run/last.pt", RESUME),
    (SHARD, VERIFY),
]


@pytest.mark.parametrize(("path", "line"), FUZZED)
def test_another_shape_inside(path, line, world, monkeypatch):
    """Whatever stands for a value in a JSON file, a checkpoint or a shard: the command works, or it
    is refused in one line."""
    monkeypatch.setattr(train, "train_epoch", Mock(return_value=0.5))
    states = {}
    if path.endswith("json"):
        good = json.loads(Path(path).read_text())
    elif path == SHARD:
        states, good = read_shard(path)
    else:
        good = torch.load(path, weights_only=True)
    kept = contents()
    for mutant in mutants(good, Random(0)):
        if path.endswith("json"):
            Path(path).write_text(json.dumps(mutant))
        elif path == SHARD:
            write_shard(path, states, mutant)
        else:
            torch.save(copy.deepcopy(mutant), path)
        try:
            call(line)
        except SystemExit as error:
            assert error.code in (1, 2)
        except (ValueError, OSError, MemoryError) as error:
            assert len(str(error).splitlines()) == 1
        for name, content in kept.items():
            if Path(name).is_file() and Path(name).read_bytes() != content:
                write(name, content)
        shutil.rmtree("new", ignore_errors=True)
        for name in set(contents()) - set(kept):
            Path(name).unlink(missing_ok=True)


@pytest.mark.parametrize(("key", "value"), [("RANK", "1"), ("WORLD_SIZE", "2")])
def test_half_a_torchrun(key, value, refused, monkeypatch):
    """RANK without WORLD_SIZE, or the reverse, is refused: a share of the work would be missing."""
    monkeypatch.setenv(key, value)
    for line in (FILL, TRAIN):
        refused(line, "set both, or neither; RANK counts from 0")


def test_lock_that_is_a_link(world):
    """A lock's name may be a link: its target is not changed."""
    os.mkdir("new")
    os.symlink(os.path.abspath(LABELS), "new/.lock-0")
    before = Path(LABELS).read_bytes()
    call(FILL)
    assert Path(LABELS).read_bytes() == before
