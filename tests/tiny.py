"""The sizes of a model that has every part and takes milliseconds, for tests of what surrounds it."""

from __future__ import annotations

from typing import Any

SIZES: dict[str, Any] = {
    "latent_dim": 3,
    "components": 2,
    "frequencies": 4,
    "encoder_centroids": (12, 6),
    "encoder_neighbors": (5, 4),
    "encoder_channels": (4, 5),
    "weight_net": (4,),
    "flow_layers": 2,
    "hypernet_widths": (6,),
    "inr_widths": (5,),
    "gating_widths": (4,),
    "kl_samples": 2,
}
"""Arguments of `VaMoH` and of `ModelConfig`."""
