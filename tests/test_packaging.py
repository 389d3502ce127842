"""ia3rt imports, with kernels/ and bench/ inside it and transformers beside it, however it was installed."""

import os
import shutil
import site
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ["ia3rt", "kernels", "bench", "examples", "docs", "tests", "setup.py", "pyproject.toml", "MANIFEST.in"]
SOURCES += ["README.md", "LICENSE"]
CHECK = """
import importlib.resources, importlib.util, sys
import ia3rt, ia3rt.bench.interleaved, ia3rt.kernels.configs
import transformers
from transformers import LlamaForCausalLM  # imports the Hugging Face package `kernels` where there is one
if importlib.util.find_spec("triton"):
    import ia3rt.kernels.linear
from ia3rt.examples.tasks import TASKS
assert all((importlib.resources.files("ia3rt.examples") / "adapters" / name).is_dir() for name in TASKS)
real = importlib.util.find_spec("kernels")
assert ("kernels" in sys.argv) == bool(real and real.origin), real
print(ia3rt.__file__)
"""


def run(*command, cwd, **environment):
    """Runs a command without this process's import paths; returns what it printed."""
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV"))}
    result = subprocess.run(
        [str(part) for part in command], cwd=cwd, env={**clean, **environment}, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """A copy of the sources, so that building leaves nothing in the checkout."""
    copied = tmp_path_factory.mktemp("sources")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, copied / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, copied)
    return copied


def installed_files(sources):
    """What has to be installed, as it lies inside of ia3rt: the code, what its types are read by, and data.

    What was measured on some day is for the documents, and stays in the repository.
    """
    for folder in ("ia3rt", "kernels", "bench", "examples"):
        for path in (sources / folder).rglob("*"):
            inside = path.relative_to(sources / folder)
            if path.is_file() and (folder, inside.parts[0]) != ("bench", "results"):
                yield inside if folder == "ia3rt" else Path(folder) / inside


@pytest.fixture
def environment(tmp_path):
    """A fresh environment without ia3rt, whose other packages are this one's: torch is too large to install again."""
    folder = tmp_path / "environment"
    venv.create(folder, with_pip=False)
    python = folder / "bin" / "python"
    own = Path(run(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=tmp_path))
    # A path in a .pth file is searched, but its own .pth files, among them an editable ia3rt's, are not read.
    (own / "this_environment.pth").write_text("\n".join(site.getsitepackages()))
    return python


def install(python, *arguments, cwd):
    run(
        sys.executable,
        "-m",
        "pip",
        "--python",
        python,
        "install",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        *arguments,
        cwd=cwd,
    )


@pytest.mark.slow
def test_wheel(environment, sources, tmp_path):
    run(
        sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path / "dist", sources, cwd=tmp_path
    )
    (wheel,) = (tmp_path / "dist").iterdir()
    expected = {f"ia3rt/{path}" for path in installed_files(sources)}
    assert len(expected) > 150 and expected <= set(zipfile.ZipFile(wheel).namelist())
    install(environment, wheel, cwd=tmp_path)
    assert str(environment.parent.parent) in run(environment, "-c", CHECK, cwd=tmp_path)
    assert "demo" in run(environment.parent / "ia3rt", "--help", cwd=tmp_path)


@pytest.mark.slow
def test_sdist(sources, tmp_path):
    """The documents, to which README and docstrings point, come with the sources; the tests do not."""
    run(sys.executable, "-m", "build", "--sdist", "--no-isolation", "--outdir", tmp_path, sources, cwd=tmp_path)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as opened:
        names = {name.partition("/")[2] for name in opened.getnames()}
    documents = {path.relative_to(sources).as_posix() for path in (sources / "docs").rglob("*.*")}
    assert len(documents) > 10 and documents <= names
    assert not any(name.startswith("tests") for name in names)


@pytest.mark.slow
def test_editable_install(environment, sources, tmp_path):
    install(environment, "--editable", sources, cwd=tmp_path)
    assert run(environment, "-c", CHECK, cwd=tmp_path) == str(sources / "ia3rt" / "__init__.py")
    # Each package is found where it stands, so that all its files are.
    packages = sorted({".".join(["ia3rt", *path.parent.parts]) for path in installed_files(sources)})
    packages = [name for name in packages if "adapters." not in name]  # of data, in examples
    code = f"import importlib.util; print(*(name for name in {packages} if not importlib.util.find_spec(name)))"
    assert run(environment, "-c", code, cwd=tmp_path) == ""
    assert "demo" in run(environment.parent / "ia3rt", "--help", cwd=tmp_path)


def test_uninstalled_from_the_root(environment, sources):
    assert run(environment, "-c", CHECK, cwd=sources) == str(sources / "ia3rt" / "__init__.py")


def test_beside_the_hugging_face_package_kernels(environment, sources, tmp_path):
    """Its name is that of our folder: from the root, where ours is found first, it still has to win."""
    command = [sys.executable, "-m", "pip", "--retries", "0", "download", "--quiet", "--no-deps", "--dest", tmp_path]
    downloaded = subprocess.run([*command, "kernels"], capture_output=True, text=True)
    if "from versions: none" in downloaded.stderr:
        pytest.skip("needs an index of packages that pip reaches, with the package kernels")
    assert downloaded.returncode == 0, downloaded.stderr
    (wheel,) = tmp_path.glob("kernels-*.whl")
    install(environment, wheel, cwd=tmp_path)
    assert run(environment, "-c", CHECK, "kernels", cwd=sources) == str(sources / "ia3rt" / "__init__.py")


@pytest.mark.parametrize("module", ["ia3rt", "ia3rt.cli.main"])
def test_importing_it_imports_neither_transformers_nor_triton(module):
    """Both take seconds, and Triton need not be there."""
    heavy = {"transformers", "triton", "torch._dynamo", "matplotlib", "vllm"}
    code = f"import {module}, sys; print(*{heavy} & sys.modules.keys())"
    assert run(sys.executable, "-c", code, cwd=ROOT) == ""


def test_the_folder_kernels_is_no_package_of_its_own():
    assert not (ROOT / "kernels" / "__init__.py").exists()
