"""What a real run writes, as a delta and as plain files, through the command."""

import hashlib
import re
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from fishertune_d2.config import read_config
from fishertune_d2.engine import Trainer
from fishertune_d2.engine.trained_model import build_trained
from fishertune_d2.export import Delta, apply_delta, delta_of_run, read_tuned, tuned_backbone
from fishertune_d2.export.__main__ import main

VIT = "backbone.vit."


@pytest.fixture
def run(tiny_cfg, public):
    """Returns a function that trains a tiny model; gives its OUTPUT_DIR and its checkpoint."""

    def train(**options) -> tuple[Path, dict[str, torch.Tensor]]:
        cfg = tiny_cfg(MODEL__VFM__WEIGHTS=public, TEST__EVAL_PERIOD=0, **options)
        trainer = Trainer(cfg)
        trainer.train()
        folder = Path(cfg.OUTPUT_DIR)
        (folder / "config.yaml").write_text(cfg.dump())
        return folder, torch.load(folder / "model_final.pth", weights_only=True)["model"]

    return train


def _vit(state) -> dict[str, torch.Tensor]:
    return {n.removeprefix(VIT): t for n, t in state.items() if n.startswith(VIT)}


def _assert_same(got, expected):
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(got[name].cpu(), value.cpu()), name


def test_a_run_becomes_a_delta_and_a_delta_the_run(run, public, run_card, capsys):
    out, trained = run(MODEL__MASK_FORMER__NHEADS=2)
    main(["delta", str(out), "--decoder"])
    delta = Delta.load(out / "delta.safetensors")
    total = sum(t.numel() for t in _vit(trained).values())
    # One selected last may not have moved.
    assert 0.95 * int(0.05 * total) < delta.changed <= int(0.05 * total)
    assert f"{delta.changed:,} of {total:,} weights differ" in capsys.readouterr().out
    assert (
        "pos_embed" in delta.whole.keys() - delta.base.keys()
    )  # for 48 x 64 pixels, not 160 x 160
    assert delta.notes["weights"] == "public.safetensors"
    assert delta.notes["method"] == "fishertune"

    backbone = tuned_backbone(out / "delta.safetensors", public)
    _assert_same(backbone.vit.state_dict(), _vit(trained))

    source = [str(out / "delta.safetensors"), "--base", public]
    main(["plain", *source, "--output", str(out / "plain")])
    _assert_same(load_file(out / "plain/model.safetensors"), _vit(trained))
    main(["plain", *source, "--layout", "detectron2"])
    cfg = read_config(str(out / "config.yaml"), ["MODEL.DEVICE", "cpu"])
    expected = build_trained(cfg, str(out / "model_final.pth"))
    model = run_card(out / "detectron2")["model"]
    _assert_same(model.state_dict(), trained)
    # The number of heads, which no tensor shows, is the run's too.
    image = torch.randint(0, 256, (3, 48, 64), dtype=torch.uint8)
    (got,), (wanted,) = model([{"image": image}]), expected([{"image": image}])
    assert torch.equal(got["sem_seg"], wanted["sem_seg"])


def test_plain_files_need_no_public_weights(run, public):
    out, trained = run(TUNING__METHOD="freeze")
    Path(public).unlink()
    main(["plain", str(out)])
    _assert_same(load_file(out / "timm/model.safetensors"), _vit(trained))


def test_full_fine_tuning_has_a_delta_too(run, public):
    out, trained = run(TUNING__METHOD="full", SOLVER__MAX_ITER=4)
    delta = delta_of_run(out / "model_final.pth")
    assert delta.changed > 0.9 * sum(t.numel() for t in _vit(trained).values())
    assert not delta.decoder
    _assert_same(tuned_backbone(delta, public).vit.state_dict(), _vit(trained))


def test_a_timm_model_of_ones_own_takes_it(run, public):
    out, trained = run(SOLVER__MAX_ITER=4)
    vit = timm.create_model("test_vit", num_classes=0, img_size=(48, 64))
    weights = load_file(public)
    weights["pos_embed"] = vit.state_dict()["pos_embed"]  # not even resized
    vit.load_state_dict(weights)
    apply_delta(vit, delta_of_run(out))
    _assert_same(vit.state_dict(), _vit(trained))


def test_other_public_weights_than_the_runs_are_noticed(run, public, capsys, tmp_path):
    out, _ = run(SOLVER__MAX_ITER=4)
    main(["delta", str(out)])
    other = load_file(public)
    other["blocks.0.mlp.fc1.weight"][0, 0] += 1
    other["blocks.5.mlp.fc1.weight"] += 1
    save_file(other, tmp_path / "other.safetensors")
    other = ["--base", str(tmp_path / "other.safetensors")]
    with pytest.raises(SystemExit, match="1"):
        main(["delta", str(out), *other])
    assert "other weights than" in (error := capsys.readouterr().err)
    assert "Name its own with --base" in error
    with pytest.raises(SystemExit, match="1"):
        main(["plain", str(out / "delta.safetensors"), *other])
    assert "2 of 77 tensors differ, blocks.0.mlp.fc1.weight, blocks.5" in capsys.readouterr().err
    assert not (out / "timm").exists()


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def test_refuses(run, tmp_path, capsys):
    def refused(*arguments) -> str:
        with pytest.raises(SystemExit, match="1"):
            main([str(argument) for argument in arguments])
        return capsys.readouterr().err

    out, _ = run(SOLVER__MAX_ITER=4)
    assert "is the OUTPUT_DIR of a run" in refused(
        "plain", out, "--layout", "detectron2", "--output", out
    )
    config, delta = out / "config.yaml", out / "delta.safetensors"
    before = _digest(out / "model_final.pth")
    text = config.read_text()

    assert "there is no" in refused("delta", tmp_path / "nowhere.pth")
    assert "--config-file" in refused("delta", out, "--config-file", tmp_path / "none.yaml")
    assert "(For an export, --base FILE" in refused("delta", out, "--base", tmp_path / "none.pth")
    config.write_text(text.replace("NAME: tiny", "NAME: dinov2_vits"))
    error = refused("plain", out)
    assert "MODEL.VFM.NAME was 'tiny' and is 'dinov2_vits'" in error and str(config) in error
    harm = tmp_path / "harm"
    config.write_text(f"SEED: !!python/object/apply:pathlib.Path.touch [{harm}]\n")
    assert "config.yaml is no YAML that can be read" in refused("delta", out)
    config.write_text(text + "\nSPEED: 3\n")
    assert "SPEED is no key" in refused("delta", out)
    (out / "broken.pth").write_bytes((out / "model_final.pth").read_bytes()[:9999])
    config.write_text(text)
    assert "broken.pth: it is damaged" in refused("plain", out / "broken.pth")
    delta.write_bytes(b"nothing")
    assert "delta.safetensors cannot be used" in refused("plain", delta)
    assert not harm.exists()
    assert _digest(out / "model_final.pth") == before


def test_weights_without_a_record_have_to_fit_their_config(run, tmp_path, capsys):
    out, trained = run(SOLVER__MAX_ITER=4)
    config, weights = out / "config.yaml", out / "weights.pth"
    text = config.read_text()

    def refused(state) -> str:
        torch.save({"model": state}, weights)
        with pytest.raises(SystemExit, match="1"):
            main(["plain", str(weights), "--layout", "detectron2"])
        return capsys.readouterr().err

    for old, new, words in (
        ("NAME: tiny", "NAME: huge", "MODEL.VFM.NAME is 'huge'; known are"),
        ("NAME: tiny", "NAME: dinov2_vits", rf"do not fill the model .*the config is {config}"),
        (
            "DEC_LAYERS: 3",
            "DEC_LAYERS: 4",
            rf"\(22 of its .*the config is {config}",
        ),
        (
            "NUM_CLASSES: 3",
            "NUM_CLASSES: 5",
            "predict 3 classes and the config asks for 5",
        ),
    ):
        config.write_text(text.replace(old, new))
        assert re.search(words, refused(trained))
    config.write_text(text)
    del trained["sem_seg_head.class_predictor.bias"]
    assert "1 of its tensors are left" in refused(trained)
    assert not (out / "detectron2").exists()


def test_a_delta_says_of_its_training_what_the_checkpoint_says(run):
    out, _ = run(SOLVER__MAX_ITER=4)
    config = out / "config.yaml"
    other = config.read_text().replace("SEED: 42", "SEED: 1").replace("MAX_ITER: 4", "MAX_ITER: 9")
    config.write_text(other)
    facts = {"method": "fishertune", "iterations": "4", "seed": "42"}
    assert delta_of_run(out).notes.items() >= facts.items()
    state = torch.load(out / "model_final.pth", weights_only=True)["model"]
    torch.save({"model": state}, out / "weights.pth")
    assert not delta_of_run(out / "weights.pth").notes.keys() & facts.keys()


def test_a_run_from_random_weights_has_no_delta(run, capsys):
    out, trained = run(SOLVER__MAX_ITER=4)
    text = (out / "config.yaml").read_text()
    lines = [line for line in text.splitlines() if "public.safetensors" in line]
    (out / "config.yaml").write_text(text.replace(lines[0].strip(), "WEIGHTS: random"))
    with pytest.raises(SystemExit, match="1"):
        main(["delta", str(out)])
    assert "the run started from no public weights" in capsys.readouterr().err
    _assert_same(read_tuned(out).vit, _vit(trained))
