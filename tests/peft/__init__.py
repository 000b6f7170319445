"""The PEFT adapters, on tiny real architectures."""
