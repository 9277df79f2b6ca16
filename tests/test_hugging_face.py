"""Hugging Face's format both ways, against transformers' own models: an oracle that shares no code."""

import copy
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file, save_file
from torch import Tensor
from torchtitan.components.checkpointer.base import MODEL, ModelWrapper
from torchtitan.components.checkpointer.dcp import CheckpointManager
from torchtitan.models.deepseek_v3.state_dict_adapter import DeepSeekV3StateDictAdapter
from torchtitan.models.qwen3.state_dict_adapter import Qwen3StateDictAdapter

from tests import tiny_models
from tests.ranks import run_ranks
from tests.tiny_models import NUM_EXPERTS, VOCAB, deepseek, hf_deepseek, hf_qwen3_moe, qwen3_moe, scramble
from titan_moe import models
from titan_moe.models.hugging_face.config_json import HuggingFaceError, difference, hf_config
from titan_moe.models.hugging_face.folder import EXPERT_BIAS
from titan_moe.trainer.checkpoint import CheckpointManager as OurManager
from titan_moe.trainer.convert import main
from titan_moe.trainer.data import TOKENIZER_DIR

transformers = pytest.importorskip("transformers", reason="the oracle: pip install -e '.[dev]'")

DEBUG_LOCAL = Path(__file__).parent.parent / "train_configs" / "debug_local.toml"
TOLERANCE = 1e-4  # of logits up to 5, fp32
TOKENS = torch.randint(0, VOCAB, (2, 23), generator=torch.Generator().manual_seed(1))

# Ours, and transformers' as its users would write it.
PAIRS: dict[str, tuple[Callable[[], Any], Callable[[], Any]]] = {
    "deepseek_v3": (deepseek, hf_deepseek),
    "deepseek_v3 without groups, route_norm, q_lora": (
        lambda: deepseek(groups=None, route_norm=False, q_lora_rank=0),
        lambda: hf_deepseek(groups=1, route_norm=False, q_lora_rank=None),
    ),
    "qwen3_moe": (qwen3_moe, hf_qwen3_moe),
    "qwen3_moe without route_norm, a dense layer": (
        lambda: qwen3_moe(route_norm=False, dense=True),
        lambda: hf_qwen3_moe(route_norm=False, dense=True),
    ),
}
# What only the way out meets.
OUT_ONLY: dict[str, Callable[[], Any]] = {
    "softmax: deepseek_v2": lambda: deepseek(score_func="softmax", groups=None, route_norm=False, coeff=None),
    "deepseek_v3 without expert bias": lambda: deepseek(coeff=None),
    "deepseek_v3 without yarn": lambda: deepseek(yarn=False),
}


def build(spec: Any) -> Any:
    """A whole model on one rank."""
    model = spec.model.build()
    model.init_states()
    return model.eval()


def our_logits(model: Any) -> Tensor:
    return tiny_models.logits(model, TOKENS)


def hf_logits(model: Any) -> Tensor:
    with torch.no_grad():
        return model(TOKENS).logits


def hf_model(config: Any) -> Any:
    model = scramble(transformers.AutoModelForCausalLM.from_config(config))
    model.set_experts_implementation("eager")  # a loop over experts: the plainest it has
    return model


def hf_folder(path: Path, config: Any) -> Path:
    hf_model(config).save_pretrained(path)
    return path


def open_folder(path: Path) -> Any:
    """As a user of transformers would; nothing may be missing, left over or made up."""
    model, report = transformers.AutoModelForCausalLM.from_pretrained(path, output_loading_info=True)
    assert not any(report.values()), report
    model.set_experts_implementation("eager")
    return model.eval()


def load_folder(spec: Any, path: Path, *, adapter: Any = None, quantized: bool = False) -> Any:
    """What ``checkpoint.initial_load_in_hf`` does, by torchtitan's own checkpointer."""
    model = build(spec)
    wrapper = ModelWrapper([model])
    checkpointer: Any = SimpleNamespace(
        sd_adapter=(adapter or spec.state_dict_adapter)(spec.model, None), states={MODEL: wrapper}
    )
    CheckpointManager.dcp_load(
        checkpointer, wrapper.state_dict(), checkpoint_id=str(path), from_hf=True, from_quantized=quantized
    )
    return model


def run_folder(path: Path, model: Any, *, name: str = "deepseek_v3", step: int = 7) -> Path:
    """The dump folder of a run that ended with this model."""
    path.mkdir(exist_ok=True)
    (path / "resolved.toml").write_text(f'[model]\nname = "{name}"\nflavor = "debugmodel"\n')
    dcp.save(model.state_dict(), checkpoint_id=path / "checkpoint" / f"step-{step}")
    return path


def write(spec: Any, model: Any, folder: Path) -> dict[str, Tensor]:
    """The adapter's tensors, as a file."""
    named = spec.state_dict_adapter(spec.model, None).to_hf(model.state_dict())
    named = {name: tensor.contiguous().clone() for name, tensor in named.items()}
    folder.mkdir(exist_ok=True)
    save_file(named, folder / "model.safetensors")
    return named


def last_save(spec: Any, model: Any, folder: Path, *, manager: Any, dtype: str = "float32") -> Path:
    """What ``checkpoint.last_save_in_hf`` does at the end of a run, by this manager, on one rank."""
    checkpointer = object.__new__(manager)
    checkpointer.folder, checkpointer.states = str(folder), {MODEL: ModelWrapper([model])}
    checkpointer.sd_adapter = spec.state_dict_adapter(spec.model, str(TOKENIZER_DIR))
    checkpointer.last_save_in_hf = checkpointer.last_save_model_only = True
    checkpointer.export_dtype = getattr(torch, dtype)
    checkpointer._save_last_step(7)
    return folder / "step-7"


@pytest.fixture
def tiny_flavor(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[], Any]], None]:
    """Makes every flavor the given one."""
    return lambda make: monkeypatch.setattr(models, "build_spec", lambda *_, **__: make())


def distance(left: Tensor, right: Tensor) -> float:
    assert left.abs().max() > 1, "logits that are all small prove little"
    return (left - right).abs().max().item()


class TestIn:
    @pytest.mark.parametrize("pair", PAIRS)
    def test_logits(self, pair: str, tmp_path: Path) -> None:
        ours, theirs = PAIRS[pair]
        folder = hf_folder(tmp_path / "hf", theirs())
        assert distance(our_logits(load_folder(ours(), folder)), hf_logits(open_folder(folder))) < TOLERANCE

    def test_several_files(self, tmp_path: Path) -> None:
        model = hf_model(hf_deepseek())
        model.save_pretrained(tmp_path, max_shard_size="200KB")
        assert len(list(tmp_path.glob("*.safetensors"))) > 2
        assert distance(our_logits(load_folder(deepseek(), tmp_path)), hf_logits(model)) < TOLERANCE

    @pytest.mark.parametrize("quantized", [False, True])
    def test_fp8(self, tmp_path: Path, quantized: bool) -> None:
        """With scales multiplied in, whether the flag is set or not."""
        folder, whole = fp8_folder(tmp_path)
        expected = our_logits(load_folder(deepseek(), whole))
        assert torch.equal(our_logits(load_folder(deepseek(), folder, quantized=quantized)), expected)
        stock = load_folder(deepseek(), folder, adapter=DeepSeekV3StateDictAdapter)
        assert distance(our_logits(stock), expected) > 0.5, "torchtitan's adapter takes fp8 for weights"

    def test_multi_token_prediction_layers_are_left_out(self, tmp_path: Path) -> None:
        folder = hf_folder(tmp_path, hf_deepseek())
        expected = our_logits(load_folder(deepseek(), folder))
        extra = {
            "model.layers.3.eh_proj.weight": torch.ones(32, 64),
            "model.layers.3.enorm.weight": torch.ones(32),
        }
        edit(folder, lambda tensors: tensors | extra, num_nextn_predict_layers=1)
        assert torch.equal(our_logits(load_folder(deepseek(), folder)), expected)

    def test_multi_token_prediction_layers_are_loaded_where_the_model_has_them(self, tmp_path: Path) -> None:
        spec = deepseek(mtp=1)
        source = scramble(build(spec))
        assert "model.layers.3.mlp.experts.11.up_proj.weight" in write(spec, source, tmp_path)
        ours = load_folder(spec, tmp_path).state_dict()
        assert all(torch.equal(ours[name], tensor) for name, tensor in source.state_dict().items())

    def test_a_bias_that_qwen3_does_not_have(self, tmp_path: Path) -> None:
        """Ours starts from zero, and comes back from a folder that we have written."""
        spec = qwen3_moe(coeff=1e-3)
        folder = hf_folder(tmp_path, hf_qwen3_moe())
        model = load_folder(spec, folder)
        assert not model.layers["1"].moe.expert_bias_E.any()
        write(spec, scramble(model), folder)
        bias_E = load_folder(qwen3_moe(coeff=1e-3), folder).layers["1"].moe.expert_bias_E
        assert bias_E.any()
        assert torch.equal(bias_E, model.layers["1"].moe.expert_bias_E)
        stock = Qwen3StateDictAdapter(spec.model, None).to_hf(model.state_dict())
        assert not any(name.endswith(EXPERT_BIAS) for name in stock), "torchtitan's adapter drops it"


class TestOut:
    @pytest.mark.parametrize("name", [*PAIRS, *OUT_ONLY])
    def test_logits(self, name: str, tmp_path: Path, tiny_flavor: Any, capsys: Any) -> None:
        make = OUT_ONLY[name] if name in OUT_ONLY else PAIRS[name][0]
        tiny_flavor(make)
        ours = scramble(build(make()))
        run = run_folder(tmp_path / "run", ours)
        assert main(["export", str(run), str(tmp_path / "hf")]) == 0
        assert "tensors in float32, from" in capsys.readouterr().out
        theirs = open_folder(tmp_path / "hf")
        assert theirs.dtype == torch.float32
        assert distance(our_logits(ours), hf_logits(theirs)) < TOLERANCE

    def test_bf16_keeps_the_expert_bias_in_fp32(self, tmp_path: Path, tiny_flavor: Any) -> None:
        tiny_flavor(deepseek)
        ours = scramble(build(deepseek()))
        run = run_folder(tmp_path / "run", ours)
        assert main(["export", str(run), str(tmp_path / "hf"), "--dtype", "bfloat16"]) == 0
        gate = open_folder(tmp_path / "hf").model.layers[1].mlp.gate
        assert gate.weight.dtype == torch.bfloat16
        assert torch.equal(gate.e_score_correction_bias, ours.layers["1"].moe.expert_bias_E)

    def test_several_files(self, tmp_path: Path, tiny_flavor: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("titan_moe.models.hugging_face.export.MAX_FILE_BYTES", 200_000)
        tiny_flavor(deepseek)
        ours = scramble(build(deepseek()))
        assert main(["export", str(run_folder(tmp_path / "run", ours)), str(tmp_path / "hf")]) == 0
        assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 2
        assert distance(our_logits(ours), hf_logits(open_folder(tmp_path / "hf"))) < TOLERANCE

    def test_tokenizer(self, tmp_path: Path, tiny_flavor: Any) -> None:
        tiny_flavor(deepseek)
        main(["export", str(run_folder(tmp_path / "run", build(deepseek()))), str(tmp_path / "hf")])
        tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "hf")
        config = transformers.AutoConfig.from_pretrained(tmp_path / "hf")
        assert tokenizer.eos_token_id == config.eos_token_id == 1
        assert (tmp_path / "hf" / "tokenizer.json").read_bytes() == (
            TOKENIZER_DIR / "tokenizer.json"
        ).read_bytes()


# What is published, but for keys that no rule of ours reads.
PUBLISHED: dict[tuple[str, str], dict[str, Any]] = {
    ("deepseek_v3", "671B"): {
        "attention_bias": False,
        "first_k_dense_replace": 3,
        "hidden_act": "silu",
        "hidden_size": 7168,
        "intermediate_size": 18432,
        "kv_lora_rank": 512,
        "max_position_embeddings": 163840,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": 2048,
        "moe_layer_freq": 1,
        "n_group": 8,
        "n_routed_experts": 256,
        "n_shared_experts": 1,
        "norm_topk_prob": True,
        "num_attention_heads": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 61,
        "num_key_value_heads": 128,
        "num_nextn_predict_layers": 1,
        "q_lora_rank": 1536,
        "qk_nope_head_dim": 128,
        "qk_rope_head_dim": 64,
        "quantization_config": {"fmt": "e4m3", "quant_method": "fp8", "weight_block_size": [128, 128]},
        "rms_norm_eps": 1e-06,
        "rope_scaling": {
            **{"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0},
            **{"original_max_position_embeddings": 4096, "type": "yarn"},
        },
        "rope_theta": 10000,
        "routed_scaling_factor": 2.5,
        "scoring_func": "sigmoid",
        "tie_word_embeddings": False,
        "topk_group": 4,
        "topk_method": "noaux_tc",
        "v_head_dim": 128,
        "vocab_size": 129280,
    },
    ("qwen3_moe", "30B-A3B"): {
        "attention_bias": False,
        "decoder_sparse_step": 1,
        "head_dim": 128,
        "hidden_act": "silu",
        "hidden_size": 2048,
        "intermediate_size": 6144,
        "max_position_embeddings": 40960,
        "mlp_only_layers": [],
        "model_type": "qwen3_moe",
        "moe_intermediate_size": 768,
        "norm_topk_prob": True,
        "num_attention_heads": 32,
        "num_experts": 128,
        "num_experts_per_tok": 8,
        "num_hidden_layers": 48,
        "num_key_value_heads": 4,
        "rms_norm_eps": 1e-06,
        "rope_scaling": None,
        "rope_theta": 1000000.0,
        "tie_word_embeddings": False,
        "use_sliding_window": False,
        "vocab_size": 151936,
    },
}


@pytest.mark.parametrize(("name", "flavor"), PUBLISHED)
def test_the_real_sizes_are_the_published_models(name: str, flavor: str) -> None:
    published = PUBLISHED[name, flavor]
    model: Any = models.build_spec(name, flavor, norm_eps=1e-6).model
    assert difference(model, published) == ""
    unread = {"max_position_embeddings", "num_nextn_predict_layers", "rope_scaling"}
    unread |= {"intermediate_size"} if name == "qwen3_moe" else set()  # of dense layers, which it lacks
    for key in published.keys() & hf_config(model).keys() - unread:
        value = published[key]
        other = "other" if isinstance(value, str) else [7] if isinstance(value, list) else 3 + value
        assert difference(model, published | {key: other}), f"{key} goes unnoticed"


# A difference that must not pass for rounding: what is done to our model after it was loaded.
FAULTS: dict[str, Callable[[Any], None]] = {
    "expert bias zeroed": lambda layer: layer.moe.expert_bias_E.zero_(),
    "experts in the order of their names as strings": lambda layer: _permute(
        layer.moe, sorted(range(NUM_EXPERTS), key=str)
    ),
    "route_norm flipped": lambda layer: _router(layer, route_norm=False),
    "group limit ignored": lambda layer: _router(layer, num_expert_groups=None),
    "route_scale of 1": lambda layer: _router(layer, route_scale=1.0),
    "softmax for sigmoid": lambda layer: _router(layer, score_func="softmax"),
    "torchtitan's eps": lambda layer: _eps(layer, 1e-5),
    "no yarn in the softmax scale": lambda layer: setattr(layer.attention, "softmax_scale", 16**-0.5),
    "gate and up swapped": lambda layer: _swap(layer.moe.routed_experts.inner_experts),
}


def _permute(moe: Any, order: list[int]) -> None:
    for weight in moe.routed_experts.inner_experts.parameters():
        weight.data = weight.data[order]


def _router(layer: Any, **changes: Any) -> None:
    layer.moe.router.config = copy.copy(layer.moe.router.config)
    for name, value in changes.items():
        setattr(layer.moe.router.config, name, value)


def _eps(layer: Any, eps: float) -> None:
    for module in layer.modules():
        if isinstance(module, torch.nn.RMSNorm):
            module.eps = eps


def _swap(experts: Any) -> None:
    experts.w1_EFD.data, experts.w3_EFD.data = experts.w3_EFD.data, experts.w1_EFD.data


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Tensor]:
    """Ours from a folder, and the logits of the model that wrote it."""
    theirs = hf_model(hf_deepseek())
    folder = tmp_path_factory.mktemp("hf")
    theirs.save_pretrained(folder)
    return load_folder(deepseek(), folder), hf_logits(theirs)


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str, loaded: tuple[Any, Tensor]) -> None:
    model, expected = copy.deepcopy(loaded[0]), loaded[1]
    assert distance(our_logits(model), expected) < TOLERANCE
    with torch.no_grad():
        FAULTS[fault](model.layers["1"])
    assert distance(our_logits(model), expected) > TOLERANCE


def edit(folder: Path, change: Callable[[dict[str, Tensor]], dict[str, Tensor]], **config: Any) -> None:
    """Other tensors, other keys of config.json."""
    save_file(change(load_file(folder / "model.safetensors")), folder / "model.safetensors")
    given = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(given | config))


def fp8_folder(path: Path, block: int = 16) -> tuple[Path, Path]:
    """A folder of DeepSeek's kind, in blocks; and what it stands for, in fp32."""
    folder, whole = (hf_folder(path / name, hf_deepseek()) for name in ("fp8", "whole"))
    quantized, exact = {}, {}
    for name, weight in load_file(whole / "model.safetensors").items():
        if "_proj" not in name:
            quantized[name] = exact[name] = weight
            continue
        scales = torch.zeros(*(-(-size // block) for size in weight.shape))
        fp8, back = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty_like(weight)
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                place = (slice(i * block, (i + 1) * block), slice(j * block, (j + 1) * block))
                scales[i, j] = weight[place].abs().max() / 448
                fp8[place] = (weight[place] / scales[i, j]).to(torch.float8_e4m3fn)
                back[place] = fp8[place].float() * scales[i, j]
        quantized |= {name: fp8, name.removesuffix(".weight") + ".weight_scale_inv": scales}
        exact[name] = back
    edit(folder, lambda _: quantized, quantization_config={"weight_block_size": [block, block]})
    edit(whole, lambda _: exact)
    return folder, whole


def train(
    folder: Path, run: Path, *arguments: str, train: bool = False, family: str = "deepseek_v3", **changes: Any
) -> list[Any]:
    """4 ranks, from ``folder`` to the step folder of ``run``, by torchtitan's keys."""
    run.mkdir()
    argv = [
        *(str(DEBUG_LOCAL), f"--dump_folder={run}", "--debug.no-enable_structured_logging"),
        *("--training.steps=2", "--training.seq_len=32", "--training.mixed_precision_param=float32"),
        *("--training.local_batch_size=1", "--training.global_batch_size=4", "--moe.dispatcher=all_to_all"),
        *(
            "--checkpoint.enable",
            "--checkpoint.initial_load_in_hf",
            f"--checkpoint.initial_load_path={folder}",
        ),
        *("--model.norm_eps=1e-6", "--moe.load_balance_coeff=none"),  # of the model that is not the tiny one
        *("--checkpoint.last_save_in_hf", "--checkpoint.last_save_model_only", *arguments),
    ]
    return run_ranks(tiny_models.train_from_folder, 4, argv, family, changes, train, TOKENS, timeout_s=120.0)


class TestLastSave:
    """torchtitan's manager is the negative control: it writes no config.json and rounds the bias."""

    @pytest.mark.parametrize("name", ["deepseek_v3", "qwen3_moe"])
    def test_is_a_folder_that_transformers_opens(self, name: str, tmp_path: Path) -> None:
        spec = PAIRS[name][0]()
        model = scramble(build(spec))
        step = last_save(spec, model, tmp_path, manager=OurManager)
        assert distance(our_logits(model), hf_logits(open_folder(step))) < TOLERANCE
        assert (step / "tokenizer.json").read_bytes() == (TOKENIZER_DIR / "tokenizer.json").read_bytes()
        theirs = last_save(spec, model, tmp_path / "theirs", manager=CheckpointManager)
        assert not (theirs / "config.json").exists()

    @pytest.mark.parametrize("files", [1, 2])
    def test_bf16_keeps_the_expert_bias_in_fp32(
        self, files: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        if files > 1:
            monkeypatch.setattr("titan_moe.models.hugging_face.adapter.MAX_FILE_BYTES", 150_000)
        spec = deepseek()
        model = scramble(build(spec))
        step = last_save(spec, model, tmp_path, manager=OurManager, dtype="bfloat16")
        assert json.loads((step / "config.json").read_text())["torch_dtype"] == "bfloat16"
        found = sorted(step.glob("*.safetensors"))
        assert (len(found) > 1) == (files > 1)
        saved = {name: tensor for file in found for name, tensor in load_file(file).items()}
        for name, tensor in saved.items():
            assert tensor.dtype == (torch.float32 if name.endswith(EXPERT_BIAS) else torch.bfloat16)
        bias_E = model.state_dict()["layers.1.moe.expert_bias_E"]
        assert saved["model.layers.1" + EXPERT_BIAS].equal(bias_E)
        assert not bias_E.bfloat16().float().equal(bias_E)

        step = last_save(spec, model, tmp_path / "theirs", manager=CheckpointManager, dtype="bfloat16")
        theirs = {
            name: tensor for file in step.glob("*.safetensors") for name, tensor in load_file(file).items()
        }
        assert theirs["model.layers.1" + EXPERT_BIAS].dtype == torch.bfloat16


# torchtitan's adapter fails on the first two: (arguments, the model, how many experts each rank holds).
MESHES: dict[str, tuple[list[str], dict[str, Any], list[int]]] = {
    "HSDP 2 x 2, EP 2": (
        ["--parallelism.data_parallel_replicate_degree=2", "--parallelism.expert_parallel_degree=2"],
        {"family": "qwen3_moe"},
        [6, 6, 6, 6],
    ),
    "FSDP 4, 6 experts": ([], {"num_experts": 6, "groups": None}, [2, 2, 2, 0]),
    "EP 4, multi-token prediction": (["--parallelism.expert_parallel_degree=4"], {"mtp": 1}, [3, 3, 3, 3]),
    "FSDP 2, TP 2, several files": (
        ["--parallelism.tensor_parallel_degree=2"],
        {"family": "qwen3_moe", "max_file_bytes": 200_000},
        [6, 6, 6, 6],
    ),
}


SLOW_MESHES = ("FSDP 2, TP 2, several files", "EP 4, multi-token prediction")


class TestRanks:
    def test_from_a_folder_on_ep_4_to_a_folder_that_generates(
        self, tmp_path: Path, tiny_flavor: Any, capsys: Any
    ) -> None:
        theirs = hf_model(hf_deepseek())
        theirs.save_pretrained(tmp_path / "start")
        run = tmp_path / "run"
        arguments = ["--parallelism.expert_parallel_degree=4", "--checkpoint.interval=1"]
        ranks = train(tmp_path / "start", run, *arguments, train=True)
        for rank in ranks:
            assert rank["local_experts"] == 3
            assert distance(rank["loaded"], hf_logits(theirs)) < TOLERANCE
        tiny_flavor(deepseek)
        trained = open_folder(run / "checkpoint" / "step-2")
        written = (run / "checkpoint" / "step-2" / "config.json").read_bytes()
        (run / "resolved.toml").write_text('[model]\nname = "deepseek_v3"\nflavor = "debugmodel"\n')
        assert main(["describe", str(run)]) == 0
        assert f"{run / 'checkpoint' / 'step-2'}: 115 tensors, config.json added" in capsys.readouterr().out
        assert (run / "checkpoint" / "step-2" / "config.json").read_bytes() == written
        assert distance(hf_logits(trained), hf_logits(theirs)) > 0.01, "two steps that changed nothing"
        assert distance(ranks[0]["trained"], hf_logits(trained)) < TOLERANCE
        prompt = TOKENS[:1, :8]
        generated = trained.generate(prompt, max_new_tokens=20, do_sample=False, eos_token_id=None)
        tokens = generated[0, 8:].tolist()
        assert len(tokens) == 20
        assert [rank["greedy"] for rank in ranks] == [tokens] * 4

        assert main(["export", str(run), str(tmp_path / "exported"), "--step", "1"]) == 0
        whole = build(deepseek())
        dcp.load(whole.state_dict(), checkpoint_id=run / "checkpoint" / "step-1")
        assert distance(our_logits(whole), hf_logits(open_folder(tmp_path / "exported"))) < TOLERANCE

    @pytest.mark.parametrize(
        "mesh", [pytest.param(m, marks=[pytest.mark.slow] if m in SLOW_MESHES else []) for m in MESHES]
    )
    def test_in_and_out_on(self, mesh: str, tmp_path: Path) -> None:
        """The same bits come out, and in between the logits are those of one rank."""
        arguments, changes, local_experts = MESHES[mesh]
        sizes = {key: value for key, value in changes.items() if key not in ("family", "max_file_bytes")}
        spec = (qwen3_moe if changes.get("family") == "qwen3_moe" else deepseek)(**sizes)
        source = scramble(build(spec))
        expected = write(spec, source, tmp_path / "start")
        ranks = train(tmp_path / "start", tmp_path / "run", *arguments, **changes)
        assert [rank["local_experts"] for rank in ranks] == local_experts
        assert all(distance(rank["loaded"], our_logits(source)) < TOLERANCE for rank in ranks)
        files = sorted((tmp_path / "run" / "checkpoint" / "step-1").glob("*.safetensors"))
        assert (len(files) > 2) == ("max_file_bytes" in changes)
        written = {name: tensor for file in files for name, tensor in load_file(file).items()}
        assert written.keys() == expected.keys()
        assert all(torch.equal(written[name], tensor) for name, tensor in expected.items())


# What a folder must be refused for: (tensors and config.json edited, the model, what the line says).
GATE = "model.layers.1.mlp.gate.weight"
EXPERT = "model.layers.2.mlp.experts.11.down_proj.weight"
REFUSED: dict[str, tuple[Any, dict[str, Any], Callable[[], Any], str]] = {
    "an expert is missing": (lambda t: _without(t, EXPERT), {}, deepseek, f"lacks {EXPERT}$"),
    "the expert bias is missing": (
        lambda t: {name: x for name, x in t.items() if not name.endswith(EXPERT_BIAS)},
        {},
        deepseek,
        r"lacks model\.layers\.1\.mlp\.gate\.e_score_correction_bias and 1 more",
    ),
    "another shape": (
        lambda t: t | {GATE: t[GATE][:8].contiguous()},
        {},
        deepseek,
        r"gate\.weight is \[8, 32\], and the model's is \[12, 32\]",
    ),
    "a layer too many": (
        lambda t: t | {"model.layers.3.input_layernorm.weight": torch.ones(32)},
        {},
        deepseek,
        r"no place for model\.layers\.3\.input_layernorm",
    ),
    "a bias": (
        lambda t: t | {"model.layers.0.self_attn.o_proj.bias": torch.ones(32)},
        {},
        deepseek,
        r"no place for .*o_proj\.bias",
    ),
    "more experts": (
        None,
        {"n_routed_experts": 16},
        deepseek,
        "n_routed_experts is 16 in config.json and 12 in",
    ),
    "route_norm": (None, {"norm_topk_prob": False}, deepseek, "norm_topk_prob is False in .* and True in"),
    "groups": (None, {"topk_group": 3}, deepseek, "topk_group is 3 in config.json and 2"),
    "route_scale": (None, {"routed_scaling_factor": 1.0}, deepseek, "routed_scaling_factor is 1.0 in"),
    "eps": (None, {"rms_norm_eps": 1e-5}, deepseek, "rms_norm_eps is 1e-05 in config.json and 1e-06"),
    "rope in halves": (None, {"rope_interleave": False}, deepseek, "rope_interleave is False"),
    "attention bias": (None, {"attention_bias": True}, deepseek, "attention_bias is True"),
    "tied embeddings": (None, {"tie_word_embeddings": True}, deepseek, "tie_word_embeddings is True"),
    "another rope": (
        None,
        {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0}},
        deepseek,
        r"rope_scaling\.type is default in config\.json and yarn",
    ),
    "a rope that scales cos and sin": (
        None,
        {
            "rope_parameters": None,
            "rope_scaling": {**tiny_models.HF_YARN, "mscale": 1.0, "mscale_all_dim": 0.7},
        },
        deepseek,
        r"rope_scaling\.attention_factor is 1\.08",
    ),
    "another family": (None, {"model_type": "kimi_k2"}, deepseek, "model_type is kimi_k2"),
    "a bias for a model without": (
        None,
        {},
        lambda: deepseek(coeff=None),
        "has an expert bias and the model has none; set moe.load_balance_coeff",
    ),
    "fp8 without scales": (
        lambda t: t | {EXPERT: t[EXPERT].to(torch.float8_e4m3fn)},
        {},
        deepseek,
        f"{EXPERT} is F8_E4M3 and has no weight_scale_inv",
    ),
    "fp8 in other blocks": (
        lambda t: (
            t
            | {
                EXPERT: t[EXPERT].to(torch.float8_e4m3fn),
                EXPERT.replace(".weight", ".weight_scale_inv"): torch.ones(2, 2),
            }
        ),
        {},
        deepseek,
        r"has scales \[2, 2\], which are not one per 128 x 128",
    ),
}


def _without(tensors: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    return {key: tensor for key, tensor in tensors.items() if key != name}


@pytest.fixture(scope="module")
def good_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """To be edited in copies."""
    return hf_folder(tmp_path_factory.mktemp("hf"), hf_deepseek())


class TestRefused:
    @pytest.mark.parametrize("what", REFUSED)
    def test_folder(self, what: str, good_folder: Path, tmp_path: Path) -> None:
        change, config, make, says = REFUSED[what]
        folder = tmp_path / "hf"
        shutil.copytree(good_folder, folder)
        edit(folder, change or dict, **config)
        with pytest.raises(HuggingFaceError, match=says) as caught:
            load_folder(make(), folder)
        assert "\n" not in str(caught.value)

    def test_without_config_json_names_and_shapes_are_checked(
        self, good_folder: Path, tmp_path: Path
    ) -> None:
        shutil.copyfile(good_folder / "model.safetensors", tmp_path / "model.safetensors")
        load_folder(deepseek(), tmp_path)
        with pytest.raises(HuggingFaceError, match=r"lacks model\.layers\.0\.self_attn\.q_proj\.weight"):
            load_folder(deepseek(q_lora_rank=0), tmp_path)

    def test_unreadable(self, good_folder: Path, tmp_path: Path) -> None:
        with pytest.raises(HuggingFaceError, match=r"no \*\.safetensors here"):
            load_folder(deepseek(), tmp_path)
        (tmp_path / "model.safetensors").write_bytes((good_folder / "model.safetensors").read_bytes()[:1000])
        with pytest.raises(HuggingFaceError, match=r"model\.safetensors cannot be read"):
            load_folder(deepseek(), tmp_path)

    def test_twice_the_same_tensor(self, good_folder: Path, tmp_path: Path) -> None:
        for name in ("model.safetensors", "consolidated.safetensors"):
            shutil.copyfile(good_folder / "model.safetensors", tmp_path / name)
        with pytest.raises(HuggingFaceError, match=r"is in consolidated\.safetensors and model\.safetensors"):
            load_folder(deepseek(), tmp_path)

    def test_quantized_flag_without_fp8(self, good_folder: Path) -> None:
        with pytest.raises(HuggingFaceError, match=r"is not fp8; set .*_in_hf_quantized"):
            load_folder(deepseek(), good_folder, quantized=True)

    def test_tensors_without_a_place(self) -> None:
        """Offline: torchtitan's adapter loses experts without a word, or mixes them up."""
        spec = deepseek()
        adapter = spec.state_dict_adapter(spec.model, None)
        named = adapter.to_hf(build(spec).state_dict())
        with pytest.raises(HuggingFaceError, match=r"layers\.2\..*w2_EDF is not complete"):
            adapter.from_hf(_without(named, EXPERT))
        with pytest.raises(HuggingFaceError, match=r"no place for model\.layers\.9"):
            adapter.from_hf(named | {"model.layers.9.input_layernorm.weight": torch.ones(32)})
        with pytest.raises(HuggingFaceError, match=r"layers\.0\.attention\.wo\.bias has no name"):
            adapter.to_hf({"layers.0.attention.wo.bias": torch.ones(32)})
        small = deepseek(num_experts=8)
        experts = "layers.1.moe.routed_experts.inner_experts.w1_EFD"
        mixed = DeepSeekV3StateDictAdapter(small.model, None).from_hf(dict(sorted(named.items())))[experts]
        eleventh = named["model.layers.1.mlp.experts.11.gate_proj.weight"]
        assert torch.equal(mixed[7], eleventh), "torchtitan: experts 0 to 5, 10 and 11"
        with pytest.raises(HuggingFaceError, match=r"no place for .*experts\.10\."):
            small.state_dict_adapter(small.model, None).from_hf(dict(sorted(named.items())))

    @pytest.mark.parametrize(
        ("make", "says"),
        [
            (lambda: deepseek(score_func="softmax"), "a softmax router with expert groups or route_norm"),
            (
                lambda: _edited(deepseek(), lambda m: setattr(m.layers[1].attention.kv_norm, "eps", 1e-5)),
                "fixes both",
            ),
            (lambda: _edited(deepseek(), lambda m: setattr(m.layers[0], "moe", m.layers[1].moe)), None),
            (
                lambda: _edited(deepseek(), lambda m: m.layers.append(m.layers[0])),
                "a dense layer after a MoE layer",
            ),
            (
                lambda: _edited(deepseek(), lambda m: setattr(m.layers[1].moe.router, "top_k", 2)),
                "top_k is not the same",
            ),
            (
                lambda: _edited(qwen3_moe(), lambda m: setattr(m.layers[1].moe.router, "route_scale", 2.0)),
                "Qwen3-MoE",
            ),
            (
                lambda: _edited(qwen3_moe(), lambda m: setattr(m.layers[0].moe.router.gate, "bias", True)),
                "has a bias",
            ),
            (
                lambda: _edited(qwen3_moe(), lambda m: setattr(m.layers[0].attention, "qk_norm", None)),
                "per head",
            ),
        ],
    )
    def test_models_without_a_hugging_face_form(self, make: Callable[[], Any], says: str | None) -> None:
        if says is None:
            assert hf_config(make().model)["first_k_dense_replace"] == 0
            return
        with pytest.raises(HuggingFaceError, match=says):
            hf_config(make().model)


def _edited(spec: Any, change: Callable[[Any], Any]) -> Any:
    change(spec.model)
    return spec


class TestCommands:
    def _refused(self, capsys: Any, *argv: str) -> str:
        assert main(list(argv)) == 2
        printed = capsys.readouterr()
        assert not printed.out
        assert printed.err.startswith("titan_moe: ")
        assert printed.err.count("\n") == 1
        return printed.err

    def test_check(self, tmp_path: Path, tiny_flavor: Any, capsys: Any, good_folder: Path) -> None:
        tiny_flavor(deepseek)
        argv = ["check", str(DEBUG_LOCAL), "--checkpoint.initial_load_path", str(good_folder)]
        assert main(argv) == 0
        assert capsys.readouterr().out == f"{good_folder}: 115 tensors fit\n"
        assert main([*argv[:-1], str(fp8_folder(tmp_path)[0])]) == 0
        assert "115 tensors fit, fp8 in blocks of 16" in capsys.readouterr().out
        tiny_flavor(lambda: deepseek(route_norm=False))
        assert "norm_topk_prob is True in config.json" in self._refused(capsys, *argv)
        said = self._refused(capsys, "check", str(DEBUG_LOCAL), "--checkpoint.initial_load_pth=x")
        assert "did you mean 'initial_load_path'?" in said

    def test_export_refuses(self, tmp_path: Path, tiny_flavor: Any, capsys: Any) -> None:
        tiny_flavor(qwen3_moe)
        run, out = tmp_path / "run", str(tmp_path / "hf")
        assert "holds no resolved.toml" in self._refused(capsys, "export", str(run), out)
        run_folder(run, build(qwen3_moe()))
        assert "--step 3 is not there (there are: 7)" in self._refused(
            capsys, "export", str(run), out, "--step", "3"
        )
        assert "--stp is not an argument of export" in self._refused(
            capsys, "export", str(run), out, "--stp", "3"
        )
        assert "is not an empty folder" in self._refused(capsys, "export", str(run), str(run))
        assert "is a DCP checkpoint; export makes" in self._refused(capsys, "describe", str(run))
        tiny_flavor(deepseek)
        assert "it is another model's" in self._refused(capsys, "export", str(run), out)
        tiny_flavor(lambda: qwen3_moe(num_experts=8))
        assert "[12, 16, 32] here and [8, 16, 32] in the model" in self._refused(
            capsys, "export", str(run), out
        )
        assert not Path(out).exists()
        tiny_flavor(qwen3_moe)
        (data,) = (run / "checkpoint" / "step-7").glob("*.distcp")
        data.write_bytes(data.read_bytes()[:5000])
        assert "step-7 cannot be read: " in self._refused(capsys, "export", str(run), out)
        (run / "checkpoint" / "step-9").mkdir()
        assert "is not a DCP checkpoint" in self._refused(capsys, "export", str(run), str(tmp_path / "other"))

    def test_an_expert_bias_in_bf16_is_told(self, tmp_path: Path, tiny_flavor: Any, capsys: Any) -> None:
        """torchtitan's export_dtype rounds it with all the rest."""
        tiny_flavor(deepseek)
        run = run_folder(tmp_path / "run", build(deepseek()))
        step = run / "checkpoint" / "step-8"
        named = write(deepseek(), build(deepseek()), step)
        (step / "model.safetensors.index.json").write_text("{}")
        assert main(["describe", str(run)]) == 0
        assert "rounded" not in capsys.readouterr().out
        save_file({name: tensor.bfloat16() for name, tensor in named.items()}, step / "model.safetensors")
        assert main(["describe", str(run)]) == 0
        assert "its expert bias was rounded by checkpoint.export_dtype" in capsys.readouterr().out
        assert json.loads((step / "config.json").read_text())["torch_dtype"] == "bfloat16"

    @pytest.mark.parametrize("command", ["export", "describe"])
    def test_an_expert_bias_that_would_be_lost(
        self, command: str, tmp_path: Path, tiny_flavor: Any, capsys: Any
    ) -> None:
        """Qwen3-MoE with torchtitan's balancing: refused, unless the bias is zero or dropped on purpose."""
        make = lambda: qwen3_moe(coeff=1e-3)  # noqa: E731
        tiny_flavor(make)
        model = build(make())
        run, folder = tmp_path / "run", tmp_path / "hf"
        argv = [command, str(run), *([str(folder)] if command == "export" else [])]

        def save() -> None:
            run_folder(run, model)
            if command == "describe":
                step = run / "checkpoint" / "step-8"
                write(make(), model, step)
                (step / "model.safetensors.index.json").write_text("{}")

        save()
        assert main(argv) == 0
        shutil.rmtree(folder, ignore_errors=True)
        scramble(model)
        save()
        capsys.readouterr()
        assert re.search(
            r"the expert bias \(up to 0\.\d+\) takes part in routing", self._refused(capsys, *argv)
        )
        assert main([*argv, "--drop-expert-bias"]) == 0
