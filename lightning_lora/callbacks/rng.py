"""The random state of a process as plain data that ``torch.load(weights_only=True)`` reads.

Lightning saves none, so a resumed run would shuffle and drop out differently from one that was never interrupted.
"""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch


def random_state() -> dict[str, Any]:
    """Return the states of torch (CPU and every CUDA device), numpy and ``random``."""
    version, words, gauss = random.getstate()
    name, keys, *rest = np.random.get_state(legacy=True)
    return {
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "python": (version, list(words), gauss),
        "numpy": (
            str(name),
            torch.from_numpy(np.asarray(keys, dtype=np.int64)),
            *(float(x) if isinstance(x, float) else int(x) for x in rest),
        ),
    }


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what :func:`random_state` returned; CUDA devices beyond those there are now are passed over."""
    torch.set_rng_state(state["torch"].cpu())
    for device, cuda in enumerate(state["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(cuda.cpu(), device)
    version, words, gauss = state["python"]
    random.setstate((version, tuple(words), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
