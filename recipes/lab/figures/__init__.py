"""The figures of the paper from one's own networks: numbers first, as a file, then the drawing."""
