"""Checks for gradient masking."""
