"""A language model, data, SAMTrainer on them, and the plain loop to compare it with."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import re
from contextlib import nullcontext

import pytest
import torch
from small_problems import weights
from torch import nn
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import mup2_fused as mup2
from experiments.data import import_torchvision

torchvision = import_torchvision()  # before transformers, which imports it
pytest.importorskip("accelerate")
hf = pytest.importorskip("transformers")

from mup2_fused.huggingface import SAMTrainer
from mup2_fused.loops import passes

hf.utils.logging.set_verbosity_error()

WIDTH, BASE, MICRO, STEPS = 32, 16, 4, 4  # 22 samples: updates of 4 and of 2 micro-batches, the last one of 2 samples
SETTINGS = dict(learning_rate=0.01, weight_decay=0.1, warmup_steps=1, num_train_epochs=2, logging_steps=1)
SETTINGS |= dict(per_device_train_batch_size=MICRO, gradient_accumulation_steps=4, max_grad_norm=0)
QUIET = dict(use_cpu=True, report_to=[], disable_tqdm=True, save_strategy="no", train_sampling_strategy="sequential")
WAYS = [{}, {"interval": 2}, {"ascent": "momentum"}]


def config(n=WIDTH, dropout=0.0):
    shape = dict(vocab_size=50, hidden_size=n, intermediate_size=2 * n, num_hidden_layers=1, num_attention_heads=2)
    return hf.LlamaConfig(**shape, attention_dropout=dropout, eos_token_id=2)


def llama(seed=0, **options):
    torch.manual_seed(seed)
    return mup2.init_(hf.LlamaForCausalLM(config(**options)), config(BASE))


class Classifier(nn.Module):
    """Not of transformers: Trainer divides its loss by the number of micro-batches."""

    def __init__(self, n=WIDTH):
        super().__init__()
        self.mlp = mup2.MLP(5, n, 3)

    def forward(self, x, labels):
        return {"loss": cross_entropy(self.mlp(x), labels)}


def classifier(seed=0):
    torch.manual_seed(seed)
    return mup2.init_(Classifier(), lambda: Classifier(BASE))


def samples(model, n=22):
    """Sentences have from 1 to 6 targets, so that micro-batches differ in how many they have."""
    torch.manual_seed(1)
    if isinstance(model, Classifier):
        return [dict(x=torch.randn(5), labels=torch.randint(3, ())) for _ in range(n)]
    sentences = [torch.randint(50, (8,)) for _ in range(n)]
    return [dict(input_ids=s, labels=s.where(torch.arange(8) < torch.randint(2, 8, ()), -100)) for s in sentences]


def base_of(model):
    return (lambda: Classifier(BASE)) if isinstance(model, Classifier) else config(BASE)


def trainer_of(model, folder, options=None, kind=SAMTrainer, data=None, **arguments):
    """options: of SAMTrainer."""
    args = hf.TrainingArguments(str(folder), **QUIET | SETTINGS | arguments)
    options = dict(base=base_of(model), rho=0.1) if options is None else options
    return kind(model, args, train_dataset=data or samples(model), **options)


def trained(model, folder, sam=None, **arguments):
    trainer = trainer_of(model, folder, dict(base=base_of(model), rho=0.1, sam=sam), **arguments)
    trainer.train()
    return trainer


def sam_of(model, **options):
    """No weight decay on vectors."""
    scaling = mup2.exponents(base_optimizer="adam")
    made = mup2.param_groups(model, base_of(model), scaling, lr=0.01, rho=0.1, weight_decay=0.1)
    groups = []
    for g in made:
        for vectors in (False, True):
            params = [p for n, p in zip(g["names"], g["params"]) if bool(re.search("bias|norm", n)) == vectors]
            groups += [g | {"params": params} | ({"weight_decay": 0.0} if vectors else {})] if params else []
    return mup2.SAM(groups, torch.optim.AdamW, fused=True, **options)


def loss_of(model, batch, batches):
    if isinstance(model, Classifier):
        return model(**batch)["loss"] / len(batches)
    return model(**batch, num_items_in_batch=sum(b["labels"][:, 1:].ne(-100).sum() for b in batches)).loss


def plain(model, sam=None, clip=0, context=nullcontext, scaler=None, data=None, per_update=4, updates=STEPS):
    """The loop; (weights, losses at w, norms of the last gradient)."""
    opt, losses, norms = sam_of(model, **sam or {}), [], []
    scheduler = hf.get_linear_schedule_with_warmup(opt, 1, STEPS)
    micro = list(DataLoader(data or samples(model), MICRO, collate_fn=hf.default_data_collator))
    groups = [micro[i : i + per_update] for i in range(0, len(micro), per_update)]
    for batches in (groups * 2)[:updates]:

        def closure():
            opt.zero_grad()
            total = 0.0
            for batch in batches:
                with context():
                    loss = loss_of(model, batch, batches)
                (scaler.scale(loss) if scaler else loss).backward()
                total += loss.detach()
            if clip and not scaler and (opt.phase.backups or opt.moments or not opt.climbs):  # the last pass only
                norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
            return total

        if scaler:
            losses.append(passes(opt, closure, closure).item())
            scaler.unscale_(opt)
            norms.append(torch.nn.utils.clip_grad_norm_(model.parameters(), clip).item())
            scaler.step(opt)
            scaler.update()
        else:
            losses.append(opt.step(closure).item())
        scheduler.step()
    return weights(model), losses, norms
