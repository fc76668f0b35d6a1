"""Matrices that are not nn.Linear's: raw tensors with a layout, stacks of matrices, the experts of transformers.

Their roles, factors and initial weights are those of the same matrices in nn.Linear.
"""

import pytest
import torch
from huggingface_problems import hf
from small_problems import Raw
from torch import nn

from mup2_fused import exponents, init_, param_groups
from mup2_fused.check import check
from mup2_fused.roles import describe

BASE, WIDE, M = 8, 32, 4
ADAM = exponents(base_optimizer="adam")


def factors(model, base, roles=None):
    """name -> role, growth, base_fan_in, and the factors of lr for SGD and Adam, of rho and of the norm"""
    weights = describe(model, base, roles)
    found = {n: [w.role, tuple(w.growth), w.base_fan_in] for n, w in weights.items()}
    for scaling in (exponents(), ADAM):
        for g in param_groups(model, base, scaling, lr=1.0, rho=1.0, roles=roles):
            for n in g["names"]:
                found[n] += [g["lr"], g["rho"], g["gradnorm_scaling"]]
    return found


def of_linear(fan_in, fan_out, base_fan_in, base_fan_out):
    args = dict(bias=False, device="meta")
    return factors(nn.Linear(fan_in, fan_out, **args), nn.Linear(base_fan_in, base_fan_out, **args))["weight"]


LAYOUTS = [  # shape, word, (fan_in, fan_out)
    (lambda n: (4, n, 2 * n), "hidden", lambda n: (2 * n, n)),
    (lambda n: (4, n, 2 * n), "batch out in", lambda n: (2 * n, n)),
    (lambda n: (4, n, 2 * n), "batch in out", lambda n: (n, 2 * n)),
    (lambda n: (3, 4, n, 2 * n), "in out", lambda n: (n, 2 * n)),
    (lambda n: (4, n, n * n), "in out", lambda n: (n, n * n)),
    (lambda n: (4, n, n * n), "out in", lambda n: (n * n, n)),
    (lambda n: (n, n * n), "in out", lambda n: (n, n * n)),
    (lambda n: (n, 5, n), "in batch out", lambda n: (n, n)),
    (lambda n: (n, 2 * n, 3), "out in in", lambda n: (6 * n, n)),  # a convolution
    (lambda n: (5, n), "in out", lambda n: (5, n)),
    (lambda n: (n, 5), "in out", lambda n: (n, 5)),
    (lambda n: (n, 5), "output", lambda n: (n, 5)),
    (lambda n: (4, 5, n), "output", lambda n: (n, 5)),
    (lambda n: (4, n, 5), "output", lambda n: (n, 5)),
    (lambda n: (n,), "output", lambda n: (n, 1)),  # x @ w
    (lambda n: (n,), "in", lambda n: (n, 1)),
    (lambda n: (1, 1, n), "output", lambda n: (n, 1)),
    (lambda n: (1, 2, n), "batch batch in", lambda n: (n, 1)),  # two heads of graph attention
    (lambda n: (n // 4, 4, 4), "out out in", lambda n: (4, n)),  # blocks on a diagonal
]


@pytest.mark.parametrize("shape, word, fans", LAYOUTS)
def test_raw_tensors_are_scaled_as_linear_layers(shape, word, fans):
    model, base = Raw(*shape(WIDE)), Raw(*shape(BASE))
    assert factors(model, base, {"w": word})["w"] == of_linear(*fans(WIDE), *fans(BASE))


@pytest.mark.parametrize("word, factor", [("input", M), ("out", M), ("finite", 1)])
def test_raw_tensors_that_are_no_matrices_are_not_drawn(word, factor):
    for shape in (lambda n: (4, 5, n), lambda n: (1, n, 1)):
        if word == "out" and shape(9)[-1] == 1:
            continue
        model, base = Raw(*shape(WIDE)), Raw(*shape(BASE))
        assert factors(model, base, {"w": word})["w"][2:5] == [None, factor, factor]
        assert not init_(model, base, roles={"w": word}).w.any()


def test_what_a_role_alone_does_not_tell():
    for shape in (lambda n: (4, n, n * n), lambda n: (n, n, 3), lambda n: (n, n, n), lambda n: (1, 1, n)):
        with pytest.raises(ValueError, match=r"role of 'w' .* says 'hidden'\).*'in out' for x @ w, 'batch in out'"):
            describe(Raw(*shape(WIDE)), Raw(*shape(BASE)), {"w": "hidden"})
    for word in ("batch out in", "batch in out"):
        with pytest.raises(
            ValueError, match=rf"'w' \(shape .* number of experts, is no width.*'w': '{word.replace('batch', 'out')}'"
        ):
            describe(Raw(32, 32, 32), Raw(8, 8, 8), {"w": word})
    for word in ("batch", "out inn", "batch batch out in", ""):
        with pytest.raises(ValueError, match=rf"'w' the role '{word}'; take .* layout .* each of its 3 dimensions"):
            describe(Raw(4, 32, 32), Raw(4, 8, 8), {"w": word})


@pytest.mark.parametrize("word, fan_in", [("hidden", 16), ("batch out in", 16), ("batch in out", 8), ("in out", 8)])
def test_a_stack_is_drawn_matrix_by_matrix_at_every_width(word, fan_in):
    base = Raw(50, BASE, 2 * BASE)
    for n in (BASE, WIDE):
        model = init_(Raw(50, n, 2 * n), base, gain=3.0, roles={"w": word})
        assert model.w.std().item() == pytest.approx(3 * (fan_in * n / BASE) ** -0.5, rel=0.03)


class Experts(nn.Module):
    """Of no library: the shapes tell that the matrices are (out, in)."""

    def __init__(self, n, m):
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Parameter(torch.ones(4, 2 * m, n)), nn.Parameter(torch.ones(4, n, m))


class Conv1D(nn.Module):
    """Only shares its name with the layer of GPT-2."""

    def __init__(self, n, m):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(m, n)), nn.Parameter(torch.ones(m))


def test_modules_that_are_recognized_by_more_than_their_names():
    found = factors(Experts(64, 64), Experts(16, 8))
    assert found["gate_up_proj"] == of_linear(64, 128, 16, 16) and found["down_proj"] == of_linear(64, 64, 8, 16)
    with pytest.raises(ValueError, match=r"role of 'weight' .* Conv1D"):
        describe(Conv1D(64, 32), Conv1D(16, 8))


# ------------------------------------------------------------------------------------------ transformers


def config(kind, n, m, **kwargs):
    """Width n, width m inside of the experts."""
    sizes = dict(hidden_size=n, intermediate_size=m, moe_intermediate_size=m, vocab_size=50, num_hidden_layers=1)
    heads = dict(num_attention_heads=2, num_key_value_heads=2, head_dim=n // 2, num_experts_per_tok=2)
    return kind(**sizes | heads | dict(tie_word_embeddings=False, pad_token_id=0) | kwargs)


def deepseek(n, m):
    ranks = dict(q_lora_rank=n, kv_lora_rank=n, qk_rope_head_dim=n // 2, qk_nope_head_dim=n // 2, v_head_dim=n // 2)
    experts = dict(n_routed_experts=4, n_group=1, topk_group=1, first_k_dense_replace=0)
    return hf.DeepseekV3ForCausalLM(config(hf.DeepseekV3Config, n, m, **ranks, **experts))


EXPERTS = {  # and whether their matrices are (in, out)
    "Mixtral": (lambda n, m: hf.MixtralForCausalLM(config(hf.MixtralConfig, n, m, num_local_experts=4)), False),
    "Qwen2Moe": (lambda n, m: hf.Qwen2MoeForCausalLM(config(hf.Qwen2MoeConfig, n, m, num_experts=4)), False),
    "Qwen3Moe": (lambda n, m: hf.Qwen3MoeForCausalLM(config(hf.Qwen3MoeConfig, n, m, num_experts=4)), False),
    "DeepseekV3": (deepseek, False),
    "NemotronH": (  # whose up_proj has no gate beside it
        lambda n, m: hf.NemotronHForCausalLM(
            config(hf.NemotronHConfig, n, m, layers_block_type=["moe"], n_routed_experts=4, n_group=1, topk_group=1)
        ),
        False,
    ),
    "GptOss": (lambda n, m: hf.GptOssForCausalLM(config(hf.GptOssConfig, n, m, num_local_experts=4)), True),
    "Aria": (lambda n, m: hf.AriaTextForCausalLM(config(hf.AriaTextConfig, n, m, moe_num_experts=4)), True),
    "Llama4": (  # whose experts have no attribute that tells
        lambda n, m: hf.Llama4ForCausalLM(
            config(hf.Llama4TextConfig, n, m, num_local_experts=4, num_experts_per_tok=1)
        ),
        True,
    ),
}


@pytest.mark.parametrize("name", EXPERTS)
def test_experts_are_scaled_and_drawn_as_linear_layers(name):
    """The two widths grow by different factors, so that a transposed matrix would show."""
    build, transposed = EXPERTS[name]
    sizes, base_sizes = (64, 64), (16, 8)
    model, base = build(*sizes), build(*base_sizes)
    for m in model.modules():
        m.__class__ = type("FSDP" + type(m).__name__, (type(m),), {})  # as fully_shard makes classes
    found = factors(model, base)
    init_(model, base, gain=1.0)
    seen = set()
    for key, p in model.named_parameters():
        local = key.rpartition(".")[2]
        if ".experts." in key and local.endswith("proj"):
            up = 1 + local.startswith("gate_up")
            fans = [(n, up * m) if "up" in local else (m, n) for n, m in (sizes, base_sizes)]
            assert tuple(p.shape) == (4, *(fans[0] if transposed else fans[0][::-1]))
            assert found[key] == of_linear(*fans[0], *fans[1]), key
            same = init_(nn.Linear(*fans[0], bias=False), nn.Linear(*fans[1], bias=False), gain=1.0)
            assert p.std().item() == pytest.approx(same.weight.std().item(), rel=0.06), key
            seen.add(local)
        elif ".experts." in key:
            assert local.endswith("proj_bias") and found[key][:3] == ["input", (8 if "up" in local else 4, 1), None]
            assert not p.any()
        elif tuple(p.shape) == (4, 64):  # the router
            assert found[key] == of_linear(64, 4, 16, 4)
            assert p.std().item() == pytest.approx(16**-0.5 / 4, rel=0.2)
            seen.add("router")
    assert seen == {"router", "down_proj", "up_proj" if name == "NemotronH" else "gate_up_proj"}


def test_zero_output_leaves_routers_random():
    build, _ = EXPERTS["Mixtral"]
    model = init_(build(64, 64), build(16, 16), zero_output=True)
    assert not model.lm_head.weight.any() and model.model.layers[0].mlp.gate.weight.any()


def test_experts_pass_the_perturbation_check():
    for name, base in (("Mixtral", "sgd"), ("Aria", "adam")):
        report = check(lambda n: EXPERTS[name][0](n, n), [16, 32, 64], base_optimizer=base, seeds=2, steps=3)
        assert report.passed, str(report)
        effects = [r.values["perturbation"] for r in report.rows if ".experts." in r.name and r.name.endswith("proj")]
        assert len(effects) == 2 and all(effects)
