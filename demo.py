#!/usr/bin/env python
"""Draws a trained model's predictions on images and videos, as fishertune_d2/predict/ does.

python demo.py --config-file OUTPUT_DIR/config.yaml --input street.jpg --output seen.png
python demo.py --config-file FILE --input FOLDER "night/*.png" drive.mp4 --output seen --confidence
python demo.py ... --opts MODEL.WEIGHTS model_0004999.pth MODEL.DEVICE cpu
"""

from fishertune_d2.predict.__main__ import run

if __name__ == "__main__":
    run()
