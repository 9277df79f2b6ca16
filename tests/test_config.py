"""The configuration: what is read, what is refused, and in which words."""

import dataclasses
import shlex
import tomllib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from torchtitan.components.loss import ChunkedLossWrapper, CrossEntropyLoss
from torchtitan.distributed.activation_checkpoint import FullAC, MemoryBudgetAC, SelectiveAC
from torchtitan.hf_datasets.text_datasets import HuggingFaceTextDataLoader
from torchtitan.tools import utils
from torchtitan.trainer import Trainer

from titan_moe.layer import dispatch
from titan_moe.layer.dispatch.base import DispatchLimits
from titan_moe.layer.dispatch.local import LocalDispatcher
from titan_moe.layer.moe import MoE
from titan_moe.trainer.config import ConfigError, Job, load, write_resolved
from titan_moe.trainer.config.job import world_size_from_env
from titan_moe.trainer.config.sections import OUR_DEFAULTS, every_key, keys_of
from titan_moe.trainer.data import TOKENIZER_DIR, TextDataLoader

ROOT = Path(__file__).parent.parent
TRAIN_CONFIGS = sorted((ROOT / "train_configs").glob("*.toml"))
MODEL = '[model]\nname = "deepseek_v3"\nflavor = "debugmodel"\n'


@pytest.fixture
def job(tmp_path: Path) -> Callable[..., Job]:
    """Loads MODEL plus some TOML and a command line."""

    def _job(text: str = "", arguments: str = "", *, ranks: int = 4, model: str = MODEL) -> Job:
        file = tmp_path / "x.toml"
        file.write_text(model + text)
        return load([str(file), *shlex.split(arguments)], world_size=ranks)

    return _job


@pytest.fixture
def error(job: Callable[..., Job], tmp_path: Path) -> Callable[..., str]:
    """The message of a configuration that must not load, the folder of its file left out."""

    def _error(*args: Any, **kwargs: Any) -> str:
        with pytest.raises(ConfigError) as caught:
            job(*args, **kwargs)
        message = str(caught.value)
        assert "\n" not in message
        return message.replace(f"{tmp_path}/", "")

    return _error


# --- where values come from -------------------------------------------------------------------------


def test_command_line_wins_over_file_and_file_over_defaults(job: Callable[..., Job]) -> None:
    text = "[training]\nsteps = 7\nseq_len = 64\n"
    training = job(text, "--training.seq_len 32").trainer.training
    assert (training.seq_len, training.steps, training.gc_freq) == (32, 7, Trainer.Config().training.gc_freq)
    assert job(text, "--training.seq_len 32 --training.seq_len 16").trainer.training.seq_len == 16


@pytest.mark.parametrize(
    ("arguments", "key", "value"),
    [
        ("--training.steps 3", "training.steps", 3),
        ("--training.steps=3", "training.steps", 3),
        ("--training.local-batch-size 3", "training.local_batch_size", 3),
        ("--parallelism.data_parallel_shard_degree -1", "parallelism.data_parallel_shard_degree", -1),
        ("--training.max_norm 1e-1", "training.max_norm", 0.1),
        ("--debug.deterministic", "debug.deterministic", True),
        ("--debug.deterministic false", "debug.deterministic", False),
        ("--parallelism.no-enable-sequence-parallel", "parallelism.enable_sequence_parallel", False),
        ("--compile.enable --training.steps 3", "compile.enable", True),
        ("--dump_folder out", "dump_folder", "out"),
        ("--debug.seed none", "debug.seed", None),
        ("--debug.seed 5", "debug.seed", 5),
        (
            "--parallelism.context_parallel_load_balancer none",
            "parallelism.context_parallel_load_balancer",
            None,
        ),
        ("--compile.components '[\"loss\"]'", "compile.components", ["loss"]),
        ("--checkpoint.folder=a=b", "checkpoint.folder", "a=b"),
        ("--metrics.save_tb_folder 12", "metrics.save_tb_folder", "12"),
        ("--validator.dataloader.seed 3", "validator.dataloader.seed", 3),
        ('--override.imports \'["a.b", ["c.d", {"k": 1}]]\'', "override.imports", ["a.b", ("c.d", {"k": 1})]),
    ],
)
def test_command_line_forms(job: Callable[..., Job], arguments: str, key: str, value: Any) -> None:
    found: Any = job("", arguments).trainer
    for part in key.split("."):
        found = getattr(found, part)
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("stray", "'stray' is not an option"),
        ("-x 3", "'-x' is not an option"),
        ("-- 3", "'--' is not an option"),
        ("--training..steps 3", "'--training..steps' is not an option"),
        ("--training.steps", "training.steps needs a value: an integer"),
        ("--training.no-steps", "training.steps needs a value: an integer"),
        ("--training 3", "training is a table"),
        ("--dump_folder.x 3", "dump_folder must be a string, not a table"),
        ("--model.name.x 3", "model.name is one value, not a table"),
        ("--compile.components loss", "a TOML or JSON literal, not 'loss'"),
    ],
)
def test_command_line_that_is_wrong(error: Callable[..., str], arguments: str, message: str) -> None:
    said = error("", arguments)
    assert said.startswith("command line: ")
    assert message in said


def test_no_key_can_be_mistaken_for_a_negated_flag() -> None:
    assert not [key for _, key in every_key() if key.startswith("no_")]


def test_world_size_comes_from_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WORLD_SIZE", "NGPU", "NNODES"):
        monkeypatch.delenv(name, raising=False)
    assert world_size_from_env() == 4
    monkeypatch.setenv("NGPU", "8")
    monkeypatch.setenv("NNODES", "3")
    assert world_size_from_env() == 24
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert world_size_from_env() == 2
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(ConfigError, match=r"environment: WORLD_SIZE \('two'\) must be a positive integer"):
        world_size_from_env()


# --- defaults and sections ----------------------------------------------------------------------------


def test_every_other_default_is_torchtitans(job: Callable[..., Job]) -> None:
    ours, theirs = job().trainer, Trainer.Config()
    for section in keys_of(Trainer.Config):
        if section in ("dump_folder", "hf_assets_path", "dataloader", "loss", "optimizer", "validator"):
            continue
        mine, default = (
            dataclasses.asdict(getattr(ours, section)),
            dataclasses.asdict(getattr(theirs, section)),
        )
        assert mine.keys() - default.keys() == ({"verify"} if section == "checkpoint" else set())
        changed = {f"{section}.{key}" for key in default if mine[key] != default[key]}
        assert changed <= OUR_DEFAULTS.keys(), section
    assert ours.dump_folder == "./outputs/x"
    assert ours.hf_assets_path == str(TOKENIZER_DIR)
    assert (ours.validator.freq, ours.validator.steps) == (theirs.validator.freq, theirs.validator.steps)
    assert ours.optimizer.implementation == ("fused" if utils.device_type == "cuda" else "foreach")


@pytest.mark.parametrize(
    ("arguments", "section", "wanted"),
    [
        ("", "activation_checkpoint", SelectiveAC.Config()),
        ("--activation_checkpoint.mode none", "activation_checkpoint", None),
        ("--activation_checkpoint.mode full", "activation_checkpoint", FullAC.Config()),
        (
            "--compile.enable --activation_checkpoint.mode memory_budget "
            "--activation_checkpoint.memory_budget 1",
            "activation_checkpoint",
            MemoryBudgetAC.Config(memory_budget=1.0),
        ),
        ("", "loss", CrossEntropyLoss.Config()),
        ("--loss.name chunked_cross_entropy", "loss", ChunkedLossWrapper.Config()),
        (
            "--loss.name chunked_cross_entropy --loss.num_chunks 4",
            "loss",
            ChunkedLossWrapper.Config(num_chunks=4),
        ),
        ("--dataloader.seed 3", "dataloader", TextDataLoader.Config(seed=3)),
        (
            "--dataloader.source huggingface --dataloader.dataset c4",
            "dataloader",
            HuggingFaceTextDataLoader.Config(dataset="c4"),
        ),
    ],
)
def test_sections_with_variants(job: Callable[..., Job], arguments: str, section: str, wanted: Any) -> None:
    assert getattr(job("", arguments).trainer, section) == wanted


def test_local_files_and_the_validators_own_loader(job: Callable[..., Job], tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("text")
    files = f'source = "files"\npaths = ["{tmp_path}/*.txt"]\n'
    trainer = job(f"[dataloader]\n{files}[validator]\nenable = true\n[validator.dataloader]\n{files}").trainer
    assert trainer.dataloader == trainer.validator.dataloader
    assert trainer.dataloader.source == "files"
    huggingface = job("", "--validator.dataloader.source huggingface").trainer.validator.dataloader
    assert (
        huggingface == Trainer.Config().validator.dataloader
    )  # with torchtitan's own values, not its class's


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            "--activation_checkpoint.mode none --activation_checkpoint.debug",
            "activation_checkpoint.debug is not a key of [activation_checkpoint] with mode = 'none'",
        ),
        (
            "--activation_checkpoint.mode full --activation_checkpoint.memory_budget 0.5",
            "with mode = 'full'; it belongs to mode = 'memory_budget'",
        ),
        ("--activation_checkpoint.mode ful", "not 'ful'; did you mean 'full'?"),
        ("--loss.num_chunks 3", "with name = 'cross_entropy'; it belongs to name = 'chunked_cross_entropy'"),
        ("--dataloader.dataset c4", "it belongs to source = 'huggingface'"),
        ("--validator.dataloader.dataset c4", "[validator.dataloader] with source = 'stdlib'"),
        ("--dataloader.source files", "needs dataloader.paths"),
    ],
)
def test_keys_of_another_variant_are_refused(error: Callable[..., str], arguments: str, message: str) -> None:
    assert message in error("", arguments)


def test_optimizer_short_form(job: Callable[..., Job]) -> None:
    (group,) = job("[optimizer]\nweight_decay = 0\n", "--optimizer.lr 3e-4").trainer.optimizer.param_groups
    kwargs = {"lr": 3e-4, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}
    assert (group.pattern, group.optimizer_name, group.optimizer_kwargs) == (".*", "AdamW", kwargs)


def test_optimizer_groups(job: Callable[..., Job], error: Callable[..., str]) -> None:
    text = """
[[optimizer.param_groups]]
pattern = 'router'
optimizer_name = "Adam"
optimizer_kwargs = { lr = 1e-4, betas = [0.9, 0.99] }
[[optimizer.param_groups]]
pattern = ".*"
optimizer_name = "AdamW"
optimizer_kwargs.lr = 1e-3
"""
    router, rest = job(text).trainer.optimizer.param_groups
    assert (router.pattern, router.optimizer_kwargs) == ("router", {"lr": 1e-4, "betas": (0.9, 0.99)})
    assert (rest.optimizer_name, rest.optimizer_kwargs) == ("AdamW", {"lr": 1e-3})
    said = error(text, "--optimizer.lr 3e-4")
    assert said.startswith("command line: optimizer.lr and optimizer.param_groups exclude each other")
    assert "optimizer.param_groups[1].patern is not a key" in error(text.replace('pattern = "', 'patern = "'))
    assert "optimizer.param_groups[1].pattern is not set" in error(text.replace('pattern = ".*"', ""))


@dataclass(frozen=True)
class _FakeDispatcher:
    """A backend with keys of its own, as [moe.fake]."""

    requires_ep = True
    needs_host_sync = False

    @dataclass(kw_only=True, slots=True)
    class Config(LocalDispatcher.Config):
        num_sms: int = 24

        def validate(self, limits: DispatchLimits) -> None:
            if self.num_sms > limits.num_max_tokens_per_rank:
                raise ValueError(f"num_sms ({self.num_sms}) exceeds {limits.num_max_tokens_per_rank} tokens")


def test_backend_tables(
    job: Callable[..., Job], error: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(dispatch.DISPATCHERS, "fake", f"{__name__}:_FakeDispatcher")
    text = '[moe]\ndispatcher = "fake"\n[moe.fake]\nnum_sms = 8\n[parallelism]\nexpert_parallel_degree = 2\n'
    chosen = job(text)
    (_, layer, _, _), *_ = chosen.trainer.model_spec.model.traverse(MoE.Config)
    assert layer.routed_experts.token_dispatcher == _FakeDispatcher.Config(num_experts=8, top_k=3, num_sms=8)
    assert chosen.resolved["moe"] == {
        "dispatcher": "fake",
        "save": "all",
        "load_balance_coeff": 1e-3,
        "fake": {"num_sms": 8},
    }
    assert (
        "fake"
        not in job(text, "--moe.dispatcher local --parallelism.expert_parallel_degree 1").resolved["moe"]
    )
    # Strict, chosen or not; its own limits count; and it says that it needs EP.
    assert "moe.fake.num_sm is not a key of [moe.fake]; did you mean 'num_sms'?" in error(
        text, "--moe.fake.num_sm 1"
    )
    unused = error(text, "--moe.dispatcher all_to_all --moe.fake.num_sms many")
    assert unused == "command line: moe.fake.num_sms must be an integer, not 'many'"
    assert "moe.dispatcher 'fake': num_sms (99999) exceeds" in error(text, "--moe.fake.num_sms 99999")
    assert "expert_parallel_degree (1) > 1" in error(text, "--parallelism.expert_parallel_degree 1")
    assert "moe.other is not a dispatcher (there are: local" in error(text, "--moe.other.x 1")
    assert "moe.fake.top_k is not a key" in error(text, "--moe.fake.top_k 1")


@pytest.mark.parametrize(("given", "wanted"), [("none", None), ("0.01", 0.01)])
def test_load_balance_coeff_reaches_every_layer(job: Callable[..., Job], given: str, wanted: Any) -> None:
    model = job("", f"--moe.load_balance_coeff {given}").trainer.model_spec.model
    assert [layer.load_balance_coeff for _, layer, _, _ in model.traverse(MoE.Config)] == [wanted] * 5


# --- resolved.toml ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        "",
        "--activation_checkpoint.mode none --debug.seed 1 --parallelism.context_parallel_load_balancer none",
        "--activation_checkpoint.mode full --loss.name chunked_cross_entropy --loss.num_chunks 4",
        "--dataloader.source huggingface --dataloader.dataset c4 --moe.load_balance_coeff none",
        "--validator.dataloader.source huggingface --optimizer.name Adam --optimizer.betas '[0.8, 0.9]'",
        '--optimizer.param_groups \'[{pattern="x", optimizer_name="Adam", '
        "optimizer_kwargs={lr=1, betas=[0.5, 0.5]}}]'",
        "--override.imports '[[\"a.b\", {k = 1.5}]]' --parallelism.module_fqns_per_model_part '[[\"norm\"]]'",
        "--moe.dispatcher local --training.max_norm 2 --dump_folder out",
    ],
)
def test_resolved_is_a_fixed_point(job: Callable[..., Job], tmp_path: Path, arguments: str) -> None:
    first = job("", arguments)
    file = tmp_path / "deep" / "resolved.toml"
    write_resolved(first, file)
    again = load([str(file)], world_size=4)
    assert tomllib.loads(file.read_text()) == again.resolved == first.resolved
    assert again.trainer.to_dict() == first.trainer.to_dict()


def test_resolved_holds_every_key_in_force(job: Callable[..., Job]) -> None:
    resolved = job("", "--training.steps 7").resolved
    assert resolved["training"]["steps"] == 7
    assert resolved["debug"]["seed"] == "none"
    ours = {"moe": "titan_moe", "norm_eps": "none"}
    assert resolved["model"] == {"name": "deepseek_v3", "flavor": "debugmodel"} | ours
    for section in keys_of(Trainer.Config):
        assert section in resolved
