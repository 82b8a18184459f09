"""`compare`: what training changed between checkpoints."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from interference_guard.errors import ConfigError

from . import output

if TYPE_CHECKING:
    from interference_guard.analysis.checkpoints import Checkpoint, Weights
    from interference_guard.analysis.state import DomainRecord

# Rows of the table by layer and module that are printed; --json gives all.
PLACES = 20


def compare(
    base: Annotated[Path, typer.Argument(help="The checkpoint before training.")],
    checkpoints: Annotated[list[Path], typer.Argument(help="One or more later ones: models or LoRA adapters.")],
    chain: Annotated[
        bool, typer.Option("--chain", help="Compare each with the one before it, not with BASE.")
    ] = False,
    state: Annotated[
        Path | None, typer.Option(help="A folder with a guard's state: show predicted interference by domain.")
    ] = None,
    unit_override: Annotated[
        list[str] | None,
        typer.Option(
            help="'PATTERN=row', '=column' or '=vector', as in the run's unit_overrides; may be repeated. For "
            "layers that are stored transposed, if no config.json says so."
        ),
    ] = None,
    places: Annotated[bool, typer.Option("--places", help="Show layers and modules as well.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure edits: unchanged parameters, size, most changed neurons and their overlap.

    Tensors are read one at a time, so memory does not grow with the model.

    Example: interference-guard compare base after-math after-code --chain
    """
    # Here, because the program is asked for its help more often than for this.
    from interference_guard import GuardConfig
    from interference_guard.analysis import jaccard, measure_edits, open_checkpoint, top_neurons

    overrides = GuardConfig(unit_overrides=unit_override).overrides()
    start = open_checkpoint(base)
    opened = [open_checkpoint(path) for path in checkpoints]
    weights = [_fitting(start, item) for item in opened]
    found: list[dict[str, Any]] = []
    tops = []
    for index, after in enumerate(weights):
        before = weights[index - 1] if chain and index else start
        with output.progress(f"{before.label} -> {after.label}", len(after.shapes)) as advance:
            edits = measure_edits(before, after, overrides, advance=advance)
        tops.append(top_neurons(edits.neurons()))
        found.append(
            {"before": before.label, "after": after.label, **edits.summary(), "places": edits.by_place()}
        )
    pairs = [
        {"first": found[i]["after"], "second": found[j]["after"], "jaccard": jaccard(tops[i], tops[j])}
        for i in range(len(tops))
        for j in range(i + 1, len(tops))
        # Between sets of which one is empty, as of a checkpoint without an edit, there is no overlap to speak of.
        if all(any(bool(mask.any()) for mask in tops[index].values()) for index in (i, j))
    ]
    predictions = _predictions(state, opened, weights)
    if json:
        output.as_json({"edits": found, "top_neurons": pairs, "predictions": predictions})
        return
    _show(found, pairs, predictions, places)


def _fitting(base: Checkpoint, other: Checkpoint) -> Weights:
    from interference_guard.analysis import MergedCheckpoint

    return MergedCheckpoint(base, other) if other.adapter and not base.adapter else other


def _predictions(state: Path | None, opened: list[Checkpoint], weights: list[Weights]) -> list[dict[str, Any]]:
    if state is None:
        return []
    from interference_guard.analysis import StateFile

    records = [record for record in StateFile(state).domains.values() if record.modelled]
    if not records:
        raise ConfigError(f"{state} has no anchored domain, so nothing can be predicted. Leave out --state.")
    return [
        _predicted(record, seen)
        for alone, after in zip(opened, weights, strict=True)
        for record in records
        # A guard of LoRA factors knows these, and not the merged weights.
        for seen in [alone if record.state.adapter else after]
    ]


def _predicted(record: DomainRecord, weights: Weights) -> dict[str, Any]:
    """A row of the table; without numbers where the region was moved after the checkpoint."""
    from interference_guard.analysis.prediction import before_move, predict_interference

    row: dict[str, Any] = {"after": weights.label, "domain": record.name, "moved_at": record.moved_at or None}
    if before_move(record, weights):
        return row | {"raw": None, "predicted": None, "unit": None}
    found = predict_interference(record, weights)
    # Before a measurement there is no calibration, and so no unit.
    unit = record.region.unit if math.isfinite(found.calibrated) else None
    return row | {"raw": found.raw, "predicted": found.calibrated, "unit": unit}


def _short(labels: list[str]) -> dict[str, str]:
    """Folder names where they tell the checkpoints apart, else whole paths."""
    names = {label: Path(label).resolve().name for label in labels}
    return names if len(set(names.values())) == len(names) else {label: label for label in names}


def _show(
    found: list[dict[str, Any]], pairs: list[dict[str, Any]], predictions: list[dict[str, Any]], places: bool
) -> None:
    short = _short([item[key] for item in found for key in ("before", "after")])
    keys = ("under_both", "close", "equal", "relative")
    names = ["unchanged (< 1e-7 and < 1e-3)", "close (1e-7 + 1e-3)", "equal", "length / weights"]
    rows = [
        [f"{short[item['before']]} -> {short[item['after']]}", *(output.number(item[key], ".2%") for key in keys)]
        for item in found
    ]
    output.table("Edits", ["checkpoints", *names], rows)
    for item in found if places else ():
        ranked = sorted(item["places"].items(), key=lambda entry: -entry[1]["norm"])[:PLACES]
        rows = [[place, *(output.number(values[key], ".2%") for key in keys)] for place, values in ranked]
        output.table(f"Largest edits of {short[item['after']]}", ["layer and module", *names], rows)
    if pairs:
        rows = [
            [f"{short[item['first']]} and {short[item['second']]}", output.number(item["jaccard"])]
            for item in pairs
        ]
        output.table("The 10 % most changed neurons", ["checkpoints", "Jaccard index"], rows)
    if predictions:
        rows = [
            [
                f"{short[item['after']]}, {item['domain']}",
                output.number(item["raw"], ".3e"),
                output.number(item["predicted"]),
                output.UNITS.get(item["unit"], "-"),
            ]
            for item in predictions
        ]
        names = ["checkpoint, domain", "raw", "predicted", "unit"]
        output.table("Predicted interference since the anchor", names, rows)
        for domain, step in {item["domain"]: item["moved_at"] for item in predictions}.items():
            if step:
                output.line(
                    f"{domain}: since its region was moved, at foreign step {step} after its anchor. Only later "
                    "checkpoints are meant; of those known to be earlier nothing is shown."
                )
