"""Rewards: plain classes called once per rollout; one file and one YAML each."""
