"""A report as a model card of the Hugging Face Hub, and its upload (extra ``hub``)."""

import shutil
import socket
import ssl
import tempfile
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from sj_robust.data.files import one_line
from sj_robust.evaluation.report.export import Exported, exported
from sj_robust.evaluation.report.table import table
from sj_robust.evaluation.report.verdict import alarms, budget, masked, remarks, verdict
from sj_robust.evaluation.result import Evaluation

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["hub_card", "push_to_hub"]

_TAGS = ["spiking-neural-network", "spikingjelly", "adversarial-robustness"]
_SUMMARIES = {"clean": "clean", "everything": "robust", "verified": "verified"}
"""Kinds of figures that a card of a suite states, and what it calls them."""
_WEIGHTS = "model.pt"
_LOADING = f"""## Weights

`{_WEIGHTS}` is the state dict: `net.load_state_dict(torch.load("{_WEIGHTS}", weights_only=True))`.
"""


def hub_card(report: Evaluation, *, has_weights: bool = False) -> str:
    """README.md of a model on the Hub: figures that its pages show, the verdict, the table, and how
    it was measured. Hub 模型卡。

    Args:
        report: The report.
        has_weights: Whether the weights lie beside it, so that the card says how to load them.

    Raises:
        ModuleNotFoundError: If huggingface_hub is not installed.
    """
    _check_hub()
    from huggingface_hub import ModelCardData

    head = ModelCardData(
        model_name=report.name,
        library_name="sj_robust",
        pipeline_tag="image-classification",
        tags=_TAGS,
        eval_results=list(_results(report)),
    )
    doubts = [f"**{text}**" for text in (*alarms(report), *masked(report))]
    where = [f"- {name}: {value}" for name, value in report.environment.items()]
    parts = [
        f"# {report.name}",
        verdict(report),
        *doubts,
        f"Measured with sj_robust on {len(report.labels)} images of {report.dataset}: "
        f"{budget(report.threat)}, suite {report.suite}. `report.json` has the outcome per image.",
        table(report),
        *remarks(report),
        *([_LOADING] if has_weights else []),
        "## Environment",
        "\n".join(where),
    ]
    text = "\n\n".join(part for part in parts if part)
    return f"---\n{head.to_yaml()}\n---\n\n{text}\n"


def push_to_hub(
    report: Evaluation,
    text: str,
    repo_id: str,
    *,
    network: nn.Module | str | Path | None = None,
    token: str | None = None,
    private: bool = False,
    endpoint: str | None = None,
) -> str:
    """Upload card, report and network, in one commit; returns the address. 上传到 Hub。

    Args:
        report: The report.
        text: The report as JSON.
        repo_id: ``"OWNER/NAME"`` of the model, which is made if it is not there.
        network: A network, whose state dict is uploaded, or a file such as ``best.pt``; None for
            none.
        token: Token of the Hub; None takes that of ``hf auth login``.
        private: Whether a new model is private.
        endpoint: Address of another Hub; None for the public one.

    Raises:
        ModuleNotFoundError: If huggingface_hub is not installed.
        TypeError: If ``network`` is neither a network nor a path.
        FileNotFoundError: If there is no such file.
        ConnectionError: If the Hub cannot be reached.
    """
    _check_hub()
    from huggingface_hub import HfApi

    if network is not None and not isinstance(network, nn.Module | str | Path):
        raise TypeError(
            f"network must be a network or the path of a file, got {type(network).__name__}; give "
            "the network that was evaluated, or its best.pt"
        )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        is_module = isinstance(network, nn.Module)
        card = hub_card(report, has_weights=is_module)
        (folder / "README.md").write_text(card, encoding="utf-8")
        (folder / "report.json").write_text(text, encoding="utf-8")
        if isinstance(network, nn.Module):
            torch.save(network.state_dict(), folder / _WEIGHTS)
        elif network is not None:
            shutil.copy2(network, folder)
        hub = HfApi(endpoint=endpoint, token=token)
        try:
            address = hub.create_repo(repo_id, private=private, exist_ok=True)
        except Exception as error:  # its class changes with the client that huggingface_hub has
            if not _is_of_connection(error):
                raise
            raise ConnectionError(
                f"{hub.endpoint} cannot be reached ({one_line(error)}); push again with a "
                "connection, or give another endpoint: Report.save keeps the report until then"
            ) from error
        hub.upload_folder(
            repo_id=repo_id,
            folder_path=folder,
            commit_message=f"Report of sj_robust: suite {report.suite}",
        )
    return str(address)


def _results(report: Evaluation) -> Iterable["EvalResult"]:
    """Figures as the Hub shows them beside the card."""
    from huggingface_hub import EvalResult

    rows = exported(report)
    summaries = [row for row in rows if row.kind in _SUMMARIES and row.variant == report.main]
    for row in summaries if report.is_suite else rows:
        yield EvalResult(
            task_type="image-classification",
            dataset_type=report.dataset,
            dataset_name=report.dataset,
            metric_type="accuracy",
            metric_name=_metric(row, is_suite=report.is_suite),
            metric_value=round(100 * row.accuracy, 2),
        )


def _metric(row: Exported, *, is_suite: bool) -> str:
    """Name of a figure, with the threat that it is under."""
    name = _SUMMARIES[row.kind] if is_suite else " ".join(filter(None, (row.variant, row.name)))
    threat = f", {row.norm} {row.eps}" if row.eps else ""
    suite = f", suite {row.suite}" if row.kind == "everything" else ""
    return f"{name} accuracy, %{threat}{suite}"


def _is_of_connection(error: BaseException | None) -> bool:
    """Whether what a client raises comes from a connection that failed."""
    while error is not None:
        if isinstance(error, ConnectionError | TimeoutError | socket.gaierror | ssl.SSLError):
            return True
        error = error.__cause__ or error.__context__
    return False


def _check_hub() -> None:
    if find_spec("huggingface_hub") is None:
        raise ModuleNotFoundError(
            "a model card of the Hub needs huggingface_hub, which is not installed: pip install "
            "'sj_robust[hub]'",
            name="huggingface_hub",
        )
