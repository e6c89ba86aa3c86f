"""The benchmark of the standard error of DRF's change, on small numbers."""

import importlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fishertune_d2.fisher import (
    FisherEstimate,
    Selection,
    StatisticsPerturbation,
    Units,
    domain_related_fisher,
    estimate_fisher,
    find_candidates,
)

ROOT = Path(__file__).resolve().parents[1]
SHAPES = {
    "blocks.0.mlp.fc1.weight": (60, 8),
    "blocks.0.mlp.fc1.bias": (60,),
    "blocks.0.mlp.fc2.weight": (8, 60),
    "blocks.0.mlp.fc2.bias": (8,),
}
BASE = 1028  # all of them


@pytest.fixture
def benchmark(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    return importlib.import_module("score_noise")


def _sums(benchmark, batches: int, seed: int, noise: float = 1.0):
    """Sums of made-up batches of four images, for weights and neurons."""
    same, other = (torch.Generator().manual_seed(each) for each in (0, seed))
    mean = {name: torch.rand(shape, generator=same) for name, shape in SHAPES.items()}
    gathered = {unit: benchmark.PairedSums() for unit in ("weight", "neuron")}
    for _ in range(batches):
        pair = [
            {n: m + noise * torch.rand(m.shape, generator=other) for n, m in mean.items()}
            for _ in "ab"
        ]
        for unit, sums in gathered.items():
            sums.add(*(Units(unit, SHAPES).mean(each) for each in pair), 4)
    return gathered


@pytest.mark.parametrize("parts", [(7,), (2, 5)])
def test_standard_errors_are_those_of_numpy(benchmark, parts):
    s, shifted = np.random.default_rng(0).random((2, 7, 3))
    total, first = benchmark.PairedSums(), 0
    for count in parts:
        part = benchmark.PairedSums()
        for k in range(first, first + count):
            part.add({"w": torch.tensor(s[k])}, {"w": torch.tensor(shifted[k])}, 4)
        total.join(part)
        first += count
    estimate = total.estimate()
    assert (total.batches, estimate.images) == (7, 28)
    np.testing.assert_allclose(estimate.f["w"], s.mean(0) / 4)
    np.testing.assert_allclose(estimate.shifted["w"], shifted.mean(0) / 4)
    paired = np.std((shifted - s) / 4, 0, ddof=1) / np.sqrt(7)
    np.testing.assert_allclose(total.standard_errors()["w"], paired)
    unpaired = np.sqrt((np.var(s / 4, 0, ddof=1) + np.var(shifted / 4, 0, ddof=1)) / 7)
    np.testing.assert_allclose(total.standard_errors(paired=False)["w"], unpaired)


def test_one_batch_has_no_standard_error(benchmark):
    sums = _sums(benchmark, 1, seed=1)["weight"]
    with pytest.raises(ValueError, match="two batches: got 1"):
        sums.standard_errors()


def test_the_sums_are_those_of_each_batch_of_an_estimate(
    benchmark, vit, images, loss, one_thread, tmp_path
):
    model, pictures = vit(dtype=torch.float64), images(9)
    batches = [pictures[i : i + 3] for i in (0, 3, 6)]

    def estimate(some, estimator):
        perturb = StatisticsPerturbation(
            [model.patch_embed, model.blocks[0]], num_prefix_tokens=[0, 1], eps_mode="channel"
        )
        candidates = find_candidates(model)
        return estimate_fisher(
            model, some, loss, candidates, estimator=estimator, perturb=perturb, seed=5
        )

    gathered, found = benchmark.gather(batches, estimate)
    # The batch k alone is the estimate until k without the one until k - 1, in float64.
    until = [estimate(batches[:k], "diagonal_loop") for k in (1, 2, 3)]
    assert found.shift_weight == until[-1].shift_weight
    units, largest = Units("neuron", until[-1].shapes), 0.0
    for unit, sums in gathered.items():
        each = [e if unit == "weight" else e.by_unit(units) for e in until]
        for name, f in each[-1].f.items():
            totals = [[torch.zeros_like(f)] * 2]
            totals += [[e.f[name] * e.images, e.shifted[name] * e.images] for e in each]
            s, shifted = np.diff(
                np.array([[t.numpy() for t in pair] for pair in totals]), axis=0
            ).swapaxes(0, 1)
            own = {quantity: values[name] for quantity, values in sums.sums.items()}
            np.testing.assert_allclose(own["plain"], s.sum(0), rtol=1e-8, atol=1e-14)
            np.testing.assert_allclose(own["shifted"], shifted.sum(0), rtol=1e-8, atol=1e-14)
            squares = ((shifted - s) ** 2).sum(0)
            np.testing.assert_allclose(own["squares"], squares, rtol=1e-6, atol=1e-20)
            unpaired = (s**2 + shifted**2).sum(0)
            np.testing.assert_allclose(own["unpaired"], unpaired, rtol=1e-6, atol=1e-20)
            largest = max(largest, squares.max())
    assert largest > 1e-10  # so that the tolerances above mean something
    # A file gives back the same sums, in the same order.
    benchmark.save(tmp_path / "sums.safetensors", gathered, base=7)
    for unit, sums in gathered.items():
        read, notes = benchmark.load(tmp_path / "sums.safetensors", unit)
        assert (notes["base"], read.images, read.batches) == (7, 9, 3)
        for quantity, values in sums.sums.items():
            assert list(values) == list(read.sums[quantity])
            assert all(torch.equal(v, read.sums[quantity][n]) for n, v in values.items())


@pytest.mark.parametrize(
    ("z", "expected"),
    [
        (0.0, [5.0, 0.0, 3.0, 1.0]),
        (0.5, [4.5, 0.5, 2.5, 1.0]),
        (2.0, [3.0, 2.0, 2.0, 1.0]),
        (9.0, [2.0, 2.0, 2.0, 1.0]),
    ],
)
def test_a_change_shrinks_by_its_standard_error_and_not_beyond_f(benchmark, z, expected):
    f, shifted = torch.tensor([2.0, 2.0, 2.0, 1.0]), torch.tensor([5.0, 0.0, 3.0, 1.0])
    estimate = FisherEstimate({"w": f}, {"w": shifted}, 0.3, 4)
    found = benchmark.shrunk(estimate, {"w": torch.ones(4)}, z)
    assert found.shifted["w"].tolist() == expected
    assert torch.equal(found.f["w"], f)


def test_the_signal_to_noise_is_the_change_in_standard_errors(benchmark):
    estimate = FisherEstimate(
        {"w": torch.tensor([2.0, 2.0, 1.0])}, {"w": torch.tensor([5.0, 1.0, 1.0])}, 0.3, 4
    )
    found = benchmark.signal_to_noise(estimate, {"w": torch.tensor([2.0, 0.5, 0.0])})
    assert found["w"].tolist() == [1.5, 2.0, 0.0]


def _write_parts(benchmark, folder: Path, marks=(32, 64), noise: float = 1.0) -> None:
    (folder / "score_noise").mkdir(exist_ok=True)
    for half in (0, 1):
        before = 0
        for mark in marks:
            gathered = _sums(benchmark, (mark - before) // 4, seed=mark + half, noise=noise)
            benchmark.save(benchmark.part_file(folder, 43, half, mark), gathered, base=BASE)
            before = mark


def test_the_rows_compare_halves_f_and_the_truth(benchmark, tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SAMPLED", 1)
    _write_parts(benchmark, tmp_path)
    benchmark.compare(tmp_path)
    result = json.loads((tmp_path / "score_noise.json").read_text())
    scores = 2 + len(benchmark.ZS) * 3 + len(benchmark.MORE_RHOS)
    assert len(result["rows"]) == 2 * 2 * scores  # units, numbers of images
    for row in result["rows"]:
        assert row["truth_images"] == 64
        if row["score"] == "F":
            assert row["with_f"] == 1.0
        if row["z"] == 0 and row["images"] == 64 and str(row["rho"]) in row["with_truth"]:
            assert row["with_truth"][str(row["rho"])] == pytest.approx(row["halves"])
    # An oracle for one row: DRF by hand from the joined sums, selected by a sort.
    row = next(
        r for r in result["rows"]
        if (r["unit"], r["images"], r["rho"], r["z"]) == ("weight", 64, 0.1, 1.0)
    )  # fmt: skip
    chosen, by_f = [], []
    for half in (0, 1):
        sums, _ = benchmark.read_half(tmp_path, 43, half, 64, "weight")
        estimate, errors = sums.estimate(), sums.standard_errors()
        change = {n: estimate.shifted[n] - f for n, f in estimate.f.items()}
        nearer = {
            n: f + change[n].sign() * (change[n].abs() - errors[n]).clamp_min(0)
            for n, f in estimate.f.items()
        }
        drf = domain_related_fisher(
            FisherEstimate(estimate.f, nearer, importlib.import_module("fisher").SHIFT_WEIGHT, 64),
            rho=0.1,
        )
        for scores, places in ((drf, chosen), (estimate.f, by_f)):
            flat = torch.cat([each.flatten() for each in scores.values()])
            places.append(set(flat.argsort(descending=True)[: BASE // 20].tolist()))
    assert row["halves"] == pytest.approx(len(chosen[0] & chosen[1]) / len(chosen[0]))
    with_f = sum(len(a & b) / len(a) for a, b in zip(chosen, by_f, strict=True)) / 2
    assert row["with_f"] == pytest.approx(with_f)


def test_a_comparison_goes_on_where_a_measurement_did(benchmark, tmp_path):
    _write_parts(benchmark, tmp_path, marks=(32,))
    benchmark.compare(tmp_path)
    file = tmp_path / "score_noise.json"
    assert {row["truth_images"] for row in json.loads(file.read_text())["rows"]} == {32}
    _write_parts(benchmark, tmp_path)
    benchmark.compare(tmp_path)
    longer = file.read_text()
    assert {row["truth_images"] for row in json.loads(longer)["rows"]} == {64}
    benchmark.compare(tmp_path)
    assert file.read_text() == longer


def test_standard_errors_of_independent_halves_are_calibrated(benchmark):
    halves = [_sums(benchmark, 80, seed=seed)["weight"] for seed in (1, 2)]
    for sums in halves:
        for quantity, values in sums.sums.items():
            sums.sums[quantity] = {"all": torch.cat([v.flatten() for v in values.values()])}
    found = benchmark.noise(halves)
    assert found["between"] == pytest.approx(0.6745, abs=0.06)
    assert found["paired"] == pytest.approx(1.0, abs=0.03)  # the noise of x and x' is independent
    assert found["above_2"] == pytest.approx(0.046, abs=0.02)


def test_neurons_are_ranked_as_a_selection_ranks_them(benchmark, tmp_path):
    _write_parts(benchmark, tmp_path)
    sums, ranked = benchmark.read_half(tmp_path, 43, 0, 64, "neuron")
    units = Units("neuron", SHAPES)
    scores = {"blocks.0.FFN": sums.estimate().f["all"]}
    selection = Selection.from_scores(scores, benchmark.SHARE, BASE, units)
    (places,) = selection.indices.values()
    best = ranked.best(scores["blocks.0.FFN"]).nonzero().flatten()
    assert best.tolist() == sorted(places.tolist())
    assert ranked.sizes.tolist() == [17] * 60


def _row(seed: int, score: str, rho: float | None, z: float | None, *overlaps: float) -> dict:
    halves, with_f, truth = overlaps
    key = {"seed": seed, "unit": "neuron", "images": 64, "truth_images": 128}
    row = {**key, "score": score, "rho": rho, "z": z, "halves": halves, "with_f": with_f}
    return {**row, "with_truth": {"0.01": truth, "0.1": truth, "1.0": truth}}


def test_the_tables_have_means_over_seeds_and_a_larger_rho_at_the_same_overlap(benchmark, capsys):
    tables = importlib.import_module("fisher_tables")
    rows = [
        row
        for seed, more in ((43, 0.0), (44, 0.2))
        for row in (
            _row(seed, "F", None, None, 0.7, 1.0, 0.4),
            _row(seed, "DRF", 0.01, 0.0, 0.4 + more, 0.5, 0.3),
            _row(seed, "DRF", 0.1, 0.0, 0.6 + more, 0.7, 0.4),
            _row(seed, "DRF", 1.0, 0.0, 0.7 + more, 0.9, 0.2),
            _row(seed, "DRF", 0.01, 0.5, 0.6 + more, 0.55, 0.5),
            _row(seed, "DRF", 0.01, 1.0, 0.6 + more, 0.95, 0.5),
        )
    ]
    errors = {"paired": 0.9, "between": 0.8, "above_0.5": 0.6, "above_1": 0.5, "above_2": 0.4}
    noise = [{"seed": seed, "unit": "neuron", "images": 64, **errors} for seed in (43, 44)]
    tables._noise({"rows": rows, "noise": noise})
    lines = [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in capsys.readouterr().out.splitlines()
    ]
    seeds = "43, 44"
    assert [seeds, "neuron", "DRF", "0.01", "0.5", "0.700", "0.550", *["0.500"] * 3] in lines
    # Between rho 0.01 and 0.1, a quarter of the way: 0.5 + 0.2 / 4 and 0.3 + 0.1 / 4.
    assert [
        seeds,
        "neuron",
        "128",
        "64",
        "0.5",
        "0.550",
        "0.700",
        "0.550",
        "0.500",
        "0.325",
    ] in lines
    # No rho of the table has so much in common with F, up to F itself: 0.8 + (0.7 - 0.8) / 2.
    assert [
        seeds,
        "neuron",
        "128",
        "64",
        "1.0",
        "0.950",
        "0.700",
        "0.750",
        "0.500",
        "0.300",
    ] in lines
    assert [seeds, "neuron", "64", "0.90", "0.80", "0.60", "0.50", "0.40"] in lines


def test_the_page_has_the_committed_numbers(benchmark, capsys):
    tables = importlib.import_module("fisher_tables")
    measured = json.loads((ROOT / "docs/results/fisher/score_noise.json").read_text())
    tables._noise(measured)
    page = (ROOT / "docs/results/fisher.md").read_text()
    for table in capsys.readouterr().out.strip().split("\n\n"):
        assert table in page
    assert {row["z"] for row in measured["rows"]} == {None, *benchmark.ZS}
