"""What the wrong rows of the user's own groups have in common, and how that comes about."""

from __future__ import annotations

import math
import statistics

from mup2_fused.check.advice import power
from mup2_fused.check.counterpart import KEYS, Settings
from mup2_fused.check.judge import TOLERANCE, Row
from mup2_fused.check.measure import WHOLE


def notes_on(rows: list[Row], own: dict[int, Settings], widths: list[int]) -> list[str]:
    """own: the settings of the user's groups at each width."""
    rows = [r for r in rows if r.name != WHOLE]
    wrong = {q: [r for r in rows if q in r.wrong] for q in ("init", "update", "perturbation")}
    narrow, wide = ({key: _perturbed(own[w], key) for key in KEYS} for w in (widths[0], widths[-1]))
    notes = []
    if wrong["init"]:
        notes.append(
            "initial weights are not muP's: correct them first, as gradients and all that follows change with them"
        )
    if wrong["update"] and narrow == wide:
        notes.append(
            f"learning rates and radii are the same at widths {widths[0]} and {widths[-1]}: either these are no muP² "
            "groups, or their base model is as wide as the model. Build the base model at one fixed width."
        )
    elif len(wrong["update"]) > 1 and len(wide["lr"]) == 1:
        notes.append("all layers have one learning rate: in muP it depends on the role, as in mup2_fused.param_groups")
    if wrong["perturbation"] and len(wide["rho"]) == 1 and len(wide["gradnorm_scaling"]) == 1:
        notes.append(
            "all layers have one radius: this is SAM without muP². Use the groups of mup2_fused.param_groups(model, "
            "base, exponents('mup', 'effective'), lr=..., rho=...)."
        )
    return notes + _note_on_common_change(rows)


def _perturbed(settings: Settings, key: str) -> list[float]:
    """The different values of perturbed parameters."""
    return sorted({s[key] for s in settings.values() if s["perturb"]})


def _note_on_common_change(rows: list[Row]) -> list[str]:
    """A note if all perturbations vanish or blow up together."""
    tolerance = TOLERANCE["compared"][0]
    perturbed = [r for r in rows if not math.isnan(r.slopes["perturbation"].value)]
    common = statistics.median([r.slopes["perturbation"].excess for r in perturbed] or [0.0])
    together = all(abs(r.slopes["perturbation"].excess - common) < tolerance for r in perturbed)
    if not together or abs(common) <= tolerance or not any("perturbation" in r.wrong for r in rows):
        return []
    top = max(perturbed, key=lambda r: r.slopes["norm share"].excess)
    note = (
        f"all perturbations change alike, as {power(common)}: it is the norm that they are divided by, of which "
        f"'{top.name}' has a growing share. gradnorm_scaling must go with rho, as in mup2_fused.param_groups."
    )
    return [note]
