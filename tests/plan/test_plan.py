"""The plan as a whole, and the command."""

from contextlib import redirect_stdout
from io import StringIO

import pytest
import torch
from detectron2.modeling import build_model

from fishertune_d2.plan import Plan, format_fit, format_hours, make_plan, summary
from fishertune_d2.plan import __main__ as command
from fishertune_d2.plan.__main__ import main
from fishertune_d2.plan.fake_model import fake_model
from fishertune_d2.plan.fake_run import FakeRun, stage_lengths
from fishertune_d2.plan.inference import plan_inference
from fishertune_d2.plan.memory import Memory
from fishertune_d2.plan.rates import EFFICIENCY
from fishertune_d2.plan.stage_costs import held_memory, step_flops
from fishertune_d2.tuning import build_tuning_method

CHANGES = ["SOLVER.IMS_PER_BATCH", "3", "FISHER.ESTIMATOR", "pathwise"]


@pytest.fixture(scope="module")
def config_file(small_cfg, tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("plan") / "small.yaml"
    path.write_text(small_cfg().dump())
    return str(path)


@pytest.fixture(scope="module")
def planned(config_file) -> tuple[Plan, str]:
    """The plan that the command makes, and the text that it prints."""
    made: list[Plan] = []

    def make(cfg) -> Plan:
        made.append(make_plan(cfg))
        return made[0]

    with pytest.MonkeyPatch.context() as patch, redirect_stdout(StringIO()) as printed:
        patch.setattr(command, "make_plan", make)
        assert main(["--config-file", config_file, *CHANGES, "--memory-gb", "1"]) == 0
    return made[0], printed.getvalue()


@pytest.fixture(scope="module")
def plan(planned) -> Plan:
    return planned[0]


@pytest.fixture
def runs(small_cfg):
    """Returns a function that counts the steps of each stage of a run."""

    def steps(**overrides) -> dict[str, int]:
        own = {"SOLVER__MAX_ITER": 7, "TUNING__WARMUP_ITERS": 3, "FISHER__BATCHES": 5}
        cfg = small_cfg(**own | overrides)
        return {name: n for name, (n, _) in stage_lengths(cfg, build_tuning_method(cfg)).items()}

    return steps


def test_a_run_goes_through_the_stages_it_must(runs):
    assert runs() == {"warmup": 3, "estimation": 5, "tuning": 4}
    assert runs(TUNING__WARMUP_CHECKPOINT="w.pth") == {"estimation": 5, "tuning": 4}
    assert runs(FISHER__ESTIMATE="f.safetensors") == {"warmup": 3, "tuning": 4}
    assert runs(SOLVER__MAX_ITER=3) == {"warmup": 3}
    assert runs(TUNING__WARMUP_ITERS=0) == {"estimation": 5, "tuning": 7}
    for method in ("random", "full", "freeze"):
        assert runs(TUNING__METHOD=method) == {"warmup": 3, "tuning": 4}


def test_a_config_for_four_processes_is_planned_as_one_process_trains_it(small_cfg):
    own = {"TUNING__METHOD": "freeze", "SOLVER__MAX_ITER": 6, "TUNING__WARMUP_ITERS": 2}
    cfg = small_cfg(**own, SOLVER__IMS_PER_BATCH=4, SOLVER__REFERENCE_WORLD_SIZE=4)
    stages = [(each.name, each.steps, each.images) for each in make_plan(cfg).stages]
    assert stages == [("warmup", 8, 1), ("tuning", 16, 1)]
    assert cfg.SOLVER.MAX_ITER == 6


def test_a_run_that_trains_nothing_is_refused(small_cfg):
    own = {"SOLVER__MAX_ITER": 3, "TUNING__WARMUP_ITERS": 3, "TUNING__WARMUP_CHECKPOINT": "w.pth"}
    with pytest.raises(ValueError, match="MAX_ITER is 3: nothing is trained"):
        make_plan(small_cfg(**own))


def test_a_method_that_computes_with_values_is_refused_by_name(small_cfg):
    own = {"TUNING__METHOD": "peft", "TUNING__PEFT__TYPE": "SHIRA", "TUNING__WARMUP_ITERS": 0}
    with pytest.raises(ValueError, match="the cost of SHIRA cannot be counted .*: start a run"):
        make_plan(small_cfg(**own))


def test_an_estimate_of_another_run_is_copied(small_cfg):
    plan = make_plan(small_cfg(FISHER__ESTIMATE="another.safetensors", TUNING__WARMUP_ITERS=0))
    assert plan.files["fisher.safetensors"] == 2 * 4 * plan.parameters["candidates"] > 0


def test_estimation_begins_as_warmup_leaves_the_decoder(small_cfg):
    def held(**overrides) -> dict[str, Memory]:
        cfg = small_cfg(**overrides)
        run = FakeRun(cfg, build_tuning_method(cfg), (48, 64))
        return {name: held_memory(run, name) for name in ("warmup", "estimation")}

    own, other = held(), held(TUNING__WARMUP_CHECKPOINT="another.pth")
    assert own["estimation"].gradients == own["warmup"].gradients > 0
    assert own["estimation"].optimizer == own["warmup"].optimizer > 0
    assert other["estimation"].gradients == 0
    assert other["estimation"].optimizer == own["warmup"].optimizer
    assert held(TUNING__WARMUP_ITERS=0)["estimation"].optimizer == 0


def test_steps_multiply_images_passes_and_domains(small_cfg, plan):
    def one_image(**overrides) -> dict[str, int]:
        ones = {"SOLVER__IMS_PER_BATCH": 1, "FISHER__IMS_PER_BATCH": 1}
        cfg = small_cfg(**ones | overrides)
        run = FakeRun(cfg, build_tuning_method(cfg), (48, 64))
        return {name: step_flops(run, name)[0] for name in ("estimation", "tuning")}

    one, flops = one_image(), {stage.name: stage.flops for stage in plan.stages}
    assert flops["tuning"] == 3 * one["tuning"]
    # Two images, and the two passes of the pathwise estimator where the default has one.
    assert flops["estimation"] == 2 * 2 * one["estimation"]
    # A batch of 3 in parts of 2 and 1.
    parts = one_image(SOLVER__IMS_PER_BATCH=3, SOLVER__ACCUMULATE=2)
    assert parts["tuning"] == flops["tuning"]


def test_no_fake_tensor_is_left_for_a_real_model(small_cfg, plan):
    image = {"image": torch.zeros(3, 48, 64), "sem_seg": torch.zeros(48, 64, dtype=torch.int64)}
    losses = build_model(small_cfg()).train()([image] * 3)  # the last that was planned: 3 images
    assert all(type(each) is torch.Tensor and each.isfinite() for each in losses.values())


def test_test_images_are_those_of_the_data_sets(small_cfg):
    names = ("cityscapes_val", "mapillary_val", "acdc_fog_val", "camvid_day_test", "nobody_has_it")
    sizes = [["acdc_fog_val", 64, 48]]
    cfg = small_cfg(DATASETS__TEST=names, TEST__SIZES=sizes)
    slide = plan_inference(cfg, fake_model(cfg), unknown=(48, 64))
    assert [(each.names, each.size, each.windows) for each in slide] == [
        # Windows of 48 x 64, a row and a column every 32 pixels, the last ones at the border.
        (("cityscapes_val", "mapillary_val"), (512, 1024), 16 * 31),
        (("acdc_fog_val",), (48, 64), 1),
        (("camvid_day_test",), (360, 480), 11 * 14),
        (("nobody_has_it",), None, 1),
    ]
    assert len({each.flops.forward for each in slide}) == 1

    names = ("camvid_day_test", "nobody_has_it")
    cfg = small_cfg(DATASETS__TEST=names, TEST__MODE="whole")
    whole = plan_inference(cfg, fake_model(cfg), unknown=(48, 64))
    assert [(each.window, each.windows) for each in whole] == [((360, 480), 1), ((48, 64), 1)]
    assert whole[0].flops.forward > 50 * whole[1].flops.forward


@pytest.mark.parametrize(
    ("protocol", "sizes"),
    [
        ("tqdm", [(1024, 2048), (540, 960), None]),
        ("hrda", [(1024, 2048), (1080, 1920), None]),
        ("native", [(1024, 2048), (1080, 1920), None]),
    ],
)
def test_a_protocol_sets_the_sizes_of_test_images(small_cfg, protocol, sizes):
    names = ("cityscapes_val", "acdc_fog_val", "nobody_has_it")
    cfg = small_cfg(DATASETS__TEST=names, TEST__PROTOCOL=protocol)
    planned = plan_inference(cfg, fake_model(cfg), unknown=(48, 64))
    assert [each.size for each in planned] == sizes


def test_the_command_prints_the_plan_and_whether_it_fits(planned, config_file, capsys, monkeypatch):
    plan, printed = planned
    arguments = ["--config-file", config_file, *CHANGES]
    assert summary(plan) in printed
    assert "Fits a card of 1 GB" in printed and "NOT counted" not in printed
    assert f"{plan.parameters['backbone'] / 1e6:.2f} M" in printed
    for name in ("model_warmup.pth", "fisher.safetensors", "selection.safetensors"):
        assert name in printed

    monkeypatch.setattr(command, "make_plan", lambda cfg: plan)
    assert main(arguments) == 0
    assert "card" not in capsys.readouterr().out
    warmup, _, tuning = (stage.memory.total / 2**30 for stage in plan.stages)
    assert main([*arguments, "--memory-gb", f"{(warmup + tuning) / 2}"]) == 1
    last = capsys.readouterr().out.splitlines()[-1]
    assert last.startswith("Does not fit a card of") and f"tuning ({tuning:.2f} GB)" in last
    assert "warm-up" not in last
    assert not format_fit(plan, 0.9 * warmup)[0]
    assert main([*arguments, "--card", "a100"]) == 0
    assert "312 in bfloat16" in capsys.readouterr().out
    assert main([*arguments, "--tflops", "1e-9"]) == 0
    assert format_hours(plan, dict.fromkeys(EFFICIENCY, 1e-9)) in capsys.readouterr().out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (["SOLVER.NO_SUCH_KEY", "3"], "SOLVER.NO_SUCH_KEY is no key"),
        (["SOLVER.MAX_ITER", "many"], "SOLVER.MAX_ITER is 'many', text, and takes a whole number"),
        (["SOLVER.MAX_ITER"], "no value stands after SOLVER.MAX_ITER"),
        (["TUNING.METHOD", "fishertun"], "'fishertun': did you mean fishertune? There are adapt"),
        (["MODEL.VFM.NAME", "magic"], "MODEL.VFM.NAME is 'magic'; known are"),
        (["FISHER.ESTIMATOR", "magic"], "FISHER.ESTIMATOR is 'magic': choose from diagonal,"),
    ],
)
def test_what_is_wrong_with_a_config_is_said(config_file, capsys, change, words):
    with pytest.raises(SystemExit) as error:
        main(["--config-file", config_file, *change])
    assert error.value.code == 2
    assert words in capsys.readouterr().err


def test_a_missing_file_is_named(capsys):
    with pytest.raises(SystemExit):
        main(["--config-file", "configs/no_such.yaml"])
    assert "'configs/no_such.yaml' does not exist" in capsys.readouterr().err
