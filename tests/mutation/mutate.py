"""Plants small faults in the Python files of a package and records which its tests notice; run by hand.

``python tests/mutation/mutate.py --package perturbation --sample 60`` takes minutes and writes ``scores.json`` beside
this file. The faults go into a copy of the tree, never into the tree itself. What survived and why is written by hand
into ``survivors.json``.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).resolve().parents[1])
    from mutation.command import main

    main()
