"""MSP-Podcast from disk (section III): labels, audio, a Dataset, and a synthetic corpus in the same
layout.

Everything but `main` stands alone: copy it. As a command:

    python data.py MSP-Podcast   # a table of splits, then every problem; exit status 1 if any
    python data.py --demo demo   # write the synthetic corpus demo/ and a tiny encoder, demo/encoder

A corpus is a folder with Audios/ (or Audio/) and Labels/labels_consensus.csv; any release from 1.6
on is read.
"""

import argparse
import csv
import math
import multiprocessing
import os
import re
import signal
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.signal
import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

LABEL_FOLDERS = ("labels", "label")  # compared in lower case: Labels, labels (1.9), label (1.6)
LABEL_FILES = ("labels_consensus.csv", "labels_concensus.csv")  # the second until 1.9
AUDIO_FOLDERS = ("audios", "audio")
COLUMNS = ("FileName", "EmoAct", "EmoVal", "SpkrID", "Split_Set")
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".mp3", ".aiff")  # of files to predict in a folder
SPLITS = ("Train", "Development", "Test1", "Test2", "Test3")
OLD_SPLITS = {"Test": "Test1", "Validation": "Development"}  # 1.6 and 1.8
UNLABELLED = "Test3"  # its labels are withheld
MIN_SECONDS, MAX_SECONDS = 0.025, 60.0  # one frame of the CNN; MSP-Podcast ends at 11 s
VOWELS = ((700, 1200, 2500), (350, 2100, 2800), (400, 900, 2400), (500, 1600, 2500))  # formants, Hz


class Utterance(NamedTuple):
    name: str  # FileName
    path: str
    split: str
    speaker: str
    activation: float  # 0 to 1: (label - 1) / 6; NaN in Test3
    valence: float
    samples: int = 0  # at the encoder's sample rate, set by `check_audio`


class Problem(NamedTuple):
    kind: str
    where: str
    split: str  # "" where the split is what is wrong


def find(folder, names, what):
    """Path of the first entry of `folder` whose name in lower case is one of `names`."""
    if not os.path.isdir(folder):
        raise NotADirectoryError(
            f"{folder} is not a folder; a corpus has Audios/ and Labels/ in it"
        )
    entries = {entry.lower(): entry for entry in sorted(os.listdir(folder))}
    for name in names:
        if name in entries:
            return os.path.join(folder, entries[name])
    raise FileNotFoundError(
        f"{folder} has no {what} ({' or '.join(names)}); it holds {sorted(entries)[:5]}"
    )


def unit_label(cell):
    """A label on the scale 1 to 7, as text -> 0 to 1 (section III). Raises ValueError for anything
    else."""
    value = float(cell)
    if not 1 <= value <= 7:
        raise ValueError
    return (value - 1) / 6


def read_corpus(root):
    """All usable rows of a corpus's label file -> ([Utterance], [Problem]).

    A row that cannot be used (no label, label out of 1 to 7, missing audio, unknown split, repeated
    name, a name that leaves the audio folder) becomes a Problem. OSError or ValueError where the
    corpus cannot be read at all.
    """
    labels = find(find(root, LABEL_FOLDERS, "label folder"), LABEL_FILES, "label file")
    audio = find(root, AUDIO_FOLDERS, "audio folder")
    present = set(os.listdir(audio))
    utterances, problems, seen = [], [], set()
    try:
        with open(labels, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [column for column in COLUMNS if column not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"no column {', '.join(missing)} in {reader.fieldnames}")
            cells = ([(row[column] or "").strip() for column in COLUMNS] for row in reader)
            rows = [(reader.line_num, *row) for row in cells]
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{labels} is not a label file in UTF-8 with commas: {error}") from error
    for line, name, activation, valence, speaker, split in rows:
        split = OLD_SPLITS.get(split, split)
        where = f"line {line}: {name!r}"  # quoted: a name may hold anything
        labels = f"EmoAct {activation!r} EmoVal {valence!r}"
        try:
            activation, valence = unit_label(activation), unit_label(valence)
        except ValueError:
            activation = valence = math.nan
        if split not in SPLITS:
            problems.append(Problem("unknown split", f"{where} {split!r}", ""))
        elif name in seen:
            problems.append(Problem("repeated name", where, split))
        elif name != os.path.basename(name):
            problems.append(Problem("name leaves the audio folder", where, split))
        elif math.isnan(activation) and split != UNLABELLED:
            problems.append(Problem("label missing or not in 1 to 7", f"{where} {labels}", split))
        elif name not in present:
            problems.append(Problem("missing audio", where, split))
        else:
            path = os.path.join(audio, name)
            utterances.append(Utterance(name, path, split, speaker, activation, valence))
        seen.add(name)
    return utterances, problems


def check_length(samples, rate):
    """ValueError for what no model here can use: less than a frame, or so much that attention fills
    the memory."""
    if samples < MIN_SECONDS * rate:
        raise ValueError("shorter than 25 ms")
    if samples > MAX_SECONDS * rate:
        raise ValueError(f"longer than {MAX_SECONDS:.0f} s")


def inspect_audio(path):
    """(samples, sample rate) of an audio file. Raises ValueError with the reason if it cannot be
    trained on.

    PCM WAV is judged by header and size, which takes 0.1 ms; what can hide more (NaN, a damaged
    block) is decoded.
    """
    try:
        with soundfile.SoundFile(path) as file:
            samples, rate, notes = file.frames, file.samplerate, file.extra_info
            check_length(samples, rate)
            if file.format not in ("WAV", "WAVEX") or not file.subtype.startswith("PCM"):
                wave = file.read(dtype="float32")
                if len(wave) < samples:
                    raise ValueError("truncated")
                if not np.isfinite(wave).all():
                    raise ValueError("NaN or infinite samples")
    except soundfile.SoundFileError as error:
        if not os.path.exists(path):  # a link to nowhere
            raise ValueError("missing audio") from error
        kind = "damaged or not audio" if os.path.getsize(path) else "empty file"
        raise ValueError(kind) from error
    sizes = re.search(r"^data : (\d+) \(should be (\d+)\)", notes, re.MULTILINE)
    if sizes and int(sizes[2]) < int(sizes[1]) < 2**31 - 2**16:  # more: its writer did not know
        raise ValueError("truncated")
    return samples, rate


def inspect_quietly(path):
    """What inspect_audio returns, or its reason as text."""
    try:
        return inspect_audio(path)
    except (ValueError, OSError) as error:
        return str(error)


def leave_signals():
    """In a worker: Ctrl-C is its parent's to handle, which ends it by SIGTERM without a word."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def check_audio(utterances, sample_rate=16000):
    """Inspect every file -> ([Utterance with samples], [Problem])."""
    processes = min(16, os.cpu_count() or 1)
    with multiprocessing.Pool(processes, leave_signals) as pool:
        reports = pool.map(inspect_quietly, [u.path for u in utterances])
        pool.close()
        pool.join()
    good, problems = [], []
    for utterance, report in zip(utterances, reports, strict=True):
        if isinstance(report, str):
            problems.append(Problem(report, utterance.name, utterance.split))
        else:
            samples, rate = report
            good.append(utterance._replace(samples=math.ceil(samples * sample_rate / rate)))
    return good, problems


def select(utterances, problems, splits, skip_bad=False):
    """The utterances of some splits, if nothing is wrong with them; otherwise a ValueError that
    counts what is wrong, or with `skip_bad` a printed line."""
    bad = [p for p in problems if p.split in (*splits, "")]
    if bad:
        counts = ", ".join(f"{n} {kind}" for kind, n in Counter(p.kind for p in bad).most_common())
        first = "; ".join(p.where for p in bad[:3])
        if not skip_bad:
            raise ValueError(
                f"{len(bad)} utterances cannot be used: {counts} (first: {first}). "
                "`python data.py ROOT` lists all, --skip-bad goes on without them"
            )
        print(f"skipped {len(bad)} utterances: {counts} (first: {first})")
    chosen = [u for u in utterances if u.split in splits]
    for split in splits:
        n = sum(u.split == split for u in chosen)
        if n < 2:
            raise ValueError(
                f"split {split} has {n} usable utterances; CCC needs 2 (--splits names the splits)"
            )
    return chosen


def load_audio(path, sample_rate=16000):
    """Any file that soundfile reads -> mono float32 (S,) at `sample_rate`: channels averaged, then
    polyphase resampling. Raises ValueError naming the file."""
    try:
        wave, source_rate = soundfile.read(path, dtype="float32", always_2d=True)
        check_length(len(wave), source_rate)
    except (soundfile.SoundFileError, ValueError) as error:
        raise ValueError(f"{path}: {' '.join(str(error).split())}") from error
    wave = wave.mean(axis=1)  # (S, channels) -> (S,)
    if source_rate != sample_rate:
        divisor = math.gcd(source_rate, sample_rate)
        wave = scipy.signal.resample_poly(wave, sample_rate // divisor, source_rate // divisor)
    if not np.isfinite(wave).all():
        raise ValueError(f"{path}: NaN or infinite samples")
    return wave.astype(np.float32, copy=False)


def normalise(wave):
    """Zero mean, unit variance over the true length, before any padding, as Hugging Face's
    preprocessor does it."""
    return (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)


class SpeechDataset(Dataset):
    """Item i: waveform (S,) float32, target (2,) float32 on the scale 0 to 1, i."""

    def __init__(self, utterances, sample_rate=16000, normalise=True):
        self.utterances, self.sample_rate, self.normalise = utterances, sample_rate, normalise

    def __len__(self):
        return len(self.utterances)

    def __getitem__(self, i):
        utterance = self.utterances[i]
        wave = load_audio(utterance.path, self.sample_rate)
        if self.normalise:
            wave = normalise(wave)
        return torch.from_numpy(wave), torch.tensor([utterance.activation, utterance.valence]), i


def collate(items):
    """Items of a dataset -> inputs zero-padded to the longest (B, S) or (B, T, D), lengths (B,),
    targets (B, 2), indices (B,)."""
    inputs, targets, indices = zip(*items, strict=True)
    lengths = torch.tensor([len(x) for x in inputs])
    inputs = pad_sequence(inputs, batch_first=True)
    return inputs, lengths, torch.stack(targets), torch.tensor(indices)


def synthesize(activation, valence, voice, rng, sample_rate=16000):
    """Speech-like sound (S,) from a source-filter model; activation, valence in 0..1 and a voice
    (f0 in Hz, vocal tract scale). Activation raises the pitch and the syllable rate and flattens
    the spectral tilt; valence raises the formants, as a smile does, widens the intonation, shortens
    pauses and makes the voice less breathy."""
    f0, tract = voice
    syllables = []
    for _ in range(rng.integers(4, 7)):
        duration = rng.uniform(0.8, 1.2) * (0.34 - 0.22 * activation)  # s
        t = np.arange(int(duration * sample_rate)) / sample_rate
        position = t / duration  # 0 to 1 within the syllable
        octaves = 0.9 * (activation - 0.5) + 0.5 * valence * (position - 0.5)
        phase = 2 * np.pi * np.cumsum(f0 * 2**octaves) / sample_rate
        breath = 0.3 * (1 - valence) * rng.normal(size=len(t))
        source = np.maximum(np.sin(phase), 0) ** 3 + breath  # glottal pulses and breath
        tilt = 0.93 - 0.7 * activation
        source = scipy.signal.lfilter([1, -1], [1, -tilt], source)
        vowel = np.array(VOWELS[rng.integers(len(VOWELS))])
        for formant in vowel * tract * (0.8 + 0.4 * valence):
            radius = math.exp(-math.pi * 90 / sample_rate)  # bandwidth 90 Hz
            pole = -2 * radius * math.cos(2 * math.pi * formant / sample_rate)
            source = scipy.signal.lfilter([1 - radius], [1, pole, radius**2], source)
        pause = np.zeros(int((0.02 + 0.12 * (1 - valence)) * sample_rate))
        syllables += [source * np.sin(np.pi * position) ** 0.5, pause]
    wave = np.concatenate(syllables)
    return 0.5 * wave / np.abs(wave).max() + 0.001 * rng.normal(size=len(wave))


SPEAKERS = (
    ("Train", 12, 32),
    ("Development", 4, 24),
    ("Test1", 4, 32),
)  # speakers, utterances of each


def write_demo(root, seed=0, speakers=SPEAKERS):
    """A corpus in the MSP-Podcast layout, no speaker in two splits. The labels are what the sound
    was made from plus noise, on the scale 1 to 7."""
    rng = np.random.default_rng(seed)
    audio, labels = Path(root, "Audios"), Path(root, "Labels")
    audio.mkdir(parents=True, exist_ok=True)
    labels.mkdir(exist_ok=True)
    rows, speaker = [], 0
    for split, n_speakers, n_utterances in speakers:
        for _ in range(n_speakers):
            speaker += 1
            female = speaker % 2
            f0 = rng.uniform(170, 230) if female else rng.uniform(95, 130)
            voice = f0, rng.uniform(0.95, 1.05) + 0.1 * female
            for i in range(n_utterances):
                activation, valence = rng.uniform(0, 1, 2)
                name = f"DEMO_{speaker:04}_{i:04}.wav"
                wave = synthesize(activation, valence, voice, rng)
                soundfile.write(audio / name, wave, 16000, subtype="PCM_16")
                label = 1 + 6 * np.array([activation, valence]) + 0.3 * rng.normal(size=2)
                gender = "Female" if female else "Male"
                label = (f"{x:.3f}" for x in np.clip(label, 1, 7))
                rows.append([name, "X", *label, "", speaker, gender, split])
    header = ["FileName", "EmoClass", "EmoAct", "EmoVal", "EmoDom", "SpkrID", "Gender", "Split_Set"]
    with open(labels / "labels_consensus.csv", "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def write_encoder(folder, seed=0, layers=4, width=64, channels=32):
    """A tiny random wav2vec 2.0 encoder in the Hugging Face layout, with the base model's
    preprocessor settings."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(seed)
    config = Wav2Vec2Config(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=1,  # as wide as the base model's: 64
        intermediate_size=2 * width,
        conv_dim=(channels,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
    )
    Wav2Vec2Model(config).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, sampling_rate=16000).save_pretrained(folder)


def report(root):
    """Print a table of splits and every problem of a corpus; returns the number of problems."""
    utterances, problems = read_corpus(root)
    good, more = check_audio(utterances)
    problems += more
    print(
        f"{'split':12} {'utterances':>10} {'speakers':>8} {'hours':>7} {'activation':>10} "
        f"{'valence':>8}  (mean, 1 to 7)"
    )
    for split in SPLITS:
        part = [u for u in good if u.split == split]
        if part:
            hours = sum(u.samples for u in part) / 16000 / 3600
            speakers = len({u.speaker for u in part} - {"Unknown"})
            labels = np.array([(u.activation, u.valence) for u in part])
            activation, valence = 1 + 6 * labels.mean(0)
            print(
                f"{split:12} {len(part):10,} {speakers:8,} {hours:7.2f} {activation:10.2f} "
                f"{valence:8.2f}"
            )
    for kind, n in Counter(p.kind for p in problems).most_common():
        print(f"{n} x {kind}")
        for problem in problems:
            if problem.kind == kind:
                print(f"    {problem.split} {problem.where}")
    for split in SPLITS[:3]:
        if not any(u.split == split for u in good):
            problems.append(Problem("empty split", split, split))
            print(f"split {split} is empty")
    print(f"{len(problems)} problems" if problems else "no problems")
    return len(problems)


def main(argv=None):
    parser = argparse.ArgumentParser(
        usage="python data.py [--demo] ROOT",
        description="Check a corpus, or write the synthetic one.",
    )
    parser.add_argument("root", help="folder with Audios/ and Labels/")
    parser.add_argument("--demo", action="store_true", help="write a synthetic corpus and encoder")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    try:
        if args.demo:
            write_demo(args.root)
            write_encoder(Path(args.root, "encoder"))
            print(f"{args.root}: 608 utterances of 20 synthetic speakers, and {args.root}/encoder")
        elif report(args.root):
            raise SystemExit(1)
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        parser.error(str(error))


if __name__ == "__main__":
    main()
