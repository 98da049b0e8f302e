"""The Kubeflow faces of the steps: a signature, one import, one call. The work is in `medforge.steps`."""

import os
from functools import partial

from kfp import dsl

from medforge import __version__

# The images must be built from the same code; on a cluster they are pinned by digest (pipelines/cluster.py).
DATA_IMAGE = os.environ.get("MEDFORGE_IMAGE_DATA", f"medforge/data:{__version__}")
TRAIN_IMAGE = os.environ.get("MEDFORGE_IMAGE_TRAIN", f"medforge/train:{__version__}")

step = partial(dsl.component, base_image=DATA_IMAGE, install_kfp_package=False)
model_step = partial(dsl.component, base_image=TRAIN_IMAGE, install_kfp_package=False)  # one that opens a model
