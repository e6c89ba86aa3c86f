import torch

from fishertune_d2.analysis.forms import select_by_each, table
from fishertune_d2.fisher import FisherEstimate


def test_selections_and_what_they_have_in_common():
    q = torch.tensor([[8.0], [0.0], [0.0]])  # rows of Q, K and V
    fc = torch.tensor([[1.0], [2.0]])
    name, other = "blocks.0.attn.qkv.weight", "blocks.1.mlp.fc1.weight"
    f = {name: q, other: fc}
    shifted = {name: q + 0.001 * (q > 0), other: torch.tensor([[1.5], [6.0]])}
    selections = select_by_each(FisherEstimate(f, shifted, 0.5, 1), 0.2)
    chosen = {
        key: [(n, int(i)) for n, places in s.indices.items() for i in places]
        for key, s in selections.items()
    }
    assert chosen["F"] == [(name, 0)]
    assert chosen["dF"] == [(other, 1)]
    assert chosen["eq15"] == chosen["F"]
    header, _, first, second, *_ = table(selections).splitlines()
    titles = [cell.strip() for cell in header.strip("|").split("|")]
    by_f = dict(zip(titles, [c.strip() for c in first.strip("|").split("|")], strict=True))
    by_change = dict(zip(titles, [c.strip() for c in second.strip("|").split("|")], strict=True))
    assert (by_f["selected by"], by_f["% also by F"], by_f["% also by dF"]) == ("F", "100.0", "0.0")
    assert (by_f["% in Q"], by_f["% in FFN"], by_f["% in the deeper half"]) == (
        "100.0",
        "0.0",
        "0.0",
    )
    assert (by_change["% in FFN"], by_change["% in the deeper half"]) == ("100.0", "100.0")
