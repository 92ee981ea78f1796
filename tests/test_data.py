"""Corpora and audio against closed forms, bytes built by hand, and the releases' names."""

import filecmp
import io
import math
import os
import re
import shutil
import threading
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch

import data

HEADER = "FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"
NOISE = np.random.default_rng(0).normal(0, 0.1, 48000)


def sine(rate, seconds=1.0):
    return 0.5 * np.sin(2 * np.pi * 300 * np.arange(round(rate * seconds)) / rate)


def write_corpus(root, rows, audio="Audios", file="Labels/labels_consensus.csv"):
    """Audio files of 0.1 s and their label file. Rows: (name, activation, valence, split); no label
    of dominance."""
    (root / audio).mkdir(parents=True)
    (root / file).parent.mkdir()
    lines = [HEADER]
    for name, activation, valence, split in rows:
        soundfile.write(root / audio / name, sine(16000, seconds=0.1), 16000)
        lines.append(f"{name},N,{activation},{valence},,Unknown,F,{split}")
    (root / file).write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")  # with a BOM


def write_labels(root, content):
    (root / "Labels").mkdir(parents=True)
    (root / "Labels" / "labels_consensus.csv").write_bytes(content)


def check_file(path, sample_rate=16000):
    """Samples of one file, or what is wrong with it, as check_audio and load_audio both say. Only
    its length is no concern of load_audio."""
    good, problems = data.check_audio([data.Utterance(path.name, str(path))], sample_rate)
    if good:
        assert len(data.load_audio(path, sample_rate)) == good[0].samples
        return good[0].samples
    (kind,) = problems
    assert "; " in kind  # a remedy stands behind it
    if kind.startswith(("shorter than", "longer than")):
        assert len(data.load_audio(path, sample_rate))
        return kind
    with pytest.raises(ValueError) as error:
        data.load_audio(path, sample_rate)
    assert str(error.value) == f"{str(path)!r}: {kind}"
    return kind


def check_sound(path, wave, rate, subtype=None, kind="WAV", alter=bytes, sample_rate=16000):
    """The same of a sound that is written first, and then altered."""
    soundfile.write(path, wave, rate, subtype, format=kind)
    path.write_bytes(alter(path.read_bytes()))
    return check_file(path, sample_rate)


def test_dataset_and_collate(tmp_path):
    """A batch is the files' own samples, not normalised, zero-padded, with lengths as ints, those
    of the dataset, and each utterance's target."""
    utterances = []
    for i, samples in enumerate((16001, 400, 48000)):
        path = str(tmp_path / f"{i}.wav")
        soundfile.write(path, NOISE[:samples], 16000, "DOUBLE")
        utterances.append(data.Utterance("x", path, labels=(i / 4, 0.5)))
    dataset = data.SpeechDataset(data.check_audio(utterances)[0])
    inputs, lengths, targets = data.collate([dataset[i] for i in range(3)])
    assert inputs.dtype == targets.dtype == torch.float32 and inputs.shape == (3, 48000)
    for row, samples in zip(inputs, lengths, strict=True):
        assert np.array_equal(row[:samples], NOISE[:samples].astype(np.float32))
        assert row[samples:].count_nonzero() == 0
    assert lengths == dataset.lengths == [16001, 400, 48000]
    assert targets.tolist() == dataset.targets.tolist() == [[0, 0.5], [0.25, 0.5], [0.5, 0.5]]


@pytest.mark.parametrize("workers", [1, 3])
def test_read_ahead(workers):
    """Results come in order, those before an error too; nothing is loaded further ahead than two
    items a worker, and no thread outlives a consumer that leaves early."""
    loaded = []
    before = set(threading.enumerate())

    def load(i):
        loaded.append(i)
        return 10 // (7 - i)

    results = data.read_ahead(load, iter(range(99)), workers, "load")
    assert [next(results) for _ in range(7)] == [10 // (7 - i) for i in range(7)]
    assert max(loaded) <= 6 + 2 * workers
    with pytest.raises(ZeroDivisionError):
        next(results)
    results = data.read_ahead(load, range(8, 99), workers, "load")
    next(results)
    results.close()
    assert set(threading.enumerate()) <= before


RELEASES = [
    ("Audio", "label/labels_concensus.csv", "Validation", "Test"),  # 1.6
    ("Audios", "labels/labels_concensus.csv", "Validation", "Test1"),  # 1.9
    ("Audios", "Labels/labels_consensus.csv", "Development", "Test1"),  # 1.11
]


@pytest.mark.parametrize(("audio", "file", "development", "test"), RELEASES)
def test_releases(audio, file, development, test, tmp_path):
    """Every release's folder, file and split names are read, in file order; labels 1 to 7 become 0
    to 1; Test3 needs no labels. The audio may have been moved away."""
    rows = [("a.wav", 1, 7, "Train"), ("b.wav", 4, 2.5, development), ("c.wav", 7, "4.00", test)]
    rows += [("d.wav", 1, 1, "Test2"), ("e.wav", "", "", "Test3")]
    write_corpus(tmp_path, rows, audio, file)
    utterances, problems = data.read_corpus(tmp_path)
    assert not problems and [u.name for u in utterances] == [row[0] for row in rows]
    assert [u.split for u in utterances] == data.SPLITS
    assert [u.labels for u in utterances[:4]] == [(0, 1), (0.5, 0.25), (1, 0.5), (0, 0)]
    assert all(map(math.isnan, utterances[4].labels))
    (tmp_path / audio).rename(tmp_path / "elsewhere")
    (train,) = data.usable(data.read_corpus(tmp_path, splits=["Train"]))
    assert train.labels == (0, 1)
    with pytest.raises(FileNotFoundError):
        data.check_audio(utterances)


def test_scale_and_attributes(tmp_path):
    """Labels come in the order asked, from the scale given to 0 to 1, clipped where rounding went
    past a bound, in any notation of NumPy's. No attributes ask for no labels."""
    rows = [("a.wav", "1.0e+00", "5.000000000000001", "Train"), ("b.wav", "+2", "4E0", "Train")]
    write_corpus(tmp_path, rows)
    utterances, _ = data.read_corpus(tmp_path, ["valence", "activation"], scale=(1, 5))
    assert [u.labels for u in utterances] == [(1, 0), (0.75, 0.25)]
    assert [u.labels for u in data.read_corpus(tmp_path, ())[0]] == [(), ()]
    _, problems = data.read_corpus(tmp_path, data.ATTRIBUTES)
    assert [len(places) for places in problems.values()] == [2]  # no label of dominance
    with pytest.raises(ValueError, match="scale"):
        data.read_corpus(tmp_path, scale=(5, 1))


def test_rows_that_are_problems(tmp_path):
    """Each kind of row that cannot be used is a problem of its own kind, with its name; a line that
    is empty but for commas is none. Labels are numbers of the scale."""
    cells = ["", "4;0", "nan", "inf", "7.5", "7.01", "0.99", "high", "1e999"]
    rows = ["", ",, ,,,,,", *(f"{cell}.wav,N,{cell},4,,1,F,Test2" for cell in cells)]
    rows += ["a.wav,N,4,4,,1,F,Train", "b.wav,N,4,4,,1,F,Dev", "../c.wav,N,4,4,,1,F,Train"]
    rows += [f"{name},N,4,4,,1,F,Train" for name in ("\0", "x" * 300)]
    write_labels(tmp_path, "\n".join([HEADER, *rows]).encode())
    utterances, problems = data.read_corpus(tmp_path)
    assert [u.name for u in utterances] == ["a.wav"]
    bad_labels = problems.pop("label missing, no number, or not from 1 to 7 (--scale)")
    assert bad_labels[0] == "'Test2' '.wav' ['', '4']" and len(bad_labels) == 9
    assert problems == {
        f"unknown split; Split_Set is to be one of {data.SPLITS}": ["'Dev' 'b.wav' ['4', '4']"],
        "not the plain name of a file; correct FileName": [
            f"'Train' '{name}' ['4', '4']" for name in ("../c.wav", r"\x00", "x" * 300)
        ],
    }


GOOD = HEADER + "\na.wav,N,4,4,,1,F,Train\n"
FILES = [  # bytes of a label file, what is said of it
    (b"", ": 0 columns 'FileName' in its first line, \\[]; "),
    (HEADER.replace(",", ";").encode(), "0 columns 'FileName' in .*; give it one, between commas"),
    (HEADER.replace("EmoVal", "V").encode(), ": 0 columns 'EmoVal' in .*'V'"),
    ((GOOD + "d.wav,N,4").encode(), "has to be corrected: line 3: 3 cells, not 8"),
    (
        (GOOD + "\ne.wav,N,4,4,,1,F,Train,7\nf").encode(),
        "line 4: 9 cells, .*line 5: 1 cells, not 8",
    ),
    ((GOOD.replace("EmoClass", "EmoVal")).encode(), ": 2 columns 'EmoVal' in "),
    ((GOOD + "a.wav,N,4,4,,1,F,Train").encode(), "line 3: a second row of 'a.wav'"),
    ((GOOD + "ä.wav").encode("latin-1"), "save it as CSV in UTF-8"),
    (HEADER.encode("utf-16"), "save it as CSV in UTF-8"),
    ((GOOD + '"b.wav,N').encode(), "line 3 or later: unexpected end of data"),
]


@pytest.mark.parametrize(("content", "message"), FILES)
def test_label_files(content, message, tmp_path):
    """A file that is no table of labels, each file in one row, is refused by its name and with what
    was found in it."""
    write_labels(tmp_path, content)
    place = f"^'{tmp_path}/Labels/labels_consensus.csv'"
    with pytest.raises(ValueError, match=f"{place}.*{message}"):
        data.read_corpus(tmp_path)


@pytest.mark.parametrize("folder", ["Labels", "labels", "Label", "label"])
@pytest.mark.parametrize("file", ["labels_consensus.csv", "labels_concensus.csv"])
def test_places_of_labels(folder, file, tmp_path):
    """A label file is found in each folder and under each name that releases have had. Spaces
    around a cell do not count; a row of an unknown split may not get lost in silence."""
    (tmp_path / folder).mkdir()
    rows = [HEADER, " a.wav ,N, 4 , 4 ,, 1 ,F, Train ", "b.wav,N,4,4,,1,F,Dev"]
    (tmp_path / folder / file).write_text("\n".join(rows))
    (utterance,), _ = data.read_corpus(tmp_path)
    assert utterance._replace(path="") == ("a.wav", "", "Train", (0.5, 0.5), 0)
    with pytest.raises(ValueError, match="^1 unknown split"):
        data.usable(data.read_corpus(tmp_path, splits=["Train"]))


def test_one_list_of_problems(tmp_path, capsys):
    """Problems of labels, and then of audio, of the splits asked for are counted in a ValueError of
    one line or, with skip_bad, in a printed line. A split of one utterance is too small."""
    rows = [("0.wav", 9, 4, "Test2"), *((f"{i}.wav", 4, 4, "Train") for i in range(1, 8))]
    write_corpus(tmp_path, [*rows, ("8.wav", 4, 9, "Train")])
    for i in range(1, 6):
        (tmp_path / "Audios" / f"{i}.wav").write_bytes(b"RIFF")
    with pytest.raises(ValueError, match="^1 label .*skip-bad.*$"):
        data.usable(data.read_corpus(tmp_path, splits=["Train"]))
    labelled = data.usable(data.read_corpus(tmp_path, splits=["Train"]), skip_bad=True)
    assert capsys.readouterr().err.startswith("skipped: 1 label")
    with pytest.raises(ValueError, match="^5 dama.*and 2 more.*skip-bad.*$"):
        data.usable(data.check_audio(labelled))
    good = data.usable(data.check_audio(labelled), skip_bad=True)
    assert capsys.readouterr().err.startswith("skipped: 5 damaged")
    assert [u.name for u in good] == ["6.wav", "7.wav"] and good[0].samples == 1600
    data.require(good, ["Train"])
    with pytest.raises(
        ValueError, match="^split 'Train' has 1 usable utterances, and needs 2; `python"
    ):
        data.require(good[:1], ["Train"], least=2)
    with pytest.raises(ValueError, match="^split 'train' has 0 usable utterances"):
        data.usable(data.read_corpus(tmp_path, splits=["train"]), splits=["train"])


def test_missing_audio(tmp_path, monkeypatch):
    """A missing file is a problem that says which one is like it: in another case, another Unicode
    form, a sub-folder or another audio folder. Too many open files, or a folder without any file,
    is the machine's fault."""
    names = ["a.wav", "\u00e9.wav", "sub.wav", "other.wav", "none.wav", "here.wav"]
    write_corpus(tmp_path, [(name, 4, 4, "Train") for name in names])
    places = ["Audios/A.WAV", "Audios/e\u0301.wav", "Audios/s/sub.wav", "Audio/other.wav"]
    for name, place in zip(names, places, strict=False):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        (tmp_path / "Audios" / name).rename(tmp_path / place)
    (tmp_path / "Transcripts").mkdir()
    (tmp_path / "Transcripts" / "sub.txt").touch()  # MSP-Podcast has a text of each file's name.
    (tmp_path / "Audios" / "none.wav").unlink()
    (tmp_path / "Audios" / "folder.wav").mkdir()
    (tmp_path / "Audios" / "none.wav").symlink_to("gone.wav")
    utterances, _ = data.read_corpus(tmp_path)
    utterances.append(data.Utterance("folder.wav", f"{tmp_path}/Audios/folder.wav"))
    good, problems = data.check_audio(utterances)
    assert [u.name for u in good] == ["here.wav"]
    assert problems.keys() == {"missing audio"}
    alike = [place.split("alike: ")[1] for place in problems["missing audio"]]
    places.append("Audios/none.wav")  # the link itself
    assert alike == [*(ascii(str(tmp_path / place)) for place in places), "None"]
    shutil.rmtree(tmp_path / "Audios")
    (tmp_path / "Audios").mkdir()
    with pytest.raises(FileNotFoundError, match="mounted"):
        data.check_audio(utterances)
    for error in (OSError(24, "Too many open files"), PermissionError(13, "Permission denied")):
        monkeypatch.setattr(data, "open", Mock(side_effect=error), raising=False)
        with pytest.raises(OSError, match=error.strerror):
            data.check_audio(utterances)


# suffix, rate, subtype, gains of the channels, accuracy
FORMATS = [("wav", 16000, "PCM_16", [1], 5e-5), ("wav", 44100, "PCM_16", [1.5, 0.5], 2e-3)]
FORMATS += [("wav", 16000, "PCM_24", [1.5, 0.5], 1e-6), ("flac", 48000, "PCM_24", [1], 2e-3)]
FORMATS += [("flac", 16000, "PCM_16", [1.5, 0.5], 5e-5), ("wav", 8000, "ULAW", [1, 1], 2e-2)]
FORMATS += [("wav", 8000, "GSM610", [1], 0.15)]  # in blocks of 40 ms, and cannot seek


@pytest.mark.parametrize(("suffix", "rate", "subtype", "gains", "accuracy"), FORMATS)
def test_audio_formats(suffix, rate, subtype, gains, accuracy, tmp_path):
    """A sine of any rate, format and channel count is read as the 16 kHz mono sine, channels
    averaged; GSM fills it up to a whole block. From a file in memory comes the same."""
    path = tmp_path / f"sine.{suffix}"
    soundfile.write(path, np.outer(sine(rate), gains), rate, subtype)
    wave = data.load_audio(path)
    assert wave.dtype == np.float32 and wave.shape == (check_file(path),)
    assert len(wave) == (16640 if subtype == "GSM610" else 16000)
    assert np.abs(wave[:16000] - sine(16000))[200:-200].max() < accuracy  # off the filter's edges
    memory = io.BytesIO(path.read_bytes())
    memory.name = str(path)
    assert np.array_equal(data.load_audio(memory), wave)


@pytest.mark.parametrize("rate", [7919, 8000, 11025, 16000, 22050, 32001, 44100, 48000])
def test_sample_count(rate, tmp_path):
    """check_audio, which does not decode, counts the samples that load_audio returns, at odd rates
    and lengths, for encoders at 16 and 8 kHz."""
    for samples in (rate // 10, rate // 3 + 1, rate + 7):
        for encoder in (16000, 8000):
            counted = check_sound(tmp_path / "x", np.zeros((samples, 2)), rate, sample_rate=encoder)
            assert counted == math.ceil(samples * encoder / rate)


@pytest.mark.parametrize("kind", ["WAV", "FLAC", "OGG", "MP3"])
def test_pieces_of_a_long_recording(kind, tmp_path):
    """Of a recording of 130 s, which is too long for a corpus, a piece is that part of it, from its
    first sample on: of an MP3, too, whose bit rate varies with its pauses."""
    pauses = np.arange(130 * 8000) // 2667 % 3 > 0
    sound = np.where(pauses, 0, np.resize(NOISE, 130 * 8000))
    variable = {"bitrate_mode": "VARIABLE", "compression_level": 0.5} if kind == "MP3" else {}
    soundfile.write(tmp_path / "x", sound, 8000, format=kind, **variable)
    whole, _ = soundfile.read(tmp_path / "x", dtype="float32")
    assert check_file(tmp_path / "x").startswith("longer than 60 s; ")
    assert data.measure(tmp_path / "x", limited=False) / 16000 == pytest.approx(130, abs=0.1)
    for start in range(49, 60):
        piece = data.load_audio(tmp_path / "x", 8000, start, stop=70)
        assert np.abs(piece - whole[start * 8000 : 70 * 8000]).max() < 1e-5
    rest = data.load_audio(tmp_path / "x", 8000, start=125)
    assert len(rest) == len(whole) - 125 * 8000
    for times in ((131, None), (131, 140), (5, 4), (-1, 4)):
        with pytest.raises(ValueError, match="x': it has no sound from .* s; give other times"):
            data.load_audio(tmp_path / "x", 8000, *times)


@pytest.mark.parametrize("kind", ["FLAC", "MP3"])
def test_tags_before_the_sound(kind, tmp_path):
    """ID3v2 tags, a cover or two, change no sample, whole or in pieces, and make no file look
    truncated: here in an MP3 of constant bit rate whose frame that tells its length is gone."""
    constant = {"bitrate_mode": "CONSTANT", "compression_level": 0.5} if kind == "MP3" else {}
    soundfile.write(tmp_path / "x", NOISE, 16000, format=kind, **constant)
    content = (tmp_path / "x").read_bytes()
    if kind == "MP3":
        content = content[content.index(content[:2], 4) :]
    tags = b"ID3\3\0\0\0\1\5\10" + bytes(128**2 + 5 * 128 + 8) + b"ID3\4\0\0\0\0\0\1\0"
    found = []
    for name, sound in (("bare", content), ("tagged", tags + content)):
        path = tmp_path / name
        path.write_bytes(sound)
        assert check_file(path) == len(data.load_audio(path))
        pieces = [data.load_audio(path, start=start, stop=start + 1) for start in (0, 1, 2)]
        found.append(np.concatenate([data.load_audio(path), *pieces]))
    assert len(found[0]) > 90000 and np.array_equal(*found)


def test_pieces_of_gsm(tmp_path):
    """GSM, in which no place can be sought, is refused in pieces with what to do."""
    soundfile.write(tmp_path / "x", NOISE, 8000, "GSM610", format="WAV")
    with pytest.raises(
        ValueError, match="x': damaged, no audio, or of a kind not read here.*`ffmpeg"
    ):
        data.load_audio(tmp_path / "x", 8000, start=1, stop=2)


# container, subtype
HALVES = [(kind, None) for kind in ("WAV", "WAVEX", "AIFF", "AU", "W64", "RF64", "FLAC", "CAF")]
HALVES += [("OGG", "VORBIS"), ("OGG", "OPUS"), ("MP3", None), ("WAV", "FLOAT"), ("WAV", "GSM610")]


@pytest.mark.parametrize(("kind", "subtype"), HALVES)
def test_truncated(kind, subtype, tmp_path):
    """Half or nine tenths of a file are refused in every container, the whole is not."""
    assert check_sound(tmp_path / "x", NOISE, 16000, subtype, kind) == 48000
    content = (tmp_path / "x").read_bytes()
    for size in (len(content) // 2, len(content) * 9 // 10):
        (tmp_path / "x").write_bytes(content[:size])
        assert re.match("truncated|damaged", check_file(tmp_path / "x"))


def change(content, place, new):
    """Bytes, of which those from a place on are others."""
    return content[:place] + new + content[place + len(new) :]


@pytest.mark.parametrize(
    ("kind", "subtype"), [case for case in HALVES if case[0] in ("FLAC", "OGG", "MP3")]
)
def test_damaged_in_the_middle(kind, subtype, tmp_path):
    """Where bytes behind a header are overwritten by those before them, no time is lost silently:
    a file is refused, or has the length that it had. Decoders skip what they cannot read, or end
    there."""
    assert check_sound(tmp_path / "x", NOISE, 16000, subtype, kind) == 48000
    content = (tmp_path / "x").read_bytes()
    size = len(content) // 6
    for place in np.linspace(2 * size, len(content) - size, 300).astype(int):
        (tmp_path / "x").write_bytes(change(content, place, content[place - size : place]))
        said = check_file(tmp_path / "x")
        assert re.match("truncated|damaged|NaN", str(said)) or abs(said - 48000) < 2500


MINUTE = {"wave": np.resize(NOISE, 59 * 8000), "rate": 8000, "kind": "MP3"}
SECOND = {"wave": NOISE[:16000], "rate": 16000}
SIZES = [2**32 - 1, 0x7FFFF000, 32016, 32028, 32044]  # ffmpeg's and SoX's streams; with the header
TAGS = [b"TAG" + bytes(125), b"APETAGEX" + bytes(4) + (5000).to_bytes(4, "little") + bytes(5016)]
SOUNDS = [  # container, what is done to a second of sound, what is said of it, or its samples
    *(("WAV", lambda c, n=n: change(c, 40, n.to_bytes(4, "little")), "16000") for n in SIZES),
    ("WAV", lambda c: change(c, 40, bytes(4)), "its header tells of no.*`ffmpeg -ignore_length"),
    ("WAV", lambda c: change(c, 40, b"\x00\x10\0\0"), "damaged, .*longer than its header.*`ffmpeg"),
    ("WAV", lambda c: change(c, 24, (384001).to_bytes(4, "little")), "impossible sample rate"),
    ("FLAC", lambda c: change(c, 21, b"\xf0\0\0\0\0"), "its header does not tell.*`ffmpeg"),
    ("WAV", lambda c: c + b"LIST" + (60000).to_bytes(4, "little") + bytes(60000), "16000"),
    ("WAV", lambda c: change(c, 40, (33600).to_bytes(4, "little")), "truncated: "),  # lacks .05 s
    *((kind, lambda c: c + c, "truncated, jo.*`ffmpeg") for kind in ["MP3", "FLAC", "OGG", "AU"]),
    ("CAF", lambda c: c + c, "truncated, joined, "),
    ("CAF", lambda c: c + b"free" + (40000).to_bytes(8) + bytes(40000), "16000"),
    ("AIFF", lambda c: c + b"ID3 " + (40000).to_bytes(4) + bytes(40000), "16000"),
    ("AIFF", lambda c: c.replace(b"SSND\0\0\x7d\x08", b"SSND\0\0\x1d\x08"), "truncated, joined, "),
    *(("MP3", lambda c, tag=tag: c + tag, "16000") for tag in TAGS),
    *(("MP3", lambda c, tag=tag: c + tag + c, "truncated, .*`ffmpeg") for tag in TAGS),
    ("NIST", bytes, "in NIST, a missing end .*`ffmpeg"),
    ("WAV", lambda c: b"\0\0\0\x1cftypM4A " + c, "damaged, no audio, .*`ffmpeg"),
]
SOUNDS = [({**SECOND, "kind": kind, "alter": alter}, said) for kind, alter, said in SOUNDS]
SOUNDS += [
    ({"wave": [0.1] * 999 + [math.nan], "rate": 16000, "subtype": "FLOAT"}, "NaN or infinite sam"),
    ({"wave": np.zeros(60000), "rate": 999}, "impossible sample rate; "),
    ({"wave": np.zeros(60001), "rate": 1000}, "longer than 60 s; "),
    ({"wave": np.zeros(60000), "rate": 1000}, "960000"),
    ({**MINUTE, "alter": lambda c: c}, "944"),
    ({**MINUTE, "alter": lambda c: c[:-1200]}, "truncated"),
    ({"wave": np.zeros(1199), "rate": 48000}, "shorter than 25 ms; "),
    ({"wave": np.zeros(1200), "rate": 48000}, "400"),
    ({"wave": np.zeros(799), "rate": 16000, "sample_rate": 8000}, "shorter than 50 ms; "),
]


@pytest.mark.parametrize(("sound", "said"), SOUNDS)
def test_unusable_sounds(sound, said, tmp_path):
    """A file that cannot be trained on is a problem with its reason and what to do. A length that
    its header does not know, or knows wrongly, loses no sound silently."""
    assert re.match(said, str(check_sound(tmp_path / "x", **sound)))


def test_names_of_any_bytes(tmp_path):
    """A name need not be UTF-8 to be read, and is quoted in what is said of it; x.raw has no
    header by its name, and is judged by its content all the same."""
    path = Path(os.fsdecode(os.fsencode(tmp_path) + b"/\xff\n.raw"))
    with open(path, "wb") as file:
        soundfile.write(file, sine(16000), 16000, format="WAV")
    assert check_file(path) == 16000
    path.write_bytes(b"RIFF")
    with pytest.raises(ValueError, match=r"\\udcff\\n.raw': damaged"):
        data.load_audio(path)
    with pytest.raises(ValueError, match="'a file in memory': damaged"):
        data.load_audio(io.BytesIO(b"RIFF"))


def test_find_audio(tmp_path, capsys, monkeypatch):
    """Of a folder, all audio is found, that which only ffmpeg reads too, with linked folders once;
    hidden files are left out, and all that is left out is told by kinds. A folder that may not be
    read is an error, and not left out."""
    top = tmp_path / "in"
    only_ffmpeg = {f"a/d.{suffix}" for suffix in ("m4a", "aac", "webm", "amr", "wma")}
    here = {"b.WAV", "a/c.flac", *only_ffmpeg}
    for name in [*here, "a/._c.flac", ".h/e.wav", "f.txt", "g", "h/h.mp3"]:
        (top / name).parent.mkdir(parents=True, exist_ok=True)
        (top / name).touch()
    (top / "h").rename(tmp_path / "out")
    (top / "a" / "up").symlink_to("..")
    (top / "z").symlink_to(tmp_path / "out")
    found = data.find_audio([top])
    assert sorted(u.name for u in found) == sorted([*here, "z/h.mp3"])
    assert all(u.path == str(top / u.name) for u in found)
    told = capsys.readouterr().err.rstrip().split(": ")[1].split(", ")
    assert sorted(told) == ["1 .flac", "1 .txt", "1 .wav", "1 without suffix"]
    alone = str(top / "b.WAV")
    both = data.find_audio([str(tmp_path / "out"), alone])
    assert [u.name for u in both] == [str(tmp_path / "out" / "h.mp3"), alone]
    with pytest.raises(ValueError, match="no audio files"):
        data.find_audio([])
    scan = os.scandir

    def guarded(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", path)
        return scan(path)

    monkeypatch.setattr(os, "scandir", guarded)
    with pytest.raises(PermissionError, match="in/a"):
        data.find_audio([top])


def test_synthetic_corpus(tmp_path):
    """The same seed writes the same bytes, another seed other ones. A linear model of the mean log
    spectrum and the duration predicts all three labels of unseen synthetic speakers, none of whom
    is in two splits."""
    data.write_demo(tmp_path / "a", 3, speakers=(("Train", 8, 9), ("Test1", 4, 9)))
    for name, seed in [("b", 3), ("c", 4)]:
        data.write_demo(tmp_path / name, seed, speakers=(("Train", 1, 3),))
    files = [f"Audios/DEMO_0001_000{i}.wav" for i in range(3)]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)[0] == files
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", files, shallow=False)[1] == files
    utterances, _ = data.read_corpus(tmp_path / "a", data.ATTRIBUTES)
    speakers = {(u.name[:9], u.split) for u in utterances}  # DEMO_0001_0000.wav
    assert len(speakers) == len({speaker for speaker, _ in speakers}) == 12
    waves = [data.load_audio(u.path) for u in utterances]
    bands = [np.log(scipy.signal.welch(wave, nperseg=32)[1]) for wave in waves]
    features = np.array([[1, len(wave), *b] for wave, b in zip(waves, bands, strict=True)])
    labels = np.array([u.labels for u in utterances])  # the first 8 * 9 are to train on
    predicted = features[72:] @ np.linalg.lstsq(features[:72], labels[:72])[0]
    for column in range(3):
        assert np.corrcoef(predicted[:, column], labels[72:, column])[0, 1] > 0.5


def test_demo_is_whole_or_not_at_all(tmp_path, monkeypatch, capfd):
    """The demo is written into a new folder, quietly; an existing one keeps its labels, and nothing
    is left of a demo that failed."""
    monkeypatch.setattr(data.write_demo, "__defaults__", (0, (("Train", 1, 2),)))
    data.main(["--demo", str(tmp_path / "demo")])
    assert (tmp_path / "demo" / "encoder" / "config.json").exists() and capfd.readouterr().err == ""
    write_labels(tmp_path / "real", b"mine")
    with pytest.raises(FileExistsError, match="new folder"):
        data.main(["--demo", str(tmp_path / "real")])
    full = soundfile.LibsndfileError(2, "No space left: ")
    monkeypatch.setattr(data, "write_encoder", Mock(side_effect=full))
    with pytest.raises(OSError, match="cannot write '.*next': No space left"):
        data.make_demo(tmp_path / "next")
    assert sorted(os.listdir(tmp_path)) == ["demo", "real"]


def test_command(tmp_path, capsys):
    """data.py prints each split's size and range of labels, notes on silence and on a scale that
    does not fit, and problems, 20 of a kind, after which it exits with 1. A split that is too small
    to train on is an error."""
    rows = [("a.wav", 1, 5, "Train"), ("b.wav", 2, 3, "Train")]
    others = [(f"{i}.wav", 2, 3, split) for i, split in enumerate(data.SPLITS[1:3] * 2)]
    write_corpus(tmp_path, [*rows, *others, ("e.wav", "", "", "Test3")])
    antiphase = np.outer(sine(16000), [1, -1])
    soundfile.write(tmp_path / "Audios" / "b.wav", antiphase, 16000)
    data.main([str(tmp_path)])
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["Train", "2", "utterances"]
    assert lines[0].endswith("activation 1 to 2  valence 3 to 5")
    assert lines[3].startswith("Test3 ") and lines[3].endswith(" h")  # Its labels are withheld.
    assert "--scale 1 5?" in lines[4] and lines[5].endswith("'b.wav'") and lines[6] == "no problems"
    write_corpus(tmp_path / "8", [*rows, *others[:3]])
    with pytest.raises(ValueError, match="split 'Test1' has 1 usable utterances"):
        data.main([str(tmp_path / "8")])
    assert "no problems" not in capsys.readouterr().out
    beyond = [(f"b{i}.wav", 4, 9, "Train") for i in range(23)]
    write_corpus(tmp_path / "9", [("a.wav", 1, 7, "Train"), *beyond, others[0]])
    (tmp_path / "9" / "Audios" / "a.wav").rename(tmp_path / "9" / "Audios" / "A.flac")
    with pytest.raises(SystemExit) as exit:
        data.main([str(tmp_path / "9")])
    output = capsys.readouterr().out
    assert exit.value.code == 1 and "no problems" not in output
    assert re.search("'a.wav': no such file, .*; alike: '.*/A.flac'", output)
    assert re.search(r"from 1 to 7 \(--scale\): 23\n(  'Train' .*\n){20}  and 3 more\n", output)
    assert "activation 1 to 4  valence 7 to 9" in output and "is that --scale 1 9?" in output
