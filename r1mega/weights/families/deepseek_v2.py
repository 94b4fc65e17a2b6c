"""DeepSeek-V2 and V2-Lite (arXiv 2405.04434): V3's tensors without the router's expert bias and without multi-token prediction."""

from r1mega.weights.architecture import Architecture, Moe
from r1mega.weights.families.config import Config, choice, expect, flag, integer, number
from r1mega.weights.families.deepseek_v3 import latent_attention_moe
from r1mega.weights.families.deepseek_v3 import table as table


def architecture(config: Config) -> Architecture:
    """Read a `DeepseekV2ForCausalLM` config.json."""
    expect(config, scoring_func="softmax")
    grouped = choice(config, "topk_method", ("greedy", "group_limited_greedy"), "greedy") == "group_limited_greedy"
    moe = Moe(
        experts=integer(config, "n_routed_experts"),
        shared_experts=integer(config, "n_shared_experts", least=0),
        top_k=integer(config, "num_experts_per_tok"),
        intermediate_size=integer(config, "moe_intermediate_size"),
        first_dense_layers=integer(config, "first_k_dense_replace", least=0),
        groups=integer(config, "n_group") if grouped else 1,
        top_groups=integer(config, "topk_group") if grouped else 1,
        scoring="softmax",
        normalize=flag(config, "norm_topk_prob", False),
        scaling=number(config, "routed_scaling_factor", default=1.0),
        expert_bias=False,
    )
    return latent_attention_moe("deepseek_v2", config, moe, mtp_layers=0)
