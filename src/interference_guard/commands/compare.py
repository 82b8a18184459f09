"""`compare`: what training changed between checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from interference_guard.analysis import (
    Checkpoint,
    MergedCheckpoint,
    StateFile,
    jaccard,
    measure_edits,
    open_checkpoint,
    predict_damage,
    top_neurons,
)
from interference_guard.analysis.checkpoints import Weights
from interference_guard.errors import ConfigError

from . import output

# Rows of the table by layer and module that are printed; --json gives all.
PLACES = 20


def compare(
    base: Annotated[Path, typer.Argument(help="The checkpoint before training.")],
    checkpoints: Annotated[list[Path], typer.Argument(help="One or more after it: models or LoRA adapters.")],
    chain: Annotated[
        bool, typer.Option("--chain", help="Compare each with the one before it, not with BASE.")
    ] = False,
    state: Annotated[
        Path | None, typer.Option(help="A folder with a guard's state: predict each domain's interference.")
    ] = None,
    places: Annotated[bool, typer.Option("--places", help="Show layers and modules too.")] = False,
    json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Measure edits: unchanged parameters, size, most changed neurons and their overlap.

    Tensors are read one after the other, so memory does not grow with the model.

    Example: interference-guard compare base after-math after-code --chain
    """
    start = open_checkpoint(base)
    weights = [_fitting(start, open_checkpoint(path)) for path in checkpoints]
    found: list[dict[str, Any]] = []
    tops = []
    for index, after in enumerate(weights):
        before = weights[index - 1] if chain and index else start
        with output.progress(f"{before.label} -> {after.label}", len(after.shapes)) as advance:
            edits = measure_edits(before, after, advance=advance)
        tops.append(top_neurons(edits.neurons()))
        found.append(
            {"before": before.label, "after": after.label, **edits.summary(), "places": edits.by_place()}
        )
    pairs = [
        {"first": found[i]["after"], "second": found[j]["after"], "jaccard": jaccard(tops[i], tops[j])}
        for i in range(len(tops))
        for j in range(i + 1, len(tops))
        if tops[i] and tops[j]
    ]
    predictions = _predictions(state, weights)
    if json:
        output.as_json({"edits": found, "top_neurons": pairs, "predictions": predictions})
        return
    _show(found, pairs, predictions, places)


def _fitting(base: Checkpoint, other: Checkpoint) -> Weights:
    return MergedCheckpoint(base, other) if other.adapter and not base.adapter else other


def _predictions(state: Path | None, weights: list[Weights]) -> list[dict[str, Any]]:
    if state is None:
        return []
    records = [record for record in StateFile(state).domains.values() if record.modelled]
    if not records:
        raise ConfigError(f"{state} has no anchored domain, so nothing can be predicted. Leave out --state.")
    return [
        {"after": after.label, "domain": record.name, "raw": found.raw, "predicted": found.calibrated}
        for after in weights
        for record in records
        for found in [predict_damage(record, after)]
    ]


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
            ]
            for item in predictions
        ]
        output.table("Predicted interference since the anchor", ["checkpoint, domain", "raw", "reward"], rows)
