"""Policy gradients: GRPO, whatever the actions are."""
