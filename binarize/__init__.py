"""1-bit networks: sign, layers, attention, the stages that lead there, and what they cost."""
