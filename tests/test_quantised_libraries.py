"""Protects the reading of quantised checkpoints beside the libraries that write them: their packing of known numbers is
read to the bit, and what store_quantised writes is read by them. Each is skipped, with the reason, where its library
is not installed; none needs a GPU. How to install them stands in docs/checkpoints.md."""

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_ref.checkpoints.naming import find_naming
from moe_ref.checkpoints.quantisation_config import read_format
from moe_ref.checkpoints.quantised_names import MATRICES, LayerNames
from moe_ref.checkpoints.quantised_reader import open_quantised
from moe_ref.checkpoints.quantised_writer import store_quantised
from moe_ref.contract.encoded import Encoded
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.quantised import QuantisedWeights
from moe_ref.contract.spec import MLP, MoESpec, Router, SharedExpert
from moe_ref.contract.vocabulary import Scheme
from moe_ref.oracle.decode import decode
from tests.distinct_encoded import assert_same_weights, make_weights
from tests.quantised_configs import CONFIGS

SPEC = MoESpec(hidden_size=128, intermediate_size=256, shared=SharedExpert(intermediate_size=256),
               router=Router(num_experts=3, top_k=2, score="sigmoid", selection_bias="score", renormalize=True))
"""Sizes that every library takes: AutoAWQ and compressed-tensors have no partial groups."""
FAMILY, LAYER = "deepseek_v3", 1


def library(name: str) -> ModuleType:
    """The module, or a skip that says what is missing."""
    return pytest.importorskip(name, reason=f"{name.partition('.')[0]} is not installed, or something that it needs")


def layer_of(name: str) -> tuple[QuantisedWeights, dict[str, Any]]:
    """Weights of the format's scheme and its configuration; no code is -0, which the libraries write as 0."""
    scheme, config = CONFIGS[name]
    weights = make_weights(scheme, SPEC)
    if scheme in (Scheme.NVFP4, Scheme.MXFP4):
        for field in ("w13", "w2", "shared_w13", "shared_w2"):
            codes = getattr(weights, field).codes
            codes[codes & 15 == 8] += 1
            codes[codes >> 4 == 8] += 16
    return weights, config


def stored_by(weights: QuantisedWeights, config: dict[str, Any],
              convert: Callable[[Encoded], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    """The layer's tensors, in which `convert` made those of every encoded matrix."""
    tensors = store_quantised(weights, LAYER, FAMILY, SPEC, config)
    names = LayerNames(f"model.layers.{LAYER}.", find_naming(FAMILY), SPEC, read_format("config", config))
    for start, part in (("", "experts"), ("shared_", "shared")):
        for parameter in MATRICES:
            matrix = getattr(weights, start + parameter)
            for place, one in enumerate(names.matrices(part, parameter)):  # type: ignore[arg-type]
                for e, module in enumerate(one.modules):
                    expert = matrix if start else matrix.at(e)
                    converted = convert(expert.at(place) if parameter == "w13" else expert)
                    tensors |= {names.tensor(module, key): tensor for key, tensor in converted.items()}
    return tensors


def check_read(folder: Path, tensors: dict[str, torch.Tensor], config: dict[str, Any],
               weights: QuantisedWeights) -> None:
    """The file gives these weights, whole and on every rank of three."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps({"quantization_config": config}))
    for parallel in (Parallel(), Parallel(tp=3)):
        for rank in range(parallel.size):
            read = open_quantised(folder, LAYER, FAMILY, SPEC, parallel, rank)
            assert_same_weights(read, weights.shard(parallel, rank))


COMPRESSED = [name for name, (_, config) in CONFIGS.items()
              if config["quant_method"] == "compressed-tensors" and name != "int4_order"]
"""int4_order is left out: actorder="group" was taken out of the library, files that have it are older."""


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_writes(name: str, tmp_path: Path) -> None:
    """The library quantises the decoded numbers with the given scales: codes and packing are its own."""
    compressors, quantization = library("compressed_tensors.compressors"), library("compressed_tensors.quantization")
    weights, config = layer_of(name)
    scheme = quantization.QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = compressors.BaseCompressor.get_value_from_registry(config["format"])
    stored_format = read_format("config", config)

    def convert(matrix: Encoded) -> dict[str, torch.Tensor]:
        given = stored_format.store(matrix) | {"weight": decode(matrix).float()}
        if matrix.zeros is not None:
            given["weight_zero_point"] = (matrix.zeros.to(torch.int16) - 8).to(torch.int8)
        if matrix.scales.dtype in (torch.uint8, torch.float8_e4m3fn):
            exponents = matrix.scales.dtype == torch.uint8
            given["weight_scale"] = torch.exp2(matrix.scales.float() - 127) if exponents else matrix.scales.float()
        given.pop("weight_packed", None)
        return compressor.compress(given, scheme)

    check_read(tmp_path, stored_by(weights, config, convert), config, weights)


@pytest.mark.parametrize("name", COMPRESSED)
def test_compressed_tensors_reads(name: str) -> None:
    """The library's numbers of what we store are the decoded ones, rounded once to the dtype that it decodes in."""
    compressors, quantization = library("compressed_tensors.compressors"), library("compressed_tensors.quantization")
    weights, config = layer_of(name)
    scheme = quantization.QuantizationScheme(**config["config_groups"]["group_0"])
    compressor = compressors.BaseCompressor.get_value_from_registry(config["format"])
    matrix = weights.w2.at(1)
    stored = read_format("config", config).store(matrix) | {"weight_shape": torch.tensor(matrix.shape)}
    read = compressor.decompress(stored, scheme)["weight"]
    assert read.dtype in (torch.float32, torch.float16, torch.bfloat16)
    assert torch.equal(read, decode(matrix).to(read.dtype))


@pytest.mark.parametrize("name", ["gptq", "gptq_32", "gptq_v2", "gptq_zeros", "gptq_order", "gptq_order_32"])
def test_gptqmodel_writes(name: str, tmp_path: Path) -> None:
    """GPTQModel packs in format gptq_v2, and takes one from every zero point for format gptq."""
    torch_linear = library("gptqmodel.nn_modules.qlinear.torch").TorchLinear
    to_v1 = library("gptqmodel.utils.model").convert_gptq_v2_to_v1_format_module
    weights, config = layer_of(name)

    def convert(matrix: Encoded) -> dict[str, torch.Tensor]:
        num_rows, num_columns = matrix.shape
        linear = torch.nn.Linear(num_columns, num_rows, bias=False)
        linear.weight.data = decode(matrix).float()
        groups = torch.arange(num_columns) // config["group_size"] if matrix.groups is None else matrix.groups
        zeros = torch.full_like(matrix.scales, 8.0) if matrix.zeros is None else matrix.zeros
        layer = torch_linear(bits=4, group_size=config["group_size"], sym=config["sym"], desc_act=config["desc_act"],
                             in_features=num_columns, out_features=num_rows, bias=False, register_buffers=False)
        layer.pack_original(linear, matrix.scales.float(), zeros.float(), groups.int())
        if config["checkpoint_format"] == "gptq":
            to_v1(layer, SimpleNamespace(bits=4, pack_dtype=torch.int32))
        return {key: getattr(layer, key).clone() for key in ("qweight", "qzeros", "scales", "g_idx")}

    check_read(tmp_path, stored_by(weights, config, convert), config, weights)


@pytest.mark.parametrize("name", ["awq", "awq_32"])
def test_autoawq_writes_and_reads(name: str, tmp_path: Path) -> None:
    """AutoAWQ's WQLinear_GEMM packs on a CPU; its dequantize_gemm gives back the numbers in fp16."""
    linear_gemm = library("awq.modules.linear.gemm").WQLinear_GEMM
    unpack = library("awq.utils.packing_utils").dequantize_gemm
    weights, config = layer_of(name)

    def convert(matrix: Encoded) -> dict[str, torch.Tensor]:
        num_rows, num_columns = matrix.shape
        linear = torch.nn.Linear(num_columns, num_rows, bias=False)
        linear.weight.data = decode(matrix).float()
        assert matrix.zeros is not None
        layer = linear_gemm.from_linear(linear, 4, config["group_size"], scales=matrix.scales.mT,
                                        zeros=matrix.zeros.mT.float())
        return {key: getattr(layer, key) for key in ("qweight", "qzeros", "scales")}

    check_read(tmp_path, stored_by(weights, config, convert), config, weights)
    stored = read_format("config", config).store(matrix := weights.w2.at(1))
    read = unpack(stored["qweight"], stored["qzeros"], stored["scales"], 4, config["group_size"])
    assert torch.equal(read.mT, decode(matrix).half())


def test_transformers_quantises_fp8(tmp_path: Path) -> None:
    """transformers' own block quantiser on random weights: what is decoded are its codes times its scales."""
    fp8 = library("transformers.integrations.finegrained_fp8")
    holder = SimpleNamespace(quantization_config=library("transformers").FineGrainedFP8Config())
    config = json.loads(json.dumps(holder.quantization_config.to_dict()))
    weights, _ = layer_of("deepseek_fp8")
    seen: list[dict[str, torch.Tensor]] = []

    def convert(matrix: Encoded) -> dict[str, torch.Tensor]:
        weight = torch.randn(matrix.shape, generator=torch.Generator().manual_seed(len(seen)))
        made = fp8.Fp8Quantize(holder).convert({"m.weight": weight})
        seen.append(made)
        return {key.removeprefix("m."): tensor for key, tensor in made.items()}

    save_file(stored_by(weights, config, convert), tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps({"quantization_config": config}))
    gate_ENK = decode(open_quantised(tmp_path, LAYER, FAMILY, SPEC).w13)[:, 0]
    for e in range(3):
        scales = seen[e]["m.weight_scale_inv"].repeat_interleave(128, 0).repeat_interleave(128, 1)
        assert torch.equal(gate_ENK[e].float(), seen[e]["m.weight"].float() * scales)


def whole_model(folder: Path, config: Any, tensors: dict[str, torch.Tensor], quantisation: dict[str, Any]) -> Any:
    """A tiny random model as transformers saves it, its layers' experts replaced, and read again in fp32."""
    transformers = library("transformers")
    library("accelerate")
    torch.manual_seed(0)
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    modules = {name.rpartition(".mlp.")[0] + ".mlp." for name in tensors}
    plain = {name: tensor for name, tensor in load_file(folder / "model.safetensors").items()
             if not name.startswith(tuple(modules))}
    save_file(plain | tensors, folder / "model.safetensors", metadata={"format": "pt"})
    text = json.loads((folder / "config.json").read_text()) | {"quantization_config": quantisation}
    (folder / "config.json").write_text(json.dumps(text))
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


SMALL = {"vocab_size": 32, "hidden_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
         "num_key_value_heads": 2, "max_position_embeddings": 32}


def test_transformers_reads_deepseek_fp8(tmp_path: Path) -> None:
    """A whole DeepSeek-V3 whose experts store_quantised wrote: from_pretrained decodes the same numbers in fp32."""
    weights, quantisation = layer_of("deepseek_fp8")
    config = library("transformers").DeepseekV3Config(
        **SMALL, moe_intermediate_size=256, n_routed_experts=3, num_experts_per_tok=2, n_shared_experts=1,
        first_k_dense_replace=1, n_group=1, topk_group=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8,
        qk_nope_head_dim=8, v_head_dim=8, intermediate_size=16)
    tensors = store_quantised(weights, LAYER, FAMILY, SPEC, quantisation)
    quantisation = quantisation | {"modules_to_not_convert": ["self_attn", "model.layers.0", "lm_head"]}
    block = whole_model(tmp_path, config, tensors, quantisation).model.layers[1].mlp
    assert torch.equal(block.experts.gate_up_proj, decode(weights.w13).flatten(1, 2).float())
    assert torch.equal(block.experts.down_proj, decode(weights.w2).float())
    assert torch.equal(block.shared_experts.up_proj.weight, decode(weights.shared_w13)[1].float())
    assert_same_weights(open_quantised(tmp_path, LAYER, FAMILY, SPEC), weights)


def test_transformers_reads_gpt_oss(tmp_path: Path) -> None:
    """A whole gpt-oss in mxfp4, gate and up rows taking turns: the same numbers, in its own (in, out)."""
    spec = MoESpec(hidden_size=128, intermediate_size=256, experts=MLP(bias=True, limit=7.0, sigmoid_scale=1.702,
                                                                      up_offset=1.0),
                   router=Router(num_experts=3, top_k=2, logit_bias=True, renormalize=True))
    scheme, quantisation = CONFIGS["gpt_oss_mxfp4"]
    layers = [make_weights(scheme, spec, seed) for seed in (1, 2)]
    config = library("transformers").GptOssConfig(**SMALL, intermediate_size=256, num_local_experts=3,
                                                  num_experts_per_tok=2, head_dim=64)
    tensors = {name: tensor for number, weights in enumerate(layers)
               for name, tensor in store_quantised(weights, number, "gpt_oss", spec, quantisation).items()}
    model = whole_model(tmp_path, config, tensors, quantisation)
    for number, weights in enumerate(layers):
        experts = model.model.layers[number].mlp.experts
        for place in (0, 1):
            assert torch.equal(experts.gate_up_proj[..., place::2].mT, decode(weights.w13)[:, place].float())
            assert torch.equal(experts.gate_up_proj_bias[:, place::2], weights.w13_bias_EGI[:, place].float())
        assert torch.equal(experts.down_proj.mT, decode(weights.w2).float())
        assert_same_weights(open_quantised(tmp_path, number, "gpt_oss", spec), weights)
