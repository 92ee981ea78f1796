"""MSP-Podcast from disk (section III): labels, audio, a Dataset, and a synthetic corpus in the same
layout. Everything but `main` stands alone: copy it. As a command:

    python data.py MSP-Podcast   # a table of splits, then every problem; exit status 1 if any
    python data.py --demo demo   # write the synthetic corpus demo/ and a tiny encoder, demo/encoder

A corpus is a folder with Audios/ and Labels/labels_consensus.csv; any release from 1.6 on is read.
In comments: B batch, S samples, T frames, D width, A attributes.
"""

import argparse
import csv
import math
import os
import re
from collections import Counter, deque
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.signal
import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence

# the last release's name first; 1.6 to 1.9 have others
LABEL_FOLDERS = ["Labels", "labels", "Label", "label"]
LABEL_FILES = [f"{folder}/labels_con{c}ensus.csv" for c in "sc" for folder in LABEL_FOLDERS]
AUDIO_FOLDERS = ["Audios", "Audio", "audios", "audio"]
ATTRIBUTES = {"activation": "Act", "valence": "Val", "dominance": "Dom"}  # column: "Emo" + this
PAPER = ["activation", "valence"]  # the attributes that the paper predicts
SPLITS = ["Train", "Development", "Test1", "Test2", "Test3"]  # Test3's labels are withheld
LABEL = re.compile(r"[1-6](\.\d*)?|7(\.0*)?")
OLD_SPLITS = {"Test": "Test1", "Validation": "Development"}  # 1.6 and 1.8
MIN_SAMPLES = 400  # at the encoder's rate: one frame of every supported encoder's CNN
MAX_SECONDS = 60  # our choice: attention's memory grows with T squared; MSP-Podcast ends at 11 s
AUDIO_SUFFIXES = (".wav", ".flac", ".ogg", ".opus", ".mp3", ".aiff", ".aif", ".au", ".caf")


class Utterance(NamedTuple):
    name: str  # FileName
    path: str
    split: str
    speaker: str
    labels: tuple  # A floats, 1 to 7 as 0 to 1 (section III); NaN in Test3
    samples: int = 0  # at the encoder's sample rate, set by `check_audio`


class Problem(NamedTuple):
    kind: str
    where: str
    split: str  # "" where the split is what is wrong


def find(root, names):
    """Path of the first of some names that is under `root`."""
    for path in (os.path.join(root, name) for name in names):
        if os.path.exists(path):
            return path
    raise FileNotFoundError(f"{root} is no corpus: it has no {names[0]}")


def read_corpus(root, attributes=PAPER):
    """All rows of a label file -> ([Utterance], [Problem]: a row that cannot be used). OSError or
    ValueError where the corpus cannot be read at all, or lacks the column of an attribute."""
    table, audio = find(root, LABEL_FILES), find(root, AUDIO_FOLDERS)
    columns = ["FileName", "SpkrID", "Split_Set", *("Emo" + ATTRIBUTES[a] for a in attributes)]
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file, strict=True)
            missing = [c for c in columns if c not in (reader.fieldnames or ())]
            if missing:
                raise ValueError(f"no column {', '.join(missing)} in {reader.fieldnames}")
            rows = [(reader.line_num, *((row[c] or "").strip() for c in columns)) for row in reader]
    except (csv.Error, ValueError) as error:
        raise ValueError(f"{table} is not a label file in UTF-8 with commas: {error}") from error
    utterances, problems, seen = [], [], set()
    for line, name, speaker, split, *cells in rows:
        split, path = OLD_SPLITS.get(split, split), os.path.join(audio, name)
        labels = tuple((float(c) - 1) / 6 if LABEL.fullmatch(c) else math.nan for c in cells)
        where = f"line {line}: {name!r}"  # quoted: a name may hold anything
        if split not in SPLITS:
            problems.append(Problem("unknown split", f"{where} {split!r}", ""))
        elif name in seen:
            problems.append(Problem("repeated name", where, split))
        elif any(map(math.isnan, labels)) and split != "Test3":
            problems.append(Problem("label missing or not in 1 to 7", f"{where} {cells}", split))
        elif name != os.path.basename(name) or not os.path.isfile(path):  # ../other.wav is not ours
            problems.append(Problem("missing audio", where, split))
        else:
            utterances.append(Utterance(name, path, split, speaker, labels))
        seen.add(name)
    return utterances, problems


def read_audio(path, sample_rate=16000, header_only=False):
    """Any file that soundfile reads -> (mono wave (S,) float32, S, its own rate). ValueError with
    file and reason if an encoder at `sample_rate` cannot use it. With `header_only`, PCM WAV is
    judged by header and size, in 0.1 ms, and its wave is None; others are decoded."""
    wave = None
    try:  # as bytes, because soundfile encodes text strictly and a name may not be UTF-8
        with soundfile.SoundFile(os.fsencode(path)) as file:
            samples, rate, notes = file.frames, file.samplerate, file.extra_info
            if samples * sample_rate < MIN_SAMPLES * rate:
                raise ValueError(f"{path}: shorter than {1000 * MIN_SAMPLES / sample_rate:g} ms")
            if samples > MAX_SECONDS * rate:
                raise ValueError(f"{path}: longer than {MAX_SECONDS} s")
            if not header_only or file.format[:3] != "WAV" or file.subtype[:3] != "PCM":
                wave = file.read(samples, dtype="float32", always_2d=True).mean(axis=1)
    except (soundfile.SoundFileError, TypeError) as error:  # TypeError: .raw
        raise ValueError(f"{path}: damaged or not audio") from error
    # A writer into a pipe cannot know the size: ffmpeg claims 2**32 - 1, SoX the whole blocks in
    # 0x7ffff000, both above 2**31 - 2**16. Such sound is not truncated: it ends with the file.
    size = re.search(r"^data : (\d+) \(should be (\d+)\)", notes, re.MULTILINE)
    cut = size and int(size[2]) < int(size[1]) < 2**31 - 2**16
    if cut or (wave is not None and len(wave) != samples):
        raise ValueError(f"{path}: truncated")
    if wave is not None and not np.isfinite(wave).all():
        raise ValueError(f"{path}: NaN or infinite samples")
    return wave, samples, rate


def check_audio(utterances, sample_rate=16000):
    """Inspect every file -> ([Utterance with samples], [Problem])."""
    good, problems = [], []
    for u in utterances:
        try:
            _, samples, rate = read_audio(u.path, sample_rate, header_only=True)
            good.append(u._replace(samples=math.ceil(samples * sample_rate / rate)))
        except ValueError as error:
            problems.append(Problem(str(error).removeprefix(f"{u.path}: "), u.name, u.split))
    return good, problems


def find_audio(paths):
    """Unlabelled utterances of files, and of audio in folders: of one, named by its path there."""
    found = []
    for top in map(Path, paths):
        for path in sorted(top.rglob("*")) if top.is_dir() else [top]:
            if path == top or (path.suffix.lower() in AUDIO_SUFFIXES and path.is_file()):
                name = path.relative_to(top) if len(paths) == 1 and path != top else path
                found.append(Utterance(str(name), str(path), "", "", ()))
    if not found:
        raise ValueError(f"{' '.join(paths)}: no audio files")
    return found


def load_corpus(root, splits, attributes=PAPER, sample_rate=16000, skip_bad=False, inspect=True):
    """The usable utterances of some splits of a corpus, their audio inspected if `inspect`.
    ValueError, or with `skip_bad` a line, if any are unusable."""
    utterances, bad = read_corpus(root, attributes)
    utterances = [u for u in utterances if u.split in splits]
    bad = [problem for problem in bad if problem.split in (*splits, "")]
    if inspect:
        utterances, more = check_audio(utterances, sample_rate)
        bad += more
    if bad:
        counts = ", ".join(f"{n} {kind}" for kind, n in Counter(p.kind for p in bad).most_common())
        text = f"{len(bad)} utterances cannot be used: {counts} (first: {bad[0].where})"
        if not skip_bad:
            raise ValueError(f"{text}; `python data.py ROOT` lists all, --skip-bad leaves them out")
        print(f"skipped: {text}")
    for split in splits:
        if (n := sum(u.split == split for u in utterances)) < 2:
            raise ValueError(f"split {split} has {n} usable utterances; CCC needs 2 (see --splits)")
    return utterances


def load_audio(path, sample_rate=16000):
    """Any file that soundfile reads -> mono float32 (S,) at `sample_rate`: channels averaged, then
    polyphase resampling. ValueError naming the file."""
    wave, _, rate = read_audio(path, sample_rate)
    return scipy.signal.resample_poly(wave, sample_rate, rate).astype(np.float32, copy=False)


class SpeechDataset:
    """Item i: waveform (S,), target (A,) 0 to 1, float32."""

    def __init__(self, utterances, sample_rate=16000, normalise=True):
        self.utterances, self.sample_rate, self.normalise = utterances, sample_rate, normalise
        self.lengths = [u.samples for u in utterances]
        self.targets = torch.tensor([u.labels for u in utterances], dtype=torch.float32)  # (N, A)

    def __len__(self):
        return len(self.utterances)

    def __getitem__(self, i):
        wave = load_audio(self.utterances[i].path, self.sample_rate)
        if self.normalise:  # over the true length, before padding, as Hugging Face's code does
            wave = (wave - wave.mean()) / np.sqrt(wave.var() + 1e-7)
        return torch.from_numpy(wave), self.targets[i]


def collate(items):
    """Items of a dataset -> inputs zero-padded to the longest (B, S) or (B, T, D), lengths [int],
    targets (B, A). Lengths stay on the CPU, so that nothing waits for a GPU to tell them."""
    inputs, targets = zip(*items, strict=True)
    return pad_sequence(inputs, batch_first=True), [len(x) for x in inputs], torch.stack(targets)


def read_ahead(load, items, workers):
    """Yield load(item) for each item, in order, computed by `workers` threads up to 2 * workers
    items ahead. Our choice, threads: nothing is pickled, no shared memory fills up, an error
    arrives as it is; decoding, checksums and NumPy release the GIL."""
    futures = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in items:
            futures.append(pool.submit(load, item))
            if len(futures) > 2 * workers:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()


VOWELS = ((700, 1200, 2500), (350, 2100, 2800), (400, 900, 2400), (500, 1600, 2500))  # formants, Hz
SPEAKERS = (("Train", 12, 32), ("Development", 4, 24), ("Test1", 4, 32))  # utterances of each


def synthesize(activation, valence, voice, rng, sample_rate=16000):
    """Speech-like sound (S,) of a voice (f0 in Hz, formant scale), source and filter. Activation,
    0 to 1, raises pitch and syllable rate and flattens the spectral tilt; valence raises formants,
    as a smile does, widens intonation, shortens pauses and lessens breath."""
    f0, tract = voice
    syllables = []
    for _ in range(rng.integers(4, 7)):
        duration = rng.uniform(0.8, 1.2) * (0.34 - 0.22 * activation)  # s
        position = np.arange(int(duration * sample_rate)) / sample_rate / duration  # 0 to 1
        octaves = 0.9 * (activation - 0.5) + 0.5 * valence * (position - 0.5)
        phase = 2 * np.pi * np.cumsum(f0 * 2**octaves) / sample_rate
        breath = 0.3 * (1 - valence) * rng.normal(size=len(position))
        source = np.maximum(np.sin(phase), 0) ** 3 + breath  # glottal pulses and breath
        source = scipy.signal.lfilter([1, -1], [1, 0.7 * activation - 0.93], source)  # the tilt
        for formant in np.array(VOWELS[rng.integers(len(VOWELS))]) * tract * (0.8 + 0.4 * valence):
            radius = math.exp(-math.pi * 90 / sample_rate)  # bandwidth 90 Hz
            pole = -2 * radius * math.cos(2 * math.pi * formant / sample_rate)
            source = scipy.signal.lfilter([1 - radius], [1, pole, radius**2], source)
        pause = np.zeros(int((0.02 + 0.12 * (1 - valence)) * sample_rate))
        syllables += [source * np.sin(np.pi * position) ** 0.5, pause]
    wave = np.concatenate(syllables)
    return 0.5 * wave / np.abs(wave).max() + 0.001 * rng.normal(size=len(wave))


def write_demo(root, seed=0, speakers=SPEAKERS):
    """A corpus in the MSP-Podcast layout, labelled with what its sound was made from, plus noise
    (dominance: a mixture of both). No speaker is in two splits."""
    rng, dominance_rng = np.random.default_rng(seed), np.random.default_rng((seed, 1))
    Path(root, "Audios").mkdir(parents=True, exist_ok=True)
    Path(root, "Labels").mkdir(exist_ok=True)
    rows = ["FileName,EmoClass,EmoAct,EmoVal,EmoDom,SpkrID,Gender,Split_Set"]
    each = [(split, n) for split, n_speakers, n in speakers for _ in range(n_speakers)]
    for speaker, (split, n) in enumerate(each, start=1):
        gender, low, high = ("Female", 170, 230) if speaker % 2 else ("Male", 95, 130)
        voice = rng.uniform(low, high), rng.uniform(0.95, 1.05) + 0.1 * (speaker % 2)
        for i in range(n):
            a, v = rng.uniform(0, 1, 2)
            name = f"DEMO_{speaker:04}_{i:04}.wav"
            soundfile.write(Path(root, "Audios", name), synthesize(a, v, voice, rng), 16000)
            noise = np.append(rng.normal(size=2), dominance_rng.normal())
            act, val, dom = np.clip(1 + 6 * np.array([a, v, 0.7 * a + 0.3 * v]) + 0.3 * noise, 1, 7)
            rows.append(f"{name},X,{act:.3f},{val:.3f},{dom:.3f},{speaker},{gender},{split}")
    Path(root, "Labels", "labels_consensus.csv").write_text("\n".join(rows) + "\n")


def write_encoder(folder, seed=0, layers=4, width=64, channels=32):
    """A tiny random wav2vec 2.0 in the Hugging Face layout, with the base's preprocessor config."""
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(seed)
    shape = {"hidden_size": width, "intermediate_size": 2 * width, "conv_dim": (channels,) * 7}
    shape |= {"num_conv_pos_embeddings": 16, "num_conv_pos_embedding_groups": 4}
    shape |= {"num_hidden_layers": layers, "num_attention_heads": 1}  # as wide as the base's: 64
    Wav2Vec2Model(Wav2Vec2Config(**shape)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=True, sampling_rate=16000).save_pretrained(folder)


def main(argv=None):
    parser = argparse.ArgumentParser(description="Check a corpus, or write the synthetic one.")
    parser.add_argument("root", help="folder with Audios/ and Labels/")
    parser.add_argument("--demo", action="store_true", help="write a synthetic corpus and encoder")
    args = parser.parse_args(argv)
    if args.demo:
        write_demo(args.root)
        write_encoder(Path(args.root, "encoder"))
        return print(f"wrote {args.root} and {args.root}/encoder")
    utterances, problems = read_corpus(args.root)
    good, more = check_audio(utterances)
    problems += more
    for split in SPLITS:
        part = [u for u in good if u.split == split]
        if part:
            hours = sum(u.samples for u in part) / 16000 / 3600
            speakers = len({u.speaker for u in part} - {"Unknown"})
            print(f"{split:12}{len(part):8,} utterances{speakers:6,} speakers{hours:8.2f} h")
        elif split in SPLITS[:3]:
            problems.append(Problem("empty split", "no usable utterance", split))
    for problem in sorted(problems):
        print(f"{problem.kind}: {problem.split} {problem.where}")
    print(f"{len(problems) or 'no'} problems")
    if problems:
        raise SystemExit(1)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # bad input: one line and exit status 2
        argparse.ArgumentParser().exit(2, f"error: {error}\n")
