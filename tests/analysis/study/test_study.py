"""A study of several ablations: methods and their scale, what it says, its files, and how it runs."""

import functools
import html
import json
import re

import numpy as np
import pytest

from mmfusion.analysis.run_ablation import Execution, Request
from mmfusion.analysis.study import aggregates, page, run_study
from mmfusion.analysis.study.datasets import BEST_CLASSICAL, BEST_UNIMODAL, common_methods, read
from mmfusion.analysis.study.statements import statements
from mmfusion.analysis.study.summary import summarise
from tests import tiny
from tests.analysis.study import made
from tests.errors import rejects

SEEDS = 8
LEVELS = {"concat": 0.80, "late_transformer": 0.84, "gmu": 0.82, "image alone": 0.70, "ensemble (mean)": 0.78,
          "ensemble (stacked)": 0.79, "majority": 0.5, "linear_svm, image": 0.72}  # fmt: skip


def scores(level, index, method, spread=0.002):
    """Returns scores of SEEDS runs, which differ by method, dataset and seed."""
    if method == "majority" or ", " in method:
        return [level] * SEEDS
    rng = np.random.default_rng([index, *method.encode()])
    return (level + spread * rng.normal(size=SEEDS)).tolist()


def outcomes(count, **levels):
    return {
        f"data{i}": made.outcome({name: scores(level, i, name) for name, level in {**LEVELS, **levels}.items()})
        for i in range(count)
    }


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(aggregates, "DRAWS", 100)
        yield


@pytest.fixture(scope="module")
def summary():
    """Returns the summary of seven datasets, of nine planned, on which late_transformer is the best of three."""
    return summarise(outcomes(7), 9, tune=4)


def of(summary, about):
    return [statement for statement in statements(summary) if statement.about == about]


def test_floors_are_selected_on_validation_and_chance_is_the_baseline_without_inputs():
    good_on_test = made.result("text alone", [0.9, 0.9], valid=[0.5, 0.5])
    rows = [made.result("gmu", [0.8, 0.8]), made.result("image alone", [0.7, 0.7]), good_on_test,
            made.result("linear_svm, image", [0.6, 0.6], valid=[0.9, 0.9]), made.result("ensemble (mean)", [0.7, 0.8]),
            made.result("linear_svm, text", [0.8, 0.8], valid=[0.6, 0.6]),
            made.result("majority", [0.2, 0.2])]  # fmt: skip
    found = read("x", made.outcome(rows))
    assert {name: result.method for name, result in found.methods.items()} == {
        "gmu": "gmu", "ensemble (mean)": "ensemble (mean)",
        BEST_UNIMODAL: "image alone", BEST_CLASSICAL: "linear_svm, image",
    }  # fmt: skip
    assert found.strategies == ("gmu",) and found.chance == 0.2
    without = read("y", made.outcome([rows[0], rows[1]]))
    assert common_methods([found, without]) == ["gmu", BEST_UNIMODAL]


def test_normalised_scores_are_zero_at_chance_and_one_at_a_perfect_score():
    higher = read("x", made.outcome({"gmu": [0.6, 1.0], "majority": [0.2] * 2}))
    assert higher.normalised(["gmu"]).tolist() == [pytest.approx([0.5, 1.0])]
    lower = read("x", made.outcome({"gmu": [1.0, 0.0], "majority": [4.0] * 2}, metric="mae", higher=False))
    assert lower.normalised(["gmu"]).tolist() == [[0.75, 1.0]]
    assert lower.scores(["gmu"]).tolist() == [[-1.0, 0.0]]  # signed, for ranks
    for metric, found in (("accuracy", {"gmu": [0.5]}), ("label/loss", {"gmu": [0.5], "majority": [0.9]})):
        dataset = read("x", made.outcome(found, metric=metric, higher=metric == "accuracy"))
        assert dataset.scale is None and dataset.normalised(["gmu"]) is None


def test_a_seed_that_a_method_lacks_is_missing_in_its_row_only():
    rows = [made.result("gmu", [0.6, 0.7], seeds=[0, 2]), made.result("concat", [0.1, 0.2, 0.3])]
    np.testing.assert_array_equal(
        read("x", made.outcome(rows)).scores(["gmu", "concat"]), [[0.6, np.nan, 0.7], [0.1, 0.2, 0.3]]
    )


def test_the_best_strategy_is_selected_by_validation_ranks_not_test():
    rows = [made.result("gmu", [0.8] * SEEDS, valid=[0.9] * SEEDS), made.result("concat", [0.85] * SEEDS)]
    summary = summarise({f"data{i}": made.outcome(rows) for i in range(6)}, 6)
    assert summary.best == "gmu" and summary.rows[0].method == "concat"
    assert "The best mean rank on test is that of concat (1.00" in of(summary, "best")[0].text


def test_summary_ranks_strategies_with_floors_and_compares_them_with_the_references(summary):
    assert [row.method for row in summary.rows] == [
        "late_transformer", "gmu", "concat", "ensemble (stacked)", "ensemble (mean)", BEST_CLASSICAL, BEST_UNIMODAL,
    ]  # fmt: skip
    assert summary.references == ("concat", "late_transformer", "ensemble (stacked)", BEST_UNIMODAL)
    assert summary.best == "late_transformer" and summary.row("gmu").rank.value == 2.0
    assert summary.row("concat").middle.value == pytest.approx(0.6, abs=0.003)  # (0.80 - 0.5) / 0.5
    verdicts = {(d.method, d.other): d.verdict for d in summary.over_datasets}
    assert verdicts["gmu", "concat"] == "better" and verdicts["gmu", "late_transformer"] == "worse"
    assert len(summary.over_datasets) == 2 + 2 + 3 + 3
    assert summary.row("gmu").improvement["concat"].value == pytest.approx(1.0)
    assert summary.row("concat").parameters == 1.0 and summary.row("gmu").parameters == 0.5  # by length of the name
    assert summary.row("ensemble (mean)").parameters is None and summary.row("gmu").seconds == 14.0


def test_a_method_without_a_score_on_every_dataset_is_left_out_and_named():
    found = outcomes(6)
    found["data5"] = made.outcome({name: scores(level, 5, name) for name, level in LEVELS.items() if name != "gmu"})
    found["data6"] = made.outcome({"image alone": [0.7] * SEEDS})
    summary = summarise(found, 7)
    assert summary.left_out == {"gmu": ["data5"]} and list(summary.without) == ["data6"]
    assert "gmu" not in [row.method for row in summary.rows] and len(summary.datasets) == 6
    (statement,) = of(summary, "missing")
    assert "gmu, without a score on data5" in statement.text and "data6 (no run" in statement.text
    assert summarise({"data6": found["data6"]}, 1) is None


@pytest.mark.parametrize(
    ("levels", "verdict", "says"),
    [
        ({"late_transformer": 0.9, "gmu": 0.8001, "concat": 0.8}, "worse", "No: each of 2 strategies"),
        ({"late_transformer": 0.76, "gmu": 0.86, "concat": 0.7}, "better", "Yes: gmu, of 2 strategies"),
        ({"late_transformer": 0.84, "gmu": 0.82, "concat": 0.7}, "cannot tell", "gmu beats one of them"),
    ],
)
def test_the_answer_is_whether_a_strategy_beats_both_the_late_transformer_and_the_ensemble(levels, verdict, says):
    best = 0.86 if verdict == "worse" else 0.80
    ensembles = {"ensemble (mean)": best - 0.02, "ensemble (stacked)": best}
    (statement,) = of(summarise(outcomes(7, **{**levels, **ensembles}), 7, tune=4), "answer")
    assert statement.verdict == verdict and says in statement.text
    assert "tuned late-fusion transformer and the stacked ensemble of single modalities" in statement.text
    assert "arXiv:2512.22991" in statement.text


def test_fewer_than_six_datasets_support_no_verdict_over_datasets():
    found = summarise(outcomes(5), 5)
    assert {d.verdict for d in found.over_datasets} == {"cannot tell"}
    assert of(found, "datasets")[0].text.startswith("5 datasets cannot show a difference over datasets: below 6")
    assert of(found, "answer")[0].verdict == "cannot tell"
    assert {d.verdict for d in found.over_seeds["data0"]} >= {"better"}  # eight seeds do, on each dataset


def test_where_the_best_strategy_is_not_the_best():
    found = outcomes(7)
    found["odd"] = made.outcome({**{n: scores(x, 9, n) for n, x in LEVELS.items()}, "gmu": scores(0.9, 9, "gmu"),
                                 "concat": scores(0.88, 9, "concat")})  # fmt: skip
    (statement,) = of(summarise(found, 8), "where")
    assert statement.text == (
        "Where late_transformer is not the best: it is worse than concat on odd; the strategy of the best mean test "
        "score is gmu on odd."
    )
    assert not of(summarise(outcomes(7), 7), "where")


def test_runs_that_end_with_their_best_step_are_named():
    found = outcomes(6)
    for outcome in found.values():
        for name, result in outcome.results.items():
            result |= {"best_step": 100 if name.startswith("gmu") else 50, "config": {"steps": 100}}
    (statement,) = of(summarise(found, 6), "undertrained")
    assert statement.text.endswith("in more than 20% of the runs of gmu (100%).")


def test_a_dataset_without_a_scale_counts_in_ranks_only():
    found = outcomes(6)
    found["bare"] = made.outcome({name: scores(x, 9, name) for name, x in LEVELS.items() if name != "majority"})
    summary = summarise(found, 7)
    assert len(summary.datasets) == 7 and len(summary.normalised) == 6
    assert summary.over_datasets[0].comparison.n == 6
    assert "In no normalised score: bare" in of(summary, "missing")[0].text


def visible_text(text):
    body = re.sub(r"<style>.*?</style>", "", text[text.index("<body>") :], flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", body)).split())


def test_report_has_every_statement_number_and_link_and_loads_nothing(tmp_path):
    summary = run_study.conclude(outcomes(7), 9, tmp_path, "python -m experiments.study --seeds=8", tune=4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["study.html", "study.json", "study.md"]
    text = (tmp_path / "study.html").read_text(encoding="utf-8")
    shown, markdown = visible_text(text), (tmp_path / "study.md").read_text(encoding="utf-8")
    for statement in statements(summary):
        assert statement.text in shown
        assert statement.text in re.sub(r"\\(.)", r"\1", markdown)
    assert "over 7 of 9 datasets" in shown and "7 of 9 finished" in shown
    assert 'href="data3/report.html"' in text and "(<data3/report.md>)" in markdown
    assert text.count("<svg role") == 7 and not re.search(r"(src|href)=\"(?!#|data\d/report)|@import|url\((?!#)", text)
    content = json.loads((tmp_path / "study.json").read_text())
    assert [row["method"] for row in content["methods"]] == [row.method for row in summary.rows]
    assert content["methods"][0]["rank"]["value"] == 1.0 and len(content["statements"]) == len(statements(summary))
    assert content["datasets"][0]["methods"][BEST_UNIMODAL]["as"] == "image alone"
    numbers = re.findall(r"\d+\.\d{3,}", statements(summary)[0].text)
    assert numbers and all(any(f"{x:.3f}" == n for x in flat(content)) for n in numbers)


def flat(value):
    """Returns all numbers in JSON values."""
    if isinstance(value, dict | list):
        return [x for inner in (value.values() if isinstance(value, dict) else value) for x in flat(inner)]
    return [value] if isinstance(value, float) else []


@pytest.mark.parametrize("kept", [("concat",), ("concat", "gmu", "majority"), ("gmu", "image alone", "majority")])
def test_report_of_few_methods_is_written(kept, tmp_path):
    found = {"one": made.outcome({name: scores(LEVELS[name], 0, name)[:1] for name in kept})}
    summary = run_study.conclude(found, 2, tmp_path)
    assert summary.best in kept and "study.html" in {path.name for path in tmp_path.iterdir()}
    assert page.title(summary).startswith(f"{len(summary.strategies)} fusion strateg")


def entry(directory, name, **changes):
    make = functools.partial(made_config, changes)
    return run_study.Entry(Request(make, ["concat", "gmu"], 2), Execution(directory / name))


def made_config(changes, fusion, seed, modalities):
    arg = [f"seed={seed}"] + [f"fusion={fusion}"] * bool(fusion) + [f"modalities={modalities}"] * bool(modalities)
    return tiny.config(",".join(arg), changes)


def test_study_reports_after_each_dataset_and_continues(tmp_path, monkeypatch):
    found, reported = outcomes(2), []
    monkeypatch.setattr(page, "write", lambda *_: None)

    def run_ablation(request, execution):
        name = execution.directory.name
        path = tmp_path / "study.json"
        reported.append((name, json.loads(path.read_text())["finished"] if path.exists() else 0))
        return found[name]

    monkeypatch.setattr(run_study, "run_ablation", run_ablation)
    entries = {name: entry(tmp_path, name) for name in found}
    lines = []
    summary = run_study.run_study(entries, tmp_path, started=lines.append)
    assert reported == [("data0", 0), ("data1", 1)] and lines == ["[1/2] data0", "[2/2] data1"]
    assert len(summary.datasets) == 2
    monkeypatch.setattr(run_study, "run_ablation", lambda request, execution: made.outcome({"image alone": [0.5]}))
    with rejects(tmp_path, says="no run of a fusion strategy"):
        run_study.run_study(entries, tmp_path, started=lines.append)


def test_study_checks_every_config_before_the_first_run(tmp_path, monkeypatch):
    monkeypatch.setattr(run_study, "run_ablation", lambda *_: pytest.fail("an ablation started"))
    folds = entry(tmp_path, "b", **{"data.folds": 3, "data.test": "test"})
    with rejects("--config.data.folds", 3, says="one test split"):
        run_study.run_study({"a": entry(tmp_path, "a"), "b": folds}, tmp_path)
    with rejects("config.batch_size"):
        run_study.run_study({"a": entry(tmp_path, "a"), "b": entry(tmp_path, "b", batch_size=0)}, tmp_path)
