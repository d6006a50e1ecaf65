"""Named choices: what the paper published, and what we recommend instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedllm.strategies.spry.dealing import Dealing

from fedllm.config import Scalar

PresetName = Literal["ours", "paper"]


@dataclass(frozen=True)
class YogiStep:
    """Step size and adaptivity of Yogi on the server."""

    eta: float
    tau: float


FLOWERS = YogiStep(eta=1e-2, tau=1e-3)


@dataclass(frozen=True)
class Preset:
    """What a preset decides unless the configuration does.

    Attributes:
        dealing: see :func:`fedllm.strategies.spry.dealing.deal`.
        yogi: the server's step per epoch; per iteration, where noisy gradients come up, it is Flower's.
        forward_ad: parameters of the client update ``forward-ad``.
    """

    dealing: Dealing
    yogi: YogiStep
    forward_ad: Mapping[str, Scalar]


PRESETS: Mapping[PresetName, Preset] = {
    # Spry's §3, appendices B and E: one Gaussian tangent for heads and factors alike, AdamW that starts fresh in every
    # round, FedYogi with Flower's constants. To be run with lora.rank 1, lora.alpha 1, train.batch-size 8 and one local
    # epoch.
    "paper": Preset(
        dealing="cyclic",
        yogi=FLOWERS,
        forward_ad={
            "tangents": 1,
            "distribution": "gaussian",
            "optimizer": "adamw",
            "max-grad-norm": 0.0,
            "exact-heads": False,
            "b-only": False,
            "control-variate": False,
            "dropout": True,
        },
    ),
    # Heads are differentiated exactly, which removes the largest part of the noise; A, whose gradient is zero as long
    # as B is, stays as it was drawn; SGD keeps the size of a jvp, of which AdamW's first steps keep the sign only. With
    # Flower's constants Yogi moves an entry by about 0.01 a round, too little for heads; ours follow faster and still
    # even out what clients with few classes pull to their side. One tangent: within equal time more steps beat more
    # tangents a step (benchmarks/forward_mode.py).
    "ours": Preset(
        dealing="contiguous",
        yogi=YogiStep(eta=0.1, tau=1e-2),
        forward_ad={
            "tangents": 1,
            "distribution": "rademacher",
            "optimizer": "sgd",
            "exact-heads": True,
            "head-tangents": 16,
            "b-only": True,
        },
    ),
}
