"""Corpora, audio and normalisation against Hugging Face's feature extractor, closed forms and the
releases' names."""

import csv
import filecmp
import math
import os
import threading

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor

import data


def sine(rate, seconds=1.0):
    return 0.5 * np.sin(2 * np.pi * 300 * np.arange(round(rate * seconds)) / rate)


def write_corpus(root, rows, audio="Audios", file="Labels/labels_consensus.csv"):
    """Audio files of 0.1 s and their label file, whose path is returned. Rows: (name, activation,
    valence, split); no label of dominance."""
    (root / audio).mkdir(parents=True)
    (root / file).parent.mkdir()
    with open(root / file, "w", newline="", encoding="utf-8-sig") as out:  # a byte order mark
        out.write("FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set\r\n")
        for name, activation, valence, split in rows:
            soundfile.write(root / audio / name, sine(16000, seconds=0.1), 16000)
            csv.writer(out).writerow([name, "N", activation, valence, "", "Unknown", "F", split])
    return root / file


def check_file(path, sample_rate=16000):
    """Samples of one file, or what is wrong with it, as check_audio finds them."""
    utterance = data.Utterance("x", os.fspath(path), "Train", "1", (0.5, 0.5))
    good, problems = data.check_audio([utterance], sample_rate)
    return good[0].samples if good else problems[0].kind


@pytest.mark.parametrize("samples", [400, 16001, 50000])
def test_normalise(samples, tmp_path):
    """A dataset's waveform is bitwise what Wav2Vec2FeatureExtractor makes of the same."""
    wave = (0.1 * np.random.default_rng(0).normal(size=samples) + 0.02).astype(np.float32)
    soundfile.write(path := tmp_path / "x.wav", wave, 16000, "FLOAT")
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    expected = extractor(wave, sampling_rate=16000).input_values[0]
    found, _ = data.SpeechDataset([data.Utterance("x", str(path), "Train", "1", (0.5, 0.5))])[0]
    assert found.dtype == torch.float32 and np.array_equal(found.numpy(), expected)


RELEASES = [("Audio", "label/labels_concensus.csv", "Validation", "Test")]  # 1.6
RELEASES += [("Audios", "labels/labels_concensus.csv", "Validation", "Test1")]  # 1.9
RELEASES += [("Audios", "Labels/labels_consensus.csv", "Development", "Test1")]  # 1.11


@pytest.mark.parametrize(("audio", "file", "development", "test"), RELEASES)
def test_releases(audio, file, development, test, tmp_path):
    """Every release's folder, file and split names are read, in file order; labels 1 to 7 become 0
    to 1; Test3 needs no labels."""
    rows = [("a.wav", 1, 7, "Train"), ("b.wav", 4, 2.5, development), ("c.wav", 7, "4.00", test)]
    rows += [("d.wav", 1, 1, "Test2"), ("e.wav", "", "", "Test3")]
    write_corpus(tmp_path, rows, audio, file)
    utterances, problems = data.read_corpus(tmp_path)
    assert problems == [] and [u.name for u in utterances] == [row[0] for row in rows]
    assert [u.split for u in utterances] == data.SPLITS
    assert [u.labels for u in utterances[:4]] == [(0, 1), (0.5, 0.25), (1, 0.5), (0, 0)]
    assert all(map(math.isnan, utterances[4].labels))


def test_attributes(corpus, tmp_path):
    """Labels come in the order asked. A column that was not asked for may be empty; one that was
    makes each row a problem, and one line if it is missing."""
    pairs, triples = (data.read_corpus(corpus, names)[0] for names in (data.PAPER, data.ATTRIBUTES))
    assert [u.labels[:2] for u in triples] == [u.labels for u in pairs]
    table = write_corpus(tmp_path, [("a.wav", 1, 7, "Train"), ("b.wav", 4, 4, "Train")])
    assert [u.labels for u in data.read_corpus(tmp_path, ["valence"])[0]] == [(1,), (0.5,)]
    utterances, problems = data.read_corpus(tmp_path, data.ATTRIBUTES)
    assert utterances == [] and len(problems) == 2
    table.write_text(table.read_text().replace("EmoDom", "Dom"))
    with pytest.raises(ValueError, match="^.*labels_consensus.csv.* no column EmoDom in .*$"):
        data.read_corpus(tmp_path, data.ATTRIBUTES)


def test_problems(tmp_path, capsys):
    """A label that is no number from 1 to 7 is a problem (Python's float would read 0_3 as 3), as
    is a name that leads out of the audio folder. Those of the splits asked for are counted in a
    ValueError or, with skip_bad, in a line."""
    cells = ["", "0_3", "nan", "inf", "7.5", "7.01", "0.99", "high"]
    rows = [(f"{i}.wav", cell, 4, "Test2") for i, cell in enumerate(cells)]
    table = write_corpus(tmp_path, rows + [(f"t{i}.wav", 4, 4, "Train") for i in range(4)])
    wheres = [f"line {i + 2}: '{i}.wav' {[cell, '4']}" for i, cell in enumerate(cells)]
    assert [p.where for p in data.read_corpus(tmp_path)[1]] == wheres
    assert [u.samples for u in data.load_corpus(tmp_path, ["Train"])] == [1600] * 4
    (tmp_path / "Audios" / "t0.wav").write_bytes(b"RIFF")
    table.write_text(table.read_text().replace("t1.wav", "../Audios/t1.wav"))
    assert len(data.load_corpus(tmp_path, ["Train"], skip_bad=True, inspect=False)) == 3
    assert len(data.load_corpus(tmp_path, ["Train"], skip_bad=True)) == 2
    assert "skipped: 2 utterances" in capsys.readouterr().out
    with pytest.raises(ValueError, match="^2 utt.* 1 missing audio, 1 damaged or not audio .*$"):
        data.load_corpus(tmp_path, ["Train"])


FORMATS = [("wav", 16000, "PCM_16"), ("wav", 8000, "PCM_16"), ("wav", 44100, "PCM_16")]
FORMATS += [("wav", 16000, "PCM_24"), ("flac", 48000, "PCM_24"), ("flac", 16000, "PCM_16")]


@pytest.mark.parametrize(("suffix", "rate", "subtype"), FORMATS)
@pytest.mark.parametrize("gains", [[1.0], [1.5, 0.5]])
def test_audio_formats(suffix, rate, subtype, gains, tmp_path):
    """A sine of any rate, format and channel count is read as the 16 kHz mono sine, channels
    averaged."""
    path = tmp_path / f"sine.{suffix}"
    soundfile.write(path, np.outer(sine(rate), gains), rate, subtype=subtype)
    wave = data.load_audio(path)
    accuracy = 2e-3 if rate != 16000 else 1e-6 if subtype == "PCM_24" else 5e-5
    assert wave.dtype == np.float32 and wave.shape == (16000,)
    assert np.abs(wave - sine(16000))[200:-200].max() < accuracy  # off the filter's edges


@pytest.mark.parametrize("rate", [7919, 8000, 11025, 16000, 22050, 32001, 44100, 48000])
def test_sample_count(rate, tmp_path):
    """check_audio, which does not decode, counts the samples that load_audio returns, at odd rates
    and lengths, through links too, for encoders at 16 and 8 kHz."""
    (tmp_path / "Audios").mkdir()
    (tmp_path / "folder").symlink_to(tmp_path / "Audios")
    for samples in (rate // 10, rate // 3 + 1, rate + 7):
        soundfile.write(tmp_path / "Audios" / f"{samples}.wav", np.zeros((samples, 2)), rate)
        (tmp_path / "Audios" / f"{samples}").symlink_to(f"{samples}.wav")
        for sample_rate in (16000, 8000):
            path = tmp_path / "folder" / f"{samples}"
            assert check_file(path, sample_rate) == len(data.load_audio(path, sample_rate))


@pytest.mark.parametrize("subtype", ["GSM610", "G721_32", "NMS_ADPCM_32", "IMA_ADPCM", "ULAW"])
def test_telephone_codecs(subtype, tmp_path):
    """WAV files of telephone codecs, the first three of which cannot seek, are read as planned:
    the sine, filled up to a whole block."""
    soundfile.write(tmp_path / "x.wav", sine(8000), 8000, subtype=subtype)
    wave = data.load_audio(tmp_path / "x.wav", 8000)
    assert 8000 <= len(wave) == check_file(tmp_path / "x.wav", 8000) < 8400
    assert np.abs(np.fft.rfft(wave[:8000])).argmax() == 300


UNUSABLE = [  # what is said of a file's first bytes: kind, samples, rate, subtype, bytes
    ("damaged or not audio", sine(16000), 16000, "PCM_16", 30),
    ("truncated", sine(16000), 16000, "PCM_16", 20000),
    ("truncated", sine(16000, seconds=2), 16000, "MPEG_LAYER_III", 1500),
    ("NaN or infinite samples", [0.1] * 999 + [math.nan], 16000, "FLOAT", None),
    ("longer than 60 s", np.zeros(60001), 1000, "PCM_16", None),
    ("shorter than 25 ms", np.zeros(1199), 48000, "PCM_16", None),
    ("shorter than 50 ms", np.zeros(799), 16000, "PCM_16", None),
]


@pytest.mark.parametrize(("kind", "wave", "rate", "subtype", "size"), UNUSABLE)
def test_unusable_audio(kind, wave, rate, subtype, size, tmp_path):
    """A file that cannot be trained on is a problem with its reason; load_audio raises it."""
    path, sample_rate = tmp_path / "x.wav", 8000 if "50 ms" in kind else 16000
    form = "MP3" if subtype == "MPEG_LAYER_III" else "WAV"
    soundfile.write(path, wave, rate, subtype, format=form)
    path.write_bytes(path.read_bytes()[:size])
    assert check_file(path, sample_rate) == kind
    with pytest.raises(ValueError, match=f"^{path}: {kind}$"):
        data.load_audio(path, sample_rate)


@pytest.mark.parametrize("size", [2**32 - 1, 0x7FFFF000])
def test_streamed(size, tmp_path):
    """A WAV whose header has the size that ffmpeg or SoX writes into a pipe ends where it ends."""
    path = tmp_path / "x.wav"
    soundfile.write(path, sine(16000), 16000)
    content = path.read_bytes()
    path.write_bytes(content[:40] + size.to_bytes(4, "little") + content[44:])
    assert check_file(path) == len(data.load_audio(path)) == 16000


def test_name_not_utf8(tmp_path, capsys):
    """Names on disk that are not UTF-8 stop neither their folder nor themselves from being read."""
    write_corpus(tmp_path / "x", [(f"{i}.wav", 4, 4, s) for i, s in enumerate(data.SPLITS[:3])])
    root = (tmp_path / "x").rename(tmp_path / os.fsdecode(b"\xff"))
    path = (root / "Audios" / "0.wav").rename(root / "Audios" / os.fsdecode(b"\xfe.wav"))
    assert len(data.load_audio(path)) == check_file(path) == 1600
    with pytest.raises(SystemExit):
        data.main([str(root)])
    lines = capsys.readouterr().out.splitlines()
    assert "missing audio: Train line 2: '0.wav'" in lines and "damaged" not in "".join(lines)


def test_dataset_and_collate(corpus):
    """A batch holds each utterance's normalised waveform, exactly zero after its end, its length
    as an int, and its target."""
    utterances = data.load_corpus(corpus, ["Train"])
    dataset, rows = data.SpeechDataset(utterances), [5, 0, 9]
    inputs, lengths, targets = data.collate([dataset[i] for i in rows])
    assert lengths == [dataset.lengths[i] for i in rows] and inputs.shape == (3, max(lengths))
    assert torch.equal(targets, torch.tensor([utterances[i].labels for i in rows]))
    for i, row in enumerate(rows):
        wave = torch.from_numpy(data.load_audio(utterances[row].path))
        wave = (wave - wave.mean()) / wave.std(correction=0)
        torch.testing.assert_close(inputs[i, : lengths[i]], wave, rtol=0, atol=1e-3)
        assert len(wave) == lengths[i] and not inputs[i, lengths[i] :].any()


@pytest.mark.parametrize("workers", [1, 3])
def test_read_ahead(workers):
    """Results come in order, those before an error too; nothing is loaded further ahead than two
    items a worker, and no thread outlives a consumer that leaves early."""
    loaded = []

    def load(i):
        loaded.append(i)
        return 10 // (7 - i)

    results = data.read_ahead(load, iter(range(99)), workers)
    assert [next(results) for _ in range(7)] == [10 // (7 - i) for i in range(7)]
    assert max(loaded) <= 6 + 2 * workers
    with pytest.raises(ZeroDivisionError):
        next(results)
    results = data.read_ahead(load, range(8, 99), workers)
    next(results)
    results.close()
    assert max(loaded) <= 8 + 2 * workers
    assert not any("ThreadPool" in thread.name for thread in threading.enumerate())


def test_synthetic_corpus_is_deterministic(tmp_path):
    """The same seed writes the same bytes, another seed other ones."""
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        data.write_demo(tmp_path / name, seed=seed, speakers=(("Train", 1, 3),))
    files = sorted(str(p.relative_to(tmp_path / "a")) for p in tmp_path.glob("a/*/*"))
    assert len(files) == 4
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)[0] == files
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", files, shallow=False)[1] == files


def test_synthetic_labels_are_audible(tmp_path):
    """A linear model of the mean log spectrum and the duration predicts all three labels of unseen
    synthetic speakers, none of whom is in two splits."""
    data.write_demo(tmp_path, speakers=(("Train", 8, 16), ("Test1", 4, 16)))
    utterances, _ = data.read_corpus(tmp_path, data.ATTRIBUTES)
    assert len({(u.speaker, u.split) for u in utterances}) == len({u.speaker for u in utterances})
    features, train = [], np.array([u.split == "Train" for u in utterances])
    for u in utterances:
        wave = data.load_audio(u.path)
        bands = scipy.signal.welch(wave, 16000, nperseg=512)[1][1:].reshape(32, 8).mean(1)
        features.append([1, len(wave) / 16000, *np.log(bands + 1e-9)])
    features, labels = np.array(features), np.array([u.labels for u in utterances])
    ridge = features[train].T @ features[train] + np.eye(features.shape[1])
    pred = features[~train] @ np.linalg.solve(ridge, features[train].T @ labels[train])
    for column in range(3):
        assert np.corrcoef(pred[:, column], labels[~train, column])[0, 1] > 0.5


def test_command(corpus, tmp_path, capsys):
    """data.py prints each split's utterances and speakers; it names each problem and then exits
    with 1."""
    data.main([corpus])
    lines = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert lines[0].startswith("Train 12 utterances 3 speakers") and lines[3] == "no problems"
    write_corpus(tmp_path, [("a.wav", 1, 7, "Train"), ("b.wav", 4, 9, "Train")])
    (tmp_path / "Audios" / "a.wav").unlink()
    with pytest.raises(SystemExit) as exit:
        data.main([str(tmp_path)])
    output = capsys.readouterr().out
    assert exit.value.code == 1 and "missing audio: Train line 2: 'a.wav'" in output
    assert "1 to 7: Train line 3: 'b.wav'" in output and "empty split: Test1" in output
