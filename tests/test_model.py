"""The model against Hugging Face's own forward, the paper's parameter counts, and checkpoints in
and out."""

import pytest
import torch
from conftest import DEPTH, WIDTH, read_csv, relative, step, tiny_config, tiny_encoder
from torch import nn
from transformers import (
    AutoFeatureExtractor,
    AutoModelForAudioClassification,
    Wav2Vec2Config,
    Wav2Vec2FeatureExtractor,
    Wav2Vec2ForPreTraining,
    Wav2Vec2Model,
)

import data
import model as models

ROWS = [  # of Table I: method, layers, freeze_prefix, trained parameters of the base model
    ("full", None, False, 90_172_034),
    ("partial", 3, False, 26_381_186),
    ("partial", 2, False, 19_293_314),
    ("partial", 1, False, 12_205_442),
    ("partial", 3, True, 21_265_154),
    ("partial", 2, True, 14_177_282),
    ("partial", 1, True, 7_089_410),
    ("lora", None, False, 296_450),
]
every_row = pytest.mark.parametrize(("method", "layers", "freeze_prefix", "count"), ROWS)
every_cut = pytest.mark.parametrize("layer", range(DEPTH + 1))
every_norm = pytest.mark.parametrize("norm", ["group", "layer"])


def tiny_model(padding, method="full", layers=None, freeze_prefix=False, **changes):
    model = models.EmotionModel(tiny_encoder(**changes), padding=padding)
    models.freeze(model, method, layers, freeze_prefix)
    return model.eval()


def ragged():
    """Noise of 25 ms to 0.8 s, two of one length, zero-padded: wave (B, S), samples (B,)."""
    samples = torch.tensor([9000, 4001, 12345, 400, 9000])
    waves = [torch.randn(n, generator=torch.Generator().manual_seed(n)) for n in samples.tolist()]
    return nn.utils.rnn.pad_sequence(waves, batch_first=True), samples


def hugging_face(model, wave):
    """Our heads on the plain mean of the frames of Hugging Face's own forward."""
    pooled = model.encoder(wave).last_hidden_state.mean(1)
    return torch.cat([model.activation(pooled), model.valence(pooled)], dim=1)


def alone(model):
    rows = zip(*ragged(), strict=True)
    return torch.cat([hugging_face(model, wave[None, :samples]) for wave, samples in rows])


@torch.no_grad()
@every_norm
@every_cut
def test_suffix_of_prefix(norm, layer):
    """Cut before any layer, suffix(prefix(x)) is Hugging Face's forward of the padded batch,
    pooling and heads."""
    model = tiny_model("paper", feat_extract_norm=norm)
    expected = hugging_face(model, ragged()[0])
    assert relative(model.suffix(*model.prefix(*ragged(), layer), layer), expected) < 1e-6
    assert relative(model(*ragged()), expected) < 1e-6


@torch.no_grad()
@every_norm
@every_cut
def test_exact_is_alone(norm, layer):
    """In exact padding a ragged batch gives what Hugging Face gives each waveform alone, cut at any
    layer."""
    model = tiny_model("exact", feat_extract_norm=norm)
    assert relative(model.suffix(*model.prefix(*ragged(), layer), layer), alone(model)) < 1e-5


@torch.no_grad()
@every_norm
def test_paper_padding_depends_on_the_batch(norm):
    """In paper padding the same batch moves predictions by more than a hundredth."""
    model = tiny_model("paper", feat_extract_norm=norm)
    assert relative(model(*ragged()), alone(model)) > 1e-2


@torch.no_grad()
def test_frames():
    """frames() is Hugging Face's count and what the convolutions really make, also at the edges of
    a frame."""
    model, samples = tiny_model("exact"), torch.arange(400, 3000)
    expected = model.encoder._get_feat_extract_output_lengths(samples)
    assert torch.equal(model.frames(samples), expected)
    for n in (400, 719, 720, 16000, 16079, 16080):
        assert model.encoder.feature_extractor(torch.zeros(1, n)).shape[2] == model.frames(n)


@torch.no_grad()
def test_lora_starts_as_the_base():
    """Before its first step a LoRA model's output is bitwise the base model's."""
    base, adapted = tiny_model("exact"), tiny_model("exact", "lora")
    adapted.activation, adapted.valence = base.activation, base.valence
    assert torch.equal(adapted(*ragged()), base(*ragged()))


@torch.no_grad()
def test_lora_formula_and_merge():
    """W x + b + alpha / rank B A x, and merge() is one nn.Linear that computes it."""
    linear = models.LoRALinear(nn.Linear(WIDTH, 24), rank=4, alpha=6, dropout=0.5).eval()
    x, _ = torch.randn(7, WIDTH), linear.lora_b.normal_()
    expected = linear.base(x) + 6 / 4 * x @ linear.lora_a.T @ linear.lora_b.T
    merged = linear.merge()
    assert type(merged) is nn.Linear
    assert relative(linear(x), expected) < 1e-6 and relative(merged(x), expected) < 1e-5


@every_row
def test_what_is_trained(method, layers, freeze_prefix, count):
    """The trainable names are each row's, and a backward pass reaches every one of them and nothing
    else."""
    model = tiny_model("exact", method, layers, freeze_prefix).train()
    first, names = (
        DEPTH - (layers or DEPTH),
        {f"{a}.{p}" for a in models.ATTRIBUTES for p in ("weight", "bias")},
    )
    if method == "lora":
        names |= {
            f"encoder.encoder.layers.{i}.attention.{m}_proj.lora_{part}"
            for i in range(first, DEPTH)
            for m in "qv"
            for part in "ab"
        }
    else:
        frozen = [
            "feature_extractor.",
            "masked_spec_embed",
            *(f"encoder.layers.{i}." for i in range(first)),
        ]
        if freeze_prefix:
            frozen += ["feature_projection.", "encoder.pos_conv_embed.", "encoder.layer_norm."]
        whole = [name for name, _ in tiny_encoder().named_parameters()]
        names |= {f"encoder.{name}" for name in whole if not name.startswith(tuple(frozen))}
    for name, parameter in model.named_parameters():
        if name.endswith("lora_b"):  # zero would keep any gradient from lora_a
            nn.init.normal_(parameter)
    gradients = step(model, [*ragged(), torch.rand(5, 2)])
    assert set(models.trainable(model)) == gradients.keys() - {"predictions", "loss"} == names
    assert all(gradients[name].any() for name in names)


@torch.no_grad()
@every_row
def test_frozen_parts_stay_in_eval(method, layers, freeze_prefix, count):
    """After train() no module of a frozen part is in train mode: it computes the same twice, while
    the dropout of what is trained is on."""
    model = tiny_model("exact", method, layers, freeze_prefix).train()
    encoder, first = model.encoder.encoder, DEPTH - (layers or DEPTH)
    front = [
        model.encoder.feature_projection,
        encoder.pos_conv_embed,
        encoder.layer_norm,
        encoder.dropout,
    ]
    trains_front = method != "lora" and not freeze_prefix
    frozen = [
        model.encoder.feature_extractor,
        *encoder.layers[:first],
        *([] if trains_front else front),
    ]
    trained = [model.dropout, *encoder.layers[first:], *(front if trains_front else [])]
    assert not any(module.training for part in frozen for module in part.modules())
    assert all(module.training for part in trained for module in part.modules())
    hidden, frames = model.frozen(*ragged())
    assert torch.equal(hidden, model.frozen(*ragged())[0])
    assert not torch.equal(model.trained(hidden, frames), model.trained(hidden, frames))
    if trains_front:
        hidden = model.embed(hidden, frames)
        assert torch.equal(*(model.run_layers(hidden, frames, 0, first) for _ in range(2)))


@every_row
def test_counts_of_the_base_model(method, layers, freeze_prefix, count):
    """On wav2vec2-base (shapes only) each row trains the paper's number of parameters."""
    with torch.device("meta"):
        model = models.EmotionModel(Wav2Vec2Model(Wav2Vec2Config()))
        assert sum(p.numel() for p in model.encoder.parameters()) == 94_371_712
        models.freeze(model, method, layers, freeze_prefix)
    assert sum(p.numel() for p in models.trainable(model).values()) == count


def test_params_command(tmp_path, capsys):
    """`model.py params` prints those counts from a config.json alone."""
    Wav2Vec2Config().save_pretrained(tmp_path)
    models.main(["params", "--model", str(tmp_path)])
    rows = [line.split()[3] for line in capsys.readouterr().out.splitlines()[1:]]
    assert rows == [f"{count:,}" for *_, count in ROWS]


def write_old_layout(folder, lacking=None):
    """pytorch_model.bin as on the hub: Wav2Vec2ForPreTraining, weight norm as weight_g and
    weight_v."""
    config = tiny_config(num_codevectors_per_group=8, codevector_dim=16, proj_codevector_dim=16)
    model = Wav2Vec2ForPreTraining(config)
    weights = model.state_dict()
    for new, old in (("original0", "weight_g"), ("original1", "weight_v")):
        name = "wav2vec2.encoder.pos_conv_embed.conv."
        weights[name + old] = weights.pop(f"{name}parametrizations.weight.{new}")
    weights.pop(f"wav2vec2.{lacking}", None)
    torch.save(dict(weights), folder / "pytorch_model.bin")
    config.architectures = ["Wav2Vec2ForPreTraining"]
    config.save_pretrained(folder)
    Wav2Vec2FeatureExtractor(do_normalize=False, sampling_rate=8000).save_pretrained(folder)
    return model.wav2vec2.state_dict()


def test_old_checkpoint_layout(tmp_path):
    """A checkpoint in the hub's older layout loads completely and bitwise, with its own
    preprocessor's settings."""
    expected = write_old_layout(tmp_path)
    encoder, audio = models.load_encoder(str(tmp_path))
    loaded = encoder.state_dict()
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    assert audio == {"sample_rate": 8000, "normalise": False}


LACKING = ["encoder.pos_conv_embed.conv.weight_g", "encoder.layers.2.attention.q_proj.bias"]


@pytest.mark.parametrize("lacking", LACKING)
def test_missing_weight_is_an_error(lacking, tmp_path):
    """A checkpoint that lacks one weight is refused."""
    write_old_layout(tmp_path, lacking)
    with pytest.raises(ValueError, match="lacks 1 weights"):
        models.load_encoder(str(tmp_path))


@pytest.fixture(scope="module", params=["partial", "lora"])
def run(request, launch, tmp_path_factory):
    """A run folder in exact padding and float32; steps so large that every trained part has
    moved."""
    folder = tmp_path_factory.mktemp("run")
    options = ["--method", request.param, "--layers", 2, "--epochs", 2, "--lr", 0.01]
    launch(folder, *options, "--padding", "exact")
    return folder


def test_saved_run_has_its_heads(run):
    """A loaded run holds all that was trained, heads included."""
    saved = torch.load(run / "best.pt", weights_only=True)["weights"]
    loaded = models.trainable(models.load_run(run)[0])
    assert {"activation.weight", "valence.bias"} < saved.keys() == loaded.keys()
    assert all(torch.equal(parameter, saved[name]) for name, parameter in loaded.items())


def test_predict_command(run, corpus, tmp_path, monkeypatch):
    """`model.py predict` gives, on both scales, what the run wrote for its test split."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # which rounds otherwise
    expected = read_csv(run / "predictions-Test1.csv")
    models.main(["predict", str(run), f"{corpus}/Audios", "--csv", str(tmp_path / "all.csv")])
    found = {row["FileName"]: row for row in read_csv(tmp_path / "all.csv")}
    assert len(expected) == 8 and len(found) == 28
    for row in expected:
        for scale in ("Act", "Val"):
            value, same = float(row[scale]), found[row["FileName"]]
            assert float(same[scale]) == pytest.approx(value, abs=1e-4)
            assert float(same[f"{scale}01"]) == pytest.approx((value - 1) / 6, abs=1e-5)


@torch.no_grad()
def test_export(run, corpus, tmp_path):
    """The exported folder is a regression model with named labels, LoRA merged, that gives Hugging
    Face the numbers that the run wrote for its test split."""
    models.main(["export", str(run), str(tmp_path / "out")])
    exported = AutoModelForAudioClassification.from_pretrained(tmp_path / "out").eval()
    extractor = AutoFeatureExtractor.from_pretrained(tmp_path / "out")
    assert exported.config.id2label == {0: "activation", 1: "valence"}
    assert exported.config.problem_type == "regression"
    assert not any("lora" in name for name in exported.state_dict())
    for row in read_csv(run / "predictions-Test1.csv"):
        wave = data.load_audio(f"{corpus}/Audios/{row['FileName']}")
        logits = exported(**extractor(wave, sampling_rate=16000, return_tensors="pt")).logits
        expected = [float(row["Act"]), float(row["Val"])]
        assert (1 + 6 * logits[0]).tolist() == pytest.approx(expected, abs=1e-4)
