"""The pages say what is there: paths, names, links, choices, commands, the modules' first lines."""

import ast
import re
import runpy
from pathlib import Path

import pytest
import yaml

import t2i_rl
from tests.support import architecture

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs" / "LOG.md"  # its entries stay as they were written, old names among them
CHANGELOG = ROOT / "CHANGELOG.md"
PAGES = [
    page
    for page in (*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").glob("*.md")))
    if page not in (NOTEBOOK, architecture.PAGE)  # the one is made of its head and the modules
]
MODULES = sorted(architecture.PACKAGE.rglob("*.py"))
FENCE = re.compile(r"^```.*?^```$", flags=re.M | re.S)
EXAMPLE = re.compile(r"<!-- example:begin -->.*?<!-- example:end -->", flags=re.S)  # run by test_readme.py


def text_of(page: Path) -> str:
    return EXAMPLE.sub("", page.read_text(encoding="utf-8"))


def by_name(paths):
    return {"argvalues": paths, "ids": [path.relative_to(ROOT).as_posix() for path in paths]}


def test_the_architecture_page_is_what_the_generator_makes():
    assert architecture.PAGE.read_text(encoding="utf-8") == architecture.page(), "run `make docs`"


def test_every_module_begins_with_one_sentence_that_ends_within_120_characters():
    first_lines = {path: architecture.first_line(path) for path in MODULES}
    unfit = {
        path.relative_to(ROOT).as_posix(): line
        for path, line in first_lines.items()
        if not line.endswith(".") or len(line) > 120 or re.search(r"[.?!] [A-Z]", line)
    }
    assert not unfit


@pytest.mark.parametrize("page", **by_name(PAGES))
def test_every_path_that_a_page_names_exists(page):
    named = set(re.findall(r"(?<![\w/.-])(?:t2i_rl|conf|tests|experiments|docs)/[\w./-]*\w/?", text_of(page)))
    assert not sorted(path for path in named if not (ROOT / path).exists())


@pytest.mark.parametrize("page", **by_name([page for page in PAGES if page != CHANGELOG]))
def test_every_dotted_name_that_a_page_gives_exists(page):
    names = set(re.findall(r"(?<![\w/.])t2i_rl(?:\.\w+)+", text_of(page)))
    assert not sorted(name for name in names if not exists(name))


def test_every_new_name_in_the_changelog_exists_and_no_old_one_does():
    rows = re.search(r"\| 0\.1\.0 \| 0\.2\.0 \|\n\|.*?\n(.*?)\n\n", CHANGELOG.read_text(encoding="utf-8"), flags=re.S)
    for row in rows.group(1).splitlines():
        old, new = (re.findall(r"`([\w.]+)`", cell) for cell in row.strip("| ").split(" | "))
        assert all(exists(f"t2i_rl.{name}") for name in new if name != "TokenRollout"), row
        assert not [name for name in old if (architecture.PACKAGE / f"{name.replace('.', '/')}.py").is_file()], row


def exists(name: str) -> bool:
    """Whether a dotted name is a module or a package of t2i_rl, or stands at the top of one."""
    parts = name.split(".")[1:]
    for depth in range(len(parts), -1, -1):
        path = architecture.PACKAGE.joinpath(*parts[:depth])
        module = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        if module.is_file():
            rest = parts[depth:]
            return not rest or (depth == 0 and rest[0] in t2i_rl.__all__) or rest[0] in names_at_the_top_of(module)
    return False


def names_at_the_top_of(module: Path) -> set[str]:
    names = set()
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Assign):
            names |= {target.id for target in node.targets if isinstance(target, ast.Name)}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
    return names


@pytest.mark.parametrize("page", **by_name([*PAGES, architecture.PAGE]))
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in (target for target in targets if not target.startswith("http")):
        path, _, anchor = target.partition("#")
        file = (page.parent / path).resolve() if path else page
        assert file.exists(), target
        assert not anchor or anchor in anchors_of(file), target


def anchors_of(page: Path) -> set[str]:
    """The headings of a page as GitHub makes anchors of them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", **by_name(PAGES))
def test_prose_is_wrapped_at_100_characters(page):
    prose = FENCE.sub("", page.read_text(encoding="utf-8")).splitlines()
    assert not [line for line in prose if len(line) > 100 and not line.startswith(("|", "!["))]


def test_the_readme_has_at_most_150_lines():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 150


@pytest.mark.parametrize("group", ["method", "model", "reward", "benchmark", "data"])
def test_the_readme_names_every_choice_of_a_group(group):
    assert not choices_of(group) - words_of("README.md")


@pytest.mark.parametrize(
    "group", ["task", "method", "regularizer", "model", "reward", "benchmark", "data", "trainer", "logger"]
)
def test_the_page_on_using_it_names_every_choice_of_a_group(group):
    assert not choices_of(group) - words_of("docs/using.md")


def test_the_tables_of_methods_name_no_method_that_is_not_there():
    table = re.search(r"\| `method` \|.*?\n\n", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.S).group()
    rows = [row.split("|")[1:-1] for row in table.strip().splitlines()[2:]]
    for method, _, reward, benchmark, data in rows:
        assert set(re.findall(r"`(\w+)`", method)) <= choices_of("method")
        assert set(re.findall(r"`(\w+)`", reward)) <= choices_of("reward")
        assert set(re.findall(r"`(\w+)`", benchmark)) <= choices_of("benchmark")
        assert set(re.findall(r"`(\w+)`", data)) <= choices_of("data")


def choices_of(group: str) -> set[str]:
    return {path.stem for path in (ROOT / "conf" / group).glob("*.yaml")}


def words_of(page: str) -> set[str]:
    """What stands in backticks on a page, word by word."""
    return {
        word
        for code in re.findall(r"`([^`\n]+)`", (ROOT / page).read_text(encoding="utf-8"))
        for word in re.findall(r"\w+", code)
    }


LEADING_OUT = re.compile(
    r"\.\./shared/specs|\bspec(ification)?('s)? (sections?|traps?|figures|\d)|the specification", re.I
)
SOURCES = [
    *PAGES,
    *(file for folder in ("t2i_rl", "conf", "tests", "experiments") for file in (ROOT / folder).rglob("*")),
]


def test_nothing_refers_to_a_specification_that_is_not_in_the_repository():
    texts = {
        file: file.read_text(encoding="utf-8")
        for file in SOURCES
        if file.suffix in (".py", ".yaml", ".md") and file != Path(__file__)
    }
    assert not [file.relative_to(ROOT).as_posix() for file, text in texts.items() if LEADING_OUT.search(text)]


def test_every_make_target_that_a_page_names_is_there():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.M))
    pages = [page.read_text(encoding="utf-8") for page in PAGES] + [(ROOT / ".ci" / "run").read_text(encoding="utf-8")]
    named = {name for page in pages for name in re.findall(r"^make ([\w-]+)|`make ([\w-]+)`", page, flags=re.M)}
    assert {name for pair in named for name in pair if name} <= targets
    assert {"lint", "types", "docs", "test", "test-all", "demo", "help"} <= targets


def test_changelog_and_citation_have_this_version():
    assert f"## {t2i_rl.__version__} - " in CHANGELOG.read_text(encoding="utf-8")
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == t2i_rl.__version__
    cited = {reference["url"].rsplit("/", 1)[1] for reference in citation["references"]}
    methods = re.findall(r"\d{4}\.\d{5}", text_of(ROOT / "README.md"))
    assert methods and set(methods) <= cited


@pytest.mark.parametrize(
    ("message", "fits"),
    [
        ("docs: results on a page of their own\n\nbody of any length", True),
        ("methods, conf: presets", True),
        ('Revert "docs: results"', True),
        ("Results on a page of their own", False),
        ("docs results", False),
        ("docs: results.", False),
        ("docs: " + "x" * 67, False),
    ],
)
def test_a_commits_subject_is_area_and_what_in_72_characters(message, fits):
    complaint = runpy.run_path(str(ROOT / ".ci" / "commit-subject"))["complaint"]
    assert (complaint(message) is None) == fits
