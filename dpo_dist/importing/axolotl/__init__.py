"""A YAML for Axolotl."""
