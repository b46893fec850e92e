"""Every strategy passes a small form of the gate; what is planted is caught."""

import dataclasses
import re
from pathlib import Path

import pytest

from experiments import gate as known_answer
from mmfusion.analysis.gate import contract_checks, gate
from mmfusion.models import fusion
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.fusion.contract import Declaration
from tests.analysis.gate import planted

SMALL = gate.Size(
    width=8, tokens=4, heads=2, batch=32, steps=300, learning_rate=1e-2, rows=1024, variants=("absent",)
)  # that variant has the others' padding too
BRIEF = dataclasses.replace(SMALL, steps=10)
OPTIONS = {"moe, top 1": known_answer.VARIANTS["moe, top 1"]}  # FiLM's 3×3 blocks have their rendering, and the command


FIRST = {kind.declares.family: name for name, kind in reversed(FUSIONS.items())}.values()  # of each family


@pytest.mark.spread
@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.thorough if name not in FIRST else ()) for name in [*FUSIONS, *OPTIONS]],
)
def test_a_strategy_is_what_it_declares(name):
    strategy, options = OPTIONS.get(name, (name, {}))
    if "layers" in FUSIONS[strategy].__dataclass_fields__:
        options = {**options, "layers": 1}  # half the time to compile
    assert gate.check(FUSIONS[strategy], options, SMALL, modalities=(2,)).failures == ()


def without_training(kind, size=SMALL):
    return contract_checks.failures(gate.build(kind, None, size))


def after_training(kind, size=SMALL):
    cells, unmoved = gate.learn(gate.build(kind, None, size), 2, size)
    return unmoved + [cell.failure for cell in cells if cell.failure]


def said(failures, *parts):
    return any(all(part in failure for part in parts) for failure in failures)


def test_a_frozen_factor_is_caught():
    failures = after_training(planted.Frozen, BRIEF)
    assert said(failures, "factor", "no gradient")
    assert said(failures, "factor", "does not change")


def test_a_frozen_rank_is_caught():
    assert said(
        after_training(planted.FrozenRank, BRIEF),
        "part of 1 of the 10 indices of parameter fusion/factors",
        "no gradient",
    )


def test_a_strategy_for_two_modalities_is_learned_with_two():
    report = gate.check(planted.Pair, size=BRIEF, modalities=(2, 3))
    assert {cell.modalities for cell in report.cells} == {2}
    assert not said(report.failures, "any_modalities")


@pytest.mark.parametrize(("late", "failures"), [(0.95, 0), (0.6, 1)])
def test_what_falls_short_is_trained_once_more_and_longer(monkeypatch, late, failures):
    steps = []

    def learn(strategy, modalities, size):
        steps.append(size.steps)
        score = 0.6 if len(steps) == 1 else late
        return [gate._cell(strategy, "redundant", modalities, "plain", score, size)], []

    monkeypatch.setattr(gate, "learn", learn)
    monkeypatch.setattr(contract_checks, "failures", lambda *_: [])
    report = gate.check(FUSIONS["mean"], size=BRIEF, modalities=(2,))
    assert steps == [10, 30]
    assert len(report.failures) == failures
    assert [cell.score for cell in report.cells] == [late]


def test_a_gradient_that_is_zero_is_caught():
    assert said(after_training(planted.Blocked, BRIEF), "branch_a", "no gradient")


def test_a_modality_in_place_of_another_is_caught():
    failures = after_training(planted.Deaf)
    assert said(failures, "unique_b, absent", "short of the Bayes rate")
    assert not said(failures, "unique_a, absent")


@pytest.mark.parametrize("kind", [planted.Leaking, planted.Swapped])
def test_a_leaking_or_swapped_mask_is_caught(kind):
    assert said(without_training(kind), "masked positions")


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (planted.Biased, ("parameter project_b/bias gets a gradient where b is absent",)),
        (planted.Diluted, ("one more masked position", "in evaluation")),
        (planted.LeakingInEvaluation, ("values at masked positions", "in evaluation")),
        (planted.StraightThrough, ("masked positions of a get a gradient",)),
        (planted.OfFinite, ("values at masked positions change the output or a gradient",)),
        (planted.Traced, ("jit differs from eager",)),
        (planted.Idle, ("M=1: parameter scores gets no gradient",)),
        pytest.param(
            planted.SelfAttending,
            ("declares additive=False, but behaves as additive=True",),
            marks=pytest.mark.thorough,
        ),
    ],
)
def test_what_shows_without_training_is_caught(kind, parts):
    assert said(without_training(kind), *parts)


def test_what_rows_tell_of_each_other_is_caught():
    assert said(without_training(planted.OfTheBatch), "two devices")


def test_numbers_that_are_not_finite_are_caught():
    assert said(without_training(planted.Unsteady), "NaN", "all absent")


def test_a_declaration_that_contradicts_itself_is_caught():
    class Both(FUSIONS["mean"]):
        declares = dataclasses.replace(FUSIONS["mean"].declares, synergy=True)

    class Refusing(planted.Pair):
        declares = FUSIONS["concat"].declares

    assert said(without_training(Both), "additive and synergy, which exclude each other")
    assert said(without_training(Refusing), "declares any_modalities=True, but rejects M=1, 3, 4")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("mean", {"additive": False}),
        ("product", {"additive": True}),
        ("mean", {"symmetric": False}),
        ("concat", {"symmetric": True}),
        ("mean", {"needs_tokens": True}),
        ("deepsets", {"needs_tokens": False}),
        ("mean", {"any_modalities": False}),
    ],
)
def test_a_wrong_declaration_is_caught_both_ways(name, change):
    kind = FUSIONS[name]
    wrong = type(kind.__name__, (kind,), {"declares": dataclasses.replace(kind.declares, **change)})
    assert not said(without_training(kind), *change)
    assert said(without_training(wrong), *change)


def test_synergy_is_declared_both_ways():
    def cell(kind, score, task="synergy", **change):
        wrong = type(kind.__name__, (kind,), {"declares": dataclasses.replace(kind.declares, **change)})
        return gate._cell(gate.build(wrong, None, SMALL), task, 2, "plain", score, SMALL).failure

    mean, pool, product = FUSIONS["mean"], FUSIONS["attention_pool"], FUSIONS["product"]
    assert not cell(mean, 0.5)
    assert "declares no synergy" in cell(mean, 0.72)
    assert not cell(pool, 0.725)  # three of the four cells of XOR, which is not XOR
    assert "declares no synergy" in cell(pool, 0.95)
    assert "declares no synergy" in cell(product, 0.95, synergy=False)
    assert "short of the Bayes rate" in cell(mean, 0.5, synergy=True)
    assert "above chance" in cell(mean, 0.6, task="none")
    assert not cell(mean, 0.52, task="none")


def test_readme_strategy_passes_the_gate():
    readme = Path(fusion.__file__).with_name("README.md").read_text()
    (example,) = re.findall(r"```python\n(.*?)```", readme, re.DOTALL)
    assert len(example.splitlines()) < 25
    names = {}
    exec(example, names)
    assert gate.check(names["GatedProduct"], size=SMALL, modalities=(2,)).failures == ()


def test_every_family_is_named():
    assert all(isinstance(kind.declares, Declaration) and kind.declares.family for kind in FUSIONS.values())


def run_command(monkeypatch, *argv):
    """Runs the gate's command in this process, which has the flags of other commands, too."""
    monkeypatch.setattr("experiments.cli.parse", lambda argv: None)
    monkeypatch.setattr("experiments.cli.enable_compilation_cache", lambda: None)
    known_answer.flags.FLAGS(["known_answer", *argv])
    known_answer.main(["known_answer", *argv])


def test_the_command_prints_the_bayes_rate_and_writes_the_table(monkeypatch, capsys, tmp_path):
    size = dataclasses.replace(SMALL, variants=gate.VARIANTS)
    monkeypatch.setattr(known_answer, "MODALITIES", (1, 2))
    monkeypatch.setattr(known_answer, "check", lambda name: gate.check(FUSIONS[name], None, size, (1, 2)))
    run_command(monkeypatch, "--fusions=late_mean", f"--output={tmp_path}/table.md")
    assert "1 of 1 strategies hold what they declare" in capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert "| Bayes rate | 95 84 | 50 50 | 95 95 92 | 95 95 84 |" in table
    assert "--fusions=late_mean" in table


def test_the_command_exits_1_where_a_strategy_misses(monkeypatch, capsys):
    cell = gate.Cell("synergy", 2, "plain", 0.5, 0.95, "M=2 synergy, plain: 0.500, short of the Bayes rate 0.950")
    missed = gate.Report((cell,), (cell.failure,), 1.0)
    monkeypatch.setattr(known_answer, "check", lambda name: missed)
    with pytest.raises(SystemExit) as stop:
        run_command(monkeypatch, "--fusions=max", "--output=")
    assert stop.value.code == 1
    assert "max: M=2 synergy, plain: 0.500, short of" in capsys.readouterr().out
