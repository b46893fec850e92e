"""The report of an ablation: every claim is included, nothing is loaded, and missing sections give the reason."""

import dataclasses
import functools
import html
import json
import re

import matplotlib
import numpy as np
import pytest

from mmfusion.analysis import report
from mmfusion.analysis.ablation import plan as plans
from mmfusion.analysis.ablation import runner
from mmfusion.analysis.claims import selection
from mmfusion.analysis.claims.claims import claims
from mmfusion.analysis.claims.differences import Scope
from mmfusion.analysis.claims.selection import MethodResult
from mmfusion.analysis.claims.undertrained import Training
from mmfusion.analysis.outcome import Outcome
from mmfusion.analysis.probing import attention, calibration
from mmfusion.analysis.probing.attention import ExampleView
from mmfusion.analysis.report import aggregation, example_views, missing_table, plots, tables
from mmfusion.analysis.report.context import ReportContext
from mmfusion.analysis.report.sections import SECTIONS
from mmfusion.errors import UserError
from mmfusion.inference import shapley
from tests import tiny

pytestmark = pytest.mark.usefixtures("traced_once")

SEEDS = 8  # the fewest seeds that distinguish three strategies from a fourth
LEVELS = {"gmu": 0.92, "concat": 0.85, "film": 0.855, "mean": 0.6, "image alone": 0.55, "text alone": 0.5}
COMMAND = "python -m experiments.ablate --config=configs/quickstart.py --match=parameters --workdir=/runs/a_b"
NAMES = ["image", "text"]
RISKS = {"area": 0.031, "risks": [0.01 * i for i in range(20)]}
SETTINGS = dict(matplotlib.rcParams)  # before any plot


def scores(method, seed, level):
    return level + (0.02 * (-1) ** seed if method == "film" else 0.001 * seed)  # film's differences have both signs


def probe_result(level, sign, seed, names=NAMES):
    subsets = {kept: sign * (level * len(kept) / len(names) + 0.01 * seed) for kept in shapley.subsets(names)}
    bins = {"count": [10, 20], "confidence": [0.61, 0.95], "accuracy": [0.5, 0.9]}
    half = {"nll": 0.3, "ece": 0.05, "ece_equal_mass": 0.04, "bins": bins}
    pair = {"whole": [sign * level] * 3, "additive": [sign * level / 2] * 3}
    return {
        "metric": "accuracy" if sign > 0 else "nll", "sign": sign, "severities": [0.0, 0.5, 1.0],
        "rows": 64, "paired": 32, "corrupted": 16,
        "subsets": {"+".join(kept): value for kept, value in subsets.items()},
        "shapley": shapley.shapley(subsets),
        "missing": {"0.0": sign * level, "0.5": sign * level / 2},
        "imbalanced": dict.fromkeys(names, sign * level * 0.7),
        "detection": {"image": {"blur": 0.75}},
        "perceptual": dict.fromkeys(names, 0.2 + 0.01 * seed) if sign > 0 else {},
        "interaction": {"image": pair} if len(names) > 1 else {},
        "corruption": {"image": {"blur": [sign * level, sign * 0.9 * level, sign * 0.5 * level]}},
        "cost": {"flops": 2.5e6, "memory": None},
        "calibration": {"label": {"temperature": 1.5, "before": half, "after": half, "selective": RISKS}},
    }  # fmt: skip


def make(modalities, fusion, seed, alone):
    kept = alone or modalities
    return tiny.config(f"seed={seed}" + f",fusion={fusion}" * bool(fusion) + f",modalities={kept}" * bool(kept))


def ablation(
    directory, *, seeds=SEEDS, metric="accuracy", modalities="", rename=None, probed=True, errors=(), published=()
):
    """Returns an outcome and its plan, and writes the trials' metric files to the directory."""
    plan = plans.build(functools.partial(make, modalities), ["mean", "gmu", "film", "concat"], seeds, {})
    trials = tuple(dataclasses.replace(c, method=(rename or {}).get(c.method, c.method)) for c in plan.trials)
    plan, old = dataclasses.replace(plan, trials=trials), {v: k for k, v in (rename or {}).items()}
    higher = metric == "accuracy"
    results, probes = {}, {}
    for trial in plan.trials:
        level = LEVELS[old.get(trial.method, trial.method)]
        value = scores(old.get(trial.method, trial.method), trial.config["seed"], level if higher else 1 - level)
        results[trial.name] = {
            "valid": {metric: value}, "test": {metric: value}, "parameters": 1000, "examples_per_second": 50.0,
            "data": {"name": "shapes/match", "fingerprint": "f00d", "examples": {"train": 256}},
            "device": "1 x cpu", "versions": {"jax": "0.0"},
        }  # fmt: skip
        if probed and not trial.unimodal_baseline:
            score = level if higher else 1 - level
            names = NAMES[: 1 if modalities else 2]
            probes[trial.name] = probe_result(score, 1 if higher else -1, trial.config["seed"], names)
        folder = runner.trial_directory(directory, trial)
        folder.mkdir(parents=True)
        lines = [{"step": step, "split": "valid", metric: value * step / 8} for step in (4, 8)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 9, "sp')
    classical = [MethodResult("linear_svm, text", True, {"C": 1.0}, (), tuple(range(seeds)), (), (0.5,) * seeds,
                     (0.5,) * seeds, None)] * higher  # fmt: skip
    found = selection.method_results(plan.trials, results, metric)
    made_claims = claims(found, classical, probes, {}, metric, higher)
    return Outcome(
        metric, higher, (*found, *classical), made_claims, results, probes, dict(errors), dict(published)
    ), plan


def example_view(attending):
    weights = {("text", "image"): np.ones((2, 16)), ("image", "text"): np.ones((16, 2))} if attending else {}
    text = {"text": ["red", "cross"]} if attending else {}
    return ExampleView(7, "true", "false", {"image": np.zeros((32, 32, 3), np.uint8), **text}, weights)


@pytest.fixture(autouse=True)
def examples(monkeypatch):
    """Replaces the examples of a trained model."""
    monkeypatch.setattr(attention, "examples", lambda workdir: [example_view(False)])


@pytest.fixture(scope="module")
def report_files(tmp_path_factory):
    """Returns the outcome, plan and directory of a report with every section."""
    directory = tmp_path_factory.mktemp("report")
    failed = {"film_seed=9": "ValueError: a|b <script>alert(1)</script>"}
    outcome, plan = ablation(directory, errors=failed, published={"an article's CNN": 0.6012})
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "examples", lambda workdir: [example_view(True)])
        report.write(outcome, plan, directory, COMMAND, lambda trial: f"train {trial.name}", latex=True)
    return outcome, plan, directory


def visible_text(page):
    """Returns the visible text of a page, without markup."""
    body = re.sub(r"<style>.*?</style>", "", page[page.index("<body>") :], flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", body)).split())


def read(directory, name="report.html"):
    return (directory / name).read_text(encoding="utf-8")


def test_report_contains_every_claim(report_files):
    outcome, plan, directory = report_files
    page, text = visible_text(read(directory)), re.sub(r"\\(.)|`", r"\1", read(directory, "report.md"))
    markdown = " ".join(read(directory, "report.md").split())
    assert COMMAND.replace(" --", " \\ --") in page and COMMAND.replace(" --", " \\ --") in markdown
    assert {s.verdict for s in outcome.claims.statements} >= {"better", "worse", "cannot tell"}
    for part in (
        *(s.text for s in outcome.claims.statements),
        *(row.method for row in outcome.methods),
        *("better", "worse", "cannot tell"),
        *(outcome.claims.rule.replace("`", ""), plan.code, "fingerprint f00d", "1 x cpu"),
        *("train gmu_seed=0", "Published scores", "an article's CNN", "0.6012"),
    ):
        assert part in page, part
        assert part in text, part
    assert page.count("Figure ") >= 9 and "Not available" not in page
    assert sorted(path.name for path in directory.iterdir()) == ["report.html", "report.md", "table.tex", "trials"]


def test_report_loads_no_external_resources(report_files):
    page = read(report_files[2])
    addresses = re.findall(r"""(?:src|href)\s*=\s*["']?([^"'\s>]+)|url\(([^)]*)\)|@import""", page)
    assert addresses
    for one, other in addresses:
        assert (one or other).startswith(("data:", "#")), one or other
    assert not re.search(r"<(script|link|iframe|object)\b", page)


def test_report_escapes_names_and_errors(tmp_path, report_files):
    outcome, plan = ablation(tmp_path, rename={"film": "film <b>|$x$_%"})
    report.write(outcome, plan, tmp_path, "ablate '<i>&'", latex=True)
    for page in (read(tmp_path), read(report_files[2])):
        assert "<b>|$x$" not in page and "<script" not in page and "<i>" not in page
    assert "film <b>|$x$_%" in visible_text(read(tmp_path)) and "ablate '<i>&'" in visible_text(read(tmp_path))
    assert read(tmp_path).count("film &lt;b&gt;|$x$_%") > 5  # in the figures, too
    assert r"film \<b\>\|$x$_% |" in read(tmp_path, "report.md")
    assert r"film \textless{}b\textgreater{}\textbar{}\$x\$\_\%" in read(tmp_path, "table.tex")
    assert "ValueError: a|b <script>alert(1)</script>" in visible_text(read(report_files[2]))


def test_report_says_how_methods_were_tuned(tmp_path, report_files):
    for name in ("report.html", "report.md"):
        text = read(report_files[2], name)
        assert "methods were not tuned" in text and "none; one optimizer" in text
    outcome, plan = ablation(tmp_path, probed=False)
    setting = {"optim.learning_rate": 0.00358, "model.*.dropout": 0.5}
    chosen = {"values": setting, "valid": 0.9, "settings": 8, "failed": 0}
    space = {"optim.learning_rate": "0.0003 to 0.01 (log)", "model.*.dropout": "0 to 0.5"}
    tuned = {"trials": 8, "seeds": [1000, 1001], "space": space, "metric": "accuracy", "chosen": {"gmu": chosen}}
    methods = tuple(dataclasses.replace(row, selected=setting) for row in outcome.methods)
    outcome = dataclasses.replace(outcome, methods=methods, tuning=tuned, errors={"gmu_setting=0_seed=1000": "no"})
    report.write(outcome, plan, tmp_path, COMMAND)
    page, text = visible_text(read(tmp_path)), read(tmp_path, "report.md")
    for part in ("8 trials of each method, with seeds 1000 to 1001, 1 failed", "learning_rate 0.00358"):
        assert part in page and part in text, part
    assert "`model.*.dropout` 0 to 0.5" in text and "model.*.dropout 0 to 0.5" in page
    assert "6 methods and 8 seeds" in text and "dropout 0.5" in text


def test_report_names_undertrained_methods(tmp_path):
    outcome, plan = ablation(tmp_path, probed=False)
    late = {trial.name: Training(8, 8, ((4, 0.5), (8, 0.9))) for trial in plan.trials if trial.method == "gmu"}
    made = claims(outcome.methods[:6], [], {}, {}, "accuracy", True, Scope(training=late))
    report.write(dataclasses.replace(outcome, claims=made), plan, tmp_path, COMMAND)
    page, text = visible_text(read(tmp_path)), read(tmp_path, "report.md")
    assert "| gmu, best on validation, undertrained |" in text and "best on validation, undertrained" in page
    assert "cannot tell: undertrained" in text and "Undertrained, so that no claim rests on them: gmu (" in page


@pytest.mark.parametrize("metric", ["accuracy", "nll"])
def test_report_orders_methods_best_first(tmp_path, metric):
    outcome, plan = ablation(tmp_path, metric=metric, probed=False)
    report.write(outcome, plan, tmp_path, COMMAND)
    table = read(tmp_path).split('<table class="methods">')[1].split("</table>")[0]
    order = [name for name in re.findall(r"<th scope=row[^>]*>([\w ,]+)", table) if name in LEVELS]
    assert order == ["gmu", "film", "concat", "mean", "image alone", "text alone"]
    scored = next(row for row in outcome.methods if row.method == "film").test
    assert f"<td>{max(scored) if metric == 'nll' else min(scored):.4f}</td>" in table


@pytest.mark.thorough(but=("changes1-lines1",))
@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({"probed": False}, {"no run was probed": 5}),
        ({"modalities": "image"}, {"there is one modality": 3}),
        ({"seeds": 1}, {"no two methods can be compared over seeds": 1}),
    ],
)
def test_report_gives_the_reason_for_missing_sections(tmp_path, changes, lines):
    outcome, plan = ablation(tmp_path, **changes)
    report.write(outcome, plan, tmp_path, COMMAND)
    page = visible_text(read(tmp_path))
    for line, count in lines.items():
        assert page.count(f"Not available: {line}") == count
    assert page.count("Not available") == sum(lines.values())
    assert outcome.claims.none in page


def test_report_is_written_without_finished_runs(tmp_path, monkeypatch):
    def raise_user_error(workdir):
        raise UserError("it has no checkpoints")

    outcome, plan = ablation(tmp_path, probed=False)
    failed = [dataclasses.replace(r, trials=(), seeds=(), failed_seeds=r.seeds, valid=(), test=(), parameters=None)
            for r in outcome.methods]  # fmt: skip
    without_runs = dataclasses.replace(
        outcome, methods=tuple(failed), claims=claims(failed, [], {}, {}, "accuracy", True), results={}
    )
    report.write(without_runs, plan, tmp_path, COMMAND, latex=True)
    page = visible_text(read(tmp_path))
    assert "no run of a fusion strategy has a score" in page and page.count("Not available") == 10
    monkeypatch.setattr(attention, "examples", raise_user_error)
    report.write(outcome, plan, tmp_path, COMMAND)
    assert "Not available: no run could be opened (it has no checkpoints)." in visible_text(read(tmp_path))


def test_latex_table_is_well_formed(report_files):
    table = read(report_files[2], "table.tex")
    unescaped = re.sub(r"\\[{}$_%&#\\]", "", table)
    assert unescaped.count("{") == unescaped.count("}") and unescaped.count("$") % 2 == 0
    assert re.findall(r"\\begin\{(\w+)\}", table) == re.findall(r"\\end\{(\w+)\}", table)[::-1] == ["table", "tabular"]
    assert r"linear\_svm, text" in table and not re.search(r"(?<!\\)_", table)
    columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", table)[1])
    rows = [line for line in table.splitlines() if line.endswith(r"\\") and "multicolumn" not in line]
    assert len(rows) == 1 + len(report_files[0].methods) + len(report_files[0].published)
    assert {len(re.findall(r"(?<!\\)&", row)) + 1 for row in rows} == {columns}
    assert rows[1].strip().startswith("gmu & 0.92") and r"$\uparrow$" in rows[1]


@pytest.mark.parametrize("metric", ["accuracy", "nll"])
def test_heat_map_contains_means_over_seeds(tmp_path, metric):
    outcome, _ = ablation(tmp_path, metric=metric)
    rows = [row for row in outcome.methods if row.trials and not row.unimodal_baseline]
    found = aggregation.absences(rows, outcome, "subsets")
    figure = plots.heat_maps({"present": found}, metric, higher=metric == "accuracy")
    level = {"accuracy": LEVELS["gmu"], "nll": 1 - LEVELS["gmu"]}[metric]
    for kept, share in {"": 0.0, "image": 0.5, "text": 0.5, "image+text": 1.0}.items():
        mean = level * share + 0.01 * np.mean(range(SEEDS))
        assert found["gmu"][kept] == pytest.approx(mean)
        assert f">{mean:.3f}<" in figure


def test_pooled_reliability_equals_the_bins_of_all_examples():
    random = np.random.default_rng(0)
    predictions = [(3 * random.standard_normal((n, 4)), random.integers(4, size=n)) for n in (40, 90)]
    runs = [{"before": {"bins": dataclasses.asdict(calibration.reliability(*arrays))}} for arrays in predictions]
    found = aggregation.pooled(runs, "before")
    expected = calibration.reliability(*(np.concatenate(arrays) for arrays in zip(*predictions, strict=True)))
    for name in ("count", "confidence", "accuracy"):
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name))


def test_effective_robustness_is_relative_to_late_fusion():
    curves = {"late_mean": [1.0, 0.8, 0.6], "gmu": [0.9, 0.9, 0.9]}
    found = aggregation.robustness(curves, [0.0, 0.5, 1.0], sign=1)
    assert found["late_mean"] == (pytest.approx(0.8), 0.0)
    assert found["gmu"] == (pytest.approx(0.9), pytest.approx(0.2))  # mean decrease: 0, and 0.2 for late fusion
    assert aggregation.robustness({"gmu": curves["gmu"]}, [0.0, 0.5, 1.0], sign=1)["gmu"][1] is None


def test_examples_come_from_the_best_method_with_attention(tmp_path, monkeypatch):
    outcome, plan = ablation(tmp_path, rename={"mean": "slow"})
    attention_trial = next(trial for trial in plan.trials if trial.method == "slow")
    attention_trial.config["model"]["fusion"]["name"] = "co_attention"
    context = ReportContext(outcome, plan, tmp_path, tables.lines(outcome, plan))
    monkeypatch.setattr(attention, "examples", lambda workdir: [example_view("mean" in str(workdir.name))])
    found = SECTIONS["Examples"](context)
    assert found.caption.startswith("Attention of slow (the best with attention on validation, seed 0) on 1 test")
    (card,) = found.examples
    assert card.right == "wrong" and [part.modality for part in card.modalities] == NAMES
    assert card.modalities[0].heat and [share for _, share in card.modalities[1].words] == [1.0, 1.0]
    monkeypatch.setattr(attention, "examples", lambda workdir: [example_view(False)])
    found = SECTIONS["Examples"](context)
    assert "Predictions of gmu (the best on validation, seed 0) on" in found.caption
    assert not found.examples[0].modalities[0].heat and found.examples[0].modalities[1].absent


def test_received_attention_excludes_self_attention():
    weights = {("text", "image"): np.array([[0.0, 1.0], [0.5, 0.5]]), ("image", "image"): np.eye(2)}
    view = ExampleView(0, "", "", {}, weights)
    # Self-attention is excluded.
    np.testing.assert_allclose(example_views.received_attention(view, "image"), [0.25, 0.75])
    assert example_views.received_attention(view, "text") is None
    assert example_views.grid(16, (32, 32)) == (4, 4) and example_views.grid(48, (64, 48)) == (8, 6)
    assert example_views.grid(17, (32, 32)) is None and example_views.grid(2, (32, 32)) is None


def test_example_card_crops_audio_padding():
    weights = {("image", "audio"): np.array([[0.1, 0.3, 0.2, 0.0]])}
    view = ExampleView(0, "1", "1", {"audio": np.sin(np.arange(600.0))}, weights)
    (audio,) = example_views.example_card(
        view, {"audio": {"kind": "audio", "rate": 1000, "seconds": 0.8}}, classes=True
    ).modalities
    assert [round(share, 3) for *_, share in audio.spans] == [0.333, 1.0, 0.667]  # the fourth position is padding
    assert sum(width for _, width, _ in audio.spans) == pytest.approx(example_views.WAVE_SIZE[0])


def test_report_leaves_matplotlib_settings_unchanged(report_files):
    assert report_files and dict(matplotlib.rcParams) == SETTINGS


def test_missing_table_has_gains_where_the_rate_in_training_varies(tmp_path):
    outcome, plan = ablation(tmp_path, rename={"gmu": "film data.missing=0.5", "film": "film data.missing=0.0"})
    found = missing_table.table(ReportContext(outcome, plan, tmp_path, tables.lines(outcome, plan)))
    assert [head.main for head in found.heads][-2:] == ["Gain", "Gain beyond"]
    (rows,) = found.groups.values()
    gains = {row[0].main: [cell.main for cell in row[1:]] for row in rows}
    gain = (LEVELS["gmu"] - LEVELS["film"]) / 2  # the score at the test rate 0.5
    assert gains["film data.missing=0.5"] == ["0 of 32", "0.0000", "1.0000", f"+{gain:.4f}", "–"]
    assert gains["film data.missing=0.0"][3:] == ["–", "–"]
    outcome, plan = ablation(tmp_path / "one rate")
    assert (
        len(missing_table.table(ReportContext(outcome, plan, tmp_path / "one rate", tables.lines(outcome, plan))).heads)
        == 4
    )
