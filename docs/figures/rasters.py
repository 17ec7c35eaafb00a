"""Draws spike rasters of a network before and after an attack, at few and at many time steps.

python docs/figures/rasters.py  # 4 and 64 steps of a shipped network
"""

from pathlib import Path

import torch

from sj_robust import SpikingClassifier
from sj_robust.attacks import pgd
from sj_robust.core.shown import print_style
from sj_robust.data import image_loader, load_images
from sj_robust.models import pretrained
from sj_robust.perturbation import spike_traces

HERE = Path(__file__).parent
EPS = 0.1


def main() -> None:
    """One picture per number of steps; the image is the first that the attack fools."""
    x, y = next(iter(image_loader(load_images("digits").test, 16)))
    for T in (4, 64):
        model = SpikingClassifier(pretrained("digits/lif").net, T).eval()
        generator = torch.Generator().manual_seed(0)
        x_adv = pgd(model, x, y, eps=EPS, step_size=EPS / 4, steps=10, generator=generator)
        number = int((model(x_adv).argmax(1) != y).int().argmax())
        shown = spike_traces(model, x[number : number + 1], x_adv[number : number + 1])
        with print_style():
            shown.plot().savefig(HERE / f"raster_{T}.png", dpi=110)


if __name__ == "__main__":
    main()
