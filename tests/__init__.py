"""A package, or the ``tests`` of a Detectron2 checkout on the path would be taken for it."""
