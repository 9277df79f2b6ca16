"""``python -m titan_moe config``: what it says of wrong files, of the shipped ones, and on its page."""

import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from titan_moe import models
from titan_moe.layer.moe import MoE
from titan_moe.trainer.config import ConfigError, Job, load, write_resolved
from titan_moe.trainer.config.__main__ import main
from titan_moe.trainer.config.sections import OUR_DEFAULTS

ROOT = Path(__file__).parent.parent
TRAIN_CONFIGS = sorted((ROOT / "train_configs").glob("*.toml"))
MODEL = '[model]\nname = "deepseek_v3"\nflavor = "debugmodel"\n'


@pytest.fixture
def error(tmp_path: Path) -> Callable[..., str]:
    """The message of a file, MODEL and more, that must not load; its folder left out."""

    def _error(text: str = "", arguments: str = "", *, model: str = MODEL) -> str:
        (tmp_path / "x.toml").write_text(model + text)
        with pytest.raises(ConfigError) as caught:
            load([str(tmp_path / "x.toml"), *shlex.split(arguments)], world_size=4)
        assert "\n" not in str(caught.value)
        return str(caught.value).replace(f"{tmp_path}/", "")

    return _error


# --- the ten wrong configs, each by hand and as the pre-flight says it --------------------------------


def _thirteen_of_eight(spec: Any) -> Any:
    for _, layer, _, _ in spec.model.traverse(MoE.Config):
        layer.router.top_k = 13
    return spec


WRONG: dict[str, tuple[str, str]] = {
    "typo in a key": (
        f"{MODEL}[training]\nseq_length = 128\n",
        r"x\.toml: training\.seq_length is not a key of \[training\]; did you mean 'seq_len'\?",
    ),
    "wrong type": (
        f"{MODEL}[training]\nseq_len = 128.5\n",
        r"x\.toml: training\.seq_len must be an integer, not 128\.5",
    ),
    "EP that does not divide": (
        f"{MODEL}[parallelism]\nexpert_parallel_degree = 3\n",
        r"x\.toml: parallelism\.expert_parallel_degree \(3\) must divide .* = 4; use 1, 2 or 4",
    ),
    "local with EP": (
        f'{MODEL}[parallelism]\nexpert_parallel_degree = 2\n[moe]\ndispatcher = "local"\n',
        r"x\.toml: moe\.dispatcher 'local' .*parallelism\.expert_parallel_degree \(2\) > 1; use 'all_to_all'",
    ),
    "bad TOML": (
        f"{MODEL}[training\nsteps = 3\n",
        r"x\.toml: not valid TOML: .*\(at line 4, column 10\)",
    ),
    "unknown dispatcher": (
        f'{MODEL}[moe]\ndispatcher = "all_to_al"\n',
        r"x\.toml: moe\.dispatcher 'all_to_al' is not a dispatcher \(there are: .*\); "
        r"did you mean 'all_to_all'\?",
    ),
    "unknown flavor": (
        MODEL.replace("debugmodel", "16b"),
        r"x\.toml: model\.flavor '16b' is not a flavor of deepseek_v3 \(there are: debugmodel, 16B, 671B\); "
        r"did you mean '16B'\?",
    ),
    "too many ranks": (
        f"{MODEL}[parallelism]\ndata_parallel_shard_degree = 2\n",
        r"x\.toml: parallelism\.data_parallel_shard_degree \(2\): the degrees multiply to 2 but there are 4 "
        r"ranks, too many; run 2 ranks \(NGPU=2\) or set",
    ),
    "K > E": (
        MODEL,
        r"x\.toml: layers\.1\.moe\.router\.top_k \(13\) of model\.flavor deepseek_v3/debugmodel must be "
        r"between 1 and its num_experts \(8\); lower top_k",
    ),
    "missing file": ("", r"y\.toml: no such file; did you mean '.*x\.toml'\?"),
}


def _wrong_file(tmp_path: Path, case: str) -> str:
    (tmp_path / "x.toml").write_text(WRONG[case][0])
    return str(tmp_path / ("y.toml" if case == "missing file" else "x.toml"))


@pytest.mark.parametrize("case", WRONG)
def test_wrong_configs_in_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, case: str
) -> None:
    monkeypatch.setenv("NGPU", "4")
    if case == "K > E":  # no key sets K: the flavor itself must be broken
        build_spec = models.build_spec
        monkeypatch.setattr(models, "build_spec", lambda *a, **k: _thirteen_of_eight(build_spec(*a, **k)))
    assert main([_wrong_file(tmp_path, case)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.count("\n") == 1
    assert re.match(rf"titan_moe: .*{WRONG[case][1]}", err), err


@pytest.mark.parametrize("case", ["typo in a key", "missing file"])
def test_wrong_configs_as_a_command(tmp_path: Path, case: str) -> None:
    command = [sys.executable, "-m", "titan_moe.trainer.config", _wrong_file(tmp_path, case)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done.stderr
    assert re.match(rf"titan_moe: .*{WRONG[case][1]}", done.stderr)


def test_a_right_config_says_nothing_unless_asked(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NGPU", "4")
    file = str(ROOT / "train_configs" / "debug_fsdp_tp_ep.toml")
    assert main([file]) == 0
    assert capsys.readouterr() == ("", "")
    assert main([file, "--show", "--training.steps", "3"]) == 0
    assert tomllib.loads(capsys.readouterr().out)["training"]["steps"] == 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "the first argument must be a TOML file"),
        ("--training.steps 3", "the first argument must be a TOML file"),
        (".", "cannot be read: Is a directory"),
    ],
)
def test_no_file(capsys: pytest.CaptureFixture[str], arguments: str, message: str) -> None:
    assert main(arguments.split()) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[job]\ndump_folder = 'x'\n", "x.toml: job is not a section; did you mean 'dump_folder'?"),
        ("[trainig]\nsteps = 3\n", "x.toml: trainig is not a section; did you mean 'training'?"),
        ("[trainig]\n", "x.toml: trainig is not a section; did you mean 'training'?"),
        ("[routing_replays]\nmode = 'record'\n", "x.toml: routing_replays is not a section"),
        ("[training]\nlr = 3e-4\n", "training.lr is not a key of [training]; did you mean 'optimizer.lr'?"),
        ("[training]\nsteps = '3'\n", "training.steps must be an integer, not the string '3'"),
        ("[debug]\nseed = true\n", "debug.seed must be an integer or 'none', not true"),
        (
            "[profiler]\ntrace_post_processor = 'x'\n",
            "profiler.trace_post_processor is not a key of [profiler]",
        ),
        ("training = 3\n", "x.toml: training is a table"),
    ],
)
def test_what_else_a_file_can_get_wrong(error: Callable[..., str], text: str, message: str) -> None:
    top_level = text if text.startswith("training") else ""
    assert message in error("" if top_level else text, model=top_level + MODEL)


def test_model_has_no_default(error: Callable[..., str]) -> None:
    assert error(model="") == "x.toml: model.name is not set; it has no default (deepseek_v3, qwen3_moe)"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--checkpoint.keep_latest_k 1",
            r"\[checkpoint\]: .*2 checkpoint replicas.* \(you set checkpoint.keep_latest_k = 1\)",
        ),
        (
            "--validator.steps 0",
            r"\[validator\]: validation steps must be positive or -1 \(you set validator.steps = 0\)",
        ),
        (
            "--debug.batch_invariant",
            r"not supported in pre-training \(you set debug.batch_invariant = true\)",
        ),
        (
            "--activation_checkpoint.mode memory_budget",
            r"requires the model to be compiled.* \(you set activation_checkpoint.mode = memory_budget\)",
        ),
        ("--compile.enable_async_tensor_parallel", r"\[compile\]: Async TP requires"),
        (
            "--parallelism.pipeline_parallel_degree 2 --parallelism.pipeline_parallel_microbatch_size 3",
            r"training.local_batch_size \(8\) must be evenly divisible",
        ),
    ],
)
def test_torchtitans_own_refusals_name_the_key(
    error: Callable[..., str], arguments: str, message: str
) -> None:
    assert re.match(f"command line: .*{message}", error("", arguments))


# --- what is shipped ----------------------------------------------------------------------------------


@pytest.mark.parametrize("file", TRAIN_CONFIGS, ids=lambda file: file.stem)
def test_shipped_configs(file: Path, tmp_path: Path) -> None:
    text = file.read_text()
    ranks = int(re.match(r"# (\d+) ranks?[ :]", text)[1])
    shipped = load([str(file)], world_size=ranks)
    write_resolved(shipped, tmp_path / "resolved.toml")
    assert load([str(tmp_path / "resolved.toml")], world_size=ranks).resolved == shipped.resolved
    lines = text.splitlines()
    assert [line for line in lines if re.match(r"\w+ *=", line) and "  # " not in line] == [], (
        "a key without a comment"
    )
    default = load(
        [_bare(tmp_path, shipped), "--dump_folder", shipped.trainer.dump_folder], world_size=ranks
    ).resolved
    for section, table in tomllib.loads(text).items():
        same = [
            key for key, value in table.items() if section != "model" and value == default[section].get(key)
        ]
        assert same in ([], ["dispatcher"]), f"[{section}] {same}: equal to the default"


def _bare(tmp_path: Path, shipped: Job) -> str:
    file = tmp_path / "bare.toml"
    model = shipped.resolved["model"]
    file.write_text(f'[model]\nname = "{model["name"]}"\nflavor = "{model["flavor"]}"\n')
    return str(file)


def test_debug_configs_train_on_the_same_global_batch() -> None:
    for file in TRAIN_CONFIGS:
        if "debug" in file.stem:
            ranks = int(re.match(r"# (\d+) rank", file.read_text())[1])
            trainer = load([str(file)], world_size=ranks).trainer
            dp = ranks // trainer.parallelism.tensor_parallel_degree
            assert trainer.training.local_batch_size * dp == 12, file


def test_the_page_shows_real_errors_and_every_default_of_ours(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    page = (ROOT / "docs" / "config.md").read_text()
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("NGPU", "4")
    examples = re.findall(r"^\$ python -m titan_moe config (.*)\n(titan_moe: .*)$", page, flags=re.MULTILINE)
    assert len(examples) == 10
    for command, output in examples:
        assert main(shlex.split(command)) == 2
        assert capsys.readouterr().err == f"{output}\n"
    for key, default in OUR_DEFAULTS.items():
        assert f"| `{key}` | {default.shown} | {default.reason} |" in page, key
