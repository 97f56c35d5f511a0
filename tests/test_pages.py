"""Every page: its commands parse, its links lead somewhere, and the site and its API reference have what they name."""

from __future__ import annotations

import ast
import importlib
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from imgtok.cli import JOBS, TOOLS, parse

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "benchmarks/README.md", *sorted((ROOT / "docs").rglob("*.md"))]
WITHOUT_COMMANDS = {  # page -> why it has no command to check
    "docs/architecture.md": "how the code is organised",
    "docs/performance.md": "figures; benchmarks/README.md has the commands, programs of their own",
    "docs/transformers.md": "Python alone, with a model that cannot be downloaded here; its tests use tiny ones",
    "benchmarks/README.md": "programs of their own, which tests/benchmarks runs with tiny models",
}
CALIBRATIONS = {  # what `imgtok calibrate` writes
    "CALIBRATION.yaml",
    "outputs/calibration/cifar10-vae-final/calibration.yaml",
    "outputs/calibration/shapes32/calibration.yaml",
}


def name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def blocks(text: str) -> Iterator[str]:
    """The code of a page that is not Python: fenced, or indented by four spaces."""
    for language, code in re.findall(r"^```(\w*)\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        if language != "python":
            yield code
    plain = re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)
    yield "\n".join(line.strip() for line in plain.splitlines() if line.startswith("    "))


def commands(text: str) -> list[str]:
    """The `imgtok ...` commands of a page, its programs of several processes among them, without comments."""
    lines = "\n".join(blocks(text)).replace("\\\n", " ").splitlines()
    lines = [re.sub(r"^(srun|torchrun .*?-m|accelerate launch -m) ", "", line.strip()) for line in lines]
    return [line for line in lines if re.match(r"imgtok[ .][a-z]", line)]


def check(command: str, calibration: Path) -> None:
    """Parses a command, as the program would before it looks for any file of the reader's own."""
    words = [str(calibration) if word in CALIBRATIONS else word for word in shlex.split(command, comments=True)]
    if "benchmark=shapes" in words:  # another way to write `evaluate shapes`
        words = ["imgtok", "evaluate", "shapes", *(word for word in words[2:] if word != "benchmark=shapes")]
    if words[0] != "imgtok":  # imgtok.train.tokenizer CONFIG ...
        module, rest = next((m, words[1:]) for m, _ in JOBS.values() if m in (words[0], f"{words[0]}.job"))
    elif words[1] in TOOLS:
        assert len(words) > 2
        return
    else:
        length = next(length for length in (2, 1) if " ".join(words[1 : 1 + length]) in JOBS)
        module, rest = JOBS[" ".join(words[1 : 1 + length])][0], words[1 + length :]
    found = importlib.import_module(module)
    parse(found.Config, rest, getattr(found, "POSITIONAL", None))


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_the_commands_of_a_page_parse(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration = tmp_path / "calibration.yaml"
    calibration.write_text("model: {quantizer: {levels: 32}}", encoding="utf-8")
    monkeypatch.chdir(ROOT)  # where relative paths start
    found = commands(path.read_text(encoding="utf-8"))
    if not found:
        assert name(path) in WITHOUT_COMMANDS or path.parent.name == "reference", f"{name(path)} has no command"
    for command in found:
        try:
            check(command, calibration)
        except Exception as error:
            raise AssertionError(f"{name(path)}: {command}\n{error}") from error


def slug(heading: str) -> str:
    """The anchor of a heading, as GitHub and the site make it."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
    return re.sub(r"[^\w\- ]", "", text.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("path", PAGES, ids=name)
def test_links_lead_somewhere(path: Path) -> None:
    text = re.sub(r"^```.*?^```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    for target in re.findall(r"\]\((?!https?:)([^)\s]+)\)", text):
        file, _, anchor = target.partition("#")
        page = (path.parent / file).resolve() if file else path
        assert page.exists(), f"{name(path)} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in map(slug, headings), f"{name(path)} links to {target}"


def test_the_configurations_that_pages_name_exist() -> None:
    for path in PAGES:
        named = re.findall(r"\bconfigs/[\w./-]+\.yaml", path.read_text(encoding="utf-8"))
        assert [file for file in named if not (ROOT / file).exists()] == [], name(path)


# ------------------------------------------------------------------------------------------------ the site


def leaves(item: object) -> Iterator[str]:
    if isinstance(item, str):
        yield item
    elif isinstance(item, dict):
        for value in item.values():
            yield from leaves(value)
    elif isinstance(item, list):
        for value in item:
            yield from leaves(value)


def test_the_navigation_of_the_site_names_pages_that_exist() -> None:
    """A page that it does not name is put at its end by docs/hooks.py."""
    listed = list(leaves(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    here = {path.relative_to(ROOT / "docs").as_posix() for path in (ROOT / "docs").rglob("*.md")}
    assert set(listed) <= here | {"index.md", "benchmarks.md"}  # README.md and benchmarks/README.md, by docs/hooks.py
    assert len(listed) == len(set(listed))


def test_names_of_the_api_reference_exist() -> None:
    found = 0
    for path in (ROOT / "docs/reference").glob("*.md"):
        for dotted in re.findall(r"^::: (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE):
            file = ROOT / (dotted.replace(".", "/") + ".py")
            if not file.exists():
                module, _, member = dotted.rpartition(".")
                file = ROOT / (module.replace(".", "/") + ".py")
                assert file.exists(), f"{name(path)}: there is no module {module}"
                body = ast.parse(file.read_text(encoding="utf-8")).body
                assert member in {getattr(node, "name", None) for node in body}, f"{name(path)}: {dotted}"
            found += 1
    assert found > 50
