"""Project files that must agree with each other: versions, constraints, CI, hooks and rules."""

import re
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from packaging.version import Version

from megagrow import __version__
from tests.test_architecture import (
    FILE_LINES,
    FUNCTION_LINES,
    KERNEL_FILE_LINES,
    KERNEL_FUNCTION_LINES,
    ORDER,
)

ROOT = Path(__file__).resolve().parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
WORKFLOW = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
TEMPLATES = sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("*.yml"))
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
PAGES = ("README.md", "CONTRIBUTING.md", "SECURITY.md", "docs/reference/code-map.md")


def constraints() -> dict[str, Version]:
    """Return the pinned version of each package of constraints.txt."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = [line for line in lines if line and not line.startswith("#")]
    assert [pin for pin in pins if not re.fullmatch(r"[\w.-]+==[\w.]+", pin)] == []
    pairs = [pin.split("==") for pin in pins]
    return {canonicalize_name(name): Version(version) for name, version in pairs}


def requirements() -> list[Requirement]:
    """Return the dependencies that `make setup` installs: the package's, and test and dev."""
    extras = PROJECT["optional-dependencies"]
    texts = [*PROJECT["dependencies"], *extras["test"], *extras["dev"]]
    return [Requirement(text) for text in texts]


def test_constraints_pin_every_dependency() -> None:
    pins = constraints()
    for requirement in requirements():
        version = pins.get(canonicalize_name(requirement.name))
        assert version is not None, f"{requirement.name} is missing in constraints.txt"
        assert requirement.specifier.contains(version), f"{requirement} excludes {version}"


def test_constraints_hold_neither_the_project_nor_local_versions() -> None:
    pins = constraints()
    assert "megagrow" not in pins
    assert [name for name, version in pins.items() if version.local] == []


def test_setup_installs_the_pinned_torch() -> None:
    makefile = (ROOT / "Makefile").read_text()
    assert f"TORCH ?= torch=={constraints()['torch']}\n" in makefile
    assert "-c $(VENV)/constraints.txt" in makefile


def test_the_image_installs_the_pinned_torch_from_files_that_exist() -> None:
    """No test can build the image; these are the lines that other files can break."""
    lines = re.sub(r"\\\n\s*", "", (ROOT / "Dockerfile").read_text()).splitlines()
    steps = [line.split(maxsplit=1) for line in lines if line and not line.startswith("#")]
    assert ["ARG", f'TORCH="torch=={constraints()["torch"]}"'] in steps
    (base,) = [step[1] for step in steps if step[0] == "FROM"]
    python = Version(base.removeprefix("python:").removesuffix("-slim"))
    assert SpecifierSet(PROJECT["requires-python"]).contains(python)
    copied = {name for key, rest in steps if key == "COPY" for name in rest.split()[:-1]}
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert copied == {line.removeprefix("!") for line in ignored if line.startswith("!")}
    assert [name for name in copied if not (ROOT / name).exists()] == []
    (extras,) = re.findall(r"'\.\[([a-z,]+)\]'", "\n".join(lines))
    assert set(extras.split(",")) <= PROJECT["optional-dependencies"].keys()
    keys = [key for key, _ in steps]
    assert steps[keys.index("USER")][1] != "root" and keys.index("USER") > max(
        index for index, key in enumerate(keys) if key in ("RUN", "COPY")
    )


def test_ci_runs_the_entry_point_on_every_supported_python() -> None:
    job = WORKFLOW["jobs"]["test"]
    assert [step["run"] for step in job["steps"] if "run" in step] == [".ci/run"]
    versions = job["strategy"]["matrix"]["python"]
    assert versions == ["3.11", "3.12", "3.13"]
    assert Requirement(f"python{PROJECT['requires-python']}").specifier.contains(versions[0])
    assert job["env"]["PYTHON"] == "python${{ matrix.python }}"
    assert (ROOT / ".ci/run").stat().st_mode & 0o111


def test_the_changelog_has_the_current_version_first() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    headings = re.findall(r"^## \[(.+?)\](?: - (\d{4}-\d\d-\d\d))?$", text, flags=re.MULTILINE)
    assert headings[0] == ("Unreleased", "")
    assert headings[1][0] == __version__
    assert [date for _, date in headings[1:]] == sorted((d for _, d in headings[1:]), reverse=True)
    groups = set(re.findall(r"^### (\w+)$", text, flags=re.MULTILINE))
    assert groups <= {"Added", "Changed", "Deprecated", "Removed", "Fixed", "Security"}


def test_the_citation_has_the_current_version_and_the_paper() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert {"cff-version", "message", "title", "authors"} <= citation.keys()
    assert str(citation["version"]) == __version__
    date = citation["date-released"]
    assert f"## [{__version__}] - {date}\n" in (ROOT / "CHANGELOG.md").read_text()
    assert citation["license"] == PROJECT["license"]
    (paper,) = citation["references"]
    assert paper["identifiers"][0]["value"] == "arXiv:2405.15319"
    assert paper["authors"][0]["family-names"] == "Du"


def test_hooks_run_installed_tools() -> None:
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())
    hooks = [hook for repo in config["repos"] for hook in repo["hooks"]]
    tools = {hook["entry"].split()[0] for hook in hooks}
    assert tools == {"ruff", "mypy", "shellcheck", "codespell"}
    names = {requirement.name.removesuffix("-py") for requirement in requirements()}
    assert tools <= names


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_issue_templates_are_complete(path: Path) -> None:
    form = yaml.safe_load(path.read_text())
    assert {"name", "description", "body"} <= form.keys()
    ids = [field["id"] for field in form["body"]]
    assert len(ids) == len(set(ids)) > 3
    assert all(field["attributes"]["label"] for field in form["body"])


def test_there_is_a_template_for_bugs_and_for_features() -> None:
    assert [path.stem for path in TEMPLATES] == ["bug_report", "feature_request"]


def test_the_contributing_guide_states_the_enforced_rules() -> None:
    (order,) = re.findall(r"^`errors` ->.*?`cli`$", CONTRIBUTING, flags=re.DOTALL | re.MULTILINE)
    layers = [name for name in ORDER if not name.startswith("cli_")]
    assert re.findall(r"`(\w+)`", order) == layers
    assert f"| lines per file | {FILE_LINES} | {KERNEL_FILE_LINES} |" in CONTRIBUTING
    assert f"| lines per function | {FUNCTION_LINES};" in CONTRIBUTING
    assert f"90% under 40 | {KERNEL_FUNCTION_LINES} |" in CONTRIBUTING


@pytest.mark.parametrize("page", PAGES)
def test_paths_that_a_page_names_exist(page: str) -> None:
    top = "megagrow|kernels|configs|launchers|tools|tests|docs|.ci|.github"
    spans = re.findall(r"`([^`\n]+)`", (ROOT / page).read_text())
    paths = [path for span in spans for path in re.findall(rf"(?<!\S)(?:{top})/[\w./-]*", span)]
    missing = [path for path in paths if "NAME" not in path and not (ROOT / path).exists()]
    assert missing == []
