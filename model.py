"""A speech encoder with a head that predicts emotion, as `trained(frozen(x))`: freezing, LoRA, two
kinds of padding, loading and saving (section IV). Everything above `predict` stands alone: copy it.

    python model.py predict RUN clip.wav folder/ --csv predictions.csv    # imports data.py
    python model.py export RUN OUT    # a folder that Hugging Face loads
    python model.py params            # trainable parameters of every row of Table I
"""

import argparse
import copy
import csv
import hashlib
import json
import math
import sys
from pathlib import Path
from types import MethodType

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

FAMILIES = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")
DROPOUTS = ["attention_dropout", "hidden_dropout", "activation_dropout", "feat_proj_dropout"]
# what a config.json says, beside the shapes of the weights, that changes a number
SETTINGS = ["model_type", "num_attention_heads", "layer_norm_eps", "hidden_act"]
SETTINGS += ["feat_extract_activation", "feat_extract_norm", "do_stable_layer_norm"]
SETTINGS += ["max_bucket_distance", "conv_stride", *DROPOUTS]


class EmotionModel(nn.Module):
    """An encoder of transformers (one of FAMILIES), mean pooling, dropout and a linear head with a
    column an attribute (section IV-A).

    "paper" padding: inputs are zero-padded to the longest of the batch, nothing is masked, and the
        mean is over padded frames too (IV-B), so a prediction depends on its batch.
    "exact": the CNN sees each waveform alone where it normalises over time; padded frames are zero
        before the positional convolution, masked in attention, not in the mean: batched = alone.

    `frozen` is all before `cut`, `trained` the rest; a cache is a stored `frozen`. `cut` is the
    transformer layer of the first trainable parameter, or None where that lies before layer 0
    (`freeze` sets it); with a cache of more layers it is an earlier one. SpecAugment, layer drop
    and checkpointing are off, whatever config.json says (our choice: no cache could have them).
    """

    def __init__(self, encoder, attributes=("activation", "valence"), dropout=0.2, padding="paper"):
        super().__init__()
        if padding not in ("paper", "exact"):
            raise ValueError(f'padding is "paper" or "exact", not {padding!r}')
        self.encoder, self.attributes, self.padding = encoder, tuple(attributes), padding
        self.dropout, self.cut = nn.Dropout(dropout), None
        self.head = nn.Linear(encoder.config.hidden_size, len(self.attributes))
        # the encoder's LayerNorm is before layer 0, in most large models after the last layer
        self.norm_last = encoder.config.do_stable_layer_norm
        norm = [] if self.norm_last else [encoder.encoder.layer_norm]
        self.before_layers = [encoder.feature_projection, encoder.encoder.pos_conv_embed, *norm]
        self.is_wavlm = encoder.config.model_type == "wavlm"
        for layer in encoder.encoder.layers:
            layer.gradient_checkpointing = False
            attend = MethodType(wavlm_attention, layer.attention)
            layer.attention.torch_multi_head_self_attention = attend  # read by WavLM only
        if not self.is_wavlm:
            encoder.set_attn_implementation("sdpa")  # which takes the mask as booleans

    def train(self, mode=True):
        """Train mode for parts that hold a trainable parameter. Frozen parts stay in eval mode, so
        that what lies before `cut` gives an utterance the same at every epoch (IV-C)."""
        super().train(mode)
        encoder = self.encoder.encoder
        for part in (self.encoder.feature_extractor, *self.before_layers, *encoder.layers):
            part.train(mode and any(p.requires_grad for p in part.parameters()))
        encoder.dropout.train(encoder.pos_conv_embed.training)
        return self

    def frames(self, samples):
        """Frames that the CNN makes of a number of samples, both int: one of 400 every 320."""
        config = self.encoder.config
        for kernel, stride in zip(config.conv_kernel, config.conv_stride, strict=True):
            samples = (samples - kernel) // stride + 1
        return samples

    def features(self, wave, samples):
        """The CNN, frozen in every row: (B, S) -> (B, T, C)."""
        cnn = self.encoder.feature_extractor
        if self.padding == "paper" or self.encoder.config.feat_extract_norm == "layer":
            return cnn(wave).transpose(1, 2)
        # its GroupNorm runs over time, so zeros after a waveform would change every frame of it
        alone = [cnn(wave[i : i + 1, :n])[0].T for i, n in enumerate(samples)]  # (T, C) each
        return pad_sequence(alone, batch_first=True)

    def mask(self, hidden, frames):
        """(B, T) bool, False in padding; None in "paper" padding, or where there is no padding."""
        if self.padding == "paper" or min(frames) == hidden.shape[1]:
            return None
        frames = torch.tensor(frames).to(hidden.device, non_blocking=True)
        return torch.arange(hidden.shape[1], device=hidden.device) < frames[:, None]

    def embed(self, features, mask):
        """Projection, positional convolution, LayerNorm (unless last): (B, T, C) -> (B, T, D)."""
        encoder = self.encoder.encoder
        hidden = self.encoder.feature_projection(features)
        hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # by family
        if mask is not None:
            # the projection's bias is in padded frames too, and the convolution would carry it into
            # true ones; alone, an utterance has zeros there: the convolution's own padding
            hidden = hidden * mask[..., None]
        hidden = hidden + encoder.pos_conv_embed(hidden)
        return encoder.dropout(hidden if self.norm_last else encoder.layer_norm(hidden))

    def run_layers(self, hidden, mask, first, last):
        """Transformer layers first to last - 1: (B, T, D) -> (B, T, D)."""
        layers, more = self.encoder.encoder.layers, {}
        if self.is_wavlm:  # layer 0 has the table of position biases for all; each layer gates them
            bias = layers[0].attention.compute_bias(hidden.shape[1], hidden.shape[1])
            more["position_bias"] = bias.repeat(len(hidden), 1, 1)  # (B heads, T, T)
        if mask is not None:
            mask = mask[:, None, None]  # (B, 1, 1, T): for all heads and queries
        for layer in layers[first:last]:
            hidden = layer(hidden, attention_mask=mask, **more)
            hidden = hidden[0] if isinstance(hidden, tuple) else hidden  # by family
        return hidden

    @torch.no_grad()
    def frozen(self, wave, samples):
        """Wave (B, S) float, samples B ints -> hidden states before layer `cut` (B, T, D) or, if
        `cut` is None, the CNN's features (B, T, C); frames, B ints. All of it is frozen. Lengths
        stay plain ints, so nothing waits for a GPU to tell them."""
        frames = [self.frames(n) for n in samples]
        features = self.features(wave, samples)
        if self.cut is None:
            return features, frames
        mask = self.mask(features, frames)
        return self.run_layers(self.embed(features, mask), mask, 0, self.cut), frames

    def trained(self, hidden, frames):
        """What `frozen` returns -> (B, A), a column an attribute, on the scale 0 to 1."""
        mask = self.mask(hidden, frames)
        if self.cut is None:
            hidden = self.embed(hidden, mask)
        hidden = self.run_layers(hidden, mask, self.cut or 0, None)
        if self.norm_last:
            hidden = self.encoder.encoder.layer_norm(hidden)
        if mask is None:
            return self.head(self.dropout(hidden.mean(1)))
        pooled = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)  # (B, D)
        return self.head(self.dropout(pooled))

    def forward(self, wave, samples):
        return self.trained(*self.frozen(wave, samples))


def wavlm_attention(attention, hidden, mask, position_bias):
    """WavLM's attention of hidden (B, T, D) with its gated bias (B heads, T, T). Transformers' own
    reads the weights of q_proj and v_proj past their forward, and so past LoRA's."""
    projections = attention.q_proj, attention.k_proj, attention.v_proj
    split = [p(hidden).unflatten(2, (attention.num_heads, -1)).transpose(1, 2) for p in projections]
    bias = position_bias.unflatten(0, (len(hidden), -1))  # (B, heads, T, T)
    if mask is not None:  # after the gate, whose gradient would else be 0 * -inf
        bias = bias.masked_fill(~mask, -math.inf)
    dropout = attention.dropout if attention.training else 0.0
    mixed = F.scaled_dot_product_attention(*split, bias, dropout)  # (B, heads, T, D / heads)
    return attention.out_proj(mixed.transpose(1, 2).flatten(2)), None


class LoRALinear(nn.Module):
    """base(x) + alpha / rank * B A dropout(x), base frozen (Hu et al. 2021; section IV-B). A,
    lora_a (rank, in), starts random, B, lora_b (out, rank), at 0: the output starts as base's."""

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
    """Choose what is trained, by requires_grad, and set `model.cut`. The head always is, the CNN
    never (section IV-A). ValueError for another method, or where `layers` does not fit.

    "full": all transformer layers and what lies between the CNN and layer 0.
    "partial": the last `layers` transformer layers and, as the paper's parameter counts say, what
        lies between the CNN and layer 0, unless `freeze_prefix`, which a cache needs.
    "lora": adapters on q and v of the last `layers` layers (None: all), all else frozen.
    """
    encoder = model.encoder.encoder
    depth = len(encoder.layers)
    layers = depth if layers is None else layers
    if method not in ("full", "partial", "lora"):
        raise ValueError(f'method is "full", "partial" or "lora", not {method!r}')
    if not (layers == depth if method == "full" else 1 <= layers <= depth):
        raise ValueError(f"{method}, {layers} layers: this encoder has 1 to {depth}, full all")
    model.encoder.requires_grad_(False)
    model.cut = depth - layers
    if method == "lora":
        for layer in encoder.layers[model.cut :]:
            for name in ("q_proj", "v_proj"):
                base = getattr(layer.attention, name)
                setattr(layer.attention, name, LoRALinear(base, rank, alpha, lora_dropout))
        return
    encoder.layers[model.cut :].requires_grad_(True)
    if model.norm_last:
        encoder.layer_norm.requires_grad_(True)
    if not freeze_prefix:
        for part in model.before_layers:
            part.requires_grad_(True)
        model.cut = None


def trainable(model):
    """{name: parameter} of all that is trained, head included."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def from_pretrained(auto, name, **options):
    """auto.from_pretrained, quietly, never running code of a folder. OSError of one line."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    try:
        return auto.from_pretrained(name, trust_remote_code=False, **options)
    except Exception as error:  # whatever a foreign or damaged folder makes of the reader
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise OSError(f"cannot load {name}: {reason}") from error


def load_encoder(name):
    """Hub id or local folder -> (encoder in float32, {"sample_rate": Hz, "normalise": bool} of its
    preprocessor). ValueError for what no row can be trained from, OSError if nothing loads."""
    config = from_pretrained(transformers.AutoConfig, name)
    odd = [key for key in ("add_adapter", "conv_pos_batch_norm") if getattr(config, key, False)]
    if odd or config.model_type not in FAMILIES:
        raise ValueError(f"{name}: {' '.join([config.model_type, *odd])} is not one of {FAMILIES}")
    options = {"dtype": torch.float32, "output_loading_info": True, "ignore_mismatched_sizes": True}
    encoder, report = from_pretrained(transformers.AutoModel, name, **options)
    lacking = {*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])}
    if lacking := lacking - {"masked_spec_embed"}:  # SpecAugment's, which nothing here uses
        raise ValueError(f"{name}: {len(lacking)} weights missing or misshapen: {min(lacking)}, …")
    if broken := [key for key, x in encoder.state_dict().items() if not x.isfinite().all()]:
        raise ValueError(f"{name}: NaN or infinity in {broken[0]}")
    audio = from_pretrained(transformers.AutoFeatureExtractor, name)
    if not audio.sampling_rate:
        raise ValueError(f"{name}: preprocessor_config.json lacks sampling_rate")
    return encoder, {"sample_rate": audio.sampling_rate, "normalise": bool(audio.do_normalize)}


def describe(model, audio):
    """One line: what was loaded, and how much of it is trained."""
    config, size = model.encoder.config, sum(p.numel() for p in model.parameters())
    shape = f"{config.num_hidden_layers} layers of width {config.hidden_size}, {size:,} parameters"
    trained = sum(p.numel() for p in trainable(model).values())
    settings = audio | {key: getattr(config, key) for key in DROPOUTS}
    return f"{config.model_type}: {shape}, {trained:,} of them trained, {settings}"


def identity(encoder):
    """SHA-256 of all that an encoder's numbers come from: its weights and its configuration."""
    settings = {key: getattr(encoder.config, key, None) for key in SETTINGS}
    digest = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        if name != "masked_spec_embed":
            digest.update(name.encode() + tensor.cpu().numpy().tobytes())
    return digest.hexdigest()


def build(name, settings):
    """Load, wrap and freeze by `settings` -> (EmotionModel, audio settings, encoder's identity)."""
    encoder, audio = load_encoder(name)
    digest = identity(encoder)
    pick = lambda *keys: {key: settings[key] for key in keys if key in settings}
    model = EmotionModel(encoder, **pick("attributes", "dropout", "padding"))
    freeze(model, **pick("method", "layers", "freeze_prefix", "rank", "alpha", "lora_dropout"))
    return model, audio, digest


def read_checkpoint(path, *keys):
    """Entries of a file of train.py. Only tensors are unpickled; ValueError for other files."""
    try:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        return [saved[key] for key in keys]
    except Exception as error:  # whatever a foreign or damaged file makes of the reader
        raise ValueError(f"{path}: no file, damaged, or not of this project") from error


def load_run(run, name=None):
    """A run's best epoch -> (EmotionModel in eval mode, audio settings). best.pt holds what was
    trained; the rest is the run's encoder, `name` or where it was. ValueError for another."""
    path = Path(run, "best.pt")
    config, weights = read_checkpoint(path, "config", "weights")
    model, audio, digest = build(name := name or config["model"], config)
    if digest != config["encoder"]:
        raise ValueError(f"{path} was trained from another encoder than {name} is")
    if trainable(model).keys() != weights.keys():
        raise ValueError(f"{path} holds the weights of another method or number of layers")
    model.load_state_dict(weights, strict=False)
    return model.eval(), audio


@torch.no_grad()
def predict(args):
    """Print FileName, each attribute on the scale 1 to 7, and on 0 to 1: a file alone at a time."""
    import data  # the command's own need, not the part to copy

    if args.csv and Path(args.csv).suffix != ".csv":  # not to overwrite audio by a mistyped line
        raise ValueError(f"--csv {args.csv}: give a name that ends in .csv")
    model, audio = load_run(args.run, args.model)
    utterances, problems = data.check_audio(data.find_audio(args.audio), audio["sample_rate"])
    if problems:  # before --csv is touched
        raise ValueError(f"{problems[0].where}: {problems[0].kind}")
    if model.padding == "paper":
        print("note: trained in padded batches; a file alone may score otherwise", file=sys.stderr)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    columns = [data.ATTRIBUTES[attribute] for attribute in model.to(device).attributes]
    text = {"encoding": "utf-8", "errors": "surrogateescape"}  # as file names have on disk
    with open(args.csv or 1, "w", closefd=bool(args.csv), **text) as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["FileName", *columns, *(f"{column}01" for column in columns)])
        for u, (wave, _) in zip(utterances, data.SpeechDataset(utterances, **audio), strict=False):
            unit = model(wave[None].to(device), [len(wave)])[0].tolist()
            scaled = [f"{1 + 6 * x:.4f}" for x in unit]
            writer.writerow([u.name, *scaled, *(f"{x:z.6f}" for x in unit)])
            file.flush()


def export(args):
    """Save a run as Hugging Face's sequence classification model, whose logits are 0 to 1."""
    model, audio = load_run(args.run, args.model)
    if Path(args.out).exists() and any(Path(args.out).iterdir()):
        raise ValueError(f"{args.out} exists and is not empty; give a new folder")
    for attention in [layer.attention for layer in model.encoder.encoder.layers]:
        for name in ("q_proj", "v_proj"):
            if isinstance(lora := getattr(attention, name), LoRALinear):
                setattr(attention, name, lora.merge())
    config = model.encoder.config
    config.update({"classifier_proj_size": config.hidden_size, "use_weighted_layer_sum": False})
    config.problem_type, config.id2label = "regression", dict(enumerate(model.attributes))
    config.label2id = {name: i for i, name in config.id2label.items()}
    exported = transformers.AutoModelForAudioClassification.from_config(config)
    exported.base_model.load_state_dict(model.encoder.state_dict())
    exported.classifier.load_state_dict(model.head.state_dict())
    nn.init.eye_(exported.projector.weight)  # we have no projector
    nn.init.zeros_(exported.projector.bias)
    exported.save_pretrained(args.out)
    sound = {"do_normalize": audio["normalise"], "sampling_rate": audio["sample_rate"]}
    transformers.Wav2Vec2FeatureExtractor(**sound).save_pretrained(args.out)


def params(args):
    """Print trainable parameters of every row of Table I, from shapes alone."""
    config = transformers.Wav2Vec2Config()  # wav2vec2-base's shapes
    if args.model:
        config = from_pretrained(transformers.AutoConfig, args.model)
    rows = [("partial", n, frozen) for frozen in (False, True) for n in (3, 2, 1)]
    for method, layers, frozen in [("full", None, False), *rows, ("lora", None, True)]:
        with torch.device("meta"):  # shapes only, no memory
            model = EmotionModel(transformers.AutoModel.from_config(config))
            total = sum(p.numel() for p in model.encoder.parameters())
            freeze(model, method, layers, frozen)
        count = sum(p.numel() for p in trainable(model).values())
        name = f"{method} {layers or 'all'}" + (", prefix frozen" if frozen else "")
        print(f"{count:12,}  {count / total:6.1%} of the encoder  {name}")


def main(argv=None):
    parser = argparse.ArgumentParser(description="Predict with a run, export it, count parameters.")
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("predict", help="CSV of each file, alone: 1 to 7, and 0 to 1")
    command.add_argument("run", help="a run folder of train.py")
    command.add_argument("audio", nargs="+", help="audio files, and folders of them")
    command.add_argument("--csv", help="write here instead of the terminal")
    command.add_argument("--model", help="the run's encoder, if no longer where it was")
    command = commands.add_parser("export", help="write a Hugging Face folder")
    command.add_argument("run", help="a run folder of train.py")
    command.add_argument("out", help="a new folder")
    command.add_argument("--model", help="the run's encoder, if no longer where it was")
    command = commands.add_parser("params", help="count what each row of Table I trains")
    command.add_argument("--model", help="another encoder than wav2vec2-base")
    args = parser.parse_args(argv)
    {"predict": predict, "export": export, "params": params}[args.command](args)


if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:  # bad input: one line and exit status 2
        argparse.ArgumentParser().exit(2, f"error: {error}\n")
