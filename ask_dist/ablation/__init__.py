"""Arms against baselines over seeds: what each part of the method is worth, measured on one machine."""
