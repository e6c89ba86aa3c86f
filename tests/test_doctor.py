"""What the doctor finds in environments that are well, ill and broken."""

import os
import subprocess
import sys
from collections import namedtuple
from importlib import metadata
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fishertune_d2 import doctor
from fishertune_d2.data.check import survey as survey_module
from fishertune_d2.doctor import OK, PROBLEM, WARNING, Finding

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch) -> Path:
    """No data, and a cache that can be written."""
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "data"))
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "data"


def _of(check) -> dict[str, Finding]:
    return {found.what: found for found in check()}


def _fake_versions(monkeypatch, **versions: str | None) -> None:
    real = metadata.version

    def version(name: str) -> str:
        if name in versions and versions[name] is None:
            raise metadata.PackageNotFoundError(name)
        return versions.get(name) or real(name)

    monkeypatch.setattr(metadata, "version", version)


def test_this_environment_is_well(capsys):
    assert doctor.main([]) == 0
    said = capsys.readouterr().out
    for words in (metadata.version("torch"), "detectron2", "compiled part", "FISHERTUNE_CACHE"):
        assert words in said
    assert "Nothing stops a run" in said and max(map(len, said.splitlines())) <= 140
    assert said.isascii()


@pytest.mark.parametrize(
    "cuda, driver, words",
    [
        (
            "13.2",
            "Open Kernel Module for x86_64  575.57.08  Release",
            "575.57.08 is too old: torch",
        ),
        ("13.2", "Kernel Module  580.65.06  Wed Jul", "driver is there, but torch sees no GPU"),
        ("12.6", "Kernel Module  535.129.03  Thu Oct", "driver is there, but torch sees no GPU"),
        ("12.6", "Kernel Module  470.57.02  Tue Jul", "which needs driver 525"),
        ("13.2", "another text", "driver is there, but torch sees no GPU"),
        (None, "Kernel Module  470.57.02  Tue Jul", "torch is built for CPUs"),
        ("13.2", None, "none, so add MODEL.DEVICE cpu"),
    ],
)
def test_a_driver_that_is_too_old_for_torch_is_named(monkeypatch, tmp_path, cuda, driver, words):
    file = tmp_path / "version"
    if driver is not None:
        file.write_text(f"NVRM version: NVIDIA UNIX x86_64 {driver}")
    monkeypatch.setattr(doctor, "_DRIVER", file)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    found = _of(doctor.devices)["GPU"]
    assert words in found.words
    assert found.mark == (OK if driver is None else WARNING)


def test_what_is_too_old_is_named_with_the_command_that_mends_it(monkeypatch):
    _fake_versions(monkeypatch, timm="0.9.2")
    found = _of(doctor.requirements)
    assert found["timm"].mark == PROBLEM and found["torch"].mark == OK
    assert found["timm"].words == "0.9.2; >=1.0.31 is needed"
    assert found["timm"].remedy == "pip install 'timm>=1.0.31'"


def test_what_is_there_under_another_name_is_no_problem(monkeypatch):
    _fake_versions(monkeypatch, **{"opencv-python-headless": None})
    found = _of(doctor.requirements)["opencv-python-headless"]
    assert found.mark == OK and "cv2 can be imported" in found.words


def test_what_is_there_and_broken_is_a_problem(monkeypatch, tmp_path):
    (tmp_path / "onnx.py").write_text("raise OSError('libfoo.so.1: cannot open\\nshared file')")
    monkeypatch.delitem(sys.modules, "onnx", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    found = _of(doctor.requirements)["onnx"]
    assert found.mark == PROBLEM
    assert found.words.endswith("cannot be imported: OSError: libfoo.so.1: cannot open")


def test_torch_must_be_the_one_that_torchvision_was_built_for(monkeypatch):
    assert _of(doctor.requirements)["torchvision"].mark == OK
    _fake_versions(monkeypatch, torch="2.6.0+cpu", torchvision="0.99")
    found = _of(doctor.requirements)["torchvision"]
    assert found.mark == PROBLEM and "but torch is 2.6.0+cpu" in found.words
    assert "both from one index" in found.remedy


def test_an_old_extra_is_a_warning(monkeypatch):
    _fake_versions(monkeypatch, peft="0.1", submitit=None)
    found = _of(doctor.extras)
    assert found["[baselines]"].mark == WARNING and ">=0.21 is needed" in found["[baselines]"].words
    assert (found["[slurm]"].mark, found["[slurm]"].words) == (OK, "submitit not installed")


def test_an_old_python_is_a_problem(monkeypatch):
    monkeypatch.setattr("platform.python_version", lambda: "3.9.1")
    assert _of(doctor.python)["Python"].mark == PROBLEM


def test_model_zoo_is_missed_only_by_code_of_ones_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "detectron2.model_zoo", None)
    found = _of(doctor.detectron2)
    assert found["detectron2"].mark == OK
    assert found["model_zoo"].mark == WARNING and "setuptools<81" in found["model_zoo"].remedy


def test_a_data_folder_that_does_not_exist_is_a_warning(empty, monkeypatch):
    found = _of(doctor.datasets)["data"]
    assert found.mark == WARNING and f"no folder {empty}" in found.words
    monkeypatch.delenv("DETECTRON2_DATASETS")
    monkeypatch.chdir(empty.parent)
    assert _of(doctor.datasets)["data"].mark == OK  # nothing was promised


def test_data_that_a_run_would_refuse_are_a_problem(empty, monkeypatch):
    rows = [row for row in survey_module.DATASETS if row.name == "camvid_day_val"]
    monkeypatch.setattr(survey_module, "DATASETS", rows)
    for folder in ("val", "valannot"):
        (empty / "CamVid" / folder).mkdir(parents=True)
    picture = Image.fromarray(np.zeros((360, 480), dtype=np.uint8))
    picture.convert("RGB").save(empty / "CamVid/val/0016E5_1.png")
    found = _of(doctor.datasets)["camvid_day_val"]
    assert found.mark == PROBLEM and "1 of 1 images have no label" in found.words

    picture.save(empty / "CamVid/valannot/0016E5_1.png")
    found = _of(doctor.datasets)["camvid_day_val"]
    assert found.mark == WARNING and "1 pairs, 101 are published" in found.words


def test_a_cache_that_cannot_be_written_is_a_warning(monkeypatch, tmp_path):
    (tmp_path / "file").touch()
    monkeypatch.setenv("FISHERTUNE_CACHE", str(tmp_path / "file/cache"))
    assert _of(doctor.weights)["cache"].mark == WARNING


def test_more_threads_than_cores_are_a_warning(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 10_000)
    assert _of(doctor.resources)["cores"].mark == WARNING


def test_a_disk_that_holds_no_checkpoint_is_a_warning(monkeypatch):
    usage = namedtuple("usage", "total used free")(10**12, 10**12 - 10**9, 10**9)
    monkeypatch.setattr("shutil.disk_usage", lambda path: usage)
    found = _of(doctor.resources)["disk"]
    assert found.mark == WARNING and found.words.startswith("1.0 GB free")


def test_a_check_that_fails_is_a_finding_and_those_before_it_stay(monkeypatch, capsys):
    def broken():
        yield Finding("first", "well")
        raise RuntimeError("CUDA error: no kernel image\nis available")

    monkeypatch.setattr(doctor, "CHECKS", [broken])
    assert doctor.main([]) == 1
    assert capsys.readouterr().out.splitlines() == [
        " ok  first   well",
        "  x  broken  RuntimeError: CUDA error: no kernel image",
        "",
        "1 problems (x) that stop a run; 0 warnings (!).",
    ]


def test_runs_where_nothing_is_installed(tmp_path):
    names = "torch torchvision detectron2 timm transformers numpy packaging cv2".split()
    (tmp_path / "sitecustomize.py").write_text(
        f"import sys\nsys.modules.update(dict.fromkeys({names}))\n"
    )
    environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "fishertune_d2.doctor"]
    run = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert run.returncode == 1, run.stderr
    assert "Traceback" not in run.stdout + run.stderr
    lines = [line.split() for line in run.stdout.splitlines()]
    for name in ("torch", "detectron2", "timm", "transformers", "opencv-python-headless"):
        assert ["x", name, "not", "installed"] in lines
    assert "tools/install_detectron2.py" in run.stdout


def test_a_timm_that_does_not_know_a_model_is_no_error_of_the_doctors(monkeypatch):
    monkeypatch.setattr("timm.get_pretrained_cfg", lambda name: None)
    assert [found.mark for found in doctor.weights()] == [doctor.OK, doctor.OK]
