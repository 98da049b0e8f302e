"""What the tests of the heads share."""

from __future__ import annotations

import torch

from medforge.models.heads import TaskHeads

HIDDEN = 16
EACH = {"language": 1.0, "region": 2.0, "match": 0.5}


def set_log_variance(heads: TaskHeads, **values: float) -> None:
    with torch.no_grad():
        for name, value in values.items():
            heads.log_variance[name].fill_(value)
