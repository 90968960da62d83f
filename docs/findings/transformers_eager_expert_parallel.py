"""transformers: eager gpt_oss and nemotron_h experts crash under expert parallelism. 0: seen, 1: not, 2: cannot run."""

import os
import sys
import tempfile

try:
    import torch
    import torch.distributed as dist
    import transformers
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.expert_parallel import apply_expert_parallelism
    from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts
    from transformers.models.mixtral.modeling_mixtral import MixtralExperts
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts
except ImportError as error:
    print(f"CANNOT RUN: {error}")
    sys.exit(2)

TOKENS, TOP_K, HIDDEN, INTERMEDIATE, EXPERTS, RANKS = 16, 4, 64, 32, 8, 2
ALLOWED = 1e-5
SIZES = {"hidden_size": HIDDEN, "intermediate_size": INTERMEDIATE, "num_local_experts": EXPERTS}
BLOCKS = {
    "mixtral": (MixtralExperts, transformers.MixtralConfig, SIZES),
    "gpt_oss": (GptOssExperts, transformers.GptOssConfig, SIZES),
    "nemotron_h": (NemotronHExperts, transformers.NemotronHConfig,
                   {"hidden_size": HIDDEN, "moe_intermediate_size": INTERMEDIATE, "n_routed_experts": EXPERTS}),
}


def outcome(name, implementation, schedule, mesh):
    """The error of this rank against the same experts on one rank, or what was raised."""
    cls, config_class, sizes = BLOCKS[name]
    torch.manual_seed(0)
    config = config_class(**sizes)
    config._experts_implementation = "grouped_mm"
    experts = cls(config)
    for parameter in experts.parameters():
        parameter.normal_(std=0.1)
    x, weights = torch.randn(TOKENS, HIDDEN), torch.rand(TOKENS, TOP_K)
    ids = torch.stack([torch.randperm(EXPERTS)[:TOP_K] for _ in range(TOKENS)])
    want = experts(x, ids, weights)
    config._experts_implementation = implementation
    root = torch.nn.Module()
    root.experts = experts
    [prefix] = {key.removesuffix("experts") for key, style in config.base_model_ep_plan.items()
                if style == "ep_dispatch_experts"} if config.base_model_ep_plan else {""}
    plan = {key.removeprefix(prefix): style for key, style in (config.base_model_ep_plan or {}).items()}
    # Parameters before the module that holds them, as from_pretrained does.
    plan = dict(sorted(plan.items(), key=lambda item: -item[0].count(".")))
    try:
        apply_expert_parallelism(root, mesh, mesh, plan, ep_implementation=schedule)
        got = root.experts(x, ids, weights)
    except Exception as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"
    error = float((got - want).abs().max() / want.abs().max())
    return f"right, error {error:.1e}" if error <= ALLOWED else f"wrong, error {error:.1e}"


def rank_main(rank, folder):
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=RANKS)
    mesh = init_device_mesh("cpu", (RANKS,), mesh_dim_names=("ep",))
    lines = []
    with torch.no_grad():
        for name in BLOCKS:
            for implementation in ("grouped_mm", "eager"):
                for schedule in ("auto", "all_reduce", "all_to_all"):
                    said = outcome(name, implementation, schedule, mesh)
                    lines.append(f"{name:10s} {implementation:10s} {schedule:10s} {said}")
                    dist.barrier()
    with open(os.path.join(folder, f"rank{rank}"), "w") as file:
        file.write("\n".join(lines))
    dist.destroy_process_group()


def main() -> int:
    print(f"transformers {transformers.__version__}, torch {torch.__version__}, {RANKS} gloo ranks, on rank 0:")
    with tempfile.TemporaryDirectory() as folder:
        # fork: both ranks share the modules that this process has read; it has started no threads.
        torch.multiprocessing.start_processes(rank_main, (folder,), nprocs=RANKS, start_method="fork")
        with open(os.path.join(folder, "rank0")) as file:
            lines = file.read().splitlines()
    print("\n".join(lines))
    if not all(" right, " in line for line in lines if "mixtral" in line or "grouped_mm" in line):
        raise RuntimeError("what should run raises too: this script does not measure what it says")
    seen = {line.split()[0] for line in lines if " eager " in line and " right, " not in line}
    print(f"SEEN: {', '.join(sorted(seen))}" if seen else "NOT SEEN")
    return 0 if seen else 1


if __name__ == "__main__":
    sys.exit(main())
