"""A YAML for LlamaFactory."""
