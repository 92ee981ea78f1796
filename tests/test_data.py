"""Corpora and audio against Hugging Face's extractor, closed forms and the releases' names."""

import filecmp
import math
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
    """Audio files of 0.1 s and their label file. Rows: (name, activation, valence, split); no label
    of dominance."""
    (root / audio).mkdir(parents=True)
    (root / file).parent.mkdir()
    lines = ["FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"]
    for name, activation, valence, split in rows:
        soundfile.write(root / audio / name, sine(16000, seconds=0.1), 16000)
        lines.append(f"{name},N,{activation},{valence},,Unknown,F,{split}")
    (root / file).write_text("\r\n".join(lines), encoding="utf-8-sig", newline="")  # with a BOM


def check_file(path, sample_rate=16000):
    """Samples of one file, or what is wrong with it, as check_audio finds them."""
    utterance = data.Utterance("x", str(path), "Train", "1", (0.5, 0.5))
    good, problems = data.check_audio([utterance], sample_rate)
    return good[0].samples if good else problems[0].kind


def test_dataset_and_collate(tmp_path):
    """A batch is bitwise the normalised and zero-padded one that Wav2Vec2FeatureExtractor makes of
    the same waveforms, with lengths as ints, those of the dataset, and each utterance's target."""
    utterances, waves, draw = [], [], np.random.default_rng(0)
    for i, samples in enumerate((16001, 400, 50000)):
        waves.append((0.1 * draw.normal(size=samples) + 0.02).astype(np.float32))
        soundfile.write(path := tmp_path / f"{i}.wav", waves[i], 16000, "FLOAT")
        utterances.append(data.Utterance("x", str(path), "Train", "1", (i / 4, 0.5)))
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True, return_attention_mask=True)
    expected = extractor(waves, sampling_rate=16000, padding=True).input_values
    dataset = data.SpeechDataset(data.check_audio(utterances)[0])
    inputs, lengths, targets = data.collate([dataset[i] for i in range(3)])
    assert inputs.dtype == torch.float32 and np.array_equal(inputs.numpy(), np.stack(expected))
    assert lengths == dataset.lengths == [16001, 400, 50000]
    assert targets.tolist() == [[0, 0.5], [0.25, 0.5], [0.5, 0.5]]


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


def test_attributes(tmp_path):
    """Labels come in the order asked. A column that was not asked for may be empty; one that was
    makes each row a problem."""
    write_corpus(tmp_path, [("a.wav", 1, 7, "Train"), ("b.wav", 4, 4, "Train")])
    utterances, _ = data.read_corpus(tmp_path, ["valence", "activation"])
    assert [u.labels for u in utterances] == [(1, 0), (0.5, 0.5)]
    utterances, problems = data.read_corpus(tmp_path, data.ATTRIBUTES)
    assert utterances == [] and len(problems) == 2


def test_problems(tmp_path, capsys):
    """A label that is no number from 1 to 7 is a problem (Python's float would read 0_3 as 3), as
    is a name that leads out of the audio folder. Those of the splits asked for are counted in a
    ValueError or, with skip_bad, in a line."""
    cells = ["", "0_3", "nan", "inf", "7.5", "7.01", "0.99", "high"]
    rows = [(f"{i}.wav", cell, 4, "Test2") for i, cell in enumerate(cells)]
    names = ["t0.wav", "t1.wav", "t2.wav", "../Audios/t3.wav"]
    write_corpus(tmp_path, [*rows, *((name, 4, 4, "Train") for name in names)])
    (tmp_path / "Audios" / "t0.wav").write_bytes(b"RIFF")
    wheres = [f"line {i + 2}: '{i}.wav' {[cell, '4']}" for i, cell in enumerate(cells)]
    assert [p.where for p in data.read_corpus(tmp_path)[1]] == [*wheres, f"line 13: {names[3]!r}"]
    assert len(data.load_corpus(tmp_path, ["Train"], skip_bad=True, inspect=False)) == 3
    assert len(data.load_corpus(tmp_path, ["Train"], skip_bad=True)) == 2
    assert "skipped: 2 utterances" in capsys.readouterr().out
    with pytest.raises(ValueError, match="^2 utt.* 1 missing audio, 1 damaged or not audio .*$"):
        data.load_corpus(tmp_path, ["Train"])


# suffix, rate, subtype, gains of the channels, accuracy
FORMATS = [("wav", 16000, "PCM_16", [1], 5e-5), ("wav", 44100, "PCM_16", [1.5, 0.5], 2e-3)]
FORMATS += [("wav", 16000, "PCM_24", [1.5, 0.5], 1e-6), ("flac", 48000, "PCM_24", [1], 2e-3)]
FORMATS += [("flac", 16000, "PCM_16", [1.5, 0.5], 5e-5), ("wav", 8000, "ULAW", [1, 1], 2e-2)]
FORMATS += [("wav", 8000, "GSM610", [1], 0.15)]  # in blocks of 40 ms, and cannot seek


@pytest.mark.parametrize(("suffix", "rate", "subtype", "gains", "accuracy"), FORMATS)
def test_audio_formats(suffix, rate, subtype, gains, accuracy, tmp_path):
    """A sine of any rate, format and channel count is read as the 16 kHz mono sine, channels
    averaged; GSM fills it up to a whole block."""
    soundfile.write(path := tmp_path / f"sine.{suffix}", np.outer(sine(rate), gains), rate, subtype)
    wave = data.load_audio(path)
    assert wave.dtype == np.float32 and wave.shape == (check_file(path),)
    assert len(wave) == (16640 if subtype == "GSM610" else 16000)
    assert np.abs(wave[:16000] - sine(16000))[200:-200].max() < accuracy  # off the filter's edges


@pytest.mark.parametrize("rate", [7919, 8000, 11025, 16000, 22050, 32001, 44100, 48000])
def test_sample_count(rate, tmp_path):
    """check_audio, which does not decode, counts the samples that load_audio returns, at odd rates
    and lengths, for encoders at 16 and 8 kHz."""
    for samples in (rate // 10, rate // 3 + 1, rate + 7):
        soundfile.write(path := tmp_path / "x.wav", np.zeros((samples, 2)), rate)
        for sample_rate in (16000, 8000):
            assert check_file(path, sample_rate) == len(data.load_audio(path, sample_rate))


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
    soundfile.write(path, wave, rate, subtype, format="MP3" if "MPEG" in subtype else "WAV")
    path.write_bytes(path.read_bytes()[:size])
    assert check_file(path, sample_rate) == kind
    with pytest.raises(ValueError, match=f"^{path}: {kind}$"):
        data.load_audio(path, sample_rate)


@pytest.mark.parametrize("size", [2**32 - 1, 0x7FFFF000])
def test_streamed(size, tmp_path):
    """A WAV whose header has the size that ffmpeg or SoX writes into a pipe ends where it ends."""
    soundfile.write(path := tmp_path / "x.wav", sine(16000), 16000)
    content = path.read_bytes()
    path.write_bytes(content[:40] + size.to_bytes(4, "little") + content[44:])
    assert check_file(path) == len(data.load_audio(path)) == 16000


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
    assert not any("ThreadPool" in thread.name for thread in threading.enumerate())


def test_synthetic_corpus_is_deterministic(tmp_path):
    """The same seed writes the same bytes, another seed other ones."""
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        data.write_demo(tmp_path / name, seed=seed, speakers=(("Train", 1, 3),))
    files = ["Labels/labels_consensus.csv", *(f"Audios/DEMO_0001_000{i}.wav" for i in range(3))]
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)[0] == files
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", files, shallow=False)[1] == files


def test_synthetic_labels_are_audible(tmp_path):
    """A linear model of the mean log spectrum and the duration predicts all three labels of unseen
    synthetic speakers, none of whom is in two splits."""
    data.write_demo(tmp_path, speakers=(("Train", 8, 16), ("Test1", 4, 16)))
    utterances, _ = data.read_corpus(tmp_path, data.ATTRIBUTES)
    assert len({(u.speaker, u.split) for u in utterances}) == len({u.speaker for u in utterances})
    waves = [data.load_audio(u.path) for u in utterances]
    bands = [np.log(scipy.signal.welch(wave, nperseg=64)[1]) for wave in waves]
    features = np.array([[1, len(wave), *b] for wave, b in zip(waves, bands, strict=True)])
    labels = np.array([u.labels for u in utterances])  # the first 8 * 16 are to train on
    predicted = features[128:] @ np.linalg.lstsq(features[:128], labels[:128])[0]
    for column in range(3):
        assert np.corrcoef(predicted[:, column], labels[128:, column])[0, 1] > 0.5


def test_command(corpus, tmp_path, capsys):
    """data.py prints each split's utterances and speakers; it names each problem and then exits
    with 1."""
    data.main([corpus])
    words = capsys.readouterr().out.split()
    assert words[:5] == ["Train", "12", "utterances", "3", "speakers"] and words[-2] == "no"
    write_corpus(tmp_path, [("a.wav", 1, 7, "Train"), ("b.wav", 4, 9, "Train")])
    (tmp_path / "Audios" / "a.wav").unlink()
    with pytest.raises(SystemExit) as exit:
        data.main([str(tmp_path)])
    output = capsys.readouterr().out
    assert exit.value.code == 1 and "missing audio: Train line 2: 'a.wav'" in output
    assert "1 to 7: Train line 3: 'b.wav'" in output and "empty split: Test1" in output
