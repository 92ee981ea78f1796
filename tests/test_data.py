"""Corpora, audio and normalisation against Hugging Face's feature extractor, closed forms and the
releases' names."""

import csv
import filecmp
import math

import numpy as np
import pytest
import scipy.signal
import soundfile
import torch
from transformers import Wav2Vec2FeatureExtractor

import data


def sine(rate, frequency=300, seconds=1.0):
    return 0.5 * np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate)


def write_corpus(root, audio, folder, file, rows):
    """A corpus whose audio files are 0.1 s sines; rows: (name, activation, valence, split)."""
    (root / audio).mkdir(parents=True)
    (root / folder).mkdir()
    for name, *_ in rows:
        soundfile.write(root / audio / name, sine(16000, seconds=0.1), 16000)
    with open(root / folder / file, "w", newline="") as out:
        out.write("FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set\n")
        csv.writer(out).writerows([n, "N", a, v, 4, "Unknown", "F", s] for n, a, v, s in rows)


@pytest.mark.parametrize("samples", [400, 16001, 50000])
def test_normalise(samples):
    """normalise is bitwise what Wav2Vec2FeatureExtractor makes of the same waveform."""
    wave = (0.1 * np.random.default_rng(0).normal(size=samples) + 0.02).astype(np.float32)
    extractor = Wav2Vec2FeatureExtractor(do_normalize=True)
    expected = extractor(wave, sampling_rate=16000).input_values[0]
    assert data.normalise(wave).dtype == np.float32
    assert np.array_equal(data.normalise(wave), expected)


@pytest.mark.parametrize(
    ("release", "audio", "folder", "file", "development", "test"),
    [
        ("1.6", "Audio", "label", "labels_concensus.csv", "Validation", "Test"),
        ("1.8", "Audios", "Labels", "labels_concensus.csv", "Validation", "Test1"),
        ("1.9", "Audios", "labels", "labels_concensus.csv", "Validation", "Test1"),
        ("1.11", "Audios", "Labels", "labels_consensus.csv", "Development", "Test1"),
        ("2.0", "Audio", "Labels", "labels_consensus.csv", "Development", "Test1"),
    ],
)
def test_releases(release, audio, folder, file, development, test, tmp_path):
    """Every release's folder, file and split names are read, in file order; labels 1 to 7 become 0
    to 1; Test3 needs no labels."""
    rows = [("a.wav", 1, 7, "Train"), ("b.wav", 4, 2.5, development), ("c.wav", 7, 4, test)]
    rows += [("d.wav", 1, 1, "Test2"), ("e.wav", "", "", "Test3")]
    write_corpus(tmp_path, audio, folder, file, rows)
    utterances, problems = data.read_corpus(tmp_path)
    assert problems == []
    assert [u.name for u in utterances] == ["a.wav", "b.wav", "c.wav", "d.wav", "e.wav"]
    assert [u.split for u in utterances] == list(data.SPLITS)
    assert [u.activation for u in utterances[:4]] == [0, 0.5, 1, 0]
    assert [u.valence for u in utterances[:4]] == [1, 0.25, 0.5, 0]
    assert math.isnan(utterances[4].activation)
    assert [u.samples for u in data.check_audio(utterances)[0]] == [1600] * 5


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
    and lengths too."""
    utterances = []
    for samples in (rate // 10, rate // 3 + 1, rate + 7):
        path = str(tmp_path / f"{samples}.wav")
        soundfile.write(path, np.zeros(samples), rate)
        utterances.append(data.Utterance(path, path, "Train", "1", 0.5, 0.5))
    good, problems = data.check_audio(utterances)
    assert problems == []
    assert [u.samples for u in good] == [len(data.load_audio(u.path)) for u in utterances]


def test_dataset_and_collate(corpus):
    """A batch holds each utterance's normalised waveform, exactly zero after its end, its length,
    target and index."""
    utterances, _ = data.read_corpus(corpus)
    dataset = data.SpeechDataset(utterances)
    rows = [5, 0, 9]
    inputs, lengths, targets, indices = data.collate([dataset[i] for i in rows])
    assert indices.tolist() == rows and inputs.shape == (3, max(lengths))
    for i, row in enumerate(rows):
        wave = torch.from_numpy(data.load_audio(utterances[row].path))
        wave = (wave - wave.mean()) / wave.std(correction=0)
        torch.testing.assert_close(inputs[i, : lengths[i]], wave, rtol=0, atol=1e-3)
        assert len(wave) == lengths[i] and not inputs[i, lengths[i] :].any()
        expected = [utterances[row].activation, utterances[row].valence]
        torch.testing.assert_close(targets[i], torch.tensor(expected))


def test_synthetic_corpus_is_deterministic(tmp_path):
    """The same seed writes the same bytes, another seed other ones."""
    for name, seed in [("a", 3), ("b", 3), ("c", 4)]:
        data.write_demo(tmp_path / name, seed=seed, speakers=(("Train", 1, 3),))
    files = sorted(str(p.relative_to(tmp_path / "a")) for p in tmp_path.glob("a/*/*"))
    assert len(files) == 4
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "b", files, shallow=False)[0] == files
    assert filecmp.cmpfiles(tmp_path / "a", tmp_path / "c", files, shallow=False)[1] == files


def test_synthetic_speakers(corpus):
    """No speaker of the synthetic corpus is in two splits."""
    utterances, problems = data.read_corpus(corpus)
    pairs = {(u.speaker, u.split) for u in utterances}
    assert problems == [] and len(pairs) == len({speaker for speaker, _ in pairs}) == 7


def test_synthetic_labels_are_audible(tmp_path):
    """A linear model of the mean log spectrum and the duration predicts both labels of unseen
    synthetic speakers."""
    data.write_demo(tmp_path, speakers=(("Train", 8, 16), ("Test1", 4, 16)))
    utterances, _ = data.read_corpus(tmp_path)
    features, train = [], np.array([u.split == "Train" for u in utterances])
    for u in utterances:
        wave = data.load_audio(u.path)
        bands = scipy.signal.welch(wave, 16000, nperseg=512)[1][1:].reshape(32, 8).mean(1)
        features.append([1, len(wave) / 16000, *np.log(bands + 1e-9)])
    features = np.array(features)
    labels = np.array([[u.activation, u.valence] for u in utterances])
    ridge = features[train].T @ features[train] + np.eye(features.shape[1])
    pred = features[~train] @ np.linalg.solve(ridge, features[train].T @ labels[train])
    for column in range(2):
        assert np.corrcoef(pred[:, column], labels[~train, column])[0, 1] > 0.5


def test_command(corpus, tmp_path, capsys):
    """data.py prints a table of the splits' utterances and speakers; it names each problem and then
    exits with 1."""
    data.main([corpus])
    rows = [" ".join(line.split()[:3]) for line in capsys.readouterr().out.splitlines()]
    assert rows[1:4] == ["Train 12 3", "Development 8 2", "Test1 8 2"]
    rows = [("a.wav", 1, 7, "Train"), ("b.wav", 4, 9, "Train"), ("c.wav", 4, 4, "Development")]
    rows.append(("d.wav", 2, 2, "Test1"))
    write_corpus(tmp_path, "Audios", "Labels", "labels_consensus.csv", rows)
    (tmp_path / "Audios" / "a.wav").unlink()
    with pytest.raises(SystemExit) as exit:
        data.main([str(tmp_path)])
    output = capsys.readouterr().out
    assert exit.value.code == 1
    assert "missing audio" in output and "a.wav" in output and "b.wav" in output
