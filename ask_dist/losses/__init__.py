"""The training objective: contrastive loss, knowledge injection, reliability weights. Pure torch."""
