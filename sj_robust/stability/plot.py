"""A certificate as a figure; needs matplotlib (extra ``recipes``)."""

from pathlib import Path

from sj_robust.stability.certificate import Bound, Certificate

__all__ = ["plot_certificate"]

# Colours of Okabe and Ito (2008), and another marker for each: told apart in grey and by all kinds of colour vision.
_MEASURED = ("measured, largest of all pairs", "#000000", "o")
_PANELS = (
    (
        "L2 over time, ||eps|| / ||Ds||",
        "measured_l2",
        {"l2": ("exact, T steps", "#0072b2", "|"), "any_time": ("any T", "#009e73", "D"),
         "printed": ("printed, no L2 bound in general", "#d55e00", "x")},
    ),
    (
        "largest step, max ||eps[t]|| / ||Ds||",
        "measured_peak",
        {"peak": ("exact, T steps", "#0072b2", "|"), "printed_peak": ("printed, if all |p| <= 1", "#d55e00", "x")},
    ),
)  # fmt: skip


def plot_certificate(certificate: Certificate, path: str | Path) -> Path:
    """Measured ratios beside their bounds, a row per covered layer, on a logarithmic axis. 绘制稳定性证书。

    Args:
        certificate: What :func:`sj_robust.stability.certify` returned, or ``Certificate.load``.
        path: File to write; its ending says which format, ``.pdf`` and ``.png`` among others.

    Raises:
        ValueError: If no layer is covered.
        ImportError: If matplotlib is not installed.

    Examples:
        >>> import tempfile
        >>> from sj_robust.stability import LayerCertificate
        >>> layer = LayerCertificate("1", "IFNode", 1.0, (1.0,), ("input",), 2.0, l2=Bound(2.0, None))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_certificate(Certificate(1, 0, 1e-3, (layer,)), f"{folder}/certificate.pdf").name
        'certificate.pdf'
    """
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.ticker import FormatStrFormatter, LogLocator, NullFormatter

    layers = [layer for layer in certificate.layers if layer.not_covered is None]
    if not layers:
        raise ValueError("no layer of the certificate is covered, so there is nothing to draw; see its table()")
    with rc_context({"font.size": 8, "pdf.fonttype": 42, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(6.75, 1.35 + 0.17 * len(layers)), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for axis, (title, measured, bounds) in zip(axes, _PANELS, strict=True):
            series = {name: [_value(getattr(layer, name)) for layer in layers] for name in (measured, *bounds)}
            for name, values in series.items():
                label, colour, marker = bounds.get(name, _MEASURED)
                shown = [(value, row) for row, value in enumerate(values) if value is not None]
                if shown:
                    size = 9 if marker == "|" else 4.5
                    axis.plot(*zip(*shown, strict=True), marker, color=colour, label=label, ms=size, mew=1.4)
            axis.set_xscale("log")
            low, high = axis.get_xlim()
            axis.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if high < 100 * low else (1.0,)))
            axis.xaxis.set_major_formatter(FormatStrFormatter("%g"))
            axis.xaxis.set_minor_formatter(NullFormatter())
            axis.set_xlabel(title)
            axis.grid(axis="both", alpha=0.25, linewidth=0.5)
            if axis.lines:
                axis.legend(fontsize=7, frameon=False, loc="lower left", bbox_to_anchor=(0.0, 1.0), borderaxespad=0.2)
        axes[0].set_yticks(range(len(layers)), [layer.name for layer in layers], fontsize=7)
        axes[0].set_ylim(len(layers) - 0.5, -0.5)
        metadata = {".pdf": {"CreationDate": None}}.get(Path(path).suffix)
        figure.savefig(path, dpi=200, metadata=metadata)
    return Path(path)


def _value(entry: Bound | float | None) -> float | None:
    """What is drawn of a bound or a measured ratio; nothing where it is missing or zero."""
    value = entry.value if isinstance(entry, Bound) else entry
    return value if value else None
