"""Inference engines made to serve IA³ adapters: vLLM's plugin, and the command that starts its server.

An engine's own names are imported in its folder only. It may import all of ia3rt; nothing but `cli` imports it.
"""
