"""Reading the settings back from a finished VllmConfig, in whatever process it arrives."""

from vllm.config import VllmConfig

from triattention_vllm.config import ADDITIONAL_CONFIG_KEY, OFF, Settings


def settings_of(vllm_config: VllmConfig) -> Settings | None:
    """The settings that ``create_engine_config`` wrote, or None where compression is off."""
    additional = vllm_config.additional_config
    if not isinstance(additional, dict) or ADDITIONAL_CONFIG_KEY not in additional:
        return None
    mapping = additional[ADDITIONAL_CONFIG_KEY]
    # Without a method it is the user's own, and compression was not turned on.
    return None if mapping.get("method", OFF) == OFF else Settings.from_mapping(mapping)
