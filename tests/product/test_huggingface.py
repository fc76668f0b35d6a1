"""SAMTrainer against a plain loop in which SAM's closure runs over all micro-batches of an update."""

import warnings
from functools import partial

import pytest
import torch
from huggingface_problems import (
    BASE,
    QUIET,
    SETTINGS,
    STEPS,
    WAYS,
    Classifier,
    SAMTrainer,
    classifier,
    config,
    hf,
    llama,
    plain,
    sam_of,
    samples,
    trained,
    trainer_of,
)
from small_problems import equal, weights
from test_processes import run_script

import mup2_fused as mup2

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries


def logged(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("make", [llama, classifier])
def test_trainer_equals_the_plain_loop(make, way, backend, tmp_path):
    """Bit for bit, clipped and with its scheduler; what it logs; with an incomplete last group of micro-batches."""
    way = way | {"backend": backend}
    trainer = trained(make(), tmp_path, way, max_grad_norm=0.1)
    expected, losses, norms = plain(make(), way, clip=0.1)
    assert equal(weights(trainer.model), expected)
    assert not equal(expected, weights(make())) and not equal(expected, plain(make(), way)[0])
    assert not any(equal(expected, plain(make(), w, clip=0.1)[0]) for w in WAYS if not w.items() <= way.items())
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)
    assert logged(trainer, "grad_norm") == pytest.approx(norms, rel=1e-6) and min(norms) > 0.1
    assert logged(trainer, "learning_rate") == pytest.approx([0, 0.01, 0.01 * 2 / 3, 0.01 / 3])
    assert isinstance(trainer.sam, mup2.SAM) and trainer.sam.phase.steps == STEPS


def test_bf16(tmp_path):
    autocast = partial(torch.autocast, "cpu", torch.bfloat16)
    expected, losses, _ = plain(llama(), context=autocast)
    trainer = trained(llama(), tmp_path, bf16=True)
    assert equal(weights(trainer.model), expected) and not equal(expected, plain(llama())[0])
    assert logged(trainer, "loss") == pytest.approx(losses, rel=1e-6)


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("scale", [2.0**10, 2.0**126])
def test_fp16(scale, way, tmp_path):
    """Accelerate makes a scaler on GPUs only; here it is given one. Updates that overflow are skipped."""
    autocast = partial(torch.autocast, "cpu", torch.float16)
    scalers = [torch.amp.GradScaler("cpu", init_scale=scale) for _ in range(2)]
    options = dict(base=config(BASE), rho=0.1, sam=way)
    trainer = trainer_of(llama(), tmp_path, options, fp16=True, max_grad_norm=0.1)
    trainer.accelerator.native_amp, trainer.accelerator.scaler = True, scalers[0]
    trainer.train()
    expected, _, _ = plain(llama(), way, clip=0.1, context=autocast, scaler=scalers[1])
    assert equal(weights(trainer.model), expected) and not equal(expected, plain(llama(), way, clip=0.1)[0])
    skipped = STEPS if scale > 2.0**100 else 0
    assert equal(expected, weights(llama())) == bool(skipped) and trainer.sam.skipped_steps == skipped
    assert scalers[0].get_scale() == scalers[1].get_scale() == scale / 2**skipped


@pytest.mark.parametrize("way", WAYS[1:], ids=str)
def test_resumes_bit_for_bit(way, tmp_path):
    """In the middle of an epoch and of an interval, with dropout and shuffled data."""
    way = way | {"same_randomness": True}
    options = dict(train_sampling_strategy="random", save_strategy="steps", save_steps=1, gradient_accumulation_steps=2)
    finished = trained(llama(dropout=0.2), tmp_path / "a", way, **options)
    assert finished.state.global_step == 6
    resumed = trainer_of(llama(7, dropout=0.2), tmp_path / "b", dict(base=config(BASE), rho=0.1, sam=way), **options)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-1"))
    assert equal(weights(resumed.model), weights(finished.model))
    assert logged(resumed, "loss") == logged(finished, "loss")
    a, b = (trainer.sam.state_dict() for trainer in (resumed, finished))
    torch.testing.assert_close(a["state"], b["state"], rtol=0, atol=0)
    assert a["state"] and a["param_groups"] == b["param_groups"]


class Static(Classifier):
    """If it has a memory, its loss is always there, as in a CUDA graph."""

    memory = None

    def forward(self, x, labels, num_items_in_batch):  # Trainer does not divide such a loss, which would make a copy
        loss = super().forward(x, labels)["loss"]
        return {"loss": loss if self.memory is None else Reused.apply(loss, self.memory)}


class Reused(torch.autograd.Function):
    @staticmethod
    def forward(ctx, loss, memory):
        return memory.copy_(loss).detach()

    @staticmethod
    def backward(ctx, gradient):
        return gradient, None


def test_the_loss_at_w_is_logged_if_the_second_pass_reuses_its_memory(tmp_path):
    losses = []
    for memory in (None, torch.zeros(())):
        torch.manual_seed(0)
        model = Static()
        model.memory = memory
        trainer = trainer_of(model, tmp_path, dict(base=model, rho=1.0), gradient_accumulation_steps=1)
        trainer.model_accepts_loss_kwargs = True
        trainer.train()
        losses.append(logged(trainer, "loss"))
    assert losses[0] == losses[1] and len(losses[0]) == 12


class Watch(hf.TrainerCallback):
    """The weights and the events at which they were seen."""

    def __init__(self):
        self.seen, self.events = [], []

    def __getattribute__(self, name):
        if not name.startswith("on_"):
            return super().__getattribute__(name)

        def note(args, state, control, model=None, **kwargs):
            if model is not None:
                self.events.append(name)
                self.seen.append(weights(model))

        return note


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_the_weights_are_at_w_whenever_trainer_looks(way, tmp_path):
    watch, model = Watch(), llama()
    often = dict(save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    options = dict(base=config(BASE), rho=0.1, sam=way, eval_dataset=samples(model, 4), callbacks=[watch])
    trainer_of(model, tmp_path, options, **often).train()
    updates = [plain(llama(), way, updates=n)[0] for n in range(STEPS + 1)]
    done = 0
    assert {"on_substep_end", "on_pre_optimizer_step", "on_log", "on_save", "on_evaluate"} <= {*watch.events}
    for event, seen in zip(watch.events, watch.seen):
        done += event == "on_optimizer_step"
        assert equal(seen, updates[done]), event
    assert done == STEPS and not equal(updates[0], updates[-1])
    saved = hf.LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-2")
    assert equal(weights(saved), updates[2])


class Fails(SAMTrainer):
    passes = 0

    def compute_loss(self, model, *args, **kwargs):
        loss = super().compute_loss(model, *args, **kwargs)
        self.passes += 1
        if self.passes == self.fails_at:
            self.perturbed = not equal(weights(model), self.before)
            raise self.fault("here")
        return loss


@pytest.mark.parametrize("at, updates", [(2, 0), (14, 1)], ids=["first pass", "second pass"])
@pytest.mark.parametrize("fault", [KeyboardInterrupt, RuntimeError])
def test_a_fault_leaves_the_weights_at_w(fault, at, updates, tmp_path):
    """An update takes 4 passes at w and 4 at w + e. Then train() starts again."""
    trainer = trainer_of(llama(), tmp_path, kind=Fails, data=(data := samples(llama(), 32)))
    trainer.fault, trainer.fails_at, trainer.before = fault, at, plain(llama(), data=data, updates=updates)[0]
    with pytest.raises(fault, match="here"):
        trainer.train()
    assert equal(weights(trainer.model), trainer.before) and trainer.perturbed == bool(updates)
    trainer.sam.state_dict()
    trainer.train()
    if not updates:
        assert equal(weights(trainer.model), plain(llama(), data=data)[0])


class StopsHalfway(hf.TrainerCallback):
    def on_substep_end(self, args, state, control, **kwargs):
        control.should_training_stop = True


def test_no_micro_batch_is_kept_after_training(tmp_path):
    for fault in (KeyboardInterrupt, RuntimeError):
        trainer = trainer_of(llama(), tmp_path, kind=Fails)
        trainer.fault, trainer.fails_at, trainer.before = fault, 3, weights(trainer.model)
        with pytest.raises(fault, match="here"):
            trainer.train()
        assert trainer.passes == 3 and trainer.micro_batches == []
    trainer = trainer_of(llama(), tmp_path, dict(base=config(BASE), callbacks=[StopsHalfway()]))
    trainer.train()
    assert trainer.state.global_step == 0 and trainer.micro_batches == []


class Endless(torch.utils.data.IterableDataset):
    """Trainer adds the gradient of a group that its end leaves incomplete to the next update."""

    def __iter__(self):
        return iter(samples(classifier(), 10))


@pytest.mark.parametrize("data", [None, Endless()], ids=["list", "iterable"])
def test_with_radius_0_it_is_trainer(data, tmp_path):
    arguments = dict(data=data, max_steps=5, gradient_accumulation_steps=2)
    model = classifier()
    groups = [{key: g[key] for key in ("params", "lr", "weight_decay")} for g in sam_of(model).param_groups]
    adamw = dict(optimizers=(torch.optim.AdamW(groups, fused=True), None))
    expected = trainer_of(model, tmp_path, adamw, hf.Trainer, **arguments)
    trainer = trainer_of(classifier(), tmp_path, dict(base=lambda: Classifier(BASE), rho=0.0), **arguments)
    for each in (trainer, expected):
        each.train()
    assert equal(weights(trainer.model), weights(model)) and not equal(weights(model), weights(classifier()))


class Masks(SAMTrainer):
    """The random numbers that each pass over a micro-batch begins with."""

    def compute_loss(self, model, *args, **kwargs):
        self.masks = [*getattr(self, "masks", []), torch.rand(()).item()]
        return super().compute_loss(model, *args, **kwargs)


@pytest.mark.parametrize("same", [True, False])
def test_same_randomness_in_both_passes(same, tmp_path):
    options = dict(base=config(BASE), rho=0.1, sam=dict(same_randomness=same))
    trainer = trainer_of(llama(dropout=0.5), tmp_path, options, Masks, gradient_accumulation_steps=3)
    trainer.train()
    first, second, rest = trainer.masks[:3], trainer.masks[3:6], trainer.masks[6:]
    assert (first == second) == same and len({*first, *rest[:3]}) == 6 and len(trainer.masks) == 24


def test_other_trainers_and_ones_own_optimizer(tmp_path):
    """SAMTrainer before Seq2SeqTrainer; optimizers=(sam, None); optim and weight decay from the arguments."""

    class Both(SAMTrainer, hf.Seq2SeqTrainer):
        pass

    args = hf.Seq2SeqTrainingArguments(str(tmp_path), **QUIET | SETTINGS)
    both = Both(llama(), args, train_dataset=samples(llama()), base=config(BASE), rho=0.1)
    model = llama()
    own = trainer_of(model, tmp_path, dict(optimizers=(sam := sam_of(model), None)))
    expected, _, _ = plain(llama())
    for trainer in (both, own):
        trainer.train()
        assert equal(weights(trainer.model), expected)
    assert own.sam is sam
    own.train()  # once more, with the wrapped optimizer
    assert own.sam is sam and not equal(weights(own.model), expected)
    options = dict(base=config(BASE), groups=dict(perturb="norm"))
    sgd = trainer_of(llama(), tmp_path, options, optim="sgd", optim_args="momentum=0.9").create_optimizer()
    assert isinstance(sgd.base_optimizer, torch.optim.SGD) and sgd.defaults["momentum"] == 0.9
    assert {g["lr"] for g in sgd.param_groups} == {0.005, 0.01, 0.02}
    assert [g["rho"] for g in sgd.param_groups if g["perturb"]] == [2 * sgd.defaults["rho"]], "SAM's default"
    decays = {n for g in sgd.param_groups if g["weight_decay"] for n in g["names"]}
    assert decays == set(own.get_decay_parameter_names(model)) and len(decays) < len(list(model.parameters()))


def test_errors(tmp_path):
    """What cannot work says what to do, and leaves the weights."""
    model, before = llama(), weights(llama())
    alone = trainer_of(model, tmp_path, dict(optimizers=(sam_of(model), None)), hf.Trainer)
    with pytest.raises(RuntimeError, match="take mup2_fused.huggingface.SAMTrainer"):
        alone.train()
    assert equal(weights(model), before)
    sgd, own = torch.optim.SGD(model.parameters(), 0.1), {"params": []}
    for error, message, options, arguments in (
        (TypeError, "needs a mup2_fused.SAM, not .*SGD", dict(optimizers=(sgd, None)), {}),
        (ValueError, "leave out base, rho", dict(optimizers=(sam_of(model), None), rho=0.1), {}),
        (ValueError, "groups=dict\\(scaling=", dict(base=config(BASE)), dict(optim="adagrad")),
        (ValueError, "base=model gives plain SAM", {}, {}),
        (ValueError, "sam has lr, rho: give rho to SAMTrainer", dict(sam=dict(rho=0.1, lr=1)), {}),
        (ValueError, "sam has weight_decay: give", dict(sam=dict(weight_decay=0.1)), {}),
        (ValueError, "groups of its own", dict(base=model, optimizer_cls_and_kwargs=(torch.optim.SGD, own)), {}),
    ):
        with pytest.raises(error, match=message):
            trainer_of(model, tmp_path, options, **arguments).create_optimizer()

    class DeepSpeed(SAMTrainer):
        def create_accelerator_and_postprocess(self):
            super().create_accelerator_and_postprocess()
            self.is_deepspeed_enabled = True

    with pytest.raises(ValueError, match="FSDP1 and DeepSpeed flatten"):
        DeepSpeed(model, hf.TrainingArguments(str(tmp_path), use_cpu=True), base=config(BASE))


def test_settings_of_the_base_optimizer(tmp_path):
    """Those beside its class count, and those in sam override them."""
    for settings, sam, expected in (
        (dict(lr=0.5, momentum=0.9), {}, dict(lr=0.5, weight_decay=0.1, momentum=0.9)),
        (dict(momentum=0.9, weight_decay=0.3), dict(momentum=0.8), dict(lr=0.01, weight_decay=0.3, momentum=0.8)),
    ):
        options = dict(base=(model := llama()), sam=sam, optimizer_cls_and_kwargs=(torch.optim.SGD, settings))
        made = trainer_of(model, tmp_path, options).create_optimizer()
        decayed = [g for g in made.param_groups if g["weight_decay"]]
        assert decayed and all(g[key] == number for g in decayed for key, number in expected.items())
        assert {g["lr"] for g in made.param_groups} == {expected["lr"]}
        assert any(g["weight_decay"] == 0 for g in made.param_groups)
    model = llama()
    made = trainer_of(model, tmp_path, dict(base=model, sam=dict(betas=(0.8, 0.9), interval=2))).create_optimizer()
    assert made.interval == 2 and {g["betas"] for g in made.param_groups} == {(0.8, 0.9)}


class DrawsBatches(hf.Trainer):
    """As TRL's GRPOTrainer does."""

    def _prepare_inputs(self, inputs):
        return super()._prepare_inputs(inputs)


class LayerwiseDecay(hf.Trainer):
    def create_optimizer(self, model=None):
        raise AssertionError


def test_trainers_that_it_cannot_be_combined_with(tmp_path):
    """They would train on other data, or with another optimizer, without a word."""
    model = llama()
    for parent, message in (
        (DrawsBatches, "DrawsBatches overrides _prepare_inputs.* get other batches"),
        (LayerwiseDecay, "LayerwiseDecay overrides create_optimizer.* Override make_sam"),
    ):
        kind = type("Both", (SAMTrainer, parent), {})
        with pytest.raises(TypeError, match=message):
            trainer_of(model, tmp_path, kind=kind)
    own = trainer_of(model, tmp_path, dict(optimizers=(sam_of(model), None)), kind)
    own.train()
    assert not equal(weights(model), weights(llama()))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_perturbed_weights_with_few_digits_raise_a_warning(dtype, tmp_path):
    model = llama().to(dtype)
    for name, p in model.named_parameters():
        p.data = p.data.float() if "norm" in name else p.data
    for perturb, count in (("all", 9), ("norm", 0)):
        trainer = trainer_of(model, tmp_path, dict(base=model, groups=dict(perturb=perturb)))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            trainer.create_optimizer()
        said = [str(w.message) for w in caught if "Load the model with dtype=torch.float32" in str(w.message)]
        assert len(said) == bool(count and dtype != torch.float32)
        assert all(f"{count} perturbed parameters" in text and f".weight' is in {dtype}" in text for text in said)


def test_two_processes(tmp_path):
    """DistributedDataParallel on gloo."""
    run_script("huggingface_processes.py", tmp_path)
