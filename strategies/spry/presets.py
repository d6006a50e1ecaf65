"""Named choices: what the paper published, and what we recommend instead."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from fedllm.strategies.spry.dealing import Dealing

from fedllm.config import Scalar

PresetName = Literal["ours", "paper"]
ServerStep = Literal["yogi", "sgd"]


@dataclass(frozen=True)
class Preset:
    """What a preset decides unless the configuration does.

    Attributes:
        dealing: see :func:`fedllm.strategies.spry.dealing.deal`.
        server: the server's step where clients send tensors; per iteration, where they send gradients, it is Yogi.
        forward_ad: parameters of the client update ``forward-ad``.
    """

    dealing: Dealing
    server: ServerStep
    forward_ad: Mapping[str, Scalar]


PRESETS: Mapping[PresetName, Preset] = {
    # Spry's §3, appendices B and E: one Gaussian tangent for heads and factors alike, AdamW that starts fresh in every
    # round, FedYogi with Flower's constants. To be run with lora.rank 1, lora.alpha 1, train.batch-size 8 and one local
    # epoch.
    "paper": Preset(
        dealing="cyclic",
        server="yogi",
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
    # as B is, stays as it was drawn; SGD keeps the size of a jvp, of which AdamW's first steps keep the sign only. The
    # exact heads need no adaptive server: Yogi with Flower's constants moves them by 0.01 a round, whatever they need.
    "ours": Preset(
        dealing="contiguous",
        server="sgd",
        forward_ad={
            "tangents": 4,
            "distribution": "rademacher",
            "optimizer": "sgd",
            "exact-heads": True,
            "head-tangents": 16,
            "b-only": True,
        },
    ),
}
