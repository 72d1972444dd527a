"""What setup.py builds, what is in the wheel, and what an import brings along.

Most build from a copy of the packaging files with a csrc/ of its own, so that they do not depend on
what the repository's csrc/ holds today; the last two build that. TROPD_OTHER_PYTHON names another
Python with another torch, in which the wheel then has to run.
"""

import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow  # of our own tools, not of the package

ROOT = Path(__file__).resolve().parents[2]

# Compiles only with the flags of a wheel that runs elsewhere: with libtorch's stable ABI, with
# Python's limited API, and with infinities that are infinities.
SOURCE = """
#ifndef TORCH_TARGET_VERSION
#error "no target for libtorch's stable ABI"
#endif
#ifndef Py_LIMITED_API
#error "no limited Python API"
#endif
#ifdef __FAST_MATH__
#error "-ffast-math"
#endif
extern "C" int tropd_answer() { return 42; }
"""

needs_compiler = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler")
not_on_windows = pytest.mark.skipif(sys.platform == "win32", reason="csrc/ is not built on Windows")


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_of_the_build(tmp_path)


def copy_of_the_build(tmp_path: Path) -> Path:
    """A copy of what a build reads, with an empty csrc/ and three folders that must stay out."""
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    ignored = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "tropd_kernels", tmp_path / "tropd_kernels", ignore=ignored)
    (tmp_path / "csrc").mkdir()
    for name in ("benchmarks", "examples", "tests"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").touch()
    return tmp_path


def run_setup(checkout: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    ours = ("TROPD_BUILD_EXT", "TROPD_SANITIZE", "CXX", "CFLAGS", "CXXFLAGS", "CPPFLAGS", "LDFLAGS")
    environment = {k: v for k, v in os.environ.items() if k not in ours} | variables
    return subprocess.run(
        [sys.executable, "setup.py", *arguments],
        cwd=checkout,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
    )


def build_wheel(checkout: Path, **variables: str) -> tuple[Path, str]:
    """The wheel and all that the build printed."""
    result = run_setup(checkout, "bdist_wheel", **variables)
    output = result.stdout + result.stderr
    assert result.returncode == 0, output
    (wheel,) = (checkout / "dist").glob("*.whl")
    return wheel, output


def names_in(wheel: Path) -> list[str]:
    with zipfile.ZipFile(wheel) as archive:
        return archive.namelist()


def notices(output: str) -> list[str]:
    return [line for line in output.splitlines() if line.startswith("tropd-kernels: pure Python")]


def test_without_sources_the_wheel_is_pure_and_the_build_says_so(checkout: Path) -> None:
    wheel, output = build_wheel(checkout)
    assert wheel.name.endswith("-py3-none-any.whl")
    assert len(notices(output)) == 1
    assert "csrc/ holds no C++ sources" in notices(output)[0]


def test_the_wheel_holds_the_package_its_type_marker_and_its_licence(checkout: Path) -> None:
    wheel, _ = build_wheel(checkout)
    names = names_in(wheel)
    packed = {name for name in names if name.startswith("tropd_kernels/")}
    source = checkout / "tropd_kernels"
    expected = {f"tropd_kernels/{path.relative_to(source)}" for path in source.rglob("*.py")}
    expected |= {"tropd_kernels/py.typed", "tropd_kernels/integrations/verl_example.yaml"}
    assert packed == expected
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"tropd_kernels"}, "strays"


def test_0_ignores_sources(checkout: Path) -> None:
    (checkout / "csrc" / "rows.cpp").write_text("#error must not be compiled\n")
    wheel, output = build_wheel(checkout, TROPD_BUILD_EXT="0")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert "TROPD_BUILD_EXT=0" in notices(output)[0]


def test_auto_without_a_compiler_makes_a_pure_wheel(checkout: Path) -> None:
    (checkout / "csrc" / "rows.cpp").write_text(SOURCE)
    wheel, output = build_wheel(checkout, TROPD_BUILD_EXT="auto", CXX="no-such-compiler")
    assert wheel.name.endswith("-py3-none-any.whl"), "platform tag on a wheel without a library"
    assert "no-such-compiler" in notices(output)[0]


def test_auto_with_a_compiler_that_fails_makes_a_pure_wheel(checkout: Path) -> None:
    (checkout / "csrc" / "rows.cpp").write_text("#error an old compiler\n")
    wheel, output = build_wheel(checkout, TROPD_BUILD_EXT="auto")
    assert wheel.name.endswith("-py3-none-any.whl"), "platform tag on a wheel without a library"
    assert len(notices(output)) == 1 and "an old compiler" in notices(output)[0]
    result = run_setup(checkout, "bdist_wheel", TROPD_BUILD_EXT="1")
    assert result.returncode != 0 and "an old compiler" in result.stdout + result.stderr


def test_1_fails_without_sources(checkout: Path) -> None:
    result = run_setup(checkout, "bdist_wheel", TROPD_BUILD_EXT="1")
    assert result.returncode != 0
    assert "TROPD_BUILD_EXT=1" in result.stderr
    assert "csrc/ holds no C++ sources" in result.stderr
    assert not (checkout / "dist").exists()


def test_1_fails_without_a_compiler(checkout: Path) -> None:
    (checkout / "csrc" / "rows.cpp").write_text(SOURCE)
    result = run_setup(checkout, "bdist_wheel", TROPD_BUILD_EXT="1", CXX="no-such-compiler")
    assert result.returncode != 0
    assert "no-such-compiler" in result.stderr


@pytest.mark.parametrize("value", ["yes", "", "AUTO"])
def test_an_unknown_value_is_an_error_that_names_the_allowed_ones(
    checkout: Path, value: str
) -> None:
    result = run_setup(checkout, "--version", TROPD_BUILD_EXT=value)
    assert result.returncode != 0
    assert f"TROPD_BUILD_EXT must be auto, 0 or 1, got {value!r}" in result.stderr
    result = run_setup(checkout, "--version", TROPD_SANITIZE=value)
    assert result.returncode != 0
    assert f"TROPD_SANITIZE must be 0 or 1, got {value!r}" in result.stderr


@needs_compiler
@not_on_windows
def test_an_assembler_that_does_not_know_amx_costs_only_amx(checkout: Path) -> None:
    (checkout / "csrc" / "rows.cpp").write_text(SOURCE)
    old = checkout / "old-compiler"  # fails where it is to assemble the probe, which it reads
    old.write_text('#!/bin/sh\nfor a; do [ "$a" = - ] && exit 1; done\nexec c++ "$@"\n')
    old.chmod(0o755)
    wheel, output = build_wheel(checkout, CXX=str(old))
    assert "tropd_kernels/_C.abi3.so" in names_in(wheel) and not notices(output)
    assert "-DTROPD_NO_AMX" in output


@needs_compiler
@not_on_windows
def test_sources_become_a_library_for_every_later_python_and_torch(checkout: Path) -> None:
    (checkout / "csrc" / "rows.cpp").write_text(SOURCE)
    wheel, output = build_wheel(checkout)
    assert re.search(r"-cp310-abi3-(?!any)\w+\.whl$", wheel.name), wheel.name
    assert "tropd_kernels/_C.abi3.so" in names_in(wheel)
    assert "-march=native" not in output, "would run on no machine older than the one that built it"
    assert not notices(output)


def test_torch_is_no_build_requirement() -> None:
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    build_system = text[text.index("[build-system]") : text.index("[project]")]
    requires = re.search(r"^requires = (.+)$", build_system, re.MULTILINE)
    assert requires is not None
    assert "torch" not in requires[1]


def test_the_version_is_one(checkout: Path) -> None:
    import tropd_kernels

    result = run_setup(checkout, "--version")
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip().splitlines()[-1] == tropd_kernels.__version__
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert tropd_kernels.__version__ in changes, "the changelog does not know this version"
    try:
        installed = metadata.version("tropd-kernels")
    except metadata.PackageNotFoundError:
        pytest.skip("runs from the source tree, not installed")
    assert installed == tropd_kernels.__version__


# --- the source distribution -------------------------------------------------------------------


def test_the_source_distribution_is_the_repository_and_installs(tmp_path: Path) -> None:
    """It holds what git does, but for what only a forge reads, and a wheel that is built from it
    holds the package."""
    if not (ROOT / ".git").exists() or shutil.which("git") is None:
        pytest.skip("no checkout of git's")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    known = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    copy = tmp_path / "checkout"
    for name in known.splitlines():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, copy / name)

    build = [sys.executable, "-m", "build", "--no-isolation"]
    made = subprocess.run(
        [*build, "--sdist", "--outdir", tmp_path, copy], capture_output=True, text=True, timeout=300
    )
    assert made.returncode == 0, made.stdout + made.stderr
    (archive,) = tmp_path.glob("*.tar.gz")
    shutil.unpack_archive(archive, tmp_path / "unpacked")
    (source,) = (tmp_path / "unpacked").iterdir()
    held = {str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()}
    left_out = (".ci/", ".github/", ".gitignore", ".pre-commit-config.yaml")
    missing = {name for name in known.splitlines() if (ROOT / name).exists()} - held
    assert {name for name in missing if not name.startswith(left_out)} == set()

    wheel, _ = build_wheel(source, TROPD_BUILD_EXT="0")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, "--quiet", "--target", tmp_path / "site", wheel], check=True, timeout=300)
    code = "import tropd_kernels as tk; print(tk.__file__, tk.TrOPD())"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300,
        env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
    )  # fmt: skip
    assert done.returncode == 0 and str(tmp_path) in done.stdout, done.stdout + done.stderr


# --- the repository's own csrc/ ------------------------------------------------------------------


@pytest.fixture(scope="module")
def wheel_of_this_checkout(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """TROPD_WHEEL: one that has just been made."""
    if "TROPD_WHEEL" in os.environ:
        return ROOT / os.environ["TROPD_WHEEL"]
    checkout = copy_of_the_build(tmp_path_factory.mktemp("checkout"))
    shutil.copytree(ROOT / "csrc", checkout / "csrc", dirs_exist_ok=True)
    return build_wheel(checkout, TROPD_BUILD_EXT="1")[0]


@needs_compiler
@not_on_windows
def test_the_kernels_need_no_symbol_that_another_python_or_torch_may_lack(
    wheel_of_this_checkout: Path, tmp_path: Path
) -> None:
    assert re.search(r"-cp310-abi3-(?!any)\w+\.whl$", wheel_of_this_checkout.name)
    with zipfile.ZipFile(wheel_of_this_checkout) as archive:
        library = archive.extract("tropd_kernels/_C.abi3.so", tmp_path)
    if shutil.which("nm") is None:
        pytest.skip("no nm to list symbols with")
    needs = subprocess.run(
        ["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True
    ).stdout
    assert "aoti_torch_get_dtype" in needs  # libtorch's stable ABI is C functions
    # Of C++ only the standard library, nothing of at::, c10:: or torch::; and no Python at all.
    assert not re.findall(r"\b_ZN?K?(?:2at|3c10|5torch)\w+|\b_?Py\w+", needs)


RUNS_ELSEWHERE = """
import sys, torch, tropd_kernels as tk
from tropd_kernels import native
assert tk.__file__.startswith(sys.argv[1]), tk.__file__
assert native.WHY_NOT is None, native.WHY_NOT
for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 1e-2)):
    results = {}
    for backend in ("native", "reference"):
        torch.manual_seed(0)
        hidden, weight = torch.randn(50, 32).to(dtype), torch.randn(300, 32).to(dtype)
        leaves = hidden.requires_grad_(), weight.requires_grad_()
        teacher = tk.HiddenTeacher(torch.randn(50, 16).to(dtype), torch.randn(300, 16).to(dtype))
        labels = torch.randint(300, (50,))
        out = tk.linear_distillation_loss(*leaves, labels, teacher, tk.GKD(0.3), backend=backend)
        out.loss.backward()
        results[backend] = [out.loss.detach(), *(leaf.grad for leaf in leaves)]
    for ours, truth in zip(*results.values()):
        assert (ours - truth).norm() <= bound * truth.norm(), (dtype, ours, truth)
print("Python", sys.version.split()[0], "torch", torch.__version__, native.description())
"""


@needs_compiler
@not_on_windows
@pytest.mark.skipif(
    "TROPD_OTHER_PYTHON" not in os.environ,
    reason="TROPD_OTHER_PYTHON names no other Python with another torch",
)
def test_the_wheel_runs_in_another_python_with_another_torch(
    wheel_of_this_checkout: Path, tmp_path: Path
) -> None:
    other = os.environ["TROPD_OTHER_PYTHON"]
    clean = {k: v for k, v in os.environ.items() if k not in ("LD_PRELOAD", "VIRTUAL_ENV")}

    def run(*command: str | Path) -> str:
        result = subprocess.run(
            command, cwd=tmp_path, env=clean | {"PYTHONPATH": str(tmp_path / "site")},
            capture_output=True, text=True, timeout=300,
        )  # fmt: skip
        assert result.returncode == 0, result.stdout + result.stderr
        return result.stdout

    versions = "import sys, torch; print(*sys.version_info[:2], torch.__version__)"
    assert run(other, "-c", versions) != run(sys.executable, "-c", versions), "not another one"
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", other)
    run(*pip, "install", "--no-deps", "--target", tmp_path / "site", wheel_of_this_checkout)
    print(run(other, "-c", RUNS_ELSEWHERE, tmp_path / "site"))
