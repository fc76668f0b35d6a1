"""README.md and docs/*.md: what they name exists, and their tables are those of the committed result files."""

import importlib
import re
import shlex
import sys

import pytest

from docs import build
from docs.build import PAGES, ROOT

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


# ------------------------------------------------------------------------------------------ size


def test_readme_is_short():
    readme = TEXT["README.md"]
    assert len(readme.splitlines()) <= 180
    results = readme.partition("## Key results\n")[2].partition("\n## ")[0]
    assert 0 < len(re.findall(r"^\|(?! ---)", results, re.MULTILINE)) <= 25 + 2  # and two headers
    code = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)[0]
    assert len([line for line in code.splitlines() if line]) <= 14
