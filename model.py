"""wav2vec 2.0 with two heads, as `suffix(prefix(x))`: freezing, LoRA, saving, and the two kinds of
padding (section IV).

Everything above `predict` stands alone: copy it. As a command:

    python model.py predict RUN clip.wav folder/ --csv predictions.csv   # imports data.py
    python model.py export RUN OUT                                # a folder that Hugging Face loads
    python model.py params --model facebook/wav2vec2-base         # trainable parameters of Table I
"""

import argparse
import copy
import csv
import hashlib
import math
import sys
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import nn
from torch.nn import functional as F
from transformers import (
    AutoConfig,
    AutoFeatureExtractor,
    AutoModel,
    Wav2Vec2ForSequenceClassification,
    Wav2Vec2Model,
)

ATTRIBUTES = ("activation", "valence")


class EmotionModel(nn.Module):
    """An encoder, mean pooling, dropout and one linear head an attribute (section IV-A).

    encoder : transformers' Wav2Vec2Model.
    padding : what batch-mates do to a prediction.
      "paper": inputs are zero-padded to the longest of the batch, nothing is masked, and the mean
               runs over padded frames too (section IV-B), so a prediction depends on its batch.
      "exact": the CNN sees each waveform alone, because its GroupNorm runs over time; padded
               frames are zero before the positional convolution, masked in attention and left out
               of the mean. Batched = alone.

    `frozen` is all that comes before the first trainable parameter, without gradient; `trained` the
    rest. Where they meet is `cut`, set by `freeze`: a transformer layer, or None where only the CNN
    is frozen. LayerDrop and SpecAugment are left out (our choice: behind a cache there is nothing
    left for SpecAugment to mask, and every row should train the same way).
    """

    def __init__(self, encoder, dropout=0.2, padding="paper"):
        super().__init__()
        self.encoder = encoder
        self.dropout = nn.Dropout(dropout)
        self.activation = nn.Linear(encoder.config.hidden_size, 1)
        self.valence = nn.Linear(encoder.config.hidden_size, 1)
        self.padding = padding
        self.cut = None

    def train(self, mode=True):
        """Train mode for parts with anything trainable in them, a layer with LoRA adapters too;
        frozen parts stay in eval mode: their output for an utterance does not change (section
        IV-C)."""
        super().train(mode)
        encoder = self.encoder.encoder
        front = self.encoder.feature_extractor, self.encoder.feature_projection
        for part in (*front, encoder.pos_conv_embed, encoder.layer_norm, *encoder.layers):
            part.train(mode and any(p.requires_grad for p in part.parameters()))
        encoder.dropout.train(encoder.layer_norm.training)
        return self

    def frames(self, samples):
        """Frames (B,) that the convolutions make of `samples` (B,); also of a plain int."""
        config = self.encoder.config
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    @torch.no_grad()
    def features(self, wave, samples):
        """The CNN, frozen in every method: wave (B, S) float, samples (B,) int -> features (B, T, C),
        frames (B,)."""
        cnn, frames = self.encoder.feature_extractor, self.frames(samples)
        if self.padding == "paper" or self.encoder.config.feat_extract_norm == "layer":
            return cnn(wave).transpose(1, 2), frames
        features = None
        for length in samples.unique().tolist():  # a pass each: no waveform meets padding
            rows = samples == length
            part = cnn(wave[rows, :length]).transpose(1, 2)  # (rows, T, C)
            if features is None:
                features = part.new_zeros(len(wave), int(frames.max()), part.shape[2])
            features[rows, : part.shape[1]] = part
        return features, frames

    def embed(self, features, frames):
        """Projection, positional convolution and LayerNorm: features (B, T, C) -> (B, T, D), the
        hidden states before layer 0."""
        encoder = self.encoder.encoder
        hidden, _ = self.encoder.feature_projection(features)
        if self.padding == "exact":  # the convolution pads with zeros itself
            hidden = hidden * self.is_frame(hidden, frames)[..., None]
        return encoder.dropout(encoder.layer_norm(hidden + encoder.pos_conv_embed(hidden)))

    def is_frame(self, hidden, frames):
        """(B, T) bool: True for frames of the utterance, False for padding."""
        return torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]

    def run_layers(self, hidden, frames, first, last):
        """Transformer layers first..last-1: (B, T, D) -> (B, T, D)."""
        mask = None
        if self.padding == "exact" and int(frames.min()) < hidden.shape[1]:
            mask = hidden.new_zeros(len(hidden), 1, 1, hidden.shape[1])  # (B, heads, queries, keys)
            mask.masked_fill_(~self.is_frame(hidden, frames)[:, None, None], -math.inf)
        for layer in self.encoder.encoder.layers[first:last]:
            hidden = layer(hidden, attention_mask=mask)
        return hidden

    def prefix(self, wave, samples, layer):
        """All before transformer layer `layer`: wave (B, S) float, samples (B,) -> hidden states
        (B, T, D), frames (B,)."""
        features, frames = self.features(wave, samples)
        return self.run_layers(self.embed(features, frames), frames, 0, layer), frames

    def suffix(self, hidden, frames, layer):
        """All from transformer layer `layer` on: hidden (B, T, D), frames (B,) -> (B, 2), activation
        and valence on the scale 0 to 1, unbounded."""
        hidden = self.run_layers(hidden, frames, layer, None)
        if self.padding == "exact":
            hidden = hidden * self.is_frame(hidden, frames)[..., None]
            pooled = hidden.sum(1) / frames[:, None]  # (B, D)
        else:
            pooled = hidden.mean(1)
        pooled = self.dropout(pooled)
        return torch.cat([self.activation(pooled), self.valence(pooled)], dim=1)

    @torch.no_grad()
    def frozen(self, wave, samples):
        """Up to the first trainable parameter: wave (B, S), samples (B,) -> the input of
        `trained`."""
        if self.cut is None:
            return self.features(wave, samples)
        return self.prefix(wave, samples, self.cut)

    def trained(self, hidden, frames):
        """From the first trainable parameter on -> (B, 2). A cache stores this function's input."""
        if self.cut is None:
            return self.suffix(self.embed(hidden, frames), frames, 0)
        return self.suffix(hidden, frames, self.cut)

    def forward(self, wave, samples):
        return self.trained(*self.frozen(wave, samples))


class LoRALinear(nn.Module):
    """base(x) + alpha / rank * B A dropout(x), base frozen (Hu et al. 2021; section IV-B: rank 8,
    alpha 16, dropout .1).

    lora_a (rank, in) starts random, lora_b (out, rank) at zero: until the first step the output is
    the base's.
    """

    def __init__(self, base, rank=8, alpha=16, dropout=0.1):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_a = nn.Parameter(base.weight.new_empty(rank, base.in_features))
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))  # as nn.Linear initialises its weight
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, x):
        low = F.linear(self.dropout(x), self.lora_a)  # (..., rank)
        return self.base(x) + self.scale * F.linear(low, self.lora_b)

    @torch.no_grad()
    def merge(self):
        """A plain nn.Linear that computes the same, dropout off."""
        merged = copy.deepcopy(self.base)
        merged.weight += self.scale * self.lora_b @ self.lora_a
        return merged


def freeze(model, method, layers=None, freeze_prefix=False, rank=8, alpha=16, lora_dropout=0.1):
    """Choose what is trained, by requires_grad. The heads always are, the CNN never is (section
    IV-A).

    method  "full": all transformer layers and what lies between CNN and layer 0;
            "partial": the last `layers` transformer layers, and, as the paper's parameter counts
            say, what lies between CNN and layer 0, unless `freeze_prefix`, which a cache needs;
            "lora": adapters on q and v of the last `layers` layers (None: of all), everything else
            frozen.
    Raises ValueError where `layers` does not fit the encoder.
    """
    encoder = model.encoder.encoder
    depth = len(encoder.layers)
    layers = depth if layers is None else layers
    if not 1 <= layers <= depth:
        raise ValueError(f"--layers {layers}: this encoder has transformer layers 1 to {depth}")
    model.encoder.requires_grad_(False)
    model.cut = depth - layers
    if method == "lora":
        for layer in encoder.layers[model.cut :]:
            for name in ("q_proj", "v_proj"):
                base = getattr(layer.attention, name)
                setattr(layer.attention, name, LoRALinear(base, rank, alpha, lora_dropout))
        return
    encoder.layers[model.cut :].requires_grad_(True)
    if not freeze_prefix:
        for part in (model.encoder.feature_projection, encoder.pos_conv_embed, encoder.layer_norm):
            part.requires_grad_(True)
        model.cut = None


def from_pretrained(auto, name, **options):
    """auto.from_pretrained, never running code from the folder, with advice in one line where
    nothing can be loaded (OSError)."""
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # whatever a foreign or damaged folder makes of the reader
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise OSError(
            f"cannot load {name}: {reason} Without network, give the folder of a downloaded "
            "checkpoint: --model FOLDER (config.json, preprocessor_config.json and the weights)"
        ) from error


def load_encoder(name):
    """Hub id or local folder -> (Wav2Vec2Model in float32, {"sample_rate": Hz, "normalise": bool}).

    The checkpoint's own preprocessor settings are used. Raises ValueError for a checkpoint that
    lacks a weight or is of an architecture that is not built yet, OSError with advice where nothing
    can be loaded.
    """
    config = from_pretrained(AutoConfig, name)
    if config.model_type != "wav2vec2" or config.do_stable_layer_norm or config.add_adapter:
        raise ValueError(
            f"{name}: only wav2vec2 of the base kind (LayerNorm after each block) is supported"
        )
    encoder, report = from_pretrained(
        AutoModel, name, dtype=torch.float32, attn_implementation="sdpa", output_loading_info=True
    )
    audio = from_pretrained(AutoFeatureExtractor, name)
    missing = [*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])]
    if missing:
        raise ValueError(f"{name}: lacks {len(missing)} weights, the first {min(missing)}")
    return encoder, {"sample_rate": audio.sampling_rate, "normalise": audio.do_normalize}


def weights_hash(encoder):
    """SHA-256 over names and values of all weights: says whether two encoders are the same."""
    digest = hashlib.sha256()
    for name, tensor in sorted(encoder.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy())
    return digest.hexdigest()


def build(settings):
    """(EmotionModel frozen as `settings` say, audio settings, hash of the pretrained encoder).

    settings : mapping with model, padding, dropout, method, layers, freeze_prefix, rank, alpha,
    lora_dropout.
    """
    encoder, audio = load_encoder(settings["model"])
    digest = weights_hash(encoder)
    model = EmotionModel(encoder, settings["dropout"], settings["padding"])
    keys = ("method", "layers", "freeze_prefix", "rank", "alpha", "lora_dropout")
    freeze(model, **{key: settings[key] for key in keys})
    return model, audio, digest


def trainable(model):
    """{name: parameter} of all that is trained; heads included."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def load_trainable(model, weights):
    """Copy saved trainable weights into a model frozen the same way. Raises ValueError if the names
    differ."""
    parameters = trainable(model)
    if parameters.keys() != weights.keys():
        raise ValueError("the saved weights are of another method or number of layers")
    for name, parameter in parameters.items():
        parameter.copy_(weights[name])


def read_checkpoint(path, *keys):
    """Entries of a file that train.py saved, as mapped tensors; nothing else is unpickled.
    ValueError for other files."""
    try:
        saved = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        return [saved[key] for key in keys]
    except Exception as error:  # whatever a foreign or damaged file makes of the reader
        raise ValueError(
            f"{path} is not a checkpoint of this project, or damaged: {type(error).__name__}"
        ) from error


def load_run(run):
    """A trained run's best epoch -> (EmotionModel in eval mode, audio settings). best.pt holds what
    was trained; the frozen rest comes from the same encoder as in training, or it is a
    ValueError."""
    path = Path(run, "best.pt")
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; give a run that has finished an epoch")
    settings, weights, expected = read_checkpoint(path, "settings", "weights", "encoder")
    model, audio, digest = build(settings)
    if digest != expected:
        raise ValueError(f"{path} was trained from another encoder than {settings['model']} is now")
    load_trainable(model, weights)
    return model.eval(), audio


def predict(args):
    """FileName, Act, Val (scale 1 to 7), Act01, Val01 (scale 0 to 1) of audio files, a line as soon
    as it is known. Each is predicted alone, so no prediction depends on another file. FileName is
    relative to the folder given, as in a label file."""
    import data  # the command's own need, not the part to copy

    files = []  # (FileName, path)
    for path in map(Path, args.audio):
        inside = sorted(path.rglob("*")) if path.is_dir() else []
        inside = [f for f in inside if f.suffix.lower() in data.AUDIO_SUFFIXES]
        found = [(f.relative_to(path), f) for f in inside]
        if path.is_dir() and not found:
            raise ValueError(f"{path}: no audio files ({', '.join(data.AUDIO_SUFFIXES)}) in it")
        files += found or [(path.name, path)]
    if args.csv and not Path(args.csv).absolute().parent.is_dir():
        raise ValueError(f"--csv {args.csv}: its folder does not exist; make it first")
    model, audio = load_run(args.run)
    for _, path in files:  # all of them, before --csv is touched
        try:
            data.inspect_audio(path)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model.to(device)
    with open(args.csv, "w", newline="") if args.csv else nullcontext(sys.stdout) as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(["FileName", "Act", "Val", "Act01", "Val01"])
        for name, path in files:
            wave = data.load_audio(path, audio["sample_rate"])
            wave = torch.from_numpy(data.normalise(wave) if audio["normalise"] else wave).to(device)
            with torch.no_grad():
                unit = model(wave[None], torch.tensor([len(wave)], device=device))[0].tolist()
            scaled = (f"{1 + 6 * x:.4f}" for x in unit)
            writer.writerow([name, *scaled, *(f"{x:.6f}" for x in unit)])


def export(args):
    """Save a run as Wav2Vec2ForSequenceClassification: our pooling and heads are its identity
    projector and classifier. Its logits are activation and valence on the scale 0 to 1; LoRA is
    merged."""
    model, audio = load_run(args.run)
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise ValueError(f"{args.out} exists and is not empty; give a new folder")
    for layer in model.encoder.encoder.layers:
        for name in ("q_proj", "v_proj"):
            linear = getattr(layer.attention, name)
            if isinstance(linear, LoRALinear):
                setattr(layer.attention, name, linear.merge())
    config = model.encoder.config
    config.update({"classifier_proj_size": config.hidden_size, "use_weighted_layer_sum": False})
    config.update({"num_labels": len(ATTRIBUTES), "problem_type": "regression"})
    config.id2label = dict(enumerate(ATTRIBUTES))
    config.label2id = {name: i for i, name in enumerate(ATTRIBUTES)}
    exported = Wav2Vec2ForSequenceClassification(config)
    exported.wav2vec2.load_state_dict(model.encoder.state_dict())
    heads = model.activation, model.valence
    with torch.no_grad():
        exported.projector.weight.copy_(torch.eye(config.hidden_size))
        exported.projector.bias.zero_()
        exported.classifier.weight.copy_(torch.cat([head.weight for head in heads]))
        exported.classifier.bias.copy_(torch.cat([head.bias for head in heads]))
    exported.save_pretrained(args.out)
    AutoFeatureExtractor.from_pretrained(
        model.encoder.config._name_or_path,
        do_normalize=audio["normalise"],
        sampling_rate=audio["sample_rate"],
    ).save_pretrained(args.out)
    print(f"{args.out}: AutoModelForAudioClassification.from_pretrained({args.out!r}) loads it")


def params(args):
    """Print trainable parameters of every row of Table I; needs the encoder's config.json only."""
    config = from_pretrained(AutoConfig, args.model)
    depth = config.num_hidden_layers
    rows = [("full", depth, False)]
    rows += [("partial", n, frozen) for frozen in (False, True) for n in (3, 2, 1) if n <= depth]
    rows += [("lora", depth, False)]
    print(f"{'method':8} {'layers':>6} {'prefix':>8} {'trainable':>12} {'of encoder':>10}")
    for method, layers, frozen in rows:
        with torch.device("meta"):  # shapes only, no memory
            model = EmotionModel(Wav2Vec2Model(config))
            total = sum(p.numel() for p in model.encoder.parameters())
            freeze(model, method, layers, frozen)
        count = sum(p.numel() for p in trainable(model).values())
        prefix = "frozen" if frozen or method == "lora" else "trained"
        print(f"{method:8} {layers:6} {prefix:>8} {count:12,} {count / total:10.1%}")


def main(argv=None):
    parser = argparse.ArgumentParser(
        usage="python model.py {predict,export,params} ... (--help for all)",
        description="Predict with a run, export it, or count what each row of Table I trains.",
    )
    commands = parser.add_subparsers(required=True)
    command = commands.add_parser("predict", help="predict audio files with a trained run")
    command.add_argument("run", help="a run folder of train.py")
    command.add_argument("audio", nargs="+", help="audio files of any kind, or folders of them")
    command.add_argument("--csv", help="write here instead of the terminal")
    command.set_defaults(function=predict)
    command = commands.add_parser("export", help="write a Hugging Face folder")
    command.add_argument("run", help="a run folder of train.py")
    command.add_argument("out", help="a new folder")
    command.set_defaults(function=export)
    command = commands.add_parser("params", help="trainable parameters of every row of Table I")
    command.add_argument("--model", default="facebook/wav2vec2-base", help="hub id or local folder")
    command.set_defaults(function=params)
    for command in commands.choices.values():
        command.usage = parser.usage  # one line
        command.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_args(argv)
    try:
        args.function(args)
    except (ValueError, OSError) as error:
        if args.debug:
            raise
        parser.error(str(error))


if __name__ == "__main__":
    main()
