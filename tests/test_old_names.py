"""Every name of version 0.1.0 still works, or works with a warning that says its new name.

The tables hold the names of that version. Do not add new names and do not delete old ones: give a
name that you rename an alias with a warning, and test the alias.
"""

import importlib
import re
import runpy
import sys
import warnings
from pathlib import Path

import pytest
from detectron2.config import get_cfg

from fishertune_d2 import train
from fishertune_d2.bench import tables
from fishertune_d2.config import add_fishertune_config, get_config_file, read_config
from fishertune_d2.config_slips import dotted_items
from fishertune_d2.data.dataset_table import DATASETS
from fishertune_d2.export import LAYOUTS
from fishertune_d2.fisher import ESTIMATORS, LABELS, tuned_share
from fishertune_d2.fisher.perturb import EPS_MODES
from fishertune_d2.fisher.score import FORMS
from fishertune_d2.modeling import VFMS
from fishertune_d2.tuning import TUNING_REGISTRY

ROOT = Path(__file__).resolve().parents[1]

# python -m fishertune_d2.<name>
COMMANDS = """
    analysis.compare analysis.convergence analysis.forms analysis.rows analysis.selection_map
    analysis.sensitivity_map analysis.shift_curve bench data.check data.streets doctor export plan
    predict report train
""".split()
RENAMED_COMMANDS = {"analysis.rows": "analysis.methods", "data.streets": "streets"}
SCRIPTS = """
    demo.py train_net.py
    benchmarks/data_loading.py benchmarks/evaluation.py benchmarks/fisher.py
    benchmarks/fisher_tables.py benchmarks/gpu/__main__.py benchmarks/scaling.py
    benchmarks/selection_stability.py benchmarks/training.py
    examples/simple_trainer.py examples/timm_classifier.py examples/vitdet_mask_rcnn.py
    examples/what_moved.py
    tools/config_costs.py tools/fake_cuda/__main__.py tools/fake_cuda/count_steps.py
    tools/gpu_check.sh tools/gpu_check/carry.py tools/install_detectron2.py tools/model_zoo.py
    tools/run_notebooks.py tools/setup_venv.sh tools/train.sbatch
""".split()
TARGETS = "demo test notebooks lint docs setup clean".split()
# Folder below configs/: its files, without .yaml.
CONFIGS = {
    "": """
        Base-cpu Base-gtav Base-paper Base-recipe demo fishertune_clip fishertune_dinov2
        fishertune_dinov3 fishertune_eva02 fishertune_mae fishertune_mae_vith fishertune_sam
        freeze_clip freeze_dinov2 freeze_dinov3 freeze_eva02 freeze_mae freeze_mae_vith freeze_sam
        full_clip full_dinov2 full_dinov3 full_eva02 full_mae full_mae_vith full_sam lora_dinov2
        rein_dinov2 vltseg_eva02_clip
    """,
    "camvid": """
        Base-camvid adaptformer childtune fishertune freeze full lora rein set vpt vqt
    """,
    "cityscapes_to_acdc": """
        Base-acdc fishertune_dinov2 fishertune_eva02 freeze_dinov2 freeze_eva02 full_dinov2
        full_eva02
    """,
    "cityscapes_to_adverse": """
        Base-adverse fishertune_dinov2 freeze_dinov2 full_dinov2
    """,
    "cityscapes_to_bdd100k": """
        Base-bdd100k fishertune_dinov2 fishertune_eva02 freeze_dinov2 freeze_eva02 full_dinov2
        full_eva02
    """,
    "streets": """
        Base-streets
    """,
}
# Section: its keys.
KEYS = {
    "FISHER": "BATCHES EPS ESTIMATE ESTIMATOR FORM GAMMA IMS_PER_BATCH LABELS PRECISION RHO TAU",
    "FISHER.PERTURB": "EPS_MODE POINTS STRENGTH",
    "INPUT": "COLOR_AUG_SSD",
    "MODEL.MASK_FORMER": """
        CLASS_WEIGHT DEC_LAYERS DEEP_SUPERVISION DICE_WEIGHT DIM_FEEDFORWARD DROPOUT HIDDEN_DIM
        IMPORTANCE_SAMPLE_RATIO MASK_WEIGHT NHEADS NO_OBJECT_WEIGHT NUM_OBJECT_QUERIES
        OVERSAMPLE_RATIO PRE_NORM TRAIN_NUM_POINTS
    """,
    "MODEL.SEM_SEG_HEAD": "MASK_DIM TRANSFORMER_ENC_DIM_FEEDFORWARD TRANSFORMER_ENC_LAYERS",
    "MODEL.VFM": "CHECKPOINT_BLOCKS IMG_SIZE NAME PATCH_RESIZE PATCH_SIZE PIXELS WEIGHTS",
    "SOLVER": "ACCUMULATE BACKBONE_MULTIPLIER FUSED MATMUL_PRECISION OPTIMIZER WEIGHT_DECAY_EMBED",
    "SOLVER.AMP": "PRECISION",
    "TEST": "CLASS_RULE CROP_SIZE MODE NATIVE_LABELS PICTURES SIZES STRIDE WINDOWS_PER_BATCH",
    "TUNING.ADAPTFORMER": "DIM SCALE",
    "TUNING": "D_MAX D_MIN FEATURE_PERTURBATION METHOD SCHEDULE WARMUP_CHECKPOINT WARMUP_ITERS",
    "TUNING.GROUP": "DEPTH KINDS",
    "TUNING.LORA": "ALPHA RANK",
    "TUNING.PEFT": "OPTIONS TARGETS TYPE",
    "TUNING.REIN": "RANK",
    "TUNING.VPT": "NUM_TOKENS",
    "TUNING.VQT": "NUM_TOKENS",
}
METHODS = """
    adaptformer childtune delta_fisher fisher fishertune freeze full group lora peft random random_k
    random_q random_v rein set vpt vqt
""".split()
VFM_NAMES = """
    dinov2_vits dinov2_vitb dinov2_vitl dinov2_vitg dinov2_vits_reg dinov2_vitb_reg dinov2_vitl_reg
    dinov2_vitg_reg dinov3_vits dinov3_vits_plus dinov3_vitb dinov3_vitl dinov3_vith_plus
    dinov3_vit7b clip_vitl mae_vitl mae_vith sam_vith eva02_vitl eva02_clip_vitl tiny
""".split()
DATA_SETS = """
    gtav_train synthia_train cityscapes_train cityscapes_val bdd100k_train bdd100k_val
    mapillary_train mapillary_train_hrda mapillary_val mapillary_val_hrda acdc_train acdc_fog_train
    acdc_night_train acdc_rain_train acdc_snow_train acdc_val acdc_fog_val acdc_night_val
    acdc_rain_val acdc_snow_val foggy_zurich foggy_driving dark_zurich_val nighttime_driving
    camvid_day_train camvid_day_val camvid_day_test camvid_dusk_dev camvid_dusk_test
    streets_day_train streets_day_val streets_dusk_val streets_night_val streets_fog_val
    streets_rain_val streets_snow_val
""".split()
BENCH_METHODS = """
    adaptformer fisher delta_fisher childtune fishertune freeze full lora peft random random_q
    random_k random_v group rein set vpt vqt dora vera ia3 q_shallow q_middle q_deep k_shallow
    k_middle k_deep v_shallow v_middle v_deep ffn_shallow ffn_middle ffn_deep share_2.5
    adaptformer_fp vpt_fp rein_fp fishertune_fp eq7 eq15 rank share_1 share_20 smoothed natural
    variational fisher_variational sampled_labels shift_embedding shift_blocks
""".split()
BENCH_TABLES = "table1 table2 table3 table4 table5 fig2 fig3 fig5 selection".split()
# Key: its values.
VALUES = {
    "FISHER.ESTIMATOR": (
        "diagonal diagonal_loop smoothed closed_form variational natural batch_mean",
        ESTIMATORS,
    ),
    "FISHER.FORM": ("balanced eq7 eq15 rank", FORMS),
    "FISHER.LABELS": ("ground_truth sampled", LABELS),
    "FISHER.PERTURB.EPS_MODE": ("image channel", EPS_MODES),
    "export plain --layout": ("timm transformers detectron2", LAYOUTS),
}
# Module below fishertune_d2: its public names.
PUBLIC = {
    "": """
        add_fishertune_config apply_fishertune get_config_file data engine evaluation modeling
        tuning
    """,
    "fisher": """
        ESTIMATORS KINDS LABELS BatchMean Candidate ClosedForm Cost Diagonal DiagonalLoop Estimator
        FisherEstimate FreeEnergy Natural Selection Smoothed SoftmaxLikelihood
        StatisticsPerturbation Variational count_of_share domain_related_fisher entries_within
        estimate_fisher find_candidates image_seeds keeping_activations overlap relative_change
        sampled_nll seeded tuned_share
    """,
    "tuning": """
        TUNING_REGISTRY MaskedUpdate SelectedWeights SelectiveMethod TuningMethod
        build_tuning_method require_same_shapes
    """,
    "data": """
        DatasetError DatasetMetadata SegmentationMapper build_test_loader build_train_loader
        check_datasets class_counts dataset_metadata load_datasets register_sem_seg
        require_ignore_value
    """,
    "modeling": "VFM VFMS Mask2FormerHead VFMBackbone VFMSegmentor",
    "evaluation": "DomainGeneralizationEvaluator all_scores best_classes format_table summarize",
    "engine": """
        FisherEstimation LearningRates ParameterMask Trainer WarmupFreeze WholeCheckpointer
        apply_fishertune build_optimizer count_parameters launch log_plan
    """,
    "predict": """
        InputError Prediction Predictor draw_file draw_files draw_prediction find_inputs
        name_outputs read_run
    """,
    "export": """
        Architecture Delta apply_delta LAYOUTS TunedModel delta_of_run read_tuned tuned_backbone
    """,
    "report": "Run RunError write_report",
    "plan": "Plan Stage format_fit format_plan make_plan summary",
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_its_help(name, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [f"fishertune_d2.{name}", "--help"])
    with pytest.raises(SystemExit) as end, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # runpy's, of a module imported before
        runpy.run_module(f"fishertune_d2.{name}", run_name="__main__")
    said = capsys.readouterr()
    assert end.value.code == 0 and said.out.startswith("usage: ")
    new = RENAMED_COMMANDS.get(name)
    assert (f"fishertune_d2.{name} is now called fishertune_d2.{new}\n" == said.err) is bool(new)


def test_scripts_and_targets_exist():
    assert [script for script in SCRIPTS if not (ROOT / script).is_file()] == []
    makefile = (ROOT / "Makefile").read_text()
    assert [name for name in TARGETS if not re.search(rf"^{name}:", makefile, re.M)] == []


@pytest.mark.parametrize("folder", CONFIGS)
@pytest.mark.filterwarnings("ignore:.* is now configs/:FutureWarning")
def test_configs_are_found(folder):
    for name in CONFIGS[folder].split():
        assert Path(get_config_file(f"{folder}/{name}.yaml".lstrip("/"))).is_file()


@pytest.mark.parametrize(
    ("old", "new", "test", "output"),
    [
        (
            "configs/cityscapes_to_acdc/full_eva02.yaml",
            "cityscapes/full_eva02.yaml",
            ("cityscapes_val", "acdc_val"),
            "outputs/cityscapes_to_acdc/full_eva02",
        ),
        (
            "cityscapes_to_bdd100k/Base-bdd100k.yaml",
            "cityscapes/Base-cityscapes.yaml",
            ("cityscapes_val", "bdd100k_val"),
            None,
        ),
    ],
)
def test_a_renamed_config_is_read_with_its_old_test_sets(old, new, test, output):
    with pytest.warns(FutureWarning, match=f"{Path(old).name} is now configs/{new} with the opt"):
        cfg = read_config(old, ["SEED", "7"])
    expected = read_config(new, ["SEED", "7"]).clone()
    expected.defrost()
    expected.DATASETS.TEST = test
    expected.OUTPUT_DIR = output or expected.OUTPUT_DIR
    assert cfg == expected
    with pytest.warns(FutureWarning):
        assert read_config(old, ["DATASETS.TEST", "()"]).DATASETS.TEST == ()


def test_the_train_command_takes_a_renamed_config(monkeypatch, tmp_path):
    started = []
    monkeypatch.setattr(train, "launch", lambda main, args, device: started.append(args))
    old = "configs/cityscapes_to_acdc/freeze_dinov2.yaml"
    own = ["MODEL.DEVICE", "cpu", "OUTPUT_DIR", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", ["train_net.py", "--config-file", old, *own])
    with pytest.warns(FutureWarning, match="is now configs/cityscapes/freeze_dinov2.yaml"):
        train.run()
    (args,) = started
    cfg = read_config(args.config_file, args.opts)
    assert args.config_file == get_config_file("cityscapes/freeze_dinov2.yaml")
    assert cfg.DATASETS.TEST == ("cityscapes_val", "acdc_val") and cfg.OUTPUT_DIR == str(tmp_path)


def test_keys_and_values_exist():
    cfg = get_cfg()
    add_fishertune_config(cfg)
    present = {key for key, _ in dotted_items(cfg)}
    old = {f"{section}.{name}" for section, names in KEYS.items() for name in names.split()}
    assert old - present == set()
    for key, (values, known) in VALUES.items():
        assert set(values.split()) - set(known) == set(), key


@pytest.mark.filterwarnings("ignore:the schedule 'text':FutureWarning")
def test_schedules_exist_and_the_renamed_one_equals_its_new_name():
    for schedule in ("eq16", "linear", "constant"):
        tuned_share(0.5, 0.01, 0.05, schedule=schedule)
    assert tuned_share(0.5, 0.01, 0.05, schedule="text") == tuned_share(0.5, 0.01, 0.05)


def test_registered_names_exist():
    assert set(METHODS) - {name for name, _ in TUNING_REGISTRY} == set()
    assert set(VFM_NAMES) - set(VFMS) == set()
    assert set(DATA_SETS) - {data_set.name for data_set in DATASETS} == set()
    assert set(BENCH_TABLES) - set(tables.TABLES) == set()
    assert {"paper", "camvid", "streets"} - set(tables.PROFILES) == set()
    found = {name: tables.find_entry(name) for name in BENCH_METHODS}
    # A name that is no entry would be taken for a tuning method.
    assert [name for name, entry in found.items() if entry.method not in METHODS] == []


@pytest.mark.parametrize("room", PUBLIC)
def test_public_names_can_be_imported(room):
    module = importlib.import_module(f"fishertune_d2.{room}".rstrip("."))
    missing = [name for name in PUBLIC[room].split() if not hasattr(module, name)]
    assert missing == []
