"""The Kubeflow faces of the steps: a signature, one import, one call. The work is in `medforge.steps`."""

import os
from functools import partial

from kfp import dsl

# The image must be built from the same code; on a cluster it is pinned by digest.
IMAGE = os.environ.get("MEDFORGE_IMAGE", "medforge/train:0.1.0")

step = partial(dsl.component, base_image=IMAGE, install_kfp_package=False)
