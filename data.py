"""MSP-Podcast from disk (section III): audio, labels, a Dataset, files of predictions, and a
synthetic corpus in the same layout. Everything above the command line stands alone: copy it. As a
command:

    python data.py MSP-Podcast   # a table of splits, then any problems, with exit status 1
    python data.py --demo synth  # write the synthetic corpus synth/ and a tiny encoder in it

A corpus is a folder with Audios/ and Labels/labels_consensus.csv; any release from 1.6 on is read.
In comments: B batch, S samples, T frames, D width, A attributes.
"""

import argparse
import csv
import io
import math
import os
import re
import sys
import tempfile
import unicodedata
from collections import Counter, defaultdict, deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import NamedTuple

import numpy as np
import scipy.signal
import soundfile
import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

ATTRIBUTES = {"activation": "Act", "valence": "Val", "dominance": "Dom"}  # column: "Emo" + this
PAPER = ["activation", "valence"]  # the attributes that the paper predicts
SPLITS = ["Train", "Development", "Test1", "Test2", "Test3"]  # Test3's labels are withheld
SCALE = [1, 7]  # the least and the greatest label of MSP-Podcast; a list, as in JSON
MIN_SAMPLES = 400  # at the encoder's rate: one frame of every supported encoder's CNN
MAX_SECONDS = 60  # our choice: attention's memory grows with T squared; MSP-Podcast ends at 11 s


class Utterance(NamedTuple):
    name: str  # FileName
    path: str
    split: str = ""
    # A floats, on 0 to 1 for the ends of the scale (section III), as are targets and predictions.
    # Only files and the screen have numbers on the scale itself. Those of Test3 are not checked, as
    # they are withheld: NaN.
    labels: tuple = ()
    samples: int = 0  # at the encoder's sample rate, set by `check_audio`


def load_audio(source, sample_rate=16000, start=0.0, stop=None):
    """Sound of a path, or of an open binary file -> mono float32 (S,) at `sample_rate`.
    With `start` or `stop`, in seconds, only that piece of it. Whatever is asked for is in memory at
    once: `measure` tells before how long a recording is.
    ValueError "name: reason; remedy" where a file cannot be used, OSError where not opened."""
    # Both helpers stand below, and judge whether the file is what it says.
    with open_sound(source) as (sound, file):
        blocks = read_blocks(sound, file, start, stop)  # each (S, channels)
        wave = np.concatenate([block.mean(axis=1) for block in blocks])
        # This keeps float32.
        return scipy.signal.resample_poly(wave, sample_rate, sound.samplerate)


class SpeechDataset:
    """Item i: waveform (S,) as the file has it, target (A,) on 0 to 1, both float32. The model
    normalises its own input."""

    def __init__(self, utterances, sample_rate=16000):
        self.utterances = utterances
        self.sample_rate = sample_rate
        self.lengths = [u.samples for u in utterances]
        self.targets = torch.tensor([u.labels for u in utterances], dtype=torch.float32)  # (N, A)

    def __len__(self):
        return len(self.utterances)

    def __getitem__(self, i):
        wave = load_audio(self.utterances[i].path, self.sample_rate)
        return torch.from_numpy(wave), self.targets[i]


def collate(items):
    """Items of a dataset -> inputs zero-padded to the longest (B, S) or (B, T, D), lengths [int],
    targets (B, A). Lengths stay on the CPU, so that nothing waits for a GPU to tell them."""
    inputs, targets = zip(*items)
    return pad_sequence(inputs, batch_first=True), [len(x) for x in inputs], torch.stack(targets)


def progress(items, name):
    """The items, with a bar of that name where there is a terminal. Of torchrun's processes, the
    first alone has one."""
    quiet = os.environ.get("RANK", "0") != "0"
    return tqdm(items, name, leave=False, disable=quiet or None)


def read_ahead(load, items, workers, name):
    """Yield load(item) for each item, in order, computed by `workers` threads up to 2 * workers
    items ahead, with a bar of that name. Our choice is threads, and not a DataLoader's processes:
    nothing is pickled, no shared memory fills up, and an error arrives as it is. Decoding,
    checksums and NumPy release the GIL, so that threads do work side by side."""
    futures = deque()
    with ThreadPoolExecutor(workers) as pool:
        for item in progress(items, name):
            futures.append(pool.submit(load, item))
            if len(futures) > 2 * workers:
                yield futures.popleft().result()
        while futures:
            yield futures.popleft().result()


# ---- a corpus: labels, then which of its utterances can be used ----

# The newest release's names stand first; releases 1.6 to 1.9 have the others.
LABEL_FILES = str.split("""Labels/labels_consensus.csv labels/labels_consensus.csv
    Label/labels_consensus.csv label/labels_consensus.csv
    Labels/labels_concensus.csv labels/labels_concensus.csv
    Label/labels_concensus.csv label/labels_concensus.csv""")
AUDIO_FOLDERS = str.split("Audios Audio audios audio")
OLD_SPLITS = {"Test": "Test1", "Validation": "Development"}  # releases 1.6 and 1.8


def find(root, names):
    """Path of the first of some names that is under `root`, or else of the first name."""
    paths = [f"{root}/{name}" for name in names]
    return next(filter(os.path.exists, paths), paths[0])


def to_unit(cell, low, high):
    """A label -> 0 to 1 for low to high, and beyond that for one beyond them; NaN if it is no
    number. It is rounded first, as a mean of ratings may be 7.000000000000001."""
    try:
        return (round(float(cell), 9) - low) / (high - low)
    except ValueError:
        return math.nan


def read_table(path, columns=()):
    """Rows of a CSV file by their names, {FileName: {column: cell}}, without spaces around cells
    and without empty lines. ValueError where it lacks one of `columns` or has a column twice, where
    a row has another number of cells or a name is in two rows, and where it is no CSV in UTF-8."""
    table = {}
    faults = []
    with open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True, skipinitialspace=True)
        lines = ([cell.strip() for cell in cells] for cells in reader)
        try:
            header = next(lines, [])
            for column in ["FileName", *columns, *filter(None, header)]:
                count = header.count(column)
                if count != 1:
                    reason = f"{count} columns {column!r} in its first line, {header[:20]}"
                    raise ValueError(f"'{path}': {reason}; give it one, between commas")
            for cells in filter(any, lines):  # An empty line may have commas.
                row = dict(zip(header, cells))
                if len(cells) != len(header):
                    faults.append(f"line {reader.line_num}: {len(cells)} cells, not {len(header)}")
                elif row["FileName"] in table:
                    faults.append(f"line {reader.line_num}: a second row of {row['FileName']!r}")
                else:
                    table[row["FileName"]] = row
        except (csv.Error, UnicodeError) as error:
            faults.append(f"line {reader.line_num} or later: {error}; save it as CSV in UTF-8")
    if faults:
        raise ValueError(f"'{path}' has to be corrected: {some(faults, 9)}")
    return table


def read_corpus(root, attributes=PAPER, scale=SCALE, splits=SPLITS):
    """Rows of a label file -> ([Utterance], problems), of some splits. A row of a split that is not
    in SPLITS is a problem, whichever are asked for. Problems are {what is wrong: [where]}; names
    and cells are quoted in it, as they may hold anything. The audio is not looked at. With `scale`
    None, labels stay as they are, NaN where they are no number. OSError or ValueError where the
    file cannot be read as a table."""
    low, high = scale or (0, 1)
    if not -1e9 < low < high < 1e9:
        raise ValueError(f"--scale {low} {high}: give two numbers, the least label first")
    folder = find(root, AUDIO_FOLDERS)
    columns = ["Split_Set", *("Emo" + ATTRIBUTES[a] for a in attributes)]
    utterances = []
    problems = defaultdict(list)
    for name, row in read_table(find(root, LABEL_FILES), columns).items():
        split, *cells = (row[column] for column in columns)
        split = OLD_SPLITS.get(split, split)
        labels = tuple(to_unit(cell, low, high) for cell in cells)
        if split not in SPLITS:
            kind = f"unknown split; Split_Set is to be one of {SPLITS}"
        elif split not in splits:
            continue
        elif "/" in name or "\0" in name or len(name) > 255:  # ../other.wav
            kind = "not the plain name of a file; correct FileName"
        elif scale and split != "Test3" and not all(0 <= unit <= 1 for unit in labels):
            kind = f"label missing, no number, or not from {low:g} to {high:g} (--scale)"
        else:
            utterances.append(Utterance(name, f"{folder}/{name}", split, labels))
            continue
        problems[kind].append(f"{split!r} {name!r} {cells}")
    return utterances, problems


def check_audio(utterances, sample_rate=16000):
    """Inspect every file -> ([Utterance with samples], {what is wrong: [where]}). OSError where the
    machine is at fault: no audio folder, no permission, too many open files."""
    good = []
    problems = defaultdict(list)
    files = {}
    for u in progress(utterances, "checking audio"):
        try:
            good.append(u._replace(samples=measure(u.path, sample_rate)))
        except ValueError as error:
            # Without the name of the file, all that are wrong in the same way have the same text.
            kind = str(error).removeprefix(f"{u.path!r}: ")
            problems[kind].append(f"{u.split!r} {u.name!r}")
        except (FileNotFoundError, IsADirectoryError):
            files = files or list_files(os.path.dirname(u.path))
            # In ASCII, because two Unicode forms of a name look the same.
            alike = files.get(simplify(u.name))
            where = f"{u.split!r} {u.name!r}: no such file, or a link to none; alike: {alike!a}"
            problems["missing audio"].append(where)
    return good, problems


def simplify(path):
    """The same text for files whose names differ only in suffix, case or Unicode form."""
    return unicodedata.normalize("NFC", Path(path).stem).casefold()


def list_files(folder):
    """{simplified name: path} of all audio files in the corpus whose audio folder `folder` is: what
    is missing there may be in a sub-folder, or in Audio where there is Audios, too. A link to
    nothing counts as a file, so it is found under its own name."""
    if not os.listdir(folder):  # this itself is an OSError where there is no folder
        raise FileNotFoundError(f"{folder} is empty; is its disk mounted?")
    paths = walk(os.path.dirname(folder))
    return {simplify(path): path for path in paths if path.lower().endswith(SUFFIXES)}


def some(items, most=3, between=", "):
    """The first few of many texts in one, and how many more there are."""
    shown = items[:most]
    if len(items) > most:
        shown.append(f"and {len(items) - most} more")
    return between.join(shown)


def usable(found, skip_bad=False, splits=()):
    """The utterances of what read_corpus or check_audio found, (utterances, problems). If there are
    problems: ValueError of one line, or with `skip_bad` a line on stderr. (Of several processes,
    stdout is the first one's only, but each may find other problems.) ValueError, too, where one of
    `splits` has no utterance."""
    utterances, problems = found
    if problems:
        kinds = [f"{len(places)} {kind} ({some(places)})" for kind, places in problems.items()]
        text = some(kinds, 9)
        if not skip_bad:
            remedy = "`python data.py ROOT` lists more, --skip-bad leaves them out"
            raise ValueError(f"{text}; {remedy}")
        print(f"skipped: {text}", file=sys.stderr)
    require(utterances, splits)
    return utterances


def require(utterances, splits, least=1):
    """ValueError where a split has fewer utterances than `least`. A CCC needs 2."""
    for split in splits:
        size = sum(u.split == split for u in utterances)
        if size < least:
            raise ValueError(
                f"split {split!r} has {size} usable utterances, and needs {least};"
                " `python data.py ROOT` shows those of all splits"
            )


# Of the second line nothing is read here. It is found in folders, so that an error names it.
SUFFIXES = tuple(
    str.split("""
    .wav .wave .flac .ogg .oga .opus .mp3 .mp2 .aif .aifc .aiff .au .snd .caf .w64 .rf64
    .m4a .m4b .mp4 .aac .webm .mka .amr .3gp .wma .ac3 .ape .wv .spx .sph .voc .tta .mpc""")
)


def walk(top, on_error=None):
    """Paths of a folder's files. Links are followed, but to no folder twice: one may lead back.
    `on_error` is called with the OSError of a folder that cannot be read."""
    seen = set()
    for folder, folders, names in os.walk(top, onerror=on_error, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            folders.clear()  # os.walk then goes no deeper here
            continue
        seen.add(place)
        folders.sort()
        for name in sorted(names):
            yield os.path.join(folder, name)


def find_audio(paths):
    """Unlabelled utterances of files, and of the audio in folders. If one folder is given, they
    have names relative to it, else their whole paths. What else is there is counted on stderr."""

    def fail(error):
        raise error  # Else the files of a folder that cannot be read would be left out silently.

    found = []
    others = Counter()
    for top in map(str, paths):
        if not os.path.isdir(top):
            found.append(Utterance(top, top))
            continue
        for path in walk(top, fail):
            name = os.path.relpath(path, top)
            hidden = "/." in f"/{name}"
            if hidden or not name.lower().endswith(SUFFIXES):
                others[Path(name).suffix or "without suffix"] += 1
            else:
                found.append(Utterance(name if len(paths) == 1 else path, path))
    if others:
        kinds = [f"{n} {suffix}" for suffix, n in others.most_common()]
        print(f"left out, hidden or no audio: {some(kinds, 9)}", file=sys.stderr)
    if not found:
        raise ValueError(f"{', '.join(map(str, paths))}: no audio files")
    return found


# ---- predictions, in the columns of a label file ----


def predictions_writer(file, attributes, scale, windows=False, labels=True):
    """Write the first line of predictions to an open text file -> write(utterance, units, bounds),
    which writes a row: FileName; with `windows` Start and End, the bounds in seconds; the A
    predictions; and with `labels` those of the utterance. `units` are predictions on 0 to 1. In the
    file, they and the labels are on the scale."""
    low, high = scale
    columns = [ATTRIBUTES[attribute] for attribute in attributes]
    header = ["FileName"]
    if windows:
        header += ["Start", "End"]
    header += columns
    if labels:
        header += [f"Emo{column}" for column in columns]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(header)

    def write(u, units, bounds=()):
        values = [low + (high - low) * unit for unit in [*units, *u.labels]]
        writer.writerow([u.name, *(f"{value:.6f}" for value in [*bounds, *values])])

    return write


# ---- what can be wrong with a sound file; a reader may skip this ----

# The containers in which libsndfile, or decoding, notices that the end of a file is missing.
CONTAINERS = str.split("WAV WAVEX RF64 W64 AIFF AU CAF FLAC OGG MP3")
# What libsndfile notes of a header that claims other sizes than its file has. A writer into a pipe
# cannot know them: ffmpeg claims 2**32 - 1, SoX about 2**31. Such sound ends with its file.
CLAIM = re.compile(
    r"(?m)^ *(?:data|SSND|riff|Riff size|Data Size) *: "
    r"(?!4294967295 |21[34]\d{7} )(\d+) \(should be (\d+)\)"
)
# What it notes of an OGG whose end is missing, or of which it skipped a damaged page, and of a WAV
# that has more sound than it counts.
DEFECTS = (
    "Last page lacks|Junk after the last page|reports a hole|Unknown chunk marker.*Exiting parser"
)
REWRITE = "`ffmpeg -i OLD NEW.wav` rewrites it"
FETCH = f"fetch it again, or if it plays to its end, {REWRITE}"
IGNORE = "(a WAV: `ffmpeg -ignore_length 1 -i OLD NEW.wav`)"


@contextmanager
def open_sound(source):
    """A path or an open binary file -> (SoundFile whose header is fit for use, the open file that
    it reads). Every ValueError while it is open gets the file's name."""
    is_path = isinstance(source, (str, os.PathLike))
    # Python opens the file: its OSErrors say what happened, and a name need not be UTF-8. The
    # library then reads from the number of the open file.
    with open(source, "rb", buffering=0) if is_path else nullcontext(source) as file:
        try:
            if not file.seekable():
                raise ValueError("a pipe; save it as a file first")
            content = without_tags(file)
            handle = file.fileno() if is_path and content is file else content
            with soundfile.SoundFile(handle, closefd=False) as sound:
                judge_header(sound)
                yield sound, content
        except (soundfile.SoundFileError, TypeError, ValueError) as error:
            # soundfile raises a TypeError for an open file whose name ends in .raw. And some
            # codecs, GSM for one, cannot seek, and so not be read in pieces.
            reason = f"damaged, no audio, or of a kind not read here, or in pieces; {FETCH}"
            if isinstance(error, ValueError):
                reason = error
            name = str(getattr(file, "name", "a file in memory"))
            raise ValueError(f"{name!r}: {reason}") from error


def without_tags(file):
    """An open file as it is or, if ID3v2 tags stand before its sound (a title, a cover), what
    follows them, in memory. With such tags, libsndfile estimates a greater length of an MP3, and
    does not find every place in a FLAC."""
    begin = 0
    while True:
        file.seek(begin)
        head = file.read(10)
        if not head.startswith(b"ID3"):
            break
        # The last four bytes of a tag's head have seven bits each of how many bytes follow it.
        begin += 10 + sum(byte << bit for byte, bit in zip(head[6:], (21, 14, 7, 0)))
    file.seek(begin)
    return io.BytesIO(file.read()) if begin else file


def judge_header(sound):
    """ValueError "reason; remedy" where a header, or what libsndfile noted about it, tells that
    the sound cannot be used."""
    rate = sound.samplerate
    frames = sound.frames
    claim = CLAIM.search(sound.extra_info)
    if not 1000 <= rate <= 384000:
        raise ValueError("impossible sample rate; correct its header")
    if frames == 0:
        raise ValueError(f"its header tells of no sound; {FETCH} {IGNORE}")
    if frames >= 2**40:  # This is how libsndfile tells that a header lacks the number.
        raise ValueError(f"its header does not tell its length; {REWRITE}")
    if sound.format not in CONTAINERS:
        raise ValueError(f"in {sound.format}, a missing end would not be noticed; {REWRITE}")
    # Less than .01 s is let pass, because some writers count the header itself as sound.
    if claim and (int(claim[1]) / int(claim[2]) - 1) * frames > 0.01 * rate:
        raise ValueError(f"truncated: its header tells of more sound; {FETCH}")
    if re.search(DEFECTS, sound.extra_info):
        raise ValueError(f"damaged, truncated, or longer than its header tells; {FETCH} {IGNORE}")


def read_blocks(sound, file, start=0.0, stop=None):
    """Yield the sound from `start` to `stop`, in seconds, as float32 (S, channels), a minute at a
    time. ValueError where a sample is not finite, or where all is read and ends elsewhere than the
    header says: too early, or before the file does."""
    rate = sound.samplerate
    first = round(start * rate)
    last = sound.frames if stop is None else min(round(stop * rate), sound.frames)
    if not 0 <= first < last:
        raise ValueError(f"it has no sound from {start} to {stop} s; give other times")
    # After a seek, an MP3's first frames are not decoded as they would be from its start. So a
    # second before them is decoded, too, and dropped.
    ahead = min(first, rate)
    if first:
        sound.seek(first - ahead)  # A SoundFileError for the few codecs that cannot.
    samples = 0
    for place in range(first - ahead, last, MAX_SECONDS * rate):
        block = sound.read(min(last - place, MAX_SECONDS * rate), "float32", always_2d=True)
        if not np.isfinite(block).all():
            raise ValueError("NaN or infinite samples; leave it out")
        if not len(block):
            break  # The header claims more, which is judged below.
        samples += len(block)
        yield block[ahead:]
        ahead = 0
    if last - first < sound.frames:
        return  # Only a piece was asked for, so the end cannot be judged.
    # Decoding may have ended at damage, before the length that the header says. Or sound is left
    # after that length: an MP3 may lack it, and libsndfile then estimates it from the first frame's
    # bit rate, and files may have been joined. If `decoded` bytes gave `samples`, the rest would
    # give samples * rest / decoded more.
    expected = samples
    decoded = file.tell()  # in bytes: libsndfile reads this very file, so it has read up to here
    rest = file.read()
    # A tag, of title and artist, is no sound. One of this kind tells its own length.
    if rest.startswith(b"APETAGEX"):
        rest = rest[32 + int.from_bytes(rest[12:16], "little") :]
    # In other containers more may follow than sound: in AIFF and CAF, chunks with names in ASCII.
    sure = ["MP3", "FLAC", "OGG", "AU"]
    if not re.match(rb"\0?(?!caff)[ -~]{4}", rest):
        sure += ["AIFF", "CAF"]
    if sound.format in sure:
        expected += samples * len(rest) / decoded
    # Of whole MP3s, libsndfile left up to .11 s in the files that were tried.
    if max(sound.frames - samples, expected - sound.frames) > 0.2 * rate:
        raise ValueError(f"truncated, joined, or damaged: its header tells another length; {FETCH}")


def measure(path, sample_rate=16000, limited=True):
    """A file's number of samples at `sample_rate`. PCM or ADPCM in WAV is judged by its header and
    size, which takes .1 ms; anything else is decoded. ValueError where it is too short for a model
    or, if `limited`, too long."""
    with open_sound(path) as (sound, file):
        samples = sound.frames
        rate = sound.samplerate
        if samples * sample_rate < MIN_SAMPLES * rate:
            raise ValueError(f"shorter than {1000 * MIN_SAMPLES / sample_rate:g} ms; leave it out")
        if limited and samples > MAX_SECONDS * rate:
            raise ValueError(
                f"longer than {MAX_SECONDS} s; cut it, or read pieces (`model.py predict --window`)"
            )
        if "WAV" not in sound.format or "PCM" not in sound.subtype:
            samples = sum(map(len, read_blocks(sound, file)))
        return math.ceil(samples * sample_rate / rate)


def is_constant(wave):
    """Whether a sound says nothing: digital silence, or two channels that cancel each other."""
    return np.ptp(wave) < 1e-4  # three steps of 16 bits


# ---- a synthetic corpus ----

VOWELS = ((700, 1200, 2500), (350, 2100, 2800), (400, 900, 2400), (500, 1600, 2500))  # formants, Hz
VOICES = ((95, 130), (170, 230))  # ranges of f0, Hz: of a man's voice, of a woman's
# Of each split, how many speakers, and how many utterances of each of them.
SPEAKERS = (("Train", 12, 32), ("Development", 4, 24), ("Test1", 4, 32))


def synthesize(activation, valence, voice, rng, sample_rate=16000):
    """Speech-like sound (S,) of a voice (f0 in Hz, formant scale), source and filter. Activation,
    0 to 1, raises pitch and syllable rate and flattens the spectral tilt; valence raises formants,
    as a smile does, widens intonation, shortens pauses and lessens breath."""
    f0, tract = voice
    syllables = []
    for _ in range(rng.integers(4, 7)):
        seconds = rng.uniform(0.8, 1.2) * (0.34 - 0.22 * activation)
        position = np.arange(int(seconds * sample_rate)) / sample_rate / seconds  # 0 to 1
        octaves = 0.9 * (activation - 0.5) + 0.5 * valence * (position - 0.5)
        phase = 2 * np.pi * np.cumsum(f0 * 2**octaves) / sample_rate
        breath = 0.3 * (1 - valence) * rng.normal(size=len(position))
        source = np.maximum(np.sin(phase), 0) ** 3 + breath  # glottal pulses and breath
        source = scipy.signal.lfilter([1, -1], [1, 0.7 * activation - 0.93], source)  # the tilt
        for formant in rng.choice(VOWELS) * tract * (0.8 + 0.4 * valence):
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
    rng = np.random.default_rng(seed)
    os.makedirs(f"{root}/Audios", exist_ok=True)
    os.makedirs(f"{root}/Labels", exist_ok=True)
    rows = ["FileName,EmoAct,EmoVal,EmoDom,SpkrID,Split_Set"]
    speaker = 0
    for split, n_speakers, n in speakers:
        for _ in range(n_speakers):
            speaker += 1
            f0 = rng.uniform(*VOICES[speaker % 2])
            voice = f0, rng.uniform(0.95, 1.05) + 0.1 * (speaker % 2)
            for i in range(n):
                units = rng.uniform(0, 1, 2)  # activation, valence
                name = f"DEMO_{speaker:04}_{i:04}.wav"
                soundfile.write(f"{root}/Audios/{name}", synthesize(*units, voice, rng), 16000)
                act, val = np.clip(1 + 6 * units + 0.3 * rng.normal(size=2), 1, 7)
                dom = 0.7 * act + 0.3 * val
                rows.append(f"{name},{act:.3f},{val:.3f},{dom:.3f},{speaker},{split}")
    Path(f"{root}/Labels/labels_consensus.csv").write_text("\n".join(rows) + "\n")


def write_encoder(folder, width=64, channels=32):
    """A tiny random wav2vec 2.0 in the Hugging Face layout, with the base's preprocessor config."""
    import transformers

    transformers.logging.disable_progress_bar()
    torch.manual_seed(0)
    config = transformers.Wav2Vec2Config(
        hidden_size=width,
        intermediate_size=2 * width,
        conv_dim=(channels,) * 7,
        num_conv_pos_embeddings=16,
        num_conv_pos_embedding_groups=4,
        num_hidden_layers=4,
        num_attention_heads=1,  # as wide as the base's: 64
    )
    transformers.Wav2Vec2Model(config).save_pretrained(folder)
    transformers.Wav2Vec2FeatureExtractor().save_pretrained(folder)  # 16 kHz, normalised


@contextmanager
def new_folder(path):
    """The path of a folder to make, which becomes `path` at the end: whole, or not at all. OSError
    where there is something already, except an empty folder, and where it cannot be filled."""
    path = Path(path)
    if path.exists() and os.listdir(path):
        raise FileExistsError(f"'{path}' is not empty: give the name of a new folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".new-", dir=path.parent) as folder:
        made = Path(folder, "made")
        try:
            yield made
        except Exception as error:  # Of a full disk, soundfile and safetensors raise their own.
            raise OSError(f"cannot write '{path}': {error}") from error
        made.rename(path)


def make_demo(root):
    """The synthetic corpus, and root/encoder, in a new folder."""
    with new_folder(root) as folder:
        write_demo(folder)
        write_encoder(folder / "encoder")


# ---- command line ----


def print_splits(good, labelled, low, high):
    """A line a split: usable utterances, hours, the least and the greatest label of activation and
    of valence, usable or not. Where labels lie beyond the scale, or all stay far below its end, it
    is probably another one: a note says so."""
    every = []
    for split in SPLITS:
        part = [u for u in good if u.split == split]
        labels = np.array([u.labels for u in labelled if u.split == split])  # (N, A)
        if not len(labels):
            continue
        hours = sum(u.samples for u in part) / 16000 / 3600
        line = f"{split:12}{len(part):8,} utterances{hours:8.2f} h"
        for attribute, column in zip(PAPER, labels.T):
            known = column[np.isfinite(column)]
            if len(known):  # Those of Test3 are withheld.
                line += f"  {attribute} {known.min():g} to {known.max():g}"
                every += known.tolist()
        print(line)
    least = math.floor(min(every, default=low))
    greatest = math.ceil(max(every, default=high))
    if least < low or not low + 0.75 * (high - low) < greatest <= high:
        print(f"note: labels lie from {least} to {greatest}: is that --scale {least} {greatest}?")


def main(argv=None):
    parser = argparse.ArgumentParser(
        description="Check a corpus (activation, valence), or write one."
    )
    parser.add_argument("root", help="folder with Audios/ and Labels/; with --demo, a new one")
    parser.add_argument("--demo", action="store_true", help="write a synthetic corpus and encoder")
    parser.add_argument("--scale", nargs=2, type=float, default=SCALE, help="least, greatest label")
    args = parser.parse_args(argv)
    if args.demo:
        make_demo(args.root)
        print(f"wrote {args.root} and {args.root}/encoder")
        return
    utterances, bad_rows = read_corpus(args.root, scale=args.scale)
    good, bad_files = check_audio(utterances)
    problems = bad_rows | bad_files
    labelled, _ = read_corpus(args.root, scale=None)
    print_splits(good, labelled, *args.scale)
    listened = progress(good, "listening")
    constant = [repr(u.name) for u in listened if is_constant(load_audio(u.path))]
    if constant:
        print(f"note: silence, or channels that cancel each other: {some(constant)}")
    for kind, places in problems.items():
        print(f"{kind}: {len(places)}", some(places, 20, "\n  "), sep="\n  ")
    if problems:
        sys.exit(1)
    require(good, SPLITS[:3], least=2)  # what train.py needs, in one process
    print("no problems")


if __name__ == "__main__":
    from ccc import shell

    shell(main)
