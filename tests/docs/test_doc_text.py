"""README.md and docs/*.md: what they name exists, and their numbers are those of the committed result files."""

import importlib
import itertools
import json
import re
import shlex
import statistics
import sys

import pytest

from docs import build
from docs.build import PAGES, RESULTS, ROOT
from experiments import demo, sweep, transfer_report
from experiments.sweep import METHODS
from experiments.transfer import TWO

TEXT = {str(page.relative_to(ROOT)): page.read_text() for page in PAGES}


@pytest.mark.parametrize("page", TEXT)
def test_tables_are_the_committed_ones(page):
    """If this fails: make docs."""
    assert build.fill(TEXT[page]) == TEXT[page]


def test_every_table_is_shown_and_a_changed_one_is_noticed():
    shown = {name for text in TEXT.values() for _, name, _ in build.BLOCK.findall(text)}
    assert shown == set(build.TABLES)
    assert all(text.count("<!-- table:") == text.count("<!-- end -->") for text in TEXT.values())
    page = TEXT["docs/results.md"]
    changed = build.BLOCK.sub(r"\1| 99.9 |\n\3", page)
    assert changed != page and build.fill(changed) == page
    with pytest.raises(ValueError, match="there is no table 'accuracies'; a page may have"):
        build.fill("<!-- table: accuracies -->\n<!-- end -->")


def test_the_command_finds_and_rewrites_a_stale_page(tmp_path, monkeypatch, capsys):
    page = tmp_path / "page.md"
    page.write_text("<!-- table: exponents -->\nold\n<!-- end -->\n")
    monkeypatch.setattr(build, "PAGES", [page])
    monkeypatch.setattr(build, "ROOT", tmp_path)
    for printed in ("page.md\n", ""):
        build.main()
        assert capsys.readouterr().out == printed and "0.04" in page.read_text() and "old" not in page.read_text()


# ------------------------------------------------------------------------------------------ links


def slug(heading):
    """GitHub's name of a heading."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def headings(text):
    code = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    return {slug(heading) for heading in re.findall(r"^#+ (.*)$", code, re.MULTILINE)}


@pytest.mark.parametrize("page", TEXT)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\((?!http)([^)#\s]*)(?:#([^)\s]*))?\)", TEXT[page])
    assert links or "docs/" in page
    for path, heading in links:
        target = (ROOT / page).parent / path if path else ROOT / page
        assert target.exists(), path
        if heading:
            assert heading in headings(target.read_text()), f"{path}#{heading}"


def test_every_page_can_be_reached():
    assert [page for page in TEXT if f"]({page}" not in TEXT["README.md"]] == ["README.md"]


# ------------------------------------------------------------------------------------------ commands


def commands():
    """(page, module, arguments) of every `python -m module arguments`, and of torchrun -m."""
    found = []
    for page, text in TEXT.items():
        for line in re.findall(
            r"(?:python|--nproc_per_node \d) -m ((?:experiments|benchmarks|mup2_fused|docs)\.[^`\n]*)", text
        ):
            module, *arguments = shlex.split(line, comments=True)
            found.append((page, module, arguments))
    return found


MODULES = sorted({module for _, module, _ in commands()})


@pytest.fixture
def help_of(monkeypatch, capsys):
    """What `python -m module --help` prints, as a function of the module's name."""

    def text(module):
        monkeypatch.setattr(sys, "argv", [module, "--help"])
        with pytest.raises(SystemExit) as ended:
            importlib.import_module(module.replace("mup2_fused.check", "mup2_fused.check.__main__")).main()
        assert not ended.value.code
        return capsys.readouterr().out

    return text


@pytest.mark.parametrize("module", MODULES)
def test_commands_exist_with_their_flags(module, help_of):
    text = help_of(module)
    if module == "experiments.search":  # it passes the other flags on
        text += help_of("experiments.vision")
    parse = getattr(sys.modules[module], "parse_args", None)
    for page, _, arguments in (command for command in commands() if command[1] == module):
        for flag in (argument for argument in arguments if argument.startswith("--")):
            assert re.search(rf"{flag}\b", text), f"{page}: {module} has no {flag}"
        if parse:
            parse(arguments)  # raises SystemExit where a value is not among the choices


def test_flags_that_the_text_mentions_exist(help_of):
    known = {flag for module in MODULES for flag in re.findall(r"--[a-z][a-z-]*", help_of(module))}
    named = {flag for text in TEXT.values() for flag in re.findall(r"`(--[a-z][a-z-]*)", text)}
    assert {"--parameterization", "--roles", "--depth"} <= named <= known


def test_make_targets_exist():
    makefile = (ROOT / "Makefile").read_text()
    found = [re.findall(r"(?:^|`)make ([a-z-]+)", text, re.MULTILINE) for text in TEXT.values()]
    targets = {target for targets in found for target in targets}
    assert {"demo", "test", "docs", "bench", "cuda", "gpu", "gpu-training"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_contributing_names_what_exists():
    """Files; and functions, classes and tables in these files, but for the kernel of its example."""
    names = set(re.findall(r"`([\w./]+)(?:\(\))?`", TEXT["docs/contributing.md"]))
    paths = {name for name in names if re.search(r"[/.]", name) and not name.startswith("torch.")}
    code = " ".join((ROOT / path).read_text() for path in paths if (ROOT / path).is_file())
    missing = {path for path in paths if not (ROOT / path).exists()}
    missing |= {name for name in names - paths if not re.search(rf"\b{name}\b", code)}
    assert len(paths) > 25 and missing == {"centered", "square_avg", "rmsprop_"}


# ------------------------------------------------------------------------------------------ size and numbers


def test_readme_is_short():
    readme = TEXT["README.md"]
    assert len(readme.splitlines()) <= 180
    results = readme.partition("## Key results\n")[2].partition("\n## ")[0]
    assert 0 < len(re.findall(r"^\|(?! ---)", results, re.MULTILINE)) <= 25 + 2  # and two headers
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line]) <= 14


def assert_said(sentence, *numbers, page="docs/results.md"):
    """The pages repeat numbers of their tables in sentences; the tests below compute these numbers again."""
    assert sentence.format(*numbers) in " ".join(TEXT[page].split())


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


def power_of_the_width(rows, method):
    return transfer_report.power_of_the_width(transfer_report.of([*rows.values()], method))


def test_sentences_about_fashion_mnist():
    rows, accuracy = transfer("fashion")
    wide = {method: row for (method, width), row in rows.items() if width == 1024}
    lost = {key: transfer_report.regret(row, 64)[0] for key, row in rows.items()}
    four = ("muP-global", "muP-naive", "SP-naive", "muP²")
    words = "{:.1f} points with muP-global, {:.1f} with muP-naive, {:.1f} with plain SAM, {:.1f} with muP², and nothing"
    assert_said(words, *(lost[method, 1024] for method in four))
    assert lost["SP-LP", 1024] == 0 and all(lost[method, 128] < lost[method, 1024] for method in four)
    for width in (128, 256, 512, 1024):
        best = max(accuracy[method, width] for method in wide)
        assert accuracy["muP²", width] == pytest.approx(best, abs=1e-9 if width != 256 else 0.01)
    assert_said("at 1024 muP² reaches {:.1f} %", accuracy["muP²", 1024])
    assert_said("SP-LP reaches {:.1f} %", accuracy["SP-LP", 1024])
    alone = [transfer_report.mean_error(wide[method]["alone"])[0] for method in ("SP-naive", "muP²")]
    assert_said("without SAM {:.1f} %, against {:.1f} % in muP", *alone)
    point = lambda method, width: (rows[method, width]["lr"], rows[method, width]["rho"])
    assert point("muP²", 64) == point("muP²", 128) == (0.005, 0.1778)
    assert {point("muP²", width) for width in (256, 512, 1024)} == {(0.01, 0.3162)}
    for method in ("SP-naive", "muP-naive"):
        assert (point(method, 128)[0], point(method, 1024)[0]) == (0.01, 0.0025)
    powers = [power_of_the_width(rows, method) for method in ("muP²", "SP-naive", "muP-naive")]
    assert_said("grows as width^{:.2f}, that of plain SAM as width^{:.2f}. That of muP-naive", *powers)
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
        assert len(radii) >= 2 and max(radii.values()) < tried["muP-SGD", width, 0.8, 0.0]
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
    wide = {name: {m: transfer(name)[0][m, 1024] for m in METHODS} for name in ("fashion", "mnist1d")}
    less = {m: [] for m in METHODS if m != "muP²"}
    for (name, rows), method in itertools.product(wide.items(), less):
        kept, best = (
            statistics.fmean(a - b for a, b in zip(read(rows["muP²"]), read(rows[method])))
            for read in (lambda row: row["kept"]["64"], lambda row: row["accuracies"])
        )
        assert min(kept, best) > 0
        less[method].append(kept)
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
    assert_said("scatter by up to {:.1f} points between seeds", max(deviations))
    powers = [power_of_the_width(rows, method) for method in TWO]
    assert_said("moves as width^{:.2f} with plain SAM and as width^{:.2f} with muP²", *powers)


def test_sentences_about_the_resnet_with_right_labels():
    rows, accuracy = transfer("resnet-clean")
    plain, mup2 = rows["SP-naive", 32], rows["muP²", 32]
    gains = [transfer_report.gain(row) for row in (rows["muP²", 4], plain, mup2)]
    assert max(mean for mean, _ in gains) < 1
    words = "{:.1f} ± {:.1f} points at width 4, and at width 32 {:.1f} ± {:.1f} points in SP and {:.1f} ± {:.1f} with"
    assert_said(words, *itertools.chain(*gains))
    over_alone = [
        (rho, statistics.fmean(values) - statistics.fmean(row["alone"]))
        for row in rows.values()
        for rho, values in row["slice"]
    ]
    flat = [over for rho, over in over_alone if 0.0178 <= rho <= 0.1]
    assert_said(
        "at rho 0.0178 to 0.1 and each width's best lr, the accuracy differs by {:.1f} to {:.1f}", min(flat), max(flat)
    )
    assert_said("At rho 0.562 it is at least {:.1f}", -max(over for rho, over in over_alone if rho == 0.5623))
    lost = [transfer_report.regret(row, width) for row, width in ((plain, 4), (plain, 8), (mup2, 8))]
    assert_said("loses {:.1f} ± {:.1f} points at width 32 with plain SAM, and nothing with muP²", *lost[0])
    assert transfer_report.regret(mup2, 4)[0] < 0
    falls = [rows[method, 8]["lr"] / rows[method, 32]["lr"] for method in TWO]
    words = (
        "Width 8's loses {:.1f} ± {:.1f} points with plain SAM, whose best learning rate falls by a factor of {:.0f}"
    )
    words += " between widths 8 and 32, and {:.1f} ± {:.1f} with muP², where it falls by a factor of {:.0f}"
    assert_said(words, *lost[1], falls[0], *lost[2], falls[1])
    more = [
        transfer_report.mean_error([a - b for a, b in zip(mup2[key], plain[key])]) for key in ("accuracies", "alone")
    ]
    words = "At width 32 muP² reaches {:.1f} %, {:.1f} ± {:.1f} points more than plain SAM. SGD alone reaches {:.1f}"
    assert_said(f"{words} ± {{:.1f}} points more in muP than in SP", accuracy["muP²", 32], *more[0], *more[1])
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
    more = [
        transfer_report.mean_error([a - b for a, b in zip(mup2["accuracies"], values)])
        for values in (plain["accuracies"], plain["kept"]["32"])
    ]
    assert_said(
        "muP² reaches {:.1f} %, {:.1f} ± {:.1f} points more than plain SAM, and", accuracy["muP²", 128], *more[0]
    )
    assert_said("and {:.1f} ± {:.1f} points more than plain SAM with width 32's", *more[1])
    alone = transfer_report.mean_error([a - b for a, b in zip(mup2["alone"], plain["alone"])])
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
    over_alone = lambda row, rho: statistics.fmean(dict(row["slice"])[rho]) - statistics.fmean(row["alone"])
    at = {rho: [over_alone(row, rho) for row in rows.values()] for rho in (0.1778, 0.5623)}
    assert_said("differs by {:.1f} to {:.1f} points from", min(at[0.1778]), max(at[0.1778]))
    assert_said("it is at least {:.1f} points below", -max(at[0.5623]))
    factors = [rows[method, 16]["lr"] / rows[method, 128]["lr"] for method in TWO]
    lost = [transfer_report.regret(row, 16) for row in (plain, mup2)]
    words = (
        "Width 16's (lr, rho) loses {:.1f} ± {:.1f} points at width 128 with plain SAM, and {:.1f} ± {:.1f} with muP²."
    )
    words = f"falls by a factor of {{:.0f}} with plain SAM and of {{:.0f}} with muP². {words}"
    assert_said(words, *factors, *lost[0], *lost[1])
    more = [
        transfer_report.mean_error([a - b for a, b in zip(mup2[key], plain[key])]) for key in ("accuracies", "alone")
    ]
    words = (
        "At width 128 muP² reaches {:.1f} %, {:.1f} ± {:.1f} points more than plain SAM. Most of this comes from muP:"
    )
    words += " AdamW alone reaches {:.1f} ± {:.1f} points more in muP than in SP."
    assert_said(words, accuracy["muP²", 128], *more[0], *more[1])


def test_sentences_about_the_variants():
    found = {row["method"]: row["accuracies"] for row in build.transfer_rows("table2")}
    assert {len(values) for values in found.values()} == {12}
    more = lambda a, b: transfer_report.mean_error([x - y for x, y in zip(found[a], found[b])])
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
    settings = {"vit": ("ViT", 16, 128), "vit-clean": ("ViT, right labels", 16, 128), "resnet": ("ResNet-18", 4, 32)}
    settings["resnet-clean"] = ("ResNet-18, right labels", 4, 32)
    for name, (title, narrow, wide) in settings.items():
        plain, mup2 = (transfer_report.regret(transfer(name)[0][m, wide], narrow) for m in TWO)
        words = "{:.1f} ± {:.1f} and {:.1f} ± {:.1f} points" if name == "vit" else "{:.1f} ± {:.1f} and {:.1f} ± {:.1f}"
        assert_said(f"{words} ({title})", *plain, *mup2, page="README.md")


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


def test_sentence_about_adamw_in_bfloat16():
    times = json.loads((build.TIMES / "cpu-amd-epyc.json").read_text())["rows"]
    times = [
        row for row in times if (row["implementation"], row["dtype"], row["base"]) == ("mup2_fused", "bf16", "adamw")
    ]
    ratios = [row["ratio"] for row in times if row["model"] != "mlp-tiny"]
    assert_said("all models but the tiny one take at least {:.1f} times the floor", min(ratios), page="docs/speed.md")


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
