"""Times vLLM's server with IA³ adapters beside the base model's server and LoRA's."""
