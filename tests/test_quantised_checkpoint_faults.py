"""Protects the refusals of quantised checkpoints: what is wrong is named, with what should be there, before anything is
decoded; and that a rank reads no more than its part."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from moe_ref.checkpoints.files import StoredSlice
from moe_ref.checkpoints.quantised_reader import open_quantised
from moe_ref.checkpoints.quantised_writer import store_quantised
from moe_ref.checkpoints.reader import open_checkpoint
from moe_ref.contract.errors import UsageTypeError, UsageValueError
from moe_ref.contract.parallel import Parallel
from moe_ref.contract.spec import MoESpec, Router
from tests.distinct_encoded import make_weights
from tests.quantised_configs import AWQ, CONFIGS, FLOAT4, FLOAT8, FP8, GPTQ, INT4, MXFP4, TOKEN, compressed
from tests.test_quantised_checkpoints import LAYER, family_of, write

MLP_NAME = f"model.layers.{LAYER}.mlp."
GATE, DOWN = f"{MLP_NAME}experts.1.gate_proj.", f"{MLP_NAME}experts.1.down_proj."
Change = Callable[[dict[str, torch.Tensor]], None]


def saved(folder: Path, name: str, change: Change = lambda tensors: None,
          config: dict[str, Any] | None = None) -> tuple[Path, str, MoESpec]:
    """A checkpoint in a format, its tensors changed and perhaps another configuration beside it."""
    scheme, usual = CONFIGS[name]
    family, spec = family_of(name)
    tensors = store_quantised(make_weights(scheme, spec), LAYER, family, spec, usual)
    change(tensors)
    return write(folder, tensors, usual if config is None else config), family, spec


def fault(folder: Path, name: str, change: Change = lambda tensors: None, config: dict[str, Any] | None = None) -> str:
    """What opening it says."""
    path, family, spec = saved(folder, name, change, config)
    with pytest.raises(UsageValueError) as caught:
        open_quantised(path, LAYER, family, spec)
    return str(caught.value)


def without(*names: str) -> Change:
    """These tensors are not there."""
    return lambda tensors: [tensors.pop(name) for name in names] and None


def with_one(name: str, tensor: torch.Tensor) -> Change:
    """One tensor is another one, or added."""
    return lambda tensors: tensors.update({name: tensor})


STORED: dict[str, tuple[str, Change, tuple[str, ...]]] = {
    "a missing scale": ("deepseek_fp8", without(f"{GATE}weight_scale_inv", f"{DOWN}weight_scale_inv"), (
        f"{GATE}weight_scale_inv is missing", f"{DOWN}weight_scale_inv is missing")),
    "blocks in the other order": ("deepseek_fp8", with_one(f"{GATE}weight_scale_inv", torch.ones(2, 3)), (
        f"{GATE}weight_scale_inv: shape (2, 3), but should be (3, 2)",)),
    "one scale for all rows": ("fp8_channel", with_one(f"{GATE}weight_scale", torch.ones(1)), (
        f"{GATE}weight_scale: shape (1,), but should be (288, 1)",)),
    "a plain expert": ("deepseek_fp8", with_one(f"{GATE}weight", torch.ones(288, 160).bfloat16()), (
        f"{GATE}weight: stored as BF16, but should be F8_E4M3; a plain tensor, but format fp8 has codes",)),
    "a plain expert beside packed ones": ("gptq", lambda tensors: (without(f"{DOWN}qweight")(tensors), with_one(
        f"{DOWN}weight", torch.ones(160, 288))(tensors))[0], (
        f"{DOWN}qweight is missing", f"{DOWN}weight (F32) is there")),
    "codes of another dtype": ("int8", with_one(f"{GATE}weight", torch.ones(288, 160).to(torch.float8_e4m3fn)), (
        f"{GATE}weight: stored as F8_E4M3, but should be I8",)),
    "scales of two dtypes": ("gptq", with_one(f"{GATE}scales", torch.ones(2, 288).bfloat16()), (
        f"{GATE}scales: stored as BF16, but should be F16 as {MLP_NAME}experts.0.gate_proj.scales",)),
    "scales of another dtype": ("awq", with_one(f"{GATE}scales", torch.ones(2, 288)), (
        f"{GATE}scales: stored as F32, but should be F16 or BF16",)),
    "an encoded router": ("deepseek_fp8", with_one(f"{MLP_NAME}gate.weight", torch.ones(3, 160).to(
        torch.float8_e4m3fn)), (f"{MLP_NAME}gate.weight: stored as F8_E4M3, but should be one of F64",)),
    "a scale of the router": ("deepseek_fp8", with_one(f"{MLP_NAME}gate.weight_scale_inv", torch.ones(1, 2)), (
        f"{MLP_NAME}gate.weight_scale_inv (F32) is there",)),
    "two input scales": ("fp8_tensor", with_one(f"{GATE}input_scale", torch.tensor([7.0])), (
        f"{GATE}input_scale: 7, {MLP_NAME}experts.1.up_proj.input_scale:", "gate and up take the same rows")),
    "a shape that is not the matrix's": ("int4", with_one(f"{GATE}weight_shape", torch.tensor([288, 152])), (
        f"{GATE}weight_shape: [288, 152], but should be [288, 160]",)),
    "columns out of order": ("gptq", with_one(f"{GATE}g_idx", torch.arange(160, dtype=torch.int32) % 2), (
        f"{GATE[:-1]}: g_idx: columns in another order than runs of 128, but desc_act is false",)),
    "a group that is not there": ("gptq_order", with_one(f"{DOWN}g_idx", torch.full((288,), 3, dtype=torch.int32)), (
        f"{DOWN[:-1]}: g_idx: groups 3 to 3, but should be in [0, 3)",)),
    "zero points where there should be none": ("gptq", with_one(
        f"{GATE}qzeros", torch.full((2, 36), 0x66666666, dtype=torch.int32)), (
        f"{GATE[:-1]}: qzeros: zero point 7, but should be 8 everywhere with sym=True",)),
    "a second scale of nought": ("nvfp4", with_one(f"{DOWN}weight_global_scale", torch.zeros(1)), (
        f"{DOWN[:-1]}: weight_global_scale: [0.0], but should be finite and above 0: it divides",)),
    "gate and up apart": ("gpt_oss_mxfp4", with_one(
        f"{MLP_NAME}experts.gate_up_proj_scales", torch.ones(3, 288, 5, dtype=torch.uint8)), (
        "gate_up_proj_scales: shape (3, 288, 5), but should be (3, 576, 5)",)),
    "a bias that is packed": ("gpt_oss_mxfp4", with_one(
        f"{MLP_NAME}experts.down_proj_bias", torch.ones(3, 160, dtype=torch.uint8)), (
        "down_proj_bias: stored as U8, but should be one of F64",)),
}


@pytest.mark.parametrize("name", STORED)
def test_stored_tensors_that_do_not_fit(name: str, tmp_path: Path) -> None:
    """One tensor of one expert among twelve is wrong; it is named."""
    stored_format, change, words = STORED[name]
    said = fault(tmp_path, stored_format, change)
    for one in words:
        assert one in said


def test_all_faults_at_once(tmp_path: Path) -> None:
    """A missing scale and a wrong shape, of experts that one rank of two does not host, on both ranks."""
    def change(tensors: dict[str, torch.Tensor]) -> None:
        without(f"{MLP_NAME}experts.0.up_proj.weight_scale_inv")(tensors)
        with_one(f"{MLP_NAME}experts.2.up_proj.weight_scale_inv", torch.ones(1, 1))(tensors)

    path, family, spec = saved(tmp_path, "deepseek_fp8", change)
    for rank in (0, 1):
        with pytest.raises(UsageValueError, match=r"experts.0.up_proj.weight_scale_inv is missing.*experts.2.up_proj."
                                                  r"weight_scale_inv: shape \(1, 1\), but should be \(3, 2\)"):
            open_quantised(path, LAYER, family, spec, Parallel(ep=2), rank)


CONFIGURED: dict[str, tuple[str, dict[str, Any], str]] = {
    "an unknown method": ("awq", {"quant_method": "bitsandbytes"}, "quant_method='bitsandbytes', but should be one of "
                          "fp8, compressed-tensors, gptq, awq, mxfp4"),
    "no method": ("awq", {"bits": 4}, "quant_method=None, but should be one of"),
    "other blocks": ("deepseek_fp8", FP8 | {"weight_block_size": [64, 128]},
                     "weight_block_size=[64, 128], but should be [128, 128]"),
    "groups without a scheme": ("gptq", GPTQ | {"group_size": 64}, "group_size=64, but should be 128 or 32"),
    "three bits": ("gptq", GPTQ | {"bits": 3}, "bits=3, but should be 4"),
    "act-order with zero points": ("gptq", GPTQ | {"sym": False, "desc_act": True},
                                   "sym=False and desc_act=True, but act-order is known with sym=True alone"),
    "another version of awq": ("awq", AWQ | {"version": "gemv"}, "version='gemv', but should be 'gemm'"),
    "groups of modules": ("int4", compressed("pack-quantized", INT4) | {"config_groups": {"a": {}, "b": {}}},
                          "2 config_groups, but should be 1"),
    "sparse": ("int8", compressed("marlin-24", INT4), "format marlin-24, but should be float-quantized"),
    "int4 by rows": ("int4", compressed("pack-quantized", INT4 | {"strategy": "channel"}),
                     "strategy='channel', but should be 'group'"),
    "nvfp4 in groups of 32": ("nvfp4", compressed("nvfp4-pack-quantized", FLOAT4 | {"group_size": 32}),
                              "group_size=32, but should be 16"),
    "one scale, rows by themselves": (
        "fp8_tensor", compressed("float-quantized", FLOAT8 | {"strategy": "tensor"}, TOKEN),
        "dynamic=True, but should be False or None"),
    "the routed experts left out": (
        "deepseek_fp8", FP8 | {"modules_to_not_convert": [f"model.layers.{LAYER}.mlp.experts"]},
        "experts.{0-2}.gate_proj. is left out by the configuration"),
    "the shared expert left out": ("awq", AWQ | {"modules_to_not_convert": ["shared_experts"]},
                                   "mlp.shared_experts.down_proj. is left out by the configuration, but all matrices "
                                   "of a layer should be encoded in one format"),
    "one expert left out by a pattern": ("int4", CONFIGS["int4"][1] | {"ignore": ["re:.*experts[.]2[.]up_proj"]},
                                         "experts.2.up_proj. is left out"),
    "left out by a rule": ("gptq", GPTQ | {"dynamic": {r"-:.*experts\.0\..*": {}}}, "experts.0.down_proj. is left out"),
    "gpt-oss's experts left out": ("gpt_oss_mxfp4", MXFP4 | {"modules_to_not_convert": ["model.layers.*.mlp"]},
                                   "mlp.experts.gate_up_proj. is left out"),
}


@pytest.mark.parametrize("name", CONFIGURED)
def test_configurations_that_are_not_known(name: str, tmp_path: Path) -> None:
    """A value that is not known is refused, since its tensors may look the same."""
    stored_format, config, words = CONFIGURED[name]
    assert words in fault(tmp_path, stored_format, config=config)


def test_a_router_that_is_left_out_is_as_usual(tmp_path: Path) -> None:
    """Every released configuration leaves out router, attention and head, each tool by rules of its own."""
    for name in ("deepseek_fp8", "awq", "gptq", "int4", "gpt_oss_mxfp4"):
        key = {"int4": "ignore", "gptq": "dynamic"}.get(name, "modules_to_not_convert")
        listed: Any = {"deepseek_fp8": [f"{MLP_NAME}gate", "self_attn", "lm_head"], "awq": ["gate.", "self_attn"],
                       "gptq": {r"-:.*mlp\.gate$": {}, r"+:.*self_attn.*": {"bits": 8}},
                       "int4": ["re:.*mlp.gate$", "lm_head"], "gpt_oss_mxfp4": ["model.layers.*.mlp.router"]}[name]
        folder = tmp_path / name
        folder.mkdir()
        path, family, spec = saved(folder, name, config=CONFIGS[name][1] | {key: listed})
        assert open_quantised(path, LAYER, family, spec).num_experts == 3


def test_plain_and_quantised_have_a_reader_each(tmp_path: Path) -> None:
    """Each refuses the other's checkpoints and says which reads them."""
    path, family, spec = saved(tmp_path, "deepseek_fp8")
    with pytest.raises(UsageValueError, match=r"stored as F8_E4M3, but should be one of .*open_quantised"):
        open_checkpoint(path, LAYER, family, spec)
    (path / "config.json").write_text("{}")
    with pytest.raises(UsageValueError, match="no quantization_config; plain checkpoints are read by open_checkpoint"):
        open_quantised(path, LAYER, family, spec)
    (path / "config.json").unlink()
    with pytest.raises(UsageValueError, match=r"config.json: cannot be read"):
        open_quantised(path, LAYER, family, spec)


def test_a_multimodal_configuration(tmp_path: Path) -> None:
    """quantization_config may stand in text_config."""
    path, family, spec = saved(tmp_path, "awq")
    (path / "config.json").write_text(json.dumps({"text_config": {"quantization_config": CONFIGS["awq"][1]}}))
    assert open_quantised(path, LAYER, family, spec).num_experts == 3


def test_scales_of_16_bits_and_of_e8m0_are_widened(tmp_path: Path) -> None:
    """Qwen3 stores block scales in bf16, DeepSeek-V3.1 powers of two: fp32 has them all, so no number changes."""
    scales = torch.tensor([[0.5, 2**-9], [4.0, 0.25], [1.0, 2.0]])
    for number, dtype in enumerate((torch.bfloat16, torch.float8_e8m0fnu)):
        folder = tmp_path / str(number)
        folder.mkdir()

        def change(tensors: dict[str, torch.Tensor], dtype: torch.dtype = dtype) -> None:
            for name in [name for name in tensors if name.endswith("scale_inv")]:
                tensors[name] = torch.ones(tensors[name].shape, dtype=dtype)
            tensors[f"{GATE}weight_scale_inv"] = scales.to(dtype)

        path, family, spec = saved(folder, "deepseek_fp8", change)
        assert torch.equal(open_quantised(path, LAYER, family, spec).w13.scales[1, 0], scales)


def test_a_zero_point_that_format_gptq_does_not_have(tmp_path: Path) -> None:
    """It stores one less: 0 would be -1, and what is stored as 15 is 0 to some readers and 16 to others."""
    words = torch.full((2, 36), -1, dtype=torch.int32)
    assert "qzeros: 15 is stored" in fault(tmp_path, "gptq_zeros", with_one(f"{GATE}qzeros", words))
    scheme, config = CONFIGS["gptq_zeros"]
    family, spec = family_of("gptq_zeros")
    weights = make_weights(scheme, spec)
    weights.w2.zeros[0, 0, 0] = 0
    with pytest.raises(UsageValueError, match="zero point 0, but format gptq has 1 to 15"):
        store_quantised(weights, LAYER, family, spec, config)
    tensors = store_quantised(weights, LAYER, family, spec, config | {"checkpoint_format": "gptq_v2"})
    write(tmp_path, tensors, config | {"checkpoint_format": "gptq_v2"})
    assert open_quantised(tmp_path, LAYER, family, spec).w2.zeros[0, 0, 0] == 0


def test_a_second_scale_that_is_no_reciprocal() -> None:
    """nvfp4 stores its reciprocal, and not every fp32 number is one; the writer says so and changes nothing."""
    scheme, config = CONFIGS["nvfp4"]
    family, spec = family_of("nvfp4")
    weights = make_weights(scheme, spec)
    weights.w2.second_scale[1] = 2 - 2**-23
    with pytest.raises(UsageValueError, match="no fp32 number has this reciprocal"):
        store_quantised(weights, LAYER, family, spec, config)


def test_weights_of_another_scheme_are_not_written() -> None:
    """The configuration says what is stored."""
    family, spec = family_of("awq")
    with pytest.raises(UsageTypeError, match="scheme gptq, but should be awq as the config says"):
        store_quantised(make_weights(CONFIGS["gptq"][0], spec), LAYER, family, spec, CONFIGS["awq"][1])


def test_sizes_that_words_do_not_hold(tmp_path: Path) -> None:
    """Eight codes to a word, no partial ones in GPTQ and AWQ."""
    spec = MoESpec(hidden_size=20, intermediate_size=24, router=Router(num_experts=3, top_k=2))
    write(tmp_path, {f"{MLP_NAME}gate.weight": torch.zeros(3, 20)}, GPTQ)
    with pytest.raises(UsageValueError, match="gate_proj: 20 columns, but should be a multiple of 8 in format gptq"):
        open_quantised(tmp_path, LAYER, "deepseek_v3", spec)


def test_a_naming_without_a_known_order(tmp_path: Path) -> None:
    """Llama 4 stores its bf16 experts (in, out) in one tensor; how a tool quantises that is not guessed."""
    spec = MoESpec(hidden_size=160, intermediate_size=288, router=Router(num_experts=3, top_k=2))
    write(tmp_path, {"model.layers.2.feed_forward.router.weight": torch.zeros(3, 160)}, FP8)
    with pytest.raises(UsageValueError, match=r"naming llama4 stores \(in, out\) or folded, but format fp8"):
        open_quantised(tmp_path, LAYER, "llama4_text", spec)


READ = {
    "deepseek_fp8": {"gate_proj.weight": 160 * 160, "gate_proj.weight_scale_inv": 2 * 2,
                     "down_proj.weight": 160 * 160, "down_proj.weight_scale_inv": 2 * 2},
    "gptq_order": {"gate_proj.qweight": 144 * 20, "gate_proj.scales": 144 * 2, "gate_proj.qzeros": 18 * 2,
                   "gate_proj.g_idx": 160, "down_proj.qweight": 160 * 18, "down_proj.scales": 160 * 3,
                   "down_proj.qzeros": 20 * 3, "down_proj.g_idx": 144},
    "awq": {"gate_proj.qweight": 18 * 160, "gate_proj.scales": 144 * 2, "gate_proj.qzeros": 18 * 2,
            "down_proj.qweight": 20 * 160, "down_proj.scales": 160 * 2, "down_proj.qzeros": 20 * 2},
    "gpt_oss_mxfp4": {"gate_up_proj_blocks": 288 * 80, "gate_up_proj_scales": 288 * 5, "gate_up_proj_bias": 288,
                      "down_proj_blocks": 160 * 80, "down_proj_scales": 160 * 5, "down_proj_bias": 160},
}
"""Elements of expert 2's tensors that the rank reads: rows and columns 144 to 288, from 128 where blocks are cut in
their midst, also in blocks of 32; of down_proj under act-order the scales of all three groups."""


@pytest.mark.parametrize("name", READ)
def test_a_rank_reads_its_slices_alone(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 3 of ep 2 times tp 2 hosts the last of three experts and half of its columns: of the others nothing."""
    path, family, spec = saved(tmp_path, name)
    read: dict[str, int] = {}
    init, plain = StoredSlice.__init__, StoredSlice.__getitem__

    def named(self: Any, handle: Any, name: str) -> None:
        init(self, handle, name)
        self.name = name

    def counted(self: Any, index: Any) -> torch.Tensor:
        tensor = plain(self, index)
        read[self.name] = read.get(self.name, 0) + tensor.numel()
        return tensor

    monkeypatch.setattr(StoredSlice, "__init__", named)
    monkeypatch.setattr(StoredSlice, "__getitem__", counted)
    open_quantised(path, LAYER, family, spec, Parallel(ep=2, tp=2, shared="replicated"), 3)
    start = f"{MLP_NAME}experts." + ("" if name == "gpt_oss_mxfp4" else "2.")
    experts = {key.removeprefix(start): count for key, count in read.items() if ".experts." in key}
    assert {key: count for key, count in experts.items() if not key.startswith("up_proj.")} == READ[name]


def test_a_file_of_one_layer_saved_by_hand(tmp_path: Path) -> None:
    """The path may be that of the file; config.json lies beside it."""
    path, family, spec = saved(tmp_path, "int8")
    (path / "model.safetensors").rename(path / "layer.safetensors")
    assert open_quantised(path / "layer.safetensors", LAYER, family, spec).num_experts == 3
    save_file(load_file(path / "layer.safetensors"), path / "other.safetensors")
    assert open_quantised(path / "other.safetensors", LAYER, family, spec).num_experts == 3
