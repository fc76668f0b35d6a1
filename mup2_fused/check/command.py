"""`python -m mup2_fused.check module:factory`"""

from __future__ import annotations

import argparse
import sys
import traceback
from collections.abc import Callable
from typing import Any

import mup2_fused.check
from mup2_fused.check.report import plot
from mup2_fused.check.run import ASCENTS, BASES, check
from mup2_fused.user_code import attribute
from mup2_ref import VARIANTS


def main(arguments: list[str] | None = None) -> int:
    """Exit status: 0 passed, 1 something is wrong or unclear, 2 the check could not be made."""
    args = vars(parser().parse_args(arguments))
    factory, groups, picture = attribute(args.pop("factory")), args.pop("groups"), args.pop("picture")
    try:
        own = attribute(groups) if groups else None
        report = check(factory, args.pop("widths"), groups=own, progress=_progress(), **args)
    except (ValueError, TypeError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception:  # noqa: BLE001 - of the factory or the loss, whatever it is
        traceback.print_exc()
        return 2
    print(report)
    if picture:
        plot(report, picture)
        print(f"picture: {picture}")
    return 0 if report.passed else 1


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m mup2_fused.check",
        description=mup2_fused.check.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    p.add_argument("factory", help="module:factory; factory(width) returns the model or (model, loss)")
    p.add_argument("--widths", type=_numbers(","), default=(64, 128, 256, 512), help="such as 128,256,512,1024")
    p.add_argument("--groups", help="module:function; function(model) returns your parameter groups")
    p.add_argument("--own-init", action="store_true", help="keep the factory's initial weights")
    p.add_argument("--roles", type=_pairs, help="as for param_groups: 'embed.weight=input,w=in out'")
    p.add_argument("--base-optimizer", choices=list(BASES), default="sgd")
    p.add_argument("--variant", choices=VARIANTS, help="default: that of the groups, or sam")
    p.add_argument("--ascent", choices=ASCENTS, default="gradient", help="as for SAM; SGD has momentum 0.9 then")
    p.add_argument("--lr", type=float, help="without --groups; default 0.05, Adam 0.001")
    p.add_argument("--rho", type=float, default=0.02, help="without --groups")
    p.add_argument("--steps", type=int, default=5, help="SAM steps before the one that is measured")
    p.add_argument("--seeds", type=int, default=3)
    p.add_argument("--input", type=_numbers("x"), dest="input_shape", help="shape of one sample, such as 3x32x32")
    p.add_argument("--vocabulary", type=int, help="inputs are token numbers below this")
    p.add_argument("--batch", type=int, default=32)
    p.add_argument("--device", default="cpu")
    p.add_argument("--picture", help="file for the log-log plots, such as check.png (needs matplotlib)")
    return p


def _numbers(separator: str) -> Callable[[str], tuple[int, ...]]:
    return lambda s: tuple(int(x) for x in s.split(separator))


def _pairs(s: str) -> dict[str, str]:
    return dict(pair.split("=") for pair in s.split(","))


def _progress() -> Callable[[list[Any]], Any]:
    try:
        from tqdm import tqdm
    except ImportError:
        return iter
    return lambda runs: tqdm(runs, desc="measuring", leave=False)
