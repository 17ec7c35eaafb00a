"""Batch norm and the DLIF neurons behind it as one operator."""
