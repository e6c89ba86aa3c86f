"""Compares the selections that each form of the score makes from one Fisher estimate.

python -m fishertune_d2.analysis.forms OUTPUT_DIR [--share 0.05]
"""

import argparse
from pathlib import Path

from fishertune_d2.analysis.statistics import markdown_table
from fishertune_d2.command_line import ending_in_a_sentence
from fishertune_d2.fisher import (
    KINDS,
    FisherEstimate,
    Selection,
    domain_related_fisher,
    overlap,
    relative_change,
)
from fishertune_d2.fisher.score import FORMS
from fishertune_d2.run import Run


def select_by_each(estimate: FisherEstimate, share: float) -> dict[str, Selection]:
    """Selects by F alone, by dF alone, and by DRF in each form with its defaults.

    Args:
        estimate: The estimate, with F(x').
        share: The share of the candidates' tensors to select, in [0, 1].

    Returns:
        The selections, by the name of the score.
    """
    base = sum(value.numel() for value in estimate.values())
    scores = {"F": estimate.f, "dF": relative_change(estimate.f, estimate.shifted, eps=1e-8)}
    for form in FORMS:
        scores[form] = domain_related_fisher(estimate, form=form)
    return {name: Selection.from_scores(score, share, base) for name, score in scores.items()}


def table(selections: dict[str, Selection]) -> str:
    """Formats each selection's overlap with the others and its share of each kind, in percent."""
    lines = []
    for name, selection in selections.items():
        counts = selection.summary()
        total = sum(counts.values())
        kinds = [sum(n for (kind, _), n in counts.items() if kind == k) / total for k in KINDS]
        half = (1 + max(block for _, block in counts)) / 2
        deep = sum(n for (_, block), n in counts.items() if block >= half) / total
        common = [overlap(selection, other) for other in selections.values()]
        lines.append([name, *(f"{100 * value:.1f}" for value in [*common, *kinds, deep])])
    headers = ["selected by", *(f"% also by {name}" for name in selections)]
    headers += [*(f"% in {kind}" for kind in KINDS), "% in the deeper half"]
    return markdown_table(lines, headers)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("output_dir", type=Path, help="the OUTPUT_DIR of a run that estimated")
    parser.add_argument(
        "--share", type=float, default=0.05, help="the share of the candidates' tensors to select"
    )
    args = parser.parse_args()
    with ending_in_a_sentence():
        print(table(select_by_each(Run(args.output_dir).load_estimate(), args.share)))
