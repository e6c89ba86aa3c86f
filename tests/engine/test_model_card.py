"""The model cards that the export command writes of a real run."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fishertune_d2.engine.run_record import RunRecord
from fishertune_d2.export.__main__ import main
from fishertune_d2.export.model_card import ModelCard
from fishertune_d2.run import Run

from .conftest import train


@pytest.fixture
def run(tiny_cfg, public) -> Path:
    """The folder of a run that scored a checkpoint in the middle, which it keeps as the best."""
    cfg = tiny_cfg(
        MODEL__VFM__WEIGHTS=public,
        TEST__EVAL_PERIOD=5,
        TEST__BEST_ON="tiny_day",
        SOLVER__EMA=0.9,
    )
    train(cfg)
    folder = Path(cfg.OUTPUT_DIR)
    (folder / "config.yaml").write_text(cfg.dump())
    return folder


def _table(card: Path) -> dict[str, list[str]]:
    """The rows of a card's tables by their first cell."""
    lines = [line for line in card.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return {first: rest for first, *rest in rows}


def test_a_card_has_the_facts_and_the_scores_of_the_run(run, public, run_card):
    main(["delta", str(run)])
    results, card = json.loads((run / "results.json").read_text()), _table(run / "README.md")
    tuned, whole = results["tuned_parameters"], results["backbone_parameters"]
    expected = {
        "backbone": "tiny, timm's `test_vit.r160_in1k`",
        "licence of the public weights": "Apache-2.0",
        "image size": "48 x 64 pixels (height x width)",
        "tuning method": "fishertune",
        "tuned weights of the backbone": f"{tuned:,} of {whole:,} ({100 * tuned / whole:.2f} %)",
        "training data": "tiny_day (6 images)",
        "iterations": "7",
        "of these, warm-up of the decoder": "3",
        "batch size": "2",
        "decay of the average of the weights": "0.9",
        "seed": "42",
        "protocol of the scores": "mode whole, class rule present",
        "commit of the scores": results["protocol"]["commit"],
    }
    assert {name: card[name][0] for name in expected} == expected
    assert card["tiny_day"] == ["source", f"{results['source']['tiny_day']:.2f}"]
    assert card["tiny_night"] == ["unseen", f"{results['targets']['tiny_night']:.2f}"]
    assert "chosen as the best by the mIoU on" not in card
    assert 'tuned_backbone("delta.safetensors")' in (run / "README.md").read_text()

    main(["plain", str(run / "delta.safetensors"), "--base", public])
    of_delta = run / "timm/README.md"
    assert _table(of_delta) == card
    loaded = run_card(of_delta.parent)["backbone"].state_dict()
    weights = load_file(of_delta.with_name("model.safetensors"))
    assert all(torch.equal(tensor, weights[name]) for name, tensor in loaded.items())


def test_the_method_is_named_with_what_it_selects(tiny_cfg, tmp_path):
    cfg = tiny_cfg(TUNING__UNIT="neuron", FISHER__PERTURB__KIND="night")
    record = RunRecord.of_run(cfg, None, None)
    card = ModelCard.of_run(Run(tmp_path), tmp_path / "model_final.pth", record)
    assert card.facts["tuning method"] == "fishertune, unit neuron, shift night"


def test_the_card_of_the_best_has_its_own_scores(run):
    logged = Run(run).metrics[4]
    state = torch.load(run / "model_best.pth", weights_only=True)
    state["iteration"] = 4
    torch.save(state, run / "model_best.pth")
    (run / "best").mkdir()
    main(["delta", str(run / "model_best.pth"), "--output", str(run / "best/best.safetensors")])
    card = _table(run / "best/README.md")
    assert card["chosen as the best by the mIoU on"] == ["tiny_day"]
    assert card["iterations"] == ["5"]
    # Those of results.json are of the last checkpoint.
    assert not {"commit of the scores", "tuned weights of the backbone"} & card.keys()
    for name, domain in (("tiny_day", "source"), ("tiny_night", "unseen")):
        assert card[name] == [domain, f"{logged[f'{name}/sem_seg/mIoU']:.2f}"]


def test_unknown_facts_are_left_out(run):
    state = torch.load(run / "model_final.pth", weights_only=True)
    torch.save({"model": state["model"]}, run / "weights.pth")
    main(["plain", str(run / "weights.pth"), "--layout", "detectron2"])
    card = _table(run / "detectron2/README.md")
    assert card["licence of the public weights"] == ["Apache-2.0"]
    assert not {"tuning method", "seed", "tiny_day"} & card.keys()
    assert "None" not in (run / "detectron2/README.md").read_text()


def test_a_readme_of_the_user_stays(run, caplog):
    (run / "README.md").write_text("# My runs\n")
    main(["delta", str(run)])
    assert (run / "README.md").read_text() == "# My runs\n"
    assert "is no model card, so it stays" in caplog.text


def test_a_run_that_keeps_no_best_says_how(run, capsys):
    (run / "model_best.pth").unlink()
    with pytest.raises(SystemExit, match="1"):
        main(["delta", str(run / "model_best.pth")])
    assert "TEST.EVAL_PERIOD and TEST.BEST_ON are set" in capsys.readouterr().err
