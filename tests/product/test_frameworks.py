"""The recipes of docs/frameworks.md for Lightning and Accelerate, with the real libraries, against a plain loop."""

import logging
import re
import warnings
from contextlib import nullcontext, suppress
from functools import partial

import pytest
import torch
from small_problems import ROOT, assert_close, blocks, equal
from test_processes import run_script
from torch.utils.data import DataLoader, TensorDataset

import mup2_fused as mup2
from experiments import data

with suppress(data.DataError):
    data.import_torchvision()  # before lightning, which imports it if it is there
accelerate = pytest.importorskip("accelerate")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    lightning = pytest.importorskip("lightning")
from accelerate.state import AcceleratorState, GradientState
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.plugins import MixedPrecision

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries, about workers, logging intervals and the like

PAGE = (ROOT / "docs" / "frameworks.md").read_text()
USAGE = blocks("README.md")[0]
# tests/docs runs those for the Hugging Face Trainer.
LIT, PIECES, HALF, ACCELERATE, ACCELERATE_HALF = blocks("docs/frameworks.md")[:5]
CLASS, _, _ = LIT.partition("lightning.Trainer(")
EPOCHS = 3
BASES = ["torch.optim.SGD, momentum=0.9", "torch.optim.AdamW, weight_decay=0.1"]


@pytest.fixture(autouse=True)
def _patched(request, monkeypatch, tmp_path):
    """Trainers are quiet and short, and write to tmp_path. mup2.SAM is the fixture's, if the test takes it."""
    if "SAM" in request.fixturenames:
        monkeypatch.setattr(mup2, "SAM", request.getfixturevalue("SAM"))
    monkeypatch.setattr(lightning, "Trainer", partial(trainer, default_root_dir=tmp_path))
    new_accelerator()
    yield
    new_accelerator()


def trainer(*, Trainer=lightning.Trainer, **kwargs):
    quiet = dict(enable_progress_bar=False, enable_model_summary=False, logger=False, accelerator="cpu")
    return Trainer(**dict(enable_checkpointing=False, devices=1) | kwargs | quiet | dict(max_epochs=EPOCHS))


def new_accelerator():
    AcceleratorState._reset_state(True)  # which all of a process share
    GradientState._reset_state()


def names(seed=0, batch_size=8, samples=40, base=BASES[0]):
    """What the code at the README's top leaves behind, after no step."""
    torch.manual_seed(seed)
    space = {"Model": lambda width: mup2.MLP(5, width, 3), "loader": []}
    exec(USAGE.replace(BASES[0], base).replace("width=1024", "width=256"), space)
    torch.manual_seed(1)
    samples = TensorDataset(torch.randn(samples, 5), torch.randint(3, (samples,)))
    loss_function = torch.nn.functional.cross_entropy
    return space | {"loader": DataLoader(samples, batch_size), "loss_function": loss_function, "base": base}


def execute(recipe, space):
    exec(recipe.replace(BASES[0], space["base"]), space)
    return space


def plain(space, epochs=EPOCHS, every="epoch", clip=None, context=nullcontext, T_max=None, steps=1, pieces=None):
    """The loop at the README's top with a scheduler, clipping and autocast; its weights and losses.

    steps: of the scheduler, after every epoch or batch. pieces: the size of the micro-batches that are accumulated.
    """
    model, opt, losses = space["model"], space["opt"], []
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(opt, T_max or epochs)
    for _ in range(epochs):
        for x, y in space["loader"]:

            def closure():
                opt.zero_grad()
                if pieces:
                    loss = mup2.accumulate(model, zip(x.split(pieces), y.split(pieces)))
                else:
                    with context():
                        loss = space["loss_function"](model(x), y)
                    loss.backward()
                if clip is not None:
                    torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
                return loss

            losses.append(opt.step(closure).item())
            for _ in range(steps * (every == "batch")):
                scheduler.step()
        for _ in range(steps * (every == "epoch")):
            scheduler.step()
    return weights(space), losses


def weights(space):
    model = space["model"]
    return [p.detach().clone() for p in getattr(model, "module", model).parameters()]


def same_state(a, b):
    """Of two state_dicts: momenta, moments and step counts, to the bit, and groups."""
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert a["state"] and a["param_groups"] == b["param_groups"]


def half(scale=2.0**14):
    """What Trainer(precision="16-mixed") makes on a GPU; on a CPU Lightning takes bfloat16 instead."""
    return MixedPrecision("16-mixed", "cpu", torch.amp.GradScaler("cpu", init_scale=scale))


def plain_half(space, every="epoch", T_max=EPOCHS):
    """train_epoch in float16; returns weights and scaler."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**14)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(space["opt"], T_max)
    autocast = partial(torch.autocast, "cpu", torch.float16, cache_enabled=False)
    options = dict(autocast=autocast, scaler=scaler, scheduler=scheduler if every == "batch" else None)
    for _ in range(EPOCHS):
        mup2.train_epoch(space["model"], space["opt"], space["loader"], **options)
        if every == "epoch":
            scheduler.step()
    return weights(space), scaler


def lit(kind="Lit", seed=0, fit=None, batch_size=8, **kwargs):
    """The class of that name, trained; the names of the code, with lit and trainer."""
    space = names(seed, batch_size)
    space["base"] = kwargs.pop("base", space["base"])
    execute(CLASS + PIECES + HALF, space)
    space["lit"] = space[kind](space["model"], space["groups"])
    space["trainer"] = lightning.Trainer(**kwargs)
    space["trainer"].fit(space["lit"], space["loader"], **fit or {})
    return space


def test_lightning_equals_the_plain_loop(SAM):
    """The recipe as it stands; its state, its number of steps and its scheduler."""
    recipe, space = execute(LIT, names()), lit()
    expected, _ = plain(reference := names())
    assert equal(weights(recipe), expected) and equal(weights(space), expected)
    assert not equal(expected, weights(names())) and not equal(expected, plain(names(), every="never")[0])
    optimizer = space["trainer"].optimizers[0]
    assert type(optimizer) is SAM.func and space["trainer"].global_step == EPOCHS * 5
    same_state(optimizer.state_dict(), reference["opt"].state_dict())


def test_lightning_with_bf16_mixed_and_clipping():
    autocast = partial(torch.autocast, "cpu", torch.bfloat16, cache_enabled=False)
    unclipped, _ = plain(names())
    for trainer_options, options in (
        (dict(precision="bf16-mixed"), dict(context=autocast)),
        (dict(gradient_clip_val=0.1), dict(clip=0.1)),
    ):
        expected, _ = plain(names(), **options)
        assert equal(weights(lit(**trainer_options)), expected) and not equal(expected, unclipped)


@pytest.mark.parametrize("base", BASES)
def test_lightning_resumes_bit_for_bit(SAM, base, tmp_path):
    keep = lightning.pytorch.callbacks.ModelCheckpoint(tmp_path, "{epoch}", save_top_k=-1)
    finished = lit(base=base, enable_checkpointing=True, callbacks=[keep])
    path = str(tmp_path / "epoch=0.ckpt")
    resumed = lit(base=base, seed=7, fit=dict(ckpt_path=path))
    assert equal(weights(resumed), weights(finished))
    assert resumed["trainer"].global_step == finished["trainer"].global_step == EPOCHS * 5
    same_state(*(s["trainer"].optimizers[0].state_dict() for s in (resumed, finished)))
    assert not equal(torch.load(path, weights_only=False)["state_dict"].values(), weights(finished))


def test_lightning_can_log_the_loss_at_w():
    """The page's one-line optimizer_step."""
    (line,) = re.findall(r"`(def optimizer_step.*?)`", PAGE, re.DOTALL)
    space = execute(CLASS + line, names())
    space["Lit"].optimizer_step = space["optimizer_step"]
    trainer = lightning.Trainer()
    trainer.fit(space["Lit"](space["model"], space["groups"]), space["loader"])
    expected, losses = plain(names())
    assert equal(weights(space), expected)
    assert trainer.callback_metrics["loss_epoch"].item() == pytest.approx(sum(losses[-5:]) / 5)


def test_lightning_accumulates_in_manual_optimization():
    """A large batch in pieces of 32, the last one of 8, clipped: accumulate in a plain loop."""
    space = lit("LitPieces", batch_size=40)
    expected, _ = plain(names(batch_size=40), pieces=32, clip=1.0)
    assert equal(weights(space), expected) and space["trainer"].global_step == EPOCHS
    assert not equal(expected, plain(names(batch_size=40), pieces=32)[0])


def test_lightning_with_16_mixed():
    """The automatic recipe raises an error; LitHalf is train_epoch with a scaler, and skips overflows."""
    with pytest.raises(RuntimeError, match="nothing is perturbed: with float16.* Lightning \\(16-mixed"):
        lit(plugins=[half()])
    plugin = half()
    space = lit("LitHalf", plugins=[plugin])
    expected, scaler = plain_half(names())
    assert equal(weights(space), expected) and plugin.scaler.get_scale() == scaler.get_scale()
    assert not equal(expected, plain(names())[0]) and space["trainer"].optimizers[0].skipped_steps == 0
    with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
        lit("LitHalf", plugins=[half()], gradient_clip_val=1.0)
    plugin = half(2.0**40)
    space = lit("LitHalf", plugins=[plugin])
    assert space["trainer"].optimizers[0].skipped_steps > 0 and plugin.scaler.get_scale() < 2.0**40
    assert all(w.isfinite().all() for w in weights(space))


def test_the_passes_of_lightnings_wrapper_are_refused():
    """Its second step would be the base optimizer's."""
    space = names()
    for x, y in space["loader"]:
        space["loss_function"](space["model"](x), y).backward()
    wrapper, before = LightningOptimizer(space["opt"]), weights(space)
    for attempt in (wrapper.first_step, wrapper.perturbed().__enter__):
        with pytest.raises(RuntimeError, match="this wraps the optimizer"):
            attempt()
        assert equal(before, weights(space))


def accelerated(space, recipe=ACCELERATE, epochs=1, **kwargs):
    """The recipe, or its loop only for further epochs, with other arguments of Accelerator."""
    arguments = ", ".join(f"{k}={v!r}" for k, v in {"cpu": True, **kwargs}.items())
    assert "Accelerator()" in recipe
    recipe = recipe.replace("Accelerator()", f"Accelerator({arguments})")
    recipe = recipe.replace("len(loader)", f"{EPOCHS} * len(loader)")
    start, loop, body = recipe.partition("for x, y in loader:\n")
    execute(start, space)
    for _ in range(epochs):
        execute(loop + body, space)
    return space


def plain_batches(space, **kwargs):
    """As plain, with the recipe's schedule and clipping."""
    return plain(space, every="batch", T_max=EPOCHS * len(space["loader"]), clip=1.0, **kwargs)


def test_accelerate_equals_the_plain_loop(SAM):
    """The recipe to the letter, and with a longer schedule."""
    space = execute(ACCELERATE, names())
    expected, _ = plain(reference := names(), epochs=1, every="batch", T_max=5, clip=1.0)
    assert equal(weights(space), expected) and not equal(expected, weights(names()))
    assert type(space["opt"].optimizer) is SAM.func and type(space["opt"]) is accelerate.optimizer.AcceleratedOptimizer
    same_state(space["opt"].state_dict(), reference["opt"].state_dict())
    assert space["opt"].step(lambda: space["closure"]() or 1.0) is None, "as the page says"


def test_accelerate_with_bf16():
    space = accelerated(names(), mixed_precision="bf16")
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    assert equal(weights(space), plain_batches(names(), epochs=1, context=autocast)[0])
    assert not equal(weights(space), plain_batches(names(), epochs=1)[0])


@pytest.mark.parametrize("base", BASES)
def test_accelerate_resumes_bit_for_bit(SAM, base, tmp_path):
    another_epoch = ACCELERATE[ACCELERATE.index("for x, y in loader:") :]
    finished = accelerated(names(base=base))
    finished["accelerator"].save_state(str(tmp_path))
    saved = weights(finished)
    execute(another_epoch, finished)
    new_accelerator()
    resumed = accelerated(names(seed=7, base=base), epochs=0)
    assert not equal(weights(resumed), saved)
    resumed["accelerator"].load_state(str(tmp_path))
    assert equal(weights(resumed), saved)
    execute(another_epoch, resumed)
    assert equal(weights(resumed), weights(finished)) and not equal(weights(finished), saved)
    same_state(resumed["opt"].state_dict(), finished["opt"].state_dict())
    assert resumed["scheduler"].get_last_lr() == finished["scheduler"].get_last_lr()


def test_accelerate_accumulates_in_the_closure():
    """With the page's line in place of backward: the large batch, in float64 and so up to rounding."""
    line = re.search(r"`(mup2\.accumulate\(model, zip.*?)` instead of `accelerator\.backward", PAGE)[1]
    backward = "accelerator.backward(loss_function(model(x), y))"
    assert backward in ACCELERATE
    a, b = names(batch_size=40), names(batch_size=40)
    for space in (a, b):
        space["model"].double()
        x, y = space["loader"].dataset.tensors
        space["loader"] = DataLoader(TensorDataset(x.double(), y), 40)
    sizes, start = [], weights(a)
    a["model"].register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    accelerated(a, ACCELERATE.replace(backward, line))
    plain(b, epochs=1, every="batch", clip=1.0)
    assert sizes == [32, 8, 32, 8] and not equal(weights(a), start)
    assert_close(weights(a), weights(b))


def with_a_scaler(space, scale):
    """Accelerate makes a scaler on GPUs only; here it is given one."""
    start, loop, _ = ACCELERATE.partition("for x, y in loader:\n")
    before, prepare, after = start.replace("Accelerator()", "Accelerator(cpu=True)").partition("scheduler =")
    execute(before, space)
    space["accelerator"].scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    execute(prepare + after, space)
    return loop


def test_accelerate_with_fp16():
    """A closure is refused, the page's passes work."""
    space = names()
    float32, loop = space["loss_function"], with_a_scaler(space, 2.0**14)
    model = space["model"]
    model.forward = torch.autocast("cpu", torch.float16, cache_enabled=False)(model.forward)
    space["loss_function"] = lambda f, y: float32(f.float(), y)
    passes = "".join(f"    {line}\n" for line in (ACCELERATE_HALF + "scheduler.step()").splitlines())
    for _ in range(EPOCHS):
        execute(loop + passes, space)
    expected, _ = plain_half(names(), every="batch", T_max=5)
    assert equal(weights(space), expected)
    assert not equal(expected, plain(names(), every="batch", T_max=5)[0])
    with pytest.raises(RuntimeError, match="GradScaler cannot unscale in a closure: with float16.*Accelerate \\(fp16"):
        space["opt"].step(space["backward"])
    assert equal(weights(space), expected)


def test_accelerate_with_fp16_that_overflows():
    """The weights stay, the step is counted and the scale halved, and training goes on."""
    space = names()
    with_a_scaler(space, 2.0**126)
    sam, old, scaler = space["opt"].optimizer, weights(space), space["accelerator"].scaler
    x, y = next(iter(space["loader"]))
    execute(ACCELERATE_HALF + "scheduler.step()", space | {"x": 1e30 * x, "y": y})
    assert sam.skipped_steps == 1 and scaler.get_scale() == 2.0**125 and equal(weights(space), old)
    scaler.update(1.0)
    execute(ACCELERATE_HALF, space | {"x": x, "y": y})
    assert sam.skipped_steps == 1 and not equal(weights(space), old)


def test_accumulation_of_lightning_and_accelerate_is_refused(SAM):
    """It would not be a large batch, and Accelerate's leaves batches out. Weights stay."""
    with pytest.raises(RuntimeError, match="Do not use Lightning's accumulate_grad_batches"):
        lit(accumulate_grad_batches=5)
    space = names()
    step = "    opt.step(closure)"
    loop = ACCELERATE.replace(step, f"    with accelerator.accumulate(model):\n    {step}")
    with pytest.raises(RuntimeError, match="leave gradient_accumulation_steps at 1"):
        accelerated(space, loop, gradient_accumulation_steps=5)
    assert equal(weights(space), weights(names())) and space["opt"].optimizer.phase.backups is None
    new_accelerator()
    accelerated(space := names(), gradient_accumulation_steps=1)
    assert not equal(weights(space), weights(names()))


@pytest.mark.parametrize("options", ["", ", ascent='momentum'", ", interval=2"])
def test_a_manual_step_of_lightning_without_a_closure_is_refused(SAM, options):
    """Lightning then calls step with a closure that does nothing. The weights stay."""
    space = names()
    execute(CLASS.replace("momentum=0.9", f"momentum=0.9{options}"), space)

    class Manual(space["Lit"]):
        automatic_optimization = False

        def training_step(self, batch, batch_idx):
            opt = self.optimizers()
            opt.zero_grad()
            self.manual_backward(space["loss_function"](self.model(batch[0]), batch[1]))
            opt.step()

    with pytest.raises(RuntimeError, match="Lightning's manual optimization, give opt.step"):
        lightning.Trainer().fit(Manual(space["model"], space["groups"]), space["loader"])
    assert equal(weights(space), weights(names()))


def test_two_processes_of_each(tmp_path):
    """DistributedDataParallel on gloo, of Lightning and Accelerate."""
    run_script("framework_processes.py", tmp_path)
