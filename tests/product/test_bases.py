"""The base model as a config or a function, and models of transformers that multiply by numbers of their own."""

import copy
import re

import pytest
import torch
from huggingface_problems import hf, torchvision
from small_problems import by_name, closure_of, equal, weights
from torch import nn

from mup2_fused import MLP, SAM, exponents, init_, param_groups, report
from mup2_fused.bases import base_module
from mup2_fused.multipliers import logits_divisor
from mup2_fused.roles import describe

WIDTH, BASE = 64, 16
HEADS = dict(num_attention_heads=2, num_key_value_heads=2)
PARTS = {
    "MiniCPM3": dict(q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8),
    "FalconH1": dict(mamba_n_heads=4, mamba_n_groups=1, mamba_d_state=8, mamba_d_ssm=32, mamba_d_head=8),
    "Gemma": dict(head_dim=8),
    "Afmoe": dict(num_experts=2, num_experts_per_tok=1, head_dim=8, num_dense_layers=1, moe_intermediate_size=8),
}


def config(name, n=WIDTH, **numbers):
    shape = dict(vocab_size=50, hidden_size=n, intermediate_size=2 * n, num_hidden_layers=2, eos_token_id=2)
    shape |= HEADS | dict(tie_word_embeddings=False) | PARTS.get(name, {})
    return getattr(hf, f"{name}Config")(**shape | numbers)


def language_model(name, n=WIDTH, **numbers):
    torch.manual_seed(0)
    return getattr(hf, f"{name}ForCausalLM")(config(name, n, **numbers))


def vit(n):
    settings = dict(num_hidden_layers=1, num_attention_heads=2, image_size=16, patch_size=8, num_labels=3)
    return hf.ViTForImageClassification(hf.ViTConfig(hidden_size=n, intermediate_size=2 * n, **settings))


@pytest.mark.parametrize(
    "build, as_given",
    [
        (lambda n: language_model("Llama", n), config("Llama", BASE)),
        (vit, vit(BASE).config),
        (lambda n: torchvision.models.VisionTransformer(16, 8, 1, 2, n, 2 * n, num_classes=3), None),
        (lambda n: MLP(5, n, 3), None),
    ],
    ids=["llama", "vit", "torchvision", "mlp"],
)
def test_a_config_or_a_function_is_the_base_model(build, as_given):
    """For init_ and param_groups; nothing is allocated, and the config stays as it is."""
    made, before = [], copy.deepcopy(as_given)
    model, base = build(WIDTH), as_given or (lambda: made.append(build(BASE)) or made[-1])
    drawn = {}
    for given in (base, build(BASE)):
        torch.manual_seed(0)
        drawn[given is base] = weights(init_(model, given))
    assert equal(drawn[True], drawn[False])
    texts = [report(param_groups(model, given, lr=0.1, rho=0.1)) for given in (base, build(BASE))]
    assert texts[0] == texts[1] and "output" in texts[0]
    assert all(p.is_meta for m in [*made, base_module(model, base)] for p in m.parameters())
    assert as_given is None or vars(as_given) == vars(before)


def test_making_the_base_model_draws_no_random_numbers():
    """Some models draw weights that are not on the meta device, as those with weight_norm do."""
    model = MLP(5, WIDTH, 3)

    def base():
        torch.rand(3, device="cpu")
        return MLP(5, BASE, 3)

    drawn = []
    for given in (base, base()):
        torch.manual_seed(0)
        drawn.append(weights(init_(model, given)))
    assert equal(*drawn)


@pytest.mark.parametrize("width", [WIDTH, BASE])
def test_other_numbers_of_tokens_and_labels(width):
    """They are no width, also at the base width. Position tables may differ."""
    shape = dict(vocab_size=50, hidden_size=width, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)

    def bert(kind, positions=16, **options):
        settings = shape | dict(max_position_embeddings=positions, tie_word_embeddings=False)
        return getattr(hf, f"BertFor{kind}")(hf.BertConfig(**settings | options))

    def base(**options):
        return hf.BertConfig(**shape | dict(hidden_size=BASE, max_position_embeddings=16) | options)

    resized = language_model("Llama", width)
    resized.resize_token_embeddings(53)
    for model, given, message in (
        (resized, config("Llama", BASE), "53 tokens and the base model 50.*vocab_"),
        (language_model("Llama", width), config("Llama", BASE, vocab_size=40), "50 tokens and the base model 40"),
        (bert("SequenceClassification", num_labels=7), base(), "7 labels \\('classifier.*base model 2: .*num_labels"),
        (bert("TokenClassification"), base(num_labels=5), "2 labels \\('classifier.*base model 5"),
    ):
        with pytest.raises(ValueError, match=message):
            param_groups(model, given, lr=0.1, rho=0.1)
    table = language_model("Llama", width)
    table.lm_head = nn.Linear(width, 53, bias=False)
    with pytest.raises(ValueError, match="53 tokens and the base model 50"):
        describe(table, config("Llama", BASE))
    describe(bert("SequenceClassification", num_labels=7), base(num_labels=7))
    describe(bert("MaskedLM", num_labels=7), base(tie_word_embeddings=False)), "it has no classifier"
    describe(bert("SequenceClassification", positions=32), base())


def test_what_is_no_base_model():
    model = language_model("Llama")
    for given, error, message in (
        (config("Granite"), TypeError, "a LlamaConfig, or a function .* not of type GraniteConfig"),
        (BASE, TypeError, "not of type int"),
        (lambda: BASE, TypeError, "returned something of type int"),
        (lambda: torch.ones(()).item(), RuntimeError, "make it yourself, and pass the model"),
    ):
        with pytest.raises(error, match=message):
            param_groups(model, given, lr=0.1, rho=0.1)
    with pytest.raises(TypeError, match="base is a model, or a function"):
        init_(MLP(5, WIDTH, 3), config("Llama"))


@pytest.mark.parametrize(
    "name, now, at_base, divisor",
    [
        ("Granite", dict(logits_scaling=6.0), dict(logits_scaling=2.0), 3.0),
        ("MiniCPM3", dict(dim_model_base=16), dict(dim_model_base=64), 4.0),
        ("FalconH1", dict(lm_head_multiplier=0.1), dict(lm_head_multiplier=0.2), 2.0),
        ("Cohere", dict(logit_scale=0.1), dict(logit_scale=0.2), 2.0),
        ("HyperCLOVAX", dict(logits_scaling=0.5), dict(logits_scaling=1.0), 2.0),
        ("Llama", {}, {}, 1.0),
    ],
)
def test_how_much_more_a_model_divides_its_logits(name, now, at_base, divisor):
    """As measured on models with the same weights; the factors of the last layer take it up."""
    one, other = language_model(name, **now).eval(), language_model(name, **at_base).eval()
    x = torch.arange(6)[None]
    torch.testing.assert_close(one(x).logits * divisor, other(x).logits)
    weight, found = logits_divisor(one, other)
    assert weight is one.lm_head.weight and found == pytest.approx(divisor)
    of_width = WIDTH / 32 if "dim_model_base" in now else 1.0
    at_half_the_width = describe(one, config(name, 32, **at_base)).items()
    assert {n: w.divisor for n, w in at_half_the_width if w.divisor != 1} == (
        {"lm_head.weight": pytest.approx(divisor * of_width)} if divisor != 1 else {}
    )


def test_t5_divides_by_the_square_root_of_the_width():
    shape = dict(vocab_size=50, d_kv=8, num_layers=1, num_heads=2)
    model, base = (hf.T5ForConditionalGeneration(hf.T5Config(d_model=n, d_ff=n, **shape)).eval() for n in (WIDTH, BASE))
    weight, divisor = logits_divisor(model, base)
    assert weight is model.lm_head.weight and divisor == 2.0
    x = torch.arange(6)[None]
    divided = model(x, decoder_input_ids=x).logits
    model.config.scale_decoder_outputs = False
    torch.testing.assert_close(model(x, decoder_input_ids=x).logits, 8 * divided)
    assert logits_divisor(model, base)[1] == 0.25, "the base model's alone"
    with pytest.raises(ValueError, match="'global' needs .* by the growth of the width"):
        roles = {"shared.weight": "output"}
        param_groups(model, base, exponents(perturbation="global"), lr=1, rho=1, roles=roles)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_training_with_a_division_of_the_logits_equals_training_without(base):
    """Granite that divides its logits by 4 at 4 times the width, and Granite that does not."""
    x, y, outputs = torch.randint(50, (4, 8)), torch.randint(50, (32,)), []
    scaling = exponents(base_optimizer="sgd" if base is torch.optim.SGD else "adam")
    for number in (1.0, 4.0):
        model = language_model("Granite", logits_scaling=number)
        start = weights(init_(model, config("Granite", BASE), scaling).double())
        groups = param_groups(model, config("Granite", BASE), scaling, lr=0.01, rho=0.1)
        opt = SAM(groups, base, **{"eps": 1e-30} if base is torch.optim.AdamW else {})
        loss = lambda _: nn.functional.cross_entropy(model(x).logits.flatten(0, 1), y)
        losses = [opt.step(closure_of(opt, None, loss)).item() for _ in range(3)]
        outputs.append((losses, model(x).logits.detach(), start))
    (a, f, w), (b, g, v) = outputs
    assert a == pytest.approx(b, rel=1e-4) and a[-1] < a[0]
    torch.testing.assert_close(f, g, rtol=1e-3, atol=1e-4)
    assert equal([4 * w[-1]], [v[-1]]) and equal(w[:-1], v[:-1])


def test_a_tied_readout_that_divides_by_the_growth_needs_no_word():
    """MiniCPM3, as mup.MuSharedReadout; in T5, the square root is not enough."""
    tied = dict(tie_word_embeddings=True, dim_model_base=BASE)
    model = language_model("MiniCPM3", **tied)
    groups = param_groups(model, config("MiniCPM3", BASE, **tied), lr=0.1, rho=0.1)
    (group,) = (g for g in groups if "model.embed_tokens.weight" in g["names"])
    assert (group["role"], group["rho"], group["gradnorm_scaling"]) == ("input", pytest.approx(0.4), 2.0)
    for now, at_base in ((3136, 1024), (3136, 128)):  # quotients that floats round
        with torch.device("meta"):
            model, base = (language_model("MiniCPM3", n, **tied) for n in (now, at_base))
        assert "model.embed_tokens.weight" in by_name(param_groups(model, base, lr=0.1, rho=0.1))
    message = "one tied tensor in two roles. Untie both .*or .*roles={'model.embed_tokens.weight': 'output'}"
    with pytest.raises(ValueError, match=message):
        describe(language_model("Granite", tie_word_embeddings=True), config("Granite", BASE, tie_word_embeddings=True))


@pytest.mark.parametrize(
    "name, now, at_base, message",
    [
        ("Granite", dict(embedding_multiplier=6), dict(embedding_multiplier=12), "embedding_m.* 6 here and 12"),
        ("Granite", dict(residual_multiplier=0.5), {}, "residual_multiplier.*give both configs the same one"),
        ("FalconH1", dict(mlp_multipliers=[1.0, 0.5]), {}, "config.mlp_multipliers"),
        ("MiniCPM3", dict(scale_emb=6), {}, "embed_tokens.embed_scale"),
        ("Gemma", {}, {}, "embed_scale is 8.0 here and 4.0 .*embed_scale = torch.tensor\\(4.0\\)"),
        ("Afmoe", dict(mup_enabled=True), dict(mup_enabled=True), "set mup_enabled=False in both"),
    ],
)
def test_other_numbers_must_be_the_same(name, now, at_base, message):
    parts = dict(mamba_d_ssm=8, mamba_d_head=2) if name == "FalconH1" else {}
    model = language_model(name, **now)
    with pytest.raises(ValueError, match=message):
        param_groups(model, config(name, BASE, **at_base | parts), lr=0.1, rho=0.1)
    if now != at_base:
        describe(model, config(name, BASE, **now | parts))


def test_all_numbers_that_differ_are_in_one_error():
    """Those in buffers, too, whether the base model is made or a config; the error's advice helps."""
    shape = dict(vocab_size=50, hidden_size_per_layer_input=8, vocab_size_per_layer_input=50, head_dim=8, laurel_rank=4)
    shape |= HEADS | dict(num_hidden_layers=2, num_kv_shared_layers=0, layer_types=["full_attention"] * 2)
    shape |= dict(activation_sparsity_pattern=[0.0, 0.0], tie_word_embeddings=False)

    def gemma3n(n):
        return hf.Gemma3nTextConfig(hidden_size=n, intermediate_size=2 * n, **shape)

    model = hf.Gemma3nForCausalLM(gemma3n(WIDTH))
    for base in (gemma3n(BASE), hf.Gemma3nForCausalLM(gemma3n(BASE))):
        with pytest.raises(ValueError, match="per_layer_projection_scale is 0.125 here and 0.25") as caught:
            describe(model, base)
        lines = str(caught.value).splitlines()[1:]
        assert [line.split()[0].rpartition(".")[2] for line in lines] == [
            *("per_layer_projection_scale", "embed_scale", "router_input_scale", "router_input_scale")
        ]
    for line in lines:
        exec(re.search(r"set (model\..*\))", line)[1], {"model": model, "torch": torch})
    assert describe(model, base)["lm_head.weight"].role == "output"
    assert model(torch.arange(6)[None]).logits.shape == (1, 6, 50)


def test_numbers_in_buffers_of_other_models_are_their_own_affair():
    """A running number, and a scale of attention."""

    class Model(MLP):
        def __init__(self, n, persistent):
            super().__init__(5, n, 3)
            self.register_buffer("number", torch.tensor(1 / n), persistent=persistent)

    for persistent in (True, False):
        describe(Model(WIDTH, persistent), Model(BASE, persistent))


@pytest.mark.parametrize("family", ["T5", "MT5", "UMT5", "LongT5", "Pop2Piano", "Udop"])
def test_embeddings_of_t5_stay_tied(family):
    assert getattr(hf, f"{family}Config")(tie_word_embeddings=False).tie_word_embeddings, "docs/networks.md says so"


def test_numbers_of_a_model_inside():
    """Llava has a readout of its own, which does not divide as Granite's does."""
    vision = dict(hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1, image_size=8)

    def llava(n, **numbers):
        text, images = config("Granite", n, **numbers), hf.CLIPVisionConfig(patch_size=4, **vision)
        return hf.LlavaConfig(text_config=text, vision_config=images, image_token_index=3)

    model = hf.LlavaForConditionalGeneration(llava(WIDTH))
    assert describe(model, llava(BASE))["lm_head.weight"].divisor == 1.0
    for numbers in (dict(logits_scaling=2.0), dict(residual_multiplier=2.0)):
        with pytest.raises(ValueError, match=f"config.text_config.{next(iter(numbers))}"):
            describe(model, llava(BASE, **numbers))


def test_numbers_that_may_differ():
    """What multiplies the logits of attention, and an embed_scale that was set as the error says."""
    describe(language_model("Granite", attention_multiplier=0.01), config("Granite", BASE, attention_multiplier=0.04))
    gemma = language_model("Gemma")
    gemma.get_submodule("model.embed_tokens").embed_scale = torch.tensor(4.0)
    assert describe(gemma, config("Gemma", BASE))["lm_head.weight"].divisor == 1.0
    assert gemma(torch.arange(6)[None]).logits.shape == (1, 6, 50)
    describe(language_model("Gemma", 24).bfloat16(), config("Gemma", 24)), "its rounded number is the same"
