"""A YAML for TRL's dpo script, or of the alignment-handbook."""
