"""Training of the tiny video model: codec, flow matching, few-step self-rollout distillation, long tuning."""
