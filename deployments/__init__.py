"""Helios as a service on Ray Serve: the only importer of ray and fastapi. ARCHITECTURE.md follows one video through it."""
