"""Batch norm and the DLIF neurons after it as one operator."""
