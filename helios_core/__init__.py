"""Helios 14B, the model: text, transformer, sampling, VAE and media, with no server in it.

Importing this package costs nothing: torch comes in with the modules that compute
(`from helios_core.helios import Helios`), so that the control plane can read configurations without it.
"""
