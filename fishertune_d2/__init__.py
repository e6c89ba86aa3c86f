"""FisherTune for Detectron2."""
