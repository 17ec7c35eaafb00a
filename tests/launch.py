"""Recipes started by tests: in this process, or as a process that hears Ctrl-C."""

import signal
from functools import partial

from accelerate.state import AcceleratorState

# A shell may have started the tests in the background, where SIGINT is ignored; a child would inherit that. For
# ``preexec_fn`` of a process that Ctrl-C is sent to.
hears_ctrl_c = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)


def in_process(main, monkeypatch, folder, *options):
    """A recipe without a process of its own, which takes seconds to start."""
    monkeypatch.chdir(folder)
    try:
        main(list(options))
    finally:
        AcceleratorState._reset_state(True)
