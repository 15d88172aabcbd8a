"""Installed files, and a check that kernels/ is not taken for the published package `kernels`.

A folder without __init__.py can still be found as a namespace package, which has no file and gives
way to any regular package of that name, wherever on the path it stands. So ours is harmless if
what is found under the name `kernels` is never a file of ours.
"""

import importlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Iterator
from importlib.machinery import PathFinder
from pathlib import Path

import pytest

from megagrow import __version__

ROOT = Path(__file__).resolve().parents[1]
FIND = """
import importlib.util, json
found = importlib.util.find_spec("kernels")
print(json.dumps(found and found.origin))
"""


def python(*arguments: str, cwd: Path = ROOT, path: tuple[Path, ...] = ()) -> str:
    """Return the output of a fresh interpreter, with `path` as its PYTHONPATH."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path))}
    command = [sys.executable, *arguments]
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def published(tmp_path: Path) -> Path:
    """A folder with a regular package `kernels`, as the published one would be installed."""
    package = tmp_path / "elsewhere" / "kernels"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("name = 'published'\n")
    return package.parent


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel of this tree, built from a copy so that nothing is left in the tree."""
    source, built = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for name in ("megagrow", "kernels", "configs"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--quiet", "--no-deps", "--no-build-isolation", "--wheel-dir", str(built))
    python("-m", "pip", "wheel", *options, str(source))
    return next(built.glob("*.whl"))


@pytest.fixture(scope="module")
def unpacked(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that an installed wheel would add to the path."""
    folder = tmp_path_factory.mktemp("installed")
    zipfile.ZipFile(wheel).extractall(folder)
    return folder


def test_kernels_is_a_folder_and_no_package() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "kernels" / "megagrow_kernels" / "__init__.py").is_file()


@pytest.mark.parametrize("path", [[""], ["."], [".", "kernels"]], ids=str)
def test_no_file_of_ours_is_found_as_kernels(path: list[str]) -> None:
    found = PathFinder.find_spec("kernels", [str(ROOT / entry) for entry in path])
    assert found is None or found.origin is None


@pytest.mark.parametrize("entry", ["-c", "-m"])
def test_nor_from_the_repositorys_root(entry: str, tmp_path: Path) -> None:
    (tmp_path / "find_kernels.py").write_text(FIND)
    code = FIND if entry == "-c" else "find_kernels"
    origin = json.loads(python(entry, code, path=(ROOT, ROOT / "kernels", tmp_path)))
    assert origin is None or not Path(origin).is_relative_to(ROOT)


def test_nor_in_this_process() -> None:
    found = PathFinder.find_spec("kernels")
    assert found is None or found.origin is None or not Path(found.origin).is_relative_to(ROOT)


def test_the_published_package_wins_even_at_the_end_of_the_path(published: Path) -> None:
    code = "import kernels, megagrow_kernels; print(kernels.name, megagrow_kernels.__name__)"
    path = (ROOT, ROOT / "kernels", published)
    assert python("-c", code, path=path) == "published megagrow_kernels"


def test_transformers_works_from_the_root() -> None:
    code = "from transformers import LlamaConfig, LlamaForCausalLM; print(LlamaConfig().model_type)"
    assert python("-c", code, path=(ROOT, ROOT / "kernels")) == "llama"


def test_our_kernels_are_importable_here() -> None:
    ours = importlib.import_module("megagrow_kernels")
    assert Path(ours.__file__).is_relative_to(ROOT / "kernels" / "megagrow_kernels")


def installed_from_here() -> Iterator[str]:
    """The direct_url.json of an editable install of this tree, if there is one."""
    for distribution in importlib.metadata.distributions(path=[sysconfig.get_path("purelib")]):
        url = distribution.read_text("direct_url.json")
        if distribution.name == "megagrow" and url and ROOT.as_uri() in url:
            yield url


@pytest.mark.skipif(not any(installed_from_here()), reason="this tree is not installed")
def test_the_editable_install_brings_both_packages_and_no_kernels(tmp_path: Path) -> None:
    code = "import megagrow, megagrow_kernels; print(megagrow.__file__, megagrow_kernels.__file__)"
    for file in python("-c", code, cwd=tmp_path).split():
        assert Path(file).is_relative_to(ROOT)
    origin = json.loads(python("-c", FIND, cwd=tmp_path))
    assert origin is None or not Path(origin).is_relative_to(ROOT)


def test_the_wheel_holds_every_module_table_and_config(wheel: Path) -> None:
    held = set(zipfile.ZipFile(wheel).namelist())
    product, kernels = ROOT / "megagrow", ROOT / "kernels"
    modules = set[str]()
    for pattern in ("*.py", "*.json", "*.html", "*.js", "*.yaml", "py.typed"):
        modules |= {p.relative_to(ROOT).as_posix() for p in product.rglob(pattern)}
    for pattern in ("*.py", "tiles/*.json"):
        modules |= {p.relative_to(kernels).as_posix() for p in kernels.rglob(pattern)}
    share = f"megagrow-{__version__}.data/data/share/megagrow"
    configs = {f"{share}/{p.relative_to(ROOT).as_posix()}" for p in (ROOT / "configs").rglob("*.*")}
    assert "megagrow/py.typed" in modules
    assert modules | configs == {name for name in held if "dist-info/" not in name}


def test_the_wheel_brings_both_packages_and_no_kernels(unpacked: Path, tmp_path: Path) -> None:
    code = "import megagrow, megagrow_kernels; print(megagrow.__file__, megagrow_kernels.__file__)"
    for file in python("-c", code, cwd=tmp_path, path=(unpacked,)).split():
        assert Path(file).is_relative_to(unpacked)
    origin = json.loads(python("-c", FIND, cwd=tmp_path, path=(unpacked,)))
    assert origin is None or not Path(origin).is_relative_to(unpacked)


def test_the_wheel_names_the_command_and_the_extras(unpacked: Path) -> None:
    (information,) = unpacked.glob("*.dist-info")
    assert "megagrow = megagrow.cli.app:main" in (information / "entry_points.txt").read_text()
    metadata = importlib.metadata.PathDistribution(information).metadata
    assert metadata["Version"] == __version__
    assert metadata["License-Expression"] == "Apache-2.0"
    extras = metadata.get_all("Provides-Extra")
    assert set(extras) == {"flash", "mamba", "eval", "hf", "test", "dev", "wandb"}


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with the programs of an environment in which pip has installed the wheel.

    The dependencies are those of this environment.
    """
    environment = tmp_path_factory.mktemp("environment")
    python("-m", "venv", "--without-pip", str(environment))
    interpreter, packages = environment / "bin/python", sysconfig.get_path("purelib")
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "dependencies.pth").write_text(f"{packages}\n")
    options = ("--quiet", "--no-deps", "--no-index", "--ignore-installed")
    python("-m", "pip", "--python", str(interpreter), "install", *options, str(wheel))
    return environment / "bin"


@pytest.mark.parametrize(
    ("arguments", "output"),
    [
        (["--version"], f"megagrow {__version__}"),
        (["config", "ls"], "gstack-1.1b"),
        (["plan", "gstack-1.1b"], "gstack-1.1b on 1 rank"),
        (["config", "show", "demo/gstack"], "name: demo-gstack"),
    ],
)
def test_an_installed_wheel_finds_its_run_files_by_name_in_an_empty_folder(
    installed: Path, tmp_path: Path, arguments: list[str], output: str
) -> None:
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    command = [str(installed / "megagrow"), *arguments]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert output in done.stdout
    code = "import megagrow; print(megagrow.__file__)"
    where = [str(installed / "python"), "-c", code]
    file = subprocess.run(where, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert Path(file.stdout.strip()).is_relative_to(installed.parent)
