"""The Trainer of Hugging Face's transformers, with SAM. Import this module by its name; mup2_fused leaves it out.

Trainer knows no closure. It calls training_step() for every micro-batch, clips, and calls optimizer.step(). SAMTrainer
keeps the micro-batches of an update. After the last one it climbs to w + e, takes the second pass over the same
micro-batches, and returns to w. Clipping and optimizer.step() then get the gradients of the second pass.
"""

from __future__ import annotations

import warnings
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import Trainer

from mup2_fused.arguments import RATES
from mup2_fused.bases import Base
from mup2_fused.groups import param_groups
from mup2_fused.loops import random_states
from mup2_fused.optimizer import SAM
from mup2_fused.sharded import Groups
from mup2_fused.theory import exponents

RHO = 0.05  # SAM's default


class MicroBatch(NamedTuple):
    """What training_step() got in the first pass, and needs again in the second one."""

    inputs: Any
    num_items_in_batch: Any
    accumulation_steps: int  # micro-batches of the update, by which Trainer divides some losses
    random: list[Any]  # states of the random number generators; none without same_randomness


class SAMTrainer(Trainer):
    """Trainer with SAM around its own optimizer, with muP² factors. It takes Trainer's arguments, and these:

    base: the base model, as for param_groups(): a model, a config of the model's class, or a function that makes it.
    With base=model, SAM is plain SAM. args.learning_rate and args.weight_decay are those tuned on the base model.
    rho: the radius at the base width, 0.05 by default.
    groups: other arguments of param_groups(), such as dict(perturb="norm", roles={...}).
    sam: other arguments of SAM(), such as dict(interval=4, same_randomness=True), and of the base optimizer.

    The base optimizer is that of args.optim or optimizer_cls_and_kwargs, whose lr and weight_decay count. Tensors that
    Trainer leaves without weight decay have none. With optimizers=(opt, scheduler), opt is a SAM of your own, and the
    arguments above are left out. Call init_() on the model yourself. To combine this class with another trainer,
    inherit from this one first: class MyTrainer(SAMTrainer, Seq2SeqTrainer).

    All micro-batches of gradient accumulation are one large batch for both passes. The weights are at w whenever
    Trainer clips, logs, saves or evaluates, and callbacks run; an exception in the second pass leaves them at w. The
    loss that is logged is the one at w, and the norm of the gradient the one at w + e. With ascent="momentum", which
    has no pass at w, both are at w + e. ValueError with FSDP and DeepSpeed. TypeError for trainers that override
    _prepare_inputs(), as TRL's GRPO does to draw batches, or create_optimizer().
    """

    def __init__(
        self,
        *args: Any,
        base: Base = None,
        rho: float | None = None,
        groups: dict[str, Any] | None = None,
        sam: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        self.base, self.rho, self.group_options, self.sam_options = base, rho, groups, sam
        self.micro_batches: list[MicroBatch] = []
        if said := {"rho", "lr", "weight_decay"} & (sam or {}).keys():
            raise ValueError(
                f"sam has {', '.join(sorted(said))}: give rho to SAMTrainer, and lr and weight_decay to "
                "TrainingArguments, as learning_rate and weight_decay"
            )
        self._refuse_drawn_batches()
        super().__init__(*args, **kwargs)
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled or bool(self.args.fsdp)
        if sharded or getattr(self, "is_distributed_loading_by_transformers", False):
            raise ValueError(
                "SAMTrainer works in one process and with DistributedDataParallel. FSDP1 and DeepSpeed flatten the "
                "parameters, and roles are lost. For FSDP2, write a loop of your own, as docs/training.md does"
            )
        if self.optimizer is None:
            self._refuse_other_optimizers()
        elif not isinstance(self.optimizer, SAM):
            raise TypeError(f"optimizers=(opt, scheduler) needs a mup2_fused.SAM, not {type(self.optimizer)}")
        elif any(option is not None for option in (base, rho, groups, sam)):
            raise ValueError("with optimizers=(opt, scheduler), leave out base, rho, groups and sam")

    def _refuse_drawn_batches(self) -> None:
        """TypeError if both passes may get different batches."""
        if type(self)._prepare_inputs is not Trainer._prepare_inputs:
            raise TypeError(
                f"{_owner(type(self), '_prepare_inputs')} overrides _prepare_inputs(). Trainers such as TRL's "
                "GRPOTrainer and RLOOTrainer draw their batches there, and the second pass would get other batches. "
                "SAMTrainer needs trainers whose batches come from the data loader: move what is done there to "
                "data_collator or compute_loss()"
            )

    def _refuse_other_optimizers(self) -> None:
        """TypeError if a class makes an optimizer that is not this class's SAM."""
        owners = [kind for kind in type(self).__mro__ if "create_optimizer" in vars(kind)]
        if others := [kind.__name__ for kind in owners if kind not in (SAMTrainer, Trainer)]:
            raise TypeError(
                f"{others[0]} overrides create_optimizer(), which SAMTrainer needs for itself. Override "
                "make_sam(model) instead. If the class is not yours, make the SAM and pass optimizers=(sam, None)"
            )

    @property
    def sam(self) -> SAM:
        """The optimizer itself, around which Accelerate puts a wrapper."""
        optimizer: Any = self.optimizer
        return getattr(optimizer, "optimizer", optimizer)

    def create_optimizer(self, model: nn.Module | None = None) -> torch.optim.Optimizer:
        """Trainer calls this at the start of every train()."""
        self.micro_batches = []
        if self.optimizer is None:
            self.optimizer = self.make_sam(self.model if model is None else model)
        return self.optimizer

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """As in Trainer. Afterwards no micro-batch is kept in memory."""
        try:
            return super().train(*args, **kwargs)
        finally:
            self.micro_batches = []

    def make_sam(self, model: Any) -> SAM:
        """SAM around the optimizer that Trainer would make."""
        if self.base is None and not any(hasattr(p, "infshape") for p in model.parameters()):
            raise ValueError(
                "SAMTrainer needs base. base=model gives plain SAM. For muP², base is the narrow model on which "
                "learning_rate and rho were tuned, or its config"
            )
        kind, options = self.optimizer_cls_and_kwargs or self.get_optimizer_cls_and_kwargs(self.args, model)
        if own := {"params", "model", "optimizer_dict"} & options.keys():
            raise ValueError(f"optim={self.args.optim} makes groups of its own ({own.pop()}), without muP² factors")
        settings: dict[str, Any] = dict(lr=self.args.learning_rate, weight_decay=self.args.weight_decay)
        settings |= {key: options[key] for key in settings if key in options}
        settings |= {"rho": RHO if self.rho is None else self.rho} | (self.group_options or {})
        if "scaling" not in settings:
            if kind not in RATES:
                raise ValueError(
                    f"say whether the learning rates of {kind} follow the rule of Adam or that of SGD: "
                    "groups=dict(scaling=mup2.exponents(base_optimizer='adam')), or 'sgd'"
                )
            settings["scaling"] = exponents(base_optimizer=RATES[kind])
        groups = param_groups(model, self.base, **settings)
        _warn_of_rounding(groups)
        groups = split_by_decay(groups, set(self.get_decay_parameter_names(model)))
        return SAM(groups, kind, **options | (self.sam_options or {}))

    def training_step(self, model: nn.Module, inputs: Any, num_items_in_batch: Any = None) -> Tensor:
        """The first pass over a micro-batch; after the last micro-batch of the update, also the second pass."""
        sam = self.sam
        if sam.moments:  # there is no first pass
            with sam.perturbed():
                return super().training_step(model, inputs, num_items_in_batch)
        if sam.climbs:
            random = random_states(sam.param_groups) if sam.same_randomness else []
            batch = MicroBatch(inputs, num_items_in_batch, self.current_gradient_accumulation_steps, random)
            self.micro_batches.append(batch)
        loss = super().training_step(model, inputs, num_items_in_batch)
        if self.accelerator.sync_gradients:  # an update follows
            loss = loss.clone()  # the second pass may reuse its memory
            self.second_pass(model) if sam.climbs else sam.first_step()
        return loss

    def second_pass(self, model: nn.Module) -> None:
        """The gradient at w + e of all micro-batches. A subclass may put frozen_buffers() or the like around it."""
        batches, self.micro_batches = self.micro_batches, []
        with self.sam.perturbed():
            model.zero_grad()
            for i, batch in enumerate(batches, 1):
                for set_state, state in batch.random:
                    set_state(state)
                self.current_gradient_accumulation_steps = batch.accumulation_steps
                with nullcontext() if i == len(batches) else self.accelerator.no_sync(model):
                    super().training_step(model, batch.inputs, batch.num_items_in_batch)


def _owner(kind: type, method: str) -> str:
    """The name of the class from which the method comes."""
    return next(parent.__name__ for parent in kind.__mro__ if method in vars(parent))


def _warn_of_rounding(groups: Groups) -> None:
    perturbed = [named for g in groups if g["perturb"] for named in zip(g["names"], g["params"])]
    half = [(name, p.dtype) for name, p in perturbed if p.dtype in (torch.bfloat16, torch.float16)]
    if half:
        name, dtype = half[0]
        warnings.warn(
            f"{len(half)} perturbed parameters have few digits ('{name}' is in {dtype}), and rounding hides a part of "
            "the perturbation. Load the model with dtype=torch.float32, and train with fp16=True or in float32.",
            stacklevel=3,
        )


def split_by_decay(groups: Groups, decayed: set[str]) -> Groups:
    """The groups, without weight decay for the tensors that are not named in decayed."""
    split = []
    for group in groups:
        for decays in (True, False):
            members = [(n, p) for n, p in zip(group["names"], group["params"]) if (n in decayed) == decays]
            if members:
                names, params = map(list, zip(*members))
                own = {} if decays or "weight_decay" not in group else {"weight_decay": 0.0}
                split.append(group | {"names": names, "params": params} | own)
    return split
