"""Shared basis of the package: the host, checks, files, devices, random numbers."""

__all__: list[str] = []
