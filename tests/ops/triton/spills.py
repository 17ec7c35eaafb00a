"""Compiles the Triton kernels in variants that can be launched, and prints those that spill
registers.

``python -m ops.triton.spills`` in ``tests/``: of every kernel the variants in which any two choices
meet. A number behind it adds so many of each at random; all of them are hundreds of thousands. It
takes ten minutes, and less a second time, since Triton keeps what it has compiled.
"""

import functools
import random
import sys
from dataclasses import dataclass, replace
from typing import Any

import torch
from ops.triton import ahead
from ops.triton.cases import pairwise

from sj_robust.ops import Surrogate
from sj_robust.ops.bn_dlif import triton_launch as stage_launch
from sj_robust.ops.dlif import triton_launch
from sj_robust.ops.dlif.config import DLIFConfig, Planes
from sj_robust.ops.surrogate import HOST_NAMES

STAGES = {  # of one pass: tensors that it leaves out
    "gradient of x": ("grad_x_total", "grad_v_init", *ahead.BACKWARD["gradient of x"]),
    "evaluation": ("grad_x_total", *ahead.BACKWARD["evaluation"]),
    "sums": ("grad_x_total", *ahead.BACKWARD["sums"]),
    "one step, repeated": ahead.BACKWARD["sums"],
    "no batch norm": ("moments", "slopes", "partial_sums", "grad_x_total"),
}
CHOICES: dict[str, list[Any]] = {
    "architecture": [80, 90, 100],
    "dtype": [torch.float32, torch.float16, torch.bfloat16],
    "steps": [1, 4, 8, 16, 17, 24, 100],
    "v_reset": [0.0, None, -0.25],
    "detach_reset": [False, True],
    "kind": list(HOST_NAMES),
    "starts": ["at rest", "anywhere", "learned"],
    "last": [False, True],  # the last potential gets a gradient
    "stores": [False, True],  # potentials, or reads their gradients
    "currents": [False, True],  # the same of those behind the batch norm
    "stage": list(STAGES),
    # channels; height and width; channels last, pooled
    "planes": [
        Planes(*size, last, pool)
        for size in ((64, 32, 32), (64, 4, 4), (3, 7, 7))
        for last in (False, True)
        for pool in (False, True)
    ],
}


@dataclass(frozen=True)
class Variant:
    """A kernel and the names of CHOICES; those that it does not know are the first ones."""

    kernel: str
    architecture: int
    dtype: torch.dtype
    steps: int
    v_reset: float | None = 0.0
    detach_reset: bool = False
    kind: str = CHOICES["kind"][0]
    starts: str = "at rest"
    last: bool = False
    stores: bool = False
    currents: bool = False
    stage: str = CHOICES["stage"][0]
    planes: Planes = CHOICES["planes"][0]

    @classmethod
    def at_random(cls, kernel: str, draw: random.Random) -> "Variant":
        """One of a kernel."""
        variant = cls(kernel, *(draw.choice(values) for values in CHOICES.values()))
        unknown = []
        if kernel.endswith("forward"):
            unknown = ["detach_reset", "kind", "last"]
            variant = replace(variant, starts=variant.starts.replace("learned", "anywhere"))
        if not kernel.startswith("bn"):
            unknown += ["currents", "stage"]
            variant = replace(variant, planes=CHOICES["planes"][0 if variant.is_aligned else -1])
        elif kernel.endswith("forward") and variant.stage != "no batch norm":
            unknown += ["stage"]
        return replace(variant, **{name: CHOICES[name][0] for name in unknown})

    @property
    def is_aligned(self) -> bool:
        """Whether 16 divides the sizes, and pointers."""
        return self.planes.channels % 16 == 0

    @property
    def absent(self) -> tuple[str, ...]:
        """Tensors that it does not get."""
        missing = {
            "v_init": self.starts == "at rest",
            "grad_v_init": self.starts != "learned",
            "grad_v_last": not self.last,
            "v_seq": not self.stores,
            "grad_v_seq": not self.stores,
            "current_seq": not self.currents,
            "grad_current_seq": not self.currents,
            "checkpoints": self.steps <= triton_launch.LONGEST_SEQUENCE_IN_REGISTERS,
        }
        of_stage = STAGES[self.stage] if self.kernel.startswith("bn") else ()
        module = stage_launch if self.kernel.startswith("bn") else triton_launch
        names = {name for name, is_missing in missing.items() if is_missing}.union(of_stage)
        return tuple(
            name for name in getattr(module._kernels(), self.kernel).arg_names if name in names
        )

    def code(self) -> ahead.Code:
        """Compiled."""
        config = DLIFConfig(0.9, 1.0, self.v_reset, Surrogate(self.kind), self.detach_reset)
        options = {
            "architecture": self.architecture,
            "absent": self.absent,
            "aligned": self.is_aligned,
        }
        if self.kernel.startswith("bn"):
            return ahead.stage_code(
                self.kernel, self.dtype, self.steps, self.planes, config, **options
            )
        return ahead.triton_code(self.kernel, self.dtype, self.steps, config, **options)


def main(more: int) -> None:
    """Print what spills, and how many that are."""
    draw = random.Random(2)
    for kernel in ("dlif_forward", "dlif_backward", "bn_dlif_forward", "bn_dlif_backward"):
        at_random = functools.partial(Variant.at_random, kernel)
        variants = dict.fromkeys(
            [*pairwise([], at_random, 2000), *(at_random(draw) for _ in range(more))]
        )
        spilling = 0
        for variant in variants:
            code = variant.code()
            if code.stack:
                spilling += 1
                print(
                    f"{variant}: {code.registers} registers, {code.stack} bytes on the stack",
                    flush=True,
                )
        print(f"{kernel}: {spilling} of {len(variants)} variants spill", flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 0)
