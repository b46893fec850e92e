"""Every strategy passes a small version of the gate, and the gate detects planted defects."""

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
)  # the absent variant also contains padding
BRIEF = dataclasses.replace(SMALL, steps=10)
OPTIONS = {"moe, top 1": known_answer.VARIANTS["moe, top 1"]}  # FiLM's 3×3 blocks: see test_formulas and the command


@pytest.mark.loop
@pytest.mark.spread
@pytest.mark.thorough(but=("late_mean", "weighted"))
@pytest.mark.parametrize("name", [*FUSIONS, *OPTIONS])
def test_gate_passes_every_strategy(name):
    strategy, options = OPTIONS.get(name, (name, {}))
    if "layers" in FUSIONS[strategy].__dataclass_fields__:
        options = {**options, "layers": 1}  # half the time to compile
    assert gate.check(FUSIONS[strategy], options, SMALL, modalities=(2,)).failures == ()


def without_training(kind, size=SMALL):
    return contract_checks.failures(gate.build(kind, None, size))


def after_training(kind, size=SMALL):
    cells, unmoved = gate.learn(gate.build(kind, None, size), 2, size)
    return unmoved + [cell.failure for cell in cells if cell.failure]


def has_failure(failures, *parts):
    return any(all(part in failure for part in parts) for failure in failures)


@pytest.mark.loop
def test_gate_detects_a_frozen_factor():
    failures = after_training(planted.Frozen, BRIEF)
    assert has_failure(failures, "factor", "no gradient")
    assert has_failure(failures, "factor", "does not change")


@pytest.mark.loop
def test_gate_detects_a_frozen_rank():
    assert has_failure(
        after_training(planted.FrozenRank, BRIEF),
        "part of 1 of the 10 indices of parameter fusion/factors",
        "no gradient",
    )


@pytest.mark.thorough
@pytest.mark.loop
def test_gate_trains_a_two_modality_strategy_with_two_modalities():
    report = gate.check(planted.Pair, size=BRIEF, modalities=(2, 3))
    assert {cell.modalities for cell in report.cells} == {2}
    assert not has_failure(report.failures, "any_modalities")


@pytest.mark.parametrize(("retrained_score", "failures"), [(0.95, 0), (0.6, 1)])
def test_gate_retrains_longer_after_a_low_score(monkeypatch, retrained_score, failures):
    steps = []

    def learn(strategy, modalities, size):
        steps.append(size.steps)
        score = 0.6 if len(steps) == 1 else retrained_score
        return [gate._cell(strategy, "redundant", modalities, "plain", score, size)], []

    monkeypatch.setattr(gate, "learn", learn)
    monkeypatch.setattr(contract_checks, "failures", lambda *_: [])
    report = gate.check(FUSIONS["mean"], size=BRIEF, modalities=(2,))
    assert steps == [10, 30]
    assert len(report.failures) == failures
    assert [cell.score for cell in report.cells] == [retrained_score]


def test_gate_detects_a_zero_gradient():
    assert has_failure(after_training(planted.Blocked, BRIEF), "branch_a", "no gradient")


def test_gate_detects_a_replaced_modality():
    failures = after_training(planted.FirstOnly)
    assert has_failure(failures, "unique_b, absent", "short of the Bayes rate")
    assert not has_failure(failures, "unique_a, absent")


@pytest.mark.parametrize("kind", [planted.Leaking, planted.Swapped])
def test_gate_detects_a_leaking_or_swapped_mask(kind):
    assert has_failure(without_training(kind), "masked positions")


@pytest.mark.thorough(but=("Biased-parts0", "LeakingInEvaluation-parts2", "AddsMasked-parts4", "Idle-parts6"))
@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        (planted.Biased, ("parameter project_b/bias gets a gradient where b is absent",)),
        (planted.Diluted, ("one more masked position", "in evaluation")),
        (planted.LeakingInEvaluation, ("values at masked positions", "in evaluation")),
        (planted.StraightThrough, ("masked positions of a get a gradient",)),
        (planted.AddsMasked, ("values at masked positions change the output or a gradient",)),
        (planted.Traced, ("jit differs from eager",)),
        (planted.Idle, ("M=1: parameter scores gets no gradient",)),
        (planted.SelfAttending, ("declares additive=False, but behaves as additive=True",)),
    ],
)
def test_gate_detects_contract_violations_without_training(kind, parts):
    assert has_failure(without_training(kind), *parts)


def test_gate_detects_dependence_on_other_rows():
    assert has_failure(without_training(planted.BatchDependent), "two devices")


def test_gate_detects_non_finite_values():
    assert has_failure(without_training(planted.Unstable), "NaN", "all absent")


def test_gate_detects_a_contradictory_declaration():
    class Both(FUSIONS["mean"]):
        declares = dataclasses.replace(FUSIONS["mean"].declares, synergy=True)

    class Refusing(planted.Pair):
        declares = FUSIONS["concat"].declares

    assert has_failure(without_training(Both), "additive and synergy, which exclude each other")
    assert has_failure(without_training(Refusing), "declares any_modalities=True, but rejects M=1, 3, 4")


@pytest.mark.thorough(but=("mean-change0", "concat-change3"))
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
def test_gate_detects_a_wrong_declaration(name, change):
    kind = FUSIONS[name]
    wrong = type(kind.__name__, (kind,), {"declares": dataclasses.replace(kind.declares, **change)})
    assert not has_failure(without_training(kind), *change)
    assert has_failure(without_training(wrong), *change)


def test_gate_checks_declared_and_undeclared_synergy():
    def cell(kind, score, task="synergy", **change):
        wrong = type(kind.__name__, (kind,), {"declares": dataclasses.replace(kind.declares, **change)})
        return gate._cell(gate.build(wrong, None, SMALL), task, 2, "plain", score, SMALL).failure

    mean, pool, product = FUSIONS["mean"], FUSIONS["attention_pool"], FUSIONS["product"]
    assert not cell(mean, 0.5)
    assert "declares no synergy" in cell(mean, 0.72)
    assert not cell(pool, 0.725)  # three of the four cells of XOR are separable without synergy
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


def test_every_strategy_declares_a_family():
    assert all(isinstance(kind.declares, Declaration) and kind.declares.family for kind in FUSIONS.values())


def run_command(monkeypatch, *argv):
    """Runs the gate's command in this process, whose flags include those of other commands."""
    monkeypatch.setattr("experiments.cli.parse", lambda argv: None)
    monkeypatch.setattr("experiments.cli.enable_compilation_cache", lambda: None)
    known_answer.flags.FLAGS(["known_answer", *argv])
    known_answer.main(["known_answer", *argv])


@pytest.mark.thorough
@pytest.mark.loop
def test_gate_command_prints_the_bayes_rate_and_writes_a_table(monkeypatch, capsys, tmp_path):
    size = dataclasses.replace(SMALL, variants=gate.VARIANTS)
    monkeypatch.setattr(known_answer, "MODALITIES", (1, 2))
    monkeypatch.setattr(known_answer, "check", lambda name: gate.check(FUSIONS[name], None, size, (1, 2)))
    run_command(monkeypatch, "--fusions=late_mean", f"--output={tmp_path}/table.md")
    assert "1 of 1 strategies hold what they declare" in capsys.readouterr().out
    table = (tmp_path / "table.md").read_text()
    assert "| Bayes rate | 95 84 | 50 50 | 95 95 92 | 95 95 84 |" in table
    assert "--fusions=late_mean" in table


def test_gate_command_exits_1_when_a_strategy_fails(monkeypatch, capsys):
    cell = gate.Cell("synergy", 2, "plain", 0.5, 0.95, "M=2 synergy, plain: 0.500, short of the Bayes rate 0.950")
    report = gate.Report((cell,), (cell.failure,), 1.0)
    monkeypatch.setattr(known_answer, "check", lambda name: report)
    with pytest.raises(SystemExit) as caught:
        run_command(monkeypatch, "--fusions=max", "--output=")
    assert caught.value.code == 1
    assert "max: M=2 synergy, plain: 0.500, short of" in capsys.readouterr().out
