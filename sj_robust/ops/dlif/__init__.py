"""The DLIF operator: one definition (``reference``), several implementations, one entry point."""
