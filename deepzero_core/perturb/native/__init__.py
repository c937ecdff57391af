"""Compiled kernels for what the engine spends its time on: convolutions and the chain behind them, on the CPU."""
