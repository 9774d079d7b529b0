"""From checkpoint to bundle, and the proof that the bundle computes what the checkpoint computes."""
