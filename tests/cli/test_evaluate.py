"""`nextquill evaluate`: its figures, their inputs and their files."""

import json
import re
import shutil
import signal
import subprocess
import sys
import tempfile

import pytest

from nextquill.evaluation.results import read_evaluation, read_item_effects
from nextquill.storage.checkpoints import trained_users, user_digest
from nextquill.storage.manifests import with_digest


def evaluate(nextquill, model, data, *words):
    return nextquill("evaluate", "--model_name_or_path", model, "--eval_file", data / "eval.jsonl", *words)


def test_figures_equal_the_trainers_own(nextquill, trained, data, tmp_path):
    result = evaluate(nextquill, trained, data, "--generate", "false", "--output_file", tmp_path / "m.json")
    assert result.code == 0, result.err
    metrics = json.loads((tmp_path / "m.json").read_text())
    own = json.loads((trained / "metrics.json").read_text())["eval"]
    for name in ("nll_factual", "nll_counterfactual", "nll_placebo", "effect_prob", "share_above_threshold"):
        assert metrics[name] == pytest.approx(own[f"eval_{name}"], rel=1e-5, abs=1e-8), name
    for name in ("effect_logprob", "effect_placebo"):  # small differences of large numbers
        assert metrics[name] == pytest.approx(own[f"eval_{name}"], abs=1e-6), name
    assert metrics["tokens"] == own["eval_num_tokens"]
    assert metrics["examples"] == 5


def test_batch_size_changes_nothing(nextquill, trained, data, tmp_path):
    for size in (1, 4):
        evaluate(nextquill, trained, data, "--generate", "false", "--batch_size", size,
                 "--output_file", tmp_path / f"{size}.json")  # fmt: skip
    one, four = (json.loads((tmp_path / f"{size}.json").read_text()) for size in (1, 4))
    assert one == pytest.approx(four, rel=1e-5, abs=1e-6)


def test_a_checkpoint_is_prompted_as_its_run_was(nextquill, train, data, tmp_path):
    folder = tmp_path / "run"
    assert train(folder, "--max_steps", 1, "--prompt_order", "history_first", "--system_prompt", "Be brief.").code == 0
    outputs = []
    for number, words in enumerate(([folder], [folder / "checkpoint-1"], [folder, "--prompt_order", "official"])):
        file = tmp_path / f"{number}.json"
        assert evaluate(nextquill, words[0], data, "--generate", "false", "--output_file", file, *words[1:]).code == 0
        outputs.append(json.loads(file.read_text()))
    assert outputs[0] == outputs[1]
    assert outputs[0] != outputs[2]


def test_a_base_model_is_measured_with_the_prompts_of_its_run(nextquill, train, trained, data, tmp_path):
    base, run, words = tmp_path / "base", tmp_path / "run", ("--generate", "false", "--resamples", 50)
    shutil.copytree(trained, base, ignore=shutil.ignore_patterns("nextquill_prompt.json", "checkpoint-*"))
    own = evaluate(nextquill, base, data, *words, "--output_dir", tmp_path / "own")
    assert "no prompt settings; flags and nextquill's defaults decide the prompts (official order, at most " in own.err
    sizes = ("--max_steps", 1, "--prompt_order", "history_first", "--max_length", 600)
    assert train(run, "--model", base, *sizes).code == 0
    baseline = ("--baseline", tmp_path / "own")
    unlike = evaluate(nextquill, run, data, *words, *baseline).err
    assert re.search(
        r"other prompts: max_length is \d+ there, 600 here; order is official there, history_first h", unlike
    )
    same = evaluate(nextquill, base, data, *words, "--prompt_from", run, "--output_dir", tmp_path / "same")
    assert (same.code, same.err) == (0, "")
    assert evaluate(nextquill, run, data, *words, "--baseline", tmp_path / "same").err == ""
    found = read_evaluation(tmp_path / "same").settings
    assert (found["max_length"], found["template"]["order"]) == (600, "history_first")
    wrong = evaluate(nextquill, "./nowhere", data, "--prompt_from", tmp_path / "no_run")
    assert wrong.err.startswith("nextquill: --prompt_from: expected the folder of a run, got ")


def test_the_tables(nextquill, trained, data):
    words = (
        "--max_new_tokens",
        4,
        "--generate_limit",
        2,
        "--limit",
        3,
        "--generate_branches",
        "factual",
        "counterfactual",
    )
    result = evaluate(nextquill, trained, data, *words)
    assert result.code == 0, result.err
    texts = ("ROUGE-L (of 1)", "BLEU (of 100)")
    for label in ("nll with history", "nll without history", "nll with another's history", *texts):
        assert f"\n  {label}  " in result.out, label
    assert re.search("with history +without", result.out)
    known = trained_users(trained)
    new = {json.loads(line)["user_id"] for line in (data / "eval.jsonl").read_text().splitlines()[:3]}
    new = [user for user in new if user_digest(user) not in known]
    assert f"3 examples of 3 users ({len(new)} never trained on), " in result.out
    assert "95% intervals over users" in result.out
    assert "4 texts generated, for 2 examples." in result.out
    assert "Warning: Only 3 people." in result.out
    assert max(map(len, result.out.splitlines())) <= 80


def test_four_columns_keep_their_labels(nextquill, trained, data):
    branches = ("factual", "counterfactual", "placebo")
    result = evaluate(nextquill, trained, data, "--max_new_tokens", 4, "--generate_branches", *branches)
    assert result.code == 0, result.err
    above, below = result.out.split("generated texts")[1:]
    assert "\n  ROUGE-L (of 1)  " in above
    assert "the person's own" not in above
    assert below.split("\n")[0].strip() == "the person's own"
    assert "\n  Right person (of 1)  " in below
    assert "ROUGE-L" not in below
    assert max(map(len, result.out.splitlines())) <= 80
    assert result.err == ""


def test_flat_metrics_are_those_of_the_folder(nextquill, trained, data, tmp_path):
    folder, file = tmp_path / "out", tmp_path / "m.json"
    words = ("--max_new_tokens", 4, "--output_dir", folder, "--output_file", file, "--item_effects", 1)
    result = evaluate(nextquill, trained, data, *words)
    assert result.code == 0, result.err
    assert f"Results: {folder}\n" in result.out
    evaluation = read_evaluation(folder)
    assert json.loads(file.read_text()) == {name: metric.value for name, metric in evaluation.metrics.items()}
    assert evaluation.model == str(trained)
    assert [each.index for each in read_item_effects(folder)] == [0]
    lines = [json.loads(line) for line in (folder / "effects.jsonl").read_text().splitlines()]
    calibrated = ("top1", "confidence", "nll_by_temperature", "digest")
    assert all([each.pop(name) for name in calibrated] for each in lines)
    written = "".join(json.dumps(with_digest(each), ensure_ascii=False) + "\n" for each in lines)
    assert written.encode() == scored(nextquill, trained, data, tmp_path)


def scored(nextquill, model, data, tmp_path):
    """The output of `score`, which is that of `evaluate` without calibration."""
    file = tmp_path / "effects.jsonl"
    words = ("--eval_file", data / "eval.jsonl", "--output_file", file, "--show", 0)
    assert nextquill("score", "--model_name_or_path", model, *words).code == 0
    return file.read_bytes()


def test_nothing_is_left_where_nothing_is_kept(nextquill, trained, data, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    result = evaluate(nextquill, trained, data, "--generate", "false")
    assert result.code == 0, result.err
    assert "generated texts" not in result.out
    assert list(tmp_path.iterdir()) == []


# ---- another evaluation ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(nextquill, trained, data, tmp_path_factory):
    """An evaluation's folder, which tests only read."""
    folder = tmp_path_factory.mktemp("evaluation") / "out"
    result = evaluate(nextquill, trained, data, *SMALL, "--output_dir", folder)
    assert result.code == 0, result.err
    return folder


SMALL = ("--max_new_tokens", 3, "--resamples", 50, "--batch_size", 2)


def test_differences_to_a_baseline(nextquill, trained, data, finished):
    words = ("--resamples", 50, "--baseline", finished)
    same = evaluate(nextquill, trained, data, *words, "--generate", "false")
    assert same.code == 0, same.err
    table = same.out[same.out.index("this - ") :]
    assert "+0.00 [0.00, 0.00]   1.000" in table
    assert "ROUGE" not in table, "one side has no texts"
    other = evaluate(nextquill, trained, data, *words, "--prompt_order", "history_first", "--max_new_tokens", 3)
    row = next(line for line in other.out[other.out.index("this - ") :].splitlines() if "nll with history " in line)
    assert "+0.000" not in row
    assert "ROUGE-L with history " in other.out
    unlike = " ".join(other.out[other.out.index("These settings differ too") :].split())
    assert "template order 'history_first', there 'official'" in unlike
    again = evaluate(nextquill, trained, data, *SMALL, "--baseline", finished, "--resamples", 60)
    assert "These settings differ too" not in again.out


def test_a_baseline_that_cannot_be_compared_is_refused_before_the_model_is_loaded(nextquill, data, finished, tmp_path):
    words = ("--baseline", finished, "--limit", 3)
    result = evaluate(nextquill, "./nowhere", data, *words)
    assert result.code == 1
    assert f"--baseline: {finished} is an evaluation of other records (5) than --eval_file (3)" in result.err
    (tmp_path / "half").mkdir()
    shutil.copy(finished / "evaluation.json", tmp_path / "half")
    result = evaluate(nextquill, "./nowhere", data, "--baseline", tmp_path / "half")
    assert f"--baseline: {tmp_path / 'half'}: effects.jsonl is missing; restore the file, or evaluate" in result.err
    result = evaluate(nextquill, "./nowhere", data, "--baseline", tmp_path)
    assert f"--baseline: {tmp_path / 'evaluation.json'}: cannot be read: No such file" in result.err


def test_tokens_that_another_evaluation_marks(nextquill, trained, data, finished, tmp_path):
    words = ("--generate", "false", "--resamples", 50, "--personal_from", finished, "--baseline", finished)
    result = evaluate(nextquill, trained, data, *words, "--score_temperature", 1.4, "--output_dir", tmp_path)
    assert result.code == 0, result.err
    assert "tokens of --personal_from" in result.out
    assert re.search(r"\n  share of tokens +\d", result.out)
    assert "nll at a temperature" in result.out
    unlike = " ".join(result.out[result.out.index("These settings differ too") :].split())
    assert "score_temperature 1.4, there None" in unlike
    assert "personal_from" not in unlike, "it changes no measure that both have"
    lines = [line for line in result.out.splitlines() if not line.startswith("Results: ")]
    assert max(map(len, lines)) <= 80
    assert read_evaluation(tmp_path).metrics["nll_at_temperature"].label == "nll at temperature 1.4"


def test_marks_of_other_records_are_refused_before_the_model_is_loaded(nextquill, data, finished, tmp_path):
    result = evaluate(nextquill, "./nowhere", data, "--personal_from", finished, "--limit", 3)
    assert result.code == 1
    assert f"--personal_from: {finished} is an evaluation of other records (5) than these (3)" in result.err
    result = evaluate(nextquill, "./nowhere", data, "--personal_from", tmp_path)
    assert f"--personal_from: {tmp_path / 'evaluation.json'}: cannot be read: No such file" in result.err
    result = evaluate(nextquill, "./nowhere", data, "--score_temperature", 1.3)
    assert "--score_temperature: expected one of 0.7, 0.8" in result.err


# ---- runs that are cut short, and second ones ----------------------------------------------------


@pytest.mark.slow  # `test_evaluation_resume` stops it at every stage, within one process
@pytest.mark.parametrize("name", ["effect_line", "decoded"])
def test_a_process_that_is_killed_goes_on_and_gives_the_same_bytes(nextquill, trained, data, finished, tmp_path, name):
    """SIGKILL, which a process cannot handle, while scoring and while generating."""
    folder, place = tmp_path / "out", "evaluation.evaluate" if name == "effect_line" else "generation"
    code = (
        "import os, signal; from nextquill.cli import main\n"
        f"from nextquill.evaluation import evaluate; from nextquill.{place} import {name} as own\n"
        f"import nextquill.{place} as module\n"
        "calls = []\n"
        "def killing(*a):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 3: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return own(*a)\n"
        f"module.{name} = killing\n"
        f"main.main(['evaluate', '--model_name_or_path', {str(trained)!r}, '--eval_file', {str(data / 'eval.jsonl')!r},"
        f" '--output_dir', {str(folder)!r}, *{[str(word) for word in SMALL]!r}])"
    )
    killed = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=120, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    cut = folder / ("effects.jsonl.partial" if name == "effect_line" else "generated.jsonl.partial")
    assert cut.read_bytes().count(b"\n") == 4, "a first line and three"
    assert not (folder / "evaluation.json").exists()
    result = evaluate(nextquill, trained, data, *SMALL, "--output_dir", folder)
    assert result.code == 0, result.err
    names = sorted(path.name for path in folder.iterdir())
    assert names == sorted(path.name for path in finished.iterdir())
    for each in names:
        assert (folder / each).read_bytes() == (finished / each).read_bytes(), each


def test_ctrl_c_says_how_to_go_on(nextquill, trained, data, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("nextquill.generation.decoded", interrupt)
    result = evaluate(nextquill, trained, data, *SMALL, "--output_dir", tmp_path)
    assert result.code == 130
    assert f"the finished part is in {tmp_path}; the same command resumes" in result.err


def test_a_second_run_is_refused_before_the_model_is_loaded(nextquill, data, finished):
    result = evaluate(nextquill, "./nowhere", data, "--output_dir", finished)
    assert result.code == 1
    assert result.err == (
        f"nextquill: --output_dir: {finished} holds a finished evaluation; give another, or --overwrite\n"
    )


def test_another_evaluation_in_the_folder_is_refused_by_name(nextquill, trained, data, tmp_path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr("nextquill.generation.decoded", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            evaluate(nextquill, trained, data, *SMALL, "--output_dir", tmp_path)
    result = evaluate(nextquill, trained, data, *SMALL, "--output_dir", tmp_path, "--seed", 1)
    assert result.code == 1
    assert (
        f"--output_dir: {tmp_path / 'evaluation.json.partial'} was started with another seed: there 42, here 1"
        in result.err
    )
    assert "start again with --overwrite" in result.err
    words = (*SMALL, "--output_dir", tmp_path, "--seed", 1, "--overwrite", "--generate", "false")
    assert evaluate(nextquill, trained, data, *words).code == 0


def test_an_existing_output_file_is_not_replaced_unasked(nextquill, trained, data, tmp_path):
    file = tmp_path / "deep" / "m.json"
    words = ("--generate", "false", "--limit", 1, "--output_file", file)
    assert evaluate(nextquill, trained, data, *words).code == 0
    file.write_text("precious")
    refused = evaluate(nextquill, trained, data, *words)
    assert refused.code == 1
    assert refused.err == f"nextquill: --output_file: {file} exists; give another name or --overwrite\n"
    assert file.read_text() == "precious"
    assert evaluate(nextquill, trained, data, *words, "--overwrite").code == 0
    assert json.loads(file.read_text())["examples"] == 1


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--limit", 0], 2, "--limit: expected a positive number, got 0"),
        (["--batch_size", -1], 2, "--batch_size: expected a positive number, got -1"),
        (["--generate_limit", 0], 2, "--generate_limit: expected at least 1"),
        (["--max_new_tokens", 0], 2, "--max_new_tokens: expected a positive number"),
        (["--task", "lamp_33"], 2, "argument --task: invalid choice: 'lamp_33'"),
        (["--metrics", "rogue_l"], 2, "--metrics: expected one of rouge_1"),
        (["--generate_branches", "own"], 2, "argument --generate_branches: invalid choice: 'own'"),
        (["--metrics", "bleu", "--generate", "false"], 2, "--metrics: bleu measures generated texts"),
        (["--temperature", -1], 2, "--temperature: expected 0 (greedy) or more, got -1.0"),
        (["--top_p", 0.5], 2, "--top_p: expected a temperature above 0 with it"),
        (["--item_effects", -1], 2, "--item_effects: expected at least 0, got -1"),
        (["--level", 95], 2, "--level: expected a share between 0 and 1, got 95.0"),
        (["--engine", "tgi"], 2, "argument --engine: invalid choice: 'tgi'"),
        (["--task", "lamp_3"], 1, "--eval_file: record 0: field 'response': lamp_3 expects a rating"),
        (["--task", "preferences"], 1, "--eval_file: record 0: field 'chosen': preferences needs it"),
        (["--dtype", "int8"], 2, "argument --dtype: invalid choice: 'int8'"),
        (["--max_length", 20], 1, "--eval_file: record 0 (user 'u0'): the prompt without any history takes"),
        (["--max_length", 5000], 2, "--max_length: expected at most the model's context of 4096 tokens"),
        (["--output_file", "."], 1, "--output_file: . is a folder"),
        (["--model_name_or_path", "tiny"], 1, "a new 'tiny' model can only be trained"),
        (["--model_name_or_path", "./nowhere"], 1, "there is no folder ./nowhere"),
        (["--eval_file", "nowhere.jsonl"], 1, "--eval_file: nowhere.jsonl: cannot be read: No such file"),
    ],
)
def test_mistakes_are_named(nextquill, trained, data, words, code, message):
    result = evaluate(nextquill, trained, data, *words)
    assert result.code == code, result.err
    assert message in result.err
    assert result.err.count("\n") == 1
    assert result.out == ""


@pytest.mark.parametrize("words", [("--task", "lamp_33"), ("--level", 2), ("--output_dir", __file__)], ids=str)
def test_wrong_flags_fail_before_the_model_is_loaded(nextquill, trained, data, words, monkeypatch):
    monkeypatch.setattr("nextquill.cli.evaluate.Loaded", lambda *_: pytest.fail("loaded"))
    assert evaluate(nextquill, trained, data, *words).code in (1, 2)


def test_without_vllm_its_engine_is_refused_at_once(nextquill, data, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = evaluate(nextquill, "./nowhere", data, "--engine", "vllm")
    assert result.code == 1
    assert "--engine: 'vllm' needs vLLM, which is not installed; pip install vllm" in result.err


def test_bad_records_are_left_out_and_counted(nextquill, trained, make_records, tmp_path):
    file = make_records(tmp_path / "r.jsonl", 12)
    with file.open("a", encoding="utf-8") as stream:
        stream.write('{"user_id": "u", "query": "q", "history": []}\n')
    words = ("--model_name_or_path", trained, "--eval_file", file, "--generate", "false")
    refused = nextquill("evaluate", *words)
    assert refused.code == 1
    assert f"--eval_file: {file} line 13: field 'response': required" in refused.err
    result = nextquill("evaluate", *words, "--skip_bad")
    assert result.code == 0, result.err
    assert "12 examples" in result.out
    assert "skipped 1 bad records" in result.err
    assert f"{file} line 13: field 'response'" in result.err


def test_pairs_are_compared(nextquill, trained, make_records, tmp_path):
    file = make_records(tmp_path / "r.jsonl", 4, chosen="warm soup", rejected="the quick ramen was salty")
    words = ("--task", "preferences", "--output_dir", tmp_path / "out", "--eval_file", file)
    result = nextquill("evaluate", "--model_name_or_path", trained, *words)
    assert result.code == 0, result.err
    assert "prefers/token" in result.out
    assert "margin/token" in result.out
    metrics = read_evaluation(tmp_path / "out").metrics
    assert metrics["preference_margin"].value > 0, "the shorter of two under a model that has learnt nothing"


def test_a_run_that_has_not_finished_names_its_checkpoint(nextquill, data, tmp_path):
    (tmp_path / "checkpoint-2").mkdir()
    result = evaluate(nextquill, tmp_path, data)
    assert result.code == 1
    assert f"its run has not finished; its last checkpoint is {tmp_path / 'checkpoint-2'}" in result.err


def test_records_of_one_user_have_no_placebo(nextquill, trained, make_records, tmp_path):
    file = make_records(tmp_path / "one.jsonl", 3, user_id="only")
    result = nextquill("evaluate", "--model_name_or_path", trained, "--eval_file", file, "--generate", "false")
    assert result.code == 0, result.err
    assert "another" not in result.out
    assert "placebo" not in result.out
