"""What `pip install` puts in place: it runs, is typed, and takes no other name than its own."""

import os
import shutil
import subprocess
import sys
import venv
import zipfile

import pytest

from tests.helpers import ROOT

PARTS = "concurrent_prompts.py", "pyproject.toml", "setup.py", "README.md", "LICENSE", "backends", "extras"


def python(*words, folder, path=sys.executable):
    environment = os.environ | {"PYTHONSAFEPATH": "1"}
    ran = subprocess.run([path, *words], cwd=folder, env=environment, capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def install(kind, folder):
    """Install a copy of the checkout into an empty environment; return its Python and its folder of packages."""
    pytest.importorskip("setuptools", minversion="77")
    checkout, home = folder / "checkout", folder / "venv"
    checkout.mkdir()
    for name in PARTS:
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, checkout / name)
    python("setup.py", "-q", kind, "--dist-dir", folder, folder=checkout)
    venv.create(home, symlinks=os.name != "nt")
    run = home / ("Scripts" if os.name == "nt" else "bin") / "python"
    (site,) = python("-c", "import sysconfig; print(sysconfig.get_path('purelib'))", folder=home, path=run).splitlines()
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        wheel.extractall(site)
    return run, site


@pytest.mark.parametrize("kind", ["bdist_wheel", "editable_wheel"])
def test_an_installed_module_runs_and_takes_no_other_name(kind, tmp_path):
    run, site = install(kind, tmp_path)
    assert python("-m", "concurrent_prompts", "--version", folder=tmp_path, path=run)
    assert python("-m", "concurrent_prompts.extras.stand_in", "--help", folder=tmp_path, path=run)
    lines = "import concurrent_prompts.extras.budget as it; print(it.core.sibling('backends', 'stdlib').__name__)"
    assert python("-c", lines, folder=tmp_path, path=run) == "concurrent_prompts.backends.stdlib\n"
    names = {name.partition("-")[0].partition(".")[0] for name in os.listdir(site)}
    assert {name for name in names if name and not name.startswith("_")} == {"concurrent_prompts"}
