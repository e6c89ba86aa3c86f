#!/usr/bin/env python
"""Trains and evaluates a segmentation model with FisherTune, as fishertune_d2/train.py does.

python train_net.py --config-file configs/fishertune_dinov2.yaml [--num-gpus N] [--resume]
python train_net.py --config-file FILE --eval-only MODEL.WEIGHTS OUTPUT_DIR/model_final.pth
torchrun --nproc-per-node N train_net.py --config-file FILE [MODEL.DEVICE cpu]
"""

from fishertune_d2.train import run

if __name__ == "__main__":
    run()
