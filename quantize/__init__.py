"""Networks of few bits: quantizers, quantized convolutions and their reconstruction, who gets how many bits, what it weighs."""
