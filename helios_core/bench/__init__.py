"""`helios bench`: how fast each part is, against what the machine can do and against diffusers.

It needs torch, triton, numpy, einops and safetensors alone, and by default makes its weights itself, so that one
command on a bare machine is enough: `python -m helios_core.bench`.

- `command.py`: the options, the sections in their order, what is written
- `subject.py`: what is measured, and how many operations each part of it takes
- `sections.py`: what is measured of it, one function a section
- `compare.py`: the same against diffusers, with the same weights
- `measure.py`: clocks, counts, what the GPU says of itself
- `report.py`: rows as a table and as JSON
"""

from helios_core.bench.command import main as main
