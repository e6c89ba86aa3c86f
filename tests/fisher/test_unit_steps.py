import pytest
import torch

from fishertune_d2.fisher import UNITS, Selection, Units, find_candidates, steps_of_units


@pytest.mark.parametrize("unit", UNITS)
def test_every_unit_changes_the_loss_alike_to_second_order(vit, unit):
    model = vit()
    shapes = {c.name: tuple(c.parameter.shape) for c in find_candidates(model)}
    generator = torch.Generator().manual_seed(0)
    f = {name: torch.rand(shape, generator=generator) ** 6 for name, shape in shapes.items()}
    units = Units(unit, shapes)
    base = sum(p.numel() for p in model.parameters())
    selection = Selection.from_scores(units.mean(f), 0.05, base, units)
    steps = steps_of_units(f, selection)

    means = units.mean({name: value.double() for name, value in f.items()})
    total = weights = 0.0
    changes = []
    for name, mean in means.items():
        chosen = selection.indices[name]
        changes.append(mean.flatten()[chosen] * steps[name].double() ** 2)
        total += float(steps[name].sum()) * units.groups[name].size
        weights += len(chosen) * units.groups[name].size
    together = torch.cat(changes)
    torch.testing.assert_close(together, together[:1].expand_as(together), rtol=1e-4, atol=0)
    assert total / weights == pytest.approx(1.0, rel=1e-4)


def test_a_unit_without_information_moves_as_the_least_sensitive():
    selection = Selection.from_scores({"p": torch.tensor([4.0, 3.0, 2.0, 1.0])}, 0.75, 4)
    steps = steps_of_units({"p": torch.tensor([4.0, 1.0, 0.0, 9.0])}, selection)
    # F^(-1/2) is 1/2, 1 and, for F = 0, 1: their mean is 5/6.
    assert steps["p"].tolist() == pytest.approx([0.6, 1.2, 1.2])
    nothing = steps_of_units({"p": torch.zeros(4)}, selection)
    assert nothing["p"].tolist() == [1.0] * 3
