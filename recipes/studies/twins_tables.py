"""Tables of twins.md, from twins.csv.

python recipes/studies/twins_tables.py
"""

from pathlib import Path
from statistics import fmean

import tyro
from tables import Options, groups, numbers, read_table, with_spread, write_page

from sj_robust.core.saved import markdown_table

PAGE = "twins.md"
NAMES = {
    "relu": "clipped ReLUs (twin)",
    "twin": "the twin's weights, DLIF",
    "falling": "the twin's weights, gains 1.3 to 0.7",
    "at": "AT, LIF",
    "ms_mppd_at": "AT with MS-MPPD, DLIF",
    "mtl_ibp": "MTL-IBP, DLIF",
    "certified": "certified, DLIF",
    "mtl_ibp_from_twin": "MTL-IBP from a twin, DLIF",
    "certified_from_twin": "certified from a twin, DLIF",
}


def main(options: Options) -> None:
    """The page."""
    write_page(options.output / PAGE, tables(options.output))


def tables(folder: Path) -> dict[str, str]:
    """A table for every data set, and one of training images."""
    found, learned = {}, []
    for (data,), of_data in groups(read_table(folder / "twins.csv"), "data").items():
        cells = []
        for (network, T, images), rows in groups(of_data, "network", "T", "images").items():
            line = [NAMES[network], T, images, str(len(rows))]
            line += [with_spread(numbers(rows, name)) for name in ("clean", "left", "proved")]
            line += [f"{fmean(numbers(rows, name)):,.0f}" for name in ("spikes", "operations")]
            cells.append(line)
            gap = [with_spread(numbers(rows, name)) for name in ("learned", "learned_left")]
            if all(gap):
                learned.append([data, NAMES[network], *gap])
        heads = ["network", "T", "images", "seeds", "clean, %", "left, %", "proved, %"]
        found[data] = markdown_table([*heads, "spikes", "operations"], cells)
    heads = ["data", "network", "control, %", "all attacks, %"]
    return found | {"learned": markdown_table(heads, learned, words=2)}


if __name__ == "__main__":
    main(tyro.cli(Options))
