"""The three methods without PEFT."""
