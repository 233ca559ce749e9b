"""The documentation is true: the site builds, generated pages are current, commands and messages exist."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import click
import pytest
import yaml
from click.testing import CliRunner

import dstrain
from dstrain.cli.main import COMMANDS, group
from dstrain.config.loader import load_config
from tools import configuration_page, migration_page, modules_page

ROOT = Path(__file__).resolve().parents[2]
_OUTSIDE = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "launch/README.md", "benchmarks/README.md")
PAGES = [*(ROOT / name for name in _OUTSIDE), *sorted((ROOT / "docs").glob("*.md"))]
NAMES = [str(page.relative_to(ROOT)) for page in PAGES]
MOST_WORDS = 1200

_FENCED = re.compile(r"^( *)```([^\n]*)\n(.*?)^\1```$", re.MULTILINE | re.DOTALL)
_INDENTED = re.compile(r"^(?:(?: {4}.*)\n)+", re.MULTILINE)
_SHELL = ("", "console", "sh", "bash", "shell")


# --- what is generated


def test_the_configuration_reference_is_current() -> None:
    written = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert written == configuration_page.page(), "docs/configuration.md is out of date: run `make docs`"


def test_the_list_of_modules_is_current() -> None:
    written = (ROOT / "docs" / "modules.md").read_text(encoding="utf-8")
    assert written == modules_page.page(), "docs/modules.md is out of date: run `make docs`"


def test_the_keys_of_other_trainers_are_current() -> None:
    written = (ROOT / "docs" / "migration.md").read_text(encoding="utf-8")
    assert written == migration_page.page(), "docs/migration.md is out of date: run `make docs`"


def test_every_module_says_what_it_is_for() -> None:
    modules = sorted((ROOT / "dstrain").rglob("*.py"))
    assert len(modules) > 100
    assert not [str(path) for path in modules if not modules_page.first_line(path)]


def test_a_page_of_modules_has_packages_and_the_packages_in_them(tmp_path: Path) -> None:
    for name, text in {
        "errors.py": '"""What the user can fix."""',
        "later/__init__.py": '"""Comes last."""',
        "launch/__init__.py": '"""How a run starts.\n\nMore."""',
        "launch/hosts.py": '"""Over two\nlines, with ``code`` and a |."""',
        "launch/launchers/__init__.py": '"""Inner."""',
        "launch/launchers/local.py": '"""One machine."""',
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    lines = modules_page.page(tmp_path).splitlines()
    headings = [line for line in lines if line.startswith("##")]
    assert headings == ["## dstrain", "## dstrain.launch", "### dstrain.launch.launchers", "## dstrain.later"]
    assert "| `hosts.py` | Over two lines, with `code` and a \\|. |" in lines and "More." not in lines
    assert "| `errors.py` | What the user can fix. |" in lines and "How a run starts." in lines


# --- the site


def test_the_site_builds_in_strict_mode(tmp_path: Path) -> None:
    """Every link and anchor leads somewhere, every page is in the navigation, and nothing comes from elsewhere."""
    from mkdocs.commands.build import build
    from mkdocs.config import load_config as load_mkdocs

    build(load_mkdocs(str(ROOT / "mkdocs.yml"), site_dir=str(tmp_path / "site"), strict=True))
    pages = {path.parent.name: path.read_text(encoding="utf-8") for path in tmp_path.rglob("index.html")}
    assert len(pages) >= 20
    assert "what a checkpoint costs" in pages["benchmarks"]  # included from another folder
    assert "dstrain.load_config" in pages["python-api"] or "load_config" in pages["python-api"]
    for name, page in pages.items():
        loaded = re.findall(r"""<(?:script|img|iframe)[^>]* src="?(https?:[^" >]+)""", page)
        loaded += re.findall(
            r"""<link[^>]* rel="?(?:stylesheet|preconnect)"?[^>]*href="?(https?:[^" >]+)""", page
        )
        assert not loaded, f"{name} loads {loaded}"


def test_pages_that_are_read_in_the_repository_have_no_dead_links() -> None:
    """MkDocs sees docs/ alone; README, CONTRIBUTING and their like link into it."""
    seen = 0
    for page in PAGES:
        if page.parent == ROOT / "docs":
            continue
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
            if re.match(r"[a-z]+://", target):
                continue
            file, _, anchor = target.partition("#")
            path = page.parent / file if file else page
            assert path.exists(), f"{page.name} links to {target}"
            if anchor:
                assert anchor in _anchors(path), f"{page.name} links to {target}: no such heading"
            seen += 1
    assert seen >= 40


def _anchors(page: Path) -> set[str]:
    from markdown.extensions.toc import slugify

    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {slugify(re.sub(r"[`*]", "", heading), "-") for heading in headings}


@pytest.mark.parametrize("name", ["README.md", "CONTRIBUTING.md"])
def test_the_first_pages_stay_short(name: str) -> None:
    assert len((ROOT / name).read_text(encoding="utf-8").split()) <= MOST_WORDS


# --- what is typed


def _blocks(page: Path) -> Iterator[tuple[str, str]]:
    """(language, text) of each code block, fenced or indented. Only the repository's own pages indent them."""
    text = page.read_text(encoding="utf-8")
    for _, language, block in _FENCED.findall(text):
        yield language.split(" ")[0], block
    if page.parent != ROOT / "docs":
        for block in _INDENTED.findall(_FENCED.sub("", text)):
            yield "", block


def _typed(page: Path) -> Iterator[str]:
    """Each command line of the page's blocks, continuation lines joined; without the prompt."""
    for language, block in _blocks(page):
        if language not in _SHELL:
            continue
        for line in re.sub(r"\\\n\s*", "", block).splitlines():
            yield line.strip().removeprefix("$ ")


def _dstrain(line: str) -> list[str] | None:
    """The words behind `dstrain` in what is typed, also behind `docker exec` and `launch/docker.sh`."""
    starts = re.match(
        r"(?:(?:docker (?:exec|run) .* |\S*/)?dstrain|launch/docker\.sh) +(?P<words>[a-z-].*)", line
    )
    if starts is None or re.match(r"docker build ", line):
        return None
    lexer = shlex.shlex(starts["words"], posix=True, punctuation_chars="|>&;")
    lexer.whitespace_split = True
    words = []
    for word in lexer:
        if set(word) <= set("|>&;"):
            break
        words.append(word)
    return None if line.startswith("launch/docker.sh") and words[0] in ("keys", "node") else words


def _command(words: list[str]) -> tuple[click.Command, list[str]]:
    """The command that the words name, and what is left of them."""
    command: click.Command = group
    context = click.Context(group)
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        inner = command.get_command(context, words[0])
        assert inner is not None, f"there is no command {words[0]!r}"
        command, words = inner, words[1:]
    return command, words


def test_what_is_taken_for_a_command() -> None:
    """The reader above, tried: it would be easy to check nothing."""
    assert _dstrain("dstrain plan --set a=b  # why") == ["plan", "--set", "a=b"]
    assert _dstrain("/tmp/try/bin/dstrain config schema > dstrain.json") == ["config", "schema"]
    assert _dstrain("docker exec -it node1 dstrain doctor --hostfile h") == ["doctor", "--hostfile", "h"]
    assert _dstrain("launch/docker.sh run --zero 2") == ["run", "--zero", "2"]
    assert _dstrain("launch/docker.sh node node1") is None and _dstrain("docker build -t dstrain .") is None
    with pytest.raises(AssertionError):
        _command(["trian"])
    command, rest = _command(["run", "--zeor", "2"])
    with pytest.raises(click.NoSuchOption):
        command.make_context("run", rest)


@pytest.mark.parametrize("name", NAMES)
def test_commands_on_the_page_are_accepted_by_the_command_line(name: str) -> None:
    """Each is parsed with its values, by click: an unknown option, a wrong value or a missing argument is an error."""
    for line in _typed(ROOT / name):
        words = _dstrain(line)
        if words is None:
            continue
        command, rest = _command(words)
        try:
            command.make_context(words[0], rest)
        except click.ClickException as error:
            pytest.fail(f"{name}: {line}\n{error.format_message()}")


def test_the_pages_show_most_commands() -> None:
    shown = {words[0] for page in PAGES for line in _typed(page) if (words := _dstrain(line))}
    assert shown == set(COMMANDS)


@pytest.mark.parametrize("name", NAMES)
def test_options_named_in_the_text_exist(name: str) -> None:
    """`dstrain run --elastic` in running text may have placeholders, so only the names of its options are looked up."""
    prose = _FENCED.sub("", (ROOT / name).read_text(encoding="utf-8"))
    for inline in re.findall(r"`(dstrain [a-z][^`]*)`", prose):
        words = inline.split()[1:]
        if words[0] not in COMMANDS:
            pytest.fail(f"{name}: `{inline}`: there is no command {words[0]!r}")
        command, rest = _command(words if words[0] in ("config", "data") and len(words) > 1 else words[:1])
        known = {
            option for parameter in command.params for option in (*parameter.opts, *parameter.secondary_opts)
        }
        given = {word.partition("=")[0] for word in (rest or words[1:]) if word.startswith("--")}
        assert given - {"--time"} <= known | {"--help", "--debug"}, f"{name}: `{inline}`"


def test_submit_shows_the_script_that_the_page_promises(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    typed = [words for line in _typed(ROOT / "docs" / "slurm.md") if (words := _dstrain(line))]
    [words] = [words for words in typed if words[0] == "submit" and "--dry-run" in words]
    command = importlib.import_module(COMMANDS["submit"][0]).command
    shown = CliRunner().invoke(command, words[1:], catch_exceptions=False)
    assert "#SBATCH --gpus-per-node=8" in shown.output and "#SBATCH --time=04:00:00" in shown.output


@pytest.mark.parametrize("name", NAMES)
def test_other_programs_on_the_page_are_there(name: str) -> None:
    """Targets of make, and scripts and modules of the repository."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for line in _typed(ROOT / name):
        for target in re.findall(r"(?:^|\s)make ([a-z-]+)(?=\s|$)", line.split("#")[0]):
            assert target in targets, f"{name}: {line}"
        for module in re.findall(r"python -m ((?:dstrain|benchmarks|tools)[\w.]*)", line):
            assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file(), f"{name}: {line}"
        for script in re.findall(r"python ((?:benchmarks|examples|tools)/\S+)", line):
            assert (ROOT / script).is_file(), f"{name}: {line}"


@pytest.mark.parametrize("name", NAMES)
def test_files_named_on_the_page_are_there(name: str) -> None:
    """Of the repository: `dstrain/engine/pipeline_module.py`, `ds_configs/devices/`."""
    text = (ROOT / name).read_text(encoding="utf-8")
    rooms = "dstrain|tests|tools|launch|image|benchmarks|ds_configs|examples|docs"
    for path in re.findall(rf"`((?:{rooms})/[\w./-]+)`", text):
        assert (ROOT / path).exists(), f"{name} names {path}"


def test_config_files_on_the_pages_are_valid(tmp_path: Path) -> None:
    found = 0
    for page in PAGES:
        for language, block in _blocks(page):
            if language not in ("yaml", "yml"):
                continue
            assert isinstance(yaml.safe_load(block), dict), f"{page.name}: {block}"
            file = tmp_path / "run.yaml"
            file.write_text(block)
            load_config(config_file=str(file))
            found += 1
    assert found >= 1


@pytest.mark.parametrize("name", NAMES)
def test_calls_of_the_python_api_on_the_page_fit_its_signatures(name: str) -> None:
    for language, block in _blocks(ROOT / name):
        if language != "python" and "import dstrain" not in block:
            continue
        for node in ast.walk(ast.parse(textwrap.dedent(block))):
            if isinstance(node, ast.Call) and re.fullmatch(r"dstrain\.\w+", ast.unparse(node.func)):
                function = getattr(dstrain, ast.unparse(node.func).removeprefix("dstrain."))
                given = {str(keyword.arg): None for keyword in node.keywords}
                inspect.signature(function).bind(*node.args, **given)


# --- what is said


def test_messages_explained_in_debugging_exist() -> None:
    """The fixed parts of each message, between its placeholders, are texts of the source."""
    source = _texts_of_the_source()
    page = (ROOT / "docs" / "debugging.md").read_text(encoding="utf-8")
    messages = [
        message
        for row in re.findall(r"^\| (`.*?`) \|", page, re.MULTILINE)
        for message in re.findall(r"`([^`]+)`", row)
    ]
    assert len(messages) >= 60
    missing = [
        f"{message!r}: no text has {part!r}"
        for message in messages
        for part in (part.strip() for part in message.split("…"))
        if len(part) > 3 and part not in source
    ]
    assert not missing, "\n".join(missing)


def _texts_of_the_source() -> str:
    """All texts of the package, those of an f-string as they follow each other."""
    texts = []
    for path in sorted((ROOT / "dstrain").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                texts.append(node.value)
    return "\n".join(texts)
