"""Helios as a service on Ray Serve. ARCHITECTURE.md follows one video through it."""
