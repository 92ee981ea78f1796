"""A speech encoder with a head that predicts emotion: freezing, LoRA, two kinds of padding, loading
and saving (section IV).

The one idea: waveform -> CNN -> stages 0 to L -> mean -> head. Stage 0 is the embedding
(projection, positional convolution, LayerNorm), and stages 1 to L are the L transformer layers. The
cut is the stage at which the model is divided: `prefix` is the CNN and the stages before the cut,
without a gradient, and `suffix` is all from the cut on. Of L = 12 layers:

    full, and partial as in the paper   cut 0: the embedding is trained, so a gradient must reach it
    last 3, from a cache or with        cut 10: nothing before stage 10 is trained
    --freeze-embedding
    LoRA of all layers                  cut 1: adapters begin in stage 1

All above the line `# ---- command line ----` needs no other file of this project: copy it.

    python model.py predict RUN clip.wav folder/ --csv predictions.csv    # for files
    python model.py predict RUN interview.wav --window 10 --hop 5         # for long ones, in pieces
    python model.py export RUN OUT    # a folder that Hugging Face loads
    python model.py params            # trainable parameters of every row of Table I

In comments: B batch, S samples, T frames, C channels of the CNN, D width, A attributes.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import re
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MethodType

import torch
import transformers
from torch import nn
from torch.nn import functional as F
from tqdm import tqdm

FAMILIES = ("wav2vec2", "hubert", "wavlm", "unispeech", "unispeech-sat")
PADDINGS = ("paper", "exact")  # See EmotionModel.
METHODS = ("full", "partial", "lora")  # See `freeze`.


class EmotionModel(nn.Module):
    """An encoder of Hugging Face's (one of FAMILIES), mean pooling, dropout, and one linear layer.
    Each of its outputs is one of the paper's heads (section IV-A). In Hugging Face's names, the
    encoder's `feature_extractor` is the CNN, and its `encoder` is the transformer.

    `cut` is the first stage that `suffix` runs. `freeze` sets it. A cache that was filled for a
    lower cut lowers it to its own (cache.agree_with). What lies before the cut needs no gradient.
    Frozen stages may come after it, too: in partial finetuning as in the paper, the embedding is
    trained, so the cut is 0, and a gradient crosses all frozen layers.

    "paper" padding: a batch is zero-padded to its longest. Without a cache, the waveforms are
        padded (IV-B). With a cache, the hidden states at the cut are (IV-C), which gives other
        predictions. Nothing is masked, and the mean is over padded frames, too. So a prediction
        depends on its batch.
    "exact" padding: a CNN that normalises over time sees each waveform alone, and padded frames
        are zero before the positional convolution, masked in attention and left out of the mean.
        So a prediction is what it would be alone (our choice, beside the paper's).

    `sample_rate` (Hz) and `normalise` say which waveforms the encoder was pretrained on.
    load_encoder reads both from the checkpoint's preprocessor: `EmotionModel(encoder, **audio)`.
    The model normalises waveforms itself, in `prefix`. All weights are float32: for half precision,
    use autocast.

    SpecAugment and layer drop never run, whatever the encoder's config.json says: both are in
    Hugging Face's forward, and `run_stages` calls the layers without it. That is our choice: no
    cache could have them before the cut, and the rows of Table I are to differ only in what they
    train. Hugging Face's checkpointing is switched off, too, as train.py has its own. The encoder
    is changed in place (in WavLM, the attention, too): use it through the model only.
    """

    # Add 1 whenever what `prefix` computes changes: older caches are then refused.
    PREFIX_VERSION = 1

    def __init__(
        self,
        encoder,
        attributes=("activation", "valence"),
        dropout=0.2,
        padding="paper",
        sample_rate=16000,
        normalise=True,
    ):
        super().__init__()
        check_encoder(encoder.config)
        if padding not in PADDINGS:
            raise ValueError(f"padding is one of {PADDINGS}, not {padding!r}")
        self.encoder = encoder
        self.attributes = tuple(attributes)
        self.padding = padding
        self.sample_rate = sample_rate
        self.normalise = normalise
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(encoder.config.hidden_size, len(self.attributes))
        self.is_wavlm = encoder.config.model_type == "wavlm"
        # Most large encoders have their LayerNorm after the last layer, base ones in stage 0.
        self.norm_last = encoder.config.do_stable_layer_norm
        for layer in encoder.encoder.layers:
            layer.gradient_checkpointing = False
            if self.is_wavlm:
                # WavLM's own attention does not call q_proj and v_proj. It reads their weights,
                # which a LoRALinear in their place does not have.
                attend = MethodType(wavlm_attention, layer.attention)
                layer.attention.torch_multi_head_self_attention = attend
        if not self.is_wavlm:
            encoder.set_attn_implementation("sdpa")  # It takes our mask of booleans as it is.
        freeze(self, "full")  # Call `freeze` again to train less.

    def forward(self, wave, samples):
        return self.suffix(*self.prefix(wave, samples))

    @torch.no_grad()
    def prefix(self, wave, samples):
        """All before the cut.

        Takes wave (B, S) float, and `samples`, the true length of each waveform, B ints.
        Returns hidden, what stage `cut` takes: (B, T, D), or at cut 0 the CNN's features (B, T, C);
        and frames, their true lengths, B ints. Lengths are plain ints: to read them from a tensor
        on a GPU, one would have to wait for it. ValueError where a length is no int from 1 to S, or
        a waveform is shorter than one frame.
        """
        check_batch(wave, samples)
        frames = [self.count_frames(n) for n in samples]
        if min(frames) < 1:
            raise ValueError(f"{min(samples)} samples are shorter than one frame")
        hidden = self.features(self.normalised(wave, samples), samples)
        return self.run_stages(hidden, self.mask(hidden, frames), range(self.cut)), frames

    def suffix(self, hidden, frames):
        """All from the cut on: takes what `prefix` returns, returns (B, A) float32, a column an
        attribute. Labels are on 0 to 1, but predictions are not clipped."""
        check_batch(hidden, frames)
        mask = self.mask(hidden, frames)
        stages = range(self.cut, len(self.encoder.encoder.layers) + 1)
        hidden = self.run_stages(hidden, mask, stages)
        if self.norm_last:
            hidden = self.encoder.encoder.layer_norm(hidden)
        # Half precision would round a prediction to 8 or 11 bits, so what follows is in float32.
        with torch.autocast(hidden.device.type, enabled=False):
            return self.head(self.dropout(self.pool(hidden.float(), mask)))

    def pool(self, hidden, mask):
        """Mean over the frames that count: (B, T, D) -> (B, D). A subclass may pool in another
        way."""
        return (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)

    def embedding(self):
        """The modules of stage 0, in a new list, so that one call of train() or requires_grad_()
        reaches all. (The list's own `training` says nothing of them.)"""
        transformer = self.encoder.encoder
        parts = [self.encoder.feature_projection, transformer.pos_conv_embed, transformer.dropout]
        if not self.norm_last:
            parts.append(transformer.layer_norm)
        return nn.ModuleList(parts)

    def train(self, mode=True):
        """Parts of the encoder without a trainable parameter stay in eval mode: "the output of
        frozen layers does not change" (IV-C), so no dropout may work in them."""
        super().train(mode)
        encoder = self.encoder
        for part in [encoder.feature_extractor, self.embedding(), *encoder.encoder.layers]:
            part.train(mode and any(p.requires_grad for p in part.parameters()))
        return self

    def count_frames(self, samples):
        """How many frames the CNN makes of a number of samples. With the usual kernels and strides,
        a frame is made of 400 samples (25 ms), and the next begins 320 (20 ms) later."""
        config = self.encoder.config
        for kernel, stride in zip(config.conv_kernel, config.conv_stride):
            samples = (samples - kernel) // stride + 1
        return samples

    def normalised(self, wave, samples):
        """Wave (B, S) -> a new float32 (B, S): each row's true samples with mean 0 and variance 1,
        if the checkpoint wants that, and zeros after them. The moments are those of the true
        samples, before padding, by Hugging Face's formula."""
        wave = wave.to(torch.float32, copy=True)
        for row, n in zip(wave, samples):
            if self.normalise:
                row[:n] = F.layer_norm(row[:n], (n,), eps=1e-7)
            row[n:] = 0
        return wave

    def features(self, wave, samples):
        """The CNN: (B, S) -> (B, T, C)."""
        cnn = self.encoder.feature_extractor
        if self.padding == "paper" or self.encoder.config.feat_extract_norm == "layer":
            return cnn(wave).mT
        # Base encoders have a GroupNorm over time here: zeros after a waveform would change every
        # frame of it, so each waveform goes through the CNN alone.
        alone = [cnn(row[None, :n])[0].T for row, n in zip(wave, samples)]  # each (T, C)
        return nn.utils.rnn.pad_sequence(alone, batch_first=True)

    def mask(self, hidden, frames):
        """(B, T) bool, which frames count: in "exact" padding the true ones, else all."""
        longest = hidden.shape[1]
        if self.padding == "paper":
            frames = [longest] * len(frames)
        frames = torch.tensor(frames).to(hidden.device, non_blocking=True)
        return torch.arange(longest, device=hidden.device) < frames[:, None]

    def embed(self, features, mask):
        """Stage 0: projection, positional convolution, LayerNorm: (B, T, C) -> (B, T, D).

        On a CPU, a LayerNorm of bfloat16 input adds up its weight's gradient over all frames in
        bfloat16. That was 46 % off in one batch, and gets worse with more frames. So the LayerNorms
        here take float32 under autocast, too: `run_stages` gives the projection float32 features,
        and the .float() below does it for the last one. (Those inside the layers take sums with the
        hidden states, which are float32.)
        """
        transformer = self.encoder.encoder
        hidden = first_of(self.encoder.feature_projection(features)).float()
        # The projection's bias is in frames that do not count, too, and the convolution would carry
        # it into true ones. Alone, an utterance has zeros there: the convolution's own padding.
        hidden = hidden * mask[..., None]
        hidden = hidden + transformer.pos_conv_embed(hidden)
        if not self.norm_last:
            hidden = transformer.layer_norm(hidden)
        return transformer.dropout(hidden)

    def run_stages(self, hidden, mask, stages):
        """The stages of a range, one after another: (B, T, C or D) -> (B, T, D). An empty range
        returns its input, in float32."""
        hidden = hidden.float()  # Half from a float16 cache, or from the CNN under autocast.
        layers = self.encoder.encoder.layers
        options = {}  # What a transformer layer takes beside the hidden states.
        if self.padding == "exact":  # In "paper" padding all frames count, and no mask is faster.
            options["attention_mask"] = mask[:, None, None]  # (B, 1, 1, T): all heads, all queries.
        if self.is_wavlm:
            # The position biases (heads, T, T) that the first layer computes are those of all
            # layers. Each layer gets them here, and multiplies them by a gate of its own.
            longest = hidden.shape[1]
            bias = layers[0].attention.compute_bias(longest, longest)
            options["position_bias"] = bias.repeat(len(hidden), 1, 1)  # (B * heads, T, T)
        for stage in stages:
            if stage == 0:
                hidden = self.embed(hidden, mask)
            else:
                hidden = first_of(layers[stage - 1](hidden, **options))
        return hidden


def check_encoder(config):
    """ValueError where an encoder of this configuration has parts that EmotionModel does not run,
    or is of another family."""
    odd = [key for key in ("add_adapter", "conv_pos_batch_norm") if getattr(config, key, False)]
    if odd or config.model_type not in FAMILIES:
        raise ValueError(f"{odd or config.model_type}: not a plain one of {FAMILIES}")


def check_batch(inputs, lengths):
    """ValueError unless inputs are a tensor (B, n, ...), and lengths B ints from 1 to n: a NumPy
    array or an attention mask would be misread in silence."""
    fits = torch.is_tensor(inputs) and len(inputs) == len(lengths)
    if not (fits and all(type(n) is int and 0 < n <= inputs.shape[1] for n in lengths)):
        raise ValueError(f"no tensor (B, n, ...) with its true lengths, B ints: {lengths!s:.99}")


def first_of(output):
    """The hidden states of a module's output: some families return a tuple."""
    return output[0] if isinstance(output, tuple) else output


def wavlm_attention(attention, hidden, mask, position_bias, *_):
    """Self-attention of hidden (B, T, D) -> (B, T, D), and None for the attention's weights. It
    replaces WavLM's method torch_multi_head_self_attention. `position_bias` (B * heads, T, T) is
    gated already. What else that method is given depends on the version of transformers, and is not
    needed here."""
    split = [  # query, key and value, each (B, heads, T, D / heads)
        projection(hidden).unflatten(2, (attention.num_heads, -1)).transpose(1, 2)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    ]
    bias = position_bias.unflatten(0, (len(hidden), -1))  # (B, heads, T, T)
    if mask is not None:
        # Only here, after the gate: before it, -inf in the bias would make the gate's gradient 0
        # times infinity, which is NaN.
        bias = bias.masked_fill(~mask, -math.inf)
    dropout = attention.dropout if attention.training else 0.0
    # Autocast, where it is on, casts the bias, too.
    mixed = F.scaled_dot_product_attention(*split, bias, dropout)
    return attention.out_proj(mixed.transpose(1, 2).flatten(2)), None


class LoRALinear(nn.Module):
    """base(x) + alpha / rank * lora_b @ lora_a @ dropout(x), with base frozen (Hu et al. 2021;
    section IV-B).

    A weight's update is a product of two thin matrices: lora_a (rank, in) starts random, and lora_b
    (out, rank) at zero. So the output starts as base's to the bit, and lora_b receives a gradient
    at once. Were both zero, neither would ever get one.

    A module that reads its layer's weight, and does not call the layer, cannot have this in its
    place: WavLM's attention, or PyTorch's TransformerEncoderLayer in eval mode.
    """

    def __init__(self, base, rank=8, alpha=16, dropout=0.1):
        super().__init__()
        self.base = base.requires_grad_(False)
        # The weight of a fresh nn.Linear has that module's random start. It is moved to base's
        # device and dtype.
        self.lora_a = nn.Linear(base.in_features, rank, bias=False).to(base.weight).weight
        self.lora_b = nn.Parameter(base.weight.new_zeros(base.out_features, rank))
        self.dropout = nn.Dropout(dropout)
        self.scale = alpha / rank

    def forward(self, x):
        low = self.dropout(x) @ self.lora_a.T  # (..., rank)
        return self.base(x) + self.scale * low @ self.lora_b.T

    @torch.no_grad()
    def merge(self):
        """A plain nn.Linear that computes the same, dropout off."""
        merged = copy.deepcopy(self.base)
        merged.weight += self.scale * self.lora_b @ self.lora_a
        return merged


def freeze(model, method, layers=None, freeze_embedding=False, rank=8, alpha=16, lora_dropout=0.1):
    """Choose what is trained, by requires_grad, and set `model.cut`. The head always is trained,
    the CNN never (section IV-A). ValueError where method and layers do not fit.

    "full": all transformer layers, and the embedding before them.
    "partial": the last `layers` transformer layers (in large encoders also the LayerNorm after
        them) and, as the paper's parameter counts say, the embedding, unless `freeze_embedding`. To
        reach the embedding, a gradient crosses all frozen layers: that is the cost that a cache,
        which must freeze it, saves.
    "lora": adapters on q and v of the last `layers` layers (None: all); all else is frozen.
    """
    transformer = model.encoder.encoder
    depth = len(transformer.layers)
    if layers is None and method != "partial":
        layers = depth
    if method not in METHODS:
        raise ValueError(f"method is one of {METHODS}, not {method!r}")
    if layers not in range(1, depth + 1):
        raise ValueError(f"{method}, {layers} layers: 1 to {depth} are possible")
    if method == "full" and (layers < depth or freeze_embedding):
        raise ValueError("full trains all: it takes no fewer layers, frozen embedding, or cache")
    if any(isinstance(module, LoRALinear) for module in model.modules()):
        raise ValueError("the model has adapters already: build a new model")
    model.encoder.requires_grad_(False)
    model.head.requires_grad_(True)
    last = transformer.layers[depth - layers :]
    model.cut = depth - layers + 1  # The stage of the first of these layers.
    if method == "lora":
        for layer in last:
            attention = layer.attention
            attention.q_proj = LoRALinear(attention.q_proj, rank, alpha, lora_dropout)
            attention.v_proj = LoRALinear(attention.v_proj, rank, alpha, lora_dropout)
    else:
        last.requires_grad_(True)
        if model.norm_last:
            transformer.layer_norm.requires_grad_(True)
        if not freeze_embedding:
            model.cut = 0
            model.embedding().requires_grad_(True)
    model.train(model.training)  # It sets frozen parts to eval mode: now it is known which.


def count_parameters(parameters):
    """How many numbers some parameters hold."""
    return sum(p.numel() for p in parameters)


def trainable(model):
    """{name: parameter} of all that is trained, the head included."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


# ---- load an encoder ----

# These values replace those of an encoder's config.json. They decide what Hugging Face's own
# forward does and returns, which an exported model runs. No prediction here depends on them.
OVERRIDES = {
    "gradient_checkpointing": False,
    "layerdrop": 0.0,
    "apply_spec_augment": False,
    "output_attentions": False,
    "output_hidden_states": False,
    "return_dict": True,
}
# Keys of an encoder's config.json that change what the same weights compute, in training or not.
HASHED = str.split("""model_type num_attention_heads layer_norm_eps hidden_act conv_stride
    feat_extract_norm feat_extract_activation do_stable_layer_norm max_bucket_distance
    attention_dropout hidden_dropout activation_dropout feat_proj_dropout""")


def load_encoder(name):
    """Hub id or local folder -> encoder in float32, and `audio`, what its preprocessor says of the
    waveforms it takes: {"sample_rate": Hz, "normalise": bool}. It is no sound, but keyword
    arguments of the model: EmotionModel(encoder, **audio).

    ValueError of one line where none loads, or it cannot be trained here.
    """
    config = read_config(name)
    with blame(name):
        encoder, report = transformers.AutoModel.from_pretrained(
            name,
            config=config,
            dtype=torch.float32,
            attn_implementation="eager",  # All families have it, and EmotionModel replaces it.
            ignore_mismatched_sizes=True,  # They are refused below, with the missing ones.
            output_loading_info=True,
        )
        lacking = {*report["missing_keys"], *map(str, report["mismatched_keys"])}
        lacking -= {"masked_spec_embed"}  # It is SpecAugment's, and nothing here uses it.
        if lacking:
            raise ValueError(f"{len(lacking)} weights missing or misshapen: {min(lacking)} …")
        extractor = transformers.Wav2Vec2FeatureExtractor.from_pretrained(name)  # of all FAMILIES
        rate = extractor.sampling_rate
        if rate not in range(4000, 192001):
            raise ValueError(f"sampling_rate {rate} in preprocessor_config.json is not in Hz")
        return encoder, {"sample_rate": rate, "normalise": bool(extractor.do_normalize)}


def read_config(name):
    """The configuration of an encoder that can be trained here. ValueError for any other. No code
    of its folder is run. From here on, transformers prints errors only."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    hint = "" if os.path.isdir(name) else " (no folder here: give its place by --model)"
    with blame(f"{name}{hint}"):
        transformers.utils.versions.require_version("transformers>=4.57")
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **OVERRIDES)
        check_encoder(config)
        if transformers.utils.find_adapter_config_file(name):
            raise ValueError("it holds adapter_config.json: merge its adapter, else it is lost")
        return config


@contextmanager
def blame(path):
    """Yield a path. Any exception meanwhile becomes a ValueError of one line that names it: most
    likely the file is damaged, foreign or missing."""
    try:
        yield path
    except Exception as error:
        words = f"{type(error).__name__}: {error}".split()
        reason = " ".join(words).split(". ")[0]  # The first sentence, which may go over lines.
        raise ValueError(
            f"'{path}' cannot be used (if damaged, make or fetch it again): {reason:.300}"
        ) from error


def digest(encoder):
    """SHA-256 of all that an encoder computes with: its weights, and of its configuration what
    HASHED names. A run and a cache recognise their encoder by it."""
    settings = [getattr(encoder.config, key, None) for key in HASHED]
    sha256 = hashlib.sha256(json.dumps(settings).encode())
    for name, tensor in sorted(encoder.state_dict().items()):
        if name != "masked_spec_embed":
            sha256.update(name.encode() + tensor.cpu().numpy().tobytes())
    return sha256.hexdigest()


# ---- load a run ----


def load_trained(model, weights):
    """Put {name: tensor} of a checkpoint into the parameters that are trained. ValueError where it
    has others. Call it inside `blame`, which puts the file's name before the message."""
    if trainable(model).keys() != weights.keys():
        raise ValueError("it holds the weights of another method or number of layers")
    model.load_state_dict(weights, strict=False)


def build(encoder, audio, settings):
    """An EmotionModel, built and frozen as `settings` say: the arguments of a run, {name: value}.
    `encoder, audio` are what load_encoder returns. Only such a model has `encoder_sha256`, the
    encoder's digest, and `scale`, (low, high), the ends of the labels' scale."""
    model = EmotionModel(
        encoder, settings["attributes"], settings["dropout"], settings["padding"], **audio
    )
    model.encoder_sha256 = digest(encoder)  # It is taken before adapters come into the encoder.
    model.scale = settings["scale"]
    keys = ["method", "layers", "freeze_embedding", "rank", "alpha", "lora_dropout"]
    freeze(model, **{key: settings[key] for key in keys})
    return model


def load_run(run, name=None):
    """Load a run's best epoch -> EmotionModel in eval mode, float32, with `scale`: (low, high), the
    ends of its labels' scale.

    best.pt holds what was trained; the rest comes from the run's encoder, which is at `name` now,
    or where the run's config.json says. ValueError of one line that names the file, where either is
    missing, damaged, or not the run's own.
    """
    with blame(Path(run, "config.json")) as path:
        config = json.loads(path.read_text())
        name = name or str(config["model"])
    encoder, audio = load_encoder(name)
    with blame(Path(run, "best.pt")) as path:
        saved = torch.load(path, map_location="cpu", weights_only=True)
        if digest(encoder) != saved["settings"]["encoder_sha256"]:
            raise ValueError(f"it was trained from another encoder than '{name}' is")
        # Of one run, all settings in best.pt are in config.json, too.
        if config | saved["settings"] != config:
            raise ValueError("it is of another run than config.json")
        model = build(encoder, audio, saved["settings"])
        load_trained(model, saved["weights"])
        return model.eval()


# This is what Python, PyTorch on a GPU and on a CPU, cuBLAS and cuDNN say.
MEMORY_IS_FULL = "MemoryError|out of memory|allocate memory|ALLOC_FAILED|unable to find an engine"


@contextmanager
def explain_memory(advice):
    """Where memory is full, in whichever words a library says that: MemoryError of one line, with
    advice."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not re.search(MEMORY_IS_FULL, repr(error)):
            raise
        raise MemoryError(f"out of memory: {advice}") from error


# ---- command line ----


def predict(args):
    """Write FileName and each attribute, on the run's scale, of every file or window; of a corpus
    the labels, too. What is left out is a line on stderr, and status 1 at the end: files that are
    missing, unusable or may not be read, and utterances without usable labels."""
    import data  # Only the command needs it, and no part of what is copied.

    model = load_run(args.run, args.model).to(choose_device(args.device))
    if model.padding == "paper":
        print("note: trained in padded batches; a file alone may score otherwise", file=sys.stderr)
    failed = False
    if args.data:
        splits = [args.split or "Test1"]
        scale = args.scale or model.scale
        found = data.read_corpus(args.data, model.attributes, scale, splits)
        utterances = data.usable(found, skip_bad=True, splits=splits)
        _, problems = found
        failed = bool(problems)
        # Where there is no audio folder, this is one OSError, and not a line for each utterance.
        os.listdir(os.path.dirname(utterances[0].path))
    else:
        utterances = data.find_audio(args.paths)
    if args.csv:
        utterances = data.progress(utterances, "predict")  # A bar, but not among the rows.
    # A folder's names need not be UTF-8, and are written as they are on disk. A row is written at
    # once, and no file that is there already is written over.
    with (
        open(args.csv, "x", buffering=1, encoding="utf-8", errors="surrogateescape")
        if args.csv
        else nullcontext(sys.stdout)
    ) as file:
        write = data.predictions_writer(
            file, model.attributes, model.scale, windows=args.window, labels=args.data
        )
        for u in utterances:
            try:
                for units, bounds in predict_file(model, u.path, args.window, args.hop):
                    write(u, units, bounds)
            except (ValueError, FileNotFoundError, PermissionError) as error:
                failed = True
                tqdm.write(str(error), sys.stderr)
    if failed:
        raise SystemExit(1)


@torch.no_grad()
def predict_file(model, path, window, hop):
    """Yield the predictions of a file, or of each of its windows: A numbers on 0 to 1, and where it
    starts and stops in seconds, which is () of a whole file. ValueError for unusable sound."""
    import data

    seconds = data.measure(path, model.sample_rate, limited=not window) / model.sample_rate
    pieces = [()]  # the whole
    if window:
        # Another window begins while over .1 s lies after the end of the last. It may be shorter.
        count = 1 + max(0, math.ceil((seconds - window - 0.1) / hop))
        pieces = [(k * hop, min(k * hop + window, seconds)) for k in range(count)]
    for bounds in pieces:  # () or (start, stop) in seconds
        wave = data.load_audio(path, model.sample_rate, *bounds)
        if data.is_constant(wave):
            tqdm.write(f"note: constant sound: '{path}' {bounds or ''}", sys.stderr)
        with explain_memory(f"'{path}' needs --window, or a shorter one"):
            wave = torch.from_numpy(wave).to(model.head.weight.device)
            units = model(wave[None], [len(wave)])[0].tolist()
        yield units, bounds


def export(args):
    """Save a finished run as Hugging Face's model for sequence classification, its logits on 0 to
    1."""
    import data

    model = load_run(args.run, args.model)
    for name, module in list(model.named_modules()):
        if isinstance(module, LoRALinear):
            model.set_submodule(name, module.merge())
    config = model.encoder.config
    config.classifier_proj_size = config.hidden_size
    config.use_weighted_layer_sum = False
    config.problem_type = "regression"
    config.id2label = dict(enumerate(model.attributes))
    exported = transformers.AutoModelForAudioClassification.from_config(config)
    exported.base_model.load_state_dict(model.encoder.state_dict())
    exported.classifier = model.head
    # Hugging Face has a linear layer before the mean. We have none: theirs becomes the identity.
    nn.init.eye_(exported.projector.weight)
    nn.init.zeros_(exported.projector.bias)
    # Hugging Face's padding with a mask is our "exact" one, unless the CNN normalises over time. A
    # model that was trained without a mask is exported without one.
    masked = model.padding == "exact" and config.feat_extract_norm == "layer"
    extractor = transformers.Wav2Vec2FeatureExtractor(
        sampling_rate=model.sample_rate,
        do_normalize=model.normalise,
        return_attention_mask=masked,
    )
    card = describe(args, model, masked)
    with data.new_folder(args.out) as folder:
        exported.save_pretrained(folder)
        extractor.save_pretrained(folder)
        Path(folder, "README.md").write_text(card)


def describe(args, model, masked):
    """The model card of an exported run; `masked`: whether its files may be scored in batches."""
    low, high = model.scale
    with blame(Path(args.run, "result.json")) as path:
        facts = json.loads(path.read_text())
        return f"""# Emotion in speech: {", ".join(model.attributes)}

{facts["model"]}, finetuned in {model.padding} padding. CCCs and n of its test: {facts["test"]}.
A logit x is {low:g} + {high - low:g} x on the scale {low:g} to {high:g} of its labels.
{"Files may be scored in batches." if masked else "Score each file alone: padding changes scores."}
To open files, the pipeline needs ffmpeg.

```python
from transformers import pipeline
score = pipeline("audio-classification", "{args.out}")
print(score("clip.wav", function_to_apply="none", top_k=None))
```
"""


def params(args):
    """Print trainable parameters of every row of Table I, from shapes alone."""
    config = read_config(args.model) if args.model else transformers.Wav2Vec2Config()
    with blame(args.model), torch.device("meta"):  # Tensors there have a shape, and no memory.
        model = EmotionModel(transformers.AutoModel.from_config(config))
    total = model.encoder.num_parameters()
    rows = [("partial", n, frozen) for frozen in (False, True) for n in (3, 2, 1)]
    # One model serves all rows, as `freeze` starts anew. Only LoRA changes it, and comes last.
    for method, layers, frozen in [("full", None, False), *rows, ("lora", None, False)]:
        freeze(model, method, layers, frozen)
        trained = count_parameters(trainable(model).values())
        name = f"{method} {layers or 'all'}{', embedding frozen' * frozen}"
        print(f"{trained:12,}  {trained / total:6.1%} of the encoder  {name}")


def choose_device(name):
    """Whether to run on the "cpu" or on "cuda": auto takes a GPU if there is one. Of several GPUs,
    this process's own is made the current one. ValueError where there is none."""
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return "cpu"
    gpus = torch.cuda.device_count()
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if local >= gpus:
        raise ValueError(f"process {local} of this machine has no GPU: PyTorch sees {gpus}")
    torch.cuda.set_device(local)
    return "cuda"


def main(argv=None):
    parser = argparse.ArgumentParser(description="Predict with a run, export it, count parameters.")
    commands = parser.add_subparsers(dest="command", required=True)
    add = commands.add_parser("predict", help="for files, on the run's scale").add_argument
    add_export = commands.add_parser("export", help="write a Hugging Face folder").add_argument
    for either in (add, add_export):
        either("run", help="a run folder of train.py")
        either("--model", help="the run's encoder, if no longer where it was")
    add_export("out", help="a new folder")
    # Not nargs "*": with it, argparse takes no file where an option stands before the files.
    files = add("paths", nargs="+", help="audio files, and folders of them (or --data)")
    files.required = False  # --data may stand instead.
    add("--csv", help="write a new file instead of to the terminal")
    add("--window", type=float, help="predict for pieces of so many seconds")
    add("--hop", type=float, help="seconds from a piece's start to the next's (--window)")
    add("--data", help="predict for a split of this corpus, and write its labels beside")
    add("--split", help="of --data (Test1)")
    add("--scale", nargs=2, type=float, help="of the labels of --data, if not the run's")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: a GPU if any")
    add = commands.add_parser("params", help="count what each row of Table I trains").add_argument
    add("--model", help="another encoder than wav2vec2-base")
    args = parser.parse_args(argv)
    if args.command == "predict":
        if args.hop is None:
            args.hop = args.window
        if bool(args.paths) == bool(args.data):
            parser.error("predict takes audio, or --data")
        if args.csv and os.path.exists(args.csv):
            parser.error(f"'{args.csv}' is there already: move it away, or give another --csv")
        if (args.split or args.scale) and not args.data:
            parser.error("--split and --scale need --data")
        if args.hop is not None and not 0.1 <= args.hop <= (args.window or 0) < math.inf:
            parser.error("--hop must be at least .1, and at most --window")
    {"predict": predict, "export": export, "params": params}[args.command](args)


if __name__ == "__main__":
    from ccc import shell

    shell(main)
