#!/usr/bin/env python
"""Writes the costs of configs into their heads, below the line "Tunes:" or "Adds:".

python tools/config_costs.py                     # the models trained on GTAV or Cityscapes
python tools/config_costs.py configs/full_sam.yaml ...
"""

import re
import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from fishertune_d2.command_line import ending_in_a_sentence  # noqa: E402 - need not be installed
from fishertune_d2.config import read_config  # noqa: E402
from fishertune_d2.plan import make_plan, summary  # noqa: E402


def rewrite(text: str, costs: str) -> str:
    """Replaces the costs in the head of a config.

    Args:
        text: The config.
        costs: The sentence that the plan writes.

    Returns:
        The config with the new costs.

    Raises:
        ValueError: If the head has no line "# Tunes: ..." or "# Adds: ...".
    """
    text = re.sub(r"^# Costs, .*?(?=^# [A-Z][a-z ]*:)", "", text, flags=re.MULTILINE | re.DOTALL)
    lines = "\n".join(f"# {line}" for line in textwrap.wrap(costs, width=98))
    above = re.compile(r"^(# (?:Tunes|Adds): .*\n)", flags=re.MULTILINE)
    text, found = above.subn(rf"\g<1>{lines}\n", text)
    if not found:
        raise ValueError('the head has no line "# Tunes: ..." or "# Adds: ..." to write below')
    return text


def main(files: list[str]) -> None:
    """Rewrites ``files``, or the configs of all models that are trained on GTAV or Cityscapes."""
    configs = ROOT / "configs"
    every = [*configs.glob("*_*.yaml"), *configs.glob("cityscapes/*_*.yaml")]
    for path in [Path(file) for file in files] or sorted(every):
        plan = make_plan(read_config(str(path), ["DATASETS.TEST", "()"]))  # only the training
        costs = summary(plan)
        path.write_text(rewrite(path.read_text(), costs))
        print(f"{path}: {costs}")


if __name__ == "__main__":
    with ending_in_a_sentence():
        main(sys.argv[1:])
