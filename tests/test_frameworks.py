"""The README's recipes for Lightning and Accelerate, run against the real libraries and held to a plain loop."""

import logging
import re
import subprocess
import sys
import warnings
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import pytest
import torch
from conftest import ROOT
from torch.utils.data import DataLoader, TensorDataset

import data
import mup2_ref

with suppress(data.DataError):
    data.import_torchvision()  # before lightning, which imports it if it is there
accelerate = pytest.importorskip("accelerate")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning")
from accelerate.state import AcceleratorState, GradientState
from lightning.pytorch.plugins import MixedPrecision

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about workers, logging intervals and the like

README = (ROOT / "README.md").read_text()
SECTION = README.partition("### With Lightning, Accelerate\n")[2].partition("\n## ")[0]
TOP, *_ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
RECIPES = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
LIT, PIECES, HALF, ACCELERATE, ACCELERATE_HALF = RECIPES
EPOCHS = 3


@pytest.fixture(autouse=True)
def _patched(request, monkeypatch, tmp_path):
    """The recipes use mup2.SAM: let it be the fixture's. Trainers are quiet and short, and write to tmp_path."""
    if "SAM" in request.fixturenames:
        monkeypatch.setattr(mup2_ref, "SAM", request.getfixturevalue("SAM"))
    monkeypatch.setattr(lightning, "Trainer", partial(trainer, default_root_dir=tmp_path))
    fresh_accelerator()
    yield
    fresh_accelerator()


def trainer(*, Trainer=lightning.Trainer, **kwargs):
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False, accelerator="cpu")
    return Trainer(**dict(enable_checkpointing=False, devices=1) | kwargs | quiet | dict(max_epochs=EPOCHS))


def fresh_accelerator():
    AcceleratorState._reset_state(True)  # which all of a process share
    GradientState._reset_state()


def names(seed=0, batch_size=8, samples=40, base="torch.optim.SGD, momentum=0.9"):
    """What the code at the README's top leaves behind, after no step."""
    torch.manual_seed(seed)
    space = {"Model": lambda width: mup2_ref.MLP(5, width, 3), "loader": []}
    exec(TOP.replace("torch.optim.SGD, momentum=0.9", base).replace("width=1024", "width=256"), space)
    torch.manual_seed(1)
    samples = TensorDataset(torch.randn(samples, 5), torch.randint(3, (samples,)))
    return space | {
        "loader": DataLoader(samples, batch_size),
        "loss_function": torch.nn.functional.cross_entropy,
        "base": base,
    }


def execute(recipe, space):
    exec(recipe.replace("torch.optim.SGD, momentum=0.9", space["base"]), space)
    return space


def plain(space, epochs=EPOCHS, every="epoch", clip=None, context=nullcontext, T_max=None):
    """The loop at the README's top with a scheduler, clipping and autocast; its weights."""
    model, opt, losses = space["model"], space["opt"], []
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max or epochs)
    for _ in range(epochs):
        for x, y in space["loader"]:

            def closure():
                opt.zero_grad()
                with context():
                    loss = space["loss_function"](model(x), y)
                loss.backward()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                return loss

            losses.append(opt.step(closure).item())
            if every == "batch":
                scheduler.step()
        if every == "epoch":
            scheduler.step()
    return weights(space), losses


def weights(space):
    model = space["model"]
    return [p.detach().clone() for p in getattr(model, "module", model).parameters()]


def equal(a, b):
    return all(torch.equal(p, q) for p, q in zip(a, b, strict=True))


def learning_rates(optimizer):
    return [group["lr"] for group in optimizer.param_groups]


def same_state(a, b):
    """Of two state_dicts: momenta, moments and step counts, to the bit, and groups."""
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert a["state"] and a["param_groups"] == b["param_groups"]


def half():
    """What Trainer(precision="16-mixed") makes on a GPU; on a CPU Lightning takes bfloat16 instead."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**14))


def plain_half(space):
    """The loop of mup2_ref, with the same scaler; returns weights and scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(space["opt"], EPOCHS)
    autocast = partial(torch.autocast, "cpu", torch.float16, cache_enabled=False)
    for _ in range(EPOCHS):
        mup2_ref.train_epoch(space["model"], space["opt"], space["loader"], autocast=autocast, scaler=scaler)
        scheduler.step()
    return weights(space), scaler


@pytest.mark.parametrize("recipe", RECIPES, ids=["Lit", "LitPieces", "LitHalf", "accelerate", "accelerate, fp16"])
def test_recipes_are_short(recipe):
    assert len([line for line in recipe.splitlines() if line]) <= 15


# ------------------------------------------------------------------------------------------------ Lightning


def lit(kind="Lit", seed=0, fit=None, batch_size=8, **kwargs):
    """The README's class of that name, trained; the names of the code, with lit and trainer."""
    space = names(seed, batch_size)
    space["base"] = kwargs.pop("base", space["base"])
    definition, _, _ = LIT.partition("lightning.Trainer(")
    execute(definition + PIECES + HALF, space)
    space["lit"] = space[kind](space["model"], space["groups"])
    space["trainer"] = lightning.Trainer(**kwargs)
    space["trainer"].fit(space["lit"], space["loader"], **fit or {})
    return space


def test_lightning_equals_the_plain_loop(SAM):
    """The recipe as it stands."""
    space = execute(LIT, names())
    expected, _ = plain(names())
    assert equal(weights(space), expected) and not equal(expected, weights(names()))


def test_lightning_steps_the_scheduler(SAM):
    space = lit()
    plain(reference := names(), epochs=EPOCHS)
    optimizer = space["trainer"].optimizers[0]
    assert type(optimizer) is SAM and space["trainer"].global_step == EPOCHS * 5
    same_state(optimizer.state_dict(), reference["opt"].state_dict())
    constant, _ = plain(names(), every="never")
    assert not equal(weights(space), constant)


def test_lightning_with_bf16_mixed(SAM):
    space = lit(precision="bf16-mixed")
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)
    assert equal(weights(space), plain(names(), context=autocast)[0])
    assert not equal(weights(space), plain(names())[0])


def test_lightning_clips_gradients(SAM):
    space = lit(gradient_clip_val=0.1)
    assert equal(weights(space), plain(names(), clip=0.1)[0])
    assert not equal(weights(space), plain(names())[0])


@pytest.mark.parametrize("base", ["torch.optim.SGD, momentum=0.9", "torch.optim.AdamW, weight_decay=0.1"])
def test_lightning_resumes_bit_for_bit(SAM, base, tmp_path):
    keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    whole = lit(base=base, enable_checkpointing=True, callbacks=[keep])
    path = str(tmp_path / "epoch=0.ckpt")
    resumed = lit(base=base, seed=7, fit=dict(ckpt_path=path))
    assert equal(weights(resumed), weights(whole))
    assert resumed["trainer"].global_step == whole["trainer"].global_step == EPOCHS * 5
    same_state(*(s["trainer"].optimizers[0].state_dict() for s in (resumed, whole)))
    saved = torch.load(path, weights_only=False)["state_dict"].values()
    assert not equal(saved, weights(whole)) and not equal(weights(lit(base=base, seed=7)), weights(whole))


def test_lightning_logs_both_passes_but_the_loss_at_w_can_be_logged(SAM, monkeypatch):
    """The README's one-line optimizer_step."""
    (line,) = re.findall(r"`(def optimizer_step.*?)`", SECTION, re.DOTALL)
    space = execute(LIT.partition("lightning.Trainer(")[0] + line, names())
    Lit, seen = space["Lit"], []

    class Logs(Lit):
        optimizer_step = space["optimizer_step"]

        def training_step(self, batch, batch_idx):
            loss = super().training_step(batch, batch_idx)
            self.log("both", loss, on_epoch=True)
            seen.append(loss.item())
            return loss

        def on_train_epoch_end(self):
            epochs.append({k: self.trainer.callback_metrics[k].item() for k in ("loss_epoch", "both_epoch")})

    epochs = []
    lightning.Trainer().fit(Logs(space["model"], space["groups"]), space["loader"])
    expected, losses = plain(names())
    assert equal(weights(space), expected) and seen[::2] == losses
    at_w = torch.tensor(losses).view(EPOCHS, -1).mean(1)
    both = torch.tensor(seen).view(EPOCHS, -1).mean(1)
    torch.testing.assert_close(torch.tensor([e["loss_epoch"] for e in epochs]), at_w)
    torch.testing.assert_close(torch.tensor([e["both_epoch"] for e in epochs]), both)
    assert (both > at_w).all()


def test_lightning_accumulates_in_manual_optimization(SAM):
    """A large batch in pieces of 32, the last one of 8, clipped: mup2_ref.accumulate in a plain loop."""
    space = lit("LitPieces", batch_size=40)
    reference = names()
    loader = [(x.split(32), y.split(32)) for x, y in DataLoader(reference["loader"].dataset, 40)]
    model, opt = reference["model"], reference["opt"]
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, EPOCHS)
    for _ in range(EPOCHS):
        for x, y in loader:

            def closure():
                opt.zero_grad()
                mup2_ref.accumulate(model, zip(x, y))
                torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)

            opt.step(closure)
        scheduler.step()
    assert [len(y) for y in loader[0][1]] == [32, 8]
    assert equal(weights(space), weights(reference)) and space["trainer"].global_step == EPOCHS
    unclipped, _ = plain(names(batch_size=40))
    assert not equal(weights(space), unclipped)


def test_lightning_accumulates_wrongly_in_automatic_optimization(SAM):
    """As the README says: to see when Lightning changes."""
    right, _ = plain(names(batch_size=40))
    wrong = weights(lit(accumulate_grad_batches=5))
    assert max((p - q).abs().max() / q.abs().max() for p, q in zip(wrong, right)) > 0.01


def test_lightning_with_16_mixed(SAM):
    """The automatic recipe raises an error; LitHalf is mup2_ref's loop with a scaler."""
    with pytest.raises(RuntimeError, match="nothing is perturbed"):
        lit(plugins=[half()])
    plugin = half()
    space = lit("LitHalf", plugins=[plugin])
    expected, scaler = plain_half(names())
    assert equal(weights(space), expected) and plugin.scaler.get_scale() == scaler.get_scale()
    assert not equal(expected, plain(names())[0]) and space["trainer"].optimizers[0].skipped_steps == 0
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        lit("LitHalf", plugins=[half()], gradient_clip_val=1.0)


def test_lightning_skips_an_overflow(SAM):
    plugin = MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=2.0**40))
    space = lit("LitHalf", plugins=[plugin])
    assert space["trainer"].optimizers[0].skipped_steps > 0 and plugin.scaler.get_scale() < 2.0**40
    assert all(w.isfinite().all() for w in weights(space))


def manual(passes, **kwargs):
    """Lit in manual optimization, where passes(self, backward) makes a step."""
    space = names()
    execute(LIT.partition("lightning.Trainer(")[0], space)

    class Manual(space["Lit"]):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            def backward():
                self.optimizers().zero_grad()
                loss = space["Lit"].training_step(self, batch, batch_idx)
                self.manual_backward(loss)
                return loss

            passes(self, backward)

    lightning.Trainer(**kwargs).fit(Manual(space["model"], space["groups"]), space["loader"])
    return space


def test_lightning_without_a_closure_is_no_sam(SAM):
    """As the README says: to see when Lightning changes."""

    def passes(self, backward):
        backward()
        self.optimizers().step()

    reference = names()
    for group in reference["opt"].param_groups:
        group["rho"] = 0.0
    assert equal(weights(manual(passes)), plain(reference, every="never")[0])


def test_the_passes_of_a_wrapper_are_refused(SAM):
    """The backup would be the wrapper's, and weights would stay perturbed."""

    def passes(self, backward):
        backward()
        before = [p.detach().clone() for p in self.model.parameters()]
        for attempt in (self.optimizers().first_step, self.optimizers().perturbed().__enter__):
            with pytest.raises(RuntimeError, match="this wraps the optimizer"):
                attempt()
            assert equal(before, self.model.parameters())
        opt = self.optimizers(use_pl_optimizer=False)
        opt.first_step()
        backward()
        opt.second_step()

    assert equal(weights(manual(passes)), plain(names(), every="never")[0])


# ----------------------------------------------------------------------------------------------- Accelerate


def accelerated(space, recipe=ACCELERATE, clip=True, epochs=1, **kwargs):
    """The recipe, or its loop only for further epochs, with other arguments of Accelerator."""
    arguments = ", ".join(f"{k}={v!r}" for k, v in {"cpu": True, **kwargs}.items())
    assert "Accelerator()" in recipe
    recipe = recipe.replace("Accelerator()", f"Accelerator({arguments})").replace(
        "len(loader)", f"{EPOCHS} * len(loader)"
    )
    if not clip:
        recipe = re.sub(r".*clip_grad_norm_.*\n", "", recipe)
    start, loop, body = recipe.partition("for x, y in loader:\n")
    execute(start, space)
    for _ in range(epochs):
        execute(loop + body, space)
    return space


def plain_batches(space, **kwargs):
    """As plain, with the recipe's schedule."""
    return plain(space, every="batch", T_max=EPOCHS * len(space["loader"]), **kwargs)


def test_accelerate_equals_the_plain_loop(SAM):
    """The recipe to the letter."""
    space = execute(ACCELERATE, names())
    expected, _ = plain(reference := names(), epochs=1, every="batch", T_max=5, clip=1.0)
    assert equal(weights(space), expected) and not equal(expected, weights(names()))
    assert type(space["opt"].optimizer) is SAM and type(space["opt"]) is accelerate.optimizer.AcceleratedOptimizer
    same_state(space["opt"].state_dict(), reference["opt"].state_dict())
    assert space["opt"].step(lambda: space["closure"]() or 1.0) is None, "as the README says"


def test_accelerate_steps_the_scheduler(SAM):
    space = accelerated(names(), epochs=2)
    expected, _ = plain_batches(reference := names(), epochs=2, clip=1.0)
    assert equal(weights(space), expected)
    same_state(space["opt"].state_dict(), reference["opt"].state_dict())
    assert space["scheduler"].get_last_lr() == learning_rates(reference["opt"]) != learning_rates(names()["opt"])


def test_accelerate_clips_gradients(SAM):
    clipped, free = weights(accelerated(names())), weights(accelerated(names(), clip=False))
    assert equal(clipped, plain_batches(names(), epochs=1, clip=1.0)[0])
    assert equal(free, plain_batches(names(), epochs=1)[0]) and not equal(free, clipped)


def test_accelerate_with_bf16(SAM):
    space = accelerated(names(), mixed_precision="bf16")
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    assert equal(weights(space), plain_batches(names(), epochs=1, clip=1.0, context=autocast)[0])
    assert not equal(weights(space), plain_batches(names(), epochs=1, clip=1.0)[0])


@pytest.mark.parametrize("base", ["torch.optim.SGD, momentum=0.9", "torch.optim.AdamW, weight_decay=0.1"])
def test_accelerate_resumes_bit_for_bit(SAM, base, tmp_path):
    _, loop, body = ACCELERATE.partition("for x, y in loader:\n")
    whole = accelerated(names(base=base))
    whole["accelerator"].save_state(str(tmp_path))
    saved = weights(whole)
    execute(loop + body, whole)
    fresh_accelerator()
    resumed = accelerated(names(seed=7, base=base), epochs=0)
    assert not equal(weights(resumed), saved)
    resumed["accelerator"].load_state(str(tmp_path))
    assert equal(weights(resumed), saved)
    execute(loop + body, resumed)
    assert equal(weights(resumed), weights(whole)) and not equal(weights(whole), saved)
    same_state(resumed["opt"].state_dict(), whole["opt"].state_dict())
    assert resumed["scheduler"].get_last_lr() == whole["scheduler"].get_last_lr()


def test_accelerate_accumulates_in_the_closure(SAM):
    """With the README's line for backward: the large batch, in float64 and so up to rounding."""
    (line,) = re.findall(r"`(mup2\.accumulate\(model, zip.*?)` for `backward`", SECTION)
    backward = "accelerator.backward(loss_function(model(x), y))"
    assert backward in ACCELERATE
    a, b = names(batch_size=40), names(batch_size=40)
    for space in (a, b):
        space["model"].double()
        x, y = space["loader"].dataset.tensors
        space["loader"] = DataLoader(TensorDataset(x.double(), y), 40)
    sizes = []
    a["model"].register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    start = weights(a)
    accelerated(a, ACCELERATE.replace(backward, line))
    plain(b, epochs=1, every="batch", clip=1.0)
    assert sizes == [32, 8, 32, 8] and not equal(weights(a), start)
    for p, q in zip(weights(a), weights(b), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


def test_accelerate_accumulates_wrongly_by_itself(SAM):
    """As the README says: to see when Accelerate changes. Only every fifth batch is looked at, here the last."""
    space, seen = names(), []
    space["model"].register_forward_hook(lambda module, args, out: seen.append(args[0]))
    loop = ACCELERATE.replace(
        "    opt.step(closure)", "    with accelerator.accumulate(model):\n        opt.step(closure)"
    )
    accelerated(space, loop, gradient_accumulation_steps=5)
    last = space["loader"].dataset.tensors[0][-8:]
    assert len(seen) == 2 and torch.equal(seen[0], last)


def test_accelerate_with_fp16(SAM):
    """Accelerate makes a scaler on GPUs only; here it is given one. A closure is refused, the README's passes work."""
    space = names()
    start, loop, _ = ACCELERATE.partition("for x, y in loader:\n")
    prepare = start.replace("Accelerator()", "Accelerator(cpu=True)").partition("scheduler =")
    execute(prepare[0], space)
    space["accelerator"].scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    float32 = space["loss_function"]
    execute(prepare[1] + prepare[2], space)
    model = space["model"]
    model.forward = torch.autocast("cpu", torch.float16, cache_enabled=False)(model.forward)
    space["loss_function"] = lambda f, y: float32(f.float(), y)
    passes = "".join(f"    {line}\n" for line in (ACCELERATE_HALF + "scheduler.step()").splitlines())
    for _ in range(EPOCHS):
        execute(loop + passes, space)

    reference = names()
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(reference["opt"], 5)
    autocast = partial(torch.autocast, "cpu", torch.float16, cache_enabled=False)
    for _ in range(EPOCHS):
        mup2_ref.train_epoch(
            *(reference[k] for k in ("model", "opt", "loader")), scheduler=scheduler, autocast=autocast, scaler=scaler
        )
    assert equal(weights(space), weights(reference))
    assert not equal(weights(space), plain(names(), every="batch", T_max=5)[0])
    before = weights(space)
    with pytest.raises(RuntimeError, match="GradScaler cannot unscale in a closure"):
        space["opt"].step(space["backward"])
    assert equal(weights(space), before)


def test_accelerate_does_not_see_a_skipped_update(SAM):
    """As the README says: to see when Accelerate changes. The weights stay, the scheduler steps."""
    space = names()
    start, _, _ = ACCELERATE.partition("for x, y in loader:\n")
    before, prepare, after = start.replace("Accelerator()", "Accelerator(cpu=True)").partition("scheduler =")
    execute(before, space)
    space["accelerator"].scaler = scaler = torch.amp.GradScaler("cpu", init_scale=2.0**126)
    execute(prepare + after, space)
    sam, rates, old = space["opt"].optimizer, learning_rates(space["opt"]), weights(space)
    x, y = next(iter(space["loader"]))
    execute(ACCELERATE_HALF + "scheduler.step()", space | {"x": 1e30 * x, "y": y})
    assert sam.skipped_steps == 1 and scaler.get_scale() == 2.0**125 and not space["opt"].step_was_skipped
    assert equal(weights(space), old) and space["scheduler"].get_last_lr() != rates
    scaler.update(1.0)
    execute(ACCELERATE_HALF, space | {"x": x, "y": y})
    assert sam.skipped_steps == 1 and not equal(weights(space), old)


# -------------------------------------------------------------------------------------------- two processes


def test_two_processes_of_each():
    """DistributedDataParallel on gloo, of Lightning and Accelerate: see two_processes_frameworks.py."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    script = Path(__file__).with_name("two_processes_frameworks.py")
    done = subprocess.run([*command, str(script)], capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
