"""The numbers that README.md and docs/*.md repeat in sentences are those of the committed result files."""

import itertools
import json
import statistics

import pytest

from docs import build
from docs.build import RESULTS, ROOT
from experiments import demo, sweep, transfer_report
from experiments.sweep import METHODS
from experiments.transfer import TWO


def assert_said(sentence, *numbers, page="docs/results.md"):
    """The pages repeat numbers of their tables in sentences; the tests below compute these numbers again."""
    assert sentence.format(*numbers) in " ".join((ROOT / page).read_text().split())


def transfer(name):
    """{(method, width): its row} of a result of experiments.transfer, and the mean accuracy of each."""
    rows = {(row["method"], row["width"]): row for row in build.transfer_rows(name)}
    return rows, {key: transfer_report.mean_error(row["accuracies"])[0] for key, row in rows.items()}


def transfer_means(name):
    """{(method, width, lr, rho): the mean accuracy of all seeds} of the runs of experiments.transfer."""
    runs, found = sweep.read_runs(RESULTS / f"transfer_{name}.jsonl"), {}
    for run in runs:
        found.setdefault((run.method, run.width, run.lr, run.rho), []).append(sweep.score(runs, run))
    return {key: statistics.fmean(values) for key, values in found.items()}


def difference(values, others):
    """Mean of a - b over the seeds, and its standard error."""
    return transfer_report.mean_error([a - b for a, b in zip(values, others)])


def power_of_the_width(rows, method):
    return transfer_report.power_of_the_width(transfer_report.of([*rows.values()], method))


def over_alone(rows, rho):
    """By how much the accuracy at this rho is above the one without SAM, on the same seeds, for each row."""
    return [difference(dict(row["slice"])[rho], row["alone"])[0] for row in rows.values()]


def test_sentences_about_all_settings():
    lost = lambda name, wide, narrow, method="muP²": transfer_report.regret(transfer(name)[0][method, wide], narrow)
    numbers = [*lost("fashion", 1024, 64), *lost("mnist1d", 1024, 64)]
    assert_said("({:.1f} ± {:.1f} points with width 64's), but not on MNIST-1D ({:.1f} ± {:.1f}), where", *numbers)
    assert max(lost("mnist1d", 1024, 64, method)[0] for method in ("SP-naive", "muP-naive")) <= 0
    assert_said("({:.1f} ± {:.1f}, with right labels {:.1f}", *lost("vit", 128, 16), lost("vit-clean", 128, 16)[0])
    numbers = [*lost("resnet-clean", 32, 4), *lost("resnet", 32, 4)]
    words = "with right labels ({:.1f} ± {:.1f}), but not for the ResNet with random labels ({:.1f} ± {:.1f})"
    assert_said(words, *numbers)


def test_sentences_about_fashion_mnist():
    rows, accuracy = transfer("fashion")
    wide = {method: row for (method, width), row in rows.items() if width == 1024}
    lost = {key: transfer_report.regret(row, 64)[0] for key, row in rows.items()}
    four = ("muP-global", "muP-naive", "SP-naive", "muP²")
    words = "{:.1f} points with muP-global, {:.1f} with muP-naive, {:.1f} with plain SAM, {:.1f} with muP², and nothing"
    assert_said(words, *(lost[method, 1024] for method in four))
    assert lost["SP-LP", 1024] == 0
    at_128 = sorted(lost[method, 128] for method in wide)
    assert lost["muP-global", 128] == at_128[-1]
    assert_said("loses {:.1f} points with muP-global and at most {:.1f} with the others", *reversed(at_128[-2:]))
    for width in (128, 256, 512, 1024):
        best = max(accuracy[method, width] for method in wide)
        assert accuracy["muP²", width] == pytest.approx(best, abs=1e-9 if width != 256 else 0.01)
    behind = difference(wide["muP²"]["accuracies"], wide["muP-global"]["accuracies"])
    words = "where muP² reaches {:.1f} %, muP-global is {:.1f} ± {:.1f} points behind"
    assert_said(words, accuracy["muP²", 1024], *behind)
    assert_said("SP-LP reaches {:.1f} %", accuracy["SP-LP", 1024])
    alone = [transfer_report.mean_error(wide[method]["alone"])[0] for method in ("SP-naive", "muP²")]
    assert_said("without SAM {:.1f} %, against {:.1f} % in muP", *alone)
    point = lambda method, width: (rows[method, width]["lr"], rows[method, width]["rho"])
    assert point("muP²", 64) == point("muP²", 128) == (0.005, 0.1778)
    assert {point("muP²", width) for width in (256, 512, 1024)} == {(0.01, 0.3162)}
    for method in ("SP-naive", "muP-naive"):
        assert (point(method, 128)[0], point(method, 1024)[0]) == (0.01, 0.0025)
    powers = [power_of_the_width(rows, method) for method in ("muP²", "SP-naive", "muP-naive")]
    assert_said("grows as width^{:.2f} (that of plain SAM grows as width^{:.2f}). That of muP-naive", *powers)
    assert_said("should fall as width^-0.5, and falls as width^{:.2f}", powers[2])
    assert_said("grows by a factor of {:.1f}", point("muP-global", 1024)[1] / point("muP-global", 64)[1])


def test_sentences_about_mnist1d():
    rows, accuracy = transfer("mnist1d")
    wide = [128, 256, 512, 1024]
    for width in wide:
        assert max(accuracy, key=lambda key: (key[1] == width, accuracy[key])) == ("muP²", width)
    pairs = zip(rows["muP²", 1024]["accuracies"], rows["SP-naive", 1024]["accuracies"])
    more = transfer_report.mean_error([a - b for a, b in pairs])
    assert_said("at width 1024 with {:.1f} %, {:.1f} ± {:.1f} points more than plain", accuracy["muP²", 1024], *more)
    narrow = difference(rows["SP-naive", 64]["accuracies"], rows["muP²", 64]["accuracies"])
    assert_said("At width 64 plain SAM reaches {:.1f} ± {:.1f} points more than muP²", *narrow)
    pairs = itertools.product(("muP-naive", "muP-global"), wide[1:])
    gains = {pair: transfer_report.gain(rows[pair])[0] for pair in pairs}
    assert_said("With muP-naive and muP-global, SAM gains {:.1f} points at most", max(gains.values()))
    wider = [pair for pair in gains if pair[1] >= 512]
    losses = sorted(-gains[pair] for pair in wider)
    assert_said("At widths 512 and 1024 it loses {:.1f} to {:.1f} points", losses[0], losses[-1])
    assert {(rows[pair]["lr"], rows[pair]["alone_lr"]) for pair in wider} == {(0.4, 0.8)}
    tried = transfer_means("mnist1d")
    for method, width in wider:
        radii = {rho: mean for (m, w, lr, rho), mean in tried.items() if (m, w, lr) == (method, width, 0.8)}
        assert max(radii.values()) < tried["muP-SGD", width, 0.8, 0.0]
        assert width == 512 or len(radii) == {"muP-naive": 2, "muP-global": 4}[method]
    assert all(transfer_report.regret(rows["muP²", width], 128)[0] <= 0 for width in wide[1:])
    assert_said(
        "width 64's loses {:.1f} ± {:.1f} points at width 1024", *transfer_report.regret(rows["muP²", 1024], 64)
    )
    for width in wide:
        plain = rows["SP-naive", width]
        assert transfer_report.regret(plain, 64)[0] <= 0
        for key in ("lr", "rho"):
            low, high = plain[f"{key}s"]
            assert low <= rows["SP-naive", 64][key] <= high
    powers = [power_of_the_width(rows, method) for method in ("muP-naive", "muP²")]
    assert_said("falls as width^{:.2f}, where theory", powers[0])
    assert_said("That of muP² grows as width^{:.2f}", powers[1])
    radii = {width: transfer_report.largest_stable_rho(rows["muP-naive", width]) for width in (64, 512, 1024)}
    assert_said("by a factor of {:.1f} from width 64 to 512, but not", radii[64] / radii[512])
    assert radii[1024] == pytest.approx(radii[512], rel=0.02)


def test_sentences_of_the_readme_about_both_data_sets():
    """With width 64's (lr, rho), and with the best one."""
    less, leads = {m: [] for m in METHODS if m != "muP²"}, []
    for name in ("fashion", "mnist1d"):
        wide = {m: transfer(name)[0][m, 1024] for m in METHODS}
        for method, lost in less.items():
            kept = difference(wide["muP²"]["kept"]["64"], wide[method]["kept"]["64"])
            lost.append(kept[0])
            leads += [kept, difference(wide["muP²"]["accuracies"], wide[method]["accuracies"])]
    within = [mean for mean, error in leads if mean <= 2 * error]
    assert min(leads)[0] > 0 and (len(within), len(leads)) == (3, 16)
    assert_said("three of its sixteen leads are within two standard errors", page="README.md")
    worst = min(map(max, less.values()))
    assert_said("each other method reaches at least {:.1f} points less", worst, page="README.md")


def test_sentences_about_the_resnet():
    rows, accuracy = transfer("resnet")
    gains = {key: transfer_report.gain(row)[0] for key, row in rows.items()}
    assert gains["muP²", 4] < 0
    assert_said("gains {:.1f} points in the standard parameterization and {:.1f} with", *(gains[m, 32] for m in TWO))
    narrow, wide = rows["muP²", 4], rows["muP²", 32]
    assert narrow["lr"] == wide["lr"] and wide["rho"] / narrow["rho"] == pytest.approx(10**0.25, rel=0.001)
    assert all(transfer_report.regret(rows[method, 32], 8)[0] < 0 for method in TWO)
    lost = {method: transfer_report.regret(rows[method, 32], 4) for method in TWO}
    assert_said("Width 4's (lr, rho) loses {:.1f} ± {:.1f} points with muP², and nothing", *lost["muP²"])
    assert lost["SP-naive"][0] == 0
    assert_said(
        "At width 8 muP² reaches {:.1f} points more than plain SAM", accuracy["muP²", 8] - accuracy["SP-naive", 8]
    )
    assert_said("the difference, {:.1f} points", accuracy["muP²", 32] - accuracy["SP-naive", 32])
    deviations = [statistics.stdev(row["accuracies"]) for row in rows.values()]
    assert_said("the standard deviation between seeds is up to {:.1f} points", max(deviations))
    powers = [power_of_the_width(rows, method) for method in TWO]
    assert_said("moves as width^{:.2f} with plain SAM and as width^{:.2f} with muP²", *powers)


def test_sentences_about_the_resnet_with_right_labels():
    rows, accuracy = transfer("resnet-clean")
    plain, mup2 = rows["SP-naive", 32], rows["muP²", 32]
    gains = {key: transfer_report.gain(row) for key, row in rows.items()}
    words = "{:.1f} ± {:.1f} points at width 4, and at width 32 {:.1f} ± {:.1f} points in SP and {:.1f} ± {:.1f} with"
    assert_said(words, *gains["muP²", 4], *gains["SP-naive", 32], *gains["muP²", 32])
    loss, error = gains["muP²", 8]
    words = "at width 8 it gains {:.1f} ± {:.1f} points in SP and loses {:.1f} ± {:.1f} with muP²"
    assert_said(words, *gains["SP-naive", 8], -loss, error)
    assert [key for key, (gain, error) in gains.items() if gain > 2 * error] == [("muP²", 32)]
    assert_said("differs by at most {:.1f} points from", max(map(abs, over_alone(rows, 0.1778))))
    assert_said("at rho 0.562 it is at least {:.1f} points below", -max(over_alone(rows, 0.5623)))
    lost = [transfer_report.regret(row, width) for row, width in ((plain, 4), (mup2, 4), (plain, 8), (mup2, 8))]
    assert all(mean < 2 * error for mean, error in lost[:2])
    assert_said("{:.1f} ± {:.1f} points with plain SAM and {:.1f} ± {:.1f} with muP². Width 8's", *lost[0], *lost[1])
    falls = [rows[method, 8]["lr"] / rows[method, 32]["lr"] for method in TWO]
    words = (
        "Width 8's loses {:.1f} ± {:.1f} points with plain SAM, whose best learning rate falls by a factor of {:.0f}"
    )
    words += " between widths 8 and 32, and {:.1f} ± {:.1f} with muP², where it falls by a factor of {:.0f}"
    assert_said(words, *lost[2], falls[0], *lost[3], falls[1])
    more = difference(mup2["accuracies"], plain["accuracies"])
    words = (
        "At width 32 muP² reaches {:.1f} %, {:.1f} ± {:.1f} points more than plain SAM. With width 4's (lr, rho), it"
    )
    kept = difference(mup2["kept"]["4"], plain["kept"]["4"])
    assert_said(f"{words} reaches {{:.1f}} ± {{:.1f}} points more", accuracy["muP²", 32], *more, *kept)
    alone = difference(mup2["alone"], plain["alone"])
    assert_said("muP and SP differ by {:.1f} ± {:.1f} points at width 32, which is within the error", *alone)
    assert alone[0] < alone[1]
    rates = (rows["muP²", 4]["alone_lr"], mup2["alone_lr"], plain["alone_lr"])
    assert_said("is {:.3g} at width 4; at width 32 it is {:.3g} in muP and {:.3g} in SP", *rates)
    powers = [power_of_the_width(rows, method) for method in TWO]
    assert_said("moves as width^{:.2f} with plain SAM and as width^{:.2f} with muP²", *powers)


def test_sentences_about_the_vit():
    rows, accuracy = transfer("vit")
    plain, mup2 = rows["SP-naive", 128], rows["muP²", 128]
    gains = [transfer_report.gain(row) for row in (rows["muP²", 16], plain, mup2)]
    assert_said("SAM gains {:.1f} points at width 16", gains[0][0])
    assert_said("at width 128 still {:.1f} ± {:.1f} points in SP and {:.1f} ± {:.1f} with", *gains[1], *gains[2])
    for words, key in (
        ("the best learning rate falls by a factor of {:.0f} with plain SAM and of {:.0f}", "lr"),
        ("AdamW's best learning rate falls by a factor of {:.0f} in SP and of {:.0f} in muP", "alone_lr"),
    ):
        assert_said(words, *(rows[method, 16][key] / rows[method, 128][key] for method in TWO))
    lost = [transfer_report.regret(row, 16) for row in (plain, mup2)]
    words = "{:.1f} ± {:.1f} points at width 128 with plain SAM, and {:.1f} ± {:.1f} with muP²"
    assert_said(f"Width 16's (lr, rho) loses {words}", *lost[0], *lost[1])
    assert transfer_report.regret(plain, 32)[0] < 0
    assert_said("cannot tell the learning rates from {:.3g} to {:.3g} apart", *plain["lrs"])
    assert plain["lrs"][1] == rows["SP-naive", 32]["lr"] and plain["rho"] == rows["SP-naive", 32]["rho"]
    more = [difference(mup2["accuracies"], values) for values in (plain["accuracies"], plain["kept"]["32"])]
    assert_said(
        "muP² reaches {:.1f} %, {:.1f} ± {:.1f} points more than plain SAM, and", accuracy["muP²", 128], *more[0]
    )
    assert_said("and {:.1f} ± {:.1f} points more than plain SAM with width 32's", *more[1])
    alone = difference(mup2["alone"], plain["alone"])
    assert_said("AdamW reaches {:.1f} ± {:.1f} points more in muP than in SP", *alone)
    powers = [power_of_the_width(rows, method) for method in reversed(TWO)]
    assert_said("moves as width^{:.2f} with muP² and as width^{:.2f} with plain SAM", *powers)


def test_sentences_about_the_vit_with_right_labels():
    rows, accuracy = transfer("vit-clean")
    plain, mup2 = rows["SP-naive", 128], rows["muP²", 128]
    gains = [transfer_report.gain(row) for row in (rows["muP²", 16], plain, mup2)]
    words = (
        "gains {:.1f} ± {:.1f} points at width 16, and at width 128 {:.1f} ± {:.1f} points in SP and {:.1f} ± {:.1f}"
    )
    assert_said(words, *itertools.chain(*gains))
    at = {rho: over_alone(rows, rho) for rho in (0.1778, 0.5623)}
    assert_said("differs by {:.1f} to {:.1f} points from", min(at[0.1778]), max(at[0.1778]))
    assert_said("it is at least {:.1f} points below", -max(at[0.5623]))
    factors = [rows[method, 16]["lr"] / rows[method, 128]["lr"] for method in TWO]
    lost = [transfer_report.regret(row, 16) for row in (plain, mup2)]
    words = (
        "Width 16's (lr, rho) loses {:.1f} ± {:.1f} points at width 128 with plain SAM, and {:.1f} ± {:.1f} with muP²."
    )
    words = f"falls by a factor of {{:.0f}} with plain SAM and of {{:.0f}} with muP². {words}"
    assert_said(words, *factors, *lost[0], *lost[1])
    more = [difference(mup2[key], plain[key]) for key in ("accuracies", "alone")]
    words = (
        "At width 128 muP² reaches {:.1f} %, {:.1f} ± {:.1f} points more than plain SAM. Most of this comes from muP:"
    )
    words += " AdamW alone reaches {:.1f} ± {:.1f} points more in muP than in SP."
    assert_said(words, accuracy["muP²", 128], *more[0], *more[1])


def test_sentences_about_the_variants():
    found = {row["method"]: row["accuracies"] for row in build.transfer_rows("table2")}
    assert {len(values) for values in found.values()} == {12}
    more = lambda a, b: difference(found[a], found[b])
    over_sp = {v: more(f"muP²{v}", f"SP-naive{v}") for v in ("", " SAM-ON", " elementwise", " layerwise")}
    assert_said("{:.1f} ± {:.1f} points more than SP with SAM and {:.1f}", *over_sp[""], over_sp[" SAM-ON"][0])
    assert_said("and {:.1f} ± {:.1f} points more with SAM-ON", *over_sp[" SAM-ON"])
    assert all(abs(mean) < error for mean, error in (over_sp[" elementwise"], over_sp[" layerwise"]))
    over_sam = {method: more(method, method.partition(" ")[0]) for method in found if " " in method}
    in_sp = [over_sam[f"SP-naive {variant}"][0] for variant in ("elementwise", "layerwise")]
    assert_said("{:.1f} and {:.1f} points more than SAM", *in_sp)
    assert all(abs(mean) < 2 * error for method, (mean, error) in over_sam.items() if "muP²" in method)
    assert max(found, key=lambda method: statistics.fmean(found[method])) == "muP² SAM-ON"
    assert_said("SAM-ON reaches the most, {:.1f} %", statistics.fmean(found["muP² SAM-ON"]))


def test_sentences_of_the_readme_about_other_settings():
    lost = lambda name, *widths: [transfer_report.regret(transfer(name)[0][m, widths[1]], widths[0]) for m in TWO]
    pair, first = "{:.1f} ± {:.1f} and {:.1f} ± {:.1f}", "{:.1f} ± {:.1f} points with plain SAM and {:.1f} ± {:.1f}"
    for title, words, *setting in (("ViT", f"{first} with muP²", "vit", 16, 128), ("ResNet-18", pair, "resnet", 4, 32)):
        numbers = itertools.chain(*lost(*setting), *lost(f"{setting[0]}-clean", *setting[1:]))
        assert_said(f"a {title} with random labels {words}, with right labels {pair}", *numbers, page="README.md")


def test_sentences_of_the_readme_about_cheaper_steps():
    found = {x["setting"]["title"]: {row["way"]: row for row in x["rows"]} for x in build.FRONTIERS.values()}
    adamw = found.pop("ViT, digits, AdamW")
    sgd = [*found.values()]
    factors = []
    for way in ("interval-4", "interval-8"):
        times_sam = [rows[way]["rho"] / rows["sam"]["rho"] for rows in sgd]
        factors += [min(times_sam), max(times_sam)]
    words = "`interval=4` at {:.0f} to {:.0f} times SAM's rho for about all of the gain, or `interval=8` at {:.0f} to"
    assert_said(f"{words} {{:.0f}} times", *factors, page="README.md")
    kept = [(rows["interval-4"]["kept"], rows["interval-4"]["kept_error"]) for rows in sgd]
    assert all(share + error > 1 for share, error in kept) and adamw["momentum"]["kept"] > 0.9


def test_sentence_about_bfloat16_on_the_cpu():
    times = json.loads((build.TIMES / "cpu-amd-epyc.json").read_text())["rows"]
    times = [row for row in times if (row["implementation"], row["dtype"]) == ("mup2_fused", "bf16")]
    ratios = [row["ratio"] for row in times if row["model"] != "mlp-tiny"]
    words = "all models but the tiny one take {:.1f} to {:.1f} times the floor"
    assert_said(words, min(ratios), max(ratios), page="docs/speed.md")


def test_sentences_about_the_picture_of_the_readme():
    found = build.demo_runs()
    grid = sorted(found["muP²"].points[1024])
    steps = {m: grid.index(x.best_rho(1024)) - grid.index(x.best_rho(64)) for m, x in found.items()}
    assert steps == {"SP-naive": 2, "muP²": 1, "muP-naive": 1}
    cost, best = ([getattr(found[m], key) for m in ("muP-naive", "muP²")] for key in ("cost", "kept"))
    assert max(cost) < 1 and found["SP-naive"].cost > 7 and abs(best[0] - best[1]) < 0.5


def test_the_learning_rate_of_the_picture_is_the_best_one_at_width_64():
    runs = sweep.read_runs(RESULTS / "demo.jsonl")
    rhos = [0.0562, 0.1, 0.1778, 0.3162]
    best = {}
    for lr in (0.000625, 0.0025, demo.LR):
        x = demo.seen(runs, "SP-naive", [64], rhos, 5, lr)
        best[lr] = x.mean(64, x.best_rho(64))
    assert max(best, key=best.get) == demo.LR
    assert_said("0.000625 reaches {:.1f} %, 0.0025 reaches {:.1f} %, and 0.00125 reaches {:.1f} %", *best.values())
