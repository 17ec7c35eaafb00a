"""What every part of the package stands on: the host, checks, files, devices, random numbers."""

__all__: list[str] = []
