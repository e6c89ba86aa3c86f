"""Packages that are too old end the import in one sentence, not in an error of theirs."""

import os
import re
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

from fishertune_d2 import doctor
from fishertune_d2.compat import OLDEST, require_versions


def install(folder, name, version):
    """Puts a package's metadata, which say the version, before those of the environment."""
    info = folder / f"{name}-{version}.dist-info"
    info.mkdir(parents=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")


def test_the_table_says_what_setup_says():
    needs = [Requirement(text) for text in doctor._needs()[1]]
    lower = {need.name: str(need.specifier)[2:] for need in needs if need.specifier}
    assert all(str(need.specifier).startswith(">=") for need in needs if need.specifier)
    assert lower == OLDEST


def test_what_is_installed_here_is_new_enough():
    require_versions(*OLDEST)


@pytest.mark.parametrize(
    ("version", "fits"),
    [
        ("1.0.9", False),
        ("1.0.19", False),
        ("0.9.16", False),
        ("1.0.31", True),
        ("1.0.31.dev0", False),
        ("1.0.31a0+git1234", False),
        ("1.0.31rc1", False),
        ("1.0.31.post1", True),
        ("1.0.31+cu128", True),
        ("1.0.100", True),
        ("1.1.0rc1", True),
        ("2.0+local.3", True),
    ],
)
def test_versions_are_compared_number_by_number_and_pre_releases_are_older(
    tmp_path, monkeypatch, version, fits
):
    install(tmp_path, "timm", version)
    monkeypatch.syspath_prepend(tmp_path)
    assert metadata.version("timm") == version
    if fits:
        require_versions("timm")
        return
    message = re.escape(f"needs timm 1.0.31 or newer, and timm {version} is installed")
    with pytest.raises(ImportError, match=message):
        require_versions("timm")


def test_several_old_packages_are_named_in_one_sentence_with_one_command(tmp_path, monkeypatch):
    install(tmp_path, "timm", "1.0.9")
    install(tmp_path, "transformers", "4.40.0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError) as error:
        require_versions("timm", "torch", "transformers")
    assert str(error.value).startswith(
        "FisherTune needs timm 1.0.31 or newer and transformers 5.0 or newer, and timm 1.0.9 and "
        "transformers 4.40.0 are installed: run `pip install 'timm>=1.0.31' 'transformers>=5.0'`; "
    )


def test_what_is_not_installed_is_left_to_its_own_import(monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(metadata, "version", missing)
    require_versions(*OLDEST)


@pytest.mark.parametrize("command", [["-m", "fishertune_d2.train"], ["-c", "import fishertune_d2"]])
@pytest.mark.parametrize("name", ["torch", "timm", "transformers"])
def test_the_import_ends_in_the_sentence(tmp_path, name, command):
    install(tmp_path, name, "0.1")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), os.getcwd()])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    sentence = f"FisherTune needs {name} {OLDEST[name]} or newer, and"
    if command[0] == "-m":
        assert done.stderr.startswith(f"error: {sentence}")
    else:
        assert done.stderr.splitlines()[-1].startswith(f"ImportError: {sentence}")


def test_the_doctor_still_runs(tmp_path):
    install(tmp_path, "timm", "1.0.9")
    path = os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", ""), os.getcwd()])
    done = subprocess.run(
        [sys.executable, "-m", "fishertune_d2.doctor"],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
    )
    assert "1.0.9; >=1.0.31 is needed" in done.stdout
    assert "pip install 'timm>=1.0.31'" in done.stdout
    assert done.returncode == 1


def test_an_old_peft_is_named_where_it_is_used(tmp_path, monkeypatch):
    from fishertune_d2.tuning import peft_tuners

    install(tmp_path, "peft", "0.10.0")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ImportError, match="needs peft 0.21 or newer, and peft 0.10.0 is installed"):
        peft_tuners._import_peft()
