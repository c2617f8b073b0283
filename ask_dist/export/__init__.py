"""A finished run for other programs: transformers, safetensors, ONNX; each with a model card."""
