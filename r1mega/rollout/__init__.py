"""Generation: the engine protocol, the engines, and asking many prompts many times over all ranks."""
