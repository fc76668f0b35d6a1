"""param_groups and init_ on models that other people wrote, unchanged: torchvision's, timm's and Hugging Face's."""

import warnings
from typing import NamedTuple

import pytest
import torch
from huggingface_problems import hf, torchvision
from small_problems import block, by_name, closure_of
from torch import nn

import mup2_fused
from mup2_fused import SAM, init_, param_groups
from mup2_fused.check import check

timm = pytest.importorskip("timm")

BASE, M = 16, 4
tv = torchvision.models


def image(batch=4):
    return torch.randn(batch, 3, 32, 32)


def tokens(batch=4):
    return torch.randint(50, (batch, 8))


def config(kind, n, **kwargs):
    return kind(hidden_size=n, num_hidden_layers=2, num_attention_heads=2, intermediate_size=4 * n, **kwargs)


def gpt2(n):
    return hf.GPT2LMHeadModel(
        hf.GPT2Config(vocab_size=50, n_embd=n, n_layer=2, n_head=2, n_positions=16, tie_word_embeddings=False)
    )


SMALL = dict(img_size=32, patch_size=4, num_classes=10)


class Model(NamedTuple):
    build: callable  # of the width
    inputs: callable
    output: set  # parameters with this role
    hidden: set  # some that have this one
    input: set


MODELS = {
    "torchvision wide resnet": Model(  # whose blocks are wide inside: their last layers are outputs, the head is not
        lambda n: tv.ResNet(tv.resnet.Bottleneck, [1, 1, 1, 1], 10, width_per_group=n),
        image,
        {f"layer{i}.0.conv3.weight" for i in range(1, 5)},
        {f"layer{i}.0.conv2.weight" for i in range(1, 5)},
        {"layer1.0.conv1.weight", "layer1.0.bn1.weight"},
    ),
    "torchvision vit": Model(
        lambda n: tv.VisionTransformer(32, 8, 2, 2, n, 4 * n, num_classes=10),
        image,
        {"heads.head.weight"},
        {"encoder.layers.encoder_layer_0.self_attention.in_proj_weight"},
        {"conv_proj.weight", "class_token", "encoder.pos_embedding"},
    ),
    "torchvision convnext": Model(
        lambda n: tv.ConvNeXt([tv.convnext.CNBlockConfig(n, 2 * n, 1), tv.convnext.CNBlockConfig(2 * n, None, 1)]),
        image,
        {"classifier.2.weight"},
        {"features.1.0.block.3.weight", "features.2.1.weight"},
        {"features.0.0.weight", "features.1.0.block.0.weight", "features.1.0.layer_scale"},
    ),
    "torchvision swin": Model(
        lambda n: tv.SwinTransformer([4, 4], n, [1, 1], [2, 4], [4, 4], num_classes=10),
        image,
        {"head.weight"},
        {"features.1.0.attn.qkv.weight", "features.2.reduction.weight"},
        {"features.0.0.weight"},
    ),
    "timm vit": Model(
        lambda n: timm.create_model("vit_small_patch16_224", embed_dim=n, num_heads=2, depth=2, **SMALL),
        image,
        {"head.weight"},
        {"blocks.0.attn.qkv.weight", "blocks.1.mlp.fc2.weight"},
        {"patch_embed.proj.weight", "cls_token", "pos_embed", "norm.weight"},
    ),
    "timm swin": Model(
        lambda n: timm.create_model(
            "swin_tiny_patch4_window7_224", embed_dim=n, depths=(1, 1), num_heads=(2, 4), window_size=4, **SMALL
        ),
        image,
        {"head.fc.weight"},
        {"layers.0.blocks.0.attn.qkv.weight", "layers.1.downsample.reduction.weight"},
        {"patch_embed.proj.weight"},
    ),
    "timm convnext": Model(
        lambda n: timm.create_model("convnext_tiny", dims=(n, *[2 * n] * 3), depths=(1, 1, 1, 1), num_classes=10),
        image,
        {"head.fc.weight"},
        {"stages.0.blocks.0.mlp.fc1.weight", "stages.1.downsample.1.weight"},
        {"stem.0.weight", "stages.0.blocks.0.conv_dw.weight", "stages.0.blocks.0.gamma"},
    ),
    "hf bert": Model(
        lambda n: hf.BertForSequenceClassification(config(hf.BertConfig, n, vocab_size=50, num_labels=10)),
        tokens,
        {"classifier.weight"},
        {"bert.pooler.dense.weight"},
        {"bert.embeddings.word_embeddings.weight", "bert.embeddings.token_type_embeddings.weight"},
    ),
    "hf llama": Model(
        lambda n: hf.LlamaForCausalLM(config(hf.LlamaConfig, n, vocab_size=50, num_key_value_heads=1)),
        tokens,
        {"lm_head.weight"},
        {"model.layers.0.self_attn.k_proj.weight", "model.layers.0.mlp.gate_proj.weight"},
        {"model.embed_tokens.weight", "model.norm.weight"},
    ),
    "hf gpt2": Model(  # its Conv1D is a class of its own, whose matrices are (in, out)
        gpt2,
        tokens,
        {"lm_head.weight"},
        {f"transformer.h.0.{name}.weight" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
        {"transformer.wte.weight", "transformer.wpe.weight"},
    ),
    "hf vit": Model(
        lambda n: hf.ViTForImageClassification(config(hf.ViTConfig, n, image_size=32, patch_size=8, num_labels=10)),
        image,
        {"classifier.weight"},
        {"vit.layers.0.mlp.fc1.weight"},
        {"vit.embeddings.cls_token", "vit.embeddings.position_embeddings"},
    ),
    "hf resnet": Model(
        lambda n: hf.ResNetForImageClassification(
            hf.ResNetConfig(embedding_size=n, hidden_sizes=[4 * n, 8 * n], depths=[1, 1], num_labels=10)
        ),
        image,
        {"classifier.1.weight"},
        {"resnet.encoder.stages.1.layers.0.layer.0.convolution.weight"},
        {"resnet.embedder.embedder.convolution.weight"},
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_other_peoples_models(name):
    m = MODELS[name]
    model, base = m.build(M * BASE), m.build(BASE)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    assert init_(model, base) is model
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # no role is assumed
        groups = param_groups(model, base, lr=0.05, rho=0.02)
    found = by_name(groups)
    role = {n: g["role"] for n, g in found.items()}
    assert role.keys() == before.keys()
    assert {n for n, r in role.items() if r == "output"} == m.output
    assert {role[n] for n in m.hidden} <= {"hidden"} and {role[n] for n in m.input} == {"input"}
    assert all(found[n]["rho"] == pytest.approx(0.02 / M) for n in m.output)
    assert all(found[n]["gradnorm_scaling"] == pytest.approx(M**0.5) for n in m.input)
    fan_in = {n: before[n].shape[1] for n in m.output}
    for n, p in model.named_parameters():
        if n in m.output:
            assert p.std().item() == pytest.approx((2 * M / fan_in[n]) ** 0.5 / M, rel=0.2)
        if isinstance(model.get_submodule(n.rpartition(".")[0]), (nn.LayerNorm, nn.BatchNorm2d, nn.Embedding)):
            assert torch.equal(p, before[n])

    opt, x, losses = SAM(groups, momentum=0.9), m.inputs(), []

    def loss(_):
        torch.manual_seed(0)  # the same dropout
        f = model(x)
        f = getattr(f, "logits", f)
        losses.append(nn.functional.cross_entropy(f.flatten(0, -2), torch.arange(f[..., 0].numel()) % 10))
        return losses[-1]

    for _ in range(6):
        opt.step(closure_of(opt, None, loss))
    assert losses[1] > losses[0], "the perturbation climbs"
    assert losses[-2] < losses[0], "and the steps descend"


def recipe(model):
    """The lines for GPT-2 in docs/networks.md."""
    names = {"mup2": mup2_fused, "gpt2": model, "gpt2_base": gpt2(BASE)}
    exec(block("docs/networks.md", "gpt2"), names)
    return names["groups"]


def test_the_documented_recipe_for_gpt2():
    model = gpt2(M * BASE)
    recipe(model)
    mlp = model.transformer.h[0].mlp
    for conv1d, fan_in in ((mlp.c_fc, M * BASE), (mlp.c_proj, 4 * M * BASE)):
        assert conv1d.weight.std().item() == pytest.approx(fan_in**-0.5, rel=0.05) and not conv1d.bias.any()
    report = check(gpt2, [16, 32, 64, 128], groups=recipe, seeds=2, batch=8)
    assert report.passed and not any(row.wrong or row.unclear for row in report.rows), str(report)
    assert all(row.values["perturbation"] for row in report.rows if row.role in ("hidden", "output"))


@pytest.mark.parametrize("name", ["torchvision vit", "hf llama"])
def test_the_perturbation_check_passes(name):
    m = MODELS[name]
    shape = dict(input_shape=(3, 32, 32)) if m.inputs is image else {}
    report = check(m.build, [16, 32, 64, 128], base_optimizer="adam", seeds=2, steps=3, batch=8, **shape)
    assert report.passed, str(report)
