"""The commands as users run them: real processes, exit codes, one line for a mistake."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import runpy
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Annotated, Any, get_args

import msgspec
import pytest
import typer

from chameleon_deploy import Runtime, Sampling, __version__, cli
from chameleon_deploy.contract.bundle import Precision, open_bundle
from chameleon_deploy.contract.manifest import PRECISION_USES
from chameleon_deploy.terminal import console
from chameleon_deploy.terminal.commands import COMMANDS, module_of
from tests.commands import call, run


def test_generate_prints_json_lines(bundle: Path, runtime: Runtime) -> None:
    prompts = ["The river", "def f(x):\n    return"]
    result = run("chameleon_deploy.generate", bundle, "--prompt", prompts[0], "--prompt", prompts[1],
                 "--max-new-tokens", 5, "--temperature", 0.9, "--seed", 3, "--mode", "request", "--json")  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    expected = runtime.generate(prompts, max_new_tokens=5, mode="request", sampling=Sampling(temperature=0.9, seed=3))
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [line["token_ids"] for line in lines] == [g.token_ids for g in expected]
    assert set(lines[0]) == {"token_ids", "text", "cluster_id", "finish_reason"}


def test_generate_takes_penalties_and_reports_log_probabilities(bundle: Path, runtime: Runtime) -> None:
    result = run("chameleon_deploy.generate", bundle, "--prompt", "The river", "--max-new-tokens", 6, "--json",
                 "--presence-penalty", 1.5, "--frequency-penalty", 0.5, "--logit-bias", "7=2.5",
                 "--logit-bias", "8=-100", "--logprobs", 2)  # fmt: skip
    assert (result.returncode, result.stderr) == (0, "")
    sampling = Sampling(presence_penalty=1.5, frequency_penalty=0.5, logit_bias={7: 2.5, 8: -100.0}, logprobs=2)
    expected = runtime.generate(["The river"], max_new_tokens=6, sampling=sampling)[0]
    record = {name: value for name, value in dataclasses.asdict(expected).items() if value is not None}
    assert json.loads(result.stdout) == json.loads(json.dumps(record))


def test_generate_reads_prompts_from_a_file(bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "p.jsonl").write_text('{"text": "one"}\n\n{"text": "two\\n\\nlines"}\n')
    (tmp_path / "p.txt").write_text("first\nparagraph\n\n \nsecond\n")
    for name in ("p.jsonl", "p.txt"):
        result = call("chameleon_deploy.generate", bundle, "--prompts", tmp_path / name, "--max-new-tokens", 2)
        assert result.returncode == 0, result.stderr
        assert "length" in result.stdout


def test_score_prints_json_lines(bundle: Path, runtime: Runtime, tmp_path: Path) -> None:
    (tmp_path / "t.txt").write_text("The river runs.\n\nx\n")
    result = run("chameleon_deploy.score", bundle, "--text", tmp_path / "t.txt", "--json")
    assert result.returncode == 0, result.stderr
    first, second = (json.loads(line) for line in result.stdout.splitlines())
    expected = runtime.score(["The river runs.", "x"])[0]
    assert first["token_ids"] == expected.token_ids
    assert first["token_logprobs"] == pytest.approx(expected.token_logprobs, abs=1e-5)
    assert first["perplexity"] == pytest.approx(expected.perplexity, rel=1e-5)
    assert second["perplexity"] is None or math.isfinite(second["perplexity"])


def test_console_script(bundle: Path) -> None:
    program = str(Path(sys.executable).with_name("chameleon-deploy"))
    result = run("generate", bundle, "--prompt", "x", "--max-new-tokens", 2, "--json", program=program)
    assert result.returncode == 0, result.stderr
    assert run("--help", program=program).returncode == 0
    assert run("dance", program=program).returncode == 2
    shown = run("verify", "--help", program=program)
    assert shown.returncode == 0
    assert "--reference" in shown.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_has_help(command: str) -> None:
    result = call(module_of(command), "--help")
    assert result.returncode == 0, result.stderr
    assert "Usage" in result.stdout


@pytest.mark.parametrize("command", COMMANDS)
def test_every_module_runs_its_command(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `python -m` runs it, and without the seconds that a process takes for its imports."""
    monkeypatch.setattr(sys, "argv", [command, "--no-such-option"])
    with pytest.raises(SystemExit) as ended, warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # it has been imported before
        runpy.run_module(module_of(command), run_name="__main__")
    assert ended.value.code == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_option_has_a_help_text(command: str) -> None:
    made = cli.build().get_command(None, command).make_context(command, ["--help"], resilient_parsing=True).command
    for each in (made, *getattr(made, "commands", {}).values()):
        for option in each.params:
            assert getattr(option, "help", None), f"{each.name}: {option.name} has no help"


def test_help_is_grouped_and_keeps_brackets(capsys: pytest.CaptureFixture[str]) -> None:
    def work(
        threads: Annotated[int, typer.Option(help="Install [cpu] first.")] = 1,
        unknown: Annotated[int, typer.Option(help="Of no group.")] = 1,
    ) -> None:
        """Needs [export]."""

    command = console.make_command(work)
    assert [option.rich_help_panel for option in command.params] == ["Execution", None]
    with pytest.raises(SystemExit):
        command(["--help"])
    shown = capsys.readouterr().out
    assert "Install [cpu] first." in shown
    assert "Needs [export]." in shown
    assert shown.index("Options") < shown.index("Execution")


def test_the_program_lists_its_commands_without_importing_them() -> None:
    code = (
        "import sys; sys.argv = ['chameleon-deploy', sys.argv[1]]\nfrom chameleon_deploy import cli\n"
        "try:\n    cli.main()\nexcept SystemExit as end:\n    assert end.code == 0\n"
        "from chameleon_deploy.terminal.commands import COMMANDS, module_of\n"
        "modules = set(map(module_of, COMMANDS))\n"
        "print(sorted(modules & sys.modules.keys()), 'torch' in sys.modules)"
    )
    for option, shown in (("--help", COMMANDS), ("--version", [__version__])):
        output = subprocess.run([sys.executable, "-c", code, option], check=True, capture_output=True, text=True).stdout
        assert all(text in output for text in shown)
        assert output.splitlines()[-1] == "[] False"


def test_generate_runs_where_only_the_runtime_is_installed(bundle: Path) -> None:
    code = (
        "import sys\nfor name in ('torch', 'transformers', 'onnx', 'onnx_ir', 'onnxscript', 'sklearn', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        "from chameleon_deploy import cli\ncli.main()"
    )
    command = [sys.executable, "-c", code, "generate", str(bundle), "--prompt", "x", "--json"]
    assert subprocess.run(command, check=True, capture_output=True, text=True).stdout.startswith("{")


def test_the_shell_completes_commands_and_options() -> None:
    program = Path(sys.executable).with_name("chameleon-deploy")
    for words, expected in (("chameleon-deploy ge", "generate"), ("chameleon-deploy score --thr", "--threads")):
        asked = {
            "_CHAMELEON_DEPLOY_COMPLETE": "complete_bash",
            "COMP_WORDS": words,
            "COMP_CWORD": str(words.count(" ")),
        }
        result = subprocess.run([program], env={**os.environ, **asked}, capture_output=True, text=True, check=False)
        assert result.stdout.split() == [expected], result.stderr
    shown = run(
        "--show-completion", "bash", program=str(program), env={"_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}
    )
    assert "_CHAMELEON_DEPLOY_COMPLETE=complete_bash" in shown.stdout


@pytest.mark.parametrize("path", ["bundle", "lora_bundle"])
def test_inspect_shows_what_a_bundle_holds(path: str, request: pytest.FixtureRequest) -> None:
    bundle = request.getfixturevalue(path)
    manifest = open_bundle(bundle).manifest
    shown = call("chameleon_deploy.inspect", bundle)
    assert shown.returncode == 0, shown.stderr
    for text in (manifest.adaptation.regime, "lm_head [512 x 64]", "not verified", *manifest.graphs, *manifest.files):
        assert text in shown.stdout
    assert f"fp32: {PRECISION_USES['fp32']}" in shown.stdout
    record = json.loads(call("chameleon_deploy.inspect", bundle, "--json").stdout)
    assert record["model"] == msgspec.to_builtins(manifest.model)
    assert record["modes"] == list(manifest.adaptation.modes)
    assert record["adapters"] == (path == "lora_bundle")
    assert record["size"] == sum((bundle / name).stat().st_size for name in manifest.files)


def test_every_precision_is_for_something() -> None:
    """`inspect` would have no words for another."""
    assert PRECISION_USES.keys() == set(get_args(Precision))


def test_the_cache_is_listed_and_pruned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CHAMELEON_DEPLOY_CACHE", str(tmp_path / "cache"))
    entry = tmp_path / "cache" / "engines" / ("a" * 32)
    entry.mkdir(parents=True, mode=0o700)
    (tmp_path / "cache").chmod(0o700)
    (entry / "entry.json").write_text('{"key": {"device": "a [GPU]"}, "files": {}}')
    (entry / "decoder.engine").write_bytes(bytes(1000))
    shown = call("chameleon_deploy.cache", "list")
    assert "a [GPU]" in shown.stdout, shown.stderr
    listed = json.loads(call("chameleon_deploy.cache", "list", "--json").stdout)
    assert (listed["kind"], listed["key"], listed["path"]) == ("engines", {"device": "a [GPU]"}, str(entry))
    assert call("chameleon_deploy.cache", "prune").returncode == 2
    assert call("chameleon_deploy.cache", "prune", "--older-than", 1, "--json").stdout == ""
    assert json.loads(call("chameleon_deploy.cache", "prune", "--max-bytes", 500, "--json").stdout) == listed
    assert not entry.exists()
    (tmp_path / "cache").chmod(0o777)
    assert "[path_unsafe]" in call("chameleon_deploy.cache", "list").stderr


def bad_calls(bundle: Path, mini: Path, tmp: Path) -> dict[str, tuple[list[Any], str]]:
    (tmp / "latin1.txt").write_bytes("caf\xe9".encode("latin-1"))
    (tmp / "empty.txt").write_text("\n\n")
    (tmp / "bad.jsonl").write_text('{"text": 3}\n')
    (tmp / "short.txt").write_text("a\n\nb\n\nc\n")
    (tmp / "exists").mkdir()
    (tmp / "nested.jsonl").write_text('{"text": ' + "[" * 100_000 + "\n")
    for name, changed in (
        ("huge", {"rank": 1 << 40}),
        ("large", {"rank": 1 << 19}),
        ("negative", {"hidden_sizes": [-1, 8]}),
    ):
        (tmp / name).mkdir()
        config = json.loads((mini / "chameleon_config.json").read_text())
        config |= {"base_model": str(mini / config["base_model"]), **changed}
        (tmp / name / "chameleon_config.json").write_text(json.dumps(config))
        shutil.copy(mini / "chameleon.safetensors", tmp / name)
    generate, score, train = "chameleon_deploy.generate", "chameleon_deploy.score", "chameleon_deploy.train"
    return {
        "no such bundle": ([generate, tmp / "nope", "--prompt", "x"], "[bundle_not_found]"),
        "not a bundle": ([generate, mini, "--prompt", "x"], "[bundle_not_found]"),
        "no prompt": ([generate, bundle], "[input_invalid]"),
        "empty prompt": ([generate, bundle, "--prompt", ""], "[input_invalid]"),
        "unknown mode": ([generate, bundle, "--prompt", "x", "--mode", "magic"], "[usage]"),
        "static without factors": ([generate, bundle, "--prompt", "x", "--mode", "static"], "[mode_unavailable]"),
        "unknown option": ([generate, bundle, "--prompt", "x", "--loud"], "[usage]"),
        "no arguments": ([generate], "[usage]"),
        "zero tokens": ([generate, bundle, "--prompt", "x", "--max-new-tokens", 0], "[usage]"),
        "negative temperature": ([generate, bundle, "--prompt", "x", "--temperature", -1], "[input_invalid]"),
        "bias without a value": ([generate, bundle, "--prompt", "x", "--logit-bias", "7"], "[input_invalid]"),
        "bias of no token": ([generate, bundle, "--prompt", "x", "--logit-bias", "512=1"], "[token_invalid]"),
        "prompt too long": ([generate, bundle, "--prompt", "word " * 500], "[text_too_long]"),
        "unknown provider": ([generate, bundle, "--prompt", "x", "--provider", "tpu"], "[provider_unavailable]"),
        "text missing": ([score, bundle, "--text", tmp / "gone.txt"], "[input_invalid]"),
        "text not UTF-8": ([score, bundle, "--text", tmp / "latin1.txt"], "[input_invalid]"),
        "text empty": ([score, bundle, "--text", tmp / "empty.txt"], "[input_invalid]"),
        "text a directory": ([score, bundle, "--text", tmp], "[input_invalid]"),
        "bad jsonl": ([score, bundle, "--text", tmp / "bad.jsonl"], "[input_invalid]"),
        "deeply nested jsonl": ([score, bundle, "--text", tmp / "nested.jsonl"], "[input_invalid]"),
        "too many threads": ([generate, bundle, "--prompt", "x", "--threads", 1_000_000], "[input_invalid]"),
        "threads beyond any integer": ([generate, bundle, "--prompt", "x", "--threads", 1 << 40], "[input_invalid]"),
        "rank beyond any": (["chameleon_deploy.export", tmp / "huge", "--out", tmp / "o"], "[checkpoint_invalid]"),
        "rank beyond memory": (["chameleon_deploy.export", tmp / "large", "--out", tmp / "o"], "[tensor_invalid]"),
        "negative size": (["chameleon_deploy.export", tmp / "negative", "--out", tmp / "o"], "[checkpoint_invalid]"),
        "hub out of reach": ([train, "--base", "nobody/nothing", "--out", tmp / "o", "--text", tmp / "short.txt",
                              "--validation-text", tmp / "short.txt"], "[checkpoint_invalid]"),
        "no room for a prompt": (["chameleon_deploy.bench", bundle, "--reference", mini, "--tokens", 128], "--tokens"),
        "no tenants": ([score, bundle, "--text", tmp / "short.txt", "--mode", "tenant"], "[input_invalid]"),
        "no such checkpoint": (["chameleon_deploy.export", tmp / "nope", "--out", tmp / "o"], "[checkpoint_invalid]"),
        "no such recipe": (["chameleon_deploy.export", tmp / "nope.toml", "--out", tmp / "o"], "[recipe_invalid]"),
        "unknown precision": (["chameleon_deploy.export", mini, "--out", tmp / "o", "--precision", "fp8"], "[usage]"),
        "output exists": (["chameleon_deploy.export", mini, "--out", tmp / "exists"], "[output_exists]"),
        "output under a file": (["chameleon_deploy.export", mini, "--out", tmp / "empty.txt" / "o"], "[output_failed]"),
        "too little to verify on": (
            ["chameleon_deploy.verify", bundle, "--reference", mini, "--text", tmp / "short.txt"],
            "[input_invalid]",
        ),
        "no text to train on": ([train, "--base", mini / "base", "--out", tmp / "o"], "[input_invalid]"),
        "texts too few": ([train, "--base", mini / "base", "--out", tmp / "o", "--text", tmp / "latin1.txt"], "UTF-8"),
        "base missing": ([train, "--base", tmp / "nope", "--out", tmp / "o", "--text", tmp / "short.txt",
                          "--validation-text", tmp / "short.txt"], "[checkpoint_invalid]"),
        "nothing to predict": ([train, "--base", mini / "base", "--out", tmp / "o", "--text", tmp / "short.txt",
                                "--validation-text", tmp / "short.txt"], "[input_invalid]"),
        "dataset out of reach": ([train, "--base", mini / "base", "--out", tmp / "o", "--dataset", "a/b"], "--text"),
    }  # fmt: skip


NAMES = [
    "no such bundle", "not a bundle", "no prompt", "empty prompt", "unknown mode", "static without factors",
    "unknown option", "no arguments", "zero tokens", "negative temperature", "bias without a value",
    "bias of no token", "prompt too long", "unknown provider",
    "text missing", "text not UTF-8", "text empty", "text a directory", "bad jsonl", "deeply nested jsonl",
    "no tenants", "too many threads", "threads beyond any integer", "rank beyond any", "rank beyond memory",
    "negative size", "hub out of reach", "no room for a prompt",
    "no such checkpoint", "no such recipe", "unknown precision", "output exists", "output under a file",
    "too little to verify on", "no text to train on", "texts too few", "base missing", "nothing to predict",
    "dataset out of reach",
]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_mistake_is_one_line_and_exit_code_2(name: str, bundle: Path, mini_path: Path, tmp_path: Path) -> None:
    arguments, expected = bad_calls(bundle, mini_path, tmp_path)[name]
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    result = call(*arguments)
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("error: ")
    assert expected in result.stderr
    assert result.stdout == ""
    leftovers = {path for path in tmp_path.iterdir() if path not in before}
    assert not leftovers


OUTPUTS = {
    "bench --json": ("bench", "--json"), "bench --html": ("bench", "--html"),
    "verify --out": ("verify", "--out"),
    "gpu-check --json": ("bench.gpu_check", "--json"),
    "compare --html": ("compare", "--html"),
}  # fmt: skip


@pytest.mark.parametrize("name", OUTPUTS)
def test_an_output_that_cannot_be_written_is_told_before_the_work(name: str, tmp_path: Path) -> None:
    """Neither bundle nor checkpoint exists, which the work would find first."""
    command, option = OUTPUTS[name]
    work: list[Any] = [tmp_path / "bundle", "--reference", tmp_path / "checkpoint"]
    if command == "compare":
        work = ["--base", tmp_path / "base", "--text", tmp_path / "text", "--work", tmp_path / "work"]
    for target, message in (
        (tmp_path, "is a directory"),
        (tmp_path / "missing" / "file", "No such file or directory"),
        (Path("/proc/file"), "cannot write /proc/file"),
    ):
        result = call(f"chameleon_deploy.{command}", *work, option, target)
        assert result.returncode == 2
        assert message in result.stderr
        assert "[output_failed]" in result.stderr
        assert result.stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_pipe_and_an_existing_file_are_outputs(tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("old")
    console.check_output(None, file, Path("/dev/stdout"), Path("/dev/null"))
    assert file.read_text() == "old"


def test_train_export_generate_from_the_shell(mini_path: Path, tmp_path: Path) -> None:
    from chameleon_deploy.reference.python_corpus import python_texts

    (tmp_path / "text.jsonl").write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in python_texts("prose", 60) + python_texts("changelog", 60))
    )
    trained = run("chameleon_deploy.train", "--base", mini_path / "base", "--text", tmp_path / "text.jsonl",
                  "--out", tmp_path / "checkpoint", "--epochs", 1, "--clusters", 2, "--max-length", 64)  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "validation loss" in trained.stdout
    exported = call("chameleon_deploy.export", tmp_path / "checkpoint", "--out", tmp_path / "bundle")
    assert exported.returncode == 0, exported.stderr
    assert "verified: " in exported.stdout
    result = call("chameleon_deploy.generate", tmp_path / "bundle", "--prompt", "The", "--json")
    assert json.loads(result.stdout)["cluster_id"] in (0, 1)
