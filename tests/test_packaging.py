"""What gets installed: the right files under one name, imported quickly, shadowing nobody."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

import diffpatch
from diffpatch.cli import COMMANDS, build_parser

ROOT = Path(__file__).parents[1]
PARTS = ("kernels", "pipelines", "eval")
NOT_COPIED = (
    ".*",
    "out",
    "runs",
    "build",
    "dist",
    "tests",
    "examples",
    "*.egg-info",
    "__pycache__",
)


def python(code: str, cwd: Path, path: str = "") -> str:
    """The output of a fresh interpreter."""
    environment = os.environ | {"PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from a copy of the working tree."""
    folder = tmp_path_factory.mktemp("wheel")
    source, target = folder / "source", folder / "dist"
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*NOT_COPIED))
    version = int(importlib.metadata.version("setuptools").split(".")[0])
    # Building in isolation fetches setuptools, which is only needed where it is too old.
    isolation = ["--no-isolation"] if version >= 77 else []
    command = [sys.executable, "-m", "build", "--wheel", *isolation, "-o", str(target), str(source)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return next(target.glob("*.whl"))


def test_the_wheel_holds_every_module_and_all_weights(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {
        f"diffpatch/{path.relative_to(ROOT).as_posix()}"
        for part in PARTS
        for path in (ROOT / part).rglob("*.py")
    }
    modules |= {
        path.relative_to(ROOT).as_posix()
        for path in (ROOT / "diffpatch").rglob("*.py")  # does not follow the links
    }
    weights = {
        f"diffpatch/{path.relative_to(ROOT).as_posix()}"
        for path in (ROOT / "pipelines" / "demo" / "weights").rglob("*")
        if path.is_file() and not path.name.startswith(".")
    }
    report = ROOT / "eval" / "sweep" / "report"
    read = [report / name for name in ("page.html", "page.css", "page.js", "plot.svg")]
    read += (ROOT / "eval" / "weights").glob("*.safetensors")
    weights |= {f"diffpatch/{path.relative_to(ROOT).as_posix()}" for path in read}
    weights |= {"diffpatch/eval/results/profile_cpu.json", "diffpatch/cli/render/page.html"}
    assert modules | weights | {"diffpatch/py.typed"} <= names
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"diffpatch"}


def test_the_installed_wheel_works_anywhere(wheel: Path, tmp_path: Path) -> None:
    target = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(target)
    code = (
        "import diffpatch, diffpatch.kernels.block_sparse, diffpatch.pipelines.running.loading, "
        "diffpatch.eval.quality.metrics; from diffpatch.cli import main; "
        "print(diffpatch.__file__); "
        "main(['methods'])"
    )
    output = python(code, tmp_path, str(target))
    assert output.startswith(str(target))
    assert "radial" in output


# What the commands cannot do without.
ENOUGH: dict[str, list[str]] = {
    "plan": ["-m", "wan-1.3b", "--height", "16", "--width", "16"],
    "calibrate": ["-p", "a"],
    "bench": ["attention"],
    "sweep": ["x.yaml"],
}


def test_importing_is_light() -> None:
    heavy = {"diffusers", "transformers", "accelerate", "torchmetrics", "imageio", "torchvision"}
    code = "import sys; from diffpatch.cli import build_parser; build_parser(); print(*sys.modules)"
    assert not heavy & set(python(code, ROOT).split())


@pytest.mark.parametrize("word", ["--help", "--version"])
def test_the_first_help_needs_no_torch(word: str) -> None:
    """It is what one types first, and torch takes seconds."""
    code = f"import sys; from diffpatch.cli import main; main([{word!r}]); print(*sys.modules)"
    shown = python(code, ROOT)
    assert "diffpatch" in shown and "torch" not in shown.split()


def test_the_first_help_says_what_the_commands_say() -> None:
    assert build_parser().format_help() == build_parser([]).format_help()
    for name in COMMANDS:
        assert build_parser([name]).parse_args([name, *ENOUGH.get(name, [])]).run


def test_what_is_public_is_there_and_nothing_else_shows() -> None:
    public = importlib.import_module("diffpatch.public")
    imported = {name for name in vars(public) if not name.startswith("_")} - {"annotations"}
    assert set(public.__all__) == imported
    assert dir(diffpatch) == sorted([*public.__all__, "__version__"])
    assert diffpatch.__all__ == public.__all__  # type: ignore[attr-defined]
    for name in ("fit_kept", "entropy_scale", "MethodInfo", "FamilyInfo", "ModelError", "settled"):
        assert getattr(diffpatch, name)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        diffpatch.nothing  # type: ignore[attr-defined]  # noqa: B018


def test_other_peoples_kernels_package_wins_over_our_folder(tmp_path: Path) -> None:
    """A regular package anywhere on the path beats a folder without __init__.py before it."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    theirs = tmp_path / "kernels"
    theirs.mkdir()
    (theirs / "__init__.py").write_text("get_kernel = 'theirs'")
    code = "import sys, kernels; assert sys.path[0] == ''; print(kernels.get_kernel)"
    assert python(code, ROOT, str(tmp_path)) == "theirs"


def test_the_top_level_folders_are_parts_of_the_package() -> None:
    for part in PARTS:
        link = ROOT / "diffpatch" / part
        assert link.is_symlink() and os.readlink(link) == f"../{part}"
        for file in (ROOT / part).rglob("*.py"):
            assert f"from {part}" not in file.read_text(encoding="utf-8")


def test_the_version_is_said_once() -> None:
    assert importlib.metadata.version("diffpatch") == diffpatch.__version__
